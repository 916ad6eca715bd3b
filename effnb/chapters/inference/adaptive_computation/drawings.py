"""The pictures of the chapter on adaptive computation, with captions and alternative text."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from effnb.chapters.inference.adaptive_computation import methods, tables
from effnb.inference.adaptive_computation import calm, speculative
from effnb.lab import PALETTE, figure, name_lines
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.figures import CaptionedFigure

WIDTH = 78
"""Letters in a line of shaded text."""
COLOURS = {"softmax": PALETTE[0], "saturation": PALETTE[1], "classifier": PALETTE[2]}


def shade(layer: int, layers: int) -> tuple[float, float, float, float]:
    """The colour of a layer: pale for the first, dark for the last."""
    return colormaps["YlGnBu"](0.05 + 0.9 * (layer - 1) / max(1, layers - 1))


def lines_of(
    pieces: Sequence[tuple[str, int]], width: int = WIDTH
) -> list[list[tuple[int, str, int]]]:
    """Where each token goes: lines of (column, text, layer); a token is not broken."""
    lines: list[list[tuple[int, str, int]]] = [[]]
    column = 0
    for text, layer in pieces:
        if column + len(text) > width:
            lines.append([])
            column = 0
        lines[-1].append((column, text, layer))
        column += len(text)
    return lines


def draw_text(
    axes: Axes, pieces: Sequence[tuple[str, int]], layers: int, top: float, width: int = WIDTH
) -> float:
    """Tokens on the shade of the layer they left at; layer 0 (a prompt) has none.

    Returns:
        The height below the last line.
    """
    for line in lines_of(pieces, width):
        for column, text, layer in line:
            dark = layer > 0.6 * layers
            if layer:
                box = Rectangle((column, top - 0.82), len(text), 0.9, color=shade(layer, layers))
                axes.add_patch(box)
            for i, letter in enumerate(text):
                axes.text(
                    column + i + 0.5,
                    top - 0.37,
                    letter,
                    color="white" if dark else "black",
                    family="DejaVu Sans Mono",
                    fontsize=8,
                    ha="center",
                    va="center",
                )
        top -= 1.0
    return top


def key(axes: Axes, layers: int, top: float) -> None:
    """What the shades mean."""
    axes.text(0, top - 0.4, "left at layer", fontsize=8, va="center", color="0.25")
    for layer in range(1, layers + 1):
        draw_text(axes, [], layers, top)
        x = 12 + 4 * layer
        axes.add_patch(Rectangle((x, top - 0.82), 3.4, 0.9, color=shade(layer, layers)))
        axes.text(
            x + 1.7,
            top - 0.37,
            str(layer),
            color="white" if layer > 0.6 * layers else "black",
            fontsize=8,
            ha="center",
            va="center",
        )


def prepare(axes: Axes, rows: float) -> None:
    """Letters as units, no frame."""
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(-rows, 0.2)
    axes.axis("off")


def pieces_of(writer: methods.Writer, text: calm.EarlyText) -> list[tuple[str, int]]:
    """The prompt without shade, and each token with the layer it left at."""
    return [(writer.prompt, 0), *zip(writer.pieces(text.tokens), text.layers, strict=True)]


def texts(writer: methods.Writer, thresholds: Sequence[float]) -> CaptionedFigure:
    """The same beginning, continued at several thresholds."""
    found = [(at, writer.write(at)) for at in thresholds]
    blocks = [(at, one, pieces_of(writer, one)) for at, one in found]
    rows = 1.4 + sum(1.6 + len(lines_of(pieces)) for _, _, pieces in blocks)

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        prepare(axes, rows)
        key(axes, writer.stack.count, 0)
        top = -1.4
        for at, one, pieces in blocks:
            words = "all layers" if at >= 1 else f"threshold {at:g}"
            axes.text(
                0,
                top - 0.4,
                f"{words}: {one.mean_layers:.1f} layers per token",
                fontsize=8.5,
                va="center",
                weight="bold",
            )
            top = draw_text(axes, pieces, one.of, top - 1.0) - 0.6

    return figure(
        draw,
        caption=f"What {writer.bench.name} writes after “{writer.prompt}”, each token on the shade "
        "of the layer that it left at. A token leaves as soon as a layer's lead of the most "
        "probable token over the second reaches the threshold.",
        alt=" ".join(
            f"Threshold {at:g}, {one.mean_layers:.1f} layers per token: “"
            + "".join(text for text, _ in pieces)
            + f"”; layers {', '.join(map(str, one.layers))}."
            for at, one, pieces in blocks
        ),
        figsize=(6.8, 0.2 + 0.185 * rows),
    )


@if_measured
def curves(rows: Sequence[Row], model: str = tables.EXITS) -> CaptionedFigure:
    """Loss, and how often the word is the full model's, over layers for each measure."""
    panes = {"loss": "nats per token", "agrees": "same word as all layers"}

    def points(measure: str, key: str) -> list[tuple[float, float]]:
        found = pick(rows, model=model, measure=measure)
        return sorted((row["layers"], row[key]) for row in found)

    def fixed(key: str) -> list[tuple[float, float]]:
        return [(row["exit"], row[key]) for row in rows if row["model"] == model and "exit" in row]

    def draw(fig: Figure) -> None:
        for axes, (key_, label) in zip(fig.subplots(1, 2), panes.items(), strict=True):
            axes.plot(
                *zip(*fixed(key_)), "s:", color="0.45", label="one exit for all", markersize=4
            )
            for measure, colour in COLOURS.items():
                axes.plot(
                    *zip(*points(measure, key_)), "o-", color=colour, label=measure, markersize=3
                )
            oracle = pick(rows, model=model, measure="oracle")[0]
            axes.plot([oracle["layers"]], [oracle[key_]], "*", color="black", markersize=10)
            axes.set_xlabel("layers per token")
            axes.set_ylabel(label)
            if key_ == "loss":
                axes.legend()

    return figure(
        draw,
        caption=f"{model} on held-out text: loss, and how often the most probable word is that of "
        "all layers, over layers per token as the threshold falls. The star is the oracle, which "
        "leaves at the first layer with the last layer's word.",
        alt="; ".join(
            f"{measure}: "
            + ", ".join(
                f"{loss:.2f} nats and {same:.0%} at {layers:.1f} layers"
                for (layers, loss), (_, same) in zip(
                    points(measure, "loss")[::3], points(measure, "agrees")[::3], strict=True
                )
            )
            for measure in COLOURS
        )
        + "; one exit for all: "
        + ", ".join(f"{same:.0%} at {layers}" for layers, same in fixed("agrees"))
        + ".",
        figsize=(6.6, 2.8),
    )


