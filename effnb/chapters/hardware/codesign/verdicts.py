"""The verdicts of the chapter on co-design, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

TABLES = tuple(f"codesign_claims_{part}" for part in ("mini", "smollm2"))
"""The stored tables that the verdicts rest on."""


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


EXPERTS = 16
LAYER = f"one layer of {EXPERTS} experts"


def s_h3(*stored: StoredResult) -> Verdict:
    """Special hardware: low and mixed precision, and redundant heads and tokens."""
    return judge(
        "S-H3",
        *stored,
        note="Judged on chapters of a held-out novel, one window a chapter; every choice that is "
        "compared with a random one is compared with five of them. Speed and energy of the chips "
        "cannot be tested here: that takes the chips. The chapter simulates their cycles, and no "
        "part of the verdict rests on the simulation.",
    )


def s_h4(experts: StoredResult, scaling: StoredResult | None = None) -> Verdict:
    """Partitioning scales parallelism: real processes on one machine.

    Args:
        experts: The stored result on bytes, operations and processor time (`codesign_experts`).
        scaling: The stored result by the clock (`codesign_scaling`), if one was measured.
    """
    rows = [
        _row(row, experts, "experts", count=row["devices"])
        for row in experts.data["table"]
        if row["experts"] == EXPERTS
    ]
    why = {"compiler": "it takes a compiler that places the exchanges, and a cluster to run on"}
    if scaling is None:
        why["clock"] = "no run on two idle cores is stored"
    else:
        rows += [
            _row(row, scaling, "scaling")
            for row in scaling.data["table"]
            if row["experts"] == EXPERTS
        ]
    return judge(
        "S-H4",
        rows=rows,
        why=why,
        note="Real processes that exchange tokens on one machine, with 16 experts; the exchanges "
        "are written by hand, where GShard's compiler places them. The co-designs of attention are "
        "judged under S-H3.",
    )


def _row(
    row: Mapping[str, Any], stored: StoredResult, table: str, count: int = 0
) -> dict[str, Any]:
    """A row as the ledger names it: of one layer, with what the busiest process did."""
    about = {"model": LAYER, "table": table, "date": stored.provenance.date}
    if count:
        sent = max(row["sent_bytes"])
        busiest = row["sent_bytes"].index(sent)
        about |= {"busiest_bytes": sent, "busiest_operations": row["operations"][busiest]}
    return about | dict(row)
