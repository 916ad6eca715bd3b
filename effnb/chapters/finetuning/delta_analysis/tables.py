"""What the chapter on the analysis of delta tuning says with stored rows: tables and sentences.

A part may be there with some of its seeds; tables take the mean over those that are.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from effnb.chapters.finetuning.delta_analysis import verdicts
from effnb.chapters.finetuning.delta_analysis.methods import PARTS, SUBSETS, said
from effnb.chapters.finetuning.delta_analysis.verdicts import CHAPTER, KIND_OF, digits
from effnb.lab import results
from effnb.lab.changes import Change, Row, if_measured, pick, spoken, tidy
from effnb.lab.results import NotMeasured, StoredResult
from effnb.lab.tables import NOT_MEASURED, Table, table

SETS = [*(said(names) for names in SUBSETS), "full"]
SCALED = ("full", "LoRA", "adapter", "prompt", "last layers", "random modules")
SIZES = ("mini-300k", "mini-1m", "mini-5m")


def stored(part: str) -> StoredResult | NotMeasured:
    """A stored table of this chapter."""
    return results.read(f"{CHAPTER}/{part}")


def mean_of(rows: Sequence[Row], key: str) -> float | object:
    """The mean of a number over rows, or that it was not measured."""
    return fmean(row[key] for row in rows) if rows else NOT_MEASURED


def right(rows: Sequence[Row], key: str = "answers") -> float | object:
    """Per cent of right answers over rows, or that it was not measured."""
    found = [100 * fmean(digits(row[key])) for row in rows if key in row]
    return fmean(found) if found else NOT_MEASURED


def paired(rows: Sequence[Row], one: Row, other: Row, key: str = "documents") -> Change | None:
    """The difference of two methods, document by document, over the seeds that both have.

    Args:
        rows: Rows in the form of `verdicts`.
        one: What to pick.
        other: What to take away.
        key: What is compared.
    """
    a, b = ({r.get("seed"): r for r in pick(rows, **about) if key in r} for about in (one, other))
    if set(b) == {None}:
        b = dict.fromkeys(a, b[None])
    common = [seed for seed in a if seed in b]
    if not common:
        return None
    sides = [verdicts.mean_rows([side[seed][key] for seed in common]) for side in (a, b)]
    return Change.between(*sides)


def seeds_of(rows: Sequence[Row]) -> str:
    """On how many seeds rows rest, in words."""
    count = len({row["seed"] for row in rows if "seed" in row})
    return f"{count} seed{'s' * (count != 1)}"


# ------------------------------------------------------------------------------------ many users


def times(rows: Sequence[Row], users: int) -> dict[str, float]:
    """The median seconds of each way to answer some users."""
    return {r["method"]: median(r["seconds"]) for r in pick(rows, users=users)}


@if_measured
def serving_said(rows: Sequence[Row]) -> str:
    """How one batch compares with loops and with the frozen model, in sentences."""
    most = max(row["users"] for row in rows)
    found, held = times(rows, most), {r["method"]: r["bytes"] for r in pick(rows, users=most)}
    return (
        f"mini-5m, {most} users with one text each, measured when this was stored: a loop over "
        f"users takes {found['loop'] / found['batch']:.1f} times as long as one batch, a loop over "
        f"merged models {found['merged'] / found['batch']:.1f} times. The batch takes "
        f"{found['batch'] / found['frozen']:.2f} times as long as the frozen model without any "
        f"LoRA. Merged models for all of them hold {held['merged'] / held['batch']:.1f} times the "
        "bytes of one model with all deltas."
    )


@if_measured
def smollm2_said(rows: Sequence[Row]) -> str:
    """One batch against a loop on a larger model, in a sentence."""
    (count,) = {row["users"] for row in rows}
    found = times(rows, count)
    return (
        f"SmolLM2-135M, {count} users with a LoRA and one text of 16 tokens each, measured when "
        f"this was stored: {1000 * found['batch']:.0f} ms of processor time in one batch, "
        f"{1000 * found['loop']:.0f} ms one after the other."
    )


@if_measured
def times_table(rows: Sequence[Row]) -> Table:
    """Time of a training step, and bytes for a task."""
    full = median(pick(rows, method="full")[0]["seconds"])
    lines = [
        {
            "method": r["method"],
            "step over full": median(r["seconds"]) / full,
            "bytes for a task": r["bytes"],
        }
        for r in rows
    ]
    return table(
        lines,
        {"method": "", "step over full": ".2f", "bytes for a task": ",d"},
        caption="MiniLM-L6, a training step of 8 texts: its median time over that of full tuning, "
        "and what is stored for a task at 16 bits a number.",
    )


# -------------------------------------------------------------------------------- several at once


@if_measured
def together_table(rows: Sequence[Row]) -> Table:
    """Each set of methods on new texts and on those of training."""
    lines = []
    for name in SETS:
        own = pick(rows, method=name)
        new, old = right(own), right(own, "train_answers")
        between = old - new if own else NOT_MEASURED
        lines.append({"trained": name, "new texts": new, "training texts": old, "gap": between})
    return table(
        lines,
        {"trained": "", "new texts": ".1f", "training texts": ".1f", "gap": ".1f"},
        caption="MiniLM-L6 on topics with 16 examples of each: per cent of texts that are right, "
        f"and the generalization gap in points; {seeds_of(rows)}.",
    )


@if_measured
def adds_said(rows: Sequence[Row]) -> str | NotMeasured:
    """What each method adds to sets of the others, in a sentence."""
    made = verdicts.together(rows)
    parts = []
    for part in PARTS:
        change = paired(made, {"method": f"with {part}"}, {"method": f"without {part}"})
        if change is None:
            return NotMeasured(f"{CHAPTER}/together")
        word = {"better": "helps", "worse": "hurts"}.get(change.word(False), "changes little")
        article = "" if part == "BitFit" else "a " if part == "prompt" else "an "
        parts.append(f"{article}{part} {word} ({change.number()})")
    return f"Added to others, {spoken(parts)}; intervals are over documents alone."


@if_measured
def sequence_table(rows: Sequence[Row]) -> Table:
    """What each order reaches after each of its stages."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        stages = [row["stages"] for row in pick(rows, method=name)]
        line: dict[str, Any] = {"order": name.replace(", ", " → ")}
        for place, label in enumerate(("first", "second", "third")):
            line[label] = fmean(100 * fmean(digits(one[place])) for one in stages)
        lines.append(line)
    return table(
        lines,
        {"order": "", "first": ".1f", "second": ".1f", "third": ".1f"},
        caption="MiniLM-L6 on topics with 16 examples of each: per cent of new texts that are "
        f"right after each stage, earlier deltas frozen; {seeds_of(rows)}. Last: one adapter "
        "that is trained on for as long.",
    )


