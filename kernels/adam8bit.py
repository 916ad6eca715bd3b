r"""Adam with both moments in 8 bits, updated in one pass over memory.

Adam keeps two numbers for each weight, 8 bytes in float32. Here each is a code of 8 bits, with one
scale for 256 of them (Dettmers, Lewis, Shleifer and Zettlemoyer, 2021, arXiv 2110.02861):

$$m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, g, \quad
  v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, g^2, \quad
  w \leftarrow (1 - \eta\lambda)\, w - \frac{\eta \sqrt{1 - \beta_2^t}}{1 - \beta_1^t}\,
  \frac{m_t}{\sqrt{v_t} + \epsilon \sqrt{1 - \beta_2^t}}.$$

The moments are decoded, moved and used in float32, and only then coded again: a weight never waits
for its own rounding. Moments span many powers of ten, so the **dynamic map** spaces its entries by
decades: for $i = 0 \ldots 6$ the range from $10^{i-7}$ to $10^{i-6}$ is cut into $K_i$ equal parts
whose middles are entries, $K_i = 2^i$ for $m$ (with either sign) and $2^{i+1}$ for $v$ (never
negative); 0 and 1 are entries too. What is coded is the number over the largest one of its block.

**No table.** With $n$ counted from 0 upwards, an entry's decade is the exponent of $n$ (of $n + 1$
for $v$) as a binary number, and its place in the decade are the digits after it. So decoding takes
a shift, a power and a product, and coding takes a logarithm, where a search in a table takes eight
steps that wait for one another. Widths grow fivefold from decade to decade, so that a number is
nearer to the last entry of the decade below if it lies less than a fifth of a part above the edge.

**Bytes.** At two bytes a weight and a gradient, and with scales of two moments for 256 weights,
$2 + 2 \cdot 2 + 4 \cdot 1 + 4 \cdot 4 / 256 = 10.06$ bytes a weight move once, where Adam in
float32 moves $2 + 4 + 16 = 22$: a quarter of the memory for moments, and by bytes alone 2.2 times
as fast. Coding and decoding take as many instructions as the bytes leave time for, and again as
many (`python -m effnb.kernels.compile --report adam8bit`), so what is saved is memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from effnb.kernels._launch import (
    cdiv,
    check_floats,
    check_number,
    check_shape,
    check_whole,
    choose,
    jit,
    launch,
    tl,
)
from effnb.kernels.bench import OTHER, BenchCase, Runner, absent
from effnb.kernels.compile import CompileCase
from effnb.kernels.report import Work

BLOCK = 256
"""Weights that share a scale."""
ROWS = 4
"""Blocks of a program: with 4 warps each thread has 8 weights, 16 bytes of 16-bit gradients."""
DECADES = 7
ZERO = 127
"""The code of 0 among signed ones; 127 negative ones lie below it, 128 positive ones above."""


def dynamic_map(signed: bool = True) -> Float[Tensor, " codes"]:
    r"""The 256 entries in order, by their codes.

    Args:
        signed: Whether entries have either sign, as those of $m$; those of $v$ have none. There is
            a 1, but no −1.
    """
    first = 1 if signed else 2
    found = [torch.zeros(1, dtype=torch.float64)]
    for i in range(DECADES):
        count = first * 2**i
        parts = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        found.append(10.0 ** (i - DECADES + 1) * (0.1 + 0.9 * parts))
    positive = torch.cat([*found, torch.ones(1, dtype=torch.float64)])
    if signed:
        return torch.cat([-positive[1:-1].flip(0), positive]).float()
    return positive.float()


@dataclass
class Adam8bitState:
    """Both moments of one parameter.

    Attributes:
        m: Codes of the first moment, one for each weight, in the order of memory.
        m_scale: Largest magnitude of each block of 256 of them.
        v: Codes of the second moment.
        v_scale: Largest of each block of 256 of them.
    """

    m: UInt8[Tensor, " weights"]
    m_scale: Float[Tensor, " blocks"]
    v: UInt8[Tensor, " weights"]
    v_scale: Float[Tensor, " blocks"]

    @classmethod
    def zeros(cls, parameter: Tensor) -> Adam8bitState:
        """The state before the first step."""
        count = parameter.numel()
        where = parameter.device
        return cls(
            torch.full((count,), ZERO, dtype=torch.uint8, device=where),
            torch.zeros(cdiv(count, BLOCK), device=where),
            torch.zeros(count, dtype=torch.uint8, device=where),
            torch.zeros(cdiv(count, BLOCK), device=where),
        )

    def moments(self) -> tuple[Float[Tensor, " weights"], Float[Tensor, " weights"]]:
        """Both moments, decoded to float32."""
        return _decode(self.m, self.m_scale, True), _decode(self.v, self.v_scale, False)

    def tensors(self) -> dict[str, Tensor]:
        """The four tensors by their names."""
        return {"m": self.m, "m_scale": self.m_scale, "v": self.v, "v_scale": self.v_scale}


# ---------------------------------------------------------------- in PyTorch


def _blocks(x: Tensor) -> Tensor:
    """A flat tensor as rows of a block each, filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).unflatten(0, (-1, BLOCK))


def _decode(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    levels = dynamic_map(signed).to(codes.device)
    return (_blocks(levels[codes.long()]) * scale[:, None]).flatten()[: len(codes)]


def _encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales; half way between two entries, the upper one."""
    rows = _blocks(x)
    scale = rows.abs().amax(1)
    levels = dynamic_map(signed).to(x.device).double()
    middles = (levels[:-1] + levels[1:]) / 2
    shares = rows.double() / torch.where(scale > 0, scale, 1.0).double()[:, None]
    codes = torch.searchsorted(middles, shares.contiguous(), right=True)
    if signed:  # what is not 0 keeps its sign
        codes = torch.where((codes == ZERO) & (rows < 0), ZERO - 1, codes)
    return codes.flatten()[: len(x)].to(torch.uint8), scale


def adam8bit_reference(
    parameter: Tensor,
    gradient: Tensor,
    state: Adam8bitState,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """The definition, in plain PyTorch and float32. Arguments are those of `adam8bit`."""
    g = gradient.detach().reshape(-1).float()
    m, v = state.moments()
    seen = g.isfinite()
    m = torch.where(seen, betas[0] * m + (1 - betas[0]) * g, 0.0)
    v = torch.where(seen, betas[1] * v + (1 - betas[1]) * g * g, 0.0)
    size, epsilon = _step_size(step, lr, betas, eps)
    w = parameter.detach().reshape(-1).float()
    moved = (1 - lr * weight_decay) * w - size * m / (v.sqrt() + epsilon)
    moved = torch.where(seen, moved, w).view_as(parameter)
    with torch.no_grad():
        parameter.copy_(moved)
        for name, (codes, scale) in {"m": _encode(m, True), "v": _encode(v, False)}.items():
            getattr(state, name).copy_(codes)
            getattr(state, f"{name}_scale").copy_(scale)


def _step_size(step: int, lr: float, betas: tuple[float, float], eps: float) -> tuple[float, float]:
    """The factor on the moments' ratio, and what is added below it."""
    second = (1 - betas[1] ** step) ** 0.5
    return lr * second / (1 - betas[0] ** step), eps * second


# ---------------------------------------------------------------- the kernel


@jit
def _exponent(n):
    """The whole part of log2 of a whole number above 0."""
    return (n.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@jit
def _power_of_2(i):
    """2 to a whole number, exactly."""
    return ((i + 127) << 23).to(tl.float32, bitcast=True)


@jit
def _power_of_10(i):
    """10 to a whole number, to two units in the last place."""
    return tl.exp2(3.321928094887362 * i.to(tl.float32))


@jit
def _entry(n, FIRST: tl.constexpr):
    """The n-th entry that is not negative; a decade begins with FIRST, 2 FIRST, 4 FIRST parts."""
    place = n + (FIRST - 1)
    exponent = _exponent(tl.maximum(place, 1))
    # The middle of a part, from 1 to 2: what is 0.1 + 0.9 (middle - 1) is 0.9 middle - 0.8.
    middle = (place.to(tl.float32) + 0.5) * _power_of_2(-exponent)
    value = _power_of_10(exponent - (FIRST - 1) - 6) * (0.9 * middle - 0.8)
    top: tl.constexpr = 128 * FIRST - (FIRST - 1)
    return tl.where(n == 0, 0.0, tl.where(n >= top, 1.0, value))


@jit
def _nearest(share, FIRST: tl.constexpr):
    """The number n of the entry nearest to a share from 0 to 1."""
    decade = tl.floor(tl.log2(tl.maximum(share, 1e-30)) * 0.3010299956639812).to(tl.int32) + 7
    decade = tl.minimum(tl.maximum(decade, 0), 6)
    count = _power_of_2(decade) * FIRST
    # Parts of this decade above its edge: (share - edge) / (9 edge / count).
    above = count * (share * _power_of_10(7 - decade) - 1.0) * (1.0 / 9.0)
    part = tl.minimum(tl.maximum(tl.floor(above), 0.0), count - 1.0)
    # Below a fifth of a part, the last entry of the decade below is nearer.
    part = tl.where((above < 0.2) & (decade > 0), -1.0, part)
    n = (count + part).to(tl.int32) - (FIRST - 1)
    top: tl.constexpr = 128 * FIRST - (FIRST - 1)
    smallest: tl.constexpr = 1e-6 * (0.1 + 0.45 / FIRST)
    largest: tl.constexpr = 1.0 - 0.45 / (64 * FIRST)
    n = tl.where(share < smallest / 2, 0, n)
    return tl.where(share >= (1.0 + largest) / 2, top, n)


@jit
def _adam8bit_kernel(
    parameter, gradient, m_codes, m_scales, v_codes, v_scales,
    count,
    step_size, epsilon, decay, beta_1, beta_2,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Some blocks of a parameter: everything is read once and written once, in place."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    parameter, gradient = parameter + first * SIZE, gradient + first * SIZE
    m_codes, v_codes = m_codes + first * SIZE, v_codes + first * SIZE
    m_scales, v_scales = m_scales + first, v_scales + first
    block = tl.arange(0, BLOCKS)
    place = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    # Where nothing hangs over the end, masks would only keep loads from being wide.
    inside = place >= 0 if EVEN else place < count - first * SIZE
    real = block >= 0 if EVEN else block * SIZE < count - first * SIZE
    w = tl.load(parameter + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    m_code = tl.load(m_codes + place, mask=inside, other=127).to(tl.int32) - 127
    v_code = tl.load(v_codes + place, mask=inside, other=0).to(tl.int32)
    m_scale = tl.load(m_scales + block, mask=real, other=0.0)[:, None]
    v_scale = tl.load(v_scales + block, mask=real, other=0.0)[:, None]
    m = _entry(tl.abs(m_code), 1) * m_scale
    m = tl.where(m_code < 0, -m, m)
    v = _entry(v_code, 2) * v_scale

    seen = tl.abs(g) < float("inf")  # neither infinite nor NaN
    m = tl.where(seen, beta_1 * m + (1 - beta_1) * g, 0.0)
    v = tl.where(seen, beta_2 * v + (1 - beta_2) * g * g, 0.0)
    moved = decay * w - step_size * m / (tl.sqrt(v) + epsilon)
    moved = tl.where(seen, moved, w)
    tl.store(parameter + place, moved.to(parameter.dtype.element_ty), mask=inside)

    m_scale, v_scale = tl.max(tl.abs(m), axis=1), tl.max(v, axis=1)
    tl.store(m_scales + block, m_scale, mask=real)
    tl.store(v_scales + block, v_scale, mask=real)
    m_share = 1.0 / tl.where(m_scale > 0, m_scale, 1.0)[:, None]
    v_share = 1.0 / tl.where(v_scale > 0, v_scale, 1.0)[:, None]
    n = _nearest(tl.abs(m) * m_share, 1)
    n = tl.where(m < 0, -tl.minimum(tl.maximum(n, 1), 127), n)  # there is no -1, nor a -0
    tl.store(m_codes + place, (n + 127).to(tl.uint8), mask=inside)
    tl.store(v_codes + place, _nearest(v * v_share, 2).to(tl.uint8), mask=inside)


# ---------------------------------------------------------------- the one to call


def adam8bit(
    parameter: Float[Tensor, " *shape"],
    gradient: Float[Tensor, " *shape"],
    state: Adam8bitState,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    backend: str | None = None,
) -> None:
    r"""One step of Adam with decoupled weight decay; parameter and state change in place.

    Where a gradient is infinite or NaN, the weight stays and its moments become 0.

    Args:
        parameter: The weights, of any shape.
        gradient: Their gradient, of the same shape; its type may be another one.
        state: Their moments.
        step: The number $t$ of this step, from 1.
        lr: The rate $\eta$.
        betas: $\beta_1$ and $\beta_2$, from 0 and below 1.
        eps: $\epsilon$.
        weight_decay: $\lambda$.
        backend: "triton", "torch", or None for the kernel where it can run.

    Raises:
        ValueError: Shapes that do not fit each other, a parameter that does not lie in one piece, a
            step below 1, a rate, $\epsilon$ or decay below 0, betas outside [0, 1), an unknown
            backend.
        TypeError: Numbers that are not floating-point, or settings that are no numbers.
    """
    check_floats(parameter=parameter, gradient=gradient)
    step = check_whole("step", step)
    lr, eps = check_number("lr", lr), check_number("eps", eps)
    weight_decay = check_number("weight_decay", weight_decay)
    betas = check_number("beta 1", betas[0]), check_number("beta 2", betas[1])
    if step < 1:
        raise ValueError(f"step is {step}; steps are counted from 1.")
    for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must not be negative.")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {betas}; both must be from 0 and below 1.")
    shown = f"a parameter of shape {tuple(parameter.shape)}"
    count = parameter.numel()
    check_shape("gradient", gradient, tuple(parameter.shape), shown)
    for name, tensor in state.tensors().items():
        expected = (cdiv(count, BLOCK),) if name.endswith("scale") else (count,)
        check_shape(f"the state's {name}", tensor, expected, shown)
    if not parameter.is_contiguous():
        raise ValueError("the parameter is changed in place, and must lie in one piece.")
    options = dict(step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    held = state.tensors()
    if choose(backend, parameter, gradient, *held.values()) == "torch":
        adam8bit_reference(parameter, gradient, state, **options)
        return
    size, epsilon = _step_size(step, lr, betas, eps)
    launch(
        _adam8bit_kernel,
        (cdiv(count, BLOCK * ROWS),),
        *(parameter.detach(), gradient.detach().contiguous()),
        *(held["m"], held["m_scale"], held["v"], held["v_scale"]),
        *(count, size, epsilon, 1 - lr * weight_decay, *betas),
        SIZE=BLOCK,
        BLOCKS=ROWS,
        EVEN=count % (BLOCK * ROWS) == 0,
        num_warps=4,
    )


# ---------------------------------------------------------------- for the compiler and the clock


def compile_cases() -> list[CompileCase]:
    """Weights and gradients in each type, and weights in float32 with 16-bit gradients."""
    found = []
    for weights, gradients in (
        ("fp32", "fp32"),
        ("fp16", "fp16"),
        ("bf16", "bf16"),
        ("fp32", "bf16"),
    ):
        types = {"parameter": f"*{weights}", "gradient": f"*{gradients}", "count": "i64"}
        types |= dict.fromkeys(("m_codes", "v_codes"), "*u8")
        types |= dict.fromkeys(("m_scales", "v_scales"), "*fp32")
        numbers = ("step_size", "epsilon", "decay", "beta_1", "beta_2")
        types |= dict.fromkeys(numbers, "fp32")
        count = 4096 * 4096
        a, b = (4 if kind == "fp32" else 2 for kind in (weights, gradients))
        work = Work(
            what="4096 x 4096 weights",
            item="weight",
            items=BLOCK * ROWS,
            turns=1,
            programs=count // (BLOCK * ROWS),
            fetched=BLOCK * ROWS * (a + b + 2),
            bytes=count * (2 * a + b + 4) + count // BLOCK * 16,
            flops=18 * count,
        )
        name = f"adam8bit: weights {weights}, gradients {gradients}"
        constants = {"SIZE": BLOCK, "BLOCKS": ROWS, "EVEN": True}
        found.append(CompileCase(name, _adam8bit_kernel, types, constants, work=work))
    return found


def bench_cases(*, small: bool = False) -> list[BenchCase]:
    """One matrix of a large model, and one of a small one."""
    shapes = [(64, 64)] if small else [(4096, 4096), (14336, 4096), (576, 1536)]
    return [_bench_case(*shape) for shape in shapes]


def _bench_case(rows: int, columns: int) -> BenchCase:
    count = rows * columns

    def make(device: torch.device) -> dict[str, Runner]:
        weight = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
        gradient = torch.randn_like(weight)
        ours, plain = (Adam8bitState.zeros(weight) for _ in range(2))
        options = dict(step=1, lr=1e-3)

        def bitsandbytes() -> Tensor:
            optimizer.step()
            return parameter

        known = absent("bitsandbytes")
        if not known and device.type == "cuda":
            from bitsandbytes.optim import Adam8bit

            parameter = torch.nn.Parameter(weight.clone())
            parameter.grad = gradient
            optimizer = Adam8bit([parameter], lr=1e-3, min_8bit_size=1)
        wide = torch.nn.Parameter(weight.float())
        wide.grad = gradient.float()
        fused = torch.optim.AdamW([wide], lr=1e-3, weight_decay=0.0, fused=True)

        def in_place(state: Adam8bitState, how: str | None) -> Runner:
            own = weight.clone()

            def run() -> Tensor:
                adam8bit(own, gradient, state, **options, backend=how)
                return own

            return run

        def by_torch() -> Tensor:
            fused.step()
            return wide.bfloat16()

        return {
            "ours": in_place(ours, None),
            "torch, the definition": in_place(plain, "torch"),
            f"torch, fused, float32 moments{OTHER}": by_torch,
            "bitsandbytes": known
            or ("It is for the GPU here." if device.type != "cuda" else bitsandbytes),
        }

    size = count * 10 + count // BLOCK * 16
    shape = f"{rows} x {columns} weights"
    return BenchCase("adam8bit", shape, torch.bfloat16, size, 18 * count, make)
