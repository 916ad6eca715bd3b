r"""The decoding step as one compiled function, where there is a C++ compiler to build it.

`decoding.Step` still makes about a thousand calls for a token. On x86 processors under Linux one
function of C++ takes their place, for one sequence without padding. It reads the very tensors that
PyTorch's kernels read: there is no second copy of the weights. PyTorch lays codes out for the
registers that it uses, and so there are two variants:

- panels of 64 rows: AVX-512 with VNNI and VBMI (Intel since Ice Lake, AMD since Zen 4);
- panels of 32 rows: AVX2 with FMA and F16C (Intel since Haswell, AMD since Excavator).

They share everything but the product with a panel and the width of registers, which stand in
`panel_avx512.h` and `panel_avx2.h`.

**What it computes.** An input of a product is rounded to 16 bits, with one scale for each group of
columns that the weight has: $x \approx a_g (256 h + l)$ with signed bytes $h$ and $l$ and
$a_g = \max_g |x| / 32639$, an error of at most $a_g / 2$. Groups without a number above $10^{-30}$
count as zeros. With codes $u$ and the weight $\hat w = s_g (u - 8) + t_g$

$y = \sum_g s_g (d_g - 8 m_g) + t_g m_g$, with $m_g = \sum_k x_k$ over the group's columns and
$d_g = a_g (256 \sum_k u_k h_k + \sum_k u_k l_k)$.

Both sums over codes are exact: a VNNI instruction adds products up in 32-bit integers; AVX2's adds
two in 16 bits, where 16 columns are at most $16 \cdot 15 \cdot 128 = 30720$ in absolute value
before they are widened. Rows of signed 8-bit codes with one scale a row (the kind "int8") are
multiplied by the 16 bits at once; there groups are of 32 columns. Everything else is float32.
PyTorch's kernels round inputs and outputs to bfloat16, an error of up to $2^{-9}$: these logits are
nearer to those of the dequantized model, and not equal to theirs.

The function is built once in a process, in a few seconds, with the compiler that `CXX` names, or
`c++`, `g++` or `clang++`. Without one, and on other processors, `decoding.Step` decodes.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.inference.quantization.packed import PackedTensor, native_layout

SOURCE = Path(__file__).with_name("step.cpp")
VARIANTS = {
    "64 halves": "avx512f avx512bw avx512dq avx512vl avx512vnni avx512vbmi avx2 fma f16c",
    "32 halves": "avx2 fma f16c",
}
"""For each layout of panels the instructions that its variant of the function is built with."""

PARTS = ("products", "attention", "head", "rest")
"""Of a step: the products of the blocks, attention, the output head, and norms and the like."""


def compiler() -> str | None:
    """The C++ compiler's path, or None: that of the variable CXX, or one with a usual name."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def build(layout: str) -> ctypes.CDLL | None:
    """The variant for one layout of panels; None without a compiler that knows its instructions."""
    path = compiler()
    if path is None:
        return None
    with tempfile.TemporaryDirectory(prefix="effnb-") as folder:
        target = Path(folder) / "step.so"
        flags = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno"]
        flags += [f"-m{name}" for name in VARIANTS[layout].split()]
        done = subprocess.run(
            [path, *flags, str(SOURCE), "-o", str(target)], capture_output=True, check=False
        )
        if done.returncode:
            return None
        try:
            return ctypes.CDLL(str(target))  # stays when the file is gone
        except OSError:
            return None


@lru_cache
def library() -> ctypes.CDLL | None:
    """What is compiled, or None where it cannot be built or this processor cannot run it."""
    if not sys.platform.startswith("linux") or native_layout() not in VARIANTS:
        return None
    loaded = build(native_layout())
    if loaded is None or not loaded.effnb_supported():
        return None
    loaded.effnb_step.argtypes = [ctypes.c_void_p]
    loaded.effnb_product.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    loaded.effnb_step.restype = loaded.effnb_product.restype = None
    return loaded


class _Weight(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "after")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group", "inputs")),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("norm1", "norm2")),
        *((name, _Weight) for name in ("qkv", "out", "gate_up", "down")),
        ("store", ctypes.c_void_p),
    )


def _step_type(blocks: int) -> type[ctypes.Structure]:
    numbers = ("blocks", "hidden", "heads", "kv_heads", "size", "inner")
    numbers += ("room", "length", "threads")

    class Step(ctypes.Structure):
        _fields_ = (
            *((name, ctypes.c_int64) for name in numbers),
            *((name, ctypes.c_double) for name in ("eps", "scale")),
            *(
                (name, ctypes.c_void_p)
                for name in ("norm", "input", "cos", "sin", "logits", "seconds")
            ),
            ("head", _Weight),
            ("block", _Block * blocks),
        )

    return Step


