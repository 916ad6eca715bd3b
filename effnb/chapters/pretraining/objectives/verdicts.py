"""The verdict of the chapter on objectives, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. The stored table is
that of `python data/sweeps/03_pretraining/1_objectives_claims.py`.
"""

from __future__ import annotations

from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

TABLES = ("03_pretraining/1_objectives_claims/tokens",)
"""The stored tables that the verdict rests on."""


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


def s_p1(*stored: StoredResult) -> Verdict:
    """CLM is asked everywhere, MLM at about 15 % of the positions."""
    return judge(
        "S-P1",
        *stored,
        note="The shares are counted and are no evidence. Tested is what they are worth: the same "
        "objective is asked everywhere, or at a random 15 % of the positions, on the same text "
        "with the same network. Networks have the shape of mini-300k and read 614,400 tokens. "
        "Probes are judged on descriptions of packages, in groups of neighbouring sources.",
    )
