r"""GPTQ: round the columns of a weight one by one, and let the others make up for the error.

Rounding to nearest treats every weight alone. But what matters is the layer's output, the error
$\lVert \Delta W X \rVert_F^2$ on real inputs $X$. When a column is rounded, the columns that are
not yet rounded can move so as to cancel part of that error, as far as inputs are correlated. The
best move has a closed form (Optimal Brain Surgeon), and since all rows go through the columns in
one order, a single triangular matrix $U$ with $U^\top U = H^{-1}$, $H = \frac2N X X^\top$, holds it
for every row and every step (`effnb.core.hessian`):

$$\hat w_i = \operatorname{round}(w_i), \qquad e_i = \frac{w_i - \hat w_i}{U_{ii}}, \qquad
  W_{:,j} \leftarrow W_{:,j} - e_i U_{ij} \quad (j > i).$$

The weights end up *further* from the original than by rounding to nearest, and the output nearer.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", 2022, arXiv 2210.17323.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnb.core.calibration import CalibrationLike, Hessian, block_linears, layerwise
from effnb.core.hessian import check_damping, inverse_cholesky
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import LayerChoice, Model, chooses_layers
from effnb.inference.quantization.clipping import choose_grid
from effnb.inference.quantization.formats import QuantizedTensor
from effnb.inference.quantization.grid import Granularity, Grid
from effnb.inference.quantization.linear import QuantizedLinear, refuse_quantized
from effnb.inference.quantization.stored import check_matrix

EXPONENT = 2.4
"""The power of the error that `clip="mse"` sums in GPTQ's published code."""


@dataclass(frozen=True)
class InverseHessian:
    r"""What GPTQ needs to know about a layer's inputs; layers with the same inputs share it.

    Attributes:
        upper: $U$, upper triangular with $U^\top U = H_d^{-1}$, inputs in the order of rounding.
        dead: Inputs that were always 0, in the order of the weight.
        order: Which input comes when; None from first to last.
    """

    upper: Float[Tensor, "in in"]
    dead: Bool[Tensor, "in"]
    order: Int[Tensor, "in"] | None


@dataclass(frozen=True)
class GptqResult:
    r"""A rounded weight and what is known about it.

    Attributes:
        tensor: The weight as it is stored.
        error: $\sum_i \lVert e_i \rVert^2 = \operatorname{tr}(\Delta W H_d \Delta W^\top)$: twice
            the mean squared change of the output per token, plus the damping's share.
        seconds: What walking through the columns took, without the factorization of $H$.
    """

    tensor: QuantizedTensor
    error: float
    seconds: float


def invert_hessian(
    hessian: Float[Tensor, "*matrix"], *, damping: float = 0.01, act_order: bool = False
) -> InverseHessian:
    """Prepare a Hessian for `gptq_columns`.

    Args:
        hessian: $H$ of the layer's inputs, see `effnb.core.calibration.Hessian`.
        damping: See `effnb.core.hessian.damp_hessian`.
        act_order: Whether to round the inputs with the largest diagonal entries first, while most
            others can still move; otherwise from first to last.

    Raises:
        ValueError: See `effnb.core.hessian.inverse_cholesky`.
    """
    if not act_order:
        return InverseHessian(*inverse_cholesky(hessian, damping), None)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    upper, dead = inverse_cholesky(hessian[order][:, order], damping)
    return InverseHessian(upper, dead[order.argsort()], order)


