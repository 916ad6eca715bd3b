"""The verdict of the chapter on low-rank factorization, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. The stored tables are
those of `python data/sweep_claims_low_rank.py`.
"""

from __future__ import annotations

from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

TABLES = tuple(f"low_rank_claims_{part}" for part in ("mini", "smollm2"))
"""The stored tables that the verdicts rest on."""


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


def c_4(*stored: StoredResult) -> Verdict:
    """Low rank makes weights smaller, and looking at activations beats plain SVD."""
    return judge(
        "C-4",
        *stored,
        note="Judged on chapters of a novel that is in none of the calibration draws, one window a "
        "chapter. ASVD and SVD-LLM see the same draws of calibration text; plain SVD sees none, "
        "which is what the claim compares. Where both methods leave a ruined model, which of two "
        "ruins is worse says little: the chapter prints the losses beside the difference.",
    )
