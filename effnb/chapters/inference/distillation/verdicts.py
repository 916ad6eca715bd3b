"""The verdicts of the chapter on distillation, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. The stored tables are
those of `python data/sweeps/05_inference/5_distillation_claims.py`.
"""

from __future__ import annotations

from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

TABLES = tuple(
    f"05_inference/5_distillation_claims/{part}"
    for part in ("languages", "text", "context", "sums")
)
"""The stored tables that the verdicts rest on."""


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


def s_i2(*stored: StoredResult) -> Verdict:
    """A small student keeps most of its teacher's quality."""
    return judge(
        "S-I2",
        *stored,
        note="Every student is compared with the same student on labels alone, in as many steps "
        "and at the compute that the teacher's answers cost. These are computed once.",
    )


def c_2(*stored: StoredResult) -> Verdict:
    """Outputs, features, and behaviour."""
    return judge(
        "C-2",
        *stored,
        note="The teacher of sums is a program. Following instructions was not measured: no two "
        "models here that share a vocabulary follow them.",
    )


def g_1(*stored: StoredResult) -> Verdict:
    """Weights and robust choice against a teacher's errors."""
    return judge(
        "G-1",
        *stored,
        note="The teacher's two best classes change places as often as is said, beside the errors "
        "that it makes by itself. How often it errs is estimated on 256 labelled texts.",
    )


def g_2(*stored: StoredResult) -> Verdict:
    """A teacher that makes the inputs that it labels."""
    return judge(
        "G-2",
        *stored,
        note="Inputs are moved in the principal components of the few texts' features; no text is "
        "written. In the long tail, a language has between 40 texts and 2.",
    )


def g_5(*stored: StoredResult) -> Verdict:
    """Complexity of a teacher's answers to a small student."""
    return judge(
        "G-5",
        *stored,
        note="Students are networks with 4 to 128 hidden units; complexity is that of 96 texts "
        "under a student's tangent kernel at its start.",
    )


ALL = (s_i2, c_2, g_1, g_2, g_5)
"""The functions that judge, in the order of the page."""
