r"""Dual encoders and cross-encoders: two texts apart, or read together.

A *dual encoder* turns query and document into a vector each, and scores by their product: documents
are encoded once, and found by a nearest-neighbour search. A *cross-encoder* reads both at once, and
must read every pair. A *dual-pooled* cross-encoder reads both at once too, but pools the query's
tokens and the document's apart and scores by the product: its two vectors are something for a dual
encoder's to copy.

Dual pooling: Kim et al., "EmbedDistill: A Geometric Knowledge Distillation for Information
Retrieval", 2023, arXiv 2301.12005.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnb.core.modules import clone


def mean_pool(
    hidden: Float[Tensor, "texts time dim"], real: Bool[Tensor, "texts time"]
) -> Float[Tensor, "texts dim"]:
    """Mean over the tokens that count.

    Raises:
        ValueError: A text of which no token counts.
    """
    if bool((~real.any(1)).any()):
        raise ValueError("a text has no token that counts; each needs at least one.")
    weights = real.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1)


class DualEncoder(nn.Module):
    """One encoder for queries and one for documents, which may be the same.

    Attributes:
        query: A Hugging Face encoder.
        document: Another, or the same.
        projection: From the query encoder's width to the document encoder's, or to a chosen size.
        document_projection: The same for documents; None where they keep their width.
    """

    def __init__(
        self,
        query: nn.Module,
        document: nn.Module,
        *,
        size: int | None = None,
        normalized: bool = False,
        seed: int = 0,
    ) -> None:
        """Join two encoders.

        Args:
            query: The query encoder, with `config.hidden_size`.
            document: The document encoder, likewise.
            size: Width of both embeddings; the document encoder's when None, and then documents are
                not projected.
            normalized: Whether embeddings are scaled to length 1.
            seed: Of the projections' first values.

        Raises:
            ValueError: A size below 1.
        """
        super().__init__()
        if size is not None and size < 1:
            raise ValueError(f"size is {size}; it must be at least 1.")
        self.query, self.document, self.normalized = query, document, normalized
        ours, theirs = query.config.hidden_size, document.config.hidden_size
        draws = torch.Generator().manual_seed(seed)
        self.document_projection = None if size is None else _projection(theirs, size, draws)
        if query is document:  # one encoder, one map
            self.projection = self.document_projection
        elif size is not None or ours != theirs:
            self.projection = _projection(ours, theirs if size is None else size, draws)
        else:
            self.projection = None

    def encode_queries(
        self, ids: Int[Tensor, "texts time"], real: Bool[Tensor, "texts time"]
    ) -> Float[Tensor, "texts size"]:
        """Embeddings of queries."""
        return self._finish(_encode(self.query, ids, real), self.projection)

    def encode_documents(
        self, ids: Int[Tensor, "texts time"], real: Bool[Tensor, "texts time"]
    ) -> Float[Tensor, "texts size"]:
        """Embeddings of documents."""
        return self._finish(_encode(self.document, ids, real), self.document_projection)

    def _finish(self, pooled: Tensor, projection: nn.Module | None) -> Tensor:
        out = pooled if projection is None else projection(pooled)
        return nn.functional.normalize(out, dim=-1) if self.normalized else out


def _projection(before: int, after: int, draws: torch.Generator) -> nn.Linear:
    """A map of small random values, the same for one seed."""
    layer = nn.Linear(before, after, bias=False)
    with torch.no_grad():
        layer.weight.normal_(0, before**-0.5, generator=draws)
    return layer


def _encode(encoder: nn.Module, ids: Tensor, real: Tensor) -> Tensor:
    hidden = encoder(input_ids=ids, attention_mask=real.long()).last_hidden_state
    return mean_pool(hidden, real)


def pair_scores(
    queries: Float[Tensor, "queries dim"], documents: Float[Tensor, "queries candidates dim"]
) -> Float[Tensor, "queries candidates"]:
    """The product of every query with each of its own candidates."""
    return (queries[:, None] * documents).sum(-1)


def inherit_documents(model: nn.Module, query: nn.Module, *, seed: int = 0) -> DualEncoder:
    """A student with the teacher's document encoder, frozen, and a query encoder of its own.

    The teacher's index is the student's: documents have the very same embeddings.

    Args:
        model: The teacher, a `DualEncoder`; it is not changed.
        query: The student's query encoder, copied; a smaller one gets a projection.
        seed: Of the projection's first values.

    Raises:
        ValueError: A teacher that is no `DualEncoder`.
    """
    if not isinstance(model, DualEncoder):
        raise ValueError(f"the teacher is a {type(model).__name__}; it must be a DualEncoder.")
    teacher = clone(model)
    head = teacher.document_projection
    size = None if head is None else head.out_features
    student = DualEncoder(
        clone(query), teacher.document, size=size, normalized=model.normalized, seed=seed
    )
    student.document_projection = head
    frozen = [teacher.document, *([] if head is None else [head])]
    for part in frozen:
        part.requires_grad_(False)
    return student


def join(
    queries: Sequence[Sequence[int]],
    documents: Sequence[Sequence[int]],
    *,
    start: int,
    separator: int,
    pad: int = 0,
    longest: int | None = None,
) -> dict[str, Tensor]:
    """Pairs as one text each: start, query, separator, document, separator.

    Args:
        queries: Token ids of each query, without special tokens.
        documents: Of each document.
        start: The token in front.
        separator: The token behind each of the two.
        pad: The token of the padding, on the right.
        longest: Tokens of the longest text; documents are cut to fit.

    Returns:
        `input_ids`, `attention_mask`, `token_type_ids` (1 from the document on), and where the two
        texts are, `query` and `document`.

    Raises:
        ValueError: Other numbers of queries and documents, or a query that leaves no room.
    """
    if len(queries) != len(documents) or not len(queries):
        raise ValueError(f"there are {len(queries)} queries and {len(documents)} documents.")
    rows = []
    for q, d in zip(queries, documents):
        room = len(d) if longest is None else longest - len(q) - 3
        if room < 1 or not len(q):
            raise ValueError(
                f"a query of {len(q)} tokens leaves no room for its document in {longest}, or "
                "either is empty."
            )
        rows.append((list(q), list(d)[:room]))
    width = max(len(q) + len(d) + 3 for q, d in rows)
    names = ("input_ids", "attention_mask", "token_type_ids", "query", "document")
    out = {name: torch.zeros(len(rows), width, dtype=torch.long) for name in names}
    out["input_ids"].fill_(pad)
    for i, (q, d) in enumerate(rows):
        middle, end = len(q) + 1, len(q) + len(d) + 2
        out["input_ids"][i, : end + 1] = torch.tensor([start, *q, separator, *d, separator])
        out["attention_mask"][i, : end + 1] = 1
        out["token_type_ids"][i, middle + 1 : end + 1] = 1
        out["query"][i, 1:middle] = 1
        out["document"][i, middle + 1 : end] = 1
    return out | {name: out[name].bool() for name in ("query", "document")}


class CrossEncoder(nn.Module):
    """An encoder that reads a pair and gives one score: from the first token, or dual-pooled.

    Attributes:
        encoder: A Hugging Face encoder.
        head: From the first token's state to the score; None when dual-pooled.
    """

    def __init__(self, encoder: nn.Module, *, dual_pooled: bool = False, seed: int = 0) -> None:
        """Put a score on an encoder.

        Args:
            encoder: With `config.hidden_size`.
            dual_pooled: Whether the score is the product of the pooled query and document.
            seed: Of the head's first values.
        """
        super().__init__()
        self.encoder = encoder
        draws = torch.Generator().manual_seed(seed)
        width = encoder.config.hidden_size
        self.head = None if dual_pooled else _projection(width, 1, draws)

    def embeddings(
        self, pairs: dict[str, Tensor]
    ) -> tuple[Float[Tensor, "pairs dim"], Float[Tensor, "pairs dim"]]:
        """Query and document, pooled apart after they were read together."""
        hidden = self._read(pairs)
        return mean_pool(hidden, pairs["query"]), mean_pool(hidden, pairs["document"])

    def forward(self, pairs: dict[str, Tensor]) -> Float[Tensor, " pairs"]:
        """The score of every pair that `join` made."""
        if self.head is None:
            query, document = self.embeddings(pairs)
            return (query * document).sum(-1)
        return self.head(self._read(pairs)[:, 0])[:, 0]

    def _read(self, pairs: dict[str, Tensor]) -> Tensor:
        names = ["input_ids", "attention_mask"]
        if getattr(self.encoder.config, "type_vocab_size", 1) > 1:
            names.append("token_type_ids")
        return self.encoder(**{name: pairs[name] for name in names}).last_hidden_state
