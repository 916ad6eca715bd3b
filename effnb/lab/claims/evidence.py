"""A measured value with its interval, and what it says about a registered part of a claim."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from effnb.lab.claims.intervals import CONFIDENCE, crossed, student_point, student_tail
from effnb.lab.claims.registry import Part

SHOWN, CONTRADICTED, UNDECIDED = "shown", "contradicted", "undecided"
CONSTRUCTION, CONTEXT, NOT_TESTED = "by construction", "for comparison", "not tested"
LEAST_SEEDS = 5
"""Where calibration or training is involved, fewer seeds decide nothing."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """An estimate with its uncertainty; logarithms where the part is a ratio.

    Attributes:
        label: The two that are compared, where a part compares several groups; else "".
        estimate: The mean difference.
        error: Its standard error; 0 where nothing was measured.
        freedom: Its degrees of freedom.
    """

    label: str
    estimate: float
    error: float
    freedom: float

    def ends(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """The interval that holds the truth in a fraction `confidence` of all measurements."""
        if self.error == 0:
            return self.estimate, self.estimate
        reach = student_point(confidence, self.freedom) * self.error
        return self.estimate - reach, self.estimate + reach

    def tail(self, threshold: float) -> float:
        """Two-sided p-value for lying above the threshold; near 2 where it lies far below."""
        return 2 * student_tail((self.estimate - threshold) / self.error, self.freedom)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was measured for one registered part.

    Make one with `compared`, `differences`, `counted` or `untested`; `judge` does so from stored
    rows.

    Attributes:
        part: The registered part.
        contrasts: One estimate, or one for every pair of groups; empty for an untested part.
        seeds: Number of seeds.
        documents: Number of documents, questions or repeated timings.
        date: The day of the measurement, as 2026-01-31, or "".
        why: Why the part was not tested, or "".
        adjusted: Holm's p-value over all parts of the claim; the part's own until `judge` sets it.
    """

    part: Part
    contrasts: tuple[Contrast, ...] = ()
    seeds: int = 0
    documents: int = 0
    date: str = ""
    why: str = ""
    adjusted: float | None = None

    # ------------------------------------------------------------------------------- decisions

    def _p_values(self) -> tuple[float, float]:
        """Two-sided p-values for "shown" and for "contradicted"."""
        part = self.part
        low, high = (_scaled(part, sign) for sign in (-1, 1))
        if part.expect == "higher":
            tail = self.contrasts[0].tail(high)
            return tail, 2 - tail
        if part.expect == "lower":
            tail = self.contrasts[0].tail(low)
            return 2 - tail, tail
        inside = [max(c.tail(low), 2 - c.tail(high)) for c in self.contrasts]
        outside = [min(c.tail(high), 2 - c.tail(low)) for c in self.contrasts]
        if part.expect == "equal":
            return inside[0], outside[0]
        return min(1.0, len(outside) * min(outside)), max(inside)

    @property
    def p_value(self) -> float | None:
        """The part's own p-value for whichever decision it points at; None if it makes none."""
        if not self.part.tested or self.why:
            return None
        return min(1.0, *self._p_values())

    @property
    def outcome(self) -> str:
        """What this part says: shown, contradicted, undecided, or that it does not count."""
        if not self.part.tested:
            return CONSTRUCTION if self.part.role == "construction" else CONTEXT
        if self.why:
            return NOT_TESTED
        decided = self.p_value if self.adjusted is None else self.adjusted
        if decided > 1 - CONFIDENCE:
            return UNDECIDED
        shown, contradicted = self._p_values()
        return SHOWN if shown < contradicted else CONTRADICTED

    @property
    def post_hoc(self) -> bool:
        """Whether the measurement is older than the registration of its bound."""
        return self.p_value is not None and self.date < self.part.registered

    # ----------------------------------------------------------------------------------- words

    @property
    def leading(self) -> Contrast | None:
        """The estimate that is printed: of several pairs, the one that differs most surely."""
        if not self.contrasts:
            return None
        return max(self.contrasts, key=lambda c: abs(c.estimate) / c.error if c.error else 0.0)

    def numbers(self) -> tuple[float, float, float] | None:
        """The estimate and its 95 % interval in the part's unit; all pairs at once if several."""
        if self.leading is None:
            return None
        confidence = 1 - (1 - CONFIDENCE) / len(self.contrasts)
        found = (self.leading.estimate, *self.leading.ends(confidence))
        return tuple(math.exp(x) for x in found) if self.part.ratio else found

    def basis(self) -> str:
        """What the number rests on: seeds, documents, or the formula."""
        if self.why:
            return self.why
        if self.part.role == "construction":
            return "counted, not measured: it does not count as evidence"
        of = _repeated(self.part)
        counts = [
            f"{count} {name}"
            for count, name in ((self.seeds, "seeds"), (self.documents, of))
            if count > 1
        ]
        own = ", beside the claim" if self.part.role == "beside" else ""
        p = own if self.adjusted is None else f", adjusted p {_p_words(self.adjusted)}"
        return f"{' × '.join(counts)}, 95 % interval{p}"

    def measured(self) -> str:
        """The number with its interval."""
        numbers = self.numbers()
        if numbers is None:
            return "not measured"
        estimate, low, high = numbers
        if self.part.role == "construction":
            return f"{estimate:.3g}"
        return f"{estimate:.3g} [{low:.3g}, {high:.3g}]"

    def what(self) -> str:
        """What was compared, and on which model."""
        label = f" ({self.leading.label})" if self.leading and self.leading.label else ""
        return f"{self.part.what}, {self.part.model}{label}"

    def __str__(self) -> str:
        """What was measured, its interval, and what that says."""
        return (
            f"{self.what()}: {self.measured()}; {self.part.expected()}: {self.outcome} "
            f"({self.basis()})"
        )

    def turning_point(self) -> str:
        """What would have changed this part's outcome: the words after "if"."""
        part, numbers = self.part, self.numbers()
        if self.why or numbers is None:
            return f"“{part.what}” were measured ({self.why})"
        low, high = (_scaled(part, sign) for sign in (-1, 1))
        words = [f"{math.exp(x) if part.ratio else x:.3g}" for x in (low, high)]
        if self.outcome == UNDECIDED:
            return f"the interval of “{part.what}” were about {self._narrower()} as wide"
        now = f"(it is {numbers[0]:.3g})"
        if part.expect in ("higher", "lower"):
            side = "above" if (part.expect == "higher") != (self.outcome == SHOWN) else "below"
            edge = words[1] if part.expect == "higher" else words[0]
            return f"“{part.what}” were {side} {edge} {now}"
        inside = (part.expect == "differ") == (self.outcome == SHOWN)
        where = "between" if inside else "outside of"
        return f"“{part.what}” were {where} {words[0]} and {words[1]} {now}"

    def _narrower(self) -> str:
        """The part of its width that an undecided interval may have to decide."""
        part = self.part
        one = self.leading
        edges = {"higher": (1,), "lower": (-1,)}.get(part.expect, (-1, 1))
        distance = min(abs(one.estimate - _scaled(part, sign)) for sign in edges)
        half = one.ends()[1] - one.estimate
        return f"{max(0.01, min(0.9, distance / half)):.0%}"

    def adjusted_to(self, p_value: float) -> Evidence:
        """The same evidence with Holm's p-value."""
        return replace(self, adjusted=p_value)


