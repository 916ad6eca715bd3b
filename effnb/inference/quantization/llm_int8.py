r"""LLM.int8(): 8-bit products, with the few outlier features kept out of them.

Every token of the input and every row of the weight gets its own scale (vector-wise). A few
features of large models are tens of times larger than the rest, and would coarsen the grid of every
token; their columns are multiplied in floating point instead (mixed-precision decomposition):

$$Y = X_{:,O} \hat W_{:,O}^\top + (s_x s_w^\top) \odot \left(Q_{x} Q_{w}^\top\right)_{\setminus O},
  \qquad O = \{ j : \max_t |X_{tj}| \ge \tau \}.$$

Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at
Scale", 2022, arXiv 2208.07339. Two details are those of the authors' library, bitsandbytes: a
token's scale is taken over its entries below the threshold, those of outlier columns included; and
the weights of outlier columns are read back from their 8-bit codes, so that no second copy of the
weight is kept.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor, nn

from effnb.core.linear_form import in_linear_form
from effnb.core.modules import (
    LayerChoice,
    Layers,
    Model,
    chooses_layers,
    named_modules_of,
    replace_modules,
    share,
)
from effnb.inference.quantization.activations import activation_codes, quantized_matmul
from effnb.inference.quantization.formats import QuantizedTensor, quantize
from effnb.inference.quantization.linear import QuantizedLinear
from effnb.inference.quantization.rtn import rtn


def _check_threshold(threshold: float) -> None:
    if not threshold >= 0:
        raise ValueError(
            f"threshold is {threshold}; it must be above 0, or 0 for no decomposition."
        )


def outlier_columns(
    inputs: Float[Tensor, "tokens in"], threshold: float = 6.0
) -> Bool[Tensor, " in"]:
    r"""Whether a feature reaches the threshold at any token: $\max_t |X_{tj}| \ge \tau$.

    With a threshold of 0 there are no outliers, as in bitsandbytes.

    Raises:
        ValueError: A negative threshold, or NaN.
    """
    _check_threshold(threshold)
    if threshold == 0:
        return torch.zeros(inputs.shape[1], dtype=torch.bool, device=inputs.device)
    return (inputs.abs() >= threshold).any(0)


def vectorwise_codes(
    inputs: Float[Tensor, "tokens in"], threshold: float = 6.0
) -> tuple[Int8[Tensor, "tokens in"], Float[Tensor, "tokens 1"], Bool[Tensor, " in"]]:
    r"""8-bit codes of the inputs without their outlier columns.

    $s_t = \max_j |X_{tj}| / 127$ over the entries below the threshold; the codes of outlier columns
    are 0.

    Args:
        inputs: $X$, tokens in rows.
        threshold: $\tau$; 0 for no decomposition.

    Returns:
        Codes, scales, and which columns are outliers.

    Raises:
        ValueError: A negative threshold, or NaN.
    """
    outliers = outlier_columns(inputs, threshold)
    kept = inputs.masked_fill(inputs.abs() >= threshold, 0) if threshold else inputs
    codes, scales = activation_codes(kept, 8)
    return codes.masked_fill(outliers, 0), scales, outliers


def llm_int8_matmul(
    inputs: Float[Tensor, "tokens in"],
    weight: Float[Tensor, "out in"] | QuantizedTensor,
    threshold: float = 6.0,
) -> Float[Tensor, "tokens out"]:
    r"""$X \hat W^\top$ with outlier columns in floating point and the others in integers.

    Args:
        inputs: $X$, tokens in rows. Which columns are outliers depends on all of them together.
        weight: $W$, quantized to 8 bits by rows here; or a weight quantized before.
        threshold: $\tau$, 6 in the paper; 0 for no decomposition.

    Returns:
        The product, in the type of the inputs.

    Raises:
        ValueError: A negative threshold, or a weight that cannot be quantized.
    """
    _check_threshold(threshold)
    if not isinstance(weight, QuantizedTensor):
        weight = quantize(weight, 8, symmetric=True)
    codes, scales, outliers = vectorwise_codes(inputs, threshold)
    y = quantized_matmul(codes, scales, weight)
    if outliers.any():
        y = y + inputs[:, outliers].to(y.dtype) @ weight.dequantize(y.dtype)[:, outliers].T
    return y.to(inputs.dtype)


class LLMInt8Linear(nn.Module):
    """A linear layer with an 8-bit weight whose outlier inputs stay in floating point.

    Should the wrapped layer hold an ordinary weight (see `dequantized`), the same numbers are
    computed in floating point.
    """

    rounds_inputs = True

    def __init__(self, layer: nn.Module, threshold: float = 6.0) -> None:
        """Wrap a `QuantizedLinear`; the threshold is 0 for no decomposition."""
        super().__init__()
        _check_threshold(threshold)
        self.layer, self.threshold = layer, threshold

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The wrapped layer's weight."""
        return self.layer.weight

    def forward(self, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Find the outliers of this batch, multiply both parts, add them."""
        x = inputs.flatten(0, -2)
        weight = getattr(self.layer, "quantized", None)
        if isinstance(weight, QuantizedTensor):
            y = llm_int8_matmul(x, weight, self.threshold)
            if self.layer.bias is not None:
                y = y + self.layer.bias
        else:
            codes, scales, outliers = vectorwise_codes(x, self.threshold)
            y = self.layer(torch.where(outliers, x, (codes * scales).to(x.dtype)))
        return y.unflatten(0, inputs.shape[:-1])

    def extra_repr(self) -> str:
        """The threshold."""
        return f"threshold={self.threshold}"


@chooses_layers
def llm_int8(
    model: Model,
    threshold: float = 6.0,
    *,
    layers: LayerChoice = "*",
) -> Model:
    r"""8-bit weights by rows, 8-bit inputs by tokens, outlier features in floating point.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        threshold: $\tau$: a feature with an input of this magnitude is left out of the 8-bit
            product. 6 in the paper; 0 for no decomposition.
        layers: Name patterns of the layers.

    Returns:
        A new model that shares every tensor it did not quantize.

    Raises:
        ValueError: A negative threshold, weights that are not finite, no fitting layer, or a model
            that is quantized already.
    """
    _check_threshold(threshold)
    rounded = rtn(model, 8, symmetric=True, layers=layers)
    chosen = named_modules_of(rounded, QuantizedLinear)
    return replace_modules(
        rounded, {name: LLMInt8Linear(layer, threshold) for name, layer in chosen.items()}
    )


@in_linear_form
def outlier_fractions(
    model: nn.Module, ids: Int[Tensor, "batch time"], threshold: float = 6.0
) -> dict[str, float]:
    """The fraction of each layer's input columns that are outliers on a batch.

    It is the share of the weight that LLM.int8() multiplies in floating point.

    Args:
        model: A model with ordinary linear layers, or one from `llm_int8`.
        ids: Token ids.
        threshold: For ordinary layers; an `LLMInt8Linear` has its own.

    Raises:
        ValueError: A negative threshold, or no such layer.
    """
    _check_threshold(threshold)
    watched = share(model).eval()
    layers = named_modules_of(watched, (nn.Linear, LLMInt8Linear), Layers())
    found: dict[str, float] = {}

    def hook_for(name: str):
        def hook(module, arguments):
            limit = getattr(module, "threshold", threshold)
            found[name] = float(outlier_columns(arguments[0].flatten(0, -2), limit).float().mean())

        return hook

    for name, layer in layers.items():
        layer.register_forward_pre_hook(hook_for(name))
    with torch.no_grad():
        watched(input_ids=ids)
    return found
