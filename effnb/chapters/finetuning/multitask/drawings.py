"""The pictures of the chapter on many tasks, each with its caption and alternative text."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure

from effnb.chapters.finetuning.multitask import methods, tables
from effnb.lab import PALETTE, figure
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.figures import CaptionedFigure

COLOURS = {"raw": PALETTE[1], "calibrated": PALETTE[0]}
SAID = {"raw": "as the model answers", "calibrated": "calibrated"}


def by_accuracy(rows: Sequence[Row], question: str) -> list[Row]:
    """The orders of a question, the worst first."""
    own = pick(rows, question=question)
    return sorted(own, key=lambda row: (row["raw"], row["calibrated"], row["order"]))


@if_measured
def orders(rows: Sequence[Row], question: str = "topic") -> CaptionedFigure:
    """One column for each order of the same four examples: as answered, and calibrated."""
    own = by_accuracy(rows, question)
    words = methods.QUESTIONS[question].words

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        places = range(1, len(own) + 1)
        for x, row in zip(places, own, strict=True):
            axes.plot(
                [x, x], [100 * row["raw"], 100 * row["calibrated"]], color="0.75", linewidth=1.5
            )
        for way, marker in (("calibrated", "D"), ("raw", "o")):
            heights = [100 * row[way] for row in own]
            axes.plot(places, heights, marker, color=COLOURS[way], label=SAID[way], markersize=7)
        axes.axhline(50, color="0.45", linestyle=":")
        initials = ["\n".join(words[int(k)][0] for k in row["labels"]) for row in own]
        axes.set_xticks(list(places), initials, fontsize=7)
        axes.set_ylim(min(30.0, 100 * min(row["raw"] for row in own) - 5), 102)
        axes.set_ylabel("right, per cent")
        axes.set_xlabel(f"order of the answers: {words[0][0]} {words[0]}, {words[1][0]} {words[1]}")
        axes.grid(visible=False, axis="x")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)

    ends = {
        way: (min(found), fmean(found), max(found))
        for way in tables.WAYS
        for found in [tables.accuracies(rows, question, way)]
    }
    return figure(
        draw,
        caption=f"SmolLM2-135M chooses {words[0]!r} or {words[1]!r} for {tables.texts_of(rows)} "
        f"texts behind the same four examples in {len(own)} orders, one a column; the answers of "
        "the examples stand below it from the first to the last. Dotted: guessing.",
        alt="; ".join(
            f"{SAID[way]}: worst order {100 * low:.0f} per cent, mean {100 * mean:.0f}, best "
            f"{100 * high:.0f}"
            for way, (low, mean, high) in ends.items()
        )
        + ".",
        figsize=(7.0, 3.2),
    )


@if_measured
def shots(rows: Sequence[Row]) -> CaptionedFigure:
    """Accuracy over the number of examples, every draw a dot."""
    names = tables.questions_of(rows)
    counts = sorted({row["shots"] for row in rows})
    means = {
        (name, way): [fmean(r[way] for r in pick(rows, question=name, shots=n)) for n in counts]
        for name in names
        for way in tables.WAYS
        if all(pick(rows, question=name, shots=n) for n in counts)
    }

    def draw(fig: Figure) -> None:
        panes = fig.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, name in zip(panes, names, strict=True):
            for way, shift in (("raw", -0.08), ("calibrated", 0.08)):
                for place, count in enumerate(counts):
                    own = [100 * r[way] for r in pick(rows, question=name, shots=count)]
                    axes.plot([place + shift] * len(own), own, "o", color=COLOURS[way],
                              markersize=4, alpha=0.6)  # fmt: skip
                if (name, way) in means:
                    heights = [100 * mean for mean in means[name, way]]
                    axes.plot(range(len(counts)), heights, "-", color=COLOURS[way], label=SAID[way])
            axes.axhline(50, color="0.45", linestyle=":")
            axes.set_xticks(range(len(counts)), [str(count) for count in counts])
            axes.set_xlabel("examples in the prompt")
            axes.set_title(name)
        panes[0].set_ylabel("right, per cent")
        panes[0].set_ylim(min(25.0, 100 * min(row["raw"] for row in rows) - 5), 102)
        panes[-1].legend(loc="lower right", fontsize=8)

    return figure(
        draw,
        caption="SmolLM2-135M: accuracy over the number of examples. Each dot is a draw of "
        "examples, the lines are means. Dotted: guessing.",
        alt="; ".join(
            f"{name}, {SAID[way]}: "
            + ", ".join(f"{100 * y:.0f} per cent with {n}" for n, y in zip(counts, found))
            for (name, way), found in means.items()
        )
        + ".",
        figsize=(6.6, 2.6),
    )


@if_measured
def instructions(rows: Sequence[Row]) -> CaptionedFigure:
    """Before and after training on instructions, on new wordings and on new tasks."""
    bars = {}
    for what, said in tables.KINDS.items():
        before, after = (
            [fmean(row["documents"]) for row in pick(rows, judged=what, method=method)]
            for method in ("untrained", "instructions")
        )
        if before and after:
            bars[said] = (fmean(before), after)

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for y, (start, ends) in enumerate(reversed(bars.values())):
            axes.barh([y + 0.2], [100 * start], height=0.36, color="0.7",
                      label=None if y else "untrained")  # fmt: skip
            axes.barh([y - 0.2], [100 * fmean(ends)], height=0.36, color=PALETTE[0],
                      label=None if y else "trained on instructions")  # fmt: skip
            axes.plot([100 * end for end in ends], [y - 0.2] * len(ends), "o", color="0.15",
                      markersize=3)  # fmt: skip
        axes.set_yticks(range(len(bars)), list(reversed(bars)))
        axes.set_xlabel("right, per cent")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)

    return figure(
        draw,
        caption="mini-1m before and after training on instructions for classification and writing. "
        "The dots are seeds.",
        alt="; ".join(
            f"{said}: {100 * start:.0f} per cent before, {100 * fmean(ends):.0f} after"
            for said, (start, ends) in bars.items()
        )
        + ".",
        figsize=(6.4, 2.0),
    )
