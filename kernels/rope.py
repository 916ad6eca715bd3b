r"""Rotary position embedding: queries and keys turned by their positions, in one pass over memory.

RoPE takes the `dim` numbers of a head as `dim / 2` points of the plane and turns the point $i$ of
the token at position $m$ by the angle $m\,\theta_i$ (Su et al., 2021, arXiv 2104.09864):

$$\begin{pmatrix} x'_a \ x'_b \end{pmatrix} = c
  \begin{pmatrix} \cos m\theta_i & -\sin m\theta_i \ \sin m\theta_i & \cos m\theta_i
  \end{pmatrix} \begin{pmatrix} x_a \ x_b \end{pmatrix}$$

A turned query and a turned key have an inner product that depends on their distance only. Methods
that stretch the context (position interpolation, NTK-aware, NTK-by-parts, YaRN) change nothing here
but the frequencies $\theta_i$ and, YaRN, the factor $c$: both are arguments.

Two layouts say which numbers make a pair: half-split $(a, b) = (i, i + d/2)$, Llama's in
`transformers`, and interleaved $(2i, 2i + 1)$, the paper's. Weights trained with one are useless
with the other.

**Bytes and operations.** With $h$ query and key heads together, $T$ tokens and $s$ bytes a number,
each number is read once and written once: $2\,h\,d\,T\,s$ bytes. A pair takes 4 products and 2
sums, so $3\,h\,d\,T$ operations: 0.75 per byte at 16 bits, far left of any GPU's ridge. The bound
is $t \ge 2\,h\,d\,T\,s / B$ for a memory of $B$ bytes per second. Written in PyTorch, each product
and sum is another pass over memory.

The angles are computed where they are used, once per token for all heads, with a full range
reduction: at position 100,000 the fast approximations of GPUs are noise.

**The gradient** of a rotation is the rotation back: the same kernel with $-\theta$.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from effnb.kernels import _tuning
from effnb.kernels._launch import (
    check_floats,
    check_number,
    check_shape,
    choose,
    empty,
    exact,
    jit,
    launch,
    next_power_of_2,
    short,
    tl,
)
from effnb.kernels._tuning import Candidate, Numbers, TuneCase, cut, drawn, key_of
from effnb.kernels.bench import EXACT, BenchCase, Runner, absent, pinned
from effnb.kernels.compile import CompileCase
from effnb.kernels.report import Work

WIDEST = 2**16
"""The widest heads that the kernel takes: one program holds all pairs of a head."""

# ---------------------------------------------------------------- the plain formula


def rope_reference(
    q: Tensor,
    k: Tensor,
    inv_freq: Tensor,
    positions: Tensor | None = None,
    *,
    scaling: float = 1.0,
    interleaved: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `rope` computes, in plain PyTorch; `inverse` turns back instead.

    The angles are products in float32, as `transformers` computes the ones models are trained with,
    and in float64 for float64 inputs.
    """
    kind = exact(q)
    if positions is None:
        positions = torch.arange(q.shape[2], device=q.device)
    angles = positions.to(kind)[..., None] * inv_freq.to(kind)
    if angles.ndim == 3:  # one row of positions per sequence; heads share them
        angles = angles[:, None]
    cos, sin = scaling * angles.cos(), scaling * angles.sin()
    if inverse:
        sin = -sin
    turned = []
    for x in (q, k):
        if interleaved:
            a, b = x[..., 0::2].to(kind), x[..., 1::2].to(kind)
            y = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        else:
            a, b = x.to(kind).chunk(2, dim=-1)
            y = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        turned.append(y.to(x.dtype))
    return turned[0], turned[1]


# ---------------------------------------------------------------- the kernel


