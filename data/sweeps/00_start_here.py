"""The stored measurements of `notebooks/00_start_here` (`make results`).

    python data/sweeps/00_start_here.py    # some minutes on one CPU core

rtn: round-to-nearest at every bit-width and grouping on `mini-5m`, measured as `effnb.lab.bench`
says. capital: what SmolLM2 says is the capital of France at each position of the tour's first
panel: the answer, the five likeliest next tokens, bytes as stored, and what a position takes when
it is computed live (the quickest one's seconds, the peak memory of this process).
"""

from __future__ import annotations

import math
import sys
import time

import psutil
from torch import nn

from effnb.chapters import start_here
from effnb.inference.quantization import QuantizedLinear, dequantized, rtn
from effnb.lab import load
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


def capital() -> dict:
    """SmolLM2's answer at every position, and the original's."""
    loaded = load("smollm2-135m", device="cpu")
    original = start_here.ask(loaded.model, loaded) | {"bytes": file_bytes(loaded.model)}
    table, seconds, process, peak = [], [], psutil.Process(), 0
    for scale in start_here.SCALES:
        for bits in range(start_here.BITS[0], start_here.BITS[1] + 1):
            began = time.perf_counter()
            row = {"bits": bits, "scale": scale} | start_here.rounded(loaded, bits, scale)
            seconds.append(time.perf_counter() - began)
            peak = max(peak, process.memory_info().rss)
            table.append(row)
            print(row, flush=True)
    live = {"seconds": round(min(seconds), 1), "mebibytes": round(peak / 2**20)}
    return {"prompt": start_here.PROMPT, "original": original, "table": table, "live": live}


PARTS = {"rtn": rounding, "capital": capital}

if __name__ == "__main__":
    sys.exit(run(PARTS, __file__, __doc__.splitlines()[0]))
