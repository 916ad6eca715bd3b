"""The stored measurements of `notebooks/03_pretraining/1_objectives` (`make results`).

    python data/sweeps/03_pretraining/1_objectives.py            # every part
    python data/sweeps/03_pretraining/1_objectives.py compute    # this part

Each part is written to `data/results/03_pretraining/1_objectives/<part>.json`. Idle times on one
core; with `1_objectives_claims.py` (27 minutes) the set takes about 45.

compute  objectives that may spend as many operations as CLM did on its text, three seeds (11 min)
repeats  20,480 tokens read 30 times: one masking, ten maskings, a new one each time (3 min)
real     the same probe on the workbook's models, two of them made by others (4 min)
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

from effnb.chapters.pretraining.objectives import probing, runs
from effnb.lab import load, sweeps
from effnb.lab.sweeps import run
from effnb.pretraining import objectives

sys.path.append(str(Path(__file__).resolve().parent))
claims = importlib.import_module("1_objectives_claims")

SEEDS = (0, 1, 2)
COMPARED = ("MLM 15 %", "MLM 40 %", "prefix LM", "spans of 3", "ELECTRA")
REPEATED = 20
"""Batches of text that are read again and again."""
MASKINGS = {"one masking": 1, "ten maskings": 10, "a new one each time": 0}
REAL = ("mini-300k", "mini-1m", "mini-5m", "minilm-l6", "smollm2-135m")


class Table(sweeps.Table):
    """A table of this chapter."""

    chapter = "03_pretraining/1_objectives"


def compute() -> None:
    """Cheaper steps buy more text: each objective gets CLM's operations."""
    each = {name: runs.step_work(runs.ALL[name]).flops for name in ("CLM", *COMPARED)}
    table = Table("compute", flops=each["CLM"] * runs.STEPS)
    for seed in SEEDS:
        for name in COMPARED:
            steps = round(runs.STEPS * each["CLM"] / each[name])

            def measure(name: str = name, seed: int = seed, steps: int = steps) -> dict[str, Any]:
                return claims.judged(runs.trained(runs.ALL[name], seed, steps=steps))

            table.add({"method": name, "seed": seed}, measure)


def repeats() -> None:
    """Static masking against dynamic masking, where a text is read many times."""
    objective = runs.ALL["MLM 15 %"]
    table = Table("repeats", times=runs.STEPS // REPEATED, batches=REPEATED)
    for seed in SEEDS:
        batch, length = runs.SHAPE
        windows = runs.text_windows(seed, REPEATED * batch, length)
        for name, copies in MASKINGS.items():

            def measure(
                seed: int = seed, copies: int = copies, windows: torch.Tensor = windows
            ) -> dict[str, Any]:
                fixed = static(windows, copies, seed) if copies else None
                return claims.judged(runs.trained(objective, seed, windows=windows, examples=fixed))

            table.add({"method": name, "seed": seed}, measure)


def static(windows: torch.Tensor, copies: int, seed: int) -> list[objectives.Example]:
    """Fixed maskings of every batch: all batches in one masking, then all in the next."""
    batches = [
        objectives.static_masking(
            part, copies, 0.15, seed=1000 * seed + number, mask_token=runs.MASK,
            vocabulary=runs.WORDS,
        )
        for number, part in enumerate(windows.split(runs.SHAPE[0]))
    ]  # fmt: skip
    return [of[copy] for copy in range(copies) for of in batches]


def real() -> None:
    """Models of this workbook and of others, by the same probe on the same descriptions."""
    table = Table("real", tokens=probing.TOKENS)
    for name in REAL:

        def measure(name: str = name) -> dict[str, Any]:
            loaded = load(name, device="cpu")
            correct = probing.probed(lambda t: runs.pooled(loaded.model, t), loaded.tokenizer)
            return {
                "parameters": sum(p.numel() for p in loaded.model.parameters()),
                "probe": round(sum(correct) / len(correct), 4),
                "probe_groups": probing.grouped(correct),
            }

        table.add({"model": name}, measure)


PARTS = {"compute": compute, "repeats": repeats, "real": real}

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(run(PARTS, __file__, __doc__.splitlines()[0]))
