"""Runs shared with a datastore, and the parameters that it is worth."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.design.retrieval.leakage import chunk_overlap, matched_lengths
from effnb.design.retrieval.worth import SizeCurve, Worth, fit_log_line, fit_power_law

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=14)


def runs_by_hand(text, store):
    """The longest run from each place that some document holds, by trying all."""
    held = {tuple(d[i:j]) for d in store for i in range(len(d)) for j in range(i + 1, len(d) + 1)}
    return [
        max([n for n in range(len(text) - i + 1) if tuple(text[i : i + n]) in held], default=0)
        for i in range(len(text))
    ]


@settings(max_examples=60, deadline=None)
@given(TOKENS, st.lists(TOKENS, min_size=1, max_size=4), st.integers(1, 15))
def test_runs_are_those_found_by_trying_all(text, store, longest):
    want = [min(n, longest) for n in runs_by_hand(text, [tuple(d) for d in store] + [()])]
    assert matched_lengths(text, store, longest=longest).tolist() == want


def test_no_run_crosses_from_one_document_into_the_next():
    assert matched_lengths([1, 2, 3, 4], [[1, 2], [3, 4]]).tolist() == [2, 1, 2, 1]


def test_overlap_stays_within_its_chunk():
    """The run of 6 is cut at the border of two chunks of 4."""
    text = [9, 1, 2, 3, 4, 5, 6, 8, 7, 7, 7]
    assert chunk_overlap(text, [[1, 2, 3, 4, 5, 6]], chunk=4).tolist() == [0.75, 0.75]
    assert chunk_overlap([1, 2], [[1, 2]], chunk=2).tolist() == [1.0]
    assert chunk_overlap([1, 2], [[3]], chunk=2).tolist() == [0.0]


def test_worth_lies_on_the_curve():
    curve = SizeCurve((1e5, 1e6, 1e7), (5.0, 4.0, 3.5))
    for size, loss in zip(curve.parameters, curve.losses):
        assert math.isclose(curve.worth(loss).parameters, size)
    middle = curve.worth(4.5)
    assert math.isclose(middle.parameters, 10**5.5) and not middle.bound
    assert math.isclose(curve.loss(middle.parameters), 4.5)
    assert math.isclose(middle.ratio(1e5), 10**0.5)


def test_beyond_the_measured_sizes_worth_is_a_bound():
    curve = SizeCurve((1e5, 1e6), (5.0, 4.0))
    assert curve.worth(3.9) == Worth(1e6, "at least")
    assert curve.worth(5.1) == Worth(1e5, "at most")


@settings(max_examples=30, deadline=None)
@given(st.floats(1, 9), st.floats(0.01, 1), st.integers(2, 6))
def test_a_line_and_a_law_are_found_again(start, slope, points):
    sizes = [10.0 * 3**i for i in range(points)]
    line = fit_log_line(sizes, [start - slope * math.log(n) for n in sizes])
    assert math.isclose(line.start, start, abs_tol=1e-6)
    assert math.isclose(line.slope, slope, abs_tol=1e-6)
    assert line.residual < 1e-6
    assert math.isclose(line.at(100) - line.at(200), line.per_doubling, abs_tol=1e-9)
    assert math.isclose(line.entries(line.at(50)), 50, rel_tol=1e-6)
    law = fit_power_law(sizes, [start * n**-slope for n in sizes])
    assert math.isclose(law.exponent, slope, abs_tol=1e-6)
    assert math.isclose(law.parameters(law.loss(77)), 77, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: matched_lengths([], [[1]]), "no text"),
        (lambda: matched_lengths([1], []), "the datastore is empty"),
        (lambda: matched_lengths([1], [[]]), "datastore is empty"),
        (lambda: matched_lengths([1], [[1]], longest=0), "longest is 0"),
        (lambda: chunk_overlap([1, 2], [[1]], chunk=3), "chunk is 3; .* from 1 to 2"),
        (lambda: SizeCurve((1e5,), (5.0,)), "at least two"),
        (lambda: SizeCurve((1e5, 1e6), (5.0,)), "2 sizes and 1 losses"),
        (lambda: SizeCurve((1e5, 1e6), (5.0, 5.1)), "losses must fall"),
        (lambda: SizeCurve((1e6, 1e5), (5.0, 4.1)), "sizes must rise"),
        (lambda: SizeCurve((1e5, 1e6), (5.0, 4.0)).worth(math.nan), "finite"),
        (lambda: SizeCurve((1e5, 1e6), (5.0, 4.0)).loss(1e7), "lie outside"),
        (lambda: Worth(1e6).ratio(0), "parameters is 0"),
        (lambda: fit_log_line([10, 10], [1.0, 2.0]), "two different sizes"),
        (lambda: fit_log_line([10, 0], [1.0, 2.0]), "above 0"),
        (lambda: fit_log_line([10, 20], [1.0, 2.0]).entries(0.5), "does not fall"),
        (lambda: fit_power_law([10, 20], [1.0, -2.0]), "a loss is -2.0"),
        (lambda: fit_power_law([10, 20], [1.0, 2.0]).parameters(0.5), "loss does not fall"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrong()
