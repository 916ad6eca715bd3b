r"""Attention whose queries read from an array of another length and width.

$$\text{CA}(X, C) = \text{softmax}\!\left(\frac{X W_Q (C W_K)^\top}{\sqrt{d_h}}\right) C W_V W_O$$

With $C = X$ it is self-attention. The product of queries and keys costs (queries x keys), so a few
queries read a long array at a cost that grows linearly with its length.

Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762, section 3.2.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.design.attention.checks import check_heads, check_mask


class Attention(nn.Module):
    """Queries of one array over keys and values of another.

    Args:
        width: Channels of the queries' array, and of the output.
        context: Channels of the array that is read.
        heads: h.
        qk_width: Channels of all heads' queries; the width where None. Heads divide it.
        v_width: Channels of all heads' values; as `qk_width` where None.
    """

    def __init__(
        self,
        width: int,
        context: int,
        heads: int,
        qk_width: int | None = None,
        v_width: int | None = None,
    ) -> None:
        super().__init__()
        qk_width = width if qk_width is None else qk_width
        v_width = qk_width if v_width is None else v_width
        check_heads(qk_width, heads)
        check_heads(v_width, heads)
        self.heads = heads
        self.query = nn.Linear(width, qk_width)
        self.key = nn.Linear(context, qk_width)
        self.value = nn.Linear(context, v_width)
        self.output = nn.Linear(v_width, width)

    def forward(
        self,
        x: Float[Tensor, "batch queries width"],
        context: Float[Tensor, "batch keys context"],
        mask: Bool[Tensor, "batch keys"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "batch queries width"]:
        """CA(x, context).

        Args:
            x: What asks.
            context: What is read.
            mask: True where a row of the context is text; None when all are.
            causal: Whether a query reads up to its own place only.

        Raises:
            ValueError: A mask that is not boolean or of another shape.
        """
        check_mask("mask", mask, context.shape[:2])
        q, k, v = (
            layer(array).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, array in ((self.query, x), (self.key, context), (self.value, context))
        )
        seen = None if mask is None else mask[:, None, None, :]
        if seen is not None and causal:
            places = range_like(context)
            seen, causal = seen & (places[None, :] <= places[:, None]), False
        heads = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=causal
        )  # softmax(Q K^T / sqrt(d_h)) V
        return self.output(heads.transpose(1, 2).flatten(2))


def range_like(array: Float[Tensor, "batch time width"]) -> Tensor:
    """Places 0, 1, … of an array on its device."""
    return array.new_ones(array.shape[1]).cumsum(0) - 1
