"""What the chapter on many tasks says with its stored measurements: tables and sentences.

A part of the sweep may be missing, or may have stopped half-way: everything here rests on the rows
that are there, and says on how many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, pstdev
from typing import Any

from effnb.chapters.finetuning.multitask import methods
from effnb.finetuning.mixing import mixing_rates
from effnb.lab import results
from effnb.lab.changes import Change, Row, if_measured, pick, spoken, tidy
from effnb.lab.claims import Verdict
from effnb.lab.results import NotMeasured, StoredResult
from effnb.lab.tables import NOT_MEASURED, Table, table

CHAPTER = "04_finetuning/3_multitask"
WAYS = ("raw", "calibrated")
LABELLED = ("section", "match", "work", "language", "origin")
"""The tasks of the verdict's mixture, in the order of its documents."""
KINDS = {"new wordings": "trained tasks, new wording", "new tasks": "tasks of a new kind"}


def stored(part: str) -> StoredResult | NotMeasured:
    """A stored table of this chapter."""
    return results.read(f"{CHAPTER}/{part}")


def judged(part: str) -> StoredResult | NotMeasured:
    """A stored table that a verdict of this chapter rests on."""
    return results.read(f"{CHAPTER}_claims/{part}")


def percent(value: float, digits: int = 0) -> str:
    """A part as per cent."""
    return f"{tidy(100 * value, digits):.{digits}f} %"


def counted(number: int, thing: str) -> str:
    """A number of things: 1 seed, 3 seeds."""
    return f"{number} {thing}{'s' * (number != 1)}"


def one_decimal(value: float) -> float:
    """A part in per cent, as tables show it."""
    return tidy(100 * value, 1)


# --- orders ---------------------------------------------------------------------------------------


def questions_of(rows: Sequence[Row]) -> list[str]:
    """The questions that have rows."""
    return list(dict.fromkeys(row["question"] for row in rows))


def accuracies(rows: Sequence[Row], question: str, way: str) -> list[float]:
    """The accuracy of each row, in the order of the rows."""
    return [row[way] for row in pick(rows, question=question)]


def texts_of(rows: Sequence[Row]) -> int:
    """How many texts each row was asked about."""
    return len(rows[0]["raw_answers"])


def preferred(row: Row, way: str) -> float:
    """The part of the texts that get the label which this prompt says most often.

    The texts carry both labels in turn, so that an answer which is right or wrong tells the label.
    """
    said = [
        place % 2 if right == "1" else 1 - place % 2
        for place, right in enumerate(row[f"{way}_answers"])
    ]
    return max(fmean(said), 1 - fmean(said))


def swing(rows: Sequence[Row], question: str, way: str) -> float:
    """From the worst order to the best."""
    found = accuracies(rows, question, way)
    return max(found) - min(found)


@if_measured
def orders_said(rows: Sequence[Row], question: str = "topic") -> str:
    """How much the order of four examples decides, before calibration and after."""
    raw, calibrated = (accuracies(rows, question, way) for way in WAYS)
    change = fmean(calibrated) - fmean(raw)
    moved = "moves" if abs(change) < 5e-4 else "rises" if change > 0 else "falls"
    spread = [percent(pstdev(found), 1) for found in (raw, calibrated)]
    worse = sum(c < r for r, c in zip(raw, calibrated, strict=True))
    return (
        f"{question}, {len(raw)} orders of the same four examples, {texts_of(rows)} texts: between "
        f"{percent(min(raw))} and {percent(max(raw))} are right, and calibrated between "
        f"{percent(min(calibrated))} and {percent(max(calibrated))}.\n"
        f"The mean {moved} from {percent(fmean(raw))} to {percent(fmean(calibrated))}; the "
        f"standard deviation over the orders goes from {spread[0]} to {spread[1]}.\n"
        f"Calibration makes {worse} of the {len(raw)} orders worse."
    )


@if_measured
def orders_table(rows: Sequence[Row]) -> Table:
    """Both questions, both ways."""
    lines = []
    for question in questions_of(rows):
        for way in WAYS:
            found = accuracies(rows, question, way)
            lines.append(
                {
                    "question": question,
                    "answers": way,
                    "worst": one_decimal(min(found)),
                    "mean": one_decimal(fmean(found)),
                    "best": one_decimal(max(found)),
                    "one label": one_decimal(
                        fmean(preferred(row, way) for row in pick(rows, question=question))
                    ),
                }
            )
    numbers = dict.fromkeys(("worst", "mean", "best", "one label"), ".1f")
    return table(
        lines,
        {"question": "", "answers": ""} | numbers,
        caption=f"SmolLM2-135M, four examples in each of their orders, {texts_of(rows)} texts a "
        "question: per cent right. One label: how many of the texts get the label that the prompt "
        "gives most often; half of them should.",
    )


