"""What a model costs: parameters, bytes as stored, FLOPs counted, time and memory measured here.

Times are medians after a warm-up, never single runs; on a shared machine only their ratios within
one run mean anything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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
        parameters: Numbers the model is made of; a quantized weight counts as many as it stands
            for.
        bytes: Bytes of the model's file: parameters and buffers, plain weights in 16 bits.
        flops_per_token: Floating-point operations of a forward pass, per token of the given prompt.
        prefill_seconds: Median time to read the prompt.
        decode_tokens_per_second: Tokens generated per second, one sequence, with a key-value cache.
        peak_memory_bytes: Largest memory that the prompt's activations held at one time, the
            model itself not counted; None where it was not measured.
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


def file_bytes(model: nn.Module) -> int:
    """Bytes of a model's file, with its plain weights in 16 bits.

    The models ship in 16 bits and are loaded in 32: a parameter in float32 counts 2 bytes a number,
    so that no compression is credited with undoing that. Packed weights, scales and other buffers
    count as they are held.
    """
    shared = {(p.data_ptr(), p.shape): p for p in model.parameters() if p.dtype == torch.float32}
    return stored_bytes(model) - 2 * sum(p.numel() for p in shared.values())


def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of a call, counted by PyTorch.

    A multiplication with addition counts as 2. Attention runs on the plain mathematical backend
    while counting: the fused CPU kernel is not known to the counter and would count as nothing.
    Element-wise operations count as nothing.
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


def peak_memory(function: Callable[[], Any]) -> int:
    """Largest memory that tensors made during a call held at one time, in bytes.

    What was there before, such as the model's weights, is not counted. On CUDA it is the
    allocator's own peak; elsewhere the results of all operations are added up while they are
    alive, so the number is the same on every run. What an operation uses inside itself is then
    not seen.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _Held() as held:
        function()
    return held.peak


class _Held(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as each of them is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        keywords = keywords or {}
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((arguments, keywords)) if _is_plain(t)
        }
        result = operation(*arguments, **keywords)
        for tensor in filter(_is_plain, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:  # neither a view nor a result written in place
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


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
        bytes=file_bytes(model),
        flops_per_token=flops(read) / prompt.numel(),
        prefill_seconds=latency(read, runs=runs).median_seconds,
        decode_tokens_per_second=decode_tokens_per_second(model, prompt, tokens=decode_tokens),
        peak_memory_bytes=memory,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )
