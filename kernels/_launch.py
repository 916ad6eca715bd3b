"""What all kernels share: Triton or its absence, the choice of a backend, and the launch.

A kernel runs where Triton can compile for the device: on an NVIDIA GPU of compute capability 8.0 or
newer. Its reference runs anywhere. `choose` says which of the two, before anything is launched; a
launch that fails raises.

`TRITON_INTERPRET=1`, set before a kernel's module is imported, makes its kernels run in NumPy, on
tensors of the CPU. That proves what they compute, very slowly; it is never chosen by itself.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows, and Linux with a torch without CUDA
    triton = tl = None

__all__ = [
    "BACKENDS", "INTERPRETED", "LIMITS", "arch_of", "cdiv", "check_floats", "check_number",
    "check_shape", "check_whole", "choose", "empty", "exact", "jit", "launch", "next_power_of_2",
    "precision", "recorded", "rows_of", "short", "tl", "triton", "wide_precision",
]  # fmt: skip

BACKENDS = (None, "triton", "torch")
"""None lets `choose` choose; "torch" is the reference."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What kernels compute on; float64 goes to the reference."""

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter. It is decided when they are decorated: now."""

GRID = (2**31 - 1, 65535, 65535)
"""How many programs a grid may have along each of its axes. Rows always count along the first."""

LIMITS = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may have, by compute capability."""


def arch_of(device: torch.device) -> int:
    """The one of `LIMITS` whose settings are for this device; the oldest where no GPU is."""
    if device.type != "cuda" or torch.version.hip:
        return min(LIMITS)
    major, minor = torch.cuda.get_device_capability(device)
    return max([min(LIMITS), *(arch for arch in LIMITS if arch <= 10 * major + minor)])


def jit(function: Callable) -> Any:
    """`triton.jit`, and nothing where there is no Triton: the module can still be imported."""
    return function if triton is None else triton.jit(function)


def cdiv(a: int, b: int) -> int:
    """How many pieces of size b cover a."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def short(dtype: torch.dtype) -> str:
    """A type's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    """Refuse a tensor whose shape does not follow from another's.

    Args:
        name: What the caller calls the tensor.
        tensor: The tensor.
        expected: The shape it must have.
        why: Where that comes from, as in "x of shape (3, 8)".

    Raises:
        ValueError: When the shape is another one; the sentence has both.
    """
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, which does not fit {why}: it must be "
            f"{tuple(expected)}."
        )


def check_floats(**tensors: Tensor | None) -> None:
    """Refuse tensors that no backend computes on: anything but floating-point numbers.

    Raises:
        TypeError: When one of them holds something else.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (*FLOATS, torch.float64):
            raise TypeError(
                f"{name} is of {short(tensor.dtype)}; it must be float32, float16, bfloat16 or "
                "float64."
            )


def check_number(name: str, value: float) -> float:
    """A number of any kind, NumPy's too, as Python's own, which kernels take.

    Raises:
        TypeError: When it is none. A tensor is refused too: kernels would lose its gradient
            without a word.
    """
    if isinstance(value, Tensor):
        raise TypeError(f"{name} is a tensor; it must be a number, to which no gradient leads.")
    if not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be a number.")
    return float(value)


def check_whole(name: str, value: int) -> int:
    """A whole number of any kind, NumPy's too, as Python's own, which kernels take.

    Raises:
        TypeError: When it is none.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be a whole number.") from None


def exact(*tensors: Tensor | None) -> torch.dtype:
    """The type in which references compute: float64 if a tensor has it, and float32 otherwise."""
    found = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if found else torch.float32


def rows_of(x: Tensor) -> Tensor:
    """(..., K) as (rows, K), also where K or the rows are none."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _obstacle(tensors: list[Tensor]) -> str:
    """Why Triton cannot run on these tensors, in a sentence; empty if it can."""
    device = tensors[0].device
    kinds = {t.dtype for t in tensors if t.is_floating_point()}
    odd = kinds - set(FLOATS)
    if triton is None:
        return "Triton is not installed here."
    if odd:
        return f"the kernel has no {short(odd.pop())}, only float32, float16 and bfloat16."
    if any(t.is_neg() for t in tensors):
        return "a tensor is a view that changes the sign of what lies in memory."
    if INTERPRETED and device.type == "cpu":
        if torch.bfloat16 in kinds:
            return "Triton's interpreter computes bfloat16 wrongly."
        return ""
    if device.type != "cuda" or torch.version.hip:
        return (
            f"the tensors are on {device.type}; Triton runs on an NVIDIA GPU, or interpreted with "
            "TRITON_INTERPRET=1 set before the import."
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels are for GPUs of compute capability 8.0 or newer."
    return ""


def choose(backend: str | None, *tensors: Tensor | None, obstacle: str = "") -> str:
    """Which of the two computes: "triton" or "torch".

    Args:
        backend: None for Triton on a GPU that it can compile for and the reference anywhere else;
            "triton" or "torch" for that one or an error.
        tensors: Everything the kernel reads; None is skipped.
        obstacle: Why the caller's shapes or formats have no kernel, in a sentence.

    Raises:
        ValueError: An unknown backend, tensors on different devices, or "triton" where Triton
            cannot run; the sentence says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f'backend is {backend!r}; it must be "triton", "torch" or None.')
    given = [t for t in tensors if t is not None]
    devices = {t.device for t in given}
    if len(devices) > 1:
        raise ValueError(
            f"the tensors are on {' and '.join(sorted(map(str, devices)))}; they must be on one "
            "device."
        )
    if backend == "torch":
        return "torch"
    if _recorder is None:
        obstacle = obstacle or _obstacle(given)
    if backend == "triton" and obstacle:
        raise ValueError(f"the Triton kernel cannot run: {obstacle}")
    # The interpreter is for proofs: on its own nothing chooses it.
    return "torch" if obstacle or (backend is None and INTERPRETED) else "triton"


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32: as torch's own products are set, exactly by default."""
    allowed = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def wide_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32 numbers that came from inputs of this type.

    Those of 16-bit inputs in TF32: it has the digits of float16 and the range of float32, so that
    nothing between input and output overflows.
    """
    return precision(dtype) if dtype == torch.float32 else "tf32"


Launched = tuple[Any, tuple[Any, ...], dict[str, Any]]
_recorder: list[Launched] | None = None


@contextmanager
def recorded() -> Iterator[list[Launched]]:
    """Inside, nothing is launched: kernel, arguments and settings of each launch are kept.

    That is how block sizes are compiled on a machine without a GPU. Every call takes the kernel.
    """
    global _recorder
    before, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = before


_allocate = torch.empty  # tests put memory here that is poisoned and has guarded edges


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a kernel to write to: everything that a kernel writes comes from here."""
    return _allocate(shape, dtype=dtype, device=device)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Start the programs of a kernel on the device of its first tensor; none on an empty grid.

    Raises:
        ValueError: When the grid is larger than a GPU's.
    """
    if 0 in grid:
        return
    if _recorder is not None:
        _recorder.append((kernel, arguments, settings))
        return
    if any(n > most for n, most in zip(grid, GRID)):
        raise ValueError(
            f"a grid of {grid} programs is larger than a GPU's, {GRID}: split the input."
        )
    first = next(a for a in arguments if isinstance(a, Tensor))
    if first.device.type != "cuda":
        kernel[grid](*arguments, **settings)
        return
    with torch.cuda.device(first.device):
        kernel[grid](*arguments, **settings)
