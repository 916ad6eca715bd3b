"""One turn of a tensor-core kernel's loop, from its tile and its stored machine code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from effnb.kernels.linear_cross_entropy import TILES
from effnb.lab import PALETTE, figure, table
from effnb.lab.changes import if_measured
from effnb.lab.figures import CaptionedFigure
from effnb.lab.tables import Table

KERNEL = "linear_cross_entropy: sums bf16"
"""The kernel that is walked through, as the report calls it."""
TILE = dict(zip(("tokens", "words", "hidden", "warps", "stages"), TILES[torch.float16]))
INSTRUCTION = {80: ((16, 8, 16), 1), 90: ((64, 128, 16), 4)}
"""Rows, columns and depth that one tensor-core instruction multiplies, and how many warps do it
together, by compute capability."""
GPUS = {80: "A100", 90: "H100"}


def turn() -> dict[str, int]:
    """What one turn of the loop fetches and does, and what a thread holds of it."""
    m, v, h = TILE["tokens"], TILE["words"], TILE["hidden"]
    fetched = 2 * (m + v) * h  # two bytes a number
    return {
        "fetched": fetched,
        "operations": 2 * m * v * h,
        "per_byte": 2 * m * v * h // fetched,
        "sums": m * v // (32 * TILE["warps"]),
    }


def products_of_a_warp(arch: int) -> int:
    """Tensor-core instructions that each warp takes part in during a turn."""
    (rows, columns, depth), together = INSTRUCTION[arch]
    all_of_them = turn()["operations"] // (2 * rows * columns * depth)
    return all_of_them * together // TILE["warps"]


def of_kernel(rows: Sequence[Mapping[str, Any]], arch: int) -> Mapping[str, Any]:
    """The stored line of the kernel."""
    (found,) = (r for r in rows if r["kernel"] == KERNEL and r["arch"] == arch)
    return found


@if_measured
def walk_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One turn in numbers, on both GPUs, with the reason for each."""
    about, stored = turn(), {arch: of_kernel(rows, arch) for arch in GPUS}
    each = {arch: f"{a} x {b} x {c}" for arch, ((a, b, c), _) in INSTRUCTION.items()}
    lines = [
        (
            "tile: tokens x words x hidden",
            dict.fromkeys(GPUS, " x ".join(str(TILE[k]) for k in ("tokens", "words", "hidden"))),
            f"{about['per_byte']} operations for each byte that is fetched",
        ),
        (
            "sums in a thread",
            dict.fromkeys(GPUS, str(about["sums"])),
            f"{TILE['warps']} warps of 32 threads hold the tile in float32",
        ),
        (
            "registers of a thread",
            {arch: str(row["registers"]) for arch, row in stored.items()},
            "sums, their logits, and copies of both; 255 are the most",
        ),
        ("one instruction multiplies", each, "by one warp on an A100, by four on an H100"),
        (
            "such instructions of a warp",
            {arch: str(row["products"]) for arch, row in stored.items()},
            "tile over instruction, over warps",
        ),
        (
            "all instructions of a warp",
            {
                arch: f"{row['instructions_per_item'] / TILE['warps']:.0f}"
                for arch, row in stored.items()
            },
            "the rest copies, counts and waits",
        ),
        (
            "KiB that a turn fetches",
            dict.fromkeys(GPUS, f"{about['fetched'] / 1024:.0f}"),
            "two bytes of each number of x and of the weight",
        ),
        (
            "KiB in flight (needed)",
            {
                arch: f"{row['bytes_in_flight'] / 1024:.0f} ({row['needed_in_flight'] / 1024:.1f})"
                for arch, row in stored.items()
            },
            f"of {TILE['stages']} stages, {TILE['stages'] - 1} are under way",
        ),
        (
            "at least, in ms (roofline)",
            {
                arch: f"{row['bound_us'] / 1e3:.1f} "
                f"({row['bound_us'] * row['roofline_share'] / 1e3:.1f})"
                for arch, row in stored.items()
            },
            stored[90]["work"],
        ),
    ]
    return table(
        [
            {"one turn": name, **{GPUS[arch]: found[arch] for arch in GPUS}, "why": why}
            for name, found, why in lines
        ],
        caption="One turn of the loop that makes logits, in bfloat16, compiled and not run. The "
        "last two lines are of the whole launch.",
    )


@if_measured
def bounds(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> CaptionedFigure:
    """The bound of each kernel that is shown beside its roofline, on an H100."""
    found = {row["kernel"]: row for row in rows if row["arch"] == 90}
    shown = [(name.split(",")[0], found[name]) for name in names]
    least = [row["bound_us"] * row["roofline_share"] for _, row in shown]

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for place, ((_, row), roof) in enumerate(zip(shown, least, strict=True)):
            axes.plot([roof, row["bound_us"]], [place, place], color="0.6", linewidth=2)
            bar = dict(color=PALETTE[1], markersize=16, markeredgewidth=2.5, linestyle="")
            axes.plot(roof, place, "|", label="roofline" if not place else None, **bar)
            dot = dict(color=PALETTE[0], markersize=6, linestyle="")
            label = "what the machine code allows" if not place else None
            axes.plot(row["bound_us"], place, "o", label=label, **dot)
        axes.set_xscale("log")
        axes.set_yticks(range(len(shown)), [name for name, _ in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel("µs at least")
        axes.legend(loc="upper right", fontsize="small")

    return figure(
        draw,
        caption="How far machine code alone keeps kernels from the roofline of an H100. A dot on "
        "its bar: memory or the tensor cores set the pace, not instructions or latency.",
        alt="Roofline and bound in microseconds: "
        + "; ".join(
            f"{name} {roof:,.1f} and {row['bound_us']:,.1f}"
            for (name, row), roof in zip(shown, least, strict=True)
        )
        + ".",
        figsize=(6.4, 3.4),
    )
