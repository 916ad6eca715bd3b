"""The pictures of the chapter on retention, each with its caption and alternative text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from matplotlib.figure import Figure
from torch import Tensor

from effnb.chapters.design.retention import methods, tables
from effnb.design.retention import RetNetLM
from effnb.lab import PALETTE, figure, name_lines
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.figures import CaptionedFigure

COLOURS = dict(zip(("RetNet", "Transformer", "RWKV", "Hyena", "GLA"), PALETTE))
SHORT = {"Transformer, standard": "standard", "Transformer, FlashAttention": "Flash"}
LINES = {
    "Transformer, standard": (COLOURS["Transformer"], ":"),
    "Transformer, FlashAttention": (COLOURS["Transformer"], "-"),
}


def kept(read: Mapping[str, Sequence[tuple[int, int]]], words: Sequence[str]) -> CaptionedFigure:
    """Bytes kept of a text while two models write it.

    Args:
        read: For each model, tokens written and bytes kept.
        words: What stands in the text at a few evenly spread places, the first at its beginning.
    """
    last = max(tokens for tokens, _ in next(iter(read.values())))

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for (name, points), colour in zip(read.items(), (PALETTE[1], PALETTE[0])):
            x, y = zip(*points)
            y = [value / 1e3 for value in y]
            axes.fill_between(x, y, color=colour, alpha=0.15, linewidth=0)
            axes.plot(x, y, color=colour, label=name, linewidth=3)
            axes.annotate(
                tables.amount(points[-1][1]), (x[-1], y[-1]), (-8, 8), ha="right", color=colour,
                textcoords="offset points", weight="bold",
            )  # fmt: skip
        for i, said in enumerate(words):
            axes.text(
                last * i / len(words), -0.32, f"… {said} …", transform=axes.get_xaxis_transform(),
                fontsize=8, style="italic", color="0.35", va="top",
            )  # fmt: skip
        axes.set_xlim(0, last)
        axes.set_ylim(0)
        axes.set_xlabel("tokens written")
        axes.set_ylabel("kept of them, kB")
        name_lines(axes)

    ends = "; ".join(
        f"{name}: {tables.amount(points[0][1])} after {points[0][0]} tokens and "
        f"{tables.amount(points[-1][1])} after {points[-1][0]:,}"
        for name, points in read.items()
    )
    return figure(
        draw,
        caption="Two trained models of equal size write the same text. What each keeps of it in "
        "order to go on; below, the text itself.",
        alt=f"One line rises without end, the other is flat. {ends}.",
        figsize=(6.2, 2.5),
    )


@if_measured
def decoding(rows: Sequence[Row]) -> CaptionedFigure:
    """Bytes kept and time of a step over the length of what was read."""
    lengths = sorted({row["tokens"] for row in rows})
    bytes_ = {
        m: [pick(rows, method=m, tokens=t)[0]["state_bytes"] for t in lengths]
        for m in methods.METHODS
    }
    times = {
        m: [tables.milliseconds(rows, method=m, tokens=t) for t in lengths] for m in methods.METHODS
    }

    def draw(fig: Figure) -> None:
        left, right = fig.subplots(1, 2)
        for method in methods.METHODS:
            about = {"color": COLOURS[method], "markersize": 3, "linewidth": 1.8}
            about["zorder"] = 3 if method == "Transformer" else 2
            line = "o--" if method == "Transformer" else "o-"
            left.plot(lengths, bytes_[method], line, **about)
            right.plot(lengths, times[method], line, label=method, **about)
        for axes, said in ((left, "bytes kept"), (right, "milliseconds for a token")):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks([64, 512, 4096], ["64", "512", "4,096"])
            axes.set_xlabel("tokens read")
            axes.set_title(said)
        right.legend()

    return figure(
        draw,
        caption="Models of mini-1m's size: what they keep of a text, and the processor's time to "
        "write its next token. Both axes are logarithmic.",
        alt="; ".join(
            f"{m}: {tables.amount(bytes_[m][0])} and {times[m][0]:.1f} ms after {lengths[0]} "
            f"tokens, {tables.amount(bytes_[m][-1])} and {times[m][-1]:.1f} ms after "
            f"{lengths[-1]:,}"
            for m in methods.METHODS
        )
        + ".",
        figsize=(5.6, 2.2),
    )


@if_measured
def latency(rows: Sequence[Row]) -> CaptionedFigure:
    """A step over the batch."""
    batches = sorted({row["batch"] for row in rows})
    tokens = next(row["tokens"] for row in rows if row["batch"] == batches[-1])
    times = {
        m: [tables.milliseconds(rows, method=m, batch=b, tokens=tokens) for b in batches]
        for m in ("RetNet", "Transformer")
    }

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for method, y in times.items():
            axes.plot(batches, y, "o-", color=COLOURS[method], label=method, markersize=4)
        axes.set_xticks(batches, [str(b) for b in batches])
        axes.set_ylim(0)
        axes.set_xlabel(f"texts at once, {tokens:,} tokens each")
        axes.set_ylabel("ms for a step")
        axes.legend()

    return figure(
        draw,
        caption="The processor's time of a step in which every text gets its next token.",
        alt="; ".join(
            f"{m}: " + ", ".join(f"{y:.1f} ms for {b}" for b, y in zip(batches, found))
            for m, found in times.items()
        )
        + ".",
        figsize=(3.8, 1.7),
    )


@if_measured
def training(rows: Sequence[Row]) -> CaptionedFigure:
    """Time and memory of a training step over the length of the text."""
    names = list(dict.fromkeys(row["method"] for row in rows))

    def curve(name: str, key: str) -> list[tuple[int, float]]:
        found = [row for row in pick(rows, method=name) if key in row]
        scale = 1 if key == "seconds" else 1e-6
        return [
            (r["tokens"], scale * (median(r[key]) if key == "seconds" else r[key])) for r in found
        ]

    def draw(fig: Figure) -> None:
        panes = fig.subplots(1, 2)
        for axes, key, title in zip(
            panes, ("seconds", "peak_bytes"), ("seconds", "largest memory, MB"), strict=True
        ):
            for name in names:
                colour, line = LINES.get(name, (COLOURS.get(name), "-"))
                axes.plot(
                    *zip(*curve(name, key)), line, marker="o", color=colour,
                    label=SHORT.get(name, name), markersize=3, linewidth=1.8,
                )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks([512, 2048, 8192], ["512", "2,048", "8,192"])
            axes.set_xlabel("tokens of the text")
            axes.set_title(title)
        panes[1].set_xlim(right=2**14)  # room for the names
        panes[1].legend(fontsize=7, loc="lower right")

    return figure(
        draw,
        caption="A training step of models of mini-1m's size, without the output head: the "
        "processor's time, and the most that its tensors hold at one time. “Standard” and “Flash” "
        "are the Transformer without and with FlashAttention.",
        alt="; ".join(
            f"{name}: "
            + ", ".join(f"{y:.2f} s at {x:,}" for x, y in curve(name, "seconds"))
            + " tokens"
            for name in names
        )
        + ".",
        figsize=(5.8, 2.4),
    )


@if_measured
def positions(rows: Sequence[Row]) -> CaptionedFigure:
    """Loss by place, behind the length of training too."""

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for row in rows:
            width = 2048 // len(row["losses"])
            x = [width * (i + 0.5) for i in range(len(row["losses"]))]
            method = {"mini": "Transformer", "retnet": "RetNet", "rwkv": "RWKV"}
            colour = COLOURS[method[row["model"].split("-")[0]]]
            axes.plot(x, row["losses"], "o-", color=colour, label=row["model"], markersize=3)
        axes.axvline(512, color="0.45", linestyle=":")
        axes.set_xlabel("place in the text, tokens")
        axes.set_ylabel("nats per token")
        axes.legend()

    return figure(
        draw,
        caption="Loss by place in chapters of a held-out novel. Dotted: the length of the texts "
        "that the models were trained on.",
        alt="; ".join(
            f"{row['model']}: {row['losses'][0]:.2f} at the start, {row['losses'][3]:.2f} before "
            f"512 tokens, {row['losses'][-1]:.2f} before 2,048"
            for row in rows
        )
        + ".",
        figsize=(4.2, 1.8),
    )


SCALES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""Factors of the values, of an untrained layer, at which the trap is looked at."""


