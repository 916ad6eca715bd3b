r"""KIVI: a key-value cache of 2 bits, keys grouped by channel and values by token.

When text is generated, the keys and values of all tokens so far are kept, and for long texts they
outgrow the model. KIVI stores them on separate affine grids,

$$\hat x = q\,s + m, \qquad m = \min x, \qquad s = \frac{\max x - \min x}{2^b - 1},$$

with one pair $(s, m)$ in half precision for every $G$ numbers: $b + 32 / G$ bits per number, 3
bits for $b = 2$ and $G = 32$. Keys have channels that are large at every token, so $G$ consecutive
tokens of one channel share a grid (`key_axis="channel"`); values have none, and $G$ channels of one
token share it. The latest tokens, the *residual*, stay as they are, since a full group of keys has
to be waited for: of the values, always the last $R$; of the keys, those since the last time that
there were $R$ of them, when all of these are quantized together.

Keys are quantized as transformers' caches receive them, after the rotary embedding.

Liu, Yuan, Jin, Zhong, Xu, Braverman, Chen, Hu, "KIVI: A Tuning-Free Asymmetric 2bit Quantization
for KV Cache", 2024, arXiv 2402.02750.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.context import check_context
from effnb.core.modules import Model, share
from effnb.inference.quantization.hadamard import check_order
from effnb.inference.quantization.kv_layer import KiviLayer, check_head, check_settings


@cache
def _as_transformers_cache() -> type:
    """`KiviCache` as a subclass of transformers' `Cache`.

    Made when a cache is first needed, so that importing this module does not import transformers.
    """
    from transformers.cache_utils import Cache, CacheLayerMixin

    CacheLayerMixin.register(KiviLayer)
    return type("KiviCache", (KiviCache, Cache), {})


class KiviCache:
    """A quantized key-value cache for `model(..., past_key_values=)` and `model.generate`.

    A cache is for one batch; make a fresh one for the next, or call `reset`. It grows by any number
    of tokens at a time. What one step attends to is exact for that step's own tokens, as in the
    paper: **a single pass over a whole text therefore shows no error at all.** To measure the error
    run the text in small chunks (`decode_losses`), or set `quantized_prompt`.
    """

    def __new__(cls, *args: Any, **keywords: Any) -> KiviCache:
        """An instance of the subclass that is a transformers `Cache` too."""
        return object.__new__(_as_transformers_cache())

    def __init__(
        self,
        config: Any = None,
        *,
        bits: int = 2,
        group_size: int = 32,
        residual: int = 128,
        key_axis: str = "channel",
        quantized_prompt: bool = False,
        rotate_keys: bool = False,
    ) -> None:
        r"""An empty cache.

        Args:
            config: The model's configuration, to check the model at once; without it, layers are
                added as they come.
            bits: 2, 4 or 8 in the paper; 2 to 8 here.
            group_size: $G$, numbers that share scale and minimum; a multiple of 8.
            residual: $R$, the latest tokens that are kept exactly; a multiple of `group_size`.
            key_axis: "channel": $G$ tokens of a channel share a grid. "token": $G$ channels of a
                token, as for values.
            quantized_prompt: Whether all tokens of a first step attend to keys and values as the
                last one meets them: all but the residual quantized. A single pass over a text then
                shows an error. It is larger than that of decoding, where the near past is exact
                for every token.
            rotate_keys: Multiply keys by a Hadamard matrix within the head before they are
                quantized, and back when they are read (as in QuaRot, for the cache only).

        Raises:
            ValueError: A parameter outside its range, heads that do not consist of whole groups, or
                a model whose layers do not all attend to everything.
        """
        settings = dict(
            bits=bits,
            group_size=group_size,
            residual=residual,
            key_axis=key_axis,
            quantized_prompt=quantized_prompt,
            rotate_keys=rotate_keys,
        )
        check_settings(bits, group_size, residual, key_axis)
        make = partial(KiviLayer, **settings)
        if config is None:
            super().__init__(layer_class_to_replicate=make)
            return
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                "an encoder-decoder keeps keys of two attentions in its cache; KIVI is for models "
                "that are one decoder."
            )
        config = config.get_text_config(decoder=True)
        if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
            raise ValueError("only models whose layers all attend to everything can use KIVI.")
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        check_head(size, group_size)
        if rotate_keys:
            check_order(size, "the width of a key")
        super().__init__(layers=[make() for _ in range(config.num_hidden_layers)])

    @property
    def bytes(self) -> int:
        """Bytes of all that is stored: codes, scales, minima, and the latest tokens."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def residual_bytes(self) -> int:
        """The part of `bytes` that the latest tokens take, in the model's own type."""
        return sum(layer.residual_bytes for layer in self.layers)

    @property
    def fp16_bytes(self) -> int:
        """What an ordinary cache would take for the same tokens in 16-bit precision."""
        return sum(layer.fp16_bytes for layer in self.layers)


