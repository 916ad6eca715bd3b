r"""RWKV-4: a language model of weighted running averages, with five vectors of state per layer.

Both layers of a block see each token mixed with the one before it, with separate weights for each
purpose: $\tilde x_t = \mu \odot x_t + (1 - \mu) \odot x_{t-1}$, with $x_0 = 0$. The **time mix** is

$$r = \sigma(W_r \tilde x^r),\quad k = W_k \tilde x^k,\quad v = W_v \tilde x^v, \qquad
  \mathrm{out} = W_o\,(r \odot \mathrm{wkv}),$$

with the averages of `wkv`. The **channel mix** is
$\sigma(W_r \tilde x^r) \odot W_v \max(W_k \tilde x^k, 0)^2$. A block adds both to the residual
stream, each after a layer norm; one more norm follows the embedding.

The state of a layer is the last inputs of the two mixes and the (a, b, p) of the averages: $5d$
numbers in float32, where retention keeps $2 d\,d_k$.

The initial decays, bonuses and mixes, and which matrices start at 0, are those of the published
code. There, the embedding starts at $10^{-4}$ and the head has a separate matrix; here they share
one, which starts at 0.02.

Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", 2023, arXiv 2305.13048.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.design.retention.configuration import Call, LayerState, LMConfig
from effnb.design.retention.language_model import RecurrentLM
from effnb.design.retention.wkv import EMPTY, FORMS, wkv


@dataclass(frozen=True)
class RWKVConfig(LMConfig):
    """Sizes of an RWKV-4; the paper's feed-forward layer has 4 times the width."""

    @property
    def block_parameters(self) -> int:
        """Numbers of one block; those of the norm after the embedding are not among them."""
        d = self.hidden
        return 5 * d * d + 2 * d * self.feed_forward + 11 * d

    @property
    def parameters(self) -> int:
        """Numbers of the whole model."""
        return super().parameters + 2 * self.hidden


def initial_mix(hidden: int, layer: int, layers: int) -> dict[str, Float[Tensor, " hidden"]]:
    r"""The parameters of a time mix before training.

    For channel $c$ of $d$ in layer $l$ of $N$, with $\rho = l / (N - 1)$ (0 for a single layer):
    decay $-5 + 8\,(c / (d-1))^{0.7 + 1.3 \rho}$, first
    $\ln 0.3 + \frac12\,(((c + 1) \bmod 3) - 1)$, mixes $\mu^k = (c/d)^{1 - l/N}$,
    $\mu^v = \mu^k + 0.3 \rho$ and $\mu^r = (c/d)^{(1 - l/N)/2}$.
    """
    c = torch.arange(hidden, dtype=torch.float64)
    rho = layer / max(layers - 1, 1)
    rest = 1 - layer / layers
    mix = (c / hidden) ** rest
    found = {
        "decay": -5 + 8 * (c / max(hidden - 1, 1)) ** (0.7 + 1.3 * rho),
        "first": math.log(0.3) + 0.5 * ((c + 1) % 3 - 1),
        "key": mix,
        "value": mix + 0.3 * rho,
        "receptance": (c / hidden) ** (0.5 * rest),
    }
    return {name: tensor.to(torch.get_default_dtype()) for name, tensor in found.items()}


def token_shift(
    x: Float[Tensor, "batch time hidden"], last: Float[Tensor, "batch hidden"]
) -> Float[Tensor, "batch time hidden"]:
    """Every token's predecessor; that of the first is `last`."""
    return torch.cat([last[:, None].to(x.dtype), x[:, :-1]], 1)


def _mixed(x: Tensor, before: Tensor, mu: Tensor) -> Tensor:
    return mu * x + (1 - mu) * before  # μ ∘ x_t + (1 − μ) ∘ x_{t−1}


