"""The pictures of the chapter on attention, each with its caption and alternative text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from effnb.chapters.design.attention import forms, tables
from effnb.chapters.design.attention.streaming import EVERYTHING
from effnb.design.attention import (
    bigbird_pattern,
    etc_pattern,
    share_of_dense,
    window_pattern,
)
from effnb.lab import PALETTE, figure, name_lines
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.figures import CaptionedFigure

FORM_COLOURS = {
    "full, fused": PALETTE[5],
    "full, with a table": "0.6",
    "window": PALETTE[0],
    "window and global": PALETTE[2],
    "ETC": PALETTE[3],
    "BigBird": PALETTE[1],
    "LSH": PALETTE[4],
    "Linformer": "0.35",
    "Performer": PALETTE[6],
    "linear": "#8A5A2B",
}
RULE_COLOURS = {
    "quantization": PALETTE[0],
    "clustering": PALETTE[2],
    "distance": PALETTE[3],
    "window": PALETTE[1],
    "random": "0.6",
}


# --- a cache that forgets -------------------------------------------------------------------------


def places_of(data: Row, window: int | str, sinks: int) -> tuple[list[float], list[float]]:
    """Middles of the bins, and perplexities."""
    curve = tables.curve_of(data, window, sinks)
    return [data["bin"] * (i + 0.5) for i in range(len(curve))], [math.exp(x) for x in curve]


@if_measured
def result(real: Row, mini: Row) -> CaptionedFigure:
    """What happens when the first tokens leave a cache, and what four of them mend."""
    window = next(row["window"] for row in real["table"] if row["window"] != EVERYTHING)
    largest = max(row["window"] for row in mini["table"] if row["window"] != EVERYTHING)
    shown = (
        (real, [(window, 0), (window, 4), (EVERYTHING, 0)]),
        (mini, [(EVERYTHING, 0), (largest, 0), (largest, 4)]),
    )

    def draw(fig: Figure) -> None:
        for axes, (data, caches) in zip(fig.subplots(1, 2), shown, strict=True):
            for cache in caches:
                axes.plot(
                    *places_of(data, *cache), color=cache_colour(*cache),
                    label=tables.label(*cache), linewidth=2.6 if cache[1] else 1.8,
                )  # fmt: skip
            small = [c for c in caches if c[0] != EVERYTHING]
            axes.axvline(small[0][0], color="0.7", linestyle=":")
            axes.set_yscale("log")
            axes.set_title(data["model"])
            axes.set_xlabel("place in the text, tokens")
        fig.axes[0].set_ylabel("perplexity")
        handles, labels = fig.axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=3)

    return figure(
        draw,
        caption="A text that is read token by token through a KV cache. Dotted: where the small "
        f"cache is full. Left: {real['model']}, whose first tokens leave its cache there, or do "
        f"not. Right: {mini['model']}, beyond the {mini['trained']} tokens it was trained on.",
        alt=f"{tables.sinks_said(real)} {tables.mini_said(mini)}",
        figsize=(6.8, 2.8),
    )


def cache_colour(window: int | str, sinks: int) -> str:
    """One colour for each kind of cache."""
    if window == EVERYTHING:
        return "0.55"
    return PALETTE[0] if sinks else PALETTE[1]


# --- who sees whom --------------------------------------------------------------------------------


def masks(tokens: int = 48) -> CaptionedFigure:
    """The patterns that the chapter is about, as tables of pairs."""
    shown = {
        "causal": window_pattern(tokens, tokens, causal=True),
        "window": window_pattern(tokens, 8, causal=True),
        "window, sinks": window_pattern(tokens, 8, causal=True, global_tokens=4),
        "window, global": window_pattern(tokens, 8, global_tokens=2),
        "ETC": etc_pattern(6, tokens - 6, 3),
        "BigBird": bigbird_pattern(tokens, block=3, random=2)[0],
    }

    def draw(fig: Figure) -> None:
        for axes, (name, pattern) in zip(fig.subplots(1, len(shown)), shown.items(), strict=True):
            grid(axes, pattern)
            axes.set_title(name, fontsize=9)

    shares = "; ".join(f"{name}: {share_of_dense(x):.0%} of all pairs" for name, x in shown.items())
    return figure(
        draw,
        caption=f"Who sees whom among {tokens} tokens: rows are queries, columns keys. The first "
        "three are for models that write, the others for encoders.",
        alt=f"Six square patterns. {shares}.",
        figsize=(7.0, 1.5),
    )


def grid(axes: Axes, pattern: Tensor) -> None:
    """One pattern of pairs."""
    axes.imshow(~pattern, cmap="gray", vmin=-0.35, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


# --- costs ----------------------------------------------------------------------------------------

SHOWN = ("full, with a table", "full, fused", "window", "ETC", "BigBird", "LSH", "Performer")


@if_measured
def growth(rows: Sequence[Row]) -> CaptionedFigure:
    """Measured time and memory over the length."""

    def draw(fig: Figure) -> None:
        left, right = fig.subplots(1, 2)
        for method in SHOWN:
            found = sorted(pick(rows, method=method), key=lambda row: row["tokens"])
            x = [row["tokens"] for row in found]
            options = dict(color=FORM_COLOURS[method], label=method, markersize=3)
            left.plot(x, [1e3 * tables.seconds_of(rows, method, t) for t in x], "o-", **options)
            right.plot(x, [row["peak_bytes"] / 2**20 for row in found], "o-", **options)
        for axes, title in ((left, "time, ms"), (right, "memory, MiB")):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks(tables.lengths_of(rows), [f"{t:,}" for t in tables.lengths_of(rows)])
            axes.minorticks_off()
            axes.set_xlabel("tokens")
            axes.set_title(title)
        name_lines(right)

    long = tables.lengths_of(rows)[-1]
    times = {m: tables.seconds_of(rows, m, long) for m in SHOWN}
    return figure(
        draw,
        caption="Measured time and memory of four heads over the length, one thread. Both axes are "
        "logarithmic: a line of slope 1 is linear cost, slope 2 quadratic.",
        alt=f"At {long:,} tokens, milliseconds: "
        + "; ".join(f"{m} {1e3 * t:.0f}" for m, t in times.items() if t is not None)
        + ".",
        figsize=(7.2, 2.7),
    )


# --- error ----------------------------------------------------------------------------------------


def error_axes(axes: Axes, found: Mapping[str, Mapping[int, float]], chosen: str) -> None:
    """Distance from exact attention over the budget, one form of all in colour."""
    for name, values in found.items():
        own = name == chosen
        axes.plot(
            list(values),
            list(values.values()),
            "o-",
            color=FORM_COLOURS[name] if own else "0.82",
            zorder=3 if own else 1,
            markersize=4 if own else 2,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(forms.BUDGETS, [str(b) for b in forms.BUDGETS])
    axes.set_ylim(0, 1.8)
    axes.set_xlabel("keys, mixed keys or features")


# --- recurrence -----------------------------------------------------------------------------------


@if_measured
def places(rows: Sequence[Row]) -> CaptionedFigure:
    """The loss inside a segment, place by place, with and without a memory."""
    shown = {("none", "none"): "no memory", ("memory", "memory"): "memory of 64"}
    curves = {
        words: [
            fmean(values)
            for values in zip(*(r["places"] for r in pick(rows, trained=key[0], read=key[1])))
        ]
        for key, words in shown.items()
    }

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for (words, curve), colour in zip(curves.items(), (PALETTE[1], PALETTE[0])):
            x = [4 * i + 2 for i in range(len(curve))]
            axes.plot(x, curve, "o-", color=colour, label=words, markersize=4)
        axes.set_xlabel("place inside the segment, characters")
        axes.set_ylabel("nats per character")
        name_lines(axes)

    return figure(
        draw,
        caption="Small models of characters, trained alike. Without a memory, every segment begins "
        "in the dark; means over seeds and chapters.",
        alt="; ".join(
            f"{words}: {c[0]:.2f} on the first four characters, {c[-1]:.2f} on the last four"
            for words, c in curves.items()
            if c
        )
        + ".",
        figsize=(5.0, 1.9),
    )


# --- predicted pairs ------------------------------------------------------------------------------


def curve_axes(axes: Axes, curves: Mapping[str, Sequence[tuple[float, float, float]]]) -> None:
    """Recall over sparsity of each rule."""
    for rule, points in curves.items():
        x, y = [100 * p[2] for p in points], [100 * p[1] for p in points]
        axes.plot(x, y, "o-", color=RULE_COLOURS[rule], label=rule, markersize=3)
    axes.set_xlim(0, 102)
    axes.set_ylim(0, 102)
    axes.set_xlabel("pairs left out, %")


@if_measured
def recall(rows: Sequence[Row]) -> CaptionedFigure:
    """Stored curves of the two models."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    found = {model: tables.recall_curves(rows, model) for model in models}

    def draw(fig: Figure) -> None:
        panes = fig.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axes, (model, curves) in zip(panes, found.items(), strict=True):
            curve_axes(axes, curves)
            axes.set_title(model)
        panes[0].set_ylabel("pairs in use that are found, %")
        panes[-1].legend(loc="lower left", fontsize=8)

    return figure(
        draw,
        caption="Recall over sparsity on a held-out novel, means over seeds, texts, heads and two "
        "layers. All rules are given a window of three tokens and the first token besides.",
        alt=tables.patterns_said(rows),
        figsize=(6.8, 2.7),
    )
