r"""Reformer: hash queries and keys, so that only tokens that fall into one bucket are compared.

Queries and keys are the same vectors, $k = q / \lVert q \rVert$. A random rotation $R$ hashes a
vector by the direction that it is nearest to, $h(x) = \arg\max [xR; -xR]$: near vectors often share
a bucket. Tokens are sorted by (bucket, position) and the sorted row is cut into chunks; each chunk
attends to itself and the one before it, to tokens of the same bucket. A token attends to itself
only if there is nothing else. Since near tokens may still be torn apart, several rounds of hashes
are run and their outputs weighted by how much softmax mass each round saw,

$$o = \sum_r \exp(z_r - \operatorname{logsumexp}_{r'} z_{r'})\, o_r,$$

with $z_r$ the log-sum-exp of the round's scores, in which a pair that $n$ rounds see counts
$1 / n$ in each. $O(T \log T)$ for the sort and $O(T c)$ pairs a round, for chunks of $c$.

Causal masks compare *original* positions, not places in the sorted row.

Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", 2020, arXiv 2001.04451. Its
reversible layers are in `reversible`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from effnb.design.attention.checks import check_count, check_mask, wide

SELF = 1e5
"""What is taken off a token's score with itself."""


def lsh_buckets(
    x: Float[Tensor, "batch heads time dim"], buckets: int, *, rounds: int = 1, seed: int = 0
) -> Int[Tensor, "batch heads rounds time"]:
    r"""$h(x) = \arg\max [xR; -xR]$ for each round's random $R \in \mathbb R^{d \times b / 2}$.

    Args:
        x: Vectors; their length does not matter.
        buckets: b, even.
        rounds: Independent hashes.
        seed: Of the rotations; heads and sequences share them.

    Raises:
        ValueError: An odd number of buckets, or rounds below 1.
    """
    if check_count("buckets", buckets) % 2:
        raise ValueError(f"buckets is {buckets}; it must be even: each direction has an opposite.")
    generator = torch.Generator().manual_seed(seed)
    shape = check_count("rounds", rounds), x.shape[3], buckets // 2
    rotations = torch.randn(shape, generator=generator, dtype=torch.float64).to(x)
    turned = x[:, :, None] @ rotations
    return torch.cat([turned, -turned], -1).argmax(-1)


def full_shared_attention(
    qk: Float[Tensor, "batch heads time dim"],
    v: Float[Tensor, "batch heads time value_dim"],
    *,
    causal: bool = False,
    padding: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "batch heads time value_dim"]:
    """What hashing approximates: attention of all pairs with shared queries and keys."""
    time = qk.shape[2]
    scores = qk @ torch.nn.functional.normalize(qk, dim=-1).mT / qk.shape[3] ** 0.5
    itself = torch.eye(time, dtype=torch.bool, device=qk.device)
    scores = torch.where(itself, scores - SELF, scores)
    hidden = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=qk.device)
    if causal:
        hidden = hidden | torch.ones_like(itself).triu(1)
    if padding is not None:
        hidden = hidden | padding[:, None, None]
        v = v.masked_fill(padding[:, None, :, None], 0)
    blind = hidden.all(-1, keepdim=True)
    weights = scores.masked_fill(hidden & ~blind, -torch.inf).softmax(-1).masked_fill(blind, 0)
    out = weights @ v
    return out if padding is None else out.masked_fill(padding[:, None, :, None], 0)


