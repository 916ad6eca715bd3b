"""The verdict of the chapter on retrieval, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. The stored tables are
those of `python data/sweeps/02_design/4_retrieval_claims.py`.
"""

from __future__ import annotations

from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

TABLES = tuple(f"02_design/4_retrieval_claims/{part}" for part in ("knn", "adaptation", "retro"))
"""The stored tables that the verdict rests on."""


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


def s_m7(*stored: StoredResult) -> Verdict:
    """Retrieving from a database makes a language model far more parameter-efficient."""
    return judge(
        "S-M7",
        *stored,
        note="Judged on held-out package descriptions; the datastore holds descriptions of other "
        "source packages, which the models were trained on too. Neighbours, share and temperature "
        "were chosen on validation descriptions. Our largest model has 16 times the parameters of "
        "the smallest, so that a factor of 25 lies beyond our range. RETRO's database had two "
        "trillion tokens; ours has a few hundred thousand. The entries of the datastore are not "
        "counted as parameters; the text says what they weigh.",
    )
