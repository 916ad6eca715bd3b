r"""What attention accelerators leave out: tokens, heads, values, bits (SpAtten and Energon).

All functions work on queries, keys and their attention, and are exact about what is left out: a key
that is not selected has the same effect as a score of $-\infty$. What a chip *gains* by leaving out
is another question; `accelerator` simulates it.

**SpAtten** removes for good. Tokens and heads that matter little so far are gone for all later
layers (*cascade* pruning); within a layer, values with small probabilities are not read (*local
value* pruning); and keys are first read with their high bits only, the low bits being fetched for
those queries alone whose probabilities come out flat (*progressive quantization*).

**Energon** chooses for each query: a few rounds of very coarse products (2 bits, then 4), each
of which drops the keys below a threshold, and full precision for what is left. The threshold here
lies between the mean of the scores and an extreme of them; the paper's own formula may be another.

Wang, Zhang, Han, "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head
Pruning", HPCA 2021, arXiv 2012.09852. Zhou, Liu, Wang, Zhao, Sun, "Energon: Towards Efficient
Acceleration of Transformers Using Dynamic Sparse Attention", 2021, arXiv 2110.09310.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CODE_BITS = 16
"""Bits of the codes that Energon's coarse operands are cut from."""


# --------------------------------------------------------------------------------- attention


def probabilities(
    scores: Float[Tensor, "*batch queries keys"], visible: Bool[Tensor, "*#batch queries keys"]
) -> Float[Tensor, "*batch queries keys"]:
    r"""Softmax over the visible keys; the others get exactly 0.

    A query that sees nothing (padding) gets equal probabilities, as in transformers, not NaN.
    """
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)


