r"""Sparsefinder: predict which pairs of an entmax attention are not zero, before computing them.

An entmax attention leaves most weights at exactly 0, but finding out which takes the whole table of
scores. Sparsefinder learns, for each head, small projections of queries and keys (from the width of
a head to $r = 4$), by a hinge loss over pairs with a weight above 0 and pairs without,

$$[\,1 + \lVert \tilde q - \tilde k^+ \rVert^2 - \lVert \tilde q - \tilde k^- \rVert^2\,]_+,$$

and predicts a graph from the projections, by one of three rules: *distance*, pairs nearer than a
threshold; *quantization*, pairs that share a bucket in any of the $r$ dimensions; *clustering*,
pairs whose nearest centroids agree. A window and global tokens are added to it. The rule is judged
by the recall $|\hat G \cap G| / |G|$ that it reaches at a sparsity $1 - |\hat G| / T^2$. With a
recall of 1, entmax over the predicted pairs alone is *exactly* the original attention, for a key of
weight 0 can be deleted without changing the others. Softmax does not allow this.

The distance rule still compares all pairs, in $r$ dimensions. The others put tokens into buckets,
and `bucket_neighbours` lists the pairs without visiting the rest.

Treviso, Góis, Fernandes, Fonseca, Martins, "Predicting Attention Sparsity in Transformers", 2021,
arXiv 2109.12188.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnb.design.attention.checks import check_count

# ---------------------------------------------------------------- learning the projections


class Projections(nn.Module):
    """A small linear map of queries and one of keys for each head.

    Args:
        heads: Heads.
        dim: Width of a head.
        rank: r, the width after the projection.
        shared: Whether one map serves queries and keys.
        generator: Source of the first values.
    """

    def __init__(
        self,
        heads: int,
        dim: int,
        rank: int = 4,
        *,
        shared: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        maps = torch.randn(1 if shared else 2, heads, dim, rank, generator=generator) / dim**0.5
        self.maps = nn.Parameter(maps)

    def forward(
        self, q: Float[Tensor, "batch heads queries dim"], k: Float[Tensor, "batch heads keys dim"]
    ) -> tuple[Float[Tensor, "batch heads queries rank"], Float[Tensor, "batch heads keys rank"]]:
        """Projected queries and keys."""
        return q @ self.maps[0], k @ self.maps[-1]


def triplet_loss(
    q: Float[Tensor, "triplets rank"],
    positive: Float[Tensor, "triplets rank"],
    negative: Float[Tensor, "triplets rank"],
    margin: float = 1.0,
) -> Float[Tensor, ""]:
    r"""Mean of $[\,\text{margin} + \lVert q - k^+ \rVert^2 - \lVert q - k^- \rVert^2\,]_+$."""
    near, far = (q - positive).square().sum(-1), (q - negative).square().sum(-1)
    return (margin + near - far).clamp(min=0).mean()


def sample_triplets(
    gold: Bool[Tensor, "batch heads queries keys"],
    count: int,
    *,
    visible: Bool[Tensor, "*masks queries keys"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "triplets 5"]:
    """Random triplets (batch, head, query, key with a weight, key without).

    Each pair with a weight gets one key without any, of the same query, both drawn uniformly.

    Args:
        gold: Pairs with a weight above 0.
        count: How many; fewer where there are fewer pairs.
        visible: Pairs that a mask allows; the others are no negatives.
        generator: Source of the choice.

    Raises:
        ValueError: When no query has both kinds of keys.
    """
    without = ~gold if visible is None else ~gold & visible
    pairs = (gold & without.any(-1, keepdim=True)).nonzero()
    if not len(pairs):
        raise ValueError("no query has keys both with and without a weight; nothing to learn from.")
    order = torch.randperm(len(pairs), generator=generator)[:count].to(pairs.device)
    pairs = pairs[order]
    chances = without[pairs[:, 0], pairs[:, 1], pairs[:, 2]].float().cpu()
    negative = torch.multinomial(chances, 1, generator=generator).to(pairs.device)
    return torch.cat([pairs, negative], 1)


def fit_projections(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch heads keys dim"],
    gold: Bool[Tensor, "batch heads queries keys"],
    *,
    rank: int = 4,
    shared: bool = False,
    margin: float = 1.0,
    steps: int = 200,
    triplets: int = 1024,
    learning_rate: float = 0.02,
    visible: Bool[Tensor, "*masks queries keys"] | None = None,
    seed: int = 0,
) -> Projections:
    """Learn the projections of one layer's heads from attention that was computed in full.

    Args:
        q: Queries of a trained entmax attention.
        k: Its keys.
        gold: Where its weights are above 0.
        rank: r.
        shared: Whether queries and keys have one projection.
        margin: By how much a pair without weight should be further apart.
        steps: Steps of Adam.
        triplets: Triplets in a step.
        learning_rate: Of Adam.
        visible: Pairs that a mask allows.
        seed: Of first values and triplets.

    Raises:
        ValueError: A rank, number of steps or of triplets below 1, or as `sample_triplets`.
    """
    for name, value in dict(rank=rank, steps=steps, triplets=triplets).items():
        check_count(name, value)
    generator = torch.Generator().manual_seed(seed)
    heads, dim = q.shape[1], q.shape[3]
    found = Projections(heads, dim, rank, shared=shared, generator=generator).to(q.device)
    q, k = q.detach().float(), k.detach().float()
    with torch.enable_grad():
        optimizer = torch.optim.Adam(found.parameters(), lr=learning_rate)
        for _ in range(steps):
            drawn = sample_triplets(gold, triplets, visible=visible, generator=generator)
            b, h, i, near, far = drawn.unbind(1)
            small_q, small_k = found(q, k)
            loss = triplet_loss(small_q[b, h, i], small_k[b, h, near], small_k[b, h, far], margin)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return found.requires_grad_(False)


# ---------------------------------------------------------------- predicting the graph


def distance_graph(
    q: Float[Tensor, "batch heads queries rank"],
    k: Float[Tensor, "batch heads keys rank"],
    threshold: float,
    *,
    metric: str = "euclidean",
) -> Bool[Tensor, "batch heads queries keys"]:
    r"""Pairs nearer than a threshold: $\lVert \tilde q - \tilde k \rVert < t$, or $1 - \cos < t$.

    Args:
        q: Projected queries.
        k: Projected keys.
        threshold: t.
        metric: "euclidean" or "cosine".

    Raises:
        ValueError: Another metric.
    """
    if metric == "euclidean":
        return torch.cdist(q, k) < threshold
    if metric == "cosine":
        unit_q, unit_k = (nn.functional.normalize(x, dim=-1) for x in (q, k))
        return 1 - unit_q @ unit_k.mT < threshold
    raise ValueError(f'metric is {metric!r}; it must be "euclidean" or "cosine".')


def quantization_buckets(
    q: Float[Tensor, "batch heads queries rank"],
    k: Float[Tensor, "batch heads keys rank"],
    buckets: int,
    *,
    equal_size: bool = True,
) -> tuple[Int[Tensor, "batch heads queries rank"], Int[Tensor, "batch heads keys rank"]]:
    r"""In which bucket of each dimension every query and key lies.

    Dimensions count on from each other: bucket $c$ of dimension $n$ is number $n B + c$.

    Args:
        q: Projected queries.
        k: Projected keys.
        buckets: B, buckets of a dimension.
        equal_size: Whether keys are sorted and cut into buckets of one size (queries go where they
            would lie among the keys). Otherwise numbers pass through tanh, and the buckets are
            equally wide.

    Raises:
        ValueError: Buckets below 1, or more than keys where they are of one size.
    """
    check_count("buckets", buckets)
    keys = k.shape[2]
    if equal_size:
        if buckets > keys:
            raise ValueError(f"{keys} keys cannot be cut into {buckets} buckets of one size.")
        ordered, order = k.mT.contiguous().sort(-1)
        ranks = torch.empty_like(order).scatter_(
            -1, order, torch.arange(keys, device=k.device).expand_as(order)
        )
        key_ids = (ranks * buckets // keys).mT
        # The first key of bucket c is the one of rank ceil(c keys / B).
        first = -(-torch.arange(1, buckets, device=k.device) * keys // buckets)
        query_ids = torch.searchsorted(ordered[..., first], q.mT.contiguous(), right=True).mT
    else:
        query_ids, key_ids = (
            ((x.tanh() + 1) / 2 * buckets).long().clamp(max=buckets - 1) for x in (q, k)
        )
    start = torch.arange(k.shape[3], device=k.device) * buckets
    return query_ids + start, key_ids + start


def kmeans(
    points: Float[Tensor, "heads points rank"], clusters: int, *, steps: int = 20, seed: int = 0
) -> Float[Tensor, "heads clusters rank"]:
    """Centroids of each head's points, by Lloyd's algorithm from random points.

    A cluster that loses all its points starts again at the point furthest from its centroid.

    Raises:
        ValueError: Fewer points than clusters, or clusters or steps below 1.
    """
    check_count("clusters", clusters)
    check_count("steps", steps)
    if points.shape[1] < clusters:
        raise ValueError(f"{points.shape[1]} points cannot make {clusters} clusters.")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for head in points:
        first = torch.randperm(len(head), generator=generator)[:clusters]
        centroids = head[first.to(head.device)]
        for _ in range(steps):
            away, nearest = torch.cdist(head, centroids).min(1)
            sizes = torch.bincount(nearest, minlength=clusters)
            sums = torch.zeros_like(centroids).index_add_(0, nearest, head)
            centroids = sums / sizes.clamp(min=1)[:, None]
            empty = (sizes == 0).nonzero().flatten()
            centroids[empty] = head[away.topk(len(empty)).indices]
        found.append(centroids)
    return torch.stack(found)


def cluster_buckets(
    q: Float[Tensor, "batch heads queries rank"],
    k: Float[Tensor, "batch heads keys rank"],
    centroids: Float[Tensor, "heads clusters rank"],
    *,
    top: int = 1,
) -> tuple[Int[Tensor, "batch heads queries top"], Int[Tensor, "batch heads keys top"]]:
    """The nearest clusters of every query and key.

    Args:
        q: Projected queries.
        k: Projected keys.
        centroids: From `kmeans` on projected queries and keys together.
        top: How many clusters each belongs to.

    Raises:
        ValueError: A `top` below 1 or above the number of clusters.
    """
    if check_count("top", top) > centroids.shape[1]:
        raise ValueError(f"top is {top}; there are only {centroids.shape[1]} clusters.")
    query_ids, key_ids = (
        torch.cdist(x, centroids.to(x.dtype)).topk(top, largest=False).indices for x in (q, k)
    )
    return query_ids, key_ids


def bucket_graph(
    query_ids: Int[Tensor, "batch heads queries members"],
    key_ids: Int[Tensor, "batch heads keys members"],
) -> Bool[Tensor, "batch heads queries keys"]:
    """Pairs that share a bucket, as a table of all pairs: for short texts, and pictures."""
    return (query_ids[..., :, None, :, None] == key_ids[..., None, :, None, :]).flatten(4).any(-1)


def add_window(
    graph: Bool[Tensor, "*batch queries keys"],
    *,
    window: int = 3,
    global_tokens: int = 0,
    causal: bool = False,
) -> Bool[Tensor, "*batch queries keys"]:
    """A predicted graph with what is known beforehand: a window, global tokens, no future.

    Args:
        graph: The prediction, one query for each key.
        window: Its width in tokens, odd: 3 is a token and its two neighbours. 0 adds none.
        global_tokens: The first tokens, seen by all and seeing all.
        causal: Whether pairs with a later key are taken out.

    Raises:
        ValueError: An even window, or fewer tokens than global ones.
    """
    tokens = graph.shape[-1]
    if check_count("window", window, least=0) % 2 == 0 and window:
        raise ValueError(f"window is {window}; a window with a token at its centre is odd, or 0.")
    if check_count("global_tokens", global_tokens, least=0) > tokens:
        raise ValueError(f"there are {tokens} tokens, fewer than {global_tokens} global ones.")
    i = torch.arange(tokens, device=graph.device)
    near = (i[:, None] - i).abs() <= window // 2 if window else i[:, None] < 0
    known = near | (i < global_tokens) | (i < global_tokens)[:, None]
    found = graph | known
    return found.tril() if causal else found


# ---------------------------------------------------------------- judging it


@dataclass(frozen=True)
class GraphQuality:
    """How good a prediction is, of each sequence and head.

    Attributes:
        recall: Share of the pairs with a weight that are predicted.
        sparsity: Share of the allowed pairs that are not.
    """

    recall: Float[Tensor, "batch heads"]
    sparsity: Float[Tensor, "batch heads"]


def graph_quality(
    predicted: Bool[Tensor, "batch heads queries keys"],
    gold: Bool[Tensor, "batch heads queries keys"],
    *,
    visible: Bool[Tensor, "*masks queries keys"] | None = None,
) -> GraphQuality:
    r"""Recall $|\hat G \cap G| / |G|$ and sparsity $1 - |\hat G| / T^2$ (of the allowed pairs).

    Args:
        predicted: $\hat G$.
        gold: G, where weights are above 0.
        visible: Pairs that a mask allows; without one, all $T^2$.

    Raises:
        ValueError: Graphs of different shapes.
    """
    if predicted.shape != gold.shape:
        raise ValueError(
            f"the predicted graph has shape {tuple(predicted.shape)}, the gold one "
            f"{tuple(gold.shape)}; they must agree."
        )
    allowed = torch.ones_like(gold) if visible is None else visible.expand_as(gold)
    predicted, gold = predicted & allowed, gold & allowed

    def count(x):
        return x.sum((-2, -1)).double()

    recall = count(predicted & gold) / count(gold).clamp(min=1)
    recall = torch.where(count(gold) > 0, recall, 1)
    return GraphQuality(recall, 1 - count(predicted) / count(allowed).clamp(min=1))
