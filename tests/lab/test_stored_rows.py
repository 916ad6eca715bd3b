"""Rows of stored results: what is picked, averaged, compared and said of them."""

import pytest

from effnb.lab import results
from effnb.lab.domains import domains_said, domains_table
from effnb.lab.stored_rows import Change, if_measured, mean_windows, pick, spoken, tidy

ROWS = [
    {"method": "a", "seed": 0, "windows": [1.0, 2.0]},
    {"method": "a", "seed": 1, "windows": [3.0, 6.0]},
    {"method": "b", "amount": 3, "windows": [0.5, 0.5]},
]


def test_rows_are_picked_by_their_entries_and_by_those_they_lack():
    assert pick(ROWS, method="a", seed=1) == [ROWS[1]]
    assert pick(ROWS, amount=None) == ROWS[:2]
    assert pick(ROWS, method="c") == []


def test_windows_are_averaged_over_seeds():
    assert mean_windows(pick(ROWS, method="a")) == [2.0, 4.0]
    with pytest.raises(ValueError, match="argument 2 is longer"):
        mean_windows([{"windows": [1.0]}, {"windows": [1.0, 2.0]}])


def test_a_change_is_named_by_its_interval():
    better = Change.between([1.0, 1.1, 0.9, 1.0], [2.0, 2.0, 2.0, 2.1])
    assert better.word() == "better"
    assert better.word(lower_is_better=False) == "worse"
    assert better.mean == pytest.approx(-1.025)
    assert better.low < better.mean < better.high < 0
    assert better.number(2).startswith("−1.0")
    open_ = Change.between([1.0, -1.0, 0.5, -0.4], [0.0, 0.0, 0.0, 0.0])
    assert not open_.decided
    assert open_.word() == "indistinguishable"
    assert open_.than("the other", 1).startswith("indistinguishable from the other (+0.0 [")
    assert better.than("the other", 1) == f"better than the other ({better.number(1)} nats)"
    with pytest.raises(ValueError, match="2 numbers do not pair up with 3"):
        Change.between([1.0, 2.0], [1.0, 2.0, 3.0])


def test_words_and_numbers_as_they_are_printed():
    assert [spoken(list("abc"[:n])) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    assert f"{tidy(-0.0001):+.3f}" == "+0.000"


def test_a_missing_result_is_given_back():
    missing = results.NotMeasured("05_inference/1_pruning/nothing")
    assert if_measured(lambda rows, more: len(rows))(ROWS, missing) is missing
    assert if_measured(lambda rows: len(rows))(ROWS) == 3
    assert domains_table(missing) is missing


BASE = {"novel": [4.0, 4.1], "Bible": [2.0, 2.1], "packages": [5.0, 5.2]}
PRUNED = {"novel": [4.10, 4.21], "Bible": [2.08, 2.18], "packages": [5.0, 5.21]}


def test_domains_are_ranked_in_nats_and_in_per_cent():
    found = {"original": BASE, "half": PRUNED}
    assert (
        domains_said(found, ["half"])
        == "half: novel loses most in nats (+0.105) but in per cent Bible does."
    )
    shown = domains_table(found)
    assert shown.rows == (("half", "+0.105 (+2.6 %)", "+0.080 (+3.9 %)", "+0.005 (+0.1 %)"),)
