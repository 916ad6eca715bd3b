"""What every attention layer of a model computes with: queries, keys, values and raw scores.

A transformer hands out attention probabilities at best. Distilling attention takes what comes
before: the scores without the softmax (TinyBERT), or the queries, keys and values of each head
(MiniLM). Models of the transformers library compute attention through one exchangeable function; a
recording one is put in its place in a copy that shares every parameter, so that gradients reach the
model itself and the model is not changed.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from effnb.core.modules import share

RECORDED = "effnb_recorded"
"""The name under which the recording attention is registered."""
_recording = threading.local()


@dataclass(frozen=True)
class LayerAttention:
    """What one attention layer computed with; keys and values repeated to one for each query head.

    Attributes:
        query: (batch, heads, time, head dim), after rotary positions where there are any.
        key: (batch, heads, keys, head dim), likewise.
        value: (batch, heads, keys, value dim).
        scaling: What the products of query and key are multiplied by.
        bias: What is added to the scores where a pair is seen, or None.
        seen: (batch, 1 or heads, time, keys), the pairs that the mask allows, or None for all.
    """

    query: Float[Tensor, "batch heads time dim"] = field(repr=False)
    key: Float[Tensor, "batch heads keys dim"] = field(repr=False)
    value: Float[Tensor, "batch heads keys value_dim"] = field(repr=False)
    scaling: float
    bias: Tensor | None = field(default=None, repr=False)
    seen: Bool[Tensor, "#batch some time keys"] | None = field(default=None, repr=False)

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return self.query.shape[1]

    def scores(self) -> Float[Tensor, "batch heads time keys"]:
        r"""$A = Q K^\top / \sqrt{d}$ without the softmax; 0 for pairs that the mask hides."""
        scores = self.query @ self.key.transpose(-1, -2) * self.scaling
        if self.bias is not None:
            scores = scores + self.bias
        return scores if self.seen is None else scores.masked_fill(~self.seen, 0)


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as the library calls it, noting what it computes with."""
    for unusual in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(unusual) is not None:
            raise ValueError(
                f"{type(module).__name__} changes its attention scores ({unusual}); recording "
                "them is for plain softmax attention."
            )
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias = seen = None
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[-2]]
        if attention_mask.dtype == torch.bool:
            seen = attention_mask
        else:
            seen = attention_mask > torch.finfo(attention_mask.dtype).min / 2
            bias = attention_mask.masked_fill(~seen, 0)
            bias = bias if bool(bias.any()) else None
    _recording.layers.append(LayerAttention(query, key, value, scaling, bias, seen))
    mixed = nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout if module.training else 0.0, scale=scaling
    )
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(RECORDED, _record)
AttentionMaskInterface.register(RECORDED, eager_mask)


def run_recorded(model: nn.Module, /, *inputs: Any, **keywords: Any) -> tuple[Any, list]:
    """Run a model and return its output with one `LayerAttention` for each attention layer.

    Args:
        model: A transformers model; it is not changed. Gradients reach its parameters.
        inputs: Arguments of its forward pass.
        keywords: The same by name.

    Raises:
        ValueError: When the model's attention does not pass through the library's exchangeable
            function, or changes its scores (soft capping, sinks).
    """
    reader = share(model)
    configs = {id(c): c for m in reader.modules() if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = RECORDED
    before = getattr(_recording, "layers", None)
    _recording.layers = []
    try:
        output = reader(*inputs, **keywords)
        layers = _recording.layers
    finally:
        _recording.layers = before
    if not layers:
        raise ValueError(
            f"{type(model).__name__} computes attention in its own way; only models whose "
            "attention is exchangeable in transformers can be recorded."
        )
    return output, layers


def same_heads(student: LayerAttention, teacher: LayerAttention, remedy: str) -> None:
    """Refuse layers whose heads cannot be compared one by one.

    Raises:
        ValueError: Other numbers of heads, or sequences of other lengths or numbers.
    """
    if student.heads != teacher.heads:
        raise ValueError(
            f"the student's layer has {student.heads} heads and the teacher's {teacher.heads}; "
            f"they must agree ({remedy})."
        )
    ours, theirs = (tuple(x.query.shape[i] for i in (0, 2)) for x in (student, teacher))
    if ours != theirs:
        raise ValueError(
            f"the student read {ours[0]} sequences of {ours[1]} tokens and the teacher "
            f"{theirs[0]} of {theirs[1]}; both must read the same tokens."
        )
