"""What methods share that look at the inputs of a layer before they factorise it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effnb.core.calibration import CalibrationLike, Observer, layerwise
from effnb.core.modules import LayerChoice, Layers, Model, put_modules, share
from effnb.inference.low_rank.factors import (
    Factors,
    LowRankLinear,
    check_setting,
    choose_layers,
    plan,
)
from effnb.inference.low_rank.svd import keep

Progress = Callable[[int, int], None]
Observe = Callable[[int, torch.device], Observer]
Factorise = Callable[[Tensor, Any, int | None], Factors]


def calibrated(
    model: Model,
    calibration: CalibrationLike,
    observe: Observe,
    factorise: Factorise,
    *,
    kept: float | None,
    rank: int | Mapping[str, int] | None,
    always: bool,
    sequential: bool,
    layers: LayerChoice,
) -> Model:
    """Observe the inputs of the layers inside the blocks, and factorise each by what was seen.

    Args:
        model: A transformer; it is not changed.
        calibration: See `effnb.core.calibration.batches_of`.
        observe: From the number of inputs and the device to an observer.
        factorise: From weight, observer and rank to the factors.
        kept: See `effnb.inference.low_rank.factors.plan`.
        rank: See there.
        always: See there.
        sequential: Observe each block behind the factorised ones before it; otherwise in the
            unchanged model.
        layers: Name patterns.
    """
    check_setting(kept, rank)
    chosen = choose_layers(model, layers, in_blocks=True)
    ranks = plan(chosen, kept, rank, always=always)
    if not ranks:
        return share(model)
    made: dict[str, LowRankLinear] = {}

    def compress(name: str, layer: nn.Linear, observer: Any) -> nn.Module | None:
        factors = factorise(layer.weight, observer, ranks[name])
        made[name] = LowRankLinear.replacing(layer, factors)
        return made[name] if sequential else None

    result = _pass(model, calibration, observe, compress, list(ranks))
    if sequential:
        return result
    put_modules(result, made)  # `result` is a copy of ours, so far with the old layers
    return result


def decompose_calibrated(
    model: nn.Module,
    calibration: CalibrationLike,
    observe: Observe,
    factorise: Factorise,
    *,
    layers: LayerChoice,
) -> dict[str, Factors]:
    """The full decomposition of each layer inside the blocks, from the unchanged model's inputs.

    Args:
        model: A transformer; it is not changed.
        calibration: See `effnb.core.calibration.batches_of`.
        observe: From the number of inputs and the device to an observer.
        factorise: From weight, observer and rank to the factors.
        layers: Name patterns.
    """
    names = list(choose_layers(model, layers, in_blocks=True))
    found: dict[str, Factors] = {}

    def compress(name: str, layer: nn.Linear, observer: Any) -> None:
        found[name] = keep(factorise(layer.weight, observer, None))

    _pass(model, calibration, observe, compress, names)
    return found


def _pass(
    model: Model,
    calibration: CalibrationLike,
    observe: Observe,
    compress: Callable[[str, nn.Linear, Any], nn.Module | None],
    names: list[str],
) -> Model:
    return layerwise(
        model,
        calibration,
        lambda name, layer: observe(layer.in_features, layer.weight.device),
        compress,
        layers=Layers(names, ()),
        share_observers=True,  # query, key and value read the same inputs
    )
