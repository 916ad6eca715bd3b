"""What the chapter on delta tuning says with its stored measurements: tables and sentences.

The grid may be there in part: a method is compared where every method that is named with it was
measured, and the sentences say on how many tasks and seeds that rests.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from effnb.chapters.finetuning.delta_tuning import methods, shared_prompts
from effnb.chapters.finetuning.delta_tuning.memory import state_bytes
from effnb.chapters.finetuning.delta_tuning.verdicts import TASKS, digits
from effnb.lab import results
from effnb.lab.changes import Change, Row, if_measured, pick, spoken, tidy
from effnb.lab.results import NotMeasured, StoredResult
from effnb.lab.tables import NOT_MEASURED, Table, table

CHAPTER = "04_finetuning/1_delta_tuning"
PAIRS = ("match", "origin")
"""Tasks about two texts, with two labels: guessing is right in half of the cases."""
IN_ORDER = ("full", "LoRA", "adapter", "prefix", "prompt")
"""The order that the article finds, best first."""
SHOWN = (
    "full",
    "LoRA",
    "LoRA, rank 1",
    "adapter",
    "prefix",
    "prompt",
    "BitFit",
    "last layers",
    "random modules",
)
WRITING = ("summary", "expand")


def stored(part: str) -> StoredResult | NotMeasured:
    """A stored table of this chapter."""
    return results.read(f"{CHAPTER}/{part}")


def size_said(bytes_: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, step in (("MiB", 2**20), ("KiB", 2**10)):
        if bytes_ >= step:
            return f"{bytes_ / step:,.1f} {unit}"
    return f"{bytes_:,.0f} bytes"


# --- the grid -------------------------------------------------------------------------------------


def common(rows: Sequence[Row], names: Sequence[str] = SHOWN) -> list[tuple[str, int]]:
    """The tasks and seeds at which each of these methods was measured."""
    found = {n: {(r["task"], r["seed"]) for r in pick(rows, method=n)} for n in names}
    both = set.intersection(*found.values()) if found else set()
    return sorted((t, s) for t, s in both if t in TASKS)


def unfinished() -> NotMeasured:
    """What stands for a comparison while no task has been measured with all its methods."""
    return NotMeasured(f"{CHAPTER}/grid")


def measured(rows: Sequence[Row]) -> list[str]:
    """The methods of the grid that have a run on one of the encoder's tasks."""
    return [n for n in SHOWN if any(r["task"] in TASKS for r in pick(rows, method=n))]


