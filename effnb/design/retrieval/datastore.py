r"""A datastore: keys, each with a value, searched for the keys nearest to a query.

The distance is the squared Euclidean one, $d(q, x) = \lVert q - x \rVert^2$. Exact search compares
a query with every key; FAISS may look at a part of them only.

Khandelwal, Levy, Jurafsky, Zettlemoyer, Lewis, "Generalization through Memorization: Nearest
Neighbor Language Models", 2020, arXiv 1911.00172. Douze et al., "The Faiss library", 2024,
arXiv 2401.08281.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from effnb.core.faiss_threads import one_thread, open_faiss
from effnb.design.retrieval.checks import check_count, check_keys, check_queries

AT_ONCE = 1 << 24
"""Distances that are computed at once: 64 MB."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest keys of each query, nearest first.

    Where a query has fewer than k keys to choose from, the distance is infinite.

    Attributes:
        distances: Squared distances.
        values: The value of each key.
        rows: Where each key lies in the datastore.
    """

    distances: Float[Tensor, "queries k"]
    values: Int[Tensor, "queries k"]
    rows: Int[Tensor, "queries k"]

    def first(self, k: int) -> Neighbours:
        """The nearest `k` of them.

        Raises:
            ValueError: When there are fewer.
        """
        check_count("k", k, self.rows.shape[1], "neighbours that were searched for")
        return Neighbours(self.distances[:, :k], self.values[:, :k], self.rows[:, :k])


@dataclass(frozen=True)
class Datastore:
    """Keys and their values; a datastore is never changed, only made smaller or joined.

    Attributes:
        keys: What a query is compared with; 16 bits keep it small, distances take 32.
        values: What was found there: for a language model, the token that came next.
        documents: Number of the document that each entry comes from.
    """

    keys: Float[Tensor, "entries width"]
    values: Int[Tensor, " entries"]
    documents: Int[Tensor, " entries"]

    def __post_init__(self) -> None:
        """Refuse what cannot be searched."""
        check_keys(self.keys, self.values, self.documents)

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.keys)

    @property
    def width(self) -> int:
        """Numbers of a key."""
        return self.keys.shape[1]

    @property
    def bytes(self) -> int:
        """Memory of keys and values, the values counted with 4 bytes each."""
        return self.keys.numel() * self.keys.element_size() + 4 * len(self)

    def rows(self, rows: Int[Tensor, " kept"]) -> Datastore:
        """The entries at some rows."""
        return Datastore(self.keys[rows], self.values[rows], self.documents[rows])

    def sample(self, entries: int, *, seed: int = 0) -> Datastore:
        """Entries drawn at random without repetition.

        Samples of one seed nest: a larger one holds all of a smaller one.

        Raises:
            ValueError: When there are fewer entries.
        """
        check_count("entries", entries, len(self), "entries of the datastore")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.rows(order[:entries].to(self.keys.device))

    def joined(self, other: Datastore) -> Datastore:
        """The entries of both; the other's documents are numbered on from the last one here.

        Raises:
            ValueError: When their keys differ in width.
        """
        if other.width != self.width:
            raise ValueError(
                f"one datastore has keys of {self.width} numbers and the other of {other.width}; "
                "both must come from one model."
            )
        shift = int(self.documents.max()) + 1
        return Datastore(
            torch.cat([self.keys, other.keys.to(self.keys)]),
            torch.cat([self.values, other.values.to(self.values)]),
            torch.cat([self.documents, other.documents.to(self.documents) + shift]),
        )

    @torch.no_grad()
    def search(
        self,
        queries: Float[Tensor, "queries width"],
        k: int,
        *,
        exclude: Int[Tensor, " queries"] | None = None,
    ) -> Neighbours:
        r"""The `k` nearest keys of each query, by comparison with every key.

        Candidates are found with $d = \lVert q \rVert^2 - 2 q^\top x + \lVert x \rVert^2$, a matrix
        product, about the mean of the keys, where the three terms cancel least; their distances
        are then computed from the differences.

        Args:
            queries: What is searched for.
            k: Neighbours of each.
            exclude: For each query the document whose entries it may not find, its own.

        Raises:
            ValueError: When the shapes do not fit, `k` exceeds the entries, or a query has none
                left.
        """
        check_queries(queries, self.width)
        check_count("k", k, len(self), "entries of the datastore")
        if exclude is not None and exclude.shape != queries.shape[:1]:
            raise ValueError(
                f"exclude has shape {tuple(exclude.shape)}; it must name one document for each of "
                f"the {len(queries)} queries."
            )
        middle = self.keys.mean(0, dtype=torch.float32)
        centred = self.keys.float() - middle
        squares = centred.square().sum(1)
        found = []
        size = max(1, AT_ONCE // len(self))
        for start in range(0, len(queries), size):
            part = queries[start : start + size].float()
            # ‖q − x‖² = ‖q‖² − 2 q·x + ‖x‖²; ‖q‖² is one number per query and orders nothing.
            scores = torch.addmm(squares, part - middle, centred.T, alpha=-2)
            if exclude is not None:
                own = exclude[start : start + size, None] == self.documents
                scores.masked_fill_(own, math.inf)
            nearest = scores.topk(k, dim=1, largest=False)
            found.append(self._exactly(part, nearest.values, nearest.indices))
        if not found:
            empty = queries.new_empty(0, k)
            return Neighbours(empty.float(), empty.long(), empty.long())
        distances, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
        if bool(torch.isinf(distances[:, 0]).any()):
            raise ValueError("a query has no entry left: all come from the document it excludes.")
        return Neighbours(distances, self.values[rows], rows)

    def _exactly(self, part: Tensor, scores: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Distances of the candidates from differences, and their order by these."""
        # d(q, x) = ‖q − x‖²
        distances = torch.stack(
            [
                (self.keys[own].float() - query).square().sum(1)
                for query, own in zip(part, rows, strict=True)
            ]
        )
        distances, order = distances.masked_fill(scores.isinf(), math.inf).sort(dim=1, stable=True)
        return distances, rows.gather(1, order)