def gptq_weight(
    weight: Float[Tensor, "*matrix"],
    hessian: Float[Tensor, "*matrix2"],
    bits: int,
    *,
    group_size: Granularity = "row",
    symmetric: bool = False,
    act_order: bool = False,
    static_groups: bool = False,
    block_size: int = 128,
    damping: float = 0.01,
    clip: str = "minmax",
    exponent: float = EXPONENT,
) -> QuantizedTensor:
    r"""Round a weight (out, in) such that its output changes little, by the equations above.

    With a diagonal $H$ nothing can be made up for, and the result is that of rounding to nearest.

    Args:
        weight: The weight; computed in float32, or in float64 if it is.
        hessian: $H = \frac2N X X^\top$, (in, in). Its scale does not matter.
        bits: 2 to 8.
        group_size: What shares one scale: "tensor", "row", or a number of inputs of a row. The grid
            of a tensor or row is that of the original weight. The grid of a group is chosen when
            its first column is reached, from the weights as they are then.
        symmetric: Whether the grids are centred on 0 and have no zero points.
        act_order: Round the inputs with the largest diagonal entries of $H$ first. Groups are then
            made of inputs that are neighbours in this order, which is stored with the weight.
        static_groups: Choose the grids of groups from the original weight. With `act_order`, groups
            then stay neighbouring inputs, and no order needs to be stored.
        block_size: Columns whose effect on all columns behind them is applied in one go. It changes
            the speed and not the result.
        damping: Share of the mean diagonal entry that is added to the diagonal.
        clip: What a grid covers: "minmax", "percentile" or "mse" (`clipping.choose_grid`).
        exponent: For "mse": the power of the error.

    Raises:
        ValueError: Bits, group size, block size or clip that do not exist; a weight or Hessian that
            is not finite, or shapes that do not fit; a Hessian without an inverse.
    """
    check_matrix(weight)
    grid = Grid(bits, group_size, symmetric, clip, exponent=exponent)
    _check(block_size, damping)
    if tuple(hessian.shape) != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"the Hessian has shape {tuple(hessian.shape)}; a weight of {weight.shape[1]} inputs "
            f"needs {(weight.shape[1], weight.shape[1])}."
        )
    if weight.dtype == torch.float64:
        hessian = hessian.double()
    inverse = invert_hessian(hessian, damping=damping, act_order=act_order)
    return gptq_columns(
        weight, inverse, grid, static_groups=static_groups, block_size=block_size
    ).tensor


