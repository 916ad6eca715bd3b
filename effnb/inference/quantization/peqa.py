r"""PEQA: fine-tune a quantized model by its scales alone.

The integers of every layer stay as they are; what a task trains is the change of the scales,

$$\hat W = (s_0 + \Delta s)\,(\overline{W}_0 - z_0), \qquad
  \frac{\partial L}{\partial s_{ig}} = \sum_{j \in g} \frac{\partial L}{\partial \hat W_{ij}}\,
  (\overline{W}_{0,ij} - z_{0,ig}).$$

Before and after training the model is a quantized model of the same size. A task is a set of
scales, a few kilobytes, and changing the task is changing the scales.

Kim et al., "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer
Quantization", 2023, arXiv 2305.14152.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from effnb.core.deltas import freeze, refuse_rounded_inputs
from effnb.core.modules import (
    LayerChoice,
    Layers,
    Model,
    chooses_layers,
    named_modules_of,
    replace_modules,
)
from effnb.inference.quantization.clipping import HALF_MAX, HALF_MIN
from effnb.inference.quantization.estimators import straight_through
from effnb.inference.quantization.formats import Granularity, QuantizedTensor, spread
from effnb.inference.quantization.linear import QuantizedLinear
from effnb.inference.quantization.rtn import rtn


def scale_gradient(
    weight_gradient: Float[Tensor, "out in"], stored: QuantizedTensor
) -> Float[Tensor, "scale_rows groups"]:
    r"""$\sum_{j \in g} \frac{\partial L}{\partial \hat W_{ij}} (\overline{W}_{ij} - z_{ig})$.

    Args:
        weight_gradient: $\partial L / \partial \hat W$.
        stored: The weight, whose integers and zero points are used.
    """
    columns = stored.shape[1]
    whole = stored.integers().to(weight_gradient.dtype)
    zero = stored.zero_points()
    if zero is not None:
        whole = whole - spread(zero.to(whole.dtype), stored.group_size, columns)
    if stored.order is not None:  # stored column j is column order[j] of the matrix
        weight_gradient = weight_gradient[:, stored.order.long()]
    product = weight_gradient * whole
    if stored.group_size == "tensor":
        return product.sum().view(1, 1)
    if stored.group_size == "row":
        return product.sum(1, keepdim=True)
    padded = nn.functional.pad(product, (0, -columns % stored.group_size))
    return padded.unflatten(1, (-1, stored.group_size)).sum(-1)


class _ScaledMatmul(torch.autograd.Function):
    """x times the weight read back with other scales; keeps neither it nor its integers.

    Plain autograd would hold both in full size until the backward pass. Reading the weight back
    once more is what makes training fit where the quantized model fits.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, scales: Tensor, stored: QuantizedTensor) -> Tensor:
        ctx.save_for_backward(inputs, scales)
        ctx.stored = stored
        weight = replace(stored, scales=scales.detach()).dequantize(inputs.dtype)
        return nn.functional.linear(inputs, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inputs, scales = ctx.saved_tensors
        for_inputs = for_scales = None
        if ctx.needs_input_grad[0]:
            weight = replace(ctx.stored, scales=scales).dequantize(gradient.dtype)
            for_inputs = gradient @ weight
        if ctx.needs_input_grad[1]:
            outer = gradient.flatten(0, -2).T.to(scales.dtype) @ inputs.flatten(0, -2).to(scales)
            for_scales = scale_gradient(outer, ctx.stored)
        return for_inputs, for_scales, None


class ScaleTunedLinear(QuantizedLinear):
    r"""A quantized layer with frozen integers whose scales are trained: $s = s_0 + \Delta s$.

    It computes with the scales in half precision, the form they are stored in; the gradient passes
    through that rounding, so that small steps add up.

    Attributes:
        delta: $\Delta s$, in float32, 0 at the start.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        """Take over a layer on a uniform grid.

        Raises:
            ValueError: When it is stored in a format without scales of this kind.
        """
        stored = layer.quantized
        if not isinstance(stored, QuantizedTensor):
            raise ValueError(
                f"a weight of format {stored.format!r} has no integers with scales; only uniform "
                "grids are tuned."
            )
        super().__init__(stored, layer.bias)
        self.delta = nn.Parameter(torch.zeros_like(stored.scales, dtype=torch.float32))

    @property
    def start(self) -> QuantizedTensor:
        """The weight before tuning."""
        return QuantizedLinear.quantized.fget(self)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as it would be stored now."""
        return replace(self.start, scales=self.tuned_scales().detach().half())

    def tuned_scales(self) -> Float[Tensor, "scale_rows groups"]:
        """The scales now: half-precision numbers above 0, in float32."""
        scales = self.start.scales.float() + self.delta
        # A scale that would pass 0 stops there, and its gradient can bring it back.
        return straight_through(scales.clamp(HALF_MIN, HALF_MAX).half().float(), scales)

    def forward(self, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Read the weight back with the scales of now and multiply."""
        y = _ScaledMatmul.apply(inputs, self.tuned_scales(), self.start)
        return y if self.bias is None else y + self.bias

    def converted(self) -> QuantizedLinear:
        """An ordinary quantized layer with the scales of now."""
        return QuantizedLinear(self.quantized, self.bias)


@chooses_layers
def tune_scales(model: Model, *, layers: LayerChoice = "*") -> Model:
    """Make the scales of a quantized model trainable, and nothing else.

    Args:
        model: A model with `QuantizedLinear` layers on uniform grids, from any method (RTN, GPTQ,
            AWQ, QAT); it is not changed.
        layers: Name patterns of the layers to tune.

    Returns:
        A new model that shares the integers; only the changes of the scales require gradients. They
        are 0, and its function is that of the model.

    Raises:
        ValueError: When no quantized layer fits, or one is stored in another format or rounds its
            inputs.
    """
    refuse_rounded_inputs(model)
    if any(isinstance(m, ScaleTunedLinear) for m in model.modules()):
        raise ValueError("the scales of this model are tuned already.")
    chosen = named_modules_of(model, QuantizedLinear, Layers.of(layers))
    for name, layer in chosen.items():
        if not isinstance(layer.quantized, QuantizedTensor):
            raise ValueError(
                f"{name} is stored as {layer.quantized.format!r}; only layers on uniform grids "
                "have scales to tune."
            )
    frozen = freeze(model)
    return replace_modules(
        frozen, {name: ScaleTunedLinear(frozen.get_submodule(name)) for name in chosen}
    )


@chooses_layers
def peqa(
    model: Model,
    bits: int,
    *,
    group_size: Granularity = "row",
    symmetric: bool = False,
    layers: LayerChoice = "*",
) -> Model:
    """Round a model to nearest and make its scales trainable.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        bits: 2 to 8.
        group_size: What shares one scale: "tensor", "row", or a number of inputs of a row. Smaller
            groups have more to train.
        symmetric: Whether the grids have no zero points.
        layers: Name patterns of the layers to quantize.

    Returns:
        A new model as `tune_scales` makes it; until it is trained, its function is that of `rtn`.

    Raises:
        ValueError: As `effnb.inference.quantization.rtn`.
    """
    rounded = rtn(model, bits, group_size=group_size, symmetric=symmetric, layers=layers)
    return tune_scales(rounded, layers=layers)


def scales_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The scales of all layers on uniform grids, in half precision: a task, in a few kilobytes.

    Args:
        model: A model that is tuned, or was.

    Raises:
        ValueError: When there is none.
    """
    return {
        f"{name}.scales": layer.quantized.scales.detach().clone()
        for name, layer in _scaled(model).items()
    }


def load_scales(model: Model, state: Mapping[str, Tensor]) -> Model:
    """Change the task: the same integers with other scales.

    Args:
        model: A model that is tuned, or one as `to_quantized` or any method makes it; not changed.
        state: What `scales_state_dict` gave for a model with the same integers. Layers that are not
            tuned and not in it keep their scales.

    Raises:
        ValueError: When names or shapes do not fit, or a scale is not a half-precision number above
            0.
    """
    layers = _scaled(model)
    expected = {f"{name}.scales": layer for name, layer in layers.items()}
    extra = sorted(state.keys() - expected.keys())
    missing = sorted(expected.keys() - state.keys())
    tuned = any(isinstance(layer, ScaleTunedLinear) for layer in layers.values())
    if not state or extra or (missing and tuned):
        problem = f"have {extra[0]}, which the model has not" if extra else f"lack {missing[0]}"
        raise ValueError(f"the scales do not fit the model: they {problem}.")
    new: dict[str, nn.Module] = {}
    for key in state:
        name, layer = key.removesuffix(".scales"), expected[key]
        old = layer.quantized.scales
        scales = state[key].to(old.device)
        if scales.shape != old.shape:
            raise ValueError(
                f"{name}.scales has shape {tuple(scales.shape)}; the model's is {tuple(old.shape)}."
            )
        half = scales.to(old)
        if not bool(((half > 0) & (half.to(scales) == scales) & half.isfinite()).all()):
            raise ValueError(
                f"{name}.scales has entries that are no half-precision number above 0."
            )
        if isinstance(layer, ScaleTunedLinear):
            new[name] = ScaleTunedLinear(QuantizedLinear(layer.start, layer.bias))
            with torch.no_grad():
                new[name].delta.copy_(half.float() - layer.start.scales.float())
        else:
            new[name] = QuantizedLinear(replace(layer.quantized, scales=half.clone()), layer.bias)
    return replace_modules(model, new)


def to_quantized(model: Model) -> Model:
    """The tuned model as an ordinary quantized one, with the same function and size.

    Raises:
        ValueError: When no layer's scales were tuned.
    """
    layers = named_modules_of(model, ScaleTunedLinear)
    return replace_modules(model, {name: layer.converted() for name, layer in layers.items()})


def _scaled(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with scales: those that are tuned, or else those that are quantized."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, ScaleTunedLinear)}
    if not found:
        found = {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, QuantizedLinear) and isinstance(m.quantized, QuantizedTensor)
        }
    if not found:
        raise ValueError("the model has no layer on a uniform grid.")
    return found
