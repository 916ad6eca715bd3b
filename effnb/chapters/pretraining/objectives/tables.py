"""The tables and sentences of the chapter on objectives: counted ones, and stored ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from statistics import fmean
from typing import Any

from effnb.chapters.pretraining.objectives import runs
from effnb.lab import NOT_MEASURED, results, table
from effnb.lab.changes import Change, Row, if_measured, pick, spoken
from effnb.lab.results import NotMeasured, StoredResult
from effnb.lab.tables import Table
from effnb.pretraining.objectives import Work

CHAPTER = "03_pretraining/1_objectives"
RATES = ("MLM 15 %", "MLM 40 %", "MLM 60 %", "MLM 80 %")
SPANS = ("spans of 1", "spans of 3", "spans of 10")
MASKINGS = ("one masking", "ten maskings", "a new one each time")


def stored(part: str) -> StoredResult | NotMeasured:
    """A stored table of this chapter's sweep."""
    return results.read(f"{CHAPTER}/{part}")


def claimed() -> StoredResult | NotMeasured:
    """The stored runs on equal text, behind the verdict."""
    return results.read(f"{CHAPTER}_claims/tokens")


# ------------------------------------------------------------------------------------- counted


@cache
def counted(name: str) -> Work:
    """The mean work of a training step of an objective; nothing is trained."""
    return runs.step_work(runs.ALL[name])


def work_table() -> Table:
    """What each objective asks and takes, for each token of text."""
    whole = counted("CLM")
    lines = []
    for name in runs.ALL:
        one = counted(name)
        lines.append(
            {
                "objective": name,
                "asked": one.text_targets / one.text_tokens,
                "computed": one.read_tokens / one.text_tokens,
                "asked / computed": one.share_of_read,
                "operations": one.flops / whole.flops,
            }
        )
    form = {"objective": "", "asked": ".2f", "computed": ".2f", "asked / computed": ".2f",
            "operations": ".2f"}  # fmt: skip
    return table(
        lines,
        form,
        caption="For each token of text: tokens that give a loss, positions that are computed, "
        "their ratio, and operations as a part of CLM's, for the network of this chapter.",
    )


# ----------------------------------------------------------------------------------- equal text


def probes(rows: Sequence[Row], method: str, seeds: Sequence[int] | None = None) -> list[float]:
    """The probe's accuracy in each group of descriptions, averaged over seeds."""
    found = [r for r in pick(rows, method=method) if seeds is None or r["seed"] in seeds]
    return [fmean(values) for values in zip(*(r["probe_groups"] for r in found), strict=True)]


def gain(rows: Sequence[Row], after: str, before: str) -> Change:
    """The difference of two objectives' probes over the groups, on the seeds that both have."""
    both = {r["seed"] for r in pick(rows, method=after)} & {
        r["seed"] for r in pick(rows, method=before)
    }
    return Change.between(probes(rows, after, sorted(both)), probes(rows, before, sorted(both)))


def accuracy(rows: Sequence[Row], method: str) -> float | Any:
    """Mean accuracy of the probe over all seeds, or that it is missing."""
    found = pick(rows, method=method)
    return fmean(r["probe"] for r in found) if found else NOT_MEASURED


@if_measured
def text_table(rows: Sequence[Row]) -> Table:
    """All objectives on the same text, by the probe."""
    lines = []
    for name in ("untrained", *runs.ALL):
        found = pick(rows, method=name)
        if not found:
            continue
        line = {"objective": name, "seeds": len(found), "probe": accuracy(rows, name)}
        if name != "untrained":
            line["loss-bearing tokens"] = round(fmean(r["text_targets"] for r in found) / 1000)
            line["against CLM"] = "" if name == "CLM" else gain(rows, name, "CLM").number(3)
        else:
            line |= {"loss-bearing tokens": 0, "against CLM": ""}
        lines.append(line)
    trained = next(r for r in rows if "training_tokens" in r)["training_tokens"]
    form = {"objective": "", "loss-bearing tokens": ",d", "probe": ".1%", "against CLM": "",
            "seeds": ""}  # fmt: skip
    return table(
        lines,
        form,
        caption=f"The same {trained:,} tokens of text. Loss-bearing tokens in thousands; accuracy "
        "of the probe; its difference to CLM's with a 95 % interval over groups of descriptions.",
    )


