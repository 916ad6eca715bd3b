r"""How many parameters a datastore is worth: where the curve of plain models reaches its loss.

Plain models of several sizes give a loss for each number of parameters $N$. A model of $N$
parameters with a datastore is worth as many as a plain model of equal loss would need.

Two curves answer that. `SizeCurve` takes the loss to fall evenly with $\ln N$ between two measured
sizes, and says "at least" beyond the largest. `PowerLaw` is fitted to all of them,
$L(N) = a N^{-b}$, and goes on beyond; what it says there is a guess.

Kaplan et al., "Scaling Laws for Neural Language Models", 2020, arXiv 2001.08361, eq. 1.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from effnb.design.retrieval.checks import check_positive


@dataclass(frozen=True)
class Worth:
    """Plain parameters of equal loss.

    Attributes:
        parameters: How many; the end of the measured range where the loss lies outside.
        bound: "" inside the range, "at least" beyond its largest model, "at most" below its
            smallest.
    """

    parameters: float
    bound: str = ""

    def ratio(self, parameters: float) -> float:
        """How many times as many as a model has.

        Raises:
            ValueError: When it has none.
        """
        return self.parameters / check_positive("parameters", parameters)


@dataclass(frozen=True)
class SizeCurve:
    """Loss of plain models over their parameters.

    Attributes:
        parameters: Rising.
        losses: In nats per token, falling.
    """

    parameters: tuple[float, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse a curve that cannot be read backwards."""
        n, losses = self.parameters, self.losses
        if len(n) != len(losses) or len(n) < 2:
            raise ValueError(
                f"there are {len(n)} sizes and {len(losses)} losses; give at least two of each."
            )
        for size in n:
            check_positive("a size", size)
        if any(b <= a for a, b in pairwise(n)) or any(b >= a for a, b in pairwise(losses)):
            raise ValueError(
                "sizes must rise and losses must fall with them; where a larger model is no "
                "better, no size can be told from a loss."
            )

    def worth(self, loss: float) -> Worth:
        """Parameters of a plain model with this loss.

        Raises:
            ValueError: When the loss is not finite.
        """
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss}; it must be finite.")
        if loss > self.losses[0]:
            return Worth(self.parameters[0], "at most")
        for (n0, n1), (l0, l1) in zip(pairwise(self.parameters), pairwise(self.losses)):
            if loss >= l1:
                # ln N is linear in the loss between two sizes.
                part = (l0 - loss) / (l0 - l1)
                return Worth(math.exp(math.log(n0) + part * (math.log(n1) - math.log(n0))))
        return Worth(self.parameters[-1], "at least")

    def loss(self, parameters: float) -> float:
        """Loss of a plain model of some size, inside the measured range.

        Raises:
            ValueError: When the size lies outside.
        """
        n = self.parameters
        if not n[0] <= parameters <= n[-1]:
            raise ValueError(f"{parameters:g} parameters lie outside {n[0]:g} to {n[-1]:g}.")
        for (n0, n1), (l0, l1) in zip(pairwise(n), pairwise(self.losses)):
            if parameters <= n1:
                part = math.log(parameters / n0) / math.log(n1 / n0)
                return l0 + part * (l1 - l0)
        return self.losses[-1]


@dataclass(frozen=True)
class LogLine:
    r"""$L(n) = \alpha - \beta \ln n$: what each doubling of a datastore brings is $\beta \ln 2$.

    Attributes:
        start: $\alpha$.
        slope: $\beta$, nats per factor of $e$.
        residual: Root of the mean squared distance from the line.
    """

    start: float
    slope: float
    residual: float

    @property
    def per_doubling(self) -> float:
        """Nats that twice as many entries bring."""
        return self.slope * math.log(2)

    def at(self, entries: float) -> float:
        """The loss that the line gives.

        Raises:
            ValueError: When the number is not above 0.
        """
        return self.start - self.slope * math.log(check_positive("entries", entries))

    def entries(self, loss: float) -> float:
        """How many entries the line asks for, outside the measured range a guess.

        Raises:
            ValueError: When the line does not fall.
        """
        if self.slope <= 0:
            raise ValueError("the loss does not fall as the datastore grows: no size reaches it.")
        power = (self.start - loss) / self.slope
        return math.exp(power) if power < 700 else math.inf


def fit_log_line(entries: Sequence[float], losses: Sequence[float]) -> LogLine:
    r"""Least squares for $L(n) = \alpha - \beta \ln n$.

    Raises:
        ValueError: When there are fewer than two different sizes, or one is not above 0.
    """
    if len(entries) != len(losses) or len(set(entries)) < 2:
        raise ValueError("a line needs losses at two different sizes or more, one for each size.")
    for size in entries:
        check_positive("a size", size)
    x = torch.tensor([math.log(n) for n in entries], dtype=torch.float64)
    y = torch.tensor(list(losses), dtype=torch.float64)
    # β = −cov(ln n, L) / var(ln n)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    start = float(y.mean() - slope * x.mean())
    residual = float((y - start - slope * x).square().mean().sqrt())
    return LogLine(start, -slope, residual)


@dataclass(frozen=True)
class PowerLaw:
    r"""$L(N) = a N^{-b}$.

    Attributes:
        scale: $a$, in nats.
        exponent: $b$.
        residual: Root of the mean squared distance of $\ln L$ from the line.
    """

    scale: float
    exponent: float
    residual: float

    def loss(self, parameters: float) -> float:
        """The loss of a plain model.

        Raises:
            ValueError: When the number is not above 0.
        """
        return self.scale * check_positive("parameters", parameters) ** -self.exponent

    def parameters(self, loss: float) -> float:
        """Parameters of a plain model with this loss.

        Raises:
            ValueError: When the loss is not above 0 or the law does not fall.
        """
        if self.exponent <= 0:
            raise ValueError("the loss does not fall with size: no size can be told from a loss.")
        return (self.scale / check_positive("the loss", loss)) ** (1 / self.exponent)


def fit_power_law(parameters: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    r"""Least squares for $\ln L = \ln a - b \ln N$.

    Raises:
        ValueError: When there are fewer than two different sizes, or a number is not above 0.
    """
    for loss in losses:
        check_positive("a loss", loss)
    line = fit_log_line(parameters, [math.log(loss) for loss in losses])
    return PowerLaw(math.exp(line.start), line.slope, line.residual)
