"""The panels of the chapter on context."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from effnb.chapters.design.context import methods, tables
from effnb.chapters.design.context.drawings import COLOURS
from effnb.lab import guess, knob, panel
from effnb.lab.bench import Bench
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.panels import Panel
from effnb.lab.texts import long_texts

LENGTHS = (512, 1024, 2048, 4096)
TIMES = {"about the same": 1.2, "up to twice": 2.0, "two to five times": 5.0,
         "more than five times": math.inf}  # fmt: skip
"""The choices of the guess, and where each ends."""


def times_choice(ratio: float) -> str:
    """The choice that a ratio of perplexities belongs to."""
    return next(words for words, end in TIMES.items() if ratio < end)


@if_measured
def reading(data: Row) -> Panel:
    """How far each method reads, from the stored curves."""
    width, trained = data["bin"], data["trained"]

    def compute(method: str, length: int) -> dict[str, Any]:
        curve = pick(data["table"], method=method)[0]["curve"][: length // width]
        inside = math.exp(tables.region(data, method, 0, trained))
        last = math.exp(sum(curve[-trained // width :]) / (trained // width))
        return {"method": method, "length": length, "curve": curve, "inside": inside, "last": last}

    def draw(found: Mapping[str, Any], fig: Figure) -> None:
        axes = fig.subplots()
        axes.axvspan(0, trained, color="0.92", zorder=0)
        places = [width * (i + 0.5) for i in range(len(found["curve"]))]
        axes.plot(places, [math.exp(x) for x in found["curve"]], color=COLOURS[found["method"]])
        everything = [math.exp(x) for row in data["table"] for x in row["curve"]]
        axes.set_ylim(0.9 * min(everything), 1.1 * max(everything))
        axes.set_yscale("log")
        ticks = [t for t in (50, 100, 200, 500, 1000) if min(everything) < t < max(everything)]
        axes.set_yticks(ticks, [f"{t:,}" for t in ticks])
        axes.minorticks_off()
        axes.set_xlim(0, tables.end_of(data))
        axes.set_xlabel("place in the text, tokens")
        axes.set_ylabel("perplexity")

    def text(found: Mapping[str, Any]) -> str:
        return "\n".join(
            [
                f"First {trained} tokens: {found['inside']:.1f}",
                f"Last {trained} of {found['length']:,} tokens: {found['last']:,.1f}",
                f"Times as much: {found['last'] / found['inside']:.2f}",
            ]
        )

    lengths = [n for n in LENGTHS if trained <= n <= tables.end_of(data)]
    return panel(
        compute,
        draw,
        text=text,
        title="How far does it read?",
        caption=f"Perplexity of {data['model']} by place. Grey: the length of its training texts. "
        "All methods have the scale 8; none is trained.",
        figsize=(6.4, 2.2),
        frames={"method": ["RoPE", "PI", "YaRN"], "length": [lengths[0], lengths[-1]]},
        predict=guess(
            f"A model has read nothing longer than {trained} tokens. What is its perplexity on the "
            f"last {trained} of {lengths[-1]:,}, compared with the first {trained}?",
            list(TIMES),
            answer=lambda found: times_choice(found["last"] / found["inside"]),
            at={"method": "RoPE", "length": lengths[-1]},
        ),
        method=knob(list(tables.ORDER), default="RoPE"),
        length=knob(lengths, default=lengths[-1], label="read up to token"),
    )


def live(bench: Bench, text: int = 0) -> Panel:
    """mini-5m reads a chapter with whatever frequencies the knobs make."""
    ids = long_texts(bench.tokenizer, max(LENGTHS))[text]
    known: list[methods.Reading] = []

    def compute(
        method: str, factor: int, length: int, alpha: float, beta: int, temperature: str, ramp: str
    ) -> dict[str, Any]:
        model = methods.longer(
            bench.model, method, float(factor), ramp=ramp, alpha=float(alpha), beta=float(beta),
            temperature=temperature, length=length,
        )  # fmt: skip
        if not known:  # once: later tokens do not change earlier losses
            plain = methods.longer(bench.model, "RoPE", 1.0, length=max(LENGTHS))
            known.append(methods.read(bench.model, plain, "RoPE", ids))
        found = methods.read(bench.model, model, method, ids[:length])
        return {"length": length, "reading": found, "plain": known[0]}

    def draw(
        found: Mapping[str, Any], fig: Figure, pinned: Mapping[str, Any] | None = None
    ) -> None:
        left, right = fig.subplots(1, 2, width_ratios=[2, 3])
        for one, style in ((pinned, "--"), (found, "-")):
            if one is None:
                continue
            how: methods.Reading = one["reading"]
            colour = COLOURS[how.method]
            left.plot(how.divisors, f"o{style}", color=colour, markersize=3)
            places = [methods.BIN * (i + 0.5) for i in range(len(how.curve))]
            right.plot(places, how.curve, style, color=colour)
        plain = found["plain"].curve[: len(found["reading"].curve)]
        places = [methods.BIN * (i + 0.5) for i in range(len(plain))]
        right.plot(places, plain, color="0.6", linewidth=1.5, label="as trained", zorder=1)
        right.legend(loc="upper left")
        left.set_xlabel("pair, fastest first")
        left.set_title("frequency divided by")
        left.set_ylim(0, 16.8)
        right.axvspan(0, methods.TRAINED, color="0.92", zorder=0)
        right.set_ylim(2.5, 7.5)
        right.set_xlabel("place in the text")
        right.set_title("nats per token")

    def text_of(found: Mapping[str, Any]) -> str:
        how: methods.Reading = found["reading"]
        end = found["length"]
        last = how.between(end - methods.TRAINED, end)
        lines = [
            f"First {methods.TRAINED} tokens: {how.between(0, methods.TRAINED):.3f} nats",
            f"Last {methods.TRAINED} tokens read: {last:.3f} nats, perplexity {math.exp(last):.1f}",
            f"As trained, there: {found['plain'].between(end - methods.TRAINED, end):.3f} nats",
            f"Queries and keys times: {how.temperature:.4f}",
            f"Slowest frequency divided by: {how.divisors[-1]:.3g}",
            f"Left alone: {sum(d < 1.001 for d in how.divisors)} of {len(how.divisors)} pairs",
        ]
        return "\n".join(lines)

    def ignored(values: Mapping[str, Any]) -> dict[str, str]:
        method = values["method"]
        unused = {
            "RoPE": ("factor", "alpha", "beta", "temperature", "ramp"),
            "PI": ("alpha", "beta", "temperature", "ramp"),
            "NTK-aware": ("alpha", "beta", "temperature", "ramp"),
            "NTK-by-parts": ("temperature",),
            "YaRN": (),
        }[method]
        return dict.fromkeys(unused, f"{method} does not use it")

    return panel(
        compute,
        draw,
        text=text_of,
        title="Stretch mini-5m",
        caption="Left: by what each frequency is divided. Right: the loss by place in one chapter; "
        "the grey band is the trained length, the grey curve the model as trained. Each point is "
        f"the mean of {methods.BIN} places.",
        figsize=(6.2, 2.2),
        main="factor",
        frames={"factor": [4, 16], "method": ["PI", "YaRN"]},
        predict=guess(
            "mini-5m is to read 2,048 tokens, four times its trained length. Which method has the "
            "lower loss on the last 512 of them, at s = 4, without training?",
            ["Position Interpolation", "YaRN"],
            answer=lambda found: better_of(bench, ids),
            at={"method": "YaRN", "factor": 4, "length": 2048},
        ),
        ignored=ignored,
        method=knob(list(tables.ORDER), default="YaRN"),
        factor=knob(1, 16, default=4, label="scale factor s"),
        length=knob(list(LENGTHS), default=2048, label="tokens read"),
        alpha=knob([0.25, 0.5, 1.0, 2.0, 4.0], default=1.0, label="α, rotations"),
        beta=knob([8, 16, 32, 64], default=32, label="β, rotations"),
        temperature=knob(list(methods.TEMPERATURES), label="√(1/t)"),
        ramp=knob(["code", "paper"]),
    )


def better_of(bench: Bench, ids: Any) -> str:
    """Which of two methods reads the end of four times the trained length with the lower loss."""
    end = 4 * methods.TRAINED
    loss = {}
    for name, method in (("Position Interpolation", "PI"), ("YaRN", "YaRN")):
        model = methods.longer(bench.model, method, 4.0)
        found = methods.read(bench.model, model, method, ids[:end])
        loss[name] = found.between(end - methods.TRAINED, end)
    return min(loss, key=lambda name: loss[name])
