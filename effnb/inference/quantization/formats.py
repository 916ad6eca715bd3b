r"""Uniform number formats: scales, zero points, and storage that is as small as it says.

A uniform quantizer of $b$ bits replaces each number $x$ by a code $q$, a small integer, and reads
it back as a point of an even grid:

$$q = \operatorname{clamp}(\operatorname{round}(x / s) + z,\ q_{min},\ q_{max}), \qquad
  \hat x = s\,(q - z).$$

The scale $s$ is the grid's step, the zero point $z$ the code of the number 0. Two ways to choose
them:

- *affine* (asymmetric): the grid spans the values from the smallest to the largest,
  $s = (\max - \min) / (2^b - 1)$ and $z = \operatorname{round}(-\min / s)$, with codes
  $0 \ldots 2^b - 1$. The range is first widened to contain 0, so that 0 is represented exactly;
- *symmetric* (absmax): $s = \max|x| / (2^{b-1} - 1)$, $z = 0$, and codes
  $-(2^{b-1} - 1) \ldots 2^{b-1} - 1$: one code is given up so that $-x$ and $x$ fare alike.

One pair $(s, z)$ serves a whole tensor, a row (an output channel of a linear layer), or a group of
consecutive inputs of a row. Smaller groups follow the weights more closely and store more scales.

The range may also be chosen smaller than the numbers': see `clipping`.

Rounding is half to even, as everywhere in PyTorch. Background: Gholami et al., "A Survey of
Quantization Methods for Efficient Neural Network Inference", 2021, arXiv 2103.13630; Nagel et al.,
"A White Paper on Neural Network Quantization", 2021, arXiv 2106.08295.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Num, UInt8
from torch import Tensor

from effnb.core.checks import check_finite
from effnb.inference.quantization.clipping import (
    HALF_MAX,
    HALF_MIN,
    choose_grid,
    round_to_grid,
)
from effnb.inference.quantization.grid import Granularity, Grid, check_granularity
from effnb.inference.quantization.stored import (
    BITS,
    Stored,
    check_bits,
    check_matrix,
    check_tensor,
    pack,
    unpack,
)

__all__ = [
    "BITS",
    "HALF_MAX",
    "HALF_MIN",
    "Granularity",
    "Grid",
    "QuantizedTensor",
    "bits_per_weight",
    "check_bits",
    "check_granularity",
    "choose_grid",
    "fake_quantize",
    "pack",
    "quantize",
    "unpack",
]


def scales_shape(shape: tuple[int, int], group_size: Granularity) -> tuple[int, int]:
    """Rows and columns of the scales of a matrix: one per tensor, row, or group of a row."""
    if group_size == "tensor":
        return 1, 1
    return shape[0], 1 if group_size == "row" else -(-shape[1] // group_size)


def order_dtype(columns: int) -> torch.dtype:
    """The smallest integer type that can number this many columns."""
    return torch.int16 if columns <= 2**15 else torch.int32


@dataclass(frozen=True)
class QuantizedTensor(Stored):
    r"""A matrix on a uniform grid, stored as packed codes, scales and zero points.

    Attributes:
        codes: Packed codes. A symmetric code is stored with $2^{b-1} - 1$ added to it.
        scales: Step of each group in half precision, (rows, groups per row); (1, 1) per tensor.
        zeros: Packed zero points, `bits` bits each, all groups in one row; None if symmetric.
        bits: Bits per code.
        shape: Rows and columns of the matrix.
        group_size: "tensor", "row", or inputs per group; the last group of a row may be shorter.
        order: None, or for each stored column its place in the matrix: stored column j is column
            `order[j]`. Groups are then made of columns that are neighbours in storage.
    """

    format = "uniform"

    codes: UInt8[Tensor, "rows packed"]
    scales: Float[Tensor, "scale_rows groups"]
    zeros: UInt8[Tensor, "1 packed_zeros"] | None
    bits: int
    shape: tuple[int, int]
    group_size: Granularity
    order: Int[Tensor, " places"] | None = None

    @classmethod
    def from_codes(
        cls,
        codes: Num[Tensor, "rows columns"],
        scales: Float[Tensor, "scale_rows groups"],
        zeros: Num[Tensor, "scale_rows groups"] | None,
        grid: Grid,
        *,
        order: Int[Tensor, " places"] | None = None,
    ) -> QuantizedTensor:
        r"""Store codes that a method has chosen itself.

        Args:
            codes: Whole numbers as the equations have them, columns in stored order:
                $-(2^{b-1} - 1) \ldots 2^{b-1} - 1$ if symmetric, $0 \ldots 2^b - 1$ if affine.
            scales: The step of each group; half precision must be able to hold it.
            zeros: The zero point of each group, $0 \ldots 2^b - 1$; None if symmetric.
            grid: What they are codes of; group sizes count stored columns.
            order: For each stored column its place in the matrix; None if they are in order.

        Raises:
            ValueError: When a part has the wrong shape, a code or zero point does not fit, a scale
                is not a half-precision number, or the order is no permutation.
        """
        bits, group_size, symmetric = grid.bits, grid.group_size, grid.symmetric
        if symmetric != (zeros is None):
            raise ValueError("a symmetric grid has no zero points, and an affine one needs them.")
        rows, columns = codes.shape
        expected = scales_shape((rows, columns), group_size)
        for name, part in (("scales", scales), ("zeros", zeros)):
            if part is not None and tuple(part.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(part.shape)}; it must be {expected}.")
        if not torch.equal(scales.half().to(scales.dtype), scales):
            raise ValueError(
                "a scale is not a half-precision number; round scales before choosing codes."
            )
        ends = (grid.low, grid.high)
        for name, part, (low, high) in (("codes", codes, ends), ("zeros", zeros, (0, grid.high))):
            if part is not None and not bool(
                ((part >= low) & (part <= high) & (part == part.round())).all()
            ):
                raise ValueError(f"{name} must be whole numbers from {low} to {high}.")
        codes = codes.to(torch.int16) - grid.low
        if order is not None:
            _check_order(order, columns)
            order = order.to(order_dtype(columns))
        return cls(
            codes=pack(codes.to(torch.uint8), bits),
            scales=scales.half(),
            zeros=None if zeros is None else pack(zeros.to(torch.uint8).reshape(1, -1), bits),
            bits=bits,
            shape=(rows, columns),
            group_size=group_size,
            order=order,
        )

    def check(self) -> None:
        """Refuse tensors that do not fit the bits, shape and group size."""
        check_bits(self.bits)
        check_granularity(self.group_size)
        rows, columns = self.shape
        scales = scales_shape(self.shape, self.group_size)
        check_tensor("codes", self.codes, torch.uint8, (rows, -(-columns // 8) * self.bits))
        check_tensor("scales", self.scales, torch.float16, scales)
        if self.zeros is not None:
            packed = -(-scales[0] * scales[1] // 8) * self.bits
            check_tensor("zeros", self.zeros, torch.uint8, (1, packed))
        if self.order is not None:
            check_tensor("order", self.order, order_dtype(columns), (columns,))
            _check_order(self.order, columns)

    @property
    def symmetric(self) -> bool:
        """Whether the grid has no zero point."""
        return self.zeros is None

    def integers(self) -> Int[Tensor, "rows columns"]:
        """The codes as the equations have them, in stored order: signed if symmetric."""
        codes = unpack(self.codes, self.bits, self.shape[1]).to(torch.int16)
        return codes - (2 ** (self.bits - 1) - 1) if self.symmetric else codes

    def zero_points(self) -> Int[Tensor, "scale_rows groups"] | None:
        """The zero points, one for each scale; None if symmetric."""
        if self.zeros is None:
            return None
        zeros = unpack(self.zeros, self.bits, self.scales.numel()).to(torch.int16)
        return zeros.view_as(self.scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows columns"]:
        r"""$\hat x = s\,(q - z)$, columns where the matrix has them."""
        q, z = self.integers().float(), self.zero_points()
        s = spread(self.scales.float(), self.group_size, self.shape[1])
        if z is not None:
            q = q - spread(z.float(), self.group_size, self.shape[1])
        values = (s * q).to(dtype)
        return values if self.order is None else values[:, self.order.argsort()]


def _check_order(order: Tensor, columns: int) -> None:
    whole = torch.arange(columns, device=order.device)
    if order.numel() != columns or not torch.equal(order.long().sort().values, whole):
        raise ValueError(f"order does not hold each of the {columns} columns exactly once.")


def spread(per_group: Tensor, group_size: Granularity, columns: int) -> Tensor:
    """Repeat one number per group over the columns of the group."""
    if isinstance(group_size, str):
        return per_group
    return per_group.repeat_interleave(group_size, dim=1)[:, :columns]


def groups_of(
    matrix: Float[Tensor, "rows columns"], group_size: Granularity
) -> list[Float[Tensor, "scale_rows groups size"]]:
    """The numbers that share a grid, along the last axis; a shorter last group stands apart."""
    if group_size == "tensor":
        return [matrix.reshape(1, 1, -1)]
    if group_size == "row":
        return [matrix.unsqueeze(1)]
    rest = matrix.shape[1] % group_size
    whole = matrix[:, : matrix.shape[1] - rest].unflatten(1, (-1, group_size))
    last = matrix[:, matrix.shape[1] - rest :].unsqueeze(1)
    return [part for part in (whole, last) if part.numel()]


def choose_grids(
    matrix: Float[Tensor, "rows columns"], grid: Grid, *, half_scales: bool = True
) -> tuple[Float[Tensor, "scale_rows groups"], Int[Tensor, "scale_rows groups"] | None]:
    """A grid for each tensor, row or group; a shorter last group gets one from its own numbers."""
    parts = groups_of(matrix, grid.group_size)
    grids = [choose_grid(part, grid, half_scales=half_scales) for part in parts]
    scales = torch.cat([scale for scale, _ in grids], 1)
    return scales, None if grid.symmetric else torch.cat([zero for _, zero in grids], 1)


def quantize(
    weight: Float[Tensor, "*matrix"],
    bits: int,
    *,
    group_size: Granularity = "row",
    symmetric: bool = False,
    clip: str = "minmax",
    percentile: float = 99.9,
    exponent: float = 2.0,
) -> QuantizedTensor:
    """Round a matrix to the nearest points of a uniform grid and store it packed.

    Args:
        weight: The matrix (rows, columns), in any floating-point type.
        bits: 2 to 8.
        group_size: What shares one scale: "tensor", "row", or a number of consecutive columns.
        symmetric: Whether the grid is centred on 0 and has no zero point.
        clip: What the grid covers: everything ("minmax"), a share of the numbers ("percentile"),
            or the range of least error ("mse"); see `clipping`.
        percentile: For "percentile": the share in per cent.
        exponent: For "mse": the power of the error that is summed.

    Raises:
        ValueError: Bits outside the format, entries that are not finite, not a matrix, an
            impossible group size, or an unknown way of clipping.
    """
    return quantize_on(weight, Grid(bits, group_size, symmetric, clip, percentile, exponent))


def quantize_on(weight: Float[Tensor, "*matrix"], grid: Grid) -> QuantizedTensor:
    r"""Round a matrix (rows, columns) to a grid: codes $q$ now, $\hat W = s\,(q - z)$ when read.

    `quantize` is the same with the grid's properties as keywords, and says what they may be.

    Raises:
        ValueError: Not a matrix, entries that are not finite, or groups that do not fit.
    """
    check_matrix(weight)
    weight = weight.detach().float()
    scale, zero = choose_grids(weight, grid)  # one s and one z for each row or group
    columns = weight.shape[1]
    s = spread(scale, grid.group_size, columns)
    z = None if zero is None else spread(zero, grid.group_size, columns)
    codes = round_to_grid(weight, s, z, grid.bits)  # q = clamp(round(W / s) + z)
    return QuantizedTensor.from_codes(codes, scale, zero, grid)


def fake_quantize(
    x: Float[Tensor, "*shape"],
    bits: int,
    *,
    group_size: Granularity = "row",
    symmetric: bool = False,
    clip: str = "minmax",
    percentile: float = 99.9,
    exponent: float = 2.0,
    half_scales: bool = False,
) -> Float[Tensor, "*shape"]:
    r"""Round to the grid and read back in one go, in floating point: $s\,(q - z)$, nothing packed.

    For activations, and for searches that try many grids. It computes in float32, or float64 if
    that is what it is given. With `half_scales` a float32 matrix becomes exactly what
    `quantize(...).dequantize()` gives. The gradient is that of rounding: 0.

    Args:
        x: Any shape. "row" is the last axis: for activations (batch, time, features), a token.
        bits: 2 to 8.
        group_size: What shares one scale: "tensor", "row", or a number of last-axis neighbours.
        symmetric: Whether the grid is centred on 0 and has no zero point.
        clip: What the grid covers: "minmax", "percentile" or "mse".
        percentile: For "percentile": the share in per cent.
        exponent: For "mse": the power of the error that is summed.
        half_scales: Whether scales are rounded to half precision, as in storage.

    Raises:
        ValueError: Bits outside the format, entries that are not finite, an impossible group size,
            an unknown way of clipping, or a tensor without axes.
    """
    grid = Grid(bits, group_size, symmetric, clip, percentile, exponent)
    return fake_quantize_on(x, grid, half_scales=half_scales)


def fake_quantize_on(
    x: Float[Tensor, "*shape"], grid: Grid, *, half_scales: bool = False
) -> Float[Tensor, "*shape"]:
    """`fake_quantize`, with the grid as one value."""
    if x.ndim == 0:
        raise ValueError("a single number has no grid; give a tensor with at least one axis.")
    if x.numel() == 0:
        return x
    check_finite(x, "the tensor", "quantized")
    matrix = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
    scale, zero = choose_grids(matrix, grid, half_scales=half_scales)
    s = spread(scale, grid.group_size, x.shape[-1])
    z = None if zero is None else spread(zero, grid.group_size, x.shape[-1])
    q = round_to_grid(matrix, s, z, grid.bits)
    return (s * (q if z is None else q - z)).to(x.dtype).view(x.shape)


def bits_per_weight(
    bits: int,
    shape: tuple[int, int],
    group_size: Granularity = "row",
    *,
    symmetric: bool = False,
) -> float:
    r"""Bits per weight by arithmetic, without quantizing anything.

    Groups of $g$ cost $b + 16 / g$ bits per weight, and $b / g$ more for zero points; rows that
    are no whole number of groups or of words of eight codes cost a little more.

    Args:
        bits: Bits per code.
        shape: Rows and columns of the matrix.
        group_size: What shares one scale.
        symmetric: Whether there are no zero points.

    Raises:
        ValueError: Bits or a group size that the format does not have.
    """
    check_bits(bits)
    check_granularity(group_size)

    def packed(codes: int) -> int:
        return -(-codes // 8) * bits

    rows, columns = shape
    scale_rows, groups = scales_shape(shape, group_size)
    scales = scale_rows * groups
    total = rows * packed(columns) + 2 * scales + (0 if symmetric else packed(scales))
    return 8 * total / (rows * columns)
