r"""How much a model suffers when one of its layers is rounded to a number of bits.

Three ways to measure it, from a guess to the thing itself, each a table from layer to bits to cost:

- `output_sensitivity`: how far the layer's own output moves, on real inputs;
- `hessian_sensitivity`: HAWQ-V2's estimate of the loss from its curvature,
  $\Omega_i^{(b)} = \frac{\operatorname{tr} H_i}{n_i} \lVert Q_b(W_i) - W_i \rVert_F^2$
  (Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", 2019,
  arXiv 1911.03852), with $H_i$ the second derivative of the loss by the layer's $n_i$ weights;
- `loss_sensitivity`: how far the model's loss rises when this layer alone is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from effnb.core.calibration import Calibration, CalibrationLike, Hessian, batches_of, layerwise
from effnb.core.context import context_limit
from effnb.core.gradients import loss_batches, to_device
from effnb.core.modules import LayerChoice, chooses_layers, linears, replace_modules, share
from effnb.core.training import next_token_loss, target_count
from effnb.inference.quantization.formats import quantize
from effnb.inference.quantization.linear import QuantizedLinear, refuse_quantized
from effnb.inference.quantization.stored import Stored, check_bits

Rounding = Callable[[Tensor, int], Stored]
"""From a weight and bits to its stored form, as `functools.partial(quantize, group_size=64)`."""
Loss = Callable[[Callable[..., Any], Mapping[str, Tensor]], Tensor]
"""From a model and the keyword arguments of one batch to the mean loss of its tokens."""


@dataclass(frozen=True)
class HessianTrace:
    r"""An estimate of the trace of the loss's second derivative by one layer's weights.

    Attributes:
        trace: The mean of the samples.
        standard_error: How far chance moves it: their standard deviation over the root of their
            number; infinite for a single sample.
        samples: Number of random vectors.
        weights: $n_i$, the size of the layer.
    """

    trace: float
    standard_error: float
    samples: int
    weights: int


@chooses_layers
def output_sensitivity(
    model: nn.Module,
    calibration: CalibrationLike,
    bits: Iterable[int],
    *,
    rounding: Rounding = quantize,
    layers: LayerChoice = "*",
    executor: Executor | None = None,
) -> dict[str, dict[int, float]]:
    r"""Share of each layer's output that is error after rounding, on the original model's inputs.

    $\lVert (Q_b(W) - W) X \rVert_F^2 \, / \, \lVert W X \rVert_F^2$, by way of
    $\lVert A X \rVert_F^2 = \frac N2 \operatorname{tr}(A H A^\top)$ with $H = \frac2N X X^\top$.

    Args:
        model: A transformer whose blocks `effnb.core.modules.find_blocks` finds; not changed.
        calibration: See `effnb.core.calibration.batches_of`.
        bits: Bit-widths to try.
        rounding: Rounds a weight.
        layers: Name patterns of the layers; only those inside the blocks.
        executor: Any `concurrent.futures` executor, to round layers at the same time.

    Raises:
        ValueError: Bits, calibration data or patterns that do not fit, or a quantized model.
    """
    bits = check_all_bits(bits)
    refuse_quantized(model)
    pending: dict[str, Callable[[], dict[int, float]]] = {}

    def compress(name: str, layer: nn.Linear, seen: Hessian) -> None:
        job = _job(executor, _output_errors, layer.weight.detach(), seen.value, rounding, bits)
        # Without an executor do it now: otherwise all Hessians would stay in memory.
        pending[name] = job if executor else partial(dict, job())

    layerwise(
        model,
        calibration,
        lambda name, layer: Hessian(layer.in_features, layer.weight.device),
        compress,
        layers=layers,
        share_observers=True,
    )
    return {name: result() for name, result in pending.items()}


def _output_errors(
    weight: Tensor, hessian: Tensor, rounding: Rounding, bits: Sequence[int]
) -> dict[int, float]:
    def energy(matrix: Tensor) -> float:
        return float(((matrix @ hessian) * matrix).sum())

    weight = weight.float()
    whole = energy(weight)
    return {
        b: energy(rounding(weight, b).dequantize() - weight) / whole if whole > 0 else 0.0
        for b in bits
    }


@chooses_layers
def hessian_traces(
    model: nn.Module,
    calibration: CalibrationLike,
    *,
    samples: int = 16,
    seed: int = 0,
    jointly: bool = True,
    loss: Loss = next_token_loss,
    layers: LayerChoice = "*",
) -> dict[str, HessianTrace]:
    r"""Hutchinson's estimate of $\operatorname{tr} H_i$ for each layer, without ever forming $H_i$.

    For random signs $z$, $\mathbb E[z^\top H z] = \operatorname{tr} H$; $H z$ is the gradient of
    $g^\top z$ with $g$ the gradient of the loss. One sample has the variance
    $2 (\lVert H_i \rVert_F^2 - \sum_j H_{i,jj}^2)$.

    Args:
        model: The model; it is not changed, need not be trainable, and runs without dropout.
        calibration: See `effnb.core.calibration.batches_of`.
        samples: Random vectors.
        seed: Their seed.
        jointly: Draw $z$ for all layers at once, so that a sample costs one backward pass instead
            of one for each layer. The estimate stays unbiased; the blocks of $H$ between two layers
            add $\sum_{j \ne i} \lVert H_{ij} \rVert_F^2$ to the variance.
        loss: From the model and a batch's keyword arguments to the mean loss.
        layers: Name patterns of the layers.

    Raises:
        ValueError: Fewer than one sample, no calibration data, or no fitting layer.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; at least 1 is needed.")
    batches, report = model_batches(model, calibration, loss), Calibration.of(calibration).report
    model = share(model).eval()
    leaves = {
        f"{name}.weight": layer.weight.detach().requires_grad_()
        for name, layer in linears(model, layers).items()
    }
    parameters = list(leaves.values())
    totals = torch.zeros(samples, len(leaves), dtype=torch.float64)
    weight = 1 / sum(_weight(batch, loss) for batch in batches)

    def run(**keywords: Any) -> Any:
        return torch.func.functional_call(model, leaves, (), keywords)

    derive = partial(
        torch.autograd.grad, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    for number, batch in enumerate(batches):
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels derive once
            gradients = derive(loss(run, batch), parameters, create_graph=True)
            for sample in range(samples):
                generator = torch.Generator().manual_seed(seed * 1_000_003 + sample)
                signs = [_signs(p, generator) for p in parameters]
                if jointly:
                    products = derive(gradients, parameters, grad_outputs=signs)
                else:
                    products = [
                        derive(g, p, grad_outputs=z)[0]
                        for g, p, z in zip(gradients, parameters, signs, strict=True)
                    ]
                for i, (z, product) in enumerate(zip(signs, products, strict=True)):
                    totals[sample, i] += weight * _weight(batch, loss) * float((z * product).sum())
        del gradients
        report(number + 1, len(batches))
    spread = totals.std(0) / samples**0.5 if samples > 1 else totals[0] + float("inf")
    return {
        name.removesuffix(".weight"): HessianTrace(
            float(totals[:, i].mean()), float(spread[i]), samples, leaf.numel()
        )
        for i, (name, leaf) in enumerate(leaves.items())
    }


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)


