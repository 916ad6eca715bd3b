r"""The output layer and its loss in one, without the logits in memory.

A model of 32,768 tokens and 128,256 words makes 4.2 billion logits: 8.4 GB in 16 bits, and as much
again for their gradient, where the hidden states take 0.3 GB. Only one number a token is asked for:
with hidden states $x_i$, output weights $w_v$ and the right word $y_i$

$$\ell_i = \log \sum_v e^{x_i \cdot w_v} - x_i \cdot w_{y_i}. \tag{labels}$$

So tiles of logits are made, summed up with the largest one so far (Milakov and Gimelshein, 2018,
arXiv 1805.02867), and forgotten; the backward pass makes them again (Wijmans et al., 2024, arXiv
2411.09009). With a **teacher** of hidden states $t_i$ and output weights $u_v$ at temperature
$\tau$, its distribution $q_i \propto e^{t_i \cdot u_v / \tau}$ takes the place of the label:

$$\ell_i = \sum_v q_{iv} \log \frac{q_{iv}}{p_{iv}} =
  \sum_v q_{iv}\, \frac{t_i \cdot u_v - x_i \cdot w_v}{\tau}
  - \log \sum_v e^{t_i \cdot u_v/\tau} + \log \sum_v e^{x_i \cdot w_v/\tau}. \tag{teacher}$$

**The gradient.** With $g_i$ that of $\ell_i$ and $d_{iv} = p_{iv} - [v = y_i]$, or $(p_{iv} -
q_{iv})/\tau$,

$$\nabla x_i = g_i \sum_v d_{iv} w_v, \qquad \nabla w_v = \sum_i d_{iv}\, g_i x_i.$$

A kernel writes $d$ for some thousand words at a time, and the library multiplies: what is added to
$\nabla x$ is added in float32, and $\nabla w$ of these words is written once. $g$ stays outside of
$d$, whose numbers 16 bits hold, while $g_i d_{iv}$ of a mean over many tokens would be lost in
float16.

**Bytes and operations.** $2 M H V$ operations forward for $M$ tokens, $H$ hidden numbers and $V$
words, $6 M H V$ backward, one third of it to make the logits again. At least $(M + V) H b$ bytes
move forward. It is slower than a product that keeps its logits, by up to a third: memory is what it
saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from effnb.kernels import _tuning
from effnb.kernels._launch import (
    cdiv,
    check_floats,
    check_number,
    check_shape,
    check_whole,
    choose,
    empty,
    exact,
    jit,
    launch,
    precision,
    short,
    tl,
)
from effnb.kernels._tuning import Candidate, Numbers, TuneCase, cut, drawn, key_of
from effnb.kernels.bench import EXACT, BenchCase, Runner, absent, pinned
from effnb.kernels.compile import KINDS, CompileCase
from effnb.kernels.report import Work

LOG2_E = 1.4426950408889634
WORDS = 4096
"""Words whose gradients of logits are in memory at a time."""
TILES = {torch.float32: (64, 64, 32, 4, 2), torch.float16: (128, 128, 64, 8, 3)}
"""Tokens, words and hidden numbers of a tile, warps and stages. 128 x 128 logits do 64 operations
for each byte that they fetch; eight warps hold them, and a teacher's beside them, in registers."""
PARTS = 8
"""Parts of the vocabulary that are summed up side by side, where there are few tokens."""

# ---------------------------------------------------------------- in PyTorch


@dataclass(frozen=True)
class _Heads:
    """What logits are made of, and how they are scaled.

    Attributes:
        x: Hidden states of the model, (tokens, hidden).
        w: Its output weights, (words, hidden).
        t: The teacher's hidden states; None with labels.
        u: Its output weights.
        scale: One over the temperature.
    """

    x: Tensor
    w: Tensor
    t: Tensor | None
    u: Tensor | None
    scale: float

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Words by the thousand: first, and behind the last."""
        words = len(self.w)
        yield from ((first, min(first + WORDS, words)) for first in range(0, words, WORDS))

    def logits(self, first: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Those of some words, over the temperature: the model's, and the teacher's."""
        kind = exact(self.x)
        own = self.scale * (self.x.to(kind) @ self.w[first:end].to(kind).T)
        if self.t is None or self.u is None:
            return own, None
        return own, self.scale * (self.t.to(kind) @ self.u[first:end].to(kind).T)


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
) -> Tensor:
    """The definition, with all logits. Arguments are those of `linear_cross_entropy`."""
    kind = exact(x)
    logits = x.to(kind) @ weight.to(kind).T
    return torch.nn.functional.cross_entropy(
        logits, labels, ignore_index=ignore_index, reduction="none"
    )


