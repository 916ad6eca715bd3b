r"""Rows of many experts, each multiplied by its expert's matrix, in one launch.

A layer of experts sends every token to a few of $E$ matrices. Sorted by expert, the tokens of one
lie together, and `ends` says where each group stops. With $e(i)$ the expert of row $i$,
$y_i = W_{e(i)}\, x_i$, which is, group by group,

$$Y_{a_e : b_e} = X_{a_e : b_e}\, W_e^\top, \qquad b_e = \mathrm{ends}_e,\quad a_e = b_{e-1}.$$

Rows past the last end belong to no expert (dropped tokens, padding): their results are 0.

**Bytes.** With $s$ bytes a number, $M$ rows, $N$ outputs, $K$ inputs:
$s\,(E_\text{hit} N K + M K + M N)$: of the weights, only those of experts that have a row. Of $M$
rows sent at random, $E\,(1 - (1 - 1/E)^M)$ experts have one.
**Operations.** $2MNK$, however the rows are shared out.
**Bound.** With few rows for each expert, memory: reading the weights. From about
$A / (2B) \cdot s$ rows for each expert on (some 300 on an H100 in 16 bits), arithmetic.

One grid covers all groups: a group of $m$ rows is $\lceil m / b \rceil$ tiles of $b$ rows, and a
program finds its group by adding up tiles. So the number of programs depends on $M$ and $E$ only,
$\lceil M / b \rceil + E$ times the tiles of outputs at most, and nothing waits to learn the sizes
of the groups. Programs left over stop at once.

**Gradients.** $\partial X$ is the same kernel on transposed weights. $\partial W_e = \partial
Y_e^\top X_e$ is a second one: a tile of one expert's matrix adds up over the rows of its group, in
order, so that the result is the same every time; an expert without rows has a gradient of 0.

Grouped products for experts: Gale, Narayanan, Young, Zaharia, "MegaBlocks: Efficient Sparse
Training with Mixture-of-Experts", 2022, arXiv 2211.15841.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from effnb.kernels import _tuning
from effnb.kernels._launch import (
    cdiv,
    check_floats,
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
from effnb.kernels.bench import EXACT, BenchCase, Runner, pinned
from effnb.kernels.compile import CompileCase
from effnb.kernels.report import Work

__all__ = ["MOST_EXPERTS", "grouped_matmul", "reference"]

MOST_EXPERTS = 1024
"""Every program adds up the tiles of all experts; with more of them the reference takes over."""


# --- the reference --------------------------------------------------------------------------------


def reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """One product after another in plain PyTorch, in float32 (float64 if x is), rounded once.

    Weights are taken apart once: gradients are then put together once as well, where indexing a
    stack of E matrices E times would write E stacks of zeros. Without gradients each product is
    written where it belongs.
    """
    kind = exact(x, weight)
    stops = ends.tolist()
    sizes = [stop - start for start, stop in zip([0, *stops], stops)]
    plain = kind == x.dtype and not torch.is_autocast_enabled(x.device.type)
    if plain and not torch.is_grad_enabled():
        y = x.new_empty(len(x), weight.shape[1])
        y[sum(sizes) :] = 0
        for start, stop, matrix in zip([0, *stops], stops, weight.unbind(0)):
            if stop > start:
                torch.mm(x[start:stop], matrix.mT, out=y[start:stop])
        return y
    groups = x.split([*sizes, len(x) - sum(sizes)])
    parts = [
        linear(rows.to(kind), matrix.to(kind)).to(x.dtype) if len(rows) else None
        for rows, matrix in zip(groups, weight.unbind(0))
    ]
    parts = [part for part in parts if part is not None]
    rest = x.new_zeros(len(groups[-1]), weight.shape[1])
    if not parts:  # nothing was multiplied, and gradients of 0 flow all the same
        return rest + 0 * (x[:0].sum() + weight[:, :0].sum()).to(x.dtype)
    return torch.cat([*parts, rest]) if len(rest) or len(parts) > 1 else parts[0]


# --- the kernels ----------------------------------------------------------------------------------


@jit
def _group(ends, rows, tile, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a tile, its first row, and the end of its group; E for rows of no expert."""
    es = tl.arange(0, BLOCK_E)
    end = tl.load(ends + es, mask=es < E, other=rows)
    start = tl.load(ends + es - 1, mask=(es > 0) & (es <= E), other=0)
    start = tl.where(es > E, rows, start)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    after = tl.cumsum(tiles, 0)  # tiles of this group and of all before it
    expert = tl.sum((after <= tile).to(tl.int32), 0)
    mine = es == expert
    first = tl.sum(tl.where(mine, start + (tile - after + tiles) * BLOCK_M, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@jit
def _rows(
    x, w, ends, out, rows,
    stride_xm, stride_xk, stride_we, stride_wn, stride_wk,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program i + j N / BLOCK_N: tile j of all groups' tiles, outputs i BLOCK_N ..., all inputs."""
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert, first, stop = _group(ends, rows, tl.program_id(0) // COLUMNS, E, BLOCK_E, BLOCK_M)
    if first < stop:
        ms = first.to(tl.int64) + tl.arange(0, BLOCK_M)
        ns = tl.program_id(0) % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
        owned = expert < E  # of rows without an expert nothing is read: they may be infinite
        x_rows = x + ms[:, None] * stride_xm
        w_rows = w + expert.to(tl.int64) * stride_we + ns.to(tl.int64)[None, :] * stride_wn
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for block in range((K + BLOCK_K - 1) // BLOCK_K):
            ks = (block * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
            mask = (ms < stop)[:, None] & (ks < K)[None, :] & owned
            part = tl.load(x_rows + ks[None, :] * stride_xk, mask=mask, other=0.0)
            mask = (ks < K)[:, None] & (ns < N)[None, :] & owned
            weight = tl.load(w_rows + ks[:, None] * stride_wk, mask=mask, other=0.0)
            total = tl.dot(part, weight, total, input_precision=PRECISION)
        mask = (ms < stop)[:, None] & (ns < N)[None, :]
        place = out + ms[:, None] * N + ns[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=mask)


@jit
def _weights(
    dy, x, ends, out,
    stride_dm, stride_dn, stride_xm, stride_xk,
    N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's gradient: the sum over the rows of its group."""
    DOWN: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    ACROSS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    expert = tl.program_id(0) // (DOWN * ACROSS)
    ns = tl.program_id(0) // ACROSS % DOWN * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.program_id(0) % ACROSS * BLOCK_K + tl.arange(0, BLOCK_K)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(ends + expert)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for row in range(start, stop, BLOCK_M):
        ms = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (ns < N)[:, None] & (ms < stop)[None, :]
        left = dy + ms[None, :] * stride_dm + ns.to(tl.int64)[:, None] * stride_dn
        left = tl.load(left, mask=mask, other=0.0)
        mask = (ms < stop)[:, None] & (ks < K)[None, :]
        right = x + ms[:, None] * stride_xm + ks.to(tl.int64)[None, :] * stride_xk
        right = tl.load(right, mask=mask, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    place = out + (expert.to(tl.int64) * N + ns[:, None]) * K + ks[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(ns < N)[:, None] & (ks < K)[None, :])


# --- launching ------------------------------------------------------------------------------------


NAMES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")


def _blocks(rows: int, experts: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles as high as a group of average size, and no higher than registers allow."""
    if dtype == torch.float32:  # without tensor cores, on small blocks
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    high = min(max(16, next_power_of_2(cdiv(rows, max(experts, 1)))), 128)
    wide = 128 if high == 128 else 64
    warps = 8 if high == 128 else 4
    return {
        "BLOCK_M": high, "BLOCK_N": wide, "BLOCK_K": 64, "num_warps": warps, "num_stages": 3,
    }  # fmt: skip


def _run_rows(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Launch: x (M, K), weight (E, N, K), ends (E,), with any strides."""
    (rows, k), (experts, n, _) = x.shape, weight.shape
    out = empty((rows, n), x.dtype, x.device)
    key = partial(key_of, x.dtype, rows=rows, experts=experts, n=n, k=k)
    default = tuple(_blocks(rows, experts, x.dtype).values())
    blocks = dict(zip(NAMES, _tuning.chosen("grouped_matmul", key, x.device, default)))
    tiles = cdiv(rows, blocks["BLOCK_M"]) + experts if rows else 0
    launch(
        _rows, (tiles * cdiv(n, blocks["BLOCK_N"]),), x, weight, ends, out, rows,
        *x.stride(), *weight.stride(), E=experts, N=n, K=k,
        BLOCK_E=next_power_of_2(experts + 1), PRECISION=precision(x.dtype), **blocks,
    )  # fmt: skip
    return out


def _run_weights(dy: Tensor, x: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Launch: the gradient of the weights, (E, N, K)."""
    n, k, experts = dy.shape[1], x.shape[1], len(ends)
    out = empty((experts, n, k), dtype, x.device)
    blocks = _blocks(len(x), experts, x.dtype)
    blocks["BLOCK_M"] = min(blocks["BLOCK_M"], 32)  # here the inner axis: short groups, short steps
    tiles = cdiv(n, blocks["BLOCK_N"]) * cdiv(k, blocks["BLOCK_K"])
    launch(
        _weights, (experts * tiles,), dy, x, ends, out, *dy.stride(), *x.stride(),
        N=n, K=k, PRECISION=precision(x.dtype), **blocks,
    )  # fmt: skip
    return out


class _GroupedMatmul(torch.autograd.Function):
    """The product, with gradients to the rows and to the matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return _run_rows(x, weight, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        dx = _run_rows(dy, weight.mT, ends) if ctx.needs_input_grad[0] else None
        dw = _run_weights(dy, x, ends, weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw, None


# --- the one to call ------------------------------------------------------------------------------


def grouped_matmul(
    x: Float[Tensor, "rows inputs"],
    weight: Float[Tensor, "experts outputs inputs"],
    ends: Int[Tensor, " experts"],
    *,
    backend: str | None = None,
) -> Float[Tensor, "rows outputs"]:
    r"""Rows sorted by expert, each times the transposed matrix of its expert.

    Sums are in float32 (float64 for float64) and rounded once.

    Args:
        x: The rows: first those of expert 0, then those of expert 1, and so on; any strides.
        weight: A matrix for each expert, as `torch.nn.Linear` has it, in the type of x; any
            strides.
        ends: Where the rows of each expert stop: running sums of the numbers of rows. Rows past
            the last belong to no expert and give 0.
        backend: None: Triton on a GPU, the reference elsewhere; or "triton" or "torch".

    Returns:
        The products, in the type of x.

    Raises:
        ValueError: Shapes or types that do not fit each other; ends that fall, are negative or
            exceed the rows (seen where the reference runs: a GPU would have to wait for that
            look); "triton" where it cannot run.
        TypeError: Numbers that are not floating-point, or ends that are not whole.
    """
    check_floats(x=x, weight=weight)
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit weights of shape {tuple(weight.shape)}; "
            "they must be (rows, inputs) and (experts, outputs, inputs)."
        )
    if x.dtype != weight.dtype:
        raise ValueError(
            f"x and the weight are of {short(x.dtype)} and {short(weight.dtype)}; they must be the "
            "same."
        )
    if ends.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ends is of {short(ends.dtype)}; it must be int32 or int64.")
    check_shape("ends", ends, (len(weight),), f"weights of shape {tuple(weight.shape)}")
    obstacle = ""
    if len(weight) > MOST_EXPERTS:
        obstacle = f"there are {len(weight)} experts; the kernel takes up to {MOST_EXPERTS}."
    picked = choose(backend, x, weight, ends, obstacle=obstacle)
    if ends.device.type == "cpu":
        _check_ends(ends, len(x))
    if picked == "torch":
        return reference(x, weight, ends)
    return _GroupedMatmul.apply(x, weight, ends.to(torch.int32).contiguous())


def _check_ends(ends: Tensor, rows: int) -> None:
    """Refuse ends that do not cut the rows into groups."""
    found = ends.tolist()
    if found and (found[0] < 0 or found[-1] > rows or found != sorted(found)):
        raise ValueError(
            f"ends is {found[:8]}{'...' if len(found) > 8 else ''}; it must rise from 0 at least "
            f"to {rows} at most, the number of rows."
        )


# --- for the compiler and the clock ---------------------------------------------------------------


def compile_cases() -> list[CompileCase]:
    """Eight experts of a model of 7 billion parameters, in decoding and over a prompt."""
    found = []
    experts, n, k = 8, 14336, 4096
    for dtype, m, backward in (
        ("bf16", 128, False),
        ("bf16", 16, False),
        ("fp16", 128, False),
        ("fp16", 128, True),
        ("bf16", 128, True),
        ("fp32", 16, False),
        ("fp32", 16, True),
    ):
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        rows = 32 if m == 16 and dtype != "fp32" else 4096
        blocks = _blocks(rows, experts, kind)
        if backward:
            blocks["BLOCK_M"] = min(blocks["BLOCK_M"], 32)
        warps, stages = blocks.pop("num_warps"), blocks.pop("num_stages")
        types = dict.fromkeys(("x", "w", "dy", "out"), f"*{dtype}") | {"ends": "*i32"}
        types |= dict.fromkeys(("rows", "stride_xm", "stride_dm", "stride_we", "stride_wn"), "i32")
        constants = {"E": experts, "N": n, "K": k, "BLOCK_E": 16, "PRECISION": "ieee", **blocks}
        constants |= {"stride_xk": 1, "stride_wk": 1, "stride_dn": 1}
        size = kind.itemsize
        high, wide, deep = blocks["BLOCK_M"], blocks["BLOCK_N"], blocks["BLOCK_K"]
        work = Work(
            what=f"{rows} rows, {experts} experts of {n} x {k}",
            item="tile",
            items=1,
            turns=rows // experts // high if backward else k // deep,
            programs=experts * cdiv(n, wide) * cdiv(k, deep)
            if backward
            else (cdiv(rows, high) + experts) * cdiv(n, wide),
            fetched=high * (wide + deep) * size if backward else (high + wide) * deep * size,
            bytes=size * (experts * n * k + rows * (n + k)),
            flops=2 * rows * n * k,
        )
        name = f"grouped_matmul: {'weights' if backward else 'rows'} {dtype} {high}x{wide}"
        kernel = _weights if backward else _rows
        mma = dtype != "fp32"
        found.append(CompileCase(name, kernel, types, constants, mma, warps, stages, work=work))
    return found


CANDIDATES = (
    Candidate((16, 64, 64, 4, 3), "short groups: 8 KiB of weights a turn, two turns under way"),
    Candidate((16, 128, 64, 4, 4), "short groups: rows serve twice the outputs, 48 KiB under way"),
    Candidate((32, 64, 128, 4, 3), "groups of a few rows: longer turns, half as many waits"),
    Candidate((64, 64, 64, 4, 4), "middle groups: 32 sums in a thread, three programs fit"),
    Candidate((64, 128, 64, 8, 3), "middle groups: 32 sums in a thread of twice as many"),
    Candidate(
        (128, 128, 64, 8, 3), "long groups: 64 sums in a thread, 64 operations for each byte"
    ),
    Candidate(
        (128, 256, 64, 8, 3), "long groups: 128 sums in a thread, 85 operations for each byte"
    ),
)
"""Rows, outputs and inputs of a tile, warps, and stages, of the product with the rows."""


def tune_cases(*, small: bool = False) -> list[TuneCase]:
    """Eight experts of a large model in decoding and over a prompt."""
    experts, n, k = (3, 40, 32) if small else (8, 14336, 4096)
    return [_tune_case(m, experts, n, k, small) for m in ([11] if small else [16, 512, 8192])]


def _tune_case(rows: int, experts: int, n: int, k: int, small: bool) -> TuneCase:
    dtype = torch.float16 if small else torch.bfloat16

    def make(device: torch.device, numbers: Numbers) -> Callable[[], Tensor]:
        x, weight = drawn(device, dtype, (rows, k), (experts, n, k))
        ends = (torch.arange(1, experts + 1, device=device) * rows) // experts
        ends = ends.to(torch.int32)
        return cut("grouped_matmul", numbers, lambda: _run_rows(x, weight, ends))

    high = rows // experts  # of an average group: a tile that is more than half empty cannot win
    fit = tuple(c for c in CANDIDATES if small or c.numbers[0] < 2 * max(high, 16))
    fit = tuple(c for c in fit if small or high < 128 or c.numbers[0] >= 64)
    key, default = (
        key_of(dtype, rows=rows, experts=experts, n=n, k=k),
        _blocks(rows, experts, dtype),
    )
    return TuneCase("grouped_matmul", key, tuple(default.values()), fit, make)


def bench_cases(*, small: bool = False) -> list[BenchCase]:
    """The first product of Mixtral's experts: a row, 8 tokens with two experts each, prompts."""
    experts, n, k = (4, 48, 32) if small else (8, 14336, 4096)
    return [_bench_case(m, experts, n, k) for m in ([12] if small else [1, 16, 512, 8192])]


def _bench_case(m: int, experts: int, n: int, k: int) -> BenchCase:
    dtype = torch.bfloat16

    def make(device: torch.device) -> dict[str, Runner]:
        x = torch.randn(m, k, device=device, dtype=dtype)
        weight = torch.randn(experts, n, k, device=device, dtype=dtype) / k**0.5
        owner = torch.randint(experts, (m,), generator=torch.Generator().manual_seed(0))
        ends = owner.bincount(minlength=experts).cumsum(0).to(torch.int32).to(device)
        return {
            EXACT: lambda: reference(x.double(), weight.double(), ends),
            "ours": lambda: grouped_matmul(x, weight, ends, backend=pinned(device)),
            "torch, in a loop": lambda: reference(x, weight, ends),
            "torch._grouped_mm": lambda: torch._grouped_mm(x, weight.mT, offs=ends),
        }

    hit = experts * (1 - (1 - 1 / experts) ** m)
    size = int(2 * (hit * n * k + m * (n + k)))
    shape = f"M={m} E={experts} N={n} K={k}"
    return BenchCase("grouped_matmul", shape, dtype, size, 2 * m * n * k, make)
