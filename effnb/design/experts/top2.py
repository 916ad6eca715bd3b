r"""GShard and GLaM: each token goes to two experts, whose gates are divided by their sum.

GShard keeps a second choice with the probability $\min(1, 2 g_2)$, where $g_2$ is its gate: an
expert that would hardly count is often not asked at all. GLaM asks both every time. All first
choices take their seats before any second one.

Lepikhin et al., "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding",
2020, arXiv 2006.16668, algorithm 1. Du et al., "GLaM: Efficient Scaling of Language Models with
Mixture-of-Experts", 2022, arXiv 2112.06905.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from effnb.design.experts.routing import Routing, check_k, check_logits, top_k


def glam(
    logits: Float[Tensor, "groups time experts"],
    *,
    text: Bool[Tensor, "groups time"] | None = None,
    capacity: int | None = None,
) -> Routing:
    """Each token to its two best experts.

    Args:
        logits: The router's scores.
        text: Which tokens are text; None when all are.
        capacity: Seats of each expert in each group; None for no limit.

    Raises:
        ValueError: Fewer than two experts, or shapes that do not fit.
    """
    return top_k(logits, 2, text=text, capacity=capacity)


def gshard(
    logits: Float[Tensor, "groups time experts"],
    *,
    text: Bool[Tensor, "groups time"] | None = None,
    capacity: int | None = None,
    draws: Float[Tensor, "groups time"] | None = None,
) -> Routing:
    """Each token to its best expert, and to its second one with a probability.

    Args:
        logits: The router's scores.
        text: Which tokens are text; None when all are.
        capacity: Seats of each expert in each group; None for no limit.
        draws: Uniform random numbers: a second choice is made where the draw lies below twice its
            gate. None for both choices every time, as in evaluation.

    Raises:
        ValueError: Fewer than two experts, or shapes that do not fit.
    """
    if draws is None:
        return glam(logits, text=text, capacity=capacity)
    check_logits(logits, text)
    check_k(2, logits.shape[-1])
    if draws.shape != logits.shape[:2]:
        raise ValueError(
            f"the draws have shape {tuple(draws.shape)}; one for each token is "
            f"{tuple(logits.shape[:2])}."
        )
    best = logits.detach().topk(2, dim=-1).values
    second = (best[..., 1] - best[..., 0]).sigmoid()  # g2 = p2 / (p1 + p2)
    used = torch.stack([torch.ones_like(second, dtype=torch.bool), draws < 2 * second], -1)
    return top_k(logits, 2, text=text, capacity=capacity, used=used)
