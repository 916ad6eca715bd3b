r"""Perceiver: a small array of latent vectors reads the input, and all depth is spent on it.

A learned array $Z \in \mathbb{R}^{N \times D}$ of $N$ latents asks an input
$X \in \mathbb{R}^{M \times C}$, then $L$ self-attention blocks work on the latents:

$$Z \leftarrow \text{CrossAttention}(Z, X), \qquad Z \leftarrow \text{SelfAttention}_\ell(Z),
  \quad \ell = 1, \dots, L.$$

Both may be repeated, with the same weights or with others. The cost is $O(MN + L N^2)$ where a
Transformer's is $O(L M^2)$: depth does not depend on the length of the input.

Without positions in $X$ the result is a function of a *set*: the order of the inputs does not
matter. Latents are not causal: every one reads the whole input.

Jaegle, Gimeno, Brock, Zisserman, Vinyals, Carreira, "Perceiver: General Perception with Iterative
Attention", ICML 2021, arXiv 2103.03206, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.design.attention.checks import check_count, check_heads, check_mask
from effnb.design.sharing.cross_attention import Attention


@dataclass(frozen=True)
class PerceiverConfig:
    """Sizes and settings of the encoder.

    Attributes:
        inputs: Channels C of the input.
        latents: N.
        hidden: Channels D of a latent.
        self_attends: L, self-attention blocks after each cross-attention.
        heads: Heads of self-attention.
        cross_heads: Heads of cross-attention.
        cross_width: Channels of all heads of cross-attention; the input's where None.
        repeats: How often the L blocks follow one another, with the same weights.
        cross_attends: How often the latents read the input, each time followed by the blocks.
        shared: Whether later readings use the weights of the first, and their blocks too.
        widening: Neurons of a feed-forward layer as a multiple of its channels.
    """

    inputs: int
    latents: int
    hidden: int
    self_attends: int
    heads: int = 1
    cross_heads: int = 1
    cross_width: int | None = None
    repeats: int = 1
    cross_attends: int = 1
    shared: bool = True
    widening: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be."""
        for name in ("inputs", "latents", "hidden", "repeats", "cross_attends", "widening"):
            check_count(name, getattr(self, name))
        check_count("self_attends", self.self_attends, least=0)
        check_heads(self.hidden, self.heads)
        check_heads(self.cross, self.cross_heads)

    @property
    def cross(self) -> int:
        """Channels of all heads of cross-attention."""
        return self.inputs if self.cross_width is None else self.cross_width

    @property
    def parameters(self) -> int:
        """Numbers of the encoder, shared ones once."""
        D, C = self.hidden, self.inputs
        copies = 1 if self.shared else self.cross_attends
        cross = layer_parameters(D, C, self.cross, self.cross, self.widening) + 2 * C
        tower = self.self_attends * layer_parameters(D, D, D, D, self.widening)
        return self.latents * D + copies * (cross + tower)


def layer_parameters(width: int, context: int, qk: int, v: int, widening: int) -> int:
    """Numbers of attention, its feed-forward layer and two norms; weights and biases."""
    attention = (width + 1) * qk + (context + 1) * (qk + v) + (v + 1) * width
    neurons = widening * width
    return attention + (width + 1) * neurons + (neurons + 1) * width + 4 * width


class PerceiverLayer(nn.Module):
    """Attention and a feed-forward layer, each after a norm; self-attention where `context` is 0.

    Args:
        width: Channels of what asks.
        context: Channels of the array that is read; 0 where it is the asking array itself.
        heads: Attention heads.
        qk_width: Channels of queries and keys.
        v_width: Channels of values.
        widening: Neurons per channel of the feed-forward layer.
        query_residual: Whether attention's output is added to what asks. Without it, as in the
            decoder of Perceiver IO for text, queries only say *where* to read.
    """

    def __init__(
        self,
        width: int,
        context: int,
        heads: int,
        qk_width: int,
        v_width: int,
        widening: int,
        query_residual: bool = True,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.context_norm = nn.LayerNorm(context) if context else None
        self.attention = Attention(width, context or width, heads, qk_width, v_width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, widening * width), nn.GELU(), nn.Linear(widening * width, width)
        )
        self.query_residual = query_residual

    def forward(
        self,
        x: Float[Tensor, "batch queries width"],
        context: Float[Tensor, "batch keys context"] | None = None,
        mask: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch queries width"]:
        """What asks, after having read and thought."""
        asked = self.norm(x)
        read = asked if self.context_norm is None else self.context_norm(context)
        out = self.attention(asked, read, mask)
        x = x + out if self.query_residual else out
        return x + self.mlp(self.mlp_norm(x))


class Perceiver(nn.Module):
    """The encoder: from an input of any length to N latents.

    Args:
        config: Sizes and settings. Weights are random, by PyTorch's global seed.
    """

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(0.02 * torch.randn(config.latents, config.hidden))
        crosses = [self._cross() for _ in range(1 if config.shared else config.cross_attends)]
        towers = [self._tower() for _ in range(1 if config.shared else config.cross_attends)]
        # Shared modules stand in several places: one object in every entry.
        self.cross = nn.ModuleList(crosses * (config.cross_attends // len(crosses)))
        self.towers = nn.ModuleList(towers * (config.cross_attends // len(towers)))

    def _cross(self) -> PerceiverLayer:
        c = self.config
        return PerceiverLayer(c.hidden, c.inputs, c.cross_heads, c.cross, c.cross, c.widening)

    def _tower(self) -> nn.ModuleList:
        c = self.config
        return nn.ModuleList(
            PerceiverLayer(c.hidden, 0, c.heads, c.hidden, c.hidden, c.widening)
            for _ in range(c.self_attends)
        )

    def forward(
        self,
        inputs: Float[Tensor, "batch length channels"],
        mask: Tensor | None = None,
    ) -> Float[Tensor, "batch latents hidden"]:
        """The latents after all readings.

        Args:
            inputs: X; what it says of its positions has to be in it.
            mask: True where a row of the input is not padding, (batch, length).

        Raises:
            ValueError: Another number of channels, no input, or a mask that does not fit.
        """
        if inputs.shape[-1] != self.config.inputs or not inputs.shape[1]:
            raise ValueError(
                f"the inputs are of shape {tuple(inputs.shape)}; they must be (batch, length, "
                f"{self.config.inputs}), with at least one row."
            )
        check_mask("mask", mask, inputs.shape[:2])
        z = self.latents.repeat(len(inputs), 1, 1)
        for cross, tower in zip(self.cross, self.towers):
            z = cross(z, inputs, mask)  # Z <- CA(Z, X)
            for _ in range(self.config.repeats):
                for layer in tower:
                    z = layer(z)  # Z <- SA_l(Z)
        return z
