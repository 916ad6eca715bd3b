"""The pictures of the chapter on objectives, each with its caption and alternative text."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from effnb.chapters.pretraining.objectives import runs, scaling, tables
from effnb.chapters.pretraining.objectives.sheet import Sheet, example
from effnb.lab import PALETTE, figure
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.figures import CaptionedFigure
from effnb.pretraining import objectives

FAMILIES = {
    "CLM": PALETTE[0],
    "MLM": PALETTE[1],
    "spans": PALETTE[2],
    "prefix": PALETTE[4],
    "ELECTRA": PALETTE[3],
}
"""The colour of each kind of objective, by how its name begins."""
ASKED, HIDDEN = "#0072B2", "#E3E2DC"


def colour(name: str) -> str:
    """The colour of an objective."""
    return next(c for begin, c in FAMILIES.items() if name.startswith(begin))


@if_measured
def result(rows: Sequence[Row]) -> CaptionedFigure:
    """The probe over the loss-bearing tokens, on equal text."""
    points = {
        name: (
            fmean(r["text_targets"] for r in pick(rows, method=name)) / 1000,
            100 * tables.accuracy(rows, name),
        )
        for name in runs.ALL
        if pick(rows, method=name)
    }
    untrained = pick(rows, method="untrained")
    floor = 100 * fmean(r["probe"] for r in untrained) if untrained else None

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        if floor is not None:
            axes.axhline(floor, color="0.55", linestyle=":")
            axes.text(1000, floor, "untrained", color="0.35", fontsize=9, va="bottom", ha="right")
        for name, (x, y) in points.items():
            axes.plot([x], [y], "o", color=colour(name), markersize=8)
        spread(axes, points)
        axes.set_xscale("log")
        axes.set_xlim(80, 1050)
        axes.set_xticks([100, 200, 400, 600], ["100", "200", "400", "600"])
        axes.minorticks_off()
        axes.set_xlabel("loss-bearing tokens, thousands")
        axes.set_ylabel("probe, per cent right")

    return figure(
        draw,
        caption="One network, one text, one dot for each question that it was asked. To the right: "
        "more tokens gave a loss. Up: a linear probe finds more of a package's section in what the "
        "network makes of its description. Guessing is right once in ten.",
        alt="Accuracy of the probe, by loss-bearing tokens: "
        + "; ".join(f"{name} {x:.0f} thousand, {y:.0f} %" for name, (x, y) in points.items())
        + (f"; the untrained network {floor:.0f} %." if floor is not None else "."),
        figsize=(6.8, 3.2),
    )


COLUMNS = ((0, 160), (160, 280), (280, 340), (340, 450), (450, 560), (560, 1e9))
"""Loss-bearing tokens, in thousands, whose dots lie so near each other that names may collide."""


def spread(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Names beside dots, moved apart where they would lie on one another."""
    low, high = (f(y for _, y in points.values()) for f in (min, max))
    step = max(1.0, 0.07 * (high - low))
    for left, right in COLUMNS:
        column = {n: p for n, p in points.items() if left <= p[0] < right}
        beside = 1.07 * max((x for x, _ in column.values()), default=1.0)
        last = -1e9
        for name, (x, y) in sorted(column.items(), key=lambda one: one[1][1]):
            last = max(y, last + step)
            axes.annotate(name, (x, y), (beside, last), color=colour(name), fontsize=8, va="center")


