"""The exercises of the chapter on retrieval: references, cases, and mistakes with diagnoses."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from effnb.lab import Exercise

_draw = torch.Generator().manual_seed(8)


def from_neighbours(
    distances: Float[Tensor, " k"], values: Int[Tensor, " k"], vocabulary: int, tau: float
) -> Float[Tensor, " vocabulary"]:
    """Probability of every token by the neighbours."""
    weights = (-distances / tau).softmax(0)
    return torch.zeros(vocabulary).index_add(0, values, weights)


def _over_vocabulary(distances: Tensor, values: Tensor, vocabulary: int, tau: float) -> Tensor:
    scores = torch.zeros(vocabulary).index_add(0, values, (-distances / tau).exp())
    return scores.softmax(0)


def _last_wins(distances: Tensor, values: Tensor, vocabulary: int, tau: float) -> Tensor:
    p = torch.zeros(vocabulary)
    for w, v in zip((-distances / tau).softmax(0), values.tolist()):
        p[v] = w
    return p


neighbours = Exercise(
    "What the neighbours say",
    minutes=10,
    difficulty="easy",
    reference=from_neighbours,
    cases=[
        (torch.tensor([0.0, 1.0, 1.0]), torch.tensor([2, 0, 2]), 4, 1.0),
        (3 * torch.rand(6, generator=_draw), torch.tensor([1, 1, 3, 0, 3, 1]), 5, 2.5),
        (torch.tensor([400.0, 401.0]), torch.tensor([0, 1]), 2, 1.0),
    ],
    wrong={
        "Nearer neighbours must count more: the distance enters with a minus sign": (
            lambda d, v, n, tau: from_neighbours(-d, v, n, tau)
        ),
        "The temperature divides the distances": (
            lambda d, v, n, tau: from_neighbours(d, v, n, 1 / tau)
        ),
        "The softmax runs over the neighbours; a token that no neighbour has gets 0": (
            _over_vocabulary
        ),
        "Neighbours with the same token add up; one must not overwrite another": _last_wins,
        "The distances are squared already": (
            lambda d, v, n, tau: from_neighbours(d.square(), v, n, tau)
        ),
    },
    atol=1e-6,
)


def mixed(log_lm: float, log_knn: float, lam: float) -> float:
    """The logarithm of the mixture, from logarithms, without underflow."""
    if lam == 0 or log_knn == -math.inf:
        return log_lm + (math.log1p(-lam) if lam < 1 else -math.inf)
    if lam == 1:
        return log_knn
    a, b = math.log(lam) + log_knn, math.log1p(-lam) + log_lm
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))


mixing = Exercise(
    "Mix in logarithms",
    minutes=10,
    difficulty="medium",
    reference=mixed,
    cases=[
        (math.log(0.2), math.log(0.5), 0.25),
        (math.log(0.2), -math.inf, 0.25),
        (-900.0, -901.0, 0.5),
        (-1.0, -2.0, 0.0),
    ],
    wrong={
        "The share λ belongs to the neighbours, 1 − λ to the decoder": (
            lambda lm, knn, lam: mixed(lm, knn, 1 - lam) if knn > -math.inf else -math.inf
        ),
        "Mix the probabilities; this mixes their logarithms": (
            lambda lm, knn, lam: lam * knn + (1 - lam) * lm if lam else lm
        ),
        "exp of a large negative number is 0: stay in logarithms": (
            lambda lm, knn, lam: (
                math.log(p)
                if (p := lam * math.exp(knn) + (1 - lam) * math.exp(lm)) > 0
                else -math.inf
            )
        ),
    },
    atol=1e-6,
)


def reads_chunk(token: int, m: int) -> int:
    """The chunk whose neighbours a token reads; -1 for none."""
    return (token + 1) // m - 1


alignment = Exercise(
    "Which neighbours may a token read?",
    minutes=10,
    difficulty="hard",
    reference=reads_chunk,
    cases=[*((t, 4) for t in (0, 2, 3, 6, 7, 10, 15)), (63, 64), (62, 64), (0, 1)],
    wrong={
        "That leaks: the neighbours of a chunk were found with all of its tokens, so that only "
        "its last may read them": lambda t, m: t // m,
        "That is causal, but wastes the last token of each chunk, which sees the whole chunk": (
            lambda t, m: t // m - 1
        ),
        "Tokens are counted from 0: the last of the first chunk is m − 1": (
            lambda t, m: (t + 2) // m - 1
        ),
    },
)
