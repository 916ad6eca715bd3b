"""The ledger, the five verdicts, and what must not pass for evidence."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest

from effnb.lab import claims
from effnb.lab._files import DamagedFile, data_folder
from effnb.lab.chapters import TABLE
from effnb.lab.claims import (
    CONSTRUCTION,
    CONTRADICTED,
    FAILS,
    HOLDS,
    IN_PART,
    NOT_TESTED,
    OPEN,
    SHOWN,
    UNDECIDED,
    UNTESTED,
    claims_from,
    claims_of,
    claims_table,
    compared,
    counted,
    differences,
    digest_of,
    joint,
    judge,
    judged,
    ledger,
    measure,
    outcome_of,
    untested,
    verdicts_in,
)
from effnb.lab.results import Provenance, StoredResult

TODAY, BEFORE = "2026-11-28", "2026-11-20"
MODEL = "mini-5m"


def row(name="quality", **more):
    """A registered part as the ledger holds it."""
    return {
        "name": name, "what": f"nats, {name}", "chapter": "05_inference/3_quantization",
        "model": MODEL, "unit": "nats", "expect": "lower", "method": {"method": name},
        "baseline": {"method": "plain"},
    } | more  # fmt: skip


def content(*parts, claim="S-I3"):
    """A ledger of one claim."""
    parts = list(parts)
    return {
        "sources": {claim[0]: "A survey, 2023"},
        "smallest effects": {"nats": 0.01, "times": 0.05, "per cent": 0.25, "share": 0.01},
        "claims": {
            claim: {
                "claim": "One method is better than another.", "chapters": ["05_inference/x"],
                "registered": "2026-11-27", "digest": digest_of(parts), "parts": parts,
            }
        },
    }  # fmt: skip


def part(name="quality", **more):
    return claims_from(content(row(name, **more)))["S-I3"].parts[name]


@pytest.fixture
def register(monkeypatch):
    """Judge by a ledger of these parts."""

    def use(*parts):
        found = claims_from(content(*parts))
        monkeypatch.setattr("effnb.lab.claims.verdicts.ledger", lambda: found)
        return found["S-I3"].parts

    return use


def runs(method, effect, *, seeds=5, documents=24, noise=0.003, date=TODAY, **more):
    """Stored rows: a loss for each document, moved by the method's effect."""
    base = np.random.default_rng(7).normal(4, 0.3, documents)
    rng = np.random.default_rng(len(method) + 10 * seeds)
    found = []
    for seed in range(seeds):
        losses = base + effect + noise * (rng.normal() + rng.normal(size=documents))
        about = {"model": MODEL, "method": method, "seed": seed, "date": date}
        found.append(about | {"documents": losses.tolist()} | more)
    return found


def plain(**more):
    """The baseline that no seed changes."""
    (one,) = runs("plain", 0.0, seeds=1, noise=0.0)
    del one["seed"]
    return one | more


# --------------------------------------------------------------------------------- the ledger


def test_the_ledger_is_whole():
    rows = ledger()
    assert len(rows) == 68
    counts = Counter(name.split("-")[0] for name in rows)
    assert (counts["C"], counts["D"], counts["G"], counts["S"]) == (7, 13, 8, 27)
    assert rows["S-I3"].chapters == ("05_inference/3_quantization",)
    assert "memory and computation" in rows["S-I3"].claim
    assert "2209.00099" in rows["S-I3"].source


def test_every_claim_is_a_sentence_for_the_public():
    for one in ledger().values():
        text = one.claim
        assert text[0].isupper() and text.rstrip("])")[-1] in ".", one.id
        assert len(text) > 40
        for order in ("measure it", "measure the", "show what it", "print both", "over our"):
            assert order not in text.lower(), one.id


def test_every_claim_belongs_to_chapters_of_the_map():
    for one in ledger().values():
        assert one.chapters
        assert set(one.chapters) <= set(TABLE)
        assert {p.chapter for p in one.parts.values()} <= set(one.chapters)
    tested = {chapter for one in ledger().values() for chapter in one.chapters}
    assert tested == set(TABLE) - {"00_start_here"}


def test_the_claims_of_a_chapter():
    assert [one.id for one in claims_of("05_inference/3_quantization")] == ["S-I3", "C-3", "C-7"]
    assert claims_of("00_start_here") == []


def test_a_damaged_ledger_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("effnb.lab.claims.registry.data_folder", lambda: tmp_path)
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


# ------------------------------------------------------------------------------ registrations


def stored_ledger():
    return json.loads((data_folder() / "claims.json").read_text(encoding="utf-8"))


def test_registrations_are_as_they_were_dated():
    assert claims.changed_registrations(stored_ledger()) == []
    assert sum(bool(one.parts) for one in ledger().values()) == 8


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts[0].update(bound=0.3),
        lambda parts: parts[0].update(method={"method": "another"}),
        lambda parts: parts[0].update(seeds=3),
        lambda parts: parts.pop(),
    ],
    ids=["bound", "rows", "seeds", "part"],
)
def test_a_planted_post_hoc_bound_is_seen_in_the_ledger(change):
    planted = stored_ledger()
    change(planted["claims"]["C-4"]["parts"])
    assert claims.changed_registrations(planted) == ["C-4"]


def test_a_bound_that_is_younger_than_its_measurement_is_to_be_confirmed(register):
    register(row())
    for date, late in ((BEFORE, True), (TODAY, False)):
        found = judge("S-I3", rows=[*runs("quality", -0.1, date=date), plain(date=TODAY)])
        assert found.outcome == HOLDS
        assert found.post_hoc is late
        assert ("To be confirmed" in str(found)) is late
        assert bool(found.data()["confirm"]) is late


def test_no_part_may_choose_a_margin():
    with pytest.raises(ValueError, match="unknown key 'margin'"):
        claims_from(content(row(margin=0.5)))
    effects = stored_ledger()["smallest effects"]
    assert (effects["nats"], effects["accuracy"]) == (0.01, 0.01)
    for one in ledger().values():
        for each in one.parts.values():
            assert each.margin == effects[each.unit]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"expect": "better"}, "choose of"),
        ({"role": "proof"}, "choose of"),
        ({"expect": "nothing"}, "context, and nothing else"),
        ({"expect": "differ"}, "at least two groups"),
        ({"unit": "times"}, "bound above 0"),
        ({"unit": "furlongs"}, "smallest effect for nats"),
    ],
)
def test_registrations_that_cannot_be_judged_are_refused(more, words):
    with pytest.raises(ValueError, match=words):
        part(**more)


def test_two_parts_do_not_share_a_name():
    with pytest.raises(ValueError, match="two parts of S-I3 have the same name"):
        claims_from(content(row(), row()))


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
    assert "95 % interval" in one.basis() and "5 timings" in one.basis()
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


# ----------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([SHOWN], HOLDS),
        ([SHOWN, SHOWN, CONSTRUCTION], HOLDS),
        ([SHOWN, CONTRADICTED], IN_PART),
        ([SHOWN, UNDECIDED], IN_PART),
        ([SHOWN, NOT_TESTED], IN_PART),
        ([CONTRADICTED, UNDECIDED], FAILS),
        ([CONTRADICTED, NOT_TESTED], FAILS),
        ([UNDECIDED], OPEN),
        ([UNDECIDED, NOT_TESTED, CONSTRUCTION], OPEN),
        ([NOT_TESTED, CONSTRUCTION], UNTESTED),
        ([CONSTRUCTION], UNTESTED),
        ([], UNTESTED),
    ],
)
def test_the_verdict_follows_from_its_parts(outcomes, verdict):
    assert outcome_of(outcomes) == verdict


