"""The verdict of the chapter on Matryoshka representations, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. The stored tables are
those of `python data/sweeps/05_inference/8_matryoshka_claims.py`.
"""

from __future__ import annotations

from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

TABLES = tuple(f"05_inference/8_matryoshka_claims/{part}" for part in ("search", "classes"))
"""The stored tables that the verdict rests on."""


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


def g_8(*stored: StoredResult) -> Verdict:
    """Nested vectors search with up to 16 times less compute at equal recall and accuracy."""
    return judge(
        "G-8",
        *stored,
        note="Judged on 500 test queries against 10,000 documents, with five maps. Compute is "
        "counted in multiplications of comparisons; what the encoder takes for the query is the "
        "same on both sides and left out. The setting of the exact search, 16 numbers and a "
        "shortlist of 200, was fixed beforehand. The settings of HNSW were chosen by validation "
        "queries: the cheapest of a grid that keep 99 % of the ten nearest, or where none does, "
        "those that keep most. Exact search over more documents would save more, for the second "
        "look does not grow with the collection.",
    )
