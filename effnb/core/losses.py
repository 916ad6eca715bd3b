"""Losses that need no room for all logits at once."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed with the loss, chunk by chunk: logits of one chunk live at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weights, chunk):
        total = hidden.new_zeros((), dtype=torch.float32)
        norm = token_weights.sum()
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight)
        for begin in range(0, len(hidden), chunk):
            part = slice(begin, begin + chunk)
            h, y, w = hidden[part], targets[part], token_weights[part]
            log_p = nn.functional.log_softmax((h @ weight.T).float(), -1)  # (chunk, vocabulary)
            total -= (w * log_p.gather(1, y[:, None])[:, 0]).sum()
            gradient = log_p.exp_()  # d loss / d logits = w (p - onehot(y)) / Σw
            gradient[torch.arange(len(y), device=y.device), y] -= 1
            gradient *= (w / norm)[:, None]
            gradient = gradient.to(hidden.dtype)
            hidden_gradient[part] = gradient @ weight
            weight_gradient.addmm_(gradient.T, h)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total / norm

    @staticmethod
    def backward(ctx, grad):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * grad, weight_gradient * grad, None, None, None


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocabulary dim"],
    targets: Int[Tensor, " tokens"],
    token_weights: Float[Tensor, " tokens"] | None = None,
    chunk: int = 512,
) -> Float[Tensor, ""]:
    r"""Cross-entropy of an output head without storing its logits.

    $\sum_t w_t \left(-\log \operatorname{softmax}(W h_t)_{y_t}\right) / \sum_t w_t$, in nats. Equal
    to computing all logits first, in $c / T$ of their memory for chunks of $c$ of $T$ tokens. The
    gradients for `hidden` and `weight` are made in the forward pass, so it cannot be
    differentiated twice.

    Args:
        hidden: States before the head.
        weight: The head's matrix, without a bias.
        targets: The token that each state should predict.
        token_weights: Weight $w_t$ of each token; 1 where None.
        chunk: Tokens whose logits exist at once.

    Raises:
        ValueError: When the weights add up to 0 or less, or `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1.")
    if token_weights is None:
        token_weights = torch.ones(len(targets), device=hidden.device)
    if not float(token_weights.sum()) > 0:
        raise ValueError("the weights of the tokens add up to nothing; at least one must count.")
    return _LinearCrossEntropy.apply(hidden, weight, targets, token_weights, chunk)