def linear_distillation_reference(
    x: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """The definition, with all logits. Arguments are those of `linear_distillation`."""
    kind = exact(x)
    own = (x.to(kind) @ weight.to(kind).T / temperature).log_softmax(-1)
    other = (teacher.to(kind) @ teacher_weight.to(kind).T / temperature).log_softmax(-1)
    return (other.exp() * (other - own)).sum(-1)


def _sums_in_chunks(heads: _Heads, labels: Tensor | None) -> tuple[Tensor, ...]:
    """Logarithms of both sums, and what is subtracted or added, a chunk of words at a time."""
    logs, others, inner = [], [], []
    picked = torch.zeros(len(heads.x), dtype=exact(heads.x), device=heads.x.device)
    for first, end in heads.chunks():
        own, other = heads.logits(first, end)
        logs.append(own.logsumexp(1))
        if other is not None:
            others.append(other.logsumexp(1))
            # The part of sum q (t - x) here, in units of this chunk's own sum.
            inner.append((other.softmax(1) * (other - own)).sum(1))
        elif labels is not None:
            here = (labels >= first) & (labels < end)
            at = (labels - first).clamp(0, end - first - 1)
            picked = torch.where(here, own.gather(1, at[:, None])[:, 0], picked)
    log = torch.stack(logs).logsumexp(0)
    if not others:
        return log, log, picked
    log_other = torch.stack(others).logsumexp(0)
    shares = (torch.stack(others) - log_other).exp()
    return log, log_other, (shares * torch.stack(inner)).sum(0)


def _differences_in_torch(
    heads: _Heads, labels: Tensor | None, logs: tuple[Tensor, Tensor], first: int, end: int
) -> Tensor:
    """The matrix d of some words; its rows of ignored tokens are of no account."""
    own, other = heads.logits(first, end)
    d = (own - logs[0][:, None]).exp()
    if other is not None:
        return (heads.scale * (d - (other - logs[1][:, None]).exp())).to(heads.x.dtype)
    words = torch.arange(first, end, device=d.device)
    return (d - (labels[:, None] == words).to(d.dtype)).to(heads.x.dtype)


# ---------------------------------------------------------------- the kernels


@jit
def _logits(
    x, w, token, word, tokens, words, hidden,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of products of hidden states and words, both in rows that lie in one piece."""
    h = tl.arange(0, BLOCK_H)
    at_x = x + token.to(tl.int64)[:, None] * hidden + h[None, :]
    at_w = w + word.to(tl.int64)[None, :] * hidden + h[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, hidden, BLOCK_H):
        in_x, in_w = (token < tokens)[:, None], (word < words)[None, :]
        if not EVEN:
            in_x, in_w = in_x & (h < hidden - start)[None, :], in_w & (h < hidden - start)[:, None]
        a = tl.load(at_x + start, mask=in_x, other=0.0)
        b = tl.load(at_w + start, mask=in_w, other=0.0)
        total += tl.dot(a, b, input_precision=PRECISION)
    return total


@jit
def _sums_kernel(
    x, w, t, u, labels,
    largest, total,  # (parts, tokens) each: of the model
    other_largest, other_total, inner,  # the same of the teacher; inner is the label's logit
    tokens, words, hidden, other_hidden, words_of_part,
    scale,  # with log2(e) in it
    TEACHER: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Some tokens and a part of the vocabulary: powers of two are summed as they come by."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    token = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(0) // tiles
    first = part * words_of_part
    label = tl.load(labels + token, mask=token < tokens, other=-1)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_M,), tl.float32)
    m_t = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    s_t = tl.zeros((BLOCK_M,), tl.float32)
    found = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(first, tl.minimum(first + words_of_part, words), BLOCK_V):
        word = start + tl.arange(0, BLOCK_V)
        real = (word < words)[None, :]
        z = scale * _logits(
            x, w, token, word, tokens, words, hidden, EVEN, BLOCK_M, BLOCK_V, BLOCK_H, PRECISION
        )
        z_seen = tl.where(real, z, float("-inf"))
        new_m = tl.maximum(m, tl.max(z_seen, axis=1))
        s = s * tl.exp2(m - new_m) + tl.sum(tl.exp2(z_seen - new_m[:, None]), axis=1)
        m = new_m
        if TEACHER:
            y = scale * _logits(
                t, u, token, word, tokens, words, other_hidden,
                EVEN, BLOCK_M, BLOCK_V, BLOCK_H, PRECISION,
            )  # fmt: skip
            y_seen = tl.where(real, y, float("-inf"))
            new_m = tl.maximum(m_t, tl.max(y_seen, axis=1))
            q = tl.exp2(y_seen - new_m[:, None])
            shrink = tl.exp2(m_t - new_m)
            s_t = s_t * shrink + tl.sum(q, axis=1)
            found = found * shrink + tl.sum(tl.where(real, q * (y - z), 0.0), axis=1)
            m_t = new_m
        else:
            found += tl.sum(tl.where(word[None, :] == label[:, None], z, 0.0), axis=1)
    at = part.to(tl.int64) * tokens + token
    inside = token < tokens
    tl.store(largest + at, m, mask=inside)
    tl.store(total + at, s, mask=inside)
    tl.store(inner + at, found, mask=inside)
    if TEACHER:
        tl.store(other_largest + at, m_t, mask=inside)
        tl.store(other_total + at, s_t, mask=inside)


@jit
def _differences_kernel(
    x, w, t, u, labels, log, other_log, out,
    tokens, words, hidden, other_hidden,
    first,  # the word that the first row of w and u stands for
    scale,  # with log2(e) in it
    factor,  # on the difference: one over the temperature
    TEACHER: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One tile of d: logits once more, and what is taken from their softmax."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    token = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    word = (tl.program_id(0) // tiles) * BLOCK_V + tl.arange(0, BLOCK_V)
    z = scale * _logits(
        x, w, token, word, tokens, words, hidden, EVEN, BLOCK_M, BLOCK_V, BLOCK_H, PRECISION
    )
    d = tl.exp2(z - tl.load(log + token, mask=token < tokens, other=0.0)[:, None])
    if TEACHER:
        y = scale * _logits(
            t, u, token, word, tokens, words, other_hidden,
            EVEN, BLOCK_M, BLOCK_V, BLOCK_H, PRECISION,
        )  # fmt: skip
        d -= tl.exp2(y - tl.load(other_log + token, mask=token < tokens, other=0.0)[:, None])
    else:
        label = tl.load(labels + token, mask=token < tokens, other=-1)
        d -= tl.where((first + word)[None, :] == label[:, None], 1.0, 0.0)
    at = out + token.to(tl.int64)[:, None] * words + word[None, :]
    inside = (token < tokens)[:, None] & (word < words)[None, :]
    tl.store(at, (factor * d).to(out.dtype.element_ty), mask=inside)


def _tile(dtype: torch.dtype) -> Numbers:
    """The tile, by the type of the hidden states."""
    return TILES[torch.float32 if dtype == torch.float32 else torch.float16]


def _settings(dtype: torch.dtype, tile: Numbers) -> dict[str, int]:
    """A tile as the kernels take it."""
    names = ("BLOCK_M", "BLOCK_V", "BLOCK_H", "num_warps", "num_stages")
    return dict(zip(names, tile, strict=True)) | {"PRECISION": precision(dtype)}


def _common(heads: _Heads, labels: Tensor | None) -> tuple[tuple, tuple, dict]:
    """What both kernels take: tensors, widths, and constants."""
    t, u = (heads.x, heads.w) if heads.t is None or heads.u is None else (heads.t, heads.u)
    key = partial(key_of, heads.x.dtype, tokens=len(heads.x), hidden=heads.x.shape[1])
    default = _tile(heads.x.dtype)
    tile = _tuning.chosen("linear_cross_entropy", key, heads.x.device, default)
    settings = _settings(heads.x.dtype, tile)
    block = settings["BLOCK_H"]
    even = heads.x.shape[1] % block == 0 and t.shape[1] % block == 0
    constants = settings | {"TEACHER": heads.t is not None, "EVEN": even}
    given = labels if labels is not None else heads.x.new_zeros(len(heads.x), dtype=torch.int64)
    return (heads.x, heads.w, t, u, given), (heads.x.shape[1], t.shape[1]), constants


def _sums_by_kernel(heads: _Heads, labels: Tensor | None) -> tuple[Tensor, ...]:
    """The same sums by tiles, the parts of the vocabulary put together."""
    tensors, widths, constants = _common(heads, labels)
    tokens, words = len(heads.x), len(heads.w)
    tiles = cdiv(tokens, constants["BLOCK_M"])
    blocks = cdiv(words, constants["BLOCK_V"])
    parts = min(PARTS, blocks)
    of_part = cdiv(blocks, parts) * constants["BLOCK_V"]
    parts = cdiv(words, of_part)
    largest, total, other_largest, other_total, inner = (
        empty((parts, tokens), torch.float32, heads.x.device) for _ in range(5)
    )
    launch(
        _sums_kernel, (tiles * parts,),
        *tensors, largest, total, other_largest, other_total, inner,
        *(tokens, words, *widths, of_part, heads.scale * LOG2_E),
        **constants,
    )  # fmt: skip
    log = (largest / LOG2_E + total.log()).logsumexp(0)
    inner = inner / LOG2_E
    if heads.t is None:
        return log, log, inner.sum(0)
    other = other_largest / LOG2_E + other_total.log()
    log_other = other.logsumexp(0)
    shares = (other - log_other).exp()
    return log, log_other, (shares * (inner / other_total)).sum(0)


def _differences_by_kernel(
    heads: _Heads, labels: Tensor | None, logs: tuple[Tensor, Tensor], first: int, end: int
) -> Tensor:
    """The matrix d of some words, by the kernel."""
    u = None if heads.u is None else heads.u[first:end]
    some = _Heads(heads.x, heads.w[first:end], heads.t, u, heads.scale)
    tensors, widths, constants = _common(some, labels)
    tokens, words = len(heads.x), end - first
    out = empty((tokens, words), heads.x.dtype, heads.x.device)
    grid = cdiv(tokens, constants["BLOCK_M"]) * cdiv(words, constants["BLOCK_V"])
    launch(
        _differences_kernel, (grid,),
        *tensors, *(log * LOG2_E for log in logs), out,
        *(tokens, words, *widths, first, heads.scale * LOG2_E),
        heads.scale if constants["TEACHER"] else 1.0,
        **constants,
    )  # fmt: skip
    return out


class _Loss(torch.autograd.Function):
    """Losses of tokens, by either backend."""

    @staticmethod
    def forward(ctx, x, w, t, u, labels, counted, scale, chosen):
        heads = _Heads(*(z if z is None else z.contiguous() for z in (x, w, t, u)), scale)
        sums = _sums_in_chunks if chosen == "torch" else _sums_by_kernel
        log, log_other, inner = sums(heads, labels)
        ctx.save_for_backward(*(z for z in (*_parts(heads), labels, counted) if z is not None))
        ctx.has, ctx.scale, ctx.chosen = (t is not None, labels is not None), scale, chosen
        ctx.logs = log, log_other
        losses = log - log_other + inner if t is not None else log - inner
        return torch.where(counted, losses, 0).to(exact(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = list(ctx.saved_tensors)
        counted = saved.pop()
        labels = saved.pop() if ctx.has[1] else None
        heads = _Heads(*saved, *([] if ctx.has[0] else [None, None]), ctx.scale)
        find = _differences_in_torch if ctx.chosen == "torch" else _differences_by_kernel
        g = torch.where(counted, grad, 0)[:, None]
        # Gradients of a mean are too small for float16, their sums without it maybe too large.
        size = g.abs().amax() * len(g) ** 0.5 if len(g) else g.new_ones(())
        size = torch.where(size > 0, size, 1)
        x = (g / size * heads.x.to(g.dtype)).to(heads.x.dtype)
        dx = torch.zeros_like(heads.x, dtype=g.dtype)
        dw = torch.empty_like(heads.w)
        for first, end in heads.chunks():
            d = find(heads, labels, ctx.logs, first, end)
            dx += (d @ heads.w[first:end]).to(g.dtype)
            dw[first:end] = size * (d.T @ x).to(g.dtype)
        return (g * dx).to(heads.x.dtype), dw, None, None, None, None, None, None


def _parts(heads: _Heads) -> tuple[Tensor | None, ...]:
    return heads.x, heads.w, heads.t, heads.u


# ---------------------------------------------------------------- the ones to call


def _check_heads(x: Tensor, weight: Tensor, names: tuple[str, str]) -> None:
    if x.ndim != 2 or weight.ndim != 2 or not len(weight) or not weight.shape[1]:
        raise ValueError(
            f"{names[0]} has shape {tuple(x.shape)} and {names[1]} has {tuple(weight.shape)}; they "
            "must be (tokens, hidden) and (words, hidden), words and hidden not 0."
        )
    check_shape(names[0], x, (len(x), weight.shape[1]), f"{names[1]} of {tuple(weight.shape)}")
    if x.dtype != weight.dtype:
        raise TypeError(
            f"{names[0]} is of {short(x.dtype)} and {names[1]} of {short(weight.dtype)}; they must "
            "agree."
        )


def linear_cross_entropy(
    x: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "words hidden"],
    labels: Int64[Tensor, " tokens"],
    *,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Float[Tensor, " tokens"]:
    r"""The loss of each token, from hidden states and output weights.

    Args:
        x: Hidden states.
        weight: Weights of the output layer, a row for each word.
        labels: The right words.
        ignore_index: The label of tokens that do not count: their loss is 0, and so is its
            gradient.
        backend: "triton", "torch", or None for the kernels where they can run.

    Returns:
        Losses in nats, in float32 (float64 for float64), with gradients to x and to the weights.
        Their mean over what counts is what a model is trained with.

    Raises:
        ValueError: Shapes that do not fit each other, labels that are no words, or an unknown
            backend.
        TypeError: Numbers that are not floating-point or of different types, or labels that are
            not int64.
    """
    check_floats(x=x, weight=weight)
    _check_heads(x, weight, ("x", "weight"))
    ignore_index = check_whole("ignore_index", ignore_index)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels are of {short(labels.dtype)}; they must be int64.")
    check_shape("labels", labels, (len(x),), f"x of shape {tuple(x.shape)}")
    counted = labels != ignore_index
    if bool((counted & ((labels < 0) | (labels >= len(weight)))).any()):
        raise ValueError(
            f"a label is neither a word, 0 to {len(weight) - 1}, nor ignore_index, {ignore_index}."
        )
    chosen = choose(backend, x, weight, labels)
    labels = labels.contiguous()
    return _Loss.apply(x, weight, None, None, labels, counted, 1.0, chosen)


def linear_distillation(
    x: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "words hidden"],
    teacher: Float[Tensor, "tokens teacher_hidden"],
    teacher_weight: Float[Tensor, "words teacher_hidden"],
    *,
    temperature: float = 1.0,
    counted: Tensor | None = None,
    backend: str | None = None,
) -> Float[Tensor, " tokens"]:
    r"""The divergence of each token's distribution from a teacher's, from hidden states of both.

    Args:
        x: Hidden states of the student.
        weight: Its output weights, a row for each word.
        teacher: Hidden states of the teacher, which may have another width; no gradient leads
            there.
        teacher_weight: Its output weights, for the same words.
        temperature: $\tau$, by which both logits are divided. The loss is not multiplied by its
            square.
        counted: True at tokens that count; the loss of all others is 0.
        backend: "triton", "torch", or None for the kernels where they can run.

    Returns:
        $\mathrm{KL}(q_i \,\|\, p_i)$ in nats, in float32 (float64 for float64), with gradients to
        the student's states and weights.

    Raises:
        ValueError: Shapes that do not fit each other, a temperature that is not positive, or an
            unknown backend.
        TypeError: Numbers that are not floating-point or of different types, or `counted` that is
            not boolean.
    """
    check_floats(x=x, weight=weight, teacher=teacher, teacher_weight=teacher_weight)
    temperature = check_number("temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0.")
    _check_heads(x, weight, ("x", "weight"))
    _check_heads(teacher, teacher_weight, ("teacher", "teacher_weight"))
    shown = f"x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)}"
    check_shape("teacher", teacher, (len(x), teacher.shape[1]), shown)
    check_shape("teacher_weight", teacher_weight, (len(weight), teacher.shape[1]), shown)
    if teacher.dtype != x.dtype:
        raise TypeError(
            f"x is of {short(x.dtype)} and teacher of {short(teacher.dtype)}; they must agree."
        )
    if counted is None:
        counted = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if counted.dtype != torch.bool:
        raise TypeError(f"counted is of {short(counted.dtype)}; it must be bool.")
    check_shape("counted", counted, (len(x),), shown)
    chosen = choose(backend, x, weight, teacher, teacher_weight, counted)
    given = teacher.detach(), teacher_weight.detach()
    return _Loss.apply(x, weight, *given, None, counted, 1 / temperature, chosen)


# ---------------------------------------------------------------- for the compiler and the clock


def compile_cases() -> list[CompileCase]:
    """Both kernels, with labels and with a teacher: 8,192 tokens, 4,096 hidden, 128,256 words."""
    tokens, hidden, words = 8192, 4096, 128256
    found = []
    for kind, teacher in (("fp32", False), ("fp16", True), ("bf16", False), ("bf16", True)):
        dtype = KINDS[kind]
        settings = _settings(dtype, _tile(dtype))
        warps, stages = settings.pop("num_warps"), settings.pop("num_stages")
        block_m, block_v, block_h = (settings[f"BLOCK_{x}"] for x in "MVH")
        heads, size = 1 + teacher, dtype.itemsize
        types = dict.fromkeys("xwtu", f"*{kind}") | {"labels": "*i64", "out": f"*{kind}"}
        types |= dict.fromkeys(("log", "other_log", "largest", "total"), "*fp32")
        types |= dict.fromkeys(("other_largest", "other_total", "inner"), "*fp32")
        types |= dict.fromkeys(("tokens", "words", "words_of_part", "first"), "i32")
        types |= dict.fromkeys(("scale", "factor"), "fp32")
        constants = settings | {"TEACHER": teacher, "EVEN": True}
        constants |= {"hidden": hidden, "other_hidden": hidden}
        turns = hidden // block_h  # of the loop over hidden numbers
        for name, kernel in (("sums", _sums_kernel), ("differences", _differences_kernel)):
            sums = name == "sums"
            seen = words if sums else WORDS
            programs = cdiv(tokens, block_m) * (PARTS if sums else cdiv(seen, block_v))
            tiles = cdiv(seen, block_v * PARTS) if sums else 1
            work = Work(
                what=f"{tokens} tokens, {hidden} hidden, {seen} words" + " twice" * teacher,
                item="tile",
                items=1,
                turns=turns * tiles,
                programs=programs,
                fetched=(block_m + block_v) * block_h * size,
                bytes=heads * (tokens + seen) * hidden * size + (not sums) * tokens * seen * size,
                flops=2 * heads * tokens * hidden * seen,
                other_turns=turns * tiles * teacher,
            )
            title = f"linear_cross_entropy: {name} {kind}" + " teacher" * teacher
            found.append(
                CompileCase(
                    title, kernel, types, constants, mma=kind != "fp32", warps=warps,
                    stages=stages, work=work,
                )
            )  # fmt: skip
    return found


CANDIDATES = (
    Candidate((128, 128, 64, 8, 3), "64 logits in a thread; two turns of 32 KiB under way"),
    Candidate((128, 128, 64, 8, 2), "one turn under way: a teacher's tiles beside them fit twice"),
    Candidate((64, 128, 64, 4, 3), "64 logits in a thread of half as many: two programs fit"),
    Candidate((128, 128, 32, 8, 4), "shorter turns: three of 16 KiB under way in as much memory"),
)
"""Tokens, words and hidden numbers of a tile, warps, and stages."""


def tune_cases(*, small: bool = False) -> list[TuneCase]:
    """The last layer of a model of 8 billion parameters, and of one of 135 million."""
    shapes = [(40, 32, 70)] if small else [(8192, 4096, 128256), (8192, 576, 49152)]
    return [_tune_case(*shape, small=small) for shape in shapes]


def _tune_case(tokens: int, hidden: int, words: int, *, small: bool) -> TuneCase:
    dtype = torch.float16 if small else torch.bfloat16

    def make(device: torch.device, numbers: Numbers) -> Callable[[], Tensor]:
        x, w = drawn(device, dtype, (tokens, hidden), (words, hidden))
        labels = torch.arange(tokens, device=device) % words
        heads = _Heads(x, w, None, None, 1.0)
        return cut("linear_cross_entropy", numbers, lambda: _sums_by_kernel(heads, labels)[0])

    key = key_of(dtype, tokens=tokens, hidden=hidden)
    return TuneCase("linear_cross_entropy", key, _tile(dtype), CANDIDATES, make)


def bench_cases(*, small: bool = False) -> list[BenchCase]:
    """The last layer of a model of 8 billion parameters, and of one of 135 million."""
    shapes = [(40, 32, 70)] if small else [(8192, 4096, 128256), (8192, 576, 49152)]
    return [_bench_case(*shape, backward=both) for shape in shapes for both in (False, True)]


def _bench_case(tokens: int, hidden: int, words: int, *, backward: bool) -> BenchCase:
    def make(device: torch.device) -> dict[str, Runner]:
        dtype = torch.bfloat16
        x = torch.randn(tokens, hidden, device=device, dtype=dtype)
        w = (torch.randn(words, hidden, device=device) / hidden**0.5).to(dtype)
        labels = torch.randint(words, (tokens,), device=device)
        inputs = [z.requires_grad_(backward) for z in (x, w)]

        def timed(losses) -> Runner:
            if not backward:
                return losses
            return lambda: torch.autograd.grad(losses().mean(), inputs)

        def liger() -> Tensor:
            from liger_kernel.ops.fused_linear_cross_entropy import (
                LigerFusedLinearCrossEntropyFunction,
            )

            mean = LigerFusedLinearCrossEntropyFunction.apply(x, w, labels)
            return mean[0] if isinstance(mean, tuple) else mean

        plain = absent("liger_kernel")
        if not plain:
            plain = "It gives the mean alone." if not backward else timed(liger)

        def exactly():
            wide = [z.detach().double().requires_grad_(backward) for z in (x, w)]
            losses = linear_cross_entropy(*wide, labels, backend="torch")
            return torch.autograd.grad(losses.mean(), wide) if backward else losses

        how = pinned(device)
        return {
            EXACT: exactly,
            "ours": timed(lambda: linear_cross_entropy(x, w, labels, backend=how)),
            "torch, a thousand words at a time": timed(
                lambda: linear_cross_entropy(x, w, labels, backend="torch")
            ),
            "torch, all logits": timed(lambda: linear_cross_entropy_reference(x, w, labels)),
            "Liger": plain,
        }

    size = (tokens + words) * hidden * 2 * (3 if backward else 1)
    flops = (8 if backward else 2) * tokens * hidden * words
    shape = f"M={tokens} H={hidden} V={words}" + " with backward" * backward
    return BenchCase("linear_cross_entropy", shape, torch.bfloat16, size, flops, make)
