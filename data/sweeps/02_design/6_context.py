"""The stored measurements of `notebooks/02_design/6_context` (`make results`).

    python data/sweeps/02_design/6_context.py            # every part
    python data/sweeps/02_design/6_context.py positions  # this part

Each part is written to `data/results/02_design/6_context/<part>.json`. Idle times on one core:

positions  `mini-5m` from 512 to 4,096 tokens: loss by place, every method at a scale of 8 (1 min)
factors    `mini-5m` at 2,048 tokens: all methods at scales 1 to 16, ramps, temperature (4 min)
recall     key-value recall by depth and length, on the first model that recalls (2 min)
smollm2    `smollm2-135m` past its 8,192 tokens, three methods; run it last (10 min, 4 GB)

The tables behind the verdicts, short training among them, are those of `6_context_claims.py`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from effnb.design.context import (
    extrapolation,
    ntk_aware,
    ntk_by_parts,
    position_interpolation,
    yarn,
)
from effnb.evaluation.long_context import RecallGrid, chunked_losses, context_losses, recall_grid
from effnb.lab import corpora, load, sweeps
from effnb.lab.sweeps import held_out_novel, run, timed
from effnb.lab.texts import long_texts

TRAINED = 512
METHODS: dict[str, Callable[[nn.Module, float], nn.Module]] = {
    "RoPE": extrapolation,
    "PI": position_interpolation,
    "NTK-aware": ntk_aware,
    "NTK-by-parts": ntk_by_parts,
    "YaRN": yarn,
}
LENGTH, CHAPTERS, BIN = 4096, 6, 128
FACTORS = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0)
VARIANTS = {
    "YaRN, paper's ramp": partial(yarn, ramp="paper"),
    "YaRN, no temperature": partial(yarn, attention=False),
    "NTK-by-parts, paper's ramp": partial(ntk_by_parts, ramp="paper"),
}
RECALLING = ("mini-300k", "mini-1m", "mini-5m")
ENOUGH = 0.9
LENGTHS, DEPTHS, TRIALS = (256, 512, 1024, 2048), (0.0, 0.25, 0.5, 0.75, 1.0), 8
SMOLLM2_LENGTH, SMOLLM2_BIN = 10_240, 512


class Table(sweeps.Table):
    """A table of this chapter."""

    chapter = "02_design/6_context"


def binned(losses: torch.Tensor, width: int) -> list[float]:
    """Mean loss of the first `width` places, of the next, and so on; the first place has none."""
    return [round(float(part.mean()), 4) for part in losses.mean(0).split(width)]


def positions() -> None:
    """Where does the loss rise? Chapters of 4,096 tokens, one after the other."""
    loaded = load("mini-5m", device="cpu")
    rows = long_texts(loaded.tokenizer, LENGTH, count=CHAPTERS)
    table = Table("positions", model="mini-5m", bin=BIN, chapters=CHAPTERS, trained=TRAINED)
    for method, make in METHODS.items():
        longer = make(loaded.model, LENGTH / TRAINED)

        def measure(longer: nn.Module = longer) -> dict:
            losses = torch.cat([chunked_losses(longer, row[None]) for row in rows])
            return {"curve": binned(losses, BIN)}

        table.add({"method": method, "factor": LENGTH / TRAINED}, measure)


def factors() -> None:
    """How far is each method to be stretched, and what does it cost inside?"""
    loaded = load("mini-5m", device="cpu")
    rows = long_texts(loaded.tokenizer, 2048, count=4)
    table = Table("factors", model="mini-5m", length=2048, chapters=len(rows))
    for method, make in (METHODS | VARIANTS).items():
        for factor in FACTORS if method in METHODS else (4.0,):
            if method == "RoPE" and factor != 4.0:
                continue
            longer = make(loaded.model, factor)
            longer.config.max_position_embeddings = 2048  # a smaller scale is read past its end

            def measure(longer: nn.Module = longer) -> dict:
                found = context_losses(longer, rows, [TRAINED, 2048], targets=256)
                near, far = found.nats
                return {"near": round(near, 4), "far": round(far, 4)}

            table.add({"method": method, "factor": factor}, measure)


def recall() -> dict:
    """Is far context used? A value that was told once, asked for at the end."""

    def grid(loaded, model: nn.Module, lengths: tuple[int, ...]) -> RecallGrid:
        def make(length: int, depth: float, seed: int) -> tuple[list[int], int]:
            draw = random.Random(f"{length} {depth} {seed}")
            return corpora.recall_at(loaded.tokenizer, draw, length, depth)

        return recall_grid(model, make, lengths, DEPTHS, trials=TRIALS, batch_size=4)

    inside = {}
    for name in RECALLING:
        loaded = load(name, device="cpu")
        found = grid(loaded, loaded.model, (256, TRAINED))
        inside[name] = round(sum(found.by_length) / 2, 4)
        print(name, inside[name], flush=True)
        if inside[name] >= ENOUGH:
            break
    chosen = next((n for n, a in inside.items() if a >= ENOUGH), max(inside, key=inside.get))
    loaded = load(chosen, device="cpu")
    rows = []
    for method in ("RoPE", "PI", "YaRN"):
        found = grid(loaded, METHODS[method](loaded.model, LENGTHS[-1] / TRAINED), LENGTHS)
        rows.append({"method": method, "correct": [list(row) for row in found.correct]})
        print(method, found.by_length, flush=True)
    return {
        "model": chosen, "inside": inside, "enough": ENOUGH, "trials": TRIALS,
        "lengths": list(LENGTHS), "depths": list(DEPTHS), "trained": TRAINED, "table": rows,
    }  # fmt: skip


def smollm2() -> None:
    """One text longer than any that SmolLM2 was trained on; one draw, so no interval."""
    loaded = load("smollm2-135m", device="cpu")
    ids: list[int] = []
    for text in held_out_novel():
        ids += loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        if len(ids) >= SMOLLM2_LENGTH:
            break
    row = torch.tensor([ids[:SMOLLM2_LENGTH]])
    trained = loaded.model.config.max_position_embeddings
    table = Table(
        "smollm2", model="smollm2-135m", bin=SMOLLM2_BIN, length=SMOLLM2_LENGTH, trained=trained
    )
    for method in ("RoPE", "YaRN", "PI"):
        longer = METHODS[method](loaded.model, 2.0)

        def measure(longer: nn.Module = longer) -> dict:
            losses, seconds = timed(chunked_losses, longer, row, 256)
            return {"curve": binned(losses, SMOLLM2_BIN), "seconds": seconds}

        table.add({"method": method, "factor": 2.0}, measure)


PARTS = {"positions": positions, "factors": factors, "recall": recall, "smollm2": smollm2}

if __name__ == "__main__":
    sys.exit(run(PARTS, __file__, __doc__.splitlines()[0]))
