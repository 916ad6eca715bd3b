"""What companions of chapters share: rows of stored tables, and differences said in words."""

import pytest

from effnb.lab import results
from effnb.lab.changes import Change, if_measured, mean_windows, pick, spoken, tidy


def test_a_change_is_named_by_its_interval():
    better = Change.between([1.0, 1.1, 0.9, 1.0], [2.0, 2.0, 2.0, 2.1])
    assert better.word() == "better"
    assert better.word(lower_is_better=False) == "worse"
    assert better.mean == pytest.approx(-1.025)
    assert better.low < better.mean < better.high < 0
    open_ = Change.between([1.0, -1.0, 0.5, -0.4], [0.0, 0.0, 0.0, 0.0])
    assert open_.word() == "indistinguishable"
    assert not open_.decided
    with pytest.raises(ValueError, match="2 numbers do not pair up with 3"):
        Change.between([1.0, 2.0], [1.0, 2.0, 3.0])


def test_a_change_is_said_with_its_interval():
    assert Change(-0.5, -0.75, -0.25).number(2) == "−0.50 [−0.75, −0.25]"
    assert Change(0.0001, -0.0001, 0.0003).number() == "+0.000 [+0.000, +0.000]"
    assert str(tidy(-0.0001)) == "0.0"


def test_rows_are_picked_and_averaged_over_their_seeds():
    rows = [
        {"method": "original", "windows": [1.0, 2.0]},
        {"method": "SVD", "seed": 0, "windows": [2.0, 4.0]},
        {"method": "SVD", "seed": 1, "windows": [4.0, 8.0]},
    ]
    assert pick(rows, method="SVD", seed=1) == rows[2:]
    assert pick(rows, method="original", seed=None) == rows[:1]
    assert mean_windows(pick(rows, method="SVD")) == [3.0, 6.0]


def test_a_missing_result_goes_through():
    count = if_measured(lambda name, rows: f"{name}: {len(rows)}")
    missing = results.NotMeasured("05_inference/2_low_rank/nothing")
    assert count("rows", [1, 2]) == "rows: 2"
    assert count("rows", missing["table"]) is missing


def test_lists_are_joined_as_in_english():
    assert [spoken("a"), spoken("ab"), spoken("abc")] == ["a", "a and b", "a, b and c"]