class TimeMix(nn.Module):
    """Averages over time, gated by a receptance.

    Args:
        config: Sizes.
        layer: Number of the block, on which the initial values depend.
    """

    def __init__(self, config: RWKVConfig, layer: int) -> None:
        super().__init__()
        d = config.hidden
        start = initial_mix(d, layer, config.layers)
        self.time_decay = nn.Parameter(start["decay"])
        self.time_first = nn.Parameter(start["first"])
        self.mix_key = nn.Parameter(start["key"])
        self.mix_value = nn.Parameter(start["value"])
        self.mix_receptance = nn.Parameter(start["receptance"])
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.receptance = nn.Linear(d, d, bias=False)
        self.output = nn.Linear(d, d, bias=False)
        nn.init.orthogonal_(self.value.weight)
        for layer_from_zero in (self.key, self.receptance, self.output):
            nn.init.zeros_(layer_from_zero.weight)

    def forward(
        self, x: Float[Tensor, "batch time hidden"], state: LayerState, call: Call
    ) -> tuple[Float[Tensor, "batch time hidden"], LayerState]:
        """Outputs, and the parts of the state that this layer has."""
        x = call.hide(x)
        before = token_shift(x, state["time_shift"])
        k = self.key(_mixed(x, before, self.mix_key))
        v = self.value(_mixed(x, before, self.mix_value))
        r = torch.sigmoid(self.receptance(_mixed(x, before, self.mix_receptance)))
        if call.mask is not None:  # padding has no weight, rather than that of a key of 0
            k = k.to(state["p"].dtype).masked_fill(~call.mask[..., None], EMPTY)
        sums = state["a"], state["b"], state["p"]
        averages, sums = wkv(self.time_decay.exp(), self.time_first, k, v, sums, form=call.form)
        last = x[:, -1].to(state["time_shift"].dtype)
        return self.output(r * averages), {"time_shift": last, **dict(zip("abp", sums))}


class ChannelMix(nn.Module):
    """The feed-forward layer, of each token and its predecessor.

    Args:
        config: Sizes.
        layer: Number of the block, on which the initial values depend.
    """

    def __init__(self, config: RWKVConfig, layer: int) -> None:
        super().__init__()
        d, wide = config.hidden, config.feed_forward
        start = initial_mix(d, layer, config.layers)["key"]
        self.mix_key = nn.Parameter(start)
        self.mix_receptance = nn.Parameter(start.clone())
        self.key = nn.Linear(d, wide, bias=False)
        self.receptance = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(wide, d, bias=False)
        nn.init.orthogonal_(self.key.weight, gain=math.sqrt(max(1, wide / d)))
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.value.weight)

    def forward(
        self, x: Float[Tensor, "batch time hidden"], state: LayerState, call: Call
    ) -> tuple[Float[Tensor, "batch time hidden"], LayerState]:
        """Outputs, and the part of the state that this layer has."""
        x = call.hide(x)
        before = token_shift(x, state["channel_shift"])
        k = torch.relu(self.key(_mixed(x, before, self.mix_key))).square()
        r = torch.sigmoid(self.receptance(_mixed(x, before, self.mix_receptance)))
        last = x[:, -1].to(state["channel_shift"].dtype)
        return r * self.value(k), {"channel_shift": last}


class RWKVBlock(nn.Module):
    """Time mix, then channel mix; the first block begins with a norm of the embedding.

    Args:
        config: Sizes.
        layer: Number of the block.
    """

    def __init__(self, config: RWKVConfig, layer: int) -> None:
        super().__init__()
        d = config.hidden
        self.norm0 = nn.LayerNorm(d) if layer == 0 else None
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.time_mix, self.channel_mix = TimeMix(config, layer), ChannelMix(config, layer)
        self.width = d

    def initial_state(self, zeros: Float[Tensor, " batch"]) -> LayerState:
        """Five vectors: of nothing."""
        names = ("time_shift", "a", "b", "p", "channel_shift")
        state = {name: zeros.new_zeros(len(zeros), self.width) for name in names}
        return state | {"p": state["p"] + EMPTY}

    def forward(
        self, x: Float[Tensor, "batch time hidden"], state: LayerState, call: Call
    ) -> tuple[Float[Tensor, "batch time hidden"], LayerState]:
        """The residual stream after the block, and the state after the tokens."""
        if self.norm0 is not None:
            x = self.norm0(x)
        y, time = self.time_mix(self.norm1(x), state, call)
        x = x + y
        y, channel = self.channel_mix(self.norm2(x), state, call)
        return x + y, time | channel


class RWKVLM(RecurrentLM):
    """RWKV-4 as a language model, with a state of constant size.

    Args:
        config: An `RWKVConfig`.
    """

    config_class = RWKVConfig
    block_class = RWKVBlock
    forms = FORMS
