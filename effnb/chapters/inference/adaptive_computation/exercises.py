"""The exercises of the chapter on adaptive computation: references, cases, diagnosed mistakes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.lab import Exercise


def exit_of(logits: Float[Tensor, "layers vocabulary"], threshold: float) -> int:
    r"""The first layer with $p_{(1)} - p_{(2)} \ge \lambda$, counted from 1; else the last."""
    top = logits.softmax(-1).topk(2, -1).values
    for layer, lead in enumerate((top[:, 0] - top[:, 1]).tolist(), 1):
        if lead >= threshold:
            return layer
    return len(logits)


def _without(logits: Tensor, threshold: float) -> int:
    top = logits.softmax(-1).max(-1).values
    return next((i for i, x in enumerate(top.tolist(), 1) if x >= threshold), len(logits))


def _last_that_fits(logits: Tensor, threshold: float) -> int:
    top = logits.softmax(-1).topk(2, -1).values
    fits = [i for i, x in enumerate((top[:, 0] - top[:, 1]).tolist(), 1) if x >= threshold]
    return fits[-1] if fits else len(logits)


def _raw(logits: Tensor, threshold: float) -> int:
    top = logits.topk(2, -1).values
    return next(
        (i for i, x in enumerate((top[:, 0] - top[:, 1]).tolist(), 1) if x >= threshold),
        len(logits),
    )


_RISING = torch.tensor(
    [[0.0, 0.1, 0.0], [0.9, 0.0, 0.2], [2.5, 0.0, 0.1], [4.0, 0.0, 0.0], [6.0, 0.0, 0.0]]
)
_WAVERING = torch.tensor([[3.0, 0.0, 0.0], [0.2, 0.0, 0.1], [5.0, 0.0, 0.0], [7.0, 0.0, 0.0]])

leaving = Exercise(
    "Where does a token leave?",
    minutes=5,
    difficulty="easy",
    reference=exit_of,
    cases=[(_RISING, 0.3), (_RISING, 0.9), (_WAVERING, 0.8), (_RISING, 1.0)],
    wrong={
        "Count layers from 1": lambda logits, threshold: exit_of(logits, threshold) - 1,
        "This is the largest probability; the lead over the second is asked for": _without,
        "A token leaves at the first layer that is sure enough, not at the last": _last_that_fits,
        "These are differences of logits; turn them into probabilities first": _raw,
    },
)


def after_rejection(p: Float[Tensor, " words"], q: Float[Tensor, " words"]) -> Tensor:
    r"""$\max(0, p - q) / \sum \max(0, p - q)$."""
    rest = (p - q).clamp(min=0)
    return rest / rest.sum()


_P, _Q = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.1, 0.6, 0.2, 0.1])
_P2, _Q2 = torch.tensor([0.25, 0.25, 0.5]), torch.tensor([0.1, 0.8, 0.1])

rejecting = Exercise(
    "What comes after a rejection?",
    minutes=10,
    difficulty="medium",
    reference=after_rejection,
    cases=[(_P, _Q), (_P2, _Q2), (_Q, _P)],
    wrong={
        "This is the target's distribution: words that the draft proposes too often would come out "
        "too often": (lambda p, q: p),
        "The parts add up to less than 1: divide by their sum": lambda p, q: (p - q).clamp(min=0),
        "Where q is larger than p nothing may be drawn: cut below 0 before dividing": (
            lambda p, q: (p - q).abs() / (p - q).abs().sum()
        ),
        "The difference is the wrong way round": lambda p, q: after_rejection(q, p),
    },
    atol=1e-5,
)


def walk(grid: list[float], p_values: list[float], epsilon: float) -> float | None:
    """Down from the safest threshold to the last before the first p-value above epsilon."""
    chosen = None
    for threshold, p in zip(grid, p_values):
        if p > epsilon:
            break
        chosen = threshold
    return chosen


def _smallest(grid: list[float], p_values: list[float], epsilon: float) -> float | None:
    good = [threshold for threshold, p in zip(grid, p_values) if p <= epsilon]
    return min(good) if good else None


def _bonferroni(grid: list[float], p_values: list[float], epsilon: float) -> float | None:
    return walk(grid, p_values, epsilon / len(grid))


def _first_failure(grid: list[float], p_values: list[float], epsilon: float) -> float | None:
    return next((t for t, p in zip(grid, p_values) if p > epsilon), None)


walking = Exercise(
    "Which threshold may be promised?",
    minutes=10,
    difficulty="medium",
    reference=walk,
    cases=[
        ([0.9, 0.8, 0.7, 0.6], [0.001, 0.02, 0.2, 0.03], 0.05),
        ([0.9, 0.8, 0.7], [0.001, 0.03, 0.04], 0.05),
        ([0.9, 0.8], [0.3, 0.01], 0.05),
        ([1.0, 0.5, 0.2], [0.0, 0.0, 0.0], 0.1),
    ],
    wrong={
        "This is the smallest threshold that passes anywhere; the walk ends at the first failure, "
        "and nothing behind it counts": _smallest,
        "No correction is needed: the thresholds are tested in an order that was fixed before": (
            _bonferroni
        ),
        "This one failed; take the last before it": _first_failure,
        "Walk from the safest threshold down, not from the most lenient one up": (
            lambda grid, p, epsilon: walk(grid[::-1], p[::-1], epsilon)
        ),
    },
)
