"""The pictures of the chapter on quantization, each with its caption and alternative text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

from effnb.chapters.inference.quantization import tables
from effnb.inference import quantization
from effnb.lab import PALETTE, figure
from effnb.lab.figures import CaptionedFigure

Row = Mapping[str, Any]

METHODS = {"RTN": PALETTE[1], "GPTQ": PALETTE[0]}
GROUPS = {"row": ("per row", "o--"), "64": ("groups of 64", "s-")}


def plain_numbers(axes: Axes) -> None:
    """A logarithmic axis with numbers that can be read, also where it spans less than a decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


# --- the result -----------------------------------------------------------------------------------


def perplexity_curves(rows: Sequence[Row]) -> dict[str, list[tuple[int, float, float]]]:
    """For each method and group size: bits, bits stored per weight, and perplexity."""
    curves = {}
    for method in METHODS:
        for group, (label, _) in GROUPS.items():
            points = []
            for bits in range(2, 9):
                found = tables.pick(rows, method=method, group_size=group, bits=bits)
                if found:
                    loss = fmean(row["loss"] for row in found)
                    points.append((bits, found[0]["layer_bits"], math.exp(loss)))
            curves[f"{method}, {label}"] = points
    return curves


@tables.if_measured
def result(methods: Sequence[Row], minilm: Sequence[Row]) -> CaptionedFigure:
    """Two models, one curve for each way of rounding."""
    curves = perplexity_curves(methods)
    base = math.exp(tables.pick(methods, method="original")[0]["loss"])
    recall = {
        f"{method}, {label}": [
            (bits, fmean(tables.minilm_hits(minilm, method, bits, group)))
            for bits in reversed(tables.minilm_bits(minilm))
        ]
        for method in METHODS
        for group, (label, _) in GROUPS.items()
    }
    original = fmean(tables.hits(tables.pick(minilm, method="original")[0]))

    def draw(fig: Figure) -> None:
        left, right = fig.subplots(1, 2)
        for method, colour in METHODS.items():
            for label, line in GROUPS.values():
                name = f"{method}, {label}"
                left.plot(*zip(*[(x, y) for _, x, y in curves[name]]), line, color=colour)
                right.plot(*zip(*recall[name]), line, color=colour, label=name)
        left.axhline(base, color="0.45", linestyle=":")
        right.axhline(original, color="0.45", linestyle=":")
        left.set_title("mini-5m: perplexity")
        left.set_xlabel("bits stored per weight")
        right.set_title("MiniLM: found first")
        right.set_xlabel("bits per code")
        right.set_xticks(tables.minilm_bits(minilm))
        right.yaxis.set_major_formatter("{x:.0%}")
        right.legend(loc="lower right")

    worst = {name: points[0] for name, points in curves.items()}
    return figure(
        draw,
        caption="Left, lower is better: perplexity of mini-5m on held-out text. Right, higher "
        "is better: how often MiniLM finds the right one of 400 texts. Dotted: the original. "
        "RTN rounds to nearest; GPTQ lets neighbouring weights make up for each rounding.",
        alt=f"Left, four curves fall to the original's perplexity of {base:.1f}. At 2 bits: "
        + ", ".join(f"{name} {y:.1f}" for name, (_, _, y) in worst.items())
        + f". Right, four curves rise to the original's {original:.0%}. At 2 bits: "
        + ", ".join(f"{name} {points[0][1]:.0%}" for name, points in recall.items())
        + ".",
        figsize=(6.8, 2.9),
    )


# --- the idea -------------------------------------------------------------------------------------


def grid_points(small: quantization.QuantizedTensor) -> list[list[float]]:
    """The values that the first row of a small matrix can take, group by group."""
    levels = torch.arange(2**small.bits)
    zeros = small.zero_points()
    found = []
    for group, scale in enumerate(small.scales[0].float()):
        if zeros is None:  # a symmetric grid has one code fewer
            codes = levels[1:] - 2 ** (small.bits - 1)
        else:
            codes = levels - zeros[0, group]
        found.append((codes * scale).tolist())
    return found


def grids(
    weights: Sequence[float], choices: Mapping[str, quantization.QuantizedTensor]
) -> CaptionedFigure:
    """A few weights above the points of the grids that could hold them."""
    points = {label: grid_points(small) for label, small in choices.items()}
    errors = {
        label: (small.dequantize()[0] - torch.tensor(weights)).square().mean().sqrt().item()
        for label, small in choices.items()
    }

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for y, (_, every) in enumerate(points.items()):
            for colour, group in zip(PALETTE, every):
                axes.plot(group, [y] * len(group), "|", color=colour, markersize=16)
        axes.plot(weights, [len(points)] * len(weights), "o", color=PALETTE[2])
        axes.set_yticks(range(len(points) + 1), [*points, "weights"])
        axes.set_xlabel("value")

    return figure(
        draw,
        caption="The weights, and the sixteen values that four bits can hold for them. A second "
        "colour marks the grid of the second group.",
        alt="Root mean squared errors: "
        + ", ".join(f"{label} {error:.3f}" for label, error in errors.items())
        + ".",
        figsize=(7.2, 2.4),
    )


def moved(rows: Sequence[tuple[str, float, float]]) -> CaptionedFigure:
    """For each matrix: GPTQ's squared error over rounding's, in the weights and in the output."""

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for place, colour, label in ((1, PALETTE[1], "weights"), (2, PALETTE[0], "output")):
            axes.plot([row[place] for row in rows], "o", color=colour, label=label)
        axes.axhline(1, color="0.45", linestyle="--")
        plain_numbers(axes)
        axes.set_xlabel("linear layers, from the first block to the last")
        axes.set_ylabel("GPTQ's squared error / RTN's")
        axes.legend()

    weights, outputs = (fmean(row[place] for row in rows) for place in (1, 2))
    return figure(
        draw,
        caption="Three bits, one scale per row. Above the dashed line GPTQ is further from the "
        "original than rounding to nearest; below it, nearer.",
        alt=f"The ratio of the weights' errors is {weights:.2f} on average, that of the outputs' "
        f"{outputs:.2f}; the dashed line is at 1.",
        figsize=(6.4, 2.6),
    )


def smoothed(before: Float[Tensor, " in"], after: Float[Tensor, " in"]) -> CaptionedFigure:
    """The largest input of each channel before and after SmoothQuant."""

    def draw(fig: Figure) -> None:
        panes = fig.subplots(1, 2, sharey=True)
        for axes, values, title in zip(panes, (before, after), ("with outliers", "smoothed")):
            axes.bar(range(len(values)), values.tolist(), width=1.0, color=PALETTE[0])
            axes.set_title(title)
            axes.set_xlabel("input channel")
        plain_numbers(panes[0])
        panes[0].set_ylabel("largest magnitude")

    return figure(
        draw,
        caption="The largest input of each channel, before and after SmoothQuant. Both models "
        "compute the same.",
        alt=f"Left, two channels stand out: {before.max():.0f} against a median of "
        f"{before.median():.1f}. Right, the largest is {after.max():.1f} and the median "
        f"{after.median():.1f}.",
        figsize=(7.2, 2.8),
    )


def straight_through(bits: int = 3, step: float = 0.6) -> CaptionedFigure:
    """Rounding and the two gradients that training pretends it has."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    with torch.enable_grad():
        x = torch.linspace(-3, 3, 301, requires_grad=True)
        learned = torch.tensor(step, requires_grad=True)
        y = quantization.lsq_quantize(x, learned, low, high)
        (to_x,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        to_step = torch.stack(
            [torch.autograd.grad(v, learned, retain_graph=True)[0] for v in y[::3]]
        )
    lines = (
        ("forward: rounded", x, y),
        ("backward: to x", x, to_x),
        ("backward: to the step", x[::3], to_step),
    )

    def draw(fig: Figure) -> None:
        for axes, (title, across, up) in zip(fig.subplots(1, 3), lines):
            axes.plot(across.tolist(), up.tolist(), color=PALETTE[0])
            axes.set_title(title)
            axes.set_xlabel("x")

    return figure(
        draw,
        caption=f"{bits} bits with step {step}. The gradient for x is an invention; the gradient "
        "for the step (LSQ) says whether the grid should grow.",
        alt=f"Left, a staircase from {low * step:.1f} to {high * step:.1f}. Middle, 1 inside "
        f"that range and 0 outside. Right, a sawtooth between -0.5 and 0.5 inside, {low} below "
        f"the range and {high} above.",
        figsize=(7.2, 2.6),
    )


# --- what was measured ----------------------------------------------------------------------------

BY = {
    "uniform": ("the same bits everywhere", "0.35", "o"),
    "loss": ("by the rise of the loss", PALETTE[0], "o"),
    "output": ("by the output's error", PALETTE[1], "s"),
    "hessian": ("by curvature (HAWQ)", PALETTE[2], "^"),
}


@tables.if_measured
def mixed(table: Sequence[Row]) -> CaptionedFigure:
    """Perplexity over stored bits for uniform and mixed allocations."""
    curves = {
        by: sorted(
            (row["layer_bits"], math.exp(row["loss"]))
            for row in table
            if row["by"] == by and row["method"] != "greedy"
        )
        for by in BY
    }

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for by, (label, colour, marker) in BY.items():
            axes.plot(*zip(*curves[by]), f"{marker}-", color=colour, label=label)
        axes.set_xlabel("bits stored per weight")
        axes.set_ylabel("perplexity")
        axes.legend()

    return figure(
        draw,
        caption="mini-5m, rounded to nearest, with two to four bits for each layer under several "
        "byte budgets. Grey: uniform bits.",
        alt="Perplexity over stored bits per weight: "
        + "; ".join(
            f"{BY[by][0]} " + ", ".join(f"{x:.2f} bits {y:.1f}" for x, y in points)
            for by, points in curves.items()
        )
        + ".",
        figsize=(6.4, 2.8),
    )
