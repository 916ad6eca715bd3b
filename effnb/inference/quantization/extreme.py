r"""One bit and three values: binary and ternary weights.

- *binary*: $\hat W = \alpha\,\operatorname{sign}(W)$ with $\alpha = \operatorname{mean}|W|$, which
  is the scale of least squared error. Rastegari et al., 2016, arXiv 1603.05279; for BERT, Bai et
  al., "BinaryBERT", 2020, arXiv 2012.15701;
- *ternary, absmean*: $\hat W = \gamma\,\operatorname{clamp}(\operatorname{round}(W / \gamma),
  -1, 1)$ with $\gamma = \operatorname{mean}|W|$ of the whole matrix. Ma et al., "The Era of 1-bit
  LLMs" (BitNet b1.58), 2024, arXiv 2402.17764. Of normally distributed weights 31 % become 0;
- *ternary, TWN*: weights up to $\Delta = 0.7\,\operatorname{mean}|W|$ become 0, the others
  $\pm\alpha$ with $\alpha$ the mean magnitude of those. Li et al., "Ternary Weight Networks", 2016,
  arXiv 1605.04711.

A ternary weight carries $\log_2 3 = 1.58$ bits; five of them fit into a byte ($3^5 = 243$), which
takes 1.6. As rounding of a trained model these formats destroy it; they are meant for models that
are trained in them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor

from effnb.inference.quantization.stored import Stored, check_matrix, check_tensor

PACKINGS = {"base3": 5, "two_bits": 4}
"""Ternary codes per byte: digits of a number in base 3, or two bits each."""

EPSILON = 1e-8
"""Added to the mean magnitude before dividing by it, for matrices of zeros."""


def check_sharing(group_size: str) -> None:
    """Refuse anything but "tensor" and "row"."""
    if group_size not in ("tensor", "row"):
        raise ValueError(f'group_size is {group_size!r}; it must be "tensor" or "row".')


def _check_packing(packing: str) -> None:
    if packing not in PACKINGS:
        raise ValueError(f'packing is {packing!r}; it must be "base3" or "two_bits".')


def _check_scales(scales: Tensor, rows: int) -> None:
    if scales.dtype != torch.float32 or tuple(scales.shape) not in ((1, 1), (rows, 1)):
        raise ValueError(
            f"scales is of {scales.dtype} and shape {tuple(scales.shape)}; it should be of "
            f"torch.float32 and shape (1, 1) or ({rows}, 1)."
        )


def pack_digits(digits: UInt8[Tensor, " n"], base: int, per_byte: int) -> UInt8[Tensor, " packed"]:
    r"""Several digits in a byte, the first lowest: $\sum_i d_i B^i$.

    Args:
        digits: Numbers from 0 to `base` - 1; the last byte is filled up with zeros.
        base: The base $B$.
        per_byte: Digits per byte; $B$ to this power must not pass 256.
    """
    padded = torch.nn.functional.pad(digits, (0, -len(digits) % per_byte)).view(-1, per_byte)
    weights = base ** torch.arange(per_byte, device=digits.device)
    return (padded.long() * weights).sum(1).to(torch.uint8)


def unpack_digits(
    packed: UInt8[Tensor, " packed"], base: int, per_byte: int, n: int
) -> UInt8[Tensor, " n"]:
    """The inverse of `pack_digits`, for `n` digits."""
    weights = base ** torch.arange(per_byte, device=packed.device)
    digits = packed.long().unsqueeze(1) // weights % base
    return digits.flatten()[:n].to(torch.uint8)


@dataclass(frozen=True)
class TernaryTensor(Stored):
    """A matrix of -1, 0 and 1 times a scale.

    Attributes:
        codes: The values plus 1, packed in row-major order.
        scales: One scale in float32 per matrix (1, 1) or per row (rows, 1).
        shape: Rows and columns of the matrix.
        packing: "base3" (1.6 bits per weight) or "two_bits" (2 bits, cheaper to unpack).
    """

    format = "ternary"

    codes: UInt8[Tensor, " packed"]
    scales: Float[Tensor, "scale_rows 1"]
    shape: tuple[int, int]
    packing: str = "base3"

    @classmethod
    def from_codes(
        cls,
        codes: Num[Tensor, "rows columns"],
        scales: Float[Tensor, "scale_rows 1"],
        *,
        packing: str = "base3",
    ) -> TernaryTensor:
        """Store values that a method, such as training, has chosen itself.

        Args:
            codes: -1, 0 and 1.
            scales: One per matrix (1, 1) or per row (rows, 1).
            packing: "base3" or "two_bits".

        Raises:
            ValueError: When there is another value, or the scales have another shape.
        """
        _check_packing(packing)
        if not bool(((codes == -1) | (codes == 0) | (codes == 1)).all()):
            raise ValueError("ternary codes must be -1, 0 or 1.")
        scales = scales.detach().float()
        _check_scales(scales, len(codes))
        digits = (codes.to(torch.int8) + 1).to(torch.uint8).flatten()
        packed = pack_digits(digits, *_layout(packing))
        return cls(packed, scales, (codes.shape[0], codes.shape[1]), packing)

    def integers(self) -> Num[Tensor, "rows columns"]:
        """The values -1, 0 and 1."""
        n = self.shape[0] * self.shape[1]
        digits = unpack_digits(self.codes, *_layout(self.packing), n)
        return digits.view(self.shape).to(torch.int8) - 1

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows columns"]:
        """Values times scale."""
        return (self.scales * self.integers().float()).to(dtype)

    def check(self) -> None:
        """Refuse tensors that do not fit the shape and packing."""
        _check_packing(self.packing)
        rows, columns = self.shape
        per_byte = PACKINGS[self.packing]
        check_tensor("codes", self.codes, torch.uint8, (-(-rows * columns // per_byte),))
        _check_scales(self.scales, rows)
        if int(self.codes.max()) >= 3**5 and self.packing == "base3":
            raise ValueError("a byte holds more than five ternary digits can.")
        if int(self.integers().max()) > 1:
            raise ValueError("a code stands for none of -1, 0 and 1.")


def _layout(packing: str) -> tuple[int, int]:
    """Base and digits per byte of a packing."""
    return (3 if packing == "base3" else 4), PACKINGS[packing]


@dataclass(frozen=True)
class BinaryTensor(Stored):
    """A matrix of signs times a scale.

    Attributes:
        codes: A bit per number in row-major order, lowest bit first: 1 for plus, 0 for minus.
        scales: One scale in float32 per matrix (1, 1) or per row (rows, 1).
        shape: Rows and columns of the matrix.
    """

    format = "binary"

    codes: UInt8[Tensor, " packed"]
    scales: Float[Tensor, "scale_rows 1"]
    shape: tuple[int, int]

    @classmethod
    def from_codes(
        cls, codes: Num[Tensor, "rows columns"], scales: Float[Tensor, "scale_rows 1"]
    ) -> BinaryTensor:
        """Store signs that a method, such as training, has chosen itself.

        Args:
            codes: -1 and 1.
            scales: One per matrix (1, 1) or per row (rows, 1).

        Raises:
            ValueError: When there is another value, or the scales have another shape.
        """
        if not bool((codes.abs() == 1).all()):
            raise ValueError("binary codes must be -1 or 1.")
        scales = scales.detach().float()
        _check_scales(scales, len(codes))
        packed = pack_digits((codes > 0).to(torch.uint8).flatten(), 2, 8)
        return cls(packed, scales, (codes.shape[0], codes.shape[1]))

    def integers(self) -> Num[Tensor, "rows columns"]:
        """The signs -1 and 1."""
        digits = unpack_digits(self.codes, 2, 8, self.shape[0] * self.shape[1])
        return 2 * digits.view(self.shape).to(torch.int8) - 1

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows columns"]:
        """Signs times scale."""
        return (self.scales * self.integers().float()).to(dtype)

    def check(self) -> None:
        """Refuse tensors that do not fit the shape."""
        rows, columns = self.shape
        check_tensor("codes", self.codes, torch.uint8, (-(-rows * columns // 8),))
        _check_scales(self.scales, rows)


def ternarize(
    weight: Float[Tensor, "*matrix"],
    *,
    method: str = "absmean",
    group_size: str = "tensor",
    packing: str = "base3",
) -> TernaryTensor:
    r"""Round a matrix to three values.

    "absmean": $\gamma\,\operatorname{clamp}(\operatorname{round}(W / (\gamma + \epsilon)), -1, 1)$
    with $\gamma = \operatorname{mean}|W|$. "twn": 0 up to $0.7 \operatorname{mean}|W|$, beyond it
    $\pm\alpha$, $\alpha$ the mean magnitude beyond it.

    Args:
        weight: The matrix (rows, columns), in any floating-point type.
        method: "absmean" (BitNet b1.58) or "twn".
        group_size: What shares a scale: "tensor" (as in BitNet) or "row".
        packing: "base3" (1.6 bits per weight) or "two_bits".

    Raises:
        ValueError: An unknown method, sharing or packing, entries that are not finite, or not a
            matrix.
    """
    if method not in ("absmean", "twn"):
        raise ValueError(f'method is {method!r}; it must be "absmean" or "twn".')
    check_sharing(group_size)
    _check_packing(packing)
    check_matrix(weight)
    weight = weight.detach().float()
    lines = weight.reshape(1, -1) if group_size == "tensor" else weight
    scale = lines.abs().mean(1, keepdim=True)
    if method == "absmean":
        codes = (weight / (scale + EPSILON)).round().clamp(-1, 1)
    else:
        kept = lines.abs() > 0.7 * scale
        codes = (weight.sign() * kept.view(weight.shape)).float()
        scale = (lines.abs() * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return TernaryTensor.from_codes(codes, scale, packing=packing)


def binarize(weight: Float[Tensor, "*matrix"], *, group_size: str = "row") -> BinaryTensor:
    r"""Keep the signs: $\alpha\,\operatorname{sign}(W)$ with $\alpha = \operatorname{mean}|W|$.

    The sign of 0 is plus. No other $\alpha$ has a smaller squared error.

    Args:
        weight: The matrix (rows, columns), in any floating-point type.
        group_size: What shares a scale: "tensor" or "row".

    Raises:
        ValueError: An unknown sharing, entries that are not finite, or not a matrix.
    """
    check_sharing(group_size)
    check_matrix(weight)
    weight = weight.detach().float()
    lines = weight.reshape(1, -1) if group_size == "tensor" else weight
    signs = torch.where(weight >= 0, 1, -1)
    return BinaryTensor.from_codes(signs, lines.abs().mean(1, keepdim=True))
