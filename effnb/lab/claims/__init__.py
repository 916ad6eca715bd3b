"""The ledger of the papers' claims, and verdicts that are computed from measurements.

    from effnb.lab import claims_table, judge, results

    claims_table(judge("S-I3", *tables))

The ledger (`data/claims.json`) holds every claim as a sentence and registers, before the sweep, the
parts that it is judged by: which stored rows are compared, in which unit, against which bound, with
how many seeds. A verdict is one of five: it holds, holds in part, does not hold at this scale, is
undecided, or cannot be tested here.
"""

from effnb.lab.claims.evidence import (
    CONSTRUCTION,
    CONTEXT,
    CONTRADICTED,
    NOT_TESTED,
    SHOWN,
    UNDECIDED,
    Contrast,
    Evidence,
    compared,
    counted,
    differences,
    untested,
)
from effnb.lab.claims.intervals import crossed, holm, interval, student_point, student_tail
from effnb.lab.claims.registry import (
    Claim,
    Part,
    changed_registrations,
    claims_from,
    digest_of,
    ledger,
)
from effnb.lab.claims.rows import available, chosen, measure, rows_of
from effnb.lab.claims.table import MIME, claims_table, verdicts_in
from effnb.lab.claims.verdicts import (
    FAILS,
    HOLDS,
    IN_PART,
    OPEN,
    UNTESTED,
    VERDICTS,
    Verdict,
    joint,
    judge,
    judged,
    outcome_of,
    unregistered,
)

__all__ = [
    "CONSTRUCTION",
    "CONTEXT",
    "CONTRADICTED",
    "Claim",
    "Contrast",
    "Evidence",
    "FAILS",
    "HOLDS",
    "IN_PART",
    "MIME",
    "NOT_TESTED",
    "OPEN",
    "Part",
    "SHOWN",
    "UNDECIDED",
    "UNTESTED",
    "VERDICTS",
    "Verdict",
    "available",
    "changed_registrations",
    "chosen",
    "claims_from",
    "claims_table",
    "compared",
    "counted",
    "crossed",
    "differences",
    "digest_of",
    "holm",
    "interval",
    "joint",
    "judge",
    "judged",
    "ledger",
    "measure",
    "outcome_of",
    "rows_of",
    "student_point",
    "student_tail",
    "unregistered",
    "untested",
    "verdicts_in",
]
