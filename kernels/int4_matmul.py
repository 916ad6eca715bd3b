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

Three kernels. *One row*: every program takes a few outputs and a part of the inputs, multiplies in
float32 and adds up; parts go to memory and are added in a fixed order afterwards, so the result is
the same every time. *Many rows*: tiles on the tensor cores. The codes minus the zero point are
small whole numbers, exact in every type, so they are multiplied as they are and the step is applied
to the sums in float32: uniform grids lose nothing to rounding the weights. *Backward*:
$\partial x = \partial y\, \hat W$, for training something under a frozen weight (QLoRA). Here the
step is part of the weight; float16, which may not hold that, is multiplied in TF32, at half the
rate.

Fused dequantization: Frantar et al., "MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on
Large Language Models", 2024, arXiv 2408.11743. QLoRA: Dettmers et al., 2023, arXiv 2305.14314.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from effnb.kernels._int4_weight import SPANS, Int4Weight, pack_int4
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
from effnb.kernels.bench import BenchCase, absent
from effnb.kernels.compile import CompileCase
from effnb.kernels.report import Work

__all__ = ["SPANS", "Blocks", "Int4Weight", "blocks_for", "int4_matmul", "pack_int4", "reference"]


def reference(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """The same product in plain PyTorch: write the weight out, and multiply.

    In float32 (float64 if x is), rounded once: half precision would not hold every weight.
    """
    kind = exact(x, bias)
    bias = None if bias is None else bias.to(kind)
    return torch.nn.functional.linear(x.to(kind), weight.dequantize(kind), bias).to(x.dtype)


# --- the kernels ----------------------------------------------------------------------------------


@jit
def _values(codes, zero, table, TABLE: tl.constexpr):
    """What codes stand for before the step: q - z exactly, or the table's entry, in float32."""
    if TABLE:
        return tl.load(table + codes)
    # The float whose last bits are q is 2^23 + q: cheaper than converting each code.
    return ((codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0) - zero


@jit
def _one_row(
    x, codes, scales, zeros, table, out, stride_x,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    ZERO: tl.constexpr, ZEROS: tl.constexpr, TABLE: tl.constexpr,
    PART: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (i, j): outputs i BLOCK_N ..., inputs of the spans j PART ... (j + 1) PART - 1."""
    HALF: tl.constexpr = SPAN // 2
    COLUMNS: tl.constexpr = (K + SPAN - 1) // SPAN * HALF
    GROUPS: tl.constexpr = K // GROUP
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    columns = tl.arange(0, HALF)
    line = rows.to(tl.int64)
    total = tl.zeros((BLOCK_N, HALF), dtype=tl.float32)
    for step in range(PART):
        span = tl.program_id(1) * PART + step
        first = span * SPAN
        there = first < K  # the last part may have fewer spans
        packed = tl.load(
            codes + line[:, None] * COLUMNS + (span * HALF + columns)[None, :],
            mask=inside[:, None] & there,
            other=0,
        ).to(tl.int32)
        group = first // GROUP
        scale = tl.load(scales + line * GROUPS + group, mask=inside & there, other=0.0)
        zero = tl.full((BLOCK_N,), ZERO, dtype=tl.float32)
        if ZEROS:
            loaded = tl.load(zeros + line * GROUPS + group, mask=inside & there, other=0)
            zero = loaded.to(tl.float32)
        # Times a stride, 32 bits may be too few.
        place = (first + columns).to(tl.int64)
        low = tl.load(x + place * stride_x, mask=place < K, other=0.0).to(tl.float32)
        place += HALF
        high = tl.load(x + place * stride_x, mask=place < K, other=0.0).to(tl.float32)
        product = _values(packed & 15, zero[:, None], table, TABLE) * low[None, :]
        product += _values(packed >> 4, zero[:, None], table, TABLE) * high[None, :]
        total += product * scale.to(tl.float32)[:, None]
    tl.store(out + tl.program_id(1).to(tl.int64) * N + line, tl.sum(total, 1), mask=inside)


@jit
def _many_rows(
    x, codes, scales, zeros, table, bias, out, M, stride_xm, stride_xk,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    ZERO: tl.constexpr, ZEROS: tl.constexpr, TABLE: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program i + j N / BLOCK_N: rows j BLOCK_M ... of x, outputs i BLOCK_N ..., all inputs."""
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    HALF: tl.constexpr = SPAN // 2
    COLUMNS: tl.constexpr = (K + SPAN - 1) // SPAN * HALF
    GROUPS: tl.constexpr = K // GROUP
    ms = (tl.program_id(0) // BLOCKS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = tl.program_id(0) % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, HALF)
    x_rows = x + ms[:, None] * stride_xm
    line = ns.to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for span in range(COLUMNS // HALF):
        first = span * SPAN
        packed = tl.load(  # transposed: inputs by outputs
            codes + line[None, :] * COLUMNS + (span * HALF + columns)[:, None],
            mask=(ns < N)[None, :],
            other=0,
        ).to(tl.int32)
        group = first // GROUP
        scale = tl.load(scales + line * GROUPS + group, mask=ns < N, other=0.0)
        zero = tl.full((BLOCK_N,), ZERO, dtype=tl.float32)
        if ZEROS:
            zero = tl.load(zeros + line * GROUPS + group, mask=ns < N, other=0).to(tl.float32)
        place = (first + columns).to(tl.int64)
        mask = (ms < M)[:, None] & (place < K)[None, :]
        low = tl.load(x_rows + place[None, :] * stride_xk, mask=mask, other=0.0)
        place += HALF
        mask = (ms < M)[:, None] & (place < K)[None, :]
        high = tl.load(x_rows + place[None, :] * stride_xk, mask=mask, other=0.0)
        values = _values(packed & 15, zero[None, :], table, TABLE).to(x.dtype.element_ty)
        product = tl.dot(low, values, input_precision=PRECISION)
        values = _values(packed >> 4, zero[None, :], table, TABLE).to(x.dtype.element_ty)
        product = tl.dot(high, values, product, input_precision=PRECISION)
        total += product * scale.to(tl.float32)[None, :]
    if BIAS:
        total += tl.load(bias + ns, mask=ns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + ms[:, None] * N + ns[None, :],
        total.to(out.dtype.element_ty),
        mask=(ms < M)[:, None] & (ns < N)[None, :],
    )


@jit
def _backward(
    dy, codes, scales, zeros, table, dx, M, stride_dm, stride_dn,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    ZERO: tl.constexpr, ZEROS: tl.constexpr, TABLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program i + j K / SPAN: rows j BLOCK_M ..., inputs of span i, all outputs."""
    kind: tl.constexpr = tl.float32 if dy.dtype.element_ty == tl.float16 else dy.dtype.element_ty
    HALF: tl.constexpr = SPAN // 2
    COLUMNS: tl.constexpr = (K + SPAN - 1) // SPAN * HALF
    GROUPS: tl.constexpr = K // GROUP
    span = tl.program_id(0) % (COLUMNS // HALF)
    ms = (tl.program_id(0) // (COLUMNS // HALF)).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, HALF)
    group = span * SPAN // GROUP
    low = tl.zeros((BLOCK_M, HALF), dtype=tl.float32)
    high = tl.zeros((BLOCK_M, HALF), dtype=tl.float32)
    dy_rows = dy + ms[:, None] * stride_dm
    for block in range((N + BLOCK_N - 1) // BLOCK_N):
        ns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        line = ns.to(tl.int64)
        packed = tl.load(
            codes + line[:, None] * COLUMNS + (span * HALF + columns)[None, :],
            mask=(ns < N)[:, None],
            other=0,
        ).to(tl.int32)
        scale = tl.load(scales + line * GROUPS + group, mask=ns < N, other=0.0).to(tl.float32)
        zero = tl.full((BLOCK_N,), ZERO, dtype=tl.float32)
        if ZEROS:
            zero = tl.load(zeros + line * GROUPS + group, mask=ns < N, other=0).to(tl.float32)
        mask = (ms < M)[:, None] & (ns < N)[None, :]
        grad = tl.load(dy_rows + line[None, :] * stride_dn, mask=mask, other=0.0).to(kind)
        # The step belongs to the axis that is summed over, so here it is part of the weight, which
        # float16 may not hold.
        values = _values(packed & 15, zero[:, None], table, TABLE) * scale[:, None]
        low = tl.dot(grad, values.to(kind), low, input_precision=PRECISION)
        values = _values(packed >> 4, zero[:, None], table, TABLE) * scale[:, None]
        high = tl.dot(grad, values.to(kind), high, input_precision=PRECISION)
    place = span * SPAN + columns
    rows = dx + ms[:, None] * K
    mask = (ms < M)[:, None] & (place < K)[None, :]
    tl.store(rows + place[None, :], low.to(dx.dtype.element_ty), mask=mask)
    place += HALF
    mask = (ms < M)[:, None] & (place < K)[None, :]
    tl.store(rows + place[None, :], high.to(dx.dtype.element_ty), mask=mask)


# --- launching ------------------------------------------------------------------------------------

PROGRAMS = 512
"""How many programs one row is cut into at least: a few for each multiprocessor of a large GPU."""


@dataclass(frozen=True)
class Blocks:
    """How a product is cut into programs.

    Attributes:
        m: Rows of x per program; 1 for the kernel of one row.
        n: Outputs per program.
        parts: Into how many parts the inputs of one row are cut.
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
    """A fair choice by the sizes alone, the same on every machine, in which registers suffice.

    Products of float32 run without tensor cores, on small blocks.
    """
    if rows == 1:
        n = 16
        spans = cdiv(weight.shape[1], weight.span)
        parts = next_power_of_2(cdiv(PROGRAMS, cdiv(weight.shape[0], n)))
        return Blocks(1, n, min(parts, spans))
    if dtype == torch.float32:
        return Blocks(16, 16, warps=8)
    if rows <= 64:  # still limited by memory: few rows, many programs
        return Blocks(max(16, next_power_of_2(rows)), 32) if rows <= 32 else Blocks(64, 64, warps=8)
    return Blocks(64, 128, warps=8)


def _about(weight: Int4Weight) -> dict[str, Any]:
    """The kernels' constants that follow from the weight."""
    return {
        "N": weight.shape[0],
        "K": weight.shape[1],
        "GROUP": weight.group_size,
        "SPAN": weight.span,
        "ZERO": weight.zero,
        "ZEROS": weight.zeros is not None,
        "TABLE": weight.table is not None,
    }


def _forward(x: Tensor, weight: Int4Weight, bias: Tensor | None, blocks: Blocks | None) -> Tensor:
    (rows, _), n = x.shape, weight.shape[0]
    blocks = blocks or blocks_for(rows, weight, x.dtype)
    parts = weight.parts
    if rows == 1 and blocks.m == 1:
        spans = cdiv(weight.shape[1], weight.span)
        each = cdiv(spans, min(blocks.parts, spans, GRID[1]))
        count = cdiv(spans, each)
        sums = empty((count, n), torch.float32, x.device)
        launch(
            _one_row, (cdiv(n, blocks.n), count), x, *parts, sums, x.stride(1), **_about(weight),
            PART=each, BLOCK_N=blocks.n, num_warps=blocks.warps,
        )  # fmt: skip
        total = sums.sum(0, keepdim=True)
        return (total if bias is None else total + bias.float()).to(x.dtype)
    block_m = max(blocks.m, 16)
    bias = None if bias is None else bias.contiguous()
    out = empty((rows, n), x.dtype, x.device)
    launch(
        _many_rows, (cdiv(n, blocks.n) * cdiv(rows, block_m),), x, *parts, bias, out, rows,
        x.stride(0), x.stride(1), **_about(weight), BIAS=bias is not None, BLOCK_M=block_m,
        BLOCK_N=blocks.n, PRECISION=precision(x.dtype), num_warps=blocks.warps, num_stages=2,
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
    rows = len(dy)
    single = dy.dtype == torch.float32  # without tensor cores
    block_m = 16 if single else max(16, min(next_power_of_2(rows), 64))
    dx = empty((rows, weight.shape[1]), dy.dtype, dy.device)
    launch(
        _backward, (cdiv(weight.shape[1], weight.span) * cdiv(rows, block_m),), dy, *weight.parts,
        dx, rows, dy.stride(0), dy.stride(1), **_about(weight), BLOCK_M=block_m,
        BLOCK_N=16 if single else 32, PRECISION=_backward_precision(dy.dtype), num_warps=4,
        num_stages=2,
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
        blocks: How to cut the product into programs, in place of `blocks_for`.

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
    affine = {"GROUP": 128, "SPAN": 128, "ZEROS": True, "TABLE": False, "table": None}
    nf4 = {"GROUP": 64, "SPAN": 64, "ZEROS": False, "TABLE": True, "zeros": None}
    kinds = {"affine": affine, "nf4": nf4}
    found = []
    for kind, dtype, kernel, m, n, warps in (
        ("affine", "bf16", _one_row, 1, 16, 4),
        ("affine", "fp16", _many_rows, 32, 32, 4),
        ("affine", "bf16", _many_rows, 64, 128, 8),
        ("affine", "bf16", _backward, 64, 32, 4),
        ("affine", "fp32", _many_rows, 16, 16, 8),
        ("nf4", "fp16", _one_row, 1, 16, 4),
        ("nf4", "bf16", _many_rows, 16, 32, 4),
        ("nf4", "bf16", _many_rows, 64, 64, 8),
        ("nf4", "fp16", _backward, 64, 32, 4),
        ("nf4", "fp32", _one_row, 1, 16, 4),
        ("nf4", "fp32", _backward, 16, 16, 4),
    ):
        pointer = f"*{dtype}"
        types = dict.fromkeys(("x", "dy", "dx", "bias", "out"), pointer)
        types |= {"codes": "*u8", "zeros": "*u8", "table": "*fp32", "M": "i32"}
        types |= {"scales": "*fp16" if kind == "affine" else "*fp32"}
        types |= {"stride_xm": "i32", "stride_dm": "i32"}
        types |= {"out": "*fp32"} if kernel is _one_row else {}
        constants = kinds[kind] | {"N": 4096, "K": 4096, "ZERO": 8, "PART": 16, "BIAS": True}
        constants |= dict.fromkeys(("stride_x", "stride_xk", "stride_dn"), 1)
        constants |= {"BLOCK_M": m, "BLOCK_N": n}
        half = kernel is _backward and dtype == "fp16"
        constants |= {"PRECISION": "tf32" if half else "ieee"}
        mma = kernel is not _one_row and dtype != "fp32"
        name = f"int4_matmul: {kind} {dtype} {kernel.__name__.strip('_')} {m}x{n}"
        work = _work(kernel, kinds[kind], m, n, 4 if dtype == "fp32" else 2)
        found.append(CompileCase(name, kernel, types, constants, mma, warps, work=work))
    return found


def _work(kernel: Any, kind: dict[str, Any], m: int, n: int, size: int) -> Work:
    """A layer of 4,096 by 4,096: one token, a batch of a tile's rows, or a prompt of 2,048."""
    width, span = 4096, kind["SPAN"]
    rows = 1 if kernel is _one_row else 2048 if m >= 64 else m
    per_group = 4 if kind["TABLE"] else 3
    one_row, spans = kernel is _one_row, width // span
    if kernel is _backward:
        programs, turns = spans * (rows // m), width // n
    else:
        programs, turns = width // n * (spans // 16 if one_row else rows // m), spans
    return Work(
        what=f"{rows} rows, {width} x {width}",
        item="weight",
        items=n * span,
        turns=16 if one_row else turns,
        programs=programs,
        fetched=n * span // 2 + n * per_group,
        bytes=width * width // 2
        + width * width // kind["GROUP"] * per_group
        + 2 * size * rows * width,
        flops=2 * rows * width * width,
    )


def bench_cases(*, small: bool = False) -> list[BenchCase]:
    """The layers of a model of 7 billion parameters: one token, sixteen, and a prompt."""
    layers = [(96, 128)] if small else [(4096, 4096), (11008, 4096), (4096, 11008)]
    rows = [1, 3] if small else [1, 16, 2048]
    return [
        _bench_case(m, n, k, group, nf4=nf4)
        for n, k in layers
        for m in rows
        for nf4, group in ((False, 128), (True, 64))
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
            "ours": lambda: int4_matmul(x, weight),
            "torch, bfloat16 weight": lambda: torch.nn.functional.linear(x, written),
            "torch, dequantizing": lambda: reference(x, weight),
            **peers,
        }

    return BenchCase("int4_matmul", shape, torch.bfloat16, size, 2 * m * n * k, make)


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
    if x.device.type != "cuda":
        return weight, {"torch int4 (tinygemm)": "torch has it for NVIDIA GPUs and CPUs only."}
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
    s = scales.float()
    offsets = torch.stack([s, s * (8 - zeros)], 2).transpose(0, 1).contiguous().bfloat16()
    return weight, {
        "torch int4 (tinygemm)": lambda: torch.ops.aten._weight_int4pack_mm(
            x, packed, group, offsets
        )
    }


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
