r"""Retention: attention without a softmax, whose weights decay with distance, in three equal forms.

Queries and keys are turned by their positions, $\hat q_n = q_n e^{i n \theta}$ and likewise
$\hat k_m$, so that their products depend on $n - m$ only. With a decay $\gamma$ per head,
$s = 1 / \sqrt{d_k}$, and $D_{nm} = \gamma^{n-m}$ for $n \ge m$, else 0:

$$O = s\,(\hat Q \hat K^\top \odot D)\, V \tag{parallel}$$

$$S_n = \gamma S_{n-1} + \hat k_n^\top v_n, \qquad o_n = s\,\hat q_n S_n \tag{recurrent}$$

and chunkwise, which is parallel within chunks and recurrent between them. The arithmetic of all
three is `effnb.kernels.retention`; powers of $\gamma$ are taken of differences, because
$\gamma^n \gamma^{-m}$ overflows. This module adds what the paper says of decays and positions, and
its normalizations of the scores.

**Normalized scores.** For the range of 16-bit numbers, the paper divides each row of scores by a
positive number: (2) $\tilde D_{nm} = D_{nm} / \sqrt{\rho_n}$ with $\rho_n = \sum_i D_{ni}$, and
(3) $\tilde R_{nm} = R_{nm} / \max(|\sum_i R_{ni}|, 1)$. The group norm that follows removes any
factor of a row, so this should change nothing. But the published recurrent form leaves out (3), the
published chunkwise form divides by something else, and a norm with an $\epsilon$ removes factors
only from outputs that are large compared with $\sqrt\epsilon$. Where outputs are small, as at the
start of training, the three forms then disagree. `normalize` divides as the published code does, so
that this can be seen. Without it the forms are equal.

Sun, Dong, Huang, Ma, Xia, Xue, Wang, Wei, "Retentive Network: A Successor to Transformer for Large
Language Models", 2023, arXiv 2307.08621.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.design.retention.precision import no_autocast, wide
from effnb.kernels.retention import (
    CHUNK_SIZES,
    retention_chunkwise,
    retention_parallel,
    retention_recurrent,
    retention_step,
)
from effnb.kernels.retention import retention as chunkwise_kernel
from effnb.kernels.rope import rope

FORMS = ("chunkwise", "parallel", "recurrent")
NORMALIZATIONS = (None, "paper", "absolute")
MOST = 5e4
"""The largest divisor of a row of scores in the published code."""
NORMALIZED_CHUNK = 64
"""Tokens of a chunk where chunks have factors of their own: there a size changes the result."""


def decays(heads: int, kind: str | float = "paper") -> Float[Tensor, " heads"]:
    r"""$\gamma_h$ of each head, in float64: how much of its state it keeps per token.

    Args:
        heads: Number of heads $H$.
        kind: "paper" for $1 - 2^{-5-h}$, which remembers $1 / (1 - \gamma_h) = 32, 64, 128, \dots$
            tokens; "lm" for the range of the paper's language models,
            $1 - \exp(\operatorname{linspace}(\ln \frac1{32}, \ln \frac1{512}, H))$; or a number
            in (0, 1], the same for all heads.

    Raises:
        ValueError: No head, an unknown kind, or a number outside (0, 1].
    """
    if heads < 1:
        raise ValueError(f"heads is {heads}; it must be at least 1.")
    if isinstance(kind, int | float):
        if not 0 < kind <= 1:
            raise ValueError(f"the decay is {kind}; it must be above 0 and at most 1.")
        return torch.full((heads,), float(kind), dtype=torch.float64)
    if kind == "paper":
        return 1 - torch.exp2(-5 - torch.arange(heads, dtype=torch.float64))
    if kind == "lm":
        ends = math.log(1 / 32), math.log(1 / 512)
        return 1 - torch.exp(torch.linspace(*ends, heads, dtype=torch.float64))
    raise ValueError(f'the decay is {kind!r}; choose "paper", "lm" or a number in (0, 1].')


def rotation_frequencies(dim: int, kind: str = "retnet") -> Float[Tensor, " half"]:
    r"""$\theta_i$ of each pair of a head, in float64 radians per token.

    Args:
        dim: Numbers of a query or key, $d_k$.
        kind: "retnet" for the published code's $10000^{-i / (d_k/2 - 1)}$, whose last one is
            $10^{-4}$; "rope" for $10000^{-2i / d_k}$.

    Raises:
        ValueError: An odd or empty head, or an unknown kind.
    """
    if dim < 2 or dim % 2:
        raise ValueError(
            f"a head has {dim} numbers for queries and keys; the rotation turns pairs, so it must "
            "be an even number above 0."
        )
    half = dim // 2
    if kind == "retnet":
        return 10000.0 ** -torch.linspace(0, 1, half, dtype=torch.float64)
    if kind == "rope":
        return 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    raise ValueError(f'the rotation is {kind!r}; choose "retnet" or "rope".')


def rotate(
    q: Float[Tensor, "batch heads time dim"],
    k: Float[Tensor, "batch heads time dim"],
    start: int = 0,
    kind: str = "retnet",
) -> tuple[Float[Tensor, "batch heads time dim"], Float[Tensor, "batch heads time dim"]]:
    r"""Turn the pairs $(2i, 2i+1)$ of queries and keys by $n\theta_i$.

    Args:
        q: Queries.
        k: Keys.
        start: Position of the first token in the whole text; positions are global, also in chunks
            and in decoding.
        kind: See `rotation_frequencies`, also for what is raised.
    """
    frequencies = rotation_frequencies(q.shape[-1], kind)
    frequencies = frequencies.to(q.device, wide(q))
    positions = torch.arange(start, start + q.shape[2], device=q.device)
    return rope(q, k, frequencies, positions, interleaved=True)


def retention(
    q: Float[Tensor, "batch heads time dim_k"],
    k: Float[Tensor, "batch heads time dim_k"],
    v: Float[Tensor, "batch heads time dim_v"],
    gamma: Float[Tensor, " heads"],
    *,
    form: str = "chunkwise",
    chunk_size: int | None = None,
    initial_state: Float[Tensor, "batch heads dim_k dim_v"] | None = None,
    normalize: str | None = None,
    seen: int = 0,
) -> tuple[Float[Tensor, "batch heads time dim_v"], Float[Tensor, "batch heads dim_k dim_v"]]:
    r"""Retention of all heads, in the form that is asked for.

    Args:
        q: Queries, already turned (`rotate`) where the layer turns them.
        k: Keys, likewise.
        v: Values.
        gamma: Decay of each head, see `decays`.
        form: "parallel" ($T^2$ work, all tokens at once), "recurrent" (token by token) or
            "chunkwise".
        chunk_size: Tokens of a chunk, for the chunkwise form; the last chunk is as short as it is.
            Any number from 1 is allowed: one larger than the text makes it the parallel form. On a
            GPU, the kernel takes 16, 32, 64 and 128. None is the kernel's own choice for the type,
            and `NORMALIZED_CHUNK` where chunks have factors of their own.
        initial_state: $S$ before the first token; zeros by default.
        normalize: None for the plain forms, which are equal; "paper" for (2) and (3) as published,
            "absolute" with $\sum_i |R_{ni}|$, between 1 and $5 \cdot 10^4$, in (3). The recurrent
            form has (2) only, and the chunkwise form the factors of its chunks.
        seen: How many tokens went into the initial state; (2) of the recurrent form counts them.

    Returns:
        Outputs, and the state after the last token, which no normalization changes: any form can
        go on from the state of any other.

    Raises:
        ValueError: Shapes that do not fit each other, a decay outside (0, 1], an unknown form or
            normalization, or a chunk of less than one token.
    """
    _check(q, k, v, gamma, form, chunk_size, initial_state, normalize, seen)
    gamma = gamma.to(q.device, wide(q))
    with no_autocast(q):
        if normalize is not None:
            return _normalized(q, k, v, gamma, form, chunk_size, initial_state, normalize, seen)
        return _plain(q, k, v, gamma, form, chunk_size, initial_state)


def _plain(q, k, v, gamma, form, chunk_size, state):
    """The forms of the kernels' module, with its kernels where they take the sizes."""
    if form == "parallel":
        return retention_parallel(q, k, v, gamma, initial_state=state)
    if form == "chunkwise":
        own = chunk_size is None or chunk_size in CHUNK_SIZES
        chunkwise = chunkwise_kernel if own else retention_chunkwise
        return chunkwise(q, k, v, gamma, initial_state=state, chunk_size=chunk_size)
    if q.shape[2] == 1 and state is not None:  # a step of decoding
        out, state = retention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], gamma, state)
        return out[:, :, None], state
    return retention_recurrent(q, k, v, gamma, initial_state=state)


