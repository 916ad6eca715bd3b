r"""Reversible layers: activations are computed again backwards instead of being stored.

The residual stream is split in two, and each half is changed by a function of the other,

$$y_1 = x_1 + F(x_2), \quad y_2 = x_2 + G(y_1); \qquad
  x_2 = y_2 - G(y_1), \quad x_1 = y_1 - F(x_2),$$

so the inputs of a layer follow from its outputs. The backward pass of a stack of any depth needs
the last outputs only: memory is independent of depth, for one more evaluation of $F$ and $G$.

Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", 2020, arXiv 2001.04451, after
Gomez, Ren, Urtasun, Grosse, 2017, arXiv 1707.04585.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from effnb.design.attention.checks import check_count


class ReversibleBlock(nn.Module):
    """Two functions that change the halves of the stream in turn.

    Args:
        f: F, of the second half (attention, with its norm).
        g: G, of the first (a feed-forward network, with its norm). Both must be functions of their
            input alone: without dropout, or the recomputation would draw another one.

    Raises:
        ValueError: When one of them has a dropout above 0.
    """

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        if any(getattr(m, "p", 0) for m in (*f.modules(), *g.modules()) if _drops(m)):
            raise ValueError("a reversible block has no dropout: it would be drawn again.")
        self.f, self.g = f, g

    def forward(
        self, x1: Float[Tensor, "*rows half"], x2: Float[Tensor, "*rows half"]
    ) -> tuple[Float[Tensor, "*rows half"], Float[Tensor, "*rows half"]]:
        """The outputs."""
        y1 = x1 + self.f(x2)  # y1 = x1 + F(x2)
        return y1, x2 + self.g(y1)  # y2 = x2 + G(y1)

    def inverse(
        self, y1: Float[Tensor, "*rows half"], y2: Float[Tensor, "*rows half"]
    ) -> tuple[Float[Tensor, "*rows half"], Float[Tensor, "*rows half"]]:
        """The inputs, from the outputs."""
        x2 = y2 - self.g(y1)  # x2 = y2 - G(y1)
        return y1 - self.f(x2), x2  # x1 = y1 - F(x2)


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd)


class _Reversible(torch.autograd.Function):
    """A stack of blocks that keeps its last outputs only."""

    @staticmethod
    def forward(ctx, x1, x2, blocks, *parameters):
        ctx.blocks = blocks
        for block in blocks:
            x1, x2 = block(x1, x2)
        ctx.save_for_backward(x1.detach(), x2.detach())
        return x1, x2

    @staticmethod
    @once_differentiable
    def backward(ctx, g1, g2):
        y1, y2 = ctx.saved_tensors
        sums: dict[int, Tensor | None] = {}
        for block in reversed(ctx.blocks):
            with torch.no_grad():
                x1, x2 = block.inverse(y1, y2)
            with torch.enable_grad():
                x1, x2 = x1.requires_grad_(), x2.requires_grad_()
                outputs = block(x1, x2)
                own = [p for p in block.parameters() if p.requires_grad]
                found = torch.autograd.grad(outputs, (x1, x2, *own), (g1, g2), allow_unused=True)
            g1, g2 = found[:2]
            for parameter, gradient in zip(own, found[2:]):
                if gradient is not None:
                    before = sums.get(id(parameter))
                    sums[id(parameter)] = gradient if before is None else before + gradient
            y1, y2 = x1.detach(), x2.detach()
        wanted = _parameters(ctx.blocks)
        return g1, g2, None, *(sums.get(id(p)) for p in wanted)


def _parameters(blocks: Iterable[nn.Module]) -> list[nn.Parameter]:
    """All parameters that are trained, each once, also where blocks share them."""
    found = {id(p): p for block in blocks for p in block.parameters() if p.requires_grad}
    return list(found.values())


class ReversibleStack(nn.Module):
    """Reversible blocks one after another.

    Args:
        blocks: The blocks, one at least.

    Raises:
        ValueError: Without any block.
    """

    def __init__(self, blocks: Sequence[ReversibleBlock]) -> None:
        super().__init__()
        check_count("the number of blocks", len(blocks))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """The mean of the two halves of the stream, which both begin as the input."""
        y1, y2 = _Reversible.apply(x, x, list(self.blocks), *_parameters(self.blocks))
        return (y1 + y2) / 2


def chunked(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "batch time dim"], chunk: int
) -> Float[Tensor, "batch time out"]:
    """A function of single tokens, on some of them at a time: its hidden layer is never whole.

    Raises:
        ValueError: A chunk below 1.
    """
    return torch.cat([function(part) for part in x.split(check_count("chunk", chunk), 1)], 1)
