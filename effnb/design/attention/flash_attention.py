r"""FlashAttention: exact attention, tile by tile, without the table of all scores.

A softmax needs the largest score and the sum of all exponentials. Both can be kept up to date while
keys come by in blocks (online softmax). With $m$ the largest score so far, $\ell$ the sum of
$e^{s - m}$ and $o$ the sum of $e^{s - m} v$, a block of scores $S = s\,q K_j^\top$ gives

$$m' = \max(m, \max S), \quad P = e^{S - m'}, \quad
  \ell' = e^{m - m'} \ell + \textstyle\sum P, \quad o' = e^{m - m'} o + P V_j,$$

and $o / \ell$ at the end is the output. What is kept for the backward pass is one number a row, the
log-sum-exp $L = m + \log \ell$: the probabilities are computed again, $P = e^{S - L}$, and with $g$
the gradient of the output and $D = \sum_c g_c o_c$ of each row,

$$dV = P^\top g, \quad dS = P \odot (g V^\top - D), \quad dQ = s\,dS\,K, \quad dK = s\,dS^\top Q.$$

Memory is linear in the length. The number of operations is not reduced (the backward pass even
repeats some); what falls is the traffic to slow memory, `memory_accesses`. Run from Python, tile by
tile, it is slower than one large product: this module is for reading, tracing and counting. The
same computation as a kernel is in `effnb.kernels.local_attention`.

Dao, Fu, Ermon, Rudra, Ré, "FlashAttention: Fast and Memory-Efficient Exact Attention with
IO-Awareness", 2022, arXiv 2205.14135. The online softmax: Milakov, Gimelshein, "Online normalizer
calculation for softmax", 2018, arXiv 1805.02867.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from effnb.design.attention.checks import check_attention, check_count, check_mask, wide

# ---------------------------------------------------------------- the online softmax


@dataclass(frozen=True)
class SoftmaxState:
    r"""What an online softmax knows after some of the keys.

    Attributes:
        m: The largest score so far; $-\infty$ before the first.
        l: $\ell$, the sum of $e^{s - m}$.
        o: The sum of $e^{s - m} v$, not yet divided by $\ell$.
    """

    m: Float[Tensor, "*rows"]
    l: Float[Tensor, "*rows"]  # noqa: E741  the paper's name
    o: Float[Tensor, "*rows value_dim"]

    @classmethod
    def empty(cls, rows: tuple[int, ...], value_dim: int, like: Tensor) -> SoftmaxState:
        """Before the first key."""
        kind = dict(dtype=wide(like), device=like.device)
        m = torch.full(rows, -torch.inf, **kind)
        return cls(m, torch.zeros(rows, **kind), torch.zeros((*rows, value_dim), **kind))

    def add(
        self, scores: Float[Tensor, "*rows keys"], values: Float[Tensor, "*values keys value_dim"]
    ) -> SoftmaxState:
        """The state after one more block of keys; scores of hidden keys are minus infinity."""
        m = torch.maximum(self.m, scores.amax(-1))  # m' = max(m, max S)
        offset = _finite(m)
        p = (scores - offset[..., None]).exp()  # P = e^(S - m')
        shrink = (self.m - offset).exp()  # e^(m - m')
        return SoftmaxState(m, shrink * self.l + p.sum(-1), shrink[..., None] * self.o + p @ values)

    def merge(self, other: SoftmaxState) -> SoftmaxState:
        """The state after the keys of both; they can be visited in any order, or side by side."""
        m = torch.maximum(self.m, other.m)
        a, b = (self.m - _finite(m)).exp(), (other.m - _finite(m)).exp()
        return SoftmaxState(
            m, a * self.l + b * other.l, a[..., None] * self.o + b[..., None] * other.o
        )

    @property
    def output(self) -> Float[Tensor, "*rows value_dim"]:
        r"""$o / \ell$, and 0 for rows that saw no key."""
        return self.o / torch.where(self.l > 0, self.l, 1)[..., None]

    @property
    def logsumexp(self) -> Float[Tensor, "*rows"]:
        r"""$L = m + \log \ell$; $-\infty$ for rows that saw no key."""
        return self.m + torch.where(self.l > 0, self.l, 1).log()


def _finite(m: Tensor) -> Tensor:
    """The maximum, or 0 where nothing was seen: minus infinity less itself is not a number."""
    return torch.where(m == -torch.inf, 0, m)


def online_softmax(
    scores: Float[Tensor, "*rows keys"],
    values: Float[Tensor, "keys value_dim"],
    *,
    block: int,
) -> list[SoftmaxState]:
    """The states of an online softmax after each block of keys, for given scores.

    Args:
        scores: Scores of any number of rows.
        values: A value for each key.
        block: Keys in a block; the last one may be smaller.

    Returns:
        One state for each block; the last one's `output` is the softmax times the values.

    Raises:
        ValueError: A block below 1, or a number of values that is not the number of keys.
    """
    check_count("block", block)
    if scores.shape[-1] != len(values):
        raise ValueError(f"there are {scores.shape[-1]} keys but {len(values)} values.")
    state = SoftmaxState.empty(tuple(scores.shape[:-1]), values.shape[1], scores)
    kind, states = wide(scores), []
    for s, v in zip(scores.to(kind).split(block, -1), values.to(kind).split(block)):
        states.append(state := state.add(s, v))
    return states


# ---------------------------------------------------------------- tiles


@dataclass(frozen=True)
class FlashStep:
    """One tile of the forward pass, for pictures and for checking by hand.

    Attributes:
        queries: First query of the tile, and the one behind its last.
        keys: First key of the tile, and the one behind its last.
        scores: The tile of scores, hidden ones minus infinity.
        state: m, l and o of these queries after the tile.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    scores: Float[Tensor, "batch heads tile_queries tile_keys"]
    state: SoftmaxState


