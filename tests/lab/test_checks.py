import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from effnb.lab import checks
from effnb.lab.checks import Exercise, difference


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch):
    monkeypatch.setattr(checks, "registry", {})
    monkeypatch.delenv("EFFNB_SWEEP", raising=False)


def per_row(weight, bits):
    return weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)


def per_column(weight, bits):
    return weight.abs().amax(0, keepdim=True) / (2 ** (bits - 1) - 1)


def off_by_one(weight, bits):
    return weight.abs().amax(1, keepdim=True) / 2 ** (bits - 1)


WEIGHTS = torch.arange(12.0).view(3, 4) - 5
COLUMN = "the scale is per column; it should be one per row"
OFF = "the largest integer of b bits is 2^(b-1) - 1"


@pytest.fixture
def scale():
    return Exercise(
        "Absmax scale",
        minutes=5,
        reference=per_row,
        cases=[(WEIGHTS, 4), (WEIGHTS[:2, :2], 8)],
        wrong={COLUMN: per_column, OFF: off_by_one},
    )


def verdict(exercise, answer, capsys):
    """What a check prints, and that it prints one line and tells the same as it returns."""
    right = exercise.check(answer)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith("Correct: ") == right
    assert right or said.startswith("Not yet: ")
    return said.strip()


def test_a_right_answer_is_correct(scale, capsys):
    said = verdict(
        scale, lambda w, bits: w.abs().max(1, True).values / (2 ** (bits - 1) - 1), capsys
    )
    assert said == "Correct: Absmax scale gives the right answer in all 2 cases."


def raises_not_implemented(weight, bits):
    raise NotImplementedError


@pytest.mark.parametrize(
    "stub",
    [lambda w, b: None, lambda w, b: ..., raises_not_implemented, None, ...],
    ids=["returns None", "returns dots", "raises", "is None", "is dots"],
)
def test_a_blank_stub_is_told_to_begin(scale, stub, capsys):
    assert "returns nothing so far; write your answer" in verdict(scale, stub, capsys)


def test_a_known_mistake_gets_its_diagnosis(scale, capsys):
    said = verdict(scale, lambda w, b: w.abs().amax(0)[None] / (2 ** (b - 1) - 1), capsys)
    assert said == f"Not yet: {COLUMN}."
    assert verdict(scale, off_by_one, capsys) == f"Not yet: {OFF}."


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda w, b: per_row(w, b)[:, 0], "expected shape (3, 1), got shape (3,)"),
        (lambda w, b: per_row(w, b) * 2, "3 of 3 values differ; at [0, 0]: expected 0.714286, got"),
        (lambda w, b: 3.0, "expected a tensor of shape (3, 1), got a float"),
        (
            lambda w, b: per_row(w, b).int(),
            "expected values of type torch.float32, got torch.int32",
        ),
        (lambda w, b: per_row(w, b).numpy(), "expected a tensor of shape (3, 1), got a ndarray"),
        (lambda w, b: w[99], "your code raises IndexError"),
        (lambda w: w, "your code raises TypeError"),
        (lambda w, b: per_row(w.abs_(), b), "your code changes its argument number 1"),
        (lambda w, b: per_row(w, b) * float("nan"), "got nan"),
        (
            lambda w, b: per_row(w, 4),
            "for the input ([[-5.0, -4.0], [-1.0, 0.0]], 8): 2 of 2 values",
        ),
        (lambda w, b: per_row(w, b) if b == 4 else None, "(2, 1), got None"),
        (per_row(WEIGHTS, 4), "give the function itself"),
        (lambda w, b: exit(), "your code raises SystemExit"),
    ],
    ids=map(str, itertools.count()),
)
def test_other_answers_learn_where_they_differ(scale, answer, words, capsys):
    assert words in verdict(scale, answer, capsys)


def test_an_answer_cannot_spoil_the_cases(scale):
    before = [case[0].clone() for case in scale.cases]
    scale.judge(lambda w, b: w.zero_())
    assert all(torch.equal(one, case[0]) for one, case in zip(before, scale.cases))


def test_an_exercise_may_be_about_changing_its_argument(capsys):
    def double(x):
        x.mul_(2)
        return x

    exercise = Exercise("In place", reference=double, cases=[(torch.ones(2),)], wrong={})
    assert verdict(exercise, lambda x: x.mul_(2), capsys).startswith("Correct")


