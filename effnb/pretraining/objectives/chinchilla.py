r"""Chinchilla's rule: how large a model should be for the compute at hand.

Training $N$ parameters on $D$ tokens takes $C \approx 6 N D$ operations. Of all pairs with the same
$C$, one gives the lowest loss, and Hoffmann et al. find that both should grow alike,
$N_{\text{opt}} \propto C^{0.5}$ and $D_{\text{opt}} \propto C^{0.5}$, at about 20 tokens for each
parameter. They find it in three ways, of which two are here: the minimum of a parabola through the
losses of several sizes at one $C$ (`isoflop_minimum`), and a law fitted to all runs
(`fit_scaling_law`):

$$L(N, D) = E + \frac{A}{N^\alpha} + \frac{B}{D^\beta}$$

Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022, arXiv 2203.15556, sections
3.2 and 3.3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

TOKENS_PER_PARAMETER = 20.0


def training_flops(parameters: float, tokens: float) -> float:
    """$C = 6 N D$: operations of a training run, attention left out.

    Raises:
        ValueError: When a number is not above 0.
    """
    _positive(parameters=parameters, tokens=tokens)
    return 6.0 * parameters * tokens


@dataclass(frozen=True)
class Allocation:
    """A size and a number of tokens that use up a compute budget.

    Attributes:
        parameters: $N$.
        tokens: $D$.
    """

    parameters: float
    tokens: float

    @property
    def tokens_per_parameter(self) -> float:
        """$D / N$."""
        return self.tokens / self.parameters


def chinchilla(flops: float, tokens_per_parameter: float = TOKENS_PER_PARAMETER) -> Allocation:
    r"""The size and the tokens that the rule gives a budget.

    With $D = r N$, $C = 6 r N^2$ and so $N = \sqrt{C / 6 r}$.

    Args:
        flops: $C$.
        tokens_per_parameter: $r$, 20 by the rule.

    Raises:
        ValueError: When a number is not above 0.

    Source: Hoffmann et al., 2022, table 3 and section 3.
    """
    _positive(flops=flops, tokens_per_parameter=tokens_per_parameter)
    parameters = math.sqrt(flops / (6 * tokens_per_parameter))  # N = sqrt(C / 6 r)
    return Allocation(parameters, tokens_per_parameter * parameters)


def isoflop_minimum(parameters: Sequence[float], losses: Sequence[float]) -> float | None:
    r"""The size with the lowest loss at one compute: the minimum of a parabola in $\ln N$.

    Args:
        parameters: $N$ of at least three models that were trained with equal compute.
        losses: Their losses, nats per token.

    Returns:
        $N_{\text{opt}}$; None where the parabola has no minimum, or has it outside of the sizes
        that were tried, where it says nothing.

    Raises:
        ValueError: Fewer than three different sizes, or numbers that do not pair up.

    Source: Hoffmann et al., 2022, section 3.2.
    """
    if len(parameters) != len(losses) or len(set(parameters)) < 3:
        raise ValueError(
            f"{len(parameters)} sizes and {len(losses)} losses; a parabola takes at least three "
            "different sizes, each with its loss."
        )
    for size in parameters:
        _positive(parameters=size)
    x = torch.tensor([math.log(n) for n in parameters], dtype=torch.float64)
    middle = x.mean()
    design = torch.stack([torch.ones_like(x), x - middle, (x - middle) ** 2], 1)
    y = torch.tensor(list(losses), dtype=torch.float64)
    _, slope, curve = torch.linalg.lstsq(design, y[:, None]).solution[:, 0].tolist()
    if curve * float(x.max() - x.min()) ** 2 < 1e-9:  # flat, or bent the other way
        return None
    found = float(middle) - slope / (2 * curve)
    return math.exp(found) if min(x) <= found <= max(x) else None


@dataclass(frozen=True)
class ScalingLaw:
    r"""$L(N, D) = E + A / N^\alpha + B / D^\beta$, in nats per token.

    Attributes:
        E: What no model can learn.
        A: Factor of the term of the size.
        B: Factor of the term of the data.
        alpha: Exponent of the size.
        beta: Exponent of the data.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """The loss of a model of $N$ parameters after $D$ tokens."""
        _positive(parameters=parameters, tokens=tokens)
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def optimum(self, flops: float) -> Allocation:
        r"""The size and the tokens with the lowest loss at a compute $C$.

        $N = G\, (C / 6)^{a}$ and $D = G^{-1} (C / 6)^{b}$ with
        $G = (\alpha A / \beta B)^{1 / (\alpha + \beta)}$, $a = \beta / (\alpha + \beta)$ and
        $b = \alpha / (\alpha + \beta)$.

        Raises:
            ValueError: When the compute is not above 0.

        Source: Hoffmann et al., 2022, eq. 4.
        """
        _positive(flops=flops)
        total = self.alpha + self.beta
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        return Allocation(
            g * (flops / 6) ** (self.beta / total),  # N = G (C / 6)^a
            (flops / 6) ** (self.alpha / total) / g,  # D = (C / 6)^b / G
        )


