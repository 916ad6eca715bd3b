"""Round to nearest: quantize every linear layer by its own numbers, without any data.

It is the baseline that every other method of the chapter is measured against, and at eight bits it
is often all one needs. `rtn` rounds to uniform grids; `quantize_linears` to any stored format:

    quantize_linears(model, quantize_nf4)
    quantize_linears(model, lambda weight: quantize_table(weight, "e2m1", block_size=32))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from effnb.core.linear_form import in_linear_form, restore
from effnb.core.modules import (
    LayerChoice,
    Model,
    chooses_layers,
    map_linears,
    named_modules_of,
    replace_modules,
)
from effnb.inference.quantization.formats import quantize_on
from effnb.inference.quantization.grid import Granularity, Grid
from effnb.inference.quantization.linear import QuantizedLinear, refuse_quantized
from effnb.inference.quantization.stored import Stored


@chooses_layers
@in_linear_form
def quantize_linears(
    model: Model,
    function: Callable[[Tensor], Stored],
    *,
    layers: LayerChoice = "*",
) -> Model:
    """Store the weight of each linear layer in the format that a function gives it.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        function: From a weight (out, in) to its stored form.
        layers: Name patterns of the layers to quantize.

    Returns:
        A new model with `QuantizedLinear` layers that shares every other tensor.

    Raises:
        ValueError: When the format refuses a weight (the sentence names the layer), no layer fits,
            or the model is quantized already.
    """
    refuse_quantized(model)

    def replace(name: str, layer: nn.Linear) -> QuantizedLinear:
        try:
            weight = function(layer.weight.detach())
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
        return QuantizedLinear(weight, layer.bias)

    return map_linears(model, replace, layers)


@chooses_layers
def rtn(
    model: Model,
    bits: int,
    *,
    group_size: Granularity = "row",
    symmetric: bool = False,
    clip: str = "minmax",
    percentile: float = 99.9,
    exponent: float = 2.0,
    layers: LayerChoice = "*",
) -> Model:
    r"""Round each weight to the nearest point of its grid.

    $\hat w = s\,(\operatorname{clamp}(\operatorname{round}(w / s) + z) - z)$.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        bits: 2 to 8.
        group_size: What shares one scale: "tensor", "row", or a number of inputs of a row.
        symmetric: Whether the grids are centred on 0 and have no zero points.
        clip: What a grid covers: all its weights ("minmax"), a share of them ("percentile"), or the
            range of least error ("mse").
        percentile: For "percentile": the share in per cent.
        exponent: For "mse": the power of the error that is summed.
        layers: Name patterns of the layers to quantize.

    Returns:
        A new model with `QuantizedLinear` layers that shares every other tensor.

    Raises:
        ValueError: Bits, a group size or a way of clipping that do not exist, weights that are not
            finite, no fitting layer, or a model that is quantized already.
    """
    grid = Grid(bits, group_size, symmetric, clip, percentile, exponent)
    return quantize_linears(model, partial(quantize_on, grid=grid), layers=layers)


def dequantized(model: Model, dtype: torch.dtype | None = None) -> Model:
    """The same function with ordinary linear layers: for evaluating one setting many times fast.

    Args:
        model: A model with `QuantizedLinear` layers, of any format; it is not changed.
        dtype: The type of the weights read back; by default that of the model's other parameters.

    Raises:
        ValueError: When no layer is quantized.
    """
    layers = named_modules_of(model, QuantizedLinear)
    if dtype is None:
        kinds = [p.dtype for p in model.parameters() if p.is_floating_point()]
        dtype = kinds[0] if kinds else torch.float32
    return restore(replace_modules(model, {n: m.dequantized(dtype) for n, m in layers.items()}))
