r"""Approximate search with FAISS, its cost counted in distance evaluations.

**HNSW** links each document with some of its neighbours, in layers of which the upper ones hold few
documents. A query walks from neighbour to neighbour towards what is nearer, keeping the best
`ef` documents seen. **IVF** divides the documents among the nearest of some centres, and compares a
query with the documents of the few centres that are nearest to it.

Malkov, Yashunin, "Efficient and robust approximate nearest neighbor search using Hierarchical
Navigable Small World graphs", 2016, arXiv 1603.09320. Sivic, Zisserman, "Video Google", ICCV 2003.
Douze et al., "The Faiss library", 2024, arXiv 2401.08281.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from effnb.core.faiss_threads import one_thread, open_faiss
from effnb.inference.matryoshka.checks import check_count, check_vectors
from effnb.inference.matryoshka.losses import prefix
from effnb.inference.matryoshka.retrieval import Found


def _rows(vectors: Tensor, dims: int) -> np.ndarray:
    return np.ascontiguousarray(prefix(vectors, dims).detach().cpu().numpy(), dtype=np.float32)


class _Index:
    """What the two kinds of index share: prefixes of length 1, and a count of each query."""

    def __init__(self, documents: Float[Tensor, "documents dim"], dims: int | None) -> None:
        check_vectors(documents, documents)
        self.documents = len(documents)
        self.dims = documents.shape[1] if dims is None else dims
        self.faiss = open_faiss()

    def _search(
        self,
        queries: Float[Tensor, "queries dim"],
        k: int,
        count: Callable[[], int],
        reset: Callable[[], None],
    ) -> Found:
        """Search for one query after the other: FAISS counts all queries of a call together."""
        if queries.ndim != 2 or queries.shape[1] < self.dims:
            raise ValueError(
                f"queries have shape {tuple(queries.shape)}; they must be (number, width) with at "
                f"least the {self.dims} numbers that the index compares."
            )
        check_count("k", k, self.documents, "documents in the collection")
        rows, counts = [], []
        with one_thread(self.faiss):
            for query in _rows(queries, self.dims):
                reset()
                rows.append(self.index.search(query[None], k)[1][0])
                counts.append(count())
        evaluations = torch.tensor(counts, dtype=torch.float32)
        found = torch.from_numpy(np.stack(rows)).to(queries.device)
        return Found(found, evaluations, evaluations * self.dims)


class Hnsw(_Index):
    """A graph of neighbours over prefixes of the documents.

    Attributes:
        documents: How many documents it holds.
        dims: Numbers that a comparison takes.
        index: FAISS's index.
    """

    def __init__(
        self,
        documents: Float[Tensor, "documents dim"],
        *,
        dims: int | None = None,
        links: int = 16,
        construction: int = 80,
    ) -> None:
        """Link the documents; the same documents in the same order give the same graph.

        Args:
            documents: One vector per document.
            dims: Numbers to compare; all when None.
            links: Neighbours that a document is linked with; twice as many in the lowest layer.
            construction: Documents that are kept in sight while one is linked (efConstruction).

        Raises:
            ValueError: When the vectors do not fit, or `links` or `construction` is below 2.
            ModuleNotFoundError: When FAISS is not installed.
        """
        super().__init__(documents, dims)
        if links < 2 or construction < 2:
            raise ValueError(
                f"links is {links} and construction {construction}; both must be at least 2."
            )
        faiss = self.faiss
        self.index = faiss.IndexHNSWFlat(self.dims, links, faiss.METRIC_INNER_PRODUCT)
        self.index.hnsw.efConstruction = construction
        with one_thread(faiss):
            self.index.add(_rows(documents, self.dims))

    def search(self, queries: Float[Tensor, "queries dim"], k: int = 10, *, ef: int) -> Found:
        """Walk the graph, keeping the best `ef` documents in sight (efSearch).

        Raises:
            ValueError: When `ef` is below `k`, or `k` is more than there are documents.
        """
        if ef < k:
            raise ValueError(f"ef is {ef}; it must be at least k ({k}), or some are never seen.")
        self.index.hnsw.efSearch = ef
        stats = self.faiss.cvar.hnsw_stats
        return self._search(queries, k, lambda: stats.ndis, stats.reset)


class Ivf(_Index):
    """Documents in lists around centres, over prefixes.

    Attributes:
        documents: How many documents it holds.
        dims: Numbers that a comparison takes.
        lists: How many centres there are.
        index: FAISS's index.
    """

    def __init__(
        self,
        documents: Float[Tensor, "documents dim"],
        *,
        dims: int | None = None,
        lists: int = 100,
        seed: int = 0,
    ) -> None:
        """Find the centres by k-means, and give each document to the nearest.

        Args:
            documents: One vector per document.
            dims: Numbers to compare; all when None.
            lists: How many centres.
            seed: Of the documents that k-means begins with.

        Raises:
            ValueError: When the vectors do not fit, or there are more lists than documents.
            ModuleNotFoundError: When FAISS is not installed.
        """
        super().__init__(documents, dims)
        check_count("lists", lists, self.documents, "documents in the collection")
        faiss, self.lists = self.faiss, lists
        self._centres = faiss.IndexFlatIP(self.dims)  # kept: FAISS does not own it
        self.index = faiss.IndexIVFFlat(self._centres, self.dims, lists, faiss.METRIC_INNER_PRODUCT)
        self.index.cp.seed = seed + 1
        self.index.cp.min_points_per_centroid = 1
        rows = _rows(documents, self.dims)
        with one_thread(faiss):
            self.index.train(rows)
            self.index.add(rows)

    def search(self, queries: Float[Tensor, "queries dim"], k: int = 10, *, probes: int) -> Found:
        """Compare with the centres, then with the documents of the `probes` nearest ones.

        Raises:
            ValueError: When `probes` is more than there are lists, or `k` than documents.
        """
        check_count("probes", probes, self.lists, "lists")
        self.index.nprobe = probes
        stats = self.faiss.cvar.indexIVF_stats
        return self._search(queries, k, lambda: self.lists + stats.ndis, stats.reset)
