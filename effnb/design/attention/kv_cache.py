r"""The key-value cache: what decoding keeps, what it weighs, and what it saves.

A causal model that has read $T$ tokens keeps their keys and values, for the next token attends to
them and changes none. Bytes of the cache, for $N$ layers with $G$ key-value heads of width $d_h$,
$B$ sequences and $b$ bytes a number:

$$2 \cdot N \cdot G \cdot d_h \cdot T \cdot B \cdot b.$$

The attention of one more token then takes $O(T)$ products instead of the $O(T^2)$ of reading the
whole text again, and the other layers run on one token instead of $T$. Generating $n$ tokens is
$O(n^2)$ products with a cache and $O(n^3)$ without. Multi-query attention ($G = 1$) was invented to
make the cache small: Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need", 2019,
arXiv 1911.02150.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.context import check_context
from effnb.design.attention.checks import check_count


def kv_bytes(
    tokens: int,
    *,
    layers: int,
    kv_heads: int,
    head_dim: int,
    batch: int = 1,
    bytes_per_number: float = 2,
) -> float:
    r"""Bytes of keys and values: $2 N G d_h T B b$.

    Args:
        tokens: T.
        layers: N.
        kv_heads: G, heads of keys and values.
        head_dim: Width of a head.
        batch: B, sequences.
        bytes_per_number: b; 2 for 16-bit numbers, 0.5 for 4-bit codes without their scales.

    Raises:
        ValueError: A number below 1 (of tokens: below 0; of bytes: not above 0).
    """
    check_count("tokens", tokens, least=0)
    sizes = dict(layers=layers, kv_heads=kv_heads, head_dim=head_dim, batch=batch)
    for name, value in sizes.items():
        check_count(name, value)
    if not bytes_per_number > 0:
        raise ValueError(f"bytes_per_number is {bytes_per_number}; it must be above 0.")
    return 2 * layers * kv_heads * head_dim * tokens * batch * bytes_per_number


@dataclass(frozen=True)
class CacheShape:
    """The shape of a model's cache.

    Attributes:
        layers: N.
        heads: Query heads.
        kv_heads: G.
        head_dim: Width of a head.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> CacheShape:
        """The shape that a Hugging Face configuration (or model) describes.

        Raises:
            ValueError: When it describes something else than a decoder with attention throughout.
        """
        config = getattr(config, "config", config)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError("an encoder-decoder keeps keys of two attentions; give a decoder.")
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        layers, heads = (
            getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads")
        )
        if not isinstance(layers, int) or not isinstance(heads, int):
            raise ValueError("the configuration does not say how many layers and heads there are.")
        kinds = set(getattr(config, "layer_types", None) or ())
        if other := kinds - {"full_attention"}:
            raise ValueError(
                f"some layers are of the kind {min(other)}; the cache does not grow with all of "
                "them, and one formula does not fit."
            )
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        if getattr(config, "multi_query", False):  # Falcon's word
            kv_heads = 1
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(layers, heads, kv_heads, head_dim)

    def bytes(self, tokens: int, *, batch: int = 1, bytes_per_number: float = 2) -> float:
        """Bytes of the cache of so many tokens; see `kv_bytes`."""
        return kv_bytes(
            tokens,
            layers=self.layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            batch=batch,
            bytes_per_number=bytes_per_number,
        )

    def attention_operations(self, prompt: int, new: int, *, cached: bool = True) -> int:
        r"""Multiplications and additions of attention while `new` tokens are generated.

        A pair of tokens costs $4 d_h$ in every query head: products with the key and with the
        value. Token $t$ meets $t$ tokens; without a cache, all tokens before it meet theirs again.

        Args:
            prompt: Tokens read before; reading them is not counted.
            new: Tokens generated.
            cached: Whether keys and values are kept.

        Raises:
            ValueError: Negative numbers.
        """
        check_count("prompt", prompt, least=0)
        check_count("new", new, least=0)
        lengths = range(prompt + 1, prompt + new + 1)
        pairs = sum(t if cached else t * (t + 1) // 2 for t in lengths)
        return 4 * self.head_dim * self.heads * self.layers * pairs


def stored_cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a transformers cache holds now."""
    found = 0
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, Tensor):
                found += tensor.numel() * tensor.element_size()
    return found


def decode_logits(
    model: nn.Module,
    ids: Int[Tensor, "batch time"],
    past: Any = None,
    *,
    chunk: int = 1,
) -> Float[Tensor, "batch time vocabulary"]:
    """The logits of a given text, read a few tokens at a time through a cache.

    With an ordinary cache they are those of reading it at once; a cache that forgets shows here
    what forgetting does.

    Args:
        model: A Hugging Face causal language model.
        ids: Token ids, without padding.
        past: An empty cache; an ordinary one by default.
        chunk: Tokens at a time.

    Raises:
        ValueError: A chunk below 1, a text longer than the model's positions, or a cache that is
            not empty.
    """
    check_count("chunk", chunk)
    check_context(model, ids.shape[1], "the text's length")
    if past is None:
        from transformers import DynamicCache

        past = DynamicCache(config=model.config)
    if past.get_seq_length():
        raise ValueError("the cache holds another text; start with an empty one.")
    logits = []
    with torch.no_grad():
        for part in ids.split(chunk, 1):
            out = model(input_ids=part, past_key_values=past, use_cache=True)
            logits.append(out.logits)
    return torch.cat(logits, 1)
