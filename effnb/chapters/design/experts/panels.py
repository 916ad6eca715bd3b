"""The panels of the chapter on experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from effnb.chapters.design.experts import drawings, methods
from effnb.design import experts
from effnb.lab import PALETTE, guess, knob, panel
from effnb.lab.panels import Panel

EXPERTS, FACTORS = (4, 8, 16), (1.0, 1.25, 1.5, 2.0)
SHARES = {"about an eighth": 0.2, "about a third": 0.45, "more than half": 1.01}
"""The choices of the guess on the busiest expert, and where each ends."""


def share_choice(share: float) -> str:
    """The choice that a share of the tokens belongs to."""
    return next(words for words, end in SHARES.items() if share < end)


def fair() -> Panel:
    """What a perfectly fair random router drops."""

    def compute(tokens: int, count: int, factor: float) -> dict[str, Any]:
        measured, formula = methods.measured_drops(tokens, count, factor, draws=60)
        seats = experts.expert_capacity(tokens, count, factor)
        curve = [
            (t, experts.expected_drops(t, count, experts.expert_capacity(t, count, factor)))
            for t in methods.TOKENS
        ]
        return {
            "tokens": tokens, "measured": measured, "formula": formula, "seats": seats,
            "curve": curve, "count": count,
        }  # fmt: skip

    def draw(found: Mapping[str, Any], fig: Figure) -> None:
        axes = fig.subplots()
        x, y = zip(*found["curve"], strict=True)
        axes.plot(x, [100 * v for v in y], color=PALETTE[0])
        axes.plot(found["tokens"], 100 * found["measured"], "o", color=PALETTE[1], markersize=9)
        axes.set_xscale("log")
        axes.set_xticks(methods.TOKENS, [f"{t:,}" for t in methods.TOKENS])
        axes.minorticks_off()
        axes.set_ylim(0, 25)
        axes.set_xlabel("tokens that share the seats")
        axes.set_ylabel("dropped, per cent")

    def text(found: Mapping[str, Any]) -> str:
        return "\n".join(
            [
                f"Seats of each expert: {found['seats']}",
                f"Dropped, measured: {found['measured']:.1%}",
                f"Dropped, by the formula: {found['formula']:.1%}",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="What a fair router drops",
        caption="Every token chooses an expert at random, all of them alike. Line: the formula. "
        "Point: 60 groups of tokens.",
        figsize=(6.2, 2.2),
        main="tokens",
        frames={"tokens": [64, 512], "factor": [1.0, 1.25]},
        predict=guess(
            "512 tokens choose among 8 experts at random, and each expert has exactly its fair "
            "share of 64 seats. How many per cent of the tokens find their expert full?",
            answer=lambda found: round(100 * found["formula"], 1),
            at={"tokens": 512, "count": 8, "factor": 1.0},
        ),
        tokens=knob(list(methods.TOKENS), default=512),
        count=knob([2, 4, 8, 16], default=8, label="experts"),
        factor=knob(list(FACTORS), default=1.0, label="capacity factor"),
    )


def training() -> Panel:
    """A layer of experts is trained while one waits."""

    def compute(count: int, k: int, factor: float, auxiliary: float) -> dict[str, Any]:
        return {"run": methods.watched(count, k, factor, auxiliary), "count": count, "k": k}

    def draw(
        found: Mapping[str, Any], fig: Figure, pinned: Mapping[str, Any] | None = None
    ) -> None:
        drawings.watching(found["run"], fig, None if pinned is None else pinned["run"])

    def text(found: Mapping[str, Any]) -> str:
        run: methods.Watched = found["run"]
        return "\n".join(
            [
                f"Seats of each expert: {run.seats}, for {math.prod(methods.LIVE_SHAPE)} tokens",
                f"Busiest expert: {run.busiest / found['count']:.0%} of all choices, fair would be "
                f"{1 / found['count']:.0%}",
                f"Dropped at the end: {sum(run.dropped[-10:]) / 10:.1%}",
                f"Error at the end: {sum(run.losses[-10:]) / 10:.4f}",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Train a layer of experts",
        caption="Left: the part of the choices that falls on each expert, step by step; a band is "
        "an expert. Right: what is dropped (orange) and the error on the task (blue). Tokens come "
        "from eight clusters of very unequal size, each with a map of its own to learn.",
        figsize=(6.6, 2.3),
        main="auxiliary",
        frames={"auxiliary": [0.0, 0.1, 1.0], "k": [1, 2]},
        predict=guess(
            "Eight experts, one choice for each token, and nothing that keeps the load even. Which "
            "part of the tokens does the busiest expert attract at the end?",
            list(SHARES),
            answer=lambda found: share_choice(found["run"].busiest / found["count"]),
            at={"count": 8, "k": 1, "factor": 1.25, "auxiliary": 0.0},
        ),
        count=knob(list(EXPERTS), default=8, label="experts"),
        k=knob([1, 2], default=1, label="k, choices of a token"),
        factor=knob(list(FACTORS), default=1.25, label="capacity factor"),
        auxiliary=knob([0.0, 0.01, 0.1, 1.0], default=0.0, label="weight of the balance loss"),
    )