def disagreements(model: RetNetLM, x: Tensor) -> dict[str, list[float]]:
    """The largest difference of parallel and chunkwise outputs after the norm, by the scale."""
    settings = {
        "as published": {"normalize": "absolute", "epsilon": 1e-6},
        "as published, ε = 10⁻³⁰": {"normalize": "absolute", "epsilon": 1e-30},
        "not normalized": {"normalize": None, "epsilon": 1e-6},
    }
    found: dict[str, list[float]] = {}
    for name, about in settings.items():
        found[name] = []
        for scale in SCALES:
            out = methods.normalized_outputs(model, x, scale=scale, **about)
            found[name].append(float((out["parallel"] - out["chunkwise"]).abs().max()))
    return found


def trap(model: RetNetLM, x: Tensor) -> CaptionedFigure:
    """How far the published forms lie apart, over the size of the layer's outputs."""
    found = disagreements(model, x)

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for (name, values), colour, line in zip(
            found.items(), (PALETTE[1], PALETTE[4], PALETTE[0]), ("-", "--", "-")
        ):
            shown = [max(value, 1e-17) for value in values]
            axes.plot(
                SCALES,
                shown,
                line,
                marker="o",
                color=colour,
                label=SHORT.get(name, name),
                markersize=4,
            )
        axes.axvline(1, color="0.45", linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("size of the values, as initialized = 1")
        axes.set_ylabel("largest difference")
        name_lines(axes)

    return figure(
        draw,
        caption="One untrained layer on real text, in float64: the largest difference of the "
        "parallel and the chunkwise form, after the norm of the heads.",
        alt="; ".join(
            f"{name}: " + ", ".join(f"{y:.1e} at {x:g}" for x, y in zip(SCALES, values))
            for name, values in found.items()
        )
        + ".",
        figsize=(5.0, 1.9),
    )
