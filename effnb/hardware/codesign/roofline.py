r"""The roofline: the least time that a piece of work can take, from its operations and its bytes.

A machine computes at most $P$ operations and moves at most $B$ bytes per second. Work that does
$F$ operations on $D$ bytes of memory traffic has the arithmetic intensity $I = F / D$, and

$$t \ge \max\left(\frac{F}{P}, \frac{D}{B}\right), \qquad
  \text{attainable rate} = \min(P,\ I\,B).$$

Left of the ridge $I^* = P / B$ the memory decides, right of it the arithmetic units do.

All counts here are exact and leave caches out: every operand is read once and every result written
once, which is the least that can happen. A multiplication with addition counts as 2 operations.

Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model for Multicore
Architectures", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# ---------------------------------------------------------------------------- work and roofs


@dataclass(frozen=True)
class Work:
    """What a computation does and moves.

    Attributes:
        operations: Arithmetic operations; a multiplication with addition is 2.
        bytes: Bytes read from memory and written to it.
    """

    operations: float
    bytes: float

    @property
    def operations_per_byte(self) -> float:
        """The arithmetic intensity $I$."""
        return self.operations / self.bytes

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(self.operations + other.operations, self.bytes + other.bytes)


@dataclass(frozen=True)
class Roof:
    """What a machine can do at most.

    Attributes:
        name: The machine, and where the two numbers come from.
        operations_per_second: $P$, the ceiling of the arithmetic.
        bytes_per_second: $B$, the ceiling of the memory.
    """

    name: str
    operations_per_second: float
    bytes_per_second: float

    @property
    def ridge_operations_per_byte(self) -> float:
        """$I^* = P / B$: work with a lower intensity waits for the memory."""
        return self.operations_per_second / self.bytes_per_second

    def attainable(self, operations_per_byte: float) -> float:
        r"""Operations per second that work of this intensity can reach: $\min(P, I\,B)$."""
        return min(self.operations_per_second, operations_per_byte * self.bytes_per_second)

    def least_seconds(self, work: Work) -> float:
        r"""$\max(F/P,\ D/B)$; nothing that obeys the counts can be faster."""
        return max(work.operations / self.operations_per_second, work.bytes / self.bytes_per_second)

    def memory_bound(self, work: Work) -> bool:
        """Whether the memory decides: the intensity lies left of the ridge."""
        return work.operations_per_byte < self.ridge_operations_per_byte


DATA_SHEETS = {
    "A100 SXM 80 GB": Roof("A100 SXM 80 GB, bf16, data sheet", 312e12, 2.04e12),
    "H100 SXM": Roof("H100 SXM, bf16, data sheet", 989e12, 3.35e12),
    "H200": Roof("H200, bf16, data sheet", 989e12, 4.8e12),
}
"""Ceilings that the vendor states for dense bf16. Not measured here; real ones lie lower."""


# ------------------------------------------------------------------------------------ counts


def _positive(**sizes: float) -> None:
    for name, value in sizes.items():
        if value <= 0:
            raise ValueError(f"{name.replace('_', ' ')} is {value}; it has to be above 0.")


def weight_bits(
    bits: float, *, group_size: int | None = None, scale_bits: int = 16, zero_bits: float = 0
) -> float:
    r"""Bits that one weight takes, its share of the group's scale and zero point counted.

    $$b + \frac{\text{scale bits} + \text{zero bits}}{g}$$

    Args:
        bits: $b$, of the code itself.
        group_size: $g$, weights that share a scale; None when there is no scale at all.
        scale_bits: Of one scale.
        zero_bits: Of one zero point; 0 where the grid is symmetric.

    Raises:
        ValueError: A size that is not above 0.
    """
    _positive(bits=bits)
    if group_size is None:
        return bits
    _positive(group_size=group_size)
    return bits + (scale_bits + zero_bits) / group_size


def sparse_bits(bits: float, *, kept: int = 2, of: int = 4) -> float:
    r"""Bits that one weight takes when only some of a few neighbours are kept, as in 2:4 sparsity.

    A kept weight is stored with its place among its neighbours:

    $$\frac{\text{kept}}{\text{of}} \left(b + \lceil \log_2 \text{of} \rceil\right)$$

    Two of four weights of 16 bits take 9 bits a weight, 56.25 % of the dense ones; with 4 bits they
    take 3, so that at best $16/3 = 5.33$ times fewer bytes move than for dense weights of 16 bits.

    Args:
        bits: $b$, of a weight that is kept, its share of a scale counted where there is one.
        kept: How many of the neighbours are kept.
        of: How many neighbours are looked at together.

    Raises:
        ValueError: A size that is not above 0, or more kept than there are.
    """
    _positive(bits=bits, kept=kept, of=of)
    if kept > of:
        raise ValueError(f"{kept} of {of} weights cannot be kept; kept has to be at most {of}.")
    return kept / of * (bits + math.ceil(math.log2(of)))


def matmul(m: int, n: int, k: int, *, weight_bits: float = 16, activation_bits: float = 16) -> Work:
    r"""The product of inputs (m, k) and a weight (k, n), everything moved once.

    $$F = 2mnk, \qquad D = \tfrac{1}{8}\left(b_w\,nk + b_a\,(mk + mn)\right)$$

    For few tokens, $m \ll n, k$, the weight is nearly all that moves, and $I \approx 16\,m/b_w$.

    Args:
        m: Tokens.
        n: Outputs.
        k: Inputs.
        weight_bits: $b_w$, as stored; see the function `weight_bits`.
        activation_bits: $b_a$, of inputs and results.

    Raises:
        ValueError: A size that is not above 0.
    """
    _positive(m=m, n=n, k=k, weight_bits=weight_bits, activation_bits=activation_bits)
    return Work(2 * m * n * k, (weight_bits * n * k + activation_bits * (m * k + m * n)) / 8)


def elementwise(numbers: int, steps: int, *, fused: bool, bits: float = 16) -> Work:
    r"""A chain of `steps` operations, each on every one of `numbers` numbers.

    One kernel per step reads and writes everything each time: $2kn$ numbers. Fused into one kernel,
    the numbers stay in registers between the steps: $2n$.

    Raises:
        ValueError: A size that is not above 0.
    """
    _positive(numbers=numbers, steps=steps, bits=bits)
    return Work(numbers * steps, 2 * numbers * (1 if fused else steps) * bits / 8)


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder of Llama's kind that its operations and bytes follow from."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The sizes in a Hugging Face configuration (Llama and its relatives)."""
        heads = config.num_attention_heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.vocab_size,
        )

    @property
    def weights(self) -> int:
        """Weights that every token is multiplied with: the linear layers and the output head."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return (
            self.layers * (attention + 3 * self.hidden * self.intermediate)
            + self.hidden * self.vocabulary
        )

    def cache_numbers(self, tokens: int) -> int:
        """Numbers in a key-value cache of this many tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens


