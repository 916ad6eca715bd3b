"""The panels of the chapter on co-design."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from effnb.chapters.hardware.codesign import experts, roofs, tables
from effnb.chapters.hardware.codesign.drawings import GREY, roof_line
from effnb.chapters.hardware.codesign.experts import Spread
from effnb.chapters.hardware.codesign.live import PRUNERS, Attention, Pruned
from effnb.hardware.codesign import roofline
from effnb.hardware.codesign.roofline import Roof, Work
from effnb.lab import PALETTE, guess, knob, panel
from effnb.lab.panels import Panel
from effnb.lab.results import NotMeasured

Row = Mapping[str, Any]

# --- many tokens at once --------------------------------------------------------------------------

HERE = "this machine, measured"
DENSE = "16 bits"


@dataclass(frozen=True)
class Product:
    """Some tokens multiplied with a layer at once.

    Attributes:
        tokens: How many.
        one: Seconds of one token.
        together: Seconds of all at once.
        work: What they do and move.
        roof: The roof above them.
        gain: How many times as fast as with 16 bits; None where only one form was measured.
    """

    tokens: int
    one: float
    together: float
    work: Work
    roof: Roof
    gain: float | None

    @property
    def ratio(self) -> float:
        """How many times as long as one token all of them take."""
        return self.together / self.one


def together(machine: roofs.Machine) -> Panel:
    """How long many tokens take at once, by measurement or by a data sheet."""

    def compute(tokens: int, on: str, form: str) -> Product:
        if on == HERE:
            seconds = machine.seconds
            work = machine.work(tokens)
            return Product(tokens, seconds[1], seconds[tokens], work, machine.roof, None)
        roof = roofline.DATA_SHEETS[on]
        chosen = None if form == DENSE else form
        bits, faster = roofs.FORMS[chosen] if chosen else (16, 1)
        work = roofline.matmul(tokens, roofs.SHEET_WIDTH, roofs.SHEET_WIDTH, weight_bits=bits)
        one, many = (roofs.least_seconds(roof, m, chosen) for m in (1, tokens))
        above = Roof(roof.name, faster * roof.operations_per_second, roof.bytes_per_second)
        gain = roofs.least_seconds(roof, tokens) / many if chosen else None
        return Product(tokens, one, many, work, above, gain)

    return panel(
        compute,
        _draw_product,
        text=_say_product,
        title="Many tokens at once",
        caption="Left: time of one token, of all at once, and of all one after another. Right: "
        "the product under its roof.",
        figsize=(6.4, 2.0),
        frames={"tokens": [16, 256], "on": [HERE, next(iter(roofline.DATA_SHEETS))]},
        predict=guess(
            "A layer is multiplied with 16 tokens at once. How many times as long as one token do "
            "they take on this machine?",
            answer=lambda found: round(found.ratio, 1),
            at={"tokens": 16, "on": HERE},
            unit="times",
        ),
        ignored=lambda values: (
            {"form": "only 32-bit numbers were measured here"} if values["on"] == HERE else {}
        ),
        tokens=knob(roofs.TOKENS, default=16, label="tokens at once"),
        on=knob([HERE, *roofline.DATA_SHEETS], default=HERE, label="on"),
        form=knob([DENSE, *roofs.FORMS], default=DENSE, label="form of the weight"),
    )


def _draw_product(result: Product, fig: Figure) -> None:
    left, right = fig.subplots(1, 2, width_ratios=[3, 2])
    bars = {
        "one token": result.one,
        f"{result.tokens} at once": result.together,
        f"{result.tokens} one by one": result.tokens * result.one,
    }
    colours = (PALETTE[2], PALETTE[1], "0.7")
    left.barh(range(3), [1e6 * t for t in bars.values()], color=colours, height=0.6)
    left.set_yticks(range(3), list(bars))
    left.invert_yaxis()
    left.xaxis.set_major_formatter("{x:,g}")
    left.set_xlabel("microseconds")
    roof_line(right, result.roof)
    x = result.work.operations_per_byte
    y = min(result.work.operations / result.together, result.roof.operations_per_second)
    right.plot(x, y / 1e9, "o", color=PALETTE[1], markersize=9)
    right.set_ylabel("billion per second")


def _say_product(result: Product) -> str:
    waits = "memory" if result.roof.memory_bound(result.work) else "arithmetic"
    how = "measured" if result.roof.name == HERE else "least times, by arithmetic"
    lines = [
        f"Times: {how}",
        f"One token: {1e6 * result.one:.3g} µs",
        f"{result.tokens} at once: {1e6 * result.together:.3g} µs",
        f"That is: {result.ratio:.1f} times as long, for {result.tokens} times the operations",
        f"Operations per byte: {result.work.operations_per_byte:.3g}",
        f"Corner of the roof: {result.roof.ridge_operations_per_byte:.3g}",
        f"Waits for: {waits}",
    ]
    if result.gain is not None:
        lines.append(f"Against 16 bits: {result.gain:.2f} times as fast at best")
    return "\n".join(lines)


# --- what to leave out ----------------------------------------------------------------------------


def attention(subject: Attention, rows: Sequence[Row]) -> Panel:
    """Pruned attention of a language model, run while you wait, among the stored curves."""

    def compute(method: str, keep: float, alpha: float) -> Pruned:
        return subject.pruned(method, keep, alpha)

    def draw(result: Pruned, fig: Figure) -> None:
        left, right = fig.subplots(1, 2, width_ratios=[3, 2])
        if not isinstance(rows, NotMeasured):
            for name in tables.LINES:
                x, y = zip(*tables.curve(rows, name), strict=True)
                left.plot(x, [math.exp(v) for v in y], "-", color="0.8", linewidth=1.5)
        left.axhline(1, color=GREY, linestyle=":")
        ratio, low, high = (
            math.exp(v) for v in (result.loss.difference, result.loss.low, result.loss.high)
        )
        left.errorbar(
            result.now.record.pair_share,
            ratio,
            [[ratio - low], [high - ratio]],
            fmt="o",
            color=PALETTE[1],
            markersize=8,
            capsize=3,
        )
        left.set_title("perplexity ÷ the original's")
        left.set_xlabel("pairs computed")
        left.xaxis.set_major_formatter("{x:.0%}")
        bars = {
            "right answers": fmean(result.now.correct),
            "the original's": fmean(result.was.correct),
            "best keys found": result.now.record.recall,
        }
        count = len(result.now.correct)
        errors = [math.sqrt(a * (1 - a) / count) for a in list(bars.values())[:2]]
        right.barh(
            range(3),
            list(bars.values()),
            xerr=[*errors, 0],
            color=(PALETTE[1], PALETTE[2], PALETTE[0]),
            ecolor=GREY,
            height=0.6,
        )
        right.set_yticks(range(3), list(bars))
        right.invert_yaxis()
        right.set_xlim(0, 1)
        right.xaxis.set_major_formatter("{x:.0%}")

    return panel(
        compute,
        draw,
        text=_say_pruned,
        title="Prune mini-5m's attention",
        caption="Left: your setting with its 95 % interval; in grey the stored curves, of longer "
        "texts. Right: questions about package descriptions, and the 16 best keys of each query.",
        figsize=(6.4, 2.1),
        frames={"method": ["SpAtten, tokens averaged", "SpAtten, tokens summed", "Energon"]},
        predict=guess(
            "Tokens are dropped by their summed attention until a quarter is left in the last "
            "layer. What does the perplexity do?",
            ["better", "indistinguishable", "worse"],
            answer=lambda result: result.loss.outcome(),
            at={"method": "SpAtten, tokens summed", "keep": 0.25},
        ),
        ignored=lambda values: (
            {"keep": "Energon drops keys by alpha"}
            if values["method"] == "Energon"
            else {"alpha": "only Energon has a threshold"}
        ),
        method=knob(list(PRUNERS), default="SpAtten, tokens averaged"),
        keep=knob([1.0, 0.5, 0.25, 0.125], default=0.25, label="keep"),
        alpha=knob([0.0, 0.25, 0.5], default=0.0, label="alpha (Energon)"),
    )


def _say_pruned(result: Pruned) -> str:
    record, loss, choice = result.now.record, result.loss, result.choice
    ratios = [math.exp(v) for v in (loss.difference, loss.low, loss.high)]
    points = [100 * v for v in (choice.difference, choice.low, choice.high)]
    return "\n".join(
        [
            f"Pairs computed: {record.pair_share:.1%}",
            f"Values read: {record.value_share:.1%}",
            f"Best keys found: {record.recall:.1%}",
            f"Perplexity is: {loss.outcome()}, × {ratios[0]:.3g} (95 % interval × "
            f"{ratios[1]:.3g} to {ratios[2]:.3g}, {loss.count} documents)",
            f"Answers are: {choice.outcome(lower_is_better=False)}, {points[0]:+.1f} points "
            f"(95 % interval {points[1]:+.1f} to {points[2]:+.1f}, {choice.count} questions)",
            f"The original writes: {result.was.words} …",
            f"Now it writes: {result.now.words} …",
        ]
    ).replace(" -", " −")


# --- devices --------------------------------------------------------------------------------------


def devices(states: Float[Tensor, "groups tokens model"]) -> Panel:
    """Experts on more and more devices: who is wanted, and what the exchange takes."""

    def compute(devices: int, hidden: int, each: int, factor: float, link: str) -> Spread:
        return experts.spread(
            states, devices=devices, each=each, factor=factor, hidden=hidden, link=link
        )

    def draw(result: Spread, fig: Figure) -> None:
        left, right = fig.subplots(1, 2, width_ratios=[3, 2])
        load = sorted(result.routing.load, reverse=True)
        left.bar(range(len(load)), load, color=PALETTE[0], width=1.0)
        left.axhline(result.room, color=GREY, linestyle="--")
        left.set_xlabel("experts, the most wanted first")
        left.set_title("first choices; dashed: room")
        right.barh(
            (0, 1),
            (1e6 * result.compute, 1e6 * result.exchange),
            color=(PALETTE[2], PALETTE[1]),
            height=0.5,
        )
        right.set_yticks((0, 1), ["compute", "exchange"])
        right.invert_yaxis()
        right.set_xlabel("microseconds, by arithmetic")

    return panel(
        compute,
        draw,
        text=_say_spread,
        title="More devices, more experts",
        caption="Left: how many tokens want each expert, and how many it takes. Right: least times "
        "of one device, from an A100's data sheet and the rate of its link.",
        figsize=(6.4, 2.0),
        frames=[2, 32],
        predict=guess(
            "Each of 32 devices has two experts of width 2,048 and a link of 50 GB/s. How many "
            "times as long as the computation does the exchange take, at least?",
            answer=lambda result: round(result.ratio, 1),
            at={"devices": 32},
            unit="times",
        ),
        ignored=lambda values: (
            {"link": "one device sends nothing"} if values["devices"] == 1 else {}
        ),
        devices=knob([1, 2, 4, 8, 16, 32], default=2),
        hidden=knob([512, 2048, 8192], default=2048, label="width of an expert"),
        each=knob([1, 2, 4], default=2, label="experts per device"),
        factor=knob([0.5, 1.0, 1.25, 2.0], default=1.0, label="capacity factor"),
        link=knob(list(experts.LINKS), default="PCIe, 50 GB/s"),
    )


def _say_spread(result: Spread) -> str:
    routing = result.routing
    balance = routing.auxiliary_loss.item() * result.experts**2
    return "\n".join(
        [
            f"Experts: {result.experts}",
            f"Choices dropped: {routing.dropped_choices / (2 * result.tokens):.1%}",
            f"Tokens without any expert: {routing.lost_tokens / result.tokens:.1%}",
            f"Balance loss × experts²: {balance:.2f} (1 is balanced)",
            f"Sent by a device: {result.sent / 1024:.0f} KiB",
            f"Exchange / compute: {result.ratio:.2f}",
        ]
    )
