"""Compile every kernel for real GPUs on a machine without one.

    python -m effnb.kernels.compile [--arch 80 90] [NAME ...]
    python -m effnb.kernels.compile --report [NAME ...]    # and what each can reach at best
    python -m effnb.kernels.compile --report --store       # as results/kernel_report.json
    python -m effnb.kernels.compile --report --store NAME  # the lines of one that was changed

Triton's compiler needs no GPU. What it refuses here would have failed at the first launch: types
that do not fit, products too small for the tensor cores, more shared memory than a GPU has. A case
that names `mma` must also have tensor-core instructions in its PTX. Run it in a process without
`TRITON_INTERPRET`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import effnb.kernels
from effnb.kernels import report
from effnb.kernels._launch import INTERPRETED, LIMITS, Launched, recorded, triton
from effnb.kernels._stored import RESULTS, provenance, write
from effnb.kernels._tuning import TuneCase
from effnb.kernels.assembly import Assembly, disassemble
from effnb.kernels.report import Work

HELPERS = ("assembly", "bench", "compile", "report")
REPORT = RESULTS / "kernel_report.json"
KINDS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Types of cases, by the names that Triton has for them."""


@dataclass(frozen=True)
class CompileCase:
    """One kernel with the types and constants of one use.

    Attributes:
        name: What to call it in the table.
        kernel: The decorated function.
        types: Type of each argument that is no constant, by name: "*fp16" for a pointer, "i32",
            "fp32". Pointers count as aligned to 16 bytes, as torch allocates them, and arguments
            named `stride...` as multiples of 16, as in layers of the usual widths.
        constants: The `tl.constexpr` arguments, by name; None stands for an absent pointer, and a
            stride of 1 is a constant as well. Cases of several kernels may share one list.
        mma: Whether it must use the tensor cores.
        warps: Warps per program.
        stages: Stages of the pipeline.
        work: What a launch of it does at sizes that people use, for the report.
        archs: Compute capabilities whose settings these are.
        multiples: Other whole numbers that are multiples of 16, as Triton finds out at a launch.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    mma: bool = False
    warps: int = 4
    stages: int = 2
    work: Work | None = None
    archs: tuple[int, ...] = tuple(LIMITS)
    multiples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """What came out.

    Attributes:
        name: The case.
        arch: Compute capability, 80 for 8.0.
        shared_bytes: Shared memory of a program.
        registers: Registers of a thread; None where the tool that tells is missing.
        spilled_bytes: Local memory of a thread, for what found no register; None likewise.
        mma: Number of tensor-core instructions in the PTX.
        cubin: The machine code.
    """

    name: str
    arch: int
    shared_bytes: int
    registers: int | None
    spilled_bytes: int | None
    mma: int
    cubin: bytes = field(repr=False, default=b"")

    @cached_property
    def assembly(self) -> Assembly | None:
        """Its instructions; None where the tool that reads them is missing."""
        return disassemble(self.cubin)


def modules() -> list[str]:
    """Names of the kernels' modules."""
    found = (m.name for m in pkgutil.iter_modules(effnb.kernels.__path__))
    return sorted(name for name in found if not name.startswith("_") and name not in HELPERS)


def cases(*names: str) -> list[CompileCase]:
    """The cases of these modules; of all if none is named."""
    found = []
    for name in names or modules():
        found += importlib.import_module(f"effnb.kernels.{name}").compile_cases()
    return found


POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8",
    torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip


def candidate_cases(*names: str) -> list[CompileCase]:
    """What tuning would launch with each of its candidates, by these kernels or by all.

    The launches are recorded, at the sizes that are tuned on a GPU, in tensors without numbers
    where the way to the launch asks for none. Of cases that differ in sizes alone, and are cut in
    the same ways, the first stands for all.
    """
    found: dict[tuple, CompileCase] = {}
    for name in names or modules():
        firsts: dict[tuple, TuneCase] = {}
        for case in importlib.import_module(f"effnb.kernels.{name}").tune_cases():
            firsts.setdefault((case.alike, case.default, case.candidates), case)
        for case in firsts.values():
            for numbers in dict.fromkeys([case.default, *(c.numbers for c in case.candidates)]):
                title = f"{name}: {case.key} {numbers}"
                for one in (_as_case(title, *launched) for launched in _launches(case, numbers)):
                    kept = tuple(one.constants.items()), tuple(one.types.items())
                    found.setdefault((one.kernel, kept, one.warps, one.stages), one)
    return list(found.values())


def _launches(case: TuneCase, numbers: tuple[int, ...]) -> list[Launched]:
    cpu = torch.device("cpu")
    with recorded() as launches:
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                case.make(cpu, numbers)()
        except DataDependentOutputException:
            launches.clear()
            case.make(cpu, numbers)()
    return launches


