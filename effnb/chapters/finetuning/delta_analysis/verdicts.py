"""The verdicts of the chapter on the analysis of delta tuning, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. Sweeps store answers
as they are; the functions here make of them the rows that the registrations name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from effnb.chapters.finetuning.delta_analysis.methods import PARTS, SUBSETS, said
from effnb.chapters.finetuning.delta_tuning.verdicts import TASKS, digits
from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

CHAPTER = "04_finetuning/2_delta_analysis"
GRID = "04_finetuning/1_delta_tuning/grid"
KIND_OF = {
    "section": "classes",
    "language": "classes",
    "match": "pairs",
    "origin": "pairs",
    "summary": "writing",
    "expand": "writing",
}
"""The tasks between which deltas are moved, and their kinds."""

Row = Mapping[str, Any]


def mean_rows(rows: Sequence[Sequence[float]]) -> list[float]:
    """The mean over rows, document by document."""
    return [fmean(column) for column in zip(*rows, strict=True)]


def minus(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """The difference, document by document."""
    return [a - b for a, b in zip(one, other, strict=True)]


def gap(row: Row) -> list[float]:
    """Right or wrong on a training text less that on a new one, pair by pair."""
    return minus(digits(row["train_answers"]), digits(row["answers"]))


def by_seed(rows: Sequence[Row], key: str = "method") -> dict[Any, dict[str, Row]]:
    """Rows by their seed, and then by method."""
    found: dict[Any, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.get("seed"), {})[row[key]] = row
    return found


def _drawn(seed: Any) -> dict[str, Any]:
    return {} if seed is None else {"seed": seed}


def _about(table: str, row: Row, method: str, **more: Any) -> dict[str, Any]:
    about = {"table": table, "model": row["model"], "method": method}
    return about | _drawn(row.get("seed")) | more


# ------------------------------------------------------------------------------ table by table


def together(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each set of methods, and what a method adds to sets of the others."""
    found = []
    for runs in by_seed(rows).values():
        right = {name: digits(row["answers"]) for name, row in runs.items()}
        gaps = {name: gap(row) for name, row in runs.items()}
        some = next(iter(runs.values()))
        for name, values in right.items():
            more = {"documents": values, "gap_documents": gaps[name]}
            found.append(_about("together", some, name, **more))
        for part in PARTS:
            pairs = [
                (said([p for p in PARTS if p in {*others, part}]), said(others))
                for others in SUBSETS
                if others and part not in others
            ]
            if all(a in right and b in right for a, b in pairs):
                for word, side in (("with", 0), ("without", 1)):
                    values = mean_rows([right[pair[side]] for pair in pairs])
                    found.append(_about("together", some, f"{word} {part}", documents=values))
        if said(PARTS) in gaps and all(part in gaps for part in PARTS):
            alone = mean_rows([gaps[part] for part in PARTS])
            for name, values in (("all three", gaps[said(PARTS)]), ("mean of three", alone)):
                found.append(_about("together", some, name, gap_documents=values))
    return found


