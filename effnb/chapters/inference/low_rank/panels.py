"""The smaller panels of the chapter on low rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure

from effnb.chapters.inference.low_rank import methods, tables
from effnb.chapters.inference.low_rank.drawings import COLOURS
from effnb.lab import PALETTE, knob, panel
from effnb.lab.changes import Change, Row, if_measured, pick
from effnb.lab.panels import Panel, guess

VOCABULARY = 49_152
"""Tokens that SmolLM2 chooses among: the perplexity of a model that knows nothing."""

FACTORS = {
    "less than 1.5 times": 1.5,
    "1.5 to 10 times": 10.0,
    "10 to 1,000 times": 1000.0,
    "more than 1,000 times": math.inf,
}
"""The choices of a guess about perplexity, and where each ends."""


def factor_choice(nats: float) -> str:
    """The choice that a rise of the loss belongs to."""
    factor = math.exp(min(nats, 700.0))
    return next(words for words, end in FACTORS.items() if factor < end)


@if_measured
def smollm2(rows: Sequence[Row]) -> Panel:
    """SmolLM2 with a part of its layers' numbers, as the sweep found it."""
    original = pick(rows, method="original")[0]
    base = math.exp(original["loss"])

    def compute(kept: int, method: str) -> dict[str, Any]:
        found = pick(rows, method=method, kept=kept / 100)
        return {
            "perplexity": math.exp(fmean(row["loss"] for row in found)),
            "change": tables.rises(rows, method, kept / 100),
            "windows": len(original["windows"]),
            "text": found[0].get("text", ""),
        }

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        axes = fig.subplots()
        for y, value, colour in ((1, base, PALETTE[2]), (0, result["perplexity"], PALETTE[1])):
            axes.barh([y], [value], left=1, color=colour, height=0.6)
        axes.set_xscale("log")
        axes.set_xlim(1, 1e11)
        axes.set_yticks([0, 1], ["factorized", "original"])
        axes.set_xticks([1, 1e3, 1e6, 1e9], ["1", "a thousand", "a million", "a billion"])
        axes.minorticks_off()
        axes.axvline(VOCABULARY, color="0.4", linestyle="--", linewidth=1)
        axes.text(VOCABULARY * 1.3, 1.05, "guessing", color="0.35", fontsize=9, va="center")
        axes.set_xlabel("perplexity")

    def text(result: Mapping[str, Any]) -> str:
        change: Change = result["change"]
        lines = [
            f"Perplexity: {result['perplexity']:,.4g}",
            f"Original's: {base:.4g}",
            f"Against the original: {change.word()}",
            f"Factor, with its 95 % interval: {tables.times(change)}, from "
            f"{result['windows']} windows",
        ]
        if result["text"]:
            lines += [f"The original writes: {original['text']} …", f"Now: {result['text']} …"]
        return "\n".join(lines)

    shares = [round(100 * kept) for kept in tables.real_kept(rows)]
    return panel(
        compute,
        draw,
        text=text,
        title="SmolLM2-135M with fewer numbers",
        caption="Perplexity of the original and of the factorized model on a held-out text. To the "
        "right of the dashed line a model does worse than one that finds all tokens equally "
        "likely.",
        figsize=(6.4, 1.6),
        frames={"kept": [shares[0], shares[-1]], "method": ["SVD", "SVD-LLM"]},
        predict=guess(
            f"Plain SVD keeps {shares[0]} % of the numbers of every layer. By what factor does the "
            "perplexity of SmolLM2-135M grow?",
            list(FACTORS),
            answer=lambda result: factor_choice(result["change"].mean),
            at={"kept": shares[0], "method": "SVD"},
        ),
        kept=knob(shares, default=shares[0], label="kept, per cent"),
        method=knob(list(methods.METHODS), default="SVD"),
    )


# --- two inputs -----------------------------------------------------------------------------------

WEIGHT = torch.tensor([[3.0, 0.0], [4.0, 5.0]])
"""The matrix of the chapter's example."""

BETTER = ("neither", "ASVD alone", "SVD-LLM alone", "both")


def errors_at(inputs: str) -> dict[str, float]:
    """The squared error of the outputs that each method makes at rank 1."""
    gram = methods.INPUTS[inputs]
    found = methods.truncations(WEIGHT, gram, 1)
    return {name: methods.output_error(WEIGHT - matrix, gram) for name, matrix in found.items()}


def better_than_plain(errors: Mapping[str, float]) -> str:
    """Which of the two methods that look at inputs make a smaller error than plain SVD."""
    found = [name for name in ("ASVD", "SVD-LLM") if errors[name] < errors["SVD"] * (1 - 1e-6)]
    return {0: "neither", 2: "both"}.get(len(found), f"{''.join(found)} alone")


def two_inputs() -> Panel:
    """Which direction each method keeps, and what that costs, for three kinds of two inputs."""
    draws = torch.randn(150, 2, generator=torch.Generator().manual_seed(0))

    def compute(inputs: str) -> dict[str, Any]:
        gram = methods.INPUTS[inputs]
        kept = methods.truncations(WEIGHT, gram, 1)
        # A matrix of rank 1 reads one direction: its rows are multiples of each other.
        reads = {name: matrix[matrix.norm(dim=1).argmax()] for name, matrix in kept.items()}
        cloud = draws @ torch.linalg.cholesky(gram).T
        return {"cloud": cloud, "reads": reads, "errors": errors_at(inputs)}

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        left, right = fig.subplots(1, 2, width_ratios=[2, 3])
        left.plot(*result["cloud"].T.tolist(), ".", color="0.75", markersize=3)
        styles = dict(zip(methods.METHODS, ("-", (0, (5, 3)), (0, (1, 1)))))
        for name, row in result["reads"].items():
            a, b = (9 * row / row.norm()).tolist()
            left.plot([-a, a], [-b, b], color=COLOURS[name], linestyle=styles[name])
        left.set_xlim(-9, 9)
        left.set_ylim(-9, 9)
        left.set_xlabel("input 1")
        left.set_ylabel("input 2")
        names = list(reversed(methods.METHODS))
        values = [result["errors"][name] for name in names]
        right.barh(names, values, color=[COLOURS[name] for name in names], height=0.6)
        right.set_title("squared error of the output")

    def text(result: Mapping[str, Any]) -> str:
        return "\n".join(f"{name}: {error:.1f}" for name, error in result["errors"].items())

    return panel(
        compute,
        draw,
        text=text,
        title="Which direction is kept?",
        caption="Left: inputs (dots), and the one direction that each method reads at rank 1. "
        "Right: the error of the output.",
        figsize=(6.4, 2.2),
        predict=guess(
            "Two inputs are equally large, and when one rises, the other falls. Which method keeps "
            "the output better than plain SVD?",
            BETTER,
            answer=lambda result: better_than_plain(result["errors"]),
            at={"inputs": "opposed"},
        ),
        inputs=knob(list(methods.INPUTS), default="alike"),
    )
