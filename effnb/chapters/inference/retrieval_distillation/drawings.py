"""The pictures of the chapter on distilled retrievers, each with caption and alternative text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from effnb.chapters.inference.retrieval_distillation import tables
from effnb.inference.retrieval_distillation import embed_distill, margin_mse
from effnb.lab import PALETTE, figure
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.figures import CaptionedFigure

SHADES = {
    "none": "0.75",
    "labels": "0.45",
    "scores": PALETTE[1],
    "embeddings": PALETTE[2],
    "both": PALETTE[0],
}
"""A colour for each loss; "none" is before training."""


@if_measured
def found(rows: Sequence[Row]) -> CaptionedFigure:
    """What students find, by depth and loss, beside their teacher."""
    depths, size = tables.depths_of(rows), tables.sizes_of(rows)[-1]
    teacher = tables.found_share(tables.teacher_of(rows, size))
    kinds = {"the teacher's documents, frozen": True, "the student's own documents": False}
    shares = {
        name: {
            loss: [
                tables.found_share(tables.student_row(rows, depth, size, loss, frozen))
                for depth in depths
            ]
            for loss in SHADES
        }
        for name, frozen in kinds.items()
    }
    called = {"none": "before training"} | tables.LOSS_NAMES

    def draw(fig: Figure) -> None:
        panes = fig.subplots(1, 2, sharey=True)
        width = 0.8 / len(SHADES)
        for axes, (name, found) in zip(panes, shares.items(), strict=True):
            for i, (loss, values) in enumerate(found.items()):
                x = np.arange(len(depths)) + (i - (len(SHADES) - 1) / 2) * width
                heights = [100 * v for v in values]
                axes.bar(x, heights, width * 0.92, color=SHADES[loss], label=called[loss])
            axes.axhline(100 * teacher, color="0.2", linestyle=":")
            axes.set_xticks(range(len(depths)), [tables.layers_said(depth) for depth in depths])
            axes.set_title(name)
        panes[0].set_ylabel("found among the first ten, %")
        panes[0].set_ylim(0, 105)
        fig.legend(
            *panes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8
        )

    return figure(
        draw,
        caption="New synopses that find their own description among the first ten of a thousand, "
        "by what the student learned from. Dotted: the teacher, which has six layers.",
        alt=f"The teacher finds {teacher:.0%}. "
        + "; ".join(
            f"{tables.layers_said(depth)}, {name}: "
            + ", ".join(f"{values[i]:.0%} {called[loss]}" for loss, values in found.items())
            for name, found in shares.items()
            for i, depth in enumerate(depths)
        )
        + ".",
        figsize=(6.8, 2.9),
    )


def _plane(axes: Axes, query: Tensor, documents: Tensor, title: str) -> None:
    for i, (x, y) in enumerate(documents.tolist()):
        axes.plot([0, x], [0, y], color="0.8", linewidth=1)
        axes.plot(x, y, "o", color=PALETTE[2] if i == 0 else PALETTE[1], markersize=8)
        axes.text(x + 0.06, y + 0.06, f"d{i + 1}")
    (x, y), *_ = query.tolist()
    axes.annotate(
        "", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": PALETTE[0], "linewidth": 2}
    )
    axes.text(x + 0.05, y - 0.25, "q")
    axes.set_xlim(-1.3, 1.4)
    axes.set_ylim(-0.4, 1.25)
    axes.set_aspect("equal")
    axes.set_title(title)


def geometry(angle: float = 60) -> CaptionedFigure:
    """Scores that agree and embeddings that do not: the student's plane is turned."""
    (q, d), (a, b) = tables.turned(angle)

    def draw(fig: Figure) -> None:
        panes = fig.subplots(1, 3, sharey=True)
        _plane(panes[0], a, b, "teacher")
        _plane(panes[1], q, d, "student, turned")
        _plane(panes[2], q, b, "mixed")

    mixed = (q @ b.T)[0].tolist()
    return figure(
        draw,
        caption="A teacher's query and documents; a student whose plane is turned, with the very "
        "same scores; and the student's query among the teacher's documents.",
        alt=f"Three planes. In the teacher's and the student's, the query points towards document "
        f"1, and MarginMSE is {float(margin_mse(q @ d.T, a @ b.T)):.2f}, though the queries are "
        f"{float(embed_distill(q, a)):.2f} apart. In the mixed one the products with the three "
        f"documents are {', '.join(f'{v:.2f}' for v in mixed)}: document "
        f"{1 + mixed.index(max(mixed))} is first.",
        figsize=(6.8, 2.1),
    )


@if_measured
def sizes(rows: Sequence[Row]) -> CaptionedFigure:
    """Training and new queries over the embedding size of dual encoders."""
    cross = pick(rows, method="cross-encoder")[0]
    curves = {
        method: [
            (row["size"], np.mean(row["train_documents"]), np.mean(row["documents"]))
            for row in pick(rows, method=method)
        ]
        for method in ("labels", "softmax KL")
    }

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for colour, (method, points) in zip((PALETTE[1], PALETTE[0]), curves.items()):
            x = [size for size, *_ in points]
            axes.plot(x, [100 * p[1] for p in points], "o:", color=colour,
                      label=f"{method}, training queries")  # fmt: skip
            axes.plot(x, [100 * p[2] for p in points], "o-", color=colour,
                      label=f"{method}, new queries")  # fmt: skip
        axes.axhline(100 * np.mean(cross["train_documents"]), color="0.5", linestyle=":",
                     label="cross-encoder, training queries")  # fmt: skip
        axes.axhline(100 * np.mean(cross["documents"]), color="0.3",
                     label="cross-encoder, new queries")  # fmt: skip
        axes.set_xscale("log")
        ticks = [size for size, *_ in curves["labels"]]
        axes.set_xticks(ticks, [str(size) for size in ticks])
        axes.minorticks_off()
        axes.set_xlabel("size of the dual encoder's embedding")
        axes.set_ylabel("right one of eight first, %")
        fig.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)

    return figure(
        draw,
        caption="Dual encoders of two layers over the size of their embedding, on queries that "
        "they were trained on (dotted) and on new ones (solid). Grey: the cross-encoder.",
        alt=f"The cross-encoder ranks {np.mean(cross['train_documents']):.0%} of training and "
        f"{np.mean(cross['documents']):.0%} of new queries right. "
        + "; ".join(
            f"{method}: " + ", ".join(f"{a:.0%} and {b:.0%} at {size}" for size, a, b in points)
            for method, points in curves.items()
        )
        + ".",
        figsize=(6.8, 2.7),
    )