@dataclass(frozen=True)
class _Tiles:
    """How the table of scores is cut, and which of its entries are hidden."""

    queries: int
    keys: int
    block_q: int
    block_k: int
    causal: bool
    padding: Tensor | None

    def rows(self) -> Iterator[slice]:
        for start in range(0, self.queries, self.block_q):
            yield slice(start, min(start + self.block_q, self.queries))

    def columns(self, rows: slice) -> Iterator[slice]:
        """Tiles of keys that a tile of queries visits: none that lies wholly in its future."""
        offset = self.keys - self.queries  # the queries are the last tokens
        end = rows.stop + offset if self.causal else self.keys
        for start in range(0, end, self.block_k):
            yield slice(start, min(start + self.block_k, self.keys))

    def hide(self, scores: Tensor, rows: slice, columns: slice) -> Tensor:
        """Scores with hidden ones at minus infinity."""
        if self.causal and columns.stop - 1 > rows.start + self.keys - self.queries:
            i = torch.arange(rows.start, rows.stop, device=scores.device)[:, None]
            j = torch.arange(columns.start, columns.stop, device=scores.device)
            scores = scores.masked_fill(j > i + self.keys - self.queries, -torch.inf)
        if self.padding is not None:
            scores = scores.masked_fill(self.padding[:, None, None, columns], -torch.inf)
        return scores


def _walk(q: Tensor, k: Tensor, v: Tensor, scale: float, tiles: _Tiles) -> Iterator[FlashStep]:
    """The forward pass, tile by tile: for each tile of queries, all tiles of keys it visits."""
    kind = wide(q)
    for rows in tiles.rows():
        queries = q[:, :, rows].to(kind)
        state = SoftmaxState.empty(tuple(queries.shape[:3]), v.shape[3], q)
        for columns in tiles.columns(rows):
            scores = scale * queries @ k[:, :, columns].to(kind).mT  # S = s q K^T
            scores = tiles.hide(scores, rows, columns)
            state = state.add(scores, v[:, :, columns].to(kind))
            where = (rows.start, rows.stop), (columns.start, columns.stop)
            yield FlashStep(*where, scores, state)


