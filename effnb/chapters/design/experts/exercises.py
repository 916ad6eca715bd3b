"""The exercises of the chapter on experts: references, cases, and mistakes with diagnoses."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from effnb.lab import Exercise


def seats_for(tokens: int, experts: int, k: int, factor: float) -> int:
    r"""$\lfloor k f T / E \rfloor$."""
    return math.floor(k * factor * tokens / experts)


seats = Exercise(
    "Seats of an expert",
    minutes=5,
    difficulty="easy",
    reference=seats_for,
    cases=[(512, 8, 1, 1.25), (100, 8, 1, 1.0), (64, 4, 2, 1.5), (96, 16, 2, 1.1)],
    wrong={
        "Each token makes k choices, and each needs a seat": (
            lambda tokens, experts, k, factor: math.floor(factor * tokens / experts)
        ),
        "Round down, as the authors' code does": (
            lambda tokens, experts, k, factor: math.ceil(k * factor * tokens / experts)
        ),
        "The factor multiplies the fair share: a factor above 1 leaves spare seats": (
            lambda tokens, experts, k, factor: math.floor(k * tokens / experts / factor)
        ),
        "The seats are shared by all experts: divide by their number": (
            lambda tokens, experts, k, factor: math.floor(k * factor * tokens)
        ),
    },
)


def balance_of(p: Float[Tensor, "tokens experts"]) -> Float[Tensor, ""]:
    r"""$E \sum_e f_e P_e$ of a top-1 router."""
    count = p.shape[1]
    f = torch.nn.functional.one_hot(p.argmax(1), count).to(p.dtype).mean(0)
    return count * (f * p.mean(0)).sum()


def _without_count(p: Float[Tensor, "tokens experts"]) -> Float[Tensor, ""]:
    return balance_of(p) / p.shape[1]


def _squares(p: Float[Tensor, "tokens experts"]) -> Float[Tensor, ""]:
    return p.shape[1] * p.mean(0).square().sum()


def _choices_only(p: Float[Tensor, "tokens experts"]) -> Float[Tensor, ""]:
    f = torch.nn.functional.one_hot(p.argmax(1), p.shape[1]).to(p.dtype).mean(0)
    return p.shape[1] * f.square().sum()


def _token_by_token(p: Float[Tensor, "tokens experts"]) -> Float[Tensor, ""]:
    return p.shape[1] * p.amax(1).mean()


_draw = torch.Generator().manual_seed(5)

balance = Exercise(
    "The loss for balance",
    minutes=10,
    difficulty="medium",
    reference=balance_of,
    cases=[
        (torch.randn(12, 4, generator=_draw).mul(2).softmax(1),),
        (torch.randn(9, 3, generator=_draw).mul(2).softmax(1),),
        (torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]]),),
    ],
    wrong={
        "Multiply by the number of experts: balance then gives 1, whatever their number": (
            _without_count
        ),
        "f counts choices: it is the part of the tokens whose largest probability is e": _squares,
        "P is the mean probability; choices alone would have no gradient": _choices_only,
        "Take both means over the tokens first, and multiply then": _token_by_token,
    },
    atol=1e-5,
)


def choose_tokens(S: Float[Tensor, "tokens experts"], c: int) -> Int[Tensor, "experts seats"]:
    """Each expert's c tokens, in ascending order."""
    return S.topk(c, dim=0).indices.T.sort(dim=1).values


def _best_experts(S: Float[Tensor, "tokens experts"], c: int) -> Int[Tensor, "experts seats"]:
    return S.topk(min(c, S.shape[1]), dim=1).indices.sort(dim=1).values


def _smallest(S: Float[Tensor, "tokens experts"], c: int) -> Int[Tensor, "experts seats"]:
    return (-S).topk(c, dim=0).indices.T.sort(dim=1).values


def _first_come(S: Float[Tensor, "tokens experts"], c: int) -> Int[Tensor, "experts seats"]:
    return torch.arange(c).expand(S.shape[1], c)


choice = Exercise(
    "Experts choose tokens",
    minutes=10,
    difficulty="medium",
    reference=choose_tokens,
    cases=[
        (torch.randn(8, 3, generator=_draw).softmax(1), 3),
        (torch.randn(6, 2, generator=_draw).softmax(1), 2),
    ],
    wrong={
        "These are the experts of each token; go down the columns": _best_experts,
        "An expert takes the largest entries of its column": _smallest,
        "No token comes first: an expert looks at all of them": _first_come,
    },
)
