"""The verdicts of the chapter on experts, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. The stored tables are
those of `python data/sweeps/02_design/2_experts_claims.py`; S-I4 also takes those of the chapter on
adaptive computation.
"""

from __future__ import annotations

from effnb.chapters.inference.adaptive_computation.verdicts import TABLES as EXITS
from effnb.chapters.inference.adaptive_computation.verdicts import s_i4
from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

TABLES = tuple(f"02_design/2_experts_claims/{part}" for part in ("training", "by_input"))
"""The stored tables of this chapter that the verdicts rest on."""

__all__ = ["TABLES", "s_i4", "s_m4", "stored"]


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured, of this chapter and of the one on exits."""
    return available(*dict.fromkeys((*TABLES, *EXITS)))


def s_m4(*stored: StoredResult) -> Verdict:
    """More parameters at equal work per token train to a lower loss, if loads are balanced."""
    return judge(
        "S-M4",
        *stored,
        note="Decoders of the shape of mini-300k with experts in both blocks, trained alike for a "
        "few hundred steps on the same texts, and judged on chapters of a novel that none was "
        "trained on. The papers' models are thousands of times larger, have experts in every "
        "second block, and are trained on billions of tokens.",
    )