@pytest.mark.parametrize(
    ("effect", "noise", "verdict", "change"),
    [
        (-0.1, 0.003, HOLDS, "in part only, if “nats, quality” were above -0.01 (it is "),
        (0.1, 0.003, FAILS, "It would hold in part if “nats, quality” were below -0.01 (it is 0.1"),
        (-0.02, 0.2, OPEN, "decided if the interval of “nats, quality” were about "),
    ],
)
def test_a_verdict_says_what_would_have_changed_it(register, effect, noise, verdict, change):
    register(row())
    found = judge("S-I3", rows=[*runs("quality", effect, noise=noise), plain()])
    assert found.outcome == verdict
    assert change in found.change()
    assert found.change() in str(found)


def test_one_untested_part_forbids_holds(register):
    register(row(), row("chips"))
    rows = [*runs("quality", -0.1), plain()]
    found = judge("S-I3", rows=rows, why={"chips": "it takes the chips"})
    assert found.outcome == IN_PART
    assert "were measured (it takes the chips)" in found.change()
    with pytest.raises(ValueError, match="no registered part 'chip'"):
        judge("S-I3", rows=rows, why={"chip": "it takes the chips"})


def test_parts_are_tested_at_once(register):
    """p = 0.03 shows a part that is tested alone, and not one of eight."""
    one = register(row())["quality"]
    rng = np.random.default_rng(0)
    table = rng.normal(size=(1, 12))
    table = (table - table.mean()) / table.std(ddof=1) - 0.01 - 2.48 / math.sqrt(12)
    evidence = compared(one, table)
    assert evidence.p_value == pytest.approx(0.03, abs=0.002)
    assert judged("S-I3", [evidence]).outcome == HOLDS
    names = [f"part {i}" for i in range(8)]
    parts = register(*map(row, names))
    many = judged("S-I3", [compared(parts[name], table) for name in names])
    assert many.outcome == OPEN
    assert many.parts[0].adjusted == pytest.approx(0.24, abs=0.02)
    assert "adjusted p = 0.2" in str(many)


def test_a_chapter_judges_what_was_registered_and_nothing_else(register):
    parts = register(row(), row("speed"))
    good = [untested(one, "later") for one in parts.values()]
    assert judged("S-I3", good).outcome == UNTESTED
    with pytest.raises(ValueError, match="without its registered part 'speed'"):
        judged("S-I3", good[:1])
    with pytest.raises(ValueError, match="twice"):
        judged("S-I3", [*good, good[0]])
    lenient = dataclasses.replace(parts["speed"], bound=0.5)
    with pytest.raises(ValueError, match="'speed', which is not registered so"):
        judged("S-I3", [good[0], untested(lenient, "later")])
    with pytest.raises(ValueError, match="'extra', which is not registered so"):
        judged("S-I3", [*good, untested(part("extra"), "later")])


def test_claims_that_are_not_and_empty_verdicts_are_refused():
    with pytest.raises(ValueError, match="no claim 'S-I99'"):
        judge("S-I99")
    with pytest.raises(ValueError, match="what it takes to test it"):
        judge("D-1")
    assert judge("D-1", note="It takes the chapter on delta tuning.").outcome == UNTESTED


# -------------------------------------------------------------------------------------- tables


@pytest.fixture
def displayed(monkeypatch):
    bundles = []
    monkeypatch.setattr(
        "effnb.lab.claims.table.display", lambda bundle, raw: bundles.append(bundle)
    )
    return bundles


def test_the_table_says_all_to_people_and_to_programs(register, displayed):
    register(row(what="loss & more"), row("chips"))
    claims_table(judge("S-I3", rows=[*runs("quality", -0.1), plain()], note="Two <kinds>."))
    (bundle,) = displayed
    page, plain_text = bundle["text/html"], bundle["text/plain"]
    for words in (
        "loss &amp; more", "Two &lt;kinds&gt;.", "holds in part", "5 seeds × 24 documents",
        "no run of chips", "It would hold in full if", "mini-5m",
    ):  # fmt: skip
        assert words in page
    assert plain_text.startswith("S-I3: holds in part")
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
    assert found[0]["verdict"] == IN_PART
    assert [p["outcome"] for p in found[0]["parts"]] == [SHOWN, NOT_TESTED]
    assert found[0]["parts"][0]["high"] < 0
    assert found[0]["parts"][1]["estimate"] is None


