"""Weights of 4-bit codes, in the order in which the kernels of `int4_matmul` read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effnb.kernels._launch import check_shape, check_whole, short

UNIT, WORDS, SMALLEST = 128, 16, 32
"""Inputs that are packed together, in how many words, and the inputs of the smallest group.

Word j of a unit holds its codes j, j + 16, ... j + 112, the first in its lowest bits: four words
side by side, which a thread loads at once, need four neighbors of x for each of their eight codes.
Groups of 32 and more never divide the sixteen codes that stand in one place of the words.
"""


@dataclass(frozen=True)
class Int4Weight:
    """Codes in the order in which the kernels read them.

    Attributes:
        codes: (N, K / 8 rounded up to whole units) words of 32 bits; `UNIT` says what is where.
        scales: (N, groups) step of each group, float16 or float32. Neighbors in memory are the
            rows, so that a warp reads whole sectors.
        zeros: (N, groups) zero point of each group in a byte, likewise; None where all are `zero`,
            and for tables.
        table: The sixteen numbers that codes stand for, float32; None for a uniform grid.
        zero: The zero point of all groups where there is no tensor of them.
        shape: N outputs, K inputs.
        group_size: Inputs per group.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    table: Tensor | None
    zero: int
    shape: tuple[int, int]
    group_size: int

    @property
    def shared(self) -> int:
        """Inputs that certainly have one group: the largest divisor of both sizes, up to a unit."""
        return UNIT if self.group_size >= self.shape[1] else math.gcd(self.group_size, UNIT)

    @property
    def bytes(self) -> int:
        """Bytes that one product has to fetch of it."""
        return sum(t.numel() * t.element_size() for t in self.parts if t is not None)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Codes, scales, zeros and table as the kernels read them: groups by rows, no gaps."""
        parts = (self.codes, turned(self.scales), turned(self.zeros), self.table)
        return tuple(None if t is None else t.contiguous() for t in parts)

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether the weights, steps included, can be written out for the library's product.

        In bfloat16 they can; in float16 where none is beyond its range, which is looked up once.
        Float32 is multiplied exactly, as the caller asked.
        """
        if dtype != torch.float16:
            return dtype == torch.bfloat16

        def fit() -> bool:
            largest = 15.0 if self.table is None else float(self.table.detach().abs().max())
            step = float(self.scales.detach().float().abs().max())
            return largest * step <= torch.finfo(torch.float16).max

        return self._known("fits", fit)

    @property
    def pairs(self) -> Tensor | None:
        """What the two codes of each byte stand for: two float32 in the halves of 64 bits."""
        if self.table is None:
            return None

        def pair() -> Tensor:
            bits = self.table.detach().contiguous().view(torch.int32).long()
            low, high = bits & 0xFFFFFFFF, bits << 32
            return (high[:, None] | low[None, :]).flatten().contiguous()

        return self._known("pairs", pair)

    def _known(self, name: str, make: Callable[[], Any]) -> Any:
        """What follows from scales and table, found once; again when they were changed, learned.

        Tensors of inference mode count no changes, and nothing may learn them.
        """
        of = [t for t in (self.scales, self.table) if t is not None and not t.is_inference()]
        state = [t._version for t in of]
        known = self.__dict__.get(f"_{name}")
        if known is None or known[0] != state:
            known = self.__dict__[f"_{name}"] = state, make()
        return known[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as numbers, (N, K), computed in float32 or float64 and rounded once."""
        codes = unpacked(self.codes)[:, : self.shape[1]]
        inner = torch.float64 if dtype == torch.float64 else torch.float32
        if self.table is not None:
            values = self.table.to(inner)[codes.int()]
        elif self.zeros is not None:
            values = codes.to(inner) - self._spread(self.zeros.to(inner))
        else:
            values = codes.to(inner) - self.zero
        return (values * self._spread(self.scales.to(inner))).to(dtype)

    def _spread(self, per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(self.group_size, 1)


def turned(per_group: Tensor | None) -> Tensor | None:
    """Of (N, groups) the groups by the rows."""
    return None if per_group is None else per_group.t()


def packed(codes: Tensor) -> Tensor:
    """(N, K) codes in bytes as words; K is filled up with zeros to whole units."""
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[1] % UNIT))
    places = filled.unflatten(1, (-1, UNIT // WORDS, WORDS)).long()
    shifts = 4 * torch.arange(UNIT // WORDS, device=codes.device)
    words = (places << shifts[:, None]).sum(2).flatten(1)
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()


def unpacked(words: Tensor) -> Tensor:
    """The codes of words, filled up to whole units, in bytes."""
    shifts = 4 * torch.arange(UNIT // WORDS, device=words.device, dtype=torch.int32)
    places = (words.unflatten(1, (-1, 1, WORDS)) >> shifts[:, None]) & 15
    return places.flatten(1).to(torch.uint8)


def pack_int4(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    group_size: int,
    table: Tensor | None = None,
    zero: int = 8,
) -> Int4Weight:
    """Lay out codes for the kernels.

    Args:
        codes: (N, K) whole numbers 0 ... 15 in bytes.
        scales: (N, K / group_size) step of each group, in float16 or float32.
        zeros: (N, K / group_size) zero point of each group, a whole number 0 ... 15 of any type;
            None for `zero` everywhere.
        group_size: Inputs that share a step: K, or a multiple of 32 that divides K.
        table: Sixteen numbers for the codes to stand for, in place of an even grid.
        zero: The zero point where there is no tensor of them.

    The tensors are copied, so that the caller may reuse them; but scales and a table that
    are being learned (`requires_grad`) stay the caller's.

    Raises:
        ValueError: Shapes that do not fit, a group size that does not divide or has no kernel, a
            code above 15, a zero point that is no whole number from 0 to 15, zero points beside a
            table, or a code whose entry in the table is beyond half precision.
        TypeError: Codes that are not bytes, steps of another type, or a group size or zero point
            that is no whole number.
    """
    group_size, zero = check_whole("group_size", group_size), check_whole("zero", zero)
    if not 0 <= zero <= 15:
        raise ValueError(f"zero is {zero}; a zero point is a whole number from 0 to 15.")
    if codes.dtype != torch.uint8:
        raise TypeError(f"the codes are of {short(codes.dtype)}; they must be uint8.")
    if scales.dtype not in (torch.float16, torch.float32):
        raise TypeError(f"scales are of {short(scales.dtype)}; they must be float16 or float32.")
    if codes.ndim != 2 or 0 in codes.shape:
        raise ValueError(f"the codes have shape {tuple(codes.shape)}; they must be a matrix.")
    rows, columns = codes.shape
    if group_size < 1 or columns % group_size:
        raise ValueError(f"groups of {group_size} do not divide the {columns} inputs.")
    if group_size != columns and group_size % SMALLEST:
        raise ValueError(
            f"groups of {group_size} have no kernel; only multiples of {SMALLEST} have."
        )
    why = f"codes of shape {tuple(codes.shape)} in groups of {group_size}"
    check_shape("scales", scales, (rows, columns // group_size), why)
    if zeros is not None:
        check_shape("zeros", zeros, tuple(scales.shape), why)
    if table is not None:
        check_shape("table", table, (16,), "4-bit codes")
        if zeros is not None:
            raise ValueError("a table has no zero points: its entries say what a code stands for.")
    if int(codes.max()) > 15:
        raise ValueError(f"a code is {int(codes.max())}; 4-bit codes are 0 to 15.")
    if zeros is not None:
        # Stored in bytes, others would silently be cut off, or wrap around.
        fits = (zeros >= 0) & (zeros <= 15) & (zeros == zeros.round())  # and NaN does not
        if not bool(fits.all()):
            raise ValueError(
                f"a zero point is {zeros[~fits][0].item():g}; they are whole numbers from 0 to 15."
            )
    if table is not None:
        table = _usable(table, codes)
    return Int4Weight(
        codes=packed(codes),
        scales=_by_rows(scales),
        zeros=None if zeros is None else _by_rows(zeros.to(torch.uint8)),
        table=None if table is None else _kept(table.float()),
        zero=zero,
        shape=(rows, columns),
        group_size=group_size,
    )


def _by_rows(per_group: Tensor) -> Tensor:
    """A copy with the rows side by side in memory; of what is being learned, the tensor itself."""
    if per_group.requires_grad:
        return per_group
    return per_group.t().clone(memory_format=torch.contiguous_format).t()


def _kept(tensor: Tensor) -> Tensor:
    """A copy without gaps in memory; of what is being learned, the tensor itself."""
    if tensor.requires_grad:
        return tensor.contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)


def _usable(table: Tensor, codes: Tensor) -> Tensor:
    """The table with 0 for what no code stands for: kernels multiply that by 0 past the end.

    Raises:
        ValueError: When a code stands for something that half precision does not hold.
    """
    used = torch.bincount(codes.reshape(-1).int(), minlength=16) > 0
    fits = table.detach().abs() <= torch.finfo(torch.float16).max  # and NaN does not
    wrong = (used & ~fits).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"code {wrong[0]} stands for {table[wrong[0]].item():g}; the numbers of a table must "
            "be finite and within half precision, up to 65504."
        )
    return torch.where(fits, table, 0) if not bool(fits.all()) else table
