"""The ledger of the papers' claims, and verdicts that are computed from measurements.

    better = Evidence.paired("perplexity at 3 bits, GPTQ - RTN", gptq, rtn, expect="lower")
    claims_table(verdict("S-I3", parts=[better], note="4,096 tokens of a held-out novel."))

A comparison is over pairs: the same seeds, or the same items, with the method and without. Its
uncertainty is a 95 % interval: Student's for fewer than twelve pairs, where a bootstrap would look
more certain than it is, and otherwise a bootstrap whose seed is fixed. The verdict follows from the
parts: it is never typed.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np
from IPython.display import display

from effnb.lab._files import data_folder, read_manifest

HOLDS = "holds"
IN_PART = "holds in part"
FAILS = "does not hold at this scale"
UNTESTED = "cannot be tested here"
VERDICTS = (HOLDS, IN_PART, FAILS, UNTESTED)

MIME = "application/vnd.effnb.claims+json"
"""Under this type, a cell's output carries the verdicts for programs to read."""

CONFIDENCE = 0.95
FEW = 12
"""Below this many samples the interval is Student's."""

RESAMPLES = 10_000
REMEDY = "git checkout -- data/claims.json"


# --------------------------------------------------------------------------------- the ledger


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of the ledger.

    Attributes:
        id: Stable name, such as "S-I3"; its first letter names the source.
        claim: The claim; what stands in [brackets] comes from the papers that the source cites.
        chapters: Where it is tested: paths below `notebooks/`.
        source: The article that makes the claim.
    """

    id: str
    claim: str
    chapters: tuple[str, ...]
    source: str


@cache
def ledger() -> dict[str, Claim]:
    """All claims by their id, in the order of the ledger."""
    content = read_manifest(data_folder() / "claims.json", REMEDY)
    return {
        name: Claim(name, row["claim"], tuple(row["chapters"]), content["sources"][name[0]])
        for name, row in content["claims"].items()
    }


def claims_of(chapter: str) -> list[Claim]:
    """The claims that a chapter tests, such as those of "05_inference/3_quantization"."""
    return [claim for claim in ledger().values() if chapter in claim.chapters]


# ---------------------------------------------------------------------------------- intervals


def interval(samples: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean.

    Fewer than twelve samples: Student's, mean ± t·s/√n. Otherwise the percentile bootstrap with
    10,000 resamples.

    Args:
        samples: Independent measurements, at least two.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: With fewer than two samples, or with one that is not finite.
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"an interval needs at least two samples in a row, and has {values.size}.")
    if not np.isfinite(values).all():
        raise ValueError("a sample is not a finite number: there is nothing to compare.")
    if len(values) < FEW:
        reach = _student(len(values) - 1) * stdev(values.tolist()) / math.sqrt(len(values))
        centre = fmean(values.tolist())
        return centre - reach, centre + reach
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 500):  # in blocks, to keep memory small for many items
        chosen = rng.integers(len(values), size=(500, len(values)))
        means[start : start + 500] = values[chosen].mean(axis=1)
    outside = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [outside, 100 - outside])
    return float(low), float(high)


@cache
def _student(freedom: int) -> float:
    """The two-sided 95 % point of Student's t with so many degrees of freedom.

    With t = √ν tan θ the density becomes cos^(ν-1) θ, whose integral over a finite range is easy.
    """
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = np.interp(CONFIDENCE * area[-1], area, angles)
    return float(math.sqrt(freedom) * math.tan(angle))


# ----------------------------------------------------------------------------------- evidence

Expectation = Literal["higher", "lower", "equal"]
SHOWN, CONTRADICTED, UNDECIDED = "shown", "contradicted", "undecided"


@dataclass(frozen=True, slots=True)
class Evidence:
    """A measured number with its interval, and what the claim expects of it.

    Attributes:
        what: What was measured, in words, with its unit.
        estimate: The measured value.
        low: Lower end of its interval.
        high: Upper end; equal to `low` where nothing is left to chance.
        expect: "higher" or "lower" than the bound, or "equal" to it within `margin`.
        bound: What the claim compares with.
        margin: How far from the bound still counts as equal; for "higher" and "lower", by how much
            the bound must at least be passed.
        samples: How many measurements stand behind it.
        kind: "student", "bootstrap", or "exact" where nothing is left to chance.
    """

    what: str
    estimate: float
    low: float
    high: float
    expect: Expectation
    bound: float = 0.0
    margin: float = 0.0
    samples: int = 1
    kind: str = "exact"

    def __post_init__(self) -> None:
        """Refuse what cannot be judged."""
        if self.expect not in ("higher", "lower", "equal"):
            raise ValueError(f"expect is {self.expect!r}; choose higher, lower or equal.")
        if not self.low <= self.estimate <= self.high:
            raise ValueError(
                f"the estimate {self.estimate} of {self.what} lies outside of its interval, "
                f"{self.low} to {self.high}."
            )
        if self.margin < 0 or (
            self.expect == "equal" and self.margin == 0 and self.kind != "exact"
        ):
            raise ValueError(
                f"the margin of {self.what} is {self.margin}; a measured value is equal to another "
                "only within a margin above 0."
            )

    @classmethod
    def exact(
        cls, what: str, value: float, *, expect: Expectation, bound: float, margin: float = 0.0
    ) -> Evidence:
        """Evidence that leaves nothing to chance: a count, an identity, a size in bytes."""
        return cls(what, float(value), float(value), float(value), expect, bound, margin)

    @classmethod
    def repeated(
        cls,
        what: str,
        samples: Sequence[float],
        *,
        expect: Expectation,
        bound: float,
        margin: float = 0.0,
        seed: int = 0,
    ) -> Evidence:
        """Evidence from repeated measurements of one quantity, such as a slope at several seeds.

        Args:
            what: What was measured, in words, with its unit.
            samples: Independent measurements, at least two.
            expect: "higher" or "lower" than the bound, or "equal" to it within `margin`.
            bound: What the claim compares with.
            margin: See the attributes.
            seed: Seed of the bootstrap.

        Raises:
            ValueError: With fewer than two samples, or with one that is not finite.
        """
        low, high = interval(samples, seed)
        kind = "student" if len(samples) < FEW else "bootstrap"
        # The clamp undoes rounding where all samples agree.
        mean = min(max(fmean(map(float, samples)), low), high)
        return cls(what, mean, low, high, expect, bound, margin, len(samples), kind)

    @classmethod
    def paired(
        cls,
        what: str,
        method: Sequence[float],
        baseline: Sequence[float],
        *,
        expect: Expectation,
        bound: float | None = None,
        margin: float = 0.0,
        ratio: bool = False,
        seed: int = 0,
    ) -> Evidence:
        """Evidence from pairs: the same seeds or items with the method and with the baseline.

        Args:
            what: What was measured, in words, with its unit.
            method: One number for each seed or item.
            baseline: The numbers of the same seeds or items, in the same order.
            expect: Whether the claim expects the method's numbers "higher", "lower" or "equal".
            bound: What the difference (or ratio) is compared with; 0 (or 1) when None. A claim of
                "twice as fast" expects "higher" with `ratio=True, bound=2`.
            margin: How much of a difference counts as none; see the attributes.
            ratio: Compare by method / baseline (their geometric mean), not by method - baseline.
            seed: Seed of the bootstrap.

        Raises:
            ValueError: When the two do not pair up, are too few, or a ratio meets a number that is
                not above 0.
        """
        if len(method) != len(baseline):
            raise ValueError(
                f"{what}: {len(method)} numbers of the method do not pair up with "
                f"{len(baseline)} of the baseline."
            )
        pairs = [(float(a), float(b)) for a, b in zip(method, baseline, strict=True)]
        if not ratio:
            differences = [a - b for a, b in pairs]
            return cls.repeated(
                what, differences, expect=expect, bound=bound or 0.0, margin=margin, seed=seed
            )
        if any(a <= 0 or b <= 0 for a, b in pairs):
            raise ValueError(f"{what}: a ratio needs numbers above 0.")
        logs = cls.repeated(
            what, [math.log(a / b) for a, b in pairs], expect=expect, bound=0, margin=1, seed=seed
        )
        estimate, low, high = (math.exp(v) for v in (logs.estimate, logs.low, logs.high))
        limit = 1.0 if bound is None else bound
        return cls(what, estimate, low, high, expect, limit, margin, logs.samples, logs.kind)

    @classmethod
    def extremes(
        cls,
        what: str,
        groups: Mapping[str, Sequence[float]],
        *,
        expect: Expectation = "higher",
        bound: float = 0.0,
        margin: float = 0.0,
        seed: int = 0,
    ) -> Evidence:
        """Evidence that groups differ: the one with the highest mean against that with the lowest.

        Whichever two lie farthest apart in a set of measurements differ in it by construction. So
        the two are chosen by the first, third, fifth … measurement of every group, and compared by
        the others. The groups are not paired: each is resampled on its own.

        Args:
            what: What was measured, in words, with its unit; the names of the two are added.
            groups: Measurements by the name of their group; at least 24 in each.
            expect: What the claim expects of the difference of the means.
            bound: What the difference is compared with.
            margin: How much of a difference counts as none; see the attributes.
            seed: Seed of the bootstrap.

        Raises:
            ValueError: With fewer than two groups, a group of fewer than 24, or a number that is
                not finite.
        """
        values = {name: np.asarray(group, dtype=np.float64) for name, group in groups.items()}
        few = [name for name, group in values.items() if group.ndim != 1 or len(group) < 2 * FEW]
        if len(values) < 2 or few:
            raise ValueError(
                f"{what}: extremes need at least two groups of at least {2 * FEW} numbers each"
                + (f"; {few[0]} has {values[few[0]].size}." if few else ".")
            )
        if not all(np.isfinite(group).all() for group in values.values()):
            raise ValueError(f"{what}: a sample is not a finite number.")
        means = {name: group[::2].mean() for name, group in values.items()}
        top, bottom = max(means, key=means.get), min(means, key=means.get)
        rng = np.random.default_rng(seed)
        drawn = [
            group[rng.integers(len(group), size=(RESAMPLES, len(group)))].mean(axis=1)
            for group in (values[top][1::2], values[bottom][1::2])
        ]
        outside = 100 * (1 - CONFIDENCE) / 2
        low, high = np.percentile(drawn[0] - drawn[1], [outside, 100 - outside])
        estimate = values[top][1::2].mean() - values[bottom][1::2].mean()
        estimate = min(max(float(estimate), float(low)), float(high))
        used = len(values[top][1::2]) + len(values[bottom][1::2])
        label = f"{what}: {top} - {bottom}, chosen by other samples"
        return cls(
            label, estimate, float(low), float(high), expect, bound, margin, used, "bootstrap"
        )

    @property
    def outcome(self) -> str:
        """Whether the interval shows what is expected, contradicts it, or leaves it undecided."""
        if self.expect == "equal":
            low, high = self.bound - self.margin, self.bound + self.margin
            if low <= self.low and self.high <= high:
                return SHOWN
            return CONTRADICTED if self.high < low or self.low > high else UNDECIDED
        sign = 1 if self.expect == "higher" else -1
        ends = sorted([sign * (self.low - self.bound), sign * (self.high - self.bound)])
        if ends[0] > self.margin:
            return SHOWN
        return CONTRADICTED if ends[1] <= self.margin else UNDECIDED

    def __str__(self) -> str:
        """What was measured, its interval, and what that says."""
        return f"{self.what}: {self.measured()}; {self.expected()}: {self.outcome}"

    def measured(self) -> str:
        """The number with its interval."""
        if self.kind == "exact":
            return f"{self.estimate:.3g}"
        return f"{self.estimate:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def expected(self) -> str:
        """What the claim expects, in words."""
        margin = f" by more than {self.margin:.3g}" if self.margin else ""
        if self.expect == "equal":
            near = f" within {self.margin:.3g}" if self.margin else ""
            return f"expected {self.bound:.3g}{near}"
        return f"expected {self.expect} than {self.bound:.3g}{margin}"


# ----------------------------------------------------------------------------------- verdicts


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the measurements say about one claim.

    Attributes:
        claim: The row of the ledger.
        parts: The evidence, one for each part of the claim.
        note: The setting: model, data, seeds; and what is special about it.
    """

    claim: Claim
    parts: tuple[Evidence, ...]
    note: str = field(default="")

    @property
    def outcome(self) -> str:
        """One of the four verdicts, by the parts that were shown."""
        if not self.parts:
            return UNTESTED
        shown = [part.outcome == SHOWN for part in self.parts]
        return HOLDS if all(shown) else IN_PART if any(shown) else FAILS

    def __str__(self) -> str:
        """The verdict with its evidence, as lines of text."""
        lines = [f"{self.claim.id}: {self.outcome}", f"  Claim: {self.claim.claim}"]
        lines += [f"  {part}" for part in self.parts]
        return "\n".join([*lines, f"  {self.note}"] if self.note else lines)

    def data(self) -> dict[str, Any]:
        """The verdict for programs; numbers are rounded to six digits."""
        parts = [{**asdict(part), "outcome": part.outcome} for part in self.parts]
        rounded = [
            {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in part.items()}
            for part in parts
        ]
        return {"id": self.claim.id, "verdict": self.outcome, "note": self.note, "parts": rounded}


