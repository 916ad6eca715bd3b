"""Verdicts: what the parts of a claim say together. They are computed, never typed.

claims_table(judge("S-I3", *tables))  # the stored tables that the claim's rows are in
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from effnb.lab.claims.evidence import (
    CONTRADICTED,
    NOT_TESTED,
    SHOWN,
    UNDECIDED,
    Evidence,
    untested,
)
from effnb.lab.claims.intervals import holm
from effnb.lab.claims.registry import Claim, ledger
from effnb.lab.claims.rows import measure, rows_of
from effnb.lab.results import StoredResult

HOLDS = "holds"
IN_PART = "holds in part"
FAILS = "does not hold at this scale"
OPEN = "undecided"
UNTESTED = "cannot be tested here"
VERDICTS = (HOLDS, IN_PART, FAILS, OPEN, UNTESTED)


def outcome_of(outcomes: Iterable[str]) -> str:
    """The verdict that the outcomes of a claim's parts make together.

    Those of parts that are true by construction or shown for comparison do not count. All parts
    shown: it holds. Some shown: it holds in part. None shown: it does not hold if a part was
    contradicted, and is undecided otherwise; if no part was tested, it cannot be tested here.
    """
    known = (SHOWN, CONTRADICTED, UNDECIDED, NOT_TESTED)
    counts = dict.fromkeys(known, 0)
    for one in outcomes:
        if one in counts:
            counts[one] += 1
    if sum(counts.values()) == counts[NOT_TESTED]:
        return UNTESTED
    if counts[SHOWN] == sum(counts.values()):
        return HOLDS
    if counts[SHOWN]:
        return IN_PART
    return FAILS if counts[CONTRADICTED] else OPEN


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the measurements say about one claim.

    Attributes:
        claim: The row of the ledger.
        parts: The evidence, one for each registered part.
        note: The setting, and what is special about it.
    """

    claim: Claim
    parts: tuple[Evidence, ...]
    note: str = ""

    @property
    def outcome(self) -> str:
        """One of the five verdicts."""
        return outcome_of(part.outcome for part in self.parts if part.part.counts)

    @property
    def post_hoc(self) -> bool:
        """Whether a part was measured before its bound was registered: to be confirmed, then."""
        return any(part.post_hoc for part in self.parts)

    def having(self, outcome: str) -> list[Evidence]:
        """The parts that count and have this outcome."""
        return [part for part in self.parts if part.part.counts and part.outcome == outcome]

    def change(self) -> str:
        """What would have changed the verdict, in a sentence."""
        if not self.parts:
            return "No measurement on this bench could change this; see the note."
        if self.outcome == HOLDS:
            nearest = max(self.having(SHOWN), key=lambda part: part.adjusted or 0.0)
            return f"It would hold in part only, if {nearest.turning_point()}."
        start, wanted = {
            IN_PART: ("It would hold in full", (CONTRADICTED, UNDECIDED, NOT_TESTED)),
            FAILS: ("It would hold in part", (CONTRADICTED,)),
            OPEN: ("It would be decided", (UNDECIDED, NOT_TESTED)),
            UNTESTED: ("It would be tested", (NOT_TESTED,)),
        }[self.outcome]
        left = [part for name in wanted for part in self.having(name)]
        if not left:
            return "It would be tested if a part were measured that is not true by construction."
        more = f", and {len(left) - 1} more parts were other than they are" if len(left) > 1 else ""
        more = more.replace("1 more parts were other than they are", "one more part were otherwise")
        if self.outcome in (FAILS, OPEN, UNTESTED):
            more = ""
        return f"{start} if {left[0].turning_point()}{more}."

    def confirmation(self) -> str:
        """A warning where a bound was registered after its measurement; else ""."""
        if not self.post_hoc:
            return ""
        return (
            f"To be confirmed: the parts were registered on {self.claim.registered}, and some of "
            "the measurements are older."
        )

    def __str__(self) -> str:
        """The verdict with its evidence, as lines of text."""
        lines = [f"{self.claim.id}: {self.outcome}", f"  Claim: {self.claim.claim}"]
        lines += [f"  {part}" for part in self.parts]
        lines += [f"  {text}" for text in (self.change(), self.confirmation(), self.note) if text]
        return "\n".join(lines)

    def data(self) -> dict[str, Any]:
        """The verdict for programs; numbers are rounded to six digits."""
        parts = []
        for one in self.parts:
            estimate, low, high = one.numbers() or (None, None, None)
            row = {
                "name": one.part.name, "chapter": one.part.chapter, "what": one.what(),
                "estimate": estimate, "low": low, "high": high, "p": one.adjusted,
                "measured": one.measured(), "expected": one.part.expected(),
                "basis": one.basis(), "outcome": one.outcome,
                "counts": one.part.counts, "expect": one.part.expect,
                "bound": one.part.bound, "margin": one.part.margin,
            }  # fmt: skip
            parts.append({k: _as_carried(v) for k, v in row.items()})
        return {
            "id": self.claim.id,
            "verdict": self.outcome,
            "change": self.change(),
            "confirm": self.confirmation(),
            "note": self.note,
            "parts": parts,
        }