def fit_scaling_law(
    parameters: Sequence[float],
    tokens: Sequence[float],
    losses: Sequence[float],
    *,
    delta: float = 1e-3,
) -> ScalingLaw:
    r"""Fit the law to runs, as Hoffmann et al.'s third approach does.

    With $a = \ln A$, $b = \ln B$ and $e = \ln E$ it minimizes
    $\sum_i \operatorname{Huber}_\delta\bigl(\operatorname{LSE}(a - \alpha \ln N_i,
    b - \beta \ln D_i, e) - \ln L_i\bigr)$ by L-BFGS from a grid of beginnings, and keeps the best.

    Args:
        parameters: $N$ of each run.
        tokens: $D$ of each run.
        losses: Its loss, nats per token.
        delta: Where Huber's loss turns from a square to a line.

    Raises:
        ValueError: Fewer than five runs, fewer than two sizes or two numbers of tokens, or numbers
            that are not above 0.

    Source: Hoffmann et al., 2022, section 3.3, eq. 3.
    """
    if not len(parameters) == len(tokens) == len(losses):
        raise ValueError(
            f"{len(parameters)} sizes, {len(tokens)} numbers of tokens and {len(losses)} losses; "
            "each run has one of each."
        )
    if len(losses) < 5 or len(set(parameters)) < 2 or len(set(tokens)) < 2:
        raise ValueError(
            f"{len(losses)} runs of {len(set(parameters))} sizes; five unknowns take at least five "
            "runs, of two sizes and two numbers of tokens."
        )
    for values in zip(parameters, tokens, losses, strict=True):
        _positive(**dict(zip(("parameters", "tokens", "loss"), values)))
    log_n, log_d, log_l = (
        torch.tensor([math.log(v) for v in values], dtype=torch.float64)
        for values in (parameters, tokens, losses)
    )
    best, lowest = None, math.inf
    with torch.enable_grad():
        for begin in itertools.product((0.0, 5.0, 10.0), (0.0, 5.0, 10.0), (0.5,), (0.5,)):
            a, b, e, exponent = begin
            x = torch.tensor([a, b, e, exponent, exponent], dtype=torch.float64, requires_grad=True)
            found = _minimized(x, log_n, log_d, log_l, delta)
            if found < lowest:
                best, lowest = x.detach().clone(), found
    if best is None:
        raise ValueError("the fit did not come to an end; the losses do not follow the law.")
    a, b, e, alpha, beta = best.tolist()
    return ScalingLaw(math.exp(e), math.exp(a), math.exp(b), alpha, beta)


def _minimized(x, log_n, log_d, log_l, delta: float) -> float:
    """Move x to a minimum near it; the value there, infinity where it is no law."""
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=150,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def value() -> torch.Tensor:
        a, b, e, alpha, beta = x
        terms = torch.stack([a - alpha * log_n, b - beta * log_d, e.expand_as(log_n)])
        gap = torch.logsumexp(terms, 0) - log_l  # LSE(a - alpha ln N, b - beta ln D, e) - ln L
        return torch.nn.functional.huber_loss(
            gap, torch.zeros_like(gap), delta=delta, reduction="sum"
        )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = value()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        found = float(value())
        sensible = bool((x[3:] > 0).all()) and bool(torch.isfinite(x).all())
    return found if sensible and math.isfinite(found) else math.inf


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name.replace('_', ' ')} is {value}; it must be above 0.")
