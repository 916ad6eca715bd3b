r"""FWSVD: weigh the weights by what the loss says of them, then truncate.

The empirical Fisher information of a weight is the mean square of its gradient, taken sample by
sample,

$$F_{ij} = \mathbb{E}\Bigl[\Bigl(\frac{\partial \mathcal L}{\partial W_{ij}}\Bigr)^2\Bigr] ,$$

and $\sum_{ij} F_{ij} (W - \hat W)_{ij}^2$ is about what a small change of the weights does to the
loss of a trained model. Minimising that over matrices of rank $r$ has no closed form, so the
weights of one input (or one output) are given one importance,

$$\hat I_j = \sqrt{\textstyle\sum_i F_{ij}} , \qquad
  \min_{\hat W} \sum_j \hat I_j^2\, \lVert W_{:,j} - \hat W_{:,j} \rVert^2 ,$$

which has one: truncate $W \operatorname{diag}(\hat I)$, and undo the scaling. Equal importances
give plain SVD.

Hsu et al., "Language model compression with weighted low-rank factorization", 2022, arXiv
2207.00112. The paper writes $y = x W$, so its rows are inputs; that is the default here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.calibration import Calibration, CalibrationLike, batches_of
from effnb.core.context import context_limit
from effnb.core.gradients import fisher_diagonal, sequences_of
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import LayerChoice, Layers, Model, chooses_layers, share
from effnb.core.training import next_token_loss
from effnb.inference.low_rank.factors import (
    Factors,
    check_setting,
    choose_layers,
    exact,
    plan,
    put_factors,
)
from effnb.inference.low_rank.svd import keep, scaled_svd

SampleLoss = Callable[[nn.Module, dict[str, Tensor]], Tensor]
FLOOR = 1e-6
"""Least importance, in parts of the largest one: a row that is not needed must not divide by 0."""


@chooses_layers
@in_linear_form
def fisher(
    model: nn.Module,
    calibration: CalibrationLike,
    *,
    loss: SampleLoss = next_token_loss,
    layers: LayerChoice = "*",
) -> dict[str, Float[Tensor, "out in"]]:
    r"""$F = \frac1N \sum_s (\partial \mathcal L_s / \partial W)^2$ of each linear layer's weight.

    One backward pass per sample: the square of a batch's gradient is something else, because
    gradients of different signs cancel before they are squared.

    Args:
        model: The model; it is not changed, and need not be trainable.
        calibration: Token ids (samples, time), or ready keyword arguments per batch.
        loss: From the model and the keyword arguments of one sample to a scalar.
        layers: Name patterns of the layers.

    Raises:
        ValueError: When there are no samples, no fitting layer, the loss is not finite for one of
            them, or a layer had no part in it.
    """
    chosen = choose_layers(model, layers)
    return fisher_diagonal(
        model,
        _batches(model, calibration, loss),
        loss=None if loss is next_token_loss else loss,
        layers=Layers(list(chosen), ()),
    )


def _batches(model: nn.Module, calibration: CalibrationLike, loss: SampleLoss) -> Calibration:
    """Ids as keyword arguments of one sample each, which is what a given loss takes."""
    if loss is next_token_loss:
        return Calibration.of(calibration)
    given = Calibration.of(calibration).one_by_one()
    return replace(given, data=sequences_of(batches_of(given, context_limit(model)), loss))


def importance(
    information: Float[Tensor, "*matrix"], axis: str = "inputs"
) -> Float[Tensor, " features"]:
    r"""$\hat I_j = \sqrt{\sum_i F_{ij}}$ of each input, or of each output.

    Args:
        information: $F$, (out, in).
        axis: "inputs" or "outputs".

    Raises:
        ValueError: When the axis is neither.
    """
    check_axis(axis)
    return exact(information).sum(0 if axis == "inputs" else 1).sqrt()


def check_axis(axis: str) -> None:
    """Refuse an axis that a matrix does not have."""
    if axis not in ("inputs", "outputs"):
        raise ValueError(f'axis is {axis!r}; choose "inputs" or "outputs".')


def fwsvd_weight(
    weight: Float[Tensor, "*matrix"],
    information: Float[Tensor, "*fisher"],
    rank: int | None = None,
    *,
    axis: str = "inputs",
) -> Factors:
    r"""Truncate $W \operatorname{diag}(\hat I)$, or $\operatorname{diag}(\hat I)\, W$ for outputs.

    Args:
        weight: $W$, (out, in).
        information: $F$ of each weight, (out, in); none below 0.
        rank: $r$; the full rank by default.
        axis: What gets one importance: "inputs" (the paper) or "outputs".

    Returns:
        Factors whose `error` is the root of $\sum_j \hat I_j^2 \lVert \Delta W_j \rVert^2$.

    Raises:
        ValueError: When the shapes do not fit, an entry is not finite or below 0, or the rank is
            out of range.
    """
    if information.shape != weight.shape:
        raise ValueError(
            f"the Fisher information has shape {tuple(information.shape)}, the weight "
            f"{tuple(weight.shape)}; they must be equal."
        )
    if not bool((torch.isfinite(information) & (information >= 0)).all()):
        raise ValueError("the Fisher information must be finite and nowhere below 0.")
    scale = importance(information, axis)
    most = float(scale.max())
    scale = scale.clamp(min=FLOOR * most) if most > 0 else torch.ones_like(scale)
    if axis == "inputs":
        return scaled_svd(weight, scale, rank)
    turned = scaled_svd(weight.T, scale, rank)
    return Factors(turned.right.T, turned.left.T, turned.singular_values)


@chooses_layers
@in_linear_form
def decompose_fwsvd(
    model: nn.Module,
    calibration: CalibrationLike,
    *,
    axis: str = "inputs",
    loss: SampleLoss = next_token_loss,
    layers: LayerChoice = "*",
) -> dict[str, Factors]:
    """The full decompositions that `truncate` makes models of.

    Args:
        model: See `fwsvd`.
        calibration: See `fwsvd`.
        axis: See `fwsvd`.
        loss: See `fwsvd`.
        layers: Name patterns.

    Raises:
        ValueError: See `fwsvd`.
    """
    check_axis(axis)
    chosen = choose_layers(model, layers)
    found = fisher(
        model,
        calibration,
        loss=loss,
        layers=Layers(list(chosen), ()),
    )
    return {n: keep(fwsvd_weight(m.weight, found[n], axis=axis)) for n, m in chosen.items()}


@chooses_layers
@in_linear_form
def fwsvd(
    model: Model,
    calibration: CalibrationLike,
    kept: float | None = None,
    *,
    rank: int | Mapping[str, int] | None = None,
    axis: str = "inputs",
    loss: SampleLoss = next_token_loss,
    always: bool = False,
    layers: LayerChoice = "*",
) -> Model:
    """Replace linear layers by factors that spare the weights on which the loss depends.

    Args:
        model: A model with `nn.Linear` layers; it is not changed.
        calibration: Samples of the task: token ids (samples, time), or ready keyword arguments.
        kept: Part of each layer's numbers that its factors may hold; see
            `effnb.inference.low_rank.svd`, also on which layers stay dense.
        rank: Instead of `kept`: one rank for all layers, or ranks by layer name.
        axis: What gets one importance: "inputs" (the paper) or "outputs".
        loss: From the model and the keyword arguments of one sample to a scalar.
        always: Factorise also where it saves nothing.
        layers: Name patterns of the layers to factorise.

    Returns:
        A new model with `LowRankLinear` layers that shares every other tensor.

    Raises:
        ValueError: See `effnb.inference.low_rank.svd` and `fisher`.
        TypeError: When a rank is not a whole number.
    """
    check_setting(kept, rank)
    check_axis(axis)
    chosen = choose_layers(model, layers)
    ranks = plan(chosen, kept, rank, always=always)
    if not ranks:
        return share(model)
    information = fisher(
        model,
        calibration,
        loss=loss,
        layers=Layers(list(ranks), ()),
    )
    return put_factors(
        model,
        {n: fwsvd_weight(chosen[n].weight, information[n], r, axis=axis) for n, r in ranks.items()},
    )