def test_a_mistake_may_be_an_exception(capsys):
    def forgets_empty(values):
        return sum(values) / len(values)

    exercise = Exercise(
        "Mean",
        reference=lambda values: sum(values) / max(len(values), 1),
        cases=[([1.0, 2.0],), ([],)],
        wrong={"an empty list has no length to divide by": forgets_empty},
    )
    exercise.selftest()
    assert verdict(exercise, forgets_empty, capsys) == (
        "Not yet: an empty list has no length to divide by."
    )


def test_the_selftest_passes_and_finds_what_is_wrong(scale):
    scale.selftest()
    scale.wrong = {**scale.wrong, "this one is right": per_row}
    with pytest.raises(AssertionError, match="'this one is right'"):
        scale.selftest()


def test_the_selftest_finds_two_mistakes_that_look_alike(scale):
    scale.wrong = {"first": per_column, "second": per_column}
    with pytest.raises(AssertionError, match="'second'"):
        scale.selftest()


def test_the_selftest_finds_a_reference_that_is_not_steady():
    calls = []
    unsteady = Exercise(
        "Dice", reference=lambda: calls.append(1) or len(calls), cases=[()], wrong={}
    )
    with pytest.raises(AssertionError, match="the reference of 'Dice' fails"):
        unsteady.selftest()


def test_exercises_enter_the_registry_and_are_swept_when_asked(scale, monkeypatch):
    assert checks.registry == {"Absmax scale": scale}
    monkeypatch.setenv("EFFNB_SWEEP", "1")
    with pytest.raises(AssertionError, match="'no mistake'"):
        Exercise("Bad", reference=abs, cases=[(-1,)], wrong={"no mistake": abs})


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="at least one case"):
        Exercise("None", reference=abs, cases=[], wrong={})
    with pytest.raises(TypeError, match="tuple of arguments"):
        Exercise("Bare", reference=abs, cases=[-1], wrong={})
    with pytest.raises(ValueError, match="none of easy"):
        Exercise("Odd", reference=abs, cases=[(1,)], wrong={}, difficulty="nice")


def test_the_heading(scale):
    assert str(scale) == "Absmax scale (5 minutes, easy)"


@dataclass
class Pair:
    codes: torch.Tensor
    scale: float


@pytest.mark.parametrize(
    ("expected", "got", "words"),
    [
        (1.0, 1.0 + 1e-9, None),
        (1.0, 1, None),
        (1, True, "expected the number 1, got a bool"),
        (float("nan"), float("nan"), None),
        (float("inf"), float("inf"), None),
        (1 + 2j, 1 + 2j + 1e-9, None),
        (1.0, 1.1, "expected 1.0, got 1.1"),
        (1.0, torch.tensor(1.0), "expected the number 1.0, got a tensor"),
        ("a", "b", "expected 'a', got 'b'"),
        ("a", 1, "expected 'a', got an int"),
        (None, None, None),
        ([1, 2], (1, 2), None),
        ([1, 2], [1], "expected 2 values, got 1"),
        ([1, [2, 3]], [1, [2, 4]], "at position 1: at position 1: expected 3, got 4"),
        ([1], 1, "expected a list, got an int"),
        ({"a": 1}, {"b": 1}, "expected the keys ['a'], got ['b']"),
        ({"a": 1}, {"a": 2}, "at 'a': expected 1, got 2"),
        ({"a": 1}, 1, "expected a dict, got an int"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "1 of 2 values differ; at [1]: expected 2"),
        (torch.tensor(1.0), torch.tensor(2.0), "its value: expected 1.0, got 2.0"),
        (torch.ones(2).bfloat16(), torch.ones(2), None),
        (np.ones(2), np.ones(2), None),
        (np.ones(2), torch.ones(2), "got a tensor"),
        (Pair(torch.ones(2), 1.0), Pair(torch.ones(2), 1.0), None),
        (Pair(torch.ones(2), 1.0), Pair(torch.ones(2), 2.0), "in scale: expected 1.0, got 2.0"),
        (Pair(torch.ones(2), 1.0), 1.0, "expected a Pair, got a float"),
    ],
    ids=map(str, itertools.count()),
)
def test_differences_in_words(expected, got, words):
    found = difference(expected, got, 1e-6)
    assert (found is None) if words is None else (words in found)
