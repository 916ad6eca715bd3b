r"""Lottery tickets: small networks inside a large one that train as well as it, if started alike.

Iterative magnitude pruning finds them. Train; remove a part $p$ of the weights that are left, the
smallest ones; set the survivors back to what they were at an early step $k$; and train again. After
$r$ rounds $(1 - p)^r$ of the weights are left. With $k = 0$ it is the original procedure (Frankle
and Carbin, "The Lottery Ticket Hypothesis", 2018, arXiv 1803.03635); larger networks need a small
$k > 0$ (Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2019, arXiv
1912.05671). Keeping the trained weights and only starting the learning rate's schedule again works
too (Renda, Frankle, Carbin, "Comparing Rewinding and Fine-tuning in Neural Network Pruning", 2020,
arXiv 2003.02389).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effnb.core.modules import LayerChoice, Model, chooses_layers
from effnb.core.training import (
    Batches,
    Loss,
    TrainingResult,
    TrainingSettings,
    causal_lm_loss,
    train,
)
from effnb.inference.pruning.masked_training import own, train_masked
from effnb.inference.pruning.masks import (
    Pattern,
    apply_masks,
    choose_masks,
    keep_largest,
    prunable,
    summarize,
)


@dataclass(frozen=True)
class Ticket:
    """One round of the lottery.

    Attributes:
        masks: Which weights were left in this round, by layer.
        sparsity: Part of the weights that were gone.
        start: The model that the round began from; pruned weights are exactly 0.
        model: What training made of it.
        training: Losses, evaluations and time.
    """

    masks: dict[str, Tensor]
    sparsity: float
    start: nn.Module
    model: nn.Module
    training: TrainingResult


@dataclass(frozen=True)
class _Part(TrainingSettings):
    """Steps `offset` and later of a longer run, at the learning rates they have there."""

    whole: TrainingSettings | None = None
    offset: int = 0

    def rate(self, step: int) -> float:
        return self.whole.rate(step + self.offset)


def _part(whole: TrainingSettings, offset: int, steps: int) -> _Part:
    plain = asdict(whole) | {"steps": steps, "warmup_steps": 0, "schedule": "constant"}
    return _Part(**plain, whole=whole, offset=offset)


def prune_remaining(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    rate: float,
    pattern: str = "layer",
) -> dict[str, Tensor]:
    """Remove a part of the weights that are left, those with the smallest magnitudes.

    Args:
        weights: Trained weights by layer.
        masks: Which of them are left.
        rate: Part of what is left that goes, in [0, 1); not used by "N:M", where every group gives
            up one weight until N are left.
        pattern: Where weights compete: "layer", "row", "global" or "N:M".

    Raises:
        ValueError: A rate outside [0, 1), an unknown pattern, or when a layer would be empty.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate is {rate}; it must be at least 0 and below 1.")
    parsed = Pattern.parse(pattern)
    # What is gone ranks below everything that is left, so it is removed again, and first.
    scores = {n: w.detach().abs().masked_fill(~masks[n], -1.0) for n, w in weights.items()}
    if parsed.scope == "group":
        left = max(int(m.unflatten(1, (-1, parsed.group)).sum(2).max()) for m in masks.values())
        keep = max(parsed.keep, left - 1)
        return choose_masks(scores, None, Pattern("group", keep, parsed.group))
    if parsed.scope == "global":
        left = sum(int(mask.sum()) for mask in masks.values())
        total = sum(mask.numel() for mask in masks.values())
        return choose_masks(scores, 1 - (left - round(rate * left)) / total, parsed)
    new = {}
    for name, score in scores.items():
        rows = score if parsed.scope == "row" else score.view(1, -1)
        left = int(masks[name].view_as(rows)[0].sum())  # the same in every row
        gone = rows.shape[1] - left + round(rate * left)
        if gone == rows.shape[1]:
            raise ValueError(f"{name} has {left} weights left of a {pattern}; none would stay.")
        new[name] = keep_largest(rows, gone).view(score.shape)
    return new


