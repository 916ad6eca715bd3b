"""The pictures of the chapter on self-distilled quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from effnb.chapters.inference.self_distilled_quantization import languages, methods, tables
from effnb.lab import PALETTE, figure
from effnb.lab.changes import Row, if_measured
from effnb.lab.figures import CaptionedFigure
from effnb.lab.tasks import TONGUES

SHORT = {
    "query": "query",
    "key": "key",
    "value": "value",
    "self-attention": "self-attention",
    "attention output": "attention output",
    "norm after attention": "norm",
    "feed-forward, first": "feed-forward 1",
    "feed-forward, second": "feed-forward 2",
    "norm after feed-forward": "norm",
}


def draw_errors(layers: Sequence[Mapping[str, Any]], fig: Figure) -> None:
    """A map of roles by blocks on the left, the growth of the blocks' error on the right."""
    left, right = fig.subplots(1, 2, width_ratios=[3, 2])
    roles = [r for r in tables.ROLES if any(row["role"] == r for row in layers)]
    depth = 1 + max(row["layer"] for row in layers)
    grid = [
        [
            next(x["accumulated"] for x in layers if x["role"] == role and x["layer"] == layer)
            for layer in range(depth)
        ]
        for role in roles
    ]
    top = max(max(row) for row in grid)
    left.imshow(grid, cmap="cividis", aspect="auto", vmin=0, vmax=top)
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            shade = "black" if value > 0.6 * top else "white"
            words = f"{100 * value:.0f}" if value >= 0.095 else f"{100 * value:.1f}"
            left.text(j, i, words, ha="center", va="center", color=shade, fontsize=8)
    left.set_yticks(range(len(roles)), [SHORT[role] for role in roles])
    left.set_xticks(range(depth), [str(i + 1) for i in range(depth)])
    left.set_xlabel("block")
    left.set_title("error of each module, per cent")
    blocks = sorted((r for r in layers if r["role"] == "block"), key=lambda r: r["layer"])
    for kind, colour, style in (
        ("accumulated", PALETTE[1], "o-"),
        ("alone", PALETTE[0], "s--"),
    ):
        label = "all blocks rounded" if kind == "accumulated" else "this one alone"
        values = [100 * row[kind] for row in blocks]
        right.plot(range(1, depth + 1), values, style, color=colour, label=label, markersize=4)
    right.set_ylim(bottom=0)
    right.set_xticks(range(1, depth + 1))
    right.set_xlabel("block")
    right.set_title("error of the block's output, per cent")
    right.legend(loc="best")


def errors_alt(layers: Sequence[Mapping[str, Any]]) -> str:
    """What the map of errors says, for those who cannot see it."""
    means = tables.role_means(layers)
    blocks = sorted((r for r in layers if r["role"] == "block"), key=lambda r: r["layer"])
    return (
        "A map of nine modules by blocks, and a curve. Mean errors: "
        + "; ".join(f"{role} {value:.1%}" for role, value in means.items())
        + ". Output of the blocks, all rounded: "
        + ", ".join(f"{row['accumulated']:.1%}" for row in blocks)
        + "; each alone: "
        + ", ".join(f"{row['alone']:.1%}" for row in blocks)
        + "."
    )


@if_measured
def errors(
    rows: Sequence[Row], model: str = "minilm-l6", bits: int = 4
) -> CaptionedFigure | methods.NotTrained:
    """Where a rounded model errs."""
    layers = tables.errors_at(rows, model, bits)
    if not layers:
        return methods.NotTrained(model)
    return figure(
        lambda fig: draw_errors(layers, fig),
        caption=f"{model} with its weights in {bits} bits. Left: how far each module's output is "
        "from that of the unrounded model, in per cent of its size; modules from top to bottom in "
        "the order in which they compute. Right: the output of each block.",
        alt=errors_alt(layers),
        figsize=(7.4, 3.2),
    )


def draw_languages(curves: Mapping[str, Mapping[str, float]], chosen: str, fig: Figure) -> None:
    """Bars by language for several models; one language is marked."""
    axes = fig.subplots()
    order = [*languages.SEEN, *languages.UNSEEN]
    width = 0.8 / len(curves)
    for i, (name, quality) in enumerate(curves.items()):
        places = [j + (i - (len(curves) - 1) / 2) * width for j in range(len(order))]
        axes.bar(
            places, [100 * quality[x] for x in order], width, label=name,
            color=["0.75", PALETTE[1], PALETTE[0]][i % 3],
        )  # fmt: skip
    axes.axvline(len(languages.SEEN) - 0.5, color="0.4", linestyle=":")
    axes.set_xticks(range(len(order)), order)
    axes.get_xticklabels()[order.index(chosen)].set_fontweight("bold")
    axes.set_ylim(0, 100)
    axes.set_ylabel("topics right, per cent")
    axes.legend(loc="upper right", ncols=len(curves), fontsize=8)


@if_measured
def students(rows: Sequence[Row], bits: int = 4) -> CaptionedFigure:
    """Teacher, rounding and SDQ by language."""
    curves = {
        name: tables.mean_languages(found)
        for name, method, at in (
            ("32 bits", "teacher", None),
            (f"rounded to {bits} bits", "PTQ", bits),
            (f"SDQ, {bits} bits", "SDQ", bits),
        )
        if (found := tables.students_at(rows, method, at))
    }
    return figure(
        lambda fig: draw_languages(curves, "en", fig),
        caption="Topics of package descriptions that a classifier finds, by language. Left of the "
        "dotted line: languages of the fine-tuning.",
        alt="Bars for twelve languages. "
        + "; ".join(
            f"{name}: " + ", ".join(f"{TONGUES[x]} {q[x]:.0%}" for x in (*languages.SEEN,
                                                                          *languages.UNSEEN))
            for name, q in curves.items()
        )
        + ".",
        figsize=(7.4, 2.6),
    )  # fmt: skip
