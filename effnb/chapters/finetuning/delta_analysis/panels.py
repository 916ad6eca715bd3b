"""The panel of the chapter: eight users of one model, answered in three ways."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from matplotlib.figure import Figure

from effnb.chapters.finetuning.delta_analysis import users
from effnb.core.deltas import attached, merge, set_active
from effnb.finetuning import serving
from effnb.lab import PALETTE, guess, knob, load, panel
from effnb.lab.panels import Panel

MODEL = "mini-1m"
OPENINGS = ("It is a", "And the king", "This package", "If you want to", "There was")
COUNTS = (1, 2, 4, 8)
WORDS = 12
"""Tokens that are written for each user."""
CHOICES = {"about as long": 1.5, "two to four times as long": 4.5, "five times or more": 1e9}
LABELS = {
    "batch": "one batch",
    "loop": "one after the other",
    "merged": "one after the other, merged",
}


@cache
def voices() -> tuple[Any, Any]:
    """The model with the deltas of all users, and its tokenizer; trained once a session.

    Every position being tried only, a step of training each is enough.
    """
    loaded = load(MODEL, device="cpu")
    steps = 1 if os.environ.get("EFFNB_SWEEP") == "1" else 24
    tuned = [
        users.learn_voice(loaded.model, loaded.tokenizer, voice, steps=steps)
        for voice in users.VOICES
    ]
    return users.gather(loaded.model, tuned, list(users.VOICES)), loaded.tokenizer


@cache
def prepared(count: int) -> dict[str, Any]:
    """Models for the first users: one that serves all, and one for each, active or merged."""
    many, _ = voices()
    names = attached(many)[:count]
    alone = [set_active(many, name) for name in names]
    frozen = load(MODEL, device="cpu").model
    merged = [
        merge(users.gather(frozen, [one], [name]), name)
        for one, name in zip(alone, names, strict=True)
    ]
    return {"names": names, "batch": serving.serve(many, *names), "loop": alone, "merged": merged}


def write(model: Any, tokenizer: Any, rows: int, opening: str) -> list[str]:
    """What a model writes behind an opening in each of some equal rows, no two tokens twice."""
    ids = torch.tensor([tokenizer.encode(opening, add_special_tokens=False)] * rows)
    with torch.inference_mode():
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=WORDS,
            min_new_tokens=WORDS,
            do_sample=False,
            no_repeat_ngram_size=2,
            pad_token_id=tokenizer.eos_token_id,
        )
    return [" ".join(tokenizer.decode(row).split()) for row in found]


def answer(opening: str, count: int = 8) -> dict[str, str]:
    """One batch in which every row uses another user's delta: what each of them reads."""
    ready, (_, tokenizer) = prepared(count), voices()
    with serving.users(ready["batch"], ready["names"]):
        texts = write(ready["batch"], tokenizer, count, opening)
    return dict(zip(ready["names"], texts, strict=True))


def compute(users_: int, opening: str) -> dict[str, Any]:
    """Answer all users in three ways that take turns."""
    ready, (_, tokenizer) = prepared(users_), voices()
    found: dict[str, Any] = {}

    def batch() -> None:
        found["texts"] = answer(opening, users_)

    def one_by_one(way: str) -> Any:
        def run() -> None:
            for model in ready[way]:
                write(model, tokenizer, 1, opening)

        return run

    functions = {"batch": batch, "loop": one_by_one("loop"), "merged": one_by_one("merged")}
    found["seconds"] = {k: v[0] for k, v in users.in_turn(functions, 1).items()}
    return found


def ratio(result: Mapping[str, Any]) -> float:
    """How many times as long the loop took as the batch."""
    return result["seconds"]["loop"] / max(result["seconds"]["batch"], 1e-9)


def choice(times: float) -> str:
    """The choice of the question that a ratio belongs to."""
    return next(words for words, end in CHOICES.items() if times < end)


def draw(result: Mapping[str, Any], fig: Figure) -> None:
    """A bar for each way."""
    axes = fig.subplots()
    for y, (way, label) in enumerate(reversed(LABELS.items())):
        axes.barh([y], [1000 * result["seconds"][way]], color=PALETTE[y], height=0.6, label=label)
    axes.set_yticks(range(len(LABELS)), list(reversed(LABELS.values())))
    axes.set_xlabel("processor time, ms")


def text(result: Mapping[str, Any]) -> str:
    """The numbers of a position, and what each user reads."""
    lines = [
        f"{label[0].upper()}{label[1:]}: {1000 * result['seconds'][way]:.0f} ms"
        for way, label in LABELS.items()
    ]
    lines.append(f"Loop over batch: {ratio(result):.1f}")
    said = [f"{name} reads “{words}”" for name, words in result["texts"].items()]
    return "\n".join([*lines, *said])


def serve() -> Panel:
    """Eight readers of one model."""
    return panel(
        lambda users, opening: compute(users, opening),
        draw,
        text=text,
        title="One model, many users",
        caption="Time to write a line for every user: all in one batch, one after the other with "
        "the right delta switched on, and one after the other on models that were merged before.",
        figsize=(6.4, 1.9),
        main="users",
        frames={"users": list(COUNTS)},
        predict=guess(
            "Eight users ask at once, each with a delta. How long does answering one after the "
            "other take, compared with one batch?",
            list(CHOICES),
            answer=lambda result: choice(ratio(result)),
            at={"users": 8},
        ),
        users=knob(COUNTS, default=8),
        opening=knob(list(OPENINGS), default=OPENINGS[0], label="the line begins with"),
    )
