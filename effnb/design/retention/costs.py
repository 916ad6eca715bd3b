r"""What mixing tokens costs: the state's bytes, and multiply-adds per token, in closed form.

Counted is what mixes tokens only: scores, states, averages and convolutions. Projections, norms,
gates and feed-forward layers cost every token the same in all architectures, whatever the length. A
multiplication, with or without an addition, is one multiply-add; exponentials and divisions are
left out. All numbers are per layer and sequence.

**Decoding**, after $T$ tokens at width $d$, with heads of $d_k$ and $d_v$ numbers:

| | state, numbers | multiply-adds for a token |
|---|---|---|
| attention with a cache | $2 T d_{kv}$ | $2 T d$ |
| retention | $H d_k d_v$ | $3 H d_k d_v$ |
| RWKV-4 | $5 d$ | $6 d$ |
| Hyena of order $N$ | $(N - 1) T d + 2 (N + 1) d$ | $(N - 1)(T + 2) d + (3 (N + 1) + 1)\, d$ |

A step of retention decays the state, adds an outer product and reads: 3 passes. With $d_v = 2 d_k$
and $H d_k = d$ the state has $2 d\,d_k$ numbers. A key-value cache with the same number format
**breaks even at $T = d_k$ tokens**, 256 for the paper's heads, and is larger from then on.

**Training**: attention and parallel retention take $T^2 (d_k + d_v) H$, chunkwise retention
$T H\,[C (d_k + d_v) + 2 d_k d_v]$ for chunks of $C$, which grows linearly.

Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", 2023, arXiv
2307.08621.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from effnb.design.retention.configuration import LMConfig
from effnb.design.retention.hyena import SHORT, HyenaConfig
from effnb.design.retention.retnet import RetNetConfig
from effnb.design.retention.rwkv import RWKVConfig


@dataclass(frozen=True)
class DecodingCost:
    """What one layer takes to decode one more token of one sequence.

    Attributes:
        state_bytes: Bytes kept between tokens.
        multiply_adds: Multiply-adds of mixing the token.
    """

    state_bytes: int
    multiply_adds: int


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1.")


def attention_decoding(
    hidden: int,
    tokens: int,
    *,
    heads: int = 1,
    kv_heads: int | None = None,
    bytes_per_number: int = 4,
) -> DecodingCost:
    """Softmax attention with a key-value cache: $2 T d_{kv}$ numbers and $2 T d$ multiply-adds.

    Args:
        hidden: Width $d$.
        tokens: $T$, tokens in the cache, the present one among them.
        heads: Heads of the queries.
        kv_heads: Heads of keys and values where they are fewer.
        bytes_per_number: Bytes of a number of the cache.

    Raises:
        ValueError: A size below 1.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    _check(hidden=hidden, tokens=tokens, heads=heads, kv_heads=kv_heads)
    narrow = hidden // heads * kv_heads
    return DecodingCost(2 * tokens * narrow * bytes_per_number, 2 * tokens * hidden)


def retention_decoding(
    hidden: int, *, heads: int, value_factor: int = 2, bytes_per_number: int = 4
) -> DecodingCost:
    """Retention: $H d_k d_v$ numbers and three times as many multiply-adds, at any length.

    Args:
        hidden: Width $d$.
        heads: $H$.
        value_factor: $d_v / d_k$.
        bytes_per_number: Bytes of a number of the state.

    Raises:
        ValueError: A size below 1.
    """
    _check(hidden=hidden, heads=heads, value_factor=value_factor)
    size = hidden // heads
    numbers = heads * size * value_factor * size
    return DecodingCost(numbers * bytes_per_number, 3 * numbers)


def rwkv_decoding(hidden: int, *, bytes_per_number: int = 4) -> DecodingCost:
    """RWKV-4: five vectors; three multiply-adds to read and three to update, per channel.

    Args:
        hidden: Width $d$.
        bytes_per_number: Bytes of a number of the state.

    Raises:
        ValueError: A size below 1.
    """
    _check(hidden=hidden)
    return DecodingCost(5 * hidden * bytes_per_number, 6 * hidden)


def hyena_decoding(
    hidden: int, tokens: int, *, order: int = 2, bytes_per_number: int = 4
) -> DecodingCost:
    r"""Hyena: the inputs of $N - 1$ long convolutions, each summed over the whole past.

    Beside them, the short convolution's two last inputs of $N + 1$ streams and its 3 taps; two
    products per long convolution for gate and bias, and the last gate. The filters, $(N - 1) L d$
    numbers that all sequences share, are not counted.

    Args:
        hidden: Width $d$.
        tokens: $T$, tokens read, the present one among them.
        order: $N$.
        bytes_per_number: Bytes of a number of the state.

    Raises:
        ValueError: A size below 1, or an order below 2.
    """
    _check(hidden=hidden, tokens=tokens)
    if order < 2:
        raise ValueError(f"order is {order}; it must be at least 2.")
    numbers = (order - 1) * tokens * hidden + (SHORT - 1) * (order + 1) * hidden
    work = (order - 1) * (tokens + 2) * hidden + (SHORT * (order + 1) + 1) * hidden
    return DecodingCost(numbers * bytes_per_number, work)


