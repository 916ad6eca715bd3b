"""An exercise that is a GPU kernel: the tile loop of a product, run in Triton's interpreter.

Where there is no Triton, the same loop is written with slices of tensors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effnb.kernels._launch import INTERPRETED, cdiv, jit, launch, tl
from effnb.lab import Exercise

__all__ = ["INTERPRETED", "jit", "loop", "tl"]

EDGE = 2**13
"""Numbers around each tensor: a kernel that leaves its tensor meets them."""
UNTOUCHED = -math.inf
"""What the result holds before the kernel runs."""

Answer = Callable[[Tensor, Tensor, int], Any]


def between_edges(tensor: Tensor, edge: float) -> tuple[Tensor, Tensor]:
    """A copy of a tensor in the middle of memory that holds something else: memory and copy."""
    memory = torch.full((tensor.numel() + 2 * EDGE,), edge, dtype=tensor.dtype)
    inside = memory[EDGE:-EDGE].view(tensor.shape)
    inside.copy_(tensor)
    return memory, inside


def run_kernel(kernel: Any, a: Tensor, b: Tensor, size: int, **more: Any) -> dict[str, Any]:
    """Run a kernel for a @ b: its result, and how many numbers it wrote beside it.

    Raises:
        NotImplementedError: When it writes nothing.
        Exception: What the kernel raises, without the interpreter's wrapping.
    """
    (m, k), n = a.shape, b.shape[1]
    (_, left), (_, right) = between_edges(a, math.nan), between_edges(b, math.nan)
    memory, out = between_edges(torch.full((m, n), UNTOUCHED), UNTOUCHED)
    grid = (cdiv(m, size), cdiv(n, size))
    try:
        with warnings.catch_warnings():  # NumPy's, on what lies around the tensors
            warnings.simplefilter("ignore")
            launch(kernel, grid, left, right, out, m, n, K=k, SIZE=size, **more)
    except Exception as caught:  # noqa: BLE001 - a learner's kernel may raise anything
        cause = caught
        while cause.__cause__ is not None:  # the interpreter wraps what a kernel raises
            cause = cause.__cause__
        if isinstance(cause, AssertionError) and not str(cause):
            cause = TypeError(
                "Triton refuses the types of an operation; `tl.dot` adds to sums of tl.float32"
            )
        raise cause from None
    touched = memory != UNTOUCHED
    if not touched.any():
        raise NotImplementedError
    touched[EDGE:-EDGE] = False
    return {"product": out, "numbers written beside it": int(touched.sum())}


def interpreted(kernel: Any, **more: Any) -> Answer:
    """A kernel as an answer; each shape is interpreted once."""
    known: dict[torch.Size, Any] = {}

    def answer(a: Tensor, b: Tensor, size: int) -> Any:
        if a.shape not in known:
            known[a.shape] = run_kernel(kernel, a, b, size, **more)
        return known[a.shape]

    answer.__wrapped__ = kernel.fn  # whose source is the solution
    return answer


class KernelExercise(Exercise):
    """An exercise whose answer is a GPU kernel; without Triton, a function."""

    def judge(self, answer: Any) -> tuple[bool, str]:
        """Whether an answer is right, and the sentence that says so or says what to look at."""
        kernel = hasattr(answer, "fn")
        return super().judge(interpreted(answer) if kernel else answer)

    def _begin(self) -> str:
        return f"Not yet: {self.name} makes nothing so far; write its body, and run this again."


def _cases() -> list[tuple[Tensor, Tensor, int]]:
    """Whole numbers in half precision, so that every order of adding gives the same sum."""
    draw = torch.Generator().manual_seed(3)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw).half()

    return [
        (whole(-3, 4, 16, 32), whole(-3, 4, 32, 16), 16),
        (whole(-3, 4, 20, 24), whole(-3, 4, 24, 18), 16),
        (whole(100, 200, 16, 16), whole(100, 200, 16, 16), 16),
    ]


# --- with Triton ----------------------------------------------------------------------------------

if INTERPRETED:

    @jit
    def tile_kernel(a, b, out, M, N, K: tl.constexpr, SIZE: tl.constexpr):
        """Make one tile of the product."""
        rows = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        columns = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
        total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
        for first in range(0, K, SIZE):
            inner = first + tl.arange(0, SIZE)
            left = tl.load(
                a + rows[:, None] * K + inner[None, :],
                mask=(rows < M)[:, None] & (inner < K)[None, :],
                other=0.0,
            )
            right = tl.load(
                b + inner[:, None] * N + columns[None, :],
                mask=(inner < K)[:, None] & (columns < N)[None, :],
                other=0.0,
            )
            total += tl.dot(left, right)
        tl.store(
            out + rows[:, None] * N + columns[None, :],
            total,
            mask=(rows < M)[:, None] & (columns < N)[None, :],
        )

    @jit
    def mistaken(a, b, out, M, N, K: tl.constexpr, SIZE: tl.constexpr, WRONG: tl.constexpr):
        """The same with the mistake that `WRONG` names."""
        rows = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        columns = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
        if WRONG == "alone":
            rows, columns = tl.arange(0, SIZE), tl.arange(0, SIZE)
        if WRONG == "start":
            rows, columns = tl.program_id(0) + rows % SIZE, tl.program_id(1) + columns % SIZE
        next_row = K if WRONG == "stride" else N
        total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
        for first in range(0, K, SIZE):
            inner = first + tl.arange(0, SIZE)
            in_a = (rows < M)[:, None] & ((inner < K) | (WRONG in ("inner", "inner a")))[None, :]
            in_b = ((inner < K) | (WRONG == "inner"))[:, None] & (columns < N)[None, :]
            in_a, in_b = in_a | (WRONG == "nothing"), in_b | (WRONG == "nothing")
            left = tl.load(a + rows[:, None] * K + inner[None, :], mask=in_a, other=0.0)
            right = tl.load(b + inner[:, None] * next_row + columns[None, :], mask=in_b, other=0.0)
            if WRONG == "last":
                total = tl.dot(left, right)
            else:
                total += tl.dot(left, right)
            if WRONG == "half":
                total = total.to(tl.float16).to(tl.float32)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        inside = inside | (WRONG in ("store", "nothing"))
        tl.store(out + rows[:, None] * N + columns[None, :], total, mask=inside)


OVERWRITTEN = "Each tile of the result is a sum over the inner tiles: add up, do not overwrite"
MISTAKES = {
    "nothing": "The last tiles reach past the ends of all three tensors: give both loads and the "
    "store a mask",
    "inner": "The last inner tile reaches past K: the masks of both loads need `inner < K`, with "
    "other=0.0",
    "inner a": "The last inner tile reaches past K: the load of a needs `inner < K` in its mask "
    "too",
    "store": "The last tiles of the result reach past M and N: the store needs a mask too",
    "alone": "Every program makes its own tile: `tl.program_id` says which",
    "start": "Tile i begins at i * SIZE, not at i",
    "stride": "The next row of b begins N numbers later, and that of a K numbers later",
    "last": OVERWRITTEN,
    "half": "Add up in tl.float32: half precision ends at 65,504",
}
"""For each mistake of `mistaken` the sentence that names it."""


# --- without Triton -------------------------------------------------------------------------------


def tile_loop(a: Tensor, b: Tensor, size: int) -> Tensor:
    """The product of a and b, in float32, tile by tile."""
    out = torch.zeros(len(a), b.shape[1])
    for i in range(0, len(a), size):
        for j in range(0, b.shape[1], size):
            for k in range(0, a.shape[1], size):
                left = a[i : i + size, k : k + size].float()
                right = b[k : k + size, j : j + size].float()
                out[i : i + size, j : j + size] += left @ right
    return out


def _overwriting(a: Tensor, b: Tensor, size: int) -> Tensor:
    last = (a.shape[1] - 1) // size * size
    return a[:, last:].float() @ b[last:].float()


def _in_halves(a: Tensor, b: Tensor, size: int) -> Tensor:
    return sum(
        (a[:, k : k + size].float() @ b[k : k + size].float()).half()
        for k in range(0, a.shape[1], size)
    ).float()


def exercise(with_triton: bool) -> KernelExercise:
    """The exercise, for a reader with Triton or without."""
    about: dict[str, Any] = {"minutes": 20, "difficulty": "medium", "atol": 1e-3}
    if with_triton:
        return KernelExercise(
            "A tile loop",
            reference=interpreted(tile_kernel),
            cases=_cases(),
            wrong={words: interpreted(mistaken, WRONG=name) for name, words in MISTAKES.items()},
            **about,
        )
    return KernelExercise(
        "A tile loop",
        reference=tile_loop,
        cases=_cases(),
        wrong={
            OVERWRITTEN: _overwriting,
            "Add up in torch.float32: half precision ends at 65,504": _in_halves,
        },
        **about,
    )


loop = exercise(INTERPRETED)