def random_masks(masks: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Masks with as many weights kept in each layer, but chosen at random: the control.

    Args:
        masks: The masks to imitate.
        seed: Seed of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator).to(mask.device)]
        .view(mask.shape)
        for name, mask in masks.items()
    }  # fmt: skip


@chooses_layers
def lottery(
    model: Model,
    batches: Batches,
    settings: TrainingSettings,
    *,
    rounds: int,
    rate: float = 0.2,
    rewind_step: int = 0,
    rewind: str = "weights",
    pattern: str = "layer",
    layers: LayerChoice = "*",
    loss: Loss = causal_lm_loss,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[Ticket, ...]:
    r"""Iterative magnitude pruning with rewinding.

    Every round sees the same batches at the same learning rates, from step $k$ to the last; the
    optimizer starts afresh, so that no momentum of pruned weights is left.

    Args:
        model: The model at its initialization; it is not changed.
        batches: From the step's number to its batch.
        settings: The whole run: steps, rates, seeds.
        rounds: How often to prune. Round 0 trains the dense model.
        rate: Part of the weights left that each round removes.
        rewind_step: $k$, the step to whose weights the survivors go back.
        rewind: "weights" sets survivors back to step $k$; "learning rate" lets them go on from
            where they are, and only the schedule goes back.
        pattern: Where weights compete: "layer", "row", "global"; or "N:M", where each round takes
            one weight of every group and `rounds` must be M - N.
        layers: Name patterns of the layers to prune.
        loss: From (model, batch) to a scalar.
        evaluate: From the model to named numbers, as in `effnb.core.training.train`.
        progress: Called with (steps done, steps of all rounds, loss).

    Returns:
        A ticket per round, the dense one first.

    Raises:
        ValueError: Rounds below 1, a rate outside [0, 1), a step outside the run, an unknown
            pattern or rewinding, a layer that would lose every weight, weights that are not finite,
            no fitting layer, or a quantized model.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least 1 is needed.")
    if not 0 <= rate < 1:
        raise ValueError(f"rate is {rate}; it must be at least 0 and below 1.")
    if not 0 <= rewind_step < settings.steps:
        raise ValueError(
            f"rewind_step is {rewind_step}; it must be one of the steps 0 … {settings.steps - 1}."
        )
    if rewind not in ("weights", "learning rate"):
        raise ValueError(f'rewind is {rewind!r}; it must be "weights" or "learning rate".')
    parsed = Pattern.parse(pattern)
    if parsed.scope == "group" and rounds != parsed.group - parsed.keep:
        raise ValueError(
            f"rounds is {rounds}; {pattern} is reached in {parsed.group - parsed.keep}, one weight "
            "of every group each."
        )
    chosen, _ = prunable(
        model, None if parsed.scope == "group" else 1 - (1 - rate) ** rounds, pattern,
        layers,
    )  # fmt: skip

    steps = settings.steps - rewind_step
    total = rewind_step + (rounds + 1) * steps

    def report(before: int) -> bool | Callable[[int, int, float], None]:
        return (lambda done, _, value: progress(before + done, total, value)) if progress else False

    origin = own(model)
    if rewind_step:
        first = _part(settings, 0, rewind_step)
        train(origin, batches, first, loss=loss, progress=report(0))
    rest = _part(settings, rewind_step, steps)

    def later(step: int) -> Any:
        return batches(step + rewind_step)

    masks = {n: torch.ones_like(m.weight, dtype=torch.bool) for n, m in chosen.items()}
    tickets: list[Ticket] = []
    for number in range(rounds + 1):
        if number:
            trained = tickets[-1].model
            weights = {name: trained.get_submodule(name).weight for name in masks}
            masks = prune_remaining(weights, masks, rate, pattern)
        begin = origin if not number or rewind == "weights" else tickets[-1].model
        start = apply_masks(begin, masks)
        run = train_masked(
            start, later, rest, masks, loss=loss, evaluate=evaluate,
            progress=report(rewind_step + number * steps),
        )  # fmt: skip
        sparsity = summarize(masks).sparsity
        tickets.append(Ticket(masks, sparsity, start, run.model, run.training))
    return tuple(tickets)
