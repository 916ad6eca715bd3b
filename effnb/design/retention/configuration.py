r"""What the language models of this package have in common besides weights: sizes, states, calls.

A **twin** of a Llama is a model of another architecture with the same vocabulary, width and depth
and, within 3 %, as many parameters (`LMConfig.twin_of`): what is left over after the mixer goes to
the feed-forward layers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

WIDTHS = 8
"""Feed-forward layers of twins have a multiple of this many neurons."""
LayerState = dict[str, Tensor]
"""What one block keeps between tokens, by name; the first axis is the batch."""


@dataclass(frozen=True)
class LMConfig:
    """The sizes that all models have.

    Attributes:
        hidden: Width $d$ of the residual stream.
        layers: Number of blocks.
        feed_forward: Neurons of a block's feed-forward layer.
        vocabulary: Number of tokens.
    """

    hidden: int
    layers: int
    feed_forward: int
    vocabulary: int = 4096

    def __post_init__(self) -> None:
        """Refuse sizes below 1."""
        for name in ("hidden", "layers", "feed_forward", "vocabulary"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    @property
    def block_parameters(self) -> int:
        """Numbers of one block."""
        raise NotImplementedError

    @property
    def parameters(self) -> int:
        """Numbers of the whole model: the blocks, the tied embedding and the last norm."""
        d = self.hidden
        return self.vocabulary * d + self.layers * self.block_parameters + 2 * d

    @classmethod
    def twin_of(
        cls,
        hidden: int,
        feed_forward: int,
        layers: int,
        heads: int,
        kv_heads: int,
        vocabulary: int = 4096,
        *,
        own_heads: int | None = None,
        **settings: Any,
    ) -> LMConfig:
        """The model of this kind with about the parameters of a Llama of the given shape.

        Width and depth are the Llama's, and the heads where this kind has some; the feed-forward
        layer is as wide as the count allows, in multiples of 8.

        Args:
            hidden: Width of the Llama.
            feed_forward: Neurons of its feed-forward layer, which has three matrices.
            layers: Its blocks.
            heads: Its attention heads.
            kv_heads: Heads of its keys and values.
            vocabulary: Its tokens.
            own_heads: Heads of the twin where they are not to be as many as the Llama's.
            **settings: Other fields of this configuration.

        Raises:
            ValueError: When no width comes within 3 % of the Llama's count.
        """
        wanted = llama_parameters(hidden, feed_forward, layers, heads, kv_heads, vocabulary)
        if "heads" in {field.name for field in fields(cls)}:
            settings["heads"] = heads if own_heads is None else own_heads

        def sized(width: int) -> LMConfig:
            return cls(
                hidden=hidden,
                layers=layers,
                feed_forward=width,
                vocabulary=vocabulary,
                **settings,
            )

        least = sized(WIDTHS)
        each = sized(2 * WIDTHS).parameters - least.parameters
        steps = max(0, round((wanted - least.parameters) / each))
        twin = sized(WIDTHS * (1 + steps))
        if abs(twin.parameters - wanted) > 0.03 * wanted:
            raise ValueError(
                f"the smallest {cls.__name__} of this width and depth has {twin.parameters:,} "
                f"parameters, the Llama {wanted:,}; they must be within 3 %, so choose other "
                "settings."
            )
        return twin


def llama_parameters(
    hidden: int,
    feed_forward: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int = 4096,
) -> int:
    r"""$V d + L\,(2 d^2 + 2 d\,d_{kv} + 3 d f + 2 d) + d$: a Llama with a tied embedding."""
    narrow = hidden // heads * kv_heads
    block = 2 * hidden * (hidden + narrow) + 3 * hidden * feed_forward + 2 * hidden
    return vocabulary * hidden + layers * block + hidden


@dataclass(frozen=True)
class ModelState:
    """All that a model keeps of the tokens that it has read.

    Attributes:
        config: Configuration of the model that it belongs to; another one is refused by it.
        position: Tokens read, padding on the left included.
        layers: Tensors of each block.
    """

    config: LMConfig
    position: int
    layers: tuple[LayerState, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.values())


@dataclass(frozen=True)
class Call:
    """What the blocks have to know of one pass.

    Attributes:
        form: Form of the mixer.
        position: Position of the first token in the whole text.
        mask: Which tokens are text; None when all are.
    """

    form: str
    position: int = 0
    mask: Bool[Tensor, "batch time"] | None = None

    def hide(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        """Zeros in the place of padding."""
        return x if self.mask is None else x * self.mask[..., None].to(x.dtype)
