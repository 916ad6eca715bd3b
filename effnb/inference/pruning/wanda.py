r"""Wanda: remove the weights whose size times the size of their input is smallest, row by row.

$$S_{ij} = |W_{ij}| \cdot \lVert X_j \rVert_2$$

with $X_j$ the values of input feature $j$ at all calibration tokens. Scores compete within each
output row, and no weight is updated (Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning
Approach for Large Language Models", 2023, arXiv 2306.11695).

Two facts make it easy to judge. Scaling an input feature up and its column down leaves the layer's
function *and* every score as they were, so a model's outlier features cannot mislead it; they do
mislead plain magnitude. And the row's mask is the exact minimiser of the squared output error for
inputs that are not correlated with each other.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.core.calibration import CalibrationLike, InputNorm, block_linears, layerwise
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import LayerChoice, Model, chooses_layers
from effnb.inference.pruning.masks import (
    Sparsity,
    apply_masks,
    choose_masks,
    keep_mask,
    masked,
    prunable,
    with_weight,
)


def wanda_score(
    weight: Float[Tensor, "out in"], input_norm: Float[Tensor, "in"]
) -> Float[Tensor, "out in"]:
    r"""$S_{ij} = |W_{ij}| \cdot \lVert X_j \rVert_2$."""
    return weight.detach().abs() * input_norm


def cumulative_share(score: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    r"""Part of a row's score that goes if this weight and all smaller ones are removed.

    $C_{ij} = \sum_{k: S_{ik} \le S_{ij}} S_{ik} / \sum_k S_{ik}$. Removing every weight with
    $C_{ij} \le \alpha$ takes the same part of each row's score, so rows whose scores are uneven
    lose more weights. It is the paper's variant with a sparsity that adapts to the row; ranking $C$
    over the whole layer finds the $\alpha$ of a given sparsity without a search.
    """
    ordered, order = score.double().sort(dim=1, stable=True)
    total = ordered.sum(1, keepdim=True)
    share = ordered.cumsum(1) / total.where(total > 0, 1.0)
    return share.new_zeros(share.shape).scatter(1, order, share)


def wanda_mask(
    weight: Float[Tensor, "out in"],
    input_norm: Float[Tensor, "in"],
    sparsity: float | None,
    pattern: str = "row",
    *,
    adaptive: bool = False,
) -> Bool[Tensor, "out in"]:
    """Keep the weights with the largest Wanda scores; True where a weight stays.

    Args:
        weight: The weight.
        input_norm: Norm of each input feature over the calibration tokens.
        sparsity: Part to remove; None for "N:M".
        pattern: "row" (the paper's), "layer" or "N:M".
        adaptive: Let rows differ in sparsity, see `cumulative_share`; only with pattern "row".

    Raises:
        ValueError: A sparsity or pattern that does not fit, or numbers that are not finite.
    """
    score = wanda_score(weight, input_norm)
    if not adaptive:
        return keep_mask(score, sparsity, pattern)
    _check_adaptive(pattern)
    return keep_mask(cumulative_share(score), sparsity, "layer")


def _check_adaptive(pattern: str) -> None:
    if pattern != "row":
        raise ValueError(f'adaptive sparsity is between rows; the pattern is "{pattern}".')


@chooses_layers
def wanda_scores(
    model: nn.Module,
    calibration: CalibrationLike,
    *,
    layers: LayerChoice = "*",
) -> dict[str, Tensor]:
    """Wanda scores of the dense model's layers, by name; nothing is pruned.

    A layer that no token reaches (an expert that the router never chose) has its magnitudes. Only
    modules of the model itself are scored: of fused experts, score their
    `effnb.core.linear_form.linear_form`.

    Args:
        model: A transformer; it is not changed.
        calibration: Token ids (sequences, time), or keyword arguments per batch.
        layers: Name patterns of the layers to score.
    """
    chosen = block_linears(model, layers)
    scores = {name: layer.weight.detach().abs() for name, layer in chosen.items()}

    def note(name: str, layer: nn.Linear, norm: InputNorm) -> None:
        scores[name] = wanda_score(layer.weight, _norms(norm))

    layerwise(
        model, calibration, _observe, note, layers=layers,
        share_observers=True,
    )  # fmt: skip
    return scores


def _observe(name: str, layer: nn.Linear) -> InputNorm:
    return InputNorm(layer.in_features, layer.weight.device)


def _norms(seen: InputNorm) -> Float[Tensor, "in"]:
    """The norms; all 1 where no token arrived, which leaves the weights' magnitudes."""
    return seen.value if seen.tokens else torch.ones_like(seen.value)


@chooses_layers
@in_linear_form
def wanda(
    model: Model,
    calibration: CalibrationLike,
    sparsity: Sparsity = None,
    *,
    pattern: str = "row",
    adaptive: bool = False,
    true_sequential: bool = False,
    layers: LayerChoice = "*",
) -> Model:
    r"""Set the weights with the smallest $|W_{ij}| \cdot \lVert X_j \rVert_2$ to 0.

    Blocks are pruned from the first to the last, and each is calibrated on what the pruned blocks
    before it produce. Only the pattern "global" scores all layers of the dense model first, since
    its threshold needs all scores at once. A layer that no token reaches is pruned by magnitude.

    Args:
        model: A transformer; it is not changed.
        calibration: Token ids (sequences, time), or keyword arguments per batch.
        sparsity: Part of the weights to remove, in [0, 1); or one per layer's name; None for "N:M".
        pattern: Where weights compete: "row" (the paper's), "layer", "global" or "N:M".
        adaptive: Let the rows of a layer differ in sparsity, see `cumulative_share`.
        true_sequential: Also within a block, prune layers before those behind them are calibrated.
        layers: Name patterns of the layers to prune.

    Returns:
        A new model with exact zeros, sharing every tensor that was not pruned.

    Raises:
        ValueError: A sparsity or pattern that does not fit, no calibration data, no fitting layer,
            weights that are not finite, or a quantized model.
    """
    if adaptive:
        _check_adaptive(pattern)
    _, goals = prunable(model, sparsity, pattern, layers, inside_blocks=True)
    if pattern == "global":
        scores = wanda_scores(
            model,
            calibration,
            layers=layers,
        )
        return apply_masks(model, choose_masks(scores, sparsity, pattern))

    def prune(name: str, layer: nn.Linear, seen: InputNorm) -> nn.Linear:
        mask = wanda_mask(layer.weight, _norms(seen), goals[name], pattern, adaptive=adaptive)
        return with_weight(layer, masked(layer.weight, mask))

    return layerwise(
        model,
        calibration,
        _observe,
        prune,
        layers=layers,
        true_sequential=true_sequential,
        share_observers=True,
        unreached=True,
    )
