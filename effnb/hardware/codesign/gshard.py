r"""A layer of experts in the manner of GShard: two experts for each token, capacity, three einsums.

Each token goes to two of $E$ experts. Tokens come in groups of $S$, and in each group an expert
takes at most $C = \lceil 2 f S / E \rceil$ of them: the capacity makes all shapes fixed, so that
the layer is three einsums that a compiler can split. On $D$ devices each holds $E/D$ experts and
its share of the groups. Between the first two einsums lies an all-to-all that takes tokens to
their experts, and before the third one that takes them back:

$$\text{bytes sent by a device} = \frac{D-1}{D}\,E\,C\,G_d\,d\,b \approx
  \frac{D-1}{D}\,k f\,\text{tokens}_d\; d\,b, \qquad k = 2.$$

`expert_parallel` runs it with real processes.

Lepikhin, Lee, Xu, Chen, Firat, Huang, Krikun, Shazeer, Chen, "GShard: Scaling Giant Models with
Conditional Computation and Automatic Sharding", 2020, arXiv 2006.16668.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# ------------------------------------------------------------------------------------ gating


@dataclass(frozen=True)
class Routing:
    """Where the tokens of some groups go.

    Attributes:
        combine: Weight of expert e's slot c for token s, (groups, tokens, experts, capacity).
        auxiliary_loss: GShard's loss for balance, one number: 1/E when perfectly balanced.
        dropped_choices: Choices that found their expert full.
        lost_tokens: Tokens that no expert works on; only a residual connection keeps them.
        skipped_seconds: Second choices that were given up at random, before capacity.
        load: Tokens that chose each expert first, summed over groups.
    """

    combine: Float[Tensor, "groups tokens experts capacity"]
    auxiliary_loss: Float[Tensor, ""]
    dropped_choices: int
    lost_tokens: int
    skipped_seconds: int
    load: tuple[int, ...]

    @property
    def dispatch(self) -> Bool[Tensor, "groups tokens experts capacity"]:
        """Which slot of which expert each token takes."""
        return self.combine > 0


def capacity(tokens: int, experts: int, factor: float = 1.0) -> int:
    r"""Tokens of one group that an expert takes at most: $\lceil 2 f S / E \rceil$.

    Raises:
        ValueError: A size below 1, or a factor that is not above 0.
    """
    if tokens < 1 or experts < 2:
        raise ValueError(f"{tokens} tokens and {experts} experts; take at least 1 and 2.")
    if factor <= 0:
        raise ValueError(f"the capacity factor is {factor}; it has to be above 0.")
    return min(tokens, math.ceil(2 * factor * tokens / experts))


def route(
    logits: Float[Tensor, "groups tokens experts"],
    slots: int,
    *,
    draws: Float[Tensor, "groups tokens"] | None = None,
) -> Routing:
    r"""GShard's gating: two experts for each token, as long as there is room.

    The gates are a softmax over all experts; the two largest, $g_1$ and $g_2$, are divided by their
    sum. All first choices of a group are seated before any second choice, in the order of the
    tokens; who finds the expert full is dropped. The auxiliary loss is

    $$\ell = \frac{1}{E} \sum_e \frac{c_e}{S}\, m_e$$

    with $c_e$ the first choices for expert $e$ (before capacity) and $m_e$ its mean gate, averaged
    over groups.

    Args:
        logits: The router's scores.
        slots: Capacity of an expert for each group.
        draws: Uniform random numbers. A second choice is kept with a probability proportional to
            its gate, $\min(1, 2 g_2)$: where the draw lies below it. When None, all are kept.

    Raises:
        ValueError: Fewer than two experts, or no slots.
    """
    experts = logits.shape[-1]
    if experts < 2 or slots < 1:
        raise ValueError(f"{experts} experts of {slots} slots; take at least 2 of at least 1.")
    gates = logits.float().softmax(-1)
    best, chosen = gates.topk(2, dim=-1)
    best = best / best.sum(-1, keepdim=True)
    first, second = (torch.nn.functional.one_hot(c, experts) for c in chosen.unbind(-1))
    loss = (first.float().mean(1) * gates.mean(1)).sum(-1).mean() / experts
    skipped = torch.zeros_like(best[..., 1], dtype=torch.bool)
    if draws is not None:
        skipped = draws >= 2 * best[..., 1]
        second = second * ~skipped[..., None]
    # A place in the queue before each expert, counted within the group, first choices before all.
    place_first = (first.cumsum(1) - first) * first
    place_second = (second.cumsum(1) - second + first.sum(1, keepdim=True)) * second
    combine = 0
    seated = []
    for choice, place, gate in (
        (first, place_first, best[..., 0]),
        (second, place_second, best[..., 1]),
    ):
        kept = choice * (place < slots)
        seat = torch.nn.functional.one_hot((place * kept).sum(-1), slots)
        combine = combine + (gate[..., None] * kept)[..., None] * seat[..., None, :]
        seated.append(kept.sum(-1).bool())
    asked = int(first.sum() + second.sum())
    found = int(seated[0].sum() + seated[1].sum())
    lost = int((~seated[0] & ~seated[1]).sum())
    load = tuple(first.sum((0, 1)).tolist())
    return Routing(combine, loss, asked - found, lost, int(skipped.sum()), load)


# ----------------------------------------------------------------------------------- experts


@dataclass(frozen=True)
class Experts:
    """The weights of a layer of experts.

    Attributes:
        router: (model, experts).
        up: (experts, model, hidden).
        down: (experts, hidden, model).
    """

    router: Float[Tensor, "model all_experts"]
    up: Float[Tensor, "experts model hidden"]
    down: Float[Tensor, "experts hidden model"]

    @classmethod
    def random(
        cls, experts: int, model: int, hidden: int, *, seed: int = 0, dtype: Any = torch.float32
    ) -> Experts:
        """Random weights whose outputs are about as large as their inputs."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) / shape[-2] ** 0.5).to(dtype)

        return cls(
            normal(model, experts), normal(experts, model, hidden), normal(experts, hidden, model)
        )

    def part(self, device: int, devices: int) -> Experts:
        """The experts that one of several devices holds; all of them hold the router.

        Raises:
            ValueError: When the experts cannot be shared equally.
        """
        count = len(self.up)
        if devices < 1 or count % devices:
            raise ValueError(
                f"{count} experts cannot be shared equally by {devices} devices; take a divisor."
            )
        each = count // devices
        mine = slice(device * each, (device + 1) * each)
        return Experts(self.router, self.up[mine].contiguous(), self.down[mine].contiguous())


def run_experts(
    inputs: Float[Tensor, "experts slots model"],
    up: Float[Tensor, "experts model hidden"],
    down: Float[Tensor, "experts hidden model"],
) -> Float[Tensor, "experts slots model"]:
    r"""Each expert on its own tokens: $\operatorname{relu}(x W_{up})\, W_{down}$."""
    return (inputs @ up).relu() @ down


def dense_loop(x: Float[Tensor, "tokens model"], experts: Experts) -> Float[Tensor, "tokens model"]:
    """The layer without capacity, token by token: what every other form is checked against."""
    gates = (x @ experts.router).float().softmax(-1)
    rows = []
    for token, gate in zip(x, gates):
        best, chosen = gate.topk(2)
        share = best / best.sum()
        out = [(token @ experts.up[e]).relu() @ experts.down[e] for e in chosen.tolist()]
        rows.append((share[0] * out[0] + share[1] * out[1]).to(x.dtype))
    return torch.stack(rows)


# -------------------------------------------------------------------------------- the layer

Exchange = Callable[[Tensor], Tensor]
"""An all-to-all: part i of the first axis goes to device i, and part i of the result is from it."""


def moe_layer(
    x: Float[Tensor, "groups tokens model"],
    experts: Experts,
    slots: int,
    *,
    devices: int = 1,
    exchange: Exchange | None = None,
    draws: Float[Tensor, "groups tokens"] | None = None,
) -> tuple[Float[Tensor, "groups tokens model"], Routing]:
    """What one device does with its groups and its experts.

    Args:
        x: The groups of this device.
        experts: The experts of this device, and the whole router.
        slots: Capacity of an expert for each group.
        devices: How many devices there are.
        exchange: The all-to-all between them; not needed for one.
        draws: See `route`.

    Returns:
        The layer's output (dropped tokens give 0), and the routing.

    Raises:
        ValueError: Several devices without an exchange.
    """
    if devices > 1 and exchange is None:
        raise ValueError(f"{devices} devices have to exchange tokens; give an exchange.")
    groups, _, model = x.shape
    each = len(experts.up)
    routing = route(x @ experts.router, slots, draws=draws)
    dispatch = routing.dispatch.to(x.dtype)
    sent = torch.einsum("gsec,gsm->egcm", dispatch, x)  # tokens in the order of the experts
    if devices > 1:
        sent = exchange(sent.reshape(devices, each, groups, slots, model).contiguous())
        sent = sent.transpose(0, 1)  # my experts first, then where their tokens come from
    inputs = sent.reshape(each, devices * groups * slots, model)
    outputs = run_experts(inputs, experts.up, experts.down)
    if devices > 1:
        back = outputs.reshape(each, devices, groups, slots, model).transpose(0, 1)
        outputs = exchange(back.contiguous())
    outputs = outputs.reshape(devices * each, groups, slots, model)
    return torch.einsum("gsec,egcm->gsm", routing.combine.to(x.dtype), outputs), routing


def exchange_bytes(
    groups: int, slots: int, experts: int, model: int, devices: int, *, bytes_per_number: int = 4
) -> float:
    """Bytes that one device sends to others in one all-to-all, empty slots included.

    Args:
        groups: Groups of this device.
        slots: Capacity of an expert for each group.
        experts: Experts of all devices together.
        model: Width of a token.
        devices: How many devices there are.
        bytes_per_number: 4 for float32.
    """
    return groups * slots * experts * model * bytes_per_number * (devices - 1) / devices


def expert_operations(groups: int, slots: int, experts: int, model: int, hidden: int) -> int:
    """Operations of the experts for one device's share, empty slots included: they cost as much."""
    return 4 * groups * slots * experts * model * hidden
