"""RETRO's encoder: neighbours are read in both directions, in the light of the retrieving chunk.

Borgeaud et al., "Improving language models by retrieving from trillions of tokens", 2022,
arXiv 2112.04426, section 2.3.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnb.design.retrieval.checks import check_count
from effnb.design.retrieval.chunked_attention import Attention


class EncoderLayer(nn.Module):
    """Attention within a neighbour, attention to the retrieving chunk, feed-forward."""

    def __init__(self, width: int, heads: int, *, chunk: int, neighbour: int) -> None:
        """Start with random weights."""
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(3))
        self.own = Attention(width, heads, queries=neighbour, keys=neighbour)
        self.chunk = Attention(width, heads, queries=neighbour, keys=chunk)
        self.feedforward = nn.Sequential(
            nn.Linear(width, 2 * width, bias=False),
            nn.GELU(),
            nn.Linear(2 * width, width, bias=False),
        )

    def forward(
        self,
        rows: Float[Tensor, "neighbours r width"],
        present: Bool[Tensor, "neighbours r"],
        chunks: Float[Tensor, "neighbours m width"],
        seen: Bool[Tensor, "neighbours m"],
    ) -> Float[Tensor, "neighbours r width"]:
        """One layer; both kinds of attention see every row that is present."""
        own = self.norms[0](rows)
        rows = rows + self.own(own, own, present)
        rows = rows + self.chunk(self.norms[1](rows), chunks, seen)  # conditioned on H_u
        return rows + self.feedforward(self.norms[2](rows))


class NeighbourEncoder(nn.Module):
    r"""$E_u^j = \mathrm{Encoder}(\mathrm{Ret}(C_u)^j, H_u)$ for each neighbour $j$ of chunk $u$.

    Attributes:
        layers: Layers.
        norm: Norms of the chunks' rows and of the result.
    """

    def __init__(
        self, width: int, heads: int, *, chunk: int, neighbour: int, layers: int = 1
    ) -> None:
        """Start with random weights.

        Args:
            width: Channels, those of the decoder.
            heads: Heads; must divide the width.
            chunk: Tokens of a chunk.
            neighbour: Most tokens of a neighbour.
            layers: Number of layers.

        Raises:
            ValueError: When a number is below 1 or the heads do not divide the width.
        """
        super().__init__()
        check_count("layers", layers)
        self.layers = nn.ModuleList(
            EncoderLayer(width, heads, chunk=chunk, neighbour=neighbour) for _ in range(layers)
        )
        self.chunk_norm = nn.RMSNorm(width, eps=1e-5)
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def forward(
        self,
        embedded: Float[Tensor, "batch chunks k r width"],
        present: Bool[Tensor, "batch chunks k r"],
        chunks: Float[Tensor, "batch chunks m width"],
    ) -> Float[Tensor, "batch chunks k r width"]:
        """Encode the neighbours.

        Args:
            embedded: Embeddings of the neighbours' tokens.
            present: Which tokens there are.
            chunks: The decoder's rows of each chunk, $H_u$.
        """
        shape = embedded.shape
        k = shape[2]
        rows = embedded.flatten(0, 2)
        own = self.chunk_norm(chunks)[:, :, None].expand(-1, -1, k, -1, -1).flatten(0, 2)
        seen = own.new_ones(own.shape[:2], dtype=bool)
        there = present.flatten(0, 2)
        for layer in self.layers:
            rows = layer(rows, there, own, seen)
        return self.norm(rows).view(shape)


def embed_neighbours(
    embedding: nn.Module, neighbours: Int[Tensor, "batch chunks k r"]
) -> tuple[Float[Tensor, "batch chunks k r width"], Bool[Tensor, "batch chunks k r"]]:
    """Embeddings of the neighbours' tokens, and which of them there are."""
    present = neighbours >= 0
    return embedding(neighbours.clamp(min=0)), present