@if_measured
def orders_said(rows: Sequence[Row]) -> str:
    """Which order ends best at each seed, in a sentence."""
    winners: list[str] = []
    for seed in sorted({row["seed"] for row in rows}):
        own = [r for r in pick(rows, seed=seed) if len(set(r["method"].split(", "))) == len(PARTS)]
        best = max(own, key=lambda r: fmean(digits(r["stages"][-1])))
        winners.append(best["method"].replace(", ", " → "))
    return (
        f"Best order, seed by seed: {'; '.join(winners)}. Different orders win: "
        f"{'yes' if len(set(winners)) > 1 else 'no'}."
    )


@if_measured
def templates_table(rows: Sequence[Row]) -> Table:
    """A template against bare text, by the number of examples and by what is trained."""
    settings = [(n, "") for n in sorted({row["shots"] for row in rows})]
    settings += sorted({(r["shots"], r["method"].partition(", ")[2]) for r in rows} - {*settings})
    lines = []
    for shots, trained in settings:
        own = pick(rows, shots=shots)
        a, b = (
            right(pick(own, method=f"{way}, {trained}" if trained else way))
            for way in ("template", "bare text")
        )
        gain = a - b if NOT_MEASURED not in (a, b) else NOT_MEASURED
        lines.append(
            {
                "examples": shots,
                "trained": trained or ("LoRA" if shots else "nothing"),
                "template": a,
                "bare text": b,
                "difference": gain,
            }
        )
    return table(
        lines,
        {
            "examples": ",d", "trained": "", "template": ".1f", "bare text": ".1f",
            "difference": "+.1f",
        },
        caption="mini-1m on topics: per cent of new texts that are right, with the words of a "
        "template behind the text and without; 16 examples are 16 of each topic.",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- scale


@if_measured
def scale_table(rows: Sequence[Row]) -> Table:
    """Each method on each size of model."""
    lines = [
        {"method": name} | {s: right(pick(rows, method=name, model=s)) for s in SIZES}
        for name in SCALED
    ]
    return table(
        lines,
        {"method": "", **dict.fromkeys(SIZES, ".1f")},
        caption=f"Topics: per cent of new texts that are right; {seeds_of(rows)}.",
    )


# ---------------------------------------------------------------------------------------- transfer


def arriving(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Of what a target's own delta saves, the part that a source's delta saves."""
    (frozen,) = pick(rows, source="untuned")
    found = {}
    for target in KIND_OF:
        losses = {
            source: fmean(fmean(r[target]) for r in pick(rows, source=source))
            for source in KIND_OF
            if pick(rows, source=source)
        }
        before = fmean(frozen[target])
        if target in losses and before > losses[target]:
            for source, loss in losses.items():
                found[source, target] = (before - loss) / (before - losses[target])
    return found


@if_measured
def transfer_said(rows: Sequence[Row]) -> str | NotMeasured:
    """How much arrives within a kind and across kinds, in a sentence."""
    found = arriving(rows)
    sides: dict[str, list[float]] = {"same": [], "other": [], "writing to classes": []}
    for (source, target), share in found.items():
        if source != target:
            sides["same" if KIND_OF[source] == KIND_OF[target] else "other"].append(share)
            if (KIND_OF[source], KIND_OF[target]) == ("writing", "classes"):
                sides["writing to classes"].append(share)
    if not all(sides.values()):
        return NotMeasured(f"{CHAPTER}/transfer")
    same, other, written = (f"{tidy(100 * fmean(s), 0):.0f}%" for s in sides.values())
    return (
        f"Of what a task's own delta saves, the delta of the other task of its kind saves "
        f"{same} on average, that of a task of another kind {other}; from writing to classes "
        f"{written} arrive."
    )


# -------------------------------------------------------------------------------------- the theory


@if_measured
def tuned_table(rows: Sequence[Row]) -> Table:
    """What each way of tuning reaches, forgets, and how far it is from full tuning."""
    made = verdicts.tuned(rows)
    (frozen,) = pick(rows, method="untuned")
    novel = fmean(frozen["novel_documents"])
    lines = []
    for name in ("untuned", "full", "LoRA", "adapter", "prompt"):
        own = pick(rows, method=name)
        far = [fmean(r["distance_documents"]) for r in made
               if r["method"] == name and "distance_documents" in r]  # fmt: skip
        losses = [fmean(r["novel_documents"]) for r in own]
        lines.append(
            {
                "method": name,
                "right": right(own),
                "novel, nats": fmean(losses) if losses else NOT_MEASURED,
                "forgotten, nats": fmean(losses) - novel if losses else NOT_MEASURED,
                "distance": fmean(far) if far else 0.0 if name == "full" else NOT_MEASURED,
            }
        )
    return table(
        lines,
        {
            "method": "", "right": ".1f", "novel, nats": ".3f", "forgotten, nats": "+.3f",
            "distance": ".2f",
        },
        caption="mini-1m tuned on topics: per cent of new texts that are right; the loss on "
        "chapters of a novel, and how much it rose; how far the log-probabilities of the topics "
        "are from those of the fully tuned model (root mean square).",
    )  # fmt: skip


@if_measured
def energy_said(rows: Sequence[Row], rank: int = 8, width: int = 128) -> str | NotMeasured:
    """How much of full tuning's change lies in a few directions, in a sentence."""
    shares = [share for row in pick(rows, method="full") for share in row["energy"]]
    if not shares:
        return NotMeasured(f"{CHAPTER}/tuned")
    return (
        f"{rank} of at most {width} singular directions hold {fmean(shares):.0%} of the squared "
        f"change of full tuning, averaged over query and value matrices; in the matrix where it "
        f"is least, {min(shares):.0%}."
    )


@if_measured
def control_said(rows: Sequence[Row]) -> str | NotMeasured:
    """What both solutions cost, and what they do to new texts, in sentences."""
    ends = {
        way: {r["seed"]: r for r in pick(rows, method=way)}
        for way in ("back-propagation", "successive approximations")
    }
    both = [seed for seed in ends["back-propagation"] if seed in ends["successive approximations"]]
    if not both:
        return NotMeasured(f"{CHAPTER}/control")
    costs = {way: fmean(own[s]["costs"][-1] for s in both) for way, own in ends.items()}
    free = fmean(ends["back-propagation"][s]["free"] for s in both)
    apart = max(abs(ends["back-propagation"][s]["costs"][-1] -
                    ends["successive approximations"][s]["costs"][-1]) for s in both)  # fmt: skip
    new = {way: fmean(fmean(own[s]["documents"]) for s in both) for way, own in ends.items()}
    before = fmean(pick(rows, method="untouched")[0]["documents"])
    return (
        f"Untouched, the examples cost {free:.3f}. Back-propagation ends at "
        f"{costs['back-propagation']:.3f}, successive approximations at "
        f"{costs['successive approximations']:.3f}; on no set of examples are they farther apart "
        f"than {tidy(apart):.3f}. On new texts the loss falls from {before:.2f} to "
        f"{new['back-propagation']:.2f} and {new['successive approximations']:.2f}."
    )


@if_measured
def black_box_table(rows: Sequence[Row]) -> Table:
    """A prompt without gradients, with them, and none."""
    lines = []
    for name in ("untuned", "black box", "gradients"):
        own = pick(rows, method=name)
        loss = fmean(fmean(r["documents"]) for r in own) if own else NOT_MEASURED
        lines.append({"prompt": name, "loss, nats": loss, "right": right(own)})
    return table(
        lines,
        {"prompt": "", "loss, nats": ".3f", "right": ".1f"},
        caption="mini-1m on topics, a prompt of 4 vectors: loss of the right answer on new texts, "
        "and per cent right. Black box: 200 losses; gradients: 50 steps.",
    )


@if_measured
def gap_said(rows: Sequence[Row]) -> str | NotMeasured:
    """Full tuning's gap against that of each method alone, in a sentence."""
    made = verdicts.together(rows)
    parts = []
    for part in PARTS:
        change = paired(made, {"method": "full"}, {"method": part}, "gap_documents")
        if change is None:
            return NotMeasured(f"{CHAPTER}/together")
        size = {True: "differs from", False: "cannot be told from"}[change.decided]
        parts.append(f"{part} ({size} it: {change.number()})")
    return f"Full tuning's gap less that of {spoken(parts)}."
