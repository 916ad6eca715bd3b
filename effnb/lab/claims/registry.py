"""The ledger of the papers' claims, and the parts that were registered for each before its sweep.

`data/claims.json` holds a public sentence for every claim. For a claim that chapters judge it also
holds its parts: what is compared with what, in which unit, against which bound, with how many
seeds. The margin follows from the unit: there is one smallest effect of interest for all chapters.
A registration carries its date and the SHA-256 of its parts, so that a later change is seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from effnb.lab._files import data_folder, read_manifest

REMEDY = "git checkout -- data/claims.json"
EXPECTATIONS = ("higher", "lower", "equal", "differ", "nothing")
ROLES = ("measured", "beside", "construction", "context")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a claim, as registered.

    Attributes:
        claim: Id of the claim.
        name: Name of the part, unique within the claim.
        what: What is compared, in words.
        chapter: The chapter that measures it, a path below `notebooks/`.
        model: The model that it is measured on.
        role: "measured" parts count. Parts "beside" the claim are tested as well and do not count;
            nor do those that are true by "construction" (a size formula, counted operations) and
            those that are shown as "context".
        unit: A key of the ledger's smallest effects, such as "nats"; "times" is a ratio.
        expect: Whether the claim expects a value "higher" or "lower" than the bound, "equal" to it,
            that groups "differ", or "nothing" (context).
        bound: What the value is compared with.
        margin: The smallest effect of interest in this unit: the bound must be passed by more, and
            what lies within counts as equal. For "times", a fraction of the bound.
        seeds: How many seeds the method must have been run with; 0 where nothing is drawn.
        samples: How many documents, or repeated timings, are needed at least.
        method: Which stored rows are the method's: their values by key.
        baseline: Which rows it is compared with; None to compare the value itself with the bound.
        value: The key under which a row holds its measurements.
        equal: Keys that must have the same value in the method's and the baseline's rows, such as
            the tokens that each saw.
        groups: For "differ": the keys inside of the value that are compared with one another.
        over: The key of a divisor in the same row (bytes per operation); None for the value alone.
        registered: The day of the registration, as 2026-01-31.
    """

    claim: str
    name: str
    what: str
    chapter: str
    model: str
    role: str
    unit: str
    expect: str
    bound: float
    margin: float
    seeds: int
    samples: int
    method: Mapping[str, Any]
    baseline: Mapping[str, Any] | None
    value: str
    equal: tuple[str, ...]
    groups: tuple[str, ...] = ()
    over: str | None = None
    registered: str = ""

    def __post_init__(self) -> None:
        """Refuse a registration that could not be judged."""
        name = f"the part {self.name} of {self.claim}"
        if self.role not in ROLES or self.expect not in EXPECTATIONS:
            raise ValueError(
                f"{name} has the role {self.role!r} and expects {self.expect!r}; choose of "
                f"{', '.join(ROLES)}, and of {', '.join(EXPECTATIONS)}."
            )
        if (self.expect == "nothing") != (self.role == "context"):
            raise ValueError(f"{name}: context, and nothing else, expects nothing.")
        if (self.expect == "differ") != (len(self.groups) > 1):
            raise ValueError(f"{name}: at least two groups are named where groups may differ.")
        if not self.margin > 0:
            raise ValueError(f"{name} has the margin {self.margin}; it must be above 0.")
        if self.unit == "times" and not self.bound > 0:
            raise ValueError(f"{name} is a ratio and needs a bound above 0, not {self.bound}.")

    @property
    def tested(self) -> bool:
        """Whether the part can be shown or contradicted by a measurement."""
        return self.role in ("measured", "beside")

    @property
    def counts(self) -> bool:
        """Whether the part decides on its claim."""
        return self.role == "measured"

    @property
    def ratio(self) -> bool:
        """Whether values are compared by their ratio, on a logarithmic scale."""
        return self.unit == "times"

    def expected(self) -> str:
        """What the claim expects, in words."""
        if self.expect == "nothing":
            return "shown for comparison"
        margin = f"{self.margin:.3g}" if not self.ratio else f"{100 * self.margin:.3g} %"
        if self.expect == "differ":
            return f"expected: two of them differ by more than {margin}"
        if self.expect == "equal":
            return f"expected: {self.bound:.3g}, within {margin}"
        if self.role == "construction":
            return f"{self.expect} than {self.bound:.3g} by construction"
        return f"expected: {self.expect} than {self.bound:.3g} by more than {margin}"


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of the ledger.

    Attributes:
        id: Stable name, such as "S-I3"; its first letter names the source.
        claim: The claim as a sentence; text in [brackets] is from papers that the source
            cites.
        chapters: Where it is tested: paths below `notebooks/`.
        source: The article that makes the claim.
        parts: Its registered parts by name; empty for a claim that no written chapter judges.
        registered: The day on which the parts were registered, as 2026-01-31, or "".
        digest: The SHA-256 of the parts at that time.
    """

    id: str
    claim: str
    chapters: tuple[str, ...]
    source: str
    parts: Mapping[str, Part] = field(default_factory=dict)
    registered: str = ""
    digest: str = ""


def digest_of(parts: list[dict[str, Any]]) -> str:
    """The SHA-256 of parts as the ledger holds them: any other bound or selection changes it."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