class FaissIndex:
    """A datastore searched with FAISS: every key ("flat"), or the lists nearest to a query ("ivf").

    Attributes:
        store: The datastore.
        kind: "flat" or "ivf".
        index: FAISS's index.
    """

    def __init__(
        self, store: Datastore, kind: str = "flat", *, lists: int | None = None, probes: int = 8
    ) -> None:
        r"""Build the index.

        Args:
            store: What is searched.
            kind: "flat" compares with every key. "ivf" divides the keys among `lists` centres and
                compares with those of the `probes` nearest centres.
            lists: Number of lists; about $\sqrt{n}$ of $n$ entries when None.
            probes: Lists that a query looks at.

        Raises:
            ValueError: When there is no such kind, or lists or probes do not fit.
            ModuleNotFoundError: When FAISS is not installed.
        """
        if kind not in ("flat", "ivf"):
            raise ValueError(f'kind is "{kind}"; it must be "flat" or "ivf".')
        lists = round(math.sqrt(len(store))) if lists is None else lists
        if kind == "ivf":
            check_count("lists", lists, len(store), "entries of the datastore")
            check_count("probes", probes, lists, "lists")
        self.store, self.kind, self.faiss = store, kind, open_faiss()
        self.index = self._built(lists, probes)

    def _built(self, lists: int, probes: int) -> Any:
        faiss, keys = self.faiss, _rows(self.store.keys)
        with one_thread(faiss):
            if self.kind == "flat":
                index = faiss.IndexFlatL2(self.store.width)
            else:
                self._centres = faiss.IndexFlatL2(self.store.width)  # kept: FAISS does not own it
                index = faiss.IndexIVFFlat(self._centres, self.store.width, lists, faiss.METRIC_L2)
                index.nprobe = probes
                index.cp.min_points_per_centroid = 1  # few keys are no reason to complain
                index.train(keys)
            index.add(keys)
        return index

    @property
    def lists(self) -> int:
        """Number of lists; 1 without any."""
        return 1 if self.kind == "flat" else self.index.nlist

    def search(self, queries: Float[Tensor, "queries width"], k: int) -> Neighbours:
        """The `k` nearest keys of each query among those that it looks at.

        Raises:
            ValueError: When the shapes do not fit or `k` exceeds the entries.
        """
        check_queries(queries, self.store.width)
        check_count("k", k, len(self.store), "entries of the datastore")
        with one_thread(self.faiss):
            distances, rows = self.index.search(_rows(queries), k)
        found = torch.from_numpy(rows).to(self.store.values.device)
        missing = found < 0  # the lists looked at hold fewer than k keys
        far = torch.from_numpy(distances).to(found.device).masked_fill(missing, math.inf)
        found = found.clamp(min=0)
        return Neighbours(far, self.store.values[found], found)


def _rows(vectors: Tensor) -> np.ndarray:
    return np.ascontiguousarray(vectors.detach().cpu().float().numpy())
