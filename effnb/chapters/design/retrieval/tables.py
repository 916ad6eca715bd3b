"""What the chapter on retrieval asks of its stored results: tables and sentences.

Every sentence is put together from the numbers it speaks of, so that it stays true when they are
measured again.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from effnb.design.retrieval import LogLine, SizeCurve, Worth, fit_log_line, fit_power_law
from effnb.lab import results
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.tables import Table, table

MODELS = ("mini-300k", "mini-1m", "mini-5m")
BINS = ((0.0, 0.125), (0.125, 0.25), (0.25, 0.5), (0.5, 1.0))
"""Shares of a chunk that its longest run takes."""


def stored(part: str) -> results.StoredResult:
    """One stored table of this chapter."""
    return results.read(f"02_design/4_retrieval/{part}")


def measured(part: str) -> results.StoredResult:
    """One of the tables that the verdict rests on."""
    return results.read(f"02_design/4_retrieval_claims/{part}")


def one(rows: Sequence[Row], **wanted: Any) -> Row:
    """The row of a setting.

    Raises:
        ValueError: When no such row is stored.
    """
    found = pick(rows, **wanted)
    if not found:
        raise ValueError(f"no row has {wanted}.")
    return found[0]


def models_of(rows: Sequence[Row]) -> list[str]:
    """The decoders that were measured, the smallest first."""
    return sorted({r["model"] for r in rows}, key=MODELS.index)


def entries_of(rows: Sequence[Row], model: str) -> list[int]:
    """The sizes of datastores that a decoder was measured with."""
    return sorted(r["entries"] for r in pick(rows, model=model))


# --- what a datastore is worth --------------------------------------------------------------------


def curve(rows: Sequence[Row]) -> SizeCurve:
    """Loss of the plain decoders over their parameters."""
    first = [pick(rows, model=m)[0] for m in models_of(rows)]
    return SizeCurve(
        tuple(float(r["parameters"]) for r in first), tuple(float(r["alone"]) for r in first)
    )


def worth(rows: Sequence[Row], model: str, entries: int) -> Worth:
    """Parameters of a plain decoder that does as well."""
    return curve(rows).worth(one(rows, model=model, entries=entries)["loss"])


def growth(rows: Sequence[Row], model: str) -> LogLine:
    """The line of a decoder's loss over the logarithm of the entries."""
    found = sorted(pick(rows, model=model), key=lambda r: r["entries"])
    return fit_log_line([r["entries"] for r in found], [r["loss"] for r in found])


def times(found: Worth, parameters: float) -> str:
    """How many times as many parameters, as a sentence says it."""
    return f"{found.bound} {found.ratio(parameters):.1f} times".strip()


@if_measured
def worth_said(rows: Sequence[Row]) -> str:
    """What the largest datastore does for the smallest decoder, and the claim's factor."""
    small, large = models_of(rows)[0], models_of(rows)[-1]
    entries = entries_of(rows, small)[-1]
    row, best = one(rows, model=small, entries=entries), pick(rows, model=large)[0]
    found = worth(rows, small, entries)
    span = best["parameters"] / row["parameters"]
    law = fit_power_law(curve(rows).parameters, curve(rows).losses)
    # The loss that the law foresees for 25 times the parameters, from the decoder's own loss.
    wanted = row["alone"] * 25**-law.exponent
    return (
        f"{small} alone: {row['alone']:.2f} nats per token; with {entries:,} entries "
        f"{row['loss']:.2f}. A plain decoder with that loss has {times(found, row['parameters'])} "
        f"its parameters; {large}, at {best['alone']:.2f} nats, has {span:.0f} times as many. By "
        f"the power law through our three sizes, a factor of 25 would be {wanted:.2f} nats."
    )


@if_measured
def worth_table(rows: Sequence[Row]) -> Table:
    """Each decoder with its largest datastore."""
    lines = []
    for model in models_of(rows):
        row = one(rows, model=model, entries=entries_of(rows, model)[-1])
        found = worth(rows, model, row["entries"])
        lines.append(
            {
                "decoder": model,
                "alone": row["alone"],
                "with": row["loss"],
                "gain": row["alone"] - row["loss"],
                "worth": times(found, row["parameters"]),
                "weights": 2 * row["parameters"] / 1e6,
                "datastore": row["bytes"] / 1e6,
            }
        )
    entries = max(r["entries"] for r in rows)
    return table(
        lines,
        {
            "decoder": "",
            "alone": ".2f",
            "with": ".2f",
            "gain": ".2f",
            "worth": "",
            "weights": ".1f",
            "datastore": ".1f",
        },
        caption=f"Nats per token on held-out descriptions, alone and with {entries:,} entries; "
        "the parameters that a plain decoder of equal loss has, as a multiple of its own; "
        "megabytes of the weights and of the datastore, in 16 bits.",
    )


@if_measured
def growth_said(rows: Sequence[Row]) -> str:
    """What twice the entries bring, and how far the line would have to go."""
    parts = [f"{model} {1000 * growth(rows, model).per_doubling:.0f}" for model in models_of(rows)]
    small, large = models_of(rows)[0], models_of(rows)[-1]
    line, goal = growth(rows, small), pick(rows, model=large)[0]["alone"]
    said = f"Thousandths of a nat that each doubling of the datastore brings: {', '.join(parts)}. "
    if line.slope <= 0:
        return said + f"{small} does not gain from more entries here."
    if line.at(entries_of(rows, small)[-1]) <= goal:
        return said + f"Within the measured sizes {small} reaches the loss of {large}."
    wanted = float(f"{line.entries(goal):.0e}")  # one digit: the line is long
    return said + (
        f"If the line of {small} went on, it would reach the loss of {large} with "
        f"about {wanted:,.0f} entries; nothing measured here says that it does."
    )


# --- settings -------------------------------------------------------------------------------------


@if_measured
def knobs_said(rows: Sequence[Row]) -> str:
    """The best value of each knob, and what the extremes cost."""
    best = {}
    for knob in ("lam", "k", "temperature"):
        found = [r for r in pick(rows, knob=knob) if r["loss"] is not None]
        best[knob] = min(found, key=lambda r: r["loss"])
    alone = one(rows, knob="lam", value=0.0)["loss"]
    whole = one(rows, knob="lam", value=1.0)["loss"]
    end = "infinite loss" if whole is None else f"{whole:.2f} nats"
    return (
        f"Best share: {best['lam']['value']:g}, with {best['lam']['loss']:.2f} nats; 0 gives "
        f"{alone:.2f} and 1 gives {end}. Best number of neighbours: {best['k']['value']:g}; best "
        f"temperature: {best['temperature']['value']:g}."
    )


@if_measured
def keys_said(rows: Sequence[Row]) -> str:
    """Which place gives the better keys."""
    inner, outer = (one(rows, at=at) for at in ("feedforward", "output"))
    gain = outer["loss"] - inner["loss"]
    word = "lower" if gain > 0 else "higher"
    close = " (a difference of less than a hundredth)" if abs(gain) < 0.01 else ""
    return (
        f"Keys from the last feed-forward: {inner['loss']:.3f} nats; from the output layer: "
        f"{outer['loss']:.3f}; without a datastore {inner['alone']:.3f}. The paper's choice gives "
        f"the {word} loss here{close}."
    )


@if_measured
def approximate_table(rows: Sequence[Row]) -> Table:
    """What looking at some lists finds and what it keeps of the gain."""
    lines = [
        {
            "lists": f"{r['probes']} of {r['lists']}",
            "found": 100 * r["neighbours"],
            "loss": r["loss"],
            "kept": 100 * (r["alone"] - r["loss"]) / (r["alone"] - r["exact"]),
        }
        for r in sorted(rows, key=lambda r: r["probes"])
    ]
    return table(
        lines,
        {"lists": "", "found": ".0f", "loss": ".3f", "kept": ".0f"},
        caption="FAISS's lists: how many are looked at; per cent of the 64 nearest entries that "
        "are found; nats per token; per cent of exact search's gain that is kept.",
    )


