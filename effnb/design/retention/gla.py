r"""Gated linear attention (GLA): retention whose decay depends on the data, per key dimension.

With gates $\alpha_t \in (0, 1)^{d_k}$ and $s = 1 / \sqrt{d_k}$,

$$S_t = \operatorname{diag}(\alpha_t)\, S_{t-1} + k_t^\top v_t, \qquad o_t = s\, q_t S_t .
  \tag{recurrent}$$

With $b_t = \sum_{r \le t} \ln \alpha_r$, unrolled:

$$o_t = s \sum_{m \le t} \Big(\sum_c q_{tc}\, k_{mc}\, e^{b_{tc} - b_{mc}}\Big)\, v_m .
  \tag{parallel}$$

The decay of a pair is $e^{b_t - b_m} \le 1$. A matrix product would need it split into $e^{b_t}$
and $e^{-b_m}$, and the second factor overflows on long texts. So the differences are taken first.
They are $T^2 d_k$ numbers; the chunkwise form needs them within chunks only.

One constant $\gamma$ as all gates makes it retention without rotation, and gates of 1 linear
attention without a denominator. In the layer,
$\alpha_t = \sigma(x_t W_1 W_2 + b)^{1/16}$ with $W_1$ of rank 16; each head's output is normalized
by its root mean square and gated by a swish.

Yang, Wang, Shen, Panda, Kim, "Gated Linear Attention Transformers with Hardware-Efficient
Training", 2023, arXiv 2312.06635.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.design.retention.configuration import Call, LayerState, LMConfig
from effnb.design.retention.language_model import RecurrentLM
from effnb.design.retention.precision import no_autocast, wide

FORMS = ("chunkwise", "parallel", "recurrent")
TEMPERATURE = 16
"""The root that gates are taken of, which brings them near 1."""


def gla(
    q: Float[Tensor, "batch heads time dim_k"],
    k: Float[Tensor, "batch heads time dim_k"],
    v: Float[Tensor, "batch heads time dim_v"],
    log_gate: Float[Tensor, "batch heads time dim_k"],
    *,
    form: str = "chunkwise",
    chunk_size: int = 16,
    initial_state: Float[Tensor, "batch heads dim_k dim_v"] | None = None,
) -> tuple[Float[Tensor, "batch heads time dim_v"], Float[Tensor, "batch heads dim_k dim_v"]]:
    r"""Gated linear attention of all heads, in the form that is asked for.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        log_gate: $\ln \alpha$, at most 0.
        form: "parallel" ($T^2 d_k$ numbers), "recurrent" (token by token) or "chunkwise".
        chunk_size: Tokens of a chunk; the last one is as short as it is, and one larger than the
            text makes it the parallel form.
        initial_state: $S$ before the first token; zeros by default.

    Returns:
        Outputs in the values' type, and the state after the last token, in float32 (float64 for
        float64 values).

    Raises:
        ValueError: Shapes that do not fit each other, a gate above 1, an unknown form, or a chunk
            of less than one token.
    """
    if form not in FORMS:
        raise ValueError(f"the form is {form!r}; choose {', '.join(FORMS)}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; a chunk must have at least 1 token.")
    size = (*q.shape[:2], q.shape[-1], v.shape[-1])
    fits = q.shape == k.shape == log_gate.shape and q.shape[:-1] == v.shape[:-1]
    if not fits or (initial_state is not None and tuple(initial_state.shape) != size):
        raise ValueError(
            f"q, k, v and log_gate have the shapes {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)} and {tuple(log_gate.shape)}; they must be (batch, heads, time, "
            f"dim_k), v (batch, heads, time, dim_v), and a state {size}."
        )
    if log_gate.device.type == "cpu" and bool((log_gate > 0).any()):
        raise ValueError(
            "a log_gate is above 0; a gate is what a token keeps of the past, so at most 1."
        )
    queries, keys, values, gates = (x.to(wide(v)) for x in (q, k, v, log_gate))
    state = values.new_zeros(size) if initial_state is None else initial_state.to(wide(v))
    tokens = q.shape[2]
    step = {"parallel": max(tokens, 1), "recurrent": 1, "chunkwise": chunk_size}[form]
    run = _token if form == "recurrent" else _chunk
    outputs = [values[:, :, :0]]
    # Split at once: the gradient of a slice is as long as the text, for every chunk
    for part in zip(*(x.split(step, dim=2) for x in (queries, keys, values, gates)), strict=True):
        with no_autocast(v):
            out, state = run(*part, state)
        outputs.append(q.shape[-1] ** -0.5 * out)
    return torch.cat(outputs, 2).to(v.dtype), state


def _token(q, k, v, log_gate, state):
    """One token: forget, take in the new outer product, and only then read."""
    state = log_gate.exp().mT * state + k.mT @ v  # S_t = diag(α_t) S_{t−1} + k_tᵀ v_t
    return q @ state, state


def _chunk(q, k, v, log_gate, state):
    """Outputs of one chunk without the scale, and the state after it."""
    b = log_gate.cumsum(2)
    index = torch.arange(q.shape[2], device=q.device)
    future = index[:, None] < index
    # Masked before the exponential, which would be infinite for the future
    difference = (b[:, :, :, None] - b[:, :, None]).masked_fill(future[..., None], -torch.inf)
    scores = torch.einsum("bhtc,bhmc,bhtmc->bhtm", q, k, difference.exp())
    out = scores @ v + (q * b.exp()) @ state
    last = b[:, :, -1:]
    return out, last.exp().mT * state + (k * (last - b).exp()).mT @ v


@dataclass(frozen=True)
class GLAConfig(LMConfig):
    """Sizes of a GLA.

    Attributes:
        heads: Heads; they split the width, and half of it for queries and keys.
        gate_rank: Rank of the gates' projection.
        chunk_size: Tokens of a chunk of the chunkwise form.
        norm_epsilon: Inside the norm of each head.
    """

    heads: int = 4
    gate_rank: int = 16
    chunk_size: int = 16
    norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        """Refuse heads that cannot be."""
        super().__post_init__()
        if self.heads < 1 or self.hidden % (2 * self.heads):
            raise ValueError(
                f"half of a width of {self.hidden} cannot be split among {self.heads} heads; the "
                "width must be a multiple of twice their number."
            )
        if self.gate_rank < 1 or self.chunk_size < 1:
            raise ValueError(
                f"gate_rank is {self.gate_rank} and chunk_size {self.chunk_size}; both must be at "
                "least 1."
            )

    @property
    def block_parameters(self) -> int:
        """Numbers of one block."""
        d, narrow = self.hidden, self.hidden // 2
        gates = self.gate_rank * (d + narrow) + narrow
        return 2 * d * narrow + 3 * d * d + gates + 3 * d * self.feed_forward + 4 * d


class GatedLinearAttention(nn.Module):
    """The layer: projections, gates of low rank, the mixer, norm per head, swish gate.

    Args:
        config: Sizes.
    """

    def __init__(self, config: GLAConfig) -> None:
        super().__init__()
        self.config = config
        d, narrow = config.hidden, config.hidden // 2
        self.query = nn.Linear(d, narrow, bias=False)
        self.key = nn.Linear(d, narrow, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.gate = nn.Linear(d, d, bias=False)
        self.output = nn.Linear(d, d, bias=False)
        self.decay = nn.Sequential(
            nn.Linear(d, config.gate_rank, bias=False), nn.Linear(config.gate_rank, narrow)
        )

    def initial_state(self, zeros: Float[Tensor, " batch"]) -> LayerState:
        """$S = 0$."""
        heads, d = self.config.heads, self.config.hidden
        return {"S": zeros.new_zeros(len(zeros), heads, d // 2 // heads, d // heads)}

    def forward(
        self, x: Float[Tensor, "batch time hidden"], state: LayerState, call: Call
    ) -> tuple[Float[Tensor, "batch time hidden"], LayerState]:
        """Outputs of the tokens after those in the state, and the state after them."""
        config = self.config
        x = call.hide(x)
        # α = σ(x W₁ W₂ + b)^(1/16)
        log_gate = nn.functional.logsigmoid(self.decay(x).to(state["S"].dtype)) / TEMPERATURE
        q, k, v, log_gate = (
            y.unflatten(-1, (config.heads, -1)).transpose(1, 2)
            for y in (self.query(x), self.key(x), self.value(x), log_gate)
        )
        out, S = gla(
            q,
            k,
            v,
            log_gate,
            form=call.form,
            chunk_size=config.chunk_size,
            initial_state=state["S"],
        )
        out = nn.functional.rms_norm(out, out.shape[-1:], eps=config.norm_epsilon)
        y = nn.functional.silu(self.gate(x)) * out.transpose(1, 2).flatten(2)
        return self.output(y), {"S": S}


class SwiGLU(nn.Module):
    r"""The feed-forward layer $(\operatorname{swish}(x W_G) \odot x W_U)\, W_D$.

    Args:
        hidden: Width.
        neurons: Products in the middle.
    """

    def __init__(self, hidden: int, neurons: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, neurons, bias=False)
        self.up = nn.Linear(hidden, neurons, bias=False)
        self.down = nn.Linear(neurons, hidden, bias=False)

    def forward(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """The layer's output."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class GLABlock(nn.Module):
    """The mixer, then a feed-forward layer, each after a norm and beside a residual stream.

    Args:
        config: Sizes.
        layer: Number of the block; blocks do not differ.
    """

    def __init__(self, config: GLAConfig, layer: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden)
        self.attention = GatedLinearAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden)
        self.feed_forward = SwiGLU(config.hidden, config.feed_forward)

    def initial_state(self, zeros: Float[Tensor, " batch"]) -> LayerState:
        """That of the mixer."""
        return self.attention.initial_state(zeros)

    def forward(
        self, x: Float[Tensor, "batch time hidden"], state: LayerState, call: Call
    ) -> tuple[Float[Tensor, "batch time hidden"], LayerState]:
        """The residual stream after the block, and the state after the tokens."""
        y, state = self.attention(self.norm1(x), state, call)
        x = x + y
        return x + self.feed_forward(self.norm2(x)), state


class GLALM(RecurrentLM):
    """Gated linear attention as a language model, with a state of constant size.

    Args:
        config: A `GLAConfig`.
    """

    config_class = GLAConfig
    block_class = GLABlock
    forms = FORMS