def basis(runs: Sequence[tuple[str, int]]) -> str:
    """On what a mean rests, in words."""
    tasks, seeds = {t for t, _ in runs}, {s for _, s in runs}
    return (
        f"{len(tasks)} task{'s' * (len(tasks) > 1)} and {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    )


def answers(rows: Sequence[Row], name: str, runs: Sequence[tuple[str, int]]) -> list[float]:
    """Whether each test document was right, averaged over the seeds, task after task."""
    found: list[float] = []
    for task in dict.fromkeys(t for t, _ in runs):
        held = [
            digits(pick(rows, method=name, task=task, seed=s)[0]["answers"])
            for t, s in runs
            if t == task
        ]
        found += [fmean(column) for column in zip(*held, strict=True)]
    return found


def accuracy(rows: Sequence[Row], name: str, runs: Sequence[tuple[str, int]]) -> float:
    """Mean accuracy over tasks and seeds."""
    return fmean(pick(rows, method=name, task=t, seed=s)[0]["accuracy"] for t, s in runs)


def parameters(rows: Sequence[Row], name: str) -> int:
    """Trained numbers of a method in the encoder, without the classifier."""
    return next(r["parameters"] for r in pick(rows, method=name) if r["task"] in TASKS)


@if_measured
def cost_said(rows: Sequence[Row], small: str = "LoRA, rank 1") -> str | NotMeasured:
    """What the smallest LoRA stores and how accurate it is, beside full tuning, in sentences."""
    runs = common(rows, (small, "full"))
    if not runs:
        return unfinished()
    change = Change.between(answers(rows, small, runs), answers(rows, "full", runs))
    held = [2 * parameters(rows, name) for name in (small, "full")]
    return (
        f"MiniLM-L6, mean of {basis(runs)}: full tuning stores {size_said(held[1])} a task and is "
        f"right in {accuracy(rows, 'full', runs):.1%}; a LoRA of rank 1 stores "
        f"{size_said(held[0])}, {held[1] / held[0]:,.0f} times less, and is right in "
        f"{accuracy(rows, small, runs):.1%}. The difference, {change.number()}, is "
        f"{'within' if not change.decided else 'beyond'} its 95 % interval over documents."
    )


@if_measured
def grid_table(rows: Sequence[Row]) -> Table:
    """Accuracy of each method on each task, and what it trains."""
    runs = common(rows, measured(rows))
    lines = []
    for name in measured(rows):
        own = pick(rows, method=name)
        line: dict[str, Any] = {"method": name, "numbers": parameters(rows, name)}
        for task in TASKS:
            found = [r["accuracy"] for r in pick(own, task=task)]
            line[task] = 100 * fmean(found) if found else NOT_MEASURED
        line["mean"] = 100 * accuracy(rows, name, runs) if runs else NOT_MEASURED
        lines.append(line)
    return table(
        lines,
        {"method": "", "numbers": ",d", **dict.fromkeys((*TASKS, "mean"), ".1f")},
        caption="MiniLM-L6: per cent of test texts that are right, means over the stored seeds. "
        f"The last column rests on {basis(runs)}." if runs else "MiniLM-L6, as far as measured.",
    )  # fmt: skip


def pair_said(rows: Sequence[Row], one: str, other: str, runs: Sequence[tuple[str, int]]) -> str:
    """How one method compares with another, in words."""
    change = Change.between(answers(rows, one, runs), answers(rows, other, runs))
    word = change.word(lower_is_better=False)
    than = "from" if word == "indistinguishable" else "than"
    return f"{one} is {word} {than} {other} ({change.number()})"


@if_measured
def order_said(rows: Sequence[Row]) -> str | NotMeasured:
    """Each method against the next of the article's order, in a sentence."""
    runs = common(rows, IN_ORDER)
    if not runs:
        return unfinished()
    parts = [pair_said(rows, a, b, runs) for a, b in pairwise(IN_ORDER)]
    return f"On {basis(runs)}: {'; '.join(parts)}. Intervals are over documents alone."


@if_measured
def writing_table(rows: Sequence[Row]) -> Table:
    """What each method reaches where a decoder writes."""
    lines = []
    for name in IN_ORDER:
        line: dict[str, Any] = {"method": name}
        for task in WRITING:
            found = pick(rows, method=name, task=task)
            line[f"{task}, nats"] = fmean(r["loss"] for r in found) if found else NOT_MEASURED
            line[f"{task}, overlap"] = fmean(r["overlap"] for r in found) if found else NOT_MEASURED
        lines.append(line)
    columns = [c for task in WRITING for c in (f"{task}, nats", f"{task}, overlap")]
    return table(
        lines,
        {"method": "", **{c: ".3f" if "nats" in c else ".2f" for c in columns}},
        caption="mini-1m writes the short description from the long one (summary), or the first "
        "sentence of the long one (expand): nats per token of the true text, and the part of words "
        "that what it writes shares with it.",
    )


@if_measured
def few_table(rows: Sequence[Row], grid: Sequence[Row]) -> Table:
    """Accuracy with sixteen examples of each label beside that with all of them."""
    lines = []
    for name in IN_ORDER:
        line: dict[str, Any] = {"method": name}
        for label, table_ in (("16 of each label", rows), ("2,048", grid)):
            own = [r for r in pick(table_, method=name) if r["task"] in TASKS]
            by_task = [fmean(r["accuracy"] for r in pick(own, task=t)) for t in TASKS
                       if pick(own, task=t)]  # fmt: skip
            line[label] = 100 * fmean(by_task) if len(by_task) == len(TASKS) else NOT_MEASURED
        lines.append(line)
    return table(
        lines,
        {"method": "", "16 of each label": ".1f", "2,048": ".1f"},
        caption="MiniLM-L6: per cent of test texts that are right, mean of four tasks, by the "
        "number of examples to train on.",
    )


# --- learning -------------------------------------------------------------------------------------


def curve(rows: Sequence[Row], name: str, runs: Sequence[tuple[str, int]]) -> list[float]:
    """Accuracy on validation texts at each point, averaged over tasks and seeds."""
    curves = [
        [fmean(digits(point)) for point in pick(rows, method=name, task=t, seed=s)[0]["curve"]]
        for t, s in runs
    ]
    return [fmean(column) for column in zip(*curves, strict=True)]


@if_measured
def speed_said(data: Row, share: float = 0.9) -> str | NotMeasured:
    """After how many steps each method is within a share of its own best, in a sentence."""
    rows, points = data["table"], data["points"]
    runs = common(rows, IN_ORDER)
    if not runs:
        return unfinished()
    parts = []
    for name in IN_ORDER:
        found = curve(rows, name, runs)
        first = next(p for p, x in zip(points, found, strict=True) if x >= share * max(found))
        parts.append(f"{name} after {first}")
    return f"{share:.0%} of its own best accuracy is reached by {spoken(parts)} steps."


# --- subspaces ------------------------------------------------------------------------------------


@if_measured
def intrinsic_said(rows: Sequence[Row], share: float = 0.9) -> str:
    """The smallest measured dimension that keeps a share of full tuning, in a sentence."""
    full = [r["accuracy"] for r in pick(rows, dimension=0)]
    found = {
        d: fmean(r["accuracy"] for r in pick(rows, dimension=d))
        for d in sorted({r["dimension"] for r in rows} - {0})
    }
    reached = [d for d, x in found.items() if x >= share * fmean(full)]
    said = "; ".join(f"{d:,} numbers {x:.1%}" for d, x in found.items())
    end = (
        f"{min(reached):,} numbers keep {share:.0%} of that."
        if reached
        else f"None keeps {share:.0%} of that."
    )
    return f"Full tuning is right in {fmean(full):.1%}; {said}. {end}"


@if_measured
def shared_table(rows: Sequence[Row]) -> Table:
    """What prompts reach on tasks that the subspace was not learned from, over all seeds."""
    numbers = {
        "no prompt": 0,
        "average prompt": 0,
        "intrinsic prompt": shared_prompts.DIMENSION,
        "random subspace": shared_prompts.DIMENSION,
    }
    return table(
        [
            (
                name,
                numbers.get(name, "all"),
                f"{fmean(fmean(r['accuracies']) for r in pick(rows, method=name)):.1%}",
            )
            for name in shared_prompts.COMPARED
            if pick(rows, method=name)
        ],
        ["method", "numbers trained", "right on unseen tasks"],
        caption="Mean over tasks and seeds; guessing is right in half of the cases.",
    )


# --- memory ---------------------------------------------------------------------------------------


def held(rows: Sequence[Row], name: str, batch: int) -> float:
    """Bytes that a step holds, averaged over the batches that were drawn."""
    (row,) = pick(rows, method=name, batch=batch)
    return fmean(row["bytes"]) if batch else row["state_bytes"]


MEMORY_SHOWN = (
    "full",
    "LoRA",
    "adapter",
    "prefix",
    "prompt",
    "(IA)³",
    "BitFit",
    "last layers",
    "diff pruning",
)


@if_measured
def memory_table(rows: Sequence[Row]) -> Table:
    """What a step of each method holds, over what full tuning holds."""
    lines = [
        {"method": name, "numbers": pick(rows, method=name, batch=0)[0]["parameters"]}
        | {
            label: held(rows, name, batch) / held(rows, "full", batch)
            for label, batch in (("no batch", 0), ("batch 1", 1), ("batch 8", 8), ("batch 32", 32))
        }
        for name in MEMORY_SHOWN
        if pick(rows, method=name, batch=32)
    ]
    return table(
        lines,
        {"method": "", "numbers": ",d"}
        | dict.fromkeys(("no batch", "batch 1", "batch 8", "batch 32"), ".3f"),
        caption="MiniLM-L6 with Adam in 32 bits: bytes that a training step holds, full tuning's "
        "as 1. No batch: weights, gradients and moments alone.",
    )


@if_measured
def memory_said(rows: Sequence[Row], name: str = "LoRA") -> str:
    """How the closed form compares with what was counted, and what a batch changes."""
    n, m = (pick(rows, method=x, batch=0)[0]["parameters"] for x in ("full", name))
    counted = held(rows, name, 0) / held(rows, "full", 0)
    saved = {b: 1 - held(rows, name, b) / held(rows, "full", b) for b in (1, 32)}
    return (
        f"{name}: the closed form gives {state_bytes(n, m) / state_bytes(n, n):.3f} of full "
        f"tuning's bytes, and {counted:.3f} were counted. With activations it saves "
        f"{saved[1]:.0%} at a batch of 1 and {saved[32]:.0%} at a batch of 32."
    )


@if_measured
def smollm2_table(rows: Sequence[Row]) -> Table:
    """What a step of each method holds on a larger model."""
    (full,) = pick(rows, method="full")
    lines = [
        {
            "method": row["method"],
            "numbers": row["parameters"],
            "stored": size_said(2 * row["parameters"]),
            "held by a step": size_said(row["bytes"]),
            "over full": row["bytes"] / full["bytes"],
        }
        for row in rows
    ]
    return table(
        lines,
        {"method": "", "numbers": ",d", "stored": "", "held by a step": "", "over full": ".3f"},
        caption="SmolLM2-135M with Adam in 32 bits: what a task stores at 16 bits a number, and "
        "the bytes that a step on one text of 128 tokens holds.",
    )


# --- rates ----------------------------------------------------------------------------------------


@if_measured
def rates_table(rows: Sequence[Row]) -> Table:
    """Accuracy and loss after a few steps at every learning rate that was tried."""

    def remark(row: Row) -> str:
        if row == chosen_rate(rows, row["method"]):
            return "chosen"
        return "too high for pairs" if row["rate"] == methods.TOO_HIGH.get(row["method"]) else ""

    lines = [
        {"method": name, "rate": row["rate"], "accuracy": tidy(100 * row["accuracy"], 1)}
        | {"loss": row["loss"], "": remark(row)}
        for name in dict.fromkeys(r["method"] for r in rows)
        for row in pick(rows, method=name)
    ]
    return table(
        lines,
        {"method": "", "rate": ".1e", "accuracy": ".1f", "loss": ".3f", "": ""},
        caption="MiniLM-L6 on topics: per cent right on validation texts after 20 steps, and loss.",
    )


def chosen_rate(rows: Sequence[Row], method: str) -> Row:
    """The learning rate with the highest accuracy, and of equals the one with the lower loss.

    One that later turned out too high is left out: `methods.TOO_HIGH`.
    """
    allowed = [r for r in pick(rows, method=method) if r["rate"] != methods.TOO_HIGH.get(method)]
    return max(allowed, key=lambda row: (row["accuracy"], -row["loss"]))


@if_measured
def steep_said(steep: Sequence[Row], grid: Sequence[Row]) -> str:
    """How full tuning fares on pairs at the rate that is too high and at its own, in a sentence."""
    runs = [(row["task"], row["seed"]) for row in steep if row["task"] in PAIRS]
    own = [r for r in pick(grid, method=methods.FULL) if (r["task"], r["seed"]) in runs]
    high = [r for r in steep if r["task"] in PAIRS]
    if len(own) != len(high):
        return str(NotMeasured(f"{CHAPTER}/steep"))

    def fared(rows: Sequence[Row]) -> str:
        guessing = sum(abs(row["accuracy"] - 0.5) < 0.01 for row in rows)
        right = fmean(row["accuracy"] for row in rows)
        return f"{right:.1%} of the pairs right, {guessing} of {len(rows)} runs at guessing"

    return (
        f"Full tuning over all steps of the grid: at {high[0]['rate']:.0e} "
        f"{fared(high)}; at {own[0]['rate']:.0e} {fared(own)}."
    )


# --- what is counted here -------------------------------------------------------------------------


def counted_table(base: Any, layers: int, d: int) -> Table:
    """Every method's trained numbers, counted on the model."""
    lines = []
    for name, about in methods.METHODS.items():
        if about.attach is None:
            continue
        ready = methods.prepared(base, name)
        lines.append(
            {
                "class": about.family,
                "method": name,
                "size": f"{about.what} {about.size}" if about.what else "",
                "numbers": ready.parameters,
                "stored": size_said(ready.bytes),
            }
        )
    lines.sort(key=lambda line: (line["class"], line["numbers"]))
    return table(
        lines,
        {"class": "", "method": "", "size": "", "numbers": ",d", "stored": ""},
        caption=f"MiniLM-L6 ({layers} blocks, width {d}): what each method trains and stores for a "
        "task at 16 bits a number; the new classifier, which all of them train, left out.",
    )
