import json
import math
import re
from collections import Counter

import numpy as np
import pytest

from effnb.lab import claims
from effnb.lab._files import DamagedFile, data_folder
from effnb.lab.chapters import TABLE
from effnb.lab.claims import (
    FAILS,
    HOLDS,
    IN_PART,
    UNTESTED,
    Evidence,
    claims_of,
    claims_table,
    interval,
    ledger,
    verdict,
    verdicts_in,
)


@pytest.fixture
def displayed(monkeypatch):
    bundles = []
    monkeypatch.setattr(claims, "display", lambda bundle, raw: bundles.append(bundle))
    return bundles


def exactly(value, expect="higher", **bound):
    return Evidence.exact("a count", value, expect=expect, **({"bound": 0} | bound))


# --------------------------------------------------------------------------------- the ledger


def test_the_ledger_is_whole():
    rows = ledger()
    assert len(rows) == 68
    counts = Counter(re.match(r"[A-Z]-?[A-Z]?", name)[0].rstrip("-") for name in rows)
    assert counts["C"] == 7
    assert counts["D"] == 13
    assert counts["G"] == 8
    assert rows["S-I3"].chapters == ("05_inference/3_quantization",)
    assert "memory and computation" in rows["S-I3"].claim
    assert "2209.00099" in rows["S-I3"].source


def test_every_claim_belongs_to_chapters_of_the_map():
    for row in ledger().values():
        assert row.chapters
        assert set(row.chapters) <= set(TABLE)
        assert len(row.claim) > 30
    tested = {chapter for row in ledger().values() for chapter in row.chapters}
    assert tested == set(TABLE) - {"00_start_here"}


def test_the_claims_of_a_chapter():
    assert [row.id for row in claims_of("05_inference/3_quantization")] == ["S-I3", "C-3", "C-7"]
    assert claims_of("00_start_here") == []


def test_a_damaged_ledger_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "data_folder", lambda: tmp_path)
    ledger.cache_clear()
    try:
        with pytest.raises(DamagedFile, match=r"claims.json is missing; restore it with `git"):
            ledger()
        whole = (data_folder() / "claims.json").read_text()
        (tmp_path / "claims.json").write_text(whole[:5000])
        with pytest.raises(DamagedFile, match="claims.json is damaged"):
            ledger()
    finally:
        ledger.cache_clear()


# ---------------------------------------------------------------------------------- intervals


def test_few_samples_get_students_interval():
    # mean 2, s = 1, n = 3: 2 ± 4.30265 / √3, by the tables of Student's t
    low, high = interval([1.0, 2.0, 3.0])
    assert low == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-4)
    assert high == pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-4)


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (10, 2.22814)]
)
def test_students_t(freedom, t):
    assert claims._student(freedom) == pytest.approx(t, rel=1e-4)


def test_many_samples_get_a_bootstrap_near_the_normal_interval():
    samples = np.random.default_rng(0).normal(3, 2, size=400)
    low, high = interval(samples)
    reach = 1.96 * samples.std(ddof=1) / 20
    assert low == pytest.approx(samples.mean() - reach, abs=0.03)
    assert high == pytest.approx(samples.mean() + reach, abs=0.03)
    assert interval(samples) == (low, high)
    assert interval(samples, seed=1) != (low, high)


@pytest.mark.parametrize("size", [5, 30])
def test_nineteen_of_twenty_intervals_hold_the_truth(size):
    rng = np.random.default_rng(1)
    trials = 200
    hits = sum(
        low <= 3 <= high for low, high in (interval(rng.normal(3, 2, size)) for _ in range(trials))
    )
    assert 0.90 <= hits / trials <= 0.99


@pytest.mark.parametrize("samples", [[1.0], [], [1.0, math.nan], [1.0, math.inf]])
def test_too_little_to_judge_is_refused(samples):
    with pytest.raises(ValueError, match=r"at least two samples|not a finite number"):
        interval(samples)


# ----------------------------------------------------------------------------------- evidence


