r"""Learn-then-Test: choose a threshold so that a promise holds with high probability.

A text written with threshold $\lambda$ has a loss in [0, 1] against the full model's text, and a
risk $R(\lambda)$, the mean of that loss over all prompts. On $n$ calibration prompts we see only
$\hat r(\lambda)$. For each threshold the hypothesis "$R(\lambda) > \delta$" is tested, and the
thresholds are walked through from the safest on:

$$p_j = \min\bigl(e^{-n\,h_1(\min(\hat r_j, \delta), \delta)},\
  e\,P(\operatorname{Bin}(n, \delta) \le \lceil n \hat r_j \rceil)\bigr), \qquad
h_1(a, b) = a \ln\tfrac ab + (1-a) \ln\tfrac{1-a}{1-b}.$$

The walk stops at the first $p_j > \varepsilon$, and the last threshold before it is taken. With
probability at least $1 - \varepsilon$ over the draw of prompts, its risk is at most $\delta$.

Angelopoulos, Bates, Candès, Jordan, Lei, "Learn then Test", 2021, arXiv 2110.01052 (fixed-sequence
testing, Hoeffding-Bentkus p-values); applied to exits in Schuster et al., 2022, arXiv 2207.07061.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import fmean

import numpy as np

RULES = ("fixed sequence", "naive", "Bonferroni", "smallest p")
"""The first and third keep the promise; the others are mistakes worth seeing."""


@lru_cache(maxsize=65_536)
def binomial_cdf(k: int, n: int, p: float) -> float:
    r"""$P(\operatorname{Bin}(n, p) \le k)$."""
    if k < 0:
        return 0.0
    if k >= n:
        return 1.0
    log_p, log_q = math.log(p), math.log1p(-p)
    terms = [
        math.lgamma(n + 1)
        - math.lgamma(i + 1)
        - math.lgamma(n - i + 1)
        + i * log_p
        + (n - i) * log_q
        for i in range(k + 1)
    ]
    return min(1.0, math.fsum(math.exp(term) for term in terms))


def check_promise(delta: float, epsilon: float | None = None) -> None:
    """Refuse a tolerance or a probability outside of (0, 1).

    Raises:
        ValueError: With what is allowed.
    """
    for name, value in (("delta", delta), ("epsilon", epsilon)):
        if value is not None and not (math.isfinite(value) and 0 < value < 1):
            raise ValueError(f"{name} is {value}; it must lie between 0 and 1, both excluded.")


def hoeffding_bentkus(mean_loss: float, n: int, delta: float) -> float:
    r"""The p-value of "$R > \delta$" after a mean loss of $\hat r$ on $n$ prompts.

    Args:
        mean_loss: $\hat r$ in [0, 1].
        n: Number of prompts, not of tokens: tokens of a text are not independent.
        delta: The tolerance.

    Raises:
        ValueError: When there is no prompt, a loss is outside of [0, 1], or delta is out of range.
    """
    check_promise(delta)
    if n < 1:
        raise ValueError("the calibration set is empty; a promise needs at least one prompt.")
    if not (math.isfinite(mean_loss) and 0 <= mean_loss <= 1):
        raise ValueError(f"the mean loss is {mean_loss}; losses must lie in [0, 1].")
    a = min(mean_loss, delta)
    h1 = (a * math.log(a / delta) if a > 0 else 0.0) + (1 - a) * math.log((1 - a) / (1 - delta))
    hoeffding = math.exp(-n * h1)
    k = math.ceil(n * mean_loss - 1e-9)  # float noise must not add an error
    bentkus = math.e * binomial_cdf(k, n, delta)
    return min(1.0, hoeffding, bentkus)


@dataclass(frozen=True)
class Calibrated:
    r"""A threshold and what it rests on.

    Attributes:
        threshold: The one chosen; None when not even the safest passed, so that the full model
            must be used.
        p_values: Of every threshold of the grid, in its order.
        mean_losses: $\hat r$ of every threshold.
        prompts: $n$.
    """

    threshold: float | None
    p_values: tuple[float, ...]
    mean_losses: tuple[float, ...]
    prompts: int


def calibrate(
    grid: Sequence[float],
    losses: Sequence[Sequence[float]],
    delta: float,
    epsilon: float,
    rule: str = "fixed sequence",
) -> Calibrated:
    r"""The most lenient threshold that keeps $P(R(\lambda) \le \delta) \ge 1 - \varepsilon$.

    Args:
        grid: Thresholds, the safest (highest) first.
        losses: For each, the loss of every calibration prompt, in [0, 1].
        delta: Tolerated risk.
        epsilon: Tolerated probability that the promise is broken.
        rule: "fixed sequence" stops at the first failure. "Bonferroni" divides epsilon by the
            length of the grid. "naive" takes the smallest threshold with $\hat r \le \delta$, and
            "smallest p" the smallest with $p \le \varepsilon$ wherever it lies: neither promises
            anything.

    Raises:
        ValueError: When the grid does not fall, the calibration set is empty, losses are outside
            of [0, 1], or delta, epsilon or the rule is not allowed.
    """
    check_promise(delta, epsilon)
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; choose of {', '.join(RULES)}.")
    if not grid or any(a <= b for a, b in pairwise(grid)):
        raise ValueError("the grid must fall from the safest threshold to the most lenient one.")
    if len(losses) != len(grid) or len({len(row) for row in losses}) != 1:
        raise ValueError(
            f"{len(losses)} rows of losses for {len(grid)} thresholds; give one row for each, over "
            "the same prompts."
        )
    n = len(losses[0])
    if not n:
        raise ValueError("the calibration set is empty; a promise needs at least one prompt.")
    if any(not 0 <= x <= 1 for row in losses for x in row):
        raise ValueError("a loss is outside of [0, 1]; clip the losses before calibrating.")
    means = [min(1.0, fmean(row)) for row in losses]
    p_values = [hoeffding_bentkus(mean, n, delta) for mean in means]
    passed = {
        "naive": [mean <= delta for mean in means],
        "Bonferroni": [p <= epsilon / len(grid) for p in p_values],
        "smallest p": [p <= epsilon for p in p_values],
        "fixed sequence": [
            all(p <= epsilon for p in p_values[: j + 1]) for j in range(len(p_values))
        ],
    }[rule]
    chosen = [threshold for threshold, good in zip(grid, passed) if good]
    return Calibrated(min(chosen) if chosen else None, tuple(p_values), tuple(means), n)


@dataclass(frozen=True)
class Coverage:
    """How often a rule broke its promise over many calibrations.

    Attributes:
        violations: Part of the repetitions whose chosen threshold has a true risk above delta.
        mean_threshold: Mean of the thresholds chosen; 1 where none was.
        repetitions: How many.
        chosen: The threshold of every repetition.
    """

    violations: float
    mean_threshold: float
    repetitions: int
    chosen: tuple[float, ...]


def simulate(
    risk: Callable[[float], float],
    *,
    n: int = 400,
    delta: float = 0.1,
    epsilon: float = 0.05,
    grid: Sequence[float] | None = None,
    rule: str = "fixed sequence",
    repetitions: int = 1000,
    seed: int = 0,
    shared: bool = True,
) -> Coverage:
    r"""Calibrate again and again on prompts whose true risk is known, and count broken promises.

    The loss of a prompt is 1 where its number, uniform in [0, 1], is below $R(\lambda)$, else 0.
    Its mean over all prompts is $R(\lambda)$, and a prompt that is bad stays bad further down.

    Args:
        risk: The true risk of each threshold.
        n: Prompts of each calibration.
        delta: Tolerated risk.
        epsilon: Tolerated probability.
        grid: Thresholds, highest first; 21 from 1 to 0 when None.
        rule: See `calibrate`.
        repetitions: How many calibrations.
        seed: Of the draws.
        shared: Whether a prompt keeps its number; else every threshold has noise of its own.

    Raises:
        ValueError: As `calibrate`.
    """
    check_promise(delta, epsilon)
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; choose of {', '.join(RULES)}.")
    if n < 1 or repetitions < 1:
        raise ValueError("the calibration set is empty; a promise needs at least one prompt.")
    grid = [round(1 - j / 20, 2) for j in range(21)] if grid is None else list(grid)
    true = np.array([risk(x) for x in grid])
    rng = np.random.default_rng(seed)
    if shared:
        numbers = rng.random((repetitions, n))
        draws = np.stack([(numbers < r).sum(1) for r in true], 1)
    else:
        draws = rng.binomial(n, true, size=(repetitions, len(grid)))
    # one table of p-values for all counts: r-hat takes n + 1 values
    table = np.array([hoeffding_bentkus(k / n, n, delta) for k in range(n + 1)])
    p_values = table[draws]
    passed = {
        "naive": draws <= n * delta + 1e-9,
        "Bonferroni": p_values <= epsilon / len(grid),
        "smallest p": p_values <= epsilon,
        "fixed sequence": np.logical_and.accumulate(p_values <= epsilon, 1),
    }[rule]
    last = np.where(passed, np.arange(len(grid)), -1).max(1)
    chosen = np.where(last < 0, 1.0, np.array(grid)[last])
    broken = np.where(last < 0, False, true[last] > delta + 1e-12)
    return Coverage(
        float(broken.mean()), float(chosen.mean()), repetitions, tuple(float(x) for x in chosen)
    )
