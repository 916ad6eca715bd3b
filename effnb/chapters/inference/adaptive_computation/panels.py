"""The panels of the chapter on adaptive computation."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure

from effnb.chapters.inference.adaptive_computation import drawings, methods, tables
from effnb.inference.adaptive_computation import calm, cascades, learn_then_test, speculative
from effnb.lab import PALETTE, knob, panel
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.panels import Panel, guess

THRESHOLDS = [0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0]


def leaving(writer: methods.Writer) -> Panel:
    """Write a text that leaves early: threshold, measure, and how skipped layers are filled."""

    def compute(threshold: float, measure: str, copying: str) -> methods.Early:
        return writer.early(threshold, measure, copying)

    def draw(early: methods.Early, fig: Figure) -> None:
        top, below = fig.subplots(2, 1, height_ratios=[5, 3])
        pieces = [(writer.prompt, 0), *zip(early.pieces, early.text.layers, strict=True)]
        drawings.prepare(top, 1.4 + max(4, len(drawings.lines_of(pieces))))
        drawings.key(top, early.text.of, 0)
        drawings.draw_text(top, pieces, early.text.of, -1.4)
        layers = list(range(1, early.text.of + 1))
        below.bar(
            layers,
            [early.text.layers.count(i) for i in layers],
            color=[drawings.shade(i, early.text.of) for i in layers],
            edgecolor="0.5",
            linewidth=0.5,
        )
        below.set_xticks(layers)
        below.set_xlabel("layer")
        below.set_ylabel("tokens left")

    def text(early: methods.Early) -> str:
        return "\n".join(
            [
                f"Layers per token: {early.text.mean_layers:.2f} of {early.text.of}",
                f"Times faster: {early.speed:.2f}",
                f"Tokens as with all layers: {early.same:.0%}",
                f"It writes: {writer.prompt}{''.join(early.pieces)}",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Leave when sure enough",
        caption="Above: what the model writes, each token on the shade of the layer it left at. "
        "Below: how many tokens left at each layer.",
        figsize=(6.8, 3.0),
        frames=[0.2, 1.0],
        predict=guess(
            "At a threshold of 0.2 by softmax, how many of the six layers does a token pass on "
            "average?",
            answer=lambda early: round(early.text.mean_layers, 1),
            at={"threshold": 0.2, "measure": "softmax", "copying": "states"},
        ),
        threshold=knob(THRESHOLDS, default=0.2),
        measure=knob(["softmax", "saturation", "classifier"], label="confidence"),
        copying=knob(list(calm.COPYING), label="skipped layers get"),
    )


# --- the guarantee --------------------------------------------------------------------------------


@if_measured
def guarantee(rows: Sequence[Row], calibrated: int = 120) -> Panel:
    """Which threshold may be promised, for a tolerance and a probability."""
    texts = sorted(pick(rows, setting="texts"), key=lambda row: -row["threshold"])
    grid = [row["threshold"] for row in texts]
    order = list(range(len(texts[0]["distance"])))
    random.Random("calibration 0").shuffle(order)
    mine, others = order[:calibrated], order[calibrated:]

    def compute(delta: float, epsilon: float, loss: str) -> dict[str, Any]:
        key = {"textual": "distance", "risk": "risk"}[loss]
        losses = [[row[key][i] for i in mine] for row in texts]
        found = {
            rule: learn_then_test.calibrate(grid, losses, delta, epsilon, rule)
            for rule in ("fixed sequence", "naive", "Bonferroni")
        }
        chosen = found["fixed sequence"].threshold
        row = None if chosen is None else texts[grid.index(chosen)]
        return {
            "delta": delta,
            "epsilon": epsilon,
            "rules": found,
            "layers": 1.0 if row is None else fmean(row["layers"][i] for i in others),
            "risk": 0.0 if row is None else fmean(row[key][i] for i in others),
            "true": [fmean(r[key][i] for i in others) for r in texts],
        }

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        left, right = fig.subplots(1, 2)
        one = result["rules"]["fixed sequence"]
        left.plot(grid, one.mean_losses, "o-", color=PALETTE[0], label="calibration prompts")
        left.plot(grid, result["true"], ":", color=PALETTE[1], label="other prompts")
        left.axhline(result["delta"], color="0.4", linestyle="--", linewidth=1)
        left.invert_xaxis()
        left.set_xlabel("threshold")
        left.set_ylabel("mean loss")
        left.legend()
        right.plot(grid, one.p_values, "o-", color=PALETTE[0])
        right.axhline(result["epsilon"], color="0.4", linestyle="--", linewidth=1)
        right.set_ylim(-0.03, 1.03)
        right.invert_xaxis()
        right.set_xlabel("threshold")
        right.set_ylabel("p-value")
        for axes in (left, right):
            if one.threshold is not None:
                axes.axvline(one.threshold, color=PALETTE[2], linewidth=1.5)

    def text(result: Mapping[str, Any]) -> str:
        said = [
            f"Threshold by {rule}: {'none, use all layers' if c.threshold is None else c.threshold}"
            for rule, c in result["rules"].items()
        ]
        return "\n".join(
            [
                *said,
                f"Layers passed, of all: {result['layers']:.0%}",
                f"Mean loss on other prompts: {result['risk']:.3f}",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="What may be promised",
        caption=f"{calibrated} prompts calibrate. Walk to the right (more lenient) until the first "
        "p-value above ε; the vertical line is the last threshold before it. Dashed: δ and ε.",
        figsize=(6.6, 2.5),
        frames=[0.1, 0.4],
        predict=guess(
            "At δ = 0.2 and ε = 0.05, which share of the layers do the texts pass, in per cent?",
            answer=lambda result: round(100 * result["layers"]),
            at={"delta": 0.2, "epsilon": 0.05, "loss": "textual"},
            unit="%",
        ),
        delta=knob([0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5], default=0.2, label="δ, tolerated loss"),
        epsilon=knob([0.01, 0.05, 0.1, 0.2], default=0.05, label="ε, tolerated probability"),
        loss=knob(["textual", "risk"], label="consistency"),
    )


# --- speculation ----------------------------------------------------------------------------------


def speculation(rows: Sequence[Row] | None = None) -> Panel:
    """Predicted speed over acceptance and cost, and the region in which it is slower."""
    shown = [row for row in (rows or []) if not row["draft"].startswith("first")]

    def compute(alpha: float, gamma: int, cost: float) -> dict[str, Any]:
        return {
            "alpha": alpha,
            "gamma": gamma,
            "cost": cost,
            "speed": speculative.speed_up(alpha, gamma, cost),
            "tokens": speculative.expected_tokens(alpha, gamma),
            "best": speculative.best_draft_length(alpha, cost),
            "curve": [speculative.speed_up(alpha, g, cost) for g in range(13)],
        }

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        left, right = fig.subplots(1, 2)
        left.plot(range(13), result["curve"], "o-", color=PALETTE[0], markersize=4)
        left.plot([result["gamma"]], [result["speed"]], "o", color=PALETTE[1], markersize=9)
        left.axhline(1, color="0.45", linewidth=1)
        left.set_xlabel("length of the draft γ")
        left.set_ylabel("times faster")
        alphas = torch.linspace(0.01, 0.99, 60).tolist()
        edge = [
            (speculative.expected_tokens(a, result["gamma"]) - 1) / result["gamma"] for a in alphas
        ]
        right.fill_between(alphas, edge, 1.0, color="#D9A5A5")
        right.fill_between(alphas, 0.0, [min(1.0, e) for e in edge], color="#CFE3CF")
        right.plot([result["alpha"]], [result["cost"]], "o", color=PALETTE[1], markersize=9)
        for row in shown:
            if row["gamma"] == result["gamma"] and row["cost"] <= 1:
                right.plot([row["alpha"]], [row["cost"]], "k^", markersize=5)
        right.text(0.08, 0.9, "slower", fontsize=9)
        right.text(0.75, 0.06, "faster", fontsize=9)
        right.set_xlim(0, 1)
        right.set_ylim(0, 1)
        right.set_xlabel("acceptance rate α")
        right.set_ylabel("cost ratio c")

    def text(result: Mapping[str, Any]) -> str:
        return "\n".join(
            [
                f"Tokens per pass: {result['tokens']:.2f}",
                f"Times faster: {result['speed']:.2f}",
                f"Best length: {result['best'] or 'no draft at all'}",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Does a draft pay?",
        caption="Left: predicted speed over the length of the draft. Right: where speculation is "
        "faster at this length; triangles are pairs of this book's models, where measured.",
        figsize=(6.6, 2.6),
        frames=[0.3, 0.9],
        predict=guess(
            "Six drafts in ten are accepted, four tokens are drafted at a time, and a draft costs "
            "half of the target's time. How many times faster is the pair?",
            answer=lambda result: round(result["speed"], 2),
            at={"alpha": 0.6, "gamma": 4, "cost": 0.5},
        ),
        alpha=knob([0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9], default=0.6, label="acceptance rate α"),
        gamma=knob(1, 8, default=4, label="length of the draft γ"),
        cost=knob([0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8], default=0.1, label="cost ratio c"),
    )


# --- deferral -------------------------------------------------------------------------------------


@if_measured
def deferral(rows: Sequence[Row]) -> Panel:
    """Three ways to defer to a specialist, over the cost of doing so."""
    methods_ = ("CSS", "post hoc", "confidence")

    def compute(cost: float) -> dict[str, dict[str, float]]:
        return {
            m: {
                key: fmean(row[key] for row in pick(rows, method=m, cost=cost))
                for key in ("mean_loss", "accuracy", "deferred")
            }
            for m in methods_
        }

    def draw(result: Mapping[str, Mapping[str, float]], fig: Figure) -> None:
        panes = fig.subplots(1, 3, sharey=True)
        titles = {
            "mean_loss": "loss of the pair",
            "accuracy": "the base alone is right",
            "deferred": "deferred",
        }
        for axes, (key, title) in zip(panes, titles.items(), strict=True):
            axes.barh(
                list(reversed(methods_)),
                [result[m][key] for m in reversed(methods_)],
                color=[PALETTE[2], PALETTE[0], PALETTE[1]],
                height=0.6,
            )
            axes.set_xlim(0, 1 if key != "mean_loss" else 0.7)
            axes.set_title(title, fontsize=10)

    def text(result: Mapping[str, Mapping[str, float]]) -> str:
        return "\n".join(
            f"{m}: loss {found['mean_loss']:.3f}, base {found['accuracy']:.1%}, deferred "
            f"{found['deferred']:.0%}"
            for m, found in result.items()
        )

    return panel(
        compute,
        draw,
        text=text,
        title="What does deferring cost?",
        caption="Package sections: a base model with a specialist that knows three of six "
        "sections. CSS trains both at once; the other two leave the base model as it is.",
        figsize=(6.6, 1.8),
        frames=[0.0, 0.6],
        predict=guess(
            "Deferral costs 0.6 errors, so that it hardly ever pays. What does that do to the base "
            "model when classifier and rule are trained together?",
            ["it gets better", "about the same", "it gets worse"],
            answer=lambda result: worse(result["CSS"]["accuracy"] - result["post hoc"]["accuracy"]),
            at={"cost": 0.6},
        ),
        cost=knob(sorted({row["cost"] for row in rows}), default=0.2, label="cost of deferral"),
    )


def worse(change: float) -> str:
    """A change of the accuracy as one of three choices."""
    if abs(change) < 0.01:
        return "about the same"
    return "it gets better" if change > 0 else "it gets worse"


@if_measured
def cascade(rows: Sequence[Row]) -> Panel:
    """Two models on the same questions: accuracy over the part that is deferred."""
    names = [row["model"] for row in sorted(rows, key=lambda row: row["parameters"])]
    pairs = [f"{a} → {b}" for i, a in enumerate(names) for b in names[i + 1 :]]

    def compute(pair: str, threshold: float) -> dict[str, Any]:
        small, large = pair.split(" → ")
        curve = tables.curve_of(rows, small, large)
        sure = torch.tensor(pick(rows, model=small)[0]["confidence"])
        deferred = int(cascades.chow(sure, threshold).sum())
        return {"curve": curve, "point": curve[deferred], "area": cascades.benefit(curve)}

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        axes = fig.subplots()
        curve = result["curve"]
        axes.plot(
            [100 * p.deferred for p in curve], [100 * (1 - p.loss) for p in curve], color=PALETTE[0]
        )
        ends = [100 * (1 - curve[i].loss) for i in (0, -1)]
        axes.plot([0, 100], ends, ":", color="0.45")
        point = result["point"]
        axes.plot([100 * point.deferred], [100 * (1 - point.loss)], "o", color=PALETTE[1])
        axes.set_xlabel("deferred, per cent of the questions")
        axes.set_ylabel("accuracy, per cent")

    def text(result: Mapping[str, Any]) -> str:
        point = result["point"]
        return "\n".join(
            [
                f"Accuracy: {1 - point.loss:.1%}",
                f"Deferred: {point.deferred:.0%}",
                f"Cost, of the large model's: {point.cost:.0%}",
                f"Area above random deferral: {result['area']:+.3f}",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Ask the small model first",
        caption="Ranked-choice questions: accuracy over the part that the large model answers, the "
        "questions the small one is least sure of first. Dotted: deferral at random. Cost counts "
        "parameters read; a deferred question pays for both models.",
        figsize=(6.2, 2.4),
        main="threshold",
        frames=[0.8, 0.99],
        pair=knob(pairs, default=pairs[min(1, len(pairs) - 1)], label="cascade"),
        threshold=knob(
            [0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01], default=0.95, label="confidence"
        ),
    )
