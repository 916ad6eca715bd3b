r"""What routers share: who goes to which expert with what weight, and who finds a seat.

A router scores every token against $E$ experts, $\ell = x W_r$, in float32. A method then makes a
list of **assignments**: token, expert, and the weight (gate) of the expert's output. Experts may
have a limited number of seats for each group of tokens,

$$C = \lfloor k\, f\, T / E \rfloor,$$

with $T$ tokens in the group, $k$ choices of each and the capacity factor $f$. A token that comes
after the last seat is dropped: the layer gives 0, and only the residual connection carries the
token on. Padding is never assigned, takes no seat, and counts in no balance.

Fedus, Zoph, Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models with Simple and
Efficient Sparsity", 2022, arXiv 2101.03961. Lepikhin et al., "GShard", 2020, arXiv 2006.16668.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot


@dataclass(frozen=True)
class Routing:
    """The assignments of one call of a layer.

    Tokens are counted through all groups: token t of group g is g times the group's length plus t.

    Attributes:
        logits: The router's scores.
        probabilities: What the method made of them, one distribution for each token.
        tokens: The token of each assignment.
        experts: Its expert.
        gates: The weight of the expert's output.
        asked: Whether there is a token to assign; false for padding.
        kept: Whether it found a seat.
        text: Which tokens are text; None where all are.
        capacity: Seats of an expert in each group; None where they are not limited.
        choices: How many assignments each token has, where all have as many and the list holds for
            each group all first ones, then all second ones, and so on; None otherwise.
    """

    logits: Float[Tensor, "groups time experts"]
    probabilities: Float[Tensor, "groups time experts"]
    tokens: Int[Tensor, " assignments"]
    experts: Int[Tensor, " assignments"]
    gates: Float[Tensor, " assignments"]
    asked: Bool[Tensor, " assignments"]
    kept: Bool[Tensor, " assignments"]
    text: Bool[Tensor, "groups time"] | None = None
    capacity: int | None = None
    choices: int | None = None

    @property
    def count(self) -> int:
        """How many experts there are."""
        return self.logits.shape[-1]

    @property
    def wanted(self) -> Int[Tensor, " experts"]:
        """Assignments that each expert was asked for, before any was dropped."""
        return self.experts[self.asked].bincount(minlength=self.count)

    @property
    def load(self) -> Int[Tensor, " experts"]:
        """Assignments that each expert works on."""
        return self.experts[self.kept].bincount(minlength=self.count)

    @property
    def dropped(self) -> float:
        """Part of the assignments that found their expert full."""
        asked = int(self.asked.sum())
        return 1 - int(self.kept.sum()) / asked if asked else 0.0

    @property
    def experts_of_token(self) -> Int[Tensor, "groups time"]:
        """How many experts work on each token."""
        groups, time, _ = self.logits.shape
        return self.tokens[self.kept].bincount(minlength=groups * time).view(groups, time)

    def table(
        self,
    ) -> tuple[Int[Tensor, "tokens places"], Float[Tensor, "tokens places"]]:
        """The kept assignments by token: experts, `count` in a place without one, and gates."""
        groups, time, _ = self.logits.shape
        if self.choices is not None:  # they are in order: nothing has to be sorted
            shape = groups, self.choices, time
            experts = self.experts.masked_fill(~self.kept, self.count)
            gates = self.gates.masked_fill(~self.kept, 0)
            by_token = (t.view(shape).transpose(1, 2).flatten(0, 1) for t in (experts, gates))
            return tuple(by_token)
        order = self.tokens.masked_fill(~self.kept, groups * time).argsort(stable=True)
        order = order[: int(self.kept.sum())]
        token = self.tokens[order]
        many = token.bincount(minlength=groups * time)
        place = torch.arange(len(token), device=token.device) - (many.cumsum(0) - many)[token]
        shape = groups * time, max(int(many.max()) if len(many) else 0, 1)
        experts = token.new_full(shape, self.count)
        experts[token, place] = self.experts[order]
        gates = self.gates.new_zeros(shape).index_put((token, place), self.gates[order])
        return experts, gates

    @property
    def imbalance(self) -> float:
        """The largest number of assignments wanted of an expert, over their mean; 1 is balance."""
        wanted = self.wanted.float()
        return float(wanted.max() / wanted.mean()) if bool(wanted.any()) else 1.0


def check_logits(
    logits: Float[Tensor, "groups time experts"], text: Bool[Tensor, "groups time"] | None
) -> None:
    """Refuse scores that no token can be routed by.

    Raises:
        ValueError: Another number of axes, no experts, or a mask of another shape.
    """
    if logits.ndim != 3 or not logits.shape[-1]:
        raise ValueError(
            f"the scores have shape {tuple(logits.shape)}; they must be (groups, time, experts), "
            "with one expert at least."
        )
    if text is not None and text.shape != logits.shape[:2]:
        raise ValueError(
            f"the mask has shape {tuple(text.shape)}; for scores of shape {tuple(logits.shape)} it "
            f"must be {tuple(logits.shape[:2])}."
        )


def check_k(k: int, experts: int) -> None:
    """Refuse a number of choices that there are no experts for.

    Raises:
        ValueError: Below 1, or above the number of experts.
    """
    if not 1 <= k <= experts:
        raise ValueError(
            f"k is {k}; with {experts} expert{'s' * (experts > 1)} a token can choose from 1 to "
            f"{experts}."
        )


def expert_capacity(tokens: int, experts: int, factor: float, k: int = 1) -> int:
    r"""Seats of an expert in each group of tokens, $\lfloor k f T / E \rfloor$, at most $T$.

    Source: Fedus et al. 2022, eq. 3, rounded down as in the authors' code; padding counts as
    tokens here, so that shapes do not depend on the text.

    Args:
        tokens: $T$, tokens of a group.
        experts: $E$.
        factor: $f$; 1 is enough where all experts are asked for equally often.
        k: Choices of each token.

    Raises:
        ValueError: A factor that is not above 0, or a capacity below one token.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"the capacity factor is {factor}; it must be above 0.")
    seats = k * factor * tokens / experts
    if seats < 1:
        raise ValueError(
            f"{tokens} tokens, {experts} experts and the capacity factor {factor:g} leave "
            f"{seats:.2g} of a token for each expert; take larger groups, or a factor of "
            f"{experts / (k * max(tokens, 1)):.2g} at least."
        )
    return min(tokens, math.floor(seats))


