r"""A layer of experts in the place of a feed-forward layer, through one grouped product.

$$y_t = \sum_{e \in \text{experts of } t} g_{te}\; W^\text{down}_e \bigl(\sigma(W^\text{gate}_e x_t)
  \circ W^\text{up}_e x_t\bigr)$$

The experts' matrices are fused: `gate_up_proj` holds all gates and ups, (experts, 2 width, hidden),
`down_proj` is (experts, hidden, width). Assignments are sorted by
expert, so that the tokens of one lie together, and two grouped products do all of the work; dropped
ones and padding come last and give 0.

Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
2017, arXiv 1701.06538, eq. 1. Gated experts: Du et al., "GLaM", 2022, arXiv 2112.06905.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnb.design.experts.entmax_routing import entmax_routing
from effnb.design.experts.expert_choice import expert_choice
from effnb.design.experts.routing import Routing, check_k, expert_capacity, top_k
from effnb.design.experts.switch import jitter, switch
from effnb.design.experts.top2 import glam, gshard
from effnb.kernels.grouped_matmul import grouped_matmul

METHODS = ("switch", "top-k", "glam", "gshard", "expert choice", "entmax")
GROUPS = ("batch", "sequence", "position")


@dataclass(frozen=True)
class RoutingSettings:
    """How tokens find experts.

    Attributes:
        method: One of `METHODS`. "switch" is top-1 with its probability as the gate; "top-k" is
            Mixtral's, gates divided by their sum; "glam" and "gshard" are its form for k = 2, the
            latter with second choices made at random in training.
        k: Choices of each token; for "expert choice" the mean number of experts of a token. It
            is 1 for "switch", 2 for "glam" and "gshard", and not used by "entmax".
        capacity_factor: Seats of an expert in training over its fair share; None for no limit,
            which "expert choice" does not have.
        evaluation_factor: The same in evaluation, where an expert has one seat at least; None for
            no limit. "expert choice" keeps the
            factor of training: another would be another method.
        jitter: Noise on the router's inputs in training.
        group: What shares seats: all tokens of a "batch", those of a "sequence", or those at one
            "position" of all sequences.
        alpha: Entmax's exponent.
    """

    method: str = "switch"
    k: int = 1
    capacity_factor: float | None = 1.25
    evaluation_factor: float | None = 2.0
    jitter: float = 0.0
    group: str = "batch"
    alpha: float = 1.5

    def __post_init__(self) -> None:
        """Refuse settings that do not belong together."""
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; choose of {', '.join(METHODS)}.")
        if self.group not in GROUPS:
            raise ValueError(f"group is {self.group!r}; choose of {', '.join(GROUPS)}.")
        fixed = {"switch": 1, "glam": 2, "gshard": 2}.get(self.method, self.k)
        if self.k != fixed:
            raise ValueError(f"k is {self.k}; {self.method} has k = {fixed}.")
        if self.k < 1:
            raise ValueError(f"k is {self.k}; a token needs one choice at least.")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter is {self.jitter}; it must lie from 0 to below 1.")
        for name in ("capacity_factor", "evaluation_factor"):
            factor = getattr(self, name)
            if factor is not None and not factor > 0:
                raise ValueError(f"{name} is {factor}; it must be above 0, or None for no limit.")
        if self.method == "expert choice" and self.capacity_factor is None:
            raise ValueError(
                "expert choice needs a capacity_factor: it is how many tokens an expert takes."
            )

    def route(
        self,
        logits: Float[Tensor, "groups time experts"],
        text: Bool[Tensor, "groups time"] | None = None,
        *,
        training: bool = False,
    ) -> Routing:
        """The assignments of some tokens, whose groups are already those of the seats.

        Raises:
            ValueError: More choices than experts, or a capacity below one token.
        """
        time, experts = logits.shape[1:]
        fixed = training or self.method == "expert choice"
        factor = self.capacity_factor if fixed else self.evaluation_factor
        seats = None
        if self.method != "entmax":
            check_k(self.k, experts)
            if factor is not None and not fixed and self.k * factor * time < experts:
                seats = 1  # text that is written token by token: one token always has a seat
            elif factor is not None:
                seats = expert_capacity(time, experts, factor, self.k)
        if self.method == "expert choice":
            return expert_choice(logits, seats, text=text)
        if self.method == "entmax":
            return entmax_routing(logits, alpha=self.alpha, text=text)
        if self.method == "gshard" and training:
            draws = torch.rand(logits.shape[:2], device=logits.device)
            return gshard(logits, text=text, capacity=seats, draws=draws)
        if self.method == "top-k":
            return top_k(logits, self.k, text=text, capacity=seats)
        return {"switch": switch, "glam": glam, "gshard": gshard}[self.method](
            logits, text=text, capacity=seats
        )


SWITCH = RoutingSettings()
MIXTRAL = RoutingSettings("top-k", 2, capacity_factor=None, evaluation_factor=None)


class FusedExperts(nn.Module):
    """The matrices of all experts in two parameters, laid out as transformers fuses Mixtral's.

    `effnb.core.linear_form` therefore takes them apart for every method that compresses linear
    layers, and puts them together again.

    Args:
        hidden: Width of a token.
        width: Inner width of an expert.
        experts: How many there are.
        activation: What the gate passes through.
    """

    has_gate, is_transposed = True, False
    holds_own_weights = True
    """Its matrices are the model's own, not something small put beside them: methods that compress
    weights and leave these out have to say so."""

    def __init__(self, hidden: int, width: int, experts: int, activation: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.act_fn = activation

    def _apply_gate(self, inner: Float[Tensor, "rows twice"]) -> Float[Tensor, "rows width"]:
        gate, up = inner.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        chosen: Int[Tensor, "tokens places"],
        weights: Float[Tensor, "tokens places"],
    ) -> Float[Tensor, "tokens hidden"]:
        """The sum of each token's experts, times their gates; 0 for a token without any.

        Args:
            hidden_states: The tokens.
            chosen: The experts of each; their number in a place without one.
            weights: The gates, of the same shape.
        """
        count, places = len(self.down_proj), chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)  # places without an expert come last
        ends = chosen.flatten().bincount(minlength=count + 1)[:count].cumsum(0)
        if ends.device.type == "cpu":  # a GPU would have to wait for the number
            order = order[: int(ends[-1])]
        token = order // places
        rows = hidden_states.index_select(0, token)
        inner = self._apply_gate(grouped_matmul(rows, self.gate_up_proj, ends))
        y = grouped_matmul(inner, self.down_proj, ends)
        gates = weights.flatten()[order, None].to(y.dtype)
        if torch.is_grad_enabled():
            return torch.zeros_like(hidden_states).index_add(0, token, y * gates)
        return torch.zeros_like(hidden_states).index_add_(0, token, y.mul_(gates))


class ExpertLayer(nn.Module):
    """A router and its experts.

    Args:
        hidden: Width of a token.
        width: Inner width of an expert.
        experts: How many there are.
        settings: How tokens find them.
        activation: What the gate passes through.

    Attributes:
        last: The routing of the last call, for losses and pictures; not copied, not saved.
        text: Which tokens are text, (batch, time); set for each call by the model around it.

    Raises:
        ValueError: More choices than experts, or sizes below 1.
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        experts: int,
        settings: RoutingSettings = SWITCH,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if min(hidden, width, experts) < 1:
            raise ValueError(
                f"the sizes are {hidden}, {width} and {experts} experts; all must be at least 1."
            )
        if settings.method != "entmax":
            check_k(settings.k, experts)
        self.settings = settings
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = FusedExperts(hidden, width, experts, activation or nn.SiLU())
        self.width = width
        self.last: Routing | None = None
        self.text: Bool[Tensor, "batch time"] | None = None
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to the last call."""
        return self.__dict__ | {"last": None, "text": None}

    @property
    def count(self) -> int:
        """How many experts there are."""
        return self.router.out_features

    @property
    def share_active(self) -> float:
        """Part of the experts' weights that a token meets: k of E, and all of entmax's at most."""
        return 1.0 if self.settings.method == "entmax" else self.settings.k / self.count

    def forward(self, x: Float[Tensor, "batch time hidden"]) -> Float[Tensor, "batch time hidden"]:
        """The layer's output; a token without a seat gets 0."""
        batch, time, hidden = x.shape
        text = self.text if self.text is not None and self.text.shape == (batch, time) else None
        shape = {"batch": (1, batch * time), "sequence": (batch, time), "position": (time, batch)}
        by_position = self.settings.group == "position"
        rows = x.transpose(0, 1) if by_position else x
        rows = rows.reshape(*shape[self.settings.group], hidden)
        if text is not None:
            text = (text.T if by_position else text).reshape(rows.shape[:2])
        # Scores in float32 at least: a softmax in half precision rounds small differences away.
        wide = torch.promote_types(x.dtype, torch.float32)
        noisy = jitter(rows, self.settings.jitter) if self.training else rows
        logits = nn.functional.linear(noisy.to(wide), self.router.weight.to(wide))
        routing = self.settings.route(logits, text, training=self.training)
        self.last = routing
        y = self.experts(rows.reshape(-1, hidden), *routing.table())
        if by_position:
            return y.view(time, batch, hidden).transpose(0, 1)
        return y.view(batch, time, hidden)

    def extra_repr(self) -> str:
        """Its sizes, as a printed model shows them."""
        return f"{self.count} experts of width {self.width}, {self.settings.method}"
