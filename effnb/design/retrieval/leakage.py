"""How much of a text stands word for word in a datastore.

A model that looks things up gains most where it finds the very text that it reads. Reported with
the loss, the longest run of tokens that a text shares with the datastore tells memory from copying.

Borgeaud et al., "Improving language models by retrieving from trillions of tokens", 2022,
arXiv 2112.04426, section 2.6 (overlap of evaluation chunks with what is retrieved).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from effnb.design.retrieval.checks import check_count

Ids = Sequence[int]


def matched_lengths(
    text: Ids, store: Sequence[Ids], *, longest: int | None = None
) -> Int[Tensor, " time"]:
    r"""For each token of a text how long a run, starting there, some document holds.

    Matches grow token by token: of all pairs of equal runs of length $L$ those stay whose next
    tokens agree. No run crosses from one document into the next.

    Args:
        text: Tokens.
        store: Tokens of each document.
        longest: Runs longer than this are not told apart.

    Raises:
        ValueError: When there is no text or no document, or `longest` is below 1.
    """
    if not len(text) or not any(len(document) for document in store):
        raise ValueError("there is no text, or the datastore is empty; give at least one token.")
    most = len(text) if longest is None else check_count("longest", longest)
    own = np.asarray(text, dtype=np.int64)
    # A document ends in a token that no text has.
    held = np.concatenate([np.append(np.asarray(d, dtype=np.int64), -1) for d in store])
    here, there = np.arange(len(own)), np.arange(len(held))
    # Of each place the number of the run that starts there: runs that are equal share it.
    name_here, name_there = np.zeros_like(here), np.zeros_like(there)
    lengths = np.zeros(len(own), dtype=np.int64)
    for length in range(min(most, len(own))):
        fits = here + length < len(own)
        here, name_here = here[fits], name_here[fits]
        fits = there + length < len(held)
        there, name_there = there[fits], name_there[fits]
        next_here, next_there = own[here + length], held[there + length]
        fits = next_there >= 0
        there, name_there, next_there = there[fits], name_there[fits], next_there[fits]
        width = 1 + max(int(own.max()), int(held.max()))
        longer_here = name_here * width + next_here
        longer_there = name_there * width + next_there
        shared = np.intersect1d(longer_here, longer_there)
        if not len(shared):
            break
        kept_here, kept_there = np.isin(longer_here, shared), np.isin(longer_there, shared)
        here, there = here[kept_here], there[kept_there]
        name_here = np.searchsorted(shared, longer_here[kept_here])
        name_there = np.searchsorted(shared, longer_there[kept_there])
        lengths[here] = length + 1
    return torch.from_numpy(lengths)


def chunk_overlap(text: Ids, store: Sequence[Ids], *, chunk: int = 64) -> Float[Tensor, " chunks"]:
    r"""Of each whole chunk the longest run that a document holds, as a share of the chunk.

    Args:
        text: Tokens; a last part shorter than a chunk is left out.
        store: Tokens of each document.
        chunk: Tokens of a chunk, $m$.

    Raises:
        ValueError: When there is no whole chunk or no document.
    """
    check_count("chunk", chunk, len(text), "tokens of the text")
    runs = matched_lengths(text, store, longest=chunk)
    whole = len(text) // chunk * chunk
    # A run counts up to the end of its chunk.
    left = chunk - torch.arange(whole) % chunk
    inside = torch.minimum(runs[:whole], left)
    return inside.view(-1, chunk).amax(1) / chunk
