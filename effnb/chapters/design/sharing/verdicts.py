"""The verdicts of the chapter on sharing, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. The stored tables are
those of `python data/sweeps/02_design/3_sharing_claims.py`.
"""

from __future__ import annotations

from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

TABLES = tuple(
    f"02_design/3_sharing_claims/{part}" for part in ("reading", "shared", "depth", "masked")
)
"""The stored tables that the verdicts rest on."""


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


def s_m5(*stored: StoredResult) -> Verdict:
    """Sharing saves parameters for little loss, and no FLOPs."""
    return judge(
        "S-M5",
        *stored,
        note="Language models of six narrow layers, trained alike on the same tokens for a few "
        "hundred steps and judged on chapters of a novel that none was trained on. ALBERT's "
        "models are hundreds of times larger and were trained for months. Times are seconds of "
        "one thread of a processor.",
    )


def s_m6(*stored: StoredResult) -> Verdict:
    """A Perceiver's depth costs the same at any length of its input."""
    return judge(
        "S-M6",
        *stored,
        note="Seconds of one thread of a processor, on random weights. The time of a layer is the "
        "difference of a model of ten layers and one of two, divided by eight. What the latents "
        "let pass was measured on masked characters of a held-out novel, after a short training.",
    )
