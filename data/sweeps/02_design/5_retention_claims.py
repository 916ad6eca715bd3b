"""The measurements behind the verdicts of `notebooks/02_design/5_retention`.

    python data/sweeps/02_design/5_retention_claims.py                # every part
    python data/sweeps/02_design/5_retention_claims.py forms short    # these parts

forms     digits in which the three forms and their gradients agree, in float64, on 12 texts
decoding  bytes kept and seconds per token after 64 to 8,192 tokens, at the shape of mini-1m
latency   seconds per step over batch and length
training  seconds and bytes of a training step over the length
short     RetNet, RWKV, Hyena and the Transformer, trained briefly on the same tokens, five seeds

Weights are random but for `forms`: time and memory do not depend on them. Times are the processor's
seconds on one thread, in rounds that go through all models in turn. On one idle core the parts take
about half a minute, half a minute, half a minute, 2 and 12 minutes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from effnb.chapters.design.retention import methods, twins
from effnb.chapters.design.retention.methods import (
    after,
    build,
    processor_seconds,
    training_step,
    weight_bytes,
)
from effnb.core.training import TrainingSettings, train
from effnb.design.retention import CausalLM, RetNetLM
from effnb.evaluation import peak_memory
from effnb.lab import claims_bench, corpora
from effnb.lab._files import data_folder
from effnb.lab.claims_bench import SEEDS, Table, by_document, documents_of
from effnb.lab.sweeps import held_out_novel
from effnb.lab.texts import training_batches

sys.path.append(str(Path(__file__).resolve().parents[2]))
import train_models

SHAPES = "1m shapes"
LENGTHS = (64, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = (1, 4, 16)
STANDARD = 2048
LONGEST = {"Transformer, standard": STANDARD, "GLA": 512}
"""The longest texts of training steps: attention that stores every score would take 10 GB at 8,192
tokens, and gated linear attention without a kernel takes long."""
ROUNDS, STEPS_TIMED = 7, 12
STEPS, SHAPE = 100, (8, 128)
"""Steps of the short training runs, and sequences and tokens of each."""
FORMS_TOKENS = 192


@cache
def tokenizer() -> Any:
    """The bench's; no model is loaded for it."""
    return AutoTokenizer.from_pretrained(data_folder() / "models" / "tokenizer")


def documents(texts: list[str], count: int, length: int) -> list[Tensor]:
    """The beginnings of so many texts."""

    class Loaded:
        pass

    loaded = Loaded()
    loaded.tokenizer = tokenizer()
    return documents_of(loaded, texts, count, length)


def german() -> list[str]:
    """Package descriptions in a language that no model of the bench was trained on."""
    return [t.text for t in corpora.translations("de", "test")]


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int, runs: int) -> dict[str, list[float]]:
    """Processor's seconds of each call in every round; the machine's moods meet all alike."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(round(processor_seconds(call, runs), 7))
    return found


def missing(table: Table, rows: Iterable[dict[str, Any]]) -> bool:
    """Whether one of these rows is not stored yet."""
    return not all(any(about.items() <= row.items() for row in table.rows) for about in rows)


# ------------------------------------------------------------------------------------- forms


def digits(a: Tensor, b: Tensor) -> float:
    """Decimal digits in which two tensors agree, by the largest difference over the largest."""
    error = float((a - b).abs().max() / a.abs().max())
    return round(-math.log10(max(error, 1e-17)), 4)


def gradient(model: RetNetLM, ids: Tensor, form: str) -> Tensor:
    """All gradients of a sum of logits, each divided by its own largest number."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, model.config.vocabulary, dtype=torch.float64)
    (model(ids, form=form) @ weights).sum().backward()
    return torch.cat([p.grad.flatten() / p.grad.abs().max() for p in model.parameters()])


def forms(table: Table) -> None:
    """The trained twin's forms, and those of an untrained one with the published normalization."""
    texts = documents(held_out_novel(), 12, FORMS_TOKENS)
    twin = twins.load("retnet-300k", torch.float64)
    fresh = build("RetNet")
    with torch.inference_mode():
        if twin:
            for form in ("recurrent", "chunkwise"):
                found = [
                    digits(twin.model(t[None], form="parallel"), twin.model(t[None], form=form))
                    for t in texts
                ]
                about = {"model": "retnet-300k", "method": form, "table": "forms"}
                table.add(about, lambda found=found: {"digits": found})
        found = [published_digits(fresh, t) for t in texts]
    about = {"model": "RetNet before training", "method": "published", "table": "forms"}
    table.add(about, lambda: {"digits": found})
    if twin:
        model = twin.model.requires_grad_()
        short = [t[None, :64] for t in texts]
        found = [
            digits(gradient(model, t, "parallel"), gradient(model, t, "recurrent")) for t in short
        ]
        about = {"model": "retnet-300k", "method": "gradients", "table": "forms"}
        table.add(about, lambda: {"digits": found})


def published_digits(fresh: RetNetLM, text: Tensor) -> float:
    """Digits in which two forms of one untrained layer agree, normalized as published."""
    x = fresh.blocks[0].norm1(fresh.embedding(text[None])).double()
    outputs = methods.normalized_outputs(fresh, x, "absolute")
    return digits(outputs["parallel"], outputs["chunkwise"])


# ------------------------------------------------------------------------------ time and bytes


