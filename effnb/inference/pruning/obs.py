r"""Optimal Brain Damage and Optimal Brain Surgeon: pruning by the second derivative of the loss.

At a minimum the loss is $\delta L = \tfrac12\, \delta w^\top H\, \delta w$. Which weight $w_q$
costs least to remove?

- OBD (LeCun, Denker, Solla, "Optimal Brain Damage", 1990) keeps only the diagonal of $H$ and moves
  no other weight: $s_q = \tfrac12 H_{qq} w_q^2$.
- OBS (Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon",
  1993) lets all other weights make up for it:
  $s_q = \frac{w_q^2}{2 [H^{-1}]_{qq}}$, $\delta w = -\frac{w_q}{[H^{-1}]_{qq}} H^{-1} e_q$. Then
  the weight leaves the problem:
  $H^{-1} \leftarrow H^{-1} - \frac{H^{-1} e_q e_q^\top H^{-1}}{[H^{-1}]_{qq}}$.

For one linear layer and the squared error of its output, $H = \frac2N X X^\top$ is the same for
every row, and OBS can be carried out exactly, one weight after another (Frantar, Singh and
Alistarh, "Optimal Brain Compression", 2022, arXiv 2208.11580). SparseGPT is what remains of it when
a large model has to be done in hours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnb.core.calibration import CalibrationLike, Hessian, layerwise
from effnb.core.gradients import Batches, fisher_diagonal
from effnb.core.hessian import check_damping, damp_hessian
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import LayerChoice, Model, chooses_layers, linears
from effnb.core.training import Loss
from effnb.inference.pruning.masks import (
    Pattern,
    Sparsity,
    apply_masks,
    check_layer,
    choose_masks,
    goals_of,
    keep_largest,
    prunable,
    with_weight,
)

CHUNK_BYTES = 8 * 2**20
"""Rows are pruned side by side, each with its own inverse Hessian: at most this many bytes at once.

