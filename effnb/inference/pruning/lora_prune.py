r"""LoRAPrune: prune while a LoRA trains, judging structures by the LoRA's gradients alone.

Taylor importance needs the gradient of every weight, which is as large as the model. A LoRA trains
with the gradients of two thin matrices, $\partial A = s B^\top G$ and $\partial B = s G A^\top$,
$G$ the gradient of the weight itself. From them,

$$\hat G = \partial B\, A + B\, \partial A - \partial B\, \partial A, \qquad
  I = \left| \hat G \odot (W + s B A) \right|,$$

stands for $|G \odot W|$: $-\hat G$ is the change of $B A$ in one step of gradient descent at rate
1. Per matrix, $I$ is summed over each head's or neuron's rows or columns and the vector brought to
length 1; the matrices' vectors are added, and a moving average is taken over steps. The lowest
structures are masked, ever more of them on a cubic schedule, while the LoRA trains on; in the end
the LoRA is merged and the masked structures are cut out.

Two things to know. $\hat G$ has rank $r$ only while $B = 0$: train before the first cut. And its
last term is of second order in the gradient, so that the ranking changes when the loss is merely
scaled; with a loss that is a mean over tokens, gradients are small and the term matters little.

Zhang et al., "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning", 2023,
arXiv 2305.18403. There the first tenth of the layers and the last one are left alone; here all
layers give equally many, so that a plain model can hold the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.deltas import hosts, set_trainable
from effnb.core.gradients import Batches as Samples
from effnb.core.gradients import each_gradient, loss_batches
from effnb.core.modules import first_names
from effnb.core.training import (
    Batches,
    Loss,
    TrainingResult,
    TrainingSettings,
    causal_lm_loss,
    next_token_loss,
    train,
)
from effnb.finetuning import lora
from effnb.inference.pruning.choice import Kept, check_unit, choose_kept, keep_all, removals
from effnb.inference.pruning.llm_pruner import check_ratio
from effnb.inference.pruning.magnitude import CubicSchedule
from effnb.inference.pruning.shrink import Pruned, cut
from effnb.inference.pruning.structures import UNITS, Anatomy, anatomy, check_weights

_NAME = "lora_prune"


def lora_gradient(
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    grad_A: Float[Tensor, "rank in"],
    grad_B: Float[Tensor, "out rank"],
) -> Float[Tensor, "out in"]:
    r"""$\hat G = \partial B\, A + B\, \partial A - \partial B\, \partial A$."""
    return grad_B @ (A - grad_A) + B @ grad_A


def lora_score(
    weight: Float[Tensor, "out in"],
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    grad_A: Float[Tensor, "rank in"],
    grad_B: Float[Tensor, "out rank"],
    scaling: float,
) -> Float[Tensor, "out in"]:
    r"""$\left| \hat G \odot (W + s B A) \right|$, the importance of each weight."""
    merged = weight.detach().to(A.dtype) + scaling * (B @ A)
    return (lora_gradient(A, B, grad_A, grad_B) * merged).abs()


@dataclass(frozen=True)
class LoraPruned(Pruned):
    """A pruned model, and the training that pruned it.

    Attributes:
        training: Losses of all steps.
        removed_structures: For each step, how many heads (or groups) and neurons of each layer were
            masked.
    """

    training: TrainingResult = field(repr=False)
    removed_structures: list[dict[str, int]] = field(repr=False)


class _Average:
    """The moving average of the structures' importances."""

    def __init__(self, shape: Anatomy, unit: str, momentum: float) -> None:
        grouped = unit == "heads" and shape.queries_per_group == 1
        self.kinds = {"heads": "groups" if grouped else unit, "neurons": "neurons"}
        self.shape, self.momentum = shape, momentum
        self.scores = {
            kind: torch.zeros(shape.layers, shape.count(units))
            for kind, units in self.kinds.items()
        }

    def parts(self, layer: int, part: str, score: Tensor) -> Tensor:
        """The importances of the structures in one matrix, a vector of length 1."""
        units = next(u for u in self.kinds.values() if part in UNITS[u])
        sums = self.shape.by_unit(part, score, units).sum(1)
        return sums / sums.norm().clamp_min(torch.finfo(sums.dtype).tiny)

    def wanted(self) -> list[tuple[int, str]]:
        """The matrices that structures have a part in."""
        names = [part for units in self.kinds.values() for part in UNITS[units]]
        return [(layer, part) for layer in range(self.shape.layers) for part in names]

    def update(self, found: Mapping[tuple[int, str], Tensor]) -> None:
        """Take in the importances of one step."""
        for kind, units in self.kinds.items():
            new = torch.stack(
                [
                    torch.stack([found[layer, part] for part in UNITS[units]]).sum(0)
                    for layer in range(self.shape.layers)
                ]
            )
            self.scores[kind] = (
                self.momentum * self.scores[kind] + (1 - self.momentum) * new.float().cpu()
            )


