r"""Retention: attention without a softmax, so that the past fits into one matrix per head.

A retention head keeps a state $S \in \mathbb R^{d_k \times d_v}$ that forgets at the rate
$\gamma$ and takes in one outer product per token (Sun et al., 2023, arXiv 2307.08621). With
$s = 1/\sqrt{d_k}$:

$$S_n = \gamma\, S_{n-1} + k_n^\top v_n, \qquad o_n = s\, q_n S_n. \tag{recurrent}$$

Unrolled, this is attention with weights $\gamma^{n-m}$ instead of a softmax:

$$O = s\,(Q K^\top \odot D)\, V, \qquad D_{nm} = \gamma^{n-m} \text{ for } n \ge m, \text{ else } 0.
  \tag{parallel}$$

The first form costs little per token but takes the tokens one by one; the second takes all at once
and costs $T^2$. **Chunkwise** is both: parallel within chunks of $C$ tokens, recurrent from chunk
to chunk. Token $i$ of a chunk that is $L$ tokens long ($L < C$ for the last one) sees

$$O_i = s\,\big[(QK^\top \odot D)V\big]_i + s\,\gamma^{i+1} q_i S, \qquad
  S \leftarrow \gamma^{L} S + \sum_i \gamma^{L-1-i} k_i^\top v_i. \tag{chunkwise}$$

The paper gives head $h$ the decay $\gamma_h = 1 - 2^{-5-h}$ (`retention_decay`): the first head
remembers about 32 tokens, each next one twice as many. Group norm, gate and the rotation of queries
and keys belong to the layer around this function.

**Two kernels.** One walks over the chunks and writes the state before each of them. The other
computes the outputs of a chunk: scores once, then some of the value's dimensions after the other. A
token that a query does not see has no part in its output, not even as an infinite number: see
`_masked` for the second launch that this takes, of programs that read a byte and end.

**The gradient of retention is three retentions**, and so it needs no further kernels. From the
unrolled sum, with $g_n$ the gradient of $o_n$:

$$\nabla q_n = s \sum_{m \le n} \gamma^{n-m} (g_n \cdot v_m)\, k_m, \quad
  \nabla k_m = s \sum_{n \ge m} \gamma^{n-m} (v_m \cdot g_n)\, q_n, \quad
  \nabla v_m = s \sum_{n \ge m} \gamma^{n-m} (k_m \cdot q_n)\, g_n.$$

The first is the retention of $(g, v, k)$, whose states are those of the forward pass, transposed:
they are kept and read again. The other two, of $(v, g, q)$ and $(k, q, g)$ with time running
backwards, have one set of states between them, likewise transposed for the first. The state that
arrives at the start is the gradient of the initial state.

**Numbers.** States add up over a whole text, so a program holds its state in float32, and the
weighted keys of an added chunk with all their digits: bfloat16 holds eight, so three such products
make one. What is stored for the outputs is rounded to bfloat16 once, at most by $2^{-8}$ of each
number, as the outputs are. Bfloat16 inputs are multiplied in bfloat16 on the tensor cores, sums
being float32. What is between the products of float16 may be beyond its range and needs three
digits more: states are float32, and products TF32. Float32 keeps float32 states and products.

**Bytes and operations** of one head, for $T$ tokens of $b$ bytes a number. Queries, keys, values
and outputs must move once: $2 T (d_k + d_v)\, b$ bytes. Stored states add a second read of keys and
values, $T (d_k + d_v)\, b$, and are written and read: $2 b\, d_k d_v\, T / C$.
Operations are $2 T C (d_k + d_v)$ within chunks and $8\, T d_k d_v$ through states. At
$d_k = d_v = 128$, $C = 128$ and 16 bits, that makes 196,608 operations on 2,048 bytes per token, 96
per byte, where GPUs with tensor cores can do 150 to 300. So memory is the bound, $t \ge T b\,
[3 (d_k + d_v) + 2 d_k d_v / C] / B$ at $B$ bytes per second. Backward, states of the future and
three outputs take $T b\, [7 (d_k + d_v) + 4 d_k d_v / C]$. `bytes_moved` counts what programs ask
for; wider heads, and few of them, read something twice.

The **step** of decoding reads and writes the state, $8\, d_k d_v$ bytes per head, for
$5\, d_k d_v$ operations, however long the past is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from effnb.kernels._launch import (
    LIMITS,
    arch_of,
    cdiv,
    check_floats,
    check_number,
    check_shape,
    check_whole,
    choose,
    empty,
    exact,
    jit,
    launch,
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
from effnb.kernels._tuning import Candidate, Numbers, TuneCase, chosen, key_of
from effnb.kernels.bench import EXACT, OTHER, BenchCase, Runner, absent, pinned
from effnb.kernels.compile import KINDS, CompileCase
from effnb.kernels.report import Work

CHUNK_SIZES = (16, 32, 64, 128)
WIDEST = 2**16  # keys of a step, which a program holds at once


def _chunk_size(dtype: torch.dtype) -> int:
    """The default: with tensor cores the larger square of scores costs less than more states."""
    return 128 if dtype in (torch.float16, torch.bfloat16) else 64


def retention_decay(heads: int) -> Tensor:
    r"""$\gamma_h = 1 - 2^{-5-h}$ for heads $h = 0, 1, \dots$: memories of 32, 64, 128, … tokens."""
    return 1 - torch.exp2(-5 - torch.arange(heads, dtype=torch.float64)).to(torch.float32)


# ---------------------------------------------------------------- the three forms, in PyTorch


def _prepare(q, k, v, gamma, scale, state):
    """Inputs in the precision of the arithmetic: float64 stays, all else becomes float32."""
    kind = exact(q)
    batch, heads, tokens, dim_k = q.shape
    if state is None:
        state = q.new_zeros(batch, heads, dim_k, v.shape[-1], dtype=kind)
    state = state.to(kind)
    if not tokens:  # the last state is a tensor apart from the caller's first one
        state = state.clone()
    scale = dim_k**-0.5 if scale is None else scale
    # Powers of gamma are 2^(n log2 gamma): gamma^-n alone would overflow, and D needs only n >= 0.
    log2_gamma = gamma.log2().to(kind)[:, None]
    return q.to(kind), k.to(kind), v.to(kind), log2_gamma, scale, state


def _one_chunk(q, k, v, log2_gamma, scale, state):
    """Outputs of one chunk, and the state after it."""
    length = q.shape[2]
    index = torch.arange(length, device=q.device)
    distance = index[:, None] - index
    past = distance >= 0
    decay = torch.exp2(log2_gamma[..., None] * distance.clamp(min=0)) * past
    within = visible_sum(visible_products(q, k, past) * decay, v, past)
    from_state = torch.exp2(log2_gamma * (index + 1))[..., None] * (q @ state)
    to_state = torch.exp2(log2_gamma * (length - 1 - index))[..., None] * k
    state = torch.exp2(log2_gamma * length)[..., None] * state + to_state.mT @ v
    return scale * (within + from_state), state


def retention_parallel(q, k, v, gamma, *, scale=None, initial_state=None):
    """All tokens at once; arguments and results are those of `retention`."""
    *inputs, state = _prepare(q, k, v, gamma, scale, initial_state)
    out, state = _one_chunk(*inputs, state)
    return out.to(v.dtype), state


def retention_chunkwise(q, k, v, gamma, *, scale=None, initial_state=None, chunk_size=64):
    """Chunk after chunk, the last one as short as it is; the results do not depend on the size."""
    *inputs, state = _prepare(q, k, v, gamma, scale, initial_state)
    queries, keys, values, log2_gamma, scale = inputs
    chunk_size, outputs = check_whole("chunk_size", chunk_size), [values[:, :, :0]]
    # Split at once: the gradient of a slice would be as long as the text, and that for every chunk.
    chunks = zip(*(x.split(chunk_size, dim=2) for x in (queries, keys, values)), strict=True)
    for chunk in chunks:  # of no tokens, one chunk of none
        out, state = _one_chunk(*chunk, log2_gamma, scale, state)
        outputs.append(out)
    return torch.cat(outputs, dim=2).to(v.dtype), state


def retention_recurrent(q, k, v, gamma, *, scale=None, initial_state=None):
    """Token after token, as when text is generated."""
    *_, state = _prepare(q, k, v, gamma, scale, initial_state)
    outputs = [v[:, :, :0]]
    for n in range(q.shape[2]):
        out, state = retention_step_reference(
            q[:, :, n], k[:, :, n], v[:, :, n], gamma, state, scale=scale
        )
        outputs.append(out[:, :, None])
    return torch.cat(outputs, dim=2), state


def retention_step_reference(q, k, v, gamma, state, *, scale=None):
    """One token: forget, take in the new outer product, and only then read."""
    q, k, v = q[:, :, None], k[:, :, None], v[:, :, None]
    queries, keys, values, log2_gamma, scale, state = _prepare(q, k, v, gamma, scale, state)
    state = torch.exp2(log2_gamma)[..., None] * state + keys.mT @ values
    return (scale * queries @ state)[:, :, 0].to(v.dtype), state


# ---------------------------------------------------------------- the kernels


@jit
def _product(a, b, total, PRECISION: tl.constexpr):
    """Add a b to total: in the type of b where that is narrow, else in float32 or its stand-in."""
    if PRECISION == "narrow":
        total = tl.dot(a.to(b.dtype), b, total)
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    return total


@jit
def _states_kernel(
    key, value, log2_gamma,
    initial,  # (rows, DIM_K, DIM_V) float32; a row is one head of one sequence
    states,  # (rows, chunks, DIM_K, DIM_V): before each chunk (after it, in REVERSE)
    final,  # (rows, DIM_K, DIM_V) float32
    heads, tokens, scale,
    key_batch, key_head, key_token,  # strides; neighbours of the last dimension touch
    value_batch, value_head, value_token,
    DIM_K: tl.constexpr, DIM_V: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the states of one head: walk over BLOCK_T tokens at a time, storing by chunks."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    chunks, blocks = tl.cdiv(tokens, CHUNK), tl.cdiv(tokens, BLOCK_T)
    each: tl.constexpr = CHUNK // BLOCK_T
    index = tl.arange(0, BLOCK_T)
    dim_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    dim_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = dim_k < DIM_K, dim_v < DIM_V
    tile = dim_k.to(tl.int64)[:, None] * DIM_V + dim_v[None, :]
    in_tile = in_k[:, None] & in_v[None, :]
    decay = tl.load(log2_gamma + head)
    state = tl.load(initial + row * DIM_K * DIM_V + tile, mask=in_tile, other=0.0)
    for step in range(blocks):
        block = blocks - 1 - step if REVERSE else step
        first = (block == blocks - 1) | (block % each == each - 1) if REVERSE else block % each == 0
        if first:  # of its chunk
            kept = state.to(states.dtype.element_ty)
            at = states + (row * chunks + block // each) * DIM_K * DIM_V + tile
            tl.store(at, kept, mask=in_tile)
        length = tl.minimum(tokens - block * BLOCK_T, BLOCK_T)
        present = index < length
        token = (block * BLOCK_T + index).to(tl.int64)
        k = tl.load(
            key + token[:, None] * key_token + dim_k[None, :],
            mask=present[:, None] & in_k[None, :],
            other=0.0,
        )
        v = tl.load(
            value + token[:, None] * value_token + dim_v[None, :],
            mask=present[:, None] & in_v[None, :],
            other=0.0,
        )
        # How often each token still decays before the block is left: at its end, or, backwards in
        # time, at its start, where the step into the first token counts too.
        left = index + 1 if REVERSE else tl.maximum(length - 1 - index, 0)
        weight = tl.exp2(decay * left.to(tl.float32))
        if REVERSE:  # then the keys are the queries of the forward pass, which carry the scale
            weight *= scale
        rest = tl.trans(k).to(tl.float32) * weight[None, :]
        state *= tl.exp2(decay * length.to(tl.float32))
        if PRECISION == "narrow":
            # A weighted key has float32's 24 digits; three numbers of 8 hold them, one after the
            # other, and the values are what they are.
            for _ in tl.static_range(3):
                part = rest.to(v.dtype)
                state = tl.dot(part, v, state)
                rest -= part.to(tl.float32)
        else:  # "tf32x3" multiplies the digits too that TF32 leaves out
            wide: tl.constexpr = "tf32x3" if PRECISION == "tf32" else "ieee"
            state = tl.dot(rest, v.to(tl.float32), state, input_precision=wide)
    tl.store(final + row * DIM_K * DIM_V + tile, state, mask=in_tile)


@jit
def _rows_of_chunk(start, token, stride, dim, present, DIM: tl.constexpr):
    """Some dimensions of a chunk's tokens, 0 beyond both."""
    at = start + token[:, None] * stride + dim[None, :]
    return tl.load(at, mask=present[:, None] & (dim < DIM)[None, :], other=0.0)


