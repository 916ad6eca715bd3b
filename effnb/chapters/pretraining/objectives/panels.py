"""The panels of the chapter on objectives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from effnb.chapters.pretraining.objectives import drawings, runs, scaling
from effnb.chapters.pretraining.objectives.sheet import KINDS, example, fill, piece, sheet
from effnb.lab import PALETTE, guess, knob, load, panel
from effnb.lab.panels import Panel
from effnb.lab.sweeps import held_out_novel
from effnb.lab.texts import windows_of
from effnb.pretraining import objectives
from effnb.pretraining.objectives import IGNORED

RATES = tuple(range(5, 85, 5))
SPANS = (1, 2, 3, 5, 10)
FILLERS = ("random words", *scaling.SIZES)


def counts(kind: str, rate: float, span: float, texts: int = 8) -> dict[str, float]:
    """Tokens asked and positions computed for 100 tokens of text, in texts of 128 tokens."""
    draws = torch.Generator().manual_seed(0)
    read = asked = 0
    for _ in range(texts):
        one = example(kind, torch.randint(1, runs.WORDS, (1, 128), generator=draws), rate, span,
                      draws)  # fmt: skip
        read += one.read_tokens
        asked += one.text_tokens if kind == "ELECTRA" else one.text_targets
    return {"read": 100 * read / (128 * texts), "asked": 100 * asked / (128 * texts)}


def work_ratio(kind: str, rate: float, span: float) -> float:
    """Operations of a training step as a part of CLM's."""
    made = runs.Objective(
        kind,
        lambda ids, draws: example(kind, ids, rate, span, draws),
        electra="all" if kind == "ELECTRA" else "",
    )
    return runs.step_work(made, 1).flops / runs.step_work(runs.ALL["CLM"], 1).flops


def questions(generator: nn.Module) -> Panel:
    """What an objective asks about one sentence, and what that costs.

    Args:
        generator: A causal model that fills in the masked places for ELECTRA.
    """

    def compute(objective: str, rate: int, span: int, seed: int) -> dict[str, Any]:
        part = rate / 100
        return {
            "objective": objective,
            "sheet": sheet(objective, part, span, seed, generator),
            "work": work_ratio(objective, part, span),
            **counts(objective, part, span),
        }

    def draw(found: Mapping[str, Any], fig: Figure) -> None:
        drawings.boxes(fig.subplots(), found["sheet"])

    def text(found: Mapping[str, Any]) -> str:
        lines = [
            f"Asked, of 100 tokens of text: {found['asked']:.0f}",
            f"Computed, for 100 tokens of text: {found['read']:.0f}",
            f"Asked, of 100 computed: {100 * found['asked'] / found['read']:.1f}",
            f"Operations, CLM's as 1: {found['work']:.2f}",
            f"The network reads: {found['sheet'].reads()}",
        ]
        return "\n".join(lines)

    def ignored(values: Mapping[str, Any]) -> dict[str, str]:
        unused = {
            "CLM": ("rate", "span", "seed"),
            "MLM": ("span",),
            "prefix LM": ("rate", "span"),
            "span corruption": (),
            "ELECTRA": ("span",),
        }[values["objective"]]
        return dict.fromkeys(unused, f"{values['objective']} does not use it")

    return panel(
        compute,
        draw,
        text=text,
        title="What is it asked?",
        caption="A sentence as the network reads it: changed tokens on an orange ground, positions "
        "that give a loss framed in blue, with the right answer below. Numbers are means over "
        "texts of 128 tokens. For ELECTRA, mini-5m fills in the masked places.",
        alt=lambda found: (
            f"{found['objective']}: {found['sheet'].asked} of {len(found['sheet'].shown)} "
            "positions are asked."
        ),
        figsize=(7.4, 2.9),
        main="rate",
        frames={"rate": [15, 40], "objective": ["MLM", "span corruption", "ELECTRA"]},
        predict=guess(
            "Span corruption cuts out 15 % of the tokens in spans of 3. Of 100 positions that the "
            "network then computes, how many are asked for a token of the text?",
            answer=lambda found: round(100 * found["asked"] / found["read"], 1),
            at={"objective": "span corruption", "rate": 15, "span": 3},
        ),
        ignored=ignored,
        objective=knob(list(KINDS), default="MLM"),
        rate=knob(list(RATES), default=15, label="hidden, per cent"),
        span=knob(list(SPANS), default=3, label="span length"),
        seed=knob(0, 5, default=0, label="draw"),
    )


