"""Round to nearest: quantize every linear layer by its own extremes, without any data.

It is the baseline that every other method of the chapter is measured against, and at eight bits it
is often all one needs.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from effnb.core.modules import HEADS, Model, map_linears, named_modules_of, replace_modules
from effnb.inference.quantization.formats import Granularity, check_bits, quantize
from effnb.inference.quantization.linear import QuantizedLinear


def rtn(
    model: Model,
    bits: int,
    *,
    group_size: Granularity = "row",
    symmetric: bool = False,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = HEADS,
) -> Model:
    r"""Round each weight to the nearest point of its grid.

    $\hat w = s\,(\operatorname{clamp}(\operatorname{round}(w / s) + z) - z)$.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        bits: 2 to 8.
        group_size: What shares one scale: "tensor", "row", or so many inputs of a row.
        symmetric: Whether the grids are centred on 0 and have no zero points.
        include: Name patterns of the layers to quantize.
        exclude: Name patterns of layers to leave alone; output heads by default.

    Returns:
        A new model with `QuantizedLinear` layers that shares every other tensor.

    Raises:
        ValueError: Bits or a group size that the format does not have, weights that are not finite,
            no fitting layer, or a model that is quantized already.
    """
    check_bits(bits)
    if any(isinstance(m, QuantizedLinear) for m in model.modules()):
        raise ValueError("this model is quantized already; quantize the original instead.")

    def replace(name: str, layer: nn.Linear) -> QuantizedLinear:
        try:
            weight = quantize(layer.weight, bits, group_size=group_size, symmetric=symmetric)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
        return QuantizedLinear(weight, layer.bias)

    return map_linears(model, replace, include, exclude)


def dequantized(model: Model) -> Model:
    """The same function with ordinary linear layers: for evaluating one setting many times fast."""
    layers = named_modules_of(model, QuantizedLinear)
    return replace_modules(model, {name: m.dequantized() for name, m in layers.items()})
