"""Tables and sentences of what the chapter on pruning trains: healing, movement, tickets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from effnb.chapters.inference.pruning.tables import than
from effnb.lab.changes import Change, Row, if_measured, pick, spoken, tidy
from effnb.lab.tables import NOT_MEASURED, Table, table


def by_seed(rows: Sequence[Row], key: str = "loss", **wanted: Any) -> list[float]:
    """One number for each seed, in the order of the seeds."""
    return [row[key] for row in sorted(pick(rows, **wanted), key=_seed)]


def _seed(row: Row) -> int:
    return row["seed"]


# --- healing --------------------------------------------------------------------------------------

HEALED: dict[str, dict[str, Any]] = {
    "magnitude, 2:4": {"method": "magnitude", "pattern": "2:4"},
    "magnitude, 70 %": {"method": "magnitude", "sparsity": 0.7},
    "SparseGPT, 70 %": {"method": "SparseGPT", "sparsity": 0.7},
    "LLM-Pruner, a fifth": {"method": "LLM-Pruner", "amount": 0.2},
    "LLM-Pruner, half": {"method": "LLM-Pruner", "amount": 0.5},
    "ShortGPT, three blocks": {"method": "ShortGPT", "amount": 3},
}


@if_measured
def healing_table(recovery: Sequence[Row], healing: Sequence[Row]) -> Table:
    """What a few steps win back: single weights with the mask held, structures with a LoRA."""
    base = pick(recovery, method="original")[0]["loss"]
    lines = []
    for rows, trained in ((recovery, "all, mask held"), (healing, "a LoRA")):
        for name, wanted in HEALED.items():
            before = by_seed(rows, "before", **wanted)
            if before:
                after = by_seed(rows, **wanted)
                lines.append(
                    {
                        "pruned by": name,
                        "trained": trained,
                        "before": tidy(fmean(before) - base),
                        "after": tidy(fmean(after) - base),
                        "change": Change.between(after, before).number(),
                    }
                )
    return table(
        lines,
        {"pruned by": "", "trained": "", "before": "+.3f", "after": "+.3f", "change": ""},
        caption="mini-5m: nats per token above the original before and after a few dozen steps, "
        "means over seeds, and the change with its 95 % interval over seeds.",
    )


@if_measured
def healing_said(recovery: Sequence[Row], healing: Sequence[Row]) -> str:
    """The controls, and LoRAPrune against LLM-Pruner healed with as many steps."""
    base = pick(recovery, method="original")[0]["loss"]
    parts = []
    for rows, what in ((recovery, "all its weights"), (healing, "a LoRA")):
        after = by_seed(rows, method="nothing pruned")
        parts.append(
            f"{Change.between(after, [base] * len(after)).number()} nats by training {what}"
        )
    said = [f"The control, the whole model after the same steps, changes by {spoken(parts)}."]
    for amount, share in ((0.2, "a fifth"), (0.5, "half")):
        change = Change.between(
            by_seed(healing, method="LoRAPrune", amount=amount),
            by_seed(healing, method="LLM-Pruner", amount=amount),
        )
        said.append(
            f"With {share} removed LoRAPrune is {than(change, 'LLM-Pruner, healed afterwards')}."
        )
    return " ".join(said)


# --- learning German ------------------------------------------------------------------------------

WAYS = ("magnitude at once", "magnitude, gradual", "movement, hard")


def soft_penalties(rows: Sequence[Row]) -> list[float]:
    """The penalties of soft movement pruning, in order."""
    return sorted({row["penalty"] for row in rows if "penalty" in row})


@if_measured
def training_table(rows: Sequence[Row]) -> Table:
    """Perplexity of German after learning it, by the way in which weights went."""
    lines = [
        {
            "way": way,
            "removed": sparsity,
            "perplexity": math.exp(fmean(by_seed(rows, method=way, sparsity=sparsity))),
        }
        for sparsity in (0.5, 0.9)
        for way in WAYS
    ]
    for penalty in soft_penalties(rows):
        found = {"method": "movement, soft", "penalty": penalty}
        lines.append(
            {
                "way": f"movement, soft, λ = {penalty:g}",
                "removed": fmean(by_seed(rows, "reached", **found)),
                "perplexity": math.exp(fmean(by_seed(rows, **found))),
            }
        )
    before, whole = (fmean(by_seed(rows, method=method)) for method in ("original", "dense"))
    return table(
        lines,
        {"way": "", "removed": ".0%", "perplexity": ",.1f"},
        caption="mini-300k learns German package descriptions: perplexity of unseen ones, means "
        f"over seeds. Before {math.exp(before):,.0f}; fine-tuned whole {math.exp(whole):.1f}.",
    )


@if_measured
def training_said(rows: Sequence[Row]) -> str:
    """Movement against magnitude at once and gradually, seed by seed, in sentences."""
    said = []
    for sparsity in (0.5, 0.9):
        moved = by_seed(rows, method="movement, hard", sparsity=sparsity)
        parts = []
        for way in WAYS[:2]:
            change = Change.between(moved, by_seed(rows, method=way, sparsity=sparsity))
            parts.append(than(change, way))
        said.append(f"At {sparsity:.0%} removed, movement is {spoken(parts)}.")
    return " ".join(said)


# --- tickets --------------------------------------------------------------------------------------


def tickets(rows: Sequence[Row]) -> tuple[str, str]:
    """The names of the tickets that were rewound to the start, and of those rewound later."""
    first, late = sorted({row["method"] for row in rows}, key=len)
    return first, late


def share_left(sparsity: float) -> str:
    """How much is left, in words."""
    return f"{100 * (1 - sparsity):.3g} %"


@if_measured
def tickets_table(rows: Sequence[Row]) -> Table:
    """Perplexity of tickets by the weights that are left, and of their controls."""
    first, late = tickets(rows)
    left = {share_left(s): i for i, s in enumerate(rows[0]["sparsities"])}
    lines: list[dict[str, Any]] = []
    for name in (first, late):
        losses = [row["losses"] for row in pick(rows, method=name)]
        lines.append(
            {"network": name}
            | {share: math.exp(fmean(one[i] for one in losses)) for share, i in left.items()}
        )
    controls = pick(rows, method=first)
    sizes = {share_left(s): i for i, s in enumerate(controls[0]["control_sparsities"])}
    for key, name in (
        ("re-drawn", "the first tickets' masks, other weights"),
        ("random mask", "their weights, random masks"),
    ):
        line: dict[str, Any] = {"network": name}
        for share in left:
            line[share] = (
                math.exp(fmean(row[key][sizes[share]] for row in controls))
                if share in sizes
                else NOT_MEASURED
            )
        lines.append(line)
    return table(
        lines,
        {"network": "", **dict.fromkeys(left, ",.0f")},
        caption="A mini-300k trained on novels from random weights: perplexity by the part of the "
        "weights that is left, means over seeds.",
    )


@if_measured
def tickets_said(rows: Sequence[Row]) -> str:
    """The smallest tickets against their controls, seed by seed, in a sentence."""
    first, _ = tickets(rows)
    found = sorted(pick(rows, method=first), key=_seed)
    share = found[0]["control_sparsities"][-1]
    place = found[0]["sparsities"].index(share)
    own = [row["losses"][place] for row in found]
    parts = []
    for key, name in (("re-drawn", "other starting weights"), ("random mask", "random masks")):
        change = Change.between(own, [row[key][-1] for row in found])
        parts.append(than(change, name))
    return f"With {share_left(share)} of the weights left, tickets are {spoken(parts)}."
