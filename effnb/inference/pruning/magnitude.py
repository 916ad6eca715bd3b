r"""Magnitude pruning: remove the weights closest to 0, at once or little by little.

The oldest criterion and still the baseline: $S_{ij} = |W_{ij}|$ (Han et al., "Learning both Weights
and Connections for Efficient Neural Networks", 2015, arXiv 1506.02626). It needs no data. Its
weakness is that a weight's size says nothing of the inputs that it multiplies.

Gradual pruning removes more and more while the model trains and repairs itself (Zhu and Gupta, "To
prune, or not to prune", 2017, arXiv 1710.01878).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.core.linear_form import in_linear_form
from effnb.core.modules import LayerChoice, Model, chooses_layers, linears
from effnb.core.training import Batches, Loss, TrainingSettings, causal_lm_loss
from effnb.inference.pruning.masked_training import MaskedLinear, PruningRun, train_masked
from effnb.inference.pruning.masks import (
    Pattern,
    Sparsity,
    apply_masks,
    check_sparsity,
    choose_masks,
    keep_mask,
    prunable,
)


def magnitude_mask(
    weight: Float[Tensor, "out in"], sparsity: float | None, pattern: str = "layer"
) -> Bool[Tensor, "out in"]:
    r"""Keep the weights with the largest $|W_{ij}|$; True where a weight stays.

    Args:
        weight: The weight.
        sparsity: Part to remove; None for "N:M".
        pattern: "layer", "row" or "N:M".

    Raises:
        ValueError: A sparsity or pattern that does not fit, or weights that are not finite.
    """
    return keep_mask(weight.detach().abs(), sparsity, pattern)


@chooses_layers
def magnitude_scores(model: nn.Module, layers: LayerChoice = "*") -> dict[str, Tensor]:
    r"""$|W_{ij}|$ of every fitting linear layer, by name."""
    return {n: m.weight.detach().abs() for n, m in linears(model, layers).items()}


@chooses_layers
@in_linear_form
def magnitude(
    model: Model,
    sparsity: Sparsity = None,
    *,
    pattern: str = "layer",
    layers: LayerChoice = "*",
) -> Model:
    r"""Set the weights with the smallest $|W_{ij}|$ to 0.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        sparsity: Part of the weights to remove, in [0, 1); or one per layer's name; None for "N:M".
        pattern: Where weights compete: "layer", "row", "global" or "N:M".
        layers: Name patterns of the layers to prune.

    Returns:
        A new model with exact zeros, sharing every tensor that was not pruned.

    Raises:
        ValueError: A sparsity or pattern that does not fit, no fitting layer, weights that are not
            finite, a layer that would lose every weight, or a quantized model.
    """
    chosen, _ = prunable(model, sparsity, pattern, layers)
    scores = {name: layer.weight.detach().abs() for name, layer in chosen.items()}
    return apply_masks(model, choose_masks(scores, sparsity, pattern))


@dataclass(frozen=True)
class CubicSchedule:
    r"""A number that changes fast at first and ever more slowly.

    $s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3$ for $t_0 \le t \le t_1$,
    $s_i$ before and $s_f$ after. It removes much while there is much to spare (Zhu and Gupta, 2017,
    arXiv 1710.01878, eq. 1).

    Attributes:
        final: $s_f$.
        begin: $t_0$, the step at which it starts to change.
        end: $t_1$, the step from which it stays.
        initial: $s_i$.
        every: Steps between two changes; it also changes at `end`.
    """

    final: float
    begin: int
    end: int
    initial: float = 0.0
    every: int = 1

    def __post_init__(self) -> None:
        """Refuse schedules that cannot work."""
        if not 0 <= self.begin <= self.end:
            raise ValueError(
                f"begin is {self.begin} and end {self.end}; they must satisfy 0 <= begin <= end."
            )
        if self.every < 1:
            raise ValueError(f"every is {self.every}; it must be at least 1.")

    def at(self, step: int) -> float:
        """The value at a step, as if it changed at every step."""
        if step >= self.end:
            return self.final
        left = 1 - max(0, step - self.begin) / (self.end - self.begin)
        return self.final + (self.initial - self.final) * left**3

    def changes(self, step: int) -> bool:
        """Whether the value is set again at this step."""
        inside = self.begin <= step <= self.end
        return step == self.end or (inside and (step - self.begin) % self.every == 0)


@chooses_layers
def gradual(
    model: Model,
    batches: Batches,
    settings: TrainingSettings,
    schedule: CubicSchedule,
    *,
    pattern: str = "layer",
    layers: LayerChoice = "*",
    loss: Loss = causal_lm_loss,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: bool | Callable[[int, int, float], None] = False,
) -> PruningRun:
    """Prune by magnitude while training, more and more as a schedule says.

    A pruned weight gets no gradient and does not come back, so each mask lies within the one before
    it. With "N:M" a group loses its weights one by one.

    Args:
        model: The model; a copy of it is trained.
        batches: From the step's number to its batch.
        settings: Steps, rates, seeds.
        schedule: Sparsity at each step; `schedule.end` must come before the last step, so that the
            final mask is trained too.
        pattern: Where weights compete: "layer", "row", "global" or "N:M".
        layers: Name patterns of the layers to prune.
        loss: From (model, batch) to a scalar.
        evaluate: From the model to named numbers, as in `effnb.core.training.train`.
        progress: True for a progress bar; or a function of (steps done, steps, loss).

    Raises:
        ValueError: As `magnitude`; or a schedule that does not end before the last step.
    """
    if schedule.end >= settings.steps:
        raise ValueError(
            f"the schedule ends at step {schedule.end}; it must end before the last of the "
            f"{settings.steps} steps (the first is 0)."
        )
    check_sparsity(schedule.initial)
    chosen, _ = prunable(model, schedule.final, pattern, layers)
    parsed = Pattern.parse(pattern)

    def update(step: int, held: dict[str, MaskedLinear]) -> None:
        if not schedule.changes(step):
            return
        # What is pruned ranks below everything that is left, even below exact zeros.
        scores = {n: m.weight.abs().masked_fill(~m.mask, -1.0) for n, m in held.items()}
        sparsity = schedule.at(step)
        now = parsed.at(sparsity)
        masks = choose_masks(scores, None if parsed.scope == "group" else sparsity, now)
        for name, layer in held.items():
            layer.mask = masks[name]

    everything = {n: torch.ones_like(m.weight, dtype=torch.bool) for n, m in chosen.items()}
    return train_masked(
        model, batches, settings, everything,
        update=update, loss=loss, evaluate=evaluate, progress=progress,
    )  # fmt: skip
