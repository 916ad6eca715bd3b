"""Outcomes from rows and intervals, and what must not pass for evidence."""

import math
from collections import Counter

import numpy as np
import pytest
from claim_rows import MODEL, TODAY, part, plain, row, runs

from effnb.lab import claims
from effnb.lab.claims import (
    CONSTRUCTION,
    CONTRADICTED,
    FAILS,
    NOT_TESTED,
    SHOWN,
    UNDECIDED,
    UNTESTED,
    compared,
    counted,
    differences,
    judge,
    measure,
    untested,
)

# ------------------------------------------------------------------------------------ outcomes


@pytest.mark.parametrize(
    ("effect", "expect", "outcome"),
    [
        (-0.1, "lower", SHOWN),
        (-0.001, "lower", CONTRADICTED),  # smaller than the smallest effect of interest
        (0.1, "lower", CONTRADICTED),
        (-0.0101, "lower", UNDECIDED),
        (0.1, "higher", SHOWN),
        (0.001, "higher", CONTRADICTED),
        (-0.1, "higher", CONTRADICTED),
        (0.0101, "higher", UNDECIDED),
        (0.0, "equal", SHOWN),
        (0.1, "equal", CONTRADICTED),
        (-0.1, "equal", CONTRADICTED),
        (0.0099, "equal", UNDECIDED),
    ],
)
def test_outcomes_follow_from_the_interval(effect, expect, outcome):
    rng = np.random.default_rng(1)
    table = effect + 0.002 * rng.normal(size=(5, 24))
    table += effect - table.mean()
    found = compared(part(expect=expect), table)
    assert found.outcome == outcome
    assert found.numbers()[0] == pytest.approx(effect)


def test_pairs_show_what_unpaired_samples_would_hide():
    rng = np.random.default_rng(0)
    baseline = rng.normal(20, 5, size=(1, 50))  # documents differ by much
    method = baseline - 0.2 + rng.normal(0, 0.1, size=(1, 50))  # the method by little, but always
    assert compared(part(), method, baseline).outcome == SHOWN
    assert compared(part(), rng.permutation(method[0])[None], baseline).outcome == UNDECIDED


def test_the_interval_is_that_of_the_crossed_table():
    rng = np.random.default_rng(2)
    method, baseline = rng.normal(4, 1, (5, 12)), rng.normal(4, 1, (1, 12))
    estimate, low, high = compared(part(), method, baseline).numbers()
    assert (low, high) == pytest.approx(claims.interval(method - baseline))
    assert estimate == pytest.approx((method - baseline).mean())
    assert compared(part(), baseline, method).numbers()[0] == pytest.approx(-estimate)


def test_ratios_compare_with_a_factor():
    slow, fast = [[4.0, 4.4, 3.9, 4.1, 4.2]], [[2.0, 2.1, 1.9, 2.1, 2.1]]
    for bound, outcome in (
        (1.0, SHOWN),
        (2.0, CONTRADICTED),
        (3.0, CONTRADICTED),
        (1.9, UNDECIDED),
    ):
        one = compared(part(unit="times", expect="higher", bound=bound), slow, fast)
        assert one.outcome == outcome, bound
    geometric = math.prod(s / f for s, f in zip(slow[0], fast[0])) ** 0.2
    assert one.numbers()[0] == pytest.approx(geometric)
    assert "95 % interval" in one.basis() and "5 documents" in one.basis()
    timed = compared(part(unit="times", value="seconds", bound=1.0), slow, fast)
    assert "5 timings" in timed.basis()
    same = [[4.0, 4.0, 4.0, 4.01, 4.0]]
    equal = compared(part(unit="times", expect="equal", bound=1), same, [[4.0] * 5])
    assert equal.outcome == SHOWN


def test_rises_in_per_cent_are_relative_to_each_document():
    before = np.array([[2.0, 4.0, 5.0]])
    rise = compared(part(unit="per cent", expect="higher"), before * [[1.1, 1.2, 1.3]], before)
    assert rise.numbers()[0] == pytest.approx(20)


GROUPS = {"expect": "differ", "groups": ["a", "b", "c"]}


