"""A linear layer whose weight is stored quantized."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from effnb.inference.quantization.formats import Granularity, QuantizedTensor


class QuantizedLinear(nn.Module):
    r"""$y = x\,\hat W^\top + b$ with $\hat W$ read back from packed codes at every call.

    What the module holds is what a file would hold: packed codes, half-precision scales, packed
    zero points. It trades time for memory; for many calls at one setting use `dequantized`.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None) -> None:
        """Wrap a quantized weight; the bias, if any, stays as it is and is shared."""
        super().__init__()
        self.bits, self.group_size = weight.bits, weight.group_size
        self.out_features, self.in_features = weight.shape
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as it is stored."""
        shape = (self.out_features, self.in_features)
        return QuantizedTensor(
            self.codes, self.scales, self.zeros, self.bits, shape, self.group_size
        )

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight read back, in float32."""
        return self.quantized.dequantize()

    def forward(self, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Read the weight back and multiply."""
        weight = self.quantized.dequantize(inputs.dtype)
        return nn.functional.linear(inputs, weight, self.bias)

    def dequantized(self) -> nn.Linear:
        """An ordinary linear layer with the same function, as large as before quantization."""
        layer = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            layer.bias = self.bias
        return layer

    def extra_repr(self) -> str:
        """Shape, bits and grouping."""
        kind = "symmetric" if self.zeros is None else "affine"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size!r}, {kind}"
        )


def group_size_label(group_size: Granularity) -> str:
    """How a reader would say it: "per tensor", "per row", "groups of 64"."""
    return f"per {group_size}" if isinstance(group_size, str) else f"groups of {group_size}"
