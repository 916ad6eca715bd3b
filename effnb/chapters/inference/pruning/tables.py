"""What the chapter on pruning asks of its stored results: tables and sentences.

Every sentence is put together from the numbers it speaks of, so that it stays true when they are
measured again. What is trained is in `training`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from effnb.chapters.inference.quantization.tables import KNOWN, rises
from effnb.chapters.inference.quantization.tables import domains_table as table_of_domains
from effnb.lab import results
from effnb.lab.changes import Change, Row, if_measured, mean_windows, pick, spoken, tidy
from effnb.lab.tables import NOT_MEASURED, Table, table

Setting = float | str
"""A sparsity, or a pattern such as "2:4"."""

SCOPES = {"magnitude": "layer", "Wanda": "row", "SparseGPT": "layer", "Taylor": "global"}
"""Among which weights the scores of each method compete, where it is compared with others."""

SETTINGS: tuple[Setting, ...] = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, "2:4", "4:8", "1:4")
"""How much was removed, in the order of the rows of tables."""


def stored(part: str) -> results.StoredResult:
    """One stored table of this chapter."""
    return results.read(f"05_inference/1_pruning/{part}")


def label(setting: Setting) -> str:
    """A setting in words."""
    return setting if isinstance(setting, str) else f"{100 * setting:g} %"


def than(change: Change, other: str) -> str:
    """The word and the number: better than OTHER (…), indistinguishable from OTHER (…)."""
    link = "than" if change.decided else "from"
    return f"{change.word()} {link} {other} ({change.number()} nats)"


def original(rows: Sequence[Row]) -> list[float]:
    """The losses of the model that nothing was removed from, window by window."""
    return pick(rows, method="original")[0]["windows"]


def losses(rows: Sequence[Row], method: str, setting: Setting) -> list[float]:
    """The losses of one setting, window by window, averaged over seeds; empty if not measured."""
    if isinstance(setting, str):
        found = pick(rows, method=method, pattern=setting)
    else:
        found = pick(rows, method=method, sparsity=setting, pattern=SCOPES.get(method))
    return mean_windows(found or pick(rows, method=method, amount=setting))


def rise(rows: Sequence[Row], method: str, setting: Setting) -> Change | None:
    """How far a setting lies above the original, in nats per token; None if not measured."""
    found = losses(rows, method, setting)
    return Change.between(found, original(rows)) if found else None


def against(rows: Sequence[Row], method: str, other: str, setting: Setting) -> Change | None:
    """One method minus another at one setting, in nats per token; None if not measured."""
    one, two = losses(rows, method, setting), losses(rows, other, setting)
    return Change.between(one, two) if one and two else None


def measured_settings(rows: Sequence[Row], method: str = "magnitude") -> list[Setting]:
    """The settings at which a method was measured."""
    return [setting for setting in SETTINGS if losses(rows, method, setting)]


def _mean(change: Change | None) -> Any:
    return NOT_MEASURED if change is None else tidy(change.mean)


# --- single weights -------------------------------------------------------------------------------


@if_measured
def harm_said(model: str, rows: Sequence[Row], asked: Sequence[tuple[str, Setting]]) -> str:
    """What some settings cost against the original, with intervals, in a sentence."""
    parts = []
    for method, setting in asked:
        change = rise(rows, method, setting)
        if change is None:
            continue
        parts.append(f"{label(setting)} removed by {method}: {than(change, 'the original')}")
    return f"{model}. {'; '.join(parts)}."


@if_measured
def methods_table(model: str, rows: Sequence[Row]) -> Table:
    """What each amount costs by three methods, and whether SparseGPT and magnitude differ."""
    methods = ("magnitude", "Wanda", "SparseGPT")
    lines = []
    for setting in measured_settings(rows):
        gain = against(rows, "SparseGPT", "magnitude", setting)
        lines.append(
            {"removed": label(setting)}
            | {method: _mean(rise(rows, method, setting)) for method in methods}
            | {
                "SparseGPT − magnitude": gain.number() if gain else NOT_MEASURED,
                "SparseGPT is": gain.word() if gain else NOT_MEASURED,
            }
        )
    base = math.exp(fmean(original(rows)))
    return table(
        lines,
        {
            "removed": "",
            **dict.fromkeys(methods, "+.3f"),
            "SparseGPT − magnitude": "",
            "SparseGPT is": "",
        },
        caption=f"{model}: nats per token above the original (perplexity {base:.1f}), and the "
        "difference of two methods with its 95 % interval.",
    )


@if_measured
def methods_said(model: str, rows: Sequence[Row]) -> str:
    """Where Wanda and SparseGPT beat magnitude, in sentences."""
    sentences = {
        "better": "loses less than magnitude at {}",
        "indistinguishable": "cannot be told apart from magnitude at {}",
        "worse": "loses more than magnitude at {}",
    }
    said = []
    for method in ("Wanda", "SparseGPT"):
        by_word: dict[str, list[str]] = {}
        for setting in measured_settings(rows, method):
            change = against(rows, method, "magnitude", setting)
            if change:
                by_word.setdefault(change.word(), []).append(label(setting))
        parts = [text.format(spoken(by_word[w])) for w, text in sentences.items() if w in by_word]
        said.append(f"{method} {'; it '.join(parts)}.")
    return f"{model}. {' '.join(said)}"


@if_measured
def rounded_said(rows: Sequence[Row]) -> str:
    """Half of the weights with 4 bits for the rest, beside 3 bits for all, which take as much."""
    together, after, dense = (
        mean_windows(pick(rows, method=method))
        for method in (
            "SparseGPT and 4 bits in one walk",
            "SparseGPT, then 4 bits",
            "GPTQ, 3 bits, nothing pruned",
        )
    )
    walk, beside = Change.between(together, after), Change.between(together, dense)
    return (
        "Half of the weights removed and the rest in 4 bits, in one walk: "
        f"{than(walk, 'rounding afterwards')}, and "
        f"{than(beside, 'GPTQ at 3 bits with nothing removed')}."
    )


INJECTED = {
    "none": "no outliers",
    "8 x on 16 channels": "16 channels × 8",
    "40 x on 2 channels": "2 channels × 40",
}


@if_measured
def outliers_table(rows: Sequence[Row], sparsity: float = 0.5) -> Table:
    """The same part removed without outliers and with two kinds of them."""
    base = fmean(original(rows))
    lines = []
    for method in ("magnitude", "Wanda", "SparseGPT"):
        line: dict[str, Any] = {"method": method}
        for injected, name in INJECTED.items():
            case = {"sparsity": sparsity, "injected": injected}
            found = pick(rows, method=method, pattern=SCOPES[method], **case)
            line[name] = tidy(found[0]["loss"] - base) if found else NOT_MEASURED
        lines.append(line)
    return table(
        lines,
        {"method": "", **dict.fromkeys(INJECTED.values(), "+.3f")},
        caption=f"mini-5m, {label(sparsity)} removed: nats per token above the original.",
    )


@if_measured
def outliers_said(rows: Sequence[Row]) -> str:
    """What sixteen enlarged channels do to each method when half goes, in a sentence."""
    parts = []
    for method in ("magnitude", "Wanda", "SparseGPT"):
        with_them, without = (
            pick(rows, method=method, pattern=SCOPES[method], sparsity=0.5, injected=injected)[0]
            for injected in ("8 x on 16 channels", "none")
        )
        change = Change.between(with_them["windows"], without["windows"])
        parts.append(f"{method} is {change.word()} ({change.number()} nats)")
    return f"Half removed, with 16 enlarged channels against without: {spoken(parts)}."


BY = {
    "uniform": "the same for all",
    "one threshold, magnitude": "one threshold on magnitude",
    "one threshold, Taylor": "one threshold on Taylor's score",
    "sensitivity": "by measured sensitivity",
}


@if_measured
def allocation_said(rows: Sequence[Row], sparsity: float = 0.7) -> str:
    """Ways of sharing the sparsity among layers against the same for all, in a sentence."""
    same = pick(rows, by="uniform", method="magnitude", sparsity=sparsity)[0]["windows"]
    parts = []
    for by, name in BY.items():
        found = pick(rows, by=by, method="magnitude", sparsity=sparsity)
        if by != "uniform" and found:
            change = Change.between(found[0]["windows"], same)
            parts.append(f"{name} is {than(change, 'the same share for every layer')}")
    return f"mini-5m, magnitude, {label(sparsity)} removed: {'; '.join(parts)}."


# --- kinds of text --------------------------------------------------------------------------------


def by_domain(rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """For each setting the losses of each domain, window by window, averaged over seeds."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        method = row["method"]
        name = method if method == "original" else f"{method}, {label(row['sparsity'])}"
        found.setdefault(name, []).append(row["domains"])
    return {
        name: {
            domain: [fmean(each) for each in zip(*(row[domain] for row in same), strict=True)]
            for domain in same[0]
        }
        for name, same in found.items()
    }


