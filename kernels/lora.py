r"""A linear layer and its low-rank update in one pass.

$$y = x W^\top + s\,(x A^\top) B^\top + b$$

with $W$ (N, K), $A$ (r, K), $B$ (N, r). Done in turn, the update reads x once more and reads and
writes y once more. Here every program, which needs its rows of x for $x W^\top$ anyway, also
multiplies them by A, and adds $B$ times that to its part of y before writing it once.

Bytes, in 16 bits for M rows: $2 (NK + rK + Nr + MK + MN)$.
Operations: $2MNK + 2Mr(K + N)$. The kernel does $2MrK$ of them once for every block of outputs. Of
16-bit numbers, $x A^\top$ by B, and all with A and B of float32, is multiplied in TF32, at half the
rate: it has the range of float32, where half precision would overflow.
Bound: that of the layer alone, since $r$ is small: the update should cost next to nothing.

Gradients reach x, W, A, B and b: $\partial x = \partial y\,W + s\,(\partial y\,B) A$ is the same
kernel on transposed matrices. `gathered_lora` has the update alone, and that of many users.

LoRA: Hu et al., 2021, arXiv 2106.09685.
"""

from __future__ import annotations

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
from effnb.kernels.bench import OTHER, BenchCase, absent
from effnb.kernels.compile import CompileCase
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
def _layer(
    x, w, a, b, bias, out, M, scaling,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    N: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program i + j N / BLOCK_N: rows j BLOCK_M ... of x, outputs i BLOCK_N ..., all inputs.

    A and B of another type than x, and everything between them, are multiplied in float32.
    """
    kind: tl.constexpr = x.dtype.element_ty
    inner: tl.constexpr = kind if a.dtype.element_ty == kind else tl.float32
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    ms = (tl.program_id(0) // COLUMNS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = tl.program_id(0) % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
    rs = tl.arange(0, BLOCK_R)
    x_rows = x + ms[:, None] * stride_xm
    w_rows = w + ns.to(tl.int64)[None, :] * stride_wn
    a_rows = a + rs.to(tl.int64)[None, :] * stride_ar
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    thin = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for block in range((K + BLOCK_K - 1) // BLOCK_K):
        ks = (block * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask = (ms < M)[:, None] & (ks < K)[None, :]
        part = tl.load(x_rows + ks[None, :] * stride_xk, mask=mask, other=0.0)
        mask = (ks < K)[:, None] & (ns < N)[None, :]
        weight = tl.load(w_rows + ks[:, None] * stride_wk, mask=mask, other=0.0)
        mask = (ks < K)[:, None] & (rs < RANK)[None, :]
        down = tl.load(a_rows + ks[:, None] * stride_ak, mask=mask, other=0.0).to(inner)
        total = tl.dot(part, weight, total, input_precision=PRECISION)
        thin = tl.dot(part.to(inner), down, thin, input_precision=WIDE)
    thin = tl.where((rs < RANK)[None, :], thin, 0.0)  # an infinite x times 0
    mask = (rs < RANK)[:, None] & (ns < N)[None, :]
    up = b + ns.to(tl.int64)[None, :] * stride_bn + rs.to(tl.int64)[:, None] * stride_br
    up = tl.load(up, mask=mask, other=0.0).to(tl.float32)
    total += tl.dot(thin, up, input_precision=WIDE) * scaling
    if BIAS:
        total += tl.load(bias + ns, mask=ns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + ms[:, None] * N + ns[None, :],
        total.to(out.dtype.element_ty),
        mask=(ms < M)[:, None] & (ns < N)[None, :],
    )


# --- one update -----------------------------------------------------------------------------------


def _run_layer(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, bias: Tensor | None
) -> Tensor:
    """Launch: x (M, K), weight (N, K), A (r, K), B (N, r), with any strides."""
    (rows, k), n, rank = x.shape, len(weight), len(A)
    single = x.dtype == torch.float32  # without tensor cores, on small blocks
    largest = 128 if rank <= 32 else 64  # by shared memory: large ranks fill as much as outputs
    block_m = 16 if single else min(max(16, next_power_of_2(rows)), largest)
    block_n = 32 if single or rows <= 16 else 64 if rows <= 64 else largest
    bias = None if bias is None else bias.contiguous()
    out = empty((rows, n), x.dtype, x.device)
    launch(
        _layer, (cdiv(n, block_n) * cdiv(rows, block_m),), x, weight, A, B, bias, out, rows,
        float(scaling), *x.stride(), *weight.stride(), *A.stride(), *B.stride(),
        N=n, K=k, RANK=rank, BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=32 if single else 64, BLOCK_R=max(16, next_power_of_2(rank)),
        PRECISION=precision(x.dtype), WIDE=wide_precision(x.dtype),
        num_warps=8 if block_n == 128 else 4, num_stages=3,
    )  # fmt: skip
    return out


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
        ctx.save_for_backward(x, weight, A, B)
        ctx.scaling, ctx.bias_type = scaling, None if bias is None else bias.dtype
        return _run_layer(x, weight, A, B, scaling, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        need, s = ctx.needs_input_grad, ctx.scaling
        dx = dw = da = db = dbias = None
        if need[0]:  # the roles of inputs and outputs change, and those of A and B
            dx = _run_layer(dy, weight.T, B.T, A.T, s, None)
        if need[1]:
            dw = dy.T @ x
        if need[2] or need[3]:  # in float32, where nothing in between overflows
            wide, steep, a, b = x.float(), dy.float(), A.float(), B.float()
        if need[2]:
            da = ((steep @ b).T @ wide * s).to(A.dtype)
        if need[3]:
            db = (steep.T @ (wide @ a.T) * s).to(B.dtype)
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
    """The kernel in the block sizes of decoding and of a prompt, up to the largest rank.

    And backward, where the weight, B and A come transposed: neighbours along K do not touch.
    """
    found = []
    for dtype, ab, rank, m, n, k, warps, backward in (
        ("bf16", "bf16", 16, 128, 128, 64, 8, False),
        ("bf16", "fp32", 16, 128, 128, 64, 8, True),
        ("bf16", "fp32", 128, 64, 64, 64, 4, False),
        ("fp16", "fp32", 16, 128, 128, 64, 8, False),
        ("fp16", "fp16", 16, 16, 32, 64, 4, False),
        ("fp32", "fp32", 16, 16, 32, 32, 4, False),
        ("fp32", "fp32", 16, 16, 32, 32, 4, True),
    ):
        types = dict.fromkeys(("x", "w", "bias", "out"), f"*{dtype}")
        types |= {"a": f"*{ab}", "b": f"*{ab}", "M": "i32", "scaling": "fp32"}
        rows, columns = ("wn", "ar", "bn"), ("wk", "ak", "br")
        far, near = (columns, rows) if backward else (rows, columns)
        types |= {f"stride_{name}": "i32" for name in ("xm", *far)}
        constants = {f"stride_{name}": 1 for name in ("xk", *near)}
        constants |= {"N": 4096, "K": 4096, "RANK": rank, "BLOCK_R": rank, "PRECISION": "ieee"}
        constants |= {"WIDE": "ieee" if dtype == "fp32" else "tf32"}
        constants |= {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "BIAS": not backward}
        name = f"lora: {dtype} {m}x{n}, A and B {ab}, r {rank}" + backward * " backward"
        mma = dtype != "fp32"
        size, width = (4 if dtype == "fp32" else 2), 4096
        tokens = m if m == 16 else 2048
        work = Work(
            what=f"{tokens} rows, {width} x {width}, rank {rank}",
            item="tile",
            items=1,
            turns=width // k,
            programs=width // n * (tokens // m),
            fetched=(m + n) * k * size,
            bytes=size * (width * width + 2 * rank * width + 2 * tokens * width),
            flops=2 * tokens * width * (width + 2 * rank),
        )
        case = CompileCase(name, _layer, types, constants, mma, warps, stages=3, work=work)
        found.append(case)
    return found


def bench_cases(*, small: bool = False) -> list[BenchCase]:
    """A layer of a model of 7 billion parameters with rank 16: one token, sixteen, a prompt."""
    n, k, rank = (96, 128, 4) if small else (4096, 4096, 16)
    return [_bench_layer(m, n, k, rank) for m in ([3] if small else [1, 16, 2048])]


def _bench_layer(m: int, n: int, k: int, r: int) -> BenchCase:
    def make(device: torch.device) -> dict[str, Any]:
        x, w, a, b = (
            torch.randn(shape, device=device, dtype=torch.bfloat16) / shape[1] ** 0.5
            for shape in ((m, k), (n, k), (r, k), (n, r))
        )
        return {
            "ours": lambda: lora(x, w, a, b, 2.0),
            "torch, in turn": lambda: reference(x, w, a, b, 2.0),
            "torch, the layer alone" + OTHER: lambda: linear(x, w),
            "peft": _peft(x, w, a, b),
        }

    size = 2 * (n * k + r * (k + n) + m * (k + n))
    flops = 2 * m * n * k + 2 * m * r * (k + n)
    return BenchCase("lora", f"M={m} N={n} K={k} r={r}", torch.bfloat16, size, flops, make)


def _peft(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    """The same layer in the library peft, or why it is not there."""
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
    return torch.no_grad()(lambda: model(x))