class _FlashAttention(torch.autograd.Function):
    """The two passes; between them lie q, k, v, the outputs and L."""

    @staticmethod
    def forward(ctx, q, k, v, scale, tiles):
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        logsumexp = torch.full(q.shape[:3], -torch.inf, dtype=wide(q), device=q.device)
        for step in _walk(q, k, v, scale, tiles):
            rows = slice(*step.queries)
            if step.keys[1] == tiles.keys or _is_last(tiles, rows, step.keys[1]):
                out[:, :, rows] = step.state.output.to(q.dtype)
                logsumexp[:, :, rows] = step.state.logsumexp
        ctx.scale, ctx.tiles = scale, tiles
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.mark_non_differentiable(logsumexp)
        return out, logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        q, k, v, out, logsumexp = ctx.saved_tensors
        tiles, scale, kind = ctx.tiles, ctx.scale, wide(q)
        dq, dk, dv = (torch.zeros_like(x, dtype=kind) for x in (q, k, v))
        for rows in tiles.rows():
            queries, g = q[:, :, rows].to(kind), grad[:, :, rows].to(kind)
            d = (g * out[:, :, rows].to(kind)).sum(-1, keepdim=True)  # D = sum g o
            offset = _finite(logsumexp[:, :, rows, None])
            for columns in tiles.columns(rows):
                keys, values = k[:, :, columns].to(kind), v[:, :, columns].to(kind)
                scores = tiles.hide(scale * queries @ keys.mT, rows, columns)
                p = (scores - offset).exp()  # P = e^(S - L)
                dv[:, :, columns] += p.mT @ g  # dV = P^T g
                ds = p * (g @ values.mT - d)  # dS = P (g V^T - D)
                dq[:, :, rows] += scale * ds @ keys  # dQ = s dS K
                dk[:, :, columns] += scale * ds.mT @ queries  # dK = s dS^T Q
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _is_last(tiles: _Tiles, rows: slice, stop: int) -> bool:
    """Whether the tile of keys that ends at `stop` is the last that these queries visit."""
    return tiles.causal and stop >= rows.stop + tiles.keys - tiles.queries


def _prepare(q, k, v, causal, padding, scale, block_q, block_k):
    check_attention(q, k, v, causal=causal)
    check_mask("padding", padding, (k.shape[0], k.shape[2]))
    block_q, block_k = check_count("block_q", block_q), check_count("block_k", block_k)
    if padding is not None:  # whatever lies there must not reach a sum, not even times 0
        k, v = (x.masked_fill(padding[:, None, :, None], 0) for x in (k, v))
    tiles = _Tiles(q.shape[2], k.shape[2], block_q, block_k, causal, padding)
    return k, v, q.shape[3] ** -0.5 if scale is None else float(scale), tiles