def fits(weight: PackedTensor) -> bool:
    """Whether the function knows a weight: rows of bytes or native panels, columns in order."""
    whole = weight.kind == "int8"
    return (
        weight.order is None
        and (whole or weight.layout == native_layout())
        and weight.scales.dtype == (torch.float16 if whole else torch.bfloat16)
        and weight.scales.is_contiguous()
        and weight.codes.is_contiguous()
        and (weight.row_scales is None or weight.row_scales.dtype == torch.float16)
    )


def _weight(weight: PackedTensor) -> _Weight:
    whole = weight.kind == "int8"
    after = None if weight.after is None else weight.after.data_ptr()
    scales = None if whole else weight.scales.data_ptr()
    # Columns and groups as the kernel counts them: each byte of a panel holds two codes.
    columns, group = (
        (weight.columns, 0) if whole else (2 * weight.codes.shape[1], weight.kernel_group)
    )
    sizes = len(weight.codes), columns, group, weight.columns
    return _Weight(weight.codes.data_ptr(), scales, after, *sizes)


def product(weight: PackedTensor, x: Float[Tensor, " in"]) -> Float[Tensor, " out"]:
    r"""$\hat W x$ as the step computes it, alone and on one thread.

    Args:
        weight: One that `fits`, where there is a `library`.
        x: In float32.
    """
    x, y = x.contiguous(), x.new_empty(len(weight.codes))
    about = _weight(weight)
    library().effnb_product(ctypes.addressof(about), x.data_ptr(), len(x), y.data_ptr())
    return y[: weight.shape[0]]


class CompiledStep:
    """One sequence's next logits by the compiled function.

    It holds addresses: its maker keeps the tensors, and checks that they are still in use.
    """

    def __init__(
        self,
        function: Callable[..., None],
        blocks: Sequence[tuple[Tensor, Tensor, dict[str, PackedTensor]]],
        norm: Tensor,
        head: PackedTensor,
        **numbers: Any,
    ) -> None:
        """Fill in what stays the same from token to token.

        Args:
            function: The library's `effnb_step`.
            blocks: Of each block both norms and its products "qkv", "out", "gate_up" and "down".
            norm: The last norm.
            head: The output head.
            numbers: hidden, heads, kv_heads, size, inner, eps and scale.
        """
        self.function, self.vocabulary = function, head.shape[0]
        self.rows = len(head.codes)
        self.about = _step_type(len(blocks))(blocks=len(blocks), norm=norm.data_ptr(), **numbers)
        self.about.head = _weight(head)
        for place, (norm1, norm2, products) in zip(self.about.block, blocks):
            place.norm1, place.norm2 = norm1.data_ptr(), norm2.data_ptr()
            for name, weight in products.items():
                setattr(place, name, _weight(weight))
        self.kept = (blocks, norm, head)

    def __call__(
        self, embedded: Tensor, cos: Tensor, sin: Tensor, stores: Sequence[Tensor], length: int
    ) -> Float[Tensor, "1 vocabulary"]:
        """Logits after one more token, whose keys and values are written at `length`.

        Args:
            embedded: The token's embedding, `[1, hidden]` in float32.
            cos: Cosines of its place, `[1, 1, size]`; `sin` likewise.
            sin: Sines.
            stores: Keys and values of each block, `[1, 2 * kv_heads, room, size]`.
            length: Tokens before this one.
        """
        about, logits = self.about, embedded.new_empty(1, self.rows)
        about.room, about.length, about.threads = stores[0].shape[2], length, _threads()
        about.input, about.logits = embedded.data_ptr(), logits.data_ptr()
        about.cos, about.sin = cos.data_ptr(), sin.data_ptr()
        for place, store in zip(about.block, stores):
            place.store = store.data_ptr()
        self.function(ctypes.addressof(about))
        return logits[:, : self.vocabulary]

    @contextmanager
    def timed(self) -> Iterator[Float[Tensor, " parts"]]:
        """Seconds of each of PARTS on the first thread, added up over the calls made inside."""
        seconds = torch.zeros(len(PARTS), dtype=torch.float64)
        self.about.seconds = seconds.data_ptr()
        try:
            yield seconds
        finally:
            self.about.seconds = None


_PROCESSORS = os.cpu_count() or 1  # asking takes as long as a small product


def _threads() -> int:
    return min(torch.get_num_threads(), _PROCESSORS)
