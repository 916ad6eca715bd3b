r"""Cascades: ask the small model first, and the larger one only where that pays.

A cascade's rule looks at the small model's answer and decides whether to *defer*. Chow's rule
defers where the confidence is below a threshold. For a text the confidence must sum up its tokens:
their mean log-probability hides one bad token, their sum punishes length, and quantiles lie
between.

Chow, "On optimum recognition error and reject tradeoff", 1970; Jitkrittum et al., "When Does
Confidence-Based Cascade Deferral Suffice?", 2023, arXiv 2307.02764; Gupta et al., "Language Model
Cascades: Token-level uncertainty and beyond", 2024, arXiv 2404.10136.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def chow(confidence: Float[Tensor, " items"], threshold: float) -> Bool[Tensor, " items"]:
    r"""Defer where $\max_y p(y \mid x) < \lambda$: never at $-\infty$, always at $+\infty$."""
    return confidence < threshold


def sequence_confidence(
    log_probabilities: Float[Tensor, " tokens"], kind: str | float = "mean"
) -> float:
    """One number for how sure a model was of a text.

    Args:
        log_probabilities: Of each of its tokens.
        kind: "mean", "sum", "min", or a quantile in [0, 1] over the tokens.

    Raises:
        ValueError: When there is no token or no such kind.
    """
    if not len(log_probabilities):
        raise ValueError("a text without tokens has no confidence.")
    values = log_probabilities.float()
    if isinstance(kind, str):
        kinds = {"mean": values.mean, "sum": values.sum, "min": values.min}
        if kind not in kinds:
            raise ValueError(f"kind is {kind!r}; choose {', '.join(kinds)}, or a quantile.")
        return float(kinds[kind]())
    if not 0 <= kind <= 1:
        raise ValueError(f"the quantile is {kind}; it must lie in [0, 1].")
    return float(values.quantile(kind))


@dataclass(frozen=True)
class Point:
    """One setting of a cascade.

    Attributes:
        deferred: Part of the items that the larger model answers.
        loss: Mean loss of the answers given.
        cost: Mean cost of an item; a deferred one pays for both models.
    """

    deferred: float
    loss: float
    cost: float


def deferral_curve(
    score: Float[Tensor, " items"] | Sequence[float],
    small: Float[Tensor, " items"] | Sequence[float],
    large: Float[Tensor, " items"] | Sequence[float],
    costs: tuple[float, float] = (0.0, 1.0),
) -> list[Point]:
    """Loss and cost of a cascade at every threshold of its score, from none to all deferred.

    Args:
        score: How well the small model may answer each item; the lowest are deferred first.
        small: Loss of the small model's answer.
        large: Loss of the large model's.
        costs: Of one answer of each model.

    Raises:
        ValueError: When the three differ in length or are empty.
    """
    score, small, large = (torch.as_tensor(x, dtype=torch.float64) for x in (score, small, large))
    if not len(score) or not len(score) == len(small) == len(large):
        raise ValueError(
            f"{len(score)} scores, {len(small)} and {len(large)} losses; give one of each for "
            "every item, and at least one."
        )
    order = score.argsort(stable=True)
    n = len(order)
    gain = torch.cat([torch.zeros(1, dtype=torch.float64), (large - small)[order].cumsum(0)])
    losses = small.mean() + gain / n
    return [
        Point(k / n, float(losses[k]), costs[0] + costs[1] * k / n)  # both models are paid
        for k in range(n + 1)
    ]


def benefit(curve: Sequence[Point]) -> float:
    """Area between random deferral (the straight line) and the curve; above 0 is better."""
    ends = (curve[0].loss, curve[-1].loss)
    areas = []
    for a, b in pairwise(curve):
        gaps = [ends[0] + p.deferred * (ends[1] - ends[0]) - p.loss for p in (a, b)]
        areas.append((b.deferred - a.deferred) * sum(gaps) / 2)
    return math.fsum(areas)


@dataclass(frozen=True)
class Answered:
    """What a cascade of several models did.

    Attributes:
        model: Index of the model that answered each item.
        loss: Mean loss.
        cost: Mean cost; every model asked is paid.
    """

    model: tuple[int, ...]
    loss: float
    cost: float


def cascade(
    scores: Float[Tensor, "models items"],
    losses: Float[Tensor, "models items"],
    costs: Sequence[float],
    thresholds: Sequence[float],
) -> Answered:
    """From model to model, until one is sure enough; the last always answers.

    Args:
        scores: How sure each model is of each item; the last model's are not used.
        losses: Of each model's answer.
        costs: Of one answer of each model.
        thresholds: Of every model but the last.

    Raises:
        ValueError: When the numbers of models do not agree.
    """
    models, items = losses.shape
    if len(scores) != models or len(costs) != models or len(thresholds) != models - 1:
        raise ValueError(
            f"{models} models with {len(scores)} scores, {len(costs)} costs and {len(thresholds)} "
            "thresholds; every model but the last has a threshold."
        )
    stays = torch.stack([~chow(s, t) for s, t in zip(scores, thresholds)])
    last = torch.ones(1, items, dtype=torch.bool, device=stays.device)
    who = torch.cat([stays, last]).long().argmax(0)
    paid = torch.as_tensor(costs, dtype=torch.float64).cumsum(0)[who.cpu()]
    loss = losses.gather(0, who[None])[0]
    return Answered(tuple(who.tolist()), float(loss.mean()), float(paid.mean()))
