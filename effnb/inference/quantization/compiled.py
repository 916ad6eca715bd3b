r"""The decoding step as one compiled function, where there is a C++ compiler to build it.

`decoding.Step` still makes about a thousand calls for a token. On x86 processors with the AVX-512
instructions VNNI and VBMI (Intel since Ice Lake, AMD since Zen 4) one function of C++ takes their
place, for one sequence without padding. It reads the very tensors that PyTorch's kernels read:
there is no second copy of the weights.

**What it computes.** An input of a product is rounded to 16 bits, with one scale for each group of
columns that the weight has: $x \approx a_g (256 h + l)$ with bytes $h$ and $l$, an error of at most
$2^{-16}$ of the group's largest number. With codes $u$ and the weight $\hat w = s_g (u - 8) + t_g$

$y = \sum_g s_g (d_g - 8 m_g) + t_g m_g$, with $m_g = \sum_k x_k$ over the group's columns and
$d_g = a_g (256 \sum_k u_k h_k + \sum_k u_k l_k)$,
where one instruction multiplies 64 codes by 64 bytes and adds them up exactly, in 32-bit integers.
Everything else is float32. PyTorch's kernels round inputs and outputs to bfloat16, an error of up
to $2^{-9}$: these logits are nearer to those of the dequantized model, and not equal to theirs.

The function is built once in a process, in a second or two, with the compiler that `CXX` names, or
`c++`, `g++` or `clang++`. Without one, and on other processors, `decoding.Step` decodes.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.inference.quantization.packed import PackedTensor, native_layout

SOURCE = Path(__file__).with_name("step.cpp")
INSTRUCTIONS = {
    "64 halves": "avx512f avx512bw avx512dq avx512vl avx512vnni avx512vbmi avx2 fma f16c".split(),
    "32 halves": "avx2 fma f16c".split(),
}
"""For each layout of panels the instructions that its variant of the function is compiled for."""


def compiler() -> str | None:
    """The C++ compiler's path, or None: that of the variable CXX, or one with a usual name."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


@lru_cache
def library() -> Callable[..., None] | None:
    """The compiled function, or None where it cannot be built or this processor cannot run it."""
    if not sys.platform.startswith("linux") or native_layout() not in INSTRUCTIONS:
        return None
    path = compiler()
    if path is None:
        return None
    with tempfile.TemporaryDirectory(prefix="effnb-") as folder:
        target = Path(folder) / "step.so"
        flags = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno"]
        flags += [f"-m{name}" for name in INSTRUCTIONS[native_layout()]]
        done = subprocess.run(
            [path, *flags, str(SOURCE), "-o", str(target)], capture_output=True, check=False
        )
        if done.returncode:
            return None
        try:
            loaded = ctypes.CDLL(str(target))  # stays when the file is gone
        except OSError:
            return None
    if not loaded.effnb_supported():
        return None
    loaded.effnb_step.argtypes = [ctypes.c_void_p]
    loaded.effnb_step.restype = None
    return loaded.effnb_step


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
            *((name, ctypes.c_void_p) for name in ("norm", "input", "cos", "sin", "logits", "seconds")),
            ("head", _Weight),
            ("block", _Block * blocks),
        )

    return Step


def fits(weight: PackedTensor) -> bool:
    """Whether the function knows a weight: 4-bit codes in native panels, columns in order."""
    if weight.kind == "int8":
        return (
            weight.order is None
            and weight.scales.dtype == torch.float16
            and weight.scales.is_contiguous()
            and weight.codes.is_contiguous()
        )
    return (
        weight.layout == native_layout()
        and weight.order is None
        and weight.scales.dtype == torch.bfloat16
        and weight.scales.is_contiguous()
        and weight.codes.is_contiguous()
        and (weight.row_scales is None or weight.row_scales.dtype == torch.float16)
    )


def _weight(weight: PackedTensor) -> _Weight:
    if weight.kind == "int8":
        sizes = len(weight.codes), weight.columns, 0, weight.columns
        return _Weight(weight.codes.data_ptr(), None, weight.scales.data_ptr(), *sizes)
    after = None if weight.row_scales is None else weight.row_scales.data_ptr()
    columns = 2 * weight.codes.shape[1]  # as the kernel counts them: each byte holds two codes
    codes, scales = weight.codes.data_ptr(), weight.scales.data_ptr()
    sizes = len(weight.codes), columns, weight.kernel_group, weight.columns
    return _Weight(codes, scales, after, *sizes)


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
            function: What `library` gave.
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


def _threads() -> int:
    return min(torch.get_num_threads(), os.cpu_count() or 1)
