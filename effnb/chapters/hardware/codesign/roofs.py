"""The roofs of the chapter on co-design: the reader's machine, a GPU, and what they allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effnb.hardware.codesign import kernel_results, roofline
from effnb.hardware.codesign.roofline import Roof, Work
from effnb.lab import results
from effnb.lab.changes import if_measured
from effnb.lab.tables import Table, table

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Tokens at a time for which the machine is measured."""
WIDTH = 1024
"""Inputs and outputs of the layer that is measured."""
SHEET_WIDTH = 4096
"""Inputs and outputs of the layer that is counted for a GPU."""


# --- the machine that runs the page ---------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """A machine whose roof and products were measured.

    Attributes:
        roof: The highest rates that were seen of memory and of arithmetic.
        seconds: For each number of tokens, the time of their product with one layer.
    """

    roof: Roof
    seconds: Mapping[int, float]

    def work(self, tokens: int) -> Work:
        """What such a product does and moves; all numbers have 32 bits."""
        return roofline.matmul(tokens, WIDTH, WIDTH, weight_bits=32, activation_bits=32)

    def ratio(self, tokens: int) -> float:
        """The time of these tokens at once over that of one token."""
        return self.seconds[tokens] / self.seconds[1]


def measured() -> Machine:
    """Measure this machine: a large copy, a large product, and a layer with few and many tokens."""
    ceilings = roofline.measure_roof(size=1024)
    machine = Machine(ceilings, {m: roofline.measure_matmul(m, WIDTH, WIDTH) for m in TOKENS})
    seen = [(machine.work(m), seconds) for m, seconds in machine.seconds.items()]
    # A roof is the highest rate that was seen, whatever showed it.
    roof = Roof(
        "this machine, measured",
        max(ceilings.operations_per_second, *(w.operations / t for w, t in seen)),
        max(ceilings.bytes_per_second, *(w.bytes / t for w, t in seen)),
    )
    return Machine(roof, machine.seconds)


def sharing_said(machine: Machine, tokens: int = 16) -> str:
    """What sharing the weight saves here, in a sentence."""
    return (
        f"Here, {tokens} tokens at once take {machine.ratio(tokens):.1f} times as long as one "
        f"token, for {tokens} times the operations."
    )


def predicted_said(machine: Machine, tokens: int = 64) -> str:
    """The ratio of two times by the roof and as measured, in a sentence."""
    by_roof = [machine.roof.least_seconds(machine.work(m)) for m in (1, tokens)]
    return (
        f"{tokens} tokens against one: {by_roof[1] / by_roof[0]:.1f} times as long by the roof, "
        f"{machine.ratio(tokens):.1f} times as measured."
    )


# --- a GPU ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A GPU's roof, and the book's GPU kernels under it.

    Attributes:
        name: What it is called in a picture.
        roof: Its ceilings.
        measured: Whether they were measured; else its vendor states them.
        points: For each dot its operations per byte and its operations per second.
        cases: Every kernel at every shape, with its time where one was measured.
        stored: The stored run of the kernels' benchmark.
    """

    name: str
    roof: Roof
    measured: bool
    points: tuple[tuple[float, float], ...]
    cases: tuple[kernel_results.KernelCase, ...]
    stored: results.StoredResult


def gpu(sheet: str = "H100 SXM") -> Gpu:
    """The GPU that ran the kernels' benchmark; where none did, one by its data sheet."""
    stored = results.read("kernels")
    about = (stored.data, stored.provenance.device)
    roof, was_measured = kernel_results.gpu_roof(*about, roofline.DATA_SHEETS[sheet])
    cases = kernel_results.kernel_cases(*about)
    if was_measured:
        name = (kernel_results.measured_on(*about) or "").removeprefix("NVIDIA ")
        points = [
            (case.work.operations_per_byte, case.work.operations / case.ours.seconds)
            for case in cases
            if case.ours.seconds
        ]
    else:
        name = sheet
        at = [roofline.matmul(m, SHEET_WIDTH, SHEET_WIDTH) for m in (1, 16, 256, 1024)]
        points = [(w.operations_per_byte, roof.attainable(w.operations_per_byte)) for w in at]
    return Gpu(name, roof, was_measured, tuple(points), tuple(cases), stored)


