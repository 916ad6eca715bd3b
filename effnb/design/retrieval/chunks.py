r"""Chunks of text to retrieve: each is found by a vector, and comes with what followed it.

A text of $n$ tokens is cut into chunks $C_1, \dots, C_l$ of $m$ tokens. A neighbour of a chunk is
a chunk $N$ of another document, near by the distance of their vectors, and its continuation $F$:
together $r = 2m$ tokens.

Borgeaud et al., "Improving language models by retrieving from trillions of tokens", 2022,
arXiv 2112.04426, section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.context import check_context
from effnb.design.retrieval.checks import check_count, check_ids
from effnb.design.retrieval.datastore import Datastore

NONE = -1
"""Stands where a neighbour has no token."""

Embed = Callable[[Tensor], Tensor]
"""From chunks of tokens, (chunks, m), to one vector each."""


def mean_states(model: nn.Module) -> Embed:
    """Embeds a chunk as the mean of a model's last hidden states over its tokens.

    The model is only run, and reads each chunk by itself.
    """

    @torch.no_grad()
    def embed(chunks: Int[Tensor, "chunks m"]) -> Float[Tensor, "chunks width"]:
        check_ids(chunks)
        check_context(model, chunks.shape[1], "chunk")
        device = next(model.parameters()).device
        found = [
            model(input_ids=part.to(device), output_hidden_states=True).hidden_states[-1].mean(1)
            for part in chunks.split(64)
        ]
        return torch.cat(found).float()

    return embed


def bag_of_words(vocabulary: int) -> Embed:
    r"""Embeds a chunk as the square roots of how often it has each token, with length 1.

    The squared distance of two such vectors is $2 - 2\sum_v \sqrt{p_v q_v}$: it grows as fewer
    tokens are shared.

    Raises:
        ValueError: When the vocabulary is empty.
    """
    check_count("vocabulary", vocabulary)

    def embed(chunks: Int[Tensor, "chunks m"]) -> Float[Tensor, "chunks width"]:
        check_ids(chunks)
        counts = torch.zeros(len(chunks), vocabulary, device=chunks.device)
        counts.scatter_add_(1, chunks, torch.ones_like(chunks, dtype=counts.dtype))
        return (counts / chunks.shape[1]).sqrt()

    return embed


class ChunkStore:
    """Chunks of documents, with vectors to find them by.

    Attributes:
        tokens: A chunk and its continuation; -1 where the document ended.
        store: Their vectors; the value of an entry is its row in `tokens`.
        chunk: Tokens of a chunk, $m$.
    """

    def __init__(
        self, documents: Sequence[Sequence[int]], embed: Embed, *, chunk: int = 64
    ) -> None:
        """Cut the documents and embed their chunks.

        Args:
            documents: Tokens of each; one shorter than a chunk is left out.
            embed: Makes the vectors, here and for queries.
            chunk: Tokens of a chunk.

        Raises:
            ValueError: When no document has a whole chunk.
        """
        self.chunk = check_count("chunk", chunk)
        rows: list[list[int]] = []
        origin: list[int] = []
        for number, ids in enumerate(documents):
            for start in range(0, len(ids) - chunk + 1, chunk):
                row = [int(i) for i in ids[start : start + 2 * chunk]]
                rows.append(row + [NONE] * (2 * chunk - len(row)))
                origin.append(number)
        if not rows:
            raise ValueError(
                f"no document has a whole chunk of {chunk} tokens: the datastore would be empty."
            )
        self.embed = embed
        self.tokens = torch.tensor(rows)
        keys = embed(self.tokens[:, :chunk]).cpu()
        self.store = Datastore(keys, torch.arange(len(rows)), torch.tensor(origin))

    def __len__(self) -> int:
        """Number of chunks."""
        return len(self.tokens)

    def neighbours(
        self,
        ids: Int[Tensor, "batch time"],
        k: int = 2,
        *,
        exclude: Int[Tensor, " batch"] | None = None,
    ) -> Int[Tensor, "batch chunks k r"]:
        """The nearest chunks of each whole chunk of some texts, each with its continuation.

        Args:
            ids: The texts; a last part shorter than a chunk is left out.
            k: Neighbours of a chunk; 0 gives none.
            exclude: Of each text the document that it may not find: itself.

        Raises:
            ValueError: When the shapes do not fit, or `k` exceeds what there is to find.
        """
        check_ids(ids)
        check_count("k", k, len(self), "chunks of the datastore", least=0)
        batch, whole = len(ids), ids.shape[1] // self.chunk
        if not k or not whole:
            return torch.full((batch, whole, k, 2 * self.chunk), NONE, device=ids.device)
        cut = ids[:, : whole * self.chunk].reshape(-1, self.chunk).cpu()
        own = None if exclude is None else exclude.cpu()[:, None].expand(-1, whole).flatten()
        near = self.store.search(self.embed(cut).cpu(), k, exclude=own)
        found = self.tokens[near.values].masked_fill(near.distances.isinf()[..., None], NONE)
        return found.view(batch, whole, k, -1).to(ids.device)

    def random_neighbours(
        self, ids: Int[Tensor, "batch time"], k: int = 2, *, seed: int = 0
    ) -> Int[Tensor, "batch chunks k r"]:
        """As many chunks drawn at random: what a reader of neighbours gains without a search.

        Raises:
            ValueError: When the shapes do not fit.
        """
        check_ids(ids)
        check_count("k", k, len(self), "chunks of the datastore", least=0)
        draws = torch.Generator().manual_seed(seed)
        shape = (len(ids), ids.shape[1] // self.chunk, k)
        rows = torch.randint(len(self), shape, generator=draws)
        return self.tokens[rows].to(ids.device)
