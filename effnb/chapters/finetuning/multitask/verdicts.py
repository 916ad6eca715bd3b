"""The verdicts of the chapter on many tasks, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. The stored tables are
those of `python data/sweeps/04_finetuning/3_multitask_claims.py`.
"""

from __future__ import annotations

from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

TABLES = tuple(
    f"04_finetuning/3_multitask_claims/{part}" for part in ("tasks", "instructions", "smollm2")
)
"""The stored tables that the verdicts rest on."""


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


def s_f1(*stored: StoredResult) -> Verdict:
    """One model serves many tasks, and instructions carry over to tasks of a new kind."""
    return judge(
        "S-F1",
        *stored,
        note="A decoder of one million parameters, trained for a few hundred short steps. T0 has "
        "11 billion parameters and FLAN 137 billion, and FLAN's authors report that instruction "
        "training made their smaller models worse on new tasks. New wordings of trained tasks are "
        "judged beside the claim: a small model can gain there without learning any new task.",
    )


def s_f2(*stored: StoredResult) -> Verdict:
    """Words and examples in front of a text make an unchanged model do a task."""
    return judge(
        "S-F2",
        *stored,
        note="SmolLM2 with 135 million parameters, two questions with two answers each. That the "
        "model stays unchanged is true by construction and counts for nothing here. Calibration "
        "is judged beside the claim, which does not speak of it.",
    )
