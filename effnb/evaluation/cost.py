"""What a model costs: parameters, bytes as stored, FLOPs counted, time and memory measured here.

Times are medians after a warm-up, never single runs; on a shared machine only their ratios within one
run mean anything.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one thing.

    Attributes:
        median_seconds: The typical time.
        minimum_seconds: The best estimate of the time without disturbance.
        p95_seconds: Nineteen of twenty runs were at least this fast.
        runs: How many were timed, the warm-up not counted.
    """

    median_seconds: float
    minimum_seconds: float
    p95_seconds: float
    runs: int


@dataclass(frozen=True)
class Cost:
    """The cost card of a model.

    Attributes:
        parameters: Numbers the model is made of; a quantized weight counts as many as it stands for.
        bytes: Bytes of everything that is stored: parameters and buffers, as they are.
        flops_per_token: Floating-point operations of a forward pass, per token of the given prompt.
        prefill_seconds: Median time to read the prompt.
        decode_tokens_per_second: Tokens generated per second, one sequence, with a key-value cache.
        peak_memory_bytes: Largest memory in use while reading the prompt, beyond what was in use
            before; None where it could not be measured.
        device: What it was measured on.
    """

    parameters: int
    bytes: int
    flops_per_token: float
    prefill_seconds: float
    decode_tokens_per_second: float
    peak_memory_bytes: int | None
    device: str


def parameter_count(model: nn.Module) -> int:
    """How many numbers the model is made of, shared ones once.

    Modules with packed weights are counted by the shape of the weight they stand for.
    """
    seen: dict[int, int] = {id(p): p.numel() for p in model.parameters()}
    for module in model.modules():
        stored = getattr(module, "quantized", None)
        if stored is not None:
            seen[id(module)] = stored.shape[0] * stored.shape[1]
    return sum(seen.values())


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers, shared ones once: what a file would hold."""
    seen = {}
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor):
            seen[(tensor.data_ptr(), tensor.shape)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of a call, counted by PyTorch: 2 for a multiplication with addition.

    Attention runs on the plain mathematical backend while counting: the fused CPU kernel is not known to
    the counter and would count as nothing. Element-wise operations count as nothing.
    """
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return counter.get_total_flops()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def latency(
    function: Callable[[], Any], *, warmup: int = 3, runs: int = 10, seconds: float | None = None
) -> Timing:
    """Time a call again and again.

    Args:
        function: What to time.
        warmup: Calls before timing starts; the first calls prepare kernels and caches.
        runs: Timed calls.
        seconds: Stop early once the timed calls took this long together (at least 3 are made).

    Raises:
        ValueError: When `runs` is below 1.
    """
    if runs < 1:
        raise ValueError(f"runs is {runs}; at least 1 is needed.")
    for _ in range(warmup):
        function()
    _wait()
    times: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        _wait()
        times.append(time.perf_counter() - start)
        if seconds is not None and len(times) >= 3 and sum(times) > seconds:
            break
    ordered = sorted(times)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return Timing(statistics.median(times), ordered[0], p95, len(times))


def decode_tokens_per_second(
    model: nn.Module, prompt: Int[Tensor, "1 time"], *, tokens: int = 32, runs: int = 3
) -> float:
    """Tokens per second when generating greedily, one sequence, with a key-value cache.

    The time to read the prompt is not counted. The median of several runs.

    Raises:
        ValueError: When `tokens` is below 1.
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; at least 1 is needed.")
    rates = []
    with torch.inference_mode():
        for run in range(runs + 1):
            out = model(input_ids=prompt, use_cache=True)
            _wait()
            start = time.perf_counter()
            for _ in range(tokens):
                best = out.logits[:, -1:].argmax(-1)
                out = model(input_ids=best, past_key_values=out.past_key_values, use_cache=True)
            _wait()
            if run:  # the first run is the warm-up
                rates.append(tokens / (time.perf_counter() - start))
    return statistics.median(rates)


def _resident_bytes() -> int | None:
    """Memory this process holds now, or None where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        pass
    if sys.platform == "darwin":
        done = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True
        )
        return int(done.stdout) * 1024 if done.returncode == 0 else None
    return None


def peak_memory(function: Callable[[], Any], *, interval: float = 0.002) -> int | None:
    """Largest memory that a call had in use beyond what was in use before it, in bytes.

    On CUDA the allocator's own peak. On a CPU the process's resident memory, sampled every `interval`
    seconds by a thread; memory that Python or the allocator kept from before can hide some of it. None
    where neither is to be had.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = _resident_bytes()
    if before is None:
        return None
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(interval):
            peak = max(peak, _resident_bytes() or 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        function()
        peak = max(peak, _resident_bytes() or 0)
    finally:
        done.set()
        watcher.join()
    return max(0, peak - before)


def measure(
    model: nn.Module,
    prompt: Int[Tensor, "1 time"],
    *,
    decode_tokens: int = 24,
    runs: int = 7,
) -> Cost:
    """Fill in the cost card of a causal language model on its own device.

    Args:
        model: The model.
        prompt: Token ids of one prompt.
        decode_tokens: Tokens to generate when timing decoding.
        runs: Timed runs of the prompt.
    """
    device = next(model.parameters()).device
    prompt = prompt.to(device)

    def read() -> None:
        with torch.inference_mode():
            model(input_ids=prompt, use_cache=False)

    memory = peak_memory(read)
    return Cost(
        parameters=parameter_count(model),
        bytes=stored_bytes(model),
        flops_per_token=flops(read) / prompt.numel(),
        prefill_seconds=latency(read, runs=runs).median_seconds,
        decode_tokens_per_second=decode_tokens_per_second(model, prompt, tokens=decode_tokens),
        peak_memory_bytes=memory,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )
