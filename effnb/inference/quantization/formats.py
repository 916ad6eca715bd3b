r"""Uniform number formats: scales, zero points, and storage that is as small as it says.

A uniform quantiser of $b$ bits replaces each number $x$ by a code $q$, a small integer, and reads
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

Rounding is half to even, as everywhere in PyTorch. Background: Gholami et al., "A Survey of
Quantization Methods for Efficient Neural Network Inference", 2021, arXiv 2103.13630; Nagel et al.,
"A White Paper on Neural Network Quantization", 2021, arXiv 2106.08295.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, Num, UInt8
from torch import Tensor

Granularity = int | Literal["row", "tensor"]
"""What shares one scale: the whole tensor, a row, or a group of so many inputs of a row."""

BITS = range(2, 9)
HALF_MAX, HALF_MIN = 65504, 2.0**-24
"""Largest number, and smallest above 0, that half precision can hold: the limits of a scale."""


def check_bits(bits: int) -> None:
    """Refuse bit-widths that the uniform formats do not have."""
    if bits not in BITS:
        raise ValueError(f"bits is {bits!r}; the uniform formats have 2 to 8 bits.")


def check_finite(weight: Tensor) -> None:
    """Refuse tensors with NaN or infinite entries: no grid fits them."""
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise ValueError(
            f"the weight has {bad} entries that are NaN or infinite; only finite numbers can be "
            "quantized."
        )


def pack(codes: UInt8[Tensor, "rows n"], bits: int) -> UInt8[Tensor, "rows packed"]:
    """Store codes of `bits` bits without gaps, each row in `ceil(n / 8) * bits` bytes.

    Eight codes make one word of `8 * bits` bits, code 0 in its lowest bits; the word is written
    with its lowest byte first. Rows whose length is no multiple of 8 are filled up with zeros.

    Raises:
        ValueError: When a code needs more than `bits` bits.
    """
    check_bits(bits)
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit into {bits} bits.")
    rows, n = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -n % 8)).view(rows, -1, 8).long()
    shifts = torch.arange(8, device=codes.device) * bits
    words = (padded << shifts).sum(-1)  # no carry: the codes' bits do not overlap
    byte_shifts = torch.arange(bits, device=codes.device) * 8
    return ((words.unsqueeze(-1) >> byte_shifts) & 255).to(torch.uint8).flatten(1)


def unpack(packed: UInt8[Tensor, "rows packed"], bits: int, n: int) -> UInt8[Tensor, "rows n"]:
    """The inverse of `pack`, for rows of `n` codes."""
    check_bits(bits)
    if packed.shape[1] != -(-n // 8) * bits:
        raise ValueError(
            f"{packed.shape[1]} bytes do not hold rows of {n} codes of {bits} bits; "
            f"{-(-n // 8) * bits} would."
        )
    words = packed.view(len(packed), -1, bits).long()
    byte_shifts = torch.arange(bits, device=packed.device) * 8
    words = (words << byte_shifts).sum(-1, keepdim=True)
    shifts = torch.arange(8, device=packed.device) * bits
    codes = (words >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(1)[:, :n]


@dataclass(frozen=True)
class QuantizedTensor:
    r"""A matrix on a uniform grid, stored as packed codes, scales and zero points.

    Attributes:
        codes: Packed codes. A symmetric code is stored with $2^{b-1} - 1$ added to it.
        scales: Step of each group in half precision, (rows, groups per row); (1, 1) per tensor.
        zeros: Packed zero points, `bits` bits each, all groups in one row; None if symmetric.
        bits: Bits per code.
        shape: Rows and columns of the matrix.
        group_size: "tensor", "row", or inputs per group; the last group of a row may be shorter.
    """

    codes: UInt8[Tensor, "rows packed"]
    scales: Float[Tensor, "scale_rows groups"]
    zeros: UInt8[Tensor, "1 packed_zeros"] | None
    bits: int
    shape: tuple[int, int]
    group_size: Granularity

    @property
    def symmetric(self) -> bool:
        """Whether the grid has no zero point."""
        return self.zeros is None

    @property
    def bytes(self) -> int:
        """Bytes of codes, scales and zero points together: what a file would hold."""
        parts = (self.codes, self.scales, self.zeros)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per number, scales and zero points counted."""
        return 8 * self.bytes / (self.shape[0] * self.shape[1])

    def integers(self) -> Int[Tensor, "rows columns"]:
        """The codes as the equations have them: signed if symmetric, from 0 if affine."""
        codes = unpack(self.codes, self.bits, self.shape[1]).to(torch.int16)
        return codes - (2 ** (self.bits - 1) - 1) if self.symmetric else codes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows columns"]:
        r"""$\hat x = s\,(q - z)$."""
        q = self.integers().float()
        s = _spread(self.scales.float(), self)
        if self.zeros is None:
            return (s * q).to(dtype)
        z = unpack(self.zeros, self.bits, self.scales.numel()).float().view_as(self.scales)
        return (s * (q - _spread(z, self))).to(dtype)