@jit
def _outputs_kernel(
    flags,  # which programs are to run again
    query, key, value, log2_gamma,
    states,  # what _states_kernel stored, (rows, chunks, DIM_K, DIM_V), or TURNED the other way
    out,  # (rows, tokens, DIM_V)
    heads, tokens, scale,
    query_batch, query_head, query_token,
    key_batch, key_head, key_token,
    value_batch, value_head, value_token,
    DIM_K: tl.constexpr, DIM_V: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    REVERSE: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk of one head; scores once, then BLOCK_V of its dimensions a turn."""
    if AGAIN:  # noqa: SIM102 - only then there are flags
        if is_done(flags):
            return
    WHOLE: tl.constexpr = DIM_K <= BLOCK_K  # then queries are read once, and stay
    STATE_K: tl.constexpr = 1 if TURNED else DIM_V
    STATE_V: tl.constexpr = DIM_K if TURNED else 1
    chunks = tl.cdiv(tokens, CHUNK)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    batch, head = row // heads, row % heads
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    states += (row * chunks + chunk) * DIM_K * DIM_V
    out += row * tokens * DIM_V
    length = tl.minimum(tokens - chunk * CHUNK, CHUNK)
    index = tl.arange(0, CHUNK)
    present = index < length
    token = (chunk * CHUNK + index).to(tl.int64)

    dim_k = tl.arange(0, BLOCK_K)
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    if WHOLE:
        q = _rows_of_chunk(query, token, query_token, dim_k, present, DIM_K)
        k = _rows_of_chunk(key, token, key_token, dim_k, present, DIM_K)
        scores = _product(q, tl.trans(k), scores, PRECISION)
    else:
        for start in range(0, DIM_K, BLOCK_K):
            part = _rows_of_chunk(query, token, query_token, start + dim_k, present, DIM_K)
            k = _rows_of_chunk(key, token, key_token, start + dim_k, present, DIM_K)
            scores = _product(part, tl.trans(k), scores, PRECISION)

    # D, by the number of tokens between a query and a key that it may see.
    decay = tl.load(log2_gamma + head)
    distance = index[:, None] - index[None, :]
    if REVERSE:
        distance = -distance
    D = scale * tl.exp2(decay * tl.maximum(distance, 0).to(tl.float32))
    seen = (distance >= 0) & present[None, :]
    scores = tl.where(seen, scores * D, 0.0)
    # How often the state has decayed when a token reads it; backwards, the state already is a
    # gradient at the chunk's last token, and holds the scale.
    since = tl.maximum(length - 1 - index, 0) if REVERSE else index + 1
    reads = tl.exp2(decay * since.to(tl.float32))
    if not REVERSE:
        reads *= scale

    spoiled = 0
    for first in range(0, DIM_V, BLOCK_V):
        dim_v = first + tl.arange(0, BLOCK_V)
        in_v = dim_v < DIM_V
        result = tl.zeros((CHUNK, BLOCK_V), tl.float32)
        at = states + dim_k.to(tl.int64)[:, None] * STATE_K + dim_v.to(tl.int64)[None, :] * STATE_V
        if WHOLE:
            state = tl.load(at, mask=(dim_k < DIM_K)[:, None] & in_v[None, :], other=0.0)
            result = _product(q, state, result, PRECISION)
        else:
            for start in range(0, DIM_K, BLOCK_K):
                part = _rows_of_chunk(query, token, query_token, start + dim_k, present, DIM_K)
                inside = (dim_k < DIM_K - start)[:, None] & in_v[None, :]
                state = tl.load(at + start * STATE_K, mask=inside, other=0.0)
                result = _product(part, state, result, PRECISION)
        result *= reads[:, None]
        if AGAIN:
            result = sum_seen(
                result, scores, seen, value, token, tokens, value_token, dim_v, DIM_V, CHUNK
            )
        else:
            v = _rows_of_chunk(value, token, value_token, dim_v, present, DIM_V)
            result = _product(scores, v, result, PRECISION)
            spoiled = tl.maximum(spoiled, has_nan(result))
        tl.store(
            out + token[:, None] * DIM_V + dim_v[None, :],
            result.to(out.dtype.element_ty),
            mask=present[:, None] & in_v[None, :],
        )
    if not AGAIN:
        tell(flags, spoiled)


@jit
def _step_kernel(
    query, key, value, log2_gamma,
    state, new_state,  # (rows, DIM_K, DIM_V) float32
    out,  # (rows, DIM_V)
    heads, scale,
    query_batch, query_head, key_batch, key_head, value_batch, value_head,
    DIM_K: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_K: tl.constexpr,  # all of DIM_K
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One token of one head, for BLOCK_V of the value's dimensions."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    dim_k = tl.arange(0, BLOCK_K)
    dim_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = dim_k < DIM_K, dim_v < DIM_V
    q_row = query + batch * query_batch + head * query_head
    k_row = key + batch * key_batch + head * key_head
    v_row = value + batch * value_batch + head * value_head
    q = tl.load(q_row + dim_k, mask=in_k, other=0.0).to(tl.float32)
    k = tl.load(k_row + dim_k, mask=in_k, other=0.0).to(tl.float32)
    v = tl.load(v_row + dim_v, mask=in_v, other=0.0).to(tl.float32)
    gamma = tl.exp2(tl.load(log2_gamma + head))
    tile = row * DIM_K * DIM_V + dim_k.to(tl.int64)[:, None] * DIM_V + dim_v[None, :]
    in_tile = in_k[:, None] & in_v[None, :]
    new = gamma * tl.load(state + tile, mask=in_tile, other=0.0) + k[:, None] * v[None, :]
    new = tl.where(in_k[:, None], new, 0.0)  # beyond the keys, an infinite value times 0
    tl.store(new_state + tile, new, mask=in_tile)
    result = scale * tl.sum(q[:, None] * new, axis=0)
    tl.store(out + row * DIM_V + dim_v, result.to(out.dtype.element_ty), mask=in_v)


# ---------------------------------------------------------------- the kernels, launched


FEW_ROWS = 64
"""Below so many heads of all sequences a program takes a quarter of a state, so that there are four
times as many: each reads half of the keys and values, which the others find in the cache."""
BLOCKS = {
    # 128 x 128 numbers of a state are 64 registers of each of 256 threads, as many as a score
    # matrix of 128 x 128: keys and values are read once. Values come by 64 dimensions, so that two
    # stages of them and of the state, 64 KiB, leave room for the queries on an A100.
    "narrow": {"states": (128, 128), "outputs": (128, 64)},
    # Twice the bytes a number, and in the states twice the registers for the rest of their digits.
    "tf32": {"states": (64, 128), "outputs": (128, 32)},
    # Without tensor cores a thread holds two operands of every sum in registers.
    "exact": {"states": (32, 32), "outputs": (64, 32)},
}
"""Dimensions of keys and of values that a program takes at once, by how it multiplies."""


def _precision(dtype: torch.dtype) -> str:
    """How the kernels multiply inputs of a type.

    Bfloat16 has the range of float32, so that everything is multiplied in it. What is between the
    products of float16 may be beyond its range, and is multiplied in TF32, which has its digits.
    """
    if dtype == torch.float32:
        return precision(dtype)
    return "narrow" if dtype == torch.bfloat16 else "tf32"


def _state_type(dtype: torch.dtype) -> torch.dtype:
    """In which states are stored: what rounds as the inputs do, with the range of float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _settings(
    kernel: str,
    dim_k: int,
    dim_v: int,
    chunk: int,
    dtype: torch.dtype,
    reverse: bool,
    rows: int,
    turned: bool = False,
    arch: int = min(LIMITS),
) -> dict:
    """Constants of a kernel, "states" or "outputs": blocks that registers hold."""
    how = _precision(dtype)
    exact = dtype == torch.float32
    most_k, most_v = BLOCKS["exact" if exact else how][kernel]
    if kernel == "states" and rows < FEW_ROWS:
        most_k, most_v = min(most_k, 64), min(most_v, 64)
    block_k, block_v = (
        min(limit, max(16, next_power_of_2(dim)))  # 16 is the least that a tensor core takes
        for limit, dim in ((most_k, dim_k), (most_v, dim_v))
    )
    # Eight warps where a program holds 128 x 128 sums, 64 of a thread's registers; else four.
    large = chunk > 64 or exact if kernel == "outputs" else block_k * block_v > 4096
    # 64 tokens of 128 keys and values are 32 KiB, of which two stages are under way. Before wgmma,
    # which reads them from shared memory, they pass through registers, and beside 64 sums there is
    # room for 32 tokens: four stages of 16 KiB.
    narrow = how == "narrow" and block_k * block_v > 8192 and arch < 90
    block_t, stages = (32, 5) if narrow else (64, 3)
    return dict(
        DIM_K=dim_k,
        DIM_V=dim_v,
        CHUNK=chunk,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        REVERSE=reverse,
        PRECISION=how,
        num_warps=8 if large else 4,
        num_stages=stages if kernel == "states" else 2,
        **({"TURNED": turned} if kernel == "outputs" else {"BLOCK_T": min(chunk, block_t)}),
    )


def _step_settings(dim_k: int, dim_v: int) -> dict:
    """Constants of the step: a program holds all rows of some columns of the state."""
    rows = next_power_of_2(dim_k)
    columns = min(next_power_of_2(dim_v), max(1, 4096 // rows))
    return dict(DIM_K=dim_k, DIM_V=dim_v, BLOCK_K=rows, BLOCK_V=columns, num_warps=4)


def _rows(x: Tensor) -> Tensor:
    """The tensor itself if neighbours of its last dimension touch in memory, or else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _run_states(key, value, log2_gamma, initial, scale, chunk_size, *, reverse=False):
    """The states between chunks, and the last one in float32."""
    key, value = _rows(key), _rows(value)
    batch, heads, tokens, dim_k = key.shape
    dim_v, rows = value.shape[-1], batch * heads
    shape = rows, cdiv(tokens, chunk_size), dim_k, dim_v
    states = empty(shape, _state_type(value.dtype), value.device)
    final = empty((batch, heads, dim_k, dim_v), torch.float32, value.device)
    use = dim_k, dim_v, chunk_size, value.dtype, reverse, rows
    settings = _settings("states", *use, arch=arch_of(value.device))
    launch(
        _states_kernel,
        (rows, cdiv(dim_k, settings["BLOCK_K"]), cdiv(dim_v, settings["BLOCK_V"])),
        *(key, value, log2_gamma, initial, states, final, heads, tokens, scale),
        *(*key.stride()[:3], *value.stride()[:3]),
        **settings,
    )
    return states, final


def _run_outputs(
    query, key, value, log2_gamma, states, scale, chunk_size, *, reverse=False, turned=False
):
    """The outputs in the values' type, from states that were stored before."""
    query, key, value = _rows(query), _rows(key), _rows(value)
    batch, heads, tokens, dim_k = query.shape
    dim_v, rows = value.shape[-1], batch * heads
    out = empty((batch, heads, tokens, dim_v), value.dtype, value.device)
    use = dim_k, dim_v, chunk_size, value.dtype, reverse, rows, turned
    launch_again(
        _outputs_kernel,
        (rows * cdiv(tokens, chunk_size),),
        *(query, key, value, log2_gamma, states, out, heads, tokens, scale),
        *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
        **_settings("outputs", *use),
    )
    return out


class _Retention(torch.autograd.Function):
    """The kernels, with their gradient: three more retentions, two of them backwards in time.

    The first of them reads the states of the forward pass, and the other two share theirs.
    """

    @staticmethod
    def forward(ctx, q, k, v, log2_gamma, initial, scale, chunk_size):
        states, final = _run_states(k, v, log2_gamma, initial, scale, chunk_size)
        ctx.save_for_backward(q, k, v, log2_gamma, states)
        ctx.scale, ctx.chunk_size = scale, chunk_size
        return _run_outputs(q, k, v, log2_gamma, states, scale, chunk_size), final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_final):
        q, k, v, log2_gamma, states = ctx.saved_tensors
        rest = ctx.scale, ctx.chunk_size
        g = d_out.to(v.dtype)
        dq = _run_outputs(g, v, k, log2_gamma, states, *rest, turned=True)
        # S of the future: what queries and gradients behind a token say of its key and value.
        steep, d_initial = _run_states(q, g, log2_gamma, d_final.contiguous(), *rest, reverse=True)
        dk = _run_outputs(v, g, q, log2_gamma, steep, *rest, reverse=True, turned=True)
        dv = _run_outputs(k, q, g, log2_gamma, steep, *rest, reverse=True)
        return dq, dk, dv, None, d_initial, None, None


# ---------------------------------------------------------------- the ones to call


def _check(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, state: Tensor | None, sizes: str
) -> None:
    """Refuse inputs that do not fit each other; `sizes` names the dimensions of q."""
    check_floats(q=q, k=k, v=v, gamma=gamma, state=state)
    kinds = {short(x.dtype) for x in (q, k, v)}
    if len(kinds) > 1:
        raise TypeError(f"q, k and v are of {', '.join(sorted(kinds))}; they must agree.")
    if gamma.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"gamma is of {short(gamma.dtype)}, in which 1 - 2^-12 may be 1; it must be float32 "
            "or float64."
        )
    if q.ndim != sizes.count(",") + 1 or not q.shape[-1] or not q.shape[1]:
        raise ValueError(
            f"q has shape {tuple(q.shape)}; it must be ({sizes}), heads and dim not 0."
        )
    shown = f"q of shape {tuple(q.shape)}"
    check_shape("k", k, tuple(q.shape), shown)
    dim_v = v.shape[-1] if v.ndim else 0
    check_shape("v", v, (*q.shape[:-1], dim_v), f"{shown} (its last dimension is free)")
    check_shape("gamma", gamma, (q.shape[1],), shown)
    if state is not None:
        fits = f"{shown} and v of shape {tuple(v.shape)}"
        check_shape("the state", state, (*q.shape[:2], q.shape[-1], dim_v), fits)
    # On a GPU the values are not looked at, because that would wait for the GPU; there, a wrong
    # gamma gives NaN.
    if gamma.device.type == "cpu" and not bool(((gamma > 0) & (gamma <= 1)).all()):
        raise ValueError(
            "gamma must be above 0 and at most 1: it is what a token keeps of the past."
        )


def retention(
    q: Float[Tensor, "batch heads time dim_k"],
    k: Float[Tensor, "batch heads time dim_k"],
    v: Float[Tensor, "batch heads time dim_v"],
    gamma: Float[Tensor, " heads"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "batch heads dim_k dim_v"] | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "batch heads time dim_v"], Float[Tensor, "batch heads dim_k dim_v"]]:
    r"""Chunkwise retention, $o_n = s\,q_n S_n$ with $S_n = \gamma S_{n-1} + k_n^\top v_n$.

    Args:
        q: Queries, already rotated by their positions where the layer does so.
        k: Keys, likewise.
        v: Values; their dimension may be another one.
        gamma: What each head keeps of its state per token, above 0 and at most 1
            (`retention_decay`), in float32 or float64.
        scale: $s$; $1/\sqrt{d_k}$ by default.
        initial_state: $S$ before the first token; zeros by default.
        chunk_size: 16, 32, 64 or 128 tokens; it changes the speed, not the result. By default what
            was measured on this device or, where nothing was, 128 for 16-bit inputs, which tensor
            cores multiply, and 64 for others.
        backend: "triton", "torch", or None for the kernels where they can run.

    Returns:
        The outputs, in the inputs' type, and the state after the last token, in float32 (float64
        for float64 inputs). Both have gradients; gamma has one only in PyTorch.

    Raises:
        ValueError: Shapes that do not fit each other, a gamma out of range (on the CPU), a chunk
            size that is not offered, an unknown backend.
        TypeError: Numbers that are not floating-point, inputs of different types, or a scale that
            is no number.
    """
    _check(q, k, v, gamma, initial_state, "batch, heads, time, dim")
    scale = None if scale is None else check_number("scale", scale)
    if chunk_size is None:
        key = partial(key_of, q.dtype, k=q.shape[-1], v=v.shape[-1])
        (chunk_size,) = chosen("retention", key, q.device, (_chunk_size(q.dtype),))
    chunk_size = check_whole("chunk_size", chunk_size)
    if chunk_size not in CHUNK_SIZES:
        raise ValueError(f"chunk_size is {chunk_size}; it must be 16, 32, 64 or 128.")
    if choose(backend, q, k, v, gamma.float(), initial_state, obstacle=_obstacle(gamma)) == "torch":
        options = dict(scale=scale, initial_state=initial_state, chunk_size=chunk_size)
        return retention_chunkwise(q, k, v, gamma, **options)
    if initial_state is None:
        initial_state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=torch.float32)
    state = initial_state.float().contiguous()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Retention.apply(q, k, v, gamma.log2().float(), state, scale, chunk_size)


