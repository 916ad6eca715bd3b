r"""BranchyNet: leave at the first exit whose prediction has little entropy.

All exits are trained at once, $\mathcal L = \sum_n w_n \mathcal L_n$. An input leaves at the first
exit $n$ with $H(p_n) = -\sum_c p_c \ln p_c < T_n$, in nats; the last exit takes the rest.

Teerapittayanon, McDanel, Kung, "BranchyNet: Fast Inference via Early Exiting from Deep Neural
Networks", 2016, arXiv 1709.01686.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Bool, Float, Int
from torch import Tensor

from effnb.inference.adaptive_computation.classifiers import Rule, exit_losses, weighted


def entropy(logits: Float[Tensor, "*items classes"]) -> Float[Tensor, "*items"]:
    r"""$H = -\sum_c p_c \ln p_c$ of the softmax, in nats; at most $\ln N$ for $N$ classes."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def joint_loss(
    logits: Float[Tensor, "exits items classes"],
    labels: Int[Tensor, " items"],
    weights: Sequence[float] | None = None,
) -> Float[Tensor, ""]:
    r"""$\sum_n w_n \mathcal L_n$; all weights 1 when None."""
    losses = exit_losses(logits, labels)
    return weighted(losses, [1.0] * len(losses) if weights is None else weights)


def by_entropy(threshold: float | Sequence[float]) -> Rule:
    r"""Leave at exit $n$ if $H(p_n) < T_n$: 0 never leaves early, above $\ln N$ always.

    Args:
        threshold: $T$ in nats for all exits, or one for each but the last.

    Raises:
        ValueError: When a threshold is negative or not a number.
    """
    limits = [threshold] if isinstance(threshold, (int, float)) else list(threshold)
    if not limits or any(math.isnan(t) or t < 0 for t in limits):
        raise ValueError(f"threshold is {threshold}; an entropy in nats is at least 0.")

    def rule(history: Float[Tensor, "exits items classes"]) -> Bool[Tensor, " items"]:
        limit = limits[min(len(history), len(limits)) - 1]
        return entropy(history[-1]) < limit

    return rule