About what a processor's cache holds; with 64 MiB it takes several times as long.
"""


def obd_saliency(
    weight: Float[Tensor, "out in"], diagonal: Float[Tensor, "*row in"]
) -> Float[Tensor, "out in"]:
    r"""$s_q = \tfrac12 H_{qq} w_q^2$; the diagonal is (in,) for all rows, or (out, in)."""
    return diagonal * weight.detach().square() / 2


def obs_saliency(
    weight: Float[Tensor, "out in"], inverse: Float[Tensor, "in in"]
) -> Float[Tensor, "out in"]:
    r"""$s_q = w_q^2 / (2 [H^{-1}]_{qq})$ of every weight, each as if it were removed first."""
    return weight.detach().square() / (2 * inverse.diagonal())


def obs_step(
    weight: Float[Tensor, "rows in"],
    inverse: Float[Tensor, "rows in in"],
    which: Int[Tensor, " rows"],
) -> tuple[Float[Tensor, "rows in"], Float[Tensor, "rows in in"], Float[Tensor, " rows"]]:
    r"""Remove one weight of each row, move the others, and take the weight out of $H^{-1}$.

    Args:
        weight: Rows $w$.
        inverse: $H^{-1}$ of the weights each row still has; zero at those that are gone.
        which: $q$ of each row.

    Returns:
        The new rows, the new inverses, and the losses $s_q$.
    """
    rows = torch.arange(len(weight), device=weight.device)
    column = inverse[rows, :, which]
    pivot, value = column[rows, which], weight[rows, which]
    moved = weight - (value / pivot).unsqueeze(1) * column
    moved[rows, which] = 0  # exactly
    scaled = column / pivot.sqrt().unsqueeze(1)
    smaller = torch.addcmul(inverse, scaled.unsqueeze(2), scaled.unsqueeze(1), value=-1)
    smaller[rows, which, :] = 0
    smaller[rows, :, which] = 0
    return moved, smaller, value.square() / (2 * pivot)


@dataclass(frozen=True)
class ObsResult:
    r"""A pruned weight and what it cost.

    Attributes:
        weight: The weight; exactly 0 where the mask is False.
        mask: True where a weight was kept.
        loss: $\tfrac12 \operatorname{tr}(\Delta W H_d \Delta W^\top)$: the mean squared change of
            the output per token, plus the damping's share.
    """

    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    loss: float


def obs_weight(
    weight: Float[Tensor, "*matrix"],
    hessian: Float[Tensor, "*matrix2"],
    sparsity: float | None,
    *,
    pattern: str = "row",
    damping: float = 0.01,
) -> ObsResult:
    r"""Remove weights of a layer one by one, each time the one that costs least, exactly.

    Takes about $\text{removed} \cdot \text{in}^2$ operations, all removed weights counted: for
    layers of a few hundred inputs. Computed in float64.

    Args:
        weight: The weight.
        hessian: $H = \frac2N X X^\top$, (in, in).
        sparsity: Part to remove; None for "N:M".
        pattern: "row", "layer" (rows take turns as they are cheap) or "N:M" (no group gives up more
            than it has to).
        damping: Share of the mean diagonal entry that is added to the diagonal.

    Raises:
        ValueError: A sparsity or pattern that does not fit; a weight or Hessian that is not finite,
            or shapes that do not fit.
    """
    parsed = _check(pattern)
    goal = goals_of(sparsity, parsed, [""])[""]
    check_layer("the weight", weight, goal, parsed)
    damped, dead = _damped(weight, hessian, damping)
    start = weight.detach().to(damped.device).double().clone()
    start[:, dead] = 0  # they cost nothing, so they go first
    rows, columns = start.shape
    inverse = torch.linalg.inv(damped)
    counts = torch.full((rows,), round(goal * columns))
    if parsed.scope == "layer":
        # Rows do not touch each other. A row's weight goes when all before it have gone, so it
        # waits for the most expensive of them: ranking these running maxima is the greedy order.
        _, _, costs = _remove(start, inverse, torch.full((rows,), columns), parsed)
        waiting = costs.cummax(1).values.view(1, -1)
        gone = ~keep_largest(waiting, round(goal * start.numel())).view(rows, columns)
        counts = gone.sum(1)
    pruned, kept, costs = _remove(start, inverse, counts, parsed)
    pruned[:, dead] = weight.detach()[:, dead].to(pruned) * kept[:, dead]
    loss = float(costs[costs.isfinite()].sum())
    return ObsResult(pruned.to(weight), kept.to(weight.device), loss)


def _remove(
    weight: Float[Tensor, "out in"],
    inverse: Float[Tensor, "in in"],
    counts: Int[Tensor, " out"],
    pattern: Pattern,
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"], Float[Tensor, "out steps"]]:
    """Remove a number of weights from each row: the rows, which weights stayed, and the costs.

    A cost is infinite where nothing was removed.
    """
    steps = int(counts.max())
    costs = weight.new_full((len(weight), max(1, steps)), torch.inf)
    result, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    size = max(1, CHUNK_BYTES // (8 * inverse.numel()))
    for first in range(0, len(weight), size):
        part = slice(first, first + size)
        w, left = weight[part].clone(), counts[part].to(weight.device)
        inverses = inverse.expand(len(w), -1, -1)
        free = torch.ones_like(w, dtype=torch.bool)
        for step in range(int(left.max())):
            score = w.square() / (2 * inverses.diagonal(dim1=1, dim2=2))
            which = score.masked_fill(~_allowed(free, pattern), torch.inf).argmin(1)
            active = left > step
            moved, smaller, cost = obs_step(w, inverses, which)
            if bool(active.all()):
                w, inverses = moved, smaller
            else:
                w = torch.where(active.unsqueeze(1), moved, w)
                inverses = torch.where(active.view(-1, 1, 1), smaller, inverses)
            costs[part][:, step] = cost.where(active, torch.inf)
            free[torch.arange(len(w), device=w.device)[active], which[active]] = False
        result[part], kept[part] = w, free
    return result, kept, costs


def _allowed(free: Bool[Tensor, "rows in"], pattern: Pattern) -> Bool[Tensor, "rows in"]:
    """Which weights may go next: those that are there, of groups that have not given enough."""
    if pattern.scope != "group":
        return free
    left = free.unflatten(1, (-1, pattern.group)).sum(2) > pattern.keep
    return free & left.repeat_interleave(pattern.group, dim=1)


def least_squares_weight(
    weight: Float[Tensor, "*matrix"],
    mask: Bool[Tensor, "*mask"],
    hessian: Float[Tensor, "*matrix2"],
    *,
    damping: float = 0.01,
) -> Float[Tensor, "*matrix"]:
    r"""The best weights for a given mask: no other values on it change the output less.

    Row by row, with K the kept inputs, $\hat w_K = (H_{KK})^{-1} H_{K,:}\, w$. A lower bound for
    every method that also has to find the mask, and a way to improve any mask, Wanda's for one.

    Args:
        weight: The weight before pruning.
        mask: True where a weight is kept.
        hessian: $H = \frac2N X X^\top$, (in, in).
        damping: Share of the mean diagonal entry that is added to the diagonal.

    Raises:
        ValueError: A weight or Hessian that is not finite, or shapes that do not fit.
    """
    check_layer("the weight", weight, 0.0, Pattern("layer"))
    if mask.shape != weight.shape:
        raise ValueError(f"the mask is {tuple(mask.shape)}; it must be {tuple(weight.shape)}.")
    damped, dead = _damped(weight, hessian, damping)
    start = weight.detach().to(damped.device).double().clone()
    start[:, dead] = 0
    keep = mask.to(damped.device).double()
    target = start @ damped
    identity = torch.eye(len(damped), dtype=torch.float64, device=damped.device)
    result = torch.empty_like(start)
    size = max(1, CHUNK_BYTES // (8 * damped.numel()))
    for first in range(0, len(start), size):
        m = keep[first : first + size]
        system = m.unsqueeze(2) * damped * m.unsqueeze(1) + (1 - m).unsqueeze(2) * identity
        result[first : first + size] = torch.linalg.solve(system, m * target[first : first + size])
    result[:, dead] = weight.detach()[:, dead].to(result)
    return (result * keep).to(weight)


def _damped(weight: Tensor, hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    if tuple(hessian.shape) != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"the Hessian has shape {tuple(hessian.shape)}; a weight of {weight.shape[1]} inputs "
            f"needs {(weight.shape[1], weight.shape[1])}."
        )
    return damp_hessian(hessian, damping)


def _check(pattern: str) -> Pattern:
    parsed = Pattern.parse(pattern)
    if parsed.scope == "global":
        raise ValueError(
            'OBS prunes layer by layer, so it has no pattern "global"; give a sparsity per layer '
            "instead."
        )
    return parsed


@chooses_layers
@in_linear_form
def obs(
    model: Model,
    calibration: CalibrationLike,
    sparsity: Sparsity = None,
    *,
    pattern: str = "row",
    damping: float = 0.01,
    true_sequential: bool = False,
    layers: LayerChoice = "*",
) -> Model:
    """Optimal Brain Surgeon on the layers of a transformer's blocks, each on its real inputs.

    Exact and slow, see `obs_weight`: for small models, and to see what SparseGPT approximates. A
    layer that no token reaches is pruned by magnitude.

    Args:
        model: A transformer; it is not changed.
        calibration: Token ids (sequences, time), or keyword arguments per batch.
        sparsity: Part of the weights to remove, in [0, 1); or one per layer's name; None for "N:M".
        pattern: Where weights compete: "row", "layer" or "N:M".
        damping: Share of the mean diagonal entry that is added to the diagonal.
        true_sequential: Also within a block, prune layers before those behind them are calibrated.
        layers: Name patterns of the layers to prune.

    Returns:
        A new model with exact zeros, sharing every tensor that was not pruned.

    Raises:
        ValueError: A sparsity or pattern that does not fit, no calibration data, no fitting layer,
            weights that are not finite, or a quantized model.
    """
    _check(pattern)
    check_damping(damping)
    _, goals = prunable(model, sparsity, pattern, layers, inside_blocks=True)

    def observe(name: str, layer: nn.Linear) -> Hessian:
        return Hessian(layer.in_features, layer.weight.device)

    def prune(name: str, layer: nn.Linear, seen: Hessian) -> nn.Linear:
        hessian = seen.value if seen.tokens else torch.eye(layer.in_features)
        found = obs_weight(
            layer.weight, hessian.to(layer.weight.device), goals[name],
            pattern=pattern, damping=damping,
        )  # fmt: skip
        return with_weight(layer, found.weight)

    return layerwise(
        model,
        calibration,
        observe,
        prune,
        layers=layers,
        true_sequential=true_sequential,
        share_observers=True,
        unreached=True,
    )


@chooses_layers
@in_linear_form
def obd(
    model: Model,
    calibration: Batches,
    sparsity: Sparsity = None,
    *,
    pattern: str = "global",
    loss: Loss | None = None,
    layers: LayerChoice = "*",
) -> Model:
    r"""Set the weights with the smallest $\tfrac12 F_{qq} w_q^2$ to 0; no other weight moves.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        calibration: See `effnb.core.gradients.fisher_diagonal`.
        sparsity: Part of the weights to remove, in [0, 1); or one per layer's name; None for "N:M".
        pattern: Where weights compete: "global", "layer", "row" or "N:M".
        loss: From (model, sample) to a scalar; None for language modelling.
        layers: Name patterns of the layers to prune.

    Returns:
        A new model with exact zeros, sharing every tensor that was not pruned.

    Raises:
        ValueError: A sparsity or pattern that does not fit, no data, no fitting layer, numbers that
            are not finite, a layer that would lose every weight, or a quantized model.
    """
    prunable(model, sparsity, pattern, layers)
    diagonals = fisher_diagonal(
        model,
        calibration,
        loss=loss,
        layers=layers,
    )
    chosen = linears(model, layers)
    scores = {name: obd_saliency(chosen[name].weight, d) for name, d in diagonals.items()}
    return apply_masks(model, choose_masks(scores, sparsity, pattern))