# --- leakage --------------------------------------------------------------------------------------


def binned(points: Sequence[Sequence[float]]) -> list[tuple[str, int, float]]:
    """Chunks by the share that their longest run takes: name, how many, mean gain."""
    found = []
    for low, high in BINS:
        gains = [g for s, g in points if (low < s or (low == 0 and s == 0)) and s <= high]
        if gains:
            found.append((f"up to {100 * high:g} %", len(gains), fmean(gains)))
    return found


@if_measured
def overlap_table(rows: Sequence[Row]) -> Table:
    """Gain over what a chunk shares with the datastore."""
    honest, leaked = (one(rows, leaked=flag)["points"] for flag in (False, True))
    after = {name: gain for name, _, gain in binned(leaked)}
    lines = [
        {"run": name, "chunks": count, "gain": gain, "leaked": after[name]}
        for name, count, gain in binned(honest)
    ]
    return table(
        lines,
        {"run": "", "chunks": ",d", "gain": ".2f", "leaked": ".2f"},
        caption="Chunks of 32 tokens by the longest run that they share with the library, as a "
        "share of the chunk; how many; nats per token gained; and gained when the texts "
        "themselves are put into the datastore.",
    )


@if_measured
def leaked_said(rows: Sequence[Row]) -> str:
    """What a leak does to the number that one would report."""
    honest, leaked = (one(rows, leaked=flag) for flag in (False, True))
    return (
        f"Without the datastore {honest['alone']:.2f} nats, with it {honest['loss']:.2f}, with the "
        f"texts themselves in it {leaked['loss']:.2f}."
    )


# --- another domain, RETRO ------------------------------------------------------------------------


@if_measured
def adaptation_said(rows: Sequence[Row]) -> str:
    """What a German datastore does for a decoder that was trained on English."""
    alone, joined = (fmean(one(rows, method=m)["documents"]) for m in ("alone", "kNN-LM"))
    row = one(rows, method="kNN-LM")
    return (
        f"German descriptions: {alone:.2f} nats per token alone, {joined:.2f} with "
        f"{row['entries']:,} German entries (share {row['lam']:g}, chosen on other texts). No "
        "weight has changed."
    )


@if_measured
def retro_said(rows: Sequence[Row]) -> str:
    """What the frozen decoder gains by reading, from all seeds."""
    alone = fmean(one(rows, method="alone")["documents"])
    found = {
        read: [fmean(r["documents"]) for r in pick(rows, method="RETRO", read=read)]
        for read in ("retrieved", "random", "none")
    }
    seeds = len(found["retrieved"])
    new = pick(rows, method="RETRO")[0]["new_parameters"]
    gain = alone - fmean(found["retrieved"])
    word = "lower" if gain > 0 else "higher"
    return (
        f"mini-1m alone: {alone:.3f} nats. Fitted ({seeds} seeds, {new:,} new parameters): "
        f"{fmean(found['retrieved']):.3f} with retrieved neighbours, {abs(gain):.3f} {word}; "
        f"{fmean(found['random']):.3f} with random ones; {fmean(found['none']):.3f} with none."
    )


@if_measured
def neighbours_table(rows: Sequence[Row]) -> Table:
    """RETRO over the number of neighbours that it is given."""
    lines = [
        {"read": read}
        | {str(k): one(rows, read=read, k=k)["loss"] for k in sorted({r["k"] for r in rows})}
        for read in ("retrieved", "random")
    ]
    return table(
        lines,
        {"read": ""} | {str(k): ".3f" for k in sorted({r["k"] for r in rows})},
        caption="RETRO fitted with two neighbours, read with 0 to 8: nats per token on held-out "
        "descriptions, one seed.",
    )
