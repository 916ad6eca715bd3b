r"""Means with intervals, where seeds and documents are crossed.

A method is run with several seeds (draws of calibration or training data), and every run is judged
on the same documents. With $Y_{ij}$ the difference of two methods at seed i on document j,

$$Y_{ij} = \mu + a_i + b_j + e_{ij},$$

the mean over all cells has the variance $\sigma_a^2/I + \sigma_b^2/J + \sigma_e^2/(IJ)$. Its
estimate comes from the mean squares of the two-way table,

$$\hat V = (MS_a + MS_b - MS_e)/(IJ), \quad \text{not below } MS_a/(IJ) \text{ or } MS_b/(IJ),$$

and its degrees of freedom are Satterthwaite's. Windows of one document are averaged first: the
document is the unit. With one seed this is Student's interval over documents; with one document,
Student's over seeds; with two groups of documents and one seed, Welch's.

H. Clark, "The language-as-fixed-effect fallacy", Journal of Verbal Learning and Verbal Behavior 12,
1973 (the quasi F ratio for crossed subjects and items); F. Satterthwaite, "An approximate
distribution of estimates of variance components", Biometrics Bulletin 2, 1946.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

CONFIDENCE = 0.95
_ANGLES = np.linspace(0.0, math.pi / 2, 20_001)


@lru_cache(maxsize=64)
def _area(freedom: float) -> np.ndarray:
    """Student's cumulative distribution from 0 at t = √ν tan θ, where it is ∝ ∫ cos^(ν-1) θ."""
    density = np.cos(_ANGLES) ** (freedom - 1)
    if freedom == 1:
        density = np.ones_like(_ANGLES)
    # Simpson's rule on pairs of steps, so that every second angle has its exact area.
    pairs = (density[:-2:2] + 4 * density[1:-1:2] + density[2::2]) / 3
    area = np.concatenate([[0.0], np.cumsum(pairs)])
    return area / (2 * area[-1])


def student_tail(t: float, freedom: float) -> float:
    """The probability that Student's t with `freedom` degrees of freedom lies above `t`."""
    angle = math.atan2(abs(t), math.sqrt(freedom))
    beyond = 0.5 - float(np.interp(angle, _ANGLES[::2], _area(float(freedom))))
    return beyond if t >= 0 else 1 - beyond


def student_point(confidence: float, freedom: float) -> float:
    """The t that a fraction `confidence` of Student's distribution lies within, on both sides."""
    angle = float(np.interp(confidence / 2, _area(float(freedom)), _ANGLES[::2]))
    return math.sqrt(freedom) * math.tan(angle)


def crossed(
    groups: Sequence[np.ndarray], signs: Sequence[float] = (1.0,)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean of a table of seeds and documents, or a signed sum of the means of several.

    Args:
        groups: Tables [..., seeds, documents]; every table has the same seeds, and documents of
            its own. Leading axes, if any, are separate problems.
        signs: The factor of each table's mean: (1, -1) for the difference of two groups.

    Returns:
        The estimate, its standard error and its degrees of freedom, over the leading axes.

    Raises:
        ValueError: When a table holds fewer than two numbers, or the tables differ in their seeds.
    """
    tables = [np.asarray(group, dtype=np.float64) for group in groups]
    if any(table.ndim < 2 or table.shape[-1] * table.shape[-2] < 2 for table in tables):
        raise ValueError("an interval needs at least two seeds or two documents.")
    seeds = tables[0].shape[-2]
    if any(table.shape[-2] != seeds for table in tables):
        raise ValueError("all groups of documents must be measured with the same seeds.")
    by_seed = sum(sign * t.mean(-1) for sign, t in zip(signs, tables, strict=True))
    estimate = by_seed.mean(-1)
    zero = np.zeros_like(estimate)
    of_seeds = by_seed.var(-1, ddof=1) / seeds if seeds > 1 else zero
    of_documents, of_rest, weight, free = zero, zero, zero, []
    if seeds > 1:
        weight = weight + of_seeds**2 / (seeds - 1)
        free.append(seeds - 1)
    for sign, table in zip(signs, tables):
        count = table.shape[-1]
        if count < 2:
            continue
        columns = table.mean(-2)
        own = sign**2 * columns.var(-1, ddof=1) / count
        of_documents = of_documents + own
        weight = weight + own**2 / (count - 1)
        free.append(count - 1)
        if seeds > 1:
            rest = table - table.mean(-1, keepdims=True) - columns[..., None, :]
            rest = rest + table.mean((-1, -2), keepdims=True)
            squares = (rest**2).sum((-1, -2)) / ((seeds - 1) * (count - 1))
            of_rest = of_rest + sign**2 * squares / (seeds * count)
    total = np.maximum(of_seeds + of_documents - of_rest, np.maximum(of_seeds, of_documents))
    freedom = np.divide(
        total**2, weight, out=np.full_like(estimate, min(free)), where=weight > 0
    )  # fmt: skip
    return estimate, np.sqrt(total), np.maximum(freedom, min(free))


def interval(
    values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The interval of a mean: Student's over a row of samples, or over a crossed table.

    Args:
        values: Independent samples, or a table [seeds, documents].
        confidence: How often the interval holds the truth.

    Raises:
        ValueError: With fewer than two samples, or with one that is not finite.
    """
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if not np.isfinite(table).all():
        raise ValueError("a sample is not a finite number: there is nothing to compare.")
    estimate, error, freedom = crossed([table])
    reach = student_point(confidence, float(freedom)) * float(error)
    return float(estimate) - reach, float(estimate) + reach


def holm(p_values: Sequence[float]) -> list[float]:
    r"""Holm's adjusted p-values: $\max_{k \le i} \min(1, (m - k + 1)\, p_{(k)})$.

    All parts of a claim are tested at once: a part is decided when its adjusted p-value is at most
    5 %, and the probability of any wrong decision is at most that (S. Holm, "A simple sequentially
    rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979).
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
