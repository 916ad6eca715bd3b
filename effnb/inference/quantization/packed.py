r"""Weights laid out for PyTorch's CPU kernels, which multiply by 8-bit and 4-bit codes directly.

There are two kernels, and three ways to use them:

- *int8*, one scale per row: $y_o = s_o \sum_k q_{ok} x_k$ with signed codes. For symmetric formats
  of 5 to 8 bits with one scale per row or tensor, where this kernel is the faster one;
- *int4*, in groups of 32 to 256 columns: $\hat w = s_g (u - 8) + t_g$ with codes
  $u = 0 \ldots 15$ and an offset $t_g = s_g (8 - z_g)$. For every format of 2 to 4 bits per tensor,
  per row or in groups of a multiple of 32. A group that has a minimum instead of a zero point has
  the offset $t_g = 8 s_g + m_g$;
- *two int4*: an 8-bit code is two 4-bit ones, $q = 16 h + l$, so one call of the int4 kernel with
  the inputs $[x, x]$ and the columns $[h, l]$ computes any other format of 5 to 8 bits.

**What is rounded.** Codes and zero points are exact. On x86 the kernels take inputs and give
outputs in bfloat16 (8 significant bits, so each is changed by at most $2^{-8}$ of itself) and add
up in float32. The scale of a row or tensor is applied afterwards, exact, in float32. Scales and
offsets of groups are stored in bfloat16, which changes a weight by about
$2^{-8} (|\hat w| + |t_g|)$ at most. On Arm the kernels take float32; nothing is rounded.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor, nn

from effnb.inference.quantization.formats import QuantizedTensor
from effnb.inference.quantization.minimum import MinimumTensor
from effnb.inference.quantization.stored import Stored

KERNEL_GROUPS = (256, 128, 64, 32)
"""Group sizes that PyTorch's int4 kernel has."""

PANEL = 64
"""The int4 kernel works on panels of up to 64 rows; rows are filled up to a multiple of it."""


@dataclass(frozen=True)
class Machine:
    """What this processor's kernels can do.

    Attributes:
        dtype: The type in which the kernels take inputs and give outputs; None where PyTorch has
            no fast ones (x86 before AVX2, and Windows), so that weights are always read back.
        eight: The kind that is fastest for symmetric rows of 5 to 8 bits, "int8" or "two int4".
        rows: For each kind, from how many inputs on reading the weight back is faster.
        dense: The type in which a product of many rows is fastest.
    """

    dtype: torch.dtype | None
    eight: str
    rows: Mapping[str, int]
    dense: torch.dtype


