r"""Prefix language modelling: read a beginning from both sides, predict the rest token by token.

$$M_{ij} = 1 \quad\text{if}\quad j \le \max(i, P - 1)$$

The first $P$ positions see each other; those after them see the prefix and what came before. Only
tokens after the prefix are asked. With a split drawn evenly, that is half of them on average.

Liu, Saleh, Pot, Goodrich, Sepassi, Kaiser, Shazeer, "Generating Wikipedia by Summarizing Long
Sequences", 2018, arXiv 1801.10198; named and compared by Raffel et al., "Exploring the Limits of
Transfer Learning with a Unified Text-to-Text Transformer" (T5), 2019, arXiv 1910.10683, sections
3.2.1 and 3.3.1.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from effnb.pretraining.objectives.examples import (
    IGNORED,
    Example,
    drawn,
    seen_text,
    text_of,
)


def prefix_visible(prefix: Int[Tensor, " batch"], time: int) -> Bool[Tensor, "batch time time"]:
    r"""$M_{ij} = 1$ if $j \le \max(i, P - 1)$, for each text's own prefix length $P$.

    Args:
        prefix: $P$ of each text, from 0 (causal) to `time` (every position sees every other).
        time: Number of positions.

    Raises:
        ValueError: When a prefix is negative or longer than the text.
    """
    if int(prefix.min()) < 0 or int(prefix.max()) > time:
        raise ValueError(
            f"the prefixes reach from {int(prefix.min())} to {int(prefix.max())} tokens; they must "
            f"lie between 0 and the {time} of the text."
        )
    place = torch.arange(time, device=prefix.device)
    furthest = torch.maximum(place[None, :], prefix[:, None] - 1)  # max(i, P - 1)
    return place[None, None, :] <= furthest[:, :, None]


def prefix_lm(
    ids: Int[Tensor, "batch time"],
    prefix: Int[Tensor, " prefixes"] | None = None,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Example:
    r"""Ask for every token after the prefix: position t is asked $x_{t+1}$ for $t \ge P - 1$.

    Args:
        ids: Token ids, (batch, time); padding on the right only.
        prefix: Length $P$ of each text's prefix, from 1 to its tokens - 1. Drawn evenly from these
            when None.
        mask: 1 where a token is text. All when None.
        generator: Source of the draws.

    Raises:
        ValueError: Fewer than two tokens of text, padding that is not on the right, or a prefix
            that leaves nothing to read or nothing to predict.

    Source: Raffel et al., 2019, section 3.3.1 (prefix language modelling).
    """
    text = text_of(ids, mask, least=2)
    if bool((text[:, 1:] & ~text[:, :-1]).any()):
        raise ValueError("a prefix is counted from the first token; padding must be on the right.")
    lengths = text.sum(1)
    if prefix is None:
        prefix = 1 + (drawn((len(ids),), generator, ids.device) * (lengths - 1)).long()
        prefix = torch.minimum(prefix, lengths - 1)
    prefix = prefix.to(ids.device)
    if prefix.shape != lengths.shape or bool(((prefix < 1) | (prefix >= lengths)).any()):
        raise ValueError(
            f"the prefixes are {prefix.tolist()}; there must be one for each text, of at least 1 "
            "token and less than the whole text."
        )
    place = torch.arange(ids.shape[1] - 1, device=ids.device)
    asked = (place[None] >= prefix[:, None] - 1) & text[:, 1:]
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = torch.where(asked, ids[:, 1:], IGNORED)
    visible = prefix_visible(prefix, ids.shape[1])
    return Example(ids, labels, seen_text(visible, text), int(text.sum()))