def retention_step(
    q: Float[Tensor, "batch heads dim_k"],
    k: Float[Tensor, "batch heads dim_k"],
    v: Float[Tensor, "batch heads dim_v"],
    gamma: Float[Tensor, " heads"],
    state: Float[Tensor, "batch heads dim_k dim_v"],
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "batch heads dim_v"], Float[Tensor, "batch heads dim_k dim_v"]]:
    """One token of decoding: the output, and the new state. The old one is not changed.

    Arguments are those of `retention` for a single token. The kernel has no gradient; where one is
    asked for, PyTorch computes.

    Raises:
        ValueError: Shapes that do not fit each other, a gamma out of range (on the CPU), an
            unknown backend.
        TypeError: Numbers that are not floating-point, inputs of different types, or a scale that
            is no number.
    """
    _check(q, k, v, gamma, state, "batch, heads, dim")
    scale = None if scale is None else check_number("scale", scale)
    wanted = any(x.requires_grad for x in (q, k, v, gamma, state)) and torch.is_grad_enabled()
    obstacle = "the step has no gradient." if wanted else ""
    if q.shape[-1] > WIDEST:
        obstacle = f"keys of {q.shape[-1]} are too wide for the step; {WIDEST} is the most."
    if choose(backend, q, k, v, gamma.float(), state, obstacle=obstacle) == "torch":
        return retention_step_reference(q, k, v, gamma, state, scale=scale)
    q, k, v, state = _rows(q), _rows(k), _rows(v), state.float().contiguous()
    batch, heads, dim_k = q.shape
    dim_v = v.shape[-1]
    scale = dim_k**-0.5 if scale is None else scale
    out = empty(v.shape, v.dtype, v.device)
    new_state = empty(state.shape, torch.float32, v.device)
    settings = _step_settings(dim_k, dim_v)
    launch(
        _step_kernel,
        (batch * heads, cdiv(dim_v, settings["BLOCK_V"])),
        *(q, k, v, gamma.log2().float(), state, new_state, out, heads, scale),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        **settings,
    )
    return out, new_state


