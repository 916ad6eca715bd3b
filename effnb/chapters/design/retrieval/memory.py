"""kNN-LM as the chapter measures it: texts looked up once, settings chosen on other texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.design.retrieval import (
    Datastore,
    FaissIndex,
    KeyReader,
    Looked,
    build_datastore,
    matched_lengths,
)

MODELS = ("mini-300k", "mini-1m", "mini-5m")
K = 64
"""Neighbours that are searched for."""
KS = (1, 4, 16, 64)
LAMS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
TEMPERATURES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
CHUNK, SHARED = 32, 0.25
"""A chunk shares little with the datastore when no longer run than a quarter of it is found."""

Ids = Sequence[int]


@dataclass(frozen=True)
class Setting:
    """Share, neighbours and temperature.

    Attributes:
        lam: Share of the neighbours.
        k: How many count.
        temperature: What divides squared distances.
    """

    lam: float
    k: int
    temperature: float


@dataclass(frozen=True)
class Texts:
    """Several texts, looked up once.

    Attributes:
        looked: All their tokens but the first of each, one text behind the other.
        lengths: How many of these each text has.
    """

    looked: Looked
    lengths: tuple[int, ...]

    def tokens(self, setting: Setting | None) -> Float[Tensor, " tokens"]:
        """Loss of each token; the model's own without a setting."""
        if setting is None:
            return -self.looked.log_lm
        return self.looked.losses(setting.lam, setting.k, setting.temperature)

    def by_document(
        self, setting: Setting | None, only: Bool[Tensor, " tokens"] | None = None
    ) -> list[float]:
        """Mean loss of each text, over some of its tokens; texts without any are left out."""
        losses = self.tokens(setting)
        keep = torch.ones_like(losses, dtype=torch.bool) if only is None else only
        return [
            round(float(part[kept].mean()), 5)
            for part, kept in zip(losses.split(self.lengths), keep.split(self.lengths), strict=True)
            if kept.any()
        ]

    def loss(self, setting: Setting | None) -> float:
        """Mean over the texts."""
        found = self.by_document(setting)
        return round(sum(found) / len(found), 5)


def look_up(
    model: nn.Module,
    store: Datastore | FaissIndex,
    documents: Sequence[Ids],
    *,
    k: int = K,
    at: str = "feedforward",
) -> Texts:
    """Read some texts, and search once for all their tokens."""
    reader = KeyReader(model, at)
    own, targets, queries = [], [], []
    for ids in documents:
        row = torch.tensor([list(ids)])
        logits, keys = reader(row)
        following = row[0, 1:]
        log_p = logits[0, :-1].float().log_softmax(-1)
        own.append(log_p.gather(1, following[:, None])[:, 0])
        targets.append(following)
        queries.append(keys[0, :-1].float())
    near = store.search(torch.cat(queries), k)
    looked = Looked(torch.cat(own), torch.cat(targets), near)
    return Texts(looked, tuple(len(part) for part in targets))


def chosen(validation: Texts) -> Setting:
    """The setting of the grid with the least loss on texts that nothing is judged on."""
    most = validation.looked.neighbours.rows.shape[1]
    grid = [Setting(*one) for one in product(LAMS, [k for k in KS if k <= most], TEMPERATURES)]
    return min(grid, key=validation.loss)


def stored(model: nn.Module, documents: Sequence[Ids], at: str = "feedforward") -> Datastore:
    """A datastore of descriptions, in 16 bits."""
    return build_datastore(model, [list(ids) for ids in documents], context=256, at=at)


def shares_little(documents: Sequence[Ids], library: Sequence[Ids]) -> Bool[Tensor, " tokens"]:
    """Of each token but the first of a text whether its chunk shares only short runs."""
    longest = max(max(ids, default=0) for ids in [*documents, *library])
    joined = [token for ids in documents for token in (*ids, longest + 1)]
    runs = matched_lengths(joined, library, longest=CHUNK)
    kept, start = [], 0
    for ids in documents:
        own = runs[start : start + len(ids)]
        start += len(ids) + 1
        left = CHUNK - torch.arange(len(ids)) % CHUNK
        inside = torch.minimum(own, left)
        chunks = torch.stack([part.max() for part in inside.split(CHUNK)])
        little = (chunks <= SHARED * CHUNK).repeat_interleave(CHUNK)[: len(ids)]
        kept.append(little[1:])
    return torch.cat(kept)
