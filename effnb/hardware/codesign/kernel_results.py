"""What a stored run of the kernels' benchmark says: ceilings, times, peers, or "not measured".

`python -m effnb.kernels.bench --store` writes `data/results/kernels.json`. These functions read its
content, so that pages draw what was measured where something was, and say so where nothing was.
Nothing here measures or estimates a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effnb.hardware.codesign.roofline import Roof, Work

FOR_SCALE = " (for scale)"
"""Ends the name of a contestant that computes something else."""


@dataclass(frozen=True)
class Contestant:
    """One implementation in one case.

    Attributes:
        who: "ours", or the peer's name.
        seconds: Its median time; None where it was not measured.
        roofline: Part of the speed that the ceilings of the same run allow; None likewise.
        note: Why it was not measured.
    """

    who: str
    seconds: float | None
    roofline: float | None
    note: str

    @property
    def rival(self) -> bool:
        """Whether it is another implementation of the same computation, and was measured."""
        return self.who != "ours" and not self.who.endswith(FOR_SCALE) and self.seconds is not None


@dataclass(frozen=True)
class KernelCase:
    """One kernel at one shape, with everybody who computed it.

    Attributes:
        kernel: The kernel's name.
        shape: The shape in words.
        dtype: Type of the inputs.
        work: Operations that must be done and bytes that must be moved: counted, not measured.
        contestants: Ours and the peers, in the order of the file.
    """

    kernel: str
    shape: str
    dtype: str
    work: Work
    contestants: tuple[Contestant, ...]

    @property
    def ours(self) -> Contestant:
        """Our kernel."""
        return next(c for c in self.contestants if c.who == "ours")

    @property
    def best_peer(self) -> Contestant | None:
        """The fastest other implementation of the same; None when none was measured."""
        return min((c for c in self.contestants if c.rival), key=lambda c: c.seconds, default=None)


def measured_on(data: Mapping[str, Any], device: str) -> str | None:
    """The name of the GPU that a stored run was measured on; None when it was on none.

    Args:
        data: Content of the stored run.
        device: The device in its provenance, such as "cuda (NVIDIA H100)" or "not measured". Times
            of the references on a processor do not count.
    """
    if not data["ceilings"] or not device.startswith("cuda"):
        return None
    return device.removeprefix("cuda").strip().removeprefix("(").removesuffix(")") or "GPU"


def gpu_roof(
    data: Mapping[str, Any], device: str, sheet: Roof, dtype: str = "bfloat16"
) -> tuple[Roof, bool]:
    """A GPU's roof: the ceilings that were measured and stored, or else those of a data sheet.

    Args:
        data: Content of the stored run.
        device: The device in its provenance.
        sheet: What to fall back to.
        dtype: Which ceiling of the arithmetic; the highest where this type was not measured.

    Returns:
        The roof, and whether it was measured.
    """
    name = measured_on(data, device)
    if name is None:
        return sheet, False
    speeds = data["ceilings"]["flops_per_second"]
    kind = dtype if dtype in speeds else max(speeds, key=speeds.get)
    moved = data["ceilings"]["bytes_per_second"]
    return Roof(f"{name}, {kind}, measured", speeds[kind], moved), True


def kernel_cases(data: Mapping[str, Any], device: str) -> list[KernelCase]:
    """The cases of a stored run, each with ours and the peers.

    Args:
        data: Content of the stored run.
        device: The device in its provenance; times that no GPU measured are left out.

    Raises:
        ValueError: When a case has no line of ours.
    """
    measured = measured_on(data, device) is not None
    grouped: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for line in data["timings"]:
        grouped.setdefault((line["kernel"], line["shape"], line["dtype"]), []).append(line)
    cases = []
    for (kernel, shape, dtype), lines in grouped.items():
        if not any(line["who"] == "ours" for line in lines):
            raise ValueError(f"{kernel} at {shape} has no line of ours; run the benchmark again.")
        contestants = tuple(
            Contestant(line["who"], line["seconds"], line["roofline"], line["note"])
            if measured
            else Contestant(line["who"], None, None, line["note"] or "no GPU was available")
            for line in lines
        )
        work = Work(lines[0]["flops"], lines[0]["bytes"])
        cases.append(KernelCase(kernel, shape, dtype, work, contestants))
    return cases
