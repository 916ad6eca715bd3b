"""The measurements behind the verdict on S-H3 of `notebooks/06_hardware/2_codesign`.

    python data/sweep_claims_codesign.py [mini] [smollm2]

mini     attention that filters keys, lowers bits and drops tokens and heads, on `mini-5m`;
         every random choice five times
smollm2  filtered keys and dropped tokens on `smollm2-135m`

What is measured of every run is said in `claims_bench.py`; where keys are filtered, also the share
of the 16 best keys of each document that the filter finds. S-H4 is judged by the tables of
`sweep_codesign.py`.
"""

from __future__ import annotations

from typing import Any

import claims_bench
from claims_bench import SEEDS, Bench, Table, by_document
from torch import nn

from effnb.hardware.codesign import energon, pruning_record, spatten

TOP_K = 16


def filtered(bench: Bench, model: nn.Module) -> dict[str, Any]:
    """Losses and recall, document by document."""
    losses, recall = [], []
    for document in bench.documents:
        losses += by_document(model, [document])
        recall.append(round(pruning_record(model).recall, 5))
    return {"documents": losses, "recall_documents": recall, "calibration_tokens": 0}


def measure(table: Table, bench: Bench, *, everything: bool) -> None:
    """The choices by importance, and random ones with five seeds."""
    model, common = bench.model, {"model": bench.name}

    def dropped(**how: Any) -> dict[str, Any]:
        pruned = spatten(model, top_k=TOP_K, **how)
        found = bench.judged(pruned)
        pruning_record(pruned)  # what was recorded is not needed, and takes memory
        return found

    table.add(common | {"method": "original"}, lambda: bench.judged(model))
    table.add(
        common | {"method": "energon", "choose": "importance"},
        lambda: filtered(bench, energon(model, top_k=TOP_K)),
    )
    table.add(
        common | {"method": "tokens", "choose": "average"},
        lambda: dropped(token_keep=0.5, average=True),
    )
    if everything:
        table.add(common | {"method": "bits"}, lambda: dropped(msb_bits=6, threshold=0.1))
        for method, how in (("tokens", {"token_keep": 0.5}), ("heads", {"head_keep": 0.5})):
            table.add(
                common | {"method": method, "choose": "importance"}, lambda how=how: dropped(**how)
            )
    for seed in SEEDS:
        at_random = {"choose": "random", "seed": seed}
        table.add(
            common | {"method": "tokens"} | at_random,
            lambda at_random=at_random: dropped(token_keep=0.5, **at_random),
        )
        if everything:
            table.add(
                common | {"method": "heads"} | at_random,
                lambda at_random=at_random: dropped(head_keep=0.5, **at_random),
            )
            table.add(
                common | {"method": "energon"} | at_random,
                lambda at_random=at_random: filtered(
                    bench, energon(model, top_k=TOP_K, **at_random)
                ),
            )


def mini(table: Table) -> None:
    """The workbook's model."""
    measure(table, Bench("mini-5m"), everything=True)


def smollm2(table: Table) -> None:
    """A model of 135 million parameters."""
    measure(table, Bench("smollm2-135m"), everything=False)


PARTS = {"mini": mini, "smollm2": smollm2}

if __name__ == "__main__":
    claims_bench.run(PARTS, "codesign_claims", __file__, __doc__.splitlines()[0])
