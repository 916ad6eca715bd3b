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

**Two kernels.** One walks over the chunks and writes the state before each of them; all tiles of
all states run side by side. The other computes the outputs, all chunks at once. A
token that a query does not see has no part in its output, not even as an infinite number: see
`_masked` for the second launch that this takes, of programs that read a byte and end.

**The gradient of retention is three retentions**, and so it needs no further kernels. From the
unrolled sum, with $g_n$ the gradient of $o_n$:

$$\nabla q_n = s \sum_{m \le n} \gamma^{n-m} (g_n \cdot v_m)\, k_m, \quad
  \nabla k_m = s \sum_{n \ge m} \gamma^{n-m} (v_m \cdot g_n)\, q_n, \quad
  \nabla v_m = s \sum_{n \ge m} \gamma^{n-m} (k_m \cdot q_n)\, g_n.$$

The first is the retention of $(g, v, k)$; the other two are the retentions of $(v, g, q)$ and
$(k, q, g)$ with time running backwards, and the state that arrives at the start is the gradient of
the initial state.

**Bytes and operations** of one head, for $T$ tokens of $b$ bytes a number. Queries, keys, values
and outputs must move once: $2 T (d_k + d_v)\, b$ bytes. Stored states add a second read of keys and
values, $T (d_k + d_v)\, b$ (tiles of a state share them through the cache), and are written and
read in float32: $8\, d_k d_v\, T / C$. Operations are $2 T C (d_k + d_v)$ within chunks and
$4\, T d_k d_v$ through states. At $d_k = d_v = 128$, $C = 64$ and 16 bits, that makes 98,304
operations on 3,584 bytes per token, 27 per byte, where GPUs with tensor cores can do many more. So
memory is the bound, $t \ge T\,[3 (d_k + d_v)\, b + 8\, d_k d_v / C] / B$ at $B$ bytes per second,
and there is room for exactness: 16-bit inputs are multiplied in TF32, which holds all their digits
and keeps the range of float32. States, which add up over a whole text, take three TF32 products
each, and come close to float32.

