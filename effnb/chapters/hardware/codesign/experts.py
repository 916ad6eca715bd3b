"""Experts on several devices: what each computes and sends, counted, run and stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.hardware.codesign import gshard, roofline
from effnb.hardware.codesign.expert_parallel import Report, Settings, run_processes
from effnb.lab import results
from effnb.lab.bench import Bench
from effnb.lab.changes import if_measured
from effnb.lab.tables import Table, table

Row = Mapping[str, Any]

LINKS = {"network, 10 GB/s": 10e9, "PCIe, 50 GB/s": 50e9, "NVLink, 300 GB/s": 300e9}
"""Bytes per second between devices."""
GROUP = 128
"""Tokens of a device."""
SHEET = roofline.DATA_SHEETS["A100 SXM 80 GB"]
"""Computes for each device."""


# --- counted --------------------------------------------------------------------------------------


@torch.inference_mode()
def hidden_states(bench: Bench, layer: int = 3) -> Float[Tensor, "groups tokens model"]:
    """What a layer of the bench's model reads, in groups of tokens, all of the same size."""
    states = bench.model(input_ids=bench.windows[:8], output_hidden_states=True, use_cache=False)
    found = states.hidden_states[layer].reshape(-1, GROUP, bench.model.config.hidden_size).float()
    return found / found.square().mean(-1, keepdim=True).sqrt()


@dataclass(frozen=True)
class Spread:
    """A layer of experts on several devices.

    Attributes:
        routing: Where the tokens go, measured on real hidden states.
        tokens: Tokens of all devices.
        experts: Experts of all devices.
        room: Tokens that one expert takes of all devices together.
        sent: Bytes that a device sends, there and back.
        compute: Least seconds of a device's computation.
        exchange: Least seconds of its exchange.
    """

    routing: gshard.Routing
    tokens: int
    experts: int
    room: int
    sent: float
    compute: float
    exchange: float

    @property
    def ratio(self) -> float:
        """How many times as long as the computation the exchange takes."""
        return self.exchange / self.compute


def spread(
    states: Float[Tensor, "groups tokens model"],
    *,
    devices: int,
    each: int = 2,
    factor: float = 1.0,
    hidden: int = 2048,
    link: str = "PCIe, 50 GB/s",
) -> Spread:
    """Route the tokens of some devices by a random router; times are by arithmetic.

    Args:
        states: Hidden states; a group for each device.
        devices: How many devices there are.
        each: Experts on each of them.
        factor: Capacity factor.
        hidden: Width of an expert.
        link: A name of `LINKS`.
    """
    count, model = max(2, devices * each), states.shape[-1]
    router = torch.randn(model, count, generator=torch.Generator().manual_seed(0)) / model**0.5
    slots = gshard.capacity(GROUP, count, factor)
    routing = gshard.route(states[:devices] @ router, slots)
    sent = 2 * gshard.exchange_bytes(1, slots, count, model, devices, bytes_per_number=2)
    operations = gshard.expert_operations(1, slots, count, model, hidden)
    return Spread(
        routing,
        GROUP * devices,
        count,
        slots * devices,
        sent,
        operations / SHEET.operations_per_second,
        sent / LINKS[link],
    )


def exchange_table(states: Float[Tensor, "groups tokens model"]) -> Table:
    """The exchange over the computation, for more devices and for wider experts."""
    columns = {f"{n} devices": n for n in (2, 4, 32)}
    return table(
        [
            {"width of an expert": f"{hidden:,}"}
            | {k: spread(states, devices=n, hidden=hidden).ratio for k, n in columns.items()}
            for hidden in (512, 2048, 8192)
        ],
        {"width of an expert": "", **dict.fromkeys(columns, ".1f")},
        caption="Least time of the exchange, at 50 GB/s for each device, over that of the "
        "computation on an A100 by its data sheet.",
    )


# --- run here -------------------------------------------------------------------------------------

ROOMY = Settings(
    devices=2, experts=8, groups=4, tokens=64, model=64, hidden=128, factor=0, repeats=3
)
"""Two processes, with room for all tokens, so that the result can be compared with a loop."""


def run(settings: Settings = ROOMY) -> tuple[Report, ...]:
    """Start the processes, and give what each measured."""
    return tuple(run_processes(settings))


def run_said(reports: Sequence[Report], settings: Settings = ROOMY) -> str:
    """Whether the processes agree with a loop over tokens and their bytes with the formula."""
    predicted = 2 * gshard.exchange_bytes(
        settings.groups // settings.devices,
        settings.slots,
        settings.experts,
        settings.model,
        settings.devices,
    )
    agree = all(report.largest_error < 1e-6 for report in reports)
    sent = {report.sent_bytes for report in reports}
    return (
        f"{len(reports)} processes {'agree' if agree else 'do not agree'} with a loop over tokens "
        f"to a millionth; each sent {' or '.join(f'{s:,}' for s in sorted(sent))} bytes, and the "
        f"formula says {predicted:,.0f}."
    )


