"""The panel of the chapter on delta tuning: train a delta while the reader waits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure

from effnb.chapters.finetuning.delta_tuning import methods, tables
from effnb.chapters.finetuning.delta_tuning.memory import training_memory
from effnb.lab import PALETTE, guess, knob, panel
from effnb.lab.panels import Panel
from effnb.lab.task_inputs import classification_loss
from effnb.lab.tasks import task

STEPS = 24
POINTS = (0, 4, 8, 16, 24)
JUDGED = 64
"""Test documents that the panel looks at."""
RATES = {"a tenth": 0.1, "a third": 0.3, "as compared": 1.0, "three times": 3.0, "ten times": 10.0}
"""Learning rates by what they are of the method's own."""
DATA = {"16 of each topic": 16, "all 2,048": 0}
SIZES = (1, 2, 4, 8, 16, 32)
WITHOUT = ("full", "BitFit", "(IA)³")
"""Methods without a size."""
BYTES = {"less than a hundredth": 0.01, "a hundredth to a tenth": 0.1, "more than a tenth": 9.0}


def steps() -> int:
    """Steps of a run; two where every position is only tried, because each would take seconds."""
    return 2 if os.environ.get("EFFNB_SWEEP") == "1" else STEPS


@cache
def subject() -> methods.Subject:
    """Topics of package descriptions, on MiniLM."""
    return methods.Subject(task("section"))


def examples(shots: int, seed: int = 0) -> tuple:
    """What the panel trains on."""
    return subject().task.few_shot(shots, seed)[0] if shots else subject().task.train


def compute(method: str, size: int, rate: str, data: str) -> dict[str, Any]:
    """Train, watch, and count."""
    about, one = methods.METHODS[method], subject()
    size = min(size, 6) if method == "last layers" else size
    judged = methods.one_per_document(one.task.test, JUDGED if steps() == STEPS else 8)

    def watch(model: torch.nn.Module) -> dict[str, float]:
        found = one.judged(model, judged)
        return {"accuracy": fmean(found["correct"]), "loss": fmean(found["losses"])}

    found = methods.tune(
        one.base,
        method,
        one.batch,
        examples(DATA[data]),
        steps=steps(),
        size=size,
        rate=RATES[rate] * about.rate,
        watch=watch,
        points=POINTS if steps() == STEPS else (0, steps()),
    )
    batch = one.batch(one.task.train[: methods.BATCH])
    held = training_memory(found.model, classification_loss, batch)
    return {
        "method": method,
        "seen": found.seen,
        "losses": found.losses,
        "parameters": found.parameters,
        "share": found.parameters / whole(),
        "memory": held.total,
        "step": found.step_seconds,
        "rate": RATES[rate] * about.rate,
    }


@cache
def whole() -> int:
    """Parameters of the model."""
    return sum(p.numel() for p in subject().loaded.model.parameters())


def draw(result: Mapping[str, Any], fig: Figure, pinned: Mapping[str, Any] | None = None) -> None:
    """The learning curve, and the pinned one beside it."""
    axes = fig.subplots()
    for found, colour, line in ((pinned, "0.55", "o--"), (result, PALETTE[0], "o-")):
        if found is not None:
            x = [point["step"] for point in found["seen"]]
            y = [100 * point["accuracy"] for point in found["seen"]]
            label = found["method"] if found is result else f"pinned: {found['method']}"
            axes.plot(x, y, line, color=colour, label=label)
    axes.axhline(100 / 6, color="0.45", linestyle=":")
    axes.set_ylim(0, 100)
    axes.set_xlabel("steps of 8 texts")
    axes.set_ylabel("right, per cent")
    axes.legend(loc="lower right")


def text(result: Mapping[str, Any]) -> str:
    """The numbers of a position."""
    end = result["seen"][-1]
    return "\n".join(
        [
            f"Right on new texts: {end['accuracy']:.0%}",
            f"Loss on new texts: {end['loss']:.3f}",
            f"Loss on its last batch: {result['losses'][-1]:.3f}",
            f"Numbers trained: {result['parameters']:,}",
            f"Part of the model: {result['share']:.3%}",
            f"Delta: {tables.size_said(2 * result['parameters'])}",
            f"Held by a step: {result['memory'] / 2**20:,.0f} MiB",
            f"Time of a step: {1000 * result['step']:.0f} ms",
            f"Learning rate: {result['rate']:.0e}",
        ]
    )


def share_choice(share: float) -> str:
    """The choice of the question that a share belongs to."""
    return next(words for words, end in BYTES.items() if share < end)


def ignored(values: Mapping[str, Any]) -> dict[str, str]:
    """Knobs that do nothing."""
    if values["method"] in WITHOUT:
        return {"size": "this method has no size to choose"}
    return {}


def training(methods_shown: tuple[str, ...] = ("LoRA", "prompt", "full")) -> Panel:
    """Train MiniLM on topics by any method.

    Args:
        methods_shown: The methods whose pictures a page without a kernel holds.
    """
    names = sorted(methods.METHODS, key=lambda name: name != "LoRA")
    return panel(
        compute,
        draw,
        text=text,
        title="Teach MiniLM six topics",
        caption="Texts about software that are put under the right one of six topics, over the "
        "steps of training. Dotted: guessing.",
        figsize=(6.2, 2.6),
        trains=True,
        main="method",
        frames={"method": list(methods_shown)},
        predict=guess(
            "A LoRA of rank 1 sits on two matrices of each of the six blocks. What part of full "
            "tuning's file does it need?",
            list(BYTES),
            answer=lambda result: share_choice(result["share"]),
            at={"method": "LoRA", "size": 1},
        ),
        ignored=ignored,
        method=knob(names, default="LoRA"),
        size=knob(SIZES, default=8, label="size: rank, bottleneck, length, …"),
        rate=knob(list(RATES), default="as compared", label="learning rate"),
        data=knob(list(DATA), default="all 2,048", label="examples"),
    )
