"""The measurements behind the verdict of `notebooks/05_inference/2_low_rank`.

    python data/sweep_claims_low_rank.py [mini] [smollm2]

mini     plain SVD, ASVD and SVD-LLM with 80, 60 and 40 % kept, five draws of calibration text
smollm2  the same with 80 % kept (about an hour on one core)

What is measured of every run is said in `claims_bench.py`.
"""

from __future__ import annotations

import claims_bench
from claims_bench import SEEDS, Bench, Table
from torch import nn

from effnb.inference import low_rank

KEPT = (0.8, 0.6, 0.4)
AWARE = {"ASVD": low_rank.decompose_asvd, "SVD-LLM": low_rank.decompose_svd_llm}


def layer_bytes(model: nn.Module) -> int:
    """Bytes of the linear layers inside the blocks, factors too, at 16 bits a number."""
    factors = [m for m in model.modules() if isinstance(m, low_rank.Factorized)]
    inside = {id(p) for m in factors for p in m.parameters()}
    whole = [
        p for n, p in model.named_parameters() if n.endswith("proj.weight") and id(p) not in inside
    ]
    return 2 * sum(p.numel() for p in whole + [p for m in factors for p in m.parameters()])


def measure(table: Table, name: str, shares: tuple[float, ...]) -> None:
    """Every method at every share kept; each decomposition is made once."""
    bench = Bench(name)
    original = {"model": name, "method": "original"}
    table.add(
        original, lambda: bench.judged(bench.model) | {"layer_bytes": layer_bytes(bench.model)}
    )
    plain = low_rank.decompose(bench.model)
    for kept in shares:
        small = low_rank.truncate(bench.model, plain, kept)
        table.add(
            {"model": name, "method": "SVD", "kept": kept},
            lambda small=small: bench.judged(small) | {"layer_bytes": layer_bytes(small)},
        )
    for seed in SEEDS:
        given = bench.calibration(seed)
        for method, make in AWARE.items():
            about = {"model": name, "method": method, "seed": seed}
            if all(
                any({**about, "kept": k}.items() <= r.items() for r in table.rows) for k in shares
            ):
                continue
            found = make(bench.model, given)
            for kept in shares:
                small = low_rank.truncate(bench.model, found, kept)
                table.add(
                    about | {"kept": kept},
                    lambda small=small, given=given: bench.judged(small, given),
                )


def mini(table: Table) -> None:
    """The model of the workbook, at three sizes."""
    measure(table, "mini-5m", KEPT)


def smollm2(table: Table) -> None:
    """A model of 135 million parameters, at one."""
    measure(table, "smollm2-135m", KEPT[:1])


PARTS = {"mini": mini, "smollm2": smollm2}

if __name__ == "__main__":
    claims_bench.run(PARTS, "low_rank_claims", __file__, __doc__.splitlines()[0])