def leaning(rows: Sequence[Row], question: str, last: int) -> float:
    """How much of "nothing" goes to the first label, where the last example has this label."""
    own = [r for r in pick(rows, question=question) if r["labels"][-1] == str(last)]
    return fmean(row["nothing"][0] for row in own)


@if_measured
def recency_said(rows: Sequence[Row]) -> str:
    """Whether a prompt leans towards the label of its last example."""
    lines = []
    for question in questions_of(rows):
        words = methods.QUESTIONS[question].words
        after = [leaning(rows, question, last) for last in (0, 1)]
        toward = (
            "towards" if after[0] > after[1] + 0.005
            else "away from" if after[0] < after[1] - 0.005
            else "neither towards nor away from"
        )  # fmt: skip
        lines.append(
            f"{question}: asked about nothing, the prompt says {words[0]!r} with "
            f"{percent(after[0])} when its last example is {words[0]!r}, and with "
            f"{percent(after[1])} when that is {words[1]!r}: it leans {toward} its last example."
        )
    return "\n".join(lines)


@if_measured
def majority_table(rows: Sequence[Row]) -> Table:
    """What a prompt says of nothing, by how many of its examples have the first label."""
    lines = []
    for question in questions_of(rows):
        for first in sorted({row["first"] for row in rows}):
            own = pick(rows, question=question, first=first)
            if own:
                lines.append(
                    {
                        "question": question,
                        "examples": f"{first} of 4 {methods.QUESTIONS[question].words[0]}",
                        "says it of nothing": one_decimal(fmean(r["nothing"][0] for r in own)),
                        "right": one_decimal(fmean(r["raw"] for r in own)),
                        "calibrated": one_decimal(fmean(r["calibrated"] for r in own)),
                    }
                )
    draws = len({row["seed"] for row in rows})
    return table(
        lines,
        {
            "question": "", "examples": "", "says it of nothing": ".1f", "right": ".1f",
            "calibrated": ".1f",
        },
        caption=f"SmolLM2-135M: what a prompt says of no content, and how often it is right on "
        f"{texts_of(rows)} texts; per cent, mean of {counted(draws, 'draw')} of the examples.",
    )  # fmt: skip


@if_measured
def shots_table(rows: Sequence[Row]) -> Table:
    """More examples, both ways."""
    lines = []
    for question in questions_of(rows):
        for count in sorted({row["shots"] for row in pick(rows, question=question)}):
            own = pick(rows, question=question, shots=count)
            raw = [row["raw"] for row in own]
            lines.append(
                {
                    "question": question,
                    "examples": count,
                    "right": one_decimal(fmean(raw)),
                    "worst draw": one_decimal(min(raw)),
                    "best draw": one_decimal(max(raw)),
                    "calibrated": one_decimal(fmean(row["calibrated"] for row in own)),
                }
            )
    draws = len({row["seed"] for row in rows})
    return table(
        lines,
        {
            "question": "", "examples": "d", "right": ".1f", "worst draw": ".1f",
            "best draw": ".1f", "calibrated": ".1f",
        },
        caption=f"SmolLM2-135M: per cent right on {texts_of(rows)} texts, mean of at most "
        f"{counted(draws, 'draw')} of the examples.",
    )  # fmt: skip


@if_measured
def shots_said(rows: Sequence[Row]) -> str:
    """Whether more examples help."""
    lines = []
    for question in questions_of(rows):
        own = pick(rows, question=question)
        counts = sorted({row["shots"] for row in own})
        means = [fmean(row["raw"] for row in pick(own, shots=count)) for count in counts]
        best = counts[means.index(max(means))]
        steady = all(b >= a for a, b in pairwise(means))
        lines.append(
            f"{question}: from {percent(means[0])} with {counts[0]} examples to "
            f"{percent(means[-1])} with {counts[-1]}; the best mean is at {best}, and the rise is "
            f"{'steady' if steady else 'not steady'}."
        )
    return "\n".join(lines)


# --- mixtures -------------------------------------------------------------------------------------


def with_labels() -> list[str]:
    """The tasks of the mixture that are judged by accuracy, from the largest to the smallest."""
    return [name for name in methods.MIXED if methods.CLUSTERS[name] != "generation"]


