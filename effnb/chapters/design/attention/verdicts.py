"""The verdicts of the chapter on attention, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. The stored tables are
those of `python data/sweeps/02_design/1_attention_claims.py`.
"""

from __future__ import annotations

from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

TABLES = tuple(
    f"02_design/1_attention_claims/{part}"
    for part in ("recurrence", "reading", "costs", "needle", "patterns")
)
"""The stored tables that the verdicts rest on."""


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


def s_m1(*stored: StoredResult) -> Verdict:
    """Transformer-XL makes use of what it has already processed."""
    return judge(
        "S-M1",
        *stored,
        note="Small models of characters, trained alike on the same number of characters for a few "
        "hundred steps; judged on chapters of a novel that none was trained on, the same "
        "characters in every reading. The paper's models are a thousand times larger and were "
        "trained to convergence.",
    )


def s_m2(*stored: StoredResult) -> Verdict:
    """Local and global attention, kept apart, make long inputs cheap."""
    return judge(
        "S-M2",
        *stored,
        note="Seconds of one thread of a processor, for the attention alone, without projections; "
        "the forms take turns in every round. A graphics processor has other crossing points. The "
        "encoders that are asked for a far value have two layers and 256 tokens.",
    )


def s_m3(*stored: StoredResult) -> Verdict:
    """Sparse patterns can be found without the full matrix."""
    return judge(
        "S-M3",
        *stored,
        note="Softmax was exchanged for entmax in trained models, without further training; pairs "
        "with a weight above 0 are in use. Projections learn from training texts and are judged "
        "on a held-out novel. The paper fine-tunes its models with entmax first.",
    )