def worth_of_positions(rows: Sequence[Row]) -> Change:
    """Nats of a held-out novel: CLM asked at 15 % of the positions, minus CLM asked at all."""
    clm, part = (pick(rows, method=m) for m in ("CLM", "CLM, 15 % asked"))
    seeds = {r["seed"] for r in clm} & {r["seed"] for r in part}
    losses = []
    for of in (part, clm):
        found = [r["documents"] for r in of if r["seed"] in seeds]
        losses.append([fmean(values) for values in zip(*found, strict=True)])
    return Change.between(*losses)


@if_measured
def text_said(rows: Sequence[Row]) -> str:
    """What being asked everywhere is worth, in sentences."""
    lines = []
    if pick(rows, method="CLM") and pick(rows, method="CLM, 15 % asked"):
        worth = worth_of_positions(rows)
        lines.append(
            "CLM asked at 15 % of the positions, against all of them: "
            f"{worth.number()} nats on a held-out novel."
        )
    for after, before, words in (
        ("ELECTRA", "ELECTRA, 15 % asked", "ELECTRA judged everywhere, against 15 %"),
        ("CLM", "MLM 15 %", "CLM against MLM at 15 %"),
    ):
        if pick(rows, method=after) and pick(rows, method=before):
            found = gain(rows, after, before)
            lines.append(f"{words}: {found.number()} of the probe's accuracy, {found.word(False)}.")
    if pick(rows, method="untrained"):
        learnt: dict[str, list[str]] = {}
        for name in (n for n in runs.ALL if pick(rows, method=n)):
            learnt.setdefault(gain(rows, name, "untrained").word(False), []).append(name)
        lines += [
            f"Against the untrained network, {word}: {'; '.join(names)}."
            for word, names in learnt.items()
        ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- the knobs


def some_of(rows: Sequence[Row], names: Sequence[str]) -> list[str] | NotMeasured:
    """Those of the objectives that are stored; where none is, a value that says so."""
    found = [name for name in names if pick(rows, method=name)]
    return found or NotMeasured(f"{CHAPTER}_claims/tokens")


@if_measured
def rates_table(rows: Sequence[Row]) -> Table | NotMeasured:
    """Mask rates: their own loss, the loss at a common rate, and the probe."""
    if not (names := some_of(rows, RATES)):
        return names
    lines = [
        {
            "trained at": name,
            "own loss": fmean(r["training_loss"] for r in pick(rows, method=name)),
            "loss at 15 %": fmean(fmean(r["masked_documents"]) for r in pick(rows, method=name)),
            "probe": accuracy(rows, name),
        }
        for name in names
    ]
    return table(
        lines,
        {"trained at": "", "own loss": ".2f", "loss at 15 %": ".2f", "probe": ".1%"},
        caption="Own loss: nats at the end of training, each at its own rate. Loss at 15 %: nats "
        "of the same masked tokens of a held-out novel for all.",
    )


@if_measured
def rates_said(rows: Sequence[Row]) -> str | NotMeasured:
    """Whether the two losses put the rates in one order."""
    if not (measured := some_of(rows, RATES)):
        return measured

    def ordered(value) -> list[str]:
        return sorted(measured, key=lambda name: fmean(value(r) for r in pick(rows, method=name)))

    own = ordered(lambda r: r["training_loss"])
    common = ordered(lambda r: fmean(r["masked_documents"]))
    probe = max(measured, key=lambda name: accuracy(rows, name))
    agree = "put the rates in the same order" if own == common else "disagree on the order"
    return (
        f"Own loss and common loss {agree}. Lowest own loss: {own[0]}; lowest at the common 15 %: "
        f"{common[0]}; best probe: {probe}."
    )


@if_measured
def spans_table(rows: Sequence[Row]) -> Table | NotMeasured:
    """Span lengths by the probe."""
    if not (names := some_of(rows, SPANS)):
        return names
    lines = [
        {
            "objective": name,
            "computed": counted(name).read_tokens / counted(name).text_tokens,
            "operations": counted(name).flops / counted("CLM").flops,
            "probe": accuracy(rows, name),
        }
        for name in names
    ]
    return table(
        lines,
        {"objective": "", "computed": ".2f", "operations": ".2f", "probe": ".1%"},
        caption="Span corruption at 15 %: positions computed for each token of text, operations as "
        "a part of CLM's, and the probe.",
    )


@if_measured
def repeats_table(data: Row) -> Table:
    """Static against dynamic masking of a text that is read many times."""
    lines = []
    for name in MASKINGS:
        found = pick(data["table"], method=name)
        if found:
            lines.append(
                {
                    "masking": name,
                    "own loss": fmean(r["training_loss"] for r in found),
                    "loss at 15 %": fmean(fmean(r["masked_documents"]) for r in found),
                    "probe": accuracy(data["table"], name),
                }
            )
    tokens = data["batches"] * runs.SHAPE[0] * runs.SHAPE[1]
    return table(
        lines,
        {"masking": "", "own loss": ".2f", "loss at 15 %": ".2f", "probe": ".1%"},
        caption=f"{tokens:,} tokens of text, read {data['times']} times at 15 %: nats at the end "
        "of training, and of masked tokens of a held-out novel.",
    )


@if_measured
def repeats_said(data: Row) -> str:
    """What one masking does to a text that is read many times, in a sentence."""
    found = {
        name: [
            (r["training_loss"], fmean(r["masked_documents"]))
            for r in pick(data["table"], method=name)
        ]
        for name in MASKINGS
    }
    said = [
        f"with {name}, {fmean(own for own, _ in pairs):.1f} nats on the text itself and "
        f"{fmean(common for _, common in pairs):.1f} on another"
        for name, pairs in found.items()
        if pairs
    ]
    return f"After {data['times']} readings: {'; '.join(said)}."


# -------------------------------------------------------------------------------- equal compute


@if_measured
def compute_table(data: Row, rows: Sequence[Row]) -> Table:
    """Objectives that spend CLM's operations: how much text that buys, and the probe."""
    everything = [*data["table"], *pick(rows, method="CLM")]
    names = ["CLM", *dict.fromkeys(row["method"] for row in data["table"])]
    lines = []
    for name in names:
        found = pick(everything, method=name)
        lines.append(
            {
                "objective": name,
                "text": round(fmean(r["training_tokens"] for r in found) / 1000),
                "loss-bearing tokens": round(fmean(r["text_targets"] for r in found) / 1000),
                "probe": accuracy(everything, name),
                "against CLM": "" if name == "CLM" else gain(everything, name, "CLM").number(3),
            }
        )
    return table(
        lines,
        {
            "objective": "",
            "text": ",d",
            "loss-bearing tokens": ",d",
            "probe": ".1%",
            "against CLM": "",
        },
        caption="Equal operations: thousands of tokens of text and of loss-bearing tokens that "
        "CLM's compute buys, and the probe.",
    )


@if_measured
def compute_said(data: Row, rows: Sequence[Row]) -> str:
    """Which objectives the probe puts above or below CLM at equal compute."""
    everything = [*data["table"], *pick(rows, method="CLM")]
    names = list(dict.fromkeys(row["method"] for row in data["table"]))
    words: dict[str, list[str]] = {}
    for name in names:
        words.setdefault(gain(everything, name, "CLM").word(False), []).append(name)
    return (
        "Against CLM at equal operations: "
        + "; ".join(f"{word}: {spoken(found)}" for word, found in words.items())
        + "."
    )


# ---------------------------------------------------------------------------------- real models


@if_measured
def real_table(data: Row) -> Table:
    """The probe on the workbook's models, and on two that others trained."""
    trained = {
        "mini-300k": "CLM", "mini-1m": "CLM", "mini-5m": "CLM",
        "minilm-l6": "distilled from an MLM, then sentence pairs", "smollm2-135m": "CLM, then chat",
    }  # fmt: skip
    lines = [
        {
            "model": row["model"],
            "trained on": trained[row["model"]],
            "parameters": row["parameters"] / 1e6,
            "probe": row["probe"],
        }
        for row in data["table"]
    ]
    return table(
        lines,
        {"model": "", "trained on": "", "parameters": ".1f", "probe": ".1%"},
        caption=f"The same probe on the first {data['tokens']} tokens of the same descriptions; "
        "parameters in millions.",
    )


@if_measured
def real_said(data: Row) -> str:
    """The best and what it was trained on."""
    best = max(data["table"], key=lambda row: row["probe"])
    sizes = [r for r in data["table"] if r["model"].startswith("mini-")]
    steps = spoken([f"{r['model']} {r['probe']:.0%}" for r in sizes])
    return f"{steps}. Best of all: {best['model']}, {best['probe']:.0%}."