def hessian_sensitivity(
    model: nn.Module,
    traces: Mapping[str, HessianTrace],
    bits: Iterable[int],
    *,
    rounding: Rounding = quantize,
    executor: Executor | None = None,
) -> dict[str, dict[int, float]]:
    r"""HAWQ-V2's cost $\frac{\operatorname{tr} H_i}{n_i} \lVert Q_b(W_i) - W_i \rVert_F^2$.

    Twice the rise of the loss to second order, if the error pointed in all directions alike. A
    negative trace (the loss is no minimum there) counts as 0.

    Args:
        model: The model the traces were measured on.
        traces: What `hessian_traces` gave.
        bits: Bit-widths to try.
        rounding: Rounds a weight.
        executor: Any `concurrent.futures` executor, to round layers at the same time.

    Raises:
        ValueError: Bits that the format does not have.
    """
    bits = check_all_bits(bits)
    pending = {
        name: _job(executor, _errors, model.get_submodule(name).weight.detach(), rounding, bits)
        for name in traces
    }
    return {
        name: {
            b: max(0.0, traces[name].trace) / traces[name].weights * error
            for b, error in result().items()
        }
        for name, result in pending.items()
    }


def _errors(weight: Tensor, rounding: Rounding, bits: Sequence[int]) -> dict[int, float]:
    weight = weight.float()
    return {b: float((rounding(weight, b).dequantize() - weight).square().sum()) for b in bits}


