"""What a reader sees of a check: colour and words, how much is done, and the solution on demand."""

import re

import pytest

from effnb.lab import answers, checks
from effnb.lab.checks import Exercise
from effnb.lab.panels import controls


def absolute(x):
    """The distance from zero."""
    return x if x > 0 else -x


@pytest.fixture
def exercises(monkeypatch):
    monkeypatch.setattr(checks, "registry", {})
    for name in ("EFFNB_BUILD", "EFFNB_SWEEP"):
        monkeypatch.delenv(name, raising=False)
    return [
        Exercise(name, reference=absolute, cases=[(-1,), (2,)], wrong={"a < b": lambda x: x})
        for name in ("Absolute", "Again")
    ]


@pytest.fixture
def shown(monkeypatch):
    """What a reader's notebook shows."""
    bundles = []
    monkeypatch.setattr(answers, "display", lambda bundle, raw: bundles.append(bundle))
    monkeypatch.setattr(answers, "get_ipython", lambda: "a shell")
    return bundles


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_verdicts_are_coloured_and_say_the_same_in_words(exercises, shown, capsys):
    one, _ = exercises
    assert not one.check(lambda x: x)
    assert one.check(abs)
    wrong, right = (bundle["text/html"] for bundle in shown)
    assert "✗ Not yet" in wrong
    assert "a &lt; b" in wrong
    assert "✓ Correct" in right
    grounds = [re.search(r"background: (#\w{6}); color: #fff", page)[1] for page in (wrong, right)]
    assert len(set(grounds)) == 2
    assert all(1.05 / (luminance(ground) + 0.05) >= 4.5 for ground in grounds)
    assert shown[1]["text/plain"].startswith("Correct: Absolute gives")
    assert capsys.readouterr().out == ""


def test_a_line_counts_what_is_done(exercises, shown):
    one, two = exercises
    one.check(lambda x: x)
    one.check(abs)
    one.check(lambda x: x)  # trying something else afterwards undoes nothing
    two.check(abs)
    assert [bundle["text/plain"].splitlines()[-1] for bundle in shown] == [
        "0 of 2 exercises done; still open: Absolute, Again.",
        "1 of 2 exercises done; still open: Again.",
        "1 of 2 exercises done; still open: Again.",
        "2 of 2 exercises done. That was all of them.",
    ]


def test_where_outputs_are_compared_a_verdict_is_one_line(exercises, shown, monkeypatch, capsys):
    monkeypatch.setenv("EFFNB_SWEEP", "1")
    exercises[0].check(abs)
    assert capsys.readouterr().out.count("\n") == 1
    assert shown == []


def test_a_solution_is_shown_on_demand_and_redefines_nothing(exercises, shown, monkeypatch):
    monkeypatch.setattr(controls, "view_bundle", lambda box: {"box": box})
    one, _ = exercises
    one.solution()._ipython_display_()
    assert all("absolute" not in str(bundle) for bundle in shown)
    assert "Solution of Absolute: run this cell" in shown[1]["text/html"]
    _, button, place = shown[0]["box"].children
    assert button.description == "Show the solution: Absolute"
    button.click()
    words = re.sub(r"<style>.*?</style>|<[^>]*>", "", place.value)
    assert "def absolute(x):" in words
    assert "✓ Correct" in words
    button.click()
    assert place.value == ""
    assert not one.done


def test_a_built_page_folds_the_solution(exercises, shown, monkeypatch):
    monkeypatch.setenv("EFFNB_BUILD", "1")
    exercises[0].solution()._ipython_display_()
    (bundle,) = shown
    assert bundle["text/html"].startswith("<details><summary>Solution: Absolute</summary>")
    assert "absolute" in bundle["text/html"]
    assert "absolute" not in bundle["text/plain"]