def judged(name: str, evidence: Sequence[Evidence], note: str = "") -> Verdict:
    """Judge a claim by evidence for exactly its registered parts, at Holm's level.

    Raises:
        ValueError: When there is no such claim, a registered part is missing, or there is a part
            that was not registered or was registered otherwise.
    """
    claim = claim_named(name)
    given = {one.part.name: one.part for one in evidence}
    if len(given) < len(evidence):
        raise ValueError(f"{name} is judged twice by one part.")
    if wrong := [n for n in given if given[n] != claim.parts.get(n)]:
        raise ValueError(
            f"{name} is judged by the part {wrong[0]!r}, which is not registered so in the ledger."
        )
    if missing := [n for n in claim.parts if n not in given]:
        raise ValueError(f"{name} is judged without its registered part {missing[0]!r}.")
    if not claim.parts and not note.strip():
        raise ValueError(f"{name} has no registered part: say in a note what it takes to test it.")
    own = {one.part.name: one.p_value for one in evidence if one.part.counts}
    tested = [part for part, p in own.items() if p is not None]
    adjusted = dict(zip(tested, holm([own[part] for part in tested])))
    order = list(claim.parts)
    parts = sorted(evidence, key=lambda one: order.index(one.part.name))
    return Verdict(
        claim,
        tuple(
            one.adjusted_to(adjusted[one.part.name]) if one.part.name in adjusted else one
            for one in parts
        ),
        note,
    )


def judge(
    name: str,
    *stored: StoredResult,
    rows: Sequence[Mapping[str, Any]] = (),
    why: Mapping[str, str] | None = None,
    note: str = "",
) -> Verdict:
    """Judge a claim by the stored rows that its registration names.

    Args:
        name: Id of the claim, such as "S-I3".
        stored: Stored results whose data hold a "table" of rows.
        rows: More rows, such as those of a measurement that was just made.
        why: Reasons by the name of a part for which nothing can be measured here.
        note: The setting. For a claim without registered parts: what it would take to test it.

    Raises:
        ValueError: When there is no such claim, or rows are malformed.
    """
    today = date.today().isoformat()
    claim, every = claim_named(name), [*rows_of(*stored), *({"date": today, **row} for row in rows)]
    reasons = dict(why or {})
    if unknown := sorted(set(reasons) - set(claim.parts)):
        raise ValueError(f"{name} has no registered part {unknown[0]!r}.")
    evidence = [
        untested(part, reasons[part.name]) if part.name in reasons else measure(part, every)
        for part in claim.parts.values()
    ]
    return judged(name, evidence, note)


def claim_named(name: str) -> Claim:
    """A claim of the ledger.

    Raises:
        ValueError: When there is no such claim.
    """
    if name not in ledger():
        raise ValueError(f"there is no claim {name!r}; the ledger has {', '.join(ledger())}.")
    return ledger()[name]


def unregistered(verdict: Mapping[str, Any]) -> list[str]:
    """Where a verdict that a chapter carries differs from what is registered, in words.

    Args:
        verdict: As `Verdict.data` gives it.
    """
    parts, claim = {part.get("name"): part for part in verdict["parts"]}, claim_named(verdict["id"])
    more, fewer = parts.keys() - claim.parts.keys(), claim.parts.keys() - parts.keys()
    found = [f"{claim.id} judges {name!r}, which is not registered" for name in more]
    found += [f"{claim.id} does not judge {name!r}" for name in fewer]
    for name in parts.keys() & claim.parts.keys():
        for key in ("expect", "bound", "margin"):
            registered = getattr(claim.parts[name], key)
            if parts[name][key] != _as_carried(registered):
                found.append(
                    f"{claim.id} judges {name!r} by the {key} {parts[name][key]}, and "
                    f"{registered} is registered"
                )
    return sorted(found)


def _as_carried(value: Any) -> Any:
    """A registered value as a built page carries it: its numbers have six digits."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def joint(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One verdict from those that several chapters carry on the same claim.

    A part that two chapters carry counts once; where they differ, which happens when one chapter
    was built before the other's data, the part that was measured is taken.

    Args:
        verdicts: Verdicts as `Verdict.data` gives them, at least one, all on one claim.

    Raises:
        ValueError: When they are on several claims, or there are none.
    """
    if len({one["id"] for one in verdicts}) != 1:
        raise ValueError("a joint verdict is on one claim, of one chapter at least.")
    if len(verdicts) == 1:
        return dict(verdicts[0])
    parts: dict[str, Mapping[str, Any]] = {}
    for part in (part for one in verdicts for part in one["parts"]):
        name = part.get("name", part["what"])
        if name not in parts or parts[name]["outcome"] == NOT_TESTED:
            parts[name] = part
    notes = list(dict.fromkeys(one["note"] for one in verdicts if one["note"]))
    outcome = outcome_of(p["outcome"] for p in parts.values() if p.get("counts", True))
    same = all(one["verdict"] == outcome for one in verdicts)
    return dict(verdicts[0]) | ({} if same else {"change": ""}) | {
        "verdict": outcome, "parts": list(parts.values()), "note": " ".join(notes)
    }  # fmt: skip
