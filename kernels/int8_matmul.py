r"""Products of numbers of 8 bits: weights rounded once, activations as they come, row by row.

Both operands are whole numbers from −127 to 127 with a scale, one for each output of the layer and
one for each token (Dettmers, Lewis, Belkada and Zettlemoyer, 2022, arXiv 2208.07339, section 2):

$$s_i = \frac{\max_k |x_{ik}|}{127}, \quad c_{ik} = \operatorname{round}(x_{ik} / s_i), \quad
  y_{in} = s_i\, t_n \sum_k c_{ik}\, w_{nk} + b_n.$$

The sum is one of whole numbers in 32 bits, so it is exact in any order: 127² times 133,000 still
fit. Scales leave the sum because they are constant along $k$; one scale for a group of $k$ would
have to be multiplied in between. What is lost is lost by rounding, and an activation 50 times as
large as the others of its row leaves them two or three bits: see SmoothQuant for the remedy.

**Two kernels.** One reads a row, finds its largest number and writes codes; the other multiplies
codes on the tensor cores and applies both scales as it writes. A row that holds a NaN or an
infinite number comes out as NaN.

**Bytes and operations.** With $M$ rows, $K$ inputs, $N$ outputs and $b$ bytes an activation,
$M K (b + 2) + N K + M N b$ bytes move (codes are written and read once) for $2 M N K$ operations,
of which tensor cores do twice as many as in 16 bits. The weights are half of what they are in
16 bits: with few rows the time is halved, and with many it is too.

**The gradient** to $x$ is that of the layer with its rounded weights, $g\,\operatorname{diag}(t)\,
w$: rounding activations counts as no change (the straight-through estimator).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int8
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    rows_of,
    short,
    tl,
)
from effnb.kernels._tuning import Candidate, Numbers, TuneCase, cut, drawn, key_of
from effnb.kernels.bench import EXACT, OTHER, BenchCase, Runner, absent, pinned
from effnb.kernels.compile import CompileCase
from effnb.kernels.report import Work

LARGEST = 127
LONGEST = 2**31 // LARGEST**2
"""Inputs whose products may add up to no more than 32 bits hold."""
WIDEST = 2**15
"""Inputs that the kernel of activations holds at once."""

TILES = {16: (16, 64, 256, 4, 4), 64: (64, 64, 128, 4, 4)}
MANY = (128, 128, 128, 8, 3)
"""Rows, outputs and inputs of a tile, warps, and stages, up to a number of rows. With few rows the
tiles are narrow, so that there are as many programs as multiprocessors, and long, so that three
stages in flight keep 48 KiB of weights under way. With many, 128 x 128 results do 64 operations for
each byte that they fetch, and fill half of the registers of eight warps."""

# ---------------------------------------------------------------- in PyTorch


def quantize_rows(
    x: Float[Tensor, "rows inputs"],
) -> tuple[Int8[Tensor, "rows inputs"], Float[Tensor, " rows"]]:
    r"""Codes and scales $\max|x| / 127$ of each row.

    A row of zeros has the scale 0; one that holds a NaN or an infinite number has the scale NaN.
    """
    wide = x.to(exact(x))
    finite = wide.isfinite()
    largest = torch.where(finite, wide, 0).abs()
    scale = (largest.amax(1) if x.shape[1] else largest.sum(1)) / LARGEST
    step = torch.where(scale > 0, scale, 1)[:, None]
    codes = torch.where(finite, wide / step, 0).round()
    return codes.to(torch.int8), torch.where(finite.all(1), scale, torch.nan)


def _product(a: Int8[Tensor, "rows inputs"], b: Int8[Tensor, "outputs inputs"]) -> Tensor:
    """The exact sums of products, as floating-point numbers that hold them."""
    if a.device.type == "cpu" and a.numel() and b.numel():
        return torch._int_mm(a.contiguous(), b.contiguous().T).double()
    return a.double() @ b.double().T


def int8_matmul_reference(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The definition, in plain PyTorch. Arguments are those of `int8_matmul`."""
    rows, s = quantize_rows(rows_of(x))
    y = _product(rows, codes) * s.double()[:, None] * scale.double()
    if bias is not None:
        y = y + bias.double()
    return y.to(x.dtype).view(*x.shape[:-1], len(codes))


# ---------------------------------------------------------------- the kernels


@jit
def _round(x):
    """The nearest whole number, and the even one of two: float32 has no digits below it there."""
    return (x + 12582912.0) - 12582912.0  # 1.5 · 2^23