def test_groups_that_differ_and_groups_that_do_not():
    rng = np.random.default_rng(3)
    zero = np.zeros((1, 40))
    means = {"a": 0.1, "b": 0.0, "c": 0.02}
    apart = {k: (m + 0.01 * rng.normal(size=(5, 40)), zero) for k, m in means.items()}
    found = differences(part(**GROUPS), apart)
    assert found.outcome == SHOWN
    assert "(a − b)" in found.what() or "(a − c)" in found.what()
    assert len(found.contrasts) == 3
    alike = {k: (0.01 * rng.normal(size=(5, 40)), zero) for k in means}
    assert differences(part(**GROUPS), alike).outcome == CONTRADICTED
    vague = {k: (0.3 * rng.normal(size=(5, 40)), zero) for k in means}
    assert differences(part(**GROUPS), vague).outcome == UNDECIDED


def test_the_groups_that_differ_most_are_not_picked_and_then_tested():
    """Six groups that differ by chance: the largest difference passes a test made for one pair."""
    rng = np.random.default_rng(5)
    groups = {"expect": "differ", "groups": list("abcdef")}
    wrong = naive = 0
    for _ in range(200):
        tables = {name: (rng.normal(size=(1, 24)), None) for name in "abcdef"}
        wrong += differences(part(**groups), tables).outcome == SHOWN
        means = {name: table.mean() for name, (table, _) in tables.items()}
        top, low = (f(means, key=means.get) for f in (max, min))
        naive += claims.interval(tables[top][0] - tables[low][0])[0] > 0
    assert wrong <= 0.05 * 200
    assert naive >= 0.2 * 200


def test_a_planted_document_effect_is_no_difference_of_groups():
    """Windows of few documents: over windows the groups differ, over documents they need not."""
    rng = np.random.default_rng(6)
    found = Counter()
    for _ in range(100):
        windows = {
            k: rng.normal(size=(6, 1)) + 0.5 * rng.normal(size=(6, 8)) for k in GROUPS["groups"]
        }
        by_window = {k: (v.reshape(1, -1), None) for k, v in windows.items()}
        by_document = {k: (v.mean(1)[None], None) for k, v in windows.items()}
        found["windows"] += differences(part(**GROUPS), by_window).outcome == SHOWN
        found["documents"] += differences(part(**GROUPS), by_document).outcome == SHOWN
    assert found["windows"] > 50
    assert found["documents"] <= 7


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: compared(part(), [[1.0, 2.0]], [[1.0]]), "do not pair up"),
        (lambda: compared(part(), np.ones((3, 4)), np.ones((2, 4))), "do not pair up"),
        (lambda: compared(part(), [[1.0, math.nan]]), "not a finite number"),
        (lambda: compared(part(unit="times", bound=1), [[1.0, 0.0]]), "above 0"),
        (lambda: differences(part(**GROUPS), {"a": ([[1.0]], None)}), "compares a, b, c"),
        (lambda: untested(part(), " "), "say why"),
    ],
    ids=["documents", "seeds", "finite", "zero", "groups", "reason"],
)
def test_evidence_that_says_nothing_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# ---------------------------------------------------------------------------------- tautologies


def test_a_planted_tautology_is_refused_as_a_measurement():
    """A size ratio is the same in every run: nothing was measured."""
    with pytest.raises(ValueError, match="agree exactly"):
        compared(part(unit="times", bound=1), [[0.28] * 12])
    with pytest.raises(ValueError, match="registered as measured"):
        counted(part(unit="times", bound=1), 0.28)
    size = part(unit="times", bound=1, role="construction")
    with pytest.raises(ValueError, match="true by construction"):
        compared(size, [[0.28, 0.29, 0.3]])
    with pytest.raises(ValueError, match="should stay below 1"):
        counted(size, 1.2)


