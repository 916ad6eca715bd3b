"""The measurements behind the verdicts of `notebooks/02_design/2_experts`.

    python data/sweeps/02_design/2_experts_claims.py                # every part
    python data/sweeps/02_design/2_experts_claims.py training       # this part

training  five seeds of the dense twin and of Switch with 8 experts, with and without the loss for
          balance, and of GLaM, each trained for 360 steps of 1,024 tokens on the same texts
by_input  entmax routing, five seeds: losses when numbers of experts are given to other tokens

Judged on 24 chapters of a novel that none was trained on, 128 tokens each, read one by one. A
training takes half a minute to a minute on one idle core: 20 of them about 12 minutes for the
first part, 5 about 4 minutes for the second.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from effnb.chapters.design.experts import twins
from effnb.lab import claims_bench
from effnb.lab._files import data_folder
from effnb.lab.claims_bench import SEEDS, Table, documents_of
from effnb.lab.sweeps import held_out_novel

MODEL = "experts, trained briefly"
DOCUMENTS = 24
RUNS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "Switch 8": {"method": "Switch"},
    "Switch 8, no balance": {"method": "Switch", "auxiliary": 0.0},
    "GLaM 8": {"method": "GLaM"},
}


@cache
def tokenizer() -> Any:
    """The bench's; no model is loaded for it."""
    return AutoTokenizer.from_pretrained(data_folder() / "models" / "tokenizer")


@cache
def documents() -> list[Tensor]:
    """The beginnings of held-out chapters."""

    class Loaded:
        pass

    loaded = Loaded()
    loaded.tokenizer = tokenizer()
    return documents_of(loaded, held_out_novel(), DOCUMENTS, twins.SHAPE[1])


@cache
def batches(seed: int) -> list[Tensor]:
    """What every twin of a seed reads."""
    return twins.texts(tokenizer(), seed, twins.STEPS)


def trained(seed: int, method: str, auxiliary: float | None = None) -> Any:
    """A twin after its training."""
    weight = {} if auxiliary is None else {"auxiliary": auxiliary}
    return twins.trained(twins.twin(method, seed=seed), batches(seed), seed=seed, **weight)


def training(table: Table) -> None:
    """The dense twin and those with experts."""
    for seed in SEEDS:
        for name, run in RUNS.items():
            about = {"model": MODEL, "method": name, "seed": seed, "table": "training"}

            def measure(seed: int = seed, run: dict[str, Any] = run) -> dict[str, Any]:
                model = trained(seed, **run)
                tokens = sum(batch.numel() for batch in batches(seed))
                found = twins.judged(model, documents()) | twins.sizes_of(model)
                return found | {"training_tokens": tokens}

            table.add(about, measure)


def by_input(table: Table) -> None:
    """One trained twin of each seed, read as routed and with the numbers exchanged."""
    for seed in SEEDS:
        found: dict[str, dict[str, Any]] = {}

        def measured(name: str, seed: int = seed, found: dict = found) -> dict[str, Any]:
            if not found:
                found.update(twins.by_input(trained(seed, "entmax"), documents(), seed))
            return found[name]

        for name in ("entmax", "entmax, shuffled", "entmax, hard − easy"):
            about = {"model": MODEL, "method": name, "seed": seed, "table": "by input"}
            table.add(about, lambda name=name: measured(name))


PARTS = {"training": training, "by_input": by_input}

if __name__ == "__main__":
    torch.set_num_threads(1)
    claims_bench.run(PARTS, __file__, __doc__.splitlines()[0])
