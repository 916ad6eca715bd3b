r"""Switch: each token goes to one expert.

$$p = \operatorname{softmax}(x W_r), \qquad e^\ast = \arg\max_e p_e, \qquad
  y = p_{e^\ast}\, \mathrm{FFN}_{e^\ast}(x)$$

The probability multiplies the output: it is the only way on which the loss reaches the router.
Dividing it by itself, as methods with several choices divide theirs by their sum, would leave 1
and no gradient. Scores are computed in float32, for a softmax in half precision rounds away small
differences. In training the router's inputs may be **jittered**, multiplied by uniform noise
between $1 - \epsilon$ and $1 + \epsilon$, so that close decisions fall either way.

Fedus, Zoph, Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models with Simple and
Efficient Sparsity", 2022, arXiv 2101.03961, eqs. 1-3.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from effnb.design.experts.routing import Routing, top_k

TRAINING_FACTOR, EVALUATION_FACTOR = 1.25, 2.0
"""The capacity factors of the authors' code."""


def switch(
    logits: Float[Tensor, "groups time experts"],
    *,
    text: Bool[Tensor, "groups time"] | None = None,
    capacity: int | None = None,
) -> Routing:
    """Each token to one expert, with its probability as the gate; seats in the order of tokens.

    Args:
        logits: The router's scores.
        text: Which tokens are text; None when all are.
        capacity: Seats of each expert in each group; None for no limit.

    Raises:
        ValueError: Shapes that do not fit.
    """
    return top_k(logits, 1, text=text, capacity=capacity, normalize=False)


def jitter(x: Float[Tensor, "*rows hidden"], amount: float) -> Float[Tensor, "*rows hidden"]:
    r"""$x \circ u$ with $u \sim U(1 - \epsilon, 1 + \epsilon)$, by PyTorch's global seed.

    Raises:
        ValueError: An amount outside of [0, 1).
    """
    if not 0 <= amount < 1:
        raise ValueError(f"the jitter is {amount}; it must lie from 0 to below 1.")
    if not amount:
        return x
    return x * torch.empty_like(x).uniform_(1 - amount, 1 + amount)
