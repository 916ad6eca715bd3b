"""The measurements behind the verdicts of `notebooks/02_design/3_sharing`.

    python data/sweeps/02_design/3_sharing_claims.py                 # every part
    python data/sweeps/02_design/3_sharing_claims.py reading depth   # these parts

reading  seconds to read 512 tokens and parameters, with and without shared layers (half a minute)
shared   language models of six layers, built in eight ways, trained briefly on the same tokens,
         five seeds (about 45 minutes: 40 runs)
depth    seconds that one more layer takes over the length of the input, and whole models
         (2 minutes)
masked   masked characters filled in by Perceivers and a Transformer, five seeds (about 8 minutes:
         20 runs)

The minutes are those of one idle core. Times are the processor's seconds on one thread, in rounds
that go through all models in turn; they are taken on random weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from effnb.chapters.design.sharing import methods
from effnb.core.training import TrainingSettings, train
from effnb.lab import claims_bench
from effnb.lab._files import data_folder
from effnb.lab.claims_bench import Table, by_document, documents_of
from effnb.lab.sweeps import held_out_novel
from effnb.lab.texts import training_batches

sys.path.append(str(Path(__file__).resolve().parents[2]))
import train_models

SEEDS = (0, 1, 2, 3, 4)
ROUNDS = 9
STEPS, SHAPE = 800, (8, 128)
"""Steps of a language model's training, and sequences and tokens of each: after 250, a pilot's six
layers were no better than one."""
MASKED_STEPS, MASKED_SHAPE = 300, (16, methods.PLACES)
"""Pilots of up to 1,200 steps stayed where 100 had led: at the frequencies of the characters."""
LENGTHS = (128, 512, 4096)
SMALL = "six layers of 64 channels"
LATENTS = "Perceiver of 64 latents"
MASKED = "masked characters, 256 places"


@cache
def tokenizer() -> Any:
    """The bench's; no model is loaded for it."""
    return AutoTokenizer.from_pretrained(data_folder() / "models" / "tokenizer")


def documents(count: int, length: int) -> list[Tensor]:
    """The beginnings of so many chapters of a novel that no run has seen."""

    class Loaded:
        pass

    loaded = Loaded()
    loaded.tokenizer = tokenizer()
    return documents_of(loaded, held_out_novel(), count, length)


def missing(table: Table, about: dict[str, Any]) -> bool:
    """Whether a row is not stored yet."""
    return not any(about.items() <= row.items() for row in table.rows)


