r"""Losses that keep experts busy alike, and how many tokens even a fair router drops.

**Balance.** With $f_e$ the part of the choices that fall on expert $e$, counted before any token is
dropped and without a gradient, and $P_e$ its mean probability over the tokens of a group,

$$L_\text{balance} = E \sum_e f_e P_e.$$

It is 1 when all experts are chosen and weighed alike, and $E$ when one has everything, for any
number of choices: $f$ sums to 1. Padding counts in neither. Of transformers' two forms,
Switch's takes top-1 choices and is this one; Mixtral's lets $f$ sum to $k$, so that its minimum is
$k$.

**z-loss.** $L_z = \frac1T \sum_t \bigl(\log \sum_e e^{\ell_{te}}\bigr)^2$ keeps scores small, where
a softmax in low precision is exact enough.

**Drops.** Even if all experts are equally likely, some are asked for more often than others. Of $T$
tokens an expert gets $n \sim \mathrm{Bin}(T, 1/E)$, and what exceeds its $C$ seats is dropped:

$$\text{dropped} = \frac{E}{T}\, \mathbb{E}\,[(n - C)_+] \approx 0.4 \sqrt{(E - 1) / T}
  \quad\text{for } C = T / E.$$

Fedus, Zoph, Shazeer, "Switch Transformers", 2022, arXiv 2101.03961, eqs. 4-6. Zoph et al., "ST-MoE:
Designing Stable and Transferable Sparse Expert Models", 2022, arXiv 2202.08906, eq. 5. The
approximation is the mean of the positive half of a normal variable, $1/\sqrt{2\pi} = 0.399$
standard deviations.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from effnb.design.experts.routing import Routing


def balance_loss(routing: Routing) -> Float[Tensor, ""]:
    r"""$E \sum_e f_e P_e$, the mean over groups: 1 for balance, E for one expert with all.

    Source: Fedus et al. 2022, eq. 4, without its factor alpha; over several choices of a token
    the fractions are those of all choices.

    Args:
        routing: Of any method. Groups without a token of text are left out.
    """
    groups, time, count = routing.logits.shape
    group = routing.tokens // time
    asked = routing.asked.to(routing.probabilities.dtype)
    chosen = asked.new_zeros(groups * count).index_add(0, group * count + routing.experts, asked)
    chosen = chosen.view(groups, count)
    f = chosen / chosen.sum(-1, keepdim=True).clamp(min=1)
    P = masked_mean(routing.probabilities, routing.text)
    found = count * (f.detach() * P).sum(-1)
    return found[chosen.sum(-1) > 0].mean() if bool((chosen.sum(-1) > 0).any()) else found.sum()


def z_loss(routing: Routing) -> Float[Tensor, ""]:
    """The mean square of the logarithm of the softmax's denominator, over tokens of text.

    Source: Zoph et al. 2022, eq. 5, without its factor.
    """
    square = routing.logits.to(routing.probabilities.dtype).logsumexp(-1).square()
    if routing.text is None:
        return square.mean()
    text = routing.text.to(square.dtype)
    return (square * text).sum() / text.sum().clamp(min=1)


def masked_mean(
    values: Float[Tensor, "groups time experts"], text: Bool[Tensor, "groups time"] | None
) -> Float[Tensor, "groups experts"]:
    """The mean over the tokens of text of each group; 0 for a group without any."""
    if text is None:
        return values.mean(1)
    weight = text.to(values.dtype)[..., None]
    return (values * weight).sum(1) / weight.sum(1).clamp(min=1)


def expected_drops(tokens: int, experts: int, capacity: int) -> float:
    r"""The part of the tokens that a perfectly uniform random top-1 router drops.

    $\frac{E}{T} \sum_{n > C} (n - C) \binom{T}{n} (1/E)^n (1 - 1/E)^{T - n}$.

    Args:
        tokens: $T$, tokens of a group.
        experts: $E$.
        capacity: $C$, seats of each expert.

    Raises:
        ValueError: Sizes below 1.
    """
    if min(tokens, experts, capacity) < 1:
        raise ValueError(
            f"there are {tokens} tokens, {experts} experts and {capacity} seats; all must be at "
            "least 1."
        )
    if experts == 1:
        return max(tokens - capacity, 0) / tokens
    n = torch.arange(tokens + 1, dtype=torch.float64)
    ways = math.lgamma(tokens + 1) - torch.lgamma(n + 1) - torch.lgamma(tokens - n + 1)
    log_p = ways - n * math.log(experts) + (tokens - n) * math.log1p(-1 / experts)
    excess = (n - capacity).clamp(min=0)
    return float(experts / tokens * (log_p.exp() * excess).sum())


def approximate_drops(tokens: int, experts: int) -> float:
    r"""$\sqrt{(E - 1) / (2 \pi T)}$: the same where every expert has its fair share of seats."""
    return math.sqrt((experts - 1) / (2 * math.pi * tokens))
