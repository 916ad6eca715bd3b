"""Block sizes that were measured, by device; each kernel's own choice where nothing was.

    python -m effnb.kernels.bench --tune [NAME ...]     # on a GPU; writes kernels/tuned.json

A kernel has a small set of candidates, each with a reason, and a choice by sizes alone. Tuning runs
all of them on one device, after comparing each one's result with that of the kernel's choice, and
stores what was faster by more than noise. The file is read when this module is imported; a device,
kernel or size that it does not know gets the kernel's choice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effnb.kernels._launch import next_power_of_2

PATH = Path(__file__).with_name("tuned.json")
GAIN = 0.03
"""By how much a candidate must be faster to be stored: what two runs of the same differ by."""
TOLERANCE = 2e-2
"""Largest difference of two candidates' results, relative to the largest number; sums are added in
another order, and outputs have 16 bits."""

Numbers = tuple[int, ...]
Stored = dict[str, dict[str, dict[str, Numbers]]]


@dataclass(frozen=True)
class Candidate:
    """One way to cut a problem into programs.

    Attributes:
        numbers: Block sizes, warps and stages, as the kernel knows them.
        why: In a line, what speaks for it: bytes in flight, registers, programs.
    """

    numbers: Numbers
    why: str


@dataclass(frozen=True)
class TuneCase:
    """One problem with the ways to cut it.

    Attributes:
        kernel: The module's name.
        key: The sizes, from `key_of`.
        default: What the kernel chooses by itself.
        candidates: All ways, the default among them or not.
        make: From a device and numbers, a function that runs the kernel cut in that way.
        alike: What sets it apart from others beside sizes, as a width of head that is a constant.
    """

    kernel: str
    key: str
    default: Numbers
    candidates: tuple[Candidate, ...]
    make: Callable[[torch.device, Numbers], Callable[[], Tensor]]
    alike: str = ""


def key_of(dtype: torch.dtype, **sizes: int) -> str:
    """Sizes rounded up to powers of two, which share a choice: "bfloat16 rows=16 n=4096"."""
    rounded = [f"{name}={next_power_of_2(size)}" for name, size in sizes.items()]
    return " ".join([str(dtype).removeprefix("torch."), *rounded])


def read(path: Path = PATH) -> Stored:
    """What was stored; nothing where no file is.

    Raises:
        ValueError: When the file is damaged; the sentence says what to do.
    """
    if not path.exists():
        return {}
    again = f"delete it, or run python -m effnb.kernels.bench --tune again: {path.name}"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        stored = {
            device: {
                kernel: {key: tuple(numbers) for key, numbers in keys.items()}
                for kernel, keys in kernels.items()
            }
            for device, kernels in found.items()
        }
    except (ValueError, AttributeError, TypeError) as problem:
        raise ValueError(f"the file of tuned block sizes cannot be read; {again}.") from problem
    for kernels in stored.values():
        for keys in kernels.values():
            for key, numbers in keys.items():
                if not numbers or not all(isinstance(n, int) and n > 0 for n in numbers):
                    raise ValueError(f"{key!r} has {numbers}, which are no block sizes; {again}.")
    return stored


_STORED = read()


@lru_cache
def device_name(device: torch.device) -> str:
    """What a choice is stored under: the GPU's name; the type of other devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def drawn(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """The same normal numbers for every candidate, so that sums over the last axis are near 1."""
    draw = torch.Generator(device=device).manual_seed(0)
    return [
        (torch.randn(shape, device=device, generator=draw) / shape[-1] ** 0.5).to(dtype)
        for shape in shapes
    ]


_FORCED: dict[str, Numbers] = {}


def cut(kernel: str, numbers: Numbers, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The function, run with these numbers in place of what `chosen` would find."""

    def forced() -> Tensor:
        _FORCED[kernel] = numbers
        try:
            return run()
        finally:
            del _FORCED[kernel]

    return forced


def chosen(kernel: str, key: Callable[[], str], device: torch.device, default: Numbers) -> Numbers:
    """What was stored for these sizes on this device, or else the kernel's choice.

    The key is asked for where something is stored: a launch has no time for more. An entry of
    another length is of an older kernel, and counts as none.
    """
    if kernel in _FORCED:
        return _FORCED[kernel]
    if not _STORED:
        return default
    found = _STORED.get(device_name(device), {}).get(kernel, {}).get(key(), default)
    return found if len(found) == len(default) else default


@dataclass(frozen=True)
class Tuned:
    """What tuning found for one case.

    Attributes:
        case: The case.
        numbers: The choice.
        seconds: Of each candidate that ran, by its numbers.
        refused: Why others did not: the compiler's or the comparison's sentence.
    """

    case: TuneCase
    numbers: Numbers
    seconds: dict[Numbers, float]
    refused: dict[Numbers, str]


def tune(
    case: TuneCase, device: torch.device, clock: Callable[[Callable[[], Any]], float]
) -> Tuned:
    """Run the default and all candidates; the fastest wins, if by more than noise.

    Args:
        case: What to tune.
        device: Where.
        clock: Seconds of a function, a median.

    Raises:
        Exception: What the kernel's own choice raises: that one has to run.
    """
    run = case.make(device, case.default)
    expected = run().double()
    seconds, refused = {case.default: clock(run)}, {}
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    for one in case.candidates:
        if one.numbers in seconds:
            continue
        try:
            run = case.make(device, one.numbers)
            off = float((run().double() - expected).abs().max()) if expected.numel() else 0.0
            if not off <= TOLERANCE * largest:
                refused[one.numbers] = f"its result differs by {off:.2e}, of {largest:.2e}."
                continue
            seconds[one.numbers] = clock(run)
        except Exception as problem:  # noqa: BLE001 - too much shared memory, or anything else
            refused[one.numbers] = f"{type(problem).__name__}: {problem}"[:200]
    best = min(seconds, key=seconds.__getitem__)
    if seconds[best] > (1 - GAIN) * seconds[case.default]:
        best = case.default
    return Tuned(case, best, seconds, refused)


def store(found: Sequence[Tuned], device: torch.device, path: Path = PATH) -> None:
    """Write the choices for a device into the file, beside those for others.

    Where the kernel's own choice won nothing is stored, and what was is taken out.
    """
    stored = read(path)
    name = device_name(device)
    kernels = {k: dict(v) for k, v in stored.get(name, {}).items()}
    for one in found:
        keys = kernels.setdefault(one.case.kernel, {})
        keys.pop(one.case.key, None)
        if one.numbers != one.case.default:
            keys[one.case.key] = one.numbers
    kernels = {k: v for k, v in kernels.items() if v}
    stored = {k: v for k, v in ({**stored, name: kernels}).items() if v}
    path.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def said(found: Sequence[Tuned]) -> str:
    """What was found, a line for each candidate, for people to read."""
    lines = []
    for one in found:
        lines.append(f"{one.case.kernel} {one.case.key}")
        why = {c.numbers: c.why for c in one.case.candidates}
        for numbers in dict.fromkeys([one.case.default, *why]):
            mark = "*" if numbers == one.numbers else " "
            took = one.seconds.get(numbers)
            time = f"{1e6 * took:9.1f} us" if took is not None else one.refused[numbers]
            own = " (by sizes)" if numbers == one.case.default else ""
            lines.append(f" {mark} {numbers!s:<26} {time}{own}  {why.get(numbers, '')}".rstrip())
    return "\n".join(lines)
