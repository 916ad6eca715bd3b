r"""Attention of one new token to keys and values that lie packed in 2, 4 or 8 bits.

When text is generated, all keys and values so far are read for each token, and for long texts that
is most of what is read. KIVI stores them in few bits (Liu et al., 2024, arXiv 2402.02750): with a
step $s$ and a smallest number $m$ for each group of $G$, a code $c$ stands for $c\,s + m$. Groups
of keys lie along the tokens of a channel, those of values along the channels of a token, and the
latest tokens are kept as they are. What a query $q$ of each head asks for is

$$o = \sum_t p_t v_t, \qquad p_t \propto e^{\alpha\, q \cdot k_t},$$

over all tokens $t$. Read back first, the cache would be written in 16 bits and read again; here it
is unpacked in registers, so that only packed bytes come from memory.

**Bytes and places.** A byte holds $n = 8 / b$ codes of $b$ bits, neighbors along the group. The
kernel does not put them in order: shifting the bytes of a tile by $j\,b$ bits gives the tokens $n i
+ j$ of all bytes $i$, which are a tile of keys of their own. The values of just these tokens are
fetched next, and their bytes, shifted likewise, are the channels $n i + j'$: sums over tokens do
not care for the order, and channels find their place when they are written.

**Grouped queries.** All query heads that share keys are multiplied with a tile while it is there,
so that packed bytes are read once: with 8 query heads a byte of 2-bit codes does 64 operations.

**Splits.** One token of a few sequences has fewer heads than a GPU has multiprocessors. So the text
is cut into parts that are summed side by side, with the largest score of each, and put together
afterwards (Dao et al., "Flash-Decoding", 2023). The latest tokens are one part more.

With $T$ tokens of $d$ channels, $2\,T d\,(b + 32 / G) / 8$ bytes move for a head of keys and
values, and $4\,T d\,h$ operations are done for $h$ query heads that share it. With 2 bits and
groups of 32 that is 5.3 times less than in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.kernels import _tuning
from effnb.kernels._launch import (
    INTERPRETED,
    cdiv,
    check_floats,
    check_number,
    check_shape,
    choose,
    empty,
    exact,
    jit,
    launch,
    next_power_of_2,
    precision,
    short,
    tl,
)
from effnb.kernels._tuning import Candidate, Numbers, TuneCase, cut, drawn, key_of
from effnb.kernels.bench import EXACT, OTHER, BenchCase, Runner, pinned
from effnb.kernels.compile import KINDS, CompileCase
from effnb.kernels.report import Work

LOG2_E = 1.4426950408889634
TOKENS = 128
"""Tokens of a tile: of 2-bit keys that is a sector of memory for each channel."""
PARTS, WARPS, STAGES = 32, 4, 2
"""Parts of a long text at most, warps and stages: with 8 heads of keys that makes 256 programs for
one sequence, two on a multiprocessor, each with a tile of 2-bit keys and values, 12 KiB with their
steps, under way: twice what memory needs."""
BITS = (2, 4, 8)


class Packed(Protocol):
    """Rows of numbers in groups along the row; `PackedRows` of the quantization package is one.

    Attributes:
        codes: (batch, heads, rows, bytes) uint8; the first code of a byte in its lowest bits.
        scales: (batch, heads, rows, groups): the step of each group.
        minima: (batch, heads, rows, groups): its smallest number.
        bits: Bits of a code.
        group_size: Codes of a group.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor
    bits: int
    group_size: int


# ---------------------------------------------------------------- in PyTorch


def read_back(packed: Packed, dtype: torch.dtype) -> Float[Tensor, "batch heads rows columns"]:
    r"""What the codes stand for, $c\,s + m$."""
    each = 8 // packed.bits
    shifts = packed.bits * torch.arange(each, device=packed.codes.device)
    codes = ((packed.codes[..., None].int() >> shifts) & (2**packed.bits - 1)).flatten(-2)
    grouped = codes.unflatten(-1, (-1, packed.group_size)).to(dtype)
    x = grouped * packed.scales.to(dtype)[..., None] + packed.minima.to(dtype)[..., None]
    return x.flatten(-2)


