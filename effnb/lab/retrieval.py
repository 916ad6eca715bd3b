"""A panel on a retriever that was compressed: how often it still finds the right text first.

The rows come from a stored result; the lab knows neither the model nor the methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from effnb.lab.figures import PALETTE
from effnb.lab.panels import Panel, knob, panel

Row = Mapping[str, Any]
Z = 1.96
"""Standard errors on either side of a difference that 95 % of normal differences stay within."""


def retrieval_panel(
    rows: Sequence[Row],
    *,
    queries: int,
    title: str = "Search with rounded weights",
    groups: Mapping[str, str] | None = None,
) -> Panel:
    r"""Bits, method and grouping of a retriever, and how often the right text comes first.

    The difference to the original gets the interval of two independent proportions,
    $\hat p - \hat p_0 \pm 1.96 \sqrt{s^2 + s_0^2}$. Both answered the same queries, whose
    difficulty they share, so the true interval is narrower: "worse" is never said too soon.

    Args:
        rows: Settings, each with `method`, `bits`, `group_size`, `recall_at_1`, `standard_error`
            and `bytes`; that of the original has the method "original".
        queries: How many queries each answered.
        title: A heading of a few words.
        groups: Labels of the groupings by the rows' `group_size`; by default those of the rows.

    Raises:
        ValueError: When the original is missing, or a setting of the knobs' is.
    """
    originals = [row for row in rows if row["method"] == "original"]
    table = {(r["bits"], r["method"], r["group_size"]): r for r in rows if r not in originals}
    bits, methods, found = (list(dict.fromkeys(values)) for values in zip(*table))
    labels = dict(groups or {group: group for group in found})
    missing = [(b, m, g) for b in bits for m in methods for g in labels if (b, m, g) not in table]
    if len(originals) != 1 or missing:
        what = f"the setting {missing[0]}" if missing else "exactly one original"
        raise ValueError(f"a panel on retrieval needs {what} among its rows.")
    original, by_label = originals[0], {label: group for group, label in labels.items()}

    def compute(bits: int, method: str, scale: str) -> Row:
        return {**table[bits, method, by_label[scale]], "original": original}

    return panel(
        compute,
        _draw,
        text=lambda row: _words(row, queries),
        title=title,
        caption=f"How often the right text comes first for {queries} queries; the lines show 95 % "
        "intervals.",
        bits=knob(sorted(bits), default=max(bits)),
        method=knob(methods),
        scale=knob(list(by_label), label="a scale for each"),
    )


def _draw(row: Row, figure: Any) -> None:
    axes = figure.subplots()
    names = ["original", f"{row['method']}, {row['bits']} bits"]
    for place, (one, colour) in enumerate(((row["original"], "0.7"), (row, PALETTE[0]))):
        share, reach = one["recall_at_1"], Z * one["standard_error"]
        axes.barh(place, share, xerr=reach, color=colour, height=0.5)
        axes.annotate(f"{share:.0%}", (share + reach + 0.02, place), va="center")
    axes.set_yticks([0, 1], names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("the right text comes first")


def _words(row: Row, queries: int) -> str:
    original = row["original"]
    change = row["recall_at_1"] - original["recall_at_1"]
    reach = Z * math.hypot(row["standard_error"], original["standard_error"])
    said = "indistinguishable"
    if abs(change) > reach:
        said = "worse" if change < 0 else "better"
    return "\n".join(
        [
            f"Right text first: {row['recall_at_1']:.0%}",
            f"Original's: {original['recall_at_1']:.0%}",
            f"Size: {row['bytes'] / 2**20:.0f} MiB",
            f"Original's size: {original['bytes'] / 2**20:.0f} MiB",
            f"Compared with the original: {said} on {queries} queries "
            f"({change:+.0%}, interval {change - reach:+.0%} to {change + reach:+.0%})",
        ]
    )
