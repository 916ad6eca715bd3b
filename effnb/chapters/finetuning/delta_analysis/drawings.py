"""The pictures of the chapter on the analysis of delta tuning, captioned and described."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from effnb.chapters.finetuning.delta_analysis import tables
from effnb.chapters.finetuning.delta_analysis.verdicts import CHAPTER, KIND_OF
from effnb.lab import PALETTE, figure, name_lines
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.figures import CaptionedFigure
from effnb.lab.results import NotMeasured

WAYS = {
    "loop": "one user after the other",
    "merged": "one after the other, merged",
    "batch": "one batch",
    "frozen": "one batch, no LoRA",
}


@if_measured
def serving(rows: Sequence[Row]) -> CaptionedFigure:
    """Time over the number of users."""
    counts = sorted({row["users"] for row in rows})
    curves = {way: [1000 * tables.times(rows, count)[way] for count in counts] for way in WAYS}

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for colour, (way, label) in zip(PALETTE, WAYS.items()):
            axes.plot(counts, curves[way], "o-", color=colour, label=label, markersize=4)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("users, each with a text and a LoRA")
        axes.set_ylabel("ms")
        axes.set_ylim(bottom=0)
        name_lines(axes)

    return figure(
        draw,
        caption="mini-5m: processor time to answer one text of 16 tokens for each user, when this "
        "was stored.",
        alt="; ".join(
            f"{WAYS[way]}: " + ", ".join(f"{y:.0f} ms for {n}" for n, y in zip(counts, found))
            for way, found in curves.items()
        )
        + ".",
        figsize=(6.6, 2.8),
    )


@if_measured
def together(rows: Sequence[Row]) -> CaptionedFigure | NotMeasured:
    """Accuracy on training texts and on new ones for each set of methods."""
    found = {
        name: (tables.right(own), tables.right(own, "train_answers"))
        for name in tables.SETS
        if (own := pick(rows, method=name))
    }
    if len(found) < 2:
        return NotMeasured(f"{CHAPTER}/together")

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for y, (new, old) in enumerate(reversed(found.values())):
            axes.plot([new, old], [y, y], color="0.6", linewidth=2, zorder=1)
            axes.plot([new], [y], "o", color=PALETTE[0], label="new texts" if not y else None)
            axes.plot([old], [y], "s", color=PALETTE[1], label="training texts" if not y else None)
        axes.set_yticks(range(len(found)), list(reversed(found)))
        axes.set_xlabel("right, per cent")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)

    return figure(
        draw,
        caption="MiniLM-L6 on topics with 16 examples of each: texts that are right, by what is "
        f"trained; {tables.seeds_of(rows)}. The line between is the generalization gap.",
        alt="; ".join(
            f"{n}: {a:.0f} on new, {b:.0f} on training texts" for n, (a, b) in found.items()
        )
        + ".",
        figsize=(6.4, 3.0),
    )  # fmt: skip


@if_measured
def transfer(rows: Sequence[Row]) -> CaptionedFigure | NotMeasured:
    """Which part of a task's saving the delta of another one brings, as a heat map."""
    found = tables.arriving(rows)
    names = list(KIND_OF)
    if len(found) < len(names) ** 2:
        return NotMeasured(f"{CHAPTER}/transfer")
    cells = np.array([[100 * found[source, target] for target in names] for source in names])

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        axes.imshow(np.clip(cells, -100, 100), cmap="PuOr_r", vmin=-100, vmax=100, aspect="auto")
        for y, row in enumerate(cells):
            for x, value in enumerate(row):
                dark = abs(value) > 70
                axes.text(x, y, f"{value:.0f}".replace("-", "−"), ha="center", va="center",
                          color="white" if dark else "black", fontsize=9)  # fmt: skip
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("judged on")
        axes.set_ylabel("tuned on")
        axes.grid(False)
        for place in (1.5, 3.5):
            axes.axhline(place, color="0.2", linewidth=1)
            axes.axvline(place, color="0.2", linewidth=1)

    return figure(
        draw,
        caption="mini-1m: what the delta of one task saves on another, in per cent of what that "
        "task's own delta saves. Lines part the kinds: classes, pairs, writing.",
        alt="; ".join(
            f"from {source}: " + ", ".join(f"{v:.0f} on {t}" for t, v in zip(names, row))
            for source, row in zip(names, cells)
        )
        + ".",
        figsize=(6.2, 3.2),
    )


@if_measured
def scale(rows: Sequence[Row]) -> CaptionedFigure | NotMeasured:
    """Accuracy over the size of the model for each method."""
    found = {
        name: [tables.right(pick(rows, method=name, model=size)) for size in tables.SIZES]
        for name in tables.SCALED
    }
    if not all(isinstance(y, float) for ys in found.values() for y in ys):
        return NotMeasured(f"{CHAPTER}/scale")

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for colour, (name, ys) in zip(PALETTE, found.items()):
            axes.plot(range(len(tables.SIZES)), ys, "o-", color=colour, label=name, markersize=4)
        axes.set_xticks(range(len(tables.SIZES)), tables.SIZES)
        axes.set_ylabel("right, per cent")
        name_lines(axes)

    return figure(
        draw,
        caption=f"Topics: new texts that are right, by the size of the decoder; "
        f"{tables.seeds_of(rows)}.",
        alt="; ".join(
            f"{name}: " + ", ".join(f"{y:.0f} on {s}" for s, y in zip(tables.SIZES, ys))
            for name, ys in found.items()
        )
        + ".",
        figsize=(6.4, 2.8),
    )


@if_measured
def control(rows: Sequence[Row]) -> CaptionedFigure | NotMeasured:
    """The cost of both solutions round by round, for the first set of examples."""
    shown = {
        way: pick(rows, method=way, seed=0)
        for way in ("back-propagation", "successive approximations")
    }
    if not all(shown.values()):
        return NotMeasured(f"{CHAPTER}/control")
    curves = {way: own[0]["costs"] for way, own in shown.items()}

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for colour, (way, costs) in zip(PALETTE, curves.items()):
            axes.plot(range(len(costs)), costs, "o-", color=colour, label=way, markersize=4)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("rounds")
        axes.set_ylabel("cost J, nats")
        axes.legend()

    return figure(
        draw,
        caption="mini-1m, a vector behind each frozen block: the cost after each round. A round of "
        "back-propagation is up to twenty steps on all controls at once.",
        alt="; ".join(
            f"{way}: from {costs[0]:.2f} to {costs[-1]:.3f} in {len(costs) - 1} rounds"
            for way, costs in curves.items()
        )
        + ".",
        figsize=(6.0, 2.5),
    )


def mean_size(rows: Sequence[Row], way: str) -> list[float]:
    """How long the vector behind each block is, averaged over sets of examples."""
    return [fmean(column) for column in zip(*(r["sizes"] for r in pick(rows, method=way)))]
