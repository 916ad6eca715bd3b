"""See what the linear layers of a block read, in runs of the block or of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from effnb.core.modules import find_stacks
from effnb.core.observers import Observer
from effnb.core.padding import masked_rows

Run = tuple[Tensor | None, Callable[[], Any]]
"""One batch: which of its tokens are text (None: all), and what lets it run."""


def watch_runs(
    module: nn.Module, observers: Mapping[str, Observer], runs: Iterable[Run], shared: bool = False
) -> dict[str, Observer]:
    """Let the calibration data run; each observer sees its layer's inputs, wherever it is used.

    Args:
        module: A block, or the whole model.
        observers: One for each layer, by the layer's name within the module.
        runs: The batches.
        shared: Whether layers that read the very same tensor use the first one's observer. They
            must then do so in all their places.

    Returns:
        The observers, in the order in which their layers ran; layers that did not run are left out.
    """
    used: dict[str, Observer] = {}
    ran: set[str] = set()
    seen: list[tuple[Tensor, Observer]] = []  # in the current place of the current batch
    masks: list[Tensor | None] = []

    def hook_for(name: str):
        def hook(layer, arguments):
            inputs = arguments[0]
            if name in ran:  # its next place: what was read before need not be kept
                ran.clear()
                seen.clear()
            ran.add(name)
            same = [observer for tensor, observer in seen if tensor is inputs] if shared else []
            observer = used.setdefault(name, same[0] if same else observers[name])
            if any(observer is other for other in same):
                return  # it has taken these inputs in already
            if shared:
                seen.append((inputs, observer))
            observer.update(masked_rows(inputs, masks[0]))

        return hook

    hooks = [
        module.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in observers
    ]
    try:
        for mask, run in runs:
            masks[:] = [mask]
            ran.clear()
            seen.clear()
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return used


def block_users(model: nn.Module) -> dict[nn.Module, frozenset[nn.Module]]:
    """The blocks that use each of the modules inside a model's blocks."""
    users: dict[nn.Module, set[nn.Module]] = {}
    for stack in find_stacks(model).values():
        for block in stack:
            for module in block.modules():
                users.setdefault(module, set()).add(block)
    return {module: frozenset(blocks) for module, blocks in users.items()}


def by_users(
    block: nn.Module,
    observers: Mapping[str, Observer],
    users: Mapping[nn.Module, frozenset[nn.Module]],
) -> dict[frozenset[nn.Module], dict[str, Observer]]:
    """Observers of a block's layers, those of layers that the same blocks use together.

    Only these may share an observer: elsewhere, one of two layers may read what the other does not.
    """
    found: dict[frozenset[nn.Module], dict[str, Observer]] = {}
    for name, observer in observers.items():
        found.setdefault(users[block.get_submodule(name)], {})[name] = observer
    return found


def by_inputs(block: nn.Module, names: Iterable[str], run: Callable[[], Any]) -> list[list[str]]:
    """The layers of a block as they run, those that read the very same tensor together."""
    order: list[tuple[str, Tensor]] = []

    def hook_for(name: str):
        return lambda module, arguments: order.append((name, arguments[0]))

    hooks = [block.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[str]] = []
    inputs: list[Tensor] = []
    for name, tensor in order:
        for group, known in zip(groups, inputs, strict=True):
            if known is tensor and name not in group:
                group.append(name)
                break
        else:
            groups.append([name])
            inputs.append(tensor)
    return groups