@if_measured
def mixing_table(rows: Sequence[Row]) -> Table:
    """Every task's score in every mixture."""
    names = with_labels()
    ways: dict[str, list[Row]] = {"untrained": pick(rows, method="none")}
    full = pick(rows, method="full")
    for label in dict.fromkeys(row["temperature"] for row in full):
        for cap in dict.fromkeys(r.get("cap") for r in full if r["temperature"] == label):
            said = f"T = {label}" + (f", K = {cap}" if cap else "")
            ways[said] = pick(full, temperature=label, cap=cap)
    ways["(IA)³, T = ∞"] = pick(rows, method="(IA)³")
    lines = []
    for said, own in ways.items():
        if own:
            scores = {name: fmean(row[name] for row in own) for name in names}
            lines.append(
                {"trained": said}
                | {name: one_decimal(scores[name]) for name in names}
                | {"mean": one_decimal(fmean(scores.values()))}
            )
    alone = {name: pick(rows, method="alone", task=name) for name in names}
    if any(alone.values()):
        found = {n: fmean(r[n] for r in own) if own else NOT_MEASURED for n, own in alone.items()}
        whole = all(alone.values())
        lines.append(
            {"trained": "one model each"}
            | {n: one_decimal(v) if alone[n] else v for n, v in found.items()}
            | {"mean": one_decimal(fmean(found.values())) if whole else NOT_MEASURED}
        )
    seeds = len({row["seed"] for row in rows if "seed" in row})
    return table(
        lines,
        {"trained": ""} | dict.fromkeys((*names, "mean"), ".1f"),
        caption="mini-1m: per cent right on each task with labels, tasks from the largest to the "
        f"smallest; mean of at most {counted(seeds, 'seed')}. One model each: as many steps in "
        "all.",
    )


@if_measured
def mixing_said(rows: Sequence[Row]) -> str | NotMeasured:
    """What equal parts do to the largest and the smallest task."""
    names = with_labels()
    proportional = pick(rows, method="full", temperature="1", cap=None)
    equal = pick(rows, method="full", temperature="∞")
    if not proportional or not equal:
        return NotMeasured(f"{CHAPTER}/mixing")
    changes = {
        name: fmean(r[name] for r in equal) - fmean(r[name] for r in proportional) for name in names
    }
    said = [f"{name} {100 * change:+.1f}".replace("-", "−") for name, change in changes.items()]
    return f"From parts by size to equal parts, in points: {spoken(said)}."


@if_measured
def rates_table(rows: Sequence[Row]) -> Table:
    """(IA)³ at a few learning rates."""
    return table(
        [
            {"rate": row["rate"]}
            | {name: one_decimal(row[name]) for name in LABELLED}
            | {"mean": one_decimal(row["accuracy"])}
            for row in rows
        ],
        {"rate": ".2g"} | dict.fromkeys((*LABELLED, "mean"), ".1f"),
        caption="mini-1m with one (IA)³ for five tasks, after equally many steps: per cent right "
        "on validation texts, by the learning rate.",
    )


def repeats(sizes: dict[str, int], rows: int, *, cap: int | None, temperature: float) -> dict:
    """How often a run of so many rows meets each example of each task."""
    rates = mixing_rates(sizes, cap=cap, temperature=temperature)
    return {name: rates[name] * rows / size for name, size in sizes.items()}


def repeats_table(rows: int = 1920) -> Table:
    """How often each task's examples are met."""
    ways = {
        "T = 1": (None, 1.0),
        "T = 2": (None, 2.0),
        "T = ∞": (None, math.inf),
        "T = 1, K = 256": (256, 1.0),
    }
    lines = [
        {"mixture": said} | repeats(methods.MIXED, rows, cap=cap, temperature=temperature)
        for said, (cap, temperature) in ways.items()
    ]
    return table(
        lines,
        {"mixture": ""} | dict.fromkeys(methods.MIXED, ".2f"),
        caption=f"Six tasks, {rows:,} rows of training in all: how many times each example of a "
        "task is seen.",
    )


# --- a few examples, and instructions -------------------------------------------------------------


