"""Two models on the same windows or questions: how they differ, with an interval.

    paired(quantized.losses, original.losses).words("nats")

Both models read the same text, so the differences window by window are what counts: they vary far
less than the losses themselves.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np


@dataclass(frozen=True)
class Paired:
    """The mean difference of two paired samples, and its interval.

    Attributes:
        difference: Mean of the new values minus the old ones.
        low: Lower end of the interval.
        high: Upper end of the interval.
        count: How many independent pairs it rests on.
        confidence: Part of such intervals that hold the true difference, such as 0.95.
    """

    difference: float
    low: float
    high: float
    count: int
    confidence: float

    def outcome(self, *, lower_is_better: bool = True) -> str:
        """Whether the new values are "better", "worse", or "indistinguishable" from the old."""
        if self.low <= 0 <= self.high:
            return "indistinguishable"
        return "better" if (self.high < 0) == lower_is_better else "worse"


def student_quantile(probability: float, freedom: int) -> float:
    r"""The quantile of Student's t distribution, by bisection on its integral.

    Raises:
        ValueError: When the probability is outside 0.5 … 0.9999, or `freedom` is below 1.
    """
    if not 0.5 <= probability <= 0.9999 or freedom < 1:
        raise ValueError("student_quantile needs a probability of 0.5 … 0.9999 and freedom ≥ 1.")
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    log_scale -= 0.5 * math.log(math.pi * freedom)
    # t = sqrt(f) tan(a) turns the density into a smooth function on a bounded interval:
    # p(t) dt = scale · sqrt(f) · cos(a)^(f - 1) da.
    scale = math.exp(log_scale) * math.sqrt(freedom)

    def below(t: float) -> float:
        angle = np.linspace(0.0, math.atan(t / math.sqrt(freedom)), 2001)
        heights = np.cos(angle) ** (freedom - 1)
        return 0.5 + scale * float(np.trapezoid(heights, angle))

    low, high = 0.0, 1.0
    while below(high) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < probability else (low, middle)
    return (low + high) / 2


def paired(
    new: Sequence[float],
    old: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Paired:
    r"""The mean of $x_i - y_i$ with Student's interval, $\bar d \pm t\, s / \sqrt n$.

    Args:
        new: A value of the new model for each window or question.
        old: The old model's, in the same order.
        groups: To which document each belongs: windows of one document are not independent, so the
            interval then rests on the documents' means. Each pair is independent when None.
        confidence: Part of such intervals that hold the true difference.

    Raises:
        ValueError: When the lengths differ, or there are fewer than two independent pairs.
    """
    if len(new) != len(old) or (groups is not None and len(groups) != len(new)):
        raise ValueError(f"paired values have one length, not {len(new)} and {len(old)}.")
    differences = [float(a) - float(b) for a, b in zip(new, old, strict=True)]
    if groups is not None:
        gathered: dict[Hashable, list[float]] = {}
        for group, value in zip(groups, differences, strict=True):
            gathered.setdefault(group, []).append(value)
        differences = [fmean(values) for values in gathered.values()]
    count = len(differences)
    if count < 2:
        raise ValueError("an interval needs at least two independent pairs.")
    mean = fmean(differences)
    half = student_quantile((1 + confidence) / 2, count - 1) * stdev(differences) / math.sqrt(count)
    return Paired(mean, mean - half, mean + half, count, confidence)


def paired_answers(new: Sequence[bool], old: Sequence[bool], confidence: float = 0.95) -> Paired:
    r"""The difference of two accuracies on the same questions, with an interval.

    With $b$ answers gained and $c$ lost of $n$, the difference is $(b - c) / n$ and its standard
    error $\sqrt{b + c - (b - c)^2 / n} / n$. Half an answer is added to each of $b$ and $c$ in the
    standard error, so that no change at all does not look certain (after Agresti and Min, 2005).

    Args:
        new: Whether the new model answered each question right.
        old: The old model's, in the same order.
        confidence: Part of such intervals that hold the true difference.

    Raises:
        ValueError: When the two are not of the same questions, or there are fewer than two.
    """
    if len(new) != len(old):
        raise ValueError(
            f"{len(old)} answers before and {len(new)} after; a paired comparison needs the same "
            "questions."
        )
    count = len(new)
    if count < 2:
        raise ValueError("an interval needs at least two questions.")
    gained = sum(a and not b for a, b in zip(new, old, strict=True))
    lost = sum(b and not a for a, b in zip(new, old, strict=True))
    change = (gained - lost) / count
    error = math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / count) / count
    half = student_quantile((1 + confidence) / 2, count - 1) * error
    return Paired(change, max(-1.0, change - half), min(1.0, change + half), count, confidence)
