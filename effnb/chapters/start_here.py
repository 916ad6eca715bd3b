"""The tour's first panel: SmolLM2 is asked for the capital of France while its weights are rounded.

A position takes seconds on a real model, so a page that is built or tested shows what
`data/sweep_tour.py` stored, and so does a kernel in which the model is not installed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from effnb.evaluation import stored_bytes
from effnb.inference import quantization
from effnb.lab import PALETTE, knob, load, panel, results
from effnb.lab.models import LoadedModel, ModelUnavailable
from effnb.lab.panels import Panel

PROMPT = "The capital of France is"
ANSWER = " Paris"
BITS = (2, 8)
SCALES = {"row": "row", "32 weights": 32}
WORDS = 10
"""Tokens of the answer that are shown."""
STORED = "tour_capital"


@torch.inference_mode()
def ask(model: torch.nn.Module, loaded: LoadedModel) -> dict[str, Any]:
    """The likeliest words after the question, and what the model writes when it takes them.

    Returns:
        "answer", the text; "paris", the probability of the right next token; "next", the five
        likeliest tokens with their probabilities.
    """
    prompt = loaded.tokenizer(PROMPT, return_tensors="pt").to(model.device)
    chances = model(**prompt).logits[0, -1].float().softmax(-1)
    likeliest = chances.topk(5)
    right = loaded.tokenizer.encode(ANSWER)[0]
    words = model.generate(
        **prompt, max_new_tokens=WORDS, do_sample=False, pad_token_id=loaded.tokenizer.eos_token_id
    )
    said = loaded.tokenizer.decode(
        words[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return {
        "answer": " ".join(said.split()),
        "paris": round(chances[right].item(), 4),
        "next": [
            [" ".join(loaded.tokenizer.decode([token]).split()) or "(space)", round(chance, 4)]
            for token, chance in zip(likeliest.indices.tolist(), likeliest.values.tolist())
        ],
    }


def rounded(loaded: LoadedModel, bits: int, scale: str) -> dict[str, Any]:
    """What the model answers when each weight is rounded to the nearest of $2^b$ values."""
    packed = quantization.rtn(loaded.model, bits, group_size=SCALES[scale])
    size = stored_bytes(packed)
    return ask(quantization.dequantized(packed), loaded) | {"bytes": size}


@cache
def _model() -> LoadedModel:
    """SmolLM2, read when the first position is computed and kept."""
    return load("smollm2-135m")


def _found(bits: int, scale: str) -> dict[str, Any]:
    """The answer at one position: computed here where that is possible, else the stored one."""
    stored = results.read(STORED)
    source = f"stored on {stored.provenance.date}"
    row = next(r for r in stored.data["table"] if (r["bits"], r["scale"]) == (bits, scale))
    if results.live():
        try:
            row, source = rounded(_model(), bits, scale), "computed here, just now"
        except ModelUnavailable:
            source += ", since the model is not installed here"
    return {**row, "bits": bits, "source": source, "original": stored.data["original"]}


def _draw(found: dict[str, Any], figure: Any) -> None:
    """The five likeliest next words, and the size."""
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    names = [_drawable(word) for word, _ in found["next"]]
    chances = [chance for _, chance in found["next"]]
    colours = [PALETTE[2] if word == ANSWER.strip() else "0.7" for word, _ in found["next"]]
    left.barh(range(5), chances, color=colours, height=0.6)
    for place, chance in enumerate(chances):
        left.annotate(f"{chance:.0%}", (chance + 0.02, place), va="center")
    left.set_yticks(range(5), names)
    left.invert_yaxis()
    left.set_xlim(0, 1.15)
    left.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    left.set_title(f"{PROMPT} …")
    left.set_xlabel("probability of the next token")
    sizes = [found["original"]["bytes"] / 2**20, found["bytes"] / 2**20]
    right.barh([0, 1], sizes, color=["0.7", PALETTE[0]], height=0.5)
    for place, size in enumerate(sizes):
        right.annotate(f"{size:.0f}", (size + 8, place), va="center")
    right.set_xlim(0, sizes[0] * 1.25)
    right.set_yticks([0, 1], ["original", f"{found['bits']} bits"])
    right.invert_yaxis()
    right.set_title("size")
    right.set_xlabel("MiB")


def _drawable(word: str) -> str:
    """A token in signs that every font has, and that matplotlib does not take for mathematics."""
    return word.encode("ascii", "replace").decode().replace("$", r"\$")[:14]


def _words(found: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"The model answers: {PROMPT} {found['answer']} …",
            f"The original answers: {PROMPT} {found['original']['answer']} …",
            f"Probability of “Paris”: {found['paris']:.0%}",
            f"Original's: {found['original']['paris']:.0%}",
            f"Size: {found['bytes'] / 2**20:.0f} MiB",
            f"Original's size: {found['original']['bytes'] / 2**20:.0f} MiB",
            f"Answer: {found['source']}",
        ]
    )


def capital_panel() -> Panel:
    """Bits and grouping for SmolLM2, and what it says is the capital of France."""
    return panel(
        _found,
        _draw,
        text=_words,
        title="Round SmolLM2's weights, and ask it for the capital of France",
        caption="Left: the model's five likeliest next words, “Paris” in green where it is among "
        "them. Right: the model's size.",
        bits=knob(*BITS, default=8),
        scale=knob(list(SCALES), label="a scale for each"),
    )


def answers(*positions: tuple[int, str]) -> None:
    """Print the stored answers at some positions, one a line."""
    stored = results.read(STORED).data
    print(f"original              {stored['original']['answer']}")
    for bits, scale in positions:
        row = next(r for r in stored["table"] if (r["bits"], r["scale"]) == (bits, scale))
        print(f"{bits} bits, {scale:<13} {row['answer']}")
