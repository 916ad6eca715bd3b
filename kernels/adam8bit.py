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

**Decoding** is a look into a table of 256 entries, which every program copies into shared memory.

**Coding** has no such table to look into, and a search in one takes eight steps that wait for one
another. But within a decade entries are evenly spaced, so that a line counts them; parts widen
fivefold from one decade to the next, so that lines of higher decades are flatter, and the right one
of the seven is the **lowest**: seven products and six minima, none of which waits for memory. What
they count is right, or one too large; a look at the edge below the entry says which. (A decade's
first entry is nearest only from a fifth of its part on, and 1 already from a quarter of a part
below it: the table of edges knows.)

**Bytes.** At two bytes a weight and a gradient, and with scales of two moments for 256 weights,
$2 + 2 \cdot 2 + 4 \cdot 1 + 4 \cdot 4 / 256 = 10.06$ bytes a weight move once, where Adam in
float32 moves $2 + 4 + 16 = 22$: a quarter of the memory for moments, and by bytes alone 2.2 times
as fast. Instructions have to keep up with that: memory leaves an H100 time for 92 on each weight,
and coding by logarithms took 199 of them, twice the time (`python -m effnb.kernels.compile --report
adam8bit` counts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

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
from effnb.kernels._tuning import Candidate, Numbers, TuneCase, chosen, cut, key_of
from effnb.kernels.bench import EXACT, OTHER, BenchCase, Runner, absent, pinned
from effnb.kernels.compile import CompileCase
from effnb.kernels.report import Work

BLOCK = 256
"""Weights that share a scale."""
ROWS, WARPS = 8, 4
"""Blocks and warps of a program. Each thread has 16 weights, so that what is done once for a row or
a program, as copying the tables, costs two instructions a weight; 12 KiB of a program are in flight
while six of them fit into the registers of a multiprocessor, six times what memory needs."""
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


def _line(decade: int, first: int) -> tuple[float, float]:
    r"""Slope and height of the line that counts entries in a decade.

    The $K_i = $ `first` $\cdot 2^i$ parts of decade $i$ follow on the $K_i - $ `first` of the
    decades below and on 0: a share $s$ lies in part
    $K_i (10^{7-i} s - 1) / 9$ of them. `LEAD` is added, so that the whole part is never too small.
    """
    count = first * 2**decade
    return count * 10.0 ** (DECADES - decade) / 9, count * 8 / 9 - (first - 1) + LEAD


LEAD = 0.3
"""Between 1/4, by which the upper edge of the last part lies nearer to the entry 1, and 4/5."""
LINES = tuple(tuple(_line(i, first) for i in range(DECADES)) for first in (1, 2))
"""Of signed and of unsigned entries."""


@lru_cache
def _tables(device: torch.device) -> Float[Tensor, "4 256"]:
    """What codes of m and of v stand for; the smallest shares of which entries are nearest."""
    found = []
    for signed in (True, False):
        entries = dynamic_map(signed).double()[ZERO if signed else 0 :]
        middles = (entries[1:] + entries[:-1]) / 2
        edges = torch.cat([middles.new_tensor([-1.0]), middles])
        found.append(torch.nn.functional.pad(edges, (0, 256 - len(edges)), value=2.0))
    return torch.stack([dynamic_map(True), dynamic_map(False), *found]).float().to(device)


@jit
def _looked_up(table, n):
    """Entries of a table of 256, which lies in shared memory, for a tile of numbers."""
    return tl.reshape(tl.gather(table, tl.reshape(n, (n.numel,)), 0), n.shape)


@jit
def _nearest(share, edges, LINES: tl.constexpr):
    """The number n of the entry nearest to a share from 0 to 1.

    Parts widen from decade to decade, so that the line of the right decade is the lowest one.
    """
    part = LINES[0][0] * share + LINES[0][1]
    for i in tl.static_range(1, 7):
        part = tl.minimum(part, LINES[i][0] * share + LINES[i][1])
    n = tl.maximum(part, 0.0).to(tl.int32)  # right, or one too large
    return n - (share < _looked_up(edges, n)).to(tl.int32)


@jit
def _adam8bit_kernel(
    parameter, gradient, m_codes, m_scales, v_codes, v_scales, tables,
    count,
    step_size, epsilon, decay, beta_1, beta_2,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr,
    M_LINES: tl.constexpr, V_LINES: tl.constexpr,
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
    m_code = tl.load(m_codes + place, mask=inside, other=127).to(tl.int32)
    v_code = tl.load(v_codes + place, mask=inside, other=0).to(tl.int32)
    w = tl.load(parameter + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    m_scale = tl.load(m_scales + block, mask=real, other=0.0)[:, None]
    v_scale = tl.load(v_scales + block, mask=real, other=0.0)[:, None]
    entry = tl.arange(0, 256)
    m = _looked_up(tl.load(tables + entry), m_code) * m_scale
    v = _looked_up(tl.load(tables + 256 + entry), v_code) * v_scale

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
    n = _nearest(tl.abs(m) * m_share, tl.load(tables + 512 + entry), M_LINES)
    n = tl.where(m < 0, -tl.minimum(tl.maximum(n, 1), 127), n)  # there is no -1, nor a -0
    tl.store(m_codes + place, (n + 127).to(tl.uint8), mask=inside)
    n = _nearest(v * v_share, tl.load(tables + 768 + entry), V_LINES)
    tl.store(v_codes + place, n.to(tl.uint8), mask=inside)


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
    key = partial(key_of, parameter.dtype, count=count)
    rows, warps = chosen("adam8bit", key, parameter.device, (ROWS, WARPS))
    launch(
        _adam8bit_kernel,
        (cdiv(count, BLOCK * rows),),
        *(parameter.detach(), gradient.detach().contiguous()),
        *(held["m"], held["m_scale"], held["v"], held["v_scale"], _tables(parameter.device)),
        *(count, size, epsilon, 1 - lr * weight_decay, *betas),
        SIZE=BLOCK,
        BLOCKS=rows,
        EVEN=count % (BLOCK * rows) == 0,
        M_LINES=LINES[0],
        V_LINES=LINES[1],
        num_warps=warps,
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
        types |= dict.fromkeys(("m_scales", "v_scales", "tables"), "*fp32")
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
        constants |= {"M_LINES": LINES[0], "V_LINES": LINES[1]}
        case = CompileCase(name, _adam8bit_kernel, types, constants, warps=WARPS, work=work)
        found.append(case)
    return found


CANDIDATES = (
    Candidate((8, 4), "16 weights a thread: tables and rows cost least for each"),
    Candidate((4, 4), "8 weights a thread: fewer registers, so half as many warps again fit"),
    Candidate((4, 2), "16 weights a thread in small programs, which end and begin more evenly"),
    Candidate((8, 8), "8 weights a thread, tables copied for twice as many of them"),
)
"""Blocks of 256 weights, and warps."""


def tune_cases(*, small: bool = False) -> list[TuneCase]:
    """A matrix of a small model, and one of a large one."""
    shapes = [(3, 700)] if small else [(4096, 4096), (576, 1536)]
    return [_tune_case(*shape, small=small) for shape in shapes]


def _tune_case(rows: int, columns: int, *, small: bool) -> TuneCase:
    dtype = torch.float16 if small else torch.bfloat16

    def make(device: torch.device, numbers: Numbers) -> Callable[[], Tensor]:
        draw = torch.Generator().manual_seed(0)
        weight, gradient = (
            torch.randn(rows, columns, generator=draw).to(device, dtype) for _ in range(2)
        )
        state = Adam8bitState.zeros(weight)

        def run() -> Tensor:
            adam8bit(weight, gradient, state, step=1, lr=1e-3, backend="triton")
            return weight

        return cut("adam8bit", numbers, run)

    key = key_of(dtype, count=rows * columns)
    return TuneCase("adam8bit", key, (ROWS, WARPS), CANDIDATES, make)


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

        def exactly() -> Tensor:
            # From moments of zero the first step is the learning rate, by the gradient's sign.
            g = gradient.double()
            return weight.double() - 1e-3 * g / (g.abs() + 1e-8)

        return {
            EXACT: exactly,
            "ours": in_place(ours, pinned(device)),
            "torch, the definition": in_place(plain, "torch"),
            f"torch, fused, float32 moments{OTHER}": by_torch,
            "bitsandbytes": known
            or ("It is for the GPU here." if device.type != "cuda" else bitsandbytes),
        }

    size = count * 10 + count // BLOCK * 16
    shape = f"{rows} x {columns} weights"
    return BenchCase("adam8bit", shape, torch.bfloat16, size, 18 * count, make)
