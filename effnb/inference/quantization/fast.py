"""Really faster: linear layers that run from packed codes.

Generating text one token at a time multiplies each weight matrix with a single vector: every weight
is fetched from memory, used once, and dropped. The time is that of moving bytes, so 4-bit codes can
be several times faster than 32-bit numbers, if the kernel reads the codes as they are. That is what
the layers here do; `QuantizedLinear` writes the whole matrix out at every call instead.

One function, `packed_linear`, multiplies by a stored weight as fast as it can: by a kernel where
there is one for the device and format (`packed` says which, and what is rounded), by reading the
weight back where there is none.

**Many rows.** With many tokens at once (a prompt) the time is that of arithmetic, and the ordinary
matrix product is the best arithmetic there is. From `Machine.rows` inputs on, the weight is read
back once, a few megabytes at a time, and multiplied as usual: in bfloat16 where the processor
multiplies that natively, which made a prompt of 512 tokens faster than float32 weights where it was
measured, else in float32, where the reading back is lost time.

**One token at a time** a Llama takes a shorter way than through its modules: see `decoding`, and
`compiled` for processors where one compiled function computes the whole step.

On a GPU the layers are `Int4Tensor`s, whose product `effnb.kernels.int4_matmul` computes for one
row and for many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from effnb.core.modules import Model, named_modules_of, output_heads, replace_modules
from effnb.inference.quantization.decoding import with_short_way
from effnb.inference.quantization.formats import Granularity, QuantizedTensor, quantize
from effnb.inference.quantization.linear import QuantizedLinear
from effnb.inference.quantization.packed import PANEL, PackedTensor, machine, why_not
from effnb.inference.quantization.rtn import rtn
from effnb.inference.quantization.stored import Stored, check_bits, check_tensor
from effnb.inference.quantization.tables import TableTensor, code_bits
from effnb.kernels.int4_matmul import SMALLEST, UNIT, Int4Weight, int4_matmul, pack_int4

CHUNK = 1 << 20
"""Weights that are read back at a time, so that they are still in the cache when multiplied."""


def packed_linear(
    inputs: Float[Tensor, "*batch in"], weight: Stored, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    r"""$y = x\,\hat W^\top + b$ by the fastest way there is for this device and format.

    Args:
        inputs: Any floating-point type; the result has the same. Where gradients flow through the
            inputs the CPU reads the weight back, since its kernels have none; the GPU's have them.
        weight: A `PackedTensor` for the CPU's kernels, an `Int4Tensor` for the GPU's; any other
            stored weight is read back.
        bias: Added at the end.

    Raises:
        ValueError: When the inputs' last axis is not the weight's.
    """
    rows, columns = weight.shape
    if inputs.shape[-1] != columns:
        raise ValueError(
            f"the inputs have {inputs.shape[-1]} features; the weight has {columns} columns."
        )
    if isinstance(weight, Int4Tensor):
        x = inputs if weight.order is None else inputs.index_select(-1, weight.order)
        return int4_matmul(x, weight.kernel_weight, bias)
    if not isinstance(weight, PackedTensor):
        return nn.functional.linear(inputs, weight.dequantize(inputs.dtype), bias)
    shape = inputs.shape
    x = inputs if len(shape) == 2 else inputs.reshape(-1, columns)
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    multiply = _kernel if _kernel_wins(x, weight) else _dense
    y = multiply(x, weight)
    if weight.after is not None:
        y = y * weight.after  # bfloat16 times half precision is computed in float32
    if y.shape[1] != rows:
        y = y[:, :rows].contiguous()
    if bias is not None:
        y = y + bias
    if y.dtype != inputs.dtype:
        y = y.to(inputs.dtype)
    return y if len(shape) == 2 else y.view(*shape[:-1], rows)


def _kernel_wins(x: Tensor, weight: PackedTensor) -> bool:
    """Whether a kernel can and should compute this product."""
    return (
        len(x) < weight.rows_limit
        and x.device.type == "cpu"
        and x.dtype != torch.float64
        and not _differentiable(x)
    )


def _differentiable(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _kernel(x: Tensor, weight: PackedTensor) -> Tensor:
    """The product with all stored rows in the kernel's type."""
    x = x.to(machine().dtype).contiguous()
    if x.shape[1] != weight.columns:
        x = nn.functional.pad(x, (0, weight.columns - x.shape[1]))
    if weight.kind == "two int4":
        x = torch.cat([x, x], 1)
    if weight.kind != "int8":
        scales = weight.scales.contiguous()  # a view where layers stand side by side
        return torch._weight_int4pack_mm_for_cpu(x, weight.codes, weight.kernel_group, scales)
    if x.data_ptr() % 32:  # a view into something larger; the kernel loads whole registers
        x = x.clone()
    return torch._weight_int8pack_mm(x, weight.codes, _ones(len(weight.codes), x.dtype))


