import copy
from dataclasses import dataclass

import pytest

from effnb.evaluation.cost import Cost, Timing
from effnb.lab.cards import _UNITS, _ratio_of_rounds, cost_card

BEFORE = Cost(5_000_000, 20 * 2**20, 1.2e7, 0.080, 100.0, 3 * 2**20, "cpu")
AFTER = Cost(5_000_000, 5 * 2**20, 1.2e7, 0.1204, 170.0, None, "cpu")


def rows(card):
    return {title: cells for title, *cells in card.rows}


def test_units_and_ratios_are_in_words():
    found = rows(cost_card(BEFORE, AFTER))
    assert found == {
        "Parameters": ["5 million", "5 million", "the same"],
        "File size": ["20 MiB", "5 MiB", "4× smaller"],
        "FLOPs per token": ["12 million", "12 million", "the same"],
        "Prefill": ["80 ms", "120 ms", "1.5× slower"],
        "Decode": ["100 tokens/s", "170 tokens/s", "1.7× faster"],
        "Peak memory": ["3 MiB", "not measured", "—"],
    }


def test_what_both_share_is_a_note():
    card = cost_card(BEFORE, AFTER)
    assert card.note == "Device: cpu."
    assert "Device: cpu." in str(card)
    there = Cost(*[getattr(AFTER, n) for n in list(Cost.__dataclass_fields__)[:-1]], "cuda")
    assert rows(cost_card(BEFORE, there))["Device"] == ["cpu", "cuda", ""]


def test_the_table_is_for_eyes_and_ears():
    page = cost_card(BEFORE, AFTER, ("32 bits", "<4 bits>"))._repr_html_()
    assert 'scope="col"' in page
    assert 'scope="row"' in page
    assert "&lt;4 bits&gt;" in page
    assert "4× smaller" in page
    text = str(cost_card(BEFORE, AFTER))
    assert len({line.find("ratio") for line in text.splitlines()[:1]}) == 1
    assert text.splitlines()[2].index("4×") == text.splitlines()[0].index("ratio")


@dataclass
class Work:
    steps: int
    train_seconds: float
    energy_joules: float
    requests_per_second: float


def test_any_dataclass_will_do():
    found = rows(cost_card(Work(1000, 3e-5, 2.0, 4e6), Work(2, 90.0, 2.01, 1e3)))
    assert found == {
        "Steps": ["1 thousand", "2", "500× fewer"],
        "Train": ["30 µs", "90 s", "3,000,000× slower"],
        "Energy": ["2 J", "2.01 J", "about the same"],
        "Requests": ["4 million per second", "1 thousand per second", "4,000× slower"],
    }
    assert rows(cost_card(Work(0, 1, 1, 1), Work(5, 1, 1, 1)))["Steps"] == ["0", "5", "—"]


def test_two_of_a_kind_are_needed():
    with pytest.raises(TypeError, match="compares two of a kind, not a Cost with a Work"):
        cost_card(BEFORE, Work(1, 1, 1, 1))


# ------------------------------------------------------------------------------ in turns


def test_models_are_timed_in_turns(monkeypatch, llama, ids):
    """A machine that slows down for a while slows both: the ratio stays what it is."""
    import effnb.evaluation as evaluation
    from effnb.lab import compare_costs

    order = []

    def latency(function, **_):
        order.append(function.__defaults__[0])
        slow = 10.0 if len(order) > 6 else 1.0
        return Timing(0.02 * slow * (2 if order[-1] is llama else 1), 0, 0, 1)

    monkeypatch.setattr(evaluation, "latency", latency)
    monkeypatch.setattr(
        evaluation,
        "decode_tokens_per_second",
        lambda model, *_, **__: next(noise) * (1 if model is llama else 1.001),
    )
    noise = iter([100.0, 90.0, 80.0, 110.0, 95.0, 100.0, 90.0, 120.0, 100.0, 90.0] * 3)
    other = copy.deepcopy(llama)
    found = rows(compare_costs(llama, other, ids[:1], rounds=5, labels=("a", "b")))
    assert [model is llama for model in order] == [bool(int(i)) for i in "1001100110"]
    assert found["Prefill"][2] == "2× faster"
    assert found["Parameters"][2] == "the same"


def test_rounds_that_disagree_are_about_the_same():
    seconds = _UNITS["seconds"]
    assert _ratio_of_rounds([1, 1, 1, 1], [1.2, 0.9, 1.3, 0.8], seconds) == "about the same"
    assert _ratio_of_rounds([1, 1, 1, 1], [1.2, 1.1, 1.3, 1.2], seconds) == "1.2× slower"
    rate = _UNITS["tokens_per_second"]
    assert _ratio_of_rounds([10, 5, 8], [20, 10, 16], rate) == "2× faster"


def test_real_models_are_measured(llama, ids):
    from effnb.lab import compare_costs

    card = compare_costs(llama, llama, ids[:1], rounds=3, decode_tokens=2)
    assert "Times: medians of 3 rounds, both models in turns." in card.note
    assert rows(card)["Parameters"][2] == "the same"
    with pytest.raises(ValueError, match="at least 3"):
        compare_costs(llama, llama, ids[:1], rounds=1)
