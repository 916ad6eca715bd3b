r"""Movement pruning: while fine-tuning, remove the weights that move towards 0.

A weight can be large only because pre-training made it so. Movement pruning learns a score $S$ for
every weight together with the weights themselves. The model computes with $W' = W \odot M(S)$; the
choice of $M$ has no gradient, so the one of $W'$ is passed straight through it:

$$\frac{\partial L}{\partial S} = \frac{\partial L}{\partial W'} \odot W, \qquad
  \frac{\partial L}{\partial W} = \frac{\partial L}{\partial W'} \odot M.$$

With plain gradient descent $S = -\alpha \sum_t \frac{\partial L}{\partial W'} \odot W$: a score
grows when its weight is pushed away from 0. Removed weights keep getting a score gradient, so they
can come back. In the *hard* form $M$ keeps the largest scores; in the *soft* form
$M = [\sigma(S) > \tau]$, and a penalty $\lambda\, \overline{\sigma(S)}$ pushes scores down.

Sanh, Wolf, Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, arXiv 2005.07683.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.core.modules import LayerChoice, Model, chooses_layers, named_modules_of, replace_modules
from effnb.core.training import (
    Batches,
    Loss,
    TrainingResult,
    TrainingSettings,
    causal_lm_loss,
    train,
)
from effnb.inference.pruning.magnitude import CubicSchedule
from effnb.inference.pruning.masked_training import MaskedLinear, own, release
from effnb.inference.pruning.masks import Pattern, choose_masks, keep_largest, prunable, summarize

LEAST_KEPT = 0.005
"""The soft form never keeps less of a layer, whatever the threshold."""


@dataclass(frozen=True)
class MovementRun:
    """What came of movement pruning.

    Attributes:
        model: The trained model; pruned weights are exactly 0 and its layers are `nn.Linear`.
        masks: Which weights were kept, by layer.
        scores: The learned scores, by layer.
        training: Losses (with the penalty, in the soft form), evaluations and time.
        sparsities: Sparsity of all layers together at every step.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    scores: dict[str, Tensor]
    training: TrainingResult
    sparsities: list[float]


class _StraightThrough(torch.autograd.Function):
    """The mask as numbers; its gradient goes to the scores as it is."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor) -> Tensor:
        return mask.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Rate(torch.autograd.Function):
    """Multiply by a number going forward, and by 1 going back."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, rate: float) -> Tensor:
        return parameter * rate

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class MovementLinear(MaskedLinear):
    r"""$y = x\,(W \odot M)^\top + b$ with a learned score for every weight.

    The trainer has one learning rate. Scores need another, so what is trained is $S / \rho$ with
    $\rho$ the ratio of the two, and it gets the gradient of $S$: an optimizer step on it moves $S$
    by $\rho$ times as much. It is a vector, since the trainer's weight decay is for matrices.
    """

    def __init__(self, layer: nn.Linear, rate_ratio: float = 1.0) -> None:
        """Start with all scores 0 and everything kept."""
        super().__init__(layer, torch.ones_like(layer.weight, dtype=torch.bool))
        self.rate_ratio = rate_ratio
        self.raw_scores = nn.Parameter(torch.zeros_like(layer.weight).flatten())

    @property
    def scores(self) -> Float[Tensor, "out in"]:
        """$S$, differentiable."""
        return _Rate.apply(self.raw_scores, self.rate_ratio).view_as(self.weight)

    def kept(self) -> Float[Tensor, "out in"]:
        r"""$W \odot M$, with the straight-through gradient."""
        return self.weight * _StraightThrough.apply(self.scores, self.mask)


def soft_mask(scores: Float[Tensor, "out in"], threshold: float) -> Bool[Tensor, "out in"]:
    r"""$[\sigma(S) > \tau]$, but at least one weight in 200 stays."""
    mask = torch.sigmoid(scores) > threshold
    least = math.ceil(LEAST_KEPT * mask.numel())
    if int(mask.sum()) >= least:
        return mask
    return keep_largest(scores.reshape(1, -1), mask.numel() - least).view(scores.shape)


@chooses_layers
def movement(
    model: Model,
    batches: Batches,
    settings: TrainingSettings,
    schedule: CubicSchedule,
    *,
    pattern: str = "layer",
    score_learning_rate: float = 1e-2,
    layers: LayerChoice = "*",
    loss: Loss = causal_lm_loss,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: bool | Callable[[int, int, float], None] = False,
) -> MovementRun:
    """Hard movement pruning: keep the largest scores, fewer and fewer as a schedule says.

    The paper's fine-tuning leaves embeddings frozen: set `requires_grad` of what should not be
    trained to False beforehand.

    Args:
        model: A trained model; a copy of it is fine-tuned.
        batches: From the step's number to its batch.
        settings: Steps, rates, seeds; `learning_rate` is that of the weights.
        schedule: Sparsity at each step; it must end before the last step. The paper leaves steps
            for learning before it begins, and steps at full sparsity after it ends.
        pattern: Where scores compete: "layer" (the paper's), "row", "global" or "N:M".
        score_learning_rate: Peak rate of the scores; it follows the same warm-up and decay.
        layers: Name patterns of the layers to prune.
        loss: From (model, batch) to a scalar.
        evaluate: From the model to named numbers, as in `effnb.core.training.train`.
        progress: True for a progress bar; or a function of (steps done, steps, loss).

    Raises:
        ValueError: A sparsity or pattern that does not fit, a schedule that does not end before the
            last step, a rate not above 0, patience, weights that are not finite, no fitting layer,
            a layer that would lose every weight, or a quantized model.
    """
    chosen, _ = prunable(model, schedule.final, pattern, layers)
    parsed = Pattern.parse(pattern)

    def choose(held: dict[str, MovementLinear], step: int) -> dict[str, Tensor]:
        sparsity = schedule.at(step)
        scores = {name: layer.scores.detach() for name, layer in held.items()}
        return choose_masks(
            scores, None if parsed.scope == "group" else sparsity, parsed.at(sparsity)
        )

    return _run(
        model, batches, settings, schedule, list(chosen), choose, score_learning_rate,
        None, loss, evaluate, progress,
    )  # fmt: skip


