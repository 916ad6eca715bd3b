"""The exercises of the chapter on attention: references, cases, and mistakes with diagnoses."""

from __future__ import annotations

import math

from effnb.lab import Exercise

# --- two halves of one softmax --------------------------------------------------------------------


def merged(
    m1: float, l1: float, o1: float, m2: float, l2: float, o2: float
) -> tuple[float, float, float]:
    """Maximum, sum and weighted sum of all keys from those of two blocks."""
    m = max(m1, m2)
    a, b = math.exp(m1 - m), math.exp(m2 - m)
    return m, a * l1 + b * l2, a * o1 + b * o2


def _added(m1, l1, o1, m2, l2, o2):
    return max(m1, m2), l1 + l2, o1 + o2


def _one_sided(m1, l1, o1, m2, l2, o2):
    m = max(m1, m2)
    return m, math.exp(m1 - m) * l1 + l2, math.exp(m1 - m) * o1 + o2


def _not_o(m1, l1, o1, m2, l2, o2):
    m = max(m1, m2)
    return m, math.exp(m1 - m) * l1 + math.exp(m2 - m) * l2, o1 + o2


def _divided(m1, l1, o1, m2, l2, o2):
    m, total, out = merged(m1, l1, o1, m2, l2, o2)
    return m, total, out / total


merging = Exercise(
    "Two halves of one softmax",
    minutes=10,
    difficulty="medium",
    reference=merged,
    cases=[
        (3.0, 1.5, 2.0, 1.0, 2.0, 5.0),
        (0.0, 1.0, 4.0, 2.0, 1.25, -1.0),
        (-1.0, 2.0, 1.0, -1.0, 3.0, 2.0),
    ],
    wrong={
        "The two sums were measured from different maxima: scale each to the common one": _added,
        "Either block may have the smaller maximum: both need a factor": _one_sided,
        "The weighted sum was measured from the same maximum as the sum: scale it, too": _not_o,
        "Divide only once, at the very end: the next block still needs the sums": _divided,
    },
    atol=1e-6,
)

# --- the size of a cache --------------------------------------------------------------------------


def longest(memory: int, layers: int, kv_heads: int, head_dim: int, bits: int) -> int:
    """Whole tokens of one text whose keys and values fit into so many bytes."""
    return 8 * memory // (2 * layers * kv_heads * head_dim * bits)


room = Exercise(
    "How long a text fits",
    minutes=5,
    difficulty="easy",
    reference=longest,
    cases=[(2**30, 30, 3, 64, 16), (2**20, 6, 4, 32, 16), (10**9, 32, 8, 128, 4)],
    wrong={
        "A token has a key and a value: twice as many numbers": (
            lambda memory, layers, kv_heads, head_dim, bits: (
                8 * memory // (layers * kv_heads * head_dim * bits)
            )
        ),
        "There are 8 bits in a byte": (
            lambda memory, layers, kv_heads, head_dim, bits: (
                memory // (2 * layers * kv_heads * head_dim * bits)
            )
        ),
        "Every layer keeps keys and values of its own": (
            lambda memory, layers, kv_heads, head_dim, bits: (
                8 * memory // (2 * kv_heads * head_dim * bits)
            )
        ),
        "Half a token does not fit: round down": (
            lambda memory, layers, kv_heads, head_dim, bits: (
                8 * memory / (2 * layers * kv_heads * head_dim * bits)
            )
        ),
    },
)

# --- pairs of a causal window with sinks ----------------------------------------------------------


def seen_pairs(tokens: int, window: int, sinks: int) -> int:
    """Pairs of a causal window, itself included, and of the first tokens, none counted twice."""
    seen = (min(t, window) + min(sinks, max(0, t - window)) for t in range(1, tokens + 1))
    return sum(seen)


def _twice(tokens, window, sinks):
    return sum(min(t, window) + min(t, sinks) for t in range(1, tokens + 1))


def _start(tokens, window, sinks):
    return tokens * (window + sinks)


def _without_itself(tokens, window, sinks):
    return seen_pairs(tokens, window + 1, sinks)


def _acausal(tokens, window, sinks):
    return seen_pairs(tokens, window, sinks) + sum(
        tokens - t for t in range(1, min(sinks, tokens) + 1)
    )


pairs = Exercise(
    "Pairs of a window with sinks",
    minutes=15,
    difficulty="medium",
    reference=seen_pairs,
    cases=[(100, 16, 4), (8, 3, 2), (5, 8, 2), (64, 8, 0)],
    wrong={
        "A sink inside the window is one key, not two": _twice,
        "The first tokens have fewer tokens before them than the window is wide": _start,
        "A token is one of the tokens in its own window": _without_itself,
        "The pattern is causal: a sink does not see what comes later": _acausal,
    },
)