def _as_case(name: str, kernel: Any, given: tuple, settings: dict[str, Any]) -> CompileCase:
    """A launch as the compiler sees it: what is 1, and tensors that are absent, are constants."""
    values = dict(zip(kernel.arg_names, given, strict=False)) | settings
    warps, stages = values.pop("num_warps", 4), values.pop("num_stages", 3)
    types, constants, multiples = {}, {}, []
    for parameter in kernel.params:
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or _is_one(value):
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            types[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            multiples += [parameter.name] * (value % 16 == 0)
    about = dict(warps=warps, stages=stages, multiples=tuple(multiples))
    return CompileCase(name, kernel, types, constants, **about)


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def compile_case(case: CompileCase, arch: int) -> Compiled:
    """Compile one case down to machine code.

    Raises:
        ValueError: When arguments are missing, it takes too much shared memory, or lacks the
            tensor-core instructions it should have.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in case.constants else case.types.get(name)
        for name in case.kernel.arg_names
    }
    missing = [name for name, kind in signature.items() if kind is None]
    if missing:
        raise ValueError(f"{case.name}: no type or constant for {', '.join(missing)}.")
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*")
        or (name.startswith("stride") and kind != "constexpr")
        or name in case.multiples
    }
    constants = {name: v for name, v in case.constants.items() if name in signature}
    source = ASTSource(case.kernel, signature, constants, aligned)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    shared, limit = built.metadata.shared, LIMITS.get(arch, LIMITS[80])
    if shared > limit:
        raise ValueError(
            f"{case.name} takes {shared} bytes of shared memory; sm_{arch} has {limit}."
        )
    mma = len(re.findall(r"^\s*w?g?mma\.", built.asm["ptx"], re.M))
    if case.mma and not mma:
        raise ValueError(f"{case.name} has no tensor-core instruction on sm_{arch}.")
    cubin = built.asm["cubin"]
    return Compiled(case.name, arch, shared, *_usage(cubin), mma, cubin)


def _usage(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and local bytes of a thread, by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (None, None)


def _devices() -> dict[str, dict[str, Any]]:
    """The data sheets that bounds are computed from."""
    return {str(arch): dict(vars(device)) for arch, device in report.DEVICES.items()}


def _module(row: Mapping[str, Any]) -> str:
    return row["kernel"].partition(":")[0]


def of_others(stored: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """The stored lines of all kernels but these, which the same compiler would give again.

    A test compiles everything and compares, so that a line that is out of date does not stay.

    Raises:
        ValueError: When another compiler wrote them, or they follow from other data sheets.
    """
    data = stored["data"]
    if data["triton"] != triton.__version__:
        raise ValueError(f"the report is by Triton {data['triton']}, and this is another.")
    if data["devices"] != _devices():
        raise ValueError("the report follows from other data sheets.")
    return [row for row in data["table"] if _module(row) not in names]


def main(arguments: list[str] | None = None) -> int:
    """Compile, print a table; 1 when something failed."""
    parser = argparse.ArgumentParser(prog="python -m effnb.kernels.compile")
    parser.add_argument("names", nargs="*", help="kernels, all by default")
    parser.add_argument("--arch", nargs="+", type=int, default=sorted(LIMITS), metavar="80")
    parser.add_argument("--report", action="store_true", help="what each can reach at best")
    parser.add_argument("--store", action="store_true", help="store that; of names, their lines")
    options = parser.parse_args(arguments)
    if options.store and (not options.report or set(options.arch) != set(LIMITS)):
        parser.error("--store goes with --report, for all targets: what is stored is whole.")
    if triton is None or INTERPRETED:
        why = "TRITON_INTERPRET is set" if INTERPRETED else "Triton is not installed"
        print(f"Nothing can be compiled: {why}.", file=sys.stderr)
        return 2
    unknown = sorted(set(options.names) - set(modules()))
    if unknown:
        print(f"{unknown[0]} is no kernel: {', '.join(modules())}.", file=sys.stderr)
        return 2
    kept: list[dict[str, Any]] = []
    if options.store and options.names:
        try:
            kept = of_others(json.loads(REPORT.read_text(encoding="utf-8")), options.names)
        except (OSError, ValueError) as problem:
            print(f"All kernels have to be stored at once: {problem}", file=sys.stderr)
            return 2
    built, failures = build(options.names, options.arch)
    print(report.HEAD if options.report else HEAD)
    rows = []
    for case, arch, one in built:
        if isinstance(one, Exception):
            print(f"{case.name:<58} sm_{arch} FAILED: {one}")
        elif options.report and case.work is not None:
            rows.append(report.row(one, case.work, warps=case.warps, stages=case.stages))
            print(report.line(rows[-1]))
        else:
            numbers = [one.shared_bytes, one.registers, one.spilled_bytes, one.mma]
            shown = ["-" if n is None else str(n) for n in numbers]
            print(
                f"{case.name:<58} sm_{arch} {shown[0]:>7} {shown[1]:>5} {shown[2]:>5} {shown[3]:>4}"
            )
    print(f"{failures} failed." if failures else "All compiled.")
    if options.store and not failures:
        about = provenance(
            "python -m effnb.kernels.compile --report --store", "not run", ("triton", "torch")
        )
        rows = sorted(kept + rows, key=lambda one: modules().index(_module(one)))
        data = {"triton": triton.__version__, "devices": _devices(), "table": rows}
        write({"provenance": about, "data": data}, REPORT)
    return 1 if failures else 0


HEAD = f"{'kernel':<58} {'arch':>5} {'shared':>7} {'regs':>5} {'spill':>5} {'mma':>4}"
Built = list[tuple[CompileCase, int, Compiled | Exception]]


def build(names: Sequence[str] = (), archs: Sequence[int] = tuple(LIMITS)) -> tuple[Built, int]:
    """Every case of these kernels for every target, or what the compiler said, and how many failed.

    Args:
        names: Kernels; all where none is named.
        archs: Compute capabilities.
    """
    found: Built = []
    for case in cases(*names):
        for arch in (one for one in archs if one in case.archs):
            try:
                found.append((case, arch, compile_case(case, arch)))
            except Exception as problem:  # noqa: BLE001 - whatever the compiler says, for any case
                found.append((case, arch, problem))
    return found, sum(isinstance(one, Exception) for *_, one in found)


if __name__ == "__main__":
    sys.exit(main())
