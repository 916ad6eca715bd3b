r"""What a compiled kernel can reach at best, before it has met a GPU.

    python -m effnb.kernels.compile --report [NAME ...]

For a launch of $P$ programs with $w$ warps, whose main loop has $n$ instructions and runs $r$
times, a device with $S$ multiprocessors of four schedulers at $f$ cycles a second takes at least

$$t_\text{issue} = \frac{P w n r}{4 S f}.$$

Memory of bandwidth $B$ and latency $\ell$ gives at most what is in flight in that time (Little's
law): with $F$ bytes in flight on a multiprocessor,

$$t_\text{flight} = \frac{\text{bytes}\ \ell}{S F}.$$

The roofline is $\max(\text{bytes} / B, \text{operations} / A)$, and the bound the largest of all
four. It is a bound: what waits for barriers, banks of shared memory or the last wave comes on top.

Little's law for GPUs: Volkov, "Understanding Latency Hiding on GPUs", 2016. The roofline: Williams,
Waterman and Patterson, "Roofline: An Insightful Visual Performance Model for Multicore
Architectures", 2009.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["DEVICES", "Bound", "Device", "Work", "bound", "in_flight", "resident"]


@dataclass(frozen=True)
class Device:
    """What a data sheet says of a GPU.

    Attributes:
        name: Its name.
        multiprocessors: How many it has.
        clock: Cycles a second.
        bandwidth: Bytes a second.
        products: Operations a second on the tensor cores, of 16-bit numbers.
        plain: Operations a second without them, of float32.
        shared_bytes: Shared memory of a multiprocessor.
        registers: Registers of 32 bits of a multiprocessor.
        warps: Warps that may be resident on it.
        programs: Programs that may be.
        latency: Seconds from a request to memory until its answer, under load. No data sheet has
            it; half a microsecond is assumed for both.
    """

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    products: float
    plain: float
    shared_bytes: int
    registers: int = 65536
    warps: int = 64
    programs: int = 32
    latency: float = 500e-9

    @property
    def needed_in_flight(self) -> float:
        """Bytes in flight on a multiprocessor that keep memory busy."""
        return self.bandwidth * self.latency / self.multiprocessors


DEVICES = {
    80: Device("A100 SXM 80 GB", 108, 1.41e9, 2.04e12, 312e12, 19.5e12, 164 * 1024),
    90: Device("H100 SXM", 132, 1.83e9, 3.35e12, 989e12, 66.9e12, 228 * 1024),
}
"""By compute capability."""


@dataclass(frozen=True)
class Work:
    """What one launch of a compiled case does, at sizes that people use.

    Attributes:
        what: The launch in words: rows, sizes.
        item: What instructions are counted for: a "tile", for which a whole warp's instructions
            count as one, or a "weight" or "number", for which each thread's do.
        items: How many of them a program handles in one turn of its main loop.
        turns: Turns of the main loop of one program.
        programs: Programs of the launch.
        fetched: Bytes that a program asks memory for in one turn and no other program shares.
        bytes: Bytes that the launch moves at the least.
        flops: Operations of the launch.
        other_turns: Turns of a second loop beside the main one, which does the same with masks.
    """

    what: str
    item: str
    items: int
    turns: int
    programs: int
    fetched: int
    bytes: int
    flops: int
    other_turns: int = 0


@dataclass(frozen=True)
class Bound:
    """Seconds that a launch takes at least, by what.

    Attributes:
        memory: Bytes over bandwidth.
        arithmetic: Operations over the device's rate.
        issue: Instructions over the schedulers' rate.
        flight: Bytes over what is in flight within memory's latency.
    """

    memory: float
    arithmetic: float
    issue: float
    flight: float

    @property
    def seconds(self) -> float:
        """The bound."""
        return max(self.memory, self.arithmetic, self.issue, self.flight)

    @property
    def by(self) -> str:
        """What sets it."""
        return max(vars(self), key=vars(self).get)

    @property
    def share(self) -> float:
        """Part of the roofline that can be reached at best."""
        return max(self.memory, self.arithmetic) / self.seconds


def resident(device: Device, *, registers: int, shared_bytes: int, warps: int) -> int:
    """How many programs find room on a multiprocessor.

    Registers are given out to warps in steps of 256, and shared memory with 1 KiB of the driver's.

    Raises:
        ValueError: When not even one does.
    """
    per_warp = -(-registers * 32 // 256) * 256
    found = min(
        device.programs,
        device.warps // warps,
        device.registers // (per_warp * warps),
        device.shared_bytes // (shared_bytes + 1024),
    )
    if found < 1:
        raise ValueError(
            f"a program of {warps} warps with {registers} registers a thread and {shared_bytes} "
            f"bytes of shared memory finds no room on {device.name}."
        )
    return found


def in_flight(device: Device, work: Work, programs: int, *, asynchronous: bool, stages: int) -> int:
    """Bytes that a multiprocessor waits for at a time.

    A loop without asynchronous copies asks for one turn's bytes and waits; with them, all stages
    but the one that is computed on are under way. Not every multiprocessor is full: a launch of few
    programs leaves room.
    """
    here = min(programs, -(-work.programs // device.multiprocessors))
    return work.fetched * (max(1, stages - 1) if asynchronous else 1) * here


def bound(
    device: Device,
    work: Work,
    flight: int,
    *,
    instructions: int,
    warps: int,
    mma: bool,
    other: int = 0,
) -> Bound:
    """The bounds of one launch, by the instructions of its main loop and of the other one."""
    issued = work.programs * warps * (instructions * work.turns + other * work.other_turns)
    rate = device.products if mma else device.plain
    return Bound(
        memory=work.bytes / device.bandwidth,
        arithmetic=work.flops / rate,
        issue=issued / (4 * device.multiprocessors * device.clock),
        flight=work.bytes * device.latency / (device.multiprocessors * flight) if flight else 0.0,
    )


def row(compiled: Any, work: Work, *, warps: int, stages: int) -> dict[str, Any]:
    """One line of the report, as it is stored."""
    device, assembly = DEVICES[compiled.arch], compiled.assembly
    loop = assembly.main_loop()
    programs = resident(
        device, registers=compiled.registers, shared_bytes=compiled.shared_bytes, warps=warps
    )
    copies, lanes = assembly.asynchronous, 1 if work.item == "tile" else 32
    flight = in_flight(device, work, programs, asynchronous=copies > 0, stages=stages)
    found = bound(
        device,
        work,
        flight,
        instructions=len(loop),
        other=len(assembly.other_loop()) if work.other_turns else 0,
        warps=warps,
        mma=assembly.products > 0,
    )
    return {
        "kernel": compiled.name,
        "arch": compiled.arch,
        "work": work.what,
        "registers": compiled.registers,
        "spilled_bytes": compiled.spilled_bytes,
        "shared_bytes": compiled.shared_bytes,
        "products": assembly.products,
        "wgmma": assembly.wide_products,
        "load_widths": {str(width): count for width, count in assembly.load_widths().items()},
        "asynchronous": copies,
        "item": work.item,
        "instructions_per_item": round(lanes * warps * len(loop) / work.items, 2),
        "resident_programs": programs,
        "occupancy": round(programs * warps / device.warps, 3),
        "bytes_in_flight": flight,
        "needed_in_flight": round(device.needed_in_flight),
        "bound_us": round(1e6 * found.seconds, 2),
        "bound_by": found.by,
        "roofline_share": round(found.share, 3),
    }


def line(about: dict[str, Any]) -> str:
    """The same for a terminal."""
    widths = " ".join(f"{count}x{width}" for width, count in about["load_widths"].items()) or "-"
    each = f"{about['instructions_per_item']:g}/{about['item']}"
    return (
        f"{about['kernel']:<52} sm_{about['arch']} {about['registers']:>4} "
        f"{about['spilled_bytes']:>5} {about['shared_bytes']:>7} {about['products']:>4}"
        f"{'w' if about['wgmma'] else ' '} {widths:<14} {about['asynchronous']:>3} {each:>14} "
        f"{about['bytes_in_flight'] / 1024:>5.1f} {about['occupancy']:>4.0%} "
        f"{about['bound_us']:>8.1f} {about['bound_by']:<10} {about['roofline_share']:>4.0%}"
    )


HEAD = (
    f"{'kernel':<52} {'arch':>5} {'regs':>4} {'spill':>5} {'shared':>7} {'mma':>5} "
    f"{'loads':<14} {'cp':>3} {'instructions':>14} {'KiB':>5} {'occ':>4} {'bound us':>8} "
    f"{'by':<10} {'roof':>4}"
)