def prefill(shape: Shape, tokens: int, *, weight_bits: float = 16, cache_bits: float = 16) -> Work:
    r"""Reading a prompt at once: $F = 2TW + 4Lhd\,T^2$, $D$ = the weights, and writing the cache.

    Attention is counted over all $T^2$ pairs, as libraries without a causal kernel compute it.
    Activations are left out: a kernel can keep them close, and next to the weights they are few.

    Raises:
        ValueError: A size that is not above 0.
    """
    _positive(tokens=tokens, weight_bits=weight_bits, cache_bits=cache_bits)
    pairs = 4 * shape.layers * shape.heads * shape.head_dim * tokens**2
    return Work(
        2 * tokens * shape.weights + pairs,
        (weight_bits * shape.weights + cache_bits * shape.cache_numbers(tokens)) / 8,
    )


def decode_step(
    shape: Shape,
    context: int,
    *,
    batch: int = 1,
    weight_bits: float = 16,
    cache_bits: float = 16,
) -> Work:
    r"""One token for each of `batch` sequences that hold `context` tokens, this one included.

    $$F = n\,(2W + 4Lhd\,T), \qquad
      D = \tfrac{1}{8}\left(b_w W + n\, b_c \cdot 2 L h_{kv} d\, T\right)$$

    The weights are read once for the whole batch of $n$; each sequence has its own cache.

    Raises:
        ValueError: A size that is not above 0.
    """
    _positive(context=context, batch=batch, weight_bits=weight_bits, cache_bits=cache_bits)
    pairs = 4 * shape.layers * shape.heads * shape.head_dim * context
    moved = weight_bits * shape.weights + batch * cache_bits * shape.cache_numbers(context)
    return Work(batch * (2 * shape.weights + pairs), moved / 8)


