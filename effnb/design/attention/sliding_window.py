r"""Sliding-window attention with sinks, in a model that was trained without.

Every token attends to the first $S$ tokens (sinks), to itself and to the $w - 1$ before it:

$$j \le i \quad\text{and}\quad (i - j < w \ \text{ or } \ j < S),$$

$T (w + S)$ pairs instead of $T^2 / 2$. The pairs are computed tile by tile by
`effnb.kernels.local_attention`, where sinks are global tokens of a causal window; no table of all
pairs is made. Positions stay those of the text. $N$ layers pass information on over $N (w - 1)$
tokens.

The cache still holds all tokens: use `streaming_llm` for a cache of constant size. The pattern is
not stored with the model's weights; a saved model is the original one.

Beltagy, Peters, Cohan, "Longformer: The Long-Document Transformer", 2020, arXiv 2004.05150; sinks:
Xiao, Tian, Chen, Han, Lewis, 2023, arXiv 2309.17453.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.core.modules import Model, refuse_encoder_decoder, share
from effnb.core.proof import probe_ids
from effnb.design.attention.checks import check_count
from effnb.kernels.local_attention import local_attention

NAME = "effnb_sliding_window"
TILE = 128
"""Queries that are computed together when the keys are more than the queries."""


def sliding_window_attention(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys dim"],
    *,
    window: int,
    sinks: int = 0,
    padding: Bool[Tensor, "batch keys"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries dim"]:
    r"""Causal attention to the first tokens and the latest ones; queries are the last tokens.

    Args:
        q: Queries.
        k: Keys; heads of a grouped-query model are fewer.
        v: Values.
        window: w, tokens that a query sees, itself among them.
        sinks: S, the first tokens that are not padding, seen by all.
        padding: True at tokens that are none; their outputs are 0.
        scale: The factor on scores; $1 / \sqrt d$ by default.

    Raises:
        ValueError: A window below 1, sinks below 0, shapes that do not fit.
    """
    check_count("window", window)
    check_count("sinks", sinks, least=0)
    queries, keys = q.shape[2], k.shape[2]
    if queries > keys:
        raise ValueError(
            f"there are {queries} queries and {keys} keys; queries are the last of them."
        )
    if padding is None:
        first = (torch.arange(keys, device=q.device) < sinks)[None]
    else:
        first = ((~padding).cumsum(1) <= sinks) & ~padding
    if queries == keys:
        return local_attention(
            q, k, v, window=window, causal=True, scale=scale, padding=padding,
            global_tokens=first.expand(len(q), -1) if sinks else None,
        )  # fmt: skip
    # Behind a cache: a few tiles of queries, each with the keys that any of them sees.
    parts, offset = [], keys - queries
    sink_columns = first.any(0).nonzero().flatten()
    for start in range(0, queries, TILE):
        stop = min(start + TILE, queries)
        near = torch.arange(max(0, offset + start - window + 1), offset + stop, device=q.device)
        columns = torch.cat([sink_columns[sink_columns < near[0]], near])
        i = torch.arange(offset + start, offset + stop, device=q.device)[:, None]
        seen = (columns <= i) & (((i - columns) < window) | first[:, None, columns])
        if padding is not None:
            seen = seen & ~padding[:, None, columns] & ~padding[:, i.flatten(), None]
        keys_here, values = (x[:, :, columns] for x in (k, v))
        if padding is not None:
            unseen = padding[:, None, columns, None]
            keys_here, values = (x.masked_fill(unseen, 0) for x in (keys_here, values))
        blind = ~seen.any(-1, keepdim=True)
        out = nn.functional.scaled_dot_product_attention(
            q[:, :, start:stop], keys_here, values, attn_mask=(seen | blind)[:, None],
            scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        parts.append(out.masked_fill(blind[:, None], 0))
    return torch.cat(parts, 2)


def _mask(
    *,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    kv_length: int,
    kv_offset: int = 0,
    **_: Any,
) -> Tensor | None:
    """What transformers asks for a mask: which keys are padding, and no table.

    Raises:
        ValueError: When the model wants another pattern than the causal one.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is not causal_mask_function:
        raise ValueError(
            "the model asks for a mask that is not just causal (packed texts, a window of its "
            "own); a sliding window takes plain causal attention only."
        )
    if attention_mask is None:
        return None
    real = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if real.shape[1] < kv_length:
        raise ValueError(
            f"the attention mask has {real.shape[1]} entries for {kv_length} tokens with their "
            "past; give one for each."
        )
    return None if bool(real.all()) else ~real


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention."""
    if dropout:
        raise ValueError("a sliding window has no dropout on attention weights; use eval().")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError("a mask of all pairs was given; only padding is taken beside the window.")
    odd = [n for n in ("softcap", "s_aux", "position_bias", "sliding_window") if keywords.get(n)
           is not None]  # fmt: skip
    if odd:
        raise ValueError(f"this model's attention has {odd[0]}, which a sliding window does not.")
    window, sinks = module.sliding_window_and_sinks
    out = sliding_window_attention(
        query, key, value, window=window, sinks=sinks, padding=attention_mask, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


def sliding_window(model: Model, window: int, *, sinks: int = 4) -> Model:
    """A model whose tokens attend to the latest tokens and to the first ones only.

    Caches, padding on either side and `generate` work as before.

    Args:
        model: A Hugging Face decoder of the Llama family, whose layers all attend to everything; it
            is not changed.
        window: w, tokens that a token sees, itself among them. A window as long as the text changes
            nothing.
        sinks: S, first tokens (of each sequence, without padding) that all see.

    Returns:
        A new model that shares all weights.

    Raises:
        ValueError: A window below 1, sinks below 0; an encoder, an encoder-decoder, or a model
            whose attention is not plain causal attention (windows or sinks of its own, capped
            scores, biases by position, or code that cannot be exchanged).
        TypeError: Numbers that are not whole.
    """
    check_count("window", window)
    check_count("sinks", sinks, least=0)
    refuse_encoder_decoder(model, "sliding_window")
    name = type(model).__name__
    config = getattr(model, "config", None)
    modules = [m for m in model.modules() if _is_attention(m)]
    if config is None or not modules or not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"the attention of {name} cannot be exchanged; give a Hugging Face decoder of the "
            "Llama family."
        )
    if not all(m.is_causal for m in modules):
        raise ValueError(f"{name} sees later tokens; a causal window is for decoders.")
    text = config.get_text_config()
    windows = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if windows or getattr(text, "sliding_window", None):
        raise ValueError(f"{name} has windows of its own; set those in its configuration instead.")
    if any(hasattr(m, "sliding_window_and_sinks") for m in modules):
        raise ValueError("this model has a sliding window already; start from the original.")
    result = _with(model, window, sinks)
    _check_whole_window(model)
    return result


def _is_attention(module: nn.Module) -> bool:
    return all(hasattr(module, a) for a in ("is_causal", "scaling", "config"))


def _with(model: Model, window: int, sinks: int) -> Model:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    result = share(model)
    for module in result.modules():
        if _is_attention(module):
            module.sliding_window_and_sinks = (window, sinks)
            module.config._attn_implementation = NAME
    result.config._attn_implementation = NAME
    result.config.get_text_config()._attn_implementation = NAME
    return result


def _check_whole_window(model: nn.Module) -> None:
    """Refuse a model whose attention is more than causal attention, which a short text shows.

    Raises:
        ValueError: When a window longer than a text changes its output.
    """
    ids = probe_ids(model)
    outputs = []
    for one in (model, _with(model, ids.shape[1], 0)):
        with torch.no_grad():
            outputs.append(share(one).eval()(input_ids=ids)[0].float())
    scale = outputs[0].abs().max().clamp(min=1e-6)
    if not bool((outputs[0] - outputs[1]).abs().max() <= 0.02 * scale):
        raise ValueError(
            f"the attention of {type(model).__name__} does more than causal softmax attention (its "
            "output changes with a window that hides nothing); it cannot be given a window."
        )
