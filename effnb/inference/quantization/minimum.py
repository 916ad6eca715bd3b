r"""Uniform grids that begin at a real number: what the 4-bit files of llama.cpp hold.

A zero point is a whole number, so that 0 is a point of the grid and the grid's ends are moved to
fit it. Here each group has a step $s$ and a *minimum* $m$ instead, both in half precision:

$$q = \operatorname{clamp}(\operatorname{round}((w - m) / s),\ 0,\ 2^b - 1), \qquad
  \hat w = s\,q + m, \qquad m = \min w, \quad s = (\max w - m) / (2^b - 1).$$

Both ends of a group's range are points of its grid. So weights that lie on such a grid, and reach
both of its ends, come out as they went in: a file of this format can be quantized again without
being rounded a second time. The price is that 0 is no point of the grid, which matters to weights
that were pruned, and $16 - b$ bits more a group than with a zero point. In groups of 32 and with 4
bits it is llama.cpp's Q4_1, 5 bits a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Num, UInt8
from torch import Tensor

from effnb.inference.quantization.clipping import HALF_MAX, HALF_MIN
from effnb.inference.quantization.formats import groups_of, scales_shape, spread
from effnb.inference.quantization.grid import Granularity, check_granularity
from effnb.inference.quantization.stored import (
    Stored,
    check_bits,
    check_matrix,
    check_tensor,
    pack,
    unpack,
)


@dataclass(frozen=True)
class MinimumTensor(Stored):
    r"""A matrix on uniform grids that begin anywhere, $\hat w = s\,q + m$, stored packed.

    Attributes:
        codes: Packed codes $0 \ldots 2^b - 1$.
        scales: Step $s$ of each group in half precision, (rows, groups per row); (1, 1) per tensor.
        minima: $m$ of each group, what code 0 stands for; the same type and shape.
        bits: Bits per code.
        shape: Rows and columns of the matrix.
        group_size: "tensor", "row", or inputs per group; the last group of a row may be shorter.
    """

    format = "minimum"

    codes: UInt8[Tensor, "rows packed"]
    scales: Float[Tensor, "scale_rows groups"]
    minima: Float[Tensor, "scale_rows groups"]
    bits: int
    shape: tuple[int, int]
    group_size: Granularity

    @classmethod
    def from_codes(
        cls,
        codes: Num[Tensor, "rows columns"],
        scales: Float[Tensor, "scale_rows groups"],
        minima: Float[Tensor, "scale_rows groups"],
        bits: int,
        group_size: Granularity,
    ) -> MinimumTensor:
        r"""Store codes that were chosen elsewhere, in a file for instance.

        Args:
            codes: Whole numbers $0 \ldots 2^b - 1$.
            scales: The step of each group; half precision must be able to hold it.
            minima: What code 0 stands for in each group; likewise.
            bits: 2 to 8.
            group_size: What shares a step and a minimum.

        Raises:
            ValueError: When a part has the wrong shape, a code does not fit, or a step or minimum
                is not a half-precision number.
        """
        check_bits(bits)
        check_granularity(group_size)
        if not bool(((codes >= 0) & (codes < 2**bits) & (codes == codes.round())).all()):
            raise ValueError(f"codes must be whole numbers from 0 to {2**bits - 1}.")
        for name, part in (("a scale", scales), ("a minimum", minima)):
            if not torch.equal(part.half().to(part.dtype), part):
                raise ValueError(f"{name} is not a half-precision number; round before coding.")
        shape = (codes.shape[0], codes.shape[1])
        packed = pack(codes.to(torch.uint8), bits)
        stored = cls(packed, scales.half(), minima.half(), bits, shape, group_size)
        stored.check()
        return stored

    def check(self) -> None:
        """Refuse tensors that do not fit the bits, shape and group size."""
        check_bits(self.bits)
        check_granularity(self.group_size)
        rows, columns = self.shape
        groups = scales_shape(self.shape, self.group_size)
        check_tensor("codes", self.codes, torch.uint8, (rows, -(-columns // 8) * self.bits))
        check_tensor("scales", self.scales, torch.float16, groups)
        check_tensor("minima", self.minima, torch.float16, groups)

    def integers(self) -> Int[Tensor, "rows columns"]:
        r"""The codes $q$."""
        return unpack(self.codes, self.bits, self.shape[1]).to(torch.int16)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows columns"]:
        r"""$\hat w = s\,q + m$."""
        s, m = (
            spread(part.float(), self.group_size, self.shape[1])
            for part in (self.scales, self.minima)
        )
        return (s * self.integers().float() + m).to(dtype)


def quantize_minimum(
    weight: Float[Tensor, "*matrix"], bits: int = 4, *, group_size: Granularity = 32
) -> MinimumTensor:
    r"""Round a matrix to grids with a step and a minimum; by default llama.cpp's Q4_1.

    The minimum is rounded to half precision first and the step after it, so that the codes are
    chosen for the numbers that are stored. A group of one value gets the step 1 and the code 0.

    Args:
        weight: The matrix (rows, columns), in any floating-point type.
        bits: 2 to 8.
        group_size: What shares a step and a minimum: "tensor", "row", or a number of consecutive
            columns.

    Raises:
        ValueError: Bits outside the format, entries that are not finite or too large for half
            precision, not a matrix, or an impossible group size.
    """
    check_bits(bits)
    check_granularity(group_size)
    check_matrix(weight)
    weight, top = weight.detach().float(), 2**bits - 1
    ends = [torch.aminmax(part, dim=-1) for part in groups_of(weight, group_size)]
    low, high = torch.cat([end.min for end in ends], 1), torch.cat([end.max for end in ends], 1)
    span = (high - low) / top
    if float(torch.maximum(span, low.abs()).max()) > HALF_MAX:
        raise ValueError(
            "the weights are too large: a step or a minimum does not fit into half precision (at "
            f"most {HALF_MAX})."
        )
    m = low.half().float()
    span = (high - m) / top
    s = torch.where(high > low, span.clamp(min=HALF_MIN), torch.ones_like(span)).half().float()
    steps, start = (spread(part, group_size, weight.shape[1]) for part in (s, m))
    codes = ((weight - start) / steps).round().clamp(0, top)
    return MinimumTensor.from_codes(codes, s, m, bits, group_size)
