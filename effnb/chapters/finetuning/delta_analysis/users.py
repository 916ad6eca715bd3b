"""Many users of one frozen model: their LoRAs, and three ways to answer all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from effnb.core.deltas import (
    attach_deltas,
    delta_parameters,
    delta_state_dict,
    hosts,
    merge,
    set_active,
)
from effnb.core.training import TrainingSettings, train
from effnb.finetuning import lora, serving
from effnb.lab import corpora, load
from effnb.lab.tasks import WORKS
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
    return [m.text for m in corpora.manuals("train") if m.work == WORKS[voice]]


def learn_voice(
    model: nn.Module, tokenizer: Any, voice: str, *, steps: int = 40, seed: int = 0
) -> nn.Module:
    """The model with a LoRA for a user, trained on what the user has read."""
    chosen = windows_of(tokenizer, documents(voice)[:60], 4 * steps, 48)
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
    chosen = chosen[order]
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


PLAIN = ("*.q_proj", "*.v_proj")


def with_user(model: nn.Module, user: int, rank: int = 8) -> nn.Module:
    """A model with one more user's LoRA, whose numbers are drawn at random.

    Trained numbers would take as long: time does not depend on them.
    """
    own = f"user{user}"
    model = lora.attach(model, own, rank=rank, layers=PLAIN, seed=user)
    generator = torch.Generator().manual_seed(user)
    for parameter in delta_parameters(model, own).values():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


Way = Callable[[], torch.Tensor]


def ways(name: str, count: int, tokens: int = 16) -> dict[str, Way]:
    """Functions that answer one text of each user: the logits, (users, tokens, vocabulary).

    "batch": all rows at once, each with its own LoRA. "loop": one user after the other. "merged":
    one user after the other, on a model that was merged before. "frozen": all rows at once, without
    any LoRA.
    """
    model = frozen = load(name, device="cpu").model
    names = [f"user{i}" for i in range(count)]
    for user in range(count):
        model = with_user(model, user)
    served = serving.serve(model)
    alone = [set_active(model, one) for one in names]
    merged = [merge(with_user(frozen, user), one) for user, one in enumerate(names)]
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
    """Processor seconds of each function in each turn; they take turns.

    With one thread that is the time on a machine that does nothing else; what other programs take
    meanwhile does not count.
    """
    found: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            began = time.process_time()
            function()
            if turn:  # the first warms up
                found[name].append(time.process_time() - began)
    return found


def stored_bytes(model: nn.Module, count: int, rank: int = 8) -> dict[str, int]:
    """Bytes to keep in memory for some users: one model and deltas, or a merged model each."""
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    own = lora.attach(model, "one", rank=rank, layers=PLAIN)
    delta = sum(t.numel() * t.element_size() for t in delta_state_dict(own, "one").values())
    return {"batch": whole + count * delta, "merged": count * whole, "delta": delta}


def smollm2_here(count: int = 4, turns: int = 2) -> str:
    """SmolLM2-135M for a few users at once and one after the other, in a sentence."""
    found = in_turn(
        {k: f for k, f in ways("smollm2-135m", count).items() if k in ("batch", "loop")}, turns
    )
    batch, loop = (min(found[way]) for way in ("batch", "loop"))
    return (
        f"SmolLM2-135M, {count} users with one text of 16 tokens each: {batch:.2f} s in one batch, "
        f"{loop:.2f} s one after the other, {loop / batch:.1f} times as long."
    )