# ------------------------------------------------------------------------------------- tiling


def tiled_bytes(m: int, n: int, k: int, *, tile_m: int, tile_n: int, bits: float = 16) -> float:
    r"""Bytes that a tiled product moves: each tile of the result reads its rows and its columns.

    $$D = \frac{b}{8}\left(mk\left\lceil\tfrac{n}{t_n}\right\rceil
          + kn\left\lceil\tfrac{m}{t_m}\right\rceil + mn\right)$$

    With tiles of 1 it is the product without any reuse, with one tile for all it is `matmul`.

    Raises:
        ValueError: A size that is not above 0.
    """
    _positive(m=m, n=n, k=k, tile_m=tile_m, tile_n=tile_n, bits=bits)
    reads = m * k * math.ceil(n / tile_n) + k * n * math.ceil(m / tile_m)
    return (reads + m * n) * bits / 8


def tile_bytes(tile_m: int, tile_n: int, tile_k: int, *, bits: float = 16) -> float:
    """Bytes that have to fit close by: a tile of each operand, and the sums in 32 bits.

    Raises:
        ValueError: A size that is not above 0.
    """
    _positive(tile_m=tile_m, tile_n=tile_n, tile_k=tile_k, bits=bits)
    return (tile_m + tile_n) * tile_k * bits / 8 + 4 * tile_m * tile_n


# --------------------------------------------------------------------------------- measuring


def median_seconds(function: Callable[[int], Any], runs: int) -> float:
    """The median time of `function(0)`, `function(1)`, …, after one call to warm up."""
    _positive(runs=runs)
    function(0)
    _wait()
    times = []
    for run in range(runs):
        start = time.perf_counter()
        function(run)
        _wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def measure_roof(
    device: str | torch.device = "cpu",
    *,
    mebibytes: int = 256,
    size: int = 1024,
    dtype: torch.dtype = torch.float32,
    runs: int = 5,
) -> Roof:
    """The two ceilings of a device, measured: a large copy, and a large product of matrices.

    The copy reads and writes, and both directions count. (A processor that reads a line before it
    overwrites it moves half as much again, unseen.) The medians of several runs are taken.

    Args:
        device: Where to measure.
        mebibytes: Size of what is copied; several times the largest cache, or the cache is
            measured instead of the memory.
        size: The matrices are (size, size).
        dtype: Type of the numbers of the product.
        runs: Timed runs of each.

    Raises:
        ValueError: A size that is not above 0.
    """
    _positive(mebibytes=mebibytes, size=size, runs=runs)
    device = torch.device(device)
    source = torch.ones(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda _: target.copy_(source), runs)
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    product = median_seconds(lambda _: a @ b, runs)
    return Roof(f"{device.type}, measured", 2 * size**3 / product, 2 * source.nbytes / copy)


def measure_matmul(
    m: int,
    n: int,
    k: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    cold_mebibytes: int = 256,
    runs: int = 5,
) -> float:
    """Seconds of a product of (m, k) and (k, n) whose weight comes from memory each time.

    Several weights take turns, together so large that none is still in a cache when its turn comes:
    otherwise the product could beat a roof that was measured on memory.

    Args:
        m: Tokens.
        n: Outputs.
        k: Inputs.
        device: Where to measure.
        dtype: Type of all numbers.
        cold_mebibytes: What the weights take together, at least.
        runs: Timed runs; the median is returned.

    Raises:
        ValueError: A size that is not above 0.
    """
    _positive(m=m, n=n, k=k, cold_mebibytes=cold_mebibytes, runs=runs)
    count = math.ceil(cold_mebibytes * 2**20 / (n * k * dtype.itemsize)) + 1
    weights = torch.ones(count, n, k, device=device, dtype=dtype)
    inputs = torch.ones(m, k, device=device, dtype=dtype)
    return median_seconds(lambda run: inputs @ weights[run % count].T, runs)
