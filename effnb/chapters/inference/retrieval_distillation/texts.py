"""Synopses that look for their descriptions: pairs of the packages corpus as tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnb.inference.distillation import student_from_layers
from effnb.lab import corpora, load

QUERY_TOKENS, DOCUMENT_TOKENS = 14, 24
"""Synopses and descriptions are cut to this many tokens, special ones not counted."""
START, SEPARATOR = 101, 102
"""What BERT's tokenizer puts in front of a text, and behind."""


@dataclass(frozen=True)
class Pairs:
    """Queries and documents as token ids; query i belongs to document i.

    Attributes:
        queries: Synopses.
        documents: Descriptions.
    """

    queries: list[list[int]]
    documents: list[list[int]]


@lru_cache(maxsize=1)
def encoder() -> Any:
    """MiniLM and its tokenizer."""
    return load("minilm-l6", device="cpu")


@cache
def pairs(split: corpora.Split, count: int) -> Pairs:
    """`count` pairs spread over a split: one of a source package, no synopsis twice.

    Raises:
        ValueError: When the split does not have as many.
    """
    found: dict[str, corpora.Package] = {}
    known: set[str] = set()
    for package in corpora.packages(split):
        short = package.synopsis.lower()
        if package.source not in found and short not in known and len(package.text) >= 60:
            found[package.source] = package
            known.add(short)
    some = list(found.values())
    if len(some) < count:
        raise ValueError(f"{split} has {len(some)} such pairs, not {count}.")
    some = [some[i * len(some) // count] for i in range(count)]

    def ids(texts: list[str], longest: int) -> list[list[int]]:
        given = encoder().tokenizer(texts, add_special_tokens=False, verbose=False)
        return [row[:longest] for row in given["input_ids"]]

    return Pairs(
        ids([p.synopsis for p in some], QUERY_TOKENS),
        ids([p.text[:300] for p in some], DOCUMENT_TOKENS),
    )


def padded(
    rows: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "texts time"], Bool[Tensor, "texts time"]]:
    """Texts with their special tokens, padded on the right; (ids, real)."""
    whole = [torch.tensor([START, *row, SEPARATOR]) for row in rows]
    ids = nn.utils.rnn.pad_sequence(whole, batch_first=True)
    lengths = torch.tensor([len(row) for row in whole])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def first_layers(count: int) -> nn.Module:
    """A copy of MiniLM's first layers, whose embeddings of tokens are frozen.

    No layer at all leaves the embeddings, of which a projection can be trained.

    Raises:
        ValueError: More layers than MiniLM has, or fewer than none.
    """
    model = student_from_layers(encoder().model, range(max(1, count)))
    if count == 0:
        model.encoder.layer = nn.ModuleList()
        model.config.num_hidden_layers = 0
    elif count < 0:
        raise ValueError(f"count is {count}; it must be at least 0.")
    model.embeddings.requires_grad_(False)
    return model.eval()


def overlaps(given: Pairs) -> Float[Tensor, "queries documents"]:
    """How much each query shares with each document: its rare tokens count more.

    The logarithm of the number of documents over that of those with the token, added up over the
    tokens that both have.
    """
    documents = [set(row) for row in given.documents]
    counts = Counter(token for row in documents for token in row)
    known = {token: i for i, token in enumerate(counts)}
    has = torch.zeros(len(documents), len(known))
    for i, row in enumerate(documents):
        has[i, [known[token] for token in row]] = 1
    rarity = torch.tensor([len(documents) / counts[token] for token in known]).log()
    asks = torch.zeros(len(given.queries), len(known))
    for i, row in enumerate(given.queries):
        asks[i, [known[token] for token in set(row) if token in known]] = 1
    return (asks * rarity) @ has.T


def like(given: Pairs, count: int) -> Int[Tensor, "queries count"]:
    """The wrong documents that share most with each query; no model has a say in it."""
    shared = overlaps(given)
    shared.fill_diagonal_(-1)
    return shared.topk(count, dim=1).indices
