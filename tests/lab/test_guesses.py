import csv
import io
import json
import sys

import pytest

from effnb.lab.panels import PanelError, guess, guesses, knob, panel

made_in = sys.modules["effnb.lab.panels.guesses"]
view = sys.modules["effnb.lab.panels.view"]
ASKED = "What is twice four?"


@pytest.fixture(autouse=True)
def plain_session(monkeypatch):
    """As for a reader who has guessed nothing yet, and whose notebook's file is not known."""
    for name in ("EFFNB_BUILD", "EFFNB_SWEEP", "JPY_SESSION_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(made_in, "_made", {})


@pytest.fixture
def shown(monkeypatch):
    """What is displayed, as bundles, in order."""
    bundles = []
    monkeypatch.setattr(view, "display", lambda bundle, **_: bundles.append(bundle))
    return bundles


def doubled(question):
    return panel(
        lambda bits: 2 * bits,
        lambda value, figure: figure.subplots().bar([1], [value]),
        text=lambda value: f"double: {value}",
        caption="Twice as much.",
        predict=question,
        bits=knob(2, 8, default=4),
    )


def number(**changes):
    return guess(**{"question": ASKED, "answer": lambda value: value, **changes})


def opened(question):
    made = doubled(question)
    made._ipython_display_()
    return made


def everything(widget):
    """All the words in a widget and in those inside it."""
    words = [getattr(widget, "value", ""), getattr(widget, "description", "")]
    return " ".join(map(str, words)) + " ".join(
        everything(child) for child in getattr(widget, "children", ())
    )


def commit(made, words):
    question = made._view.question
    question._field.value = words
    question._commit.click()
    assert made.wait(30)


def test_a_locked_panel_keeps_its_answer_back(shown):
    made = opened(number())
    assert made._view.locked
    said = everything(made._view.box)
    assert ASKED in said
    assert "double" not in said
    assert "<img" not in said
    for bundle in shown:
        assert "double" not in json.dumps(bundle)
        assert "<img" not in json.dumps(bundle)


def test_a_guess_unlocks_the_panel_and_stands_beside_the_answer(shown):
    made = opened(number())
    commit(made, " 6 ")
    assert not made._view.locked
    said = everything(made._view.box)
    assert "double" in said
    assert "Your guess: 6. The answer: 8. You were 2 too low." in said
    assert "Your guess: 6. The answer: 8." in shown[-1]["text/plain"]
    assert "Your guess: 6. The answer: 8." in shown[-1]["text/html"]
    assert "double: 8" in shown[-1]["text/plain"]


def test_what_is_no_number_loses_nothing_and_stays_locked(shown):
    made = opened(number())
    commit(made, "about six")
    assert made._view.locked
    assert "Not yet: a guess is one number" in everything(made._view.box)
    assert made._view.question._field.value == "about six"
    commit(made, "")
    assert "Not yet: type a number" in everything(made._view.box)


def test_a_question_can_be_skipped(shown):
    made = opened(number())
    made._view.question._skip.click()
    assert made.wait(30)
    assert "No guess was made. The answer: 8." in everything(made._view.box)
    assert guesses().table().rows == ((ASKED, "skipped", "8"),)


def test_a_choice_is_one_of_those_offered(shown):
    question = number(choices=["less than 8", "8", "more"], answer=str)
    made = opened(question)
    made._view.question._commit.click()
    assert made._view.locked
    assert "choose one of: less than 8, 8, more" in everything(made._view.box)
    commit(made, "8")
    assert "Your guess: 8. The answer: 8. You were right." in everything(made._view.box)


def test_the_panel_goes_to_the_position_that_the_question_is_about(shown):
    made = opened(number(at={"bits": 7}))
    commit(made, "14")
    assert made._view.controls["bits"].value == 7
    assert "The answer: 14. That is within 5 %." in everything(made._view.box)


def test_no_answer_of_its_own_leaves_it_to_the_panel(shown):
    made = opened(guess(ASKED))
    commit(made, "5")
    assert "Your guess: 5." in everything(made._view.box)
    assert "The answer" not in everything(made._view.box)
    assert guesses().table().rows == ((ASKED, "5", "see the panel"),)


@pytest.mark.parametrize(
    ("words", "value"),
    [("12.5", 12.5), ("12,5", 12.5), ("1,234", 1234), ("-3", -3), ("−3", -3), ("40 %", 40)],
)
def test_numbers_are_read_as_people_write_them(words, value):
    assert guess(ASKED, unit="%").read(words) == value


@pytest.mark.parametrize("words", ["", "nan", "inf", "4 5", "%"])
def test_other_words_are_no_numbers(words):
    with pytest.raises(ValueError, match=r"number"):
        guess(ASKED, unit="%").read(words)


def test_percentages_differ_by_points():
    said = guess(ASKED, unit="%", answer=lambda found: found).verdict(50.0, 60)
    assert said == "Your guess: 50 %. The answer: 60 %. You were 10 points too low."


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="needs a question"):
        guess(" ")
    with pytest.raises(ValueError, match="two different choices"):
        guess(ASKED, ["one"])
    with pytest.raises(ValueError, match="two different choices"):
        guess(ASKED, ["one", "one"])
    with pytest.raises(ValueError, match="no position 99"):
        doubled(number(at={"bits": 99}))


def test_a_sweep_finds_an_answer_that_fails(monkeypatch):
    monkeypatch.setenv("EFFNB_SWEEP", "1")
    doubled(number())
    with pytest.raises(PanelError, match="has no answer: ZeroDivisionError"):
        doubled(number(answer=lambda value: value // 0))


# ------------------------------------------------------------------------------- kept guesses


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """The file beside a notebook of this session."""
    notebook = tmp_path / "my chapter.ipynb"
    notebook.write_text("{}")
    monkeypatch.setenv("JPY_SESSION_NAME", str(notebook))
    return tmp_path / "my chapter.guesses.json"


def test_guesses_are_kept_beside_the_notebook_and_not_asked_again(beside, shown, monkeypatch):
    commit(opened(number()), "6")
    (kept,) = json.loads(beside.read_text())
    assert (kept["question"], kept["guess"], kept["answer"]) == (ASKED, 6.0, "8")
    monkeypatch.setattr(made_in, "_made", {})  # a new kernel
    again = opened(number())
    assert not again._view.locked
    assert "Your guess: 6. The answer: 8." in everything(again._view.box)


def test_a_damaged_file_of_guesses_is_no_guess(beside, shown):
    beside.write_text('{"question')
    made = opened(number())
    assert made._view.locked
    commit(made, "6")
    assert json.loads(beside.read_text())[0]["guess"] == 6.0


def test_builds_and_sweeps_keep_nothing(beside, shown, monkeypatch):
    monkeypatch.setenv("EFFNB_SWEEP", "1")
    commit(opened(number()), "6")
    assert not beside.exists()


def test_guesses_are_given_away_as_csv(shown):
    assert "No guess has been made" in repr(guesses())
    commit(opened(number()), "6")
    commit(opened(number(question='Is "it", twice?', choices=["yes", "no"], answer=None)), "no")
    found = list(csv.DictReader(io.StringIO(guesses().csv())))
    assert found == [
        {"question": ASKED, "guess": "6", "answer": "8"},
        {"question": 'Is "it", twice?', "guess": "no", "answer": "see the panel"},
    ]
    page = guesses()._repr_html_()
    assert "<caption>" in page
    assert 'download="my_guesses.csv"' in page
