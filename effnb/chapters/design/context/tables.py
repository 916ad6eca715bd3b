"""The tables and sentences of the chapter on context, from stored results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from effnb.lab import NOT_MEASURED, results, table
from effnb.lab.changes import Change, Row, if_measured, pick, spoken, tidy
from effnb.lab.results import NotMeasured, StoredResult
from effnb.lab.tables import Table

CHAPTER = "02_design/6_context"
ORDER = ("RoPE", "PI", "NTK-aware", "NTK-by-parts", "YaRN")
STEPS = (2, 8, 20)


def stored(part: str) -> StoredResult | NotMeasured:
    """A stored table of this chapter's sweep."""
    return results.read(f"{CHAPTER}/{part}")


def claimed(part: str) -> StoredResult | NotMeasured:
    """A stored table of the sweep behind the verdicts."""
    return results.read(f"{CHAPTER}_claims/{part}")


# --- loss by place --------------------------------------------------------------------------------


def region(data: Row, method: str, first: int, last: int) -> float:
    """Mean loss of a method over the places from `first` up to `last`."""
    row = pick(data["table"], method=method)[0]
    return fmean(row["curve"][first // data["bin"] : last // data["bin"]])


def end_of(data: Row) -> int:
    """Places of the texts that were read."""
    return data["bin"] * len(data["table"][0]["curve"])


@if_measured
def positions_said(data: Row) -> str:
    """What the model's perplexity is inside and far outside its length, with and without YaRN."""
    end, trained = end_of(data), data["trained"]
    inside = math.exp(region(data, "RoPE", 0, trained))
    far = {m: math.exp(region(data, m, end - trained, end)) for m in ("RoPE", "YaRN")}
    return (
        f"{data['model']}, perplexity: {inside:.0f} on its first {trained} tokens. On the last "
        f"{trained} of {end:,} tokens: {far['RoPE']:,.0f} as trained, {far['YaRN']:.0f} with YaRN."
    )


@if_measured
def positions_table(data: Row) -> Table:
    """Perplexity by region of the text, for each method."""
    end, trained = end_of(data), data["trained"]
    edges = [0, trained, 2 * trained, 4 * trained, end]
    names = [f"{a + 1:,}-{b:,}" for a, b in pairwise(edges)]
    return table(
        [
            {"method": method}
            | {
                name: math.exp(region(data, method, a, b))
                for name, a, b in zip(names, edges, edges[1:], strict=False)
            }
            for method in ORDER
        ],
        {"method": "", **dict.fromkeys(names, ",.1f")},
        caption=f"{data['model']}: perplexity by place in {data['chapters']} chapters of a "
        f"held-out novel, all methods at a scale of {data['table'][0]['factor']:.0f}.",
    )


# --- the same tokens with more context ------------------------------------------------------------


def between(rows: Sequence[Row], model: str, after: tuple, before: tuple) -> Change:
    """The difference of two (method, context), chapter by chapter."""
    found = [
        pick(rows, model=model, method=m, context=c)[0]["documents"] for m, c in (after, before)
    ]
    return Change.between(*found)


@if_measured
def zero_shot_table(rows: Sequence[Row]) -> Table:
    """What each method costs inside the trained length, and what it is worth beyond."""
    near, far = sorted({row["context"] for row in rows})
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = []
    for method in ORDER:
        line: dict[str, Any] = {"method": method}
        for model in models:
            for context in (near, far):
                found = pick(rows, model=model, method=method, context=context)
                base = pick(rows, model=model, method="RoPE", context=near)
                line[f"{model}, {context:,}"] = (
                    tidy(fmean(found[0]["documents"]) - fmean(base[0]["documents"]))
                    if found and base
                    else NOT_MEASURED
                )
        lines.append(line)
    return table(
        lines,
        {"method": "", **{k: "+.3f" for k in lines[0] if k != "method"}},
        caption=f"Nats per token above the original with {near} tokens, on the same tokens, with "
        f"{near} and with {far:,} tokens of text. Nothing is trained; the scale is 4.",
    )


@if_measured
def zero_shot_said(rows: Sequence[Row]) -> str:
    """How the methods follow each other at the target length, in sentences."""
    near, far = sorted({row["context"] for row in rows})
    model = rows[0]["model"]
    steps = pairwise(ORDER[1:])
    parts = []
    for before, after in steps:
        change = between(rows, model, (after, far), (before, far))
        parts.append(f"{after} is {change.word()} than {before} ({change.number()} nats)")
    said = "; ".join(parts).replace("indistinguishable than", "indistinguishable from")
    own = between(rows, model, ("YaRN", far), ("RoPE", near))
    word = {"better": "lower than", "worse": "higher than"}.get(own.word(), "no different from")
    return (
        f"{model}, with {far:,} tokens: {said}. YaRN's loss there is {word} that of the original "
        f"with {near} tokens ({own.number()} nats)."
    )


@if_measured
def variants_said(data: Row) -> str:
    """What the other ramp and the temperature change at a scale of 4, in a sentence."""
    rows = data["table"]

    def far(method: str) -> float:
        return pick(rows, method=method, factor=4.0)[0]["far"]

    pairs = {
        "the paper's ramp instead of the code's": far("YaRN, paper's ramp") - far("YaRN"),
        "no temperature": far("YaRN, no temperature") - far("YaRN"),
    }
    said = spoken([f"{name} changes it by {tidy(v):+.3f}" for name, v in pairs.items()])
    return (
        f"YaRN at {data['length']:,} tokens and a scale of 4, nats: {said} "
        f"(means of {data['chapters']} chapters)."
    ).replace(" -", " −")


@if_measured
def best_factor_said(data: Row) -> str:
    """The scale that suits each method best at a length four times the trained one."""
    best = {}
    for method in ORDER[1:]:
        rows = pick(data["table"], method=method)
        best[method] = min(rows, key=lambda row: row["far"])["factor"]
    said = spoken([f"{factor:.0f} for {method}" for method, factor in best.items()])
    return f"Of the scales that were tried, the best at {data['length']:,} tokens is {said}."


# --- short training -------------------------------------------------------------------------------


def tuned_loss(rows: Sequence[Row], method: str, steps: int) -> float | None:
    """Mean loss over seeds and chapters; None where nothing is stored."""
    found = pick(rows, method=method, steps=steps)
    return fmean(fmean(row["documents"]) for row in found) if found else None


@if_measured
def tuned_table(rows: Sequence[Row]) -> Table:
    """The loss at the target length after a few steps, by method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    tokens = {row["steps"]: row["training_tokens"] for row in rows}
    names = {steps: f"{steps} steps, {tokens[steps]:,} tokens" for steps in sorted(tokens)}
    seeds = len({row["seed"] for row in rows})
    return table(
        [
            {"method": method}
            | {name: tuned_loss(rows, method, steps) for steps, name in names.items()}
            for method in methods
        ],
        {"method": "", **dict.fromkeys(names.values(), ".3f")},
        caption="mini-300k, trained on texts of 2,048 tokens: nats per token on the last 256 of "
        f"2,048 held-out tokens; means of {seeds} seed{'s' * (seeds > 1)} and 12 chapters.",
    )


def steps_to(rows: Sequence[Row], method: str, loss: float) -> int | None:
    """The fewest measured steps after which a method's loss is no higher."""
    for steps in sorted({row["steps"] for row in rows}):
        found = tuned_loss(rows, method, steps)
        if found is not None and found <= loss:
            return steps
    return None


@if_measured
def tuned_said(rows: Sequence[Row]) -> str:
    """After how many steps and tokens each method has reached what PI reaches at the end."""
    last = max(row["steps"] for row in rows)
    per_step = rows[0]["training_tokens"] // rows[0]["steps"]
    goal = tuned_loss(rows, "PI", last)
    if goal is None:
        return "Position Interpolation's training is not measured."
    parts = []
    for method in dict.fromkeys(row["method"] for row in rows):
        steps = steps_to(rows, method, goal)
        parts.append(
            f"{method} {steps} ({steps * per_step:,} tokens)" if steps else f"{method} none"
        )
    return (
        f"Of {spoken([str(s) for s in sorted({r['steps'] for r in rows})])} steps, the fewest that "
        f"reach PI's loss after {last} ({goal:.3f} nats): {'; '.join(parts)}."
    )


# --- recall ---------------------------------------------------------------------------------------


@if_measured
def recall_said(data: Row) -> str:
    """Which model was chosen, and how much it recalls inside and beyond, in sentences."""
    inside = data["inside"][data["model"]]
    enough = inside >= data["enough"]
    why = (
        f"the first of the bench that recalls {data['enough']:.0%}"
        if enough
        else f"the best of the bench, although it recalls less than {data['enough']:.0%}"
    )
    parts = [f"{row['method']} {beyond(data, row):.0%}" for row in data["table"]]
    return (
        f"{data['model']}, {why}: {inside:.0%} within {data['trained']} tokens as trained. "
        f"Beyond them: {spoken(parts)}."
    )


def beyond(data: Row, row: Mapping[str, Any]) -> float:
    """Part of all prompts longer than the trained length that were answered."""
    cells = [
        c
        for length, correct in zip(data["lengths"], row["correct"], strict=True)
        if length > data["trained"]
        for c in correct
    ]
    return sum(cells) / (len(cells) * data["trials"])


# --- a real model ---------------------------------------------------------------------------------


@if_measured
def smollm2_said(data: Row) -> str:
    """SmolLM2's perplexity before and behind the end of its length, in a sentence."""
    end, trained = end_of(data), data["trained"]
    parts = []
    for row in data["table"]:
        inside, outside = (
            math.exp(region(data, row["method"], a, b)) for a, b in ((0, trained), (trained, end))
        )
        parts.append(f"{row['method']} {inside:.1f} and {outside:,.1f}")
    return (
        f"SmolLM2-135M, perplexity on the first {trained:,} tokens and on the {end - trained:,} "
        f"behind them: {'; '.join(parts)}."
    )


# --- files ----------------------------------------------------------------------------------------


def round_trip_table(found: Mapping[str, tuple[str, float]]) -> Table:
    """What each method is called in a saved configuration, and whether its logits come back."""
    return table(
        [
            {
                "method": name,
                "rope_type": kind,
                "same logits": "yes" if gap < 1e-5 else f"{gap:.1g}",
            }
            for name, (kind, gap) in found.items()
        ],
        caption="What `save_pretrained` writes, and whether the model that `from_pretrained` reads "
        "gives the same logits.",
    )