The **step** of decoding reads and writes the state, $8\, d_k d_v$ bytes per head, for
$5\, d_k d_v$ operations, however long the past is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from effnb.kernels._launch import (
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
from effnb.kernels.bench import OTHER, BenchCase, Runner, absent
from effnb.kernels.compile import KINDS, CompileCase
from effnb.kernels.report import Work

CHUNK_SIZES = (16, 32, 64, 128)
WIDEST = 2**16  # keys of a step, which a program holds at once


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
def _states_kernel(
    key, value, log2_gamma,
    initial,  # (rows, DIM_K, DIM_V) float32; a row is one head of one sequence
    states,  # (rows, chunks, DIM_K, DIM_V) float32: before each chunk (after it, in REVERSE)
    final,  # (rows, DIM_K, DIM_V) float32
    heads, tokens, scale,
    key_batch, key_head, key_token,  # strides; neighbours of the last dimension touch
    value_batch, value_head, value_token,
    DIM_K: tl.constexpr, DIM_V: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the states of one head: walk over the chunks, storing the state at each."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    chunks = tl.cdiv(tokens, CHUNK)
    index = tl.arange(0, CHUNK)
    dim_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    dim_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = dim_k < DIM_K, dim_v < DIM_V
    tile = dim_k.to(tl.int64)[:, None] * DIM_V + dim_v[None, :]
    in_tile = in_k[:, None] & in_v[None, :]
    decay = tl.load(log2_gamma + head)
    state = tl.load(initial + row * DIM_K * DIM_V + tile, mask=in_tile, other=0.0)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        tl.store(states + (row * chunks + chunk) * DIM_K * DIM_V + tile, state, mask=in_tile)
        length = tl.minimum(tokens - chunk * CHUNK, CHUNK)
        present = index < length
        token = (chunk * CHUNK + index).to(tl.int64)
        k = tl.load(
            key + token[:, None] * key_token + dim_k[None, :],
            mask=present[:, None] & in_k[None, :],
            other=0.0,
        ).to(tl.float32)
        v = tl.load(
            value + token[:, None] * value_token + dim_v[None, :],
            mask=present[:, None] & in_v[None, :],
            other=0.0,
        ).to(tl.float32)
        # How often each token still decays before the chunk is left: at its end, or, backwards in
        # time, at its start, where the step into the first token counts too.
        left = index + 1 if REVERSE else tl.maximum(length - 1 - index, 0)
        k *= tl.exp2(decay * left.to(tl.float32))[:, None]
        if REVERSE:  # then the keys are the queries of the forward pass, which carry the scale
            k *= scale
        # The weights have more digits than TF32: "tf32x3" multiplies the rest of them too.
        added = tl.dot(tl.trans(k), v, input_precision="tf32x3" if PRECISION == "tf32" else "ieee")
        state = tl.exp2(decay * length.to(tl.float32)) * state + added
    tl.store(final + row * DIM_K * DIM_V + tile, state, mask=in_tile)


@jit
def _outputs_kernel(
    flags,  # which programs are to run again
    query, key, value, log2_gamma,
    states,  # what _states_kernel stored
    out,  # (rows, tokens, DIM_V)
    heads, tokens, scale,
    query_batch, query_head, query_token,
    key_batch, key_head, key_token,
    value_batch, value_head, value_token,
    DIM_K: tl.constexpr, DIM_V: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk of one head, for BLOCK_V of the value's dimensions."""
    if AGAIN:  # noqa: SIM102 - only then there are flags
        if is_done(flags):
            return
    chunks = tl.cdiv(tokens, CHUNK)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    batch, head = row // heads, row % heads
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    states += (row * chunks + chunk) * DIM_K * DIM_V
    length = tl.minimum(tokens - chunk * CHUNK, CHUNK)
    index = tl.arange(0, CHUNK)
    present = index < length
    token = (chunk * CHUNK + index).to(tl.int64)
    dim_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = dim_v < DIM_V

    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    from_state = tl.zeros((CHUNK, BLOCK_V), tl.float32)
    for start in range(0, DIM_K, BLOCK_K):
        dim_k = start + tl.arange(0, BLOCK_K)
        in_k = dim_k < DIM_K
        q = tl.load(
            query + token[:, None] * query_token + dim_k[None, :],
            mask=present[:, None] & in_k[None, :],
            other=0.0,
        ).to(tl.float32)
        k_transposed = tl.load(
            key + token[None, :] * key_token + dim_k[:, None],
            mask=present[None, :] & in_k[:, None],
            other=0.0,
        ).to(tl.float32)
        state = tl.load(
            states + dim_k.to(tl.int64)[:, None] * DIM_V + dim_v[None, :],
            mask=in_k[:, None] & in_v[None, :],
            other=0.0,
        )
        scores += tl.dot(q, k_transposed, input_precision=PRECISION)
        from_state += tl.dot(q, state, input_precision=PRECISION)

    # D, by the number of tokens between a query and a key that it may see.
    decay = tl.load(log2_gamma + head)
    distance = index[:, None] - index[None, :]
    if REVERSE:
        distance = -distance
    D = tl.exp2(decay * tl.maximum(distance, 0).to(tl.float32))
    seen = (distance >= 0) & present[None, :]
    scores = tl.where(seen, scores * D, 0.0)
    v = tl.load(
        value + token[:, None] * value_token + dim_v[None, :],
        mask=present[:, None] & in_v[None, :],
        other=0.0,
    ).to(tl.float32)
    if AGAIN:
        result = tl.zeros((CHUNK, BLOCK_V), tl.float32)
        result = sum_seen(
            result, scores, seen, value, token, tokens, value_token, dim_v, DIM_V, CHUNK
        )
    else:
        result = tl.dot(scores, v, input_precision=PRECISION)
        tell(flags, has_nan(result))
    result *= scale
    # How often the state has decayed when a token reads it; backwards, the state already is a
    # gradient at the chunk's last token, and holds the scale.
    since = tl.maximum(length - 1 - index, 0) if REVERSE else index + 1
    from_state *= tl.exp2(decay * since.to(tl.float32))[:, None]
    if not REVERSE:
        from_state *= scale
    tl.store(
        out + (row * tokens + token[:, None]) * DIM_V + dim_v[None, :],
        (result + from_state).to(out.dtype.element_ty),
        mask=present[:, None] & in_v[None, :],
    )


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


def _settings(
    kernel: str, dim_k: int, dim_v: int, chunk: int, dtype: torch.dtype, reverse: bool
) -> dict:
    """Constants of a kernel, "states" or "outputs": blocks that registers hold."""
    exact = dtype == torch.float32  # whose products take more registers
    most = {"states": (32, 32 if exact else 64), "outputs": (32, 32) if exact else (64, 64)}[kernel]
    block_k, block_v = (
        min(limit, max(16, next_power_of_2(dim)))  # 16 is the least that a tensor core takes
        for limit, dim in zip(most, (dim_k, dim_v))
    )
    return dict(
        DIM_K=dim_k,
        DIM_V=dim_v,
        CHUNK=chunk,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        REVERSE=reverse,
        # Float32 inputs are multiplied as torch would.
        PRECISION=precision(dtype) if exact else "tf32",
        num_warps=8 if chunk > 64 or (exact and kernel == "outputs") else 4,
        num_stages=2,
    )


def _step_settings(dim_k: int, dim_v: int) -> dict:
    """Constants of the step: a program holds all rows of some columns of the state."""
    rows = next_power_of_2(dim_k)
    columns = min(next_power_of_2(dim_v), max(1, 4096 // rows))
    return dict(DIM_K=dim_k, DIM_V=dim_v, BLOCK_K=rows, BLOCK_V=columns, num_warps=4)


def _rows(x: Tensor) -> Tensor:
    """The tensor itself if neighbours of its last dimension touch in memory, or else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _run(query, key, value, log2_gamma, initial, scale, chunk_size, *, reverse=False):
    """Both kernels; outputs in the values' type, and the last state in float32."""
    query, key, value = _rows(query), _rows(key), _rows(value)
    batch, heads, tokens, dim_k = query.shape
    dim_v = value.shape[-1]
    rows, chunks = batch * heads, cdiv(tokens, chunk_size)
    states = empty((rows, chunks, dim_k, dim_v), torch.float32, value.device)
    final = empty((batch, heads, dim_k, dim_v), torch.float32, value.device)
    out = empty((batch, heads, tokens, dim_v), value.dtype, value.device)
    use = dim_k, dim_v, chunk_size, value.dtype, reverse
    settings = _settings("states", *use)
    launch(
        _states_kernel,
        (rows, cdiv(dim_k, settings["BLOCK_K"]), cdiv(dim_v, settings["BLOCK_V"])),
        *(key, value, log2_gamma, initial, states, final, heads, tokens, scale),
        *(*key.stride()[:3], *value.stride()[:3]),
        **settings,
    )
    settings = _settings("outputs", *use)
    launch_again(
        _outputs_kernel,
        (rows * chunks, cdiv(dim_v, settings["BLOCK_V"])),
        *(query, key, value, log2_gamma, states, out, heads, tokens, scale),
        *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
        **settings,
    )
    return out, final


class _Retention(torch.autograd.Function):
    """The kernels, with their gradient: three more retentions, two of them backwards in time."""

    @staticmethod
    def forward(ctx, q, k, v, log2_gamma, initial, scale, chunk_size):
        ctx.save_for_backward(q, k, v, log2_gamma, initial)
        ctx.scale, ctx.chunk_size = scale, chunk_size
        return _run(q, k, v, log2_gamma, initial, scale, chunk_size)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_final):
        q, k, v, log2_gamma, initial = ctx.saved_tensors
        rest = ctx.scale, ctx.chunk_size
        d_out, d_final = d_out.to(v.dtype), d_final.contiguous()
        transposed = initial.mT.contiguous(), d_final.mT.contiguous()
        dq, _ = _run(d_out, v, k, log2_gamma, transposed[0], *rest)
        dk, _ = _run(v, d_out, q, log2_gamma, transposed[1], *rest, reverse=True)
        dv, d_initial = _run(k, q, d_out, log2_gamma, d_final, *rest, reverse=True)
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
    chunk_size: int = 64,
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
        chunk_size: 16, 32, 64 or 128 tokens; it changes the speed, not the result.
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


def compile_cases() -> list[CompileCase]:
    """Heads of 128 in chunks of 64, wider heads, longer chunks; the step."""
    found = []
    strides = {f"{x}_{axis}": 128 for x in ("query", "key", "value") for axis in ("batch", "head")}
    strides |= {f"{x}_token": 4096 for x in ("query", "key", "value")}
    uses = [(128, 128, 64, False, kind) for kind in KINDS] + [(128, 128, 64, True, "bf16")]
    uses += [(256, 512, 64, False, "bf16"), (128, 128, 128, False, "bf16")]
    for dim_k, dim_v, chunk, reverse, kind in uses:
        types = dict.fromkeys(("query", "key", "value", "out"), f"*{kind}")
        types |= dict.fromkeys(("log2_gamma", "initial", "states", "final"), "*fp32")
        types |= {"flags": "*i8", "heads": "i32", "tokens": "i32", "scale": "fp32"}
        about = f"{kind} {dim_k}x{dim_v} chunk {chunk}" + reverse * " backward"
        for name, kernel in (("states", _states_kernel), ("outputs", _outputs_kernel)):
            settings = _settings(name, dim_k, dim_v, chunk, KINDS[kind], reverse)
            warps, stages = settings.pop("num_warps"), settings.pop("num_stages")
            twice = kernel is _outputs_kernel and reverse
            for again in (False, True) if twice else (False,):
                case = CompileCase(
                    f"retention: {name} {about}" + again * " again", kernel, types,
                    strides | settings | {"AGAIN": again},
                    mma=kind != "fp32", warps=warps, stages=stages,
                    work=_work(name, settings, KINDS[kind].itemsize),
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


def _work(name: str, settings: dict[str, int], size: int) -> Work:
    """A text of 16,384 tokens, 16 heads."""
    tokens, heads, chunk = 16384, 16, settings["CHUNK"]
    dim_k, dim_v, k, v = (settings[x] for x in ("DIM_K", "DIM_V", "BLOCK_K", "BLOCK_V"))
    chunks = tokens // chunk
    states = chunks * dim_k * dim_v * 4
    what = f"{tokens} tokens, {heads} heads of {dim_k} x {dim_v}"
    moved, programs = tokens * (dim_k + dim_v) * size, heads * (dim_v // v)
    if name == "states":
        return Work(
            what=what,
            item="tile",
            items=1,
            turns=chunks,
            programs=programs * (dim_k // k),
            fetched=chunk * (k + v) * size,
            bytes=heads * (moved + states),
            flops=2 * heads * tokens * dim_k * dim_v,
        )
    return Work(
        what=what,
        item="tile",
        items=1,
        turns=dim_k // k,
        programs=programs * chunks,
        fetched=2 * chunk * k * size + 4 * k * v,
        bytes=heads * (2 * moved + states),
        flops=2 * heads * tokens * (dim_k * dim_v + chunk * (dim_k + dim_v)),
    )


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

        def theirs() -> Tensor:
            # Its layout is (batch, time, heads, dim); its decay is the paper's as well.
            from fla.ops.retention import chunk_retention

            return chunk_retention(*(x.transpose(1, 2) for x in (q, k, v)))[0].transpose(1, 2)

        return {
            "ours": timed(lambda: retention(q, k, v, gamma)[0]),
            "torch, chunkwise": timed(lambda: retention_chunkwise(q, k, v, gamma)[0]),
            "flash-linear-attention": absent("fla.ops.retention") or timed(theirs),
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
            "ours": lambda: retention_step(*inputs),
            "torch": lambda: retention_step_reference(*inputs),
        }

    shape = f"step B={batch} H={heads} K={dim_k} V={dim_v}"
    return BenchCase("retention", shape, torch.bfloat16, 8 * numbers, 5 * numbers, make)