@chooses_layers
def soft_movement(
    model: Model,
    batches: Batches,
    settings: TrainingSettings,
    schedule: CubicSchedule,
    *,
    penalty: float,
    score_learning_rate: float = 1e-2,
    layers: LayerChoice = "*",
    loss: Loss = causal_lm_loss,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: bool | Callable[[int, int, float], None] = False,
) -> MovementRun:
    r"""Soft movement pruning: a penalty pushes scores down, and a threshold removes the low ones.

    How sparse each layer becomes is learned; the penalty decides how sparse the whole is. At each
    step it is $\lambda \frac{\tau_t}{\tau_f}\, \overline{\sigma(S)}$, the mean taken within each
    layer and then over layers. Sparsity "N:M" needs a fixed number per group: use `movement`.

    Args:
        model: A trained model; a copy of it is fine-tuned.
        batches: From the step's number to its batch.
        settings: Steps, rates, seeds; `learning_rate` is that of the weights.
        schedule: The threshold $\tau$ at each step; the paper ends at 0.1. Scores start at
            $\sigma(0) = 0.5$.
        penalty: $\lambda$. The larger, the sparser.
        score_learning_rate: Peak rate of the scores; it follows the same warm-up and decay.
        layers: Name patterns of the layers to prune.
        loss: From (model, batch) to a scalar.
        evaluate: From the model to named numbers, as in `effnb.core.training.train`.
        progress: True for a progress bar; or a function of (steps done, steps, loss).

    Raises:
        ValueError: A threshold outside (0, 1), a negative penalty, and otherwise as `movement`.
    """
    if not 0 < schedule.final < 1 or not 0 <= schedule.initial < 1:
        raise ValueError(
            f"the threshold goes from {schedule.initial} to {schedule.final}; it must lie in "
            "(0, 1)."
        )
    if not 0 <= penalty < float("inf"):
        raise ValueError(f"penalty is {penalty}; it must be at least 0.")
    chosen, _ = prunable(model, 0.0, "layer", layers)

    def choose(held: dict[str, MovementLinear], step: int) -> dict[str, Tensor]:
        threshold = schedule.at(step)
        return {name: soft_mask(m.scores.detach(), threshold) for name, m in held.items()}

    return _run(
        model, batches, settings, schedule, list(chosen), choose, score_learning_rate,
        penalty, loss, evaluate, progress,
    )  # fmt: skip


def _run(
    model: Model,
    batches: Batches,
    settings: TrainingSettings,
    schedule: CubicSchedule,
    names: list[str],
    choose: Callable[[dict[str, MovementLinear], int], dict[str, Tensor]],
    score_learning_rate: float,
    penalty: float | None,
    loss: Loss,
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
    progress: bool | Callable[[int, int, float], None],
) -> MovementRun:
    """Train weights and scores together; `choose` makes masks of scores."""
    if schedule.end >= settings.steps:
        raise ValueError(
            f"the schedule ends at step {schedule.end}; it must end before the last of the "
            f"{settings.steps} steps (the first is 0)."
        )
    if not 0 < score_learning_rate < float("inf"):
        raise ValueError(f"score_learning_rate is {score_learning_rate}; it must be above 0.")
    if settings.patience:
        raise ValueError(
            f"patience is {settings.patience}; a run that changes its masks cannot go back to "
            "earlier weights, so patience must be 0."
        )
    copied = own(model)
    ratio = score_learning_rate / settings.learning_rate
    new = {name: MovementLinear(copied.get_submodule(name), ratio) for name in names}
    working = replace_modules(copied, new)
    held = named_modules_of(working, MovementLinear)
    sparsities: list[float] = []

    def set_masks(step: int) -> dict[str, Tensor]:
        masks = choose(held, step)
        for name, layer in held.items():
            layer.mask = masks[name]
        return masks

    def masked_loss(training: nn.Module, batch: tuple[int, Any]) -> Tensor:
        step, given = batch
        with torch.no_grad():  # scores move at every step, and the masks with them
            sparsities.append(summarize(set_masks(step)).sparsity)
        value = loss(training, given)
        if penalty is not None:
            means = torch.stack([layer.scores.sigmoid().mean() for layer in held.values()])
            value = value + penalty * schedule.at(step) / schedule.final * means.mean()
        return value

    result = train(
        working, lambda step: (step, batches(step)), settings,
        loss=masked_loss, evaluate=evaluate, progress=progress,
    )  # fmt: skip
    with torch.no_grad():
        masks = set_masks(settings.steps)
        scores = {name: layer.scores.detach().clone() for name, layer in held.items()}
    return MovementRun(release(working), masks, scores, result, sparsities)
