"""The pictures of the chapter on co-design, each with its caption and alternative text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Bool
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from effnb.chapters.hardware.codesign import tables
from effnb.chapters.hardware.codesign.roofs import Gpu, Machine
from effnb.hardware.codesign.roofline import Roof
from effnb.lab import PALETTE, figure
from effnb.lab.changes import if_measured
from effnb.lab.figures import CaptionedFigure

Row = Mapping[str, Any]
GREY = "0.45"


def roof_line(
    axes: Axes, roof: Roof, line: str = "-", *, high: float = 2000, unit: float = 1e9
) -> None:
    """The roof: a slope for the memory, a level for the arithmetic."""
    x = [0.1, roof.ridge_operations_per_byte, high]
    axes.plot(x, [roof.attainable(v) / unit for v in x], line, color="0.35")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte")


def roofs(machine: Machine, gpu: Gpu) -> CaptionedFigure:
    """The measured roof of this machine, and a GPU's."""
    here = [
        (machine.work(m).operations_per_byte, machine.work(m).operations / seconds)
        for m, seconds in machine.seconds.items()
    ]

    def draw(fig: Figure) -> None:
        left, right = fig.subplots(1, 2)
        roof_line(left, machine.roof, high=200)
        left.plot([x for x, _ in here], [y / 1e9 for _, y in here], "o", color=PALETTE[0])
        left.set_ylabel("billion operations per second")
        left.set_title("this machine, measured")
        roof_line(right, gpu.roof, "-" if gpu.measured else "--", unit=1e12)
        right.plot(
            [x for x, _ in gpu.points],
            [y / 1e12 for _, y in gpu.points],
            "o",
            color=PALETTE[1],
            markerfacecolor=PALETTE[1] if gpu.measured else "none",
        )
        right.set_ylabel("trillion operations per second")
        right.set_title(f"{gpu.name}, {'measured' if gpu.measured else 'data sheet only'}")

    right = (
        f"The ceilings of {gpu.name}, measured and stored; each dot is one of this book's GPU "
        "kernels, measured too."
        if gpu.measured
        else "The ceilings that a vendor states; hollow dots are where they would allow a layer of "
        "width 4,096 with 1, 16, 256 and 1,024 tokens. Nothing on the right was measured."
    )
    roof, few = machine.roof, here[0][1] / 1e9
    return figure(
        draw,
        caption="Left: one layer with 1 to 256 tokens at once; the roof is the highest rate that "
        f"was seen of memory and of arithmetic. Right: {right}",
        alt=f"Left, a slope of {roof.bytes_per_second / 1e9:.0f} billion bytes per second meets a "
        f"level of {roof.operations_per_second / 1e9:.0f} billion operations per second; dots "
        f"climb from {few:.1f} with one token to {here[-1][1] / 1e9:.0f} with "
        f"{max(machine.seconds)}. Right, the same shape for {gpu.roof.name}: "
        f"{gpu.roof.bytes_per_second / 1e12:.2f} trillion bytes and "
        f"{gpu.roof.operations_per_second / 1e12:.0f} trillion operations per second.",
        figsize=(6.4, 2.5),
    )


def kept(words: Sequence[str], layers: Bool[Tensor, "layers tokens"]) -> CaptionedFigure:
    """Which tokens of a sentence each layer works on."""

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for layer, present in enumerate(layers.tolist()):
            at = [i for i, one in enumerate(present) if one]
            axes.plot(at, [layer] * len(at), "s", color=PALETTE[0], markersize=8)
        axes.set_xticks(range(len(words)), words, rotation=60, ha="right")
        axes.set_yticks(range(len(layers)), [f"layer {i + 1}" for i in range(len(layers))])
        axes.set_ylim(len(layers) - 0.5, -0.5)

    left = ", ".join(word for word, one in zip(words, layers[-1].tolist(), strict=True) if one)
    return figure(
        draw,
        caption="MiniLM with SpAtten's cascade down to a quarter of the tokens. A square: the "
        "layer still works on this token.",
        alt=f"A staircase: each layer works on fewer tokens. In the last: {left}.",
        figsize=(6.4, 2.6),
    )


STYLES = {
    "tokens at random": ("0.6", "s--"),
    "tokens, summed": (PALETTE[1], "o-"),
    "tokens, averaged": (PALETTE[2], "o-"),
    "heads at random": ("0.6", "v--"),
    "heads": (PALETTE[3], "v-"),
    "Energon": (PALETTE[0], "^-"),
}


@if_measured
def curves(rows: Sequence[Row]) -> CaptionedFigure:
    """What leaving out costs a language model."""
    points = {name: tables.curve(rows, name) for name in tables.LINES}

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        axes.axhline(0, color=GREY, linestyle=":")
        for name, (colour, line) in STYLES.items():
            axes.plot(*zip(*points[name]), line, color=colour, label=name, markersize=5)
        axes.set_xlabel("pairs of query and key computed, share of all")
        axes.set_ylabel("nats above the original")
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.legend(loc="upper center")

    return figure(
        draw,
        caption="What pruned attention costs mini-5m. Left is less work, down is better. Energon "
        "chooses the keys again for each query; all others remove for good.",
        alt="Nats above the original over the share of pairs computed: "
        + "; ".join(
            f"{name} " + ", ".join(f"{x:.0%} {y:+.2f}" for x, y in found)
            for name, found in points.items()
        )
        + ".",
        figsize=(6.4, 2.6),
    )
