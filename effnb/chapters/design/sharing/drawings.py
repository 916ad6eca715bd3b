"""The pictures of the chapter on sharing, each with its caption and alternative text."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure

from effnb.chapters.design.sharing import methods, tables
from effnb.lab import PALETTE, figure
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.figures import CaptionedFigure

COLOURS = {"Perceiver": PALETTE[0], "Transformer": PALETTE[1]}
SHOWN = ("none", "three groups", "attention", "feed_forward", "all", "one layer")


@if_measured
def result(rows: Sequence[Row]) -> CaptionedFigure:
    """Loss over parameters, and loss over multiplications, of the same models."""
    names = [name for name in SHOWN if pick(rows, method=name)]
    points = {
        name: (
            pick(rows, method=name)[0]["parameters"] / 1e3,
            pick(rows, method=name)[0]["multiply_adds"] / 1e3,
            fmean(tables.losses(rows, name)),
        )
        for name in names
    }

    def draw(fig: Figure) -> None:
        panes = fig.subplots(1, 2, sharey=True)
        for column, (axes, label) in enumerate(
            zip(panes, ("thousand parameters", "thousand multiply-adds a token"), strict=True)
        ):
            for colour, (name, point) in zip(PALETTE * 2, points.items()):
                axes.plot(
                    point[column], point[2], "o", color=colour, markersize=9,
                    label=methods.NAMES[name],
                )  # fmt: skip
            axes.set_xlim(0, 1.12 * max(point[column] for point in points.values()))
            axes.set_xlabel(label)
        panes[0].set_ylabel("nats per token")
        handles, labels = panes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=3)

    return figure(
        draw,
        caption="Six ways to build one small language model, trained on the same "
        f"{rows[0]['training_tokens']:,} tokens; mean of "
        f"{len({row['seed'] for row in rows})} seeds. Left: loss over parameters, "
        "which sharing moves. Right: the same losses over multiplications, which it does not: all "
        "but the last have six layers to compute.",
        alt="; ".join(
            f"{methods.NAMES[name]}: {p:.0f} thousand parameters, {m:.0f} thousand multiply-adds, "
            f"{loss:.3f} nats"
            for name, (p, m, loss) in points.items()
        )
        + ".",
        figsize=(6.8, 3.0),
    )


@if_measured
def depth(rows: Sequence[Row]) -> CaptionedFigure:
    """What one more layer takes over the length of the input, and whole models of eight layers."""
    lengths = tables.lengths_of(rows)
    titles = {"depth": "one more layer", "whole": "the whole model, eight layers"}
    found = {
        (kind, name): [1e3 * tables.seconds_of(rows, kind, name, n) for n in lengths]
        for kind in methods.READERS
        for name in titles
    }

    def draw(fig: Figure) -> None:
        panes = fig.subplots(1, 2)
        for axes, (name, title) in zip(panes, titles.items(), strict=True):
            for kind in methods.READERS:
                axes.plot(lengths, found[kind, name], "o-", color=COLOURS[kind], label=kind)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
            axes.minorticks_off()
            axes.set_title(title)
            axes.set_xlabel("tokens of input")
        panes[0].set_ylabel("milliseconds")
        panes[1].legend()

    return figure(
        draw,
        caption=f"A Perceiver of {methods.READ_LATENTS} latents and a Transformer of the same "
        "width. Left: the time that each further layer takes. Right: whole models; a Perceiver "
        "still has to read its input once.",
        alt="; ".join(
            f"{kind}, {titles[name]}: "
            + ", ".join(f"{y:.2f} ms at {n:,}" for n, y in zip(lengths, times))
            for (kind, name), times in found.items()
        )
        + ".",
        figsize=(6.6, 2.6),
    )


@if_measured
def steps(rows: Sequence[Row]) -> CaptionedFigure:
    """Right digits over the steps that a trained model is given."""
    names = [n for n in ("halting", "six steps", "one step") if pick(rows, method=n)]
    curves = {}
    for name in names:
        found = pick(rows, method=name)
        counts = sorted(int(n) for n in found[0]["by_steps"])
        curves[name] = [(n, 100 * fmean(r["by_steps"][str(n)] for r in found)) for n in counts]

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for colour, (name, points) in zip(PALETTE, curves.items()):
            axes.plot(*zip(*points), "o-", color=colour, label=f"trained: {name}", markersize=5)
        axes.set_xlabel("steps at test time (with halting: at most)")
        axes.set_ylabel("right digits, per cent")
        axes.set_ylim(0, 104)
        axes.legend()

    return figure(
        draw,
        caption="Universal Transformers that add, run for other numbers of steps than they were "
        "trained for. One block of weights serves any number.",
        alt="; ".join(
            f"{name}: " + ", ".join(f"{y:.0f} % after {n}" for n, y in points)
            for name, points in curves.items()
        )
        + ".",
        figsize=(6.0, 2.6),
    )