def shares_said(reports: Sequence[Report]) -> str:
    """Which part of its time each process exchanges, in a sentence."""
    shares = [f"{report.exchange_seconds / report.seconds:.0%}" for report in reports]
    return f"Exchanging takes {' and '.join(shares)} of the processes' time here."


# --- stored ---------------------------------------------------------------------------------------


def of(rows: Sequence[Row], count: int, devices: int) -> Row:
    """The stored run with this number of experts and devices."""
    return next(r for r in rows if (r["experts"], r["devices"]) == (count, devices))


def by_formula(row: Row, sizes: Row) -> int:
    """Bytes that a device sends, there and back."""
    groups = sizes["groups"] // row["devices"]
    found = gshard.exchange_bytes(
        groups, row["slots"], row["experts"], sizes["model"], row["devices"]
    )
    return int(2 * found)


@if_measured
def grown_table(data: Row) -> Table:
    """Weights, operations and bytes of the busiest process, as experts and processes grow."""
    return table(
        [
            {
                "experts": str(row["experts"]),
                "processes": row["devices"],
                "MiB of weights": max(row["weight_bytes"]) / 2**20,
                "billion operations": max(row["operations"]) / 1e9,
                "MiB sent": max(row["sent_bytes"]) / 2**20,
                "bytes per 1,000 operations": 1000
                * max(row["sent_bytes"])
                / max(row["operations"]),
            }
            for row in data["table"]
        ],
        {
            "experts": "",
            "processes": "",
            "MiB of weights": ".0f",
            "billion operations": ".2f",
            "MiB sent": ".2f",
            "bytes per 1,000 operations": ".2f",
        },
        caption=f"The same {data['sizes']['groups'] * data['sizes']['tokens']:,} tokens on one "
        "machine; each number is that of the busiest process.",
    )


@if_measured
def grown_said(data: Row) -> str:
    """Whether stored runs agree with each other, with the loop and with the formula."""
    rows = data["table"]
    same = all(
        math.isclose(row["output_sum"], of(rows, row["experts"], 1)["output_sum"], rel_tol=1e-6)
        for row in rows
    )
    loop = max(row["largest_error"] for row in rows) < 1e-6
    counted = all(set(row["sent_bytes"]) == {by_formula(row, data["sizes"])} for row in rows)
    devices = ", ".join(str(n) for n in sorted({row["devices"] for row in rows}))
    return " ".join(
        [
            f"The results on {devices} processes {'agree' if same else 'differ'}.",
            f"With room for all tokens they {'agree' if loop else 'do not agree'} with a loop "
            "over tokens to a millionth.",
            f"The bytes counted are {'those' if counted else 'not those'} of the formula.",
        ]
    )


def work_table(data: Row, clock: Row) -> Table:
    """Time of the processor, and by the clock where stored, as a part of what one process takes."""
    if isinstance(data, results.NotMeasured):
        return data
    rows, by_clock = data["table"], clock["table"] if clock else ()
    timed = {(row["experts"], row["devices"]): row for row in by_clock}
    devices = sorted({row["devices"] for row in rows} - {1})
    found = []
    for count in sorted({row["experts"] for row in rows}):
        alone = median(of(rows, count, 1)["busy_seconds"])
        one, two = timed.get((count, 1)), timed.get((count, 2))
        line: dict[str, Any] = {"experts": str(count)}
        for n in devices:
            line[f"processor, {n} processes"] = median(of(rows, count, n)["busy_seconds"]) / alone
        if one and two:
            line["clock, 2 processes"] = median(two["seconds"]) / median(one["seconds"])
            line["exchange"] = median(
                e / s for e, s in zip(two["exchange_seconds"], two["seconds"], strict=True)
            )
        found.append(line)
    columns = {name: ".2f" for line in found for name in line} | {"experts": ""}
    if "exchange" in columns:
        columns["exchange"] = ".0%"
    return table(
        found,
        columns,
        caption="Median time as a part of what one process takes: of the processor for the busiest "
        "process, and by the clock on two idle cores."
        + ("" if timed else " By the clock: not measured, no run on two idle cores is stored."),
    )


def stored(part: str) -> results.StoredResult:
    """One of the stored tables on experts: "experts" or "scaling"."""
    return results.read(f"06_hardware/2_codesign/{part}")