@pytest.mark.parametrize(
    ("low", "high", "expect", "margin", "outcome"),
    [
        (0.1, 0.3, "higher", 0, "shown"),
        (-0.1, 0.3, "higher", 0, "undecided"),
        (-0.3, -0.1, "higher", 0, "contradicted"),
        (0.1, 0.3, "higher", 0.2, "undecided"),
        (0.1, 0.3, "higher", 0.5, "contradicted"),
        (-0.3, -0.1, "lower", 0, "shown"),
        (-0.3, 0.1, "lower", 0, "undecided"),
        (0.1, 0.3, "lower", 0, "contradicted"),
        (-0.3, -0.1, "lower", 0.05, "shown"),
        (-0.1, 0.1, "equal", 0.2, "shown"),
        (-0.1, 0.3, "equal", 0.2, "undecided"),
        (0.3, 0.4, "equal", 0.2, "contradicted"),
        (-0.4, -0.3, "equal", 0.2, "contradicted"),
    ],
)
def test_outcomes_follow_from_the_interval(low, high, expect, margin, outcome):
    one = Evidence("x", (low + high) / 2, low, high, expect, 0.0, margin, 5, "student")
    assert one.outcome == outcome


def test_pairs_show_what_unpaired_samples_would_hide():
    rng = np.random.default_rng(0)
    baseline = rng.normal(20, 5, size=50)  # items differ by much
    method = baseline - 0.2 + rng.normal(0, 0.1, size=50)  # the method by little, but always
    one = Evidence.paired("perplexity", method, baseline, expect="lower")
    assert one.outcome == "shown"
    assert one.kind == "bootstrap"
    assert one.samples == 50
    assert one.low < one.estimate < one.high < 0
    assert one.estimate == pytest.approx((method - baseline).mean())
    shuffled = Evidence.paired("perplexity", rng.permutation(method), baseline, expect="lower")
    assert shuffled.outcome == "undecided"


def test_ratios_compare_with_one_or_with_a_factor():
    slow, fast = [4.0, 4.4, 3.9, 4.1], [2.0, 2.1, 1.9, 2.1]
    one = Evidence.paired("time", slow, fast, expect="higher", ratio=True)
    assert one.estimate == pytest.approx(math.prod(s / f for s, f in zip(slow, fast)) ** 0.25)
    assert one.bound == 1
    assert one.outcome == "shown"
    assert Evidence.paired("t", slow, fast, expect="higher", ratio=True, bound=3).outcome == (
        "contradicted"
    )
    assert Evidence.paired("t", slow, fast, expect="higher", ratio=True, bound=2).outcome == (
        "undecided"
    )
    equal = Evidence.paired("t", slow, slow, expect="equal", ratio=True, margin=0.1)
    assert (equal.outcome, equal.estimate) == ("shown", 1)


def test_extremes_are_chosen_by_other_samples_than_those_that_judge_them():
    """Where groups differ by chance only, the interval covers zero about nineteen times in twenty.

    The range of the same samples would be above zero nearly always.
    """
    rng = np.random.default_rng(5)
    wrong = naive = 0
    for _ in range(300):
        groups = {name: rng.normal(size=40) for name in "abcdef"}
        evidence = Evidence.extremes("x", {k: list(v) for k, v in groups.items()})
        wrong += evidence.outcome == claims.SHOWN
        spread = max(groups.values(), key=np.mean) - min(groups.values(), key=np.mean)
        naive += claims.interval(list(spread))[0] > 0
    assert wrong <= 20  # 2.5 % of 300 are 7.5
    assert naive >= 60


def test_extremes_find_the_two_that_differ():
    rng = np.random.default_rng(1)
    groups = {n: list(rng.normal(m, 1, 60)) for n, m in (("low", 0), ("mid", 1), ("high", 3))}
    evidence = Evidence.extremes("nats", groups)
    assert evidence.what.startswith("nats: high - low")
    assert evidence.outcome == claims.SHOWN
    assert evidence.samples == 60
    expected = np.mean(groups["high"][1::2]) - np.mean(groups["low"][1::2])
    assert evidence.estimate == pytest.approx(expected)
    spread = math.sqrt(sum(np.var(groups[n][1::2]) / 30 for n in ("high", "low")))
    assert evidence.high - evidence.low == pytest.approx(2 * 1.96 * spread, rel=0.1)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"a": [0.0] * 24}, "at least two groups"),
        ({"a": [0.0] * 24, "b": [0.0] * 23}, "b has 23"),
        ({"a": [0.0] * 24, "b": [math.nan] * 24}, "not a finite number"),
    ],
)
def test_extremes_of_too_little_are_refused(groups, words):
    with pytest.raises(ValueError, match=words):
        Evidence.extremes("x", groups)