_REQUIRED = ("name", "what", "chapter", "model", "unit", "expect", "method")
_KNOWN = {
    *_REQUIRED, "role", "bound", "seeds", "samples", "baseline", "value", "equal", "groups", "over"
}  # fmt: skip


def _part(
    claim: str, row: Mapping[str, Any], effects: Mapping[str, float], registered: str
) -> Part:
    if unknown := sorted(set(row) - _KNOWN):
        raise ValueError(f"a part of {claim} has the unknown key {unknown[0]!r}.")
    if row["unit"] not in effects:
        raise ValueError(
            f"the part {row['name']} of {claim} is in {row['unit']!r}; the ledger has a smallest "
            f"effect for {', '.join(effects)}."
        )
    return Part(
        claim=claim,
        margin=effects[row["unit"]],
        role=row.get("role", "measured"),
        bound=row.get("bound", 0.0),
        seeds=row.get("seeds", 0),
        samples=row.get("samples", 0),
        baseline=row.get("baseline"),
        value=row.get("value", "documents"),
        equal=tuple(row.get("equal", ())),
        groups=tuple(row.get("groups", ())),
        over=row.get("over"),
        registered=registered,
        **{
            key: row[key]
            for key in ("name", "what", "chapter", "model", "unit", "expect", "method")
        },
    )


def claims_from(content: Mapping[str, Any]) -> dict[str, Claim]:
    """The claims of a ledger read from JSON, by their id.

    Raises:
        ValueError: When a registration cannot be judged, or two parts of a claim share a name.
    """
    found = {}
    for name, row in content["claims"].items():
        day, effects = row.get("registered", ""), content["smallest effects"]
        parts = [_part(name, part, effects, day) for part in row.get("parts", ())]
        by_name = {part.name: part for part in parts}
        if len(by_name) < len(parts):
            raise ValueError(f"two parts of {name} have the same name.")
        found[name] = Claim(
            name,
            row["claim"],
            tuple(row["chapters"]),
            content["sources"][name[0]],
            by_name,
            day,
            row.get("digest", ""),
        )
    return found


@cache
def ledger() -> dict[str, Claim]:
    """All claims by their id, in the order of the ledger."""
    return claims_from(read_manifest(data_folder() / "claims.json", REMEDY))


def changed_registrations(content: Mapping[str, Any] | None = None) -> list[str]:
    """Claims whose parts are not those that their registration's date and digest tell of.

    Args:
        content: The content of `data/claims.json`, which is read when None.
    """
    content = content or read_manifest(data_folder() / "claims.json", REMEDY)
    return [
        name
        for name, row in content["claims"].items()
        if bool(row.get("parts")) != bool(row.get("registered"))
        or (row.get("parts") and digest_of(row["parts"]) != row.get("digest"))
    ]