def _spread(per_group: Tensor, like: QuantizedTensor) -> Tensor:
    """Repeat one number per group over the columns of the group."""
    if isinstance(like.group_size, str):
        return per_group
    return per_group.repeat_interleave(like.group_size, dim=1)[:, : like.shape[1]]


def _grouped(weight: Tensor, group_size: Granularity) -> Float[Tensor, "scale_rows groups size"]:
    """The weight as one row of numbers per scale; a short last group is filled up with zeros.

    Zeros change neither the largest magnitude nor a range that contains 0.
    """
    if group_size == "tensor":
        return weight.reshape(1, 1, -1)
    if group_size == "row":
        return weight.unsqueeze(1)
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(
            f'group_size is {group_size!r}; it must be "tensor", "row" or a whole number from 1.'
        )
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % group_size))
    return padded.view(rows, -1, group_size)


def choose_grid(
    values: Num[Tensor, "*shape size"], bits: int, symmetric: bool
) -> tuple[Float[Tensor, "*shape"], Int[Tensor, "*shape"] | None]:
    """Scale and zero point from the extremes of the last axis.

    The scale is rounded to half precision first, the form it is stored in, so that quantizing uses
    the same number as reading back. Where all values are 0 the scale is 1.

    Raises:
        ValueError: When a scale is too large for half precision.
    """
    check_bits(bits)
    if symmetric:
        span = values.abs().amax(-1).float() / (2 ** (bits - 1) - 1)
    else:
        low, high = values.amin(-1).float().clamp(max=0), values.amax(-1).float().clamp(min=0)
        span = (high - low) / (2**bits - 1)
    if float(span.max()) > HALF_MAX:
        raise ValueError(
            f"the weights are too large: a scale of {float(span.max()):.3g} does not fit into half "
            f"precision (at most {HALF_MAX})."
        )
    # A smaller scale would round to 0, and codes could not be computed.
    scale = torch.where(span > 0, span.clamp(min=HALF_MIN), torch.ones_like(span))
    scale = scale.half().float()
    if symmetric:
        return scale, None
    return scale, (-low / scale).round().clamp(0, 2**bits - 1).int()


def quantize(
    weight: Float[Tensor, "*matrix"],
    bits: int,
    *,
    group_size: Granularity = "row",
    symmetric: bool = False,
) -> QuantizedTensor:
    """Round a matrix to the nearest points of a uniform grid and store it packed.

    Args:
        weight: The matrix (rows, columns), in any floating-point type.
        bits: 2 to 8.
        group_size: What shares one scale: "tensor", "row", or so many consecutive columns.
        symmetric: Whether the grid is centred on 0 and has no zero point.

    Raises:
        ValueError: Bits outside the format, entries that are not finite, not a matrix, or an
            impossible group size.
    """
    check_bits(bits)
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"the weight has shape {tuple(weight.shape)}; only non-empty matrices are quantized."
        )
    check_finite(weight)
    weight = weight.detach().float()
    grouped = _grouped(weight, group_size)
    scale, zero = choose_grid(grouped, bits, symmetric)
    rows, columns = weight.shape
    ratio = (grouped / scale.unsqueeze(-1)).round()
    if symmetric:
        top = 2 ** (bits - 1) - 1
        codes = ratio.clamp(-top, top) + top
    else:
        codes = (ratio + zero.unsqueeze(-1)).clamp(0, 2**bits - 1)
    codes = codes.to(torch.uint8).reshape(rows, -1)[:, :columns]
    return QuantizedTensor(
        codes=pack(codes, bits),
        scales=scale.half(),
        zeros=None if zero is None else pack(zero.to(torch.uint8).view(1, -1), bits),
        bits=bits,
        shape=(rows, columns),
        group_size=group_size,
    )


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
    """

    def packed(codes: int) -> int:
        return -(-codes // 8) * bits

    rows, columns = shape
    per_row = 1 if isinstance(group_size, str) else -(-columns // group_size)
    scales = 1 if group_size == "tensor" else rows * per_row
    total = rows * packed(columns) + 2 * scales + (0 if symmetric else packed(scales))
    return 8 * total / (rows * columns)
