r"""Local attention: a sliding window, and a few global tokens, at a cost linear in the length.

Token $i$ attends to the tokens $j$ near it. Some tokens are global: they attend to all, and all
attend to them, so that any two tokens are two steps apart (Longformer: Beltagy, Peters, Cohan,
2020, arXiv 2004.05150). The pair $(i, j)$ is visible if

$$ i - \ell \le j \le i + r \quad\text{or}\quad i \text{ is global} \quad\text{or}\quad
   j \text{ is global,}$$

and, in a causal model, $j \le i$. A window of $w$ is $\ell = r = w/2$, or, causal,
$\ell = w - 1$, $r = 0$: $w$ tokens with the token itself. The rest is attention as ever,
$o_i = \sum_j p_{ij} v_j$ with $p_{ij} \propto e^{s\, q_i \cdot k_j}$ over the visible $j$.

**Tiles.** A table of all pairs is what we want to avoid, and a test per pair would cost as much.
So queries and keys are cut into tiles, a *schedule* lists for each tile of queries the tiles of
keys with which it shares a visible pair, and the kernels visit no others. The schedule itself has
one entry per pair of tiles, 4,096 times fewer than pairs of tokens. Global tokens that lie together
share tiles: put them side by side. Tiles of which every pair is visible, most of those of a wide
window, come last and in a loop of their own, which masks nothing. A schedule is kept for the other
layers of a model, which ask for the same.

**One pass.** The softmax is taken as the keys come by (Milakov and Gimelshein, 2018, arXiv
1805.02867; Dao et al., 2022, arXiv 2205.14135). With $m$ the largest score so far, $l$ the sum of
$e^{\text{score} - m}$ and $a$ the weighted sum of values, a new tile of scores $S$ gives

$$m' = \max(m, \max S),\quad \alpha = e^{m - m'},\quad P = e^{S - m'},\quad
  l' = \alpha l + \textstyle\sum P,\quad a' = \alpha a + P V,$$

and $o = a / l$ in the end. The forward pass keeps $L_i = m + \log l$ of each row; with it, the
backward pass computes $P_{ij} = e^{S_{ij} - L_i}$ again rather than read it. With $g$ the gradient
of $o$ and $\delta_i = g_i \cdot o_i$:

$$dV = P^\top g,\quad dS = P \odot (g V^\top - \delta),\quad dQ = s\, dS\, K,\quad
  dK = s\, dS^\top Q.$$

One kernel takes tiles of queries and computes $dQ$; another takes tiles of keys and computes $dK$
and $dV$. Each result has one owner, so none is added to by two programs, and runs are repeatable.
What is not seen has no part in a sum, not even as an infinite number: see `_masked` for the second
launch of each kernel that this takes, of programs that read a byte and end. Score gradients of
float16, which may be beyond its range, are brought into it row by row before they are multiplied.

**Bytes and operations.** With $n$ visible pairs a head (causal: $Tw - w(w-1)/2$), $h$ heads of
dimension $d$ do $4\,d\,n\,h$ operations forward and, computing the scores again in both kernels,
$14\,d\,n\,h$ backward. Queries, keys, values and outputs must move once,
$(2 h_q + 2 h_{kv})\,T d b$ bytes at $b$ bytes a number: with $h_q = h_{kv}$ and 16 bits, $w/2$
operations per byte. The bound is $t \ge \max(\text{operations} / P, \text{bytes} / B)$ for a GPU of
$P$ operations and $B$ bytes per second: memory for windows below $2 P / B$, arithmetic above.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from effnb.kernels import _tuning
from effnb.kernels._launch import (
    LIMITS,
    arch_of,
    check_floats,
    check_number,
    check_shape,
    check_whole,
    choose,
    empty,
    exact,
    jit,
    next_power_of_2,
    precision,
    short,
    tl,
)
from effnb.kernels._masked import (
    has_nan,
    is_done,
    launch_again,
    sum_seen,
    tell,
    visible_products,
    visible_sum,
)
from effnb.kernels._tuning import Candidate, Numbers, TuneCase, cut, drawn, key_of
from effnb.kernels._window import (
    Masks,
    count_pairs,
    kinds_of,
    reach_of,
    tile_schedule,
    visible_kinds,
    visible_pairs,
    visits_of,
)
from effnb.kernels.bench import EXACT, BenchCase, Runner, pinned
from effnb.kernels.compile import KINDS, CompileCase
from effnb.kernels.report import Work

LOG2_E = 1.4426950408889634  # e^x = 2^(x log2 e), and powers of 2 are what GPUs compute
# ---------------------------------------------------------------- plain PyTorch


def _attend(q, k, v, visible, scale):
    """Softmax over the visible keys; rows that see nothing give 0. q has (batch, kv, group, …)."""
    kind = exact(q)
    keys, values = (x.to(kind)[:, :, None].expand(*q.shape[:3], -1, -1) for x in (k, v))
    scores = scale * visible_products(q.to(kind), keys, visible)
    blind = ~visible.any(-1, keepdim=True)  # a softmax over nothing would be NaN, gradient included
    scores = scores.masked_fill(~(visible | blind), -torch.inf)
    weights = scores.softmax(-1).masked_fill(~visible, 0)
    return visible_sum(weights, values, visible).to(q.dtype)


def local_attention_reference(
    q, k, v, *, window, causal=False, global_tokens=None, padding=None, scale=None
):
    """The definition: all pairs, and a mask. Arguments are those of `local_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    masks = dict(global_tokens=global_tokens, padding=padding, device=q.device)
    visible = visible_pairs(q.shape[2], window=window, causal=causal, **masks)
    q = q.unflatten(1, (k.shape[1], -1))  # queries by the key-value head they share
    return _attend(q, k, v, visible[:, None, None], scale).flatten(1, 2)


def local_attention_tiled(
    q, k, v, *, window, causal=False, global_tokens=None, padding=None, scale=None, block=64
):
    """The same, tile of queries by tile of queries, without the keys that none of them sees.

    This is what runs where the kernels do not: plain PyTorch, and still linear in the length.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    block, tokens = check_whole("block", block), q.shape[2]
    masks = dict(global_tokens=global_tokens, padding=padding)
    reach = reach_of(window, causal, tokens)
    if not tokens:
        return local_attention_reference(q, k, v, window=window, causal=causal, **masks)
    kinds = kinds_of(tokens, q.device, **masks)
    schedule = tile_schedule(kinds, *reach, causal, block, block).any(0).cpu()
    index = torch.arange(tokens, device=q.device)
    tiles = index.split(block)  # once: split again for each tile, it would cost the length squared
    query_tiles = q.unflatten(1, (k.shape[1], -1)).split(block, dim=3)
    outputs = [q[:, :, :0]]
    for seen, rows, queries in zip(schedule, tiles, query_tiles):
        columns = torch.cat([index[:0], *(tiles[n] for n in seen.nonzero())])
        i, j = rows[:, None], columns[None, :]
        visible = visible_kinds(i, j, kinds[:, i], kinds[:, j], *reach, causal)
        out = _attend(queries, k[:, :, columns], v[:, :, columns], visible[:, None, None], scale)
        outputs.append(out.flatten(1, 2))
    return torch.cat(outputs, dim=2)


# ---------------------------------------------------------------- the kernels


@jit
def _visible_tile(i, j, kind_i, kind_j, left, right, CAUSAL: tl.constexpr):
    """`_visible` on a tile; rows and columns past the end were loaded as padding."""
    near = (i - j <= left) & (j - i <= right)
    far = (kind_i == 1) | (kind_j == 1)
    if CAUSAL:
        far = far & (j <= i)
    return (near | far) & (kind_i != 2) & (kind_j != 2)


@jit
def _load_tile(start, token, token_stride, dim, kind, DIM: tl.constexpr):
    """Rows `token` of a matrix; zeros for padding, as which what is past its end counts."""
    inside = (kind != 2)[:, None] & (dim < DIM)[None, :]
    at = token.to(tl.int64)[:, None] * token_stride + dim[None, :]
    return tl.load(start + at, mask=inside, other=0.0)


@jit
def _load_full(start, token, token_stride, dim, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The same for a tile without padding that does not reach beyond the end."""
    at = token.to(tl.int64)[:, None] * token_stride + dim[None, :]
    if DIM == BLOCK_D:
        return tl.load(start + at)
    return tl.load(start + at, mask=(dim < DIM)[None, :], other=0.0)


@jit
def _softmax_step(scores, largest, total):
    """Weights of a tile of scores to the base 2, and what becomes of what was summed before."""
    new_largest = tl.maximum(largest, tl.max(scores, axis=1))
    # A row that has seen nothing has -inf here, and -inf - -inf is not a number.
    offset = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    shrink = tl.exp2(largest - offset)
    p = tl.exp2(scores - offset[:, None])
    return p, shrink, new_largest, total * shrink + tl.sum(p, axis=1)


@jit
def _forward_kernel(
    flags,  # which programs are to run again
    query, key, value, kinds,
    counts,  # (batch or 1, query tiles, 2): tiles of keys that are masked, and that are visited
    visits,  # (batch or 1, query tiles, key tiles): which ones, masked ones first
    out,  # (batch, heads, tokens, DIM)
    log_sum,  # (batch, heads, tokens) float32, to the base 2
    heads,
    group,  # query heads per key-value head
    tokens, key_tiles,
    scale,  # with log2(e) in it
    left, right,
    kinds_batch, counts_batch,  # strides; 0 where all sequences are alike
    query_batch, query_head, query_token,  # and neighbours of the last dimension touch
    key_batch, key_head, key_token,
    value_batch, value_head, value_token,
    DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: its outputs and the logarithms of its sums."""
    if AGAIN:  # noqa: SIM102 - only then there are flags
        if is_done(flags):
            return
    tiles = tl.cdiv(tokens, BLOCK_Q)
    row = (tl.program_id(0) // tiles).to(tl.int64)  # one head of one sequence
    tile = tl.program_id(0) % tiles
    batch, head = row // heads, row % heads
    key += batch * key_batch + head // group * key_head
    value += batch * value_batch + head // group * value_head
    kinds += batch * kinds_batch
    listed = batch * counts_batch + tile
    dim = tl.arange(0, BLOCK_D)
    i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    kind_i = tl.load(kinds + i, mask=i < tokens, other=2)
    q = _load_tile(
        query + batch * query_batch + head * query_head, i, query_token, dim, kind_i, DIM
    )

    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    weighted = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    every = tl.load(counts + 2 * listed + 1)
    masked = every if AGAIN else tl.load(counts + 2 * listed)
    for visit in range(masked):
        j = tl.load(visits + listed * key_tiles + visit) * BLOCK_K + tl.arange(0, BLOCK_K)
        kind_j = tl.load(kinds + j, mask=j < tokens, other=2)
        k = _load_tile(key, j, key_token, dim, kind_j, DIM)
        v = _load_tile(value, j, value_token, dim, kind_j, DIM)
        seen = _visible_tile(
            i[:, None], j[None, :], kind_i[:, None], kind_j[None, :], left, right, CAUSAL
        )
        scores = scale * tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.where(seen, scores, float("-inf"))
        p, shrink, largest, total = _softmax_step(scores, largest, total)
        weighted = weighted * shrink[:, None]
        if AGAIN:
            weighted = sum_seen(weighted, p, seen, value, j, tokens, value_token, dim, DIM, BLOCK_K)
        else:
            weighted += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    for visit in range(masked, every):  # everything is visible: no masks
        j = tl.load(visits + listed * key_tiles + visit) * BLOCK_K + tl.arange(0, BLOCK_K)
        k = _load_full(key, j, key_token, dim, DIM, BLOCK_D)
        v = _load_full(value, j, value_token, dim, DIM, BLOCK_D)
        scores = scale * tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p, shrink, largest, total = _softmax_step(scores, largest, total)
        weighted = weighted * shrink[:, None]
        weighted += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)

    if not AGAIN:
        tell(flags, has_nan(weighted))
    blind = kind_i == 2  # every other token sees itself
    total = tl.where(blind, 1.0, total)
    result = tl.where(blind[:, None], 0.0, weighted / total[:, None])
    tl.store(
        out + (row * tokens + i[:, None]) * DIM + dim[None, :],
        result.to(out.dtype.element_ty),
        mask=(i < tokens)[:, None] & (dim < DIM)[None, :],
    )
    log = tl.where(blind, 0.0, largest + tl.log2(total))
    tl.store(log_sum + row * tokens + i, log, mask=i < tokens)


@jit
def _score_gradients(q, k, v, g, log, delta, scale, PRECISION: tl.constexpr):
    """Scores of a tile to the base 2 less the logarithm of their sum, and what multiplies P."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores = scores * (scale * 1.4426950408889634) - log[:, None]  # log2(e)
    return scores, tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None]


@jit
def _dot_gradients(ds, x, PRECISION: tl.constexpr):
    """Score gradients times keys or queries; in float16, with each row brought into its range."""
    if x.dtype == tl.float16:
        most = tl.max(tl.abs(ds), axis=1)
        most = tl.where(most > 1e-30, most, 1.0)[:, None]
        return tl.dot((ds / most).to(x.dtype), x, input_precision=PRECISION) * most
    return tl.dot(ds.to(x.dtype), x, input_precision=PRECISION)


@jit
def _queries_backward_kernel(
    flags,  # which programs are to run again
    query, key, value, kinds, counts, visits, out, log_sum,
    d_out, d_query,
    delta,  # (batch, heads, tokens) float32: kept for the other kernel
    heads, group, tokens, key_tiles,
    scale,  # without log2(e)
    left, right,
    kinds_batch, counts_batch,
    query_batch, query_head, query_token,
    key_batch, key_head, key_token,
    value_batch, value_head, value_token,
    DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: the gradient of its queries."""
    if AGAIN:  # noqa: SIM102 - only then there are flags
        if is_done(flags):
            return
    tiles = tl.cdiv(tokens, BLOCK_Q)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    batch, head = row // heads, row % heads
    key += batch * key_batch + head // group * key_head
    value += batch * value_batch + head // group * value_head
    kinds += batch * kinds_batch
    listed = batch * counts_batch + tile
    dim = tl.arange(0, BLOCK_D)
    i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    kind_i = tl.load(kinds + i, mask=i < tokens, other=2)
    q = _load_tile(
        query + batch * query_batch + head * query_head, i, query_token, dim, kind_i, DIM
    )
    g = _load_tile(d_out + row * tokens * DIM, i, DIM, dim, kind_i, DIM)
    o = _load_tile(out + row * tokens * DIM, i, DIM, dim, kind_i, DIM)
    log = tl.load(log_sum + row * tokens + i, mask=i < tokens, other=0.0)
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
    tl.store(delta + row * tokens + i, d, mask=i < tokens)

    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    every = tl.load(counts + 2 * listed + 1)
    masked = every if AGAIN else tl.load(counts + 2 * listed)
    for visit in range(masked):
        j = tl.load(visits + listed * key_tiles + visit) * BLOCK_K + tl.arange(0, BLOCK_K)
        kind_j = tl.load(kinds + j, mask=j < tokens, other=2)
        k = _load_tile(key, j, key_token, dim, kind_j, DIM)
        v = _load_tile(value, j, value_token, dim, kind_j, DIM)
        seen = _visible_tile(
            i[:, None], j[None, :], kind_i[:, None], kind_j[None, :], left, right, CAUSAL
        )
        scores, rest = _score_gradients(q, k, v, g, log, d, scale, PRECISION)
        p = tl.exp2(tl.where(seen, scores, float("-inf")))
        ds = tl.where(seen, p * rest, 0.0)
        if AGAIN:
            dq = sum_seen(dq, ds, seen, key, j, tokens, key_token, dim, DIM, BLOCK_K)
        else:
            dq += _dot_gradients(ds, k, PRECISION)
    for visit in range(masked, every):
        j = tl.load(visits + listed * key_tiles + visit) * BLOCK_K + tl.arange(0, BLOCK_K)
        k = _load_full(key, j, key_token, dim, DIM, BLOCK_D)
        v = _load_full(value, j, value_token, dim, DIM, BLOCK_D)
        scores, rest = _score_gradients(q, k, v, g, log, d, scale, PRECISION)
        dq += _dot_gradients(tl.exp2(scores) * rest, k, PRECISION)

    if not AGAIN:
        tell(flags, has_nan(dq))
    tl.store(
        d_query + (row * tokens + i[:, None]) * DIM + dim[None, :],
        (scale * dq).to(d_query.dtype.element_ty),
        mask=(i < tokens)[:, None] & (dim < DIM)[None, :],
    )


@jit
def _seen_by(q, k, v, g, log, delta, scale, PRECISION: tl.constexpr):
    """The same of a transposed tile: keys along the rows."""
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    scores = scores * (scale * 1.4426950408889634) - log[None, :]  # log2(e)
    return scores, tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :]


@jit
def _keys_backward_kernel(
    flags,  # which programs are to run again
    query, key, value, kinds,
    counts, visits,  # the schedule the other way round: for each tile of keys, tiles of queries
    log_sum, d_out, delta, d_key, d_value,
    key_heads, group, tokens, query_tiles, scale,
    left, right,
    kinds_batch, counts_batch,
    query_batch, query_head, query_token,
    key_batch, key_head, key_token,
    value_batch, value_head, value_token,
    DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key-value head: the gradients of its keys and values.

    Everything is transposed: keys lie along the rows, the queries that see them come by.
    """
    if AGAIN:  # noqa: SIM102 - only then there are flags
        if is_done(flags):
            return
    tiles = tl.cdiv(tokens, BLOCK_K)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    batch, head = row // key_heads, row % key_heads
    query += batch * query_batch
    kinds += batch * kinds_batch
    listed = batch * counts_batch + tile
    dim = tl.arange(0, BLOCK_D)
    j = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    kind_j = tl.load(kinds + j, mask=j < tokens, other=2)
    k = _load_tile(key + batch * key_batch + head * key_head, j, key_token, dim, kind_j, DIM)
    v = _load_tile(
        value + batch * value_batch + head * value_head, j, value_token, dim, kind_j, DIM
    )

    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    every = tl.load(counts + 2 * listed + 1)
    masked = every if AGAIN else tl.load(counts + 2 * listed)
    visits += listed * query_tiles
    for step in range(masked * group):  # every head of the group, through the same tiles
        q_head = head * group + step // masked
        q_row = row * group + step // masked
        i = tl.load(visits + step % masked) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        kind_i = tl.load(kinds + i, mask=i < tokens, other=2)
        queries, gradients = query + q_head * query_head, d_out + q_row * tokens * DIM
        q = _load_tile(queries, i, query_token, dim, kind_i, DIM)
        g = _load_tile(gradients, i, DIM, dim, kind_i, DIM)
        log = tl.load(log_sum + q_row * tokens + i, mask=i < tokens, other=0.0)
        d = tl.load(delta + q_row * tokens + i, mask=i < tokens, other=0.0)
        seen = _visible_tile(
            i[None, :], j[:, None], kind_i[None, :], kind_j[:, None], left, right, CAUSAL
        )
        scores, rest = _seen_by(q, k, v, g, log, d, scale, PRECISION)
        p = tl.exp2(tl.where(seen, scores, float("-inf")))
        ds = tl.where(seen, p * rest, 0.0)
        if AGAIN:
            dv = sum_seen(dv, p, seen, gradients, i, tokens, DIM, dim, DIM, BLOCK_Q)
            dk = sum_seen(dk, ds, seen, queries, i, tokens, query_token, dim, DIM, BLOCK_Q)
        else:
            dv += tl.dot(p.to(g.dtype), g, input_precision=PRECISION)
            dk += _dot_gradients(ds, q, PRECISION)
    full = every - masked
    for step in range(full * group):
        q_head = head * group + step // full
        q_row = row * group + step // full
        i = tl.load(visits + masked + step % full) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        q = _load_full(query + q_head * query_head, i, query_token, dim, DIM, BLOCK_D)
        g = _load_full(d_out + q_row * tokens * DIM, i, DIM, dim, DIM, BLOCK_D)
        log = tl.load(log_sum + q_row * tokens + i)
        d = tl.load(delta + q_row * tokens + i)
        scores, rest = _seen_by(q, k, v, g, log, d, scale, PRECISION)
        p = tl.exp2(scores)
        dv += tl.dot(p.to(g.dtype), g, input_precision=PRECISION)
        dk += _dot_gradients(p * rest, q, PRECISION)

    if not AGAIN:
        tell(flags, tl.maximum(has_nan(dk), has_nan(dv)))
    at = (row * tokens + j[:, None]) * DIM + dim[None, :]
    inside = (j < tokens)[:, None] & (dim < DIM)[None, :]
    tl.store(d_key + at, (scale * dk).to(d_key.dtype.element_ty), mask=inside)
    tl.store(d_value + at, dv.to(d_value.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------- the kernels, launched


TILES = {
    "rows": {128: (64, 64, 4), 256: (64, 32, 4)},
    "columns": {64: (64, 64, 4), 128: (32, 64, 4), 256: (32, 32, 4)},
}
"""Queries and keys of a tile in 16 bits, and its warps, up to a width of head: of the kernels that
hold queries, and of the one that holds keys and, with two sums, finds room for fewer of what comes
by."""
TILES_90 = TILES | {"columns": TILES["columns"] | {256: (32, 64, 8)}}
"""The same where four warps multiply together (wgmma): two groups of them halve the two sums of
heads of 256, which without it would not pay."""


def _settings(holds: str, dim: int, dtype: torch.dtype, causal: bool, arch: int) -> dict:
    """Constants of the kernels that hold "rows" or "columns" of the scores.

    As many a tile as shared memory and registers hold. In 16 bits four warps share 64 rows, for a
    tensor core of an H100 takes 64 at once: a second group of four would only halve the columns,
    and both would compute the masks. In float32 nothing uses those, and more warps have more
    registers.
    """
    block_d = max(16, next_power_of_2(dim))  # 16 is the least that a tensor core takes
    if dtype == torch.float32:
        rows = min(64, max(16, 4096 // block_d))
        tile, warps = (rows, rows), 8 if block_d >= 128 else 4
    else:
        tiles = (TILES_90 if arch >= 90 else TILES)[holds]
        *tile, warps = next(one for width, one in tiles.items() if block_d <= width)
    return dict(
        DIM=dim,
        BLOCK_D=block_d,
        BLOCK_Q=tile[0],
        BLOCK_K=tile[1],
        CAUSAL=causal,
        PRECISION=precision(dtype),
        num_warps=warps,
        num_stages=2,
    )


NUMBERS = ("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages")


def _forward_settings(q: Tensor, causal: bool) -> dict:
    """Constants of the forward kernel: those by sizes, or the tile that was measured."""
    dim, tokens = q.shape[3], q.shape[2]
    settings = _settings("rows", dim, q.dtype, causal, arch_of(q.device))
    key = partial(key_of, q.dtype, dim=dim, tokens=tokens)
    default = tuple(settings[name] for name in NUMBERS)
    numbers = _tuning.chosen("local_attention", key, q.device, default)
    return settings | dict(zip(NUMBERS, numbers))


def _rows(x: Tensor) -> Tensor:
    """The tensor itself if neighbours of its last dimension touch in memory, or else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _LocalAttention(torch.autograd.Function):
    """The three kernels."""

    @staticmethod
    def forward(ctx, q, k, v, kinds, masks, left, right, scale, settings):
        q, k, v = _rows(q), _rows(k), _rows(v)
        batch, heads, tokens, _ = q.shape
        blocks = settings["BLOCK_Q"], settings["BLOCK_K"]
        visits = visits_of(kinds, masks, left, right, settings["CAUSAL"], blocks)
        out = empty(q.shape, q.dtype, q.device)
        log_sum = empty((batch, heads, tokens), torch.float32, q.device)
        ctx.scale, ctx.settings = scale, settings
        ctx.window = left, right, 0 if len(kinds) == 1 else tokens
        ctx.strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
        launch_again(
            _forward_kernel,
            (visits.held * batch * heads,),
            *(q, k, v, kinds, visits.counts, visits.tiles, out, log_sum),
            *(heads, heads // k.shape[1], tokens, visits.passing, scale * LOG2_E, *ctx.window),
            *(visits.batch_stride, *ctx.strides),
            **settings,
        )
        ctx.save_for_backward(q, k, v, kinds, out, log_sum)
        ctx.visits, ctx.masks = visits, masks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, kinds, out, log_sum = ctx.saved_tensors
        batch, heads, tokens, _ = q.shape
        key_heads, group = k.shape[1], heads // k.shape[1]
        d_out = d_out.contiguous()
        dq, dk, dv = (empty(x.shape, x.dtype, x.device) for x in (q, k, v))
        delta = empty(log_sum.shape, torch.float32, q.device)
        # Backward more is held beside the scores, so that a tile chosen for forward need not fit.
        how = q.shape[3], q.dtype, ctx.settings["CAUSAL"], arch_of(q.device)
        window, visits = (*ctx.window[:2], ctx.settings["CAUSAL"]), ctx.visits
        settings = _settings("rows", *how)
        blocks = settings["BLOCK_Q"], settings["BLOCK_K"]
        if blocks != (ctx.settings["BLOCK_Q"], ctx.settings["BLOCK_K"]):
            visits = visits_of(kinds, ctx.masks, *window, blocks)
        launch_again(
            _queries_backward_kernel,
            (visits.held * batch * heads,),
            *(q, k, v, kinds, visits.counts, visits.tiles, out, log_sum, d_out, dq, delta),
            *(heads, group, tokens, visits.passing, ctx.scale, *ctx.window),
            *(visits.batch_stride, *ctx.strides),
            **settings,
        )
        settings = _settings("columns", *how)
        blocks = settings["BLOCK_Q"], settings["BLOCK_K"]
        visits = visits_of(kinds, ctx.masks, *window, blocks, by_keys=True)
        launch_again(
            _keys_backward_kernel,
            (visits.held * batch * key_heads,),
            *(q, k, v, kinds, visits.counts, visits.tiles, log_sum, d_out, delta, dk, dv),
            *(key_heads, group, tokens, visits.passing, ctx.scale, *ctx.window),
            *(visits.batch_stride, *ctx.strides),
            **settings,
        )
        return dq, dk, dv, None, None, None, None, None, None


# ---------------------------------------------------------------- the one to call


def _check_mask(name: str, mask: Tensor | None, q: Tensor, shown: str) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} is of {short(mask.dtype)}; it must be bool, True at such tokens.")
    batch, _, tokens, _ = q.shape
    check_shape(name, mask, (tokens,) if mask.ndim == 1 else (batch, tokens), shown)


def local_attention(
    q: Float[Tensor, "batch query_heads time dim"],
    k: Float[Tensor, "batch key_heads time dim"],
    v: Float[Tensor, "batch key_heads time dim"],
    *,
    window: int,
    causal: bool = False,
    global_tokens: Bool[Tensor, " time"] | Bool[Tensor, "batch time"] | None = None,
    padding: Bool[Tensor, " time"] | Bool[Tensor, "batch time"] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Float[Tensor, "batch query_heads time dim"]:
    r"""Softmax attention over a sliding window and global tokens.

    Longformer projects global tokens by separate weights. Then the results here are those of
    the other tokens, and the few global rows are computed apart and put in their place.

    Args:
        q: Queries.
        k: Keys. Grouped-query models have fewer key-value heads: a divisor of the query heads.
        v: Values.
        window: The width $w$, as large as you like. Causal: a token sees itself and the $w - 1$
            before it. Otherwise $w$ is even, and a token sees $w / 2$ to either side and itself.
        causal: Whether no token sees a later one, global tokens included.
        global_tokens: True at tokens that attend to all and are attended by all.
        padding: True at padding: no token attends to it, whatever it holds, and their
            outputs are 0.
        scale: The factor on $q \cdot k$; $1/\sqrt{d}$ by default.
        backend: "triton", "torch", or None for the kernels where they can run.

    Returns:
        The outputs, with gradients. A row that sees nothing is 0, and so are its gradients; what
        a row does not see has no part in it, not even as an infinite number.

    Raises:
        ValueError: Shapes that do not fit each other, a window that is not positive (not even,
            where it has two sides), an unknown backend.
        TypeError: Numbers that are not floating-point or of different types, masks that are not
            boolean, a window that is no whole number, or a scale that is no number.
    """
    check_floats(q=q, k=k, v=v)
    scale = None if scale is None else check_number("scale", scale)
    types = {short(x.dtype) for x in (q, k, v)}
    if len(types) > 1:
        raise TypeError(f"q, k and v are of {', '.join(sorted(types))}; they must agree.")
    if q.ndim != 4 or not q.shape[1] or not q.shape[3]:
        raise ValueError(
            f"q has shape {tuple(q.shape)}; it must be (batch, heads, time, dim), heads and dim "
            "not 0."
        )
    batch, heads, tokens, dim = q.shape
    shown = f"q of shape {tuple(q.shape)}"
    key_heads = k.shape[1] if k.ndim == 4 else heads
    check_shape("k", k, (batch, key_heads, tokens, dim), shown)
    check_shape("v", v, tuple(k.shape), f"k of shape {tuple(k.shape)}")
    if not key_heads or heads % key_heads:
        raise ValueError(f"{heads} query heads cannot share {key_heads} key-value heads evenly.")
    left, right = reach_of(window, causal, tokens)
    _check_mask("global_tokens", global_tokens, q, shown)
    _check_mask("padding", padding, q, shown)
    obstacle = f"heads of {dim} are too wide for its tiles; 256 is the most." if dim > 256 else ""
    masks = global_tokens, padding
    if choose(backend, q, k, v, *masks, obstacle=obstacle) == "torch":
        options = dict(window=window, causal=causal, scale=scale)
        return local_attention_tiled(
            q, k, v, global_tokens=global_tokens, padding=padding, **options
        )
    scale = dim**-0.5 if scale is None else scale
    settings = _forward_settings(q, causal)
    kinds = kinds_of(tokens, q.device, *masks)
    return _LocalAttention.apply(q, k, v, kinds, Masks(*masks), left, right, scale, settings)


# ---------------------------------------------------------------- for the compiler and the clock


def compile_cases() -> list[CompileCase]:
    """The three kernels in every type, and for heads of every width of tile."""
    found = []
    strides = {f"{x}_{axis}": 128 for x in ("query", "key", "value") for axis in ("batch", "head")}
    strides |= {f"{x}_token": 4096 for x in ("query", "key", "value")}
    uses = [(128, True, "fp32"), (64, True, "fp16"), (128, False, "bf16"), (256, True, "bf16")]
    for dim, causal, kind in uses:
        types = dict.fromkeys(("query", "key", "value", "out", "d_out"), f"*{kind}")
        types |= dict.fromkeys(("d_query", "d_key", "d_value"), f"*{kind}")
        types |= dict.fromkeys(("log_sum", "delta"), "*fp32")
        types |= dict.fromkeys(("flags", "kinds"), "*i8")
        types |= {"counts": "*i32", "visits": "*i32", "scale": "fp32"}
        numbers = "heads key_heads group tokens key_tiles query_tiles left right"
        types |= dict.fromkeys(numbers.split(), "i32")
        types |= {"kinds_batch": "i32", "counts_batch": "i32"}
        for name, kernel in (
            ("forward", _forward_kernel),
            ("queries backward", _queries_backward_kernel),
            ("keys backward", _keys_backward_kernel),
        ):
            holds = "columns" if kernel is _keys_backward_kernel else "rows"
            of_archs: dict[tuple, list[int]] = {}  # equal settings are one case
            for arch in LIMITS:
                of_arch = _settings(holds, dim, KINDS[kind], causal, arch)
                of_archs.setdefault(tuple(of_arch.items()), []).append(arch)
            for items, archs in of_archs.items():
                settings = dict(items)
                warps, stages = settings.pop("num_warps"), settings.pop("num_stages")
                tile, size = (settings["BLOCK_Q"], settings["BLOCK_K"]), KINDS[kind].itemsize
                for again in (False, True) if dim == 64 else (False,):
                    case = CompileCase(
                        f"local_attention: {name} {kind} {dim}" + again * " again", kernel, types,
                        strides | settings | {"AGAIN": again},
                        mma=kind != "fp32", warps=warps, stages=stages,
                        work=_work(name, dim, causal, tile, size), archs=tuple(archs),
                    )  # fmt: skip
                    found.append(case)
    return found


def _work(name: str, dim: int, causal: bool, tile: tuple[int, int], size: int) -> Work:
    """A text of 16,384 tokens, 32 heads of queries and 8 of keys, a window of 1,024."""
    tokens, heads, key_heads, window = 16384, 32, 8, 1024
    seen = window * (1 if causal else 2)
    # Products of a tile: two forward; for the queries' gradient three, for the others' four.
    products = {"forward": 2, "queries backward": 3, "keys backward": 4}[name]
    by_keys = name == "keys backward"
    held, passing = reversed(tile) if by_keys else tile
    moved = {"forward": 2, "queries backward": 3, "keys backward": 2}[name] * heads
    moved += {"forward": 2, "queries backward": 2, "keys backward": 4}[name] * key_heads
    # Away from the ends: a held tile meets `seen + held` neighbors, in tiles that begin anywhere;
    # all see the same `seen - held` of them.
    group = heads // key_heads if by_keys else 1
    full = max(0, (seen - held) // passing)
    masked = (seen + held) // passing - full
    return Work(
        what=f"{tokens} tokens, {heads} heads of {dim}, window {window}",
        item="tile",
        items=1,
        turns=full * group,
        other_turns=masked * group,
        programs=tokens // held * (key_heads if by_keys else heads),
        fetched=2 * passing * dim * size,
        bytes=moved * tokens * dim * size,
        flops=2 * products * heads * tokens * seen * dim,
    )


CANDIDATES = (
    Candidate((64, 64, 4, 2), "64 queries are what four warps multiply at once on an H100"),
    Candidate((64, 64, 4, 3), "one more tile of keys and values under way: 32 KiB at 128 channels"),
    Candidate((64, 32, 4, 3), "half the scores: registers for a third program, shorter waits"),
    Candidate(
        (128, 64, 8, 2), "keys serve twice the queries: half of the traffic, one program less"
    ),
    Candidate((128, 32, 8, 3), "the same with half the scores in a thread"),
)
"""Queries and keys of a tile, warps, and stages, of the forward kernel in 16 bits."""


def tune_cases(*, small: bool = False) -> list[TuneCase]:
    """A long text in heads of 128, and a batch in heads of 64; causal windows."""
    shapes = [(1, 32, 8, 16384, 128, 1024), (4, 12, 12, 4096, 64, 512)]
    shapes = [(1, 2, 1, 90, 16, 40)] if small else shapes
    return [_tune_case(*s, small=small) for s in shapes]


def _tune_case(batch, heads, key_heads, tokens, dim, window, *, small: bool) -> TuneCase:
    dtype = torch.float16 if small else torch.bfloat16

    def make(device: torch.device, numbers: Numbers) -> Callable[[], Tensor]:
        shapes = [(batch, h, tokens, dim) for h in (heads, key_heads, key_heads)]
        q, k, v = drawn(device, dtype, *shapes)
        options = dict(window=window, causal=True, backend="triton")
        return cut("local_attention", numbers, lambda: local_attention(q, k, v, **options))

    settings = _settings("rows", dim, dtype, True, min(LIMITS))  # the same on all, in 16 bits
    default = tuple(settings[name] for name in NUMBERS)
    key = key_of(dtype, dim=dim, tokens=tokens)
    return TuneCase("local_attention", key, default, CANDIDATES, make)


def bench_cases(*, small: bool = False) -> list[BenchCase]:
    """A long text and a batch seen by causal windows; Longformer's base with one global token."""
    if small:
        shapes = [(1, 2, 1, 64, 16, 16, True, 0), (1, 2, 2, 64, 16, 16, False, 1)]
    else:
        shapes = [(1, 32, 8, 16384, 128, 1024, True, 0), (16, 32, 8, 2048, 128, 512, True, 0)]
        shapes += [(4, 12, 12, 4096, 64, 512, False, 1)]
    return [_bench_case(*s, backward=backward) for s in shapes for backward in (False, True)]


def _bench_case(
    batch, heads, key_heads, tokens, dim, window, causal, global_count, *, backward: bool
) -> BenchCase:
    def is_global(device: torch.device | str) -> Tensor:
        return torch.arange(tokens, device=device) < global_count

    options = dict(window=window, causal=causal)
    pairs = int(count_pairs(tokens, **options, global_tokens=is_global("cpu")).sum())
    flops = batch * heads * pairs * dim * (4 + 10 * backward)  # 5 products backward, at the least
    size = 2 * batch * tokens * dim * 2 * (heads + key_heads) * (3 if backward else 1)
    shape = f"B={batch} H={heads}/{key_heads} T={tokens} D={dim} w={window} g={global_count}"
    shape += " causal" * causal + " with backward" * backward

    def make(device: torch.device) -> dict[str, Runner]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q, d_out = (torch.randn(batch, heads, tokens, dim, device=device) for _ in range(2))
        k, v = (torch.randn(batch, key_heads, tokens, dim, device=device) for _ in range(2))
        q, k, v, d_out = (x.bfloat16() for x in (q, k, v, d_out))
        inputs = [x.requires_grad_(backward) for x in (q, k, v)]
        chosen = is_global(device) if global_count else None
        left, right = reach_of(window, causal, tokens)

        def mask(_batch, _head, i, j):
            near = (j >= i - left) & (j <= i + right)
            far = (i < global_count) | (j < global_count)
            return near | (far & (j <= i) if causal else far)

        def timed(function: Callable[[], Tensor]) -> Runner:
            return (
                (lambda: torch.autograd.grad(function(), inputs, d_out)) if backward else function
            )

        blocks = create_block_mask(mask, None, None, tokens, tokens, device=str(device))
        flex = torch.compile(flex_attention) if device.type == "cuda" else flex_attention
        dense = visible_pairs(tokens, **options, global_tokens=chosen, device=device)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        on_cpu = "Eager FlexAttention has no gradient on the CPU." if backward else ""

        def exactly():
            wide = [x.detach().double().requires_grad_(backward) for x in inputs]
            out = local_attention_tiled(*wide, global_tokens=chosen, **options)
            return torch.autograd.grad(out, wide, d_out.double()) if backward else out

        how = options | {"backend": pinned(device)}
        return {
            EXACT: exactly,
            "ours": timed(lambda: local_attention(*inputs, global_tokens=chosen, **how)),
            "torch, tile by tile": timed(
                lambda: local_attention_tiled(*inputs, global_tokens=chosen, **options)
            ),
            "FlexAttention": (device.type != "cuda" and on_cpu)
            or timed(lambda: flex(*inputs, block_mask=blocks, enable_gqa=True)),
            "SDPA, masked": timed(lambda: sdpa(*inputs, attn_mask=dense, enable_gqa=True)),
        }

    return BenchCase("local_attention", shape, torch.bfloat16, size, flops, make)
