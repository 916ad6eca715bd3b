"""Where AWQ's scales can go, and what tells how good they are.

Scales go into folds (`effnb.core.folding`): mostly one, or all those of several blocks that have a
layer or a norm in common. How good they are is told by the modules that hold the layers behind
them, in every block, or by the layers' own outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from effnb.core.calibration import Hessian, main_output
from effnb.core.folding import Fold
from effnb.core.modules import find_stacks
from effnb.core.padding import masked_rows
from effnb.core.passage import Arguments
from effnb.core.watching import Run, watch_runs


class Inputs(Hessian):
    """The Hessian of a layer's inputs, and the mean magnitude of each."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(features, device)
        self._sum = torch.zeros(features, device=device)

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Take in the inputs of one batch."""
        super().update(inputs)
        self._sum += inputs.float().abs().sum(0)

    @property
    def magnitude(self) -> Float[Tensor, "in"]:
        """The mean magnitude of each input so far."""
        return self._sum / max(self.tokens, 1)


Kept = tuple[Tensor | None, tuple, Mapping, Tensor]
"""A batch's mask, a module's arguments for it, positional and by name, and its output."""


@dataclass(frozen=True)
class Place:
    """Folds that get the same scales: one, or several whose layers stand in several blocks.

    Attributes:
        folds: The folds, by their places in the model.
        readers: Their readers, by their first names.
        judges: The modules whose outputs tell how good scales are; none for the readers' own.
    """

    folds: tuple[Fold, ...]
    readers: set[str]
    judges: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Seen:
    """What the data showed: of layers their inputs, of judges their arguments and outputs."""

    inputs: dict[str, Inputs]
    runs: dict[nn.Module, list[Kept]]

    def and_what(self, other: Seen) -> Seen:
        """Both."""
        return Seen(self.inputs | other.inputs, self.runs | other.runs)

    def magnitude(self, place: Place, first: Mapping[str, str]) -> Float[Tensor, "in"]:
        """The mean magnitude of each channel, over all folds of a place."""
        one_each = dict.fromkeys(first[fold.readers[0]] for fold in place.folds)
        seen = [self.inputs[name] for name in one_each]
        tokens = sum(observer.tokens for observer in seen)
        return sum(observer.magnitude * (observer.tokens / max(tokens, 1)) for observer in seen)


def module_loss(
    judges: Iterable[nn.Module],
    readers: list[nn.Module],
    runs: Mapping[nn.Module, list[Kept]],
    rounding: Callable[[Tensor], Tensor],
) -> Callable[[Tensor], float]:
    """The mean squared error of the judges' outputs when the readers inside are rounded."""
    inside = {
        judge: {f"{n}.weight": m for n, m in judge.named_modules() if m in readers and n}
        for judge in judges
    }

    def loss(scales: Tensor) -> float:
        rounded = {}
        for layer in readers:
            weight = layer.weight
            rounded[layer] = (rounding(weight.float() * scales) / scales).to(weight.dtype)
        total, count = 0.0, 0
        for judge, layers in inside.items():
            new = {name: rounded[layer] for name, layer in layers.items()}
            for mask, arguments, keywords, truth in runs[judge]:
                output = main_output(functional_call(judge, new, arguments, dict(keywords)))
                difference = masked_rows(output - truth, mask).float()
                total += float(difference.square().sum())
                count += difference.numel()
        return total / max(count, 1)

    return loss


def watch_places(
    model: nn.Module,
    observers: dict[str, Inputs],
    judges: Iterable[nn.Module],
    runs: list[Run],
    shared: bool,
) -> Seen:
    """Let the data run once; see the layers' inputs and what the judges compute.

    Args:
        model: The model, whose names the observers go by.
        observers: One for each layer.
        judges: Modules inside the model.
        runs: The batches, through a block or the whole model.
        shared: See `effnb.core.watching.watch_runs`.
    """
    kept: dict[nn.Module, list[Kept]] = {judge: [] for judge in judges}
    masks: list[Tensor | None] = []

    def keep(judge: nn.Module):
        def hook(module, arguments, keywords, output):
            given = Arguments.of(arguments, keywords)
            entry = (masks[-1], given.positional, given.keywords, main_output(output))
            kept[judge].append(entry)

        return hook

    def noting(mask: Tensor | None, run: Callable[[], Any]) -> Callable[[], None]:
        def noted() -> None:
            masks[:] = [mask]
            run()

        return noted

    hooks = [judge.register_forward_hook(keep(judge), with_kwargs=True) for judge in kept]
    try:
        noted = [(mask, noting(mask, run)) for mask, run in runs]
        return Seen(watch_runs(model, observers, noted, shared), kept)
    finally:
        for hook in hooks:
            hook.remove()


def judges_of(model: nn.Module, joint: Iterable[Fold]) -> tuple[nn.Module, ...]:
    """The modules whose outputs tell how good scales are; none for the readers' own outputs."""
    found = []
    for fold in joint:
        judge = _judge(model, fold)
        if judge is None or isinstance(model.get_submodule(fold.source), nn.Linear):
            return ()
        found.append(judge)
    return tuple(dict.fromkeys(found))


def _judge(model: nn.Module, fold: Fold) -> nn.Module | None:
    """The module that holds all readers; None for a reader that the block itself holds."""
    parents = [name.rpartition(".")[0].split(".") for name in fold.readers]
    common: list[str] = []
    for level in zip(*parents, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    judge = model.get_submodule(".".join(common))
    blocks = [block for stack in find_stacks(model).values() for block in stack]
    return None if len(fold.readers) == 1 and judge in blocks else judge
