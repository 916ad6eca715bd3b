r"""Search with prefixes: a shortlist by a few numbers, its order by more of them.

Adaptive retrieval compares the first $m$ numbers of the query with those of all $N$ documents,
keeps the best $K$, and orders these by $D$ numbers: $N m + K D$ multiplications in place of $N D$.
A funnel does so in more than two steps. Every prefix has length 1 when it is compared.

Kusupati et al., "Matryoshka Representation Learning", 2022, arXiv 2205.13147, section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from effnb.inference.matryoshka.checks import check_count, check_dims, check_vectors
from effnb.inference.matryoshka.losses import prefix

SOME = 64
"""Queries whose shortlists are gathered at once, so that memory does not grow with the queries."""


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        rows: The documents of each query, the best first; -1 where a search found fewer.
        evaluations: Distance evaluations of each query: how many documents it was compared with.
        multiplications: What those took, each as many as the numbers compared.
    """

    rows: Int[Tensor, "queries k"]
    evaluations: Float[Tensor, " queries"]
    multiplications: Float[Tensor, " queries"]

    def finds(self, own: Int[Tensor, " queries"], k: int = 1) -> Bool[Tensor, " queries"]:
        """Whether each query's own document is among the first `k` found.

        Raises:
            ValueError: When `k` is more than was searched for.
        """
        check_count("k", k, self.rows.shape[1], "found")
        return (self.rows[:, :k] == own.unsqueeze(1)).any(1)


def search(
    queries: Float[Tensor, "queries dim"],
    documents: Float[Tensor, "documents document_dim"],
    k: int = 10,
    *,
    dims: int | None = None,
) -> Found:
    """Compare every query with every document by cosine, and keep the best `k`.

    Args:
        queries: One vector per query.
        documents: One per document.
        k: How many documents to keep.
        dims: How many numbers of each vector to compare; all when None.

    Raises:
        ValueError: When the vectors do not fit, or `k` is more than there are documents.
    """
    check_vectors(queries, documents)
    dims = queries.shape[1] if dims is None else dims
    check_count("k", k, len(documents), "documents in the collection")
    scores = prefix(queries, dims) @ prefix(documents, dims).T
    return _found(scores.topk(k, dim=1).indices, len(documents), len(documents) * dims)


def _found(rows: Tensor, evaluations: float, multiplications: float) -> Found:
    every = torch.ones(len(rows), device=rows.device)
    return Found(rows, evaluations * every, multiplications * every)


def rerank(
    queries: Float[Tensor, "queries dim"],
    documents: Float[Tensor, "documents document_dim"],
    shortlist: Found,
    k: int,
    *,
    dims: int | None = None,
) -> Found:
    """Order each query's shortlist by more numbers, and keep the best `k`.

    Raises:
        ValueError: When the vectors do not fit, or `k` is more than the shortlist holds.
    """
    check_vectors(queries, documents)
    dims = queries.shape[1] if dims is None else dims
    check_count("k", k, shortlist.rows.shape[1], "in the shortlist")
    rows, q, d = shortlist.rows, prefix(queries, dims), prefix(documents, dims)
    scores = torch.cat(
        [
            torch.einsum("qd,qkd->qk", a, d[b.clamp(min=0)])
            for a, b in zip(q.split(SOME), rows.split(SOME))
        ]
    )
    scores = scores.masked_fill(rows < 0, -torch.inf)  # places that a search left empty
    best = rows.gather(1, scores.topk(k, dim=1).indices)
    compared = (rows >= 0).sum(1).float()
    return Found(
        best,
        shortlist.evaluations + compared,
        shortlist.multiplications + compared * dims,
    )


def adaptive_retrieval(
    queries: Float[Tensor, "queries dim"],
    documents: Float[Tensor, "documents document_dim"],
    k: int = 10,
    *,
    dims: int,
    shortlist: int,
    rerank_dims: int | None = None,
) -> Found:
    """The best `shortlist` documents by `dims` numbers, in the order of `rerank_dims` numbers.

    Args:
        queries: One vector per query.
        documents: One per document.
        k: How many documents to return.
        dims: Numbers compared with every document.
        shortlist: Documents kept for the second look.
        rerank_dims: Numbers compared in the second look; all when None.

    Raises:
        ValueError: When the prefix lengths do not nest, the shortlist is larger than the
            collection, or `k` larger than the shortlist.
    """
    full = queries.shape[1] if rerank_dims is None else rerank_dims
    return funnel(queries, documents, k, dims=(dims, full), shortlists=(shortlist,))


def funnel(
    queries: Float[Tensor, "queries dim"],
    documents: Float[Tensor, "documents document_dim"],
    k: int = 10,
    *,
    dims: Sequence[int],
    shortlists: Sequence[int],
) -> Found:
    """Adaptive retrieval in several steps: shortlists that shrink, prefixes that grow.

    All documents are compared by `dims[0]` numbers and the best `shortlists[0]` kept; these by
    `dims[1]` numbers, and so on; the last shortlist is ordered by `dims[-1]` numbers.

    Args:
        queries: One vector per query.
        documents: One per document.
        k: How many documents to return.
        dims: Prefix lengths, rising; one more than there are shortlists.
        shortlists: Documents kept after each step but the last, none more than the one before.

    Raises:
        ValueError: When the prefix lengths do not nest, a shortlist is larger than what it is
            chosen from, or `k` larger than the last shortlist.
    """
    check_vectors(queries, documents)
    nested = check_dims(dims, queries.shape[1])
    if len(shortlists) != len(nested) - 1 or not shortlists:
        raise ValueError(
            f"there are {len(shortlists)} shortlists for {len(nested)} prefix lengths; give one "
            "for each step but the last, and at least one."
        )
    check_count("the shortlist", shortlists[0], len(documents), "documents in the collection")
    for before, kept in pairwise(shortlists):
        check_count("a later shortlist", kept, before, "in the shortlist before it")
    check_count("k", k, shortlists[-1], "in the last shortlist")
    found = search(queries, documents, shortlists[0], dims=nested[0])
    for m, kept in zip(nested[1:], (*shortlists[1:], k)):
        found = rerank(queries, documents, found, kept, dims=m)
    return found


def neighbours_kept(found: Found, exact: Found) -> Float[Tensor, " queries"]:
    """The share of what an exact search found that another search found too, query by query.

    Raises:
        ValueError: When the two searched for another number of documents or queries.
    """
    if found.rows.shape != exact.rows.shape:
        raise ValueError(
            f"one search found {tuple(found.rows.shape)} documents and the other "
            f"{tuple(exact.rows.shape)}; search for equally many."
        )
    same = found.rows.unsqueeze(2) == exact.rows.unsqueeze(1)
    return same.any(2).float().mean(1)