@jit
def _turn_heads(
    x, out, heads, x_head, x_dim, out_head, cos, sin,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Turn all heads of one token by the same angles."""
    kind = out.dtype.element_ty
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    both = tl.arange(0, 2 * BLOCK_HALF)[None, :]
    for start in range(0, heads, BLOCK_HEADS):
        head = (start + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
        row, row_out = x + head * x_head, out + head * out_head
        if INTERLEAVED:  # whole heads are read and written, in vectors, and parted in registers
            inside = (head < heads) & (both < 2 * HALF)
            pairs = tl.load(row + both.to(tl.int64) * x_dim, mask=inside, other=0.0)
            x_a, x_b = tl.split(tl.reshape(pairs.to(tl.float32), (BLOCK_HEADS, BLOCK_HALF, 2)))
            turned = tl.join(x_a * cos - x_b * sin, x_b * cos + x_a * sin).to(kind)
            turned = tl.reshape(turned, (BLOCK_HEADS, 2 * BLOCK_HALF))
            tl.store(row_out + both, turned, mask=inside)
        else:
            inside = (head < heads) & (pair < HALF)
            x_a = tl.load(row + pair.to(tl.int64) * x_dim, mask=inside, other=0.0).to(tl.float32)
            at_b = (pair + HALF).to(tl.int64) * x_dim
            x_b = tl.load(row + at_b, mask=inside, other=0.0).to(tl.float32)
            tl.store(row_out + pair, (x_a * cos - x_b * sin).to(kind), mask=inside)
            tl.store(row_out + pair + HALF, (x_b * cos + x_a * sin).to(kind), mask=inside)


@jit
def _rope_kernel(
    q, k, q_out, k_out, inv_freq, positions,
    tokens, q_heads, k_heads, scaling,
    out_head,  # strides; the results are contiguous, this one is for both
    q_batch, q_head, q_token, q_dim,
    k_batch, k_head, k_token, k_dim,
    positions_batch, positions_token,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """One token of one sequence: its angles once, then all its query and key heads."""
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    pair = tl.arange(0, BLOCK_HALF)
    position = tl.load(positions + batch * positions_batch + token * positions_token)
    frequency = tl.load(inv_freq + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    angle = position.to(tl.float32) * frequency
    cos = (tl.cos(angle) * scaling)[None, :]
    sin = (tl.sin(angle) * scaling)[None, :]
    if INVERSE:
        sin = -sin
    q += batch * q_batch + token * q_token
    k += batch * k_batch + token * k_token
    q_out += (batch * q_heads * tokens + token) * 2 * HALF
    k_out += (batch * k_heads * tokens + token) * 2 * HALF
    _turn_heads(
        q, q_out, q_heads, q_head, q_dim, out_head, cos, sin,
        HALF, BLOCK_HALF, BLOCK_HEADS, INTERLEAVED,
    )  # fmt: skip
    _turn_heads(
        k, k_out, k_heads, k_head, k_dim, out_head, cos, sin,
        HALF, BLOCK_HALF, BLOCK_HEADS, INTERLEAVED,
    )  # fmt: skip


def _cut(heads: int, half: int) -> Numbers:
    """As many heads at once as fit into registers, and the warps: 16 pairs a thread at most."""
    block_half = next_power_of_2(half)
    block_heads = min(next_power_of_2(heads), max(1, 4096 // block_half))
    return block_heads, 8 if block_half * block_heads >= 4096 else 4


def _settings(numbers: Numbers, half: int) -> dict[str, int]:
    """Block sizes: all pairs of a head, and some heads."""
    block_heads, warps = numbers
    return {"BLOCK_HALF": next_power_of_2(half), "BLOCK_HEADS": block_heads, "num_warps": warps}


class _Rope(torch.autograd.Function):
    """The kernel; its gradient is the kernel the other way round."""

    @staticmethod
    def forward(ctx, q, k, inv_freq, positions, scaling, interleaved, inverse):
        ctx.save_for_backward(inv_freq, positions)
        ctx.options = scaling, interleaved, inverse
        q_out, k_out = (empty(x.shape, x.dtype, x.device) for x in (q, k))
        batch, _, tokens, dim = q.shape
        steps = (positions.stride(0) if positions.ndim == 2 else 0, positions.stride(-1))
        heads = max(q.shape[1], k.shape[1])
        key = partial(key_of, q.dtype, heads=heads, dim=dim)
        numbers = _tuning.chosen("rope", key, q.device, _cut(heads, dim // 2))
        launch(
            _rope_kernel,
            (batch * tokens,),
            *(q, k, q_out, k_out, inv_freq, positions, tokens, q.shape[1], k.shape[1], scaling),
            *(tokens * dim, *q.stride(), *k.stride(), *steps),
            HALF=dim // 2,
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            **_settings(numbers, dim // 2),
        )
        return q_out, k_out

    @staticmethod
    def backward(ctx, q_grad, k_grad):
        scaling, interleaved, inverse = ctx.options
        grads = _Rope.apply(q_grad, k_grad, *ctx.saved_tensors, scaling, interleaved, not inverse)
        return *grads, None, None, None, None, None


# ---------------------------------------------------------------- the one to call


def rope(
    q: Float[Tensor, "batch query_heads time dim"],
    k: Float[Tensor, "batch key_heads time dim"],
    inv_freq: Float[Tensor, " half"],
    positions: Shaped[Tensor, " time"] | Shaped[Tensor, "batch time"] | None = None,
    *,
    scaling: float = 1.0,
    interleaved: bool = False,
    backend: str | None = None,
) -> tuple[Float[Tensor, "batch query_heads time dim"], Float[Tensor, "batch key_heads time dim"]]:
    r"""Turn queries and keys by their positions: pair $i$ at position $m$ by the angle $m\theta_i$.

    Angles are products in float32, and so are the rotations; results are rounded once, to the
    inputs' type. Both results have gradients. A head of which only a part is rotated (GPT-NeoX,
    some Phi) is sliced by the caller: strides may be any.

    Args:
        q: Queries.
        k: Keys, with the same batch, time and dim; grouped-query models have fewer heads here.
        inv_freq: $\theta_i$, `dim / 2` of them: $10000^{-2i/d}$, or those of a context method.
        positions: $m$, integers or (interpolated) floats, one per token or one row per sequence;
            0, 1, 2, … by default. In decoding, the position in the whole text.
        scaling: The factor $c$ on both results; YaRN's $0.1 \ln s + 1$, else 1.
        interleaved: Pairs $(2i, 2i + 1)$ as in the paper, rather than $(i, i + d/2)$ as in Llama.
        backend: "triton", "torch", or None for the kernel where it can run.

    Returns:
        The turned queries and keys.

    Raises:
        ValueError: Shapes that do not fit each other, an odd `dim`, an unknown backend.
        TypeError: Numbers that are not floating-point, queries and keys of different types, or a
            tensor as scaling.
    """
    check_floats(q=q, k=k, inv_freq=inv_freq)
    scaling = check_number("scaling", scaling)
    if q.dtype != k.dtype:
        raise TypeError(f"q is of {short(q.dtype)} and k of {short(k.dtype)}; they must agree.")
    if q.ndim != 4 or q.shape[-1] % 2 or not q.shape[-1] or not q.shape[1]:
        raise ValueError(
            f"q has shape {tuple(q.shape)}; it must be (batch, heads, time, dim) with an even dim, "
            "heads and dim not 0."
        )
    batch, _, tokens, dim = q.shape
    shown = f"q of shape {tuple(q.shape)}"
    heads = k.shape[1] if k.ndim == 4 else 0
    check_shape("k", k, (batch, heads, tokens, dim), shown)
    check_shape("inv_freq", inv_freq, (dim // 2,), shown)
    if positions is None:
        positions = torch.arange(tokens, device=q.device)
    elif positions.ndim != 1:
        check_shape("positions", positions, (batch, tokens), shown)
    else:
        check_shape("positions", positions, (tokens,), shown)
    if positions.is_complex():
        raise TypeError(f"positions is of {short(positions.dtype)}; it must be real numbers.")
    learned = torch.is_grad_enabled() and (inv_freq.requires_grad or positions.requires_grad)
    obstacle = "it has no gradient for frequencies and positions." if learned else ""
    if dim > WIDEST:
        obstacle = f"heads of {dim} are too wide for it; {WIDEST} is the most."
    chosen = choose(backend, q, k, inv_freq.float(), positions, obstacle=obstacle)
    options = scaling, interleaved, False
    if chosen == "triton":
        return _Rope.apply(q, k, inv_freq.contiguous(), positions, *options)
    return rope_reference(q, k, inv_freq, positions, scaling=scaling, interleaved=interleaved)


# ---------------------------------------------------------------- for the compiler and the clock


def compile_cases() -> list[CompileCase]:
    """Both layouts, both ways, for 32 query and 8 key heads of 128."""
    sizes = {"HALF": 64, **_settings(_cut(32, 64), 64)}
    warps = sizes.pop("num_warps")
    strides = {f"{x}_{axis}": 128 for x in "qk" for axis in ("batch", "head", "token")}
    strides["out_head"] = 128
    found = []
    for kind, interleaved, inverse in (
        ("fp32", False, False),
        ("fp16", False, False),
        ("bf16", False, False),
        ("bf16", True, False),
        ("bf16", False, True),
    ):
        types = dict.fromkeys(("q", "k", "q_out", "k_out"), f"*{kind}")
        types |= {"inv_freq": "*fp32", "positions": "*i64", "scaling": "fp32"}
        types |= dict.fromkeys(("tokens", "q_heads", "k_heads", "positions_batch"), "i32")
        units = {"q_dim": 1, "k_dim": 1, "positions_token": 1}
        options = {"INTERLEAVED": interleaved, "INVERSE": inverse}
        layout = "interleaved" if interleaved else "half-split"
        name = f"rope: {layout} {'backward' if inverse else 'forward'} {kind}"
        constants = sizes | strides | units | options
        size, tokens = (4 if kind == "fp32" else 2), 16384
        work = Work(
            what=f"{tokens} tokens, 32 and 8 heads of 128",
            item="number",
            items=(32 + 8) * 128,
            turns=1,
            programs=tokens,
            fetched=(32 + 8) * 128 * size,
            bytes=2 * tokens * (32 + 8) * 128 * size,
            flops=3 * tokens * (32 + 8) * 128,
        )
        found.append(CompileCase(name, _rope_kernel, types, constants, warps=warps, work=work))
    return found


CANDIDATES = (
    Candidate((32, 4), "all heads at once: 16 pairs a thread, 20 KiB of a program in flight"),
    Candidate((16, 4), "half of the heads: 8 pairs a thread, fewer registers, more programs"),
    Candidate((8, 2), "a quarter of them in small programs: 8 pairs a thread"),
    Candidate((32, 8), "all heads by twice the threads: 8 pairs each"),
)
"""Heads that a program turns at once, and warps."""


def tune_cases(*, small: bool = False) -> list[TuneCase]:
    """Heads as in a model of 8 billion parameters, and wider ones."""
    shapes = [(1, 4, 2, 9, 32)] if small else [(1, 32, 8, 4096, 128), (1, 32, 8, 4096, 256)]
    return [_tune_case(*shape, small=small) for shape in shapes]


def _tune_case(batch, q_heads, k_heads, tokens, dim, *, small: bool) -> TuneCase:
    dtype = torch.float16 if small else torch.bfloat16

    def make(device: torch.device, numbers: Numbers) -> Callable[[], Tensor]:
        shapes = ((batch, tokens, heads, dim) for heads in (q_heads, k_heads))
        q, k = (x.transpose(1, 2) for x in drawn(device, dtype, *shapes))
        inv_freq = 10000 ** (-torch.arange(0, dim, 2, device=device) / dim)
        return cut("rope", numbers, lambda: rope(q, k, inv_freq, backend="triton")[0])

    key, default = key_of(dtype, heads=q_heads, dim=dim), _cut(q_heads, dim // 2)
    return TuneCase("rope", key, default, CANDIDATES, make, alike=f"{dim}")


def bench_cases(*, small: bool = False) -> list[BenchCase]:
    """Heads as in a model of 8 billion parameters, one text and a batch; longer and wider ones."""
    shapes = [(1, 32, 8, 4096, 128), (16, 32, 8, 2048, 128), (1, 32, 8, 16384, 256)]
    shapes = [(1, 4, 2, 64, 32)] if small else shapes
    return [
        _bench_case(*shape, backward=backward) for shape in shapes for backward in (False, True)
    ]


def _bench_case(batch, q_heads, k_heads, tokens, dim, *, backward: bool) -> BenchCase:
    dtype = torch.bfloat16
    count = batch * (q_heads + k_heads) * tokens * dim * (2 if backward else 1)
    shape = f"B={batch} H={q_heads}+{k_heads} T={tokens} D={dim}" + backward * " with backward"

    def make(device: torch.device) -> dict[str, Runner]:
        # As projections lay them out: a token's heads side by side.
        q, k = (
            torch.randn(batch, tokens, heads, dim, device=device, dtype=dtype)
            .transpose(1, 2)
            .requires_grad_(backward)
            for heads in (q_heads, k_heads)
        )
        inv_freq = 10000 ** (-torch.arange(0, dim, 2, device=device) / dim)
        grads = torch.randn_like(q), torch.randn_like(k)
        angles = torch.arange(tokens, device=device)[None, :, None] * inv_freq
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

        def timed(function: Callable[[], tuple[Tensor, Tensor]]) -> Runner:
            if not backward:
                return function
            return lambda: torch.autograd.grad(function(), (q, k), grads)

        def transformers() -> tuple[Tensor, Tensor]:
            from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

            return apply_rotary_pos_emb(q, k, cos, sin)

        def liger() -> tuple[Tensor, Tensor]:
            from liger_kernel.ops.rope import LigerRopeFunction

            # It works in place, and so comes last: its first results are right, its times all are.
            return LigerRopeFunction.apply(q, k, cos, sin)

        compiled = torch.compile(lambda: rope_reference(q, k, inv_freq))

        def exactly():
            wide = [x.detach().double().requires_grad_(backward) for x in (q, k)]
            out = rope_reference(*wide, inv_freq.double())
            steep = [g.double() for g in grads]
            return torch.autograd.grad(out, wide, steep) if backward else out

        how = pinned(device)
        return {
            EXACT: exactly,
            "ours": timed(lambda: rope(q, k, inv_freq, backend=how)),
            "torch": timed(lambda: rope_reference(q, k, inv_freq)),
            "torch.compile": timed(compiled)
            if device.type == "cuda"
            else "It is for the GPU here.",
            "transformers (cos, sin given)": absent("transformers") or timed(transformers),
            "Liger (cos, sin given)": absent("liger_kernel") or timed(liger),
        }

    size = 2 * count * dtype.itemsize
    return BenchCase("rope", shape, dtype, size, 3 * count, make)
