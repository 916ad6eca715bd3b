"""The pictures of the chapter on low rank, each with its caption and alternative text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from effnb.chapters.inference.low_rank import methods, tables
from effnb.lab import PALETTE, figure, name_lines
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.figures import CaptionedFigure

COLOURS = {
    "SVD": PALETTE[1],
    "FWSVD": PALETTE[3],
    "ASVD": PALETTE[2],
    "SVD-LLM": PALETTE[0],
}


@if_measured
def result(rows: Sequence[Row]) -> CaptionedFigure:
    """What each method costs on mini-5m over the part of the numbers that it keeps."""
    shares = sorted({row["kept"] for row in rows if row["method"] == "SVD"})
    curves = {
        method: [
            (100 * kept, math.exp(tables.rises(rows, method, kept).mean))
            for kept in shares
            if pick(rows, method=method, kept=kept)
        ]
        for method in methods.METHODS
    }

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for method, points in curves.items():
            axes.plot(*zip(*points), "o-", color=COLOURS[method], label=method, markersize=4)
        axes.axhline(1, color="0.45", linestyle=":")
        axes.set_yscale("log")
        axes.set_xlabel("numbers kept in the layers, per cent")
        axes.set_ylabel("perplexity / original's")
        axes.legend()

    ends = {method: (points[0], points[-1]) for method, points in curves.items()}
    return figure(
        draw,
        caption="mini-5m on held-out text: how many times its perplexity grows when every layer "
        "keeps only a part of its numbers. Dotted: the original.",
        alt="Three curves that rise to the left. "
        + "; ".join(
            f"{method}: {right[1]:.2f} times at {right[0]:.0f} per cent, {left[1]:.2f} times at "
            f"{left[0]:.0f} per cent"
            for method, (left, right) in ends.items()
        )
        + ".",
        figsize=(6.0, 2.5),
    )


def shuffled(weight: Float[Tensor, "out in"], seed: int = 0) -> Float[Tensor, "out in"]:
    """The same numbers in random order."""
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))
    return weight.flatten()[order].view(weight.shape)


def spectra(made: methods.Decompositions, layers: Mapping[str, str]) -> CaptionedFigure:
    """Singular values of a few weights, alone and times the root of their inputs' products.

    Args:
        made: The model's decompositions.
        layers: Names of the layers, by what they are called in the picture.
    """
    sides = {"SVD": "of W", "SVD-LLM": "of W L: what it computes"}
    curves = {
        method: {label: made.spectrum(method, name) for label, name in layers.items()}
        for method in sides
    }
    noise = {}
    for label, name in layers.items():
        weight = made.model.get_submodule(name).weight.detach().cpu()
        sigma = torch.linalg.svdvals(shuffled(weight))
        noise[label] = sigma / sigma[0]

    def draw(fig: Figure) -> None:
        panes = fig.subplots(1, 2, sharey=True)
        for axes, (method, title) in zip(panes, sides.items(), strict=True):
            for colour, (label, values) in zip(PALETTE, curves[method].items()):
                x = torch.linspace(0, 100, len(values)).tolist()
                axes.plot(x, values.tolist(), color=colour, label=label)
                if method == "SVD":
                    axes.plot(x, noise[label].tolist(), ":", color=colour, linewidth=1.5)
            axes.set_yscale("log")
            axes.set_ylim(1e-3, 1.2)
            axes.set_xlabel("position, per cent of the full rank")
            axes.set_title(title)
        panes[0].set_ylabel("singular value / largest")
        panes[0].legend(loc="lower left")

    halves = {
        label: [
            methods.smaller_half(values)
            for values in (*(curves[method][label] for method in sides), noise[label])
        ]
        for label in layers
    }
    return figure(
        draw,
        caption="Singular values of two layers of mini-5m, the largest as 1. Dotted: the same "
        "weights in random order.",
        alt="Curves that fall from 1. The smaller half of the singular values holds, of all "
        "squares of W, of W L, and of W in random order: "
        + "; ".join(f"{label} {a:.0%}, {b:.1%} and {c:.0%}" for label, (a, b, c) in halves.items())
        + ".",
        figsize=(6.6, 2.6),
    )


@if_measured
def composed(rows: Sequence[Row]) -> CaptionedFigure:
    """Perplexity over stored bits: each method alone, and followed by rounding."""
    lines = {
        "round": (["GPTQ 4", "GPTQ 3", "GPTQ 2"], PALETTE[1], "o-"),
        "low rank": (["rank 75%", "rank 50%"], PALETTE[0], "^-"),
        "low rank, round": (["rank 75% + 4 bits", "rank 50% + 4 bits"], PALETTE[0], "^--"),
        "prune half, round": (["prune 50 % + 4 bits", "prune 50 % + 2 bits"], PALETTE[2], "s--"),
    }
    base = math.exp(pick(rows, way="original")[0]["loss"])
    points = {
        label: [
            (tables.road_bits(rows, way), base * math.exp(tables.road(rows, way).mean))
            for way in ways
        ]
        for label, (ways, _, _) in lines.items()
    }

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for label, (_, colour, line) in lines.items():
            axes.plot(*zip(*points[label]), line, color=colour, label=label, linewidth=1.5)
        axes.axhline(base, color="0.45", linestyle=":")
        axes.set_xscale("log")
        axes.set_xticks([2, 3, 4, 6, 8, 12], ["2", "3", "4", "6", "8", "12"])
        axes.minorticks_off()
        axes.set_xlabel("bits stored per weight")
        axes.set_ylabel("perplexity")
        axes.legend()

    return figure(
        draw,
        caption="mini-5m: perplexity over bytes. Solid: one method alone. Dashed: followed by "
        "rounding to four bits, at the left end of the pruned curve to two. Dotted: the original.",
        alt=f"The original's perplexity is {base:.1f}. "
        + "; ".join(
            f"{label}: " + ", ".join(f"{y:.1f} at {x:.1f} bits" for x, y in found)
            for label, found in points.items()
        )
        + ".",
        figsize=(6.0, 2.6),
    )


@if_measured
def latency(curves: Sequence[Row]) -> CaptionedFigure:
    """The time of two factors over that of the dense layer, over the rank."""
    shapes = list(dict.fromkeys((curve["out"], curve["in"]) for curve in curves))
    shown = [curve for curve in curves if curve["tokens"] in (1, 256)]

    def draw(fig: Figure) -> None:
        panes = fig.subplots(1, len(shapes), sharey=True)
        for axes, (m, n) in zip(panes, shapes, strict=True):
            for colour, curve in zip(PALETTE, [c for c in shown if (c["out"], c["in"]) == (m, n)]):
                x = [100 * rank / curve["break_even"] for rank in curve["ranks"]]
                label = f"{curve['tokens']} token" + "s" * (curve["tokens"] > 1)
                axes.plot(x, curve["times_dense"], "o-", color=colour, label=label, markersize=4)
            axes.plot([0, 125], [0, 1.25], color="0.7", linewidth=1)
            axes.axhline(1, color="0.45", linestyle=":")
            axes.set_xlabel("rank, per cent of break-even")
            axes.set_title(f"{m} × {n}")
        panes[0].set_ylabel("time / the dense layer's")
        panes[0].legend()

    return figure(
        draw,
        caption="Time of two factors over that of one layer. Grey: what the multiplications alone "
        "would give. At 100 the factors hold as many numbers as the layer.",
        alt="; ".join(
            f"{c['out']} × {c['in']}, tokens at a time {c['tokens']}: "
            + ", ".join(
                f"{t:.2f} at {r / c['break_even']:.0%}"
                for t, r in zip(c["times_dense"], c["ranks"])
            )
            for c in shown
        )
        + ".",
        figsize=(6.6, 2.5),
    )


@if_measured
def text_needed(rows: Sequence[Row]) -> CaptionedFigure:
    """The rise of the loss over the tokens of calibration text, on that text and on new text."""
    tokens = tables.measured_tokens(rows)
    curves = {
        method: [tables.by_tokens(rows, method, count) for count in tokens]
        for method in ("ASVD", "SVD-LLM")
    }
    base, plain = (pick(rows, method=method)[0]["loss"] for method in ("original", "SVD"))

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for method, found in curves.items():
            own, new = zip(*found)
            axes.plot(tokens, new, "o-", color=COLOURS[method], label=f"{method}, new text")
            axes.plot(tokens, own, "o:", color=COLOURS[method], label=f"{method}, its own text")
        ends = [tokens[0], tokens[-1]]
        axes.plot(ends, [plain - base] * 2, "--", color=COLOURS["SVD"], label="SVD, new text")
        axes.set_xscale("log")
        axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
        axes.minorticks_off()
        axes.set_xlabel("tokens of calibration text")
        axes.set_ylabel("rise of the loss, nats")
        name_lines(axes)

    return figure(
        draw,
        caption="mini-5m with 60 % kept: the rise of the loss on the text that a method was "
        "calibrated with (dotted), and on held-out text.",
        alt="; ".join(
            f"{method} on new text "
            + ", ".join(f"{new:.3f} at {count}" for count, (_, new) in zip(tokens, found))
            for method, found in curves.items()
        )
        + f"; plain SVD {plain - base:.3f}.",
        figsize=(6.4, 2.6),
    )
