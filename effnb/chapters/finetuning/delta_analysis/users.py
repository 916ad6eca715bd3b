"""Many users of one frozen model: their LoRAs, and three ways to answer all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from effnb.core.deltas import (
    attach_deltas,
    delta_parameters,
    delta_state_dict,
    detach,
    hosts,
    merge,
    set_active,
)
from effnb.core.training import TrainingSettings, train
from effnb.finetuning import lora, serving
from effnb.lab import corpora, load
from effnb.lab.texts import windows_of

LAYERS = ("*.q_proj", "*.v_proj", "*.o_proj", "*.down_proj")
"""Where a reader's voice sits."""
RANK = 4
VOICES = {
    "Austen": "a novel by Jane Austen",
    "Bible": "the King James Bible",
    "Melville": "Moby-Dick",
    "PostgreSQL": "PostgreSQL's manual",
    "Python": "Python's manual",
    "SQLite": "SQLite's manual",
    "WordNet": "a dictionary",
    "packages": "descriptions of software packages",
}
"""Eight users and what each has read."""


def documents(voice: str) -> list[str]:
    """What a user has read."""
    if voice == "packages":
        return corpora.documents("packages", "train")
    if voice in ("Austen", "Bible"):
        kind = {"Austen": "novel", "Bible": "bible"}[voice]
        return [c.text for c in corpora.novels("train") if c.kind == kind]
    return [m.text for m in corpora.manuals("train") if m.work == voice]


def learn_voice(
    model: nn.Module, tokenizer: Any, voice: str, *, steps: int = 40, seed: int = 0
) -> nn.Module:
    """The model with a LoRA for a user, trained on what the user has read."""
    texts = windows_of(tokenizer, documents(voice)[:40], 4 * steps, 48)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    chosen = texts[order]
    tuned = lora.attach(model, voice, rank=RANK, alpha=2 * RANK, layers=LAYERS, seed=seed)
    settings = TrainingSettings(
        steps=steps, learning_rate=1e-2, warmup_steps=min(5, steps), schedule="linear", seed=seed
    )
    train(tuned, lambda step: chosen[4 * step % len(chosen) :][:4], settings)
    return tuned


def gather(model: nn.Module, tuned: Sequence[nn.Module], names: Sequence[str]) -> nn.Module:
    """One model that carries the deltas of several, on the tensors of the frozen one."""
    for name, one in zip(names, tuned, strict=True):
        model = attach_deltas(model, name, {p: h.deltas[name] for p, h in hosts(one, name).items()})
    return model


@cache
def many(name: str, count: int, rank: int = 8) -> nn.Module:
    """A model with LoRAs of many users, whose numbers are drawn at random.

    Trained numbers would take as long: time does not depend on them.
    """
    model = load(name, device="cpu").model
    for user in range(count):
        own = f"user{user}"
        model = lora.attach(model, own, rank=rank, layers=["*.q_proj", "*.v_proj"], seed=user)
        for parameter in delta_parameters(model, own).values():
            generator = torch.Generator().manual_seed(user)
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


Way = Callable[[], torch.Tensor]


def ways(name: str, count: int, tokens: int = 16) -> dict[str, Way]:
    """Functions that answer one text of each user: the logits, (users, tokens, vocabulary).

    "batch": all rows at once, each with its own LoRA. "loop": one user after the other. "merged":
    one user after the other, on a model that was merged before. "frozen": all rows at once, without
    any LoRA.
    """
    frozen = load(name, device="cpu").model
    model = many(name, count)
    names = [f"user{i}" for i in range(count)]
    served = serving.serve(model)
    alone = [set_active(model, one) for one in names]
    merged = []
    for one in names:
        rest = model
        for other in names:
            if other != one:
                rest = detach(rest, other)
        merged.append(merge(rest, one))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, frozen.config.vocab_size, (count, tokens), generator=generator)

    @torch.inference_mode()
    def batch() -> torch.Tensor:
        with serving.users(served, names):
            return served(input_ids=ids).logits

    def one_by_one(models: Sequence[nn.Module]) -> Way:
        @torch.inference_mode()
        def run() -> torch.Tensor:
            return torch.cat([m(input_ids=ids[i : i + 1]).logits for i, m in enumerate(models)])

        return run

    @torch.inference_mode()
    def plain() -> torch.Tensor:
        return frozen(input_ids=ids).logits

    return {
        "batch": batch,
        "loop": one_by_one(alone),
        "merged": one_by_one(merged),
        "frozen": plain,
    }


def in_turn(functions: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of each function in each turn; they take turns, so that a slow moment hits all."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if turn:  # the first warms up
                found[name].append(time.perf_counter() - began)
    return found


def stored_bytes(model: nn.Module, count: int, rank: int = 8) -> dict[str, int]:
    """Bytes to keep in memory for some users: one model and deltas, or a merged model each."""
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    own = lora.attach(model, "one", rank=rank, layers=["*.q_proj", "*.v_proj"])
    delta = sum(t.numel() * t.element_size() for t in delta_state_dict(own, "one").values())
    return {"batch": whole + count * delta, "merged": count * whole, "delta": delta}