def sequence(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the first, second and third methods of the orders reach, and an adapter for as long."""
    found = []
    for runs in by_seed(rows).values():
        orders = {n: r for n, r in runs.items() if len(set(n.split(", "))) == len(PARTS)}
        some = next(iter(runs.values()))
        if len(orders) == 6:
            for stage, name in enumerate(("first", "second", "third")):
                values = mean_rows([digits(row["stages"][stage]) for row in orders.values()])
                found.append(_about("sequence", some, name, documents=values))
            led = [digits(r["stages"][-1]) for n, r in orders.items() if n.startswith("adapter")]
            found.append(_about("sequence", some, "adapter first", documents=mean_rows(led)))
        alone = runs.get(", ".join(["adapter"] * 3))
        if alone:
            values = digits(alone["stages"][-1])
            found.append(_about("sequence", some, "adapter alone", documents=values))
    return found


def templates(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Answers, and what is lost from training texts to new ones."""
    found = []
    for row in rows:
        more = {"shots": row["shots"], "documents": digits(row["answers"])}
        if "train_answers" in row:
            more["gap_documents"] = gap(row)
        found.append(_about("templates", row, row["method"], **more))
    return found


def scale(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Answers at the end, and a quarter of the way less at the end, averaged over methods."""
    found = []
    models = dict.fromkeys(row["model"] for row in rows)
    for model in models:
        for runs in by_seed([r for r in rows if r["model"] == model]).values():
            for name, row in runs.items():
                found.append(_about("scale", row, name, documents=digits(row["answers"])))
            if len(runs) == 6:
                early = [
                    minus(digits(row["curve"][0]), digits(row["curve"][-1]))
                    for row in runs.values()
                ]
                some = next(iter(runs.values()))
                found.append(_about("scale", some, "mean", early_documents=mean_rows(early)))
    return found


def transfer(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Losses on all tasks of what was tuned on tasks of the same kind, of others, and on none."""
    runs_of = by_seed(rows, "source")
    frozen = runs_of.pop(None, {}).get("untuned")
    if frozen is None:
        return []
    classes = [t for t, kind in KIND_OF.items() if kind == "classes"]
    found = [
        _about("transfer", frozen, "untuned", documents=_targets(frozen, KIND_OF)),
        _about("transfer", frozen, "classes, untuned", documents=_targets(frozen, classes)),
    ]
    for runs in runs_of.values():
        if set(runs) != set(KIND_OF):
            continue
        some = next(iter(runs.values()))
        sides: dict[str, list[float]] = {"same kind": [], "other kinds": []}
        for target, kind in KIND_OF.items():
            for name, same in (("same kind", True), ("other kinds", False)):
                sources = [s for s, k in KIND_OF.items() if s != target and (k == kind) == same]
                sides[name] += mean_rows([runs[s][target] for s in sources])
        found += [_about("transfer", some, name, documents=x) for name, x in sides.items()]
        writers = [s for s, kind in KIND_OF.items() if kind == "writing"]
        written = [x for t in classes for x in mean_rows([runs[s][t] for s in writers])]
        own = [x for t in classes for x in runs[t][t]]
        before = _targets(frozen, classes)
        half = [(b - w) - (b - o) / 2 for b, w, o in zip(before, written, own, strict=True)]
        more = {"documents": written, "half_documents": half}
        found.append(_about("transfer", some, "classes, tuned to write", **more))
    return found


def _targets(row: Row, targets: Sequence[str] | Mapping[str, str]) -> list[float]:
    return [x for target in targets for x in row[target]]


def distance(one: Row, other: Row) -> list[float]:
    """Root mean square difference of two models' log-probabilities of all labels, text by text."""
    return [
        fmean((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5
        for a, b in zip(one["logs"], other["logs"], strict=True)
    ]


def tuned(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Losses on other text, singular directions, and distances from the fully tuned model."""
    runs_of = by_seed(rows)
    frozen = runs_of.pop(None, {}).get("untuned")
    found = []
    for runs in runs_of.values():
        full = runs.get("full")
        for name, row in runs.items():
            more = {k: row[k] for k in ("energy", "novel_documents") if k in row}
            if full and name != "full":
                more["distance_documents"] = distance(row, full)
            found.append(_about("tuned", row, name, **more))
        if frozen and full:
            more = {"distance_documents": distance(frozen, full)}
            found.append(_about("tuned", full, "untuned", **more))
    return found


def named(table: str) -> Callable[[Sequence[Row]], list[dict[str, Any]]]:
    """Rows that are in a claim's form already, with the name of their table."""
    return lambda rows: [{"table": table, **row} for row in rows]


def grid(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of the grid, the part right of training texts less each answer to a new one, four tasks."""
    runs_of: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        if row["task"] in TASKS and "answers" in row:
            runs_of.setdefault((row["method"], row["seed"]), {})[row["task"]] = row
    found = []
    for (method, _), tasks in runs_of.items():
        if set(tasks) == set(TASKS):
            values = [
                tasks[t]["train_accuracy"] - right
                for t in TASKS
                for right in digits(tasks[t]["answers"])
            ]
            found.append(_about("grid", tasks[TASKS[0]], method, gap_documents=values))
    return found


MADE: dict[str, Callable[[Sequence[Row]], list[dict[str, Any]]]] = {
    f"{CHAPTER}/together": together,
    f"{CHAPTER}/sequence": sequence,
    f"{CHAPTER}/templates": templates,
    f"{CHAPTER}/scale": scale,
    f"{CHAPTER}/transfer": transfer,
    f"{CHAPTER}/tuned": tuned,
    f"{CHAPTER}/control": named("control"),
    f"{CHAPTER}/times": named("times"),
    f"{CHAPTER}/serve": named("serve"),
    f"{CHAPTER}/black_box": named("black_box"),
    GRID: grid,
}
"""From each stored table to the rows that the registrations name."""
TABLES = tuple(MADE)


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


def _judged(name: str, stored: Sequence[StoredResult], note: str) -> Verdict:
    made = []
    for one in stored:
        rows = one.data["table"]
        if one.name in MADE and not any("table" in row for row in rows):
            one = replace(one, data={"table": MADE[one.name](rows)})
        made.append(one)
    return judge(name, *made, note=note)


def d_8(*stored: StoredResult) -> Verdict:
    """Combinations at once and in sequence, and templates."""
    return _judged(
        "D-8",
        stored,
        "MiniLM-L6 has no head that could fill in a word, so that templates are judged on mini-1m. "
        "One task, few examples and short runs; every method keeps the learning rate that suits it "
        "alone. That no order is always best takes many tasks: the page shows the orders.",
    )


def d_9(*stored: StoredResult) -> Verdict:
    """The generalization gap."""
    return _judged(
        "D-9",
        stored,
        "A gap is measured text by text: whether a training text is right, less whether a new one "
        "is. Of the grid's training texts that are judged, a run has read about a third only.",
    )


def d_10(*stored: StoredResult) -> Verdict:
    """The power of scale."""
    return _judged(
        "D-10",
        stored,
        "Three decoders of 0.3 to 5 million parameters; the article's smallest has 60 million. "
        "Learning rates are the same for all sizes.",
    )


def d_11(*stored: StoredResult) -> Verdict:
    """Transfer between tasks."""
    return _judged(
        "D-11",
        stored,
        "LoRA on mini-1m, two tasks of each of three kinds. A delta also teaches in what form an "
        "answer is given, which helps on every task whose answers look alike.",
    )


def d_12(*stored: StoredResult) -> Verdict:
    """The two theories."""
    return _judged(
        "D-12",
        stored,
        "A theory explains; what can be measured is what it leads us to expect. Two ways that end "
        "at the same cost do not prove that it is the lowest.",
    )


def d_13(*stored: StoredResult) -> Verdict:
    """Applications."""
    return _judged(
        "D-13",
        stored,
        "About 40 % is taken as 30 % or more. Times are those of one machine. One model for many "
        "tasks is the subject of the next chapter.",
    )
