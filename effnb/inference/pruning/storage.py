r"""What a pruned weight takes to store: zeros are free only if their places cost less.

A weight of $n$ numbers of $b$ bits, of which $k$ are kept, takes

- dense: $n b$ bits, whatever is 0;
- bitmap: $n + k b$ bits, one flag per number and the kept numbers in order; smaller than dense from
  a sparsity of $1 / b$ on;
- N:M: $\tfrac{n N}{M} (b + \lceil \log_2 M \rceil)$ bits, a place of $\lceil \log_2 M \rceil$ bits
  beside each of the N numbers kept of every M; for 2:4 of 16 bits this is 9/16 of dense (Mishra et
  al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv 2104.08378);
- CSR: $k (b + c) + 32 (\text{rows} + 1)$ bits, a column index of $c$ = 8, 16 or 32 bits beside each
  kept number and where each row starts.

The counts are those of the forms that `encode` makes, which decode to the same weight bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from effnb.core.modules import LayerChoice, chooses_layers, linears
from effnb.inference.pruning.masks import Pattern, follows, masks_of


@dataclass(frozen=True)
class Storage:
    """Bytes that the same weights take in each form.

    Attributes:
        dense_bytes: All numbers.
        bitmap_bytes: A flag per number, and the kept numbers.
        csr_bytes: A column index per kept number, and where rows start.
        two_four_bytes: Two numbers and two places per four; None if the weights are not 2:4.
    """

    dense_bytes: int
    bitmap_bytes: int
    csr_bytes: int
    two_four_bytes: int | None

    @property
    def smallest(self) -> str:
        """The form that takes least: "dense", "bitmap", "csr" or "2:4"."""
        return min(self._forms(), key=self._forms().get)

    @property
    def bytes(self) -> int:
        """Bytes of the smallest form."""
        return min(self._forms().values())

    def _forms(self) -> dict[str, int]:
        forms = {"dense": self.dense_bytes, "bitmap": self.bitmap_bytes, "csr": self.csr_bytes}
        return forms if self.two_four_bytes is None else forms | {"2:4": self.two_four_bytes}


def _column_bytes(columns: int) -> int:
    return 1 if columns <= 2**8 else 2 if columns <= 2**16 else 4


def mask_storage(mask: Bool[Tensor, "out in"], bits: int = 16) -> Storage:
    """Bytes of one weight by arithmetic.

    Args:
        mask: True where a number is kept.
        bits: Bits of each kept number; 16 for bfloat16, less if they are quantized as well.

    Raises:
        ValueError: When `bits` is below 1.
    """
    if bits < 1:
        raise ValueError(f"bits is {bits}; it must be at least 1.")
    rows, columns = mask.shape
    kept = int(mask.sum())
    values = -(-kept * bits // 8)
    two_four = None
    if follows(mask, "2:4"):
        half = mask.numel() // 2
        two_four = -(-half * bits // 8) + -(-half * 2 // 8)
    return Storage(
        dense_bytes=-(-mask.numel() * bits // 8),
        bitmap_bytes=-(-mask.numel() // 8) + values,
        csr_bytes=values + kept * _column_bytes(columns) + 4 * (rows + 1),
        two_four_bytes=two_four,
    )


@chooses_layers
def storage_of(
    model: nn.Module,
    bits: int = 16,
    layers: LayerChoice = "*",
) -> Storage:
    """Bytes of a model's linear layers in each form; 2:4 only if all of them are.

    Raises:
        ValueError: When no layer fits, or `bits` is below 1.
    """
    parts = [mask_storage(mask, bits) for mask in masks_of(model, layers).values()]
    two_four = [part.two_four_bytes for part in parts]
    return Storage(
        dense_bytes=sum(part.dense_bytes for part in parts),
        bitmap_bytes=sum(part.bitmap_bytes for part in parts),
        csr_bytes=sum(part.csr_bytes for part in parts),
        two_four_bytes=None if None in two_four else sum(two_four),
    )


@dataclass(frozen=True)
class SparseTensor:
    """A weight in one of the sparse forms.

    Attributes:
        form: "bitmap", "csr" or "N:M".
        values: The stored numbers in order of rows.
        places: Where they belong: flags; column indices; or packed places within each group.
        rows: Where each row starts among the values, in "csr" only.
        shape: Rows and columns of the weight.
    """

    form: str
    values: Tensor
    places: Tensor
    rows: Tensor | None
    shape: tuple[int, int]

    @property
    def bytes(self) -> int:
        """Bytes of all parts together."""
        parts = (self.values, self.places, self.rows)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    def decode(self) -> Float[Tensor, "out in"]:
        """The weight itself."""
        rows, columns = self.shape
        result = self.values.new_zeros(rows * columns)
        if self.form == "bitmap":
            result[unpack_bits(self.places, rows * columns)] = self.values
        elif self.form == "csr":
            counts = self.rows.diff().long()
            start = torch.arange(rows, device=counts.device).repeat_interleave(counts) * columns
            result[start + self.places.long()] = self.values
        else:
            pattern = Pattern.parse(self.form)
            count = len(self.values)
            width = _place_bits(pattern)
            flags = unpack_bits(self.places, count * width).view(count, width)
            inside = (flags.long() << torch.arange(width, device=flags.device)).sum(1)
            group = torch.arange(count, device=flags.device) // pattern.keep
            result[group * pattern.group + inside] = self.values
        return result.view(rows, columns)


def _place_bits(pattern: Pattern) -> int:
    return max(1, (pattern.group - 1).bit_length())


def encode(weight: Float[Tensor, "out in"], form: str) -> SparseTensor:
    """Store a pruned weight in a sparse form, without loss.

    Args:
        weight: A matrix with exact zeros.
        form: "bitmap", "csr" or "N:M".

    Raises:
        ValueError: An unknown form, or a weight that keeps more than the pattern has room for.
    """
    weight = weight.detach()
    mask = weight != 0
    shape = (weight.shape[0], weight.shape[1])
    if form == "bitmap":
        return SparseTensor(form, weight[mask], pack_bits(mask.flatten()), None, shape)
    if form == "csr":
        kind = {1: torch.uint8, 2: torch.uint16, 4: torch.int32}[_column_bytes(shape[1])]
        places = mask.nonzero()[:, 1].to(kind)
        starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        return SparseTensor(form, weight[mask], places, starts, shape)
    pattern = Pattern.parse(form)
    if pattern.scope != "group":
        raise ValueError(f'form is {form!r}; it must be "bitmap", "csr" or "N:M".')
    if not follows(mask, form):
        raise ValueError(f"the weight keeps more than {pattern.keep} of some {pattern.group}.")
    groups = weight.reshape(-1, pattern.group)
    # A group that keeps fewer stores zeros too: every group takes equally much.
    order = (groups == 0).to(torch.int8).argsort(dim=1, stable=True)[:, : pattern.keep]
    places = order.sort(dim=1).values
    width = torch.arange(_place_bits(pattern), device=weight.device)
    flags = ((places.flatten().unsqueeze(1) >> width) & 1).bool()
    return SparseTensor(
        form, groups.gather(1, places).flatten(), pack_bits(flags.flatten()), None, shape
    )


@chooses_layers
def encode_model(
    model: nn.Module,
    form: str,
    layers: LayerChoice = "*",
) -> Mapping[str, SparseTensor]:
    """The linear layers of a model in a sparse form, by name.

    Raises:
        ValueError: As `encode`, with the layer's name; or when no layer fits.
    """
    result = {}
    for name, layer in linears(model, layers).items():
        try:
            result[name] = encode(layer.weight, form)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
    return result


def save_masks(masks: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Write masks to a safetensors file, one bit per weight."""
    packed = {name: pack_bits(mask.flatten().cpu()) for name, mask in masks.items()}
    shapes = {name: "x".join(map(str, mask.shape)) for name, mask in masks.items()}
    save_file(packed, Path(path), metadata=shapes)


def load_masks(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the masks that `save_masks` wrote."""
    with safe_open(Path(path), "pt") as file:
        shapes = {n: tuple(map(int, s.split("x"))) for n, s in file.metadata().items()}
        return {
            name: unpack_bits(file.get_tensor(name), shape[0] * shape[1]).view(shape)
            for name, shape in shapes.items()
        }


def pack_bits(bits: Bool[Tensor, " n"]) -> Tensor:
    """Eight flags to a byte, the first in the lowest bit."""
    padded = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (padded.long() << torch.arange(8, device=bits.device)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Bool[Tensor, " n"]:
    """The inverse of `pack_bits`, for n flags."""
    shifts = torch.arange(8, device=packed.device)
    return ((packed.long().unsqueeze(1) >> shifts) & 1).bool().flatten()[:n]