def row_sums(
    gamma: Float[Tensor, " heads"], tokens: int, seen: int = 0
) -> Float[Tensor, "heads time"]:
    r"""$\rho_n = \sum_{j=0}^{n} \gamma^j$ in closed form, from token `seen` on."""
    n = torch.arange(seen + 1, seen + tokens + 1, device=gamma.device, dtype=gamma.dtype)
    gamma = gamma[:, None]
    # (1 − γⁿ⁺¹) / (1 − γ), by expm1 because 1 − γⁿ loses all digits where γ is close to 1
    sums = -torch.expm1(n * gamma.log()) / (1 - gamma)
    return torch.where(gamma == 1, n, sums)


def _normalized(q, k, v, gamma, form, chunk_size, state, normalize, seen):
    """The plain forms, each row divided by the factor that this form gives it."""
    tokens = q.shape[2]
    if form == "recurrent":
        out, state = retention_recurrent(q, k, v, gamma, initial_state=state)
        return _divided(out, row_sums(gamma, tokens, seen).sqrt()), state
    if form == "parallel":
        out, state = retention_parallel(q, k, v, gamma, initial_state=state)
        root = row_sums(gamma, tokens, seen).sqrt()  # D̃ = D / sqrt(ρ)
        return _divided(out, root * _row_divisor(q, k, gamma, root, normalize)), state
    chunk_size = NORMALIZED_CHUNK if chunk_size is None else chunk_size
    outputs, kind = [], wide(q)
    root = row_sums(gamma, min(chunk_size, tokens)).sqrt()  # rows count from their chunk's start
    whole = row_sums(gamma, chunk_size)[:, -1, None, None]
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=kind)
    for start in range(0, tokens, chunk_size):
        part = slice(start, start + chunk_size)
        queries, keys, values = q[:, :, part], k[:, :, part], v[:, :, part]
        length = queries.shape[2]
        inner = _row_divisor(queries, keys, gamma, root[:, :length], "absolute", math.inf)
        # Of the state, the largest sum over d_k of absolute values, beside that of a whole chunk
        cross = (state.detach() / whole).abs().sum(-2).amax(-1, keepdim=True).clamp(min=1)
        out, state = retention_parallel(queries, keys, values, gamma, initial_state=state)
        outputs.append(_divided(out, root[:, :length] * torch.maximum(inner, cross)))
    return torch.cat(outputs, dim=2), state


