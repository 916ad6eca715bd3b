"""Calibration data without padding: what a model computes at a padding token says nothing of text.

A layer inside a block may read (batch, time, features), or tokens in rows, or only the tokens that
a router sent to one expert; a mask can follow some of these reshapes, not all. So batches are cut
before the model sees them: each sequence loses its padding, and sequences of one length stay
together. Statistics are then those of the same text without padding, on whichever side it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor


def without_padding(
    batch: Mapping[str, Any], encoder_decoder: bool = False
) -> list[dict[str, Any]]:
    """A batch as one or several without padding.

    Positions that the batch gives are kept; a model that counts positions itself counts from the
    first token of the text. Of a mask with gaps only the outer padding is cut: the rest stays in
    the mask. A mask that is no table (batch, time) is not understood, and the batch stays whole.

    Args:
        batch: Keyword arguments of a model, with an `attention_mask` where there is padding.
        encoder_decoder: Whether labels belong to the decoder. Its padding is what
            `decoder_attention_mask` masks, or the labels -100 at the end of a sequence.
    """
    decoder = {key for key in batch if key.startswith("decoder_")}
    if encoder_decoder:
        decoder |= {"labels"} & batch.keys()
    mask = _table(batch.get("attention_mask"))
    own = _table(batch.get("decoder_attention_mask"))
    labels = batch.get("labels")
    if own is None and encoder_decoder and isinstance(labels, Tensor) and labels.ndim == 2:
        own = _up_to_last(labels != -100)
    if all(m is None or bool(m.all()) for m in (mask, own)):
        return [dict(batch)]
    rows = len(mask if mask is not None else own)
    spread = {key: _spread(value, rows) for key, value in batch.items()}
    groups: dict[tuple, list[dict[str, Tensor]]] = {}
    for row in range(rows):
        spans = [None if m is None else _span(m[row]) for m in (mask, own)]
        if any(span is not None and span.start == span.stop for span in spans):
            continue  # nothing but padding
        cuts = {}
        for key, value in spread.items():
            table, span = (own, spans[1]) if key in decoder else (mask, spans[0])
            if is_per_row(value, rows):
                timed = table is not None and value.shape[1:2] == table.shape[1:]
                cuts[key] = value[row : row + 1, span] if timed else value[row : row + 1]
        length = tuple(None if span is None else span.stop - span.start for span in spans)
        groups.setdefault(length, []).append(cuts)
    return [
        spread | {key: torch.cat([cuts[key] for cuts in group]) for key in group[0]}
        for group in groups.values()
    ]


def is_per_row(value: Any, rows: int) -> bool:
    """Whether a model's argument is a tensor with an entry for each sequence of a batch."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows


def _spread(value: Any, rows: int) -> Any:
    """A table of one row that serves all, such as positions, as one with a row for each."""
    if isinstance(value, Tensor) and value.ndim == 2 and len(value) == 1 < rows:
        return value.expand(rows, -1)
    return value


def _table(mask: Any) -> Bool[Tensor, "batch time"] | None:
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _up_to_last(known: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """True up to the last True of each row."""
    return known.flip(1).cumsum(1).flip(1) > 0


def _span(mask: Bool[Tensor, " time"]) -> slice:
    """From the first to the last True."""
    places = mask.nonzero().flatten().tolist()
    return slice(places[0], places[-1] + 1) if places else slice(0, 0)


def gaps(batch: Mapping[str, Any]) -> Bool[Tensor, "batch time"] | None:
    """The mask of a batch that still has gaps; None where every token is text."""
    mask = _table(batch.get("attention_mask"))
    return None if mask is None or bool(mask.all()) else mask


def masked_rows(activations: Tensor, mask: Tensor | None) -> Tensor:
    """Activations as one token a row, without padding, however batch and time were flattened.

    Args:
        activations: (batch, time, …, features), or (batch · time, features) as in OPT.
        mask: Which tokens are text, (batch, time); None when all are.

    Raises:
        ValueError: When the rows are no longer those of the mask.
    """
    if mask is None:
        return activations.flatten(0, -2)
    if activations.shape[:2] == mask.shape:
        return activations[mask].flatten(0, -2)
    if activations.shape[0] == mask.numel():
        return activations[mask.flatten()].flatten(0, -2)
    raise ValueError(
        f"an input of shape {tuple(activations.shape)} does not say which of its rows are padding "
        f"of a batch of shape {tuple(mask.shape)}; give sequences without gaps in their masks."
    )