def _scores_of(delta: nn.Module, base: nn.Module, grad_A: Tensor, grad_B: Tensor) -> Tensor:
    with torch.no_grad():
        return lora_score(base.weight, delta.A, delta.B, grad_A, grad_B, delta.scaling)


def lora_importance(
    model: nn.Module,
    calibration: Samples,
    name: str = "default",
    *,
    unit: str = "groups",
    momentum: float = 0.9,
    loss_scale: float = 1.0,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """The importance of heads and neurons by a LoRA's gradients, without training.

    Args:
        model: A Llama-like model with a LoRA on all linear layers of its blocks, trained a little;
            it is not changed.
        calibration: Token ids (sequences, time) or keyword arguments per batch; with a loss of
            one's own, the batches it takes.
        name: Of the LoRA.
        unit: "groups" or "heads": what attention is scored by.
        momentum: Of the moving average over batches, in [0, 1).
        loss_scale: A factor of the loss, to see what the last term of the estimate makes of it.
        loss: From (model, batch) to a scalar; None for language modelling.

    Returns:
        "heads" (layers, groups or heads) and "neurons" (layers, neurons).

    Raises:
        ValueError: When a layer of the blocks has no such LoRA, no data, weights that are not
            finite, or an option out of range.
    """
    check_unit(unit)
    _check_momentum(momentum)
    check_weights(model)
    working = set_trainable(model, name).eval()
    carriers = hosts(working, name)
    shape = anatomy(lora.detach(model, name))
    average = _Average(shape, unit, momentum)
    for layer, part in average.wanted():
        if shape.name(layer, part) not in carriers:
            raise ValueError(f"{shape.name(layer, part)} has no LoRA {name!r}; attach it there.")
    deltas = {at: carriers[shape.name(*at)].deltas[name] for at in average.wanted()}
    leaves = {
        f"{shape.name(*at)}.{leaf}": parameter
        for at, delta in deltas.items()
        for leaf, parameter in (("A", delta.A), ("B", delta.B))
    }
    scaled = lambda m, batch: (loss or next_token_loss)(m, batch) * loss_scale  # noqa: E731
    batches = loss_batches(model, calibration, loss)
    for found in each_gradient(working, leaves, batches, scaled):
        average.update(
            {
                at: average.parts(
                    *at,
                    _scores_of(
                        delta,
                        carriers[shape.name(*at)].base,
                        found[f"{shape.name(*at)}.A"],
                        found[f"{shape.name(*at)}.B"],
                    ),
                )
                for at, delta in deltas.items()
            }
        )
    return average.scores


def _check_momentum(momentum: float) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; it must lie in [0, 1).")


def lora_prune(
    model: nn.Module,
    batches: Batches,
    settings: TrainingSettings,
    ratio: float,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    begin: int | None = None,
    end: int | None = None,
    every: int = 5,
    momentum: float = 0.9,
    unit: str = "groups",
    seed: int = 0,
    loss: Loss = causal_lm_loss,
    progress: bool | Callable[[int, int, float], None] = False,
) -> LoraPruned:
    """Train a LoRA and prune on the way: a smaller dense model that has been trained.

    A structure that was masked stays masked. The mask acts on what the output and the down
    projection read, so that the LoRA's path is under it too.

    Args:
        model: A Llama-like model; it is not changed.
        batches: From the step's number to its batch.
        settings: Steps, rates, seeds.
        ratio: Part in [0, 1) of the heads and of the neurons of each layer to remove.
        rank: Of the LoRA.
        alpha: Of the LoRA.
        begin: Step at which pruning starts, at least 1; by default after a tenth of all steps.
        end: Step of the last cut; by default after eight tenths.
        every: Steps between two cuts.
        momentum: Of the moving average of importances, in [0, 1).
        unit: "groups" removes key-value heads with all their query heads, "heads" query heads.
        seed: Of the LoRA's start.
        loss: From (model, batch) to a scalar.
        progress: True for a progress bar; or a function of (steps done, steps, loss).

    Raises:
        ValueError: A number out of range, patience (a run whose masks change cannot go back),
            weights that are not finite, or a model that is not Llama-like or is quantized.
    """
    check_unit(unit)
    _check_momentum(momentum)
    shape = anatomy(model)
    check_weights(model)
    ratio = check_ratio(shape, ratio, unit)
    begin = max(1, settings.steps // 10) if begin is None else begin
    end = max(begin, settings.steps * 8 // 10) if end is None else end
    if settings.patience:
        raise ValueError(f"patience is {settings.patience}; masks change, so it must be 0.")
    if not 1 <= begin <= end < settings.steps:
        raise ValueError(
            f"begin is {begin} and end {end}; with {settings.steps} steps they must satisfy "
            "1 <= begin <= end < steps, so that the LoRA trains before the first cut."
        )
    schedule = CubicSchedule(ratio, begin, end, every=every)
    working = lora.attach(
        model, _NAME, rank=rank, alpha=alpha, layers=f"{shape.blocks}.*", seed=seed
    )
    run = _Pruning(shape, working, schedule, unit, momentum, keep_all(model))

    def numbered(step: int) -> tuple[int, Any]:
        return step, batches(step)

    def masked_loss(training: nn.Module, batch: tuple[int, Any]) -> Tensor:
        run.before(batch[0])
        return loss(training, batch[1])

    result = train(working, numbered, settings, loss=masked_loss, progress=progress)
    small = cut(lora.merge(working, _NAME), run.kept, run.average.scores)
    return LoraPruned(
        small.model, small.kept, small.scores, small.parameters_before, small.parameters_after,
        result, run.history,
    )  # fmt: skip


class _Pruning:
    """Watches the LoRA's gradients, and masks structures when the schedule says so."""

    def __init__(
        self,
        shape: Anatomy,
        working: nn.Module,
        schedule: CubicSchedule,
        unit: str,
        momentum: float,
        kept: Kept,
    ) -> None:
        self.shape, self.schedule, self.unit, self.kept = shape, schedule, unit, kept
        self.average = _Average(shape, unit, momentum)
        self.found: dict[tuple[int, str], Tensor] = {}
        self.history: list[dict[str, int]] = []
        self.watching = True
        device = next(working.parameters()).device
        self.masks = {
            "heads": torch.ones(shape.layers, shape.heads * shape.head_dim, device=device),
            "neurons": torch.ones(shape.layers, shape.neurons, device=device),
        }
        for layer in range(shape.layers):
            for part, kind in (("self_attn.o_proj", "heads"), ("mlp.down_proj", "neurons")):
                host = working.get_submodule(shape.name(layer, part))
                host.register_forward_pre_hook(self._mask(kind, layer))
        carriers, first = hosts(working, _NAME), first_names(working)
        for layer, part in self.average.wanted():
            host = carriers[first[shape.name(layer, part)]]
            self._watch(layer, part, host.deltas[_NAME], host.base)

    def _mask(self, kind: str, layer: int):
        def hook(module: nn.Module, arguments: tuple) -> tuple:
            return (arguments[0] * self.masks[kind][layer].to(arguments[0].dtype),)

        return hook

    def _watch(self, layer: int, part: str, delta: nn.Module, base: nn.Module) -> None:
        # In the backward pass itself: afterwards gradients are clipped and the factors change.
        def hook(_: Tensor) -> None:
            if self.watching and delta.A.grad is not None and delta.B.grad is not None:
                scores = _scores_of(delta, base, delta.A.grad, delta.B.grad)
                self.found[layer, part] = self.average.parts(layer, part, scores)

        delta.A.register_post_accumulate_grad_hook(hook)
        delta.B.register_post_accumulate_grad_hook(hook)

    def before(self, step: int) -> None:
        """Take in the step before this one, and cut if it is time."""
        if self.found:
            self.average.update(self.found)
            self.found = {}
        if self.schedule.changes(step):
            self._cut(self.schedule.at(step))
        self.watching = step < self.schedule.end
        gone = self.shape.heads - len(self.kept.heads[0])
        self.history.append(
            {"heads": gone, "neurons": self.shape.neurons - len(self.kept.neurons[0])}
        )

    def _cut(self, ratio: float) -> None:
        shape, each = self.shape, self.shape.queries_per_group
        scores = {kind: values.clone() for kind, values in self.average.scores.items()}
        wide = scores["heads"].shape[1] == shape.heads
        for layer in range(shape.layers):  # what is masked stays masked
            heads = torch.ones(shape.heads, dtype=torch.bool)
            heads[list(self.kept.heads[layer])] = False
            lost = heads if wide else heads.view(shape.kv_heads, each).all(1)
            scores["heads"][layer, lost] = -1
            neurons = torch.ones(shape.neurons, dtype=torch.bool)
            neurons[list(self.kept.neurons[layer])] = False
            scores["neurons"][layer, neurons] = -1
        count = shape.kv_heads if self.unit == "groups" else each
        remove = {
            "heads": removals(ratio, count, "heads"),
            "neurons": removals(ratio, shape.neurons, "neurons"),
        }
        self.kept = choose_kept(shape, scores, remove, unit=self.unit)
        for layer in range(shape.layers):
            rows = torch.zeros(shape.heads, shape.head_dim)
            rows[list(self.kept.heads[layer])] = 1
            self.masks["heads"][layer] = rows.flatten().to(self.masks["heads"].device)
            row = torch.zeros(shape.neurons)
            row[list(self.kept.neurons[layer])] = 1
            self.masks["neurons"][layer] = row.to(self.masks["neurons"].device)
