"""What this machine is, and the best device that torch finds on it."""

from __future__ import annotations

import html
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 1024**3


def device() -> torch.device:
    """The best device present: a CUDA GPU, else Apple's MPS, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Machine:
    """What the workbook can count on here.

    Attributes:
        system: Operating system and processor architecture.
        cores: Logical processors that this process may use.
        threads: Threads that torch uses for one operation.
        memory_bytes: Memory of the machine, or of its container where that is less; None when
            the system does not tell.
        gpu: Name of the GPU, or None.
        gpu_memory_bytes: Memory of that GPU; None without one, and where it is shared with the CPU.
        device: What `device()` picks: "cuda", "mps" or "cpu".
        python: Version of Python.
        torch: Version of torch.
        transformers: Version of transformers.
        triton: Version of Triton, or None where it is not installed.
    """

    system: str
    cores: int
    threads: int
    memory_bytes: int | None
    gpu: str | None
    gpu_memory_bytes: int | None
    device: str
    python: str
    torch: str
    transformers: str
    triton: str | None

    def rows(self) -> list[tuple[str, str]]:
        """Name and wording of each fact."""
        memory = f"{self.memory_bytes / GIB:.1f} GiB" if self.memory_bytes else "unknown"
        gpu = self.gpu or "none: everything runs on the CPU"
        if self.gpu_memory_bytes:
            gpu += f", {self.gpu_memory_bytes / GIB:.0f} GiB"
        return [
            ("System", self.system),
            ("Processor cores", f"{self.cores} ({self.threads} used by one torch operation)"),
            ("Memory", memory),
            ("GPU", gpu),
            ("Triton", self.triton or "not installed: kernels run as plain PyTorch"),
            ("Python", self.python),
            ("torch", self.torch),
            ("transformers", self.transformers),
        ]

    def __str__(self) -> str:
        """The facts as lines of text."""
        return "\n".join(f"{name:<16} {said}" for name, said in self.rows())

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><th scope="row" style="text-align: left; padding: 3px 24px 3px 0">'
            f'{html.escape(name)}</th><td style="text-align: left; padding: 3px 0">'
            f"{html.escape(said)}</td></tr>"
            for name, said in self.rows()
        )
        return f'<table aria-label="This machine" style="border-collapse: collapse">{rows}</table>'


def machine() -> Machine:
    """Look at the machine: cores, memory, GPU, versions."""
    import torch

    best = device().type
    gpu = gpu_memory = None
    if best == "cuda":
        about = torch.cuda.get_device_properties(0)
        gpu, gpu_memory = about.name, about.total_memory
    elif best == "mps":
        gpu = "Apple silicon (memory shared with the CPU)"
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        cores=cores(),
        threads=torch.get_num_threads(),
        memory_bytes=memory_bytes(),
        gpu=gpu,
        gpu_memory_bytes=gpu_memory,
        device=best,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=version("transformers"),
        triton=installed("triton"),
    )


def installed(package: str) -> str | None:
    """Version of a package, or None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cores() -> int:
    """Logical processors that this process may use; a container may have fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes(control_group: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Memory of the machine in bytes, or a container's limit where that is less.

    Args:
        control_group: Where Linux tells a container its limit, in bytes or as "max".
    """
    total = _windows_memory() if sys.platform == "win32" else _posix_memory()
    try:
        limit = int(control_group.read_text())
    except (OSError, ValueError):  # no container, or no limit
        return total
    return min(total, limit) if total else limit


def _posix_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _windows_memory() -> int | None:
    import ctypes

    class Status(ctypes.Structure):
        """The structure MEMORYSTATUSEX of the Windows interface."""

        _fields_ = [
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", "page", "free_page")),
            *((name, ctypes.c_ulonglong) for name in ("virtual", "free_virtual", "extended")),
        ]

    status = Status(length=ctypes.sizeof(Status))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return status.total
