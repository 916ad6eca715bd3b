r"""Weighted sums over what is visible: the rest counts as nothing, whatever numbers it holds.

$y_i = \sum_{j \in V_i} w_{ij} x_j$ over the set $V_i$ that row i sees. As a product of matrices it
has a weight of 0 for all other j, and $0 \cdot \infty$ is not a number: one infinite $x_j$ would
spoil the rows that do not see it. Padding, and what lies outside a window or in the future, may
hold anything.

Products are taken of whole matrices where all numbers are finite; where some are not, those rows
of x are added one by one. So do the kernels, at no cost while all is finite: a program whose sums
came out as NaN says so in a byte, and runs a second time, with `sum_seen` for the product. The
second launch, of programs that read this byte and end, is all that is added otherwise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from effnb.kernels._launch import empty, jit, launch, tl


def _sum(weights: Tensor, x: Tensor, visible: Tensor) -> Tensor:
    """(..., i, j) weights, (..., j, d) x and a mask that broadcasts to the weights: (..., i, d)."""
    weights = weights.masked_fill(~visible, 0)
    if x.device.type == "meta":
        return weights @ x
    finite = x.isfinite().all(-1).reshape(math.prod(x.shape[:-2]), x.shape[-2]).all(0)
    if bool(finite.all()):
        return weights @ x
    total = weights[..., finite] @ x[..., finite, :]
    for j in (~finite).nonzero().flatten().tolist():
        one = slice(j, j + 1)
        seen = visible.expand(weights.shape)[..., one]
        total += torch.where(seen, weights[..., one] * x[..., one, :], 0)
    return total


class _Products(torch.autograd.Function):
    """a b^T where it is visible, and 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, visible: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, visible)
        return (a @ b.mT).masked_fill(~visible, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, visible = ctx.saved_tensors
        da = visible_sum(grad, b, visible) if ctx.needs_input_grad[0] else None
        db = visible_sum(grad.mT, a, visible.mT) if ctx.needs_input_grad[1] else None
        return da, db, None


class _Sums(torch.autograd.Function):
    """The weighted sums, whose gradients are products and sums of the same kind."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, x: Tensor, visible: Tensor) -> Tensor:
        ctx.save_for_backward(weights, x, visible)
        return _sum(weights, x, visible)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, x, visible = ctx.saved_tensors
        dw = visible_products(grad, x, visible) if ctx.needs_input_grad[0] else None
        dx = visible_sum(weights.mT, grad, visible.mT) if ctx.needs_input_grad[1] else None
        return dw, dx, None


def visible_products(a: Tensor, b: Tensor, visible: Tensor) -> Tensor:
    r"""$a_i \cdot b_j$ for the pairs that are visible, and 0 for all others.

    Args:
        a: (..., i, d).
        b: (..., j, d), with the leading axes of a.
        visible: What broadcasts to (..., i, j); true where j counts for i.

    Returns:
        (..., i, j), with gradients to a and b.
    """
    return _Products.apply(a, b, visible)


def visible_sum(weights: Tensor, x: Tensor, visible: Tensor) -> Tensor:
    r"""$\sum_j w_{ij} x_j$ over the j that i sees.

    Args:
        weights: (..., i, j).
        x: (..., j, d), with the leading axes of the weights.
        visible: What broadcasts to (..., i, j); true where j counts for i.

    Returns:
        (..., i, d), with gradients to weights and x.
    """
    return _Sums.apply(weights, x, visible)


def launch_again(
    kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, **settings: Any
) -> None:
    """Launch a kernel, and its programs that came out with a NaN once more.

    The kernel's first argument is the list of flags, one a program; its constant AGAIN says which
    of the two launches it is.
    """
    flags = empty((math.prod(grid),), torch.int8, first.device)
    for again in (False, True):
        launch(kernel, grid, flags, first, *arguments, AGAIN=again, **settings)


@jit
def _flag(flags):
    """Where the flag of this program is."""
    return flags + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)


@jit
def is_done(flags):
    """Whether the first launch of this program came out without a NaN."""
    return tl.load(_flag(flags)) == 0


@jit
def has_nan(x):
    """Whether a tile holds a NaN: where a product met what no row should have seen, it does."""
    return tl.max(tl.max((x != x).to(tl.int8), axis=1), axis=0)


@jit
def tell(flags, found):
    """Write what `has_nan` found."""
    tl.store(_flag(flags), found)


@jit
def sum_seen(
    total, weights, seen, start, rows, count, stride, dim, DIM: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Add to a tile what its rows see of other rows, taken one by one.

    These COLUMNS rows are those of the matrix at `start` with the numbers `rows`, neighbours, of
    which there are `count`; the numbers along `dim` touch.
    """
    column = tl.arange(0, COLUMNS)
    first = tl.min(rows, axis=0).to(tl.int64)
    for step in range(COLUMNS):
        mine = (column == step)[None, :]
        weight = tl.sum(tl.where(mine, weights, 0.0), axis=1)
        looks = tl.max((mine & seen).to(tl.int32), axis=1) > 0
        at = first + step
        inside = (dim < DIM) & (at < count)
        row = tl.load(start + at * stride + dim, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(looks[:, None], weight[:, None] * row[None, :], 0.0)
    return total