def verdict(name: str, parts: Sequence[Evidence] = (), note: str = "") -> Verdict:
    """Judge a claim of the ledger by its evidence.

    All parts shown: it holds. Some: it holds in part. None: it does not hold at this scale, whether
    it was contradicted or stays undecided, as the table tells. No parts: it cannot be tested here.

    Args:
        name: Id of the claim, such as "S-I3".
        parts: The evidence, one for each part of the claim.
        note: The setting. Without parts: what it would take to test the claim.

    Raises:
        ValueError: When there is no such claim, or a claim without evidence has no note.
    """
    if name not in ledger():
        raise ValueError(f"there is no claim {name!r}; the ledger has {', '.join(ledger())}.")
    if not parts and not note.strip():
        raise ValueError(f"{name} has no evidence: say in a note what it would take to test it.")
    return Verdict(ledger()[name], tuple(parts), note)


_MARKS = {HOLDS: ("✓", "#009E73"), IN_PART: ("◐", "#E69F00"), FAILS: ("✗", "#D55E00")}


def _row(one: Verdict) -> str:
    mark, colour = _MARKS.get(one.outcome, ("–", "#8A919C"))
    evidence = "".join(
        f'<li style="margin: 3px 0">{html.escape(part.what)}: '
        f"<strong>{html.escape(part.measured())}</strong> "
        f'<span style="opacity: 0.8">({html.escape(part.expected())}: {part.outcome}; '
        f"{_samples(part)})</span></li>"
        for part in one.parts
    )
    listed = f'<ul style="margin: 6px 0 0; padding-left: 20px">{evidence}</ul>'
    note = f'<div style="opacity: 0.8; margin-top: 6px">{html.escape(one.note)}</div>'
    cell = 'style="text-align: left; vertical-align: top; padding: 10px 18px 10px 0"'
    return (
        f'<tr style="border-top: 1px solid rgba(128, 128, 128, 0.35)">'
        f'<th scope="row" {cell}><span style="white-space: nowrap">{one.claim.id}</span></th>'
        f'<td {cell}><div style="max-width: 62ch">{html.escape(one.claim.claim)}'
        f"{listed if evidence else ''}{note if one.note else ''}</div></td>"
        f'<td {cell}><span style="white-space: nowrap; border-left: 5px solid {colour}; '
        f'padding-left: 8px; font-weight: 600">{mark} {html.escape(one.outcome)}</span></td></tr>'
    )


