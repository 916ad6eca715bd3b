r"""Chunked cross-attention: each token reads the neighbours of the last chunk that was complete.

With chunks of $m$ tokens the neighbours of chunk $u$ were chosen with all tokens of $u$, so the
first token that may read them is the *last* of chunk $u$ (it sees the whole chunk, and predicts the
first token of the next). Rows $(u + 1) m - 1, \dots, (u + 2) m - 2$, counted from 0, read the
neighbours of chunk $u$; rows $0, \dots, m - 2$ read none.

Borgeaud et al., "Improving language models by retrieving from trillions of tokens", 2022,
arXiv 2112.04426, section 2.4, eq. 5 and figure 2.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.design.retrieval.checks import check_count


def attending_groups(
    hidden: Float[Tensor, "batch time width"], chunk: int
) -> Float[Tensor, "batch chunks m width"]:
    """The rows that read each chunk's neighbours: shifted by m - 1, filled up with zeros, cut.

    Raises:
        ValueError: When the chunk is shorter than a token.
    """
    check_count("chunk", chunk)
    batch, time, width = hidden.shape
    groups = time // chunk  # chunks that are complete
    rows = hidden[:, chunk - 1 :]
    missing = groups * chunk - rows.shape[1]
    rows = nn.functional.pad(rows, (0, 0, 0, missing)) if groups else rows[:, :0]
    return rows.reshape(batch, groups, chunk, width)


def from_groups(
    groups: Float[Tensor, "batch chunks m width"], time: int
) -> Float[Tensor, "batch time width"]:
    """Rows back in their places; 0 for those that read no neighbours."""
    batch, _, chunk, width = groups.shape
    rows = groups.reshape(batch, -1, width)[:, : max(0, time - chunk + 1)]
    return nn.functional.pad(rows, (0, 0, time - rows.shape[1], 0))


class Attention(nn.Module):
    r"""Attention of some rows to others, without a mask of order: $\mathrm{softmax}(QK^\top + B)V$.

    Attributes:
        heads: Number of heads.
        bias: A learned number for each head and each distance of key and query, $B$.
    """

    def __init__(
        self, width: int, heads: int, *, queries: int, keys: int, read: int | None = None
    ) -> None:
        """Start with random projections.

        Args:
            width: Channels of the queries and of the result.
            heads: Heads; must divide the width.
            queries: Most rows that ask.
            keys: Most rows that are read.
            read: Channels of what is read; the same width when None.

        Raises:
            ValueError: When the heads do not divide the width.
        """
        super().__init__()
        if check_count("heads", heads) and width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}.")
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(read or width, width, bias=False)
        self.value = nn.Linear(read or width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.bias = nn.Parameter(torch.zeros(heads, queries + keys - 1))
        # Distance of each key from each query, both counted from their first row.
        places = torch.arange(queries)[:, None] - torch.arange(keys) + keys - 1
        self.register_buffer("places", places, persistent=False)

    def forward(
        self,
        asking: Float[Tensor, "batch queries width"],
        read: Float[Tensor, "batch keys read"],
        present: Bool[Tensor, "batch keys"],
        copies: int = 1,
    ) -> Float[Tensor, "batch queries width"]:
        """What each row that asks reads; 0 where nothing is present.

        Args:
            asking: Rows that ask.
            read: Rows that are read.
            present: Which of these count.
            copies: How many equal stretches `read` consists of, each counted from its own start.
        """

        def split(rows: Tensor) -> Tensor:
            return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.query(asking)), split(self.key(read)), split(self.value(read))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        length = read.shape[1] // copies
        places = self.places[: asking.shape[1], :length]
        scores = scores + self.bias[:, places].repeat(1, 1, copies)
        absent = ~present[:, None, None]
        # Where nothing is present the weights are made 0 after the softmax: no NaN, no gradient.
        weights = scores.masked_fill(absent, torch.finfo(scores.dtype).min).softmax(-1)
        mixed = weights.masked_fill(absent, 0.0) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class ChunkedCrossAttention(nn.Module):
    """Reads the encoded neighbours of each chunk, with the paper's alignment.

    Attributes:
        chunk: Tokens of a chunk, $m$.
        norm: Norm of the decoder's rows before they ask.
        attention: What reads.
    """

    def __init__(
        self, width: int, heads: int, *, chunk: int, neighbour: int, read: int | None = None
    ) -> None:
        """Start with an output of 0, so that a decoder it joins is unchanged.

        Args:
            width: Channels of the decoder.
            heads: Heads; must divide the width.
            chunk: Tokens of a chunk.
            neighbour: Most tokens of a neighbour, $r$.
            read: Channels of the encoded neighbours; the decoder's when None.

        Raises:
            ValueError: When a number is below 1 or the heads do not divide the width.
        """
        super().__init__()
        self.chunk = check_count("chunk", chunk)
        check_count("neighbour", neighbour)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.attention = Attention(width, heads, queries=chunk, keys=neighbour, read=read)
        nn.init.zeros_(self.attention.out.weight)

    def forward(
        self,
        hidden: Float[Tensor, "batch time width"],
        encoded: Float[Tensor, "batch chunks k r read"],
        present: Bool[Tensor, "batch chunks k r"],
    ) -> Float[Tensor, "batch time width"]:
        """What is added to the residual stream.

        Raises:
            ValueError: When there are not the neighbours of each complete chunk.
        """
        groups = attending_groups(self.norm(hidden), self.chunk)
        batch, chunks, _, width = groups.shape
        if encoded.shape[:2] != (batch, chunks):
            raise ValueError(
                f"there are neighbours for {tuple(encoded.shape[:2])} texts and chunks; "
                f"{hidden.shape[1]} tokens have {chunks} whole chunks of {self.chunk} in each of "
                f"{batch} texts."
            )
        k = encoded.shape[2]
        if not chunks or not k:
            return torch.zeros_like(hidden)
        # CCA(H, E)_{(u+1)m−1 … (u+2)m−2} = CA(those rows, E_u), all k·r rows of E_u side by side
        read = self.attention(
            groups.flatten(0, 1),
            encoded.flatten(2, 3).flatten(0, 1),
            present.flatten(2, 3).flatten(0, 1),
            copies=k,
        )
        return from_groups(read.view(batch, chunks, self.chunk, width), hidden.shape[1])
