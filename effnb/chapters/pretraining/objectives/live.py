"""What the chapter measures on the reader's machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from effnb.chapters.pretraining.objectives import probing, runs
from effnb.chapters.pretraining.objectives.tables import counted
from effnb.lab import load, table
from effnb.lab.tables import Table

TIMED = ("CLM", "MLM 15 %", "MLM 80 %", "spans of 3", "ELECTRA")


def timed_steps(names: Sequence[str] = TIMED, steps: int = 4) -> Table:
    """Seconds of a training step of each objective here, beside the operations that were counted.

    Args:
        names: Objectives of `runs.ALL`.
        steps: Steps of each; the first one is left out.
    """
    windows = torch.randint(
        1,
        runs.WORDS,
        (runs.SHAPE[0] * 2, runs.SHAPE[1]),
        generator=torch.Generator().manual_seed(0),
    )
    found: dict[str, float] = {}
    for name in names:
        ends: list[float] = []
        runs.trained(
            runs.ALL[name],
            steps=steps,
            windows=windows,
            progress=lambda *_, ends=ends: ends.append(time.perf_counter()),
        )
        found[name] = median(b - a for a, b in pairwise(ends))
    whole, flops = found[names[0]], counted(names[0]).flops
    lines: list[dict[str, Any]] = [
        {
            "objective": name,
            "operations": counted(name).flops / flops,
            "time": seconds / whole,
            "milliseconds": 1000 * seconds,
        }
        for name, seconds in found.items()
    ]
    return table(
        lines,
        {"objective": "", "operations": ".2f", "time": ".2f", "milliseconds": ".0f"},
        caption=f"A training step here: operations and time as parts of {names[0]}'s, and "
        "milliseconds.",
    )


def real_probe(name: str = "minilm-l6") -> str:
    """The probe on a model that ships with the workbook, measured here."""
    loaded = load(name, device="cpu")
    correct = probing.probed(lambda t: runs.pooled(loaded.model, t), loaded.tokenizer)
    return f"{name}: {sum(correct) / len(correct):.1%} of {len(correct)} descriptions"