def keep_top(
    scores: Float[Tensor, "*batch items"],
    count: Int[Tensor, "*#batch"] | int,
    allowed: Bool[Tensor, "*#batch items"] | None = None,
    protected: Bool[Tensor, "*#batch items"] | None = None,
) -> Bool[Tensor, "*batch items"]:
    """The `count` highest of each row; of equal ones the first.

    Args:
        scores: What to rank by.
        count: How many to keep, one number or one for each row.
        allowed: What may be kept at all; everything when None.
        protected: What is kept before anything else, if it is allowed.
    """
    ranked = scores.clone()
    if protected is not None:
        ranked = ranked.masked_fill(protected, torch.inf)
    if allowed is not None:
        ranked = ranked.masked_fill(~allowed, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    places = torch.arange(order.shape[-1], device=order.device)
    rank.scatter_(-1, order, places.expand_as(order).contiguous())
    limit = count[..., None] if isinstance(count, Tensor) else count
    kept = rank < limit
    return kept if allowed is None else kept & allowed


# ---------------------------------------------------------------------------------- SpAtten


def schedule(layers: int, keep: float, first: int = 1) -> list[float]:
    """The share that each layer still works on: 1 before layer `first`, then down to `keep`.

    The shares fall linearly and reach `keep` in the last layer. Layer 0 always works on everything,
    since nothing is known before it.

    Raises:
        ValueError: A share outside of (0, 1], or no layer that could be pruned.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"the share to keep is {keep}; it has to be above 0 and at most 1.")
    if first < 1:
        raise ValueError(f"the first pruned layer is {first}; layer 0 sees everything, so from 1.")
    if keep < 1 and first >= layers:
        raise ValueError(
            f"the first pruned layer is {first}, and the model's last one is {layers - 1}."
        )
    steps = max(layers - first, 1)
    return [1 - (1 - keep) * max(layer - first + 1, 0) / steps for layer in range(layers)]


def token_importance(
    attention: Float[Tensor, "batch heads queries keys"],
    asks: Bool[Tensor, "batch queries"] | None = None,
    *,
    causal: bool = False,
) -> Float[Tensor, "batch rows keys"]:
    r"""How much attention each key received, summed over heads and queries.

    $$s_k = \sum_h \sum_q P^{(h)}_{qk}$$

    In a causal model a key may only be judged by what has been asked so far: row $t$ of the result
    sums the queries up to $t$. Otherwise there is one row.

    Args:
        attention: Probabilities of one layer.
        asks: Which queries count: not padding, not tokens that have been pruned; all when None.
        causal: Whether each query gets its own sum.
    """
    mass = attention.sum(1)
    if asks is not None:
        mass = mass * asks[..., None]
    return mass.cumsum(1) if causal else mass.sum(1, keepdim=True)


def head_importance(
    outputs: Float[Tensor, "batch heads queries dim"],
    asks: Bool[Tensor, "batch queries"] | None = None,
    *,
    causal: bool = False,
) -> Float[Tensor, "batch rows heads"]:
    r"""How large the output of each head is: $\sum_q \lVert o^{(h)}_q \rVert_1$.

    Args:
        outputs: What the heads computed, before the output projection.
        asks: Which queries count; all when None.
        causal: As in `token_importance`.
    """
    size = outputs.abs().sum(-1).transpose(1, 2)
    if asks is not None:
        size = size * asks[..., None]
    return size.cumsum(1) if causal else size.sum(1, keepdim=True)


def evict(
    importance: Float[Tensor, "batch steps keys"],
    count: Int[Tensor, "batch steps"],
    allowed: Bool[Tensor, "batch steps keys"],
    newest: Int[Tensor, " steps"],
    before: Bool[Tensor, "batch keys"] | None = None,
) -> Bool[Tensor, "batch steps keys"]:
    """Which keys a causal model still has at each step; one that was dropped never comes back.

    Args:
        importance: Of each key at each step.
        count: How many keys to hold at each step.
        allowed: Keys that the layer before holds at that step.
        newest: The position that each step adds; it is always kept.
        before: Keys held before the first step; None when the steps begin with the text.
    """
    held = torch.zeros_like(allowed[:, 0]) if before is None else before
    rows = []
    for step, position in enumerate(newest.tolist()):
        added = torch.zeros_like(held)
        added[:, position] = True
        held = (held | added) & allowed[:, step]
        if (held.sum(-1) > count[:, step]).any():  # often there is room: ranking takes longest
            held = keep_top(importance[:, step], count[:, step], held, added)
        rows.append(held)
    return torch.stack(rows, 1)


def local_values(
    attention: Float[Tensor, "*batch queries keys"],
    keep: float,
    visible: Bool[Tensor, "*#batch queries keys"],
) -> Bool[Tensor, "*batch queries keys"]:
    r"""The values worth reading: for each query and head, its most probable share of the keys.

    The probabilities of the others count as 0, and the rest is not normalized again.

    Args:
        attention: Probabilities.
        keep: Share of the visible keys, rounded up.
        visible: Keys that the query attends to.

    Raises:
        ValueError: A share outside of (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"the share to keep is {keep}; it has to be above 0 and at most 1.")
    count = (keep * visible.sum(-1)).ceil().long()
    return keep_top(attention, count, visible)


def integer_codes(
    x: Float[Tensor, "batch heads tokens dim"], bits: int
) -> tuple[Float[Tensor, "batch heads tokens dim"], Float[Tensor, "batch heads tokens 1"]]:
    r"""Symmetric codes $c = \operatorname{round}(x/s)$ with a step $s$ for each head of each token.

    A step for several tokens would depend on tokens that a causal model has not seen yet.

    Returns:
        The codes, whole numbers from $-(2^{b-1}-1)$ to $2^{b-1}-1$ as floats, and the steps.
    """
    top = 2 ** (bits - 1) - 1
    step = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / top
    return (x / step).round().clamp(-top, top), step


def high_bits(codes: Float[Tensor, "*shape"], low_bits: int) -> Float[Tensor, "*shape"]:
    r"""The codes without their low bits, each read as the middle of what it may have been.

    $$\hat c = 2^l \lfloor c / 2^l \rfloor + \tfrac{1}{2}(2^l - 1)$$
    """
    cell = 2**low_bits
    return (codes / cell).floor() * cell + (cell - 1) / 2


def progressive(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch heads keys dim"],
    visible: Bool[Tensor, "#batch #heads queries keys"],
    *,
    msb_bits: int = 6,
    lsb_bits: int = 4,
    threshold: float = 0.1,
    scaling: float | None = None,
) -> tuple[Float[Tensor, "batch heads queries keys"], Bool[Tensor, "batch heads queries"]]:
    r"""Attention from the high bits of queries and keys, and from all bits where that is too flat.

    A softmax with one large probability forgives errors in its scores; a flat one does not. So if
    the largest probability of a query lies below `threshold`, the low bits are fetched too.

    Args:
        q: Queries.
        k: Keys.
        visible: Which keys each query attends to.
        msb_bits: High bits, read for all; at least 2.
        lsb_bits: Low bits, fetched on demand; at least 1.
        threshold: 0 never fetches them; above 1 always.
        scaling: Factor of the scores; $1/\sqrt{d}$ when None.

    Returns:
        Probabilities, and for which queries the low bits were fetched.

    Raises:
        ValueError: Too few bits, more than 16 together, or a negative threshold.
    """
    check_progressive(msb_bits, lsb_bits, threshold)
    factor = q.shape[-1] ** -0.5 if scaling is None else scaling
    (cq, sq), (ck, sk) = (integer_codes(x, msb_bits + lsb_bits) for x in (q, k))
    unit = factor * sq * sk.transpose(-1, -2)
    rough = high_bits(cq, lsb_bits) @ high_bits(ck, lsb_bits).transpose(-1, -2)
    coarse = probabilities(unit * rough, visible)
    fetched = coarse.amax(-1) < threshold
    fine = probabilities(unit * (cq @ ck.transpose(-1, -2)), visible)
    return torch.where(fetched[..., None], fine, coarse), fetched


def check_progressive(msb_bits: int, lsb_bits: int, threshold: float) -> None:
    """Raise a ValueError for parameters that `progressive` cannot work with."""
    if msb_bits < 2 or lsb_bits < 1 or msb_bits + lsb_bits > CODE_BITS:
        raise ValueError(
            f"{msb_bits} high and {lsb_bits} low bits; take at least 2 and 1, and at most "
            f"{CODE_BITS} together."
        )
    if threshold < 0:
        raise ValueError(f"the threshold is {threshold}; a probability is not below 0.")


# ---------------------------------------------------------------------------------- Energon


def filter_keys(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch heads keys dim"],
    visible: Bool[Tensor, "#batch #heads queries keys"],
    *,
    rounds: Sequence[int] = (2, 4),
    alpha: float = 0.0,
) -> list[Bool[Tensor, "batch heads queries keys"]]:
    r"""Energon's filtering in several rounds: the keys that are left after each round.

    Round $r$ multiplies queries and keys cut to its bits, and keeps the keys that reach

    $$\theta_r = \begin{cases} \alpha \max + (1-\alpha) \operatorname{mean} & \alpha \ge 0 \\
      -\alpha \min + (1+\alpha) \operatorname{mean} & \alpha < 0 \end{cases}$$

    with mean and extremes over the scores of those keys that are left. The best key always stays.

    Args:
        q: Queries.
        k: Keys.
        visible: Which keys each query may attend to.
        rounds: Bits of the operands in each round, each at least 2 and at most 16.
        alpha: From -1 (keep everything) over 0 (above the mean) to 1 (the best only).

    Raises:
        ValueError: No round, bits or alpha outside of their range.
    """
    check_rounds(rounds, alpha)
    (cq, _), (ck, step) = (integer_codes(x, CODE_BITS) for x in (q, k))
    left = visible.expand(*q.shape[:-1], k.shape[-2])
    found = []
    for bits in rounds:
        cut = CODE_BITS - bits
        a, b = (high_bits(c, cut) / 2**cut for c in (cq, ck))
        scores = a @ (b * step).transpose(-1, -2)  # the query's own step moves no threshold
        high = scores.masked_fill(~left, -torch.inf).amax(-1, keepdim=True)
        extreme = high
        if alpha < 0:
            extreme = scores.masked_fill(~left, torch.inf).amin(-1, keepdim=True)
        mean = (scores * left).sum(-1, keepdim=True) / left.sum(-1, keepdim=True).clamp(min=1)
        theta = abs(alpha) * extreme + (1 - abs(alpha)) * mean
        left = left & (scores >= torch.minimum(theta, high))
        found.append(left)
    return found


def check_rounds(rounds: Sequence[int], alpha: float) -> None:
    """Raise a ValueError for parameters that `filter_keys` cannot work with."""
    if not rounds or not all(2 <= bits <= CODE_BITS for bits in rounds):
        raise ValueError(
            f"the rounds are {tuple(rounds)}; give the bits of one round or more, each from 2 to "
            f"{CODE_BITS}."
        )
    if not -1 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; choose from -1 (all keys) to 1 (the best only).")


def top_recall(
    scores: Float[Tensor, "*batch queries keys"],
    selected: Bool[Tensor, "*#batch queries keys"],
    visible: Bool[Tensor, "*#batch queries keys"],
    k: int,
) -> tuple[Float[Tensor, "*batch queries"], Bool[Tensor, "*batch queries"]]:
    """The share of each query's k best keys that a selection holds.

    Args:
        scores: The true scores.
        selected: The selection.
        visible: Keys that there are to choose from.
        k: How many of the best count; at least 1.

    Returns:
        The shares, and which queries have more than k keys: the others have nothing to miss.

    Raises:
        ValueError: When k is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; at least the best key has to count.")
    visible = visible.expand_as(scores)
    ranked = scores.masked_fill(~visible, -torch.inf)
    best = ranked.topk(min(k, scores.shape[-1]), dim=-1).indices
    there = visible.gather(-1, best)
    hits = selected.expand_as(scores).gather(-1, best) & there
    return hits.sum(-1) / there.sum(-1).clamp(min=1), visible.sum(-1) > k