def lsh_attention(
    qk: Float[Tensor, "batch heads time dim"],
    v: Float[Tensor, "batch heads time value_dim"],
    *,
    buckets: int,
    chunk: int = 64,
    rounds: int = 1,
    causal: bool = False,
    padding: Bool[Tensor, "batch time"] | None = None,
    hashes: Int[Tensor, "batch heads rounds time"] | None = None,
    seed: int = 0,
) -> Float[Tensor, "batch heads time value_dim"]:
    """Attention among tokens of one bucket.

    Args:
        qk: Shared queries and keys; keys are normalized here.
        v: Values.
        buckets: b, even.
        chunk: Tokens in a chunk of the sorted row; a text that is no multiple of it is filled up.
            The paper's have twice the tokens of a mean bucket, 2 T / b.
        rounds: Hashes.
        causal: Whether no token sees a later one.
        padding: True at tokens that are none: nothing sees them, and their outputs are 0.
        hashes: Buckets to use in place of random ones.
        seed: Of the hashes.

    Raises:
        ValueError: Shapes or masks that do not fit, an odd number of buckets, rounds or a chunk
            below 1, or a chunk longer than the text.
    """
    if qk.ndim != 4 or v.ndim != 4 or qk.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"qk {tuple(qk.shape)} and v {tuple(v.shape)} must agree in batch, heads and time."
        )
    batch, heads, time, dim = qk.shape
    check_mask("padding", padding, (batch, time))
    if check_count("chunk", chunk) > time:
        raise ValueError(f"chunk is {chunk}; the text has only {time} tokens.")
    if hashes is None:
        hashes = lsh_buckets(qk, buckets, rounds=rounds, seed=seed)
    elif tuple(hashes.shape) != (batch, heads, rounds, time):
        raise ValueError(
            f"hashes have shape {tuple(hashes.shape)}; they must be {(batch, heads, rounds, time)}."
        )
    # Tokens that are none come last in every sorted row, in a bucket that only they have.
    bucket = torch.nn.functional.pad(hashes, (0, -time % chunk), value=buckets)
    if padding is not None:
        outside = torch.nn.functional.pad(padding, (0, -time % chunk), value=True)
        bucket = bucket.masked_fill(outside[:, None, None], buckets)
    length = bucket.shape[3]
    place = torch.arange(length, device=qk.device)
    order = (bucket * length + place).argsort(-1)  # by bucket, then by position
    kind = wide(qk)

    def sort(x):  # (batch, heads, T, d) -> (batch, heads, rounds, chunks, chunk, d)
        x = torch.nn.functional.pad(x.to(kind), (0, 0, 0, length - time))
        index = order.flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
        return x.gather(2, index).unflatten(2, (rounds, -1, chunk))

    def with_previous(x):  # a chunk and the one before it; the first one's is the last
        return torch.cat([x, x.roll(1, 3)], 4)

    queries = sort(qk)
    keys = with_previous(torch.nn.functional.normalize(queries, dim=-1))  # k = q / |q|
    values = with_previous(sort(v))
    i = order.unflatten(3, (-1, chunk))
    j = with_previous(i)
    sorted_bucket = bucket.gather(3, order).unflatten(3, (-1, chunk))
    key_bucket = with_previous(sorted_bucket)
    hidden = sorted_bucket[..., None] != key_bucket[..., None, :]
    hidden = hidden | (key_bucket == buckets)[..., None, :]
    if i.shape[3] == 1:  # a single chunk would meet itself twice
        hidden[..., chunk:] = True
    if causal:
        hidden = hidden | (j[..., None, :] > i[..., None])  # original positions
    scores = queries @ keys.mT / dim**0.5
    scores = torch.where(i[..., None] == j[..., None, :], scores - SELF, scores)
    scores = scores - _times_seen(bucket, order, i, j, hidden).clamp(min=1).to(kind).log()
    scores = scores.masked_fill(hidden, -torch.inf)
    z = _logsumexp(scores, -1)
    out = (scores - torch.where(z == -torch.inf, 0, z)[..., None]).exp() @ values
    # Back to the order of the text, and together: o = sum_r exp(z_r - logsumexp z) o_r
    back = order.argsort(-1)
    z = z.flatten(3).gather(3, back)
    out = out.flatten(3, 4).gather(3, back[..., None].expand(*back.shape, out.shape[5]))
    total = _logsumexp(z, 2)[:, :, None]
    share = (z - torch.where(total == -torch.inf, 0, total)).exp()
    return (share[..., None] * out).sum(2)[:, :, :time].to(v.dtype)


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """Log-sum-exp whose gradient is 0, and not NaN, where everything is minus infinity."""
    nothing = (x == -torch.inf).all(dim, keepdim=True)
    found = torch.where(nothing, 0, x).logsumexp(dim)
    return found.masked_fill(nothing.squeeze(dim), -torch.inf)


def _times_seen(bucket: Tensor, order: Tensor, i: Tensor, j: Tensor, hidden: Tensor) -> Tensor:
    """In how many rounds each pair of a round is compared: same bucket, same or next chunk."""
    rounds, chunk = bucket.shape[2], i.shape[4]
    if rounds == 1:
        return torch.ones(1, device=bucket.device)
    chunks = i.shape[3]
    where = order.argsort(-1) // chunk  # the chunk of each position, in each round
    seen = torch.zeros_like(hidden, dtype=torch.int16)
    for other in range(rounds):

        def at(x, places, other=other):
            flat = places.flatten(2)
            return x[:, :, other].gather(2, flat).view_as(places)

        same = at(bucket, i)[..., None] == at(bucket, j)[..., None, :]
        ci, cj = at(where, i)[..., None], at(where, j)[..., None, :]
        seen += same & ((ci == cj) | ((ci - 1) % chunks == cj))
    return seen


def top_key_recall(
    qk: Float[Tensor, "batch heads time dim"],
    hashes: Int[Tensor, "batch heads rounds time"],
    *,
    top: int = 8,
) -> float:
    """Share of each query's true top keys (without itself) that share a bucket in any round.

    Raises:
        ValueError: A `top` below 1, or not below the number of tokens.
    """
    time = qk.shape[2]
    if check_count("top", top) >= time:
        raise ValueError(f"top is {top}; a query has only {time - 1} other keys.")
    scores = qk @ torch.nn.functional.normalize(qk, dim=-1).mT
    itself = torch.eye(time, dtype=torch.bool, device=qk.device)
    best = scores.masked_fill(itself, -torch.inf).topk(top, -1).indices
    together = (hashes[..., :, None] == hashes[..., None, :]).any(2)
    return float(together.gather(-1, best).double().mean())
