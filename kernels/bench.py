"""How fast each kernel is, beside its peers and beside what this GPU can do at all.

    python -m effnb.kernels.bench [NAME ...] [--store] [--device cpu --small]
    python -m effnb.kernels.bench --tune [NAME ...]     # measure block sizes instead; see _tuning

For every case: the median time, bytes and operations per second, and the share of the roofline, by
the bytes that must be moved and the operations that must be done (each kernel's docstring counts
them) and by two ceilings measured in the same run: the bandwidth of a large copy, and the speed of
a large matrix product in the case's type. Peers get the same numbers, each in the layout that is
its own, prepared before. What is ours is pinned to the compiled kernel. Everything is compared with
the same computation in float64 before it is timed: ours must be right, and a peer that is missing,
refuses or is wrong says why. Without a GPU nothing is timed: the table has the counts and "not
measured"; with `--gpu`, for those who came to measure, that is an error.

Tensors come from memory, as in generating text, where a whole model passes between two uses, and
launches are captured where they can be (`_clock`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from effnb.kernels._clock import clock, copies_for, l2_bytes, machine, on_host, one_at_a_time
from effnb.kernels._stored import RESULTS, provenance, write
from effnb.kernels._tuning import said, tune
from effnb.kernels._tuning import store as keep
from effnb.kernels.compile import modules

VERSIONS = (
    "torch", "triton", "bitsandbytes", "torchao", "peft", "liger-kernel", "flash-linear-attention",
    "gemlite",
)  # fmt: skip
RESULT = RESULTS / "kernels.json"
NOT_MEASURED = "not measured"

OTHER = " (for scale)"
EXACT = "float64"

Runner = Callable[[], Any] | str
"""What to time, or a sentence on why it cannot run here."""


@dataclass(frozen=True)
class BenchCase:
    """One kernel at one shape.

    Attributes:
        kernel: Its module's name.
        shape: The shape in words, as in "M=1 N=4096 K=4096 g=128".
        dtype: Type of the inputs.
        bytes: Bytes that must be moved at least: inputs once, outputs once.
        flops: Operations that must be done at least.
        make: From a device, the contestants on the same tensors: "ours" first, then peers, and
            under `EXACT` the same in float64. What each returns is compared with that before it is
            timed, except for those whose names end in `OTHER`: they compute something else, for
            scale.
        tolerance: The largest error, relative to the exact result, that 16 bits, or 8, explain.
    """

    kernel: str
    shape: str
    dtype: torch.dtype
    bytes: int
    flops: int
    make: Callable[[torch.device], Mapping[str, Runner]]
    tolerance: float = 2e-2


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches at best.

    Attributes:
        bytes_per_second: Of copying a large tensor, reads and writes counted.
        flops_per_second: Of a large matrix product, by type.
    """

    bytes_per_second: float
    flops_per_second: dict[str, float]

    def seconds(self, case: BenchCase) -> float:
        """The roofline: no run of this case can take less."""
        return max(
            case.bytes / self.bytes_per_second, case.flops / self.flops_per_second[_name(case)]
        )


@dataclass(frozen=True)
class Timing:
    """One contestant in one case.

    Attributes:
        kernel: The case's kernel.
        shape: The case's shape.
        dtype: The case's type.
        bytes: Bytes that must be moved.
        flops: Operations that must be done.
        who: "ours" or the peer.
        seconds: Median; None if not measured.
        bytes_per_second: `bytes` by that time.
        flops_per_second: `flops` by that time.
        roofline: Part of the speed that the ceilings allow.
        difference: Root mean square of its error against float64, relative to that.
        note: Why it was not measured.
        low: First quartile of the times.
        high: Third quartile.
        warm: Median where its tensors were still in the L2 cache.
        how: How it was timed; see `_clock`.
    """

    kernel: str
    shape: str
    dtype: str
    bytes: int
    flops: int
    who: str
    seconds: float | None = None
    bytes_per_second: float | None = None
    flops_per_second: float | None = None
    roofline: float | None = None
    difference: float | None = None
    note: str = ""
    low: float | None = None
    high: float | None = None
    warm: float | None = None
    how: str = ""


def _name(case: BenchCase) -> str:
    return str(case.dtype).removeprefix("torch.")


def absent(package: str) -> str:
    """Why a peer from a package cannot run, as a sentence; empty if the package is there."""
    try:
        importlib.import_module(package)
    except Exception as problem:  # noqa: BLE001 - such packages fail to import in many ways
        return f"{package} cannot be imported here ({type(problem).__name__})."
    return ""


