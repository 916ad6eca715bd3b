"""Span corruption: T5's counts, its compositions, round trips, refusals."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effnb.pretraining import objectives
from effnb.pretraining.objectives import IGNORED

FIRST, END = 32_099, 1


def words(batch=3, time=12, seed=0):
    return torch.randint(2, 1000, (batch, time), generator=torch.Generator().manual_seed(seed))


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def test_568_tokens_become_512_and_114():
    assert objectives.raw_length(512) == (568, 114)
    assert objectives.noise_counts(568) == (85, 28)
    made = objectives.span_corruption(
        words(1, 568), first_sentinel=FIRST, end=END, generator=draws()
    )
    assert (made.inputs.shape[1], made.targets.shape[1]) == (512, 114)
    assert int(made.noise.sum()) == 85
    # 13.6 % of the positions that encoder and decoder read are real tokens to predict
    read = made.inputs.numel() + made.targets.numel()
    assert float(made.noise.sum()) / read == pytest.approx(0.136, abs=5e-4)


def test_equal_lengths_at_one_half():
    text, targets = objectives.raw_length(64, 0.5, 3.0)
    noise = round(text / 2)
    inputs = text - noise + round(noise / 3) + 1
    assert targets <= inputs <= 64


@pytest.mark.parametrize(
    ("length", "counts"),
    [
        (2, (1, 1)),
        (3, (1, 1)),  # round(0.45) is 0, and one at least
        (10, (2, 1)),  # round(1.5) to the even number
        (30, (4, 1)),  # round(4.5) to the even number, round(1.33)
        (50, (8, 3)),  # round(7.5), round(2.67)
        (513, (77, 26)),
    ],
)
def test_counts_are_rounded_as_there(length, counts):
    assert objectives.noise_counts(length) == counts


def test_more_spans_than_text_that_stays_are_not_asked_for():
    assert objectives.noise_counts(10, 0.9, 1.0) == (9, 1)
    assert objectives.noise_mask(10, 0.9, 1.0).int().tolist() == [[0, *[1] * 9]]


def test_the_example_of_the_docstring():
    text = torch.tensor([[10, 11, 12, 13, 14, 15, 16, 17]])
    noise = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1]]).bool()
    made = objectives.span_corruption(text, first_sentinel=99, end=END, sentinels=9, noise=noise)
    assert made.inputs.tolist() == [[10, 11, 99, 14, 15, 98, END]]
    assert made.targets.tolist() == [[99, 12, 13, 98, 16, 17, END]]  # no sentinel at the end


def test_every_composition_is_equally_likely():
    found = Counter(map(tuple, objectives.composition(6, 3, 20_000, draws()).tolist()))
    every = {(a, b, 6 - a - b) for a in range(1, 5) for b in range(1, 6 - a)}
    assert set(found) == every
    expected = 20_000 / len(every)
    chi = sum((n - expected) ** 2 / expected for n in found.values())
    assert chi < 29.6  # 9 degrees of freedom, p = 0.0005


def test_span_lengths_follow_the_formula_and_no_geometric_law():
    lengths = objectives.composition(77, 26, 4000, draws()).flatten()
    for k in (1, 2, 3, 6):
        wanted = math.comb(77 - k - 1, 24) / math.comb(76, 25)
        found = float((lengths == k).float().mean())
        assert found == pytest.approx(wanted, abs=0.01)
    assert float((lengths == 1).float().mean()) == pytest.approx(0.33, abs=0.01)
    assert float(lengths.float().mean()) == pytest.approx(77 / 26)


@given(
    st.integers(2, 60),
    st.floats(0.02, 0.95),
    st.floats(1, 8),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_inputs_and_targets_give_the_text_back(time, rate, mean_span, batch, seed):
    ids = words(batch, time, seed)
    made = objectives.span_corruption(
        ids, rate, mean_span, first_sentinel=FIRST, end=END, generator=draws(seed)
    )
    noise, spans = objectives.noise_counts(time, rate, mean_span)
    assert made.noise.sum(1).tolist() == [noise] * batch
    assert not made.noise[:, 0].any()  # begins with text that stays
    assert made.noise[:, -1].all()  # and ends with noise
    assert made.inputs.shape[1] == time - noise + spans + 1
    assert made.targets.shape[1] == noise + spans + 1
    for row, left, right in zip(ids, made.inputs, made.targets, strict=True):
        back = objectives.restore(left, right, first_sentinel=FIRST, end=END)
        assert torch.equal(back, row)
    marks = [t for t in made.targets[0].tolist() if t > 1000]
    assert marks == list(range(FIRST, FIRST - spans, -1))  # each once, counting down


def test_one_stack_reads_the_inputs_and_writes_the_targets():
    made = objectives.span_corruption(
        words(2, 20), first_sentinel=FIRST, end=END, generator=draws()
    )
    example = made.example()
    size = made.inputs.shape[1]
    assert torch.equal(example.inputs[:, :size], made.inputs)
    assert torch.equal(example.inputs[:, size:], made.targets[:, :-1])
    assert (example.labels[:, : size - 1] == IGNORED).all()
    assert torch.equal(example.labels[:, size - 1 :], made.targets)
    assert example.visible[:, :size, :size].all()
    assert not example.visible[:, :size, size:].any()
    assert example.text_tokens == 40
    assert example.text_targets == int(made.noise.sum())
    assert example.read_tokens == 2 * (size + made.targets.shape[1] - 1)


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda: objectives.noise_counts(1), "at least 2"),
        (lambda: objectives.noise_counts(10, 0.15, 0.5), "at least 1"),
        (lambda: objectives.noise_counts(10, 0.15, math.nan), "mean span is nan"),
        (lambda: objectives.raw_length(3), "need 4 or more"),
        (lambda: objectives.composition(3, 4), "positive parts"),
        (lambda: objectives.composition(3, 0), "into 0 positive"),
        (
            lambda: objectives.span_corruption(
                words(1, 40), 0.5, 1.0, first_sentinel=FIRST, end=END, sentinels=5
            ),
            "20 spans need as many sentinels",
        ),
        (
            lambda: objectives.span_corruption(
                torch.full((1, 9), FIRST), first_sentinel=FIRST, end=END
            ),
            "holds a sentinel",
        ),
        (
            lambda: objectives.span_corruption(
                words(1, 9), first_sentinel=FIRST, end=END, noise=torch.ones(1, 8).bool()
            ),
            "noise has shape",
        ),
        (
            lambda: objectives.span_corruption(
                words(2, 3),
                first_sentinel=FIRST,
                end=END,
                noise=torch.tensor([[0, 1, 1], [0, 0, 1]]).bool(),
            ),
            "do not fit one batch",
        ),
        (
            lambda: objectives.restore(
                torch.tensor([5, FIRST, 6]),
                torch.tensor([FIRST - 1, 7, END]),
                first_sentinel=FIRST,
                end=END,
            ),
            "same ones in the same order",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(attempt, said):
    with pytest.raises(ValueError, match=said) as problem:
        attempt()
    assert str(problem.value).endswith(".")
