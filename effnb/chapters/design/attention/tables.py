"""The tables and sentences of the chapter on attention, from stored and from live results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from effnb.chapters.design.attention.streaming import EVERYTHING
from effnb.lab import results, table
from effnb.lab.changes import Change, Row, if_measured, pick, spoken
from effnb.lab.results import NotMeasured, StoredResult
from effnb.lab.tables import Table

CHAPTER = "02_design/1_attention"
DENSE = ("full, fused", "full, masked", "full, with a table", "full, entmax")
ORDER = (
    "full, fused", "window", "window and global", "ETC", "BigBird", "LSH", "Linformer",
    "Performer", "linear", "Sparsefinder", "full, masked", "full, with a table", "full, entmax",
)  # fmt: skip


def stored(part: str) -> StoredResult | NotMeasured:
    """A stored table of this chapter's sweep."""
    return results.read(f"{CHAPTER}/{part}")


def claimed(part: str) -> StoredResult | NotMeasured:
    """A stored table of the sweep behind the verdicts."""
    return results.read(f"{CHAPTER}_claims/{part}")


# --- a cache that forgets -------------------------------------------------------------------------


def label(window: int | str, sinks: int) -> str:
    """What a cache is called in pictures and panels."""
    if window == EVERYTHING:
        return "keeps everything"
    if not sinks:
        return f"latest {window}"
    return f"latest {window - sinks} and the first {sinks}"


def curve_of(data: Row, window: int | str, sinks: int) -> list[float]:
    """The loss by place of one cache."""
    return pick(data["table"], window=window, sinks=sinks)[0]["curve"]


