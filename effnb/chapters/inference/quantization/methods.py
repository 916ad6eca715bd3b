"""What the chapter on quantization measures live: the panel's methods, errors layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.calibration import Hessian, layerwise
from effnb.core.outliers import inject_outliers
from effnb.evaluation import decode_tokens_per_second, retrieval
from effnb.inference import quantization
from effnb.inference.quantization.activations import activation_codes
from effnb.lab import corpora, load, subjects
from effnb.lab.bench import Bench
from effnb.lab.quality import Subject

GROUPS: dict[str, quantization.Granularity] = {"row": "row", "64": 64}
"""The panel's group sizes by name."""


def panel_methods(calibration: Int[Tensor, "batch time"]) -> dict[str, Callable[..., nn.Module]]:
    """Every method of the panel as a function of a model and of the knobs that it reads.

    The knobs are `bits`, `group` (a name of `GROUPS`) and `outliers`, the factor by which sixteen
    channels are enlarged before the model is rounded; 0 leaves it alone.

    Args:
        calibration: Token ids for the methods that look at inputs.
    """

    def with_outliers(model: nn.Module, outliers: int) -> nn.Module:
        if not outliers:
            return model
        channels = range(0, model.config.hidden_size, 16)
        return inject_outliers(model, channels, float(outliers))

    def rtn(model: nn.Module, bits: int, group: str, outliers: int) -> nn.Module:
        model = with_outliers(model, outliers)
        return quantization.rtn(model, bits, group_size=GROUPS[group])

    def clipped(model: nn.Module, bits: int, group: str, outliers: int) -> nn.Module:
        model = with_outliers(model, outliers)
        return quantization.rtn(model, bits, group_size=GROUPS[group], clip="mse")

    def gptq(model: nn.Module, bits: int, group: str, outliers: int) -> nn.Module:
        model = with_outliers(model, outliers)
        return quantization.gptq(model, calibration, bits, group_size=GROUPS[group])

    def awq(model: nn.Module, bits: int, group: str, outliers: int) -> nn.Module:
        model = with_outliers(model, outliers)
        few = calibration[: max(1, len(calibration) // 4)]  # its search takes many passes
        return quantization.awq(model, few, bits, group_size=GROUPS[group], grid=10)

    def rotated(model: nn.Module, bits: int, group: str) -> nn.Module:
        return quantization.rtn(quantization.rotate(model), bits, group_size=GROUPS[group])

    def plain_inputs(model: nn.Module, bits: int, outliers: int) -> nn.Module:
        return quantization.quantize_activations(with_outliers(model, outliers), bits, bits)

    def smooth_inputs(model: nn.Module, bits: int, outliers: int) -> nn.Module:
        model = with_outliers(model, outliers)
        return quantization.smoothquant(model, calibration, weight_bits=bits, activation_bits=bits)

    def stored_as(form: Callable[[Tensor], Any]) -> Callable[..., nn.Module]:
        def stored(model: nn.Module, outliers: int) -> nn.Module:
            return quantization.quantize_linears(with_outliers(model, outliers), form)

        return stored

    return {
        "RTN": rtn,
        "GPTQ": gptq,
        "AWQ": awq,
        "RTN, clipped": clipped,
        "rotate, then RTN": rotated,
        "inputs too: plain": plain_inputs,
        "inputs too: SmoothQuant": smooth_inputs,
        **{name: stored_as(form) for name, form in FORMATS.items()},
    }


IDLE = {"rotate, then RTN": "it folds gains into weights first, which undoes the outliers"}
"""Why a method of the panel leaves a knob alone, where that is not plain."""

FORMATS: dict[str, Callable[[Tensor], Any]] = {
    "NF4": partial(quantization.quantize_table, table="nf4", block_size=64),
    "FP4": partial(quantization.quantize_table, table="e2m1", block_size=64),
    "FP8": partial(quantization.quantize_table, table="e4m3", block_size=64),
    "ternary": quantization.ternarize,
    "binary": quantization.binarize,
}
"""Formats without knobs: what each stores a weight as."""


def evaluated(model: nn.Module) -> nn.Module:
    """The same function with packed weights read back, which is quick to evaluate.

    Rounded inputs are then multiplied in floating point, which gives the same numbers up to
    rounding and takes a fraction of the time.
    """
    packed = any(isinstance(m, quantization.QuantizedLinear) for m in model.modules())
    return quantization.dequantized(model) if packed else model


def subject(bench: Bench) -> Subject:
    """The bench's model and the panel's look at it; the size is that of the packed form."""
    return subjects.subject(bench, evaluated)


def hessians(model: nn.Module, calibration: Int[Tensor, "batch time"]) -> dict[str, Tensor]:
    r"""$H = \frac2N X X^\top$ of every linear layer's inputs, by the layer's name."""
    seen: dict[str, Hessian] = {}

    def observe(name: str, layer: nn.Linear) -> Hessian:
        seen[name] = Hessian(layer.in_features, layer.weight.device)
        return seen[name]

    layerwise(model, calibration, observe, lambda name, layer, hessian: None)
    return {name: hessian.value for name, hessian in seen.items()}


def output_error(delta: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]) -> float:
    r"""$\operatorname{tr}(\Delta W\, H\, \Delta W^\top)$, twice the output's mean squared error."""
    return float((delta @ hessian * delta).sum())


def error_ratios(
    model: nn.Module, seen: dict[str, Tensor], bits: int, **grid: Any
) -> list[tuple[str, float, float]]:
    """GPTQ's squared error over rounding to nearest's: of the weights, and of the outputs.

    Returns:
        Name, ratio of the weights' errors and ratio of the outputs' errors, for every layer.
    """
    found = []
    for name, hessian in seen.items():
        weight = model.get_submodule(name).weight.detach()
        nearest, gptq = (
            stored.dequantize() - weight
            for stored in (
                quantization.quantize(weight, bits, **grid),
                quantization.gptq_weight(weight, hessian, bits, **grid),
            )
        )
        found.append(
            (
                name,
                float(gptq.square().sum() / nearest.square().sum()),
                output_error(gptq, hessian) / output_error(nearest, hessian),
            )
        )
    return found


@dataclass(frozen=True)
class Smoothed:
    """One product of 8-bit inputs and weights, with or without SmoothQuant.

    Attributes:
        inputs: Largest magnitude of each input channel, as it is rounded.
        weights: Largest magnitude of each column of the weight, as it is rounded.
        error: Relative error of the product.
    """

    inputs: Float[Tensor, " in"]
    weights: Float[Tensor, " in"]
    error: float


def smoothed_product(alpha: float | None, outlier: float = 60.0, seed: int = 0) -> Smoothed:
    """Round one layer whose inputs have one large channel; None is no smoothing at all.

    Inputs are rounded token by token and weights row by row, both to 8 bits.
    """
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(512, 32, generator=draw)
    inputs[:, 3] *= outlier
    weight = torch.randn(256, 32, generator=draw) / 8
    exact = inputs @ weight.T
    if alpha is not None:
        scales = quantization.smooth_scales(inputs.abs().amax(0), [weight], alpha)
        inputs, weight = inputs / scales, weight * scales
    codes, steps = activation_codes(inputs)
    small = quantization.quantize(weight, 8, symmetric=True)
    product = quantization.quantized_matmul(codes, steps, small)
    return Smoothed(
        inputs.abs().amax(0), weight.abs().amax(0), float((product - exact).norm() / exact.norm())
    )


def search_with(bits: int, group_size: quantization.Granularity, queries: int = 100) -> str:
    """Search with MiniLM as it is and rounded, among descriptions that the sweep did not use."""
    encoder = load("minilm-l6", device="cpu")
    packages = [package for package in corpora.packages("validation") if len(package.text) > 300]
    some = packages[:queries]
    small = quantization.rtn(encoder.model, bits, group_size=group_size)
    found = {}
    for name, model in (("original", encoder.model), ("rounded", quantization.dequantized(small))):
        one = replace(encoder, model=model)
        vectors = (
            one.encode([package.synopsis for package in some]),
            one.encode([package.text[:600] for package in some]),
        )
        found[name] = retrieval(*vectors).recall_at_1
    label = quantization.group_size_label(group_size)
    return (
        f"The original finds {found['original']:.0%} of {len(some)} descriptions first; rounded to "
        f"{bits} bits, {label}, it finds {found['rounded']:.0%}."
    )


def speed_here(bits: int = 4, tokens: int = 16) -> str:
    """How much faster SmolLM2 decodes on this machine with packed weights."""
    loaded = load("smollm2-135m", device="cpu")
    start = loaded.tokenizer("Efficient language models", return_tensors="pt").input_ids
    before, after = (
        decode_tokens_per_second(model, start, tokens=tokens)
        for model in (loaded.model, quantization.fast(loaded.model, bits))
    )
    return f"On this machine int{bits} decodes {after / before:.2f} times as fast as float32."