def decoding(config: LMConfig, tokens: int = 1, *, bytes_per_number: int = 4) -> DecodingCost:
    """The cost of all layers of a model of this package, for one sequence.

    Args:
        config: Its configuration, of a RetNet, an RWKV or a Hyena.
        tokens: Tokens read, which only Hyena's cost depends on.
        bytes_per_number: Bytes of a number of the state.

    Raises:
        ValueError: A configuration of another kind.
    """
    if isinstance(config, RetNetConfig):
        one = retention_decoding(
            config.hidden,
            heads=config.heads,
            value_factor=config.value_factor,
            bytes_per_number=bytes_per_number,
        )
    elif isinstance(config, HyenaConfig):
        one = hyena_decoding(
            config.hidden, tokens, order=config.order, bytes_per_number=bytes_per_number
        )
    elif isinstance(config, RWKVConfig):
        one = rwkv_decoding(config.hidden, bytes_per_number=bytes_per_number)
    else:
        kind = type(config).__name__
        raise ValueError(f"a {kind} has no closed form here; RetNet, RWKV and Hyena have.")
    return DecodingCost(config.layers * one.state_bytes, config.layers * one.multiply_adds)


# ------------------------------------------------------------------------------- break-even


def break_even_tokens(
    head_size: int,
    *,
    value_factor: int = 2,
    heads: int = 1,
    kv_heads: int | None = None,
    state_bytes_per_number: int = 4,
    cache_bytes_per_number: int = 4,
) -> float:
    r"""Tokens from which a key-value cache has more bytes than the state of retention.

    $2 T d\,(H_{kv} / H)\, b_{\text{cache}} = c\, d\, d_k\, b_{\text{state}}$ with
    $c = d_v / d_k = 2$; for equal heads and numbers, $T = d_k$.

    Args:
        head_size: $d_k$ of the retention heads.
        value_factor: $c$.
        heads: Heads of the attention's queries.
        kv_heads: Heads of its keys and values where they are fewer.
        state_bytes_per_number: Bytes of a number of the state.
        cache_bytes_per_number: Bytes of a number of the cache.

    Raises:
        ValueError: A size below 1.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    _check(head_size=head_size, value_factor=value_factor, heads=heads, kv_heads=kv_heads)
    _check(state_bytes=state_bytes_per_number, cache_bytes=cache_bytes_per_number)
    state = value_factor * head_size * state_bytes_per_number
    return state * heads / (2 * kv_heads * cache_bytes_per_number)


def break_even_work(head_size: int, *, value_factor: int = 2) -> float:
    r"""Tokens from which a step of attention has more multiply-adds than one of retention.

    $2 T d = 3 c\, d\, d_k$; with $c = 2$, $T = 3 d_k$.

    Args:
        head_size: $d_k$ of the retention heads.
        value_factor: $c = d_v / d_k$.

    Raises:
        ValueError: A size below 1.
    """
    _check(head_size=head_size, value_factor=value_factor)
    return 3 * value_factor * head_size / 2


# --------------------------------------------------------------------------------- training


def parallel_multiply_adds(tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
    r"""Mixing a whole text in parallel: $T^2 H (d_k + d_v)$, of attention as of retention.

    Args:
        tokens: $T$.
        heads: $H$.
        dim_k: $d_k$.
        dim_v: $d_v$.

    Raises:
        ValueError: A size below 1.
    """
    _check(tokens=tokens, heads=heads, dim_k=dim_k, dim_v=dim_v)
    return tokens * tokens * heads * (dim_k + dim_v)


def chunkwise_multiply_adds(
    tokens: int, heads: int, dim_k: int, dim_v: int, chunk_size: int
) -> int:
    r"""Mixing a whole text in chunks: $H \sum_c [L_c^2 (d_k + d_v) + 2 L_c\, d_k d_v]$.

    Args:
        tokens: $T$.
        heads: $H$.
        dim_k: $d_k$.
        dim_v: $d_v$.
        chunk_size: $C$; the lengths $L_c$ of the chunks are $C$ but for the last one.

    Raises:
        ValueError: A size below 1.
    """
    _check(tokens=tokens, heads=heads, dim_k=dim_k, dim_v=dim_v, chunk_size=chunk_size)
    whole, rest = divmod(tokens, chunk_size)
    squares = whole * chunk_size**2 + rest**2
    return heads * (squares * (dim_k + dim_v) + 2 * tokens * dim_k * dim_v)


def fft_multiply_adds(tokens: int, hidden: int, *, order: int = 2) -> int:
    r"""Hyena's long convolutions of a whole text, by three FFTs of length $2T$ each.

    A real FFT of $n$ numbers is counted as $\frac54 n \log_2 n$ multiply-adds, half of the
    textbook's complex $\frac52 n \log_2 n$, and the product of spectra as 4 for each of $T + 1$
    frequencies; what a library does differs by a constant.

    Args:
        tokens: $T$.
        hidden: Width $d$.
        order: $N$.

    Raises:
        ValueError: A size below 1, or an order below 2.
    """
    _check(tokens=tokens, hidden=hidden)
    if order < 2:
        raise ValueError(f"order is {order}; it must be at least 2.")
    size = 2 * tokens
    transforms = 3 * 1.25 * size * math.log2(size)
    return round((order - 1) * hidden * (transforms + 4 * (tokens + 1)))
