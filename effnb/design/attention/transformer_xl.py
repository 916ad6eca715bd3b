r"""Transformer-XL: read a long text in segments, and let each see the states of those before.

A model that reads segments one by one knows nothing at the beginning of each. Transformer-XL keeps
the last $M$ inputs of every layer (the *memory* $m$, without gradients) and lets the next segment
attend to them: with $c = [m; h]$, $q = h W_q$, $k = c W_k$, $v = c W_v$. Absolute positions would
give the tokens of memory and segment the same codes, so scores know distances
$\delta = i + M - j$ only, by a sinusoid table $R_\delta$ with a projection
$r_\delta = R_\delta W_r$ of its own:

$$A_{ij} = \big[(q_i + u) \cdot k_j + (q_i + v) \cdot r_\delta\big] / \sqrt{d_h}, \qquad
  \delta \ge 0,$$

with two learned vectors $u$, $v$ for each head, shared by all layers. The second product is
computed for all distances at once and shifted into place (`rel_shift`). A stack of $N$ layers
reaches $N M$ tokens back, for $O(L (L + M) d)$ operations a segment of length $L$.

Memories belong to sequences: row $b$ of a batch must go on where row $b$ of the batch before ended.

Dai, Yang, Yang, Carbonell, Le, Salakhutdinov, "Transformer-XL: Attentive Language Models beyond a
Fixed-Length Context", 2019, arXiv 1901.02860.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.design.attention.checks import check_count, check_heads


def relative_table(
    distances: Float[Tensor, " distances"], dim: int
) -> Float[Tensor, "distances dim"]:
    r"""$R_\delta = [\sin(\delta \omega), \cos(\delta \omega)]$, $\omega_i = 10000^{-2i/d}$.

    Raises:
        ValueError: An odd width.
    """
    if dim % 2:
        raise ValueError(f"dim is {dim}; sines and cosines need an even number.")
    omega = 10000 ** -(torch.arange(0, dim, 2, device=distances.device).to(distances) / dim)
    angles = distances[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], 1)


def rel_shift(x: Float[Tensor, "*batch queries keys"]) -> Float[Tensor, "*batch queries keys"]:
    r"""Move products with distances $K - 1, \dots, 0$ to the keys at these distances.

    Row $i$ of L must move $L - 1 - i$ places to the left. A column of zeros in front, and reading
    the same memory as rows one longer, moves each row one place further than the one below it.
    What is behind the diagonal, $j > i + K - L$, is of no use and must be masked.
    """
    *batch, queries, keys = x.shape
    padded = nn.functional.pad(x, (1, 0))  # (L, 1 + K)
    return padded.reshape(*batch, keys + 1, queries)[..., 1:, :].reshape(*batch, queries, keys)


class RelativeAttention(nn.Module):
    """Multi-head attention over memory and segment, by content and distance.

    Args:
        dim: d, the width of the model.
        heads: Heads; they divide the width.
        dropout: Share of the attention weights that is set to 0 in training.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.q_proj, self.k_proj, self.v_proj, self.r_proj, self.o_proj = (
            nn.Linear(dim, dim, bias=False) for _ in range(5)
        )

    def scores(
        self,
        h: Float[Tensor, "batch time dim"],
        c: Float[Tensor, "batch context dim"],
        u: Float[Tensor, "heads head_dim"],
        v: Float[Tensor, "heads head_dim"],
        clamp: int | None = None,
    ) -> Float[Tensor, "batch heads time context"]:
        """$A_{ij}$, minus infinity at later tokens."""
        q, k = (self._split(p(x)) for p, x in ((self.q_proj, h), (self.k_proj, c)))
        length, keys = q.shape[2], k.shape[2]
        distances = torch.arange(keys - 1, -1, -1, device=h.device)
        bounded = distances if clamp is None else distances.clamp(max=clamp)
        r = self.r_proj(relative_table(bounded.to(h.dtype), h.shape[2]))
        r = r.unflatten(1, (self.heads, -1)).transpose(0, 1)  # r = R W_r
        content = (q + u[:, None]) @ k.mT  # (q_i + u) . k_j
        position = rel_shift((q + v[:, None]) @ r.mT)  # (q_i + v) . r_(i + M - j)
        future = torch.ones(length, keys, dtype=torch.bool, device=h.device)
        future = future.triu(1 + keys - length)  # the memory moves the diagonal to 1 + M
        return ((content + position) / q.shape[3] ** 0.5).masked_fill(future, -torch.inf)

    def forward(
        self,
        h: Float[Tensor, "batch time dim"],
        memory: Float[Tensor, "batch memory dim"],
        u: Float[Tensor, "heads head_dim"],
        v: Float[Tensor, "heads head_dim"],
        clamp: int | None = None,
    ) -> Float[Tensor, "batch time dim"]:
        """What the tokens of the segment gather from memory and segment."""
        c = torch.cat([memory, h], 1)  # c = [m; h]
        weights = self.dropout(self.scores(h, c, u, v, clamp).softmax(-1))
        out = weights @ self._split(self.v_proj(c))
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class XlLayer(nn.Module):
    """Attention and a feed-forward network, each with a residual connection and a norm.

    Args:
        dim: Width of the model.
        heads: Heads.
        hidden: Width inside the feed-forward network.
        dropout: Of weights, and of what each part adds.
        pre_norm: Whether norms come before the parts instead of after the sums, as in the paper.
    """

    def __init__(
        self, dim: int, heads: int, hidden: int, dropout: float = 0.0, pre_norm: bool = False
    ) -> None:
        super().__init__()
        self.attention = RelativeAttention(dim, heads, dropout)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, dim)
        )
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.dropout, self.pre_norm = nn.Dropout(dropout), pre_norm

    def forward(
        self,
        h: Float[Tensor, "batch time dim"],
        memory: Float[Tensor, "batch memory dim"],
        u: Float[Tensor, "heads head_dim"],
        v: Float[Tensor, "heads head_dim"],
        clamp: int | None = None,
    ) -> Float[Tensor, "batch time dim"]:
        """The layer's output for the segment."""
        first, second = self.norms
        if self.pre_norm:
            h = h + self.dropout(self.attention(first(h), first(memory), u, v, clamp))
            return h + self.dropout(self.feed_forward(second(h)))
        h = first(h + self.dropout(self.attention(h, memory, u, v, clamp)))
        return second(h + self.dropout(self.feed_forward(h)))


