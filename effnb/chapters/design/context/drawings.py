"""The pictures of the chapter on context, each with its caption and alternative text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure

from effnb.chapters.design.context import tables
from effnb.design.context import code_ramp, paper_ramp, rope_frequencies, rotations
from effnb.lab import PALETTE, figure, name_lines
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.figures import CaptionedFigure

COLOURS = {
    "RoPE": PALETTE[1],
    "PI": PALETTE[4],
    "NTK-aware": PALETTE[3],
    "NTK-by-parts": PALETTE[2],
    "YaRN": PALETTE[0],
    "larger base": PALETTE[3],
}


@if_measured
def result(data: Row) -> CaptionedFigure:
    """The same weights as trained and with YaRN, place by place."""
    end, trained, width = tables.end_of(data), data["trained"], data["bin"]
    shown = {"RoPE": "as trained", "YaRN": "after one line"}
    curves = {m: [math.exp(x) for x in pick(data["table"], method=m)[0]["curve"]] for m in shown}
    places = [width * (i + 0.5) for i in range(end // width)]

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        axes.axvspan(0, trained, color="0.92", zorder=0)
        for method, label in shown.items():
            axes.plot(places, curves[method], color=COLOURS[method], label=label, linewidth=2.8)
        axes.set_yscale("log")
        ticks = [t for t in (20, 50, 100, 200, 500, 1000) if t < 1.3 * max(curves["RoPE"])]
        axes.set_yticks(ticks, [f"{t:,}" for t in ticks])
        axes.minorticks_off()
        axes.set_xlim(0, end)
        axes.set_xticks([0, *(trained * 2**i for i in range(1, 4)), trained], minor=False)
        axes.set_xticklabels(["0", *(f"{trained * 2**i:,}" for i in range(1, 4)), f"{trained}"])
        axes.set_xlabel("place in the text, tokens (grey: the length of all training texts)")
        axes.set_ylabel("perplexity")
        name_lines(axes)

    return figure(
        draw,
        caption=f"{data['model']} reads {data['chapters']} chapters of a novel that it has never "
        "seen. Nothing was trained between the two curves.",
        alt=f"Perplexity over the place in the text. Within the first {trained} tokens it is "
        f"{math.exp(tables.region(data, 'RoPE', 0, trained)):.0f} as trained and "
        f"{math.exp(tables.region(data, 'YaRN', 0, trained)):.0f} with YaRN; in the last {trained} "
        f"of {end} tokens {math.exp(tables.region(data, 'RoPE', end - trained, end)):.0f} and "
        f"{math.exp(tables.region(data, 'YaRN', end - trained, end)):.0f}.",
        figsize=(6.8, 2.9),
    )


def slowest_angle(head_dim: int = 32, trained: int = 512, end: int = 2048) -> CaptionedFigure:
    """The angles that three pairs of a head take, inside the trained length and beyond."""
    theta = rope_frequencies(head_dim)
    places = torch.arange(0, end, 4)
    turns = rotations(theta, trained)
    nearest = min(range(len(theta)), key=lambda i: abs(float(turns[i]) - 2.5))
    last = int((turns > 0.25).sum()) - 1
    shown = (nearest, last)

    def draw(fig: Figure) -> None:
        panes = fig.subplots(1, 2)
        for axes, i in zip(panes, shown, strict=True):
            for s, colour, label in ((1, PALETTE[1], "as trained"), (4, PALETTE[0], "s = 4")):
                axes.plot(places, torch.sin(places * theta[i] / s), color=colour, label=label)
            axes.axvspan(0, trained, color="0.9", zorder=0)
            axes.set_title(f"pair {i}: {float(turns[i]):.1f} rotations")
            axes.set_xlabel("position")
        panes[0].set_ylabel("sine of the angle")
        handles, labels = panes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=2)

    return figure(
        draw,
        caption=f"Two of the {len(theta)} pairs of a head of {head_dim}. Grey: the trained length. "
        "A pair that rotates several times there has shown all its angles; a slower one goes on to "
        "angles that no training text has shown. Divided by 4, it stays among those it knows.",
        alt=f"Pair {nearest} makes {float(turns[nearest]):.1f} rotations within {trained} tokens, "
        f"pair {last} {float(turns[last]):.2f}, so that beyond them it meets new angles. Divided "
        "by 4, both reach only angles of the trained length.",
        figsize=(5.8, 2.1),
    )


def spectrum(found: Mapping[str, Sequence[float]], factor: float) -> CaptionedFigure:
    """By what each frequency is divided, method by method."""

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for method, divisors in found.items():
            style = "--" if method == "YaRN, paper's ramp" else "o-"
            axes.plot(
                divisors, style, color=COLOURS.get(method, PALETTE[5]), label=method, markersize=4
            )
        axes.set_xlabel("pair of a head, from the fastest to the slowest")
        axes.set_ylabel("frequency divided by")
        name_lines(axes)

    return figure(
        draw,
        caption=f"The frequency spectrum before and after, mini-5m at s = {factor:.0f}: by what "
        "the frequency of each pair is divided. YaRN has the frequencies of NTK-by-parts.",
        alt="; ".join(
            f"{name}: {d[0]:.2f} at the fastest pair, {d[len(d) // 2]:.2f} in the middle, "
            f"{d[-1]:.2f} at the slowest"
            for name, d in found.items()
        )
        + ".",
        figsize=(6.6, 2.8),
    )


def ramps(head_dim: int = 64, trained: int = 2048) -> CaptionedFigure:
    """The two ramps of NTK-by-parts over the pairs of a head."""
    theta = rope_frequencies(head_dim)
    found = {"the paper's": paper_ramp(theta, trained), "the code's": code_ramp(theta, trained)}
    gap = (found["the code's"] - found["the paper's"]).abs()
    at = int(gap.argmax())

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for (name, gamma), colour in zip(found.items(), (PALETTE[1], PALETTE[0])):
            axes.plot(gamma.tolist(), "o-", color=colour, label=name, markersize=4)
        axes.set_xlabel("pair of a head")
        axes.set_ylabel("γ")
        name_lines(axes)

    a, b = (float(gamma[at]) for gamma in found.values())
    return figure(
        draw,
        caption=f"The two ramps, for heads of {head_dim} and L = {trained:,}: 1 leaves a frequency "
        "alone, 0 divides it by s.",
        alt=f"Both fall from 1 to 0. They differ most at pair {at}: {a:.2f} in the paper, {b:.2f} "
        "in the code.",
        figsize=(5.6, 2.3),
    )


@if_measured
def recall(data: Row) -> CaptionedFigure:
    """A heat map for each method: right answers by depth and length."""
    rows, trials = data["table"], data["trials"]
    lengths, depths = data["lengths"], data["depths"]

    def draw(fig: Figure) -> None:
        panes = fig.subplots(1, len(rows), sharey=True)
        for axes, row in zip(panes, rows, strict=True):
            grid = [[100 * c / trials for c in line] for line in row["correct"]]
            shown = list(map(list, zip(*grid)))
            axes.imshow(shown, vmin=0, vmax=100, aspect="auto", origin="upper")
            for x, line in enumerate(grid):
                for y, value in enumerate(line):
                    axes.text(
                        x, y, f"{value:.0f}", ha="center", va="center", fontsize=9,
                        color="black" if value > 50 else "white",
                    )  # fmt: skip
            inside = sum(length <= data["trained"] for length in lengths)
            axes.axvline(inside - 0.5, color="white", linewidth=2.5, linestyle="--")
            axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
            axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
            axes.set_title(row["method"])
            axes.set_xlabel("tokens")
        panes[0].set_ylabel("told at (0 %: far away)")

    return figure(
        draw,
        caption=f"{data['model']}: right answers, per cent of {trials}, when a value was told once "
        "and is asked for at the end. Right of the dashed line the prompt is longer than any that "
        "the model was trained on.",
        alt="; ".join(
            f"{row['method']}: "
            + ", ".join(
                f"{sum(line) / (trials * len(line)):.0%} at {length}"
                for length, line in zip(lengths, row["correct"])
            )
            for row in rows
        )
        + " tokens, over all depths.",
        figsize=(6.0, 2.2),
    )


@if_measured
def factors(data: Row) -> CaptionedFigure:
    """The loss over the scale, inside the trained length and at four times it."""
    shown = [m for m in tables.ORDER[1:] if pick(data["table"], method=m)]
    curves = {
        (m, key): [(row["factor"], row[key]) for row in pick(data["table"], method=m)]
        for m in shown
        for key in ("near", "far")
    }

    def draw(fig: Figure) -> None:
        panes = fig.subplots(1, 2, sharey=True)
        titles = {"near": "512 tokens of context", "far": f"{data['length']:,} tokens of context"}
        for axes, (key, title) in zip(panes, titles.items(), strict=True):
            for method in shown:
                axes.plot(*zip(*curves[method, key]), "o-", color=COLOURS[method], label=method,
                          markersize=4)  # fmt: skip
            axes.set_title(title)
            axes.set_xlabel("scale factor s")
        panes[0].set_ylabel("nats per token")
        panes[1].legend()

    return figure(
        draw,
        caption=f"{data['model']} on the same tokens, over the scale: what a scale costs inside "
        "the trained length (left) and what it is worth at four times the length (right).",
        alt="; ".join(
            f"{m} with {'512' if key == 'near' else data['length']} tokens: "
            + ", ".join(f"{y:.2f} at {x:.0f}" for x, y in points)
            for (m, key), points in curves.items()
        )
        + ".",
        figsize=(6.8, 2.7),
    )


@if_measured
def smollm2(data: Row) -> CaptionedFigure:
    """SmolLM2's loss by place, past the length it was trained on."""
    width, trained = data["bin"], data["trained"]

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        axes.axvspan(0, trained, color="0.92", zorder=0)
        for row in data["table"]:
            places = [width * (i + 0.5) for i in range(len(row["curve"]))]
            axes.plot(places, row["curve"], "o-", color=COLOURS[row["method"]],
                      label=row["method"], markersize=3)  # fmt: skip
        axes.set_xlabel("place in the text, tokens (grey: the trained length)")
        axes.set_ylabel("nats per token")
        name_lines(axes)

    return figure(
        draw,
        caption="SmolLM2-135M on one text longer than any that it was trained on.",
        alt=tables.smollm2_said(data),
        figsize=(6.6, 2.6),
    )
