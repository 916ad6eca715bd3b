"""The exercises of the chapter on pruning: references, cases, and mistakes with diagnoses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.lab import Exercise


def bytes_of(n: int, kept: int, bits: int) -> float:
    """A flag of one bit for each number, and the numbers that are kept."""
    return (n + kept * bits) / 8


storage = Exercise(
    "What a bitmap takes",
    minutes=5,
    difficulty="easy",
    reference=bytes_of,
    cases=[(1024, 512, 16), (4096, 400, 8), (64, 64, 16)],
    wrong={
        "The places are missing: a flag of one bit says of each number whether it is kept": (
            lambda n, kept, bits: kept * bits / 8
        ),
        "These are bits; a byte has eight": lambda n, kept, bits: float(n + kept * bits),
        "Every number has a flag, not only those that are kept": (
            lambda n, kept, bits: (kept + kept * bits) / 8
        ),
        "A flag takes one bit, not as many as a number": (
            lambda n, kept, bits: (n * bits + kept * bits) / 8
        ),
    },
)


def lowest_of_rows(score: Float[Tensor, "out in"], sparsity: float) -> Float[Tensor, "out in"]:
    """Zeros at the lowest scores of each row, ones elsewhere."""
    k = int(score.shape[1] * sparsity)
    return torch.ones_like(score).scatter(1, score.argsort(1)[:, :k], 0.0)


def lowest_of_all(score: Float[Tensor, "out in"], sparsity: float) -> Float[Tensor, "out in"]:
    """Zeros at the lowest scores of the whole matrix: a mistake of the second exercise."""
    return lowest_of_rows(score.view(1, -1), sparsity).view(score.shape)


def mask_of(
    weight: Float[Tensor, "out in"], inputs: Float[Tensor, "tokens in"], sparsity: float
) -> Float[Tensor, "out in"]:
    """Score by magnitude times the norm of the input, and cut the lowest of each row."""
    score = weight.abs() * inputs.norm(dim=0)
    k = int(score.shape[1] * sparsity)
    return torch.ones_like(score).scatter(1, score.argsort(1)[:, :k], 0.0)


_W = torch.tensor([[0.9, -0.5, 0.4, 0.1], [1.5, 1.0, -9.0, 5.0]])
_X = torch.tensor([[0.1, 1.0, -2.0, 0.5], [-0.1, 2.0, 1.0, 3.0], [0.2, -1.0, 0.5, 2.0]])

wanda = Exercise(
    "Wanda's mask",
    minutes=10,
    difficulty="medium",
    reference=mask_of,
    cases=[(_W, _X, 0.5), (_W * torch.tensor([1.0, 3.0, -0.2, 4.0]), _X, 0.25)],
    wrong={
        "This is magnitude: the inputs do not enter": (
            lambda w, x, sparsity: lowest_of_rows(w.abs(), sparsity)
        ),
        "Scores compete within each row, not in the whole layer": (
            lambda w, x, sparsity: lowest_of_all(w.abs() * x.norm(dim=0), sparsity)
        ),
        "Take the magnitude of the weight: a large negative one matters too": (
            lambda w, x, sparsity: lowest_of_rows(w * x.norm(dim=0), sparsity)
        ),
        "The mask is turned round: 1 keeps a weight, and the largest scores are kept": (
            lambda w, x, sparsity: 1 - lowest_of_rows(w.abs() * x.norm(dim=0), sparsity)
        ),
    },
)


def operate(
    w: Float[Tensor, " in"], hessian: Float[Tensor, "in in"], q: int
) -> Float[Tensor, " in"]:
    r"""$w - \frac{w_q}{[H^{-1}]_{qq}} H^{-1} e_q$."""
    inverse = torch.linalg.inv(hessian)
    return w - w[q] / inverse[q, q] * inverse[:, q]


_H = torch.tensor([[2.0, 1.2, 0.2], [1.2, 3.0, -0.4], [0.2, -0.4, 1.0]])

surgery = Exercise(
    "Optimal Brain Surgery",
    minutes=15,
    difficulty="hard",
    reference=operate,
    cases=[(torch.tensor([0.7, -0.4, 0.9]), _H, 1), (torch.tensor([1.5, 0.3, -0.8]), _H, 0)],
    wrong={
        "The others do not move: that is pruning without surgery": (
            lambda w, h, q: w * (torch.arange(len(w)) != q)
        ),
        "This takes H itself; the price and the direction come from its inverse": (
            lambda w, h, q: w - w[q] / h[q, q] * h[:, q]
        ),
        "Divide by the inverse's entry at (q, q), or weight q does not become zero": (
            lambda w, h, q: w - w[q] * torch.linalg.inv(h)[:, q]
        ),
        "The sign is turned: the change is subtracted": (
            lambda w, h, q: w + w[q] / torch.linalg.inv(h)[q, q] * torch.linalg.inv(h)[:, q]
        ),
    },
    atol=1e-4,
)


def scores_of(
    weights: Sequence[Float[Tensor, " n"]], gradients: Sequence[Float[Tensor, " n"]], rate: float
) -> Float[Tensor, " n"]:
    r"""$S = -\alpha \sum_t \frac{\partial L}{\partial W'_t} \odot W_t$."""
    score = torch.zeros_like(weights[0])
    for weight, gradient in zip(weights, gradients, strict=True):
        score = score - rate * gradient * weight
    return score


_STEPS = [torch.tensor([1.0, -0.5, 0.2]), torch.tensor([0.8, -0.7, 0.1])]
_SLOPES = [torch.tensor([2.0, 2.0, -1.0]), torch.tensor([1.0, 3.0, 0.5])]

movement = Exercise(
    "Scores of movement",
    minutes=10,
    difficulty="medium",
    reference=scores_of,
    cases=[(_STEPS, _SLOPES, 0.1), (_STEPS[::-1], _SLOPES, 1.0)],
    wrong={
        "The sign is turned: descent raises a score when its gradient is negative": (
            lambda weights, gradients, rate: (
                rate * sum(g * w for g, w in zip(gradients, weights, strict=True))
            )
        ),
        "This sums magnitudes, as Taylor does; movement keeps the sign": (
            lambda weights, gradients, rate: (
                -rate * sum((g * w).abs() for g, w in zip(gradients, weights, strict=True))
            )
        ),
        "Each step counts with the weights of that step, not with the first ones": (
            lambda weights, gradients, rate: -rate * sum(gradients) * weights[0]
        ),
        "Scores add up over all steps; this is the last one alone": (
            lambda weights, gradients, rate: -rate * gradients[-1] * weights[-1]
        ),
        "The gradient with respect to a score is that of the weight times the weight itself": (
            lambda weights, gradients, rate: -rate * sum(gradients)
        ),
    },
)
