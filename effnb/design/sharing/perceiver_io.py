r"""Perceiver IO: outputs of any shape, read from the latents by queries.

A query for each output, $O \in \mathbb{R}^{T \times E}$, asks the latents $Z$ once:
$Y = \text{CrossAttention}(O, Z)$, which costs $O(T N)$. For text a query says which position is
wanted: `PerceiverMLM` fills in masked tokens so.

Jaegle, Borgeaud, Alayrac, Doersch, Ionescu, Ding, Koppula, Zoran, Brock, Shelhamer, Hénaff,
Botvinick, Zisserman, Vinyals, Carreira, "Perceiver IO: A General Architecture for Structured Inputs
& Outputs", ICLR 2022, arXiv 2107.14795, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.design.attention.checks import check_count, check_heads
from effnb.design.sharing.inputs import check_ids
from effnb.design.sharing.perceiver import (
    Perceiver,
    PerceiverConfig,
    PerceiverLayer,
    layer_parameters,
)


@dataclass(frozen=True)
class PerceiverIOConfig:
    """Sizes and settings of the decoder.

    Attributes:
        encoder: Of the encoder.
        outputs: Channels E of a query, and of what it gets.
        heads: Heads of the decoder's cross-attention.
        qk_width: Channels of its queries and keys; E where None.
        query_residual: Whether the answer is added to the query.
        widening: Neurons per channel of its feed-forward layer.
    """

    encoder: PerceiverConfig
    outputs: int
    heads: int = 1
    qk_width: int | None = None
    query_residual: bool = True
    widening: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be."""
        check_count("outputs", self.outputs)
        check_count("widening", self.widening)
        check_heads(self.outputs, self.heads)
        check_heads(self.qk, self.heads)

    @property
    def qk(self) -> int:
        """Channels of the decoder's queries and keys."""
        return self.outputs if self.qk_width is None else self.qk_width

    @property
    def parameters(self) -> int:
        """Numbers of encoder and decoder, without what makes inputs and queries."""
        E, D = self.outputs, self.encoder.hidden
        decoder = layer_parameters(E, D, self.qk, E, self.widening) + 2 * D
        return self.encoder.parameters + decoder


class PerceiverIO(nn.Module):
    """Encoder and decoder: from any input and any queries to an answer for each query.

    Args:
        config: Sizes and settings.
    """

    def __init__(self, config: PerceiverIOConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Perceiver(config.encoder)
        self.decoder = PerceiverLayer(
            config.outputs,
            config.encoder.hidden,
            config.heads,
            config.qk,
            config.outputs,
            config.widening,
            config.query_residual,
        )

    def forward(
        self,
        inputs: Float[Tensor, "batch length channels"],
        queries: Float[Tensor, "batch answers outputs"],
        mask: Tensor | None = None,
    ) -> Float[Tensor, "batch answers outputs"]:
        """Y, an answer for each query; what is wanted *where* has to be in the query."""
        return self.decoder(queries, self.encoder(inputs, mask))  # Y = CA(O, Z)


class PerceiverMLM(nn.Module):
    """A masked language model: tokens with positions in, a token for each position out.

    Args:
        config: Sizes and settings; the inputs' channels are the outputs'.
        vocabulary: Number of tokens.
        positions: The longest text.

    Raises:
        ValueError: When a token's vector as read and as asked for are not of one width.
    """

    def __init__(self, config: PerceiverIOConfig, vocabulary: int, positions: int) -> None:
        super().__init__()
        width = config.encoder.inputs
        if config.outputs != width:
            raise ValueError(
                f"outputs is {config.outputs} and inputs {width}; the head is tied to the "
                "embedding, so they must be equal."
            )
        self.config, self.vocabulary, self.positions = config, vocabulary, positions
        self.embedding = nn.Embedding(check_count("vocabulary", vocabulary), width)
        self.position_embedding = nn.Embedding(check_count("positions", positions), width)
        self.query_embedding = nn.Embedding(positions, width)
        self.model = PerceiverIO(config)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        for table in (self.embedding, self.position_embedding, self.query_embedding):
            nn.init.normal_(table.weight, std=0.02)

    @property
    def parameters_by_formula(self) -> int:
        """Three tables, encoder and decoder, and the bias of each token's score."""
        tables = (self.vocabulary + 2 * self.positions) * self.config.outputs
        return tables + self.config.parameters + self.vocabulary

    def forward(
        self, ids: Int[Tensor, "batch time"], mask: Tensor | None = None
    ) -> Float[Tensor, "batch time vocabulary"]:
        """Logits of the token at each position.

        Args:
            ids: Token ids, some of them a mask token.
            mask: True or 1 where a token is text.

        Raises:
            ValueError: Ids or a mask that do not fit, or more tokens than positions.
        """
        mask = check_ids(ids, self.vocabulary, mask)
        if ids.shape[1] > self.positions:
            raise ValueError(
                f"the texts have {ids.shape[1]} tokens; the model has {self.positions} positions."
            )
        places = torch.arange(ids.shape[1], device=ids.device)
        inputs = self.embedding(ids) + self.position_embedding(places)
        queries = self.query_embedding(places).expand(len(ids), -1, -1)
        answers = self.model(inputs, queries, mask)
        return nn.functional.linear(answers, self.embedding.weight, self.bias)
