"""The verdicts of the chapter on context extension, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. The stored tables are
those of `python data/sweeps/02_design/6_context_claims.py`.
"""

from __future__ import annotations

from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

TABLES = tuple(f"02_design/6_context_claims/{part}" for part in ("zero_shot", "tuned"))
"""The stored tables that the verdicts rest on."""
TEXTS = (
    "Judged on the last 256 of 2,048 tokens of chapters of a novel that no model was trained on, "
    "the same tokens for every method and context."
)


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


def y_1(*stored: StoredResult) -> Verdict:
    """RoPE alone does not generalize, and Position Interpolation blurs."""
    return judge("Y-1", *stored, note=f"{TEXTS} Nothing was trained.")


def y_2(*stored: StoredResult) -> Verdict:
    """Each method is better than the one before, and YaRN keeps quality."""
    return judge(
        "Y-2",
        *stored,
        note=f"{TEXTS} Nothing was trained. All methods have the scale 4, the ratio of the "
        "lengths; NTK-aware scaling would be given a larger one in practice.",
    )


def y_3(*stored: StoredResult) -> Verdict:
    """YaRN needs fewer steps than Position Interpolation, and fewer tokens than Code Llama."""
    return judge(
        "Y-3",
        *stored,
        note=f"{TEXTS} All methods train on the same texts in the same order, with one learning "
        "rate and one text a step. The papers compare hundreds of steps on models of billions of "
        "weights; what is tested here is the ratio, on a model of 300 thousand.",
    )
