r"""Expert choice: each expert takes the tokens that suit it best.

From $S = \operatorname{softmax}(X W_r)$, over experts, each expert takes the $C$ tokens with the
largest entries of its column:

$$C = \lfloor T c / E \rfloor, \qquad y_t = \sum_{e:\, t \in I_e} S_{te}\, \mathrm{FFN}_e(x_t),$$

where $c$ is the mean number of experts per token. All experts get the same number of tokens by
construction, so that no auxiliary loss is needed. A token may have any number of experts from 0 to
$E$: compute follows the input.

**It sees the future.** Which tokens an expert takes depends on all tokens of the group. In a causal
language model a later token can push an earlier one out: training then uses what generation does
not have. `leak_rate` counts how often. What avoids it: encoders, or groups of tokens at one
position of several texts.

Zhou et al., "Mixture-of-Experts with Expert Choice Routing", 2022, arXiv 2202.09368, eqs. 1-3.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from effnb.design.experts.routing import Routing, check_logits


def expert_choice(
    logits: Float[Tensor, "groups time experts"],
    capacity: int,
    *,
    text: Bool[Tensor, "groups time"] | None = None,
) -> Routing:
    """Each expert takes `capacity` tokens of each group, or all where there are fewer.

    Args:
        logits: The router's scores.
        capacity: Tokens that each expert takes of each group.
        text: Which tokens are text; None when all are. Padding is never taken.

    Raises:
        ValueError: A capacity below one token or above those of a group, or shapes that do not fit.
    """
    check_logits(logits, text)
    groups, time, count = logits.shape
    if not 1 <= capacity <= time:
        raise ValueError(
            f"the capacity is {capacity} tokens; of a group of {time} an expert can take from 1 to "
            f"{time}."
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    probabilities = wide.softmax(-1)  # S
    scores = probabilities
    if text is not None:
        scores = scores.masked_fill(~text[..., None], -1)
    gates, chosen = scores.transpose(1, 2).topk(capacity, dim=-1)  # G, I = topk(S^T, k)
    asked = gates >= 0
    start = torch.arange(groups, device=logits.device)[:, None, None] * time
    expert = torch.arange(count, device=logits.device)[None, :, None].expand_as(chosen)
    asked = asked.flatten()
    return Routing(
        logits, probabilities, (start + chosen).flatten(), expert.flatten(), gates.flatten(),
        asked, asked, text, capacity,
    )  # fmt: skip


def leak_rate(
    tokens: int, experts: int, capacity: int, *, trials: int = 1000, seed: int = 0
) -> float:
    """How often another last token changes which earlier tokens the experts take.

    Scores are random: of every trial, all tokens are routed once, and once more after the last
    token's scores were drawn again.

    Args:
        tokens: Tokens of the group.
        experts: Number of experts.
        capacity: Tokens that each takes.
        trials: How many groups are drawn.
        seed: Of the draws.

    Returns:
        The part of the trials in which an earlier token's experts changed.

    Raises:
        ValueError: Sizes below 1, or a capacity above the number of tokens.
    """
    if min(tokens, experts, trials) < 1:
        raise ValueError(
            f"there are {tokens} tokens, {experts} experts and {trials} trials; all must be at "
            "least 1."
        )
    draw = torch.Generator().manual_seed(seed)
    before = torch.randn(trials, tokens, experts, generator=draw)
    after = before.clone()
    after[:, -1] = torch.randn(trials, experts, generator=draw)
    taken = []
    for logits in (before, after):
        routing = expert_choice(logits, capacity)
        table = torch.zeros(trials * tokens, experts, dtype=torch.bool)
        table[routing.tokens, routing.experts] = True
        taken.append(table.view(trials, tokens, experts)[:, :-1])
    return float((taken[0] != taken[1]).flatten(1).any(1).float().mean())
