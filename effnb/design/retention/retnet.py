r"""RetNet: a Transformer whose attention is multi-scale retention.

Each head has its own decay and is normalized separately, because heads with longer memories give
larger sums. A gate adds the non-linearity that the softmax would have brought:

$$\mathrm{head}_h = \mathrm{Retention}(X W_Q^h, X W_K^h, X W_V^h; \gamma_h), \qquad
  Y = \mathrm{GroupNorm}_H(\mathrm{head}_1, \dots, \mathrm{head}_H),$$

$$\mathrm{MSR}(X) = \big(\operatorname{swish}(X W_G) \odot Y\big)\, W_O .$$

$W_Q$ and $W_K$ are $d \times d$; $W_V$ and $W_G$ are $d \times 2d$, $W_O$ is $2d \times d$: $8 d^2$
numbers, and with a feed-forward layer of $2d$ neurons $12 d^2$, as many as a Transformer's block.
A block is $X \leftarrow X + \mathrm{MSR}(\mathrm{LN}(X))$, then
$X \leftarrow X + \mathrm{FFN}(\mathrm{LN}(X))$ with GELU.

Sun, Dong, Huang, Ma, Xia, Xue, Wang, Wei, "Retentive Network: A Successor to Transformer for Large
Language Models", 2023, arXiv 2307.08621. The initial weights are those of the published code.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from effnb.design.retention.configuration import Call, LayerState, LMConfig
from effnb.design.retention.language_model import RecurrentLM
from effnb.design.retention.retention import (
    FORMS,
    NORMALIZATIONS,
    decays,
    retention,
    rotate,
    rotation_frequencies,
)

HEAD_NORMS = ("group", "rms", "none")


@dataclass(frozen=True)
class RetNetConfig(LMConfig):
    r"""Sizes and settings of a RetNet.

    Attributes:
        heads: Retention heads $H$; `hidden / heads` is $d_k$, an even number.
        value_factor: Values are so many times as wide as queries and keys.
        decay: Decays of the heads: "paper", "lm" or one number, see `retention.decays`.
        rotation: "retnet" or "rope", see `retention.rotation_frequencies`; "none" turns nothing.
        chunk_size: Tokens of a chunk of the chunkwise form. None leaves them to the kernel, which
            knows the type: 128 in 16 bits, 64 in 32. They change the speed, not the result, unless
            `normalize` asks for factors of chunks.
        gate: Whether the outputs are gated.
        head_norm: "group" (without mean and to variance 1, per head and token, no gains), "rms"
            (to mean square 1), or "none".
        norm_epsilon: $\epsilon$ inside that norm.
        normalize: Normalizations of the scores, see `retention.retention`; None, or the three forms
            disagree where outputs are small beside $\sqrt\epsilon$.
    """

    heads: int = 4
    value_factor: int = 2
    decay: str | float = "paper"
    rotation: str = "retnet"
    chunk_size: int | None = None
    gate: bool = True
    head_norm: str = "group"
    norm_epsilon: float = 1e-6
    normalize: str | None = None

    def __post_init__(self) -> None:
        """Refuse heads that cannot be, and settings that do not exist."""
        super().__post_init__()
        if self.heads < 1 or self.hidden % self.heads:
            raise ValueError(
                f"a width of {self.hidden} cannot be split among {self.heads} heads; it must be a "
                "multiple of them."
            )
        decays(self.heads, self.decay)
        if self.rotation != "none":
            rotation_frequencies(self.head_size, self.rotation)
        if self.value_factor < 1 or (self.chunk_size is not None and self.chunk_size < 1):
            raise ValueError(
                f"value_factor is {self.value_factor} and chunk_size {self.chunk_size}; both must "
                "be at least 1."
            )
        if self.head_norm not in HEAD_NORMS:
            raise ValueError(f"head_norm is {self.head_norm!r}; choose {', '.join(HEAD_NORMS)}.")
        if not self.norm_epsilon >= 0:
            raise ValueError(f"norm_epsilon is {self.norm_epsilon}; it must be at least 0.")
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(
                f'normalize is {self.normalize!r}; choose "paper", "absolute" or None.'
            )

    @property
    def head_size(self) -> int:
        """$d_k$, numbers of a query or key."""
        return self.hidden // self.heads

    @property
    def block_parameters(self) -> int:
        """Numbers of one block."""
        d, wide = self.hidden, self.value_factor * self.hidden
        return 2 * d * d + (2 + self.gate) * d * wide + 2 * d * self.feed_forward + 4 * d


class MultiScaleRetention(nn.Module):
    """The layer: projections, rotation, retention, norm per head, gate.

    Args:
        config: Sizes and settings.
    """

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        self.config = config
        d, wide = config.hidden, config.value_factor * config.hidden
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, wide, bias=False)
        self.gate = nn.Linear(d, wide, bias=False) if config.gate else None
        self.output = nn.Linear(wide, d, bias=False)
        for layer in (self.query, self.key, self.value, self.gate):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.output.weight)

    def initial_state(self, zeros: Float[Tensor, " batch"]) -> LayerState:
        """$S = 0$."""
        size = self.config.head_size
        wide = self.config.value_factor * size
        return {"S": zeros.new_zeros(len(zeros), self.config.heads, size, wide)}

    def forward(
        self, x: Float[Tensor, "batch time hidden"], state: LayerState, call: Call
    ) -> tuple[Float[Tensor, "batch time hidden"], LayerState]:
        """MSR of the tokens after those in the state, and the state after them."""
        config, heads = self.config, self.config.heads
        x = call.hide(x)
        q, k, v = (
            layer(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if config.rotation != "none":
            q, k = rotate(q, k, call.position, config.rotation)
        out, S = retention(
            q,
            k,
            v,
            decays(heads, config.decay),
            form=call.form,
            chunk_size=config.chunk_size,
            initial_state=state["S"],
            normalize=config.normalize,
            seen=call.position,
        )
        y = self.norm_heads(out).transpose(1, 2).flatten(2)  # Y = GroupNorm_H(heads)
        if self.gate is not None:
            y = nn.functional.silu(self.gate(x)) * y  # swish(X W_G) ⊙ Y
        return self.output(y), {"S": S}

    def norm_heads(
        self, out: Float[Tensor, "batch heads time dim"]
    ) -> Float[Tensor, "batch heads time dim"]:
        """Each head's output of each token normalized by itself, without gains."""
        size, epsilon = out.shape[-1:], self.config.norm_epsilon
        if self.config.head_norm == "group":
            return nn.functional.layer_norm(out, size, eps=epsilon)
        if self.config.head_norm == "rms":
            return nn.functional.rms_norm(out, size, eps=epsilon)
        return out


