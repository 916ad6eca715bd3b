"""The calibration pass as pruning uses it: no layer that should be pruned is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from effnb.core.calibration import Calibration, Observer, layerwise
from effnb.core.modules import Model, replace_modules


def prune_layerwise(
    model: Model,
    calibration: Calibration,
    layers: Mapping[str, nn.Linear],
    observe: Callable[[str, nn.Linear], Observer],
    prune: Callable[[str, nn.Linear, Any], nn.Module],
    *,
    include: str | Iterable[str],
    exclude: str | Iterable[str],
    true_sequential: bool = False,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Visit the blocks in order; observe, prune and replace their linear layers.

    A layer that no token reaches (an expert that the router never chose) is pruned too, with an
    observer that saw nothing.

    Args:
        model: A transformer; it is not changed.
        calibration: See `effnb.core.calibration.batches_of`.
        layers: The layers that `include` and `exclude` choose.
        observe: From a layer's name and module to a fresh observer.
        prune: From name, module and observer to the module to put in its place.
        include: Name patterns of the layers to prune.
        exclude: Name patterns of layers to leave alone.
        true_sequential: Also within a block, prune layers before those behind them are observed.
        batch_size: Sequences at a time.
        progress: Called with (blocks done, blocks).

    Raises:
        ValueError: What `prune` refuses, with the layer's name; no or too long calibration data.
    """
    done: set[str] = set()

    def compress(name: str, layer: nn.Linear, seen: Any) -> nn.Module:
        done.add(name)
        try:
            return prune(name, layer, seen)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None

    result = layerwise(
        model,
        calibration,
        observe,
        compress,
        include=include,
        exclude=exclude,
        true_sequential=true_sequential,
        share_observers=True,
        batch_size=batch_size,
        progress=progress,
    )
    unseen = {name: layer for name, layer in layers.items() if name not in done}
    return replace_modules(result, {n: compress(n, m, observe(n, m)) for n, m in unseen.items()})