def _samples(part: Evidence) -> str:
    if part.kind == "exact":
        return "exact"
    return f"n = {part.samples}, 95 % {'t' if part.kind == 'student' else 'bootstrap'} interval"


def claims_table(*verdicts: Verdict) -> None:
    """Display claims, evidence and verdicts as a table, with a form of it for programs.

    Raises:
        ValueError: When no verdict, or two verdicts on one claim, are given.
    """
    names = [one.claim.id for one in verdicts]
    if not names or len(set(names)) < len(names):
        raise ValueError("a claims table takes one verdict for each claim, and at least one.")
    head = "".join(
        f'<th scope="col" style="text-align: left; padding: 4px 18px 8px 0">{word}</th>'
        for word in ("Id", "Claim and evidence", "Verdict")
    )
    table = (
        '<table aria-label="Claims and verdicts" style="border-collapse: collapse">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(map(_row, verdicts))}</tbody></table>"
    )
    display(
        {
            MIME: {"verdicts": [one.data() for one in verdicts]},
            "text/html": table,
            "text/plain": "\n\n".join(map(str, verdicts)),
        },
        raw=True,
    )


def verdicts_in(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The verdicts that an executed notebook carries in its outputs, as `Verdict.data` gives them.

    Args:
        notebook: The notebook as read from JSON.
    """
    found = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            content = output.get("data", {}).get(MIME)
            if isinstance(content, str):
                content = json.loads(content)
            found += content["verdicts"] if content else []
    return found
