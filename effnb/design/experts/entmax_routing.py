r"""Entmax routing: a router whose weights are exactly zero for most experts.

$$p = \operatorname{entmax}_\alpha(x W_r), \qquad y = \sum_{e:\, p_e > 0} p_e\, \mathrm{FFN}_e(x)$$

Top-k cuts a softmax off, at the same number for every token, and the cut has no gradient. Entmax is
zero where scores are low enough, without a cut: a clear token needs one expert, an unclear one
several, and the weights change continuously as experts come and go. The number of experts is not
given but follows from the scores; they grow sharper in training.

Entmax itself: Peters, Niculae, Martins, "Sparse Sequence-to-Sequence Models", 2019, arXiv
1905.05702. It is applied to routers here; this is no published model.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from effnb.design.attention.entmax import entmax
from effnb.design.experts.routing import Routing, check_logits


def entmax_routing(
    logits: Float[Tensor, "groups time experts"],
    *,
    alpha: float = 1.5,
    text: Bool[Tensor, "groups time"] | None = None,
) -> Routing:
    """Each token to every expert whose entmax weight is not zero.

    Args:
        logits: The router's scores.
        alpha: 1.5, or 2 for sparsemax; from above 1, where weights become zero.
        text: Which tokens are text; None when all are.

    Raises:
        ValueError: An alpha of 1 or below, which excludes no expert, or shapes that do not fit.
    """
    check_logits(logits, text)
    if not alpha > 1:
        raise ValueError(f"alpha is {alpha}; it must be above 1: softmax is never zero.")
    groups, time, count = logits.shape
    wide = logits if logits.dtype == torch.float64 else logits.float()
    probabilities = entmax(wide, alpha)
    weights = probabilities
    if text is not None:
        weights = weights.masked_fill(~text[..., None], 0)
    flat = weights.reshape(groups * time, count)
    tokens, experts = flat.nonzero().unbind(1)
    there = torch.ones_like(tokens, dtype=torch.bool)
    return Routing(
        logits, probabilities, tokens, experts, flat[tokens, experts], there, there, text
    )  # fmt: skip