@chooses_layers
def loss_sensitivity(
    model: nn.Module,
    calibration: CalibrationLike,
    bits: Iterable[int],
    *,
    rounding: Rounding = quantize,
    loss: Loss = next_token_loss,
    layers: LayerChoice = "*",
    executor: Executor | None = None,
) -> dict[str, dict[int, float]]:
    """Rise of the model's loss when one layer alone is rounded, in nats per token.

    One pass over the calibration data for each layer and bit-width.

    Args:
        model: The model; it is not changed.
        calibration: See `effnb.core.calibration.batches_of`.
        bits: Bit-widths to try.
        rounding: Rounds a weight.
        loss: From the model and a batch's keyword arguments to the mean loss.
        layers: Name patterns of the layers.
        executor: Any `concurrent.futures` executor: threads, processes, or a cluster's. Each layer
            is one call; for processes, `rounding` and `loss` must be functions of a module.

    Raises:
        ValueError: Bits, calibration data or patterns that do not fit, or a quantized model.
    """
    bits = check_all_bits(bits)
    refuse_quantized(model)
    names = list(linears(model, layers))
    batches = model_batches(model, calibration, loss)
    quiet = share(model).eval()
    base = mean_loss(quiet, batches, loss)
    pending = [
        (name, _job(executor, _losses, quiet, name, batches, loss, rounding, bits))
        for name in names
    ]
    table = {}
    for number, (name, result) in enumerate(pending):
        table[name] = {b: value - base for b, value in result().items()}
        Calibration.of(calibration).report(number + 1, len(names))
    return table


def _losses(
    model: nn.Module,
    name: str,
    batches: list[dict[str, Any]],
    loss: Loss,
    rounding: Rounding,
    bits: Sequence[int],
) -> dict[int, float]:
    layer = model.get_submodule(name)
    result = {}
    for b in bits:
        stored = QuantizedLinear(rounding(layer.weight.detach(), b), layer.bias)
        changed = replace_modules(model, {name: stored.dequantized(layer.weight.dtype)})
        result[b] = mean_loss(changed, batches, loss)
    return result


def mean_loss(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], loss: Loss = next_token_loss
) -> float:
    """The loss over all batches, each weighed by the tokens it scores."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            total += float(loss(model, batch)) * _weight(batch, loss)
            count += _weight(batch, loss)
    return total / count


def _job(executor: Executor | None, function: Callable, *arguments: Any) -> Callable[[], Any]:
    """Start a call on the executor, if there is one; returns how to get its result."""
    if executor is None:
        return partial(function, *arguments)
    return executor.submit(function, *arguments).result


def check_all_bits(bits: Iterable[int]) -> list[int]:
    """The bit-widths as a list; refuses an empty one and those that do not exist."""
    bits = list(bits)
    if not bits:
        raise ValueError("bits is empty; give at least one bit-width.")
    for b in bits:
        check_bits(b)
    return bits


def model_batches(
    model: nn.Module, calibration: CalibrationLike, loss: Loss = next_token_loss
) -> list[dict[str, Any]]:
    """Calibration data as keyword arguments, on the model's device."""
    if loss is next_token_loss:
        return loss_batches(model, calibration, None)
    device = next(model.parameters()).device
    given = batches_of(calibration, context_limit(model))
    return [to_device(batch, device) for batch in given]


def _weight(batch: Mapping[str, Any], loss: Loss) -> int:
    """How much a batch counts: the tokens that it scores, or that are no padding."""
    if loss is next_token_loss:
        return target_count(batch)
    mask = batch.get("attention_mask")
    ids = batch["input_ids"]
    return ids.numel() if mask is None or mask.ndim != 2 else int((mask != 0).sum())
