r"""SparseGPT: prune column by column, and let the columns behind make up for what was removed.

With $H = \frac2N X X^\top$ of the layer's inputs and $U$ upper triangular, $U^\top U = H_d^{-1}$
(`effnb.core.hessian`), removing $w_{ri}$ costs $w_{ri}^2 / U_{ii}^2$ if the weights behind column
$i$ move as well as they can. So within a block of columns the smallest of these scores are removed,
and column after column

$$e_i = \frac{w_i - \hat w_i}{U_{ii}}, \qquad
  W_{:,j} \leftarrow W_{:,j} - e_i U_{ij} \quad (j > i)$$

with $\hat w_{ri} = 0$ where pruned and $w_{ri}$ (or its nearest grid point) where kept. The next
block chooses its mask on weights that have moved already. For "N:M" each group of M chooses when it
is reached. All rows share $U$, which is what makes this possible for large models; the price is
that columns already passed stay as they are.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
2023, arXiv 2301.00774.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.core.calibration import CalibrationLike, Hessian, layerwise
from effnb.core.hessian import check_damping, inverse_cholesky
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import LayerChoice, Model, chooses_layers
from effnb.inference.pruning.masks import (
    Pattern,
    Sparsity,
    check_layer,
    goals_of,
    keep_largest,
    prunable,
    with_weight,
)
from effnb.inference.quantization.clipping import choose_grid
from effnb.inference.quantization.formats import QuantizedTensor
from effnb.inference.quantization.grid import Granularity, Grid
from effnb.inference.quantization.linear import QuantizedLinear


@dataclass(frozen=True)
class SparseGptResult:
    r"""A pruned weight and what is known about it.

    Attributes:
        weight: The weight; exactly 0 where the mask is False.
        mask: True where a weight was kept.
        tensor: The weight as it is stored, if it was quantized too.
        error: $\operatorname{tr}(\Delta W H_d \Delta W^\top)$: twice the mean squared change of the
            output per token, plus the damping's share. With compensation it is
            $\sum_i \lVert e_i \rVert^2$.
    """

    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    tensor: QuantizedTensor | None
    error: float


def sparsegpt_weight(
    weight: Float[Tensor, "*matrix"],
    hessian: Float[Tensor, "*matrix2"],
    sparsity: float | None,
    *,
    pattern: str = "layer",
    block_size: int = 128,
    damping: float = 0.01,
    compensate: bool = True,
    bits: int | None = None,
    group_size: Granularity = "row",
    symmetric: bool = False,
) -> SparseGptResult:
    r"""Prune a weight (out, in), and round it if asked, such that its output changes little.

    Args:
        weight: The weight; computed in float32, or in float64 if it is.
        hessian: $H = \frac2N X X^\top$, (in, in). Its scale does not matter.
        sparsity: Part to remove; None for "N:M".
        pattern: Where scores compete: "layer" (in each block of columns, rows may differ; the
            paper's), "row" (in each row of the block) or "N:M".
        block_size: Columns whose mask is chosen at once. Smaller blocks see more of the updates.
        damping: Share of the mean diagonal entry of $H$ that is added to its diagonal.
        compensate: Whether other weights move; without, only the choice of weights is SparseGPT's.
        bits: 2 to 8 to round what is kept in the same walk; None keeps floating point.
        group_size: What shares a grid, chosen from the original weight: "tensor", "row" or so many
            inputs. Every grid contains 0 exactly, so pruned weights stay 0.
        symmetric: Whether the grids have no zero points.

    Raises:
        ValueError: A sparsity, pattern, block size, bits or group size that do not fit; a weight or
            Hessian that is not finite, or shapes that do not fit.
    """
    grid = None if bits is None else Grid(bits, group_size, symmetric)
    parsed = _check(pattern, block_size, damping)
    goal = goals_of(sparsity, parsed, [""])[""]
    check_layer("the weight", weight, goal, parsed)
    if tuple(hessian.shape) != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"the Hessian has shape {tuple(hessian.shape)}; a weight of {weight.shape[1]} inputs "
            f"needs {(weight.shape[1], weight.shape[1])}."
        )
    if weight.dtype == torch.float64:
        hessian = hessian.double()
    upper, dead = inverse_cholesky(hessian, damping)
    return sparsegpt_columns(
        weight, upper, dead, goal, parsed,
        block_size=block_size, compensate=compensate, grid=grid,
    )  # fmt: skip


def sparsegpt_columns(
    weight: Float[Tensor, "out in"],
    upper: Float[Tensor, "in in"],
    dead: Bool[Tensor, "in"],
    sparsity: float,
    pattern: Pattern,
    *,
    block_size: int = 128,
    compensate: bool = True,
    grid: Grid | None = None,
) -> SparseGptResult:
    """The walk through the columns itself; arguments as in `sparsegpt_weight`, checked already.

    Args:
        weight: The weight.
        upper: $U$ from `effnb.core.hessian.inverse_cholesky`.
        dead: Inputs that were always 0. Their weights cost nothing and go first, but no more of
            them than the sparsity asks for: other texts may reach them. With `bits` they become 0.
        sparsity: Part to remove of each block.
        pattern: Where scores compete.
        block_size: Columns whose mask is chosen at once.
        compensate: Whether other weights move.
        grid: What the kept weights are rounded to; None keeps floating point.
    """
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w = weight.detach().to(kind, copy=True)
    unused = w[:, dead].T
    w[:, dead] = 0
    columns = w.shape[1]
    grids = [] if grid is None else _grids(w, grid)
    size = grid.group_size if grid and isinstance(grid.group_size, int) else columns
    n_of_m = pattern.scope == "group"
    if n_of_m:  # a group must lie within one block, where all updates before it have arrived
        block_size = max(1, block_size // pattern.group) * pattern.group

    w = w.T.contiguous()  # a column of the weight is now a row of memory
    original = w.clone()
    upper = upper.to(kind)
    diagonal = upper.diagonal()
    steps = diagonal.tolist()
    keep = torch.ones_like(w, dtype=torch.bool)
    result, codes = torch.empty_like(w), torch.empty_like(w if grids else w[:0])
    error = torch.zeros((), dtype=torch.float64 if w.device.type != "mps" else kind).to(w.device)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block, errors = w[start:stop], torch.empty_like(w[start:stop])
        if not n_of_m:
            keep[start:stop] = _choose(block, diagonal, start, sparsity, pattern)
        for i in range(start, stop):
            if n_of_m and i % pattern.group == 0:
                ahead = slice(i, i + pattern.group)
                keep[ahead] = _choose(w[ahead], diagonal, i, sparsity, pattern)
            torch.mul(w[i], keep[i], out=result[i])
            if grids:
                scale, zero = grids[i // size]
                codes[i], result[i] = _round(result[i], scale, zero, grid)
            if not compensate:
                continue
            # e = (w_i - ŵ_i) / U_ii, and every column behind moves: w_j ← w_j - U_ij e for j > i.
            e = torch.sub(w[i], result[i], out=errors[i - start]).div_(steps[i])
            block[i - start + 1 :].addr_(upper[i, i + 1 : stop], e, alpha=-1)
        if compensate:  # the same move of the columns behind the block, for all its columns at once
            w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
            error += errors.square().sum()
    if not compensate:  # tr(D H D^T) with H = U^-1 U^-T
        moved = torch.linalg.solve_triangular(upper.T, original - result, upper=False)
        error += moved.square().sum()

    if grids:
        keep &= ~dead.unsqueeze(1)
    else:
        result[dead] = torch.where(keep[dead], unused, 0)
    tensor = None
    if grids:
        scales = torch.stack([scale for scale, _ in grids], 1)
        zeros = None if grid.symmetric else torch.stack([zero for _, zero in grids], 1)
        tensor = QuantizedTensor.from_codes(codes.T, scales, zeros, grid)
    pruned = result.T.contiguous().to(weight.dtype)
    return SparseGptResult(pruned, keep.T.contiguous(), tensor, float(error))


def _choose(
    columns: Float[Tensor, "some out"],
    diagonal: Float[Tensor, "in"],
    start: int,
    sparsity: float,
    pattern: Pattern,
) -> Bool[Tensor, "some out"]:
    r"""Keep the largest $w^2 / U_{ii}^2$ of some columns, `start` the first, given as rows."""
    stop = start + len(columns)
    score = (columns / diagonal[start:stop].unsqueeze(1)).square().T  # w^2 / U_ii^2
    if pattern.scope == "group":
        return keep_largest(score.contiguous(), pattern.group - pattern.keep).T
    n = 1 if pattern.scope == "row" else len(score)
    # What rounding leaves over passes on to the next block: all blocks together are exact.
    removed = round(sparsity * n * stop) - round(sparsity * n * start)
    flat = score.contiguous() if pattern.scope == "row" else score.reshape(1, -1)
    return keep_largest(flat, removed).view(score.shape).T


def _grids(weight: Tensor, grid: Grid) -> list[tuple[Tensor, Tensor | None]]:
    if grid.group_size == "tensor":
        return [choose_grid(weight.reshape(1, -1), grid)]
    size = weight.shape[1] if grid.group_size == "row" else grid.group_size
    return [choose_grid(part, grid) for part in weight.split(size, 1)]


def _round(values: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes and grid points, by the very operations of GPTQ."""
    code = (values / scale).round_()
    if zero is None:
        code.clamp_(grid.low, grid.high)
        return code, code * scale
    code.add_(zero).clamp_(grid.low, grid.high)
    return code, (code - zero).mul_(scale)


class _Curvature(Hessian):
    """A Hessian that is inverted once for all layers that share it."""

    _factor: tuple[Tensor, Tensor] | None = None

    def factor(self, damping: float) -> tuple[Tensor, Tensor]:
        """$U$ and the dead inputs; without any token, those that prune by magnitude."""
        if self._factor is None:
            value = self.value if self.tokens else torch.eye(len(self.value)).to(self.value)
            self._factor = inverse_cholesky(value, damping)
        return self._factor


@chooses_layers
@in_linear_form
def sparsegpt(
    model: Model,
    calibration: CalibrationLike,
    sparsity: Sparsity = None,
    *,
    pattern: str = "layer",
    block_size: int = 128,
    damping: float = 0.01,
    compensate: bool = True,
    bits: int | None = None,
    group_size: Granularity = "row",
    symmetric: bool = False,
    true_sequential: bool = False,
    layers: LayerChoice = "*",
    report: Callable[[str, SparseGptResult], None] | None = None,
) -> Model:
    """Prune the linear layers of a transformer's blocks, each on the inputs it will really see.

    Block by block: the Hessians of a block's layers are gathered while the calibration data runs
    through it, its layers are pruned, and the data goes on through the pruned block. A layer that
    no token reaches is pruned by magnitude.

    Args:
        model: A transformer; it is not changed.
        calibration: Token ids (sequences, time), or keyword arguments per batch.
        sparsity: Part of the weights to remove, in [0, 1); or one per layer's name; None for "N:M".
        pattern: "layer" (the paper's), "row" or "N:M", see `sparsegpt_weight`.
        block_size: Columns whose mask is chosen at once.
        damping: Share of the mean diagonal entry that is added to the diagonal.
        compensate: Whether other weights move.
        bits: 2 to 8 to quantize in the same walk; None keeps floating point.
        group_size: What shares a grid.
        symmetric: Whether the grids have no zero points.
        true_sequential: Also within a block, prune layers before those behind them are calibrated.
        layers: Name patterns of the layers to prune.
        report: Called with each layer's name and result.

    Returns:
        A new model that shares every tensor that was not pruned; with `bits`, its layers are
        `QuantizedLinear`.

    Raises:
        ValueError: As `sparsegpt_weight`; no calibration data, no fitting layer, or a quantized
            model.
    """
    grid = None if bits is None else Grid(bits, group_size, symmetric)
    parsed = _check(pattern, block_size, damping)
    _, goals = prunable(model, sparsity, pattern, layers, inside_blocks=True)

    def observe(name: str, layer: nn.Linear) -> _Curvature:
        return _Curvature(layer.in_features, layer.weight.device)

    def prune(name: str, layer: nn.Linear, seen: _Curvature) -> nn.Module:
        found = sparsegpt_columns(
            layer.weight, *seen.factor(damping), goals[name], parsed,
            block_size=block_size, compensate=compensate, grid=grid,
        )  # fmt: skip
        if report:
            report(name, found)
        if found.tensor is not None:
            return QuantizedLinear(found.tensor, layer.bias)
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


def _check(pattern: str, block_size: int, damping: float) -> Pattern:
    parsed = Pattern.parse(pattern)
    if parsed.scope == "global":
        raise ValueError(
            'SparseGPT chooses masks as it goes, so it has no pattern "global"; give a sparsity '
            "per layer instead."
        )
    if isinstance(block_size, bool) or block_size < 1:
        raise ValueError(f"block_size is {block_size!r}; it must be a whole number from 1.")
    check_damping(damping)
    return parsed
