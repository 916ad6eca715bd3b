"""A linear layer whose weight is stored quantized, in any of the stored formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.checks import check_loaded
from effnb.inference.quantization.formats import Granularity
from effnb.inference.quantization.stored import Stored, from_parts


class QuantizedLinear(nn.Module):
    r"""$y = x\,\hat W^\top + b$ with $\hat W$ read back from packed codes at every call.

    What the module holds is what a file would hold: the tensors of the stored weight (packed
    codes, scales, whatever its format has), each a buffer of the same name. It trades time for
    memory; for many calls at one setting use `dequantized`.
    """

    def __init__(self, weight: Stored, bias: Tensor | None = None) -> None:
        """Wrap a quantized weight; the bias, if any, stays as it is and is shared."""
        super().__init__()
        self.description = weight.describe()
        self.out_features, self.in_features = weight.shape
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    @property
    def quantized(self) -> Stored:
        """The weight as it is stored."""
        tensors = {name: self._buffers[name] for name in self.description["tensors"]}
        return from_parts(self.description, tensors, check=False)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight read back, in float32."""
        return self.quantized.dequantize()

    def forward(self, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Read the weight back and multiply."""
        weight = self.quantized.dequantize(inputs.dtype)
        return nn.functional.linear(inputs, weight, self.bias)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """An ordinary linear layer with the same function, as large as before quantization."""
        layer = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        layer.weight = nn.Parameter(self.quantized.dequantize(dtype), requires_grad=False)
        if self.bias is not None:
            layer.bias = self.bias
        return layer

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Let `to` and its like move the stored tensors, but not change their types.

        A scale in another type would be another number, and the description would not fit.
        """
        before = dict(self._buffers)
        super()._apply(function, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        """Shape, format, and what the format says of itself."""
        known: dict[str, Any] = dict(self.description)
        if known["format"] == "uniform":
            known["symmetric"] = "zeros" not in known["tensors"]
        told = [f"{k}={v!r}" for k, v in known.items() if k not in ("shape", "tensors")]
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return ", ".join([size, *told])


def refuse_quantized(model: nn.Module) -> None:
    """Refuse a model that has quantized layers already: errors would add up unseen.

    A layer counts as quantized when it has the property `quantized`, as `QuantizedLinear` has, or
    is a linear layer whose weight is not of a floating-point type.

    Raises:
        ValueError: When there is such a layer, or a weight is on the meta device.
    """
    check_loaded(model)
    for module in model.modules():
        packed = isinstance(module, nn.Linear) and not module.weight.is_floating_point()
        if packed or hasattr(type(module), "quantized"):
            raise ValueError("this model is quantized already; quantize the original instead.")


def group_size_label(group_size: Granularity) -> str:
    """How a reader would say it: "per tensor", "per row", "groups of 64"."""
    return f"per {group_size}" if isinstance(group_size, str) else f"groups of {group_size}"