def _obstacle(gamma: Tensor) -> str:
    learned = gamma.requires_grad and torch.is_grad_enabled()
    return "the kernels have no gradient for gamma." if learned else ""


# ---------------------------------------------------------------- for the compiler and the clock


def bytes_moved(kernel: str, settings: dict[str, int], tokens: int, dtype: torch.dtype) -> int:
    """Bytes that the programs of one head read and write.

    What several programs read is counted for each of them.
    """
    dim_k, dim_v, chunk = (settings[x] for x in ("DIM_K", "DIM_V", "CHUNK"))
    walks_k, walks_v = (cdiv(settings[f"DIM_{x}"], settings[f"BLOCK_{x}"]) for x in "KV")
    size = dtype.itemsize
    states = cdiv(tokens, chunk) * dim_k * dim_v * _state_type(dtype).itemsize
    if kernel == "states":  # keys for every block of values, and the other way round
        first_and_last = 2 * 4 * dim_k * dim_v + 4 * walks_k * walks_v
        return tokens * (dim_k * walks_v + dim_v * walks_k) * size + states + first_and_last
    queries = 1 if walks_k == 1 else 1 + walks_v  # wider ones again for every block of values
    decays_and_flags = 6 * cdiv(tokens, chunk)  # a flag is written and read
    return tokens * (dim_k * (queries + 1) + 2 * dim_v) * size + states + decays_and_flags


