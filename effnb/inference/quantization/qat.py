r"""Quantization-aware training: let the weights learn to live on their grid.

During training every layer computes with rounded weights, while the optimizer moves the unrounded
ones behind them. The gradient passes straight through the rounding (see `estimators`). Where the
grid comes from is the method:

- *ste*: from the range of the weights, found again at every step;
- *lsq*: its step is a parameter and learns with the weights. Esser et al., "Learned Step Size
  Quantization", 2019, arXiv 1902.08153;
- *bitnet*: weights of -1, 0 and 1 times one number per matrix, inputs of eight bits. Ma et al.,
  "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", 2024, arXiv 2402.17764;
- *binary*: signs times one number per row. Bai et al., "BinaryBERT", 2020, arXiv 2012.15701.

`prepare_qat` makes the model that is trained, `convert` the packed one that computes the same.
Text to train on without data, and the loss that imitates a teacher, are in `llm_qat`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.calibration import CalibrationLike, batches_of
from effnb.core.context import context_limit
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import (
    LayerChoice,
    Model,
    chooses_layers,
    clone,
    linears,
    map_linears,
    matches,
    named_modules_of,
    replace_modules,
    share,
)
from effnb.inference.quantization.activations import QuantizedInputs
from effnb.inference.quantization.estimators import FewValues, LearnedGrid, RangeGrid, TokenGrid
from effnb.inference.quantization.grid import Granularity, Grid
from effnb.inference.quantization.linear import QuantizedLinear, refuse_quantized
from effnb.inference.quantization.stored import check_bits

METHODS = ("ste", "lsq", "bitnet", "binary")
KEYS_AND_VALUES = ("*k_proj", "*v_proj")
"""The layers whose outputs go into the key-value cache, by their usual names."""


class FakeQuantLinear(nn.Module):
    r"""Trains as it will run: $y = Q_o(Q_x(\mathrm{norm}(x))\, Q_w(W)^\top + b)$.

    Attributes:
        weight: The weight behind the rounded one; this is what the optimizer moves.
        weights: $Q_w$, a `RangeGrid`, `LearnedGrid` or `FewValues`.
        inputs: $Q_x$, a `TokenGrid`, a `LearnedGrid`, or None.
        outputs: $Q_o$, for layers that fill the key-value cache, or None.
        norm: None, or an RMSNorm before everything (BitNet's SubLN).
    """

    def __init__(
        self,
        layer: nn.Linear,
        weights: nn.Module,
        inputs: nn.Module | None = None,
        outputs: nn.Module | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        """Take over the parameters of an ordinary layer."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.weights, self.inputs, self.outputs, self.norm = weights, inputs, outputs, norm

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Round, multiply, round."""
        x = x if self.norm is None else self.norm(x)
        x = x if self.inputs is None else self.inputs(x)
        y = nn.functional.linear(x, self.weights(self.weight), self.bias)
        return y if self.outputs is None else self.outputs(y)

    def converted(self) -> nn.Module:
        """The same function from packed storage."""
        layer: nn.Module = QuantizedLinear(self.weights.stored(self.weight.detach()), self.bias)
        inputs = self.inputs
        if isinstance(inputs, TokenGrid):
            layer, inputs = QuantizedInputs(layer, inputs.bits), None
        if inputs is None and self.outputs is None and self.norm is None:
            return layer
        return SurroundedLinear(layer, inputs, self.outputs, self.norm)


class SurroundedLinear(nn.Module):
    """A packed layer with what a `FakeQuantLinear` has around it besides."""

    def __init__(
        self,
        layer: nn.Module,
        inputs: nn.Module | None,
        outputs: nn.Module | None,
        norm: nn.Module | None,
    ) -> None:
        """Take the parts; see `FakeQuantLinear`."""
        super().__init__()
        self.layer, self.inputs, self.outputs, self.norm = layer, inputs, outputs, norm

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Round, multiply, round."""
        x = x if self.norm is None else self.norm(x)
        x = x if self.inputs is None else self.inputs(x)
        y = self.layer(x)
        return y if self.outputs is None else self.outputs(y)


@chooses_layers
@in_linear_form
def prepare_qat(
    model: Model,
    bits: int | None = None,
    *,
    method: str = "ste",
    group_size: Granularity = "row",
    symmetric: bool = False,
    clip: str = "minmax",
    activation_bits: int | None = None,
    kv_bits: int | None = None,
    kv: str | Iterable[str] = KEYS_AND_VALUES,
    sub_norm: bool = False,
    calibration: CalibrationLike | None = None,
    layers: LayerChoice = "*",
) -> Model:
    """A copy of a model to train with rounded weights, and rounded activations if wanted.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        bits: Bits of the weights, 2 to 8; none for "bitnet" and "binary", which fix them.
        method: "ste" (the range of the weights gives the grid), "lsq" (the step is learned),
            "bitnet" (three values, one scale per matrix) or "binary" (two, a scale per row).
        group_size: What shares a scale or a step, for "ste" and "lsq". The LSQ paper has one per
            tensor.
        symmetric: For "ste": whether grids are centred on 0. LSQ's have no zero point.
        clip: For "ste": what the grid covers, "minmax", "percentile" or "mse".
        activation_bits: Bits of the layers' inputs. With "lsq" their step is learned too, and the
            grid starts at 0 where no input was negative on the calibration data; with the others
            each token has its own range. None leaves inputs as they are, except for "bitnet",
            where it means the paper's 8.
        kv_bits: Bits of keys and values as they enter the cache, each token with its own range.
        kv: Name patterns of the layers that make them.
        sub_norm: Whether to put an RMSNorm before each layer, as BitNet has. It changes the
            function at once: for models trained from the start.
        calibration: Token ids (sequences, time) or batches, to start the steps of the inputs.
        layers: Name patterns of the layers to quantize.

    Returns:
        A new model with its own weights, all of which require gradients.

    Raises:
        ValueError: An argument out of range, no fitting layer, missing calibration data, or a model
            that is quantized or prepared already.
    """
    if any(isinstance(m, FakeQuantLinear) for m in model.modules()):
        raise ValueError("this model is prepared for training already; start from the original.")
    refuse_quantized(model)
    _check(bits, method, group_size, clip, activation_bits, kv_bits, calibration)
    found = linears(model, layers)
    keys_and_values = [name for name in found if matches(name, kv)]
    if kv_bits is not None and not keys_and_values:
        raise ValueError("kv_bits was given, but no layer fits the patterns of keys and values.")
    if method == "bitnet" and activation_bits is None:
        activation_bits = 8
    seen = {}
    if method == "lsq" and activation_bits is not None:
        seen = _input_statistics(model, calibration, list(found))
    own = clone(model)
    for parameter in own.parameters():
        parameter.requires_grad_(parameter.is_floating_point())

    def prepared(name: str, layer: nn.Linear) -> FakeQuantLinear:
        if method == "lsq":
            weights: nn.Module = LearnedGrid.of_weight(layer.weight, bits, group_size)
        elif method == "ste":
            weights = RangeGrid(Grid(bits, group_size, symmetric, clip))
        else:
            weights = FewValues(method)
        inputs: nn.Module | None = None if activation_bits is None else TokenGrid(activation_bits)
        if name in seen:
            mean, smallest = seen[name]
            half = 2 ** (activation_bits - 1)
            low, high = (0, 2 * half - 1) if smallest >= 0 else (-half, half - 1)
            inputs = LearnedGrid(mean.view(1, 1), low, high, layer.in_features)
        outputs = TokenGrid(kv_bits) if kv_bits and name in keys_and_values else None
        norm = None
        if sub_norm:
            like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
            norm = nn.RMSNorm(layer.in_features, eps=1e-5, **like)
        return FakeQuantLinear(layer, weights, inputs, outputs, norm)

    return map_linears(own, prepared, layers)


def convert(model: Model) -> Model:
    """Pack the weights of a model that was trained for it; what it computes stays the same.

    Inputs with a range per token become integers, so sums are exact where training rounded them.

    Returns:
        A new model that shares all tensors but the packed ones.

    Raises:
        ValueError: When no layer of the model was prepared by `prepare_qat`.
    """
    layers = named_modules_of(model, FakeQuantLinear)
    return replace_modules(model, {name: layer.converted() for name, layer in layers.items()})


def _check(
    bits: int | None,
    method: str,
    group_size: Granularity,
    clip: str,
    activation_bits: int | None,
    kv_bits: int | None,
    calibration: CalibrationLike | None,
) -> None:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")
    if method in ("ste", "lsq"):
        if bits is None:
            raise ValueError(f"the method {method!r} needs bits, 2 to 8.")
        Grid(bits, group_size, clip=clip)  # refuses what does not exist
    elif bits is not None:
        raise ValueError(f"bits is {bits}; the method {method!r} fixes them itself.")
    for given in (activation_bits, kv_bits):
        if given is not None:
            check_bits(given)
    if method == "lsq" and activation_bits is not None and calibration is None:
        raise ValueError("the steps of the inputs need calibration data to start from.")


def _input_statistics(
    model: nn.Module, calibration: CalibrationLike, names: list[str]
) -> dict[str, tuple[Tensor, float]]:
    """Mean magnitude and smallest value of the inputs of each layer; padding is left out."""
    context = context_limit(model)
    device = next(model.parameters()).device
    watched = share(model).eval()  # a copy of the modules, so that no hook is left on the model
    sums: dict[str, tuple[float, int, float]] = {}
    mask: list[Tensor | None] = [None]

    def hook_for(name: str):
        def hook(module, arguments):
            x = arguments[0]
            if mask[0] is not None and x.shape[:2] == mask[0].shape:
                x = x[mask[0]]
            total, count, smallest = sums.get(name, (0.0, 0, math.inf))
            total, count = total + float(x.abs().double().sum()), count + x.numel()
            sums[name] = (total, count, min(smallest, float(x.min())))

        return hook

    for name in names:
        watched.get_submodule(name).register_forward_pre_hook(hook_for(name))
    with torch.no_grad():
        for batch in batches_of(calibration, context):
            given = batch.get("attention_mask")
            mask[0] = None if given is None or given.ndim != 2 else given.bool().to(device)
            watched(**{key: tensor.to(device) for key, tensor in batch.items()})
    missing = [name for name in names if name not in sums]
    if missing:
        raise ValueError(f"the calibration data never reaches the layer {missing[0]}.")
    return {
        name: (torch.tensor(total / count, dtype=torch.float32, device=device), smallest)
        for name, (total, count, smallest) in sums.items()
    }
