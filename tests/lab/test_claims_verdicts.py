"""Verdicts from their parts, and the tables that print them."""

import dataclasses
import json
import math

import numpy as np
import pytest
from claim_rows import BEFORE, TODAY, part, plain, row, runs

from effnb.lab import claims
from effnb.lab._files import DamagedFile, data_folder
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
    claims_table,
    compared,
    joint,
    judge,
    judged,
    outcome_of,
    untested,
    verdicts_in,
)
from effnb.lab.results import Provenance, StoredResult

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