def _dense(x: Tensor, weight: PackedTensor) -> Tensor:
    """Read the weight back, some rows at a time, and multiply."""
    if x.device.type == "cpu" and x.dtype != torch.float64 and not _differentiable(x):
        x = x.to(machine().dense)
    if x.shape[1] != weight.columns:
        x = nn.functional.pad(x, (0, weight.columns - x.shape[1]))
    n = len(weight.codes)
    step = max(PANEL, CHUNK // weight.columns // PANEL * PANEL)
    parts = []
    for start in range(0, n, step):
        rows = slice(start, start + step)
        if weight.kind == "int8":
            parts.append(nn.functional.linear(x, weight.codes[rows].to(x.dtype)))
        else:
            parts.append(x @ weight._read_back(rows, x.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@lru_cache(64)
def _ones(size: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(size, dtype=dtype)


def _product_flops(inputs: torch.Size, codes: torch.Size, *_: object, **__: object) -> int:
    return 2 * inputs[0] * inputs[1] * codes[0]


# PyTorch's counter does not know its own kernels; without this they would count as nothing.
for _kernel_name in ("_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm"):
    _operation = getattr(torch.ops.aten, _kernel_name)
    if _operation not in flop_registry:
        register_flop_formula(_operation)(_product_flops)


@dataclass(frozen=True)
class Int4Tensor(Stored):
    """A weight of 4-bit codes laid out for the GPU's kernels; any machine can read it back.

    The tensors and numbers are those of `effnb.kernels.int4_matmul.Int4Weight`, which says what
    they are, groups before rows. Second-level scales (double quantization) are written out: the
    kernels have none.

    Attributes:
        order: The matrix's column that each stored column is; None if they are in order.
    """

    format = "int4"
    differentiable = True  # the kernel goes back by the codes: no weight is written out

    codes: Int[Tensor, "rows words"]
    scales: Float[Tensor, "groups rows"]
    zeros: UInt8[Tensor, "groups rows"] | None
    table: Float[Tensor, " codes"] | None
    order: Int[Tensor, " columns"] | None
    zero: int
    shape: tuple[int, int]
    group_size: int

    @classmethod
    def from_stored(cls, weight: Stored) -> Int4Tensor:
        """Lay out a weight of up to 4 bits, on a uniform grid or by a table.

        Raises:
            ValueError: When the kernels do not have its format; the sentence says what they have.
        """
        problem = no_int4(weight)
        if problem:
            raise ValueError(problem)
        rows, columns = weight.shape
        order = None
        if isinstance(weight, QuantizedTensor):
            whole = isinstance(weight.group_size, str) or weight.group_size >= columns
            group, top = columns if whole else weight.group_size, 2 ** (weight.bits - 1) - 1
            codes, zeros = weight.integers(), weight.zero_points()
            codes = codes + (top if zeros is None else 0)
            scales = weight.scales.expand(rows, -1)
            zeros = None if zeros is None else zeros.to(torch.uint8).expand(rows, -1)
            how = {"zeros": zeros, "zero": top}
            order = None if weight.order is None else weight.order.int()
        else:
            entries = weight.entries.nan_to_num()  # codes that are never used
            group = min(weight.block_size, columns)
            codes, scales = weight.integers(), weight.block_scales().float().view(rows, -1)
            how = {"table": nn.functional.pad(entries, (0, 16 - len(entries)))}
        w = pack_int4(codes.to(torch.uint8), scales, group_size=group, **how)
        return cls(*w.parts, order, w.zero, weight.shape, w.group_size)

    @cached_property
    def kernel_weight(self) -> Int4Weight:
        """The same tensors as the kernel takes them."""
        zeros = None if self.zeros is None else self.zeros.t()
        parts = (self.codes, self.scales.t(), zeros, self.table)
        return Int4Weight(*parts, self.zero, self.shape, self.group_size)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows columns"]:
        """The numbers that are stored, columns where the matrix has them."""
        values = self.kernel_weight.dequantize(dtype)
        return values if self.order is None else values[:, self.order.long().argsort()]

    def check(self) -> None:
        """Refuse tensors that do not fit each other."""
        rows, columns = self.shape
        if self.group_size < 1 or columns % self.group_size:
            raise ValueError(f"groups of {self.group_size} do not divide {columns} columns.")
        groups = (columns // self.group_size, rows)
        stored = -(-columns // UNIT) * UNIT // 8
        check_tensor("codes", self.codes, torch.int32, (rows, stored))
        of_table = self.table is not None
        check_tensor("scales", self.scales, (torch.float16, torch.float32)[of_table], groups)
        if of_table:
            check_tensor("table", self.table, torch.float32, (16,))
        if self.zeros is not None:
            check_tensor("zeros", self.zeros, torch.uint8, groups)
        if self.order is not None:
            check_tensor("order", self.order, torch.int32, (columns,))


def no_int4(weight: Stored) -> str:
    """Why the GPU's kernels cannot multiply by a weight, in a sentence; empty if they can."""
    columns = weight.shape[1]
    if isinstance(weight, QuantizedTensor):
        if weight.bits > 4:
            return f"codes of {weight.bits} bits have no kernel on a GPU; up to 4 bits have."
        size = columns if isinstance(weight.group_size, str) else weight.group_size
    elif isinstance(weight, TableTensor):
        if code_bits(weight.entries) > 4:
            return f"a table of {len(weight.entries)} entries has no kernel; up to 16 have."
        size = weight.block_size
        if size > columns and weight.flat:
            return f"blocks of {size} reach over rows of {columns}, which has no kernel."
    else:
        return f"the format {weight.format!r} has no kernel on a GPU."
    if size < columns and (size % SMALLEST or columns % size):
        return (
            f"groups of {size} in {columns} columns have no kernel; multiples of {SMALLEST} that "
            "divide the columns have."
        )
    return ""


class PackedLinear(QuantizedLinear):
    """A `QuantizedLinear` whose product is computed by `packed_linear`."""

    _stored: Stored | None = None

    @property
    def quantized(self) -> Stored:
        """The weight as it is stored; put together again only after the tensors were moved."""
        if self._stored is None or self._stored.codes is not self._buffers["codes"]:
            self._stored = super().quantized
        return self._stored

    def forward(self, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Multiply by the packed codes."""
        return packed_linear(inputs, self.quantized, self.bias)


def accelerate(model: Model) -> Model:
    """Let every quantized layer that a kernel can compute run from packed codes.

    What comes out is laid out for this machine: save a model before, not after.

    Args:
        model: A model quantized by any method that stores uniform grids (RTN, GPTQ, AWQ, …), or on
            a GPU tables of up to 16 entries (NF4), on the device it will run on; it is not changed.

    Returns:
        A new model in which `QuantizedLinear` layers have become `PackedLinear` wherever a kernel
        knows their format; the others still read their weight back at every call. On an NVIDIA
        GPU they are `Int4Tensor`s; on other devices the weights stay as they are stored.

    Raises:
        ValueError: When no layer is quantized, or none of them can run packed; the sentence says
            why.
    """
    layers = named_modules_of(model, QuantizedLinear)
    new, reasons = {}, []
    for name, layer in layers.items():
        stored = layer.quantized
        on_gpu = stored.codes.device.type == "cuda"
        laid_out = isinstance(stored, (PackedTensor, Int4Tensor))
        reason = "" if laid_out else no_int4(stored) if on_gpu else why_not(stored)
        if reason:
            reasons.append(f"{name}: {reason}")
        elif not isinstance(layer, PackedLinear):
            if on_gpu and not laid_out:
                stored = Int4Tensor.from_stored(stored)
            elif not laid_out and stored.codes.device.type == "cpu":
                stored = PackedTensor.from_quantized(stored)
            new[name] = PackedLinear(stored, layer.bias)
    if len(reasons) == len(layers):
        raise ValueError(f"no layer can run packed; {reasons[0]}")
    return with_short_way(replace_modules(model, new))


def fast(
    model: Model,
    bits: int = 4,
    *,
    group_size: Granularity | None = None,
    head: bool | int | None = None,
    source: Callable[..., Model] = rtn,
) -> Model:
    """Quantize a language model, its output head too, and let it run from packed codes.

    The head is often the largest matrix of a small model, and the same as the embedding: a packed
    head gets separate storage, the embedding stays as it is.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        bits: 2 to 8.
        group_size: What shares one scale. By default groups of 64 up to 4 bits; above, rows without
            zero points, which every kernel can multiply by.
        head: Bits of the output head, if the model has one, by rounding to nearest; True gives it
            `bits`, False leaves it alone. By default 8 bits on a CPU: on SmolLM2-135M a head of 4
            bits lost as much as all other layers together, one of 8 bits hardly anything, in a
            little more time. A GPU's kernels know up to 4 bits: there it is left alone by default.
        source: What quantizes the rest, called as `source(model, bits, group_size=...)`, above 4
            bits and without a group size with `symmetric=True` as well.

    Raises:
        ValueError: Bits or a group size without a kernel, or what `source` refuses.
    """
    by_default = head is None
    if by_default:
        head = 0 if any(p.device.type == "cuda" for p in model.parameters()) else 8
    head_bits = bits if head is True else head
    for number in (bits, head_bits or bits):
        check_bits(number)
    if isinstance(group_size, int) and group_size % 32:
        raise ValueError(f"groups of {group_size} have no kernel; only multiples of 32 have.")

    def how(number: int, size: Granularity | None = group_size) -> dict:
        if size is not None:
            return {"group_size": size}
        return {"group_size": 64} if number <= 4 else {"group_size": "row", "symmetric": True}

    result = source(model, bits, **how(bits))
    known = output_heads(result)
    of_head = how(head_bits, None) if by_default else how(head_bits)
    heads = {
        name: QuantizedLinear(quantize(layer.weight, head_bits, **of_head), layer.bias)
        for name, layer in result.named_modules()
        if head_bits and isinstance(layer, nn.Linear) and name in known
    }
    return accelerate(replace_modules(result, heads))
