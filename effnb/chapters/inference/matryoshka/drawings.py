"""The pictures of the chapter on Matryoshka, each with its caption and alternative text."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from effnb.chapters.inference.matryoshka import tables
from effnb.lab import PALETTE, figure
from effnb.lab.changes import Row, if_measured
from effnb.lab.figures import BLACK, GREY, CaptionedFigure

LINES = {
    "Matryoshka": (PALETTE[0], "o-"),
    "own size": (BLACK, "x"),
    "principal components": (PALETTE[2], "^-"),
    "MiniLM, cut": (PALETTE[1], "s-"),
    "random numbers": (GREY, "v:"),
}
"""What the first picture draws; a map that was trained whole lies too near to others."""
SETTING = (16, 200)


def _ticks(axes: Axes, values: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{v:,}" for v in values])
    axes.minorticks_off()


@if_measured
def result(dimensions: Sequence[Row], shortlists: Sequence[Row]) -> CaptionedFigure:
    """Left: what few numbers find. Right: what a second look makes of that."""
    curves = {
        method: [
            (m, 100 * tables.mean(dimensions, "first", method=method, dims=m))
            for m in tables.dims_of(dimensions, method)
        ]
        for method in LINES
    }
    full = tables.work(tables.DOCUMENTS, tables.FULL, 0)
    one = [(full / (tables.DOCUMENTS * m), y) for m, y in curves["Matryoshka"] if m >= 8]
    lists = sorted({r["shortlist"] for r in tables.looks(shortlists) if r["shortlist"]})
    two = [
        (full / r["multiplications"], 100 * r["first"])
        for r in tables.looks(shortlists)
        if r["dims"] == SETTING[0] and r["shortlist"] in lists
    ]
    two.sort()
    star = next(
        (full / r["multiplications"], 100 * r["first"])
        for r in tables.looks(shortlists)
        if (r["dims"], r["shortlist"]) == SETTING
    )

    def draw(fig: Figure) -> None:
        left, right = fig.subplots(1, 2, sharey=True)
        for method, points in curves.items():
            colour, line = LINES[method]
            label = tables.WAYS[method]
            left.plot(*zip(*points), line, color=colour, label=label, markersize=4)
        _ticks(left, (8, 16, 32, 64, 128, 384))
        left.set_xlabel("numbers compared")
        left.set_ylabel("right description first, %")
        left.legend()
        right.plot(*zip(*one), "o-", color=PALETTE[0], label="one look", markersize=4)
        right.plot(*zip(*two), "D-", color=PALETTE[4], label="two looks", markersize=4)
        right.plot(*star, "*", color=PALETTE[1], markersize=15)
        right.annotate(
            "16 of all,\n384 of the best 200",
            star,
            (6, 13),
            textcoords="offset points",
            fontsize=9,
            ha="center",
            color=PALETTE[1],
        )
        right.set_ylim(0, 82)
        _ticks(right, (1, 2, 4, 8, 16, 32))
        right.set_xlabel("times fewer multiplications")
        right.legend(loc="lower left")

    ends = "; ".join(
        f"{tables.WAYS[method]}: "
        + ", ".join(f"{y:.0f} per cent at {m}" for m, y in points if m in (16, 64, 384))
        for method, points in curves.items()
    )
    return figure(
        draw,
        caption="Synopses look for their descriptions among 10,000. Left: by the first numbers of "
        "five kinds of vectors. Right: nested vectors once more, over the work saved, and the "
        "search of this chapter.",
        alt=f"Left, curves that rise with the numbers compared. {ends}. Right, one look falls as "
        f"work is saved; two looks fall later: at {star[0]:.1f} times fewer multiplications "
        f"{star[1]:.1f} per cent, all numbers {curves['Matryoshka'][-1][1]:.1f} per cent.",
        figsize=(7.2, 3.0),
    )


@if_measured
def walks(rows: Sequence[Row]) -> CaptionedFigure:
    """What graphs over all numbers and over prefixes find, over the multiplications they take."""
    full = tables.work(tables.DOCUMENTS, tables.FULL, 0)
    curves = {
        f"{m} numbers": [
            (r["multiplications"], 100 * r["neighbours"]) for r in tables.walks(rows, "HNSW", m)
        ]
        for m in tables.dims_of(rows, "HNSW")
    }
    lists = [
        (r["multiplications"], 100 * r["neighbours"])
        for r in tables.walks(rows, "IVF", tables.FULL)
    ]

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for colour, (label, points) in zip(PALETTE, curves.items()):
            axes.plot(*zip(*points), "o-", color=colour, label=f"HNSW, {label}", markersize=4)
        axes.plot(*zip(*lists), "s:", color=GREY, label=f"IVF, {tables.FULL} numbers", markersize=4)
        axes.axvline(full, color=BLACK, linestyle=":", linewidth=1)
        axes.text(full * 0.95, 42, "exact", rotation=90, ha="right", fontsize=9)
        _ticks(axes, (20_000, 100_000, 500_000, 2_500_000))
        axes.set_xlabel("multiplications a query")
        axes.set_ylabel("of the ten nearest, %")
        axes.set_ylim(40, 101)
        axes.legend(loc="lower right", bbox_to_anchor=(0.93, 0))

    return figure(
        draw,
        caption="Approximate search: the share of the ten nearest that is found, over "
        "multiplications, as efSearch (or the number of lists) grows. Prefixes get a second look "
        "by all numbers. Further left is cheaper.",
        alt="; ".join(
            f"{label}: " + ", ".join(f"{y:.0f} per cent for {x:,.0f}" for x, y in points)
            for label, points in (curves | {"IVF": lists}).items()
        )
        + f". Exact search takes {full:,}.",
        figsize=(6.6, 2.9),
    )
