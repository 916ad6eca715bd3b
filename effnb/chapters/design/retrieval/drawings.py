"""The pictures of the chapter on retrieval, each with its caption and alternative text."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from effnb.chapters.design.retrieval import tables
from effnb.lab import PALETTE, figure
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.figures import BLACK, GREY, CaptionedFigure


@if_measured
def result(rows: Sequence[Row]) -> CaptionedFigure:
    """Left: loss over parameters, alone and with a datastore. Right: loss over its entries."""
    plain, models = tables.curve(rows), tables.models_of(rows)
    largest = {m: tables.entries_of(rows, m)[-1] for m in models}
    joined = [tables.one(rows, model=m, entries=largest[m])["loss"] for m in models]
    found = tables.worth(rows, models[0], largest[models[0]])

    def draw(fig: Figure) -> None:
        left, right = fig.subplots(1, 2, sharey=True)
        left.plot(plain.parameters, plain.losses, "o-", color=BLACK, label="decoder alone")
        left.plot(plain.parameters, joined, "D-", color=PALETTE[1], label="with the datastore")
        for n, before, after in zip(plain.parameters, plain.losses, joined):
            left.annotate("", (n, after), (n, before),
                          arrowprops={"arrowstyle": "->", "color": GREY})  # fmt: skip
        left.plot([plain.parameters[0], found.parameters], [joined[0]] * 2, ":", color=PALETTE[0])
        left.text(found.parameters * 1.15, joined[0],
                  f"worth {tables.times(found, plain.parameters[0])}\nthe parameters",
                  color=PALETTE[0], fontsize=9, va="center")  # fmt: skip
        left.set_xscale("log")
        left.set_xticks(plain.parameters, models)
        left.minorticks_off()
        left.set_xlabel("parameters")
        left.set_ylabel("nats per token")
        left.legend()
        for colour, model in zip(PALETTE, models):
            points = sorted((r["entries"], r["loss"]) for r in pick(rows, model=model))
            right.plot(*zip(*points), "o-", color=colour, label=model)
            right.axhline(pick(rows, model=model)[0]["alone"], color=colour, linestyle=":")
        right.set_xscale("log")
        right.set_xlabel("entries of the datastore (dotted: none)")
        right.legend()

    ends = "; ".join(
        f"{m} {a:.2f} nats alone, {b:.2f} with it" for m, a, b in zip(models, plain.losses, joined)
    )
    return figure(
        draw,
        caption="Left: three decoders alone and with a datastore of descriptions, on held-out "
        "descriptions; the dotted line ends at the plain decoder of equal loss. Right: the same "
        "over the size of the datastore.",
        alt=f"Left, two falling curves: {ends}. Right, losses that fall as the datastore grows.",
        figsize=(7.2, 3.0),
    )


@if_measured
def knobs(rows: Sequence[Row]) -> CaptionedFigure:
    """Loss over each setting by itself."""
    names = {"lam": "λ, share of the neighbours", "k": "k, neighbours", "temperature": "τ"}
    points = {
        knob: sorted(
            (r["value"], r["loss"]) for r in pick(rows, knob=knob) if r["loss"] is not None
        )
        for knob in names
    }
    alone = tables.one(rows, knob="lam", value=0.0)["loss"]

    def draw(fig: Figure) -> None:
        for axes, (knob, name), colour in zip(fig.subplots(1, 3, sharey=True), names.items(),
                                              PALETTE):  # fmt: skip
            axes.plot(*zip(*points[knob]), "o-", color=colour, markersize=4)
            axes.axhline(alone, color=BLACK, linestyle=":", linewidth=1)
            axes.set_xlabel(name)
            if knob != "lam":
                axes.set_xscale("log")
        fig.axes[0].set_ylabel("nats per token")
        least = min(y for found in points.values() for _, y in found)
        fig.axes[0].set_ylim(least - 0.05, alone + 0.4)

    return figure(
        draw,
        caption="mini-300k with 50,000 entries: loss as one setting changes and the others stay. "
        "Dotted: the decoder alone.",
        alt="; ".join(
            f"{name}: " + ", ".join(f"{y:.2f} at {x:g}" for x, y in points[knob])
            for knob, name in names.items()
        ),
        figsize=(7.2, 2.2),
    )
