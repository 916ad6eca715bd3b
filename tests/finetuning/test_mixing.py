"""The rates of a mixture, and batches that follow them."""

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from effnb.finetuning.mixing import mixed_batches, mixing_rates

SIZES = {"large": 8_000, "middle": 800, "small": 80}


def test_the_equation():
    assert mixing_rates(SIZES) == pytest.approx({m: e / 8_880 for m, e in SIZES.items()})
    assert mixing_rates(SIZES, cap=1) == pytest.approx(dict.fromkeys(SIZES, 1 / 3))
    capped = mixing_rates(SIZES, cap=800)
    assert capped == pytest.approx({"large": 800 / 1680, "middle": 800 / 1680, "small": 80 / 1680})
    assert mixing_rates(SIZES, temperature=math.inf) == pytest.approx(dict.fromkeys(SIZES, 1 / 3))
    roots = {m: e**0.5 for m, e in SIZES.items()}
    total = sum(roots.values())
    found = mixing_rates(SIZES, temperature=2)
    assert found == pytest.approx({m: r / total for m, r in roots.items()})
    huge = mixing_rates({"a": 10**200, "b": 10**200})
    assert huge == pytest.approx({"a": 0.5, "b": 0.5})


@given(
    st.dictionaries(st.text(max_size=3), st.integers(1, 10**9), min_size=1, max_size=6),
    st.one_of(st.none(), st.integers(1, 10**9)),
    st.floats(1, 100),
)
@examples(max_examples=50, deadline=None)
def test_rates_add_up_and_keep_the_order(sizes, cap, temperature):
    rates = mixing_rates(sizes, cap=cap, temperature=temperature)
    assert math.isclose(sum(rates.values()), 1, rel_tol=1e-9)
    by_size = sorted(sizes, key=sizes.get)
    assert all(rates[a] <= rates[b] + 1e-12 for a, b in pairwise(by_size))
    hotter = mixing_rates(sizes, cap=cap, temperature=2 * temperature)
    assert max(hotter.values()) <= max(rates.values()) + 1e-12


def test_batches_follow_the_rates_and_go_round():
    tasks = {"a": list(range(5)), "b": list(range(100, 400))}
    batch = mixed_batches(tasks, {"a": 0.25, "b": 0.75}, size=8, seed=3)
    rows = [row for step in range(250) for row in batch(step)]
    share = sum(name == "a" for name, _ in rows) / len(rows)
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / len(rows)) ** 0.5
    mine = [row for name, row in rows if name == "a"]
    for start in range(0, len(mine) - 5, 5):  # every example once before any comes again
        assert sorted(mine[start : start + 5]) == tasks["a"]
    assert len({tuple(mine[s : s + 5]) for s in range(0, 50, 5)}) > 1
    assert len({row for name, row in rows if name == "b"}) == 300
    again = mixed_batches(tasks, {"a": 0.25, "b": 0.75}, size=8, seed=3)
    assert again(200) == batch(200)  # whatever was asked before
    other = mixed_batches(tasks, {"a": 0.25, "b": 0.75}, size=8, seed=4)
    assert [other(s) for s in range(5)] != [batch(s) for s in range(5)]
    never = mixed_batches({"a": [1], "b": []}, {"a": 1.0, "b": 0.0}, size=4)
    assert Counter(never(0)) == {("a", 1): 4}


def test_bad_input():
    for given_, message in [
        (({},), "no task to mix"),
        (({"a": 0},), "'a' has no examples"),
    ]:
        with pytest.raises(ValueError, match=message):
            mixing_rates(*given_)
    for how, message in [
        ({"cap": 0}, "cap is 0; it must be at least 1"),
        ({"temperature": 0.5}, "temperature is 0.5; it must be at least 1"),
        ({"temperature": math.nan}, "temperature is nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            mixing_rates(SIZES, **how)
    for tasks, rates, size, message in [
        ({"a": [1]}, {"b": 1.0}, 1, "'a' is in one of them only"),
        ({"a": [1]}, {"a": 1.0}, 0, "size is 0"),
        ({"a": [1]}, {"a": 0.9}, 1, "add up to 1"),
        ({"a": [1], "b": [1]}, {"a": 1.5, "b": -0.5}, 1, "at least 0"),
        ({"a": []}, {"a": 1.0}, 1, "'a' has a rate, but no examples"),
    ]:
        with pytest.raises(ValueError, match=message):
            mixed_batches(tasks, rates, size)