@if_measured
def few_table(rows: Sequence[Row]) -> Table:
    """T-Few's losses, one after the other."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    lines = []
    for losses in dict.fromkeys(row["losses"] for row in rows):
        line: dict[str, Any] = {"losses": losses}
        for name in names:
            own = [row["accuracy"] for row in pick(rows, task=name, losses=losses)]
            line[name] = one_decimal(fmean(own)) if own else NOT_MEASURED
            line[f"{name}, least to most"] = (
                f"{one_decimal(min(own)):.1f} to {one_decimal(max(own)):.1f}" if own else ""
            )
        lines.append(line)
    columns = {"losses": ""}
    for name in names:
        columns |= {name: ".1f", f"{name}, least to most": ""}
    seeds = len({row["seed"] for row in rows})
    return table(
        lines,
        columns,
        caption="mini-1m with (IA)³, 16 examples of each label: per cent right, mean of at most "
        f"{counted(seeds, 'seed')}, and the range over them.",
    )


@if_measured
def few_said(rows: Sequence[Row]) -> str:
    """Whether the two further losses helped."""
    lines = []
    for name in dict.fromkeys(row["task"] for row in rows):
        plain, all_three = (
            {row["seed"]: row["accuracy"] for row in pick(rows, task=name, losses=losses)}
            for losses in ("LM", "LM + UL + LN")
        )
        both = sorted(plain.keys() & all_three.keys())
        if both:
            gains = [all_three[seed] - plain[seed] for seed in both]
            better = sum(gain > 0 for gain in gains)
            lines.append(
                f"{name}: all three losses against the first alone, {100 * fmean(gains):+.1f} "
                f"points; better in {better} of {counted(len(both), 'seed')}."
            )
    return "\n".join(lines).replace("-", "−")


@if_measured
def instructions_table(rows: Sequence[Row]) -> Table:
    """What training on instructions changed, and on what."""
    lines = []
    for what, said in KINDS.items():
        before, after = (
            pick(rows, judged=what, method=method) for method in ("untrained", "instructions")
        )
        if before and after:
            start = fmean(before[0]["documents"])
            ends = [fmean(row["documents"]) for row in after]
            lines.append(
                {
                    "judged by": said,
                    "untrained": one_decimal(start),
                    "trained": one_decimal(fmean(ends)),
                    "least": one_decimal(min(ends)),
                    "most": one_decimal(max(ends)),
                }
            )
    seeds = len({row["seed"] for row in rows if row.get("seed") is not None})
    return table(
        lines,
        {"judged by": ""} | dict.fromkeys(("untrained", "trained", "least", "most"), ".1f"),
        caption="mini-1m, trained on instructions without any pair task: per cent right, mean, "
        f"least and most of {counted(seeds, 'seed')}.",
    )


@if_measured
def instructions_said(rows: Sequence[Row], judged: Verdict) -> str:
    """What a model of this size learned from instructions, as far as the verdict was measured."""
    parts = {evidence.part.name: evidence for evidence in judged.parts}
    lines, gained = [], []
    for what, said in KINDS.items():
        evidence = parts[what.replace(" ", "-")]
        if evidence.numbers() is None:
            return f"Not judged yet: {evidence.why or said}."
        numbers = Change(*(100 * value for value in evidence.numbers())).number(1)
        lines.append(f"{said}: {numbers} points; a gain is {evidence.outcome}.")
        gained.append(evidence.outcome == "shown")
    return "\n".join([*lines, LEARNED[tuple(gained)]])


LEARNED = {
    (True, False): "So it learned its tasks well enough to do them in other words; that it also "
    "learned to do a new kind of task does not show.",
    (True, True): "So it gained on other words, and on a new kind of task as well.",
    (False, True): "So it gained on a new kind of task, and not on other words for the old ones.",
    (False, False): "So neither other words nor a new kind of task shows a gain.",
}


@if_measured
def wordings_table(rows: Sequence[Row]) -> Table:
    """One wording of each task, or two: what that does to known and to new wordings."""
    names = list(dict.fromkeys(k.split(",")[0] for r in rows for k in r if k.endswith(" wording")))
    lines = []
    for wordings in sorted({row["wordings"] for row in rows}):
        own = pick(rows, wordings=wordings)
        for what in ("known wording", "last wording"):
            lines.append(
                {"wordings trained": wordings, "asked in": what}
                | {n: one_decimal(fmean(row[f"{n}, {what}"] for row in own)) for n in names}
            )
    return table(
        lines,
        {"wordings trained": "d", "asked in": ""} | dict.fromkeys(names, ".1f"),
        caption="mini-1m trained on instructions: per cent right, by the wording of the question. "
        "The last two tasks were never trained, and the last wording of no task.",
    )


METHODS = {
    "untrained": "untrained",
    "mixture": "all: one model",
    "(IA)³": "all: one (IA)³",
    "one for each": "each: five models",
}


@if_measured
def tasks_table(rows: Sequence[Row], names: Sequence[str] = LABELLED) -> Table:
    """Five tasks: one model or one (IA)³ for all, or one model for each."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row["documents"] for row in pick(rows, method=method)]
        each = len(own[0]) // len(names)
        scores = [
            fmean(fmean(found[i * each : (i + 1) * each]) for found in own)
            for i in range(len(names))
        ]
        lines.append(
            {"one for": METHODS.get(method, method)}
            | {name: one_decimal(score) for name, score in zip(names, scores, strict=True)}
            | {"mean": one_decimal(fmean(scores))}
        )
    seeds = len({row["seed"] for row in rows if row.get("seed") is not None})
    return table(
        lines,
        {"one for": ""} | dict.fromkeys((*names, "mean"), ".1f"),
        caption=f"mini-1m on five tasks in equal parts: per cent right, mean of "
        f"{counted(seeds, 'seed')}.",
    )


