"""The panels of the chapter on many tasks: orders, mixtures, few examples, instructions."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from effnb.chapters.finetuning.multitask import methods, tables
from effnb.chapters.finetuning.multitask.drawings import COLOURS, by_accuracy
from effnb.finetuning.instructions import instruction_batches
from effnb.finetuning.t_few import LOSSES
from effnb.lab import PALETTE, guess, knob, load, panel
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.panels import Panel
from effnb.lab.task_inputs import choose
from effnb.lab.tasks import task

# ------------------------------------------------------------------------------ four examples

POINTS = {"less than 10": 0.1, "10 to 25": 0.25, "25 to 40": 0.4, "more than 40": math.inf}
"""Choices of a guess about the distance between two orders, and where each ends."""
ANSWERS = {"as they are": "raw", "calibrated": "calibrated"}


def points_choice(distance: float) -> str:
    """The choice that a distance belongs to."""
    return next(words for words, end in POINTS.items() if distance < end)


@if_measured
def orders(rows: Sequence[Row], asked: str = "language") -> Panel:
    """The same four examples in any order, as the sweep found it."""
    found = tables.questions_of(rows)
    asked = asked if asked in found else found[0]
    about = methods.QUESTIONS[asked]
    count = len(pick(rows, question=found[0]))

    second = len(found) > 1  # the sweep may have measured one question only

    def compute(order: int, answers: str, question: str = found[0]) -> dict[str, Any]:
        own = by_accuracy(rows, question)
        return {
            "row": own[min(order, len(own)) - 1],
            "place": min(order, len(own)),
            "all": [row[ANSWERS[answers]] for row in own],
            "way": ANSWERS[answers],
            "words": methods.QUESTIONS[question].words,
            "swing": tables.swing(rows, question, "raw"),
        }

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        left, right = fig.subplots(1, 2, width_ratios=[5, 2])
        heights = [100 * value for value in result["all"]]
        places = range(1, len(heights) + 1)
        left.plot(places, heights, "o", color="0.7", markersize=5)
        here = result["place"]
        left.plot([here], [heights[here - 1]], "o", color=COLOURS[result["way"]], markersize=10)
        left.axhline(50, color="0.45", linestyle=":")
        left.set_ylim(min(30.0, min(heights) - 5), 102)
        left.set_xlabel("orders, from the worst answers to the best")
        left.set_ylabel("right, per cent")
        shares = [100 * share for share in result["row"]["nothing"]]
        right.bar([0, 1], shares, color=[PALETTE[2], PALETTE[4]], width=0.6)
        right.set_xticks([0, 1], result["words"])
        right.axhline(50, color="0.45", linestyle=":")
        right.set_ylim(0, 100)
        right.set_ylabel("per cent")
        right.set_title("asked about nothing")

    def text(result: Mapping[str, Any]) -> str:
        row, words = result["row"], result["words"]
        said = ", ".join(words[int(k)] for k in row["labels"])
        return "\n".join(
            [
                f"Answers of the four examples: {said}",
                f"Right as they are: {row['raw']:.0%}",
                f"Right, calibrated: {row['calibrated']:.0%}",
                f"Nothing is called {words[0]}: {row['nothing'][0]:.0%}",
                f"Best order minus worst, as they are: {100 * result['swing']:.0f} points",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="The same four examples, in another order",
        caption="SmolLM2-135M. Left: accuracy in each order, the chosen one in colour. Right: what "
        "this prompt says when it is asked about no content at all.",
        figsize=(6.6, 2.4),
        frames={"order": [1, count // 2, count]} | ({"question": None} if second else {}),
        predict=guess(
            f"The question of {asked}, {about.words[0]} or {about.words[1]}, behind two examples "
            "of each. How many points lie between the worst order of the four and the best?",
            list(POINTS),
            answer=lambda result: points_choice(result["swing"]),
            at={"question": asked} if second else {},
        ),
        order=knob(1, count, default=1),
        **({"question": knob(found)} if second else {}),
        answers=knob(list(ANSWERS)),
    )


# ----------------------------------------------------------------------------------- mixtures

TEMPERATURES = {"1": 1.0, "2": 2.0, "4": 4.0, "∞": math.inf}
CAPS = {"none": None, "1,024": 1024, "256": 256, "64": 64}
ROWS = 1920
"""Rows of training that the panel counts with."""


def mixture() -> Panel:
    """How often a model meets each task."""
    names = list(methods.MIXED)

    def compute(temperature: str, cap: str, tasks: int) -> dict[str, Any]:
        sizes = {name: methods.MIXED[name] for name in names[-tasks:]}
        given = {"cap": CAPS[cap], "temperature": TEMPERATURES[temperature]}
        return {
            "sizes": sizes,
            "rates": methods.mixture(sizes, **given),
            "seen": tables.repeats(sizes, ROWS, **given),
        }

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        left, right = fig.subplots(1, 2, sharey=True)
        shown = list(reversed(result["sizes"]))
        left.barh(shown, [100 * result["rates"][name] for name in shown], color=PALETTE[0])
        left.set_xlim(0, 100)
        left.set_xlabel("of the rows, per cent")
        right.barh(shown, [result["seen"][name] for name in shown], color=PALETTE[1])
        right.axvline(1, color="0.45", linestyle=":")
        right.set_xlabel("times each example is seen")

    def text(result: Mapping[str, Any]) -> str:
        small = list(result["sizes"])[-1]
        rates = "; ".join(f"{name} {rate:.1%}" for name, rate in result["rates"].items())
        return "\n".join(
            [
                f"Parts of the tasks: {rates}",
                f"Smallest task, {small}: {result['rates'][small]:.1%}",
                f"Its examples are seen: {result['seen'][small]:.2f} times",
            ]
        )

    smallest = names[-1]
    return panel(
        compute,
        draw,
        text=text,
        title="Mix the tasks",
        caption="Tasks with unequal numbers of examples. Left: the part of each in the batches. "
        f"Right: how often each of its examples is seen in {ROWS:,} rows; dotted: once.",
        figsize=(6.6, 2.4),
        main="temperature",
        frames={"temperature": None, "cap": ["none", "256"]},
        predict=guess(
            f"By size, the smallest of the six tasks, {smallest} with {methods.MIXED[smallest]} "
            f"examples of {sum(methods.MIXED.values()):,}, fills "
            f"{methods.MIXED[smallest] / sum(methods.MIXED.values()):.1%} of the rows. What part "
            "does it fill at T = 2?",
            answer=lambda result: round(100 * result["rates"][smallest], 1),
            at={"temperature": "2"},
            unit="%",
        ),
        temperature=knob(list(TEMPERATURES), default="1", label="temperature T"),
        cap=knob(list(CAPS), label="cap K"),
        tasks=knob([2, 3, 4, 5, 6], default=6, label="number of tasks"),
    )


# --------------------------------------------------------------------- training while one waits

SUBSETS = {
    "LM": LOSSES[:1],
    "LM + UL": LOSSES[:2],
    "LM + LN": (LOSSES[0], LOSSES[2]),
    "LM + UL + LN": LOSSES,
}
STEPS = {"few": 24, "instructions": 24}
JUDGED = 32
"""Test documents that a training panel looks at."""


def quick() -> bool:
    """Whether every position is only tried, because each would take seconds."""
    return os.environ.get("EFFNB_SWEEP") == "1"


@cache
def decoder() -> Any:
    """The model that the panels train."""
    return load("mini-1m", device="cpu")


def tested(name: str) -> list:
    """Test documents of a task."""
    return methods.one_per_document(task(name).test, 4 if quick() else JUDGED)


def few(name: str = "section") -> Panel:
    """(IA)³ from a few examples, by any of T-Few's losses."""

    def compute(losses: str, shots: int) -> dict[str, Any]:
        loaded, found = decoder(), task(name)
        tuned = methods.t_few(
            loaded.model, loaded.tokenizer, found, shots=shots, losses=SUBSETS[losses],
            steps=1 if quick() else STEPS["few"],
        )  # fmt: skip
        test = tested(name)
        correct = {
            label: methods.ranked(model, loaded.tokenizer, found, test)
            for label, model in (("untrained", loaded.model), ("trained", tuned))
        }
        chances = methods.chances(tuned, loaded.tokenizer, found, test)
        return {"losses": losses, "chances": chances} | {
            label: fmean(own) for label, own in correct.items()
        }

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        left, right = fig.subplots(1, 2, width_ratios=[1, 1])
        for y, (label, colour) in enumerate((("trained", PALETTE[0]), ("untrained", "0.7"))):
            left.barh([y], [100 * result[label]], color=colour, height=0.6)
        left.axvline(100 / len(task(name).labels), color="0.45", linestyle=":")
        left.set_yticks([0, 1], ["trained", "untrained"])
        left.set_xlim(0, 100)
        left.set_xlabel("right, per cent")
        shares = [100 * math.exp(nats) for nats in result["chances"]]
        right.barh([1, 0], shares, color=[PALETTE[2], PALETTE[1]], height=0.6)
        right.set_yticks([1, 0], ["right answer", "wrong ones"])
        right.set_xlabel("probability of a token, per cent")

    def text(result: Mapping[str, Any]) -> str:
        good, bad = result["chances"]
        return "\n".join(
            [
                f"Right, untrained: {result['untrained']:.0%}",
                f"Right, trained: {result['trained']:.0%}",
                f"Right answer: {good:.2f} nats a token",
                f"Wrong answers, mean: {bad:.2f} nats a token",
                f"Distance: {good - bad:.2f} nats",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Learn six topics from a few examples",
        caption="mini-1m with (IA)³ after a short training. Left: test texts that get their topic; "
        "dotted: guessing. Right: the geometric mean of the probabilities of the answers' tokens.",
        figsize=(6.6, 1.9),
        trains=True,
        main="losses",
        frames={"losses": ["LM", "LM + UL + LN"]},
        predict=guess(
            "The first loss, LM, makes right answers likelier and never sees a wrong one. What "
            "does it do to the probability of the wrong answers?",
            ["raises it too", "leaves it within a tenth of a nat", "lowers it"],
            answer=lambda result: moved(result["chances"][1] - untrained_chances(name)[1]),
            at={"losses": "LM"},
        ),
        losses=knob(list(SUBSETS)),
        shots=knob([4, 8, 16, 32], default=16, label="examples of each topic"),
    )


def moved(nats: float) -> str:
    """The choice that a change of the wrong answers' log-probability belongs to."""
    if abs(nats) <= 0.1:
        return "leaves it within a tenth of a nat"
    return "raises it too" if nats > 0 else "lowers it"


@cache
def untrained_chances(name: str) -> tuple[float, float]:
    """Of the right and the wrong answers, before any training."""
    loaded = decoder()
    return methods.chances(loaded.model, loaded.tokenizer, task(name), tested(name))


TRAINED = ("section", "language", "work")
"""Tasks that the panel on instructions trains, the first of them always."""
NEW = "match"


def instructions() -> Panel:
    """Train on more or fewer tasks and wordings, and ask in every wording."""

    def ask(model: Any, name: str, template: int) -> float:
        loaded, own = decoder(), tested(name)
        chosen = choose(
            model, loaded.tokenizer, task(name), own, template=template, tokens=methods.TOKENS
        )
        return fmean(c == e.label for c, e in zip(chosen, own, strict=True))

    places = {f"{TRAINED[0]}, wording {k + 1}": (TRAINED[0], k) for k in range(3)}
    places[f"{NEW}, never trained"] = (NEW, 0)

    @cache
    def before() -> dict[str, float]:
        return {said: ask(decoder().model, *place) for said, place in places.items()}

    def compute(tasks: int, wordings: int) -> dict[str, Any]:
        given = [methods.instruction_task(name, "train", 256) for name in TRAINED[:tasks]]
        batches = instruction_batches(given, size=16, templates=wordings, temperature=math.inf)
        steps = 1 if quick() else STEPS["instructions"]
        loaded = decoder()
        tuned = methods.follow(loaded.model, loaded.tokenizer, batches, steps=steps)
        after = {said: ask(tuned, *place) for said, place in places.items()}
        return {"before": before(), "after": after, "wordings": wordings}

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        axes = fig.subplots()
        shown = list(reversed(places))
        for y, said in enumerate(shown):
            axes.barh([y + 0.2], [100 * result["before"][said]], color="0.7", height=0.36,
                      label=None if y else "untrained")  # fmt: skip
            axes.barh([y - 0.2], [100 * result["after"][said]], color=PALETTE[0], height=0.36,
                      label=None if y else "trained")  # fmt: skip
        axes.set_yticks(range(len(shown)), shown)
        axes.set_xlim(0, 100)
        axes.set_xlabel("right, per cent")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)

    def text(result: Mapping[str, Any]) -> str:
        seen = "the first wording only"
        if result["wordings"] > 1:
            seen = f"the first {result['wordings']} wordings"
        return "\n".join(
            [f"Trained: {seen} of each task"]
            + [
                f"{said[0].upper()}{said[1:]}: {result['before'][said]:.0%} to "
                f"{result['after'][said]:.0%}"
                for said in places
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Train on instructions",
        caption=f"mini-1m after a short training on instructions: the topic asked in three "
        f"wordings, and a task that it was not trained on. {JUDGED} test documents each.",
        figsize=(6.6, 2.5),
        trains=True,
        main="tasks",
        frames={"tasks": [1, 3]},
        tasks=knob([1, 2, 3], label="tasks trained"),
        wordings=knob([1, 2], label="wordings of each"),
    )
