"""The tour: SmolLM2 is asked for the capital of France, and mini-5m is rounded and measured.

A position of the first panel takes seconds on a real model, so a page that is built or tested shows
what `data/sweeps/00_start_here.py` stored, and so does a kernel where the model is not installed.
"""

from __future__ import annotations

from functools import cache
from statistics import fmean
from typing import Any

import torch

from effnb.core.modules import linears
from effnb.evaluation import flops
from effnb.inference import quantization
from effnb.lab import PALETTE, Exercise, figure, knob, load, panel, results
from effnb.lab.bench import PANEL_QUESTIONS, PANEL_WINDOWS, Bench, file_bytes
from effnb.lab.devices import Machine
from effnb.lab.figures import CaptionedFigure
from effnb.lab.models import LoadedModel, ModelUnavailable
from effnb.lab.panels import Guess, Panel

# --- the capital of France ------------------------------------------------------------------------

PROMPT = "The capital of France is"
ANSWER = " Paris"
BITS = (2, 8)
SCALES = {"row": "row", "32 weights": 32}
WORDS = 10
"""Tokens of the answer that are shown."""
STORED = "00_start_here/capital"


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
    size = file_bytes(packed)
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
        frames={"bits": [2, 3, 4, 8], "scale": None},
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


# --- the result first -----------------------------------------------------------------------------

KINDS = {"tensor": "one scale per matrix", "row": "one per row", "64": "one per 64 weights"}


def draw_sweep(figure: Any) -> None:
    """Perplexity and answers of mini-5m over bits per weight, for each way to share a scale."""
    table = results.read("00_start_here/rtn").data["table"]
    for axes, key in zip(figure.subplots(1, 2), ("perplexity", "accuracy")):
        for colour, (kind, label) in zip(PALETTE, KINDS.items()):
            rows = [row for row in table if row["group_size"] == kind]
            bits = [row["layer_bits"] for row in rows]
            axes.plot(bits, [row[key] for row in rows], "o-", color=colour, label=label)
        axes.axhline(table[0][key], color="0.45", linestyle="--", label="original")
        axes.set_xlabel("bits stored per weight")
    left, right = figure.axes
    left.set_yscale("log")
    left.set_title("perplexity (lower is better)")
    left.legend()
    right.set_title("right answers (higher is better)")
    right.yaxis.set_major_formatter("{x:.0%}")


def describe_sweep() -> str:
    """The same picture in words."""
    table = results.read("00_start_here/rtn").data["table"]
    original = table[0]

    def at(kind: str, bits: int) -> dict[str, Any]:
        return next(r for r in table if r["group_size"] == kind and r["bits"] == bits)

    return (
        "Left, three falling curves of perplexity over bits per weight. At 8 bits all three lie on "
        f"the original's {original['perplexity']:.1f}. At 3 bits: "
        f"{at('tensor', 3)['perplexity']:.0f} with one scale per matrix, "
        f"{at('row', 3)['perplexity']:.0f} per row, "
        f"{at('64', 3)['perplexity']:.0f} per 64 weights. "
        f"Right, the share of right answers: {original['accuracy']:.0%} for the original, "
        f"{at('tensor', 2)['accuracy']:.0%} at 2 bits with one scale per matrix."
    )


def sweep_figure() -> CaptionedFigure:
    """The tour's result: what fewer bits cost `mini-5m`, by both measures."""
    return figure(
        draw_sweep,
        caption="Fewer bits per weight, for three ways to share a scale: perplexity on held-out "
        "text, and how often the model prefers the true continuation of a software package's "
        "description among four.",
        alt=describe_sweep(),
    )


# --- this machine ---------------------------------------------------------------------------------


def what_it_means(here: Machine) -> None:
    """Print what a machine's cores, memory and GPU mean for the workbook, a line each."""
    quick = "Panels will feel quick."
    enough = "Two cores are enough; the times in the map were measured on two."
    print(f"Cores: {here.cores}. {quick if here.cores >= 4 else enough}")
    if here.memory_bytes:
        memory = here.memory_bytes / 2**30
        close = "Close other programs before the sections called “On a real model”."
        print(f"Memory: {memory:.0f} GiB. {'Every chapter fits.' if memory >= 6 else close}")
    if here.gpu:
        print(f"GPU: {here.gpu}. It is used wherever it helps.")
    else:
        print(
            "GPU: none, and none is needed: compute kernels then run their plain PyTorch versions."
        )
    if here.triton:
        print(f"Triton {here.triton}: GPU kernels run, or are stepped through without a GPU.")
    else:
        print("Triton: not installed, as usual without an NVIDIA GPU; no chapter needs it.")


# --- rounding any model ---------------------------------------------------------------------------

GROUPS = {"matrix": "tensor", "row": "row", "128 weights": 128, "64 weights": 64, "32 weights": 32}


def _times(found: dict[str, Any]) -> float:
    """Perplexity as a multiple of the original's, in three digits."""
    return float(f"{found['look'].perplexity.value / found['before'].perplexity.value:.3g}")


TWO_BITS = Guess(
    "At 2 bits, with one scale per row, how many times the original's perplexity will it be?",
    answer=_times,
    at={"bits": 2},
)
"""What the panel on `mini-5m` asks before it answers."""

ROW_OR_MATRIX = {"bits": [2, 3, 4], "scale": ["row", "matrix"]}
"""What a page without a kernel stores of that panel."""


