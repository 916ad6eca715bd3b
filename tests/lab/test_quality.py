import math
import random

import pytest

from effnb.lab import Curves, Quality, Subject, knob, paired, paired_answers, quality_panel
from effnb.lab.differences import student_quantile

GIB = 2**20


@pytest.fixture(autouse=True)
def plain_session(monkeypatch):
    monkeypatch.delenv("EFFNB_BUILD", raising=False)
    monkeypatch.delenv("EFFNB_SWEEP", raising=False)


def look(model):
    """A model is the rise of its loss; every window rises by about that."""
    noise = random.Random(repr(model))
    rise = [model + (noise.gauss(0, 0.02) if model else 0.0) for _ in range(24)]
    losses = tuple(3 + i / 10 + r for i, r in enumerate(rise))
    right = tuple(i % 3 != 0 and (i * 0.01 > model) for i in range(200))
    return Quality(losses, right, int(4 * GIB / (1 + model)), f"text of {model}")


def rtn(model, bits, group):
    return model + 1.0 / 2**bits


def tiny(model, bits):
    return model + 1e-9


def binary(model):
    return model + 1.5


METHODS = {"RTN": rtn, "tiny": tiny, "binary": binary}
KNOBS = {"bits": knob(2, 8, default=4), "group": knob([32, 64])}


def made(**changes):
    seen = []

    def counted(model):
        seen.append(model)
        return look(model)

    options = {"caption": "Quality.", "idle": {"binary": "it keeps the sign alone"}, **KNOBS}
    panel = quality_panel(Subject(0.0, counted), METHODS, **{**options, **changes})
    return panel, seen


def lines(position):
    return dict(line.split(": ", 1) for line in position.text.splitlines())


def test_a_setting_stands_beside_the_original_which_is_looked_at_once():
    panel, seen = made()
    found = lines(panel.at(bits=2))
    lines(panel.at(bits=8))
    assert seen.count(0.0) == 1
    assert len(seen) == 3
    assert float(found["Perplexity"]) > float(found["Original's"])
    assert found["Stored"] == "3.20 MiB"
    assert found["Original's size"] == "4.00 MiB"
    assert found["Now it writes"] == "text of 0.25 …"


def test_worse_and_indistinguishable_are_told_by_the_interval():
    panel, _ = made()
    worse = lines(panel.at(bits=2))
    assert worse["Perplexity is"].startswith("worse, × 1.2")
    assert worse["Answers are"].startswith("worse, −")
    same = lines(panel.at(method="tiny"))
    assert same["Perplexity is"].startswith("indistinguishable")
    assert same["Answers are"].startswith("indistinguishable, +0.0 points")


def test_knobs_that_a_method_ignores_are_greyed():
    panel, _ = made()
    assert panel.at(method="RTN").ignored == {}
    assert panel.at(method="tiny").ignored == {"group": "tiny does not use it"}
    assert panel.at(method="binary").ignored == dict.fromkeys(
        ("bits", "group"), "it keeps the sign alone"
    )


def test_methods_and_knobs_have_to_fit():
    with pytest.raises(ValueError, match="at least one method"):
        quality_panel(Subject(0.0, look), {}, caption="Quality.", **KNOBS)
    with pytest.raises(ValueError, match="'RTN' takes 'group'; the knobs are bits"):
        quality_panel(Subject(0.0, look), {"RTN": rtn}, caption="Q.", bits=knob(2, 8))


def test_one_method_has_no_knob_for_it_and_a_sweep_passes():
    panel = quality_panel(Subject(0.0, look), {"RTN": rtn}, caption="Quality.", **KNOBS)
    assert list(panel.knobs) == ["bits", "group"]
    curves = Curves({"stored": [(1.0, 2.0), (2.0, 1.1)]})
    panel, _ = made(curves=curves)
    assert len(panel.sweep()) == 18
    both = panel.positions.overlaid(panel.at(bits=2), panel.at(bits=3))
    assert both.png != panel.at(bits=2).picture.png


# ------------------------------------------------------------------------------ paired values


def test_pairs_vary_less_than_what_is_paired():
    noise = random.Random(1)
    old = [noise.gauss(4, 1) for _ in range(30)]
    new = [value + 0.1 + noise.gauss(0, 0.05) for value in old]
    found = paired(new, old)
    assert found.low < 0.1 < found.high
    assert found.high - found.low < 0.06
    assert found.outcome() == "worse"
    assert paired(old, new).outcome() == "better"
    assert found.outcome(lower_is_better=False) == "better"
    assert paired(old, old).outcome() == "indistinguishable"


def test_two_models_are_compared_question_by_question():
    before = [True] * 50 + [False] * 50
    same = paired_answers(before, before)
    assert same.difference == 0 and -0.03 < same.low < 0 < same.high < 0.03  # not certain
    after = [True] * 60 + [False] * 40
    gained = paired_answers(after, before)
    assert gained.difference == pytest.approx(0.1) and gained.low > 0
    shuffled = paired_answers(after[::-1], before)  # the same accuracy, other questions
    assert shuffled.difference == pytest.approx(0.1) and shuffled.low < 0
    with pytest.raises(ValueError, match="same questions"):
        paired_answers(after[:-1], before)
    with pytest.raises(ValueError, match="at least two questions"):
        paired_answers(after[:1], before[:1])


def test_windows_of_one_document_count_once():
    old = [0.0] * 8
    new = [1.0, 1.1, 0.9, 1.0, -0.2, -0.1, -0.3, -0.2]
    alone = paired(new, old)
    grouped = paired(new, old, groups=list("aaaabbbb"))
    assert (alone.count, grouped.count) == (8, 2)
    assert grouped.high - grouped.low > 5 * (alone.high - alone.low)
    assert grouped.outcome() == "indistinguishable"


def test_intervals_hold_the_truth_as_often_as_they_say():
    noise = random.Random(3)
    held = 0
    for _ in range(400):
        found = paired([noise.gauss(0.3, 1) for _ in range(12)], [0.0] * 12)
        held += found.low <= 0.3 <= found.high
    assert 0.92 <= held / 400 <= 0.98


@pytest.mark.parametrize(
    ("probability", "freedom", "quantile"),
    [(0.975, 1, 12.7062), (0.975, 11, 2.20099), (0.95, 5, 2.01505), (0.975, 199, 1.97196)],
)
def test_the_quantiles_are_those_of_the_tables(probability, freedom, quantile):
    assert math.isclose(student_quantile(probability, freedom), quantile, rel_tol=1e-4)


def test_unpaired_values_are_refused():
    with pytest.raises(ValueError, match="one length, not 2 and 3"):
        paired([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="at least two independent pairs"):
        paired([1, 2], [1, 2], groups=["a", "a"])
