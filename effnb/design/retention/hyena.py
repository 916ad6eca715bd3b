r"""Hyena: attention's place taken by long convolutions and products of streams.

A linear layer and a short convolution make $N + 1$ streams of the input, $x^0, \dots, x^{N-1}$ and
$v$, where $N$ is the order. Then, as in the published code, with $z = v$ and for
$n = N - 1, \dots, 1$,

$$z \leftarrow h^n * (x^n \odot z) + b^n \odot (x^n \odot z), \qquad y = x^0 \odot z ,$$

with filters $h^n$ over the whole text (`long_convolution`), and a last linear layer. At $N = 2$
that is one long convolution between two gates. Training takes $O(N d\, T \log T)$.

**It has no recurrence of constant size.** A new token needs the convolution's whole past: a step of
decoding takes $T$ multiply-adds per channel and filter, and a state that grows with the text, as
attention does. And filters are functions of time in parts of the length $L$ that the model was made
for: a longer text is refused.

Poli et al., "Hyena Hierarchy: Towards Larger Convolutional Language Models", 2023, arXiv
2302.10866.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.design.retention.configuration import Call, LayerState, LMConfig
from effnb.design.retention.language_model import RecurrentLM
from effnb.design.retention.long_convolution import (
    ImplicitFilter,
    fft_convolution,
    last_outputs,
    time_features,
)
from effnb.design.retention.retnet import feed_forward

SHORT = 3
"""Taps of the short convolution."""


@dataclass(frozen=True)
class HyenaConfig(LMConfig):
    r"""Sizes and settings of a Hyena.

    Attributes:
        max_length: $L$, tokens that the filters are made for; no text can be longer.
        order: $N$, from 2: gates, and one more than there are long convolutions.
        filter_width: Neurons of the network that makes the filters.
        filter_layers: Its hidden layers besides the first one.
        filter_features: Numbers by which it is told the time; odd, from 3.
        filter_frequency: $\omega$ of its sines before training.
        slow: Part of $L$ after which the slowest window is down to 0.01.
        fast: The same of the fastest one.
    """

    max_length: int = 512
    order: int = 2
    filter_width: int = 64
    filter_layers: int = 2
    filter_features: int = 33
    filter_frequency: float = 1.0
    slow: float = 1.5
    fast: float = 0.3

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be."""
        super().__post_init__()
        if self.order < 2:
            raise ValueError(f"order is {self.order}; it must be at least 2.")
        if self.max_length < 2 or self.filter_width < 1 or self.filter_layers < 0:
            raise ValueError(
                f"max_length is {self.max_length}, filter_width {self.filter_width} and "
                f"filter_layers {self.filter_layers}; they must be at least 2, 1 and 0."
            )
        if not (self.slow > 0 and self.fast > 0):
            raise ValueError(f"slow is {self.slow} and fast {self.fast}; both must be above 0.")
        time_features(2, self.filter_features)

    @property
    def block_parameters(self) -> int:
        """Numbers of one block."""
        d, width, filters = self.hidden, self.filter_width, (self.order - 1) * self.hidden
        streams = (self.order + 1) * d
        network = (self.filter_features + 1) * width + self.filter_layers * (width + 1) * width
        convolutions = SHORT * streams + network + width + width * filters + filters
        return streams * d + d * d + convolutions + 2 * d * self.feed_forward + 4 * d


class HyenaOperator(nn.Module):
    """The layer: streams, gates and long convolutions. Nothing has a bias but the filter's network.

    Args:
        config: Sizes and settings.
    """

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        self.config = config
        d, streams = config.hidden, (config.order + 1) * config.hidden
        self.streams = nn.Linear(d, streams, bias=False)
        self.short = nn.Conv1d(streams, streams, SHORT, groups=streams, bias=False)
        self.filter = ImplicitFilter(
            (config.order - 1) * d,
            config.max_length,
            width=config.filter_width,
            inner_layers=config.filter_layers,
            features=config.filter_features,
            frequency=config.filter_frequency,
            slow=config.slow,
            fast=config.fast,
        )
        self.bias = nn.Parameter(torch.randn(config.order - 1, d))
        self.output = nn.Linear(d, d, bias=False)

    def initial_state(self, zeros: Float[Tensor, " batch"]) -> LayerState:
        """Of nothing: zeros before the short convolution, no past of the long ones."""
        d, order = self.config.hidden, self.config.order
        return {
            "short": zeros.new_zeros(len(zeros), SHORT - 1, (order + 1) * d),
            "past": zeros.new_zeros(len(zeros), 0, (order - 1) * d),
        }

    def forward(
        self, x: Float[Tensor, "batch time hidden"], state: LayerState, call: Call
    ) -> tuple[Float[Tensor, "batch time hidden"], LayerState]:
        """Outputs, and the state: all inputs of the long convolutions so far, and the filters.

        Raises:
            ValueError: When the text is longer than the filters.
        """
        config, tokens = self.config, x.shape[1]
        if call.position + tokens > config.max_length:
            raise ValueError(
                f"the text would have {call.position + tokens} tokens; the filters of this model "
                f"are made for {config.max_length}, and mean something else at another length."
            )
        u = self.streams(call.hide(x))
        u = torch.cat([state["short"].to(u.dtype), u], 1)
        short = u[:, -(SHORT - 1) :].to(state["short"].dtype)
        *gates, z = self.short(u.mT).mT.split(config.hidden, dim=2)  # x⁰, …, x^(N−1), and v
        h = state.get("filters")
        h = self.filter() if h is None else h
        pasts = state["past"].split(config.hidden, dim=2)
        inputs = []
        for n in range(config.order - 1, 0, -1):
            z = gates[n] * z
            part = slice((n - 1) * config.hidden, n * config.hidden)
            inputs.insert(0, torch.cat([pasts[n - 1], z.to(pasts[n - 1].dtype)], 1))
            if call.form == "parallel":
                far = fft_convolution(inputs[0], h[:, part])[:, -tokens:]
            else:
                far = last_outputs(inputs[0], h[:, part].to(inputs[0].dtype), tokens)
            z = far.to(z.dtype) + self.bias[n - 1] * z  # z ← h * (x z) + b (x z)
        y = self.output(gates[0] * z)  # y = x⁰ z
        return y, {"short": short, "past": torch.cat(inputs, 2), "filters": h}


class HyenaBlock(nn.Module):
    """The operator, then a feed-forward layer, each after a norm and beside a residual stream.

    Args:
        config: Sizes and settings.
        layer: Number of the block; blocks do not differ.
    """

    def __init__(self, config: HyenaConfig, layer: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden)
        self.operator = HyenaOperator(config)
        self.norm2 = nn.LayerNorm(config.hidden)
        self.feed_forward = feed_forward(config.hidden, config.feed_forward)

    def initial_state(self, zeros: Float[Tensor, " batch"]) -> LayerState:
        """That of the operator."""
        return self.operator.initial_state(zeros)

    def forward(
        self, x: Float[Tensor, "batch time hidden"], state: LayerState, call: Call
    ) -> tuple[Float[Tensor, "batch time hidden"], LayerState]:
        """The residual stream after the block, and the state after the tokens."""
        y, state = self.operator(self.norm1(x), state, call)
        x = x + y
        return x + self.feed_forward(self.norm2(x)), state


class HyenaLM(RecurrentLM):
    """Hyena as a language model; its state grows with the text.

    Args:
        config: A `HyenaConfig`.
    """

    config_class = HyenaConfig
    block_class = HyenaBlock
    forms = ("parallel", "recurrent")
