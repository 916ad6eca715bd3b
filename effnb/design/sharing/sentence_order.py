"""Sentence-order prediction: which of two consecutive segments came first?

ALBERT's second training task. Half of the examples have two consecutive segments of a text in their
order (label 0), the other half the same two swapped (label 1). Both are of one text, so that the
subject of the segments gives nothing away: only their order does.

Lan, Chen, Goodman, Gimpel, Sharma, Soricut, "ALBERT: A Lite BERT for Self-supervised Learning of
Language Representations", ICLR 2020, arXiv 1909.11942, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class SentenceOrder:
    """Examples of the task.

    Attributes:
        ids: Two segments of each text, one after the other.
        segments: 0 at tokens of the segment that stands first, 1 at the other's.
        labels: 1 where the two are swapped.
    """

    ids: Int[Tensor, "batch time"]
    segments: Int[Tensor, "batch time"]
    labels: Int[Tensor, " batch"]


def sentence_order(
    texts: Int[Tensor, "batch time"], *, separator: int | None = None, seed: int = 0
) -> SentenceOrder:
    """Swap the two halves of half of the texts.

    Args:
        texts: Token ids; the first half of a row is one segment, the second half the next.
        separator: A token to stand between the two; none where None.
        seed: Of the choice. Each text is swapped with probability 1/2.

    Raises:
        ValueError: Texts of fewer than two tokens.
    """
    if texts.ndim != 2 or texts.shape[1] < 2:
        raise ValueError(
            f"the texts are of shape {tuple(texts.shape)}; two segments take two tokens a row."
        )
    middle = texts.shape[1] // 2
    first, second = texts[:, :middle], texts[:, middle:]
    generator = torch.Generator().manual_seed(seed)
    swapped = torch.rand(len(texts), generator=generator).to(texts.device) < 0.5
    between = texts.new_full((len(texts), separator is not None), separator or 0)
    kept = torch.cat([first, between, second], 1)
    turned = torch.cat([second, between, first], 1)
    ids = torch.where(swapped[:, None], turned, kept)
    where = torch.arange(ids.shape[1], device=texts.device)
    ends = torch.where(swapped, second.shape[1], middle) + (separator is not None)
    return SentenceOrder(ids, (where >= ends[:, None]).long(), swapped.long())
