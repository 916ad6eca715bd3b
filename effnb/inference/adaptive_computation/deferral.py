r"""Learning to defer: one loss for classifier and rule, or the rule afterwards.

Base model $h$, expert $m$, cost of deferral $c$. The loss is $\mathbb 1[h \ne y]$ where the base
answers and $c + \mathbb 1[m \ne y]$ where it defers; the best rule defers if and only if
$P(m = y \mid x) - c > \max_y \eta_y(x)$, with $\eta_y(x) = P(y \mid x)$.

The *cost-sensitive softmax* (CSS) trains both at once, with one more output $\bot$ for "defer". Its
minimizer is known in closed form, $p_i^* \propto \eta_i + c\,(1 - a)$ and
$p_\bot^* \propto a\,(1 - c)$ with $a = P(m = y \mid x)$: every label is smoothed by $c (1 - a)$.
*Post-hoc* deferral trains the base alone, freezes it, and learns the rule on held-out data.

Mozannar and Sontag, "Consistent Estimators for Learning to Defer to an Expert", 2020, arXiv
2006.01862; Narasimhan, Jitkrittum, Menon, Rawat, Kumar, "Post-hoc estimators for learning to defer
to an expert", NeurIPS 2022. The closed form of the minimizer is derived here.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


def check_cost(cost: float) -> None:
    """Refuse a cost outside of [0, 1].

    Raises:
        ValueError: With what is allowed.
    """
    if not (math.isfinite(cost) and 0 <= cost <= 1):
        raise ValueError(f"cost is {cost}; a deferral costs between 0 and 1 errors.")


def css_weights(
    labels: Int[Tensor, " items"], expert_right: Bool[Tensor, " items"], classes: int, cost: float
) -> Float[Tensor, "items outputs"]:
    r"""$w_i = \max_j \kappa_j - \kappa_i$ with $\kappa_i = \mathbb 1[i \ne y]$, $\kappa_\bot = c + \mathbb 1[m \ne y]$.

    The last output is "defer".

    Raises:
        ValueError: When the cost is out of range.
    """  # noqa: E501
    check_cost(cost)
    kappa = torch.ones(len(labels), classes + 1)
    kappa[torch.arange(len(labels)), labels] = 0.0
    kappa[:, -1] = cost + (~expert_right).float()
    return kappa.max(1, keepdim=True).values - kappa


def css_loss(
    logits: Float[Tensor, "items outputs"],
    labels: Int[Tensor, " items"],
    expert_right: Bool[Tensor, " items"],
    cost: float,
) -> Float[Tensor, ""]:
    r"""$\sum_i (\max_j \kappa_j - \kappa_i)(-\log p_i)$ over classes and "defer"."""
    weights = css_weights(labels, expert_right, logits.shape[1] - 1, cost).to(logits)
    return -(weights * logits.log_softmax(-1)).sum(1).mean()


def css_minimizer(
    eta: Float[Tensor, "*batch classes"], expert: Float[Tensor, "*batch"], cost: float
) -> Float[Tensor, "*batch outputs"]:
    r"""$p_i^* \propto \eta_i + c (1 - a)$, $p_\bot^* \propto a (1 - c)$, given $\eta$ and $a$."""
    check_cost(cost)
    expert = torch.as_tensor(expert, dtype=eta.dtype)[..., None]
    raw = torch.cat([eta + cost * (1 - expert), expert * (1 - cost)], -1)
    return raw / raw.sum(-1, keepdim=True)


def best_rule(
    eta: Float[Tensor, "*batch classes"], expert: Float[Tensor, "*batch"], cost: float
) -> Bool[Tensor, "*batch"]:
    r"""Defer if and only if $a - c > \max_y \eta_y$."""
    check_cost(cost)
    return expert - cost > eta.max(-1).values


def deferral_loss(
    right: Bool[Tensor, " items"],
    expert_right: Bool[Tensor, " items"],
    defer: Bool[Tensor, " items"],
    cost: float,
) -> float:
    """Errors of those who answer, plus the cost of every deferral."""
    check_cost(cost)
    paid = torch.where(defer, cost + (~expert_right).float(), (~right).float())
    return float(paid.mean())


def rejector_loss(
    scores: Float[Tensor, " items"],
    right: Bool[Tensor, " items"],
    expert_right: Bool[Tensor, " items"],
    cost: float,
) -> Float[Tensor, ""]:
    r"""$\mathbb 1[h \ne y] \ln(1 + e^{-r}) + (c + \mathbb 1[m \ne y]) \ln(1 + e^{r})$, averaged."""
    check_cost(cost)
    softplus = nn.functional.softplus
    wrong, paid = (~right).to(scores), cost + (~expert_right).to(scores)
    return (wrong * softplus(-scores) + paid * softplus(scores)).mean()


class LogisticRule(nn.Module):
    """A linear score of standardized features; what post-hoc rules are made of."""

    def __init__(self, features: Float[Tensor, "items features"]) -> None:
        """Remember the features' means and deviations."""
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("deviation", features.std(0).clamp(min=1e-6))
        self.map = nn.Linear(features.shape[1], 1)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, features: Float[Tensor, "items features"]) -> Float[Tensor, " items"]:
        """One score for each item."""
        return self.map((features - self.mean) / self.deviation)[:, 0]


def _fit(rule: LogisticRule, loss, decay: float) -> LogisticRule:
    optimizer = torch.optim.LBFGS(rule.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss() + decay * rule.map.weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    return rule.requires_grad_(False).eval()


def _check_held_out(features: Tensor, *others: Tensor) -> None:
    if features.ndim != 2 or not len(features) or any(len(x) != len(features) for x in others):
        raise ValueError(
            f"features has the shape {tuple(features.shape)}; a rule is learnt from (items, "
            "features), with one outcome for each item and at least one item."
        )


def fit_rejector(
    features: Float[Tensor, "items features"],
    right: Bool[Tensor, " items"],
    expert_right: Bool[Tensor, " items"],
    cost: float,
    decay: float = 1e-3,
) -> LogisticRule:
    """A post-hoc rule for one cost: defer where its score is above 0.

    Args:
        features: What the rule may see of held-out items.
        right: Whether the frozen base answers them right.
        expert_right: Whether the expert does.
        cost: Of a deferral.
        decay: Weight of the squared weights.

    Raises:
        ValueError: When there is no item, or the cost is out of range.
    """
    _check_held_out(features, right, expert_right)
    check_cost(cost)
    rule = LogisticRule(features)
    return _fit(rule, lambda: rejector_loss(rule(features), right, expert_right, cost), decay)


def fit_probability(
    features: Float[Tensor, "items features"], outcome: Bool[Tensor, " items"], decay: float = 1e-3
) -> LogisticRule:
    r"""$\hat P(\text{right} \mid x)$ by logistic regression on held-out items; apply a sigmoid.

    The plug-in rule defers where the expert's probability less the cost exceeds the base's. The
    cost may change afterwards without learning anything again.

    Raises:
        ValueError: When there is no item.
    """
    _check_held_out(features, outcome)
    rule = LogisticRule(features)
    bce = nn.functional.binary_cross_entropy_with_logits
    return _fit(rule, lambda: bce(rule(features), outcome.to(features)), decay)


def plug_in(
    expert: Float[Tensor, " items"], base: Float[Tensor, " items"], cost: float
) -> Bool[Tensor, " items"]:
    r"""Defer where $\hat P(m = y \mid x) - c > \hat P(h = y \mid x)$."""
    check_cost(cost)
    return expert - cost > base
