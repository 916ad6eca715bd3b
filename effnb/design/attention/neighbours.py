r"""Attention over listed pairs: each query has a few keys, and no other score is computed.

A prediction such as Sparsefinder's puts queries and keys into buckets. Sorting keys by bucket makes
a bucket's keys lie together, so a query reads its own off without meeting the others:
$O(T (\log T + n))$ for lists of $n$ keys, where a table would be $T^2$. The lists are padded to the
longest, so buckets of very different sizes waste work; `Neighbours.pairs` counts what is real.

On a GPU single pairs are gathered slowly; real speed takes blocks of them. Treviso et al., 2021,
arXiv 2109.12188, whose prediction this serves, report sparsity and not time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from effnb.design.attention.checks import check_attention, check_count
from effnb.design.attention.entmax import entmax


@dataclass(frozen=True)
class Neighbours:
    """Lists of keys, one for each query.

    Attributes:
        index: Keys; what fills up a shorter list has any number.
        real: True at keys, False at what fills up.
    """

    index: Int[Tensor, "batch heads queries width"]
    real: Bool[Tensor, "batch heads queries width"]

    @property
    def pairs(self) -> int:
        """Pairs of query and key in all lists together."""
        return int(self.real.sum())

    def graph(self, keys: int) -> Bool[Tensor, "batch heads queries keys"]:
        """The same as a table, for short texts."""
        table = torch.zeros(*self.index.shape[:3], keys + 1, dtype=torch.bool)
        table = table.to(self.index.device)
        return table.scatter_(-1, torch.where(self.real, self.index, keys), True)[..., :keys]


def bucket_neighbours(
    query_ids: Int[Tensor, "batch heads queries members"],
    key_ids: Int[Tensor, "batch heads keys members"],
    *,
    window: int = 0,
    causal: bool = False,
) -> Neighbours:
    """For each query, the keys that share a bucket with it, without a table of pairs.

    Args:
        query_ids: Buckets of each query (`sparsefinder.quantization_buckets`, `cluster_buckets`).
        key_ids: Buckets of each key.
        window: Width of a window that is added, odd; 0 is none. There is a query for each key then.
        causal: Whether later keys are left out. There is a query for each key then.

    Raises:
        ValueError: An even window; a window or causal lists with other numbers of queries than of
            keys; buckets below 0.
    """
    queries, keys, members = query_ids.shape[2], key_ids.shape[2], key_ids.shape[3]
    if check_count("window", window, least=0) % 2 == 0 and window:
        raise ValueError(f"window is {window}; a window with a token at its centre is odd, or 0.")
    if (window or causal) and queries != keys:
        raise ValueError(f"{queries} queries are not the tokens of {keys} keys, as a window needs.")
    if query_ids.numel() and int(torch.minimum(query_ids.min(), key_ids.min())) < 0:
        raise ValueError("a bucket has a number below 0.")
    buckets = 1 + max(int(query_ids.max()), int(key_ids.max())) if key_ids.numel() else 1
    # All memberships of a head in a row, sorted by bucket; the key is what is listed.
    flat = key_ids.flatten(2)
    order = flat.argsort(dim=-1, stable=True)
    listed = order // members
    sizes = torch.zeros(*flat.shape[:2], buckets, dtype=torch.long, device=flat.device)
    sizes.scatter_add_(-1, flat, torch.ones_like(flat))
    starts = sizes.cumsum(-1) - sizes
    own = query_ids.flatten(2)
    longest = int(sizes.gather(-1, own).max()) if own.numel() else 0
    place = torch.arange(longest, device=flat.device)
    real = place < sizes.gather(-1, own)[..., None]
    where = (starts.gather(-1, own)[..., None] + place).clamp(max=max(flat.shape[-1] - 1, 0))
    index = listed.gather(-1, where.flatten(2)).view_as(where)
    index = index.unflatten(2, (queries, -1)).flatten(3)
    real = real.unflatten(2, (queries, -1)).flatten(3)
    i = torch.arange(queries, device=flat.device)[:, None]
    if window:
        near = i + torch.arange(-(window // 2), window // 2 + 1, device=flat.device)
        inside = (near >= 0) & (near < keys)
        near, inside = (x.expand(*index.shape[:2], *x.shape) for x in (near.clamp(0), inside))
        index, real = torch.cat([index, near], -1), torch.cat([real, inside], -1)
    if causal:
        real = real & (index <= i)
    # A key that shares several buckets is listed once.
    index, order = torch.where(real, index, keys).sort(-1)
    real = real.gather(-1, order)
    again = torch.zeros_like(real)
    again[..., 1:] = index[..., 1:] == index[..., :-1]
    real = real & ~again
    order = real.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    width = int(real.sum(-1).max()) if real.numel() else 0
    index, real = (x.gather(-1, order)[..., :width] for x in (index, real))
    return Neighbours(torch.where(real, index, 0), real)


def neighbour_attention(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch heads keys dim"],
    v: Float[Tensor, "batch heads keys value_dim"],
    neighbours: Neighbours,
    *,
    alpha: float = 1.5,
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries value_dim"]:
    r"""Entmax attention (softmax for $\alpha = 1$) over the listed pairs alone.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        neighbours: The keys of each query; an empty list gives 0.
        alpha: See `entmax.entmax`.
        scale: The factor on scores; $1 / \sqrt d$ by default.

    Raises:
        ValueError: Lists for other batches, heads or queries, or shapes that do not fit.
    """
    check_attention(q, k, v)
    if neighbours.index.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"there are lists for {tuple(neighbours.index.shape[:3])} (batch, heads, queries); q "
            f"has {tuple(q.shape[:3])}."
        )
    if not neighbours.index.shape[3]:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    batch, heads, queries, width = neighbours.index.shape
    flat = neighbours.index.reshape(batch, heads, -1, 1)
    keys, values = (
        x.gather(2, flat.expand(-1, -1, -1, x.shape[3])).unflatten(2, (queries, width))
        for x in (k, v)
    )
    scores = (q.shape[3] ** -0.5 if scale is None else scale) * (keys @ q[..., None])[..., 0]
    weights = entmax(scores.masked_fill(~neighbours.real, -torch.inf), alpha)
    return (weights[..., None, :] @ values)[..., 0, :]
