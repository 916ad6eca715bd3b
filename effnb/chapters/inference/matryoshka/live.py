"""The chapter's live search: the shipped prefixes, and a synopsis that a reader types."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.chapters.inference.matryoshka import shipped
from effnb.chapters.inference.matryoshka.collection import collection
from effnb.inference import matryoshka
from effnb.lab import load
from effnb.lab.changes import if_measured

K = 10


@dataclass(frozen=True)
class Answer:
    """What one setting of a search finds for all queries.

    Attributes:
        found: The search's result.
        first: Share of the queries whose own description comes first.
        neighbours: Share of the ten nearest by all stored numbers that were found.
        evaluations: Comparisons a query, on average.
        multiplications: What they take.
    """

    found: matryoshka.Found
    first: float
    neighbours: float
    evaluations: float
    multiplications: float


class Live:
    """A collection of prefixes with queries whose right answers are known.

    Attributes:
        documents: Prefixes of the descriptions.
        queries: Prefixes of the synopses.
        own: The description of each synopsis.
        width: Numbers that are stored of each.
    """

    def __init__(
        self,
        documents: Float[Tensor, "documents dim"],
        queries: Float[Tensor, "queries dim"],
        own: list[int],
    ) -> None:
        """Search once by all numbers: what later searches are compared with."""
        self.documents, self.queries = documents, queries
        self.own, self.width = torch.tensor(own), documents.shape[1]
        self.exact = matryoshka.search(queries, documents, K)
        self._graphs: dict[int, matryoshka.Hnsw] = {}

    def _answer(self, found: matryoshka.Found) -> Answer:
        return Answer(
            found,
            float(found.finds(self.own).float().mean()),
            float(matryoshka.neighbours_kept(found, self.exact).mean()),
            float(found.evaluations.mean()),
            float(found.multiplications.mean()),
        )

    def looks(self, dims: int, shortlist: int) -> Answer:
        """Search by `dims` numbers; order the best `shortlist` by all stored ones, if any."""
        if not shortlist or dims == self.width:
            return self._answer(matryoshka.search(self.queries, self.documents, K, dims=dims))
        return self._answer(
            matryoshka.adaptive_retrieval(
                self.queries, self.documents, K, dims=dims, shortlist=shortlist
            )
        )

    def walk(self, dims: int, ef: int) -> Answer:
        """Walk a graph over `dims` numbers; a prefix gives a shortlist of `ef` documents."""
        if dims not in self._graphs:
            self._graphs[dims] = matryoshka.Hnsw(self.documents, dims=dims)
        graph = self._graphs[dims]
        if dims == self.width:
            return self._answer(graph.search(self.queries, K, ef=ef))
        shortlist = graph.search(self.queries, ef, ef=ef)
        return self._answer(matryoshka.rerank(self.queries, self.documents, shortlist, K))

    def seconds(self, dims: int, shortlist: int, turns: int = 3) -> float:
        """Time of a query, one at a time, as a server answers them: the least mean of a few turns.

        The server holds the first numbers of all documents side by side, divided beforehand.
        """
        first = matryoshka.prefix(self.documents, dims).contiguous()
        whole = matryoshka.prefix(self.documents, self.width)
        short = matryoshka.prefix(self.queries, dims)

        def once() -> float:
            began = time.perf_counter()
            for q, Q in zip(short, self.queries):
                best = (first @ q).topk(shortlist or K).indices
                if shortlist:
                    best = best[(whole[best] @ Q).topk(K).indices]
            return (time.perf_counter() - began) / len(short)

        return min(once() for _ in range(turns))

    def __repr__(self) -> str:
        """What is searched, in a line."""
        return (
            f"{len(self.queries):,} synopses and {len(self.documents):,} descriptions, the first "
            f"{self.width} numbers of each."
        )


@lru_cache(maxsize=1)
def live() -> Live | Any:
    """The repository's vectors; what says that there are none, where there are none."""
    found = shipped.read()
    if not isinstance(found, shipped.Shipped):
        return found
    own = list(collection().asked["test"][: shipped.ASKING])
    return Live(found.documents, found.queries, own)


def name_of(row: int) -> str:
    """A document as a result list shows it."""
    package = collection().documents[row]
    return f"{package.name} ({package.synopsis})"


def synopsis_of(query: int) -> str:
    """The text of a stored query."""
    here = collection()
    return here.documents[here.asked["test"][query]].synopsis


@lru_cache(maxsize=64)
def typed(text: str) -> Float[Tensor, " dim"]:
    """The shipped numbers of a new text: MiniLM reads it, and the map turns what it gives."""
    return shipped.read().map @ load("minilm-l6", device="cpu").encode([text])[0]


@if_measured
def ask(searched: Live, text: str, dims: tuple[int, ...] = (8, 16, 128), count: int = 3) -> str:
    """What a few lengths of a typed text's vector find."""
    q, lines = typed(text).unsqueeze(0), []
    for m in dims:
        rows = matryoshka.search(q, searched.documents, count, dims=m).rows[0].tolist()
        lines += [f"{m} numbers:"] + [f"   {name_of(row)}" for row in rows]
    return "\n".join(lines)


def agreement(searched: Live, count: int = 8) -> tuple[float, int]:
    """Encode some of the stored queries now: their least cosine with what is stored."""
    texts = [synopsis_of(i) for i in range(count)]
    now = load("minilm-l6", device="cpu").encode(texts) @ shipped.read().map.T
    before = searched.queries[:count]
    return float(torch.nn.functional.cosine_similarity(now, before).min()), count
