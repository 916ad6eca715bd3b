"""Which pairs of tokens a sparse attention lets see each other: tables, counts, and reach.

These are tables of truth values for pictures and for checks on short texts. They are not how sparse
attention is computed: a dense product under such a mask costs as much as one without. `longformer`,
`etc` and `bigbird` compute by blocks what these tables define.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from effnb.design.attention.checks import check_count
from effnb.kernels.local_attention import visible_pairs


def chosen_tokens(tokens: int, which: int | Sequence[int]) -> Bool[Tensor, " tokens"]:
    """True at some tokens: at the first ones, given a number, or at those of a list.

    Raises:
        ValueError: A token that does not exist.
    """
    found = torch.zeros(check_count("tokens", tokens), dtype=torch.bool)
    which = range(which) if isinstance(which, int) else list(which)
    for token in which:
        if not 0 <= token < tokens:
            raise ValueError(f"token {token} is not one of the {tokens} tokens from 0 on.")
        found[token] = True
    return found


def window_pattern(
    tokens: int,
    window: int,
    *,
    global_tokens: int | Sequence[int] = 0,
    causal: bool = False,
    dilation: int = 1,
) -> Bool[Tensor, "tokens tokens"]:
    r"""Longformer's pattern: a sliding window, and global tokens that see all and are seen by all.

    Causal, with the first tokens global, it is a sliding window with attention sinks.

    Args:
        tokens: T.
        window: w, the whole width: a token sees $|i - j| \le w / 2$ (w even), or, causal, itself
            and the $w - 1$ before it.
        global_tokens: How many of the first tokens are global, or a list of tokens.
        causal: Whether nothing sees a later token.
        dilation: Steps between the tokens of a window; its reach grows by the same factor.

    Raises:
        ValueError: A window below 1, or odd where it has two sides; tokens that do not exist.
    """
    far = chosen_tokens(tokens, global_tokens)
    if check_count("dilation", dilation) == 1:
        return visible_pairs(tokens, window=window, causal=causal, global_tokens=far)[0]
    places = -(-tokens // dilation)
    near = visible_pairs(places, window=window, causal=causal)[0]
    i = torch.arange(tokens)
    step, rest = i // dilation, i % dilation
    found = near[step[:, None], step] & (rest[:, None] == rest) | far | far[:, None]
    return found.tril() if causal else found


def etc_pattern(global_count: int, long_count: int, radius: int) -> Bool[Tensor, "tokens tokens"]:
    r"""ETC's pattern, the global tokens first: all pairs but those of long tokens far apart.

    Args:
        global_count: $n_g$, tokens of the global input.
        long_count: $n_l$, tokens of the long input.
        radius: r; long tokens see each other up to this distance.

    Raises:
        ValueError: A negative number, or no long token.
    """
    check_count("global_count", global_count, least=0)
    check_count("radius", radius, least=0)
    place = torch.arange(check_count("long_count", long_count) + global_count) - global_count
    far = place < 0
    return ((place[:, None] - place).abs() <= radius) | far | far[:, None]


def count_pairs(pattern: Bool[Tensor, "tokens tokens"]) -> int:
    """Pairs that see each other: each costs a head 4 d operations."""
    return int(pattern.sum())


def share_of_dense(pattern: Bool[Tensor, "tokens tokens"]) -> float:
    """The same as a share of all pairs."""
    return count_pairs(pattern) / pattern.numel()


def receptive_field(
    pattern: Bool[Tensor, "tokens tokens"], layers: int
) -> Bool[Tensor, "tokens tokens"]:
    """Which tokens can reach which through several layers of one pattern (and the residual).

    Raises:
        ValueError: Layers below 1.
    """
    check_count("layers", layers)
    step = pattern | torch.eye(len(pattern), dtype=torch.bool, device=pattern.device)
    found = step
    for _ in range(layers - 1):
        found = (found.float() @ step.float()) > 0
    return found


def hops(pattern: Bool[Tensor, "tokens tokens"]) -> int | None:
    """How many layers it takes until every token that can ever reach another has done so.

    Causal patterns count the pairs of the past only. None when some pair of the past never meets.
    """
    tokens = len(pattern)
    causal = not bool(pattern.triu(1).any())
    wanted = torch.ones_like(pattern)
    wanted = wanted.tril() if causal else wanted
    step = pattern | torch.eye(tokens, dtype=torch.bool, device=pattern.device)
    found, layers = step, 1
    while not bool((found | ~wanted).all()):
        further = (found.float() @ step.float()) > 0
        if torch.equal(further, found):
            return None
        found, layers = further, layers + 1
    return layers