@if_measured
def domains_table(rows: Sequence[Row]) -> Table:
    """The rise of the loss in each domain, in nats and in per cent of the original's."""
    return table_of_domains(by_domain(rows))


@if_measured
def domains_said(rows: Sequence[Row], sparsity: float = 0.7) -> str:
    """Which known domain loses most by each method, in nats and in per cent."""
    found, said = by_domain(rows), []
    for name in found:
        if name.endswith(f", {label(sparsity)}"):
            nats = {domain: rises(found, name, domain).mean for domain in KNOWN}
            share = {d: 100 * nats[d] / fmean(found["original"][d]) for d in KNOWN}
            most, most_share = max(nats, key=nats.get), max(share, key=share.get)
            said.append(
                f"{name}: most nats are lost on {most} ({nats[most]:+.3f}), most per cent on "
                f"{most_share} ({share[most_share]:+.1f})."
            )
    return " ".join(said)


# --- whole structures -----------------------------------------------------------------------------

STRUCTURES: dict[str, tuple[str, float]] = {
    "a tenth of the neurons, LLM-Pruner": ("LLM-Pruner", 0.1),
    "a quarter of the heads": ("heads", 0.25),
    "an eighth of the channels": ("channels", 0.125),
    "one block, ShortGPT": ("ShortGPT", 1),
    "heads and neurons, LLM-Pruner": ("LLM-Pruner", 0.2),
    "the same, by activation (width)": ("width", 0.2),
    "the same, at random": ("random", 0.2),
    "half of heads and neurons, LLM-Pruner": ("LLM-Pruner", 0.5),
    "three blocks, ShortGPT": ("ShortGPT", 3),
}
"""What is removed in each row of the table: method and amount."""
KINDS = {
    "neurons": ("LLM-Pruner", 0.1),
    "heads": ("heads", 0.25),
    "channels": ("channels", 0.125),
    "whole blocks": ("ShortGPT", 1),
}


def structure_rows(rows: Sequence[Row], method: str, amount: float) -> list[Row]:
    """One structured setting, one row for each seed."""
    return pick(rows, method=method, amount=amount)


@if_measured
def structures_table(rows: Sequence[Row]) -> Table:
    """What went, how much of the blocks' weights that was, and what it cost."""
    lines = []
    for name, (method, amount) in STRUCTURES.items():
        found = structure_rows(rows, method, amount)
        change = rise(rows, method, amount)
        if change:
            lines.append(
                {
                    "removed": name,
                    "blocks' weights": found[0]["removed"],
                    "nats above": change.number(),
                }
            )
    return table(
        lines,
        {"removed": "", "blocks' weights": ".0%", "nats above": ""},
        caption="mini-5m without whole structures: part of the blocks' weights that went, and nats "
        "per token above the original with the 95 % interval, means over draws of calibration "
        "text.",
    )


@if_measured
def structures_said(rows: Sequence[Row]) -> str:
    """Which kind of structure costs most and least for what it weighs, and LLM-Pruner's choice."""
    cost = {}
    for kind, (method, amount) in KINDS.items():
        found, change = structure_rows(rows, method, amount), rise(rows, method, amount)
        if change:
            cost[kind] = change.mean / (100 * found[0]["removed"])
    ranked = sorted(cost, key=cost.get, reverse=True)
    each = spoken([f"{kind} {round(cost[kind], 4) + 0.0:.4f}" for kind in ranked])
    change = Change.between(losses(rows, "LLM-Pruner", 0.2), losses(rows, "random", 0.2))
    return (
        f"Nats lost for each per cent of the blocks' weights: {each}. LLM-Pruner's heads and "
        f"neurons are {than(change, 'random ones')}."
    )


@if_measured
def depth_said(rows: Sequence[Row], count: int = 3) -> str:
    """Whether the cheap measure of a block finds those that the loss misses least."""
    said = []
    for row in rows:
        influence, without = row["influence"], row["without"]
        ranks = [np.argsort(np.argsort(values)) for values in (influence, without)]
        cheap, true = (
            sorted(sorted(range(len(v)), key=v.__getitem__)[:count]) for v in (influence, without)
        )
        said.append(
            f"{row['model']}: rank correlation {np.corrcoef(*ranks)[0, 1]:.2f}; influence would "
            f"drop blocks {spoken([str(i) for i in cheap])}, the loss of each block alone would "
            f"drop {spoken([str(i) for i in true])}."
        )
    return "\n".join(said)


# --- the real model -------------------------------------------------------------------------------

REAL = {
    "LLM-Pruner": ("LLM-Pruner", 0.2),
    "at random": ("random", 0.2),
    "LLM-Pruner, then a LoRA": ("LLM-Pruner, then LoRA", 0.2),
    "three blocks, ShortGPT": ("ShortGPT", 3),
    "the same, then a LoRA": ("ShortGPT, then LoRA", 3),
    "six blocks, ShortGPT": ("ShortGPT", 6),
}


@if_measured
def real_table(rows: Sequence[Row]) -> Table:
    """Whole structures removed from SmolLM2, before and after a LoRA."""
    lines = []
    for name, (method, amount) in REAL.items():
        found, change = pick(rows, method=method, amount=amount), rise(rows, method, amount)
        if change:
            cut = found or [{}]
            gone = cut[0].get("removed") or _removed(rows, amount)
            lines.append(
                {
                    "removed": name,
                    "blocks' weights": gone,
                    "nats above": change.number(),
                    "perplexity": math.exp(fmean(losses(rows, method, amount))),
                }
            )
    base = math.exp(fmean(original(rows)))
    return table(
        lines,
        {"removed": "", "blocks' weights": ".0%", "nats above": "", "perplexity": ",.0f"},
        caption=f"SmolLM2-135M (perplexity {base:.0f}) without whole structures; LLM-Pruner cuts "
        "one of three groups of heads and a fifth of the neurons in each block.",
    )


def _removed(rows: Sequence[Row], amount: float) -> float | None:
    """What the same cut removed where it is stored."""
    return next((r["removed"] for r in rows if r["amount"] == amount and "removed" in r), None)


@if_measured
def speed_table(rows: Sequence[Row]) -> Table:
    """How fast each form of SmolLM2 reads a prompt and writes, beside the dense model."""
    return table(
        [
            {
                "removed": row["name"],
                "parameters": row["parameters"] / 1e6,
                "reading": row["prefill_times_dense"],
                "writing": row["decode_times_dense"],
            }
            for row in rows
        ],
        {"removed": "", "parameters": ",.0f", "reading": ".2f", "writing": ".2f"},
        caption="SmolLM2-135M: millions of parameters, and tokens per second as multiples of the "
        "dense model's, reading a prompt of 256 tokens and writing token by token.",
    )


def times(rows: Iterable[Row], zeros: bool) -> list[float]:
    """All ratios of speed of the models with zeros, or of those that are smaller."""
    found = [row for row in rows if row["name"] != "dense"]
    chosen = [row for row in found if row["name"].startswith("magnitude") == zeros]
    return [row[f"{what}_times_dense"] for row in chosen for what in ("prefill", "decode")]


@if_measured
def speed_said(rows: Sequence[Row]) -> str:
    """What zeros and what smaller matrices do for speed, in a sentence."""
    zeros, smaller = times(rows, zeros=True), times(rows, zeros=False)
    return (
        f"With zeros SmolLM2 runs {min(zeros):.2f} to {max(zeros):.2f} times as fast as dense; "
        f"with smaller matrices or fewer blocks, {min(smaller):.2f} to {max(smaller):.2f} times."
    )
