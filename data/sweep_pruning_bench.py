"""What the parts of `sweep_pruning.py` share: a table stored row by row, and the methods."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from sweeping import SEEDS, Bench
from torch import nn

from effnb.core.training import TrainingSettings
from effnb.evaluation import ranked_choice
from effnb.inference import pruning
from effnb.lab import results
from effnb.lab._files import DamagedFile

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MIDDLE = (0.5, 0.6, 0.7)
"""Where methods part ways: measured with three calibration seeds."""


class Table:
    """Rows that are stored one by one, and not measured again when a run goes on."""

    resume = False

    def __init__(self, part: str, **about: Any) -> None:
        """Begin the table of a part; `about` is stored beside it."""
        self.part, self.about, self.rows = part, about, []
        self.old: list[dict[str, Any]] = []
        if self.resume:
            with suppress(DamagedFile):  # nothing is stored yet
                self.old = results.read(f"pruning_{part}").data["table"]

    def add(self, about: dict[str, Any], measure: Callable[[], dict[str, Any] | None]) -> None:
        """Measure one point, unless it is stored; a measurement of None is left out."""
        row = next((r for r in self.old if about.items() <= r.items()), None)
        if row is None:
            found = measure()
            if found is None:
                return
            row = about | found
            print({k: v for k, v in row.items() if k not in LONG}, flush=True)
        self.rows.append(row)
        self.store()

    def store(self, **more: Any) -> None:
        """Write what is there."""
        self.about |= more
        data = self.about | {"table": self.rows}
        results.store(f"pruning_{self.part}", data, f"python data/sweep_pruning.py {self.part}")


LONG = ("windows", "layers", "domains", "curve")


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
    losses = bench.losses(model)
    row = {"loss": round(sum(losses) / len(losses), 5), "windows": losses}
    if ask and bench.items:
        choice = ranked_choice(model, bench.loaded.tokenizer, bench.items)
        row["accuracy"] = round(choice.accuracy, 4)
        row["standard_error"] = round(choice.standard_error, 4)
    return row


def settings_of(steps: int, rate: float) -> TrainingSettings:
    """A short run: warm up, then fall to 0."""
    return TrainingSettings(
        steps=steps, learning_rate=rate, warmup_steps=5, schedule="cosine", seed=0
    )