def test_what_is_true_by_construction_does_not_count(register):
    """A claim of eight parts, one a tautology, can still come out as not holding."""
    names = [f"part {i}" for i in range(7)]
    register(
        row("size", unit="times", bound=1, role="construction", value="bytes"), *map(row, names)
    )
    size = {"model": MODEL, "method": "size", "bytes": 30, "date": TODAY}
    rows = [size, plain(bytes=100), *(one for name in names for one in runs(name, 0.2))]
    found = judge("S-I3", rows=rows)
    assert [p.outcome for p in found.parts] == [CONSTRUCTION] + 7 * [CONTRADICTED]
    assert found.outcome == FAILS
    assert found.parts[0].numbers()[0] == pytest.approx(0.3)
    only = judge("S-I3", rows=[size, plain(bytes=100)])
    assert only.outcome == UNTESTED
    assert "does not count" in str(only)


# ------------------------------------------------------------------------------- from the rows


def test_rows_are_found_by_the_registration():
    rows = [*runs("quality", -0.1), plain(), plain(method="other"), plain(table="speed")]
    found = measure(part(), rows)
    assert (found.outcome, found.seeds, found.documents) == (SHOWN, 5, 24)
    assert found.date == TODAY
    assert found.numbers()[0] == pytest.approx(-0.1, abs=0.01)


def test_a_planted_artefact_of_unequal_data_is_caught():
    rows = [
        *runs("quality", -0.1, calibration_tokens=8192),
        *runs("plain", 0.0, calibration_tokens=2048),
    ]
    assert measure(part(), rows).outcome == SHOWN  # which is why it must be registered
    equal = part(equal=["calibration_tokens"])
    found = measure(equal, rows)
    assert found.outcome == NOT_TESTED
    assert "8192 against 2048" in found.why
    for one in rows:
        one["calibration_tokens"] = 8192
    assert measure(equal, rows).outcome == SHOWN
    del rows[0]["calibration_tokens"]
    assert "not stored" in measure(equal, rows).why


def test_seeds_are_asked_for_wherever_something_is_drawn():
    for seeds in (1, 4):
        found = measure(part(), [*runs("quality", -0.1, seeds=seeds), plain()])
        assert found.outcome == NOT_TESTED
        assert found.why.startswith("it takes 5 seeds")
    rows = [*runs("quality", -0.1), *runs("plain", 0, seeds=3)]
    assert measure(part(), rows).outcome == NOT_TESTED  # two runs of the baseline are missing
    fixed = plain(method="quality", documents=[x - 0.1 for x in plain()["documents"]])
    fixed["documents"][0] += 0.01
    assert measure(part(), [fixed, plain()]).outcome == SHOWN  # nothing is drawn on either side
    assert "5 seeds" in measure(part(seeds=5), [fixed, plain()]).why


def test_random_baselines_need_seeds_where_the_method_draws_nothing():
    rows = [plain(method="quality"), *runs("plain", 0.1)]
    assert measure(part(seeds=5), rows).outcome == SHOWN


def test_what_is_missing_is_said():
    found = measure(part(), [plain()])
    assert (found.outcome, found.measured()) == (NOT_TESTED, "not measured")
    assert "no run of quality on mini-5m" in found.why
    rows = [*runs("quality", -0.1, documents=5), plain(documents=plain()["documents"][:5])]
    assert "12 documents" in measure(part(samples=12), rows).why
    assert "different documents" in measure(part(), [*runs("quality", 0, documents=5), plain()]).why


def test_two_runs_of_one_seed_are_refused():
    """Bit widths are no replicates: rows of one method must differ in their seed alone."""
    rows = [*runs("quality", 0, bits=3), *runs("quality", 0, bits=2), plain()]
    with pytest.raises(ValueError, match="two stored rows of one seed"):
        measure(part(), rows)
    assert measure(part(method={"method": "quality", "bits": 2}), rows).outcome == CONTRADICTED


def test_groups_are_read_from_each_row():
    rows = [
        {
            "model": MODEL, "method": m, **({"seed": s} if m == "quality" else {}),
            "domains": {g: [4 + k + e * (m == "quality") + 0.001 * s * k for k in range(20)]
                        for g, e in (("a", 0.2), ("b", 0.0), ("c", 0.0))},
        }
        for m in ("quality", "plain") for s in range(5 if m == "quality" else 1)
    ]  # fmt: skip
    found = measure(part(value="domains", **GROUPS), rows)
    assert found.outcome == SHOWN
    assert found.numbers()[0] == pytest.approx(0.2)