def in_turn(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Processor's seconds of each call in every round; the machine's moods meet all alike."""
    return methods.in_turn(calls, ROUNDS)


def reading(table: Table) -> None:
    """The same pass through weights that are shared and through weights that are not."""
    names = ("none", "all")
    if not any(
        missing(table, {"model": SMALL, "method": name, "table": "reading"}) for name in names
    ):
        return
    models = {name: methods.language_model(name, seed=0).eval() for name in names}
    ids = torch.randint(1, 4096, (1, 512), generator=torch.Generator().manual_seed(0))
    calls = {
        name: (lambda model=model: model(input_ids=ids, use_cache=False))
        for name, model in models.items()
    }
    with torch.inference_mode():
        seconds = in_turn(calls)
    for name, model in models.items():
        table.add(
            {"model": SMALL, "method": name, "table": "reading"},
            lambda name=name, model=model: {
                "seconds": seconds[name],
                "parameters": sum(p.numel() for p in model.parameters()),
            },
        )


def shared(table: Table) -> None:
    """Every way to share, trained on the same tokens in the same order."""
    judged = documents(24, 256)
    for seed in SEEDS:
        for method in methods.SHARED:
            about = {"model": SMALL, "method": method, "table": "shared", "seed": seed}
            table.add(
                about,
                lambda method=method, seed=seed: trained_briefly(method, seed, judged),
            )


@cache
def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    """What every model of a seed reads, step by step, every token counted."""
    drawn = training_batches(tokenizer(), seed, STEPS, SHAPE)
    return [(ids, torch.ones(ids.shape)) for ids in drawn]


def trained_briefly(method: str, seed: int, judged: list[Tensor]) -> dict[str, Any]:
    """Losses of every document after a short training; the recipe is that of the bench."""
    model = methods.language_model(method, seed)
    model.set_attn_implementation("eager")  # a third faster than the fused one at heads of 16
    settings = TrainingSettings(
        steps=STEPS, learning_rate=train_models.MUON_RATE, warmup_steps=STEPS // 10,
        schedule="wsd", weight_decay=0.05, betas=(0.9, 0.95), seed=seed,
    )  # fmt: skip
    result = train(
        model,
        batches(seed).__getitem__,
        settings,
        loss=train_models.mixture_loss,
        optimizers=train_models.muon_and_adamw,
    )
    return {
        "documents": by_document(model, judged),
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_adds": methods.token_multiply_adds(model),
        "training_tokens": STEPS * SHAPE[0] * SHAPE[1],
        "train_seconds": round(result.seconds, 1),
    }


def depth(table: Table) -> None:
    """What a layer costs over the length of the input: the difference of a deep and a flat model.

    Then whole models of eight layers, on a short and on a long input.
    """
    few, many, whole = 2, 10, 8
    for tokens in LENGTHS:
        x = torch.randn(1, tokens, methods.WIDTH, generator=torch.Generator().manual_seed(0))
        rows = [
            {"model": LATENTS, "method": kind, "table": name, "tokens": tokens}
            for kind in methods.READERS
            for name in ("depth", "whole")
        ]
        if not any(missing(table, row) for row in rows):
            continue
        models = {
            (kind, layers): make(layers)
            for kind, make in methods.READERS.items()
            for layers in (few, many, whole)
        }
        calls = {
            f"{kind} {layers}": (lambda model=model, x=x: model(x))
            for (kind, layers), model in models.items()
        }
        with torch.inference_mode():
            seconds = in_turn(calls)
        for row in rows:
            kind = row["method"]
            if row["table"] == "whole":
                found = seconds[f"{kind} {whole}"]
            else:
                pairs = zip(seconds[f"{kind} {many}"], seconds[f"{kind} {few}"], strict=True)
                found = [max(1e-7, round((a - b) / (many - few), 7)) for a, b in pairs]
            table.add(row, lambda found=found: {"seconds": found})


def masked(table: Table) -> None:
    """Characters that are masked, from what the latents let pass."""
    judged = methods.character_windows("test", 24, methods.PLACES)
    for seed in SEEDS:
        for method in methods.FILLERS:
            about = {"model": MASKED, "method": method, "table": "masked", "seed": seed}
            table.add(about, lambda method=method, seed=seed: filled_in(method, seed, judged))


def filled_in(method: str, seed: int, judged: Tensor) -> dict[str, Any]:
    """Loss on the masked characters of every held-out window after training."""
    model = methods.filler(method, seed)
    settings = TrainingSettings(
        steps=MASKED_STEPS, learning_rate=2e-3, warmup_steps=MASKED_STEPS // 10, schedule="wsd",
        betas=(0.9, 0.98), seed=seed,
    )  # fmt: skip
    result = train(
        model, methods.masked_batches(seed, MASKED_SHAPE), settings, loss=methods.masked_loss
    )
    losses, right = methods.masked_by_window(model, judged)
    return {
        "documents": losses,
        "accuracy": right,
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_adds": methods.filler_multiply_adds(method),
        "training_tokens": MASKED_STEPS * MASKED_SHAPE[0] * MASKED_SHAPE[1],
        "train_seconds": round(result.seconds, 1),
    }


PARTS = {"reading": reading, "shared": shared, "depth": depth, "masked": masked}

if __name__ == "__main__":
    torch.set_num_threads(1)
    claims_bench.run(PARTS, __file__, __doc__.splitlines()[0])