def median_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The median time of a function; on a GPU, of runs that find nothing in the cache."""
    times = on_host(run) if device.type != "cuda" else one_at_a_time(run, device)
    return times.seconds


def pinned(device: torch.device) -> str | None:
    """The backend of what is called ours: on a GPU the compiled kernel, or an error."""
    return "triton" if device.type == "cuda" else None


def measure_ceilings(device: torch.device, dtypes: set[torch.dtype], *, small: bool) -> Ceilings:
    """Copy and multiply large tensors, as fast as torch can."""
    count = 2**22 if small else 2**30
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * count / median_seconds(lambda: target.copy_(source), device)
    n, speeds = 256 if small else 8192, {}
    for dtype in sorted(dtypes, key=str):
        a = torch.randn(n, n, device=device).to(dtype)
        out = torch.empty_like(a)
        seconds = median_seconds(lambda a=a, out=out: torch.mm(a, a, out=out), device)
        speeds[str(dtype).removeprefix("torch.")] = 2 * n**3 / seconds
    return Ceilings(bandwidth, speeds)


def cases(*names: str, small: bool = False) -> list[BenchCase]:
    """The cases of these kernels; of all if none is named."""
    found = []
    for name in names or modules():
        found += importlib.import_module(f"effnb.kernels.{name}").bench_cases(small=small)
    return found


def _tensors(result: Any) -> list[torch.Tensor]:
    parts = result if isinstance(result, (tuple, list)) else [result]
    return [p.detach().double() for p in parts if isinstance(p, torch.Tensor)]


def error(result: Any, exact: Any) -> float:
    """Root mean square of a result's error relative to the exact one; of several, the largest.

    Raises:
        ValueError: When they differ in number or shape.
    """
    mine, right = _tensors(result), _tensors(exact)
    if [x.shape for x in mine] != [x.shape for x in right]:
        raise ValueError("its results are of other shapes than the exact ones.")
    return max(float((a - b).norm() / b.norm().clamp(min=1e-300)) for a, b in zip(mine, right))


def measure(case: BenchCase, device: torch.device, ceilings: Ceilings) -> list[Timing]:
    """Time ours and every peer on the same tensors, each one that is right.

    Raises:
        ValueError: When what is ours is wrong.
    """
    about = (case.kernel, case.shape, _name(case), case.bytes, case.flops)
    first, found = dict(case.make(device)), []
    exact = first.pop(EXACT, None)
    exact = None if exact is None else exact()
    on_gpu = device.type == "cuda"
    copies = copies_for(case.bytes, l2_bytes(device)) if on_gpu else 1
    all_runs = [first, *(dict(case.make(device)) for _ in range(copies - 1))]
    for who, run in first.items():
        if isinstance(run, str):
            found.append(Timing(*about, who, note=run))
            continue
        try:
            result, off = run(), None
            if not who.endswith(OTHER) and exact is not None:
                off = error(result, exact)
                if not off <= case.tolerance:
                    raise ValueError(f"its error is {off:.1e}, above {case.tolerance:.1e}")
            del result
            took = clock([runs[who] for runs in all_runs], device)
        except Exception as problem:
            if who == "ours":
                raise
            found.append(Timing(*about, who, note=f"{type(problem).__name__}: {problem}"[:200]))
            continue
        seconds = took.cold.seconds
        rates = (case.bytes / seconds, case.flops / seconds, ceilings.seconds(case) / seconds)
        more = {"low": took.cold.low, "high": took.cold.high, "how": took.how}
        more["warm"] = None if took.warm is None else took.warm.seconds
        found.append(Timing(*about, who, seconds, *rates, off, **more))
    return found


def unmeasured(case: BenchCase) -> Timing:
    """The line of a case where there is no GPU."""
    note = "no GPU was available"
    return Timing(case.kernel, case.shape, _name(case), case.bytes, case.flops, "ours", note=note)


def table(timings: list[Timing]) -> str:
    """The results for people to read."""
    width = max([len(t.shape) for t in timings] + [5])
    head = f"{'kernel':<18} {'shape':<{width}} {'type':<8} {'who':<22} {'median':>12} "
    lines = [head + f"{'+-':>4} {'GB/s':>7} {'TFLOP/s':>8} {'roof':>5} {'error':>8}  bytes, flops"]
    for t in timings:
        line = f"{t.kernel:<18} {t.shape:<{width}} {t.dtype:<8} {t.who:<22} "
        if t.seconds is None:
            line += f"{NOT_MEASURED:>12} {'':36}"
        else:
            spread = 50 * ((t.high or t.seconds) - (t.low or t.seconds)) / t.seconds
            line += f"{t.seconds * 1e6:>9.1f} us {spread:>3.0f}% {t.bytes_per_second / 1e9:>7.0f} "
            line += f"{t.flops_per_second / 1e12:>8.2f} {t.roofline:>5.0%} "
            line += f"{t.difference:>8.1e}" if t.difference is not None else f"{'':8}"
        line += f"  {t.bytes / 1e6:.1f} MB, {t.flops / 1e9:.2f} G"
        lines.append(line + (f"  ({t.note})" if t.note else ""))
    return "\n".join(lines)


def content(
    timings: list[Timing], ceilings: Ceilings | None, device: torch.device | None
) -> dict[str, Any]:
    """What is stored, with where it comes from, as all stored results of the workbook have it."""
    name, of_gpu = NOT_MEASURED, False
    if device is not None:
        of_gpu = device.type == "cuda"
        name = f"{device.type} ({torch.cuda.get_device_name(device)})" if of_gpu else device.type
    return {
        "data": {
            "ceilings": None if ceilings is None else asdict(ceilings),
            "timings": [asdict(t) for t in timings],
            **({"machine": machine()} if of_gpu else {}),
        },
        "provenance": provenance("python -m effnb.kernels.bench --store", name, VERSIONS),
    }


def store(result: dict[str, Any], path: Path) -> str:
    """Write a result, unless that would put "not measured" in the place of measurements."""
    if path.exists() and result["data"]["ceilings"] is None:
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["data"]["ceilings"] is not None:
            return f"{path.name} holds measurements and was kept: there is no GPU here."
    write(result, path)
    return f"Stored in {path.name}."


def tune_block_sizes(names: Sequence[str], device: torch.device) -> int:
    """Measure the candidates of these kernels, print what each took, and store the choices."""
    if device.type != "cuda" or not torch.cuda.is_available():
        print(
            "Block sizes are measured on a GPU, and there is none here: kernels keep their own "
            "choices.",
            file=sys.stderr,
        )
        return 1
    found = []
    for name in names or modules():
        make = getattr(importlib.import_module(f"effnb.kernels.{name}"), "tune_cases", list)
        found += [tune(case, device, lambda run: median_seconds(run, device)) for case in make()]
    print(said(found))
    keep(found, device)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Measure what can be measured, print the table, store it if asked to."""
    parser = argparse.ArgumentParser(prog="python -m effnb.kernels.bench")
    parser.add_argument("names", nargs="*", help="kernels, all by default")
    parser.add_argument(
        "--device", default="cuda", help="cuda; cpu times the references, for tests"
    )
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try it out")
    parser.add_argument("--store", action="store_true", help="write data/results/kernels.json")
    parser.add_argument("--output", type=Path, default=RESULT, help="another file to write")
    parser.add_argument("--gpu", action="store_true", help="fail where there is no GPU")
    parser.add_argument("--tune", action="store_true", help="measure block sizes, and keep them")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(modules()))
    if unknown:
        print(f"{unknown[0]} is no kernel: {', '.join(modules())}.", file=sys.stderr)
        return 2
    if options.tune:
        return tune_block_sizes(options.names, torch.device(options.device))
    found = cases(*options.names, small=options.small)
    device, ceilings = torch.device(options.device), None
    if device.type == "cuda" and not torch.cuda.is_available():
        if options.gpu:
            print("There is no NVIDIA GPU here, and the bench measures on one.", file=sys.stderr)
            return 1
        print("There is no GPU here: times are not measured.")
        device, timings = None, [unmeasured(case) for case in found]
    else:
        torch.manual_seed(0)
        ceilings = measure_ceilings(device, {c.dtype for c in found}, small=options.small)
        timings = [timing for case in found for timing in measure(case, device, ceilings)]
        print(f"A large copy: {ceilings.bytes_per_second / 1e9:.0f} GB/s. Large products: ", end="")
        speeds = ceilings.flops_per_second.items()
        print(", ".join(f"{v / 1e12:.2f} TFLOP/s in {k}" for k, v in speeds) + ".")
    print(table(timings))
    if options.store:
        print(store(content(timings, ceilings, device), options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
