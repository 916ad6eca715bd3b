"""The verdicts of the chapter on distilled retrievers, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. The stored tables are
those of `python data/sweeps/05_inference/6_retrieval_distillation_claims.py`.
"""

from __future__ import annotations

from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

TABLES = tuple(
    f"05_inference/6_retrieval_distillation_claims/{part}" for part in ("search", "ranking")
)
"""The stored tables that the verdicts rest on."""


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


def g_3(*stored: StoredResult) -> Verdict:
    """What separates dual encoders from cross-encoders."""
    return judge(
        "G-3",
        *stored,
        note="Both start from the first two layers of MiniLM, which was trained as a dual encoder: "
        "that favours dual encoders. The cross-encoder is dual-pooled. Candidates are those that "
        "share words with the query, chosen by no model.",
    )


def g_4(*stored: StoredResult) -> Verdict:
    """Embeddings matched, documents inherited."""
    return judge(
        "G-4",
        *stored,
        note="The student is the first layer of its teacher, and starts with its projection. Made "
        "queries are spans of descriptions with words left out; the paper has a model write them.",
    )


ALL = (g_3, g_4)
"""The functions that judge, in the order of the page."""
