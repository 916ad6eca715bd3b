"""What the parts of the pruning sweep share: its table, its methods, its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from effnb.core.training import TrainingSettings
from effnb.inference import pruning
from effnb.lab import sweeps
from effnb.lab.sweeps import SEEDS, Bench

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MIDDLE = (0.5, 0.6, 0.7)
"""Where methods part ways: measured with three calibration seeds."""


class Table(sweeps.Table):
    """Rows of the chapter on pruning."""

    chapter = "05_inference/1_pruning"


def seeds_at(sparsity: float) -> tuple[int, ...]:
    """Three seeds where it matters, one elsewhere."""
    return SEEDS if sparsity in MIDDLE else SEEDS[:1]


def by_method(model: nn.Module, given: torch.Tensor | None) -> dict[str, Callable[..., nn.Module]]:
    """The one-shot methods, as functions of (sparsity, more arguments)."""
    return {
        "magnitude": lambda s, **k: pruning.magnitude(model, s, **k),
        "Wanda": lambda s, **k: pruning.wanda(model, given, s, **k),
        "SparseGPT": lambda s, **k: pruning.sparsegpt(model, given, s, **k),
        "Taylor": lambda s, **k: pruning.taylor(model, given, s, **k),
        "OBD": lambda s, **k: pruning.obd(model, given, s, **k),
    }


def quiet_row(bench: Bench, model: nn.Module, *, ask: bool = True) -> dict[str, Any]:
    """Quality of a model; without questions, its loss only."""
    return bench.quality(model, ask=ask)


def settings_of(steps: int, rate: float) -> TrainingSettings:
    """A short run: warm up, then fall to 0."""
    return TrainingSettings(
        steps=steps, learning_rate=rate, warmup_steps=5, schedule="cosine", seed=0
    )
