"""The cost card: what a model costs before and after, with the ratio in words."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import Any

from effnb.lab.tables import TABLE_STYLE

_RIGHT = (' class="n"', ' class="n"')
_WORDS = {"flops": "FLOPs", "bytes": "File size"}


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
        head = "".join(
            f'<th scope="col"{kind}>{html.escape(word)}</th>'
            for word, kind in zip(("", *self.labels, "ratio"), ("", *_RIGHT, ""))
        )
        body = "".join(
            f'<tr><th scope="row">{html.escape(title)}</th>'
            f"<td{_RIGHT[0]}>{html.escape(first)}</td><td{_RIGHT[1]}>{html.escape(second)}</td>"
            f"<td><b>{html.escape(ratio)}</b></td></tr>"
            for title, first, second, ratio in self.rows
        )
        words = html.escape(self.note)
        note = f'<p style="opacity: 0.75; font-size: 0.92em">{words}</p>' if words else ""
        return (
            f'{TABLE_STYLE}<table class="effnb-table" aria-label="What it costs">'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"
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


def compare_costs(
    before: Any,
    after: Any,
    prompt: Any,
    *,
    labels: tuple[str, str] = ("before", "after"),
    rounds: int = 7,
    decode_tokens: int = 8,
) -> CostCard:
    """Measure two language models in turns, and give their cost card.

    One round times both models, and every second round begins with the other one: what slows the
    machine down for a while, slows both. A ratio of times is the median of the rounds' own ratios.
    Where these ratios fall on both sides of 1 in more than one round in four, the card says that
    the two are about the same, whatever the medians of the times.

    Args:
        before: The first model.
        after: The second.
        prompt: Token ids of one prompt, of shape (1, time).
        labels: What the columns are called.
        rounds: How often each model is timed, at least 3.
        decode_tokens: Tokens generated in each round.

    Raises:
        ValueError: When there are fewer than three rounds.
    """
    import torch

    from effnb.evaluation import decode_tokens_per_second, latency, measure

    if rounds < 3:
        raise ValueError(f"rounds is {rounds}; medians need at least 3.")
    models = (before, after)
    costs = [measure(model, prompt, decode_tokens=decode_tokens, runs=1) for model in models]
    seconds: list[list[float]] = [[], []]
    rates: list[list[float]] = [[], []]
    for number in range(rounds):
        for i in (0, 1) if number % 2 == 0 else (1, 0):
            model = models[i]
            ids = prompt.to(next(model.parameters()).device)

            def read(model: Any = model, ids: Any = ids) -> None:
                with torch.inference_mode():
                    model(input_ids=ids, use_cache=False)

            seconds[i].append(latency(read, warmup=1, runs=1).median_seconds)
            rates[i].append(decode_tokens_per_second(model, ids, tokens=decode_tokens, runs=1))
    typical = [
        replace(cost, prefill_seconds=median(s), decode_tokens_per_second=median(r))
        for cost, s, r in zip(costs, seconds, rates, strict=True)
    ]
    card = cost_card(*typical, labels=labels)
    timed = {"prefill_seconds": seconds, "decode_tokens_per_second": rates}
    words = {_title(name): _ratio_of_rounds(*values, _unit(name)) for name, values in timed.items()}
    rows = tuple((t, a, b, words.get(t, ratio)) for t, a, b, ratio in card.rows)
    note = f"{card.note} Times: medians of {rounds} rounds, both models in turns.".strip()
    return CostCard(card.labels, rows, note)


def _ratio_of_rounds(before: list[float], after: list[float], unit: _Unit) -> str:
    """The median of the rounds' ratios in words; or that they do not agree which is larger."""
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    larger = sum(ratio > 1 for ratio in ratios) / len(ratios)
    if 0.25 < larger < 0.75:
        return "about the same"
    return _ratio(1.0, median(ratios), unit)
