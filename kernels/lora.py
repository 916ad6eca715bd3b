r"""A linear layer and its low-rank update in one pass.

$$y = x W^\top + s\,(x A^\top) B^\top + b$$

with $W$ (N, K), $A$ (r, K), $B$ (N, r). Done in turn, the update reads and writes y once more.
One small kernel computes $h = x A^\top$, once for all outputs, and every program of the layer's
product adds $s\,h B^\top$ to its part of y before writing it.

Bytes, in 16 bits for M rows: $2 (NK + rK + Nr + 2MK + MN)$, and h in float32, $8Mr$.
Operations: $2MNK + 2Mr(K + N)$. Of 16-bit numbers, h by B, and all with A and B of float32, is
multiplied in TF32, at half the rate: it has the range of float32, where half precision would
overflow.
Bound: that of the layer alone, since $r$ is small: the update should cost next to nothing.

Gradients reach x, W, A, B and b: $\partial x = \partial y\,W + s\,(\partial y\,B) A$ is the same
kernel on transposed matrices. `gathered_lora` has the update alone, and that of many users.

LoRA: Hu et al., 2021, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from effnb.kernels._launch import (
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
    rows_of,
    tl,
    wide_precision,
)
from effnb.kernels._tuning import Candidate, Numbers, TuneCase, chosen, key_of
from effnb.kernels.bench import EXACT, OTHER, BenchCase, Runner, absent, pinned
from effnb.kernels.compile import KINDS, CompileCase
from effnb.kernels.report import Work

MAX_RANK = 128
"""Above it a program's part of $x A^T$ no longer fits into registers; the reference takes over."""


# --- the reference --------------------------------------------------------------------------------


def reference(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, bias: Tensor | None = None
) -> Tensor:
    """The layer and its update in plain PyTorch: in float32 or float64, and rounded once."""
    kind = exact(x, A, bias)
    wide, bias = x.to(kind), None if bias is None else bias.to(kind)
    update = linear(linear(wide, A.to(kind)), B.to(kind)) * scaling
    return (linear(wide, weight.to(kind), bias) + update).to(x.dtype)


# --- the kernel -----------------------------------------------------------------------------------


