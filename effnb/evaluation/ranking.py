"""How well vectors find each other: rank of the right document, over many queries.

A query and a document are vectors of one space; documents are ranked by their dot product with the
query. With vectors of length 1 that is cosine similarity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Retrieval:
    r"""Quality of a search.

    Attributes:
        ranks: Of each query's own document, 1 for the best. Of equal scores the worst is counted.
        documents: Documents searched through.
    """

    ranks: tuple[int, ...]
    documents: int

    @property
    def recall_at_1(self) -> float:
        """Share of the queries whose own document comes first."""
        return self.recall_at(1)

    def recall_at(self, k: int) -> float:
        """Share of the queries whose own document is among the first `k`."""
        return sum(rank <= k for rank in self.ranks) / len(self.ranks)

    @property
    def mrr_at_10(self) -> float:
        r"""Mean reciprocal rank, $\frac1n \sum_i 1 / r_i$, ranks beyond 10 counted as 0."""
        return sum(1 / rank for rank in self.ranks if rank <= 10) / len(self.ranks)

    @property
    def standard_error(self) -> float:
        """Standard error of `recall_at_1`, queries drawn at random."""
        p = self.recall_at_1
        return math.sqrt(p * (1 - p) / len(self.ranks))


def retrieval(
    queries: Float[Tensor, "*queries"],
    documents: Float[Tensor, "*documents"],
    relevant: Int[Tensor, " n"] | None = None,
) -> Retrieval:
    """Rank all documents for every query by dot product.

    Args:
        queries: Vectors (queries, dim).
        documents: Vectors (documents, dim).
        relevant: The row in `documents` of each query's own document; by default query i belongs
            to document i.

    Raises:
        ValueError: When there is no query, the vectors differ in length or are not finite, or a
            relevant document does not exist.
    """
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1:] != documents.shape[1:]:
        raise ValueError(
            f"queries have shape {tuple(queries.shape)} and documents {tuple(documents.shape)}; "
            "both must be (number, dim) with one dim."
        )
    if not len(queries):
        raise ValueError("there are no queries; give at least one.")
    if not bool(torch.isfinite(queries).all() and torch.isfinite(documents).all()):
        raise ValueError("a vector has entries that are NaN or infinite.")
    if relevant is None:
        relevant = torch.arange(len(queries), device=queries.device)
    if len(relevant) != len(queries) or int(relevant.max()) >= len(documents):
        raise ValueError(
            f"{len(queries)} queries need as many relevant documents, from 0 to "
            f"{len(documents) - 1}."
        )
    scores = queries.float() @ documents.float().T
    own = scores.gather(1, relevant.long().unsqueeze(1))
    ranks = (scores >= own).sum(1)  # the own document counts itself
    return Retrieval(tuple(ranks.tolist()), len(documents))
