"""The smaller panels of the chapter on quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from effnb.chapters.inference.quantization import drawings, tables
from effnb.chapters.inference.quantization.methods import Smoothed, smoothed_product
from effnb.lab import PALETTE, knob, panel
from effnb.lab.panels import Panel, guess

Row = Mapping[str, Any]
GROUPS = {"per row": "row", "groups of 64": "64"}


@tables.if_measured
def retrieval(data: Row) -> Panel:
    """What a rounded MiniLM finds for a few queries, and how often it is right, from the sweep."""
    rows: Sequence[Row] = data["table"]
    original = tables.hits(tables.pick(rows, method="original")[0])

    def compute(bits: int, method: str, scales: str) -> dict[str, Any]:
        found = tables.minilm_rows(rows, method, bits, GROUPS[scales])
        answers = tables.minilm_hits(rows, method, bits, GROUPS[scales])
        return {
            "recall": fmean(answers),
            "change": tables.Change.between(answers, original),
            "found": found[0]["found"],
        }

    def draw(result: dict[str, Any], fig: Figure) -> None:
        axes = fig.subplots()
        axes.barh([1], [fmean(original)], color=PALETTE[2], height=0.6)
        axes.barh([0], [result["recall"]], color=PALETTE[1], height=0.6)
        axes.set_yticks([0, 1], ["rounded", "original"])
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.set_xlabel("queries whose own description is found first")

    def text(result: dict[str, Any]) -> str:
        change = result["change"]
        lines = [
            f"Found first: {result['recall']:.1%}",
            f"Original: {fmean(original):.1%}",
            f"Against the original: {change.word(lower_is_better=False)}",
            f"Change in points, 95 % interval: {100 * change.mean:+.1f} "
            f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}]",
        ]
        for asked, answer in zip(data["shown"], result["found"], strict=True):
            right = "right" if answer == asked["package"] else f"wrong, it is {asked['package']}"
            lines.append(f"“{asked['query']}”: {answer} ({right})")
        return "\n".join(lines)

    bits = tables.minilm_bits(rows)
    return panel(
        compute,
        draw,
        text=text,
        title="Search with a rounded MiniLM",
        caption="How often the right one of 400 package descriptions comes first. Below: what "
        "is found for six queries that the original answers correctly.",
        figsize=(6.4, 1.5),
        frames={"bits": [2, 4], "method": None},
        predict=guess(
            "With two bits per weight, rounded to nearest with one scale per row: how many of 100 "
            "queries still find their own description first?",
            answer=lambda result: round(100 * result["recall"]),
            at={"bits": 2, "method": "RTN", "scales": "per row"},
        ),
        bits=knob(bits, default=2),
        method=knob(list(drawings.METHODS), default="RTN"),
        scales=knob(list(GROUPS), default="per row", label="one scale"),
    )


OFF = "off"
SETTINGS = (OFF, "0", "0.25", "0.5", "0.75", "1")


def product_at(alpha: str) -> Smoothed:
    """The product at a position of the panel's knob."""
    return smoothed_product(None if alpha == OFF else float(alpha))


def best() -> str:
    """The position with the smallest error."""
    return min(SETTINGS, key=lambda setting: product_at(setting).error)


def smoothing() -> Panel:
    """SmoothQuant's alpha, on one layer whose inputs have one large channel."""

    def draw(result: Smoothed, fig: Figure) -> None:
        panes = fig.subplots(1, 2, sharey=True)
        for axes, values, title in zip(
            panes, (result.inputs, result.weights), ("inputs", "weights"), strict=True
        ):
            axes.bar(range(len(values)), values.tolist(), width=1.0, color=PALETTE[0])
            axes.set_title(title)
            axes.set_xlabel("channel")
            drawings.plain_numbers(axes)
            axes.set_ylim(0.3, 300)
        panes[0].set_ylabel("largest magnitude")

    def text(result: Smoothed) -> str:
        spread = {
            "inputs": float(result.inputs.max() / result.inputs.median()),
            "weights": float(result.weights.max() / result.weights.median()),
        }
        return "\n".join(
            [
                f"Relative error of the product: {result.error:.4f}",
                *(f"Largest / median, {name}: {ratio:.1f}" for name, ratio in spread.items()),
            ]
        )

    return panel(
        product_at,
        draw,
        text=text,
        title="Where do the outliers go?",
        caption="The largest magnitude of each input channel and of the weight column that "
        "reads it, both rounded to 8 bits.",
        figsize=(6.4, 1.9),
        predict=guess(
            "Which setting gives the product the smallest error?", SETTINGS, answer=lambda _: best()
        ),
        frames=(OFF, "0.5", "1"),
        alpha=knob(SETTINGS, default=OFF),
    )
