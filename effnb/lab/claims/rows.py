"""From stored rows to evidence: the registration says which rows, and how they are compared.

A row is one run: what was run (method, bits, seed and so on), what it saw (tokens of calibration
and of training), and what was measured, as a list over documents or repeated timings:

    {"model": "mini-5m", "method": "GPTQ", "bits": 3, "seed": 0, "calibration_tokens": 8192,
     "documents": [4.1, 3.9, 4.4]}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effnb.lab import results
from effnb.lab._files import DamagedFile
from effnb.lab.claims.evidence import (
    LEAST_SEEDS,
    Evidence,
    compared,
    counted,
    differences,
    untested,
)
from effnb.lab.claims.registry import Part
from effnb.lab.results import StoredResult

Row = Mapping[str, Any]


def available(*names: str) -> list[StoredResult]:
    """The stored results that exist, of those named.

    Raises:
        DamagedFile: When one is damaged.
    """
    found = []
    for name in names:
        try:
            found.append(results.read(name))
        except DamagedFile as problem:
            if "is missing" not in str(problem):
                raise
    return found


def rows_of(*stored: StoredResult) -> list[dict[str, Any]]:
    """The rows of stored tables; each takes the day it was measured on with it, as "date".

    A run that several tables hold alike, such as that of the original model, is taken once; two
    machines may differ in the last digits.
    """
    rows: list[dict[str, Any]] = []
    known: list[dict[str, Any]] = []
    for one in stored:
        for row in one.data["table"]:
            if not any(_alike(row, other) for other in known):
                known.append(row)
                rows.append({"date": one.provenance.date} | dict(row))
    return rows


def _alike(one: Any, other: Any) -> bool:
    """Whether two stored values are the same but for a thousandth."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3)
    return one == other


def chosen(rows: Sequence[Row], about: Row) -> list[Row]:
    """The rows that have all of these values, in the order of their seeds.

    A row that says which table it belongs to is found only by those who ask for that table.
    """
    wanted = {"table": None, **about}
    found = [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]
    return sorted(found, key=lambda row: row.get("seed", 0))


def measure(part: Part, rows: Sequence[Row]) -> Evidence:
    """Evidence for a registered part from stored rows.

    What is missing or does not compare is no error: the part is then not tested, and says why. So
    it is with a comparison whose sides saw different data although the registration asks for equal
    data.

    Raises:
        ValueError: When rows are malformed: two rows of one seed, measurements that do not pair
            up, or that agree exactly.
    """
    method = chosen(rows, {"model": part.model, **part.method})
    baseline = (
        None if part.baseline is None else chosen(rows, {"model": part.model, **part.baseline})
    )
    for side, found in ((part.method, method), (part.baseline, baseline)):
        if found is not None and not found:
            return untested(part, f"no run of {_words(side)} on {part.model} is stored yet")
        _refuse_twice(part, found or [])
    if unequal := _unequal(part, method, baseline):
        return untested(part, unequal)
    if baseline is not None and _seeded(method) and _seeded(baseline):
        method, baseline = _same_seeds(method, baseline)
    if few := _few_seeds(part, method, baseline or []):
        return untested(part, few)
    dates = [row.get("date", "") for row in [*method, *(baseline or [])]]
    date = min(dates, default="")
    if part.role == "construction":
        value = _number(part, method[0])
        return counted(part, value / _number(part, baseline[0]) if baseline else value, date=date)
    sizes = [
        {len(_values(part, row, name)) for row in [*method, *(baseline or [])]}
        for name in part.groups or (None,)
    ]
    if any(len(size) > 1 for size in sizes):
        return untested(part, "its runs were judged on different documents: measure them again")
    if part.groups:
        pairs = {
            name: (_table(part, method, name), baseline and _table(part, baseline, name))
            for name in part.groups
        }
        return differences(part, pairs, date=date)
    second = None if baseline is None else _table(part, baseline)
    return compared(part, _table(part, method), second, date=date)


def _words(about: Row) -> str:
    shown = {k: v for k, v in about.items() if k != "table"}
    return ", ".join(f"{v}" if k == "method" else f"{k} {v}" for k, v in shown.items())


def _number(part: Part, row: Row) -> float:
    value = row[part.value]
    return float(value) / (float(row[part.over]) if part.over else 1.0)


def _values(part: Part, row: Row, group: str | None = None) -> list[float]:
    values = row[part.value]
    if part.groups:
        return values[group or part.groups[0]]
    return values if isinstance(values, list) else [float(values)]


def _table(part: Part, rows: Sequence[Row], group: str | None = None) -> np.ndarray:
    return np.array([_values(part, row, group) for row in rows], dtype=np.float64)


def _refuse_twice(part: Part, rows: Sequence[Row]) -> None:
    seeds = [row.get("seed", 0) for row in rows]
    if len(set(seeds)) < len(seeds):
        raise ValueError(
            f"the part {part.name} of {part.claim} finds two stored rows of one seed: the rows of "
            "a method must differ in their seed only."
        )


def _unequal(part: Part, method: Sequence[Row], baseline: Sequence[Row] | None) -> str:
    """What the two sides should have had alike and had not, in words; "" if all is well."""
    for key in part.equal:
        sides = [
            {str(row[key]) if key in row else "not stored" for row in side}
            for side in (method, baseline or ())
        ]
        if len(sides[0] | sides[1]) > 1 or "not stored" in sides[0] | sides[1]:
            named = [", ".join(sorted(side)) for side in sides]
            return f"the two saw unequal {key.replace('_', ' ')}: {named[0]} against {named[1]}"
    return ""


def _seeded(rows: Sequence[Row]) -> bool:
    """Whether anything was drawn: what no seed changes is stored without one."""
    return any("seed" in row for row in rows)


def _few_seeds(part: Part, *sides: Sequence[Row]) -> str:
    """What a side that draws something lacks in seeds, in words; "" if all is well."""
    drawn = [len(side) for side in sides if _seeded(side)]
    needed = max(part.seeds, LEAST_SEEDS) if drawn or part.seeds else 0
    if part.role == "construction" or min(drawn, default=1 if needed else 0) >= needed:
        return ""
    stored = min(drawn, default=1)
    return f"it takes {needed} seeds, and {stored} {'is' if stored == 1 else 'are'} stored"


def _same_seeds(method: Sequence[Row], baseline: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of seeds that both have."""
    common = {r.get("seed", 0) for r in method} & {r.get("seed", 0) for r in baseline}
    return (
        [r for r in method if r.get("seed", 0) in common],
        [r for r in baseline if r.get("seed", 0) in common],
    )