@if_measured
def smollm2_table(rows: Sequence[Row]) -> Table:
    """The unchanged model, asked in four ways."""
    lines, names = [], list(methods.QUESTIONS)
    each = len(rows[0]["documents"]) // len(names)
    for method in ("bare text", "words", "examples", "examples, calibrated"):
        found = [row["documents"] for row in pick(rows, method=method)]
        own = [fmean(documents) for documents in found]
        if own:
            lines.append(
                {"asked by": ASKED[method]}
                | {
                    name: one_decimal(fmean(fmean(d[i * each : (i + 1) * each]) for d in found))
                    for i, name in enumerate(names)
                }
                | {
                    "both": one_decimal(fmean(own)),
                    "least": one_decimal(min(own)),
                    "most": one_decimal(max(own)),
                }
            )
    texts = len(rows[0]["documents"])
    return table(
        lines,
        {"asked by": ""} | dict.fromkeys((*names, "both", "least", "most"), ".1f"),
        caption=f"SmolLM2-135M, two questions, {texts} texts that no picture rests on: per cent "
        "right. Least and most: over the draws of the examples.",
    )


ASKED = {
    "bare text": "the text alone",
    "words": "a pattern",
    "examples": "a pattern and four examples",
    "examples, calibrated": "the same, calibrated",
}


# --- costs ----------------------------------------------------------------------------------------


@if_measured
def cost_table(costs: Row) -> Table:
    """What one answer costs without examples, behind them, and with (IA)³ in their place."""
    alone, behind = costs["tokens"]
    lines = [
        ("a pattern", alone, 0, "nothing"),
        ("four examples, read every time", behind, 0, "nothing"),
        ("four examples, read once", alone, costs["cache_bytes"], "nothing"),
        ("(IA)³", alone, costs["ia3_bytes"], "vectors"),
    ]
    return table(
        [
            {"asked by": way, "tokens read": tokens, "KiB kept": kept / 1024, "trained": what}
            for way, tokens, kept, what in lines
        ],
        {"asked by": "", "tokens read": ",.0f", "KiB kept": ",.0f", "trained": ""},
        caption="SmolLM2-135M, one answer to the question of topic: tokens that the model has to "
        "read, and what is kept for the task, in 16-bit numbers.",
    )


def costs_of(tokenizer: Any, config: Any, texts: int, question: str = "topic") -> dict[str, Any]:
    """Tokens of a question alone and behind four examples, and what can be kept in their place."""
    about = methods.QUESTIONS[question]
    shots = [about.shot(example) for example in about.examples("train", 4, 1)]

    def length(shown: Sequence[tuple[str, str]]) -> float:
        prompts = [
            about.pattern.prompt(methods.short(example), shown)
            for example in about.examples("test", texts, 0)
        ]
        return round(fmean(len(tokenizer.encode(p, add_special_tokens=False)) for p in prompts), 1)

    alone, behind = length([]), length(shots)
    return {
        "tokens": [alone, behind],
        "cache_bytes": round(cache_bytes(config, behind - alone)),
        "ia3_bytes": ia3_bytes(config),
    }


def cache_bytes(config: Any, tokens: float) -> float:
    """Keys and values of so many tokens, 16 bits a number."""
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 2 * config.num_hidden_layers * heads * width * tokens


def ia3_bytes(config: Any) -> int:
    """The vectors of (IA)³ for keys, values and the inner feed-forward channels, 16 bits each."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * config.num_key_value_heads * width + config.intermediate_size
    return 2 * config.num_hidden_layers * each