def quantize_kv(
    keys: Float[Tensor, "batch heads time key_dim"],
    values: Float[Tensor, "batch heads time value_dim"],
    bits: int = 2,
    *,
    group_size: int = 32,
    residual: int = 128,
    key_axis: str = "channel",
    rotate_keys: bool = False,
) -> tuple[Float[Tensor, "batch heads time key_dim"], Float[Tensor, "batch heads time value_dim"]]:
    """Keys and values as the last token meets them in a `KiviCache`.

    Args:
        keys: Keys of all tokens.
        values: Values of all tokens.
        bits: 2 to 8.
        group_size: Numbers that share scale and minimum.
        residual: The latest tokens that are kept exactly.
        key_axis: "channel" or "token".
        rotate_keys: Whether keys are rotated within the head while they are packed.

    Raises:
        ValueError: As `KiviCache`; or keys or values that are NaN or beyond half precision.
    """
    layer = KiviLayer(bits, group_size, residual, key_axis, True, rotate_keys)
    return layer.update(keys, values)


class _GiveCache:
    """Before a model runs: if it has no past, give it an empty quantized one."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def __call__(self, module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> Any:
        past = keywords.get("past_key_values")
        if past is None or (not isinstance(past, KiviCache) and not past.get_seq_length()):
            new = KiviCache(getattr(module, "config", None), **self.settings)
            keywords = {**keywords, "past_key_values": new}
        return arguments, keywords


def kivi(
    model: Model,
    bits: int = 2,
    *,
    group_size: int = 32,
    residual: int = 128,
    key_axis: str = "channel",
    quantized_prompt: bool = True,
    rotate_keys: bool = False,
) -> Model:
    """A model that keeps its keys and values quantized, wherever it would have had an empty cache.

    Its weights are the given model's. By default a first step attends to quantized tokens too, so
    that an evaluation in one pass shows an error; see `KiviCache`.

    Args:
        model: A Hugging Face causal language model; it is not changed.
        bits: 2 to 8.
        group_size: Numbers that share scale and minimum.
        residual: The latest tokens that are kept exactly.
        key_axis: "channel" or "token".
        quantized_prompt: Whether all tokens of a first step meet the past as the last one does.
        rotate_keys: Whether keys are rotated within the head while they are packed.

    Raises:
        ValueError: As `KiviCache`, or a model that has such a cache already.
    """
    if any(isinstance(hook, _GiveCache) for hook in model._forward_pre_hooks.values()):
        raise ValueError("this model's cache is quantized already; start from the original.")
    settings = dict(
        bits=bits,
        group_size=group_size,
        residual=residual,
        key_axis=key_axis,
        quantized_prompt=quantized_prompt,
        rotate_keys=rotate_keys,
    )
    KiviCache(getattr(model, "config", None), **settings)  # says at once what does not fit
    result = share(model)
    result.register_forward_pre_hook(_GiveCache(settings), with_kwargs=True)
    return result


def decode_losses(
    model: nn.Module, ids: Int[Tensor, "batch time"], past: Any, *, chunk: int = 32
) -> Float[Tensor, "batch time_minus_1"]:
    r"""$-\ln p(x_{t+1} \mid x_{\le t})$ of a given text, read a chunk at a time through a cache.

    With chunks of one token it is what decoding meets; larger ones are faster, and exact within the
    chunk. With chunks of `residual` tokens, keys are met as in decoding, and only some values are
    exact that would have been quantized.

    Args:
        model: A Hugging Face causal language model.
        ids: Token ids.
        past: An empty cache, quantized or not.
        chunk: Tokens at a time.

    Returns:
        Losses in nats, in float32.

    Raises:
        ValueError: A chunk below 1, fewer than two tokens or more than the model has positions for,
            or a cache that is not empty.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; at least 1 token is read at a time.")
    if ids.shape[1] < 2:
        raise ValueError(f"the text has {ids.shape[1]} tokens; at least 2 are needed for a loss.")
    if past.get_seq_length():
        raise ValueError("the cache holds another text; start with an empty one.")
    check_context(model, ids.shape[1] - 1, "the text's length")
    logits = []
    with torch.no_grad():
        for part in ids[:, :-1].split(chunk, dim=1):
            out = model(input_ids=part, past_key_values=past, use_cache=True)
            logits.append(out.logits.float())
    targets = ids[:, 1:]
    return nn.functional.cross_entropy(
        torch.cat(logits, 1).transpose(1, 2), targets, reduction="none"
    )
