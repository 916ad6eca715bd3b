"""The measurements behind the verdict of `notebooks/03_pretraining/1_objectives`.

    python data/sweeps/03_pretraining/1_objectives_claims.py [tokens]

tokens  every objective on the same 614,400 tokens of text, judged by a probe: five seeds of those
        that the verdict compares, three of the others (27 minutes on one idle core)

A run is a network of the shape of `mini-300k`; see `effnb/chapters/pretraining/objectives/runs.py`.
Each row is stored when it is done, and a run that was cut off goes on.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

from effnb.chapters.pretraining.objectives import probing, runs
from effnb.lab import claims_bench
from effnb.lab.claims_bench import SEEDS, Table, documents_of
from effnb.lab.sweeps import held_out_novel
from effnb.pretraining import objectives

MODEL = "short training runs"
JUDGED_ALIKE = {"CLM": ("CLM", "CLM, 15 % asked"), "MLM": ("MLM",)}
COMPARED = (
    "CLM", "CLM, 15 % asked", "MLM 15 %", "MLM 40 %", "ELECTRA", "ELECTRA, 15 % asked",
)  # fmt: skip
"""What the verdict compares, and so takes five seeds of."""
OTHERS = 3
"""Seeds of all else."""
DOCUMENTS, LENGTH = 24, 128


class Reader:
    """What `documents_of` needs of a model: its tokenizer."""

    tokenizer = runs.tokenizer()


def judged(found: runs.Trained) -> dict[str, Any]:
    """What a run asked and took, its probe, and losses that compare within their own kind."""
    name, work = found.objective.name, found.work
    row: dict[str, Any] = {
        "steps": found.steps,
        "training_tokens": work.text_tokens,
        "read_tokens": work.read_tokens,
        "text_targets": work.text_targets,
        "flops": work.flops,
        "share": round(work.share, 5),
        "training_loss": round(fmean(found.losses[-50:]), 4),
    }
    row |= probe(found.model, found.objective.both_sides)
    documents = documents_of(Reader(), held_out_novel(), DOCUMENTS, LENGTH)
    if name.startswith(JUDGED_ALIKE["CLM"]):
        row["documents"] = runs.losses_by_document(found.model, documents, objectives.causal_lm)
    if name.startswith(JUDGED_ALIKE["MLM"]):
        row["masked_documents"] = runs.losses_by_document(found.model, documents, runs.masked_alike)
    return row


def probe(model: torch.nn.Module, both_sides: bool) -> dict[str, Any]:
    """The probe's accuracy, over all descriptions and in groups."""
    correct = probing.probed(lambda t: runs.features(model, t, both_sides), runs.tokenizer())
    return {
        "probe": round(sum(correct) / len(correct), 4),
        "probe_groups": probing.grouped(correct),
    }


def tokens(table: Table) -> None:
    """All objectives, one seed after the other; and the network before any training."""
    for seed in SEEDS:
        for name, objective in runs.ALL.items():
            if name not in COMPARED and seed >= OTHERS:
                continue
            about = {"model": MODEL, "method": name, "seed": seed}
            table.add(about, lambda o=objective, seed=seed: judged(runs.trained(o, seed)))
        if seed < OTHERS:
            about = {"model": MODEL, "method": "untrained", "seed": seed}
            table.add(about, lambda seed=seed: probe(runs.build(seed), both_sides=True))


PARTS = {"tokens": tokens}

if __name__ == "__main__":
    torch.set_num_threads(1)
    claims_bench.run(PARTS, __file__, __doc__.splitlines()[0])
