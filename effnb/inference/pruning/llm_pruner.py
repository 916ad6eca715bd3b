r"""LLM-Pruner: coupled structures, scored by what the loss would lose with them.

*Discovery*: the dependency groups of `effnb.inference.pruning.structures`. *Estimation*: from a few
calibration samples, to second order, removing a weight changes the loss by

$$L(w = 0) - L(w) \approx -g w + \tfrac12 F w^2, \qquad
  F = \tfrac1N \sum_n g_n^2,$$

with $g$ the mean gradient and $F$, the diagonal of the empirical Fisher matrix, for the Hessian.
The importance of a group's part of one matrix is the absolute value of the sum ("vector") or the
sum of the absolute values ("element"); those of its matrices are added, multiplied, or the largest
or the last one is taken. *Recovery*: `effnb.inference.pruning.recover` trains a LoRA on what is
left and merges it.

Ma, Fang, Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", 2023, arXiv
2305.11627. They leave the first and last layers alone, whose loss hurts most; the layers then
differ in size, which no configuration can say. Here all layers give equally many. To see what
protection is worth, mask: `mask_structures(model, llm_pruner_scores(…), …, protect=[0, 1, 5])`.
Their code sums each row alone for "vector"; here the sum runs over all of a head's rows, as in the
paper's equation. For neurons, which are one row, both are the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.gradients import Batches, fisher_diagonal, mean_gradients
from effnb.core.modules import first_names
from effnb.core.training import Loss
from effnb.inference.pruning.choice import check_unit, removals
from effnb.inference.pruning.shrink import Pruned, prune_structures
from effnb.inference.pruning.structures import UNITS, Anatomy, anatomy, check_weights

IMPORTANCES = ("element", "vector")
ORDERS = ("first", "second", "mixed")
AGGREGATES = ("sum", "prod", "max", "last")


def weight_change(
    weight: Float[Tensor, "out in"],
    gradient: Tensor | None,
    fisher: Tensor | None,
    order: str = "first",
) -> Float[Tensor, "out in"]:
    r"""How much the loss falls if each weight alone goes, up to sign conventions.

    Args:
        weight: $w$.
        gradient: The mean gradient $g$; not needed for the order "second".
        fisher: $F$; not needed for "first".
        order: "first", $w g$; "second", $\tfrac12 w^2 F$; "mixed", $w g - \tfrac12 w^2 F$.
    """
    w = weight.detach()
    if order == "first":
        return w * gradient
    half = w.square() * fisher / 2
    return half if order == "second" else w * gradient - half


def aggregate_parts(parts: Float[Tensor, "parts units"], how: str) -> Float[Tensor, " units"]:
    """One importance for each structure from those of its parts, in the order of computation.

    Raises:
        ValueError: When `how` is not "sum", "prod", "max" or "last".
    """
    if how == "sum":
        return parts.sum(0)
    if how == "prod":
        return parts.prod(0)
    if how == "max":
        return parts.max(0).values
    if how == "last":
        return parts[-1]
    raise ValueError(f"aggregate is {how!r}; choose one of {', '.join(AGGREGATES)}.")


def llm_pruner_scores(
    model: nn.Module,
    calibration: Batches,
    *,
    importance: str = "element",
    order: str = "first",
    aggregate: str = "sum",
    unit: str = "groups",
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """The importance of every head or group, and of every neuron.

    Args:
        model: A Llama-like model; it is not changed.
        calibration: Token ids (sequences, time) or keyword arguments per batch, ten sequences are
            enough; with a loss of one's own, the batches it takes.
        importance: "element" or "vector".
        order: "first"; "second" and "mixed" take a backward pass for each sequence alone.
        aggregate: "sum", "prod", "max" or "last" (the output or down projection alone).
        unit: "groups" or "heads": what attention is scored by.
        loss: From (model, batch) to a scalar; None for language modelling.

    Returns:
        "heads" (layers, groups or heads) and "neurons" (layers, neurons), as `prune_structures`
        takes them.

    Raises:
        ValueError: An option that is not there, no data, weights or gradients that are not finite,
            or a model that is not Llama-like or is quantized.
    """
    _check(importance, order, aggregate, unit)
    shape = anatomy(model)
    check_weights(model)
    inside = f"{shape.blocks}.*"
    gradients = fishers = None
    if order != "second":
        gradients = mean_gradients(
            model, calibration, loss=loss, layers=inside,
        )  # fmt: skip
    if order != "first":
        fishers = fisher_diagonal(
            model, calibration, loss=loss, layers=inside,
        )  # fmt: skip

    first = first_names(model)

    def change(layer: int, part: str) -> Tensor:
        name = first[shape.name(layer, part)]  # what several layers use has one gradient
        return weight_change(
            model.get_submodule(name).weight,
            gradients[name] if gradients else None,
            fishers[name] if fishers else None,
            order,
        ).double()

    return {
        kind: torch.stack(
            [
                _layer_scores(shape, change, layer, units, importance, aggregate)
                for layer in range(shape.layers)
            ]
        ).cpu()
        for kind, units in (("heads", unit), ("neurons", "neurons"))
    }


def _layer_scores(
    shape: Anatomy,
    change: Callable[[int, str], Tensor],
    layer: int,
    units: str,
    importance: str,
    aggregate: str,
) -> Tensor:
    units = "groups" if units == "heads" and shape.queries_per_group == 1 else units
    parts = []
    for part in UNITS[units]:
        rows = shape.by_unit(part, change(layer, part), units)
        parts.append(rows.sum(1).abs() if importance == "vector" else rows.abs().sum(1))
    return aggregate_parts(torch.stack(parts), aggregate)


def _check(importance: str, order: str, aggregate: str, unit: str) -> None:
    for name, value, allowed in (
        ("importance", importance, IMPORTANCES),
        ("order", order, ORDERS),
        ("aggregate", aggregate, AGGREGATES),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(allowed)}.")
    check_unit(unit)


def llm_pruner(
    model: nn.Module,
    calibration: Batches,
    ratio: float,
    *,
    importance: str = "element",
    order: str = "first",
    aggregate: str = "sum",
    unit: str = "groups",
    loss: Loss | None = None,
) -> Pruned:
    """Remove the least important heads and neurons: a smaller dense model.

    Args:
        model: A Llama-like model; it is not changed.
        calibration: As in `llm_pruner_scores`.
        ratio: Part in [0, 1) of the heads and of the neurons of each layer to remove. Where there
            are few groups, what is really removed is a rounded part of them: see `removed` of the
            result.
        importance: As in `llm_pruner_scores`.
        order: As in `llm_pruner_scores`.
        aggregate: As in `llm_pruner_scores`.
        unit: As in `llm_pruner_scores`.
        loss: From (model, batch) to a scalar; None for language modelling.

    Raises:
        ValueError: A ratio out of range, and what `llm_pruner_scores` and `shrink` raise.
    """
    _check(importance, order, aggregate, unit)
    shape = anatomy(model)
    ratio = check_ratio(shape, ratio, unit)
    scores = llm_pruner_scores(
        model, calibration, importance=importance, order=order, aggregate=aggregate, unit=unit,
        loss=loss,
    )  # fmt: skip
    return prune_structures(model, scores, {"heads": ratio, "neurons": ratio}, unit=unit)


def check_ratio(shape: Anatomy, ratio: float, unit: str) -> float:
    """A part of both heads and neurons, once it is known that something of both stays.

    Raises:
        ValueError: When it is outside [0, 1), or a kind would be empty.
        TypeError: When it is no number.
    """
    if isinstance(ratio, int) and not isinstance(ratio, bool) and ratio != 0:
        raise ValueError(f"ratio is {ratio}; it is a part of heads and neurons, in [0, 1).")
    ratio = float(ratio) if isinstance(ratio, int) else ratio
    heads = shape.kv_heads if unit == "groups" else shape.queries_per_group
    removals(ratio, heads, "heads")
    removals(ratio, shape.neurons, "neurons")
    return ratio