@jit
def _quantize_kernel(
    x, codes, scales, inputs, stride_row, x_input, BLOCK: tl.constexpr
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < inputs
    at = x + row * stride_row + k.to(tl.int64) * x_input
    found = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    finite = tl.abs(found) < float("inf")
    found = tl.where(finite, found, 0.0)
    scale = tl.div_rn(tl.max(tl.abs(found), axis=0), 127.0)
    shares = tl.div_rn(found, tl.where(scale > 0, scale, 1.0))
    tl.store(codes + row * inputs + k, _round(shares).to(tl.int8), mask=inside)
    odd = tl.max((1 - finite.to(tl.int32)), axis=0) > 0
    tl.store(scales + row, tl.where(odd, float("nan"), scale))


@jit
def _int8_matmul_kernel(
    x_codes, x_scales, codes, scales, bias, out,
    rows, outputs, inputs,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of results. Neighboring programs share columns, whose weights the cache keeps."""
    tiles = tl.cdiv(rows, BLOCK_M)
    m = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at_x = x_codes + m[:, None] * inputs + k[None, :]
    at_w = codes + n[None, :] * inputs + k[:, None]
    row_real, column_real = (m < rows)[:, None], (n < outputs)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, inputs, BLOCK_K):
        left = inputs - start
        in_x = row_real if EVEN else row_real & (k < left)[None, :]
        in_w = column_real if EVEN else column_real & (k < left)[:, None]
        a = tl.load(at_x + start, mask=in_x, other=0)
        b = tl.load(at_w + start, mask=in_w, other=0)
        total += tl.dot(a, b, out_dtype=tl.int32)
    s = tl.load(x_scales + m, mask=m < rows, other=0.0)
    t = tl.load(scales + n, mask=n < outputs, other=0.0).to(tl.float32)
    result = total.to(tl.float32) * s[:, None] * t[None, :]
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    at = out + m[:, None] * outputs + n[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=row_real & column_real)


def _tile(rows: int) -> Numbers:
    """The tile, by the number of rows."""
    return next((one for most, one in TILES.items() if rows <= most), MANY)


def _settings(tile: Numbers) -> dict[str, int]:
    """A tile as the kernel takes it."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return dict(zip(names, tile, strict=True))


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of each row, by the kernel."""
    rows, inputs = x.shape
    codes = empty((rows, inputs), torch.int8, x.device)
    scales = empty((rows,), torch.float32, x.device)
    block = next_power_of_2(inputs)
    launch(
        _quantize_kernel, (rows,), x, codes, scales, inputs, *x.stride(),
        BLOCK=block, num_warps=min(8, max(1, block // 512)),
    )  # fmt: skip
    return codes, scales


class _Int8Matmul(torch.autograd.Function):
    """The kernels, and the gradient of a layer with rounded weights."""

    @staticmethod
    def forward(ctx, x, codes, scale, bias, chosen):
        ctx.save_for_backward(codes, scale)
        ctx.has_bias, ctx.bias_dtype = bias is not None, None if bias is None else bias.dtype
        if chosen == "torch":
            return int8_matmul_reference(x, codes, scale, bias)
        flat = rows_of(x)
        x_codes, x_scales = _quantize(flat)
        rows, inputs = flat.shape
        outputs = len(codes)
        out = empty((rows, outputs), x.dtype, x.device)
        key = partial(key_of, x.dtype, rows=rows, n=outputs, k=inputs)
        settings = _settings(_tuning.chosen("int8_matmul", key, x.device, _tile(rows)))
        grid = cdiv(rows, settings["BLOCK_M"]) * cdiv(outputs, settings["BLOCK_N"])
        launch(
            _int8_matmul_kernel, (grid,),
            *(x_codes, x_scales, codes.contiguous(), scale.contiguous()),
            *(scale if bias is None else bias.contiguous(), out, rows, outputs, inputs),
            HAS_BIAS=bias is not None, EVEN=inputs % settings["BLOCK_K"] == 0, **settings,
        )  # fmt: skip
        return out.view(*x.shape[:-1], outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        codes, scale = ctx.saved_tensors
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = grad @ (codes.to(grad.dtype) * scale.to(grad.dtype)[:, None])
        if ctx.has_bias and ctx.needs_input_grad[3]:
            db = rows_of(grad).to(exact(grad)).sum(0).to(ctx.bias_dtype)
        return dx, None, None, db, None


# ---------------------------------------------------------------- the one to call


def int8_matmul(
    x: Float[Tensor, "*batch inputs"],
    codes: Int8[Tensor, "outputs inputs"],
    scale: Float[Tensor, " outputs"],
    bias: Float[Tensor, " outputs"] | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, "*batch outputs"]:
    r"""A linear layer whose weights and activations are multiplied in 8 bits.

    Args:
        x: Activations; each row is rounded with a scale of its own.
        codes: Weights as whole numbers, as `quantize_rows` makes them of a weight matrix.
        scale: The scale $t_n$ of each row of the weights.
        bias: What is added to the result.
        backend: "triton", "torch", or None for the kernels where they can run.

    Returns:
        The result, in the type of x. Gradients lead to x and to the bias.

    Raises:
        ValueError: Shapes that do not fit each other, more inputs than 32 bits can add up, or an
            unknown backend.
        TypeError: Codes that are not int8, or other numbers that are not floating-point.
    """
    check_floats(x=x, scale=scale, bias=bias)
    if codes.dtype != torch.int8:
        raise TypeError(f"codes are of {short(codes.dtype)}; they must be int8.")
    if codes.ndim != 2 or x.ndim < 1:
        raise ValueError(
            f"codes have shape {tuple(codes.shape)} and x has {tuple(x.shape)}; they must be "
            "(outputs, inputs) and (..., inputs)."
        )
    outputs, inputs = codes.shape
    shown = f"codes of shape {tuple(codes.shape)}"
    check_shape("x", x, (*x.shape[:-1], inputs), shown)
    check_shape("scale", scale, (outputs,), shown)
    if bias is not None:
        check_shape("bias", bias, (outputs,), shown)
    if inputs > LONGEST:
        raise ValueError(f"{inputs} inputs may add up beyond 32 bits; {LONGEST} is the most.")
    obstacle = "" if inputs <= WIDEST else f"{inputs} inputs are too many; {WIDEST} is the most."
    if not inputs:
        obstacle = "there is nothing to multiply."
    chosen = choose(backend, x, codes, scale, bias, obstacle=obstacle)
    return _Int8Matmul.apply(x, codes, scale, bias, chosen)


# ---------------------------------------------------------------- for the compiler and the clock


def compile_cases() -> list[CompileCase]:
    """Rounding of a row, and the product with one, a few and many rows."""
    inputs, outputs = 4096, 4096
    found = []
    for kind, size in (("fp32", 4), ("fp16", 2), ("bf16", 2)):
        types = {"x": f"*{kind}", "codes": "*i8", "scales": "*fp32", "inputs": "i32"}
        types |= {"stride_row": "i64"}
        work = Work(
            what=f"2048 rows of {inputs}", item="number", items=inputs, turns=1, programs=2048,
            fetched=inputs * size, bytes=2048 * inputs * (size + 1), flops=4 * 2048 * inputs,
        )  # fmt: skip
        constants = {"BLOCK": inputs, "x_input": 1}
        name = f"int8_matmul: round {kind}"
        found.append(CompileCase(name, _quantize_kernel, types, constants, warps=8, work=work))
    for rows, kind, bias in ((1, "bf16", False), (64, "fp16", True), (2048, "bf16", False)):
        settings = _settings(_tile(rows))
        warps, stages = settings.pop("num_warps"), settings.pop("num_stages")
        block_m, block_n, block_k = settings.values()
        types = {"x_codes": "*i8", "x_scales": "*fp32", "codes": "*i8", "scales": "*fp32"}
        types |= {"bias": f"*{kind}", "out": f"*{kind}", "rows": "i32", "outputs": "i32"}
        work = Work(
            what=f"{rows} row{'s' * (rows > 1)}, {outputs} x {inputs}",
            item="tile",
            items=1,
            turns=inputs // block_k,
            programs=cdiv(rows, block_m) * cdiv(outputs, block_n),
            fetched=(min(rows, block_m) + block_n) * block_k,
            bytes=rows * inputs + outputs * inputs + rows * outputs * 2,
            flops=rows * inputs * outputs,  # twice as many a second as in 16 bits
        )
        constants = settings | {"inputs": inputs, "HAS_BIAS": bias, "EVEN": True}
        name = f"int8_matmul: {kind} {block_m}x{block_n}x{block_k}"
        found.append(
            CompileCase(
                name, _int8_matmul_kernel, types, constants, mma=True, warps=warps, stages=stages,
                work=work,
            )
        )  # fmt: skip
    return found


CANDIDATES = (
    Candidate((16, 64, 256, 4, 4), "few rows: 16 KiB of codes a turn, three turns under way"),
    Candidate((16, 32, 256, 4, 5), "few rows: twice the programs, where outputs are few"),
    Candidate(
        (16, 128, 128, 4, 5), "few rows: rows of x serve twice the outputs, 64 KiB under way"
    ),
    Candidate((64, 64, 128, 4, 4), "some rows: 32 sums in a thread, two programs fit"),
    Candidate((64, 128, 128, 8, 3), "some rows: what is fetched of x serves twice the outputs"),
    Candidate((128, 128, 128, 8, 3), "many rows: 64 sums in a thread, 64 products for each byte"),
    Candidate((128, 256, 64, 8, 3), "many rows: 128 sums in a thread, 85 products for each byte"),
    Candidate((128, 128, 64, 4, 4), "many rows: shorter turns, half the shared memory"),
)
"""Rows, outputs and inputs of a tile, warps, and stages."""


def tune_cases(*, small: bool = False) -> list[TuneCase]:
    """A token, some, and a prompt, through a square layer and one that widens."""
    layers = [(40, 64)] if small else [(4096, 4096), (14336, 4096)]
    return [
        _tune_case(m, n, k, small) for n, k in layers for m in ([3] if small else [1, 64, 4096])
    ]


def _tune_case(rows: int, outputs: int, inputs: int, small: bool) -> TuneCase:
    dtype = torch.float16 if small else torch.bfloat16

    def make(device: torch.device, numbers: Numbers) -> Callable[[], Tensor]:
        x, weight = drawn(device, dtype, (rows, inputs), (outputs, inputs))
        codes, scale = quantize_rows(weight)
        return cut("int8_matmul", numbers, lambda: int8_matmul(x, codes, scale, backend="triton"))

    key = key_of(dtype, rows=rows, n=outputs, k=inputs)
    # A tile that is more than half empty cannot win.
    fit = tuple(c for c in CANDIDATES if small or c.numbers[0] < 2 * max(rows, 16))
    fit = tuple(c for c in fit if small or rows <= 64 or c.numbers[0] == 128)
    return TuneCase("int8_matmul", key, _tile(rows), fit, make)


def bench_cases(*, small: bool = False) -> list[BenchCase]:
    """Decoding and prompts through a layer of a model of 8 billion parameters."""
    shapes = [(4, 64, 64)] if small else [(1, 4096, 4096), (16, 14336, 4096), (4096, 4096, 4096)]
    return [_bench_case(*shape) for shape in shapes]


def _bench_case(rows: int, outputs: int, inputs: int) -> BenchCase:
    def make(device: torch.device) -> dict[str, Runner]:
        x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
        weight = torch.randn(outputs, inputs, device=device) / inputs**0.5
        codes, scale = quantize_rows(weight)
        dense = weight.bfloat16()

        def by_torch() -> Tensor:
            a, s = quantize_rows(x)
            total = torch._int_mm(a, codes.T)
            return (total.float() * s[:, None] * scale).bfloat16()

        few = "torch._int_mm takes more than 16 rows on a GPU."

        def bitsandbytes() -> Tensor:
            from bitsandbytes import functional

            a, s, _ = functional.int8_vectorwise_quant(x.half())
            return functional.int8_scaled_mm(
                a, codes, s, scale.float() * LARGEST, dtype=torch.float16
            ).bfloat16()

        known = absent("bitsandbytes")
        on_gpu = device.type == "cuda"

        def exactly() -> Tensor:
            a, s = quantize_rows(x)
            total = a.double() @ codes.double().T
            return total * s[:, None].double() * scale.double()

        return {
            EXACT: exactly,
            "ours": lambda: int8_matmul(x, codes, scale, backend=pinned(device)),
            "torch._int_mm": few if on_gpu and rows <= 16 else by_torch,
            "bitsandbytes": known or (bitsandbytes if on_gpu else "It is for the GPU here."),
            f"torch, 16 bits{OTHER}": lambda: x @ dense.T,
        }

    size = rows * inputs * 4 + outputs * inputs + rows * outputs * 2
    shape = f"M={rows} N={outputs} K={inputs}"
    return BenchCase("int8_matmul", shape, torch.bfloat16, size, 2 * rows * inputs * outputs, make)
