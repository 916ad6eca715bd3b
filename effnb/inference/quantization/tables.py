r"""Table formats: each code stands for an entry of a table, scaled block by block.

A block of numbers shares one scale $s = \max|x| / \max|t|$; each number is replaced by the code $q$
of the nearest table entry and read back as $\hat x = s\,t_q$. The entries need not be evenly
spaced:

- `nf4` (NormalFloat): the entries are quantiles of the normal distribution, so that each code is
  used about equally often by weights that are normally distributed. Dettmers et al., "QLoRA", 2023,
  arXiv 2305.14314;
- `fp4`: the 4-bit float of the bitsandbytes library; `e2m1`: the one with 2 exponent bits and 1
  mantissa bit of the Open Compute Project;
- `e4m3`, `e5m2`: the two 8-bit floats of Micikevicius et al., 2022, arXiv 2209.05433;
- any table of up to 256 entries that you give.

*Double quantization* (QLoRA) stores the scales themselves in 8 bits: their mean is subtracted, and
blocks of 256 of them are coded by the signed dynamic map of Dettmers et al., 2021, arXiv
2110.02861. With blocks of 64 it takes $4 + 8/64 + 32/(64 \cdot 256) = 4.127$ bits per weight
instead of 4.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from effnb.inference.quantization.stored import Stored, check_matrix, check_tensor

TABLES = ("nf4", "fp4", "e2m1", "e4m3", "e5m2")
SECOND_BLOCK = 256
"""How many scales share one second-level scale under double quantization."""


@dataclass(frozen=True, eq=False)
class Table:
    """The entries of a table, prepared for finding the nearest.

    Attributes:
        levels: The number that each code stands for; NaN where the code is not used.
        order: The codes that are used, by rising number.
        bounds: Where one code of `order` ends and the next begins; a bound belongs to the lower.
    """

    levels: Float[Tensor, " codes"]
    order: Int[Tensor, " used"]
    bounds: Float[Tensor, " bounds"]

    @property
    def largest(self) -> float:
        """The largest magnitude in the table, to which the largest of a block is scaled."""
        return float(self.levels[self.order].abs().max())

    def encode(self, x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
        """The code of the nearest entry."""
        places = torch.bucketize(x.contiguous(), self.bounds.to(x.device))
        return self.order.to(x.device)[places].to(torch.uint8)


def make_table(levels: Float[Tensor, "*codes"], *, even: bool = False) -> Table:
    """Prepare a table for finding the nearest entry.

    Args:
        levels: The number that each code stands for, in any order; NaN for codes without one.
        even: Whether a number half way between two entries goes to the even code, as the floating
            formats round; otherwise it goes to the smaller entry.

    Raises:
        ValueError: When there are not 2 to 256 entries, one is infinite, or all are 0.
    """
    levels = levels.detach().float().cpu()
    used = (~levels.isnan()).nonzero().flatten()
    known = levels[used]
    if levels.ndim != 1 or len(levels) > 256 or len(used) < 2:
        raise ValueError(
            f"the table has shape {tuple(levels.shape)} with {len(used)} numbers in it; it must be "
            "a list of 2 to 256."
        )
    if not bool(known.isfinite().all()) or not bool(known.any()):
        raise ValueError("the table must hold finite numbers, and not only 0.")
    order = used[known.sort(stable=True).indices]
    ordered = levels[order]
    bounds = (ordered[:-1] + ordered[1:]) / 2
    if even:  # a tie goes up where the code above is even: let the bound lie just below the tie
        up = order[1:] % 2 == 0
        bounds = torch.where(up, torch.nextafter(bounds, torch.tensor(-torch.inf)), bounds)
    return Table(levels, order, bounds)


@cache
def named_table(name: str) -> Table:
    """A table by its name: "nf4", "fp4", "e2m1", "e4m3", "e5m2", or "dynamic" (for scales).

    Raises:
        ValueError: When there is none of this name.
    """
    if name == "nf4":
        return make_table(nf4_levels())
    if name == "fp4":
        return make_table(fp4_levels())
    if name == "e2m1":
        return make_table(float_levels(2, 1), even=True)
    if name == "e4m3":
        return make_table(float_levels(4, 3, nan_codes=1), even=True)
    if name == "e5m2":
        return make_table(float_levels(5, 2, nan_codes=4), even=True)
    if name == "dynamic":
        return make_table(dynamic_levels())
    raise ValueError(f"{name!r} is no table; known are {', '.join(TABLES)}.")


@cache
def _named_levels(name: str, device: torch.device) -> Tensor:
    """The entries of a named table, kept on the device where they are needed again and again."""
    return named_table(name).levels.to(device)


def code_bits(levels: Float[Tensor, " codes"]) -> int:
    """Bits of a stored code: 4 for a table of up to 16 entries, else 8."""
    return 4 if len(levels) <= 16 else 8


def nf4_levels() -> Float[Tensor, " codes"]:
    r"""The sixteen entries of 4-bit NormalFloat, from the quantile function of the normal.

    With $\delta = 1 - \frac12(\frac1{32} + \frac1{30})$: eight positive entries
    $\Phi^{-1}$ of nine points from $\delta$ to ½ without the last, seven negative ones
    $-\Phi^{-1}$ of eight points likewise, and 0; all divided by the largest. The two halves differ
    so that 0 is an entry. The published table has $\delta$ to seven digits and the points in single
    precision; done the same way, ours is equal to the bit.
    """
    positive = torch.special.ndtri(_points(0.9677083, 0.5, 9)[:-1].double())
    negative = -torch.special.ndtri(_points(0.9677083, 0.5, 8)[:-1].double())
    levels = torch.cat([negative, torch.zeros(1), positive]).float().sort().values
    return levels / levels.max()


def fp4_levels() -> Float[Tensor, " codes"]:
    """The 4-bit float of bitsandbytes: eight magnitudes, not in order, and a sign bit."""
    magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=torch.float64) / 12
    return torch.cat([magnitudes, 0 - magnitudes]).float()


def float_levels(exponent: int, mantissa: int, *, nan_codes: int = 0) -> Float[Tensor, " codes"]:
    r"""All numbers of a small floating-point format, by their bit pattern.

    Sign bit, exponent field $e$, mantissa field $m$ of $M$ bits, bias $B = 2^{E-1} - 1$:
    $\pm 2^{e - B} (1 + m / 2^M)$, and $\pm 2^{1 - B}\, m / 2^M$ where $e = 0$.

    Args:
        exponent: Bits $E$ of the exponent field.
        mantissa: Bits $M$ of the mantissa field.
        nan_codes: How many of the highest codes of each sign are infinite or not a number.

    Returns:
        One number per code; NaN for those codes, and for -0, which is never needed.
    """
    codes = torch.arange(2 ** (exponent + mantissa), dtype=torch.float64)
    field, rest = codes // 2**mantissa, codes % 2**mantissa / 2**mantissa
    bias = 2 ** (exponent - 1) - 1
    small = 2.0 ** (1 - bias) * rest
    magnitudes = torch.where(field == 0, small, 2.0 ** (field - bias) * (1 + rest))
    magnitudes[len(codes) - nan_codes :] = torch.nan
    negative = -magnitudes
    negative[0] = torch.nan
    return torch.cat([magnitudes, negative]).float()


def dynamic_levels() -> Float[Tensor, " codes"]:
    r"""The signed dynamic map: 8 bits of which a moving part is the exponent, after Dettmers 2021.

    For $i = 0 \ldots 6$ the range from $10^{i-7}$ to $10^{i-6}$ is cut into $2^i$ equal parts whose
    middles are entries, with both signs; 0 and 1 are the last two. So the precision is highest for
    large numbers and the range still spans seven decades.
    """
    positive = []
    for i in range(7):
        edges = _points(0.1, 1, 2**i + 1)
        positive.append(torch.tensor(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2))
    middles = torch.cat(positive)
    return torch.cat([-middles, middles, torch.tensor([0.0, 1.0])]).sort().values


def _points(start: float, end: float, n: int) -> Float[Tensor, " n"]:
    """`torch.linspace` in single precision, each point rounded once.

    PyTorch counts from both ends and rounds as the processor does; written out, the tables are the
    same on every machine.
    """
    first, last = (torch.tensor(x).double() for x in (float(start), float(end)))
    step = ((last - first) / (n - 1)).float().double()
    i = torch.arange(n, dtype=torch.float64)
    return torch.where(i < n // 2, first + step * i, last - step * (n - 1 - i)).float()


@dataclass(frozen=True)
class TableTensor(Stored):
    """A matrix as codes of a table, with one scale per block.

    Attributes:
        codes: Codes in row-major order; of 4-bit codes two in a byte, the first in the high half.
        scales: Scale of each block in float32; its 8-bit code under double quantization.
        table: The table's name, or "custom".
        shape: Rows and columns of the matrix.
        block_size: Numbers per block.
        flat: Whether blocks run on over the ends of rows; otherwise each row starts a new one.
        second_scales: Under double quantization: the scale of each 256 scales.
        mean: Under double quantization: the mean of all scales.
        levels: The entries of a custom table.
    """

    format = "table"

    codes: UInt8[Tensor, " bytes"]
    scales: Float[Tensor, " blocks"] | UInt8[Tensor, " blocks"]
    table: str
    shape: tuple[int, int]
    block_size: int
    flat: bool = True
    second_scales: Float[Tensor, " second_blocks"] | None = None
    mean: Float[Tensor, "*scalar"] | None = None
    levels: Float[Tensor, " codes"] | None = None

    @property
    def entries(self) -> Float[Tensor, " codes"]:
        """The number that each code stands for."""
        return _named_levels(self.table, self.codes.device) if self.levels is None else self.levels

    @property
    def double(self) -> bool:
        """Whether the scales are quantized too."""
        return self.second_scales is not None

    def block_scales(self) -> Float[Tensor, " blocks"]:
        """The scale of each block, read back if it is quantized itself."""
        if self.second_scales is None or self.mean is None:
            return self.scales
        spread = self.second_scales.repeat_interleave(SECOND_BLOCK)[: len(self.scales)]
        return _named_levels("dynamic", self.codes.device)[self.scales.long()] * spread + self.mean

    def integers(self) -> UInt8[Tensor, "rows columns"]:
        """The codes, one per number."""
        codes = self.codes
        if code_bits(self.entries) == 4:
            codes = torch.stack([codes >> 4, codes & 15], 1).flatten()
        return codes[: self.shape[0] * self.shape[1]].view(self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows columns"]:
        r"""$\hat x = s\,t_q$."""
        blocks = _blocks(self.entries[self.integers().int()], self.block_size, self.flat)
        return _unblock(blocks * self.block_scales().unsqueeze(1), self.shape, self.flat).to(dtype)

    def check(self) -> None:
        """Refuse tensors that do not fit the table, shape and block size."""
        _check_block_size(self.block_size)
        if (self.table == "custom") != (self.levels is not None) or self.table == "dynamic":
            raise ValueError(f"the table {self.table!r} is neither known nor among the parts.")
        if self.levels is not None:
            check_tensor("levels", self.levels, torch.float32, (len(self.levels),))
            make_table(self.levels)
        rows, columns = self.shape
        n = rows * columns
        count = -(-n // self.block_size) if self.flat else rows * -(-columns // self.block_size)
        kind = torch.uint8 if self.double else torch.float32
        size = -(-n // 2) if code_bits(self.entries) == 4 else n
        check_tensor("codes", self.codes, torch.uint8, (size,))
        check_tensor("scales", self.scales, kind, (count,))
        if self.double or self.mean is not None:
            second = -(-count // SECOND_BLOCK)
            check_tensor("second_scales", self.second_scales, torch.float32, (second,))
            check_tensor("mean", self.mean, torch.float32, ())
        largest = int(self.integers().max())
        if largest >= len(self.entries) or bool(self.entries[self.integers().int()].isnan().any()):
            raise ValueError("a code stands for no entry of the table.")


def quantize_table(
    weight: Float[Tensor, "*matrix"],
    table: str | Float[Tensor, "*levels"] = "nf4",
    *,
    block_size: int | str = 64,
    flat: bool = True,
    double: bool = False,
) -> TableTensor:
    r"""Replace each number by the nearest entry of a table, scaled block by block.

    Args:
        weight: The matrix (rows, columns), in any floating-point type.
        table: "nf4", "fp4", "e2m1", "e4m3", "e5m2", or the entries of a table of your own.
        block_size: Numbers that share a scale; "row" or "tensor" for all of a row or the matrix.
        flat: Whether blocks run on over the ends of rows, as in bitsandbytes; otherwise each row
            starts a new block, and its last one may be shorter.
        double: Whether the scales are quantized too.

    Raises:
        ValueError: An unknown table, an impossible block size, entries that are not finite, or not
            a matrix.
    """
    lookup = named_table(table) if isinstance(table, str) else make_table(table)
    if isinstance(table, str) and table not in TABLES:
        raise ValueError(f"{table!r} is no table; known are {', '.join(TABLES)}.")
    check_matrix(weight)
    if block_size == "row":
        block_size, flat = weight.shape[1], False
    elif block_size == "tensor":
        block_size, flat = weight.numel(), True
    _check_block_size(block_size)
    shape = (weight.shape[0], weight.shape[1])
    blocks = _blocks(weight.detach().float(), block_size, flat)
    scales = blocks.abs().amax(1) / lookup.largest
    # A block of zeros has scale 0; its numbers get the code of 0 all the same.
    codes = lookup.encode(blocks * (1 / scales.clamp(min=1e-38)).unsqueeze(1))
    codes = _unblock(codes, shape, flat).flatten()
    if code_bits(lookup.levels) == 4:
        filler = lookup.encode(torch.zeros(codes.numel() % 2, device=codes.device))
        codes = torch.cat([codes, filler]).view(-1, 2)
        codes = (codes[:, 0] << 4) | codes[:, 1]
    second = mean = None
    if double:
        mean = scales.mean()
        groups = _blocks((scales - mean).unsqueeze(0), SECOND_BLOCK, True)
        second = groups.abs().amax(1)
        coded = named_table("dynamic").encode(groups * (1 / second.clamp(min=1e-38)).unsqueeze(1))
        scales = coded.flatten()[: len(scales)].contiguous()
    name, levels = (table, None) if isinstance(table, str) else ("custom", lookup.levels)
    levels = levels if levels is None else levels.to(weight.device)
    return TableTensor(codes, scales, name, shape, block_size, flat, second, mean, levels)


def _check_block_size(block_size: int | str) -> None:
    whole = isinstance(block_size, int) and not isinstance(block_size, bool)
    if not whole or block_size < 1:
        raise ValueError(
            f'block_size is {block_size!r}; it must be "tensor", "row" or a whole number from 1.'
        )


def _blocks(matrix: Tensor, block_size: int, flat: bool) -> Tensor:
    """The numbers of each block in a row; short last blocks are filled up with zeros."""
    lines = matrix.reshape(1, -1) if flat else matrix
    padded = torch.nn.functional.pad(lines, (0, -lines.shape[1] % block_size))
    return padded.reshape(-1, block_size)


def _unblock(blocks: Tensor, shape: tuple[int, int], flat: bool) -> Tensor:
    """The inverse of `_blocks`."""
    if flat:
        return blocks.flatten()[: shape[0] * shape[1]].view(shape)
    return blocks.reshape(shape[0], -1)[:, : shape[1]]
