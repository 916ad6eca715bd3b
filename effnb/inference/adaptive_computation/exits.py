r"""Exits of a decoder: every layer's hidden state, read by the shared norm and output head.

A decoder with $L$ layers has $L$ exits. Exit $i$ predicts the next token from the state $d^i$ that
layer $i$ leaves, through the model's own final norm and output head:

$$p_i = \operatorname{softmax}\bigl(W \operatorname{norm}(d^i)\bigr).$$

An ordinary model is trained at its last exit only, and its early exits say little. Training all of
them at once takes a weighted sum of their losses, $\mathcal L = \sum_i \omega_i \mathcal L_i$ with
$\sum_i \omega_i = 1$.

Schuster et al., "Confident Adaptive Language Modeling", 2022, arXiv 2207.07061, section 3.1
(weights $\omega_i = i / \sum_j j$); Elhoushi et al., "LayerSkip", 2024, arXiv 2404.16710.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

WEIGHTINGS = ("linear", "uniform", "exponential")
"""How `exit_weights` may spread the loss over the exits."""


def check_decoder(model: nn.Module) -> None:
    """Refuse a model without the parts that its exits share.

    Raises:
        ValueError: When it has no blocks, final norm or output head under Llama's names.
    """
    inner = getattr(model, "model", None)
    parts = [getattr(inner, name, None) for name in ("embed_tokens", "layers", "norm")]
    if any(part is None for part in parts) or not isinstance(
        getattr(model, "lm_head", None), nn.Module
    ):
        raise ValueError(
            f"{type(model).__name__} is laid out otherwise: exits need a decoder with "
            "model.embed_tokens, model.layers, model.norm and lm_head, as Llama has."
        )


def exit_weights(exits: int, weighting: str = "linear") -> Float[Tensor, " exits"]:
    r"""$\omega_i$ of each exit, the first layer's first; they add up to 1.

    "linear" is $\omega_i \propto i$ (CALM), "uniform" the same for all, "exponential"
    $\omega_i \propto 2^i$.

    Raises:
        ValueError: When there is no exit, or no such weighting.
    """
    if exits < 1:
        raise ValueError(f"exits is {exits}; it must be at least 1.")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting is {weighting!r}; choose of {', '.join(WEIGHTINGS)}.")
    i = torch.arange(1, exits + 1, dtype=torch.float32)
    raw = {"linear": i, "uniform": torch.ones(exits), "exponential": 2.0**i}[weighting]
    return raw / raw.sum()


def exit_states(
    model: nn.Module, ids: Int[Tensor, "batch time"]
) -> list[Float[Tensor, "batch time dim"]]:
    """What each exit's head reads: every layer's states after the model's final norm."""
    check_decoder(model)
    out = model.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    # transformers gives embedding, layer 1, ..., and the last layer's states already normalized
    inner = out.hidden_states[1:-1]
    return [*(model.model.norm(state) for state in inner), out.last_hidden_state]


@torch.inference_mode()
def exit_logits(
    model: nn.Module, ids: Int[Tensor, "batch time"]
) -> Float[Tensor, "exits batch time vocabulary"]:
    """The logits of all exits; the last is the model's own."""
    return torch.stack([model.lm_head(state) for state in exit_states(model, ids)])


def exit_losses(
    model: nn.Module,
    ids: Int[Tensor, "batch time"],
    token_weights: Float[Tensor, "batch time"] | None = None,
) -> list[Float[Tensor, ""]]:
    r"""Next-token cross-entropy of each exit in nats, $\sum_t w_t \ell_t / \sum_t w_t$.

    Args:
        model: The decoder.
        ids: Tokens.
        token_weights: $w_t$, how much each token counts as a target; all alike when None.
    """
    targets = ids[:, 1:].flatten()
    weights = (torch.ones_like(ids) if token_weights is None else token_weights)[:, 1:].flatten()
    losses = []
    for state in exit_states(model, ids):
        logits = model.lm_head(state[:, :-1]).flatten(0, 1).float()
        each = nn.functional.cross_entropy(logits, targets, reduction="none")
        losses.append((weights * each).sum() / weights.sum())
    return losses


def exit_loss(
    model: nn.Module,
    ids: Int[Tensor, "batch time"],
    weights: Float[Tensor, " exits"] | Sequence[float],
    token_weights: Float[Tensor, "batch time"] | None = None,
) -> Float[Tensor, ""]:
    r"""$\mathcal L = \sum_i \omega_i \mathcal L_i$, CALM's training loss.

    Raises:
        ValueError: When there is not one weight for each layer.
    """
    losses = exit_losses(model, ids, token_weights)
    if len(weights) != len(losses):
        raise ValueError(f"{len(weights)} weights for {len(losses)} exits; give one for each.")
    # L = sum_i omega_i L_i
    return sum(omega * loss for omega, loss in zip(torch.as_tensor(weights).tolist(), losses))