def fillers() -> Panel:
    """ELECTRA's task, with generators from hopeless to good."""
    models: dict[str, Any] = {"random words": None}
    models |= {name: load(name, device="cpu").model for name in scaling.SIZES}
    ids = windows_of(runs.tokenizer(), held_out_novel(), 4, 128)

    def compute(generator: str, rate: int) -> dict[str, Any]:
        draws = torch.Generator().manual_seed(1)
        made = objectives.electra_masking(ids, rate / 100, mask_token=runs.MASK, generator=draws)
        found = fill(ids, made, models[generator], draws)
        asked = made.labels != IGNORED
        before, after = (
            " ".join(map(piece, row[:24].tolist())) for row in (ids[0], found.inputs[0])
        )
        return {
            "filled": 100 * float(asked.float().mean()),
            "right": 100 * float((~found.labels.bool() & asked).sum() / asked.sum()),
            "new": 100 * float(found.labels.mean()),
            "before": before,
            "after": after,
        }

    def draw(found: Mapping[str, Any], fig: Figure) -> None:
        axes = fig.subplots()
        lucky = found["filled"] * found["right"] / 100
        parts = (
            ("left alone", 100 - found["filled"], "#C9CDD3"),
            ("filled in, the same again", lucky, PALETTE[2]),
            ("replaced", found["new"], PALETTE[1]),
        )
        start = 0.0
        for name, width, c in parts:
            axes.barh([0], [width], left=start, color=c, label=name, height=0.5)
            start += width
        axes.set_xlim(0, 100)
        axes.set_ylim(-0.5, 1.0)
        axes.set_yticks([])
        axes.set_xlabel("tokens of the text, per cent")
        axes.legend(ncol=3, loc="upper left")

    def text(found: Mapping[str, Any]) -> str:
        return "\n".join(
            [
                f"Filled in: {found['filled']:.1f} %",
                f"The very word again: {found['right']:.1f} %",
                f"Replaced: {found['new']:.1f} %",
                f"Right if one always says “original”: {100 - found['new']:.1f} %",
                f"Before: {found['before']} …",
                f"After: {found['after']} …",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Who writes the replacements?",
        caption="What becomes of 512 tokens of a held-out novel. The models read the words before "
        "a place, and draw from what they find likely.",
        figsize=(6.6, 1.7),
        main="rate",
        frames={"rate": [15, 50], "generator": ["random words", "mini-5m"]},
        predict=guess(
            "mini-5m draws a word for each chosen place, from what it finds likely there. How many "
            "of 100 draws are the very word that was in the text?",
            answer=lambda found: round(found["right"], 1),
            at={"generator": "mini-5m", "rate": 15},
        ),
        rate=knob(list(range(5, 55, 5)), default=15, label="chosen, per cent"),
        generator=knob(list(FILLERS), default="mini-5m"),
    )


def budgets() -> Panel:
    """The three sizes at one compute, and the size that the rule asks for."""
    slices = {round(math.log10(one.flops), 2): one for one in scaling.comparable()}

    def compute(budget: float) -> dict[str, Any]:
        one = slices[budget]
        return {"slice": one, "rule": objectives.chinchilla(one.flops)}

    def draw(found: Mapping[str, Any], fig: Figure) -> None:
        axes = fig.subplots()
        one: scaling.Slice = found["slice"]
        for c, name in zip(PALETTE, scaling.SIZES):
            if name in one.losses:
                size = scaling.curves()[name].parameters
                axes.plot([size], [one.losses[name]], "o", color=c, markersize=9)
                axes.annotate(
                    name, (size, one.losses[name]), (0, 9), textcoords="offset points",
                    ha="center", fontsize=9, color=c,
                )  # fmt: skip
        axes.axvline(found["rule"].parameters, color="0.4", linestyle="--", linewidth=1.4)
        axes.text(
            found["rule"].parameters * 1.05, 5.45, "the rule", fontsize=9, color="0.3", va="top"
        )
        axes.set_xscale("log")
        axes.set_xlim(2e5, 1e7)
        axes.set_ylim(3.7, 5.5)
        axes.set_xticks([3e5, 1e6, 5e6], ["0.3 M", "1 M", "5 M"])
        axes.minorticks_off()
        axes.set_xlabel("parameters")
        axes.set_ylabel("nats per token")

    def text(found: Mapping[str, Any]) -> str:
        one: scaling.Slice = found["slice"]
        rule: objectives.Allocation = found["rule"]
        lines = [
            f"Operations: {one.flops:.1e}",
            f"The rule: {rule.parameters / 1e6:.2f} million parameters, "
            f"{rule.tokens / 1e6:.1f} million tokens",
        ]
        for name, loss in one.losses.items():
            size = scaling.curves()[name].parameters
            lines.append(
                f"{name}: {loss:.2f} nats after {one.flops / 6 / size / 1e6:.1f} million tokens"
            )
        lines.append(f"Lowest: {one.best}")
        return "\n".join(lines)

    known = sorted(slices)
    last = slices[known[-1]]
    text_of = {
        name: last.flops / 6 / scaling.curves()[name].parameters / 1e6 for name in last.losses
    }
    bought = " or ".join(f"{tokens:.0f} million tokens for {n}" for n, tokens in text_of.items())
    return panel(
        compute,
        draw,
        text=text,
        title="One budget, three sizes",
        caption="Held-out loss of each size after the text that the budget buys it. Dashed: the "
        "size that Chinchilla's rule asks for.",
        figsize=(6.0, 2.4),
        frames=[known[0], known[len(known) // 2], known[-1]],
        predict=guess(
            f"{last.flops:.0e} operations buy {bought}. Which has the lower loss then?",
            list(last.losses),
            answer=lambda found: found["slice"].best,
            at={"budget": known[-1]},
        ),
        budget=knob(known, default=known[-1], label="log₁₀ of the operations"),
    )
