r"""Quant-Noise: round a random part of each weight in training, so that most gradients are exact.

Quantization-aware training rounds every weight at every step, and the gradient that passes straight
through the rounding is wrong for all of them. Quant-Noise cuts a weight into blocks and rounds only
a random subset $J$ of them in each forward pass:

$$\psi(b_{kl} \mid J) = \begin{cases} \varphi(b_{kl}) & (k, l) \in J \\ b_{kl} & \text{otherwise,}
  \end{cases} \qquad P\bigl((k, l) \in J\bigr) = p.$$

With $p = 1$ it is quantization-aware training; with $p = 0$ ordinary training. The blocks that were
not rounded have exact gradients. At evaluation the whole weight is rounded.

The noise $\varphi$ is what will be done in the end: rounding to integers, a block's codeword in a
product quantizer, or, cheaper, the proxy $\varphi(b) = 0$ that drops the block.

Fan, Stock, Graham, Grave, Gribonval, Jégou, Joulin, "Training with Quantization Noise for Extreme
Model Compression", 2020, arXiv 2004.07320, section 4.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.core.checks import check_finite
from effnb.core.losses import check_share
from effnb.core.modules import (
    LayerChoice,
    Model,
    chooses_layers,
    clone,
    map_linears,
    named_modules_of,
    replace_modules,
)
from effnb.inference.quantization.estimators import RangeGrid, straight_through
from effnb.inference.quantization.grid import Granularity, Grid
from effnb.inference.quantization.linear import QuantizedLinear, refuse_quantized
from effnb.inference.self_distilled_quantization.product import ProductLinear, product_quantize

KINDS = ("integer", "product", "proxy")
WHOLE = 32
"""Bits at which nothing is rounded."""


def noise_mask(
    rows: int, columns: int, block_size: int, noise: float, device: torch.device | None = None
) -> Bool[Tensor, "rows columns"]:
    """Which weights lie in a drawn block: blocks of `block_size` neighbours of a row.

    Each block is drawn with probability `noise`, from torch's global generator; the trainer seeds
    that at each step, so that a resumed run draws the same. A row's last block may be shorter.

    Raises:
        ValueError: A block below 1, or a probability outside [0, 1].
    """
    check_block(block_size)
    check_share("noise", noise)
    blocks = -(-columns // block_size)
    drawn = torch.rand(rows, blocks, device=device) < noise  # $(k, l) \in J$
    return drawn.repeat_interleave(block_size, 1)[:, :columns]


def quant_noise(
    weight: Float[Tensor, "rows columns"],
    rounded: Float[Tensor, "*rounded"],
    mask: Bool[Tensor, "*mask"],
) -> Float[Tensor, "rows columns"]:
    r"""$\psi(b \mid J)$: `rounded` where the mask is True, the weight elsewhere.

    Going backward, the gradient reaches the weight unchanged in both cases (straight through).
    Where `rounded` carries its own gradient, as integer grids do, that one is taken.

    Raises:
        ValueError: When the three differ in shape.
    """
    if not weight.shape == rounded.shape == mask.shape:
        raise ValueError(
            f"the weight is {tuple(weight.shape)}, its rounded form {tuple(rounded.shape)} and the "
            f"mask {tuple(mask.shape)}; all three must have one shape."
        )
    if not rounded.requires_grad:
        rounded = straight_through(rounded, weight)
    return torch.where(mask, rounded, weight)


class NoisyLinear(nn.Module):
    r"""A linear layer that computes with $\psi(W \mid J)$ in training, with $\varphi(W)$ otherwise.

    Attributes:
        weight: The weight behind the noise; this is what the optimizer moves.
        kind: What the noise is, one of `KINDS`.
        noise: $p$, the probability of a block to be drawn.
        block_size: Neighbours of a row that are drawn together.
        weights: The integer grid of kind "integer", or None where nothing is rounded.
        centroids: Codewords of kind "product".
    """

    def __init__(
        self,
        layer: nn.Linear,
        kind: str,
        noise: float,
        block_size: int,
        weights: RangeGrid | None = None,
        centroids: int = 256,
    ) -> None:
        """Take over the parameters of an ordinary layer."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.kind, self.noise, self.block_size = kind, noise, block_size
        self.weights, self.centroids = weights, centroids
        if kind == "product":
            self.register_buffer("codewords", torch.empty_like(layer.weight), persistent=False)
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Find the codewords again; the paper does so once per epoch, since it is slow."""
        if self.kind == "product":
            found = product_quantize(self.weight, self.block_size, self.centroids)
            self.codewords.copy_(found.dequantize(self.weight.dtype))

    def rounded(self) -> Float[Tensor, "out in"]:
        r"""$\varphi(W)$ of the whole weight."""
        if self.kind == "integer":
            return self.weight if self.weights is None else self.weights(self.weight)
        if self.kind == "product":
            return straight_through(self.codewords, self.weight)
        return torch.zeros_like(self.weight)  # the proxy drops a block

    def effective(self) -> Float[Tensor, "out in"]:
        """The weight that the layer computes with now."""
        if not self.training:
            # The proxy stands for a quantizer that is applied later, so it is no noise at the end.
            return self.weight if self.kind == "proxy" else self.rounded()
        if self.noise == 0:
            return self.weight
        rows, columns = self.weight.shape
        mask = noise_mask(rows, columns, self.block_size, self.noise, self.weight.device)
        if self.kind == "proxy":  # a dropped block is 0, and so is its gradient
            return self.weight.masked_fill(mask, 0)
        return quant_noise(self.weight, self.rounded(), mask)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Draw, round, multiply."""
        return nn.functional.linear(x, self.effective(), self.bias)

    def converted(self) -> nn.Module:
        """The layer as it is stored in the end."""
        if self.kind == "product":
            return ProductLinear(
                product_quantize(self.weight.detach(), self.block_size, self.centroids), self.bias
            )
        if self.kind == "integer" and self.weights is not None:
            return QuantizedLinear(self.weights.stored(self.weight.detach()), self.bias)
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer

    def extra_repr(self) -> str:
        """What the noise is."""
        return f"kind={self.kind!r}, noise={self.noise}, block_size={self.block_size}"