def kernels_table(gpu: Gpu) -> Table:
    """Each of the book's GPU kernels: what its cases wait for, and how fast they are."""
    rows = []
    for kernel in dict.fromkeys(case.kernel for case in gpu.cases):
        cases = [case for case in gpu.cases if case.kernel == kernel]
        waiting = sum(gpu.roof.memory_bound(case.work) for case in cases)
        shares = [case.ours.roofline for case in cases if case.ours.seconds]
        times = [
            case.best_peer.seconds / case.ours.seconds
            for case in cases
            if case.ours.seconds and case.best_peer
        ]
        rows.append(
            {
                "GPU kernel": kernel,
                "sizes": len(cases),
                "operations per byte": _range(
                    [case.work.operations_per_byte for case in cases], ",.1f"
                ),
                "wait for memory": f"{waiting} of {len(cases)}",
                "of the roof": _range(shares, ".0%") if shares else None,
                "best measured peer / ours": _range(times, ".2f") if times else None,
            }
        )
    how = f"Times: {gpu.name}." if gpu.measured else "No GPU has run them for this book yet."
    return table(
        rows,
        caption=f"The book's GPU kernels at sizes of real models, under {gpu.roof.name}. {how}",
    )


SHOWN = (
    "int4_matmul: affine bf16 one_row 1x32",
    "int4_matmul: nf4 fp16 one_row 1x32",
    "int4_matmul: affine fp16 many_rows 16x64",
    "int4_matmul: affine bf16 many_rows 64x128",
    "local_attention: forward bf16 128",
    "retention: states bf16 128x128 chunk 128",
    "lora: bf16 128x128, A and B bf16, r 16",
    "rope: half-split forward bf16",
    "linear_cross_entropy: sums bf16",
    "int8_matmul: bf16 128x128x128",
    "quantized_attention: bf16 2 bits",
    "adam8bit: weights bf16, gradients bf16",
)
"""The compiled kernels that the chapter shows; the stored report has all."""
SET_BY = {
    "memory": "bandwidth",
    "arithmetic": "arithmetic",
    "issue": "instructions",
    "flight": "latency",
}


@if_measured
def bounds_table(rows: Sequence[Mapping[str, Any]], arch: int = 90) -> Table:
    """What compiled kernels can reach at best: their instructions, and the bytes they wait for."""
    found = {row["kernel"]: row for row in rows if row["arch"] == arch}
    shown = []
    for name in SHOWN:
        row = found[name]
        kernel, _, how = name.partition(": ")
        shown.append(
            {
                "GPU kernel": f"{kernel}, {how}",
                "work": row["work"],
                "instructions": f"{row['instructions_per_item']:,.1f} a {row['item']}",
                "KiB in flight": f"{row['bytes_in_flight'] / 1024:.1f}",
                "roofline": f"{row['bound_us'] * row['roofline_share']:,.1f} µs",
                "at least": f"{row['bound_us']:,.1f} µs",
                "set by": SET_BY[row["bound_by"]],
                "of the roof at best": f"{row['roofline_share']:.0%}",
            }
        )
    return table(
        shown,
        caption="Compiled for an H100 and read, not run. In flight: what one multiprocessor waits "
        "for at a time. A tile's instructions are those of a warp, a weight's those of a thread.",
    )


def flight_said(rows: Sequence[Mapping[str, Any]], arch: int = 90) -> str:
    """How many bytes have to be in flight on the stored device, in a sentence."""
    (needed,) = {row["needed_in_flight"] for row in rows if row["arch"] == arch}
    return (
        f"To keep an H100's memory busy through half a microsecond of latency, each of its "
        f"multiprocessors has to wait for {needed / 1024:.1f} KiB at a time."
    )