def gptq_columns(
    weight: Float[Tensor, "out in"],
    inverse: InverseHessian,
    grid: Grid,
    *,
    static_groups: bool = False,
    block_size: int = 128,
) -> GptqResult:
    """The walk through the columns itself, for a Hessian that is inverted already.

    Args:
        weight: The weight.
        inverse: From `invert_hessian`.
        grid: Bits, what shares a scale, symmetry and clipping; see `gptq_weight`.
        static_groups: Whether groups get their grids from the original weight.
        block_size: Columns handled before those behind them.
    """
    started = time.perf_counter()
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w = weight.detach().to(kind, copy=True)
    w[:, inverse.dead] = 0
    columns, order = w.shape[1], inverse.order
    by_group = isinstance(grid.group_size, int)
    size = grid.group_size if by_group else columns
    dynamic = by_group and not static_groups  # choose each grid when its group is reached

    def choose(values: Tensor) -> tuple[Tensor, Tensor | None]:
        scale, zero = choose_grid(values, grid)
        return scale, None if zero is None else zero.to(kind)

    grids: list[tuple[Tensor, Tensor | None]] = []
    if grid.group_size == "tensor":
        grids = [choose(w.reshape(1, -1))]
    elif not dynamic:
        grids = [choose(part) for part in w.split(size, 1)]
    places = range(columns) if order is None or dynamic else order.tolist()
    if order is not None:
        w = w[:, order]

    w = w.T.contiguous()  # a column of the weight is now a row of memory
    upper = inverse.upper.to(kind)
    diagonal = upper.diagonal().tolist()
    codes = torch.empty_like(w)
    error = 0.0
    for start, stop in _blocks(columns, block_size, size if dynamic else None):
        block, errors = w[start:stop], torch.empty_like(w[start:stop])
        for i in range(start, stop):
            if dynamic and i % size == 0:
                grids.append(choose(w[i : i + size].T))
            scale, zero = grids[places[i] // size]
            # The code of every row, q = clamp(round(w_i / s) + z), and its value, ŵ_i = s (q - z).
            code = torch.div(w[i], scale, out=codes[i]).round_()
            if zero is not None:
                code.add_(zero)
            code.clamp_(grid.low, grid.high)
            rounded = code * scale if zero is None else (code - zero).mul_(scale)
            # e = (w_i - ŵ_i) / U_ii, and every column behind moves: w_j ← w_j - U_ij e for j > i.
            e = torch.sub(w[i], rounded, out=errors[i - start]).div_(diagonal[i])
            block[i - start + 1 :].addr_(upper[i, i + 1 : stop], e, alpha=-1)
        # The same move, for all columns of the block at once, of the columns behind the block.
        w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        error += float(errors.square().sum())

    chosen = codes.T
    if order is not None and not dynamic:
        chosen, order = chosen[:, order.argsort()], None
    tensor = QuantizedTensor.from_codes(
        chosen,
        torch.stack([scale for scale, _ in grids], 1),
        None if grid.symmetric else torch.stack([zero for _, zero in grids], 1),
        grid,
        order=order,
    )
    return GptqResult(tensor, error, time.perf_counter() - started)


def _blocks(columns: int, block_size: int, group_size: int | None) -> Iterator[tuple[int, int]]:
    """First and last column of each block, such that every group can see its current weights.

    All columns of a group must have got the updates of all columns before it when its grid is
    chosen. So either whole groups lie within a block, or a group begins with a new block.
    """
    if group_size is None:
        spans = [(0, columns)]
    else:
        span = max(1, block_size // group_size) * group_size
        spans = [(first, min(first + span, columns)) for first in range(0, columns, span)]
    for first, last in spans:
        for start in range(first, last, block_size):
            yield start, min(start + block_size, last)


class _Curvature(Hessian):
    """A Hessian that is inverted once for all layers that share it."""

    _inverse: InverseHessian | None = None

    def inverted(self, damping: float, act_order: bool) -> InverseHessian:
        """What `gptq_columns` needs; without any token, what makes it round to nearest."""
        if self._inverse is None:
            hessian = self.value if self.tokens else torch.eye(len(self.value)).to(self.value)
            self._inverse = invert_hessian(hessian, damping=damping, act_order=act_order)
        return self._inverse


@chooses_layers
@in_linear_form
def gptq(
    model: Model,
    calibration: CalibrationLike,
    bits: int,
    *,
    group_size: Granularity = "row",
    symmetric: bool = False,
    act_order: bool = False,
    static_groups: bool = False,
    true_sequential: bool = False,
    block_size: int = 128,
    damping: float = 0.01,
    clip: str = "minmax",
    exponent: float = EXPONENT,
    layers: LayerChoice = "*",
    report: Callable[[str, GptqResult], None] | None = None,
) -> Model:
    """Round the linear layers of a transformer's blocks, each on the inputs it will really see.

    Block by block: the Hessians of a block's layers are gathered while the calibration data runs
    through it, its layers are rounded, and the data goes on through the rounded block. Layers that
    read the same tensor (query, key and value) share a Hessian and its inverse. A layer that no
    token reaches (an expert that the router never chose) is rounded to nearest.

    Args:
        model: A transformer whose blocks `effnb.core.modules.find_blocks` finds; it is not changed.
        calibration: Token ids (sequences, time), or batches; see `core.calibration.batches_of`.
            64 sequences of 128 tokens are enough for models of a few million parameters.
        bits: 2 to 8.
        group_size: See `gptq_weight`, as for all arguments up to `exponent` not listed here.
        symmetric: Whether the grids are centred on 0.
        act_order: Whether important inputs are rounded first.
        static_groups: Whether the grids of groups are those of the original weights.
        true_sequential: Also within a block, let layers see what the rounded layers before them
            give. Costs further passes through the block, one for each stage.
        block_size: Columns handled before those behind them.
        damping: Share of the mean diagonal entry added to the diagonal.
        clip: What a grid covers.
        exponent: For the clip "mse".
        layers: Name patterns of the layers to quantize.
        report: Called with each layer's name and result.

    Returns:
        A new model with `QuantizedLinear` layers that shares every other tensor.

    Raises:
        ValueError: As `gptq_weight`, with the layer's name; no or too long calibration data, no
            fitting layer, or a model that is quantized already.
    """
    grid = Grid(bits, group_size, symmetric, clip, exponent=exponent)
    _check(block_size, damping)
    refuse_quantized(model)
    for name, layer in block_linears(model, layers).items():
        try:
            check_matrix(layer.weight)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None

    rounding = partial(gptq_columns, grid=grid, static_groups=static_groups, block_size=block_size)

    def observe(name: str, layer: nn.Linear) -> _Curvature:
        return _Curvature(layer.in_features, layer.weight.device)

    def compress(name: str, layer: nn.Linear, seen: _Curvature) -> QuantizedLinear:
        result = rounding(layer.weight, seen.inverted(damping, act_order))
        if report:
            report(name, result)
        return QuantizedLinear(result.tensor, layer.bias)

    return layerwise(
        model,
        calibration,
        observe,
        compress,
        layers=layers,
        true_sequential=true_sequential,
        share_observers=True,
        unreached=True,
    )


def _check(block_size: int, damping: float) -> None:
    check_damping(damping)
    if isinstance(block_size, bool) or block_size < 1:
        raise ValueError(f"block_size is {block_size!r}; it must be a whole number from 1.")
