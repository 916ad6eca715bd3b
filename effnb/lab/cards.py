"""The cost card: what a model costs before and after, with the ratio in words."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

_WORDS = {"flops": "FLOPs", "bytes": "Stored"}


@dataclass(frozen=True, slots=True)
class _Unit:
    """How a kind of number is written, and what a smaller or a larger one is called."""

    say: Callable[[float], str]
    less: str
    more: str


def _scaled(value: float, base: int, prefixes: list[str], unit: str) -> str:
    step = 0
    while abs(value) >= base and step < len(prefixes) - 1:
        value, step = value / base, step + 1
    number = f"{value:,.0f}" if step == 0 and float(value).is_integer() else f"{value:.3g}"
    return f"{number} {prefixes[step]}{unit}".rstrip()


def _bytes(value: float) -> str:
    return _scaled(value, 1024, ["", "Ki", "Mi", "Gi", "Ti"], "B")


def _count(value: float) -> str:
    return _scaled(value, 1000, ["", "thousand", "million", "billion", "trillion"], "")


def _seconds(value: float) -> str:
    for scale, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


_UNITS = {  # by how the field's name ends, the longest first
    "tokens_per_second": _Unit(lambda v: f"{v:,.3g} tokens/s", "slower", "faster"),
    "per_second": _Unit(lambda v: f"{_count(v)} per second", "slower", "faster"),
    "seconds": _Unit(_seconds, "faster", "slower"),
    "bytes": _Unit(_bytes, "smaller", "larger"),
    "joules": _Unit(lambda v: f"{v:.3g} J", "less", "more"),
    "": _Unit(_count, "fewer", "more"),
}


def _unit(name: str) -> _Unit:
    return next(unit for ending, unit in _UNITS.items() if name.endswith(ending))


def _title(name: str) -> str:
    """A field's name in words, without its unit: `peak_memory_bytes` becomes "Peak memory"."""
    if name in _WORDS:
        return _WORDS[name]
    for unit in ("_tokens_per_second", "_per_second", "_seconds", "_bytes", "_joules"):
        name = name.removesuffix(unit)
    words = [_WORDS.get(word, word) for word in name.split("_")]
    return " ".join([words[0][0].upper() + words[0][1:], *words[1:]])


def _ratio(before: float, after: float, unit: _Unit) -> str:
    if before == after:
        return "the same"
    if not before or not after:
        return "—"
    factor, word = (before / after, unit.less) if after < before else (after / before, unit.more)
    if factor < 1.01:
        return "about the same"
    return f"{factor:.3g}× {word}" if factor < 100 else f"{factor:,.0f}× {word}"


@dataclass(frozen=True, slots=True)
class CostCard:
    """A table of costs; the last value of a cell shows it.

    Attributes:
        labels: Names of the two columns.
        rows: Title, first value, second value and the ratio, in words.
        note: What holds for both columns, such as the device.
    """

    labels: tuple[str, str]
    rows: tuple[tuple[str, str, str, str], ...]
    note: str

    def __str__(self) -> str:
        """The table as aligned text."""
        table = [("", *self.labels, "ratio"), *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table]
        return "\n".join([*lines, self.note] if self.note else lines)

    def __repr__(self) -> str:
        """The same: a cell of a notebook shows the table."""
        return str(self)

    def _repr_html_(self) -> str:
        cell = 'style="text-align: {}; padding: 5px 18px 5px 0{}"'
        strong = "; font-weight: 600"
        head = "".join(
            f'<th scope="col" {cell.format(side, "")}>{html.escape(word)}</th>'
            for word, side in zip(("", *self.labels, "ratio"), ("left", "right", "right", "left"))
        )
        body = "".join(
            f'<tr><th scope="row" {cell.format("left", "; font-weight: normal")}>'
            f"{html.escape(title)}</th>"
            f"<td {cell.format('right', '')}>{html.escape(first)}</td>"
            f"<td {cell.format('right', '')}>{html.escape(second)}</td>"
            f"<td {cell.format('left', strong)}>{html.escape(ratio)}</td></tr>"
            for title, first, second, ratio in self.rows
        )
        note = f'<p style="opacity: 0.75; font-size: 0.92em">{html.escape(self.note)}</p>'
        return (
            '<table aria-label="What it costs" style="border-collapse: collapse; '
            f'font-variant-numeric: tabular-nums"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table>{note if self.note else ''}"
        )


def cost_card(before: Any, after: Any, labels: tuple[str, str] = ("before", "after")) -> CostCard:
    """The costs of two models side by side, each with the ratio in words.

    Any dataclass will do, such as `effnb.evaluation.cost.Cost`: each field is a row, and its name
    tells the unit (`…_bytes`, `…_seconds`, `…_tokens_per_second`). Text that both share, such as
    the device, becomes a note. A missing number (None) is said to be missing.

    Args:
        before: The first column.
        after: The second column, of the same class.
        labels: What the columns are called.

    Raises:
        TypeError: When the two are not of one class.
    """
    if type(before) is not type(after):
        raise TypeError(
            f"a cost card compares two of a kind, not a {type(before).__name__} with a "
            f"{type(after).__name__}."
        )
    rows, notes = [], []
    for field in fields(before):
        first, second = getattr(before, field.name), getattr(after, field.name)
        title = _title(field.name)
        if isinstance(first, str) or isinstance(second, str):
            if first == second:
                notes.append(f"{title}: {first}.")
            else:
                rows.append((title, str(first), str(second), ""))
            continue
        unit = _unit(field.name)
        said = ["not measured" if v is None else unit.say(v) for v in (first, second)]
        ratio = "—" if None in (first, second) else _ratio(first, second, unit)
        rows.append((title, said[0], said[1], ratio))
    return CostCard(tuple(labels), tuple(rows), " ".join(notes))