def masks(time: int = 10, prefix: int = 4) -> CaptionedFigure:
    """What each position may see, and where it is asked."""
    ids, draws = torch.arange(2, 2 + time)[None], torch.Generator().manual_seed(3)
    made = {
        "CLM": objectives.causal_lm(ids),
        "MLM": example("MLM", ids, 0.3, 3, draws),
        "prefix LM": objectives.prefix_lm(ids, torch.tensor([prefix])),
    }
    cut = torch.zeros_like(ids, dtype=torch.bool)
    cut[:, [2, 3, 8, 9]] = True
    made["span corruption"] = objectives.span_corruption(
        ids, first_sentinel=runs.FIRST_SENTINEL, end=0, noise=cut
    ).example()

    def draw(fig: Figure) -> None:
        for axes, (name, one) in zip(fig.subplots(1, len(made)), made.items(), strict=True):
            seen = one.visible[0]
            asked = one.labels[0] != objectives.IGNORED
            n = len(seen)
            axes.grid(visible=False)
            for i in range(n):
                for j in range(n):
                    if seen[i, j]:
                        face = ASKED if asked[i] else "#B9BEC6"
                        axes.add_patch(
                            Rectangle(
                                (j, i), 1, 1, facecolor=face, edgecolor="white", linewidth=0.5
                            )
                        )
            axes.set_xlim(0, n)
            axes.set_ylim(n, 0)
            axes.set_aspect("equal")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(name, fontsize=9.5)
            axes.set_xlabel("sees")
        fig.axes[0].set_ylabel("position")

    said = {n: int((o.labels[0] != objectives.IGNORED).sum()) for n, o in made.items()}
    return figure(
        draw,
        caption="What each position (row) sees (column). Blue rows are asked something, grey ones "
        "are only read.",
        alt="Four square patterns. CLM: a lower triangle. MLM: everything. Prefix LM: a triangle "
        f"with its first {prefix} columns filled. Span corruption: the inputs as a filled square, "
        "the targets as a triangle below. Rows that are asked: "
        + ", ".join(f"{name} {count}" for name, count in said.items())
        + ".",
        figsize=(7.2, 2.2),
    )


def boxes(axes: Axes, sheet: Sheet, columns: int = 12) -> None:
    """A sentence as boxes; below each what is asked there."""
    rows = -(-len(sheet.shown) // columns)
    for i, (shown, answer, changed) in enumerate(
        zip(sheet.shown, sheet.answers, sheet.changed, strict=True)
    ):
        x, y = i % columns, i // columns
        face = "#FBD9C9" if changed else "#FFFFFF"
        edge = ASKED if answer else "#C9CDD3"
        axes.add_patch(
            Rectangle(
                (x + 0.04, y + 0.06), 0.92, 0.44, facecolor=face, edgecolor=edge, linewidth=1.2
            )
        )
        axes.text(x + 0.5, y + 0.28, shown[:9], ha="center", va="center", fontsize=7.5)
        if answer:
            axes.text(
                x + 0.5, y + 0.70, answer[:9], ha="center", va="center", fontsize=7.5, color=ASKED
            )
    axes.set_xlim(0, columns)
    axes.set_ylim(max(rows, 3), 0)
    axes.axis("off")


def law(budgets: Sequence[float] = (1e13, 2.9e13, 1e14)) -> CaptionedFigure:
    """Recorded losses of the three sizes over compute."""
    curves = scaling.curves()

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for c, (name, one) in zip(PALETTE, curves.items()):
            x = [6 * one.parameters * tokens for tokens, _ in one.points]
            axes.plot(x, [loss for _, loss in one.points], color=c, label=name)
            axes.plot([6 * one.parameters * one.end[0]], [one.end[1]], "o", color=c, markersize=5)
        for flops in budgets:
            axes.axvline(flops, color="0.75", linestyle=":", linewidth=1.2)
        axes.set_xscale("log")
        axes.set_xlabel("operations, 6 N D")
        axes.set_ylabel("nats per token")
        axes.legend()

    ends = "; ".join(
        f"{name} {one.points[0][1]:.2f} to {one.points[-1][1]:.2f}" for name, one in curves.items()
    )
    return figure(
        draw,
        caption="Held-out loss of the workbook's models while they trained, over the operations "
        "spent. Lines: constant learning rate. Dots: the end, after the rate fell to 0.",
        alt=f"Three falling curves, each larger model further to the right. Nats: {ends}.",
        figsize=(6.4, 2.6),
    )