def _scaled(part: Part, sign: int) -> float:
    """The bound moved by the margin, up (1) or down (-1); a logarithm for a ratio."""
    if part.ratio:
        return math.log(part.bound) + sign * math.log1p(part.margin)
    return part.bound + sign * part.margin


def _p_words(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


# --------------------------------------------------------------------------- making evidence


def untested(part: Part, why: str) -> Evidence:
    """A part that was not tested, and why; its claim cannot hold.

    Raises:
        ValueError: When no reason is given.
    """
    if not why.strip():
        raise ValueError(f"the part {part.name} of {part.claim} was not tested: say why.")
    return Evidence(part, why=why)


def counted(part: Part, value: float, *, date: str = "") -> Evidence:
    """A number that is true by construction: a size formula, counted operations.

    Raises:
        ValueError: When the part is registered as a measurement, or contradicts its own formula.
    """
    name = f"the part {part.name} of {part.claim}"
    if part.role != "construction":
        raise ValueError(f"{name} is registered as {part.role}: one counted value cannot judge it.")
    if part.expect == "higher" and value <= part.bound:
        raise ValueError(f"{name} is {value:.3g}, and should exceed {part.bound:.3g}.")
    if part.expect == "lower" and value >= part.bound:
        raise ValueError(f"{name} is {value:.3g}, and should stay below {part.bound:.3g}.")
    shown = math.log(value) if part.ratio else value
    return Evidence(part, (Contrast("", shown, 0.0, 1.0),), date=date)


def compared(
    part: Part,
    method: np.ndarray | Sequence[Sequence[float]],
    baseline: np.ndarray | Sequence[Sequence[float]] | None = None,
    *,
    date: str = "",
) -> Evidence:
    """Evidence from a table of seeds and documents, with the method and without.

    Args:
        part: The registered part.
        method: Measurements [seeds, documents]; repeated timings are one row.
        baseline: The same documents and seeds with the baseline; None to compare the method's
            values with the bound. A side that no seed changes is one row.
        date: The day of the measurement.

    Raises:
        ValueError: When the two do not pair up, a number is not finite, a ratio meets one that is
            not above 0, or all measurements agree exactly.
    """
    name = f"the part {part.name} of {part.claim}"
    if part.role == "construction":
        raise ValueError(f"{name} is registered as true by construction; it is counted.")
    table = _difference(part, name, method, baseline)
    short = _too_few(part, table.shape)
    if short:
        return untested(part, short)
    return Evidence(part, (_contrast(name, [table]),), *table.shape, date=date)


def differences(
    part: Part,
    groups: Mapping[str, tuple[np.ndarray, np.ndarray | None]],
    *,
    date: str = "",
) -> Evidence:
    """Evidence on whether groups of documents differ: every pair, at once.

    The two that lie farthest apart differ in any sample. So no pair is picked: "shown" needs a
    pair that differs although all pairs were looked at (Bonferroni), and "contradicted" needs all
    pairs to agree within the margin.

    Args:
        part: The registered part; it names the groups.
        groups: For each, the tables of the method and of the baseline, as `compared` takes them.
        date: The day of the measurement.

    Raises:
        ValueError: As `compared`, or when the groups are not those that were registered.
    """
    name = f"the part {part.name} of {part.claim}"
    if tuple(groups) != part.groups:
        raise ValueError(f"{name} compares {', '.join(part.groups)}, not {', '.join(groups)}.")
    tables = {key: _difference(part, name, *pair) for key, pair in groups.items()}
    short = next(filter(None, (_too_few(part, table.shape) for table in tables.values())), "")
    if short:
        return untested(part, short)
    contrasts = tuple(
        _contrast(name, [tables[a], tables[b]], (1.0, -1.0), f"{a} − {b}")
        for a, b in combinations(tables, 2)
    )
    documents = min(table.shape[1] for table in tables.values())
    return Evidence(part, contrasts, next(iter(tables.values())).shape[0], documents, date)


def _difference(part: Part, name: str, method, baseline) -> np.ndarray:
    first = np.atleast_2d(np.asarray(method, dtype=np.float64))
    second = None if baseline is None else np.atleast_2d(np.asarray(baseline, dtype=np.float64))
    if second is not None and (
        first.shape[1] != second.shape[1]
        or (first.shape[0] != second.shape[0] and 1 not in (first.shape[0], second.shape[0]))
    ):
        raise ValueError(
            f"{name}: {first.shape[0]} seeds × {first.shape[1]} measurements of the method do not "
            f"pair up with {second.shape[0]} × {second.shape[1]} of the baseline."
        )
    for table in (first, second):
        if table is not None and not np.isfinite(table).all():
            raise ValueError(f"{name}: a measurement is not a finite number.")
        if table is not None and part.unit in ("times", "per cent") and (table <= 0).any():
            raise ValueError(f"{name}: a ratio needs numbers above 0.")
    if part.ratio:
        return np.log(first) if second is None else np.log(first) - np.log(second)
    if second is None:
        return first
    return 100 * (first / second - 1) if part.unit == "per cent" else first - second


def _repeated(part: Part) -> str:
    """What a row lists: timings where the part compares seconds, else documents."""
    return "timings" if part.ratio and part.value.endswith("seconds") else "documents"


def _too_few(part: Part, shape: tuple[int, int]) -> str:
    seeds, samples = shape
    if seeds < part.seeds:
        return f"it takes {part.seeds} seeds, and {seeds} {'is' if seeds == 1 else 'are'} stored"
    if samples < part.samples:
        of = _repeated(part)
        return f"it takes {part.samples} {of}, and {samples} are stored"
    return ""


def _contrast(
    name: str, tables: list[np.ndarray], signs: tuple[float, ...] = (1.0,), label: str = ""
) -> Contrast:
    estimate, error, freedom = crossed(tables, signs)
    if not error > 1e-12 * max(1.0, abs(float(estimate))):
        raise ValueError(
            f"{name}: all measurements agree exactly, so nothing was measured. What is true by "
            "construction is registered as such."
        )
    return Contrast(label, float(estimate), float(error), float(freedom))