@if_measured
def sections(rows: Sequence[Row]) -> CaptionedFigure:
    """Accuracy over layers of MiniLM's exits, for entropy and patience."""
    lines = {
        rule: sorted((row["layers"], 100 * row["accuracy"]) for row in pick(rows, rule=rule))
        for rule in ("entropy", "patience")
    }
    oracle = pick(rows, rule="oracle")[0]

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for colour, (rule, points) in zip(PALETTE, lines.items()):
            axes.plot(*zip(*points), "o-", color=colour, label=rule, markersize=4)
        axes.plot([oracle["layers"]], [100 * oracle["accuracy"]], "k*", markersize=10)
        axes.set_xlabel("layers per text")
        axes.set_ylabel("accuracy, per cent")
        name_lines(axes)

    return figure(
        draw,
        caption="MiniLM with a head after each layer, on package sections: accuracy over layers "
        "per text. The star is the oracle.",
        alt="; ".join(
            f"{rule}: {points[0][1]:.0f} per cent at {points[0][0]:.1f} layers to "
            f"{points[-1][1]:.0f} at {points[-1][0]:.1f}"
            for rule, points in lines.items()
        )
        + f"; oracle {100 * oracle['accuracy']:.0f} at {oracle['layers']:.1f}.",
        figsize=(6.0, 2.4),
    )


@if_measured
def drafts(rows: Sequence[Row]) -> CaptionedFigure:
    """Predicted and measured speed over the length of the draft, for pairs of models."""
    names = [d for d in tables.by_name(rows, "draft") if d.startswith("mini") and d != "mini-5m"]
    found = {d: sorted(pick(rows, draft=d), key=lambda row: row["gamma"]) for d in names}

    def measured(row: Row) -> float:
        values = sorted(row["times_faster"])
        return values[len(values) // 2]

    def predicted(row: Row) -> float:
        return speculative.speed_up(row["alpha"], row["gamma"], row["cost"])

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for colour, (name, points) in zip(PALETTE, found.items()):
            x = [row["gamma"] for row in points]
            axes.plot(x, list(map(measured, points)), "o-", color=colour, label=f"{name}, measured")
            axes.plot(
                x, list(map(predicted, points)), ":", color=colour, label=f"{name}, predicted"
            )
        axes.axhline(1, color="0.45", linewidth=1)
        axes.set_xlabel("length of the draft")
        axes.set_ylabel("times faster than alone")
        axes.legend()

    return figure(
        draw,
        caption="mini-5m with smaller models as drafts: speed over the length of the draft. Below "
        "the line at 1, speculation costs time.",
        alt="; ".join(
            f"{name}: "
            + ", ".join(
                f"{measured(r):.2f} (predicted {predicted(r):.2f}) at {r['gamma']}" for r in p
            )
            for name, p in found.items()
        )
        + ".",
        figsize=(6.4, 2.6),
    )
