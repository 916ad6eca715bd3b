r"""After pruning, and before it: win quality back, and decide which layer gives how much.

*Recovery.* Fine-tuning repairs much of the damage if the pruned weights stay 0. `fine_tune` holds
the mask through every step. A model whose structures were cut out has no mask to hold: `recover`
trains a LoRA on it, as LLM-Pruner does, and merges it into the weights.

*Allocation.* The same sparsity everywhere is rarely best. One threshold over all layers lets the
scores decide. Or each layer is pruned alone, the loss measured, and the layers that mind least give
most (Han et al., 2015, arXiv 1506.02626, measured such sensitivities layer by layer). Every
allocation is a sparsity per layer's name, which all methods of this package take as `sparsity`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor, nn

from effnb.core.modules import LayerChoice, Layers, Model, chooses_layers, linears
from effnb.core.training import (
    Batches,
    Loss,
    TrainingResult,
    TrainingSettings,
    causal_lm_loss,
    train,
)
from effnb.finetuning import lora
from effnb.inference.pruning.magnitude import magnitude
from effnb.inference.pruning.masked_training import PruningRun, train_masked
from effnb.inference.pruning.masks import (
    apply_masks,
    check_sparsity,
    choose_masks,
    masks_of,
    prunable,
    refuse,
)


def fine_tune(
    model: Model,
    batches: Batches,
    settings: TrainingSettings,
    *,
    masks: Mapping[str, Tensor] | None = None,
    loss: Loss = causal_lm_loss,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: bool | Callable[[int, int, float], None] = False,
) -> PruningRun:
    """Train a pruned model on; what is 0 stays 0.

    A pruned weight gets no gradient, so neither momentum nor the clipping of gradients nor weight
    decay lets it matter, at any step.

    Args:
        model: A pruned model; it is not changed. Parameters that require no gradient stay as they
            are, so that only biases and norms, or only a LoRA, can be trained as well.
        batches: From the step's number to its batch.
        settings: Steps, rates, seeds.
        masks: Which weights may be other than 0, by layer; by default those that are.
        loss: From (model, batch) to a scalar.
        evaluate: From the model to named numbers, as in `effnb.core.training.train`.
        progress: True for a progress bar; or a function of (steps done, steps, loss).

    Raises:
        ValueError: A quantized model, no linear layer, or masks that do not fit.
    """
    refuse(model)
    masks = masks_of(model) if masks is None else masks
    return train_masked(
        apply_masks(model, masks), batches, settings, masks,
        loss=loss, evaluate=evaluate, progress=progress,
    )  # fmt: skip


@dataclass(frozen=True)
class Recovered:
    """A model after training a LoRA on it.

    Attributes:
        model: The model with the LoRA merged in: as large as before, and as plain.
        training: Losses of all steps.
        trained_parameters: Numbers that were trained.
    """

    model: nn.Module = field(repr=False)
    training: TrainingResult = field(repr=False)
    trained_parameters: int


@chooses_layers
def recover(
    model: nn.Module,
    batches: Batches,
    settings: TrainingSettings,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    layers: LayerChoice = "*",
    seed: int = 0,
    loss: Loss = causal_lm_loss,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: bool | Callable[[int, int, float], None] = False,
) -> Recovered:
    """Train a LoRA on a smaller dense model and merge it.

    Not for masked models: the product of a LoRA fills every zero. `fine_tune` is for those.

    Args:
        model: A model with linear layers; it is not changed.
        batches: From the step's number to its batch.
        settings: Steps, rates, seeds.
        rank: Of the LoRA.
        alpha: Of the LoRA.
        layers: Name patterns of the layers that get one.
        seed: Of the LoRA's start.
        loss: From (model, batch) to a scalar.
        evaluate: From the model to named numbers, as in `effnb.core.training.train`.
        progress: True for a progress bar; or a function of (steps done, steps, loss).

    Raises:
        ValueError: A quantized model, no linear layer, or numbers out of range.
    """
    refuse(model)
    working = lora.attach(model, "recovery", rank=rank, alpha=alpha, layers=layers, seed=seed)
    count = sum(p.numel() for p in lora.delta_parameters(working, "recovery").values())
    result = train(working, batches, settings, loss=loss, evaluate=evaluate, progress=progress)
    return Recovered(lora.merge(working, "recovery"), result, count)


@chooses_layers
def allocate_uniform(
    model: nn.Module,
    sparsity: float,
    *,
    layers: LayerChoice = "*",
) -> dict[str, float]:
    """The same sparsity for every fitting layer.

    Raises:
        ValueError: A sparsity outside [0, 1), or no fitting layer.
    """
    check_sparsity(sparsity)
    return dict.fromkeys(linears(model, layers), sparsity)


def allocate_global(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """The sparsity that each layer has under one threshold for all scores.

    Args:
        scores: Scores by layer, such as `magnitude_scores`, `taylor_scores` or `wanda_scores` give.
        sparsity: Part of all weights to remove.

    Raises:
        ValueError: A sparsity outside [0, 1), or when a whole layer would go.
    """
    masks = choose_masks(scores, sparsity, "global")
    return {name: 1 - int(mask.sum()) / mask.numel() for name, mask in masks.items()}


Sensitivity = dict[str, dict[float, float]]
"""By layer: the loss after pruning this layer alone, by sparsity; at 0.0 the dense model's."""