def decoding(table: Table) -> None:
    """A step of decoding over the length of what was read."""
    points = [(method, tokens) for tokens in LENGTHS for method in methods.METHODS]
    rows = {f"{m} {t}": about(m, "decoding", tokens=t) for m, t in points}
    timed_steps(table, rows, {f"{m} {t}": (t, 1) for m, t in points})


def latency(table: Table) -> None:
    """A step over the batch, and over the length for one text."""
    shapes = [(batch, STANDARD) for batch in BATCHES] + [(1, LENGTHS[2]), (1, LENGTHS[-1])]
    points = [(m, b, t) for m in ("RetNet", "Transformer") for b, t in shapes]
    rows = {f"{m} {b} {t}": about(m, "latency", batch=b, tokens=t) for m, b, t in points}
    timed_steps(table, rows, {f"{m} {b} {t}": (t, b) for m, b, t in points})


def about(method: str, name: str, **more: int) -> dict[str, Any]:
    """The keys of a row."""
    return {"model": SHAPES, "method": method, **more, "table": name}


def timed_steps(
    table: Table, rows: dict[str, dict[str, Any]], points: dict[str, tuple[int, int]]
) -> None:
    """Steps at several points, timed in turn, each with its length and its batch."""
    if not missing(table, rows.values()):
        return
    readers = {
        name: after(build(row["method"], "1m", tokens=LENGTHS[-1] + 64), *points[name])
        for name, row in rows.items()
    }
    token = {name: torch.zeros(batch, 1, dtype=torch.long) for name, (_, batch) in points.items()}
    calls = {n: (lambda one=one, n=n: one.step(token[n])) for n, one in readers.items()}
    seconds = in_turn(calls, ROUNDS, STEPS_TIMED)
    for name, row in rows.items():
        found = {
            "seconds": seconds[name],
            "state_bytes": readers[name].bytes,
            "weight_bytes": weight_bytes(readers[name].model),
        }
        table.add(row, lambda found=found: found)


def training(table: Table) -> None:
    """A training step over the length of the text."""
    names = ("Transformer, standard", "Transformer, FlashAttention", *methods.KINDS)
    for tokens in (512, 1024, 2048, 4096, 8192):
        if tokens > LENGTHS[-1]:
            continue
        chosen = [name for name in names if tokens <= LONGEST.get(name, tokens)]
        rows = {name: about(name, "training", tokens=tokens) for name in chosen}
        if not missing(table, rows.values()):
            continue
        steps = {n: training_step(build(n, "1m", tokens=tokens), tokens) for n in chosen}
        rounds = ROUNDS if tokens in (STANDARD, LENGTHS[-1]) else 3
        seconds = in_turn(steps, rounds, 1)
        for name, row in rows.items():
            found: dict[str, Any] = {"seconds": seconds[name]}
            if tokens <= STANDARD:  # each tensor is followed, which takes long where there are many
                found["peak_bytes"] = peak_memory(steps[name])
            table.add(row, lambda found=found: found)


# ------------------------------------------------------------------------------------- short


def short(table: Table) -> None:
    """All four, at 300k and, for the trend, two of them at 1m, trained alike for a short time."""
    judged = {
        "documents": documents(held_out_novel(), 24, SHAPE[1]),
        "german_documents": documents(german(), 24, SHAPE[1]),
    }
    for size, names in (("300k", methods.METHODS[:4]), ("1m", methods.METHODS[:2])):
        for seed in SEEDS:
            for method in names:
                row = {"model": "short training runs", "method": method, "size": size, "seed": seed}
                table.add(row, lambda row=row: trained_briefly(row, table, judged))


def trained_briefly(
    row: dict[str, Any], table: Table, judged: dict[str, list[Tensor]]
) -> dict[str, Any]:
    """Losses of every document after a short training; the recipe is that of the bench."""
    model = build(row["method"], row["size"], seed=row["seed"])
    settings = TrainingSettings(
        steps=STEPS, learning_rate=train_models.MUON_RATE, warmup_steps=STEPS // 10,
        schedule="wsd", weight_decay=0.05, betas=(0.9, 0.95), seed=row["seed"],
    )  # fmt: skip
    recurrent = not hasattr(model, "model")
    wrapped = CausalLM(model) if recurrent else model
    batches = [
        (ids, torch.ones(ids.shape))
        for ids in training_batches(tokenizer(), row["seed"], STEPS, SHAPE)
    ]
    train(
        wrapped,
        batches.__getitem__,
        settings,
        loss=train_models.mixture_loss,
        optimizers=train_models.muon_and_adamw,
    )
    found: dict[str, Any] = {name: by_document(wrapped, d) for name, d in judged.items()}
    found["training_tokens"] = STEPS * SHAPE[0] * SHAPE[1]
    same = {"method": "Transformer", "size": row["size"], "seed": row["seed"]}
    other = next((r for r in table.rows if same.items() <= r.items()), None)
    if other is not None:
        pairs = zip(found["documents"], other["documents"], strict=True)
        found["gap_documents"] = [round(a - b, 5) for a, b in pairs]
    return found


PARTS = {
    "forms": forms,
    "decoding": decoding,
    "latency": latency,
    "training": training,
    "short": short,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    claims_bench.run(PARTS, __file__, __doc__.splitlines()[0])