@chooses_layers
def prepare_quant_noise(
    model: Model,
    bits: int = 8,
    *,
    noise: float = 0.5,
    block_size: int = 8,
    kind: str = "integer",
    group_size: Granularity = "row",
    symmetric: bool = True,
    centroids: int = 256,
    layers: LayerChoice = "*",
) -> Model:
    """A copy of a model to train with Quant-Noise in its linear layers.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        bits: Bits of the integers, 2 to 8; 32 rounds nothing. Only kind "integer" uses them.
        noise: $p$, the part of the blocks that is rounded in each forward pass; 1 rounds all.
        block_size: Neighbours of a row that are drawn together; for "product" also the length of
            a codeword.
        kind: "integer", "product" (codewords) or "proxy" (drawn blocks are dropped).
        group_size: What shares a scale, for "integer".
        symmetric: Whether integer grids are centred on 0.
        centroids: Codewords of a matrix, for "product".
        layers: Name patterns of the layers that get noise; output heads get none by default.

    Returns:
        A new model with its own weights, all of which require gradients.

    Raises:
        ValueError: An argument out of range, no fitting layer, or a model that is quantized or
            prepared already.
    """
    if any(isinstance(m, NoisyLinear) for m in model.modules()):
        raise ValueError("this model is prepared for training already; start from the original.")
    refuse_quantized(model)
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(KINDS)}.")
    check_share("noise", noise)
    check_block(block_size)
    grid = None if bits == WHOLE else Grid(bits, group_size, symmetric)
    own = clone(model)
    for parameter in own.parameters():
        parameter.requires_grad_(parameter.is_floating_point())

    def noisy(name: str, layer: nn.Linear) -> NoisyLinear:
        check_finite(layer.weight, f"the weight of {name}", "quantized")
        weights = RangeGrid(grid) if kind == "integer" and grid is not None else None
        return NoisyLinear(layer, kind, noise, block_size, weights, centroids)

    return map_linears(own, noisy, layers)


def refresh(model: nn.Module) -> None:
    """Find the codewords of every prepared layer again, in place (kind "product")."""
    for module in model.modules():
        if isinstance(module, NoisyLinear):
            module.refresh()


def convert_noise(model: Model) -> Model:
    """The model as it is stored: integers or codewords in place of the weights behind them.

    Returns:
        A new model that shares all tensors but the packed ones; in evaluation mode it computes the
        same as the prepared one.

    Raises:
        ValueError: When no layer was prepared by `prepare_quant_noise`.
    """
    found = named_modules_of(model, NoisyLinear)
    return replace_modules(model, {name: layer.converted() for name, layer in found.items()})


def check_block(block_size: int) -> None:
    """Refuse blocks of less than one weight.

    Raises:
        ValueError: When the size is not a whole number from 1.
    """
    if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
        raise ValueError(f"block_size is {block_size!r}; it must be a whole number from 1.")
