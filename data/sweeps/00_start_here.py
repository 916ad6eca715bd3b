"""The stored measurements of `notebooks/00_start_here` (`make results`).

    python data/sweeps/00_start_here.py    # some minutes on one CPU core

Written to `data/results/00_start_here/rtn.json`: round-to-nearest at every bit-width and grouping
on `mini-5m`, measured as `effnb.lab.bench` says.
"""

from __future__ import annotations

import math
import sys

from torch import nn

from effnb.inference.quantization import QuantizedLinear, dequantized, rtn
from effnb.lab.bench import file_bytes
from effnb.lab.sweeps import Bench, run

GROUP_SIZES = ["tensor", "row", 128, 64, 32]


def rounding() -> dict:
    """Every setting, and the original."""
    bench = Bench()

    def row(model: nn.Module, bytes_: int, **setting) -> dict:
        found = bench.row(model, bytes_, **setting)
        return found | {"perplexity": round(math.exp(found["loss"]), 3)}

    original = {"bits": 16, "group_size": "none", "layer_bits": 16.0}
    table = [row(bench.model, file_bytes(bench.model), **original)]
    for group_size in GROUP_SIZES:
        for bits in range(2, 9):
            packed = rtn(bench.model, bits, group_size=group_size)
            layers = [m.quantized for m in packed.modules() if isinstance(m, QuantizedLinear)]
            numbers = sum(q.shape[0] * q.shape[1] for q in layers)
            setting = {
                "bits": bits,
                "group_size": str(group_size),
                "layer_bits": round(8 * sum(q.bytes for q in layers) / numbers, 4),
            }
            table.append(row(dequantized(packed), file_bytes(packed), **setting))
    return {
        "model": bench.name,
        "tokens": bench.windows.numel(),
        "questions": len(bench.questions),
        "table": table,
    }


PARTS = {"rtn": rounding}

if __name__ == "__main__":
    sys.exit(run(PARTS, __file__, __doc__.splitlines()[0]))