def rounding_panel(
    name: str,
    frames: list[int] | dict[str, list] | None = None,
    predict: Guess | None = None,
) -> Panel:
    """Bits and grouping for any causal language model.

    Args:
        name: One of ours, or the folder of yours.
        frames: The numbers of bits that a page without a kernel stores; or those and the
            groupings, by the names of their knobs.
        predict: What is asked before the panel answers.
    """
    bench = Bench(name, windows=PANEL_WINDOWS, questions=PANEL_QUESTIONS)
    before = bench.look(bench.model, panel=True)
    layer_name, layer = next(iter(linears(bench.model).items()))

    def compute(bits: int, scale: str) -> dict[str, Any]:
        packed = quantization.rtn(bench.model, bits, group_size=GROUPS[scale])
        after = bench.look(quantization.dequantized(packed), panel=True, stored=packed)
        one = packed.get_submodule(layer_name).quantized
        return {"bits": bits, "look": after, "one": one, "before": before}

    def draw(found: dict[str, Any], figure: Any) -> None:
        _draw_rounding(found, layer.weight[0].detach(), figure)

    return panel(
        compute,
        draw,
        text=_rounding_words,
        title=f"Round {name} to nearest",
        caption="Left: one row of weights, and the grid that the chosen bits put it on. Right: "
        f"what the whole model saves in size and loses in perplexity, on {before.sample}.",
        frames=frames,
        predict=predict,
        bits=knob(2, 8, default=4),
        scale=knob(list(GROUPS), default="row", label="a scale for each"),
    )


def _draw_rounding(found: dict[str, Any], row: torch.Tensor, figure: Any) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    left.hist(row, bins=60, color="0.75")
    for level in found["one"].dequantize()[0].unique():
        left.axvline(float(level), color=PALETTE[0], linewidth=0.8)
    left.set_title(f"one row of weights on its {found['bits']}-bit grid")
    left.set_xlabel("weight")
    left.set_ylabel("weights")
    before, after = found["before"], found["look"]
    size = after.bytes / before.bytes
    loss = after.perplexity.value / before.perplexity.value
    for y, times, colour in ((1, size, PALETTE[2]), (0, loss, PALETTE[1])):
        right.barh(y, times - 1, left=1, color=colour, height=0.5)
        right.annotate(f"{times:.2f} ×", (max(times, 1) * 1.08, y), va="center")
    right.axvline(1, color="0.3")
    right.set_xscale("log")
    right.set_xlim(0.1, max(10, 4 * loss))
    right.set_ylim(-0.6, 1.6)
    right.xaxis.set_major_formatter("{x:g}")
    right.set_yticks([1, 0], ["size", "perplexity"])
    right.set_title("times the original's")


def _rounding_words(found: dict[str, Any]) -> str:
    before, after = found["before"], found["look"]
    return "\n".join(
        [
            f"Perplexity: {after.perplexity.value:.4g}",
            f"Original's: {before.perplexity.value:.4g}",
            f"Right answers: {after.accuracy:.0%}",
            f"Original's right answers: {before.accuracy:.0%}",
            f"Size: {after.bytes / 2**20:.2f} MiB",
            f"Original's size: {before.bytes / 2**20:.2f} MiB",
            f"Bits per weight: {found['one'].bits_per_weight:.2f}",
            f"The original writes: {before.text} …",
            f"Rounded, it writes: {after.text} …",
        ]
    )


# --- the claim ------------------------------------------------------------------------------------


@torch.inference_mode()
def saved(bench: Bench, packed: torch.nn.Module) -> None:
    """Print what a packed model saves in memory and operations, and what it loses.

    Args:
        bench: The original's bench.
        packed: The same model, with packed weights in its layers.
    """
    after = fmean(bench.losses(quantization.dequantized(packed)))
    loss = after - fmean(bench.losses(bench.model))
    windows = bench.windows[:4]
    memory = file_bytes(packed) / file_bytes(bench.model)
    operations = flops(lambda: packed(input_ids=windows))
    operations /= flops(lambda: bench.model(input_ids=windows))
    print(f"memory       {memory:.2f} of the bytes of the file with 16 bits a weight")
    print(f"operations   {operations:.2f} of the original's, counted")
    print(f"loss        {loss:+.3f} nats a token")


# --- the exercise ---------------------------------------------------------------------------------


def step_of_each_row(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The largest magnitude of each row, divided by the largest code."""
    return weight.abs().amax(dim=1) / (2 ** (bits - 1) - 1)


symmetric_step = Exercise(
    "The symmetric step",
    minutes=3,
    difficulty="easy",
    reference=step_of_each_row,
    cases=[
        (torch.tensor([[1.0, -2.0, 0.5], [0.1, 0.2, -0.7]]), 4),
        (torch.tensor([[-3.0, 1.0], [0.5, 0.25], [4.0, -8.0]]), 3),
    ],
    wrong={
        "This is one step for the whole matrix; each row needs the largest magnitude in that row": (
            lambda weight, bits: weight.abs().max() / (2 ** (bits - 1) - 1)
        ),
        "This takes the largest magnitude of each column; a row is one output, so reduce over "
        "dimension 1": lambda weight, bits: weight.abs().amax(0) / (2 ** (bits - 1) - 1),
        "A negative weight can be the largest in magnitude: take the absolute value first": (
            lambda weight, bits: weight.amax(1) / (2 ** (bits - 1) - 1)
        ),
        "Half of the 2^b codes are negative: the largest code is 2^(b-1) - 1, not 2^b - 1": (
            lambda weight, bits: weight.abs().amax(1) / (2**bits - 1)
        ),
        "The largest code is 2^(b-1) - 1: the code 2^(b-1) does not fit into b bits with a sign": (
            lambda weight, bits: weight.abs().amax(1) / 2 ** (bits - 1)
        ),
    },
    atol=1e-5,
)