def tail(data: Row, window: int | str, sinks: int) -> float:
    """Mean loss over the last half of the texts."""
    curve = curve_of(data, window, sinks)
    return fmean(curve[len(curve) // 2 :])


@if_measured
def sinks_said(data: Row) -> str:
    """The perplexity behind a small cache with and without sinks, in a sentence."""
    window = next(row["window"] for row in data["table"] if row["window"] != EVERYTHING)
    without, with_, whole = (
        math.exp(tail(data, *about)) for about in ((window, 0), (window, 4), (EVERYTHING, 0))
    )
    return (
        f"{data['model']}, perplexity on the second half of {data['length']:,} tokens: "
        f"{with_:.1f} with a cache of {window} tokens that keeps the first four, {without:,.1f} "
        f"with one that does not, {whole:.1f} with everything kept."
    )


@if_measured
def written_said(data: Row, letters: int = 90) -> str:
    """What a model writes behind a text with each cache, a line each."""
    return "\n".join(
        f"{label(row['window'], row['sinks'])}: … {' '.join(row['text'].split())[:letters]}"
        for row in data["table"]
    )


@if_measured
def mini_said(data: Row) -> str:
    """What sinks and a small cache do for the model of the bench, in sentences."""
    windows = sorted({row["window"] for row in data["table"] if row["window"] != EVERYTHING})
    gaps = {w: tail(data, w, 0) - tail(data, w, 4) for w in windows}
    largest = max(gaps.values(), key=abs)
    verdict = (
        f"Sinks make no difference worth naming (at most {abs(largest):.3f} nats): this model has "
        "not learned to need them"
        if abs(largest) < 0.05
        else f"Sinks change the loss by up to {abs(largest):.2f} nats"
    )
    best = windows[-1]
    return (
        f"{data['model']}, trained on {data['trained']} tokens, perplexity on the second half of "
        f"{data['length']:,}: {math.exp(tail(data, EVERYTHING, 0)):,.0f} with everything kept, "
        f"{math.exp(tail(data, best, 0)):.0f} with the latest {best} tokens. {verdict}."
    )


# --- recurrence -----------------------------------------------------------------------------------

READ = {
    ("none", "none"): "trained and read without a memory",
    ("memory", "memory"): "trained and read with a memory of 64",
    ("memory", "longer memory"): "trained with 64, read with 256",
    ("memory", "another text's"): "read with the memory of another text",
    ("none", "memory"): "trained without, read with 64",
    ("long segments", "none"): "segments of 128, no memory",
}


def mean_of(rows: Sequence[Row], trained: str, read: str, value: str = "documents") -> float | None:
    """Nats over seeds and chapters; None where nothing is stored."""
    found = pick(rows, trained=trained, read=read)
    return fmean(fmean(row[value]) for row in found) if found else None


@if_measured
def recurrence_table(rows: Sequence[Row]) -> Table:
    """Nats per character of every arm and reading."""
    seeds = len({row["seed"] for row in rows})
    return table(
        [
            {
                "model": words,
                "all characters": mean_of(rows, *key),
                "first 8 of a segment": mean_of(rows, *key, "start_documents"),
            }
            for key, words in READ.items()
        ],
        {"model": "", "all characters": ".3f", "first 8 of a segment": ".3f"},
        caption="Nats per character on held-out chapters, segments of 64 characters unless said "
        f"otherwise; means of {seeds} seed{'s' * (seeds > 1)}.",
    )


@if_measured
def recurrence_said(rows: Sequence[Row]) -> str:
    """What the memory is worth to one model, and what training with it has changed."""
    plain = mean_of(rows, "none", "none")
    given, with_, other = (
        mean_of(rows, *key)
        for key in (("none", "memory"), ("memory", "memory"), ("memory", "another text's"))
    )
    if None in (plain, given, with_, other):
        return "The readings are not all measured."
    parts = {
        "A memory that is given to the model trained without one changes its loss by": given
        - plain,
        "the model trained with a memory is at": with_ - plain,
        "and another text's memory in the place of its own costs it": other - with_,
    }
    said = "; ".join(f"{words} {value:+.3f} nats" for words, value in parts.items())
    return f"{said}.".replace(" -", " −")


# --- grouped queries ------------------------------------------------------------------------------

POOLED = {
    "none": "as trained",
    "mean": "mean of the heads",
    "first": "first head",
    "random": "random heads",
}


def pooled_loss(data: Row, pooling: str, steps: int) -> list[float]:
    """The loss of each chapter, averaged over seeds."""
    rows = pick(data["table"], pooling=pooling, steps=steps)
    return [fmean(one) for one in zip(*(row["documents"] for row in rows), strict=True)]


@if_measured
def grouped_table(data: Row) -> Table:
    """Loss after pooling and after each look during the training."""
    steps = sorted({row["steps"] for row in data["table"]})
    names = {n: "at once" if not n else f"after {n} steps" for n in steps}
    seeds = len({row["seed"] for row in data["table"]})
    return table(
        [
            {"one head made from": words}
            | {name: fmean(pooled_loss(data, pooling, n)) for n, name in names.items()}
            for pooling, words in POOLED.items()
            if pick(data["table"], pooling=pooling)
        ],
        {"one head made from": "", **dict.fromkeys(names.values(), ".3f")},
        caption=f"{data['model']} with one head of keys and values in place of {data['heads']}: "
        f"nats per token on held-out chapters; means of {seeds} seed{'s' * (seeds > 1)}. The first "
        "line is the model with all its heads, trained on the same batches.",
    )


@if_measured
def grouped_said(data: Row) -> str:
    """How far a short training closes the gap that pooling opens, in sentences."""
    last = max(row["steps"] for row in data["table"])
    start = fmean(pooled_loss(data, "none", 0))
    gaps = {n: fmean(pooled_loss(data, "mean", n)) - start for n in (0, last)}
    other = Change.between(pooled_loss(data, "mean", last), pooled_loss(data, "first", last))
    word = {
        "better": "below", "worse": "above", "indistinguishable": "indistinguishable from"
    }[other.word()]  # fmt: skip
    return (
        f"Mean pooling raises the loss by {gaps[0]:.2f} nats; after {last} steps, "
        f"{gaps[last]:.2f} of them remain. Mean pooling is then {word} taking the first head "
        f"({other.number(2)} nats)."
    )


# --- costs ----------------------------------------------------------------------------------------


def seconds_of(rows: Sequence[Row], method: str, tokens: int) -> float | None:
    """Median seconds, or None where it was not measured."""
    found = pick(rows, method=method, tokens=tokens)
    return median(found[0]["seconds"]) if found else None


def lengths_of(rows: Sequence[Row]) -> list[int]:
    """The lengths that were measured."""
    return sorted({row["tokens"] for row in rows})


@if_measured
def costs_table(rows: Sequence[Row]) -> Table:
    """Time and memory of each form at the shortest and the longest length."""
    short, long = lengths_of(rows)[0], lengths_of(rows)[-1]
    lines = []
    for method in ORDER:
        a, b = (seconds_of(rows, method, tokens) for tokens in (short, long))
        memory = pick(rows, method=method, tokens=long)
        lines.append(
            {
                "form": method,
                f"ms, {short:,}": a and 1e3 * a,
                f"ms, {long:,}": b and 1e3 * b,
                "times": b / a if a and b else None,
                f"MiB, {long:,}": memory[0]["peak_bytes"] / 2**20 if memory else None,
            }
        )
    return table(
        lines,
        {
            "form": "", f"ms, {short:,}": ",.1f", f"ms, {long:,}": ",.0f", "times": ",.1f",
            f"MiB, {long:,}": ",.0f",
        },
        caption=f"Median processor time of four heads of 32 at {short:,} and {long:,} tokens, and "
        "the most memory that tensors held at one time, in a stored run on one thread. Linear cost "
        f"would be {long / short:.0f} times, quadratic {(long / short) ** 2:.0f}.",
    )  # fmt: skip


@if_measured
def costs_said(rows: Sequence[Row]) -> str:
    """From which measured length on a window is faster than fused attention, in a sentence."""
    for tokens in lengths_of(rows):
        window, full = (seconds_of(rows, m, tokens) for m in ("window", "full, fused"))
        if window is not None and full is not None and window < full:
            return (
                f"Of the lengths that were measured, {tokens:,} is the shortest at which blocked "
                "windows take less time than fused full attention."
            )
    return "At no length that was measured is a blocked window faster than fused attention."


# --- what is far away -----------------------------------------------------------------------------


@if_measured
def needle_said(rows: Sequence[Row]) -> str:
    """Right answers of the encoders that differ in who sees whom."""
    kinds = list(dict.fromkeys(row["method"] for row in rows))
    parts = [f"{k} {fmean(r['right'] for r in pick(rows, method=k)):.0%}" for k in kinds]
    seeds = len({row["seed"] for row in rows})
    return (
        f"Right answers about a value that no stack of windows can carry to the end: "
        f"{spoken(parts)} (means of {seeds} seed{'s' * (seeds > 1)}; chance is 12%)."
    )


# --- predicted pairs ------------------------------------------------------------------------------


def recall_curves(rows: Sequence[Row], model: str) -> dict[str, list[tuple[float, float, float]]]:
    """(setting, recall, sparsity) of every rule, averaged over seeds."""
    found = [row["curves"] for row in pick(rows, model=model, method="curves")]
    return {
        rule: [
            tuple(fmean(p[i] for p in points) for i in range(3))
            for points in zip(*(one[rule] for one in found), strict=True)
        ]
        for rule in (found[0] if found else {})
    }


@if_measured
def patterns_said(rows: Sequence[Row]) -> str:
    """Recall of quantization in 16 buckets beside a window of as many pairs, in sentences."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own, same = (
            pick(rows, model=model, method=m) for m in ("quantization", "window like quantization")
        )
        if own and same:
            recall, base, left_out = (
                fmean(fmean(row[key]) for row in of)
                for of, key in ((own, "recall"), (same, "recall"), (own, "sparsity"))
            )
            parts.append(
                f"{model}: {recall:.0%} of the pairs in use among {1 - left_out:.0%} of all pairs; "
                f"a window with as many holds {base:.0%}"
            )
    return "Quantization in 16 buckets. " + ". ".join(parts) + "."


# --- live -----------------------------------------------------------------------------------------


def cache_table(shapes: Mapping[str, Any], tokens: Sequence[int]) -> Table:
    """Bytes of the keys and values of one text, in 16 bits."""
    return table(
        [
            {"model": name, "per token": shape.bytes(1) / 1024}
            | {f"{n:,} tokens": shape.bytes(n) / 2**20 for n in tokens}
            for name, shape in shapes.items()
        ],
        {"model": "", "per token": ",.1f", **{f"{n:,} tokens": ",.1f" for n in tokens}},
        caption="The KV cache of one text in 16 bits: KiB per token, and MiB.",
    )
