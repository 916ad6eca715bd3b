r"""First-order Taylor importance: how much the loss changes, to first order, if a weight goes.

Removing $w$ changes the loss by $L(w = 0) - L(w) = -g w + O(w^2)$, $g = \partial L / \partial w$,
so $|w g|$ ranks weights by what they are worth to the *task* rather than to a layer's output
(Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", 2016,
arXiv 1611.06440; "Importance Estimation for Neural Network Pruning", 2019, arXiv 1906.10771).

SNIP is the same number at initialization, from one batch, before any training (Lee, Ajanthan, Torr,
"SNIP: Single-shot Network Pruning based on Connection Sensitivity", 2018, arXiv 1810.02340). There
it is derived as the gradient for gates $c = 1$ on the connections, which is the same:
$\partial L / \partial c_j = w_j\, \partial L / \partial w_j$.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.calibration import Calibration
from effnb.core.gradients import Batches, mean_gradients
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import LayerChoice, Model, chooses_layers, linears
from effnb.core.training import Loss
from effnb.inference.pruning.masks import Sparsity, apply_masks, choose_masks, prunable


def taylor_score(
    weight: Float[Tensor, "*shape"], gradient: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    r"""$|w\, g|$, with $g$ the mean gradient."""
    return (weight.detach() * gradient).abs()


def taylor_groups(
    weight: Float[Tensor, " groups *rest"],
    gradient: Float[Tensor, " groups *rest"],
    form: str = "vector",
) -> Float[Tensor, " groups"]:
    r"""Importance of whole groups of weights, one group for each index of the first axis.

    Args:
        weight: Weights, the groups on the first axis.
        gradient: Their mean gradients.
        form: "vector", $|\sum w g|$: the first-order change of the loss when the group goes;
            "element", $\sum |w g|$: contributions do not cancel; "squared", $\sum (w g)^2$.

    Raises:
        ValueError: When the form is none of these.
    """
    product = (weight.detach() * gradient).flatten(1)
    if form == "vector":
        return product.sum(1).abs()
    if form == "element":
        return product.abs().sum(1)
    if form == "squared":
        return product.square().sum(1)
    raise ValueError(f'form is {form!r}; it must be "vector", "element" or "squared".')


@chooses_layers
def taylor_scores(
    model: nn.Module,
    calibration: Batches,
    *,
    loss: Loss | None = None,
    layers: LayerChoice = "*",
) -> dict[str, Tensor]:
    r"""$|w g|$ of every fitting linear layer; arguments as in `mean_gradients`.

    Args:
        model: The model; it is not changed.
        calibration: See `effnb.core.gradients.loss_batches`.
        loss: From (model, batch) to a scalar; None for language modelling.
        layers: Name patterns of the layers.
    """
    gradients = mean_gradients(
        model,
        calibration,
        loss=loss,
        layers=layers,
    )
    chosen = linears(model, layers)
    return {name: taylor_score(chosen[name].weight, g) for name, g in gradients.items()}


@chooses_layers
@in_linear_form
def taylor(
    model: Model,
    calibration: Batches,
    sparsity: Sparsity = None,
    *,
    pattern: str = "global",
    loss: Loss | None = None,
    layers: LayerChoice = "*",
) -> Model:
    r"""Set the weights with the smallest $|w g|$ to 0.

    The scores of all layers are changes of one loss, so a global threshold is natural.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        calibration: Token ids (sequences, time), or batches; see
            `effnb.core.gradients.loss_batches`.
        sparsity: Part of the weights to remove, in [0, 1); or one per layer's name; None for "N:M".
        pattern: Where weights compete: "global", "layer", "row" or "N:M".
        loss: From (model, batch) to a scalar; None for language modelling.
        layers: Name patterns of the layers to prune.

    Returns:
        A new model with exact zeros, sharing every tensor that was not pruned.

    Raises:
        ValueError: A sparsity or pattern that does not fit, no data, no fitting layer, numbers that
            are not finite, a layer that would lose every weight, or a quantized model.
    """
    prunable(model, sparsity, pattern, layers)
    scores = taylor_scores(
        model,
        calibration,
        loss=loss,
        layers=layers,
    )
    return apply_masks(model, choose_masks(scores, sparsity, pattern))


@chooses_layers
def snip_scores(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    layers: LayerChoice = "*",
) -> dict[str, Tensor]:
    r"""Connection sensitivity $s_j = |w_j g_j| / \sum_k |w_k g_k|$ of one batch; they sum to 1.

    Args:
        model: A model at its initialization; it is not changed.
        batch: Token ids (sequences, time), or what a given loss takes.
        loss: From (model, batch) to a scalar; None for language modelling.
        layers: Name patterns of the layers.

    Raises:
        ValueError: An empty batch, no fitting layer, gradients that are not finite or all 0.
    """
    alone = batch if loss is None and isinstance(batch, Tensor) else [batch]
    size = len(batch) if isinstance(batch, Tensor) and len(batch) else 1
    scores = taylor_scores(model, Calibration(alone, size), loss=loss, layers=layers)
    total = sum(float(score.double().sum()) for score in scores.values())
    if total == 0:
        raise ValueError("every gradient of this batch is 0; there is nothing to rank.")
    return {name: score / total for name, score in scores.items()}


@chooses_layers
@in_linear_form
def snip(
    model: Model,
    batch: Any,
    sparsity: Sparsity = None,
    *,
    pattern: str = "global",
    loss: Loss | None = None,
    layers: LayerChoice = "*",
) -> Model:
    """Prune a model before training, by the connection sensitivities of one batch.

    Train the result with `effnb.inference.pruning.fine_tune`, which holds the mask.

    Args:
        model: A model at its initialization; it is not changed.
        batch: Token ids (sequences, time), or what a given loss takes.
        sparsity: Part of the weights to remove, in [0, 1); or one per layer's name; None for "N:M".
        pattern: Where weights compete: "global" (the paper's), "layer", "row" or "N:M".
        loss: From (model, batch) to a scalar; None for language modelling.
        layers: Name patterns of the layers to prune.

    Raises:
        ValueError: As `taylor`; at high sparsity one threshold may empty a layer, which is refused.
    """
    prunable(model, sparsity, pattern, layers)
    scores = snip_scores(model, batch, loss=loss, layers=layers)
    return apply_masks(model, choose_masks(scores, sparsity, pattern))