def compile_cases() -> list[CompileCase]:
    """Four texts of 16 heads of 128, one text, wider heads, a shorter chunk; the step."""
    found = []
    strides = {f"{x}_{axis}": 128 for x in ("query", "key", "value") for axis in ("batch", "head")}
    strides |= {f"{x}_token": 4096 for x in ("query", "key", "value")}
    uses = [(4, 128, 128, _chunk_size(KINDS[kind]), False, kind) for kind in KINDS]
    uses += [(4, 128, 128, 128, True, "bf16"), (1, 128, 128, 128, False, "bf16")]
    uses += [(4, 256, 512, 128, False, "bf16"), (4, 128, 128, 64, False, "bf16")]
    for texts, dim_k, dim_v, chunk, reverse, kind in uses:
        types = dict.fromkeys(("query", "key", "value", "out"), f"*{kind}")
        types |= dict.fromkeys(("log2_gamma", "initial", "final"), "*fp32")
        types |= {"states": "*bf16" if kind == "bf16" else "*fp32"}
        types |= {"flags": "*i8", "heads": "i32", "tokens": "i32", "scale": "fp32"}
        about = f"{kind} {dim_k}x{dim_v} chunk {chunk}"
        about += reverse * " backward" + (texts == 1) * " one text"
        for name, kernel in (("states", _states_kernel), ("outputs", _outputs_kernel)):
            if texts == 1 and name == "outputs":
                continue  # which does not depend on it
            use = dim_k, dim_v, chunk, KINDS[kind], reverse, 16 * texts
            of_archs: dict[tuple, list[int]] = {}  # equal settings are one case
            for arch in LIMITS:
                of_arch = _settings(name, *use, arch=arch) | {"TURNED": reverse}
                of_archs.setdefault(tuple(of_arch.items()), []).append(arch)
            twice = kernel is _outputs_kernel and reverse
            both = (False, True) if twice else (False,)
            for (items, archs), again in product(of_archs.items(), both):
                settings = dict(items)
                warps, stages = settings.pop("num_warps"), settings.pop("num_stages")
                case = CompileCase(
                    f"retention: {name} {about}" + again * " again", kernel, types,
                    strides | settings | {"AGAIN": again},
                    mma=kind != "fp32", warps=warps, stages=stages,
                    work=_work(name, settings, KINDS[kind], texts), archs=tuple(archs),
                )  # fmt: skip
                found.append(case)
    for kind in ("fp32", "bf16"):
        types = dict.fromkeys(("query", "key", "value", "out"), f"*{kind}")
        types |= dict.fromkeys(("log2_gamma", "state", "new_state"), "*fp32")
        settings = _step_settings(128, 128)
        warps = settings.pop("num_warps")
        types |= {"heads": "i32", "scale": "fp32"}
        name = f"retention: step {kind} 128x128"
        batch, heads, state = 64, 16, 128 * 128 * 4
        work = Work(
            what=f"{batch} sequences, {heads} heads of 128 x 128",
            item="number of the state",
            items=128 * settings["BLOCK_V"],
            turns=1,
            programs=batch * heads * (128 // settings["BLOCK_V"]),
            fetched=512 * settings["BLOCK_V"],
            bytes=batch * heads * 2 * state,
            flops=batch * heads * 5 * 128 * 128,
        )
        constants = strides | settings
        found.append(CompileCase(name, _step_kernel, types, constants, warps=warps, work=work))
    return found


def _work(name: str, settings: dict[str, int], dtype: torch.dtype, texts: int) -> Work:
    """16,384 tokens in one text or several, 16 heads."""
    heads, chunk, tokens = 16, settings["CHUNK"], 16384
    dim_k, dim_v, k, v = (settings[x] for x in ("DIM_K", "DIM_V", "BLOCK_K", "BLOCK_V"))
    chunks, size, state = tokens // chunk, dtype.itemsize, _state_type(dtype).itemsize
    of = f"{texts} texts of {tokens // texts}" if texts > 1 else f"{tokens}"
    what = f"{of} tokens, {heads} heads of {dim_k} x {dim_v}"
    moved = heads * texts * bytes_moved(name, settings, tokens // texts, dtype)
    if name == "states":
        return Work(
            what=what,
            item="tile",
            items=1,
            turns=tokens // texts // settings["BLOCK_T"],
            programs=heads * texts * (dim_v // v) * (dim_k // k),
            fetched=settings["BLOCK_T"] * (k + v) * size,
            bytes=moved,
            # A product of all digits is three of bfloat16, and of TF32 three at half the rate.
            flops=2 * heads * tokens * dim_k * dim_v * (1 if size == 4 else 3 * state // 2),
        )
    # Queries that are wider than a block come again with every block of the state.
    turns = (dim_v // v) * (dim_k // k)
    return Work(
        what=what,
        item="tile",
        items=1,
        turns=turns,
        programs=heads * chunks,
        fetched=chunk * v * size + k * v * state,
        bytes=moved,
        flops=2 * heads * tokens * (dim_k * dim_v + chunk * (dim_k + dim_v)),
    )


CANDIDATES = (
    Candidate((128,), "scores of 64 registers a thread on eight warps, and the fewest states"),
    Candidate((64,), "a quarter of the scores: more programs fit, twice as many states are moved"),
)
"""Tokens of a chunk."""


def tune_cases(*, small: bool = False) -> list[TuneCase]:
    """Heads of 128, with values of 128 and of 256."""
    sizes = [(1, 1, 130, 16, 16)] if small else [(4, 16, 4096, 128, 128), (4, 16, 4096, 128, 256)]
    return [_tune_case(*one, small=small) for one in sizes]


def _tune_case(batch, heads, tokens, dim_k, dim_v, *, small: bool) -> TuneCase:
    dtype = torch.float16 if small else torch.bfloat16

    def make(device: torch.device, numbers: Numbers) -> Callable[[], Tensor]:
        draw = torch.Generator(device=device).manual_seed(0)
        q, k, v = (
            torch.randn(batch, heads, tokens, dim, device=device, generator=draw).to(dtype)
            for dim in (dim_k, dim_k, dim_v)
        )
        gamma = retention_decay(heads).to(device)
        (chunk,) = numbers
        return lambda: retention(q, k, v, gamma, chunk_size=chunk, backend="triton")[0]

    key, default = key_of(dtype, k=dim_k, v=dim_v), (_chunk_size(dtype),)
    return TuneCase("retention", key, default, CANDIDATES, make)


def bench_cases(*, small: bool = False) -> list[BenchCase]:
    """A layer of 16 heads, forward and with backward, and a step of decoding.

    One long text, a batch of shorter ones as in training, and texts in between.
    """
    shapes = [(1, 16, 16384, 128, 256), (4, 16, 4096, 128, 128), (16, 16, 2048, 128, 256)]
    shapes = [(1, 2, 64, 16, 32)] if small else shapes
    found = [_bench_case(*s, backward=backward) for s in shapes for backward in (False, True)]
    return found + [_step_case(*s) for s in ([(2, 2, 16, 32)] if small else [(64, 16, 128, 256)])]


def _bench_inputs(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(torch.bfloat16) for shape in shapes]


def _bench_case(batch, heads, tokens, dim_k, dim_v, *, backward: bool) -> BenchCase:
    rows = batch * heads * tokens
    # What no kernel can save: inputs and outputs once, and the gradients of all of them once.
    numbers = 2 * dim_k + 2 * dim_v + backward * (4 * dim_k + 3 * dim_v)
    products = dim_k + dim_v + backward * (3 * dim_k + 2 * dim_v)  # within chunks of 64
    flops = rows * (2 * 64 * products + (4 + 10 * backward) * dim_k * dim_v)
    shape = f"B={batch} H={heads} T={tokens} K={dim_k} V={dim_v}" + backward * " with backward"

    def make(device: torch.device) -> dict[str, Runner]:
        wide = (batch, heads, tokens, dim_k)
        q, k, v, d_out = _bench_inputs(device, wide, wide, (*wide[:3], dim_v), (*wide[:3], dim_v))
        gamma = retention_decay(heads).to(device)
        inputs = [x.requires_grad_(backward) for x in (q, k, v)]

        def timed(function: Callable[[], Tensor]) -> Runner:
            return (
                (lambda: torch.autograd.grad(function(), inputs, d_out)) if backward else function
            )

        # Its layout is (batch, time, heads, dim); its decay is the paper's as well.
        turned = [x.detach().transpose(1, 2).contiguous() for x in (q, k, v, d_out)]
        own = [x.requires_grad_(backward) for x in turned[:3]]

        def theirs():
            from fla.ops.retention import chunk_retention

            out = chunk_retention(*own)[0]
            if not backward:
                return out.transpose(1, 2)
            found = torch.autograd.grad(out, own, turned[3])
            return [grad.transpose(1, 2) for grad in found]

        def exactly():
            wide = [x.detach().double().requires_grad_(backward) for x in inputs]
            out = retention_chunkwise(*wide, gamma.double())[0]
            return torch.autograd.grad(out, wide, d_out.double()) if backward else out

        how = pinned(device)
        return {
            EXACT: exactly,
            "ours": timed(lambda: retention(q, k, v, gamma, backend=how)[0]),
            "torch, chunkwise": timed(lambda: retention_chunkwise(q, k, v, gamma)[0]),
            "flash-linear-attention": absent("fla.ops.retention") or theirs,
            "causal attention (SDPA)" + OTHER: timed(
                lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            ),
        }

    return BenchCase("retention", shape, torch.bfloat16, 2 * rows * numbers, flops, make)


def _step_case(batch, heads, dim_k, dim_v) -> BenchCase:
    numbers = batch * heads * dim_k * dim_v

    def make(device: torch.device) -> dict[str, Runner]:
        row = (batch, heads, dim_k)
        q, k, v = _bench_inputs(device, row, row, (batch, heads, dim_v))
        state = torch.randn(batch, heads, dim_k, dim_v, device=device)
        inputs = q, k, v, retention_decay(heads).to(device), state
        return {
            EXACT: lambda: retention_step_reference(*(x.double() for x in inputs)),
            "ours": lambda: retention_step(*inputs, backend=pinned(device)),
            "torch": lambda: retention_step_reference(*inputs),
        }

    shape = f"step B={batch} H={heads} K={dim_k} V={dim_v}"
    return BenchCase("retention", shape, torch.bfloat16, 8 * numbers, 5 * numbers, make)
