"""The verdicts of the chapter on delta tuning, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. The grid stores one
row for each task; a claim about the average over tasks compares the documents of all four, of which
there are equally many in each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

TABLES = tuple(
    f"04_finetuning/1_delta_tuning/{part}"
    for part in ("grid", "memory", "intrinsic", "scale", "shared")
)
"""The stored tables that the verdicts rest on."""
TASKS = ("section", "language", "match", "origin")
"""The tasks that a claim about the average is judged by."""
KEPT = (0.95, 0.9, 0.8)
"""Shares of full tuning's accuracy that a method may be asked to keep."""

Row = Mapping[str, Any]


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


def digits(answers: str) -> list[float]:
    """Answers that are stored as a string of 0 and 1."""
    return [float(one) for one in answers]


def _with_rows(one: StoredResult, make: Callable[[Sequence[Row]], list[dict]]) -> StoredResult:
    """A stored result with rows made of its own; rows that are in a claim's form stay."""
    rows = one.data["table"]
    if any("documents" in row for row in rows):
        return one
    return replace(one, data={"table": make(rows)})


def averaged(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of the grid, the four tasks of a method and a seed as one; only where all are there.

    `documents` holds whether each test document was right, and `curve_documents` the part of the
    learning curve's points at which each validation document was. `above_95_documents` and the like
    are what is left of it when that share of full tuning's, at the same seed, is taken away.
    """
    by_run: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        if row["task"] in TASKS and "answers" in row:
            by_run.setdefault((row["method"], row["seed"]), {})[row["task"]] = row
    found = {}
    for (method, seed), tasks in by_run.items():
        if set(tasks) != set(TASKS):
            continue
        curves = [
            [sum(point) / len(point) for point in zip(*map(digits, tasks[t]["curve"]), strict=True)]
            for t in TASKS
        ]
        found[method, seed] = {
            "model": tasks[TASKS[0]]["model"],
            "method": method,
            "seed": seed,
            "documents": [x for t in TASKS for x in digits(tasks[t]["answers"])],
            "curve_documents": [x for curve in curves for x in curve],
        }
    for (_, seed), row in found.items():
        if full := found.get(("full", seed)):
            row |= _above(row["documents"], full["documents"])
    return list(found.values())


def _above(own: Sequence[float], full: Sequence[float]) -> dict[str, list[float]]:
    """What a method's answers have above a share of full tuning's, document by document."""
    return {
        f"above_{100 * share:.0f}_documents": [
            a - share * b for a, b in zip(own, full, strict=True)
        ]
        for share in KEPT
    }


def subspaces(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of random subspaces beside the full tuning of the same model and seed."""
    full = {(r["model"], r["seed"]): digits(r["answers"]) for r in rows if not r["dimension"]}
    found = []
    for row in rows:
        base = full.get((row["model"], row["seed"]))
        if row["dimension"] and base:
            about = {k: row[k] for k in ("model", "seed")}
            name = f"intrinsic {row['dimension']}"
            found.append(about | {"method": name} | _above(digits(row["answers"]), base))
    return found


def scaled(rows: Sequence[Row], small: str = "mini-300k") -> list[dict[str, Any]]:
    """The same for several models, and what each has above the smallest one."""
    every = subspaces(rows)
    key = "above_90_documents"
    least = {(r["method"], r["seed"]): r[key] for r in every if r["model"] == small}
    for row in every:
        other = least.get((row["method"], row["seed"]))
        if other and row["model"] != small:
            row["larger_documents"] = [a - b for a, b in zip(row[key], other, strict=True)]
    return every


def shared(rows: Sequence[Row], share: float = 0.8, chance: float = 0.5) -> list[dict[str, Any]]:
    """Rows of prompts on tasks that a subspace has not seen; the task is the unit of resampling.

    `gain_documents` is what an intrinsic prompt gains over guessing, less a share of what a prompt
    with all its numbers gains; `over_random_documents` is what it has above a random subspace.
    """
    by_run = {(row["method"], row["seed"]): row["accuracies"] for row in rows}
    found = []
    for (method, seed), own in by_run.items():
        full, other = (by_run.get((name, seed)) for name in ("prompt", "random subspace"))
        if method == "intrinsic prompt" and full and other:
            gained = [(a - chance) - share * (b - chance) for a, b in zip(own, full, strict=True)]
            over = [a - b for a, b in zip(own, other, strict=True)]
            about = {"model": rows[0]["model"], "method": method, "seed": seed}
            found.append(about | {"gain_documents": gained, "over_random_documents": over})
    return found


MADE: dict[str, Callable[[Sequence[Row]], list[dict]]] = {
    "grid": averaged,
    "memory": lambda rows: [dict(row) for row in rows],
    "intrinsic": subspaces,
    "scale": scaled,
    "shared": shared,
}
PARTS = {"D-4": ("memory",), "D-6": ("memory",), "D-7": ("intrinsic", "scale", "shared")}
"""Which of the tables a claim rests on; on the grid where it is not named."""


def _judged(name: str, stored: Sequence[StoredResult], note: str) -> Verdict:
    """A claim from its own tables; rows of others would be taken for runs of the same method."""
    others = {
        f"04_finetuning/1_delta_tuning/{p}" for p in MADE if p not in PARTS.get(name, ("grid",))
    }
    own = [one for one in stored if one.name not in others]
    made = [
        _with_rows(one, MADE[part]) if (part := one.name.rpartition("/")[2]) in MADE else one
        for one in own
    ]
    return judge(name, *made, note=note)


def d_1(*stored: StoredResult) -> Verdict:
    """The taxonomy."""
    return judge(
        "D-1",
        note="A way to sort methods is not true or false. What the chapter shows is that every "
        "method in it falls into one of the three classes, by what it does to the number of "
        "parameters. It would take a method that fits none to show that the classes are too few.",
    )


SETTING = (
    "MiniLM-L6 on four tasks, each judged on equally many documents, one example a document. Every "
    "method trains for the same number of short steps at a rate chosen on a validation set. The "
    "article trains models ten times as large, for far longer."
)


def d_2(*stored: StoredResult) -> Verdict:
    """The order of methods by average quality."""
    return _judged("D-2", stored, SETTING)


def d_3(*stored: StoredResult) -> Verdict:
    """The order of methods by how fast they learn."""
    return _judged(
        "D-3",
        stored,
        f"{SETTING} Speed is the mean accuracy on validation texts over all points of the learning "
        "curve, early ones included.",
    )


def d_4(*stored: StoredResult) -> Verdict:
    """Memory at small and at large batches."""
    return _judged(
        "D-4",
        stored,
        "Counted from the tensors that a step of MiniLM-L6 keeps on texts of up to 128 tokens, for "
        "six batches of each size. What an allocator adds to that is not counted.",
    )


def d_5(*stored: StoredResult) -> Verdict:
    """What BitFit, the last layers and random modules keep."""
    return _judged(
        "D-5",
        stored,
        f"{SETTING} MiniLM has six layers, so that a quarter of them would be one and a half: two "
        "are tuned. For what counts as acceptable the article gives no number; 80 % is ours.",
    )


def d_6(*stored: StoredResult) -> Verdict:
    """Diff pruning's memory while it trains."""
    return _judged("D-6", stored, "Counted as for D-4. Diff pruning trains a difference and a gate "
        "for every weight.")  # fmt: skip


def d_7(*stored: StoredResult) -> Verdict:
    """The dimension that adaptation needs."""
    return _judged(
        "D-7",
        stored,
        "Random subspaces of the query and value weights of MiniLM and of three decoders. "
        "Intrinsic prompt tuning learns 8 numbers from the prompts of 20 small tasks, one label "
        "against another, and is tested on 14 that it has not seen; the paper has 100 tasks and "
        "250 numbers. Guessing is right in half of the cases: only what a prompt gains over that "
        "is compared, and the task is what is drawn again.",
    )
