"""The pictures of the chapter on pruning, each with its caption and alternative text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from effnb.chapters.inference.pruning import tables
from effnb.chapters.inference.pruning.methods import Learned
from effnb.inference import pruning
from effnb.lab import PALETTE, figure, name_lines
from effnb.lab.changes import Row, if_measured
from effnb.lab.figures import CaptionedFigure

METHODS = {
    "magnitude": PALETTE[1],
    "Wanda": PALETTE[2],
    "SparseGPT": PALETTE[0],
    "Taylor": PALETTE[3],
}
"""The methods of the first picture and their colours."""
SHARES = tuple(tenths / 10 for tenths in range(1, 10))
TIMED = {
    "magnitude, 50 %": "half zeros",
    "magnitude, 2:4": "2:4 zeros",
    "a third of heads, 50 % of neurons": "fewer heads, neurons",
    "50 % of layers": "half of the blocks",
}
"""The forms of SmolLM2 whose speed the first picture shows, with short names."""


def perplexity_curves(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """For each method: part removed, and perplexity."""
    curves = {}
    for method in METHODS:
        found = [(share, tables.losses(rows, method, share)) for share in SHARES]
        curves[method] = [(share, math.exp(fmean(losses))) for share, losses in found if losses]
    return curves


@if_measured
def result(methods: Sequence[Row], speed: Sequence[Row]) -> CaptionedFigure:
    """What removing weights costs, and what it does to speed."""
    curves, base = perplexity_curves(methods), math.exp(fmean(tables.original(methods)))
    bars = {
        name: next(row for row in speed if row["name"] == timed) for timed, name in TIMED.items()
    }

    def draw(fig: Figure) -> None:
        left, right = fig.subplots(1, 2, width_ratios=[5, 4])
        for method, colour in METHODS.items():
            left.plot(*zip(*curves[method]), "o-", color=colour, markersize=4, label=method)
        left.axhline(base, color="0.45", linestyle=":")
        left.set_yscale("log")
        left.set_xlim(0.05, 1.16)
        left.set_xticks([0.1, 0.3, 0.5, 0.7, 0.9])
        left.xaxis.set_major_formatter("{x:.0%}")
        left.set_xlabel("weights set to zero")
        left.set_title("mini-5m: perplexity")
        name_lines(left)
        for shift, what, colour, said in (
            (-0.2, "prefill", PALETTE[0], "reading"),
            (0.2, "decode", PALETTE[5], "writing"),
        ):
            heights = [place + shift for place in range(len(bars))]
            found = [row[f"{what}_times_dense"] for row in bars.values()]
            right.barh(heights, found, height=0.38, color=colour, label=said)
        right.axvline(1, color="0.45", linestyle=":")
        right.set_yticks(range(len(bars)), list(bars))
        right.invert_yaxis()
        right.grid(visible=False, axis="y")
        right.set_title("SmolLM2: speed ÷ dense")
        right.legend(loc="upper right", fontsize=8)

    return figure(
        draw,
        caption="Left, lower is better: perplexity of mini-5m on held-out text while single "
        "weights are set to zero; dotted: the original. Right, higher is better: tokens per second "
        "of SmolLM2 on a CPU, reading a prompt and writing.",
        alt=f"Left, curves rise from the original's {base:.1f}. At 80 % removed: "
        + ", ".join(f"{method} {dict(points)[0.8]:.0f}" for method, points in curves.items())
        + ". Right, bars of speed, reading and writing: "
        + ", ".join(
            f"{name} {row['prefill_times_dense']:.2f} and {row['decode_times_dense']:.2f}"
            for name, row in bars.items()
        )
        + " times dense.",
        figsize=(7.2, 2.9),
    )


def patterns(score: Float[Tensor, "out in"]) -> dict[str, Tensor]:
    """Half of a small matrix removed in four ways, from the most free to the strictest."""
    weakest = score.sum(1).argsort()[: len(score) // 2]
    return {
        "layer": pruning.keep_mask(score, 0.5, "layer"),
        "row": pruning.keep_mask(score, 0.5, "row"),
        "2:4": pruning.keep_mask(score, None, "2:4"),
        "whole rows": torch.ones_like(score, dtype=torch.bool).index_fill(0, weakest, False),
    }


def masks(score: Float[Tensor, "out in"], kinds: Mapping[str, Tensor]) -> CaptionedFigure:
    """The same scores, half of them removed in several ways."""

    def draw(fig: Figure) -> None:
        for axes, (name, mask) in zip(fig.subplots(1, len(kinds)), kinds.items(), strict=True):
            axes.imshow(torch.where(mask, score, torch.nan).numpy(), cmap="Blues", vmin=-1, vmax=3)
            axes.set_title(name)
            axes.set_xticks([])
            axes.set_yticks([])
        fig.axes[0].set_ylabel("outputs")

    return figure(
        draw,
        caption="White is removed; the darker, the larger the score. From left to right the rule "
        "gets stricter, and more of the large scores go.",
        alt="Four patterns with equally many zeros. Part of all score that is kept: "
        + ", ".join(f"{n} {score[m].sum() / score.sum():.0%}" for n, m in kinds.items())
        + ".",
        figsize=(6.4, 1.4),
    )


def learned(found: Learned) -> CaptionedFigure:
    """Which weights of a layer are left after training, by what they were before."""
    before = found.before

    def draw(fig: Figure) -> None:
        panes = fig.subplots(1, 2, sharey=True, sharex=True)
        for axes, (way, kept) in zip(panes, found.kept.items(), strict=True):
            axes.hist(
                [before[kept].tolist(), before[~kept].tolist()],
                bins=40,
                stacked=True,
                color=[PALETTE[0], "0.8"],
                label=["kept", "removed"],
            )
            axes.set_title(way)
            axes.set_xlabel("weight before fine-tuning")
        panes[0].set_ylabel("weights")
        panes[0].legend()

    small = {way: found.small_kept(way) for way in found.kept}
    return figure(
        draw,
        caption="One layer of mini-300k after it learned German: which weights are left, by the "
        "value that they had before.",
        alt="Two histograms. Of the smaller half of the weights "
        + ", ".join(f"{way} keeps {share:.0%}" for way, share in small.items())
        + ".",
        figsize=(6.4, 2.3),
    )