def find_seats(
    experts: Int[Tensor, "groups queue"],
    asked: Bool[Tensor, "groups queue"],
    count: int,
    capacity: int | None,
) -> Bool[Tensor, "groups queue"]:
    """Who finds a seat, first come, first served within each group.

    Args:
        experts: Whom each assignment of the queue wants.
        asked: Which of them are there; the others take no seat.
        count: How many experts there are.
        capacity: Seats of each; None for as many as are asked for.
    """
    if capacity is None:
        return asked
    waiting = one_hot(experts, count) * asked[..., None]
    place = (waiting.cumsum(1) * waiting).sum(-1)  # 1 for the first in the queue
    return asked & (place <= capacity)


def top_k(
    logits: Float[Tensor, "groups time experts"],
    k: int,
    *,
    text: Bool[Tensor, "groups time"] | None = None,
    capacity: int | None = None,
    normalize: bool = True,
    used: Bool[Tensor, "groups time k"] | None = None,
) -> Routing:
    r"""Each token to the k experts that are most probable.

    Probabilities are $p = \operatorname{softmax}(\ell)$. All first choices of a group take their
    seats before any second choice, and so on. With `normalize` the k gates are divided by their
    sum, as in GShard, GLaM and Mixtral; without, they are the probabilities themselves, as in
    Switch.

    Args:
        logits: The router's scores.
        k: Choices of each token.
        text: Which tokens are text; None when all are.
        capacity: Seats of each expert in each group; None for no limit.
        normalize: Whether the gates of a token sum to 1. With k = 1 the gate is then constant, and
            no gradient of the loss reaches the router.
        used: Which choices are made at all; None for all. Gates are those of before.

    Raises:
        ValueError: More choices than experts, or shapes that do not fit.
    """
    check_logits(logits, text)
    groups, time, count = logits.shape
    check_k(k, count)
    probabilities = (
        logits.float().softmax(-1) if logits.dtype != torch.float64 else logits.softmax(-1)
    )
    gates, chosen = probabilities.topk(k, dim=-1)
    if normalize:
        gates = gates / gates.sum(-1, keepdim=True)
    there = torch.ones_like(chosen, dtype=torch.bool) if used is None else used
    if text is not None:
        there = there & text[..., None]
    # The queue of a group: all first choices, then all second ones.
    queue = [t.transpose(1, 2).reshape(groups, k * time) for t in (chosen, gates, there)]
    chosen, gates, there = queue
    kept = find_seats(chosen, there, count, capacity)
    token = torch.arange(groups * time, device=logits.device).view(groups, 1, time)
    token = token.expand(groups, k, time)
    return Routing(
        logits, probabilities, token.flatten(), chosen.flatten(), gates.flatten(),
        there.flatten(), kept.flatten(), text, capacity, k,
    )  # fmt: skip
