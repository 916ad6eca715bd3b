"""The verdicts of the chapter on self-distilled quantization, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. The stored tables are
those of `python data/sweeps/05_inference/4_self_distilled_quantization_claims.py`.
"""

from __future__ import annotations

from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

TABLES = tuple(
    f"05_inference/4_self_distilled_quantization_claims/{part}"
    for part in ("minilm", "errors", "students", "depth", "cost")
)
"""The stored tables that the verdicts rest on."""


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


def q_1(*stored: StoredResult) -> Verdict:
    """Where quantization errs, and whether errors add up."""
    return judge(
        "Q-1",
        *stored,
        note="Self-attention's output is here what its heads put out before the projection; "
        "the projection has rows of its own. Only weights are rounded, symmetrically, with a scale "
        "for each row.",
    )


def q_2(*stored: StoredResult) -> Verdict:
    """Eight bits without loss, and who gains most."""
    return judge(
        "Q-2",
        *stored,
        note="Fine-tuned on English, German and French; nine languages are unseen. Embeddings stay "
        "in full precision. The encoder has a million parameters; the article's have more than two "
        "hundred times as many.",
    )


def q_3(*stored: StoredResult) -> Verdict:
    """What the teacher costs, and depth."""
    return judge(
        "Q-3",
        *stored,
        note="The shallow classifier has the first two blocks of the same encoder.",
    )


def q_4(*stored: StoredResult) -> Verdict:
    """Whether compression is paid for unevenly."""
    return judge(
        "Q-4",
        *stored,
        note="The groups are languages. A source package is one document, in however many "
        "languages it was described.",
    )


ALL = (q_1, q_2, q_3, q_4)
"""The functions that judge, in the order of the page."""
