"""What the chapter on co-design asks of its stored results on attention: tables and sentences.

Every sentence is put together from the numbers it speaks of, so that it stays true when they are
measured again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from effnb.chapters.inference.quantization.tables import hits
from effnb.hardware.codesign.accelerator import Accelerator, Kept, simulate_decode_attention
from effnb.hardware.codesign.roofline import Shape
from effnb.lab import results
from effnb.lab.changes import Change, if_measured, mean_windows, pick, spoken
from effnb.lab.tables import Table, table

Row = Mapping[str, Any]
ROUNDS = [2, 4]
"""Bits of Energon's two rounds."""


def stored(part: str) -> results.StoredResult:
    """One stored table of this chapter."""
    return results.read(f"06_hardware/2_codesign/{part}")


# --- attention with something left out ------------------------------------------------------------

CHOICES = {
    "at random": "random",
    "by summed attention": "importance",
    "by averaged attention": "average",
}


def settings(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The settings that the table compares, each with its rows: several for random choices."""
    half = {"method": "tokens", "keep": 0.5}
    found = {
        f"half of the tokens, {words}": pick(rows, **half, choose=choose)
        for words, choose in CHOICES.items()
    }
    found |= {
        f"half of the heads, {words}": pick(rows, method="heads", keep=0.5, choose=choose)
        for words, choose in (("at random", "random"), ("by their outputs", "importance"))
    }
    found["half of the values"] = pick(rows, method="values", keep=0.5)
    energon = pick(rows, method="energon", choose="importance", rounds=ROUNDS)
    for row in sorted(energon, key=lambda row: row["alpha"]):
        if row["alpha"] >= 0:
            found[f"Energon, alpha {row['alpha']:g}"] = [row]
    return {name: chosen for name, chosen in found.items() if chosen}


def rise(rows: Sequence[Row], chosen: Sequence[Row]) -> Change:
    """What a setting costs above the original, window by window, averaged over its seeds."""
    return Change.between(mean_windows(chosen), pick(rows, method="original")[0]["windows"])


@if_measured
def attention_table(rows: Sequence[Row]) -> Table:
    """What each way of leaving something out computes, finds and costs."""
    lines = []
    for name, chosen in settings(rows).items():
        change = rise(rows, chosen)
        lines.append(
            {
                "left": name,
                "pairs computed": fmean(row["pair_share"] for row in chosen),
                "best keys found": fmean(row["recall"] for row in chosen),
                "nats above the original": change.number(),
                "loss is": change.word(),
            }
        )
    return table(
        lines,
        {
            "left": "",
            "pairs computed": ".1%",
            "best keys found": ".0%",
            "nats above the original": "",
            "loss is": "",
        },
        caption="mini-5m: pairs of query and key that are computed, how many of each query's 16 "
        "best keys are among them, and the rise of the loss with its 95 % interval.",
    )


@if_measured
def attention_said(rows: Sequence[Row]) -> str:
    """How the choices by attention compare with a random one, and what Energon costs."""
    found = settings(rows)
    half = {name: mean_windows(found[f"half of the tokens, {name}"]) for name in CHOICES}
    said = []
    for name in list(CHOICES)[1:]:
        change = Change.between(half[name], half["at random"])
        said.append(f"{name} is {_against(change)} ({change.number()} nats)")
    first = next(name for name in found if name.startswith("Energon"))
    change = rise(rows, found[first])
    return (
        f"With half of the tokens left, choosing {spoken(said)}. {first} computes "
        f"{found[first][0]['pair_share']:.0%} of the pairs; its loss is "
        f"{_against(change, 'the original')} ({change.number()})."
    )


def _against(
    change: Change, other: str = "a random choice", *, lower_is_better: bool = True
) -> str:
    word = change.word(lower_is_better)
    return f"{word} {'than' if change.decided else 'from'} {other}"


@if_measured
def bits_table(rows: Sequence[Row]) -> Table:
    """What reading the high bits of keys first costs, and how often the low ones follow."""
    lines = []
    for row in pick(rows, method="bits"):
        change = rise(rows, [row])
        lines.append(
            {
                "high bits": str(row["msb_bits"]),
                "threshold": row["threshold"],
                "low bits fetched": row["refetch_share"],
                "nats above the original": change.number(),
                "loss is": change.word(),
            }
        )
    return table(
        lines,
        {
            "high bits": "",
            "threshold": ".1f",
            "low bits fetched": ".0%",
            "nats above the original": "",
            "loss is": "",
        },
        caption="mini-5m: progressive quantization of queries and keys.",
    )


LINES = {
    "tokens at random": ("tokens", "random", "keep"),
    "tokens, summed": ("tokens", "importance", "keep"),
    "tokens, averaged": ("tokens", "average", "keep"),
    "heads at random": ("heads", "random", "keep"),
    "heads": ("heads", "importance", "keep"),
    "Energon": ("energon", "importance", "alpha"),
}
"""The curves: for each name the method, its choice, and what changes along it."""


def curve(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """Pairs computed and nats above the original at each setting of a curve, in order."""
    method, choose, by = LINES[name]
    chosen = pick(rows, method=method, choose=choose)
    if by == "alpha":
        chosen = [row for row in chosen if row["rounds"] == ROUNDS]
    points = []
    for setting in {row[by] for row in chosen}:
        same = [row for row in chosen if row[by] == setting]
        points.append((fmean(row["pair_share"] for row in same), rise(rows, same).mean))
    return sorted(points)


# --- a simulated chip -----------------------------------------------------------------------------


def together(rows: Sequence[Row]) -> Row:
    """The row of all of SpAtten's ways at once."""
    return pick(rows, method="together")[0]


def energon_row(rows: Sequence[Row], alpha: float = 0.0) -> Row:
    """Energon's row at a threshold."""
    return pick(rows, method="energon", choose="importance", rounds=ROUNDS, alpha=alpha)[0]


def shares(rows: Sequence[Row]) -> dict[str, tuple[Kept, list[Row]]]:
    """What the chip fetches and computes for each method, and the rows that measured it."""
    both, coarse = together(rows), energon_row(rows)
    spatten = Kept(
        both["pair_share"],
        both["value_share"],
        12,
        both["msb_bits"],
        both["refetch_share"],
        selects=True,
    )
    energon = Kept(
        coarse["pair_share"],
        coarse["value_share"],
        12,
        rounds=tuple(zip(ROUNDS, coarse["round_shares"], strict=True)),
        selects=True,
    )
    return {
        "all keys, 12 bits": (Kept(), []),
        "SpAtten, everything": (spatten, [both]),
        "Energon, alpha 0": (energon, [coarse]),
    }


@if_measured
def chip_table(rows: Sequence[Row], shape: Shape, context: int = 512) -> Table:
    """Bytes and cycles of the simulated chip, beside the measured loss."""
    chip = Accelerator()
    full = simulate_decode_attention(chip, shape, context)
    lines = []
    for name, (kept, chosen) in shares(rows).items():
        found = simulate_decode_attention(chip, shape, context, kept)
        lines.append(
            {
                "attention": name,
                "bytes": found.dram_bytes / full.dram_bytes,
                "cycles": found.cycles / full.cycles,
                "waits for": found.bound,
                "nats, measured": rise(rows, chosen).number() if chosen else "the original",
            }
        )
    return table(
        lines,
        {"attention": "", "bytes": ".0%", "cycles": ".0%", "waits for": "", "nats, measured": ""},
        caption=f"Attention of one token over {context} others on a simulated chip, as a part of "
        "what all keys take. Bytes and cycles are simulated, from measured shares; the loss is "
        "measured.",
    )


# --- an encoder -----------------------------------------------------------------------------------


def found_first(rows: Sequence[Row]) -> list[float]:
    """Which queries found their own text first, averaged over the rows of several seeds."""
    return [fmean(answers) for answers in zip(*map(hits, rows), strict=True)]


@if_measured
def minilm_table(rows: Sequence[Row]) -> Table:
    """How often MiniLM finds a package's description, with something left out."""
    original = found_first(pick(rows, method="original"))
    lines = []
    for name, chosen in minilm_settings(rows).items():
        answers = found_first(chosen)
        change = Change.between(answers, original)
        outcome = change.word(lower_is_better=False)
        lines.append(
            {
                "left": name,
                "pairs computed": chosen[0].get("pair_share", 1.0),
                "found first": fmean(answers),
                "change in points": _points(change),
                "is": "the original" if name == "everything" else outcome,
            }
        )
    return table(
        lines,
        {
            "left": "",
            "pairs computed": ".0%",
            "found first": ".1%",
            "change in points": "",
            "is": "",
        },
        caption=f"MiniLM: how often the right one of {len(original)} descriptions comes first, "
        "and the change with its 95 % interval.",
    )


def minilm_settings(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The stored settings of MiniLM by name; several rows for random choices."""
    found = {"everything": pick(rows, method="original")}
    for keep, share in ((0.5, "half"), (0.25, "a quarter")):
        for choose, words in (("importance", "by attention"), ("random", "at random")):
            chosen = pick(rows, method="tokens", keep=keep, choose=choose)
            found[f"{share} of the tokens, {words}"] = chosen
    found["half of the heads"] = pick(rows, method="heads", keep=0.5)
    for row in sorted(pick(rows, method="energon"), key=lambda row: row["alpha"]):
        found[f"Energon, alpha {row['alpha']:g}"] = [row]
    return {name: chosen for name, chosen in found.items() if chosen}


@if_measured
def minilm_said(rows: Sequence[Row]) -> str:
    """Whether attention chooses tokens better than chance, and what Energon costs."""
    found = minilm_settings(rows)
    said = []
    for share in ("half", "a quarter"):
        change = Change.between(
            found_first(found[f"{share} of the tokens, by attention"]),
            found_first(found[f"{share} of the tokens, at random"]),
        )
        word = _against(change, lower_is_better=False)
        said.append(f"{word} with {share} of the tokens ({_points(change)} points)")
    first = next(name for name in found if name.startswith("Energon"))
    change = Change.between(found_first(found[first]), found_first(found["everything"]))
    word = _against(change, "the original", lower_is_better=False)
    return (
        f"A choice by attention is {spoken(said)}. {first} computes "
        f"{found[first][0]['pair_share']:.0%} of the pairs and is {word} "
        f"({_points(change)} points)."
    )


def _points(change: Change) -> str:
    return Change(100 * change.mean, 100 * change.low, 100 * change.high).number(1)
