"""The stored measurements of `notebooks/02_design/3_sharing` (`make results`).

    python data/sweeps/02_design/3_sharing.py             # every part
    python data/sweeps/02_design/3_sharing.py universal   # these parts

universal  a Universal Transformer that learns to add: right digits and steps by the length of the
           chain of carries, with halting and with fixed steps, three seeds (4 minutes: 9 runs)
smollm2    SmolLM2-135M and mini-5m whose trained layers are made to share, by first layer and by
           mean: parameters, bytes, loss, seconds to read 256 tokens (3 minutes)

The minutes are those of one idle core. What the verdicts rest on is measured by
`3_sharing_claims.py`.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from effnb.chapters.design.sharing import methods
from effnb.core.training import TrainingSettings, train
from effnb.design.sharing import share_layers
from effnb.lab import claims_bench
from effnb.lab.claims_bench import Bench, Table, by_document

SEEDS = (0, 1, 2)
STEPS = 1000
VARIANTS = {"halting": (6, True), "six steps": (6, False), "one step": (1, False)}
"""Steps at most, and whether positions halt by themselves."""
PONDER = 0.003
GROUPS = {"smollm2-135m": (30, 15, 10), "mini-5m": (6, 3, 2)}
"""Groups of layers; as many as layers share nothing."""
DOCUMENTS = 8


def universal(table: Table) -> None:
    """What depth is worth, and where it is spent."""
    for seed in SEEDS:
        for method, (steps, halting) in VARIANTS.items():
            about = {"model": "addition", "method": method, "seed": seed}
            table.add(about, lambda s=seed, n=steps, h=halting: learned(n, h, s))


def learned(steps: int, halting: bool, seed: int) -> dict:
    """The report of a trained model, at the trained length and at twice that, by steps at test."""
    model = methods.universal(steps, halting, seed)
    settings = TrainingSettings(
        steps=STEPS, learning_rate=2e-3, warmup_steps=50, schedule="wsd", seed=seed
    )

    def batches(step: int) -> tuple:
        return methods.addition_batches(1_000_003 * (seed + 1) + step)

    loss = partial(methods.addition_loss, ponder=PONDER)
    result = train(model, batches, settings, loss=loss)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_steps": steps,
        "chains": methods.addition_report(model),
        "by_steps": {
            str(n): methods.addition_right(model, n) for n in range(1, 9)
        },
        "longer": methods.addition_right(model, steps, 2 * methods.DIGITS),
        "train_seconds": round(result.seconds, 1),
    }  # fmt: skip


def smollm2(table: Table) -> None:
    """Trained layers that share without any training after it."""
    for name, groups in GROUPS.items():
        if all(any(r["model"] == name and r["groups"] == g for r in table.rows) for g in groups):
            continue
        bench = Bench(name)
        documents = bench.documents[:DOCUMENTS]
        ids = documents[0][None, :256]
        for number in groups:
            for initial in ("first", "mean"):
                if number == groups[0] and initial == "mean":
                    continue
                new = share_layers(bench.model, groups=number, initial=initial)

                def measure(new=new, documents=documents, ids=ids) -> dict:
                    with torch.inference_mode():
                        seconds = methods.processor_seconds(
                            lambda: new(input_ids=ids, use_cache=False)
                        )
                    numbers = sum(p.numel() for p in new.parameters())
                    return {
                        "documents": by_document(new, documents),
                        "parameters": numbers,
                        "seconds": round(seconds, 4),
                    }

                table.add({"model": name, "groups": number, "initial": initial}, measure)


PARTS = {"universal": universal, "smollm2": smollm2}

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(claims_bench.run(PARTS, __file__, __doc__.splitlines()[0]))
