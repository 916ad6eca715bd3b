"""Knobs: the values that one argument of a panel's `compute` may take."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

Values = dict[str, Any]
"""The position of every knob, by its name."""


@dataclass(frozen=True)
class Knob:
    """The values that one argument of `compute` may take.

    Attributes:
        values: All positions, in the order of the slider or of the list.
        default: Where the knob is at first.
        label: What the control is called on the page; the argument's name when None.
        kind: "integer", "decimal" or "choice".
    """

    values: tuple
    default: Hashable
    label: str | None
    kind: str

    @property
    def step(self) -> float:
        """Distance of two neighbouring positions of a number's knob."""
        return self.values[1] - self.values[0]

    def spread(self, count: int) -> tuple:
        """At most `count` positions, evenly spread, both ends and the default among them."""
        last = len(self.values) - 1
        if last < count:
            return self.values
        chosen = {round(i * last / (count - 1)) for i in range(count)}
        home = self.values.index(self.default)
        if home not in chosen:
            inner = sorted(chosen - {0, last}) or [0]
            chosen.remove(min(inner, key=lambda position: abs(position - home)))
            chosen.add(home)
        return tuple(self.values[i] for i in sorted(chosen))


def knob(
    low: float | Sequence[Hashable],
    high: float | None = None,
    step: float = 1,
    default: Hashable = None,
    label: str | None = None,
) -> Knob:
    """One knob of a panel: a range of numbers, or a list of choices.

    Args:
        low: The first number; or the choices, and then neither `high` nor `step` is given.
        high: The last number. It is reached when it is a whole number of steps away.
        step: Distance between two positions. The knob gives `int`s if all three are `int`s.
        default: Where the knob is at first: the middle of a range, the first choice.
        label: What the control is called on the page; the argument's name if not given.

    Raises:
        ValueError: When there are fewer than two positions, or the default is none of them.
    """
    if isinstance(low, (int, float)) and not isinstance(low, bool):
        if high is None:
            raise ValueError(f"knob({low}) has no end: give knob(low, high) or a list of choices.")
        if step <= 0 or high <= low:
            raise ValueError(
                f"knob({low}, {high}, {step}) has no positions: it needs low < high and step > 0."
            )
        count = int((high - low) / step + 1e-9) + 1
        whole = all(isinstance(number, int) for number in (low, high, step))
        # Ten digits after the first significant one of the step: 0.1 + 0.2 becomes 0.3 again.
        values = tuple(
            low + i * step if whole else float(f"{low + i * step:.10g}") for i in range(count)
        )
        kind = "integer" if whole else "decimal"
        home = values[(count - 1) // 2]
    else:
        values, kind = tuple(low), "choice"
        home = values[0] if values else None
    if len(values) < 2 or len(set(values)) < len(values):
        raise ValueError(f"a knob needs at least two different positions, and has {values}.")
    if default is not None:
        found = match(values, default)
        if not found:
            raise ValueError(f"the default {default!r} is not among the knob's positions {values}.")
        home = found[0]
    return Knob(values, home, label, kind)


def numeric(values: Sequence) -> bool:
    """Whether all of them are numbers; True and False are none."""
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def match(values: Sequence, wanted: object) -> list:
    """The one position that is meant, or none; 0.1 + 0.2 means 0.3."""
    same = [v for v in values if type(v) is type(wanted) and v == wanted]
    if same or not numeric([wanted]):
        return same
    return [v for v in values if numeric([v]) and math.isclose(v, wanted, rel_tol=1e-9)][:1]


def say(value: object) -> str:
    """A knob's value as the page prints it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