def flash_forward(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch heads keys dim"],
    v: Float[Tensor, "batch heads keys value_dim"],
    *,
    causal: bool = False,
    padding: Bool[Tensor, "batch keys"] | None = None,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    r"""Outputs and log-sum-exps $L$ of each row, in memory linear in the length.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        causal: Whether a query sees no later key. The queries are the last tokens of the keys.
        padding: True at keys that nothing sees.
        scale: $s$; $1 / \sqrt d$ by default.
        block_q: Queries in a tile. The last tile may be smaller.
        block_k: Keys in a tile.

    Returns:
        Outputs with gradients, 0 for rows that see nothing; and $L$, without a gradient, in float32
        (float64 for float64), which is $-\infty$ for such rows.

    Raises:
        ValueError: Shapes or types that do not fit, blocks below 1, or more causal queries than
            keys.
        TypeError: A block that is not a whole number.
    """
    k, v, scale, tiles = _prepare(q, k, v, causal, padding, scale, block_q, block_k)
    return _FlashAttention.apply(q, k, v, scale, tiles)


def flash_attention(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch heads keys dim"],
    v: Float[Tensor, "batch heads keys value_dim"],
    *,
    causal: bool = False,
    padding: Bool[Tensor, "batch keys"] | None = None,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> Float[Tensor, "batch heads queries value_dim"]:
    r"""$\operatorname{softmax}(s\,QK^\top)\,V$, tile by tile; see `flash_forward`."""
    options = dict(causal=causal, padding=padding, scale=scale, block_q=block_q, block_k=block_k)
    return flash_forward(q, k, v, **options)[0]


def flash_trace(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch heads keys dim"],
    v: Float[Tensor, "batch heads keys value_dim"],
    *,
    causal: bool = False,
    padding: Bool[Tensor, "batch keys"] | None = None,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> list[FlashStep]:
    """Every tile that `flash_forward` visits, in order, with m, l and o after it.

    The steps hold all scores together, so this is for short texts.

    Raises:
        ValueError: As `flash_forward`.
    """
    k, v, scale, tiles = _prepare(q, k, v, causal, padding, scale, block_q, block_k)
    with torch.no_grad():
        return list(_walk(q, k, v, scale, tiles))


# ---------------------------------------------------------------- memory traffic


@dataclass(frozen=True)
class MemoryAccesses:
    r"""Numbers that one head moves between slow and fast memory in a forward pass.

    Attributes:
        standard: Attention that writes the table of scores, then that of probabilities.
        tiled: FlashAttention.
        asymptotic: $T^2 d^2 / M$, to which `tiled` is proportional.
        block_q: $B_r$, queries in a tile.
        block_k: $B_c$, keys in a tile.
        standard_peak: Numbers of the largest thing that is stored: the table, $T^2$.
        tiled_peak: Numbers of a tile of it, $B_r B_c$.
    """

    standard: int
    tiled: int
    asymptotic: float
    block_q: int
    block_k: int
    standard_peak: int
    tiled_peak: int


def memory_accesses(tokens: int, dim: int, sram: int) -> MemoryAccesses:
    r"""Memory traffic of a forward pass as a function of the size of fast memory.

    The paper's algorithm 1 keeps a tile of $B_c = \lceil M / 4d \rceil$ keys and values in fast
    memory, and for each passes over all tiles of $B_r = \min(B_c, d)$ queries. Keys and values are
    read once. A pass reads $q$, $o$, $\ell$, $m$ and writes $o$, $\ell$, $m$:

    $$2Td + \lceil T / B_c \rceil (3Td + 4T) = \Theta(T^2 d^2 / M).$$

    Standard attention reads $q$, $k$, $v$, writes $o$, and writes and reads two tables,
    $4Td + 4T^2$.

    Args:
        tokens: $T$.
        dim: $d$, the width of a head.
        sram: $M$, the *numbers* (not bytes) that fast memory holds; at least $4d$, so that a row of
            queries, keys, values and outputs fits. More than the whole input is no use.

    Raises:
        ValueError: Tokens or dimensions below 1, or fast memory in which nothing fits.
        TypeError: Numbers that are not whole.
    """
    t, d = check_count("tokens", tokens), check_count("dim", dim)
    if check_count("sram", sram) < 4 * d:
        raise ValueError(
            f"sram is {sram}; it must hold at least 4 * dim = {4 * d} numbers, a row each of "
            "queries, keys, values and outputs."
        )
    block_k = min(math.ceil(sram / (4 * d)), t)  # B_c = ceil(M / 4d)
    block_q = min(math.ceil(sram / (4 * d)), d, t)  # B_r = min(B_c, d)
    passes = math.ceil(t / block_k)
    return MemoryAccesses(
        standard=4 * t * d + 4 * t * t,
        tiled=2 * t * d + passes * (3 * t * d + 4 * t),
        asymptotic=t * t * d * d / sram,
        block_q=block_q,
        block_k=block_k,
        standard_peak=t * t,
        tiled_peak=block_q * block_k,
    )