@lru_cache
def machine() -> Machine:
    """What this process runs on.

    A kernel's time per input and the time to read a weight back both grow with the size of the
    matrix, so the number of inputs where they cross does not depend on it. The numbers are where
    they crossed on an AMD EPYC (Zen 4) with one thread, for matrices of 576 x 576 to 2048 x 2048.
    Generating text there with weights that come from memory, not from a cache, two int4 beat int8
    by a seventh with AVX-512, where the int4 kernel reads its panels in long runs, and lost by as
    much with AVX2. On Arm nothing was measured.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("AVX2", "AVX512") and sys.platform != "win32":
        eight = "two int4" if capability == "AVX512" else "int8"
        has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        if capability == "AVX512" and has_bfloat16:
            rows = {"int8": 24, "two int4": 48, "int4": 96}
            return Machine(torch.bfloat16, eight, rows, torch.bfloat16)
        rows = {"int8": 16, "two int4": 40, "int4": 96}
        return Machine(torch.bfloat16, eight, rows, torch.float32)
    few = 8 if platform.machine() in ("arm64", "aarch64") else 0
    rows = {"int8": few, "two int4": few, "int4": few}
    return Machine(torch.float32 if few else None, "int8", rows, torch.float32)


@lru_cache
def native_layout() -> str:
    """How this processor's int4 kernel orders the codes of a panel, found by packing a known one.

    A panel is a number of rows; for each column in turn it holds the codes of all its rows, two
    a byte. In "halves" a byte holds rows $i$ and $i + $ half a panel, in "pairs" rows $2i$ and
    $2i + 1$.
    """
    codes = torch.randint(0, 16, (2 * PANEL, 4), generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    for layout in ("64 halves", "32 halves", "64 pairs", "32 pairs", "16 pairs"):
        if torch.equal(_unpanel(packed, layout).T, codes.to(torch.uint8)):
            return layout
    return "unknown"


def _unpanel(packed: UInt8[Tensor, "rows half"], layout: str) -> UInt8[Tensor, "columns rows"]:
    """Codes 0 … 15 from the kernel's panels, transposed."""
    size, kind = layout.split()
    panels = packed.view(-1, 2 * packed.shape[1], int(size) // 2)
    both = torch.stack([panels & 15, panels >> 4], 2 if kind == "halves" else 3)
    return both.flatten(2).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class PackedTensor(Stored):
    r"""A weight laid out for the kernels of one machine; any machine can still read it back.

    Attributes:
        codes: "int8": signed codes. Otherwise 4-bit codes in the panels of `layout`.
        scales: "int8": $s_o$ of each row. Otherwise $(s_g, t_g)$ of each group and row.
        row_scales: For 4-bit codes: what rows are multiplied by at last; None where groups have
            separate scales.
        order: The matrix's column that each stored column is; None if they are in order.
        kind: "int8", "int4" or "two int4".
        layout: See `native_layout`; empty for "int8".
        shape: Rows and columns of the matrix; what is stored may be filled up with zeros.
    """

    format = "packed"

    codes: Num[Tensor, "rows packed"]
    scales: Float[Tensor, "*scales"]
    row_scales: Float[Tensor, " rows"] | None
    order: Num[Tensor, " columns"] | None
    kind: str
    layout: str
    shape: tuple[int, int]

    @classmethod
    def from_quantized(
        cls, weight: QuantizedTensor | MinimumTensor, eight: str | None = None
    ) -> PackedTensor:
        """Lay out a weight on a uniform grid.

        Args:
            weight: The weight; where its groups have minima, groups of a multiple of 32.
            eight: The kind for symmetric rows of 5 to 8 bits; by default this machine's faster one.

        Raises:
            ValueError: When no kernel has groups like the weight's.
        """
        problem = why_not(weight)
        if problem:
            raise ValueError(problem)
        whole, real = isinstance(weight.group_size, str), isinstance(weight, MinimumTensor)
        rows, row_scales = weight.shape[0], None
        if whole:
            row_scales = weight.scales.expand(rows, 1).flatten().contiguous()
        order = None if real or weight.order is None else weight.order.int()
        codes, starts = weight.integers(), weight.minima if real else weight.zero_points()
        eight = eight or machine().eight
        if whole and weight.bits > 4 and weight.symmetric and eight == "int8":
            codes = _filled(codes.to(torch.int8), 1, 32)
            return cls(codes, row_scales, None, order, "int8", "", weight.shape)
        if starts is None:  # codes from 0 on, and the code of the number 0, for every format
            top = 2 ** (weight.bits - 1) - 1
            codes, starts = codes + top, torch.full_like(weight.scales, top)
        codes = _filled(codes.int(), PANEL, 32)
        if whole:
            row_scales = nn.functional.pad(row_scales, (0, len(codes) - rows))
        exact, start = _per_kernel_group(weight, starts, codes.shape[1])
        kernel_dtype = machine().dtype or torch.float32
        s = exact.to(kernel_dtype).float()
        middle = 8 if weight.bits <= 4 else 136
        # Of grids with a zero point, 0 stays exact; of others, the code in the middle.
        total = middle * exact + start if real else s * (middle - start)
        if weight.bits <= 4:
            kind, parts = "int4", [(codes, s, total)]
        else:
            high = total.to(kernel_dtype).float()  # what it rounds off goes into the other half
            kind = "two int4"
            parts = [(codes >> 4, 16 * s, high), (codes & 15, s, total - high)]
        codes = torch.cat([part[0] for part in parts], 1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.cpu(), 1)
        groups = torch.cat([torch.stack(part[1:], -1) for part in parts]).to(kernel_dtype)
        packed, shape = packed.to(codes.device), weight.shape
        return cls(packed, groups, row_scales, order, kind, native_layout(), shape)

    def check(self) -> None:
        """Refuse tensors that do not fit each other."""
        if self.kind not in ("int8", "int4", "two int4"):
            raise ValueError(f"{self.kind!r} is no packed kind: int8, int4 or two int4.")
        whole = self.kind == "int8"
        rows = -(-self.shape[0] // (1 if whole else PANEL)) * (1 if whole else PANEL)
        columns = -(-self.shape[1] // 32) * 32
        codes = (rows, columns // 2 if self.kind == "int4" else columns)
        groups = {2 * codes[1] // g for g in KERNEL_GROUPS if 2 * codes[1] % g == 0}
        expected = {
            "codes": [codes],
            "scales": [(rows,)] if whole else [(n, rows, 2) for n in sorted(groups)],
            "row_scales": [(rows,)],
            "order": [(self.shape[1],)],
        }
        for name, tensor in self.tensors().items():
            if tuple(tensor.shape) not in expected[name]:
                allowed = " or ".join(map(str, expected[name]))
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it should be {allowed}.")

    @cached_property
    def columns(self) -> int:
        """Columns as stored, filled up."""
        return self.codes.shape[1] * (2 if self.kind == "int4" else 1)

    @cached_property
    def after(self) -> Float[Tensor, " rows"] | None:
        """What the product is multiplied by at last."""
        return self.scales if self.kind == "int8" else self.row_scales

    @cached_property
    def kernel_group(self) -> int:
        """Columns that share a scale as the int4 kernel counts them."""
        return 2 * self.codes.shape[1] // len(self.scales)

    @cached_property
    def rows_limit(self) -> int:
        """From how many inputs on reading the weight back is faster; 0 means always."""
        here = machine()
        native = self.layout == native_layout() and self.scales.dtype == here.dtype
        return here.rows[self.kind] if native or self.kind == "int8" else 0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows columns"]:
        """The weights as the kernel sees them."""
        rows, columns = self.shape
        if self.kind == "int8":
            values = self.codes.float()
        else:
            values = self._read_back(slice(None), torch.float32).T
        if self.after is not None:
            values = values * self.after.float().unsqueeze(1)
        values = values[:rows, :columns].to(dtype)
        return values if self.order is None else values[:, self.order.long().argsort()]

    def _read_back(self, rows: slice, dtype: torch.dtype) -> Float[Tensor, "columns rows"]:
        r"""$s_g (u - 8) + t_g$, transposed, of some rows (whole panels)."""
        codes, half = _unpanel(self.codes[rows], self.layout), 8
        groups = self.scales[:, rows].float().unsqueeze(1)
        s, t = groups[..., 0].contiguous(), groups[..., 1].contiguous()
        if self.kind == "two int4":  # put the halves together first; both have offsets
            (high, codes), half = codes.unflatten(0, (2, -1)), 128
            codes = codes.add(high, alpha=16)
            (high, t), s = t.unflatten(0, (2, -1)), s[len(s) // 2 :]
            t = high + t - 8 * s
        # A byte's way from unsigned to signed is free, and from signed to floating point fast.
        codes = codes.sub_(half).view(torch.int8).float().view(len(s), -1, codes.shape[1])
        return torch.addcmul(t, codes, s).flatten(0, 1).to(dtype)


def _per_kernel_group(
    weight: QuantizedTensor | MinimumTensor, starts: Tensor, columns: int
) -> tuple[Float[Tensor, "groups rows"], Float[Tensor, "groups rows"]]:
    """Scales, and zero points or minima, of the groups that the kernel sees, rows filled up.

    They are as large as the kernel has them and the weight's groups are whole numbers of them. With
    one scale per row or tensor, that scale is left out: it is applied after the product.
    """
    whole = isinstance(weight.group_size, str)
    size = next(
        g for g in KERNEL_GROUPS if columns % g == 0 and (whole or weight.group_size % g == 0)
    )
    first = torch.arange(0, columns, size, device=starts.device)
    group = first * 0 if whole else first // weight.group_size
    scales = torch.ones_like(weight.scales) if whole else weight.scales
    rows = weight.shape[0]
    s, start = (
        _filled(part.float().expand(rows, -1)[:, group], PANEL, 1).T for part in (scales, starts)
    )
    return s, start


def _filled(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Fill up with zeros to whole multiples."""
    return nn.functional.pad(matrix, (0, -matrix.shape[1] % columns, 0, -len(matrix) % rows))


def why_not(weight: Stored) -> str:
    """Why a stored weight cannot be laid out for a kernel, in a sentence; empty if it can."""
    if not isinstance(weight, QuantizedTensor | MinimumTensor):
        return f"the format {weight.format!r} has no kernel; only uniform grids have."
    if isinstance(weight, MinimumTensor) and isinstance(weight.group_size, str):
        return f"a minimum per {weight.group_size} has no kernel; groups of a multiple of 32 have."
    if isinstance(weight.group_size, int) and weight.group_size % 32:
        return f"groups of {weight.group_size} have no kernel; only multiples of 32 have."
    if native_layout() == "unknown":
        return "this build of PyTorch packs 4-bit codes in a way that is not known here."
    return ""
