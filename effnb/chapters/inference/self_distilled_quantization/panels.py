"""The panels of the chapter on self-distilled quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from matplotlib.figure import Figure

from effnb.chapters.inference.self_distilled_quantization import (
    drawings,
    languages,
    methods,
    tables,
)
from effnb.inference import self_distilled_quantization as sdq
from effnb.inference.quantization import fake_quantize
from effnb.lab import knob, load, panel
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.panels import Panel, guess
from effnb.lab.task_inputs import encoder_batch
from effnb.lab.tasks import TONGUES

TEXTS = 4
"""Texts that the live panel measures errors on."""
MODULES = {
    "all layers": "*",
    "attention only": ("*.query", "*.key", "*.value", "*attention.output.dense"),
    "feed-forward only": ("*intermediate.dense", "*layer.?.output.dense"),
    "queries and keys only": ("*.query", "*.key"),
}
"""What the live panel rounds."""


@cache
def minilm() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """MiniLM and a few English descriptions."""
    loaded = load("minilm-l6", device="cpu")
    return loaded.model, [encoder_batch(loaded.tokenizer, languages.held_out("en")[:TEXTS])]


def largest(layers: Sequence[Mapping[str, Any]]) -> str:
    """The role with the largest mean error."""
    means = tables.role_means(layers)
    return max(means, key=means.get)


def errors() -> Panel:
    """Round MiniLM and see where it errs, computed while the reader waits."""

    def compute(bits: int, rounded: str) -> dict[str, Any]:
        from effnb.inference.quantization import dequantized, rtn

        model, batches = minilm()
        small = dequantized(rtn(model, bits, symmetric=True, layers=MODULES[rounded]))
        return {"layers": methods.layer_means(sdq.module_errors(model, small, batches))}

    def text(result: Mapping[str, Any]) -> str:
        means = tables.role_means(result["layers"])
        blocks = [r["accumulated"] for r in result["layers"] if r["role"] == "block"]
        lines = [f"{role}: {value:.1%}" for role, value in means.items()]
        return "\n".join([*lines, f"Output of the last block: {blocks[-1]:.1%}"])

    return panel(
        compute,
        lambda result, fig: drawings.draw_errors(result["layers"], fig),
        text=text,
        title="Where a rounded encoder errs",
        caption=f"MiniLM on {TEXTS} descriptions, its weights rounded to nearest. Numbers are "
        "relative errors in per cent.",
        figsize=(7.4, 3.2),
        frames={"bits": [4, 8], "rounded": list(MODULES)[:3]},
        predict=guess(
            "Only the feed-forward layers are rounded to 4 bits. Which module's output is wrong by "
            "most?",
            [drawings.SHORT[r].lower() for r in tables.ROLES if "norm" not in r],
            answer=lambda result: drawings.SHORT[largest(result["layers"])].lower(),
            at={"bits": 4, "rounded": "feed-forward only"},
        ),
        bits=knob(3, 8, default=4),
        rounded=knob(list(MODULES), label="what is rounded"),
    )


def noise() -> Panel:
    """A corner of a real weight, with the blocks that a step rounds."""
    model, _ = minilm()
    name = next(n for n, _ in model.named_modules() if n.endswith("layer.2.attention.self.value"))
    corner = model.get_submodule(name).weight.detach()[:16, :48]

    def compute(probability: float, block: int, bits: int) -> dict[str, Any]:
        torch.manual_seed(1)
        mask = sdq.noise_mask(*corner.shape, block, probability)
        rounded = fake_quantize(corner, bits, symmetric=True)
        wrong = (sdq.quant_noise(corner, rounded, mask) - corner).abs()
        return {
            "mask": mask,
            "wrong": wrong / corner.abs().max(),
            "part": float(mask.float().mean()),
            "error": float(wrong.norm() / corner.norm()),
            "whole": float((rounded - corner).norm() / corner.norm()),
        }

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        above, below = fig.subplots(2, 1)
        above.imshow(result["mask"].float(), cmap="Greys", vmin=0, vmax=1.5, aspect="auto")
        above.set_title("blocks that this step rounds")
        below.imshow(result["wrong"], cmap="cividis", vmin=0, vmax=0.15, aspect="auto")
        below.set_title("how far each weight is from itself")
        for axes in (above, below):
            axes.set_xticks([])
            axes.set_yticks([])

    def text(result: Mapping[str, Any]) -> str:
        return (
            f"Rounded in this step: {result['part']:.0%} of the weights\n"
            f"Relative error of the weight in this step: {result['error']:.1%}\n"
            f"The same with all of it rounded: {result['whole']:.1%}"
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Quant-Noise on a real weight",
        caption="Sixteen rows and 48 columns of a value matrix of MiniLM. Dark blocks are rounded "
        "in this step; all others have exact gradients.",
        figsize=(6.6, 2.8),
        frames={"probability": [0.0, 0.5, 1.0]},
        probability=knob([0.0, 0.1, 0.25, 0.5, 0.75, 1.0], default=0.5, label="noise p"),
        block=knob([1, 4, 8, 16], default=8, label="block size"),
        bits=knob(2, 8, default=4),
    )


@if_measured
def grid(rows: Sequence[Row]) -> Panel:
    """Bits, noise, attention's weight and the language, as the sweep found them."""
    exact = pick(rows, method="teacher")[0]["languages"]
    students = pick(rows, method="SDQ")
    bits = sorted({row["bits"] for row in students})
    noises = sorted({row["noise"] for row in students})
    alphas = sorted({row["alpha"] for row in students})

    def compute(bits: int, noise: float, alpha: float, language: str) -> dict[str, Any]:
        trained = pick(rows, method="SDQ", bits=bits, noise=noise, alpha=alpha)[0]["languages"]
        plain = pick(rows, method="PTQ", bits=bits)[0]["languages"]
        return {
            "curves": {"32 bits": exact, "rounded": plain, "trained": trained},
            "language": next(code for code, name in TONGUES.items() if name == language),
        }

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        drawings.draw_languages(result["curves"], result["language"], fig)

    def text(result: Mapping[str, Any]) -> str:
        code, lines = result["language"], []
        for name, quality in result["curves"].items():
            seen, unseen = tables.seen_unseen(quality)
            lines.append(
                f"{name}: {TONGUES[code]} {quality[code]:.1%}; seen {seen:.1%}, unseen "
                f"{unseen:.1%}, spread {sdq.spread(quality):.1%}"
            )
        return "\n".join(lines)

    return panel(
        compute,
        draw,
        text=text,
        title="Quantize a multilingual classifier",
        caption="Accuracy by language. Left of the dotted line: languages of the fine-tuning. "
        "Noise 1 rounds everything in each step; an attention weight of 0 leaves labels and the "
        "teacher's answers. One seed.",
        figsize=(7.4, 2.6),
        frames={"bits": bits},
        predict=guess(
            "All weights are rounded to 4 bits without training. How many points of accuracy are "
            "lost on average over the nine unseen languages?",
            answer=lambda result: round(
                100
                * (
                    tables.seen_unseen(result["curves"]["32 bits"])[1]
                    - tables.seen_unseen(result["curves"]["rounded"])[1]
                ),
                1,
            ),
            at={"bits": 4, "noise": noises[0], "alpha": alphas[0], "language": "English"},
        ),
        bits=knob(bits, default=4),
        noise=knob(noises, default=0.5, label="noise p"),
        alpha=knob(alphas, default=alphas[-1], label="attention weight"),
        language=knob([TONGUES[x] for x in (*languages.SEEN, *languages.UNSEEN)]),
    )
