"""What all stored formats share: packing codes into bytes, being taken apart and rebuilt.

A *stored* weight is a handful of small tensors (packed codes, scales) and a short description
(format, shape, bits). The tensors are all that memory or a file holds of it; `dequantize` gives the
numbers back. `QuantizedLinear` wraps any of them, `storage` writes any of them to a file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from effnb.core.checks import check_finite

BITS = range(2, 9)
KNOWN: dict[str, type[Stored]] = {}
"""Every stored format by its name."""


def check_bits(bits: int) -> None:
    """Refuse bit-widths that the uniform formats do not have."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise ValueError(f"bits is {bits!r}; the uniform formats have 2 to 8 bits.")


def check_matrix(weight: Tensor) -> None:
    """Refuse anything but a finite, non-empty floating-point matrix."""
    if not weight.is_floating_point():
        raise TypeError(
            f"the weight is of {weight.dtype}; only floating-point types are quantized."
        )
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"the weight has shape {tuple(weight.shape)}; only non-empty matrices are quantized."
        )
    check_finite(weight, purpose="quantized")


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


class Stored(ABC):
    """A matrix in few bits; each format is a frozen dataclass of tensors and plain values.

    Attributes:
        format: The format's name in files.
        shape: Rows and columns of the matrix.
    """

    format: ClassVar[str]
    shape: tuple[int, int]

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Enter the format into the list of those that `from_parts` knows."""
        super().__init_subclass__(**keywords)
        KNOWN[cls.format] = cls

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows columns"]:
        """The numbers that are stored."""

    @abstractmethod
    def check(self) -> None:
        """Refuse tensors that do not fit the description, by a ValueError of one sentence."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that memory or a file holds, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def describe(self) -> dict[str, Any]:
        """The rest: plain values, ready for JSON, and the names of the tensors."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None and not isinstance(value, Tensor)
        }
        return {"format": self.format, **plain, "tensors": sorted(self.tensors())}

    @classmethod
    def from_parts(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Stored:
        """Rebuild what `describe` and `tensors` took apart; see the function `from_parts`."""
        return from_parts(description, tensors)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors together: what a file would hold."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per number, scales and everything else counted."""
        return 8 * self.bytes / (self.shape[0] * self.shape[1])


def from_parts(
    description: Mapping[str, Any], tensors: Mapping[str, Tensor], *, check: bool = True
) -> Stored:
    """Rebuild a stored weight of any format from its description and its tensors.

    Args:
        description: What `describe` gave, perhaps by way of JSON.
        tensors: What `tensors` gave, perhaps by way of a file or another device.
        check: Whether to compare the tensors with the description.

    Raises:
        ValueError: When the format is unknown, or the tensors are not those of the description.
    """
    kind = KNOWN.get(description.get("format"))
    if kind is None:
        known = ", ".join(sorted(KNOWN))
        raise ValueError(f"{description.get('format')!r} is no stored format; known are {known}.")
    names = [field.name for field in fields(kind)]
    shape = tuple(description.get("shape", ()))
    if check:
        if len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(f"the shape {shape} is not that of a matrix.")
        described = sorted(description.get("tensors", ()))
        complete = {"codes", "scales"} <= set(tensors) <= set(names)
        if described != sorted(tensors) or not complete:
            raise ValueError(
                f"the parts {sorted(tensors)} are not those described, {described}, or are not "
                f"those of the format {kind.format!r}."
            )
    plain = {name: value for name, value in description.items() if name in names}
    parts = dict.fromkeys(names) | plain | dict(tensors) | {"shape": shape}
    stored = kind(**parts)
    if check:
        stored.check()
    return stored


def check_tensor(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Refuse a part that has not the type and shape that its format needs."""
    if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape:
        found = (
            "missing" if tensor is None else f"of {tensor.dtype} and shape {tuple(tensor.shape)}"
        )
        raise ValueError(f"{name} is {found}; it should be of {dtype} and shape {shape}.")