class RetNetBlock(nn.Module):
    """Retention, then a feed-forward layer, each after a norm and beside a residual stream.

    Args:
        config: Sizes and settings.
        layer: Number of the block; blocks do not differ.
    """

    def __init__(self, config: RetNetConfig, layer: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden)
        self.retention = MultiScaleRetention(config)
        self.norm2 = nn.LayerNorm(config.hidden)
        self.feed_forward = feed_forward(config.hidden, config.feed_forward)

    def initial_state(self, zeros: Float[Tensor, " batch"]) -> LayerState:
        """That of the retention layer."""
        return self.retention.initial_state(zeros)

    def forward(
        self, x: Float[Tensor, "batch time hidden"], state: LayerState, call: Call
    ) -> tuple[Float[Tensor, "batch time hidden"], LayerState]:
        """The residual stream after the block, and the state after the tokens."""
        y, state = self.retention(self.norm1(x), state, call)
        x = x + y  # X ← X + MSR(LN(X))
        return x + self.feed_forward(self.norm2(x)), state  # X ← X + FFN(LN(X))


def feed_forward(hidden: int, neurons: int) -> nn.Sequential:
    """Two matrices without biases, with GELU in between."""
    layers = nn.Linear(hidden, neurons, bias=False), nn.Linear(neurons, hidden, bias=False)
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


class RetNetLM(RecurrentLM):
    """RetNet as a language model, with a state of constant size.

    Args:
        config: A `RetNetConfig`.
    """

    config_class = RetNetConfig
    block_class = RetNetBlock
    forms = FORMS
