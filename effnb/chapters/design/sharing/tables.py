"""The tables and sentences of the chapter on sharing, from stored results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from effnb.chapters.design.sharing import methods
from effnb.lab import results, table
from effnb.lab.changes import Change, Row, if_measured, pick, spoken, tidy
from effnb.lab.results import NotMeasured, StoredResult
from effnb.lab.tables import Table

CHAPTER = "02_design/3_sharing"


def stored(part: str) -> StoredResult | NotMeasured:
    """A stored table of this chapter's sweep."""
    return results.read(f"{CHAPTER}/{part}")


def claimed(part: str) -> StoredResult | NotMeasured:
    """A stored table of the sweep behind the verdicts."""
    return results.read(f"{CHAPTER}_claims/{part}")


# --- language models that share -------------------------------------------------------------------


def losses(rows: Sequence[Row], method: str) -> list[float]:
    """The loss of each document, averaged over the seeds."""
    found = [row["documents"] for row in pick(rows, method=method)]
    return [fmean(each) for each in zip(*found, strict=True)]


def measured_methods(rows: Sequence[Row]) -> list[str]:
    """Those of the models that were trained, in the order of the tables."""
    return [name for name in methods.NAMES if pick(rows, method=name)]


def above(rows: Sequence[Row], method: str, other: str) -> Change:
    """How much higher a model's loss is than another's, on the seeds that both have."""
    seeds = {row["seed"] for row in pick(rows, method=method)}
    seeds &= {row["seed"] for row in pick(rows, method=other)}
    both = [[r for r in rows if r["method"] == m and r["seed"] in seeds] for m in (method, other)]
    return Change.between(losses(both[0], method), losses(both[1], other))


@if_measured
def shared_table(rows: Sequence[Row]) -> Table:
    """Parameters, multiply-adds and loss side by side."""
    lines = []
    for name in measured_methods(rows):
        row = pick(rows, method=name)[0]
        lines.append(
            {
                "model": methods.NAMES[name],
                "parameters": row["parameters"],
                "multiply-adds a token": row["multiply_adds"],
                "loss": fmean(losses(rows, name)),
            }
        )
    seeds = min(len(pick(rows, method=name)) for name in measured_methods(rows))
    return table(
        lines,
        {"model": "", "parameters": ",", "multiply-adds a token": ",", "loss": ".3f"},
        caption="Language models of six layers (and one of one), trained on the same tokens: nats "
        f"per token on a held-out novel, mean of {seeds} {'seed' if seeds == 1 else 'seeds'}.",
    )


@if_measured
def shared_said(rows: Sequence[Row]) -> str:
    """What sharing costs and what it gains, in sentences."""
    said = []
    for method, other, what in (
        ("all", "none", "All layers shared, against none (the same multiplications)"),
        ("all", "one layer", "All layers shared, against one layer (the same parameters)"),
        ("attention", "feed_forward", "Attention shared, against feed-forward shared"),
        ("E = 16", "none", "Token vectors of 16 numbers, against 64, with nothing shared"),
    ):
        if pick(rows, method=method) and pick(rows, method=other):
            change = above(rows, method, other)
            said.append(f"{what}: {change.word()}, {change.number()} nats.")
    return " ".join(said)


# --- costs over length ----------------------------------------------------------------------------


def seconds_of(rows: Sequence[Row], kind: str, name: str, tokens: int) -> float:
    """The middle of the rounds."""
    return median(pick(rows, method=kind, table=name, tokens=tokens)[0]["seconds"])


def lengths_of(rows: Sequence[Row]) -> list[int]:
    """Lengths at which both kinds of model were timed."""
    return sorted({row["tokens"] for row in rows})


@if_measured
def depth_said(rows: Sequence[Row]) -> str:
    """How the time of one more layer changes over the length."""
    lengths = lengths_of(rows)
    near, far = lengths[0], lengths[-1]
    parts = [
        f"{seconds_of(rows, kind, 'depth', far) / seconds_of(rows, kind, 'depth', near):.1f} times "
        f"as long in the {kind}"
        for kind in methods.READERS
    ]
    return (
        f"From {near:,} to {far:,} tokens ({far // near} times as many), one more layer takes "
        f"{spoken(parts)}."
    )


# --- what the latents let pass --------------------------------------------------------------------


@if_measured
def masked_table(rows: Sequence[Row]) -> Table:
    """Parameters, multiply-adds and loss of the models that fill in characters."""
    lines = [
        {
            "model": name,
            "parameters": found[0]["parameters"],
            "multiply-adds a text": found[0]["multiply_adds"],
            "loss": fmean(losses(rows, name)),
            "right": fmean(row["accuracy"] for row in found),
        }
        for name in methods.FILLERS
        if (found := pick(rows, method=name))
    ]
    return table(
        lines,
        {
            "model": "",
            "parameters": ",",
            "multiply-adds a text": ",",
            "loss": ".3f",
            "right": ".0%",
        },
        caption=f"Masked characters in {methods.PLACES} places of a held-out novel, after a short "
        "training: nats per masked character, and the part filled in right.",
    )


@if_measured
def masked_said(rows: Sequence[Row]) -> str:
    """What more latents are worth, and what they lack of a Transformer."""
    said = []
    for method, other in (("64 latents", "4 latents"), ("64 latents", "Transformer")):
        if pick(rows, method=method) and pick(rows, method=other):
            change = above(rows, method, other)
            said.append(f"{method} against {other}: {change.word()}, {change.number()} nats.")
    return " ".join(said)


