"""What SmolLM2 says is the capital of France at every number of bits (`make results`).

    python data/sweep_tour.py            # about two minutes on two idle CPU cores

Each position of the tour's first panel: the answer, the five likeliest next tokens, and bytes as
stored. Also what a position takes when it is computed live: the quickest one's seconds, and the
peak memory of this process. Written to `data/results/tour_capital.json`.
"""

from __future__ import annotations

import time

import psutil

from effnb.chapters import start_here
from effnb.evaluation import stored_bytes
from effnb.lab import load, results


def main() -> None:
    """Ask at every position and store the answers."""
    loaded = load("smollm2-135m", device="cpu")
    original = start_here.ask(loaded.model, loaded) | {"bytes": stored_bytes(loaded.model)}
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
    about = {"prompt": start_here.PROMPT, "original": original, "table": table, "live": live}
    results.store(start_here.STORED, about, "python data/sweep_tour.py")


if __name__ == "__main__":
    main()