def quantized_attention_reference(
    q: Tensor,
    packed_keys: Packed,
    packed_values: Packed,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """The definition: everything read back. Arguments are those of `quantized_attention`."""
    kind = exact(q)
    k = torch.cat([read_back(packed_keys, kind).mT, keys.to(kind)], 2)
    v = torch.cat([read_back(packed_values, kind), values.to(kind)], 2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grouped = q.to(kind).unflatten(1, (k.shape[1], -1))[:, :, :, 0]
    weights = (scale * grouped @ k.mT).softmax(-1)
    return (weights @ v).flatten(1, 2)[:, :, None].to(q.dtype)


# ---------------------------------------------------------------- the kernels


@jit
def _spread(x, ROWS: tl.constexpr, GROUPS: tl.constexpr, EACH: tl.constexpr):
    """(rows, groups) as (rows, groups · EACH): each number beside itself."""
    wide = tl.broadcast_to(x[:, :, None], (ROWS, GROUPS, EACH))
    return tl.reshape(wide, (ROWS, GROUPS * EACH))


def _unpacking(bits: int, dtype: torch.dtype) -> tuple[str, ...]:
    """For each code of a byte, how a GPU unpacks it from four bytes at once; nothing, or none.

    A byte that becomes the lower half of a 16-bit number whose upper half is 0x64 (0x43) makes the
    float16 1024 + c (the bfloat16 128 + c): of four codes, a shift and a mask leave the bytes, two
    permutations put them there, two sums take the 1024 (128) off, and two products make the
    numbers. That is two instructions a number, where one number at a time takes five, one of them a
    conversion, for which a GPU has a sixteenth of the units. Eight bits are too many for bfloat16.
    """
    half = dtype == torch.float16
    if not (half or (dtype == torch.bfloat16 and bits < 8)):
        return ("",) * (8 // bits)
    kind, upper, less, one = (
        ("f16x2", 0x64646464, 0xE400E400, 0x3C003C00)
        if half
        else ("bf16x2", 0x43434343, 0xC300C300, 0x3F803F80)
    )
    mask = ((1 << bits) - 1) * 0x01010101
    return tuple(
        f"""{{
        .reg .b32 bytes, low, high, upper, less, one;
        mov.b32 upper, {upper:#x};
        mov.b32 less, {less:#x};
        mov.b32 one, {one:#x};
        shr.b32 bytes, $2, {bits * j};
        and.b32 bytes, bytes, {mask:#x};
        prmt.b32 low, bytes, upper, 0x4140;
        prmt.b32 high, bytes, upper, 0x4342;
        fma.rn.{kind} low, low, one, less;
        fma.rn.{kind} high, high, one, less;
        fma.rn.{kind} $0, low, $3, $5;
        fma.rn.{kind} $1, high, $4, $6;
        }}"""
        for j in range(8 // bits)
    )


@jit
def _numbers(
    codes, step, low, kind: tl.constexpr, ASM: tl.constexpr, J: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """The numbers c s + m of the J-th code of each byte, in a type."""
    if ASM[J] == "":
        code = ((codes.to(tl.int32) >> (J * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
        return (code * step + low).to(kind)
    else:
        return tl.inline_asm_elementwise(
            ASM[J], "=r,=r,r,r,r,r,r", [codes, step, low], dtype=step.dtype, is_pure=True, pack=4
        )


@jit
def _packed_kernel(
    query, key_codes, key_scales, key_minima, value_codes, value_scales, value_minima,
    largest, total, weighted,  # (batch · heads, parts, …) float32
    group,  # query heads that share keys
    key_bytes, key_groups,  # of a row, which is a channel
    stride_keys, stride_key_groups, stride_values, stride_value_groups,  # from head to head
    tiles, tiles_of_part, parts,
    scale,  # with log2(e) in it
    BITS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One part of the packed tokens, for all query heads that share their keys."""
    EACH: tl.constexpr = 8 // BITS
    SOME: tl.constexpr = BLOCK_T // EACH  # tokens of a tile that come with one shift
    PLACES: tl.constexpr = VALUE_DIM // EACH  # channels that do
    head = (tl.program_id(0) // parts).to(tl.int64)  # of keys, of one sequence
    part = tl.program_id(0) % parts
    row = tl.arange(0, BLOCK_Q)
    dim = tl.arange(0, DIM)
    byte = tl.arange(0, SOME)
    place = tl.arange(0, PLACES)
    key_group = tl.arange(0, BLOCK_T // GROUP)
    value_group = tl.arange(0, VALUE_DIM // GROUP)
    at_q = query + (head * group + row[:, None]) * DIM + dim[None, :]
    q = tl.load(at_q, mask=(row < group)[:, None], other=0.0)
    PACKED: tl.constexpr = ASM[0] != ""
    held: tl.constexpr = q.dtype if PACKED else tl.float32  # the type of steps and minima
    key_codes += head * stride_keys
    key_scales += head * stride_key_groups
    key_minima += head * stride_key_groups
    value_codes += head * stride_values
    value_scales += head * stride_value_groups
    value_minima += head * stride_value_groups

    m = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_Q,), tl.float32)
    out_0 = tl.zeros((BLOCK_Q, PLACES), tl.float32)  # channels by their shift; those not needed
    out_1 = tl.zeros((BLOCK_Q, PLACES), tl.float32)  # cost nothing
    out_2 = tl.zeros((BLOCK_Q, PLACES), tl.float32)
    out_3 = tl.zeros((BLOCK_Q, PLACES), tl.float32)
    last = tl.minimum((part + 1) * tiles_of_part, tiles)
    for tile in range(part * tiles_of_part, last):
        first = tile * SOME
        codes = tl.load(key_codes + dim[:, None] * key_bytes + first + byte[None, :])
        at = dim[:, None] * key_groups + tile * (BLOCK_T // GROUP) + key_group[None, :]
        step, low = tl.load(key_scales + at).to(held), tl.load(key_minima + at).to(held)
        step = _spread(step, DIM, BLOCK_T // GROUP, GROUP // EACH)
        low = _spread(low, DIM, BLOCK_T // GROUP, GROUP // EACH)
        if PACKED:  # scores of the whole tile come first: sums are shrunk once for all of them
            z_0 = scale * tl.dot(q, _numbers(codes, step, low, q.dtype, ASM, 0, BITS))
            most, z_1, z_2, z_3 = z_0, z_0, z_0, z_0
            if EACH > 1:
                z_1 = scale * tl.dot(q, _numbers(codes, step, low, q.dtype, ASM, 1, BITS))
                most = tl.maximum(most, z_1)
            if EACH > 2:
                z_2 = scale * tl.dot(q, _numbers(codes, step, low, q.dtype, ASM, 2, BITS))
                z_3 = scale * tl.dot(q, _numbers(codes, step, low, q.dtype, ASM, 3, BITS))
                most = tl.maximum(most, tl.maximum(z_2, z_3))
            new_m = tl.maximum(m, tl.max(most, axis=1))
            shrink = tl.exp2(m - new_m)
            m, s = new_m, s * shrink
            out_0, out_1 = out_0 * shrink[:, None], out_1 * shrink[:, None]
            out_2, out_3 = out_2 * shrink[:, None], out_3 * shrink[:, None]
            share = tl.zeros((BLOCK_Q, SOME), tl.float32)
        for j in tl.static_range(EACH):
            if PACKED:
                z = z_0 if j == 0 else (z_1 if j == 1 else (z_2 if j == 2 else z_3))
                p = tl.exp2(z - m[:, None])
                share += p
            else:
                k = _numbers(codes, step, low, q.dtype, ASM, j, BITS)
                z = scale * tl.dot(q, k, input_precision=PRECISION)
                new_m = tl.maximum(m, tl.max(z, axis=1))
                shrink = tl.exp2(m - new_m)
                p = tl.exp2(z - new_m[:, None])
                m, s = new_m, s * shrink + tl.sum(p, axis=1)
                out_0, out_1 = out_0 * shrink[:, None], out_1 * shrink[:, None]
                out_2, out_3 = out_2 * shrink[:, None], out_3 * shrink[:, None]
            token = tile * BLOCK_T + byte * EACH + j
            packed = tl.load(value_codes + token[:, None] * PLACES + place[None, :])
            at_v = token[:, None] * (VALUE_DIM // GROUP) + value_group[None, :]
            v_step = tl.load(value_scales + at_v).to(held)
            v_low = tl.load(value_minima + at_v).to(held)
            v_step = _spread(v_step, SOME, VALUE_DIM // GROUP, GROUP // EACH)
            v_low = _spread(v_low, SOME, VALUE_DIM // GROUP, GROUP // EACH)
            w = p.to(q.dtype)
            v = _numbers(packed, v_step, v_low, q.dtype, ASM, 0, BITS)
            out_0 = tl.dot(w, v, out_0, input_precision=PRECISION)
            if EACH > 1:
                v = _numbers(packed, v_step, v_low, q.dtype, ASM, 1, BITS)
                out_1 = tl.dot(w, v, out_1, input_precision=PRECISION)
            if EACH > 2:
                v = _numbers(packed, v_step, v_low, q.dtype, ASM, 2, BITS)
                out_2 = tl.dot(w, v, out_2, input_precision=PRECISION)
                v = _numbers(packed, v_step, v_low, q.dtype, ASM, 3, BITS)
                out_3 = tl.dot(w, v, out_3, input_precision=PRECISION)
        if PACKED:
            s += tl.sum(share, axis=1)
    here = (head * group + row) * parts + part
    real = row < group
    tl.store(largest + here, m, mask=real)
    tl.store(total + here, s, mask=real)
    at = weighted + here[:, None] * VALUE_DIM + EACH * place[None, :]
    tl.store(at, out_0, mask=real[:, None])
    if EACH > 1:
        tl.store(at + 1, out_1, mask=real[:, None])
    if EACH > 2:
        tl.store(at + 2, out_2, mask=real[:, None])
        tl.store(at + 3, out_3, mask=real[:, None])


@jit
def _latest_kernel(
    query, keys, values,  # the latest keys and values, (batch · heads, tokens, …) in one piece
    largest, total, weighted, out,
    group, tokens, parts,
    scale,  # with log2(e) in it
    PRECISION: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The tokens that are not packed; then all parts are put together."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_Q)
    dim, place = tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    real = row < group
    at_q = query + (head * group + row[:, None]) * DIM + dim[None, :]
    q = tl.load(at_q, mask=real[:, None], other=0.0)
    m = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_Q,), tl.float32)
    o = tl.zeros((BLOCK_Q, VALUE_DIM), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        inside = token < tokens
        at_k = keys + (head * tokens + token[None, :]) * DIM + dim[:, None]
        k = tl.load(at_k, mask=inside[None, :], other=0.0)
        scores = scale * tl.dot(q, k, input_precision=PRECISION)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, axis=1))
        shrink = tl.exp2(m - new_m)
        p = tl.exp2(scores - new_m[:, None])
        s = s * shrink + tl.sum(p, axis=1)
        at_v = values + (head * tokens + token[:, None]) * VALUE_DIM + place[None, :]
        v = tl.load(at_v, mask=inside[:, None], other=0.0)
        o = o * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        m = new_m
    for part in range(parts):
        here = (head * group + row) * parts + part
        other_m = tl.load(largest + here, mask=real, other=0.0)
        other_s = tl.load(total + here, mask=real, other=1.0)
        at = weighted + here[:, None] * VALUE_DIM + place[None, :]
        other_o = tl.load(at, mask=real[:, None], other=0.0)
        new_m = tl.maximum(m, other_m)
        mine, theirs = tl.exp2(m - new_m), tl.exp2(other_m - new_m)
        s = s * mine + other_s * theirs
        o = o * mine[:, None] + other_o * theirs[:, None]
        m = new_m
    at = out + (head * group + row[:, None]) * VALUE_DIM + place[None, :]
    tl.store(at, (o / s[:, None]).to(out.dtype.element_ty), mask=real[:, None])


# ---------------------------------------------------------------- the kernels, launched


@dataclass(frozen=True)
class _Rows:
    """Some columns of packed rows, or some rows."""

    codes: Tensor
    scales: Tensor
    minima: Tensor
    bits: int
    group_size: int


def _behind(packed: Packed, first: int, *, columns: bool) -> _Rows:
    """What is packed of the tokens from `first` on, which are columns of keys or rows of values."""
    if columns:
        at_code, at_group = first * packed.bits // 8, first // packed.group_size
        cut = (
            packed.codes[..., at_code:],
            packed.scales[..., at_group:],
            packed.minima[..., at_group:],
        )
    else:
        cut = tuple(x[:, :, first:] for x in (packed.codes, packed.scales, packed.minima))
    return _Rows(*cut, packed.bits, packed.group_size)


def _by_kernel(
    q: Tensor,
    packed_keys: Packed,
    packed_values: Packed,
    keys: Tensor,
    values: Tensor,
    scale: float,
) -> Tensor:
    """Whole tiles of what is packed on both sides by one kernel, rest and sum by another."""
    batch, heads, _, dim = q.shape
    key_heads, value_dim = keys.shape[1], values.shape[3]
    group, bits = heads // key_heads, packed_keys.bits
    key_bytes, key_groups = packed_keys.codes.shape[3], packed_keys.scales.shape[3]
    tiles = min(key_bytes * 8 // bits, packed_values.codes.shape[2]) // TOKENS
    key = partial(key_of, q.dtype, heads=batch * key_heads, tokens=tiles * TOKENS, dim=dim)
    default = PARTS, WARPS, STAGES
    most, warps, stages = _tuning.chosen("quantized_attention", key, q.device, default)
    tiles_of_part = max(1, cdiv(tiles, min(most, max(tiles, 1))))
    parts = cdiv(tiles, tiles_of_part)
    first = tiles * TOKENS
    late_keys = read_back(_behind(packed_keys, first, columns=True), q.dtype).mT
    late_values = read_back(_behind(packed_values, first, columns=False), q.dtype)
    late_keys = torch.cat([late_keys, keys], 2).contiguous()
    late_values = torch.cat([late_values, values], 2).contiguous()
    rows = batch * heads
    largest, total = (empty((rows, parts), torch.float32, q.device) for _ in range(2))
    weighted = empty((rows, parts, value_dim), torch.float32, q.device)
    out = empty((batch, heads, 1, value_dim), q.dtype, q.device)
    q = q.contiguous()
    sizes = dict(
        DIM=dim, VALUE_DIM=value_dim, BLOCK_Q=max(16, next_power_of_2(group)),
        PRECISION=precision(q.dtype),
    )  # fmt: skip
    held = [
        x.contiguous()
        for packed in (packed_keys, packed_values)
        for x in (packed.codes, packed.scales, packed.minima)
    ]
    value_rows = packed_values.codes.shape[2]
    asm = ("",) * (8 // bits) if INTERPRETED else _unpacking(bits, q.dtype)
    launch(
        _packed_kernel, (batch * key_heads * parts,),
        q, *held, largest, total, weighted,
        *(group, key_bytes, key_groups, dim * key_bytes, dim * key_groups),
        value_rows * packed_values.codes.shape[3],
        value_rows * packed_values.scales.shape[3],
        *(tiles, tiles_of_part, parts, scale * LOG2_E),
        BITS=bits, GROUP=packed_keys.group_size, BLOCK_T=TOKENS, ASM=asm, **sizes,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    launch(
        _latest_kernel, (batch * key_heads,),
        q, late_keys, late_values, largest, total, weighted, out,
        *(group, late_keys.shape[2], parts, scale * LOG2_E),
        BLOCK_T=32 if q.dtype == torch.float32 else 64, **sizes, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


# ---------------------------------------------------------------- the one to call


def _check_packed(name: str, packed: Packed, rows: tuple[int, int, int], shown: str) -> None:
    """Refuse packed rows that do not fit."""
    if packed.codes.dtype != torch.uint8:
        raise TypeError(f"{name} have codes of {short(packed.codes.dtype)}; they must be uint8.")
    columns = packed.codes.shape[-1] * 8 // max(packed.bits, 1)
    groups = columns // packed.group_size
    check_shape(f"{name}' codes", packed.codes, (*rows, packed.codes.shape[-1]), shown)
    for what in ("scales", "minima"):
        check_shape(f"{name}' {what}", getattr(packed, what), (*rows, groups), shown)
    if groups * packed.group_size != columns:
        raise ValueError(
            f"{name} have {columns} columns in groups of {packed.group_size}; they must be whole "
            "groups."
        )


def _obstacle(q: Tensor, packed_keys: Packed, packed_values: Packed, values: Tensor) -> str:
    """Why these sizes have no kernel, in a sentence."""
    sizes = {(rows.bits, rows.group_size) for rows in (packed_keys, packed_values)}
    if len(sizes) > 1:
        return "keys and values are packed in different ways."
    group_size = packed_keys.group_size
    if group_size not in (8, 16, 32, 64, TOKENS):
        return f"it has no groups of {group_size}, only of 8, 16, 32, 64 and 128."
    for width in (q.shape[3], values.shape[3]):
        if width != next_power_of_2(width) or not max(64, group_size) <= width <= 256:
            return f"it has no heads of {width}, only of 64, 128 and 256 in whole groups."
    given = (q, values, packed_keys.scales, packed_values.scales)
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return "it has no gradient."
    return ""


def quantized_attention(
    q: Float[Tensor, "batch query_heads 1 dim"],
    packed_keys: Packed,
    packed_values: Packed,
    keys: Float[Tensor, "batch key_heads latest_keys dim"],
    values: Float[Tensor, "batch key_heads latest_values value_dim"],
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Float[Tensor, "batch query_heads 1 value_dim"]:
    r"""Attention of the newest token of each sequence to all tokens of a KIVI cache.

    Args:
        q: The query of that token.
        packed_keys: Keys of the first tokens, a row for each channel, in 2, 4 or 8 bits.
        packed_values: Values of the first tokens, a row for each token; they may be fewer or more
            than the packed keys.
        keys: Keys of all tokens behind the packed ones.
        values: Values of all tokens behind the packed ones.
        scale: The factor on $q \cdot k$; $1/\sqrt d$ by default.
        backend: "triton", "torch", or None for the kernels where they can run.

    Returns:
        What each query head reads.

    Raises:
        ValueError: Shapes that do not fit each other, keys of more or fewer tokens than values, no
            tokens at all, other bits, or an unknown backend.
        TypeError: Numbers that are not floating-point or of different types, or codes that are not
            uint8.
    """
    check_floats(q=q, keys=keys, values=values)
    if q.ndim != 4 or q.shape[2] != 1 or keys.ndim != 4 or values.ndim != 4:
        raise ValueError(
            f"q has shape {tuple(q.shape)}; it must be (batch, heads, 1, dim), and keys and values "
            "(batch, heads, time, dim)."
        )
    types = {short(x.dtype) for x in (q, keys, values)}
    if len(types) > 1:
        raise TypeError(f"q, keys and values are of {', '.join(sorted(types))}; they must agree.")
    scale = None if scale is None else check_number("scale", scale)
    batch, heads, _, dim = q.shape
    key_heads = keys.shape[1]
    if not key_heads or heads % key_heads:
        raise ValueError(f"{heads} query heads cannot share {key_heads} key-value heads evenly.")
    shown = f"q of shape {tuple(q.shape)} and keys of shape {tuple(keys.shape)}"
    check_shape("keys", keys, (batch, key_heads, keys.shape[2], dim), shown)
    check_shape("values", values, (batch, key_heads, *values.shape[2:]), shown)
    for rows in (packed_keys, packed_values):
        if rows.bits not in BITS:
            raise ValueError(f"codes of {rows.bits} bits; they must have 2, 4 or 8.")
    _check_packed("packed keys", packed_keys, (batch, key_heads, dim), shown)
    old = packed_values.codes.shape[2] if packed_values.codes.ndim == 4 else 0
    _check_packed("packed values", packed_values, (batch, key_heads, old), shown)
    check_shape(
        "packed values' rows",
        values,
        (batch, key_heads, values.shape[2], packed_values.codes.shape[3] * 8 // packed_values.bits),
        "packed values",
    )
    tokens = packed_keys.codes.shape[3] * 8 // packed_keys.bits + keys.shape[2]
    others = old + values.shape[2]
    if tokens != others or not tokens:
        raise ValueError(
            f"keys of {tokens} tokens and values of {others}; they must be as many, and not none."
        )
    given = [
        x for rows in (packed_keys, packed_values) for x in (rows.codes, rows.scales, rows.minima)
    ]
    obstacle = _obstacle(q, packed_keys, packed_values, values)
    if choose(backend, q, keys, values, *given, obstacle=obstacle) == "torch":
        return quantized_attention_reference(
            q, packed_keys, packed_values, keys, values, scale=scale
        )
    scale = dim**-0.5 if scale is None else scale
    return _by_kernel(q, packed_keys, packed_values, keys, values, scale)


# ---------------------------------------------------------------- for the compiler and the clock


def compile_cases() -> list[CompileCase]:
    """One sequence of 32,768 tokens, 32 heads of queries and 8 of keys, of 128 channels."""
    tokens, group, key_heads, dim, group_size = 32768, 4, 8, 128, 32
    found = []
    for kind, bits in (("fp32", 2), ("fp16", 2), ("bf16", 2), ("bf16", 4), ("bf16", 8)):
        parts = PARTS
        types = {"query": f"*{kind}", "keys": f"*{kind}", "values": f"*{kind}", "out": f"*{kind}"}
        types |= dict.fromkeys(("key_codes", "value_codes"), "*u8")
        for name in ("scales", "minima"):
            types |= {f"key_{name}": "*fp16", f"value_{name}": "*fp16"}
        types |= dict.fromkeys(("largest", "total", "weighted"), "*fp32")
        whole = "group tiles tiles_of_part parts tokens"
        types |= dict.fromkeys(whole.split(), "i32") | {"scale": "fp32"}
        strides = ("keys", "key_groups", "values", "value_groups")
        types |= {f"stride_{name}": "i64" for name in strides}
        constants = dict(
            BITS=bits, GROUP=group_size, PRECISION="ieee", ASM=_unpacking(bits, KINDS[kind]),
            DIM=dim, VALUE_DIM=dim, BLOCK_Q=16, BLOCK_T=TOKENS, key_bytes=tokens * bits // 8,
            key_groups=tokens // group_size,
        )  # fmt: skip
        each = bits + 32 / group_size  # bits of a number with its share of scale and minimum
        work = Work(
            what=f"{tokens} tokens, {key_heads} heads of {dim}, {group} queries each",
            item="tile",
            items=1,
            turns=tokens // TOKENS // parts,
            programs=key_heads * parts,
            fetched=int(2 * TOKENS * dim * each / 8),
            bytes=int(2 * tokens * key_heads * dim * each / 8),
            flops=4 * tokens * key_heads * group * dim,
        )
        found.append(
            CompileCase(
                f"quantized_attention: {kind} {bits} bits", _packed_kernel, types, constants,
                warps=WARPS, stages=STAGES, mma=kind != "fp32", work=work,
            )
        )  # fmt: skip
        if bits == 2:
            block, latest, size = (32, 128, 4) if kind == "fp32" else (64, 128, 2)
            rest = Work(
                what=f"{latest} latest tokens and {parts} parts, {key_heads} heads of {dim}",
                item="tile",
                items=1,
                turns=latest // block,
                programs=key_heads,
                fetched=2 * block * dim * size,
                bytes=2 * latest * key_heads * dim * size + parts * key_heads * group * dim * 4,
                flops=4 * latest * key_heads * group * dim,
            )
            name = f"quantized_attention: latest {kind}"
            late = constants | {"BLOCK_T": block}
            found.append(
                CompileCase(name, _latest_kernel, types, late, mma=kind != "fp32", work=rest)
            )
    return found


CANDIDATES = (
    Candidate((32, 4, 2), "one tile under way in each of the programs, two on a multiprocessor"),
    Candidate((64, 4, 2), "twice the programs: three find room, and latency is hidden among them"),
    Candidate((32, 4, 3), "two tiles under way: 24 KiB of 2-bit codes and steps a program"),
    Candidate((16, 4, 3), "many sequences: fewer parts to put together, each with longer runs"),
    Candidate((32, 8, 2), "half of a tile's numbers a thread: fewer registers, more barriers"),
)
"""Parts of a text at most, warps, and stages."""


def tune_cases(*, small: bool = False) -> list[TuneCase]:
    """A long text, and many shorter ones, in 2 bits."""
    shapes = [(1, 2, 1, 5 * 128, 64)] if small else [(1, 32, 8, 16384, 128), (16, 32, 8, 4096, 128)]
    return [_tune_case(*shape, small=small) for shape in shapes]


def _tune_case(batch, heads, key_heads, tokens, dim, *, small: bool) -> TuneCase:
    dtype, bits, group = torch.float16 if small else torch.bfloat16, 2, 32

    def make(device: torch.device, numbers: Numbers) -> Callable[[], Tensor]:
        def rows(count: int, columns: int) -> _Rows:
            shape = batch, key_heads, count
            (codes,) = drawn(device, torch.float32, (*shape, columns * bits // 8))
            codes = (codes * 1000).to(torch.int32).remainder(256).to(torch.uint8)
            scales = torch.ones(*shape, columns // group, device=device).half() / 4
            return _Rows(codes, scales, -1.5 * scales, bits, group)

        late = (batch, key_heads, 40, dim)
        q, keys, values = drawn(device, dtype, (batch, heads, 1, dim), late, late)
        packed = rows(dim, tokens), rows(tokens, dim)
        return cut(
            "quantized_attention",
            numbers,
            lambda: quantized_attention(q, *packed, keys, values, backend="triton"),
        )

    key = key_of(dtype, heads=batch * key_heads, tokens=tokens, dim=dim)
    default = PARTS, WARPS, STAGES
    return TuneCase("quantized_attention", key, default, CANDIDATES, make)


def bench_cases(*, small: bool = False) -> list[BenchCase]:
    """A long text, and many shorter ones, in 2 bits."""
    shapes = [(1, 2, 1, 300, 64)] if small else [(1, 32, 8, 16384, 128), (16, 32, 8, 4096, 128)]
    return [_bench_case(*shape) for shape in shapes]


def _bench_case(batch: int, heads: int, key_heads: int, tokens: int, dim: int) -> BenchCase:
    group, bits, residual = 32, 2, 128 if tokens > 256 else 32
    late = residual + tokens % group
    old = tokens - late

    def make(device: torch.device) -> dict[str, Runner]:
        dtype = torch.bfloat16

        def rows(count: int, columns: int) -> _Rows:
            shape = (batch, key_heads, count, columns * bits // 8)
            codes = torch.randint(256, shape, device=device, dtype=torch.uint8)
            scales = torch.rand(*shape[:3], columns // group, device=device).half()
            return _Rows(codes, scales, -1.5 * scales, bits, group)

        q = torch.randn(batch, heads, 1, dim, device=device, dtype=dtype)
        packed_keys, packed_values = rows(dim, old), rows(old, dim)
        shape = (batch, key_heads, late, dim)
        keys, values = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        cache = packed_keys, packed_values, keys, values
        k = torch.cat([read_back(packed_keys, dtype).mT, keys], 2)
        v = torch.cat([read_back(packed_values, dtype), values], 2)
        sdpa = torch.nn.functional.scaled_dot_product_attention

        def exactly() -> Tensor:
            wide = torch.float64
            k = torch.cat([read_back(packed_keys, wide).mT, keys.to(wide)], 2)
            v = torch.cat([read_back(packed_values, wide), values.to(wide)], 2)
            return sdpa(q.to(wide), k, v, enable_gqa=True)

        return {
            EXACT: exactly,
            "ours": lambda: quantized_attention(q, *cache, backend=pinned(device)),
            "torch, read back": lambda: quantized_attention(q, *cache, backend="torch"),
            f"SDPA on a 16-bit cache{OTHER}": lambda: sdpa(q, k, v, enable_gqa=True),
        }

    size = 2 * batch * key_heads * dim * (old * (bits + 32 // group) // 8 + 2 * late)
    flops = 4 * batch * heads * tokens * dim
    shape = f"B={batch} H={heads}/{key_heads} T={tokens} D={dim}, {bits} bits"
    return BenchCase("quantized_attention", shape, torch.bfloat16, size, flops, make)