@if_measured
def plateau_said(rows: Sequence[Row]) -> str:
    """Whether any model does better than the frequencies, and a convolution that is trained now.

    A twentieth of a nat is what counts as better.
    """
    windows = methods.character_windows("test", 24, methods.PLACES)
    frequent = methods.frequency_loss(windows)
    steps = 100
    loss, _ = methods.masked_by_window(methods.train_neighbours(steps), windows)
    reached = {
        name: fmean(losses(rows, name)) for name in methods.FILLERS if pick(rows, method=name)
    }
    better = [name for name, value in reached.items() if value < frequent - 0.05]
    who = f"Only {spoken(better)} did better" if better else "None of them did better"
    return (
        f"Guessing by the frequency of each character costs {frequent:.1f} nats. {who}. "
        f"A convolution over seven places, trained here for {steps} steps, is at "
        f"{fmean(loss):.1f} nats."
    )


# --- learning to add ------------------------------------------------------------------------------


def chain_mean(rows: Sequence[Row], method: str, key: str) -> list[float]:
    """By length of the chain, a number of the report averaged over seeds."""
    reports = [row["chains"] for row in pick(rows, method=method)]
    return [fmean(line[key] for line in lines) for lines in zip(*reports, strict=True)]


@if_measured
def universal_table(rows: Sequence[Row]) -> Table:
    """Right digits and steps by the length of the chain."""
    names = [n for n in ("halting", "six steps", "one step") if pick(rows, method=n)]
    right = {name: chain_mean(rows, name, "right") for name in names}
    steps = chain_mean(rows, "halting", "steps") if "halting" in names else None
    lines = []
    for i, chain in enumerate(methods.CHAINS):
        line: dict[str, Any] = {"carry through": f"{chain} places"}
        line |= {f"right, {name}": right[name][i] for name in names}
        if steps:
            line["steps taken"] = steps[i]
        lines.append(line)
    forms = {"carry through": "", **{f"right, {name}": ".0%" for name in names}}
    forms |= {"steps taken": ".2f"} if steps else {}
    return table(
        lines,
        forms,
        caption="Universal Transformers that learned to add: digits that are right by how many "
        "places a carry had to come through; and the steps that halting positions took.",
    )


@if_measured
def universal_said(rows: Sequence[Row]) -> str:
    """Whether steps follow difficulty, in a sentence."""
    if not pick(rows, method="halting"):
        return "Not measured here."
    steps = chain_mean(rows, "halting", "steps")
    word = "more" if steps[-1] > steps[0] else "no more"
    return (
        f"Where a carry comes through {methods.CHAINS[-1]} places, positions take {word} steps "
        f"({steps[-1]:.2f}) than where none has to ({steps[0]:.2f})."
    )


# --- trained models -------------------------------------------------------------------------------


@if_measured
def real_table(rows: Sequence[Row]) -> Table:
    """Trained models whose layers are made to share, without training."""
    lines = []
    for row in rows:
        whole = next(r for r in rows if r["model"] == row["model"])
        rise = fmean(row["documents"]) - fmean(whole["documents"])
        lines.append(
            {
                "model": row["model"],
                "groups": row["groups"],
                "weights": "own" if row is whole else row["initial"],
                "million parameters": row["parameters"] / 1e6,
                "perplexity": perplexity(fmean(row["documents"])),
                "nats above": tidy(rise),
                "seconds": row["seconds"],
            }
        )
    return table(
        lines,
        {
            "model": "", "groups": "", "weights": "", "million parameters": ".1f",
            "perplexity": "", "nats above": "+.2f", "seconds": ".2f",
        },
        caption="Trained models whose layers were made to share, with no training afterwards; "
        "seconds to read 256 tokens.",
    )  # fmt: skip


def perplexity(loss: float) -> str:
    """A perplexity, short however large it is."""
    return f"{math.exp(loss):,.1f}" if loss < 12 else f"{math.exp(loss):.1e}"


@if_measured
def real_said(rows: Sequence[Row]) -> str:
    """What sharing does to trained models that were not made for it."""
    said = []
    for name in dict.fromkeys(row["model"] for row in rows):
        whole, *others = [row for row in rows if row["model"] == name]
        if others:
            best = min(others, key=lambda row: fmean(row["documents"]))
            rise = fmean(best["documents"]) - fmean(whole["documents"])
            said.append(
                f"{name}: at best {tidy(rise, 2):+.2f} nats, with {best['groups']} groups and "
                f"{best['parameters'] / whole['parameters']:.0%} of the parameters."
            )
    return " ".join(said)


def counted(shapes: Mapping[str, Mapping[str, int]]) -> Table:
    """Published shapes by the formulas: what shrinks, and what does not."""
    lines = [
        {
            "model": name,
            "parameters": shape["parameters"],
            "multiply-adds, 512 tokens": shape["multiply_adds"],
        }
        for name, shape in shapes.items()
    ]
    return table(
        lines,
        {"model": "", "parameters": ",", "multiply-adds, 512 tokens": ","},
        caption="Counts by formula; those of ALBERT and BERT are what transformers counts.",
    )
