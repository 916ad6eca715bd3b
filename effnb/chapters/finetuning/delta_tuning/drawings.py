"""The pictures of the chapter on delta tuning, each with its caption and alternative text."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure

from effnb.chapters.finetuning.delta_tuning import tables
from effnb.lab import PALETTE, figure, name_lines
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.figures import CaptionedFigure
from effnb.lab.results import NotMeasured

COLOURS = {
    "full": PALETTE[6],
    "LoRA": PALETTE[0],
    "LoRA, rank 1": PALETTE[0],
    "adapter": PALETTE[1],
    "prefix": PALETTE[2],
    "prompt": PALETTE[3],
    "BitFit": PALETTE[4],
    "last layers": PALETTE[5],
    "random modules": PALETTE[5],
}
BEFORE = {"section": 1 / 6, "language": 1 / 12, "match": 1 / 2, "origin": 1 / 2}
"""What guessing scores on each task."""


@if_measured
def result(rows: Sequence[Row]) -> CaptionedFigure | NotMeasured:
    """Accuracy over the bytes that a task has to store."""
    runs = tables.common(rows)
    if not runs:
        return tables.unfinished()
    points = {
        name: (2 * tables.parameters(rows, name) / 1024, 100 * tables.accuracy(rows, name, runs))
        for name in tables.SHOWN
    }
    guessing = 100 * fmean(BEFORE[task] for task, _ in runs)

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for name, (x, y) in points.items():
            axes.plot([x], [y], "o", color=COLOURS[name], markersize=9)
            left = x > 1000
            axes.annotate(
                name, (x, y), xytext=(-8 if left else 8, -3), textcoords="offset points",
                ha="right" if left else "left", fontsize=9,
            )  # fmt: skip
        axes.axhline(guessing, color="0.45", linestyle=":")
        axes.set_xscale("log")
        axes.set_xticks([10, 100, 1024, 10240, 44000], ["10", "100", "1 MiB", "10 MiB", "43 MiB"])
        axes.minorticks_off()
        axes.set_xlabel("to store for a task, KiB")
        axes.set_ylabel("right, per cent")

    return figure(
        draw,
        caption="MiniLM-L6: test texts that are right over what has to be stored for a task; mean "
        f"of {tables.basis(runs)}. Dotted: guessing. Each method is "
        "named at its point.",
        alt="; ".join(f"{n}: {y:.1f} per cent at {x:,.0f} KiB" for n, (x, y) in points.items())
        + f"; guessing {guessing:.0f} per cent.",
        figsize=(6.4, 2.9),
    )


@if_measured
def learning(data: Row) -> CaptionedFigure | NotMeasured:
    """Accuracy on validation texts over the steps."""
    rows, steps = data["table"], data["points"]
    runs = tables.common(rows)
    if not runs:
        return tables.unfinished()
    shown = (*tables.IN_ORDER, "LoRA, rank 1")
    curves = {n: [100 * x for x in tables.curve(rows, n, runs)] for n in shown}

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for name, found in curves.items():
            line = "o--" if name == "LoRA, rank 1" else "o-"
            axes.plot(steps, found, line, color=COLOURS[name], label=name, markersize=4)
        axes.set_xscale("log")
        axes.set_xticks(steps, [str(step) for step in steps])
        axes.minorticks_off()
        axes.set_xlabel("steps of 8 texts")
        axes.set_ylabel("right, per cent")
        name_lines(axes)

    return figure(
        draw,
        caption="MiniLM-L6: validation texts that are right after so many steps, mean of "
        f"{tables.basis(runs)}.",
        alt="; ".join(
            f"{name} " + ", ".join(f"{y:.0f} after {s}" for s, y in zip(steps, found, strict=True))
            for name, found in curves.items()
        )
        + ".",
        figsize=(6.4, 2.8),
    )


PARTS = (("weights", PALETTE[5]), ("gradients and moments", PALETTE[1]), ("activations", "0.6"))


@if_measured
def memory(rows: Sequence[Row]) -> CaptionedFigure:
    """Where the bytes of a step are, for two methods and two batches."""
    bars = {}
    weights = pick(rows, method="full", batch=0)[0]["parameters"] * 4
    for batch in (1, 32):
        for name in ("full", "LoRA"):
            (row,) = pick(rows, method=name, batch=batch)
            kept = fmean(row["activations"])
            more = 0 if name == "full" else 4 * row["parameters"]
            trained = row["state_bytes"] - weights - more
            bars[f"{name}, batch {batch}"] = [x / 2**20 for x in (weights + more, trained, kept)]

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for y, found in enumerate(reversed(bars.values())):
            start = 0.0
            for (label, colour), width in zip(PARTS, found, strict=True):
                axes.barh([y], [width], left=start, color=colour, height=0.6,
                          label=label if y == 0 else None)  # fmt: skip
                start += width
        axes.set_yticks(range(len(bars)), list(reversed(bars)))
        axes.set_xlabel("MiB")
        axes.legend(loc="lower right")

    return figure(
        draw,
        caption="MiniLM-L6 with Adam in 32 bits: what one training step holds, counted.",
        alt="; ".join(
            f"{name}: "
            + ", ".join(f"{x:.0f} MiB of {label}" for (label, _), x in zip(PARTS, found))
            for name, found in bars.items()
        )
        + ".",
        figsize=(6.4, 2.3),
    )


@if_measured
def subspaces(rows: Sequence[Row]) -> CaptionedFigure:
    """Accuracy over the dimension of a random subspace."""
    sizes = sorted({r["dimension"] for r in rows} - {0})
    found = [100 * fmean(r["accuracy"] for r in pick(rows, dimension=d)) for d in sizes]
    full = 100 * fmean(r["accuracy"] for r in pick(rows, dimension=0))

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        axes.plot(sizes, found, "o-", color=PALETTE[0], label="random subspace")
        axes.axhline(full, color="0.2", linewidth=1.4, label="full tuning")
        axes.axhline(0.9 * full, color="0.45", linestyle=":", label="90 % of it")
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{d:,}" for d in sizes])
        axes.minorticks_off()
        axes.set_xlabel("numbers trained")
        axes.set_ylabel("right, per cent")
        axes.legend(loc="lower right")

    return figure(
        draw,
        caption="MiniLM-L6 on topics: test texts that are right when the query and value weights "
        "may move in a random subspace only.",
        alt="; ".join(f"{y:.0f} per cent with {d:,} numbers" for d, y in zip(sizes, found))
        + f"; full tuning {full:.0f}.",
        figsize=(6.0, 2.4),
    )