def _range(values: list[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


# --- counted --------------------------------------------------------------------------------------

LLAMA = roofline.Shape(16, 2048, 8192, 32, 8, 64, 128_256)
"""Sizes of a Llama of about a billion weights."""


def waiting_table(tokens: int = 1024) -> Table:
    """What reading a prompt and decoding wait for on three GPUs, by their data sheets."""
    cases = {
        "read a prompt": roofline.prefill(LLAMA, tokens),
        "decode, 1 sequence": roofline.decode_step(LLAMA, tokens),
        "decode, 64 sequences": roofline.decode_step(LLAMA, tokens, batch=64),
        "decode, 512 sequences": roofline.decode_step(LLAMA, tokens, batch=512),
        "512 sequences of one token": roofline.decode_step(LLAMA, 1, batch=512),
    }
    sheets = {
        f"{name} ({roof.ridge_operations_per_byte:.0f})": roof
        for name, roof in roofline.DATA_SHEETS.items()
    }
    return table(
        [
            {"step": name, "operations per byte": work.operations_per_byte}
            | {
                label: "memory" if roof.memory_bound(work) else "arithmetic"
                for label, roof in sheets.items()
            }
            for name, work in cases.items()
        ],
        {"step": "", "operations per byte": ".1f", **dict.fromkeys(sheets, "")},
        caption=f"What a Llama of {LLAMA.weights / 1e9:.1f} billion weights waits for with "
        f"{tokens:,} tokens of context, by data sheets (in brackets: the corner of the roof).",
    )


FORMS = {
    "int4, groups of 128": (roofline.weight_bits(4, group_size=128), 1),
    "2:4, 16 bits": (roofline.sparse_bits(16), 2),
    "2:4 and int4, no scales": (roofline.sparse_bits(4), 2),
    "90 % zeros, unknown to the chip": (16, 1),
}
"""Forms of a weight: bits that are read for each, and how much faster the arithmetic is."""
AT_ONCE = (1, 16, 64, 256, 2048)


def least_seconds(roof: Roof, tokens: int, form: str | None = None) -> float:
    """Least time of a product with a layer whose weight has a form of `FORMS`, or 16 bits."""
    bits, faster = FORMS[form] if form else (16, 1)
    work = roofline.matmul(tokens, SHEET_WIDTH, SHEET_WIDTH, weight_bits=bits)
    quick = Roof(roof.name, faster * roof.operations_per_second, roof.bytes_per_second)
    return quick.least_seconds(work)


def gains_table(sheet: str = "A100 SXM 80 GB") -> Table:
    """How many times as fast each form is at best, for few and for many tokens."""
    roof = roofline.DATA_SHEETS[sheet]
    columns = {f"{m:,}": m for m in AT_ONCE}
    return table(
        [
            {"form of the weight": form}
            | {
                label: least_seconds(roof, m) / least_seconds(roof, m, form)
                for label, m in columns.items()
            }
            for form in FORMS
        ],
        {"form of the weight": "", **dict.fromkeys(columns, ".2f")},
        caption=f"Least time with 16 bits over least time in this form, {sheet} by its data sheet, "
        "for 1 to 2,048 tokens at once.",
    )


def tiles_table(side: int = 4) -> Table:
    """A product of small square matrices, cut into tiles; each number has one byte."""
    return table(
        [
            {
                "tiles of": f"{t} by {t}",
                "read": int(roofline.tiled_bytes(side, side, side, tile_m=t, tile_n=t, bits=8))
                - side**2,
                "written": side**2,
                "bytes held close by": int(roofline.tile_bytes(t, t, t, bits=8)),
            }
            for t in (1, 2, 4)
        ],
        caption=f"Numbers that a product of {side} by {side} matrices reads and writes; held close "
        "by are a tile of each operand, one byte a number, and the sums, four bytes each.",
    )


# --- measured here --------------------------------------------------------------------------------


def fusion_said(steps: int = 6) -> str:
    """A chain of element-wise steps, step by step and block by block, measured here."""
    numbers = torch.ones(2**24)

    def apart(_: int) -> None:
        for _ in range(steps):
            numbers.mul_(1.0001)

    def fused(_: int) -> None:
        for block in numbers.split(2**16):  # 256 KiB: stays in the cache between the steps
            for _ in range(steps):
                block.mul_(1.0001)

    # In turns, and the best of each: what else runs on the machine slows some rounds down.
    rounds = [[roofline.median_seconds(one, 1) for one in (apart, fused)] for _ in range(5)]
    separate, together = map(min, zip(*rounds, strict=True))
    moved = [
        roofline.elementwise(len(numbers), steps, fused=one, bits=32).bytes / 2**20
        for one in (False, True)
    ]
    return (
        f"{steps} steps move {moved[0]:.0f} MiB one after another and {moved[1]:.0f} MiB block by "
        f"block; here, block by block is {separate / together:.1f} times as fast."
    )


def cached_said(machine: Machine) -> str:
    """A copy so small that it never leaves the processor's cache, against the memory's rate."""
    source = torch.ones(2**15)
    target = torch.empty_like(source)
    copies = 500
    seconds = roofline.median_seconds(lambda _: [target.copy_(source) for _ in range(copies)], 5)
    rate = 2 * source.nbytes * copies / seconds
    return (
        f"Copying {source.nbytes // 1024} KiB again and again reaches "
        f"{rate / machine.roof.bytes_per_second:.1f} times the memory's rate."
    )