def _divided(out: Tensor, divisor: Tensor) -> Tensor:
    return (out.to(divisor.dtype) / divisor[..., None]).to(out.dtype)


def _row_divisor(q, k, gamma, root, normalize, most=MOST) -> Float[Tensor, "batch heads time"]:
    """What (3) divides each row of scores by; no gradient flows through it, as published."""
    q, k = q.detach().to(gamma.dtype), k.detach().to(gamma.dtype)
    index = torch.arange(q.shape[2], device=q.device)
    distance = index[:, None] - index
    D = torch.exp(gamma.log()[:, None, None] * distance.clamp(min=0)).tril()
    R = q.shape[-1] ** -0.5 * (q @ k.mT) * (D / root[..., None])
    if normalize == "paper":
        return R.sum(-1).abs().clamp(min=1)
    return R.abs().sum(-1).clamp(min=1, max=most)


def _check(q, k, v, gamma, form, chunk_size, state, normalize, seen) -> None:
    if form not in FORMS:
        raise ValueError(f"the form is {form!r}; choose {', '.join(FORMS)}.")
    if normalize not in NORMALIZATIONS:
        raise ValueError(f'normalize is {normalize!r}; choose "paper", "absolute" or None.')
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; a chunk must have at least 1 token.")
    if seen < 0:
        raise ValueError(f"seen is {seen}; it must be at least 0.")
    heads = (*q.shape[:2], q.shape[-1], v.shape[-1])
    if k.shape != q.shape or v.shape[:-1] != q.shape[:-1] or gamma.shape != q.shape[1:2]:
        raise ValueError(
            f"q, k, v and gamma have the shapes {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)} and {tuple(gamma.shape)}; they must be (batch, heads, time, dim_k) "
            "twice, (batch, heads, time, dim_v) and (heads,)."
        )
    if state is not None and tuple(state.shape) != heads:
        raise ValueError(
            f"the state has shape {tuple(state.shape)}; for this q and v it is {heads}."
        )
    if gamma.device.type == "cpu" and not bool(((gamma > 0) & (gamma <= 1)).all()):
        raise ValueError(
            "gamma must be above 0 and at most 1: it is what a token keeps of the past."
        )
