"""A text read through a cache of constant size: the loss of every token, and what is written then.

The text goes through the cache a few tokens at a time, as in generation, so that each token is
predicted from what the cache still holds and from nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.design.attention import StreamingCache

CHUNK = 4
"""Tokens that are read at once; the first of them then sees 3 tokens fewer than the cache holds."""
EVERYTHING = "everything"
"""In place of a window: nothing is forgotten."""


def empty_cache(model: nn.Module, window: int | str, sinks: int) -> Any:
    """A cache of `window` tokens, sinks among them, or one that keeps everything.

    Args:
        model: The decoder that it is for.
        window: Tokens that the cache holds in all, or `EVERYTHING`.
        sinks: First tokens that it never forgets.

    Raises:
        ValueError: When the sinks leave no room for other tokens.
    """
    if window == EVERYTHING:
        from transformers import DynamicCache

        return DynamicCache(config=model.config)
    if sinks >= int(window):
        raise ValueError(f"a cache of {window} tokens has no room for others beside {sinks} sinks.")
    return StreamingCache(model, window=int(window) - sinks, sinks=sinks)


@torch.inference_mode()
def read(
    model: nn.Module, ids: Int[Tensor, "texts time"], past: Any, chunk: int = CHUNK
) -> Float[Tensor, "texts time"]:
    """Nats of each token but the first, and 0 in its place.

    Args:
        model: A decoder; its own limit on lengths is not asked.
        ids: Texts of one length.
        past: An empty cache; it holds the end of the texts afterwards.
        chunk: Tokens read at once.
    """
    losses = [torch.zeros(len(ids), 1)]
    for start in range(0, ids.shape[1], chunk):
        part = ids[:, start : start + chunk]
        logits = model(input_ids=part, past_key_values=past, use_cache=True).logits
        following = ids[:, start + 1 : start + 1 + chunk]
        logits = logits[:, : following.shape[1]].float()
        losses.append(nn.functional.cross_entropy(logits.mT, following, reduction="none"))
    return torch.cat(losses, 1)


@torch.inference_mode()
def written(
    model: nn.Module, last: Int[Tensor, "texts 1"], past: Any, tokens: int, seed: int = 0
) -> Int[Tensor, "texts new"]:
    """Tokens drawn one by one behind what a cache holds, from the 20 likeliest each time.

    Args:
        model: A decoder.
        last: The last token of each text, read again if the cache has it.
        past: The cache.
        tokens: How many to write.
        seed: Of the draws; the same draws meet every cache.
    """
    draw = torch.Generator().manual_seed(seed)
    found, token = [], last
    for _ in range(tokens):
        logits = model(input_ids=token, past_key_values=past, use_cache=True).logits[:, -1].float()
        best, which = logits.topk(20, -1)
        token = which.gather(1, torch.multinomial(best.softmax(-1), 1, generator=draw))
        found.append(token)
    return torch.cat(found, 1)


def binned(losses: Float[Tensor, "texts time"], width: int) -> list[float]:
    """Means over the texts of `width` places at a time; the first place, which has none, aside."""
    parts = losses.split(width, 1)
    means = [parts[0][:, 1:].mean(), *(part.mean() for part in parts[1:])]
    return [round(float(x), 4) for x in means]
