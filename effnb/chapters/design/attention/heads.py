"""The heads of a trained model: their queries, keys and values, and entmax in softmax's place.

A decoder and an encoder of the bench are asked alike; queries and keys are what their scores are
made of, after the positions have been put in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnb.core.modules import share
from effnb.design.attention import entmax_attention

NAME = "effnb_chapter_heads"


@dataclass(frozen=True)
class Heads:
    """What the heads of one layer compare, for a few texts.

    Attributes:
        q: Queries.
        k: Keys, one head for each head of queries.
        v: Values, likewise.
        weights: The weight that each query gives to each key.
        causal: Whether no query sees a later key.
    """

    q: Float[Tensor, "batch heads time dim"]
    k: Float[Tensor, "batch heads time dim"]
    v: Float[Tensor, "batch heads time dim"]
    weights: Float[Tensor, "batch heads time time"]
    causal: bool

    @property
    def used(self) -> Bool[Tensor, "batch heads time time"]:
        """Pairs with a weight above 0."""
        return self.weights > 0

    @property
    def visible(self) -> Bool[Tensor, "time time"]:
        """Pairs that may have one."""
        time = self.q.shape[2]
        every = torch.ones(time, time, dtype=torch.bool, device=self.q.device)
        return every.tril() if self.causal else every


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention; texts have no padding."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    time = query.shape[2]
    visible = torch.ones(time, time, dtype=torch.bool, device=query.device)
    causal = bool(module.is_causal)
    visible = visible.tril() if causal else visible
    if module.kept_pairs is not None:
        visible = visible & module.kept_pairs(query, key)
    out, weights = entmax_attention(
        query, key, value, alpha=module.alpha, visible=visible, scale=scaling
    )
    if module.seen is not None:
        module.seen.append(Heads(query, key, value, weights, causal))
    return out.transpose(1, 2).contiguous(), None


def with_entmax(
    model: nn.Module,
    alpha: float = 1.5,
    *,
    kept_pairs: Any = None,
    seen: list[Heads] | None = None,
) -> nn.Module:
    """A model with entmax in softmax's place; nothing is trained. It reads texts without padding.

    Args:
        model: A Hugging Face model whose attention can be exchanged; it is not changed.
        alpha: Entmax's; 1 is softmax.
        kept_pairs: From a layer's queries and keys to the only pairs that are computed; for all
            layers, or a list with one for each.
        seen: A list that gets the heads of each layer, in order, whenever the model runs.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda **_: None)
    result = share(model)
    layers = [m for m in result.modules() if hasattr(m, "is_causal") and hasattr(m, "config")]
    for number, module in enumerate(layers):
        module.alpha, module.seen = alpha, seen
        listed = isinstance(kept_pairs, list)
        module.kept_pairs = kept_pairs[number] if listed else kept_pairs
    for module in result.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = NAME
    return result.eval()


@torch.no_grad()
def heads_of(model: nn.Module, ids: Int[Tensor, "batch time"], alpha: float = 1.5) -> list[Heads]:
    """The heads of every layer while a model with entmax reads texts."""
    seen: list[Heads] = []
    with_entmax(model, alpha, seen=seen)(input_ids=ids)
    return seen