def test_repeated_measurements_compare_with_a_bound():
    one = Evidence.repeated("slope", [-0.51, -0.49, -0.5], expect="equal", bound=-0.5, margin=0.1)
    assert one.outcome == "shown"
    assert one.kind == "student"


def test_samples_that_all_agree_are_certain():
    one = Evidence.repeated("x", [0.1] * 3, expect="higher", bound=0)
    assert one.low <= one.estimate <= one.high
    assert one.outcome == "shown"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Evidence.paired("x", [1, 2], [1], expect="lower"), "do not pair up"),
        (lambda: Evidence.paired("x", [1, 0], [1, 2], expect="lower", ratio=True), "above 0"),
        (lambda: Evidence.paired("x", [1, 2], [1, 3], expect="equal"), "margin"),
        (lambda: Evidence.paired("x", [1, 2], [1, 3], expect="better"), "choose higher, lower"),
        (lambda: Evidence("x", 5, 0, 1, "higher"), "outside of its interval"),
        (lambda: exactly(1, margin=-1), "margin"),
    ],
    ids=["pairs", "zero", "equal", "expect", "outside", "margin"],
)
def test_evidence_that_says_nothing_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# ----------------------------------------------------------------------------------- verdicts

YES, NO = exactly(1), exactly(-1)
MAYBE = Evidence("x", 0.1, -1, 1, "higher", samples=4, kind="student")


@pytest.mark.parametrize(
    ("parts", "outcome"),
    [
        ([YES], HOLDS),
        ([YES, YES], HOLDS),
        ([YES, NO], IN_PART),
        ([YES, MAYBE], IN_PART),
        ([NO, NO], FAILS),
        ([MAYBE], FAILS),
        ([], UNTESTED),
    ],
    ids=["one", "all", "some", "doubt", "none", "undecided", "untested"],
)
def test_the_verdict_follows_from_its_parts(parts, outcome):
    assert verdict("S-I3", parts, note="It would take a bigger machine.").outcome == outcome


def test_claims_that_are_not_and_empty_verdicts_are_refused():
    with pytest.raises(ValueError, match="no claim 'S-I99'"):
        verdict("S-I99", [YES])
    with pytest.raises(ValueError, match="what it would take"):
        verdict("S-I3")


def test_the_table_says_all_to_people_and_to_programs(displayed):
    shown = Evidence.paired("loss & more", [1.0, 1.1, 0.9], [2.0, 2.2, 2.1], expect="lower")
    claims_table(
        verdict("S-I3", [shown, NO], note="Two <seeds>."),
        verdict("C-3", note="It would take days."),
    )
    (bundle,) = displayed
    page, plain = bundle["text/html"], bundle["text/plain"]
    assert "loss &amp; more" in page
    assert "Two &lt;seeds&gt;." in page
    assert ledger()["S-I3"].claim[:40] in page
    for words in (
        "holds in part",
        "cannot be tested here",
        "contradicted",
        "n = 3",
        "95 % t interval",
    ):
        assert words in page
    assert plain.startswith("S-I3: holds in part")
    assert shown.measured() in plain
    stored = json.loads(json.dumps(bundle[claims.MIME], allow_nan=False))
    notebook = {
        "cells": [
            {"cell_type": "markdown"},
            {"outputs": [{"output_type": "stream"}, {"data": {"text/plain": "1"}}]},
            {"outputs": [{"data": bundle}]},
        ]
    }
    found = verdicts_in(notebook)
    assert found == stored["verdicts"]
    assert [one["verdict"] for one in found] == [IN_PART, UNTESTED]
    assert found[0]["parts"][0]["outcome"] == "shown"
    assert found[0]["parts"][0]["high"] == pytest.approx(shown.high, rel=1e-5)


def test_a_table_takes_each_claim_once(displayed):
    with pytest.raises(ValueError, match="one verdict for each claim"):
        claims_table(verdict("S-I3", [YES]), verdict("S-I3", [NO]))
    with pytest.raises(ValueError, match="at least one"):
        claims_table()
    assert displayed == []
