r"""Training while masks hold: pruned weights stay 0 whatever the optimizer does.

A layer under a mask computes with $W \odot M$. The gradient of a pruned weight is then exactly 0,
so it adds nothing to the length that clipping measures, and whatever momentum or weight decay do
to the stored number, the model never sees it. After training the zeros are written into the weight
and the layer is an ordinary one again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.core.linear_form import in_linear_form, restore
from effnb.core.modules import Model, named_modules_of, replace_modules
from effnb.core.training import (
    Batches,
    Loss,
    TrainingResult,
    TrainingSettings,
    causal_lm_loss,
    train,
)
from effnb.inference.pruning.masks import layers_of, masked, refuse, summarize, with_weight


@dataclass(frozen=True)
class PruningRun:
    """What came of training with masks.

    Attributes:
        model: The trained model; pruned weights are exactly 0 and its layers are `nn.Linear`.
        masks: Which weights were kept, by layer.
        training: Losses, evaluations and time.
        sparsities: Sparsity of all masked layers together at every step.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    training: TrainingResult
    sparsities: list[float]


class MaskedLinear(nn.Linear):
    r"""$y = x\,(M \odot W)^\top + b$, for as long as training lasts."""

    mask: Tensor

    def __init__(self, layer: nn.Linear, mask: Bool[Tensor, "out in"]) -> None:
        """Take over the layer's parameters and put a mask on its weight."""
        super().__init__(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
        )
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("mask", mask.to(layer.weight.device))

    def kept(self) -> Float[Tensor, "out in"]:
        r"""$M \odot W$."""
        return self.weight * self.mask

    def forward(self, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Multiply with the weights that are kept."""
        return nn.functional.linear(inputs, self.kept(), self.bias)


def own(model: Model) -> Model:
    """A copy whose trainable parameters and buffers are its own; frozen parameters are shared."""
    # A tensor made in inference mode cannot take part in training, not even frozen.
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad and not p.is_inference()}
    return copy.deepcopy(model, memo=frozen)


@in_linear_form
def hold(model: Model, masks: Mapping[str, Tensor]) -> Model:
    """A copy of a model, ready for training, whose named layers are under masks.

    Raises:
        ValueError: A quantized model, a name that is no linear layer, or a mask of another shape.
    """
    refuse(model)
    layers_of(model, masks)
    copied = own(model)
    new = {name: MaskedLinear(copied.get_submodule(name), mask) for name, mask in masks.items()}
    return replace_modules(copied, new)


def release(model: Model) -> Model:
    """The same function with ordinary linear layers that hold exact zeros.

    Raises:
        ValueError: When no layer is under a mask.
    """
    new = {}
    for name, layer in named_modules_of(model, MaskedLinear).items():
        plain = nn.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
        )
        plain.weight, plain.bias = layer.weight, layer.bias
        new[name] = with_weight(plain, masked(layer.weight, layer.mask))
    return restore(replace_modules(model, new))


def train_masked(
    model: Model,
    batches: Batches,
    settings: TrainingSettings,
    masks: Mapping[str, Tensor],
    *,
    update: Callable[[int, dict[str, MaskedLinear]], None] | None = None,
    loss: Loss = causal_lm_loss,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: bool | Callable[[int, int, float], None] = False,
) -> PruningRun:
    """Train a copy of a model under masks, which may change on the way.

    Args:
        model: The model; it is not changed. Parameters that require no gradient stay as they are.
        batches: From the step's number to its batch.
        settings: Steps, rates, seeds.
        masks: The masks at the start, by layer; True keeps a weight.
        update: Called before each step with its number and the masked layers; it may set their
            `mask`.
        loss: From (model, batch) to a scalar.
        evaluate: From the model to named numbers, as in `effnb.core.training.train`.
        progress: True for a progress bar; or a function of (steps done, steps, loss).

    Raises:
        ValueError: As `hold`; or when masks change and `settings.patience` asks for the best
            weights of the past, which belonged to other masks.
    """
    if update is not None and settings.patience:
        raise ValueError(
            f"patience is {settings.patience}; a run that changes its masks cannot go back to "
            "earlier weights, so patience must be 0."
        )
    working = hold(model, masks)
    layers = named_modules_of(working, MaskedLinear)
    sparsities: list[float] = []

    def numbered(step: int) -> tuple[int, Any]:
        return step, batches(step)

    def masked_loss(training: nn.Module, batch: tuple[int, Any]) -> Tensor:
        if update is not None:
            with torch.no_grad():
                update(batch[0], layers)
        sparsities.append(summarize({name: m.mask for name, m in layers.items()}).sparsity)
        return loss(training, batch[1])

    result = train(
        working, numbered, settings, loss=masked_loss, evaluate=evaluate, progress=progress
    )
    final = {name: layer.mask for name, layer in layers.items()}
    return PruningRun(release(working), final, result, sparsities)