@dataclass(frozen=True)
class XlOutput:
    """What a segment gives.

    Attributes:
        logits: Scores of the next token.
        memories: For the next segment: the last inputs of each layer.
    """

    logits: Float[Tensor, "batch time vocabulary"]
    memories: tuple[Float[Tensor, "batch memory dim"], ...]


class TransformerXL(nn.Module):
    """A language model that reads segments, with a memory.

    Args:
        vocabulary: Number of tokens.
        dim: d, width of the model; even.
        heads: Heads; they divide the width.
        layers: N.
        hidden: Width inside the feed-forward networks; 4 d by default.
        memory: M, inputs of each layer that are kept. It can be changed after training.
        dropout: In training.
        pre_norm: Whether norms come before attention and feed-forward network.
        clamp: Distances above this count as this; for memories longer than in training.
        tied: Whether the output layer has the embedding's weight.

    Raises:
        ValueError: A count below 1 (of `memory`: below 0), or widths that do not fit.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        dim: int = 128,
        heads: int = 4,
        layers: int = 4,
        hidden: int | None = None,
        memory: int = 64,
        dropout: float = 0.0,
        pre_norm: bool = False,
        clamp: int | None = None,
        tied: bool = True,
    ) -> None:
        super().__init__()
        check_count("layers", layers)
        check_count("memory", memory, least=0)
        if dim % 2:
            raise ValueError(f"dim is {dim}; the table of distances needs an even width.")
        hidden = 4 * dim if hidden is None else hidden
        self.memory, self.clamp = memory, clamp
        self.embedding = nn.Embedding(check_count("vocabulary", vocabulary), dim)
        self.layers = nn.ModuleList(
            XlLayer(dim, heads, hidden, dropout, pre_norm) for _ in range(layers)
        )
        self.u = nn.Parameter(torch.zeros(heads, dim // heads))
        self.v = nn.Parameter(torch.zeros(heads, dim // heads))
        self.norm = nn.LayerNorm(dim) if pre_norm else nn.Identity()
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        nn.init.normal_(self.u, std=0.02)
        nn.init.normal_(self.v, std=0.02)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        ids: Int[Tensor, "batch time"],
        memories: Sequence[Tensor] | None = None,
        *,
        stop_gradient: bool = True,
    ) -> XlOutput:
        """Read one segment.

        Args:
            ids: Tokens of the segment, without padding.
            memories: What the segment before returned; None at the beginning of a text.
            stop_gradient: Whether memories are cut off from the graph, as they should be in
                training: otherwise it grows with every segment.

        Raises:
            ValueError: Memories of another batch, or not one for each layer.
        """
        h = self.dropout(self.embedding(ids) * self.embedding.embedding_dim**0.5)
        if memories is None:
            memories = [h[:, :0].detach()] * len(self.layers)
        shapes = [tuple(m.shape[::2]) for m in memories]
        if shapes != [(h.shape[0], h.shape[2])] * len(self.layers):
            raise ValueError(
                f"the memories have (batch, dim) {shapes}; there must be {len(self.layers)} of "
                f"{(h.shape[0], h.shape[2])}, as the segment before returned them."
            )
        kept = []
        for layer, memory in zip(self.layers, memories):
            kept.append(self._remember(memory, h, stop_gradient))  # the layer's *input*
            h = layer(h, memory, self.u, self.v, self.clamp)
        return XlOutput(self.head(self.norm(h)), tuple(kept))

    def _remember(self, memory: Tensor, h: Tensor, stop_gradient: bool) -> Tensor:
        whole = torch.cat([memory, h], 1)
        found = whole[:, max(0, whole.shape[1] - self.memory) :]  # m' = the last M of [m; h]
        return found.detach() if stop_gradient else found


def read_in_segments(
    model: TransformerXL, ids: Int[Tensor, "batch time"], segment: int
) -> Float[Tensor, "batch time vocabulary"]:
    """The logits of a long text, read segment by segment with the memory handed on.

    Args:
        model: The model; its `memory` says how far a segment sees.
        ids: The text, of any length.
        segment: L; the last segment may be shorter.

    Raises:
        ValueError: A segment below 1.
    """
    check_count("segment", segment)
    logits, memories = [], None
    for part in ids.split(segment, 1):
        out = model(part, memories)
        logits.append(out.logits)
        memories = out.memories
    return torch.cat(logits, 1)
