"""Times of functions: medians with their spread, on buffers that no cache still holds.

A kernel that takes ten microseconds is launched in five, and what it read the last time may still
lie in the L2 cache. So on a GPU a small case has several copies of its tensors, together larger
than the L2 cache, whose runs are captured in one CUDA graph, which the GPU replays without waiting
for Python: each run finds its tensors in memory, as a layer does that is one of many (cold). A
graph of the first copy alone is timed beside it (warm). What cannot be captured is timed one run at
a time, with a large buffer overwritten in between.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20
L2_BYTES = 50 * 2**20
"""Of an H100, where PyTorch does not say it."""
COPIES = 32
"""Copies of a case at most; of one that moves less than 3 MiB a part then stays in the L2."""
REPEATS = 30

Run = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Times of one function.

    Attributes:
        seconds: The median.
        low: The first quartile.
        high: The third.
        runs: How many times were taken.
    """

    seconds: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """The median and the quartiles; of one time, that time.

        Raises:
            ValueError: When there is no time.
        """
        if not times:
            raise ValueError("no run was timed.")
        if len(times) == 1:
            return cls(times[0], times[0], times[0], 1)
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
        return cls(middle, low, high, len(times))


def copies_for(bytes_of_one: int, l2_bytes: int) -> int:
    """How many copies of a case are together twice as large as the L2 cache; one, where one is.

    Args:
        bytes_of_one: Bytes that one run moves.
        l2_bytes: Bytes of the cache.
    """
    wanted = -(-2 * l2_bytes // max(bytes_of_one, 1))
    return max(1, min(COPIES, wanted))


def l2_bytes(device: torch.device) -> int:
    """Of this GPU."""
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or L2_BYTES


def on_host(run: Run, *, repeats: int = REPEATS) -> Spread:
    """Times by the host's clock, after two runs that are not counted."""
    for _ in range(2):
        run()
    times = []
    for _ in range(max(repeats // 10, 3)):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return Spread.of(times)


def one_at_a_time(run: Run, device: torch.device, *, repeats: int = REPEATS) -> Spread:
    """Times by the GPU's events, each after overwriting a buffer larger than the L2 cache."""
    for _ in range(2):
        run()
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    marks = []
    for _ in range(repeats):
        flush.zero_()
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        run()
        pair[1].record()
        marks.append(pair)
    torch.cuda.synchronize(device)
    return Spread.of([start.elapsed_time(end) / 1000 for start, end in marks])


def captured(runs: Sequence[Run], device: torch.device, *, repeats: int = REPEATS) -> Spread:
    """Times of one run, of a CUDA graph in which all of them follow each other.

    Raises:
        RuntimeError: When one cannot be captured: it waits for the GPU, or copies from the host.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # compiles, and allocates what lasts
        for run in (*runs, *runs):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run() for run in runs]
    marks = []
    for repeat in range(repeats + 2):
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        graph.replay()
        pair[1].record()
        if repeat > 1:
            marks.append(pair)
    torch.cuda.synchronize(device)
    del kept
    return Spread.of([start.elapsed_time(end) / 1000 / len(runs) for start, end in marks])


@dataclass(frozen=True)
class Clocked:
    """What a function took.

    Attributes:
        cold: With its tensors in memory.
        warm: With those of the last run in the cache; None where the case is larger than that, or
            could not be captured.
        how: How it was timed: "graph of N copies", "one at a time" or "host".
    """

    cold: Spread
    warm: Spread | None
    how: str


def clock(runs: Sequence[Run], device: torch.device) -> Clocked:
    """Time the same function on several copies of its tensors.

    Args:
        runs: One for each copy.
        device: Where they run.
    """
    if device.type != "cuda":
        return Clocked(on_host(runs[0]), None, "host")
    try:
        cold = captured(runs, device)
        warm = captured(runs[:1], device) if len(runs) > 1 else None
    except Exception:  # noqa: BLE001 - libraries fail to be captured in many ways
        torch.cuda.synchronize(device)
        return Clocked(one_at_a_time(runs[0], device), None, "one at a time")
    return Clocked(cold, warm, f"graph of {len(runs)} copies")


ASKED = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")


def machine(ask: Callable[[Sequence[str]], str] | None = None) -> dict[str, str]:
    """What the driver says of the GPU: its name, the driver, the clocks now and at most.

    Args:
        ask: Runs a command and returns what it prints; for tests.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
    try:
        said = (ask or _ask)(command).strip().splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in said[0].split(",")] if said else []
    return dict(zip(ASKED, values, strict=True)) if len(values) == len(ASKED) else {}


def _ask(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout
