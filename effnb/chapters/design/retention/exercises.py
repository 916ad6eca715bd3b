"""The exercises of the chapter on retention: references, cases, and mistakes with diagnoses."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.lab import Exercise


def decay_matrix(gamma: float, tokens: int) -> Float[Tensor, "tokens tokens"]:
    r"""$D_{nm} = \gamma^{n-m}$ for $n \ge m$, else 0."""
    index = torch.arange(tokens)
    distance = index[:, None] - index
    return torch.where(distance >= 0, gamma ** distance.clamp(min=0), 0.0)


def _with_future(gamma: float, tokens: int) -> Tensor:
    index = torch.arange(tokens)
    return gamma ** (index[:, None] - index).abs()


def _two_powers(gamma: float, tokens: int) -> Tensor:
    index = torch.arange(tokens, dtype=torch.float32)
    return (gamma ** index[:, None] * gamma**-index).tril()


decay = Exercise(
    "The decay matrix",
    minutes=5,
    difficulty="easy",
    reference=decay_matrix,
    cases=[(0.5, 4), (0.9, 3), (1.0, 3), (0.75, 1200)],
    wrong={
        "A token must not see the future: entries above the diagonal are 0": _with_future,
        "The transpose: n counts rows, and rows are the tokens that look": (
            lambda gamma, tokens: decay_matrix(gamma, tokens).T
        ),
        "The present token has the weight 1: the power is n - m, not n - m + 1": (
            lambda gamma, tokens: gamma * decay_matrix(gamma, tokens)
        ),
        "Take the power of the difference: γ^n is 0 far from the start and γ^-m infinite": (
            _two_powers
        ),
    },
)


def one_token(
    S: Float[Tensor, "dk dv"],
    q: Float[Tensor, " dk"],
    k: Float[Tensor, " dk"],
    v: Float[Tensor, " dv"],
    gamma: float,
) -> tuple[Float[Tensor, " dv"], Float[Tensor, "dk dv"]]:
    r"""$S \leftarrow \gamma S + k^\top v$, then $o = q S / \sqrt{d_k}$."""
    S = gamma * S + k[:, None] * v
    return q @ S / len(q) ** 0.5, S


def _read_first(S, q, k, v, gamma):
    return q @ (gamma * S) / len(q) ** 0.5, gamma * S + k[:, None] * v


def _decay_all(S, q, k, v, gamma):
    S = gamma * (S + k[:, None] * v)
    return q @ S / len(q) ** 0.5, S


def _unscaled(S, q, k, v, gamma):
    out, S = one_token(S, q, k, v, gamma)
    return out * len(q) ** 0.5, S


_draw = torch.Generator().manual_seed(5)


def _case(dk: int, dv: int, gamma: float) -> tuple:
    shapes = ((dk, dv), (dk,), (dk,), (dv,))
    return (*(torch.randn(shape, generator=_draw) for shape in shapes), gamma)


step = Exercise(
    "One token of the recurrent form",
    minutes=10,
    difficulty="medium",
    reference=one_token,
    cases=[_case(4, 6, 0.9), _case(2, 3, 0.5)],
    wrong={
        "The token does not see itself: take it into the state before you read": _read_first,
        "Only the past decays: the new product is added as it is": _decay_all,
        "The scale is missing: divide by the square root of the number of q's entries": _unscaled,
    },
    atol=1e-5,
)


def next_state(
    S: Float[Tensor, "dk dv"],
    k: Float[Tensor, "length dk"],
    v: Float[Tensor, "length dv"],
    gamma: float,
) -> Float[Tensor, "dk dv"]:
    r"""$\gamma^L S + \sum_i \gamma^{L-1-i} k_i^\top v_i$."""
    length = len(k)
    left = gamma ** torch.arange(length - 1, -1, -1)
    return gamma**length * S + (left[:, None] * k).T @ v


def _forwards(S, k, v, gamma):
    left = gamma ** torch.arange(len(k))
    return gamma ** len(k) * S + (left[:, None] * k).T @ v


def _once(S, k, v, gamma):
    left = gamma ** torch.arange(len(k) - 1, -1, -1)
    return gamma * S + (left[:, None] * k).T @ v


def _chunk(length: int, gamma: float) -> tuple:
    shapes = ((3, 4), (length, 3), (length, 4))
    return (*(torch.randn(shape, generator=_draw) for shape in shapes), gamma)


chunk = Exercise(
    "The state after a chunk",
    minutes=15,
    difficulty="hard",
    reference=next_state,
    cases=[_chunk(5, 0.8), _chunk(1, 0.5), _chunk(7, 0.95)],
    wrong={
        "The first token of the chunk has decayed most: count the tokens behind each": _forwards,
        "The old state decays once for every token of the chunk": _once,
        "The tokens of the chunk decay too": lambda S, k, v, gamma: gamma ** len(k) * S + k.T @ v,
    },
    atol=1e-5,
)