@chooses_layers
def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    levels: Sequence[float] = (0.5, 0.75, 0.9),
    *,
    prune: Callable[[nn.Module, dict[str, float], str], nn.Module] | None = None,
    layers: LayerChoice = "*",
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Prune each layer alone, at several sparsities, and measure what it does to the loss.

    Args:
        model: The dense model; it is not changed.
        evaluate: From a model to its loss, the lower the better.
        levels: Sparsities in (0, 1) to try.
        prune: From (model, sparsity by layer, name of the one layer) to a pruned model; by default
            magnitude within the layer.
        layers: Name patterns of the layers.
        progress: Called with (evaluations done, evaluations).

    Raises:
        ValueError: No levels or levels outside (0, 1), a loss that is not finite, no fitting layer,
            or a quantized model.
    """
    levels = sorted(set(levels))
    if not levels or not 0 < levels[0] <= levels[-1] < 1:
        raise ValueError(f"levels are {levels}; give sparsities above 0 and below 1.")
    chosen, _ = prunable(model, levels[-1], "layer", layers)
    if prune is None:
        prune = _prune_one
    total = 1 + len(chosen) * len(levels)
    done = 1
    dense = _finite(evaluate(model), "the dense model")
    found: Sensitivity = {}
    for name in chosen:
        found[name] = {0.0: dense}
        for level in levels:
            loss = evaluate(prune(model, {name: level}, name))
            found[name][level] = _finite(loss, f"{name} at sparsity {level}")
            done += 1
            if progress:
                progress(done, total)
    return found


def _prune_one(model: nn.Module, sparsity: dict[str, float], name: str) -> nn.Module:
    return magnitude(model, sparsity, layers=Layers(name, ()))


def _finite(loss: float, of: str) -> float:
    if not math.isfinite(loss):
        raise ValueError(f"the loss of {of} is {loss}; sensitivities need finite numbers.")
    return float(loss)


def allocate_by_sensitivity(
    measured: Mapping[str, Mapping[float, float]], sizes: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    r"""The sparsity per layer with the smallest sum of measured losses.

    Minimises $\sum_l L_l(s_l)$ under $\sum_l n_l s_l = s \sum_l n_l$, with $L_l$ the lower convex
    hull of the layer's measurements, straight between them. The exact optimum: of all pieces of all
    hulls, the flattest per removed weight are used first.

    Args:
        measured: Loss by layer and sparsity, from `sensitivity`; each with the sparsity 0.0.
        sizes: Weights of each layer.
        sparsity: Part of all weights to remove.

    Raises:
        ValueError: A sparsity outside [0, 1) or beyond what was measured, or a layer without its
            size or without its dense loss.
    """
    check_sparsity(sparsity)
    for name, curve in measured.items():
        if name not in sizes:
            raise ValueError(f"{name} was measured but has no size.")
        if 0.0 not in curve:
            raise ValueError(f"{name} was not measured at sparsity 0.")
    total = sum(sizes[name] for name in measured)
    most = sum(sizes[name] * max(curve) for name, curve in measured.items()) / total
    if sparsity > most + 1e-12:
        raise ValueError(
            f"sparsity is {sparsity}; with the sparsities that were measured at most {most:.4g} "
            "can be reached."
        )
    pieces = []
    for name, curve in measured.items():
        hull = _lower_hull(sorted(curve.items()))
        for (a, low), (b, high) in pairwise(hull):
            pieces.append(((high - low) / ((b - a) * sizes[name]), name, (b - a) * sizes[name]))
    left = sparsity * total
    result = dict.fromkeys(measured, 0.0)
    for _, name, weights in sorted(pieces, key=lambda piece: piece[0]):
        taken = min(weights, left)
        result[name] += taken / sizes[name]
        left -= taken
    return result


def _lower_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no straight line between two others runs below or through."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull
