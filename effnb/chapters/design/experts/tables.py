"""The tables and sentences of the chapter on experts, from stored results and from counting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from effnb.chapters.design.experts import twins
from effnb.lab import NOT_MEASURED, results, table
from effnb.lab.changes import Change, Row, if_measured, pick, spoken, tidy
from effnb.lab.results import NotMeasured, StoredResult
from effnb.lab.tables import Table

CHAPTER = "02_design/2_experts"
COUNTS = (2, 4, 8, 16)
NAMES = {
    "dense": "dense",
    **{f"Switch {n}": f"Switch, {n} experts" for n in COUNTS},
    "GLaM 8": "GLaM, 2 of 8",
    "expert choice 8": "expert choice, 8 experts",
    "entmax 8": "entmax, 8 experts",
}
"""What the rows of the grid are called in the chapter."""
WEIGHTS = {"Switch 8, weight 0": 0.0, "Switch 8": 0.01, "Switch 8, weight 1": 1.0}


def stored(part: str) -> StoredResult | NotMeasured:
    """A stored table of this chapter's sweep."""
    return results.read(f"{CHAPTER}/{part}")


def claimed(part: str) -> StoredResult | NotMeasured:
    """A stored table of the sweep behind the verdicts."""
    return results.read(f"{CHAPTER}_claims/{part}")


def average(rows: Sequence[Row], key: str, **wanted: Any) -> list[float]:
    """A list of each document, as the mean over seeds."""
    return [fmean(x) for x in zip(*(row[key] for row in pick(rows, **wanted)), strict=True)]


def change(rows: Sequence[Row], name: str, base: str = "dense") -> Change:
    """A twin's loss less another's, document by document."""
    return Change.between(
        average(rows, "documents", name=name), average(rows, "documents", name=base)
    )


def present(rows: Sequence[Row]) -> list[str]:
    """The twins that were trained, in the order of the chapter."""
    return [name for name in NAMES if pick(rows, name=name)]


# --- counted --------------------------------------------------------------------------------------


def counts_table(counts: Sequence[int] = COUNTS) -> Table:
    """Parameters and operations of the twins, counted on fresh ones without a limit of seats."""
    lines = []
    for name, count in (("dense", 1), *((f"{n} experts", n) for n in counts)):
        model = twins.twin("dense") if count == 1 else twins.twin("Switch", count, factor=None)
        for layer in (m for m in model.modules() if hasattr(m, "settings")):
            layer.settings = twins.replace(layer.settings, evaluation_factor=None)
        found = twins.sizes_of(model.eval())
        lines.append(
            {
                "twin": name,
                "parameters": found["parameters"],
                "a token meets": found["active"],
                "operations per token": found["flops"],
            }
        )
    return table(
        lines,
        {
            "twin": "", "parameters": ",.0f", "a token meets": ",.0f",
            "operations per token": ",.0f",
        },
        caption="Decoders of the shape of mini-300k: all parameters, those that a token meets, and "
        "operations per token of a text of 128, counted by PyTorch. Switch, nothing dropped.",
    )  # fmt: skip


# --- twins ----------------------------------------------------------------------------------------


@if_measured
def grid_table(data: Row) -> Table:
    """What each twin's training came to."""
    rows = data["table"]
    lines = []
    for name in present(rows):
        found = pick(rows, name=name)
        line: dict[str, Any] = {
            "twin": NAMES[name],
            "parameters": fmean(r["parameters"] for r in found),
            "operations": fmean(r["flops"] for r in found),
            "loss": fmean(r["loss"] for r in found),
            "− dense": change(rows, name).number() if name != "dense" else "",
        }
        sparse = name != "dense"
        line["busiest"] = f"{fmean(average(rows, 'busiest', name=name)):.1f}" if sparse else ""
        line["dropped"] = f"{fmean(average(rows, 'dropped', name=name)):.1%}" if sparse else ""
        lines.append(line)
    return table(
        lines,
        {
            "twin": "", "parameters": ",.0f", "operations": ",.0f", "loss": ".3f", "− dense": "",
            "busiest": "", "dropped": "",
        },
        caption=f"Twins trained for {data['steps']} steps on the same texts, means of "
        f"{len({r['seed'] for r in rows})} seeds: operations per token, nats on held-out text with "
        "the difference's 95 % interval over documents, the load of the busiest expert over its "
        "fair share, and the part of the choices that found no seat.",
    )  # fmt: skip


@if_measured
def grid_said(data: Row) -> str:
    """Which twins beat the dense one, in sentences."""
    rows = data["table"]
    words: dict[str, list[str]] = {}
    for name in present(rows):
        if name != "dense":
            words.setdefault(change(rows, name).word(), []).append(NAMES[name])
    sentences = {
        "better": "A lower loss than the dense twin: {}.",
        "indistinguishable": "Not to be told apart from it: {}.",
        "worse": "A higher loss: {}.",
    }
    return " ".join(s.format("; ".join(words[w])) for w, s in sentences.items() if w in words)


@if_measured
def balance_table(data: Row) -> Table:
    """What the weight of the loss for balance does to load, drops and loss."""
    rows = data["table"]
    lines = []
    for name, weight in WEIGHTS.items():
        if pick(rows, name=name):
            lines.append(
                {
                    "weight": f"{weight:g}",
                    "busiest": fmean(average(rows, "busiest", name=name)),
                    "dropped": fmean(average(rows, "dropped", name=name)),
                    "loss": fmean(r["loss"] for r in pick(rows, name=name)),
                    "− weight 0.01": "" if name == "Switch 8"
                    else change(rows, name, "Switch 8").number(),
                }
            )  # fmt: skip
    return table(
        lines,
        {"weight": "", "busiest": ".2f", "dropped": ".1%", "loss": ".3f", "− weight 0.01": ""},
        caption="Switch with 8 experts: load of the busiest expert over its fair share, part of "
        f"the tokens dropped at a capacity factor of {twins.EVALUATION:g}, and nats.",
    )


@if_measured
def leak_said(data: Row) -> str:
    """What expert choice loses when it cannot see what is to come."""
    rows = pick(data["table"], name="expert choice 8")
    if not rows:
        return "Expert choice: not measured."
    whole, before = (fmean(r["prefixes"][k] for r in rows) for k in ("whole", "before"))
    return (
        f"Expert choice: {whole:.3f} nats when the whole text is there, {before:.3f} at the same "
        f"places when only what comes before is ({tidy(before - whole):+.3f})."
    ).replace("(-", "(−")


# --- up-cycling, compression, speed ---------------------------------------------------------------


@if_measured
def upcycled_table(data: Row) -> Table:
    """mini-1m, dense and up-cycled, before and after as many steps of training."""
    rows = data["table"]
    lines = []
    for kind in ("dense", "up-cycled"):
        line: dict[str, Any] = {"model": kind}
        for steps in (0, data["steps"]):
            found = pick(rows, kind=kind, steps=steps)
            label = "as it is" if not steps else f"after {steps} steps"
            line[label] = fmean(r["loss"] for r in found) if found else NOT_MEASURED
        line["parameters"] = pick(rows, kind=kind, steps=0)[0]["parameters"]
        lines.append(line)
    numbers = {key: ".3f" for key in lines[0] if key not in ("model", "parameters")}
    return table(
        lines,
        {"model": "", **numbers, "parameters": ",.0f"},
        caption=f"mini-1m and the same with its feed-forward layer in every second block copied "
        f"into {data['experts']} experts, two for each token: nats on held-out text.",
    )


@if_measured
def upcycled_said(data: Row) -> str:
    """Whether copies gain more by training than the dense model does, in a sentence."""
    rows = data["table"]
    steps = data["steps"]
    if not all(pick(rows, kind=k, steps=steps) for k in ("dense", "up-cycled")):
        return "Training on: not measured."
    found = Change.between(
        average(rows, "documents", kind="up-cycled", steps=steps),
        average(rows, "documents", kind="dense", steps=steps),
    )
    return f"Up-cycled against dense, trained on alike: {found.word()} ({found.number()} nats)."


@if_measured
def compressed_table(data: Row) -> Table:
    """What compression costs a model with fused experts, and whether it left anything out."""
    rows = data["table"]
    base = pick(rows, way="original")[0]
    lines = []
    for row in rows:
        moved = fmean(
            0.5 * sum(abs(a - b) for a, b in zip(one, two, strict=True))
            for one, two in zip(row["load"], base["load"], strict=True)
        )
        lines.append(
            {
                "method": row["way"],
                "nats": row["loss"] - base["loss"] if row is not base else 0.0,
                "load that moved": moved,
                "left out": "nothing" if not row["left_out"] else "see the warning",
            }
        )
    return table(
        lines,
        {"method": "", "nats": "+.3f", "load that moved": ".1%", "left out": ""},
        caption="The up-cycled mini-1m under four methods: nats above the original, the part of "
        "the choices that an expert lost to another, and what the method left as it was.",
    )


@if_measured
def speed_table(data: Row) -> Table:
    """A pass forward and backward, ours and transformers'."""
    return table(
        [
            {
                "experts": str(row["experts"]),
                "ours, ms": 1000 * row["ours"],
                "transformers, ms": 1000 * row["transformers"],
                "ratio": row["ours"] / row["transformers"],
            }
            for row in data["table"]
        ],
        {"experts": "", "ours, ms": ".1f", "transformers, ms": ".1f", "ratio": ".2f"},
        caption=f"{data['tokens']} tokens of {data['hidden']} numbers, experts of width "
        f"{data['width']}, two for each token: processor's milliseconds of a pass forward and "
        "backward on one thread, medians of 15 rounds in turn.",
    )


# --- drops ----------------------------------------------------------------------------------------


def drops_said(found: Mapping[tuple[int, float], tuple[float, float]], count: int) -> str:
    """Measured drops of a fair router beside the formula's, in sentences."""
    parts = [
        f"{tokens} tokens at factor {factor:g}: {measured:.1%} measured, {formula:.1%} by the "
        "formula"
        for (tokens, factor), (measured, formula) in found.items()
    ]
    return f"A fair router and {count} experts. {'; '.join(parts)}."


def fair_share(tokens: int, count: int) -> str:
    """The rule of thumb for drops at a factor of 1, in words."""
    return f"{math.sqrt((count - 1) / (2 * math.pi * tokens)):.1%}"


def listed(names: Sequence[str]) -> str:
    """Names as English joins them."""
    return spoken(list(names))
