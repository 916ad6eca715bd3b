r"""Multiply by a weight of 4-bit codes that is never written out: $y = x\,\hat W^\top + b$.

Each group of $g$ neighbouring inputs of a row has a step $s$, and either a zero point $z$ or a
table $t$ of sixteen entries (NF4):

$$\hat w = s\,(q - z) \qquad\text{or}\qquad \hat w = s\,t_q.$$

**Bytes.** For M rows of x, N outputs, K inputs, in 16 bits:
$NK (\frac12 + \frac{b_s}{g}) + 2MK + 2MN$, where $b_s$ counts the bytes of one group's step and
zero point: 2, 3 (half-precision step, a byte of zero point) or 4 (float32 step, for tables).
**Operations.** $2MNK$.
**Bound.** One row is limited by memory: it takes at least the time to fetch the codes, so at best
$2 / (\frac12 + \frac{b_s}{g})$ times less than with 16-bit weights: 3.88 times for $g = 128$
without zero points. With $P$ operations and $B$ bytes a second, arithmetic takes over at
$M = \frac{P}{2B} (\frac12 + \frac{b_s}{g})$ rows.

Four kernels. *One row*: every program takes 32 outputs and a part of the inputs, multiplies in
float32 and adds up. Parts go to memory, and the program that is last adds them in a fixed order, so
the result is the same every time. Reading half a byte leaves an H100's schedulers about five
instructions for a weight before they, and not memory, set the time: a code is turned into a number
where it stands in its word, by one logic operation and one subtraction. *A few rows*: tiles on the
tensor cores, likewise in parts. The codes minus the zero point are
small whole numbers, exact in every type, so they are multiplied as they are and the step is applied
to the sums in float32: uniform grids lose nothing to rounding the weights. *Writing
out*: from 256 rows on, where reading the weight costs little beside the operations, it is written
out once and the library multiplies. *Backward*:
$\partial x = \partial y\, \hat W$, for training something under a frozen weight (QLoRA). Here the
step is part of the weight; float16, which may not hold that, is multiplied in TF32, at half the
rate.

Fused dequantization: Frantar et al., "MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on
Large Language Models", 2024, arXiv 2408.11743. QLoRA: Dettmers et al., 2023, arXiv 2305.14314.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from effnb.kernels._int4_weight import SMALLEST, UNIT, Int4Weight, pack_int4
from effnb.kernels._launch import (
    GRID,
    cdiv,
    check_floats,
    check_shape,
    check_whole,
    choose,
    empty,
    exact,
    jit,
    launch,
    next_power_of_2,
    precision,
    rows_of,
    tl,
)
from effnb.kernels._tuning import Candidate, Numbers, TuneCase, chosen, key_of
from effnb.kernels.bench import EXACT, BenchCase, Runner, absent, pinned
from effnb.kernels.compile import CompileCase
from effnb.kernels.report import Work

__all__ = [
    "SMALLEST",
    "Blocks",
    "Int4Weight",
    "blocks_for",
    "int4_matmul",
    "pack_int4",
    "reference",
]


def reference(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """The same product in plain PyTorch: write the weight out, and multiply.

    In float32 (float64 if x is), rounded once: half precision would not hold every weight.
    """
    kind = exact(x, bias)
    bias = None if bias is None else bias.to(kind)
    return torch.nn.functional.linear(x.to(kind), weight.dequantize(kind), bias).to(x.dtype)


# --- the kernels ----------------------------------------------------------------------------------


@jit
def _place(bits, magic, AT: tl.constexpr):
    """The code that stands in place AT of each word as the float 2^23 + q 16^AT, in one operation.

    The code stays where it is: the last bits of a float32 count ones. `magic` is the bits of 2^23
    in a register, for no operation of three takes two constants.
    """
    return ((bits & (15 << (4 * AT))) | magic).to(tl.float32, bitcast=True)


@jit
def _two_entries(words, pairs, BYTE: tl.constexpr):
    """What the two codes of a byte stand for by the table, which holds all pairs, in one load."""
    both = tl.load(pairs + ((words >> (8 * BYTE)) & 255))
    first = (both & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    return first, (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@jit
def _of_groups(
    per_group, units, rows, mask,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Steps or zero points of the inputs from FIRST on in some units, by rows; 0 past the end."""
    group = (units * 128 + FIRST) // GROUP
    mask = mask & (group < K // GROUP)
    return tl.load(per_group + group.to(tl.int64) * N + rows, mask=mask, other=0).to(tl.float32)


@jit
def _last_adds(
    found, sums, counters, place, mask, bias, columns, out, part, rows_by_columns,
    BIAS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Store a part of a sum; the program that is last adds all of them in order, and the bias."""
    last = True
    if PARTS > 1:
        tl.store(sums + part.to(tl.int64) * rows_by_columns + place, found, mask=mask)
        tl.debug_barrier()  # all threads have stored before one of them says so
        counter = counters + tl.program_id(0)
        last = tl.atomic_add(counter, 1, sem="acq_rel") == PARTS - 1
        if last:
            found = tl.zeros_like(found)
            earlier = sums + place
            for _ in range(PARTS):
                # Other multiprocessors wrote these: not from this one's own cache.
                found += tl.load(earlier, mask=mask, other=0.0, cache_modifier=".cg")
                earlier += rows_by_columns
            tl.store(counter, 0)  # as the next launch expects it
    if last:
        if BIAS:
            found += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + place, found.to(out.dtype.element_ty), mask=mask)


@jit
def _one_row(
    x, codes, scales, zeros, pairs, bias, out, sums, counters, magics, stride_x,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    ZERO: tl.constexpr, ZEROS: tl.constexpr, TABLE: tl.constexpr, BIAS: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): outputs i BLOCK_N ..., part j of the inputs, UNITS units at a time."""
    ALL: tl.constexpr = (K + 127) // 128
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words = tl.arange(0, 16)
    line = rows.to(tl.int64)
    magic = tl.load(magics)
    total = tl.zeros((BLOCK_N, UNITS, 16), dtype=tl.float32)
    for step in range(PART):
        units = (tl.program_id(1) * PART + step) * UNITS + tl.arange(0, UNITS)
        mask = (rows < N)[:, None] & (units < ALL)[None, :]
        packed = tl.load(
            codes + line[:, None, None] * (ALL * 16) + (units[:, None] * 16 + words)[None, :, :],
            mask=mask[:, :, None],
            other=0,
        )
        upper = packed >> 16
        for part in tl.static_range(128 // SHARED):
            first = part * SHARED
            scale = _of_groups(scales, units[None, :], line[:, None], mask, N, K, GROUP, first)
            zero = tl.full((BLOCK_N, UNITS), ZERO, dtype=tl.float32)
            if ZEROS:
                zero = _of_groups(zeros, units[None, :], line[:, None], mask, N, K, GROUP, first)
            product = tl.zeros((BLOCK_N, UNITS, 16), dtype=tl.float32)
            for byte in tl.static_range(part * SHARED // 32, (part + 1) * SHARED // 32):
                k = (units[:, None] * 128 + byte * 32 + words[None, :]).to(tl.int64)
                low = tl.load(x + k * stride_x, mask=k < K, other=0.0).to(tl.float32)
                k += 16
                high = tl.load(x + k * stride_x, mask=k < K, other=0.0).to(tl.float32)
                if TABLE:
                    first, second = _two_entries(packed, pairs, byte)
                    product += first * low[None, :, :]
                    product += second * high[None, :, :]
                else:
                    # q 16^p - z 16^p, exactly, times x / 16^p
                    product += _times(packed, upper, low, zero, magic, 2 * byte)
                    product += _times(packed, upper, high, zero, magic, 2 * byte + 1)
            total += product * scale[:, :, None]
    found = tl.sum(tl.sum(total, 2), 1)
    _last_adds(
        found, sums, counters, line, rows < N, bias, line, out,
        tl.program_id(1), N, BIAS, PARTS,
    )  # fmt: skip


@jit
def _times(packed, upper, x, zero, magic, PLACE: tl.constexpr):
    """Products of x and q - z in one place; those beyond a float's last bits were moved down."""
    AT: tl.constexpr = PLACE if PLACE < 5 else PLACE - 4
    number = _place(packed if PLACE < 5 else upper, magic, AT)
    number -= (zero * 16**AT + 8388608.0)[:, :, None]
    return number * (x * (1.0 / 16**AT))[None, :, :]


@jit
def _exact(words, zero, kind: tl.constexpr, PLACE: tl.constexpr):
    """The codes in one place less their zero points, exactly, in the type that is multiplied."""
    q = (words >> (4 * PLACE)) & 15
    if kind == tl.float16:  # the float16 whose last bits are q is 1024 + q
        number = (q | 0x6400).to(tl.int16).to(kind, bitcast=True) - (zero + 1024.0).to(kind)
    elif kind == tl.bfloat16:  # and the bfloat16 is 128 + q
        number = (q | 0x4300).to(tl.int16).to(kind, bitcast=True) - (zero + 128.0).to(kind)
    else:
        number = (q | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)
    return number


@jit
def _many_rows(
    x, codes, scales, zeros, pairs, bias, out, sums, counters, M, stride_xm, stride_xk,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    ZERO: tl.constexpr, ZEROS: tl.constexpr, TABLE: tl.constexpr, BIAS: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i + j N / BLOCK_N, p): rows j BLOCK_M ..., outputs i BLOCK_N ..., a part of K."""
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    ALL: tl.constexpr = (K + 127) // 128
    kind: tl.constexpr = x.dtype.element_ty
    ms = (tl.program_id(0) // BLOCKS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = tl.program_id(0) % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    words = tl.arange(0, 16)
    x_rows = x + ms[:, None] * stride_xm
    line = ns.to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(PART):
        unit = tl.program_id(1) * PART + step
        mask = (ns < N) & (unit < ALL)
        packed = tl.load(  # transposed: inputs by outputs
            codes + line[None, :] * (ALL * 16) + (unit * 16 + words)[:, None],
            mask=mask[None, :],
            other=0,
        )
        for part in tl.static_range(128 // SHARED):
            scale = _of_groups(scales, unit, line, mask, N, K, GROUP, part * SHARED)
            zero = tl.full((BLOCK_N,), ZERO, dtype=tl.float32)
            if ZEROS:
                zero = _of_groups(zeros, unit, line, mask, N, K, GROUP, part * SHARED)
            product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for byte in tl.static_range(part * SHARED // 32, (part + 1) * SHARED // 32):
                place = (unit * 128 + byte * 32 + words).to(tl.int64)
                here = (ms < M)[:, None] & (place < K)[None, :]
                low = tl.load(x_rows + place[None, :] * stride_xk, mask=here, other=0.0)
                place += 16
                here = (ms < M)[:, None] & (place < K)[None, :]
                high = tl.load(x_rows + place[None, :] * stride_xk, mask=here, other=0.0)
                if TABLE:
                    first, second = _two_entries(packed, pairs, byte)
                else:
                    first = _exact(packed, zero[None, :], kind, 2 * byte)
                    second = _exact(packed, zero[None, :], kind, 2 * byte + 1)
                product = tl.dot(low, first.to(kind), product, input_precision=PRECISION)
                product = tl.dot(high, second.to(kind), product, input_precision=PRECISION)
            total += product * scale[None, :]
    mask = (ms < M)[:, None] & (ns < N)[None, :]
    place = ms[:, None] * N + ns[None, :]
    columns = tl.broadcast_to(line[None, :], (BLOCK_M, BLOCK_N))
    _last_adds(
        total, sums, counters, place, mask, bias, columns, out,
        tl.program_id(1), M.to(tl.int64) * N, BIAS, PARTS,
    )  # fmt: skip


@jit
def _written(
    codes, scales, zeros, table, line, k, mask,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    ZEROS: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """The weights of some rows and inputs in float32, steps included."""
    COLUMNS: tl.constexpr = (K + 127) // 128 * 16
    words = tl.load(codes + line * COLUMNS + k // 128 * 16 + k % 16, mask=mask, other=0)
    q = (words >> (k % 128 // 16 * 4)) & 15
    of_group = (k // GROUP).to(tl.int64) * N + line
    scale = tl.load(scales + of_group, mask=mask, other=0.0).to(tl.float32)
    if TABLE:
        return tl.load(table + q) * scale
    zero = tl.full((1, 1), ZERO, dtype=tl.float32)
    if ZEROS:
        zero = tl.load(zeros + of_group, mask=mask, other=0).to(tl.float32)
    return ((q | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0 - zero) * scale


@jit
def _backward(
    dy, codes, scales, zeros, table, dx, M, stride_dm, stride_dn,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    ZERO: tl.constexpr, ZEROS: tl.constexpr, TABLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program i + j K / BLOCK_K: rows j BLOCK_M ..., inputs i BLOCK_K ..., all outputs."""
    kind: tl.constexpr = tl.float32 if dy.dtype.element_ty == tl.float16 else dy.dtype.element_ty
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    ms = (tl.program_id(0) // BLOCKS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ks = tl.program_id(0) % BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    dy_rows = dy + ms[:, None] * stride_dm
    for block in range((N + BLOCK_N - 1) // BLOCK_N):
        ns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        line = ns.to(tl.int64)
        mask = (ns < N)[:, None] & (ks < K)[None, :]
        # The step belongs to the axis that is summed over, so here it is part of the weight, which
        # float16 may not hold.
        weights = _written(
            codes, scales, zeros, table, line[:, None], ks[None, :], mask,
            N, K, GROUP, ZERO, ZEROS, TABLE,
        )  # fmt: skip
        mask = (ms < M)[:, None] & (ns < N)[None, :]
        grad = tl.load(dy_rows + line[None, :] * stride_dn, mask=mask, other=0.0).to(kind)
        total = tl.dot(grad, weights.to(kind), total, input_precision=PRECISION)
    mask = (ms < M)[:, None] & (ks < K)[None, :]
    tl.store(dx + ms[:, None] * K + ks[None, :], total.to(dx.dtype.element_ty), mask=mask)


@jit
def _write_out(
    codes, scales, zeros, table, out,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    ZERO: tl.constexpr, ZEROS: tl.constexpr, TABLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the weights of rows i BLOCK_N ... and inputs j BLOCK_K ..., rounded once."""
    line = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (line < N)[:, None] & (ks < K)[None, :]
    weights = _written(
        codes, scales, zeros, table, line[:, None], ks[None, :], mask,
        N, K, GROUP, ZERO, ZEROS, TABLE,
    )  # fmt: skip
    tl.store(out + line[:, None] * K + ks[None, :], weights.to(out.dtype.element_ty), mask=mask)


# --- launching ------------------------------------------------------------------------------------

PROGRAMS = 512
"""How many programs a product of few rows is cut into at least: four for each multiprocessor of a
large GPU, so that each of them waits for four pieces of memory at a time."""
UNITS = 4
"""Units of inputs that a program of one row loads at once: a warp reads 256 bytes of a row, and a
thread 16 of each of its rows. Fewer would ask memory for too little at a time; more would need more
than the 128 registers with which four programs find room on a multiprocessor."""
LIBRARY_ROWS = 256
"""From so many rows on the weight is written out once and the library's product is called: reading
it costs little beside so many operations, and no kernel of ours is faster."""


@dataclass(frozen=True)
class Blocks:
    """How a product is cut into programs.

    Attributes:
        m: Rows of x per program; 1 for the kernel of one row.
        n: Outputs per program.
        parts: Into how many parts the inputs are cut.
        warps: Warps per program.

    Raises:
        ValueError: Numbers that no program can have.
        TypeError: What is no whole number.
    """

    m: int
    n: int
    parts: int = 1
    warps: int = 4

    def __post_init__(self) -> None:
        for name in ("m", "n", "parts", "warps"):
            number = check_whole(name, getattr(self, name))
            least = 16 if name == "n" else 1
            if number < least or (name != "parts" and number != next_power_of_2(number)):
                kind = "positive" if name == "parts" else f"a power of two from {least}"
                raise ValueError(f"{name} is {number}; it must be {kind}.")
            object.__setattr__(self, name, number)


def blocks_for(rows: int, weight: Int4Weight, dtype: torch.dtype) -> Blocks:
    """A fair choice by the sizes alone, in which registers suffice; where none was measured.

    Products of float32 run without tensor cores, on small blocks.
    """
    return _blocks(rows, *weight.shape, dtype)


def _blocks(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> Blocks:
    units = cdiv(inputs, UNIT)
    if rows == 1:
        return Blocks(1, 32, _parts(cdiv(outputs, 32), cdiv(units, UNITS)))
    if dtype == torch.float32:
        return Blocks(16, 16, warps=8)
    # As wide as registers allow: a weight that was unpacked serves all rows, and four warps share
    # the outputs, since among more of them each would unpack what another one has.
    m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    n = 64 if m == 16 else 128
    return Blocks(m, n, _parts(cdiv(outputs, n) * cdiv(rows, m), units))


def _numbers(blocks: Blocks) -> Numbers:
    return blocks.m, blocks.n, blocks.parts, blocks.warps


def _key(rows: int, n: int, k: int, group: int, table: bool, dtype: torch.dtype) -> str:
    kind = "table" if table else "grid"
    return f"{kind} {key_of(dtype, rows=rows, n=n, k=k, group=group)}"


def _chosen(rows: int, weight: Int4Weight, dtype: torch.dtype, device: torch.device) -> Blocks:
    """What was measured on this device, or else `blocks_for`."""
    own = blocks_for(rows, weight, dtype)
    table = weight.table is not None
    key = partial(_key, rows, *weight.shape, weight.group_size, table, dtype)
    return Blocks(*chosen("int4_matmul", key, device, _numbers(own)))


def _parts(programs: int, turns: int) -> int:
    """Into how many parts to cut the inputs, so that enough programs run and each has a turn."""
    return min(next_power_of_2(cdiv(PROGRAMS, max(1, programs))), turns)


def _about(weight: Int4Weight) -> dict[str, Any]:
    """The kernels' constants that follow from the weight."""
    return {
        "N": weight.shape[0],
        "K": weight.shape[1],
        "GROUP": weight.group_size,
        "ZERO": weight.zero,
        "ZEROS": weight.zeros is not None,
        "TABLE": weight.table is not None,
    }


_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}


def _counters(programs: int, device: torch.device) -> Tensor:
    """Zeros by which the last of several programs knows that it is; it leaves zeros behind.

    On a GPU they are kept for the next launch on the same stream, which begins when this one has
    ended.
    """
    if device.type != "cuda":
        return torch.zeros(programs, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if len(_COUNTERS.get(key, ())) < programs:
        _COUNTERS[key] = torch.zeros(programs, dtype=torch.int32, device=device)
    return _COUNTERS[key]


@lru_cache
def _magic(device: torch.device) -> Tensor:
    """The bits of 2^23 where no compiler sees them."""
    return torch.tensor([0x4B000000], dtype=torch.int32, device=device)


def _forward(x: Tensor, weight: Int4Weight, bias: Tensor | None, blocks: Blocks | None) -> Tensor:
    (rows, k), n = x.shape, weight.shape[0]
    if rows >= LIBRARY_ROWS and blocks is None and weight.fits(x.dtype):
        bias = None if bias is None else bias.to(x.dtype)
        return torch.nn.functional.linear(x, written_out(weight, x.dtype), bias)
    blocks = blocks or _chosen(rows, weight, x.dtype, x.device)
    single = rows == 1 and blocks.m == 1
    units = UNITS if single else 1
    turns = cdiv(cdiv(k, UNIT), units)
    each = cdiv(turns, min(blocks.parts, turns, GRID[1]))
    parts, block_m = cdiv(turns, each), 1 if single else max(blocks.m, 16)
    programs = cdiv(n, blocks.n) * cdiv(rows, block_m)
    bias = None if bias is None else bias.contiguous()
    out = empty((rows, n), x.dtype, x.device)
    sums = empty((parts, rows, n), torch.float32, x.device) if parts > 1 else None
    counters = _counters(programs, x.device) if parts > 1 else None
    codes, scales, zeros, _ = weight.parts
    given = (x, codes, scales, zeros, weight.pairs, bias, out, sums, counters)
    about = _about(weight) | {"SHARED": weight.shared, "BIAS": bias is not None}
    about |= {"PART": each, "PARTS": parts, "BLOCK_N": blocks.n, "num_warps": blocks.warps}
    if single:
        launch(
            _one_row, (programs, parts), *given, _magic(x.device), x.stride(1), **about, UNITS=UNITS
        )
    else:
        launch(
            _many_rows, (programs, parts), *given, rows, *x.stride(), **about, BLOCK_M=block_m,
            PRECISION=precision(x.dtype), num_stages=3,
        )  # fmt: skip
    return out


def written_out(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """The Triton kernel that writes the weights out, (N, K) in a type, each rounded once."""
    n, k = weight.shape
    out = empty((n, k), dtype, weight.codes.device)
    launch(
        _write_out, (cdiv(n, 32), cdiv(k, UNIT)), *weight.parts, out, **_about(weight), BLOCK_N=32,
        BLOCK_K=UNIT, num_warps=4,
    )  # fmt: skip
    return out


class _Int4Matmul(torch.autograd.Function):
    """The product with its gradients; the weight is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weight: Int4Weight, blocks: Blocks | None
    ) -> Tensor:
        ctx.weight, ctx.bias_type = weight, None if bias is None else bias.dtype
        # Saved, so that PyTorch notices when they are changed before the backward pass.
        ctx.save_for_backward(weight.codes, weight.scales, weight.zeros, weight.table)
        return _forward(x, weight, bias, blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        parts = dict(zip(("codes", "scales", "zeros", "table"), ctx.saved_tensors))
        weight, need = replace(ctx.weight, **parts), ctx.needs_input_grad
        dx = int4_matmul_transposed(dy, weight) if need[0] else None
        db = dy.sum(0, dtype=ctx.bias_type) if need[1] else None
        return dx, db, None, None


def _backward_precision(dtype: torch.dtype) -> str:
    """Weights with their steps go beyond float16: TF32 has its digits and the range of float32."""
    return "tf32" if dtype == torch.float16 else precision(dtype)


def int4_matmul_transposed(dy: Tensor, weight: Int4Weight) -> Tensor:
    """The Triton kernel of the backward pass: dy times the weight, (M, N) to (M, K)."""
    (rows, _), k = dy.shape, weight.shape[1]
    single = dy.dtype == torch.float32  # without tensor cores
    if rows >= LIBRARY_ROWS and weight.fits(dy.dtype):
        return dy @ written_out(weight, dy.dtype)
    block_m = 16 if single else max(16, min(next_power_of_2(rows), 64))
    block_k = 32 if single else 64
    dx = empty((rows, k), dy.dtype, dy.device)
    launch(
        _backward, (cdiv(k, block_k) * cdiv(rows, block_m),), dy, *weight.parts, dx, rows,
        dy.stride(0), dy.stride(1), **_about(weight), BLOCK_M=block_m, BLOCK_N=16 if single else 32,
        BLOCK_K=block_k, PRECISION=_backward_precision(dy.dtype), num_warps=4, num_stages=2,
    )  # fmt: skip
    return dx


def int4_matmul(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    r"""$y = x\,\hat W^\top + b$ by the codes of $\hat W$; gradients reach x and b.

    Args:
        x: (..., K) in float32, float16, bfloat16, or float64 for the reference; any strides.
        weight: From `pack_int4`, on the device of x. The kernel has no gradient for its scales and
            table; where one is asked for, PyTorch computes.
        bias: (N,) in any of these types; it is added in float32 (float64) before the one rounding.
        backend: None: Triton on a GPU, the reference elsewhere; or "triton" or "torch".
        blocks: How to cut the product into programs, in place of what was measured on this device
            or, where nothing was, of `blocks_for`.

    Returns:
        (..., N) in the type of x.

    Raises:
        ValueError: Shapes that do not fit each other, tensors on two devices, or "triton" where it
            cannot run.
        TypeError: Inputs that are not floating-point numbers.
    """
    check_floats(x=x, bias=bias)
    n, k = weight.shape
    if not x.ndim or x.shape[-1] != k:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; a weight of shape {(n, k)} needs {k} last."
        )
    if bias is not None:
        check_shape("bias", bias, (n,), f"a weight of shape {(n, k)}")
    learned = any(t is not None and t.requires_grad for t in (weight.scales, weight.table))
    learned = learned and torch.is_grad_enabled()
    obstacle = "it has no gradient for the scales and the table of a weight." if learned else ""
    if choose(backend, x, *weight.parts, bias, obstacle=obstacle) == "torch":
        return reference(x, weight, bias)
    return _Int4Matmul.apply(rows_of(x), bias, weight, blocks).reshape(*x.shape[:-1], n)


# --- for `compile` and `bench` --------------------------------------------------------------------


def compile_cases() -> list[CompileCase]:
    """Every kernel for both kinds of weights, in block sizes that `blocks_for` chooses."""
    affine = {"GROUP": 128, "SHARED": 128, "ZEROS": True, "TABLE": False, "pairs": None}
    nf4 = {"GROUP": 64, "SHARED": 64, "ZEROS": False, "TABLE": True, "zeros": None}
    kinds = {"affine": affine | {"table": None}, "nf4": nf4}
    found = []
    for kind, dtype, kernel, m, n, warps in (
        ("affine", "bf16", _one_row, 1, 32, 4),
        ("affine", "fp16", _many_rows, 16, 64, 4),
        ("affine", "fp16", _many_rows, 32, 128, 4),
        ("affine", "bf16", _many_rows, 64, 128, 4),
        ("affine", "bf16", _backward, 64, 32, 4),
        ("affine", "bf16", _write_out, 1, 32, 4),
        ("affine", "fp32", _many_rows, 16, 16, 8),
        ("nf4", "fp16", _one_row, 1, 32, 4),
        ("nf4", "bf16", _many_rows, 16, 64, 4),
        ("nf4", "bf16", _many_rows, 64, 128, 4),
        ("nf4", "fp16", _backward, 64, 32, 4),
        ("nf4", "fp32", _one_row, 1, 32, 4),
        ("nf4", "fp32", _backward, 16, 16, 4),
    ):
        pointer = f"*{dtype}"
        types = dict.fromkeys(("x", "dy", "dx", "bias", "out"), pointer)
        types |= {"codes": "*i32", "zeros": "*u8", "table": "*fp32", "pairs": "*i64", "M": "i32"}
        types |= {"scales": "*fp16" if kind == "affine" else "*fp32"}
        types |= {"sums": "*fp32", "counters": "*i32", "magics": "*i32"}
        types |= {"stride_xm": "i32", "stride_dm": "i32"}
        work, parts = _work(kernel, kinds[kind], m, n, 4 if dtype == "fp32" else 2)
        constants = kinds[kind] | {"N": 4096, "K": 4096, "ZERO": 8, "BIAS": True}
        constants |= dict.fromkeys(("stride_x", "stride_xk", "stride_dn"), 1)
        constants |= {"BLOCK_M": m, "BLOCK_N": n, "UNITS": UNITS, "PARTS": parts}
        constants |= {"PART": work.turns, "BLOCK_K": 32 if dtype == "fp32" else 64}
        constants |= {"BLOCK_K": UNIT} if kernel is _write_out else {}
        half = kernel is _backward and dtype == "fp16"
        constants |= {"PRECISION": "tf32" if half else "ieee"}
        mma = kernel in (_many_rows, _backward) and dtype != "fp32"
        stages = 3 if kernel is _many_rows else 2
        name = f"int4_matmul: {kind} {dtype} {kernel.__name__.strip('_')} {m}x{n}"
        found.append(CompileCase(name, kernel, types, constants, mma, warps, stages, work))
    return found


def _work(kernel: Any, kind: dict[str, Any], m: int, n: int, size: int) -> tuple[Work, int]:
    """A layer of 4,096 by 4,096: one token, a tile's rows, or a prompt; and the parts of K."""
    width, one_row = 4096, kernel is _one_row
    rows, per_group, units = m, 4 if kind["TABLE"] else 3, width // UNIT
    item = n * UNIT * (UNITS if one_row else 1)
    turns = units // UNITS if one_row else units
    few = one_row or (kernel is _many_rows and size == 2)
    parts = _parts(width // n, turns) if few else 1
    programs, turns = width // n * max(1, rows // m), turns // parts
    moved = 2 * size * rows * width
    if kernel is _backward:
        block = 64 if size == 2 else 32
        programs, turns, item = width // block * (rows // m), width // n, n * block
    if kernel is _write_out:
        rows, programs, turns, moved = 0, width // n * units, 1, size * width * width
    work = Work(
        what=f"{rows or 'no'} row{'s' * (rows != 1)}, {width} x {width}",
        item="weight",
        items=item,
        turns=turns,
        programs=programs * parts,
        fetched=item // 2 + item // kind["GROUP"] * per_group,
        bytes=width * width // 2 + width * width // kind["GROUP"] * per_group + moved,
        flops=2 * rows * width * width,
    )
    return work, parts


NO_GRADIENT = "It computes no gradient."

CANDIDATES = (
    Candidate((1, 16, 4, 4), "one row: a half of the registers, more programs on a multiprocessor"),
    Candidate((1, 32, 4, 4), "one row: a converted input serves four weights of a thread"),
    Candidate((1, 32, 8, 4), "the same in twice as many programs, each with half as many turns"),
    Candidate((1, 64, 8, 8), "one row: twice the threads, and as many registers each"),
    Candidate((16, 64, 8, 4), "up to 16 rows: 512 programs at n = 4096, 4 KiB of codes each"),
    Candidate((16, 32, 4, 4), "up to 16 rows: half the registers, programs of twice the turns"),
    Candidate((32, 128, 16, 4), "up to 32 rows: what was unpacked serves more of them"),
    Candidate((64, 128, 16, 4), "up to 64 rows: 64 sums in a thread"),
    Candidate((64, 64, 8, 4), "up to 64 rows: 32 sums in a thread, two programs fit"),
)
"""Rows, outputs, parts of the inputs, warps: few, each for a kind of sizes."""


def tune_cases(*, small: bool = False) -> list[TuneCase]:
    """One row, some, and the most before the library takes over, for both kinds of weights."""
    layers, rows = [(4096, 4096), (11008, 4096), (4096, 11008)], [1, 16, 32, 64]
    if small:
        layers, rows = [(32, 256)], [1, 3]
    kinds = (False, True)
    return [_tune_case(m, n, k, small, nf4=x) for n, k in layers for m in rows for x in kinds]


def _tune_case(m: int, n: int, k: int, small: bool, *, nf4: bool) -> TuneCase:
    dtype, group = torch.float16 if small else torch.bfloat16, 64 if nf4 else 128

    @lru_cache(maxsize=1)
    def inputs(device: torch.device) -> tuple[Tensor, Int4Weight]:
        draw = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 16, (n, k), generator=draw, dtype=torch.uint8).to(device)
        scales = torch.rand(n, k // group, generator=draw).to(device)
        table = torch.linspace(-1, 1, 16, device=device) if nf4 else None
        scales = scales if nf4 else scales.half()
        weight = pack_int4(codes, scales, group_size=group, table=table)
        return torch.randn(m, k, generator=draw).to(device, dtype), weight

    def make(device: torch.device, numbers: Numbers) -> Callable[[], Tensor]:
        x, weight = inputs(device)
        return lambda: _forward(x, weight, None, Blocks(*numbers))

    fit = tuple(c for c in CANDIDATES if (c.numbers[0] == 1) == (m == 1))
    fit = tuple(c for c in fit if c.numbers[0] < 2 * max(m, 16))
    default = _numbers(_blocks(m, n, k, dtype))
    key = _key(m, n, k, group, nf4, dtype)
    return TuneCase("int4_matmul", key, default, fit, make, alike=f"{nf4}")


def bench_cases(*, small: bool = False) -> list[BenchCase]:
    """The layers of a model of 7 billion parameters: one token, sixteen, and a prompt."""
    layers = [(96, 128)] if small else [(4096, 4096), (11008, 4096), (4096, 11008)]
    rows = [1, 3] if small else [1, 16, 2048]
    kinds = ((False, 128), (True, 64))
    found = [
        _bench_case(m, n, k, group, nf4=nf4)
        for n, k in layers
        for m in rows
        for nf4, group in kinds
    ]
    # Fine-tuning on a packed layer: a short batch through packed words, a long one by the library.
    return found + [
        _bench_backward(m, *layers[0], group, nf4=nf4)
        for m in ([3] if small else [16, 64, 2048])
        for nf4, group in kinds
    ]


def _bench_case(m: int, n: int, k: int, group: int, *, nf4: bool) -> BenchCase:
    per_group = 4 if nf4 else 3
    size = n * k // 2 + n * k // group * per_group + 2 * m * (n + k)
    shape = f"M={m} N={n} K={k} {'nf4' if nf4 else 'affine'} g={group}"

    def make(device: torch.device) -> dict[str, Any]:
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        dense = torch.randn(n, k, device=device) / 8
        if nf4:
            weight, peers = _nf4_peer(x, dense, group)
        else:
            weight, peers = _affine_peer(x, dense, group)
        written = weight.dequantize(x.dtype)
        return {
            EXACT: lambda: x.double() @ weight.dequantize(torch.float64).T,
            "ours": lambda: int4_matmul(x, weight, backend=pinned(device)),
            "torch, bfloat16 weight": lambda: torch.nn.functional.linear(x, written),
            "torch, dequantizing": lambda: reference(x, weight),
            **peers,
        }

    return BenchCase("int4_matmul", shape, torch.bfloat16, size, 2 * m * n * k, make)


def _bench_backward(m: int, n: int, k: int, group: int, *, nf4: bool) -> BenchCase:
    """Forward and the gradient to x, both through packed words: the weight is frozen."""
    case = _bench_case(m, n, k, group, nf4=nf4)

    def make(device: torch.device) -> dict[str, Any]:
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(m, n, device=device, dtype=torch.bfloat16)
        dense = torch.randn(n, k, device=device) / 8
        if nf4:
            weight, peers = _nf4_peer(x, dense, group)
        else:
            weight, peers = _affine_peer(x, dense, group)
            peers = {
                who: run if isinstance(run, str) else NO_GRADIENT for who, run in peers.items()
            }
        written = weight.dequantize(x.dtype)

        def trained(run: Callable[[], Tensor]) -> Runner:
            return lambda: torch.autograd.grad(run(), x, dy)[0]

        return {
            EXACT: lambda: dy.double() @ weight.dequantize(torch.float64),
            "ours": trained(lambda: int4_matmul(x, weight, backend=pinned(device))),
            "torch, bfloat16 weight": trained(lambda: torch.nn.functional.linear(x, written)),
            "torch, dequantizing": trained(lambda: reference(x, weight)),
            **{who: run if isinstance(run, str) else trained(run) for who, run in peers.items()},
        }

    shape = f"{case.shape} with backward"
    return replace(case, shape=shape, bytes=2 * case.bytes, flops=2 * case.flops, make=make)


def _affine_peer(x: Tensor, dense: Tensor, group: int) -> tuple[Int4Weight, dict[str, Any]]:
    """The weight on an even grid, and the kernel that torchao uses for it, from torch itself."""
    grouped = dense.unflatten(1, (-1, group))
    low, high = grouped.amin(2), grouped.amax(2)
    # torch's kernel has offsets in bfloat16 in place of zero points: steps that both can hold.
    scales = ((high - low) / 15).bfloat16().float().half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (grouped / scales.float().unsqueeze(2) + zeros.unsqueeze(2)).round().clamp(0, 15)
    codes = codes.flatten(1).to(torch.uint8)
    weight = pack_int4(codes, scales, zeros, group_size=group)
    gemlite = absent("gemlite") or _gemlite(x, codes, scales, zeros, group)
    if x.device.type != "cuda":
        no = "torch has it for NVIDIA GPUs and CPUs only."
        return weight, {"torch int4 (tinygemm)": no, "gemlite": gemlite}
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
    s = scales.float()
    offsets = torch.stack([s, s * (8 - zeros)], 2).transpose(0, 1).contiguous().bfloat16()
    return weight, {
        "torch int4 (tinygemm)": lambda: torch.ops.aten._weight_int4pack_mm(
            x, packed, group, offsets
        ),
        "gemlite": gemlite,
    }


def _gemlite(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group: int) -> Runner:
    """The same weight in gemlite's own packing, from the same codes, steps and zero points."""
    if x.device.type != "cuda":
        return "It is for the GPU here."
    try:
        from gemlite.core import DType, GemLiteLinear

        layer = GemLiteLinear(
            4,
            group_size=group,
            in_features=codes.shape[1],
            out_features=codes.shape[0],
            input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )
        layer.pack(codes, scales.to(x.dtype), zeros.to(x.dtype), None)
    except Exception as problem:  # noqa: BLE001 - another version may ask for other things
        return f"gemlite does not take this weight ({type(problem).__name__}: {problem})."[:200]
    return lambda: layer(x)


def _nf4_peer(x: Tensor, dense: Tensor, group: int) -> tuple[Int4Weight, dict[str, Any]]:
    """The weight as bitsandbytes quantizes it, and its kernel."""
    missing = absent("bitsandbytes")
    if missing:
        table = torch.linspace(-1, 1, 16, device=x.device)
        grouped = dense.unflatten(1, (-1, group))
        scales = grouped.abs().amax(2)
        codes = ((grouped / scales.unsqueeze(2) + 1) * 7.5).round().to(torch.uint8).flatten(1)
        return pack_int4(codes, scales, group_size=group, table=table), {"bitsandbytes": missing}
    import bitsandbytes

    raw, state = bitsandbytes.functional.quantize_4bit(
        dense.to(x.dtype), blocksize=group, quant_type="nf4"
    )
    flat = raw.view(torch.uint8).flatten()
    codes = torch.stack([flat >> 4, flat & 15], 1).view(dense.shape)
    scales = state.absmax.float().view(len(dense), -1)
    weight = pack_int4(codes, scales, group_size=group, table=state.code)
    return weight, {"bitsandbytes": lambda: bitsandbytes.matmul_4bit(x, raw.t(), state)}