@jit
def _inner(
    x, a, h, M, stride_xm, stride_xk, stride_ar, stride_ak,
    K: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (i, j): h of rows i BLOCK_M ..., from the j-th part of the inputs.

    A of another type than x is multiplied in float32.
    """
    kind: tl.constexpr = x.dtype.element_ty
    inner: tl.constexpr = kind if a.dtype.element_ty == kind else tl.float32
    ms = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rs = tl.arange(0, BLOCK_R)
    x_rows = x + ms[:, None] * stride_xm
    a_rows = a + rs.to(tl.int64)[None, :] * stride_ar
    thin = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    each = tl.cdiv((K + BLOCK_K - 1) // BLOCK_K, tl.num_programs(1))
    for step in range(each):
        first = (tl.program_id(1) * each + step) * BLOCK_K
        ks = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask = (ms < M)[:, None] & (ks < K)[None, :]
        part = tl.load(x_rows + ks[None, :] * stride_xk, mask=mask, other=0.0)
        mask = (ks < K)[:, None] & (rs < RANK)[None, :]
        down = tl.load(a_rows + ks[:, None] * stride_ak, mask=mask, other=0.0).to(inner)
        thin = tl.dot(part.to(inner), down, thin, input_precision=WIDE)
    at = h + tl.program_id(1).to(tl.int64) * tl.cast(M, tl.int64) * RANK
    at += ms[:, None] * RANK + rs[None, :]
    tl.store(at, thin, mask=(ms < M)[:, None] & (rs < RANK)[None, :])


@jit
def _layer(
    x, w, h, b, bias, out, M, scaling,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_bn, stride_br,
    N: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program i + j N / BLOCK_N: rows j BLOCK_M ... of x, outputs i BLOCK_N ..., all inputs."""
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    ms = (tl.program_id(0) // COLUMNS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = tl.program_id(0) % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x + ms[:, None] * stride_xm
    w_rows = w + ns.to(tl.int64)[None, :] * stride_wn
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range((K + BLOCK_K - 1) // BLOCK_K):
        ks = (block * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask = (ms < M)[:, None] & (ks < K)[None, :]
        part = tl.load(x_rows + ks[None, :] * stride_xk, mask=mask, other=0.0)
        mask = (ks < K)[:, None] & (ns < N)[None, :]
        weight = tl.load(w_rows + ks[:, None] * stride_wk, mask=mask, other=0.0)
        total = tl.dot(part, weight, total, input_precision=PRECISION)
    for first in tl.static_range(0, RANK, BLOCK_R):
        rs = first + tl.arange(0, BLOCK_R)
        mask = (ms < M)[:, None] & (rs < RANK)[None, :]
        at = h + ms[:, None] * RANK + rs[None, :]
        thin = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for _ in tl.static_range(PARTS):  # always in the same order
            thin += tl.load(at, mask=mask, other=0.0)
            at += tl.cast(M, tl.int64) * RANK
        mask = (rs < RANK)[:, None] & (ns < N)[None, :]
        up = b + ns.to(tl.int64)[None, :] * stride_bn + rs.to(tl.int64)[:, None] * stride_br
        up = tl.load(up, mask=mask, other=0.0).to(tl.float32)
        total = tl.dot(thin * scaling, up, total, input_precision=WIDE)
    if BIAS:
        total += tl.load(bias + ns, mask=ns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + ms[:, None] * N + ns[None, :],
        total.to(out.dtype.element_ty),
        mask=(ms < M)[:, None] & (ns < N)[None, :],
    )


# --- one update -----------------------------------------------------------------------------------

PROGRAMS = 128
"""As many programs as a large GPU has multiprocessors, about: with fewer, tiles get smaller."""
MAX_PARTS = 8
"""Parts of h at most: each program of the layer adds them up, 8 KiB for 16 rows of rank 16."""
BLOCK_R = 32
"""Ranks that are added at a time: h and B for them take 32 KiB beside a tile of 128 x 128."""


@dataclass(frozen=True)
class Tile:
    """How a layer is cut into programs: rows, outputs, inputs at a time, warps, and stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int = 3


LARGE = Tile(128, 128, 64, 8)
"""64 sums in each of 256 threads' registers, and 64 operations for each byte that is fetched."""
MIDDLE = Tile(64, 64, 64, 4)
"""For four times as many programs; a quarter of the sums, by half the threads."""
SINGLE = Tile(16, 32, 32, 4)
"""Float32 without tensor cores: both factors of a sum are in registers."""


def tile_for(rows: int, n: int, dtype: torch.dtype) -> Tile:
    """The largest tile of which there are enough; by the sizes alone, where none was measured."""
    if dtype == torch.float32:
        return SINGLE
    for tile in (LARGE, MIDDLE):
        if 2 * rows > tile.m and cdiv(rows, tile.m) * cdiv(n, tile.n) >= PROGRAMS:
            return tile
    m = max(16, min(next_power_of_2(rows), 64))
    narrow = cdiv(rows, m) * cdiv(n, 32) < PROGRAMS
    # Memory is waited for: 128 inputs of 32 outputs are 8 KiB, of which two stages are under way.
    return Tile(m, 16 if narrow else 32, 128 if m <= 32 else 64, 4, 4 if narrow else 3)


def _tile(rows: int, n: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """What was measured on this device, or else `tile_for`; float32 has one tile."""
    own = tile_for(rows, n, dtype)
    if dtype == torch.float32:
        return own
    key = partial(key_of, dtype, rows=rows, n=n)
    return Tile(*chosen("lora", key, device, astuple(own)))


def _inner_settings(rows: int, k: int, rank: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Constants of the kernel of h; and parts of the inputs, so that enough programs run."""
    m = max(16, min(next_power_of_2(rows), 64))
    block = 32 if dtype == torch.float32 else 64  # with 64 rows, 8 KiB of x a turn
    turns = max(1, cdiv(k, block))
    each = cdiv(turns, min(MAX_PARTS, turns, cdiv(PROGRAMS, max(1, cdiv(rows, m)))))
    blocks = {"BLOCK_M": m, "BLOCK_K": block, "BLOCK_R": max(16, next_power_of_2(rank))}
    return {"K": k, "RANK": rank, **blocks}, cdiv(turns, each)


def _run_layer(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, bias: Tensor | None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch: x (M, K), weight (N, K), A (r, K), B (N, r), with any strides; y, and h in parts."""
    (rows, k), n, rank = x.shape, len(weight), len(A)
    how, parts = _inner_settings(rows, k, rank, x.dtype)
    wide = wide_precision(x.dtype)
    h = empty((parts, rows, rank), torch.float32, x.device)
    if rank:
        launch(
            _inner, (cdiv(rows, how["BLOCK_M"]), parts), x, A, h, rows, *x.stride(), *A.stride(),
            **how, WIDE=wide, num_warps=4, num_stages=3,
        )  # fmt: skip
    tile = tile or _tile(rows, n, x.dtype, x.device)
    bias = None if bias is None else bias.contiguous()
    out = empty((rows, n), x.dtype, x.device)
    launch(
        _layer, (cdiv(n, tile.n) * cdiv(rows, tile.m),), x, weight, h, B, bias, out, rows,
        float(scaling), *x.stride(), *weight.stride(), *B.stride(),
        N=n, K=k, RANK=rank, PARTS=parts, BIAS=bias is not None, BLOCK_M=tile.m, BLOCK_N=tile.n,
        BLOCK_K=tile.k, BLOCK_R=min(BLOCK_R, how["BLOCK_R"]),
        PRECISION=precision(x.dtype), WIDE=wide, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, h


class _Lora(torch.autograd.Function):
    """The layer and its update, with gradients to everything."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        scaling: float,
    ) -> Tensor:
        out, h = _run_layer(x, weight, A, B, scaling, bias)
        ctx.save_for_backward(x, weight, A, B, h)
        ctx.scaling, ctx.bias_type = scaling, None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, h = ctx.saved_tensors
        need, s = ctx.needs_input_grad, ctx.scaling
        dx = dw = da = db = dbias = steep = None
        if need[0]:  # the roles of inputs and outputs change, and those of A and B
            dx, steep = _run_layer(dy, weight.T, B.T, A.T, s, None)
            steep = steep.sum(0)
        if need[1]:
            dw = dy.T @ x
        if need[2]:  # in float32, where nothing in between overflows
            steep = dy.float() @ B.float() if steep is None else steep
            da = (steep.T @ x.float() * s).to(A.dtype)
        if need[3]:
            db = (dy.float().T @ h.sum(0) * s).to(B.dtype)
        if need[4]:
            dbias = dy.sum(0, dtype=ctx.bias_type)
        return dx, dw, da, db, dbias, None


def lora(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""$y = x W^\top + s\,(x A^\top) B^\top + b$ in one pass.

    What lies between input and output is in float32 (float64 if a tensor is), and rounded once: no
    update overflows half precision that the sum does not. For 16-bit inputs the kernel multiplies
    A and B in TF32.

    Args:
        x: (..., K), any strides.
        weight: (N, K) in the type of x.
        A: (r, K) in the type of x or float32.
        B: (N, r) in the type of A.
        scaling: $s$, a number.
        bias: (N,) in any of these types.
        backend: None: Triton on a GPU, the reference elsewhere; or "triton" or "torch".

    Returns:
        (..., N) in the type of x.

    Raises:
        ValueError: Shapes or types that do not fit each other, tensors on two devices, or "triton"
            where it cannot run.
        TypeError: Tensors that are not of floating-point numbers, or a scaling that is no number.
    """
    check_floats(x=x, weight=weight, A=A, B=B, bias=bias)
    scaling = check_number("scaling", scaling)
    if weight.ndim != 2 or not x.ndim or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit a weight of shape {tuple(weight.shape)}."
        )
    n, k = weight.shape
    rank = A.shape[0] if A.ndim else 0
    check_shape("A", A, (rank, k), f"a weight of shape {(n, k)}")
    check_shape("B", B, (n, rank), f"a weight of shape {(n, k)} and A of shape {tuple(A.shape)}")
    if bias is not None:
        check_shape("bias", bias, (n,), f"a weight of shape {(n, k)}")
    if weight.dtype != x.dtype or A.dtype != B.dtype:
        first, second = (x, weight) if weight.dtype != x.dtype else (A, B)
        names = "x and the weight" if first is x else "A and B"
        raise ValueError(f"{names} are of {first.dtype} and {second.dtype}; they must be the same.")
    picked = choose(backend, x, weight, A, B, bias, obstacle=too_large(rank))
    if picked == "torch":
        return reference(x, weight, A, B, scaling, bias)
    return _Lora.apply(rows_of(x), weight, A, B, bias, scaling).reshape(*x.shape[:-1], n)


def in_one_pass(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None
) -> bool:
    """Whether `lora` runs its kernel on these tensors, rather than the layer and then the update.

    For callers who have the layer as well, and are as well off with `lora_update` on its output.
    """
    fit = x.ndim and x.shape[-1] == weight.shape[-1]
    if not fit or x.dtype != weight.dtype or A.dtype != B.dtype:
        return False
    return choose(None, x, weight, A, B, bias, obstacle=too_large(len(A))) == "triton"


def too_large(rank: int) -> str:
    """Why a rank has no kernel, in a sentence; empty if it has one."""
    if rank <= MAX_RANK:
        return ""
    return f"the rank is {rank}; the kernel has ranks up to {MAX_RANK}."


# --- for `compile` and `bench` --------------------------------------------------------------------


def compile_cases() -> list[CompileCase]:
    """Both kernels in the tiles of decoding and of a prompt, up to the largest rank.

    And backward, where the weight, B and A come transposed: neighbours along K do not touch.
    """
    found = []
    for dtype, ab, rank, rows, backward in (
        ("bf16", "bf16", 16, 2048, False),
        ("bf16", "fp32", 16, 2048, True),
        ("bf16", "fp32", 128, 2048, False),
        ("fp16", "fp32", 16, 2048, False),
        ("bf16", "bf16", 16, 64, False),
        ("bf16", "fp32", 128, 64, False),
        ("fp16", "fp16", 16, 16, False),
        ("fp32", "fp32", 16, 16, False),
        ("fp32", "fp32", 16, 16, True),
    ):
        types = dict.fromkeys(("x", "w", "bias", "out"), f"*{dtype}")
        types |= {"a": f"*{ab}", "b": f"*{ab}", "h": "*fp32", "M": "i32", "scaling": "fp32"}
        near, far = ("wk", "ak", "br"), ("wn", "ar", "bn")
        far, near = (near, far) if backward else (far, near)
        types |= {f"stride_{name}": "i32" for name in ("xm", *far)}
        constants = {f"stride_{name}": 1 for name in ("xk", *near)}
        wide, kind = "ieee" if dtype == "fp32" else "tf32", KINDS[dtype]
        tile = tile_for(rows, WIDTH, kind)
        inner, parts = _inner_settings(rows, WIDTH, rank, kind)
        layer = {"N": WIDTH, "K": WIDTH, "RANK": rank, "PARTS": parts, "BIAS": not backward}
        layer |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
        layer |= {"BLOCK_R": min(BLOCK_R, inner["BLOCK_R"]), "PRECISION": "ieee", "WIDE": wide}
        of = f"A and B {ab}, r {rank}" + backward * " backward"
        size, width = kind.itemsize, KINDS[ab].itemsize
        for name, kernel, more, warps, stages, work in (
            (f"lora: {dtype} {tile.m}x{tile.n}, {of}", _layer, layer, tile.warps, tile.stages,
             _layer_work(rows, rank, tile, size, width)),
            (f"lora: {dtype} inner {inner['BLOCK_M']} x {parts} parts, {of}", _inner,
             inner | {"WIDE": wide}, 4, 3, _inner_work(rows, inner, parts, size, width)),
        ):  # fmt: skip
            found.append(
                CompileCase(
                    name, kernel, types, constants | more, dtype != "fp32", warps, stages, work
                )
            )
    return found


WIDTH = 4096
"""Inputs and outputs of the layers in the report."""


def _layer_work(rows: int, rank: int, tile: Tile, size: int, width: int) -> Work:
    """A layer of 4,096 by 4,096: x, weight, h and B once, and y."""
    return Work(
        what=f"{rows} rows, {WIDTH} x {WIDTH}, rank {rank}",
        item="tile",
        items=1,
        turns=WIDTH // tile.k,
        programs=WIDTH // tile.n * (rows // tile.m),
        fetched=(tile.m + tile.n) * tile.k * size,
        bytes=size * WIDTH * (WIDTH + 2 * rows) + width * rank * WIDTH + 4 * rows * rank,
        flops=2 * rows * WIDTH * (WIDTH + rank),
    )


def _inner_work(rows: int, inner: dict[str, int], parts: int, size: int, width: int) -> Work:
    """Its h: x and A once, and h in parts."""
    m, rank, k = inner["BLOCK_M"], inner["RANK"], inner["BLOCK_K"]
    return Work(
        what=f"{rows} rows, {WIDTH} inputs, rank {rank}",
        item="tile",
        items=1,
        turns=WIDTH // k // parts,
        programs=cdiv(rows, m) * parts,
        fetched=k * (m * size + rank * width),
        bytes=rows * WIDTH * size + rank * WIDTH * width + 4 * parts * rows * rank,
        flops=2 * rows * WIDTH * rank,
    )


CANDIDATES = (
    Candidate((128, 128, 64, 8, 3), "64 sums in a thread; 64 KiB of two stages under way"),
    Candidate((128, 128, 64, 8, 4), "the same with a stage more under way, 128 KiB"),
    Candidate((128, 256, 64, 8, 3), "128 sums in a thread: a third fewer bytes for an operation"),
    Candidate((64, 128, 64, 4, 3), "64 sums in a thread, twice as many programs"),
    Candidate((64, 64, 64, 4, 3), "32 sums in a thread, four times as many programs"),
    Candidate((64, 32, 64, 4, 3), "up to 64 rows: one program for each multiprocessor at n = 4096"),
    Candidate((32, 32, 128, 4, 3), "up to 32 rows: 32 KiB of two stages under way"),
    Candidate((16, 32, 128, 4, 3), "up to 16 rows: 24 KiB of two stages under way"),
    Candidate((16, 16, 128, 4, 4), "twice as many programs, 24 KiB of three stages under way"),
    Candidate((16, 64, 128, 4, 3), "half as many programs, 40 KiB of two stages under way"),
)
"""Rows, outputs and inputs of a tile, warps, stages: few, each for a kind of sizes."""


def tune_cases(*, small: bool = False) -> list[TuneCase]:
    """One row, some, and a prompt, on a square layer and on one that widens."""
    layers, rows, rank = [(4096, 4096), (11008, 4096)], [1, 16, 64, 256, 2048], 16
    if small:
        layers, rows, rank = [(32, 48)], [3], 2
    return [_tune_case(m, n, k, rank, small) for n, k in layers for m in rows]


def _tune_case(m: int, n: int, k: int, rank: int, small: bool) -> TuneCase:
    dtype = torch.float16 if small else torch.bfloat16
    # A tile that is more than half empty cannot win, and need not be tried.
    fit = tuple(c for c in CANDIDATES if c.numbers[0] < 2 * max(m, 16))

    def make(device: torch.device, numbers: Numbers) -> Callable[[], Tensor]:
        draw = torch.Generator(device=device).manual_seed(0)
        x, w, a, b = (
            (torch.randn(shape, device=device, generator=draw) / shape[1] ** 0.5).to(dtype)
            for shape in ((m, k), (n, k), (rank, k), (n, rank))
        )
        return lambda: _run_layer(x, w, a, b, 2.0, None, Tile(*numbers))[0]

    default = astuple(tile_for(m, n, dtype))
    return TuneCase("lora", key_of(dtype, rows=m, n=n), default, fit, make)


def bench_cases(*, small: bool = False) -> list[BenchCase]:
    """A layer of a model of 7 billion parameters with rank 16: one token, sixteen, a prompt."""
    n, k, rank = (96, 128, 4) if small else (4096, 4096, 16)
    found = [_bench_layer(m, n, k, rank) for m in ([3] if small else [1, 16, 2048])]
    return found + [_bench_training(m, n, k, rank) for m in ([3] if small else [16, 2048])]


def _bench_layer(m: int, n: int, k: int, r: int) -> BenchCase:
    def make(device: torch.device) -> dict[str, Any]:
        x, w, a, b = (
            torch.randn(shape, device=device, dtype=torch.bfloat16) / shape[1] ** 0.5
            for shape in ((m, k), (n, k), (r, k), (n, r))
        )
        return {
            EXACT: lambda: reference(*(t.double() for t in (x, w, a, b)), 2.0),
            "ours": lambda: lora(x, w, a, b, 2.0, backend=pinned(device)),
            "torch, in turn": lambda: reference(x, w, a, b, 2.0),
            "torch, the layer alone" + OTHER: lambda: linear(x, w),
            "peft": _peft(x, w, a, b),
        }

    size = 2 * (n * k + r * (k + n) + m * (k + n))
    flops = 2 * m * n * k + 2 * m * r * (k + n)
    return BenchCase("lora", f"M={m} N={n} K={k} r={r}", torch.bfloat16, size, flops, make)


def _bench_training(m: int, n: int, k: int, r: int) -> BenchCase:
    """Forward and backward to everything that has a gradient: x, A and B of a frozen layer, and W.

    The layer's own gradient is asked for as well, which a fine-tuned layer leaves out: it shows
    what the low-rank part costs beside it.
    """

    def make(device: torch.device) -> dict[str, Any]:
        leaves = [
            (torch.randn(shape, device=device, dtype=torch.bfloat16) / shape[1] ** 0.5)
            for shape in ((m, k), (n, k), (r, k), (n, r))
        ]
        dy = torch.randn(m, n, device=device, dtype=torch.bfloat16)

        def trained(run: Callable[..., Tensor], kind: torch.dtype = torch.bfloat16) -> Runner:
            own = [t.to(kind).detach().requires_grad_() for t in leaves]
            return lambda: torch.autograd.grad(run(*own), own, dy.to(kind))

        return {
            EXACT: trained(lambda *t: reference(*t, 2.0), torch.float64),
            "ours": trained(lambda *t: lora(*t, 2.0, backend=pinned(device))),
            "torch, in turn": trained(lambda *t: reference(*t, 2.0)),
            "torch, 16 bits in turn": trained(
                lambda x, w, a, b: linear(x, w) + 2.0 * linear(linear(x, a), b)
            ),
            "peft": _peft(*leaves, dy),
        }

    # Forward reads x, W, A, B and writes y; backward reads them and dy, and writes four gradients.
    size = 2 * (3 * (n * k + r * (k + n)) + m * (3 * k + 2 * n))
    flops = 3 * (2 * m * n * k + 2 * m * r * (k + n))
    shape = f"M={m} N={n} K={k} r={r} with backward"
    return BenchCase("lora", shape, torch.bfloat16, size, flops, make)


def _peft(x: Tensor, w: Tensor, a: Tensor, b: Tensor, dy: Tensor | None = None) -> Any:
    """The same layer in the library peft, or why it is not there; with dy, also backward."""
    missing = absent("peft")
    if missing:
        return missing
    import peft

    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype, device=w.device)
    config = peft.LoraConfig(r=len(a), lora_alpha=2 * len(a), target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(layer), config, autocast_adapter_dtype=False)
    values = {"base_layer": w, "lora_A": a, "lora_B": b}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(next(v for key, v in values.items() if key in name))
    if dy is None:
        return torch.no_grad()(lambda: model(x))
    held = {name: p.requires_grad_() for name, p in model.named_parameters()}
    parts = [next(p for name, p in held.items() if key in name) for key in values]
    own = [x.detach().requires_grad_(), *parts]
    return lambda: torch.autograd.grad(model(own[0]), own, dy)