def test_a_table_takes_each_claim_once(register, displayed):
    register(row())
    one = judge("S-I3", rows=[plain()])
    with pytest.raises(ValueError, match="one verdict for each claim"):
        claims_table(one, one)
    with pytest.raises(ValueError, match="at least one"):
        claims_table()
    assert displayed == []


def test_several_chapters_give_one_joint_verdict(register):
    register(row(), row("speed"))
    first = judge("S-I3", rows=[*runs("quality", -0.1), plain()], note="One.").data()
    second = judge("S-I3", rows=[*runs("speed", 0.1), plain()], note="Two.").data()
    both = joint([first, second])
    assert [p["outcome"] for p in both["parts"]] == [SHOWN, CONTRADICTED]
    assert (both["verdict"], both["note"]) == (IN_PART, "One. Two.")
    assert joint([first]) == first
    with pytest.raises(ValueError, match="on one claim"):
        joint([first, second | {"id": "C-3"}])
    with pytest.raises(ValueError, match="on one claim"):
        joint([])


def test_stored_results_bring_their_day(register):
    register(row())
    about = Provenance("python data/sweep.py", BEFORE, "cpu", {})
    rows = [
        {k: v for k, v in one.items() if k != "date"} for one in (*runs("quality", -1), plain())
    ]
    found = judge("S-I3", StoredResult("x", {"table": rows}, about))
    assert (found.outcome, found.post_hoc) == (HOLDS, True)
    assert not judge("S-I3", rows=rows).post_hoc  # measured just now


def test_tables_that_are_not_measured_yet_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("effnb.lab.results.data_folder", lambda: tmp_path)
    assert claims.available("no_such_table") == []
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "broken.json").write_text("{")
    with pytest.raises(DamagedFile, match="broken"):
        claims.available("no_such_table", "broken")


def test_the_same_run_in_two_tables_counts_once(register):
    register(row())
    about = Provenance("python data/sweep.py", TODAY, "cpu", {})
    one, other = (
        StoredResult(name, {"table": [plain(date=TODAY), *more]}, about)
        for name, more in (("a", runs("quality", -0.1)), ("b", []))
    )
    assert judge("S-I3", one, other).outcome == HOLDS
    other.data["table"][0]["documents"][0] *= 1.0001  # another machine
    assert judge("S-I3", one, other).outcome == HOLDS
    changed = StoredResult("b", {"table": [plain(documents=[1.0] * 24)]}, about)
    with pytest.raises(ValueError, match="two stored rows of one seed"):
        judge("S-I3", one, changed)


def test_a_planted_bound_in_a_built_chapter_is_found(register):
    register(row(), row("speed"))
    found = judge("S-I3", rows=[*runs("quality", -0.1), plain()]).data()
    assert claims.unregistered(found) == []
    found["parts"][0]["bound"] = 0.5
    assert claims.unregistered(found) == [
        "S-I3 judges 'quality' by the bound 0.5, and 0.0 is registered"
    ]
    found["parts"][0]["name"] = "another"
    assert len(claims.unregistered(found)) == 2


def test_built_chapters_judge_what_is_registered():
    """Chapters that were built before anything was registered carry no names of parts."""
    found = []
    for path in sorted((data_folder().parent / "notebooks").rglob("*.ipynb")):
        for one in verdicts_in(json.loads(path.read_text(encoding="utf-8"))):
            if any("name" in each for each in one["parts"]):
                found += claims.unregistered(one)
    assert found == []
