"""What the chapter on Matryoshka representations asks of its stored results: tables and sentences.

Every sentence is put together from the numbers it speaks of, so that it stays true when they are
measured again.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from effnb.lab import results
from effnb.lab.changes import Row, if_measured, pick, spoken
from effnb.lab.tables import NOT_MEASURED, Table, table

FULL = 384
WAYS = {
    "Matryoshka": "nested",
    "own size": "own size",
    "trained whole, cut": "trained whole, cut",
    "principal components": "principal components",
    "MiniLM, cut": "MiniLM, cut",
    "random numbers": "random numbers",
}
"""Ways to few numbers, as stored and as pictures and tables call them."""
DOCUMENTS = 10_000
ENOUGH = 0.99
"""The share of the nearest that a search must keep to count as equal."""


def stored(part: str) -> results.StoredResult:
    """One stored table of this chapter."""
    return results.read(f"05_inference/8_matryoshka/{part}")


def mean(rows: Sequence[Row], key: str, **wanted: Any) -> float:
    """The mean of a column over the seeds of one setting.

    Raises:
        ValueError: When no such row is stored.
    """
    found = pick(rows, **wanted)
    if not found:
        raise ValueError(f"no row has {wanted}.")
    return fmean(row[key] for row in found)


def has(rows: Sequence[Row], **wanted: Any) -> bool:
    """Whether such a row is stored."""
    return bool(pick(rows, **wanted))


def dims_of(rows: Sequence[Row], method: str) -> list[int]:
    """The prefix lengths that a method was measured at."""
    return sorted({row["dims"] for row in pick(rows, method=method)})


def seeds_of(rows: Sequence[Row], method: str) -> int:
    """How many maps of a method were measured."""
    return len({row.get("seed") for row in pick(rows, method=method)})


def work(documents: int, dims: int, shortlist: int, full: int = FULL) -> int:
    """Multiplications of two looks; of one when the shortlist is 0 and `dims` is all."""
    return documents * dims + shortlist * full


def per_cent(share: float) -> str:
    """A share as it is printed."""
    return f"{100 * share:.0f} %"


# --- few numbers ----------------------------------------------------------------------------------


@if_measured
def dimensions_said(rows: Sequence[Row], dims: int = 16) -> str:
    """What a few numbers find, in two sentences."""
    nested, whole = (mean(rows, "first", method="Matryoshka", dims=m) for m in (dims, FULL))
    others = {
        name: mean(rows, "first", method=method, dims=dims)
        for method, name in WAYS.items()
        if method != "Matryoshka"
    }
    best = max((n for n in others if n != "own size"), key=others.__getitem__)
    return (
        f"All {FULL} numbers of the nested map put the right one of {DOCUMENTS:,} descriptions "
        f"first for {per_cent(whole)} of the queries, and its first {dims} numbers alone for "
        f"{per_cent(nested)}. A map trained for {dims} numbers only: {per_cent(others['own size'])}"
        f". The best of the ways that do not train prefixes ({best}): {per_cent(others[best])}."
    )


@if_measured
def dimensions_table(rows: Sequence[Row]) -> Table:
    """How often the right description comes first, by way and by numbers compared."""
    shown = (8, 16, 32, 64, 128, FULL)
    lines = [
        {"way": name}
        | {
            str(m): 100 * mean(rows, "first", method=method, dims=m)
            if has(rows, method=method, dims=m)
            else "–"
            for m in shown
        }
        for method, name in WAYS.items()
    ]
    return table(
        lines,
        {"way": ""} | {str(m): ".0f" for m in shown},
        caption=f"Right description first among {DOCUMENTS:,}, per cent of the test queries, over "
        f"the numbers compared; means of {seeds_of(rows, 'Matryoshka')} seeds where something is "
        "drawn. “Own size” is a map for each column.",
    )


@if_measured
def between_said(rows: Sequence[Row]) -> str:
    """Whether lengths that were never trained lie between their neighbours."""
    trained = [m for m in dims_of(rows, "Matryoshka") if m in (8, 16, 32, 64, 128, 256, FULL)]
    between = [m for m in dims_of(rows, "Matryoshka") if m not in trained]
    inside = 0
    for m in between:
        low = max(t for t in trained if t < m)
        high = min(t for t in trained if t > m)
        left, found, right = (
            mean(rows, "first", method="Matryoshka", dims=x) for x in (low, m, high)
        )
        inside += min(left, right) - 0.005 <= found <= max(left, right) + 0.005
    return (
        f"Of {len(between)} lengths that were never trained, {inside} find no less than the next "
        "shorter trained length and no more than the next longer one, within half a point."
    )


@if_measured
def undivided_table(rows: Sequence[Row]) -> Table:
    """Prefixes that keep their length, beside those that are divided by it."""
    shown = (8, 16, 32, 64, 128, FULL)
    lines = [
        {"prefixes": name}
        | {str(m): 100 * mean(rows, "first", method=method, dims=m) for m in shown}
        for name, method in (
            ("divided by their length", "Matryoshka"),
            ("as they are", "Matryoshka, not divided"),
        )
    ]
    return table(
        lines,
        {"prefixes": ""} | {str(m): ".0f" for m in shown},
        caption="Right description first, per cent of the test queries, over the numbers compared.",
    )


@if_measured
def undivided_said(rows: Sequence[Row]) -> str:
    """What it costs to forget the division, where it costs most."""
    lost = {
        m: mean(rows, "first", method="Matryoshka", dims=m)
        - mean(rows, "first", method="Matryoshka, not divided", dims=m)
        for m in dims_of(rows, "Matryoshka, not divided")
    }
    worst = max(lost, key=lost.__getitem__)
    if lost[worst] < 0.005:
        return "Here the division changes less than half a point at any length."
    return (
        f"Without the division the search loses most at {worst} numbers: "
        f"{100 * lost[worst]:.0f} of 100 queries."
    )


# --- two looks ------------------------------------------------------------------------------------


def looks(rows: Sequence[Row], method: str = "Matryoshka") -> list[dict[str, Any]]:
    """Every setting of two looks with its means over the seeds."""
    settings = {(r["dims"], r["shortlist"]) for r in pick(rows, method=method)}
    keys = ("first", "ten", "neighbours", "multiplications")
    return [
        {"dims": m, "shortlist": kept}
        | {k: mean(rows, k, method=method, dims=m, shortlist=kept) for k in keys}
        for m, kept in sorted(settings)
    ]


@if_measured
def shortlist_said(rows: Sequence[Row], dims: int = 16, shortlist: int = 200) -> str:
    """What the setting of the claim keeps and saves."""
    whole = mean(rows, "first", method="Matryoshka", dims=FULL, shortlist=0)
    at = {"method": "Matryoshka", "dims": dims, "shortlist": shortlist}
    saves = work(DOCUMENTS, FULL, 0) / work(DOCUMENTS, dims, shortlist)
    return (
        f"With {dims} numbers for all and {FULL} for the best {shortlist}, the right description "
        f"comes first for {100 * mean(rows, 'first', **at):.1f} % of the queries, against "
        f"{100 * whole:.1f} % with {FULL} numbers for all. Of the ten nearest, "
        f"{100 * mean(rows, 'neighbours', **at):.1f} % are found. The comparisons take "
        f"{saves:.1f} times fewer multiplications."
    )


def _whole(rows: Sequence[Row], method: str) -> float:
    """How often the right description comes first by all numbers."""
    return mean(rows, "first", method=method, dims=FULL, shortlist=0)


@if_measured
def cheapest_table(rows: Sequence[Row]) -> Table:
    """For a few goals: the cheapest two looks that reach them, of two maps."""
    names = {"Matryoshka": "nested map", "principal components": "principal components"}
    goals: dict[str, Any] = {
        f"{100 * share:.0f} % of the ten nearest": lambda r, _, share=share: (
            r["neighbours"] >= share
        )
        for share in (0.9, ENOUGH)
    }
    goals = {
        "right one first, within a point": lambda r, whole: r["first"] >= whole - 0.01,
        "right one first, within 3 points": lambda r, whole: r["first"] >= whole - 0.03,
    } | goals
    lines = []
    for goal, reached in goals.items():
        for method, name in names.items():
            whole = _whole(rows, method)
            fit = [r for r in looks(rows, method) if r["shortlist"] and reached(r, whole)]
            best = min(fit, key=lambda r: r["multiplications"], default=None)
            line = {"goal": goal, "vectors": name}
            if best:
                line |= {
                    "first look": best["dims"],
                    "shortlist": best["shortlist"],
                    "times fewer": work(DOCUMENTS, FULL, 0) / best["multiplications"],
                    "right one first, %": 100 * best["first"],
                }
            lines.append(line)
    columns = {
        "goal": "",
        "vectors": "",
        "first look": "",
        "shortlist": "",
        "times fewer": ".1f",
        "right one first, %": ".0f",
    }
    return table(
        [dict.fromkeys(columns, NOT_MEASURED) | line for line in lines],
        columns,
        caption="The cheapest two looks of the grid that reach a goal: numbers in the first look, "
        "documents in the shortlist, how many times fewer multiplications they take than "
        f"{FULL} numbers of all {DOCUMENTS:,} documents, and how often the right description "
        "comes first. Each kind of vector is compared with itself at all numbers.",
    )


@if_measured
def rivals_said(rows: Sequence[Row], dims: int = 16, shortlist: int = 200) -> str:
    """What nested vectors keep and what principal components keep, at one setting."""
    at = {"dims": dims, "shortlist": shortlist}
    nested, principal = (
        {key: 100 * mean(rows, key, method=method, **at) for key in ("first", "neighbours")}
        for method in ("Matryoshka", "principal components")
    )
    say = (
        "The nested map keeps the right answers better, and principal components the neighbours"
        if nested["first"] > principal["first"] and nested["neighbours"] < principal["neighbours"]
        else "The nested map keeps both better"
        if nested["first"] > principal["first"] and nested["neighbours"] >= principal["neighbours"]
        else "The nested map does not keep the right answers better"
    )
    return (
        f"{dims} numbers and a shortlist of {shortlist}: the nested map has the right one first "
        f"for {nested['first']:.0f} % and keeps {nested['neighbours']:.0f} % of its ten nearest; "
        f"principal components have {principal['first']:.0f} % and keep "
        f"{principal['neighbours']:.0f} %. {say}."
    )


@if_measured
def funnel_said(rows: Sequence[Row]) -> str:
    """What a funnel keeps and takes."""
    at = {"method": "Matryoshka, funnel"}
    if not has(rows, **at):
        return "The funnel is not measured yet."
    cost = mean(rows, "multiplications", **at)
    return (
        f"The funnel keeps {100 * mean(rows, 'neighbours', **at):.1f} % of the ten nearest with "
        f"{work(DOCUMENTS, FULL, 0) / cost:.1f} times fewer multiplications."
    )


# --- approximate search ---------------------------------------------------------------------------

KNOB = {"HNSW": "ef", "IVF": "probes"}


def walks(rows: Sequence[Row], method: str, dims: int) -> list[dict[str, Any]]:
    """Every setting of an index over prefixes of one length, with its means, the cheapest first."""
    knob = KNOB[method]
    found = [
        {knob: value}
        | {
            k: mean(rows, k, method=method, dims=dims, **{knob: value})
            for k in ("first", "neighbours", "evaluations", "multiplications")
        }
        for value in sorted({r[knob] for r in pick(rows, method=method, dims=dims)})
    ]
    return sorted(found, key=lambda r: r["multiplications"])


def cheapest_walk(rows: Sequence[Row], method: str, dims: int, share: float) -> dict | None:
    """The cheapest setting that keeps a share of the ten nearest; None when none does."""
    return next((r for r in walks(rows, method, dims) if r["neighbours"] >= share), None)


@if_measured
def walks_table(rows: Sequence[Row], share: float = 0.9) -> Table:
    """What each index takes for the same share of the nearest."""
    lines = []
    for method in KNOB:
        for m in dims_of(rows, method):
            best = cheapest_walk(rows, method, m, share)
            if best is None:
                continue
            lines.append(
                {
                    "index": f"{method}, {m} numbers" + (", then all" if m < FULL else ""),
                    "setting": f"{KNOB[method]} {best[KNOB[method]]}",
                    "evaluations": round(best["evaluations"]),
                    "multiplications": round(best["multiplications"]),
                    "times fewer": work(DOCUMENTS, FULL, 0) / best["multiplications"],
                }
            )
    return table(
        lines,
        {
            "index": "",
            "setting": "",
            "evaluations": ",",
            "multiplications": ",",
            "times fewer": ".1f",
        },
        caption=f"The cheapest setting of each index that finds {100 * share:.0f} % of the ten "
        "nearest: distance evaluations a query, what they take in multiplications, and how many "
        f"times fewer that is than comparing {FULL} numbers of all. An index over a prefix gives a "
        "shortlist, which is ordered by all numbers. An index that finds fewer at every setting "
        "that was tried is left out.",
    )


@if_measured
def walks_said(rows: Sequence[Row], share: float = 0.9) -> str:
    """What nested vectors add to HNSW."""
    whole = cheapest_walk(rows, "HNSW", FULL, share)
    cut = {
        m: best
        for m in dims_of(rows, "HNSW")
        if m < FULL and (best := cheapest_walk(rows, "HNSW", m, share))
    }
    if whole is None or not cut:
        return f"No walk that was measured finds {100 * share:.0f} % of the ten nearest."
    m = min(cut, key=lambda one: cut[one]["multiplications"])
    graph = work(DOCUMENTS, FULL, 0) / whole["multiplications"]
    both = whole["multiplications"] / cut[m]["multiplications"]
    tail = (
        f"Walking by {m} numbers and looking again takes another {both:.1f} times fewer"
        if both > 1
        else f"Walking by {m} numbers and looking again takes {1 / both:.1f} times as many"
    )
    return (
        f"For {100 * share:.0f} % of the ten nearest, the graph alone takes {graph:.1f} times "
        f"fewer multiplications than exact search, with all {FULL} numbers. {tail}; the shorter "
        f"comparisons alone would promise {FULL / m:.0f} times fewer."
    )


# --- classification -------------------------------------------------------------------------------

NETWORKS = ("MRL", "MRL-E", "own size", "plain, cut", "plain, principal components",
            "plain, random numbers")  # fmt: skip


@if_measured
def classes_table(rows: Sequence[Row]) -> Table:
    """Accuracy of archive sections, by way and by numbers."""
    shown = dims_of(rows, "MRL")
    lines = [
        {"way": way} | {str(m): 100 * mean(rows, "accuracy", method=way, dims=m) for m in shown}
        for way in NETWORKS
        if has(rows, method=way, dims=shown[0])
    ]
    return table(
        lines,
        {"way": ""} | {str(m): ".0f" for m in shown},
        caption="Archive section of a description, per cent right, over the numbers that the "
        f"classifier reads; means of {seeds_of(rows, 'MRL')} seeds. The plain network was trained "
        "with all 64 numbers; its features are cut or mapped, and a linear classifier is trained "
        "on what is left.",
    )


@if_measured
def classes_said(rows: Sequence[Row]) -> str:
    """What one network for all sizes costs beside a network for each, and beside mapping one."""
    shown = dims_of(rows, "MRL")
    nested, own, mapped = (
        {m: 100 * mean(rows, "accuracy", method=way, dims=m) for m in shown}
        for way in ("MRL", "own size", "plain, principal components")
    )
    behind = {m: own[m] - nested[m] for m in shown}
    most = max(shown, key=behind.__getitem__)
    ahead = [str(m) for m in shown if nested[m] > mapped[m] + 0.5]
    where = f"only at {spoken(ahead)}" if len(ahead) < len(shown) else "at every length"
    return (
        f"One nested network is {behind[most]:.0f} points behind a network of its own at {most} "
        f"numbers, where it is furthest behind, and {behind[shown[-1]]:.0f} at {shown[-1]}. "
        + (
            f"It is more than half a point ahead of a plain network's principal components {where}."
            if ahead
            else "It is nowhere more than half a point ahead of a plain network's principal "
            "components."
        )
    )


@if_measured
def stops_said(rows: Sequence[Row]) -> str:
    """What stopping early uses and costs."""
    whole = mean(rows, "accuracy", method="MRL", dims=64)
    parts = []
    for row in sorted({r["tolerance"] for r in pick(rows, method="MRL, early stops")}):
        at = {"method": "MRL, early stops", "tolerance": row}
        parts.append(
            f"{mean(rows, 'numbers', **at):.1f} numbers on average for "
            f"{100 * mean(rows, 'accuracy', **at):.1f} % right"
            + (f" (thresholds that may lose {100 * row:.1f} % a step)" if row else "")
        )
    return f"All 64 numbers: {100 * whole:.1f} % right. Early stops: {'; '.join(parts)}."


# --- cost -----------------------------------------------------------------------------------------


def storage_table() -> Table:
    """Bytes of a million vectors, and the multiplications of one query."""
    million = 1_000_000
    lines = []
    for name, dims, shortlist in (
        ("384 numbers of all", FULL, 0),
        ("128 numbers of all", 128, 0),
        ("16 of all, 384 of the best 200", 16, 200),
        ("16 of all, 128 of the best 200", 16, 200),
    ):
        held = 128 if "128" in name else FULL
        cost = work(million, dims, shortlist, held)
        lines.append(
            {
                "search": name,
                "megabytes": million * 2 * held / 1e6,
                "read for all": million * 2 * dims / 1e6,
                "multiplications": cost / 1e6,
                "times fewer": work(million, FULL, 0) / cost,
            }
        )
    return table(
        lines,
        {
            "search": "",
            "megabytes": ",.0f",
            "read for all": ",.0f",
            "multiplications": ",.1f",
            "times fewer": ".1f",
        },
        caption="A million vectors in 16 bits: megabytes in all, megabytes that the first look "
        "reads, millions of multiplications for one query, and how many times fewer they are.",
    )
