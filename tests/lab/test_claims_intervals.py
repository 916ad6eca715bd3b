"""How often intervals hold the truth, and how often decisions are wrong, by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from effnb.lab.claims import crossed, holm, interval, student_point, student_tail

TRIALS = 8_000


def covered(estimate, error, freedom, truth, confidence=0.95):
    """The fraction of many intervals, computed at once, that hold the truth."""
    reach = stats.t.ppf((1 + confidence) / 2, freedom) * error
    return float(np.mean(np.abs(estimate - truth) <= reach))


def planted(rng, seeds, documents, of_seeds, of_documents, trials=TRIALS):
    """Tables of seeds and documents with effects of both, around 0.3."""
    return (
        0.3
        + of_seeds * rng.normal(size=(trials, seeds, 1))
        + of_documents * rng.normal(size=(trials, 1, documents))
        + rng.normal(size=(trials, seeds, documents))
    )


# ---------------------------------------------------------------------------------- Student's t


@pytest.mark.parametrize("freedom", [1, 1.5, 2, 4, 10.7, 29, 200])
def test_students_t_is_that_of_scipy(freedom):
    for confidence in (0.5, 0.95, 0.99, 0.999):
        expected = stats.t.ppf((1 + confidence) / 2, freedom)
        assert student_point(confidence, freedom) == pytest.approx(expected, rel=1e-4)
    for t in (-3, -0.5, 0, 0.7, 2.5, 6):
        assert student_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), rel=1e-3)


def test_an_interval_by_hand():
    # mean 2, s = 1, n = 3: 2 ± 4.30265 / √3, by the tables of Student's t
    low, high = interval([1.0, 2.0, 3.0])
    assert low == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-4)
    assert high == pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-4)


def test_a_crossed_table_by_hand():
    # means of seeds 2, 4; of documents 1.5, 4.5; all residuals 0: MSa = 4, MSb = 9, MSe = 0
    (mean,), (error,), (freedom,) = crossed([np.array([[[0.5, 3.5], [2.5, 5.5]]])])
    assert mean == 3
    assert error == pytest.approx(math.sqrt((4 + 9) / 4))
    assert freedom == pytest.approx((4 + 9) ** 2 / (4**2 + 9**2))


@pytest.mark.parametrize("samples", [[1.0], [], [1.0, math.nan], [1.0, math.inf]])
def test_too_little_to_judge_is_refused(samples):
    with pytest.raises(ValueError, match=r"at least two|not a finite number"):
        interval(samples)


def test_many_skewed_samples_get_nearly_the_interval_of_a_bootstrap():
    """From about 50 samples on, the two agree: there is one kind of interval for all sizes."""
    rng = np.random.default_rng(0)
    for size in (50, 200):
        samples = rng.exponential(2, size=size)
        drawn = samples[rng.integers(size, size=(10_000, size))].mean(1)
        low, high = np.percentile(drawn, [2.5, 97.5])
        assert np.diff(interval(samples))[0] == pytest.approx(high - low, rel=0.06)


# ------------------------------------------------------------------------------------ coverage


@pytest.mark.parametrize("size", [5, 12, 16, 30])
@pytest.mark.parametrize("way", ["repeats", "documents"])
def test_samples_of_one_kind(size, way):
    """Repeated timings, seeds alone and documents alone, where a bootstrap covers 91 % at 12."""
    rng = np.random.default_rng(size)
    shape = (1, size) if way == "documents" else (size, 1)
    estimate, error, freedom = crossed([rng.normal(3, 2, size=(TRIALS, *shape))])
    assert covered(estimate, error, freedom, 3) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("size", [5, 12, 16, 30])
def test_ratios_are_compared_by_their_logarithms(size):
    rng = np.random.default_rng(size)
    slow, fast = (np.exp(rng.normal(m, 0.3, size=(TRIALS, 1, size))) for m in (1.0, 0.4))
    found = crossed([np.log(slow) - np.log(fast)])
    assert covered(*found, 0.6) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("size", [12, 16, 30])
def test_rises_in_per_cent(size):
    rng = np.random.default_rng(size)
    before = rng.uniform(3, 5, size=(TRIALS, 1, size))
    after = before * (1.02 + 0.01 * rng.normal(size=(TRIALS, 1, size)))
    assert covered(*crossed([100 * (after / before - 1)]), 2.0) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("seeds", [5, 8])
@pytest.mark.parametrize("documents", [5, 12, 16, 30])
@pytest.mark.parametrize(
    ("of_seeds", "of_documents"), [(0, 0), (1, 0), (0, 1), (1, 1), (0.2, 0.5), (2, 2)]
)
def test_seeds_crossed_with_documents(seeds, documents, of_seeds, of_documents):
    """Whichever varies more, and where neither does: never much less than 95 %."""
    rng = np.random.default_rng(seeds * documents)
    found = crossed([planted(rng, seeds, documents, of_seeds, of_documents)])
    assert 0.935 <= covered(*found, 0.3) <= 0.997


@pytest.mark.parametrize("documents", [(12, 12), (24, 46), (30, 96)])
@pytest.mark.parametrize("seeds", [1, 5])
@pytest.mark.parametrize("of_seeds", [0, 0.5])
def test_the_difference_of_two_groups_of_documents(documents, seeds, of_seeds):
    rng = np.random.default_rng(sum(documents))
    shared = rng.normal(size=(TRIALS, seeds, 1))  # a seed is good or bad for both groups alike
    first, second = (
        planted(rng, seeds, count, of_seeds if seeds > 1 else 0, 1) + shared for count in documents
    )
    found = crossed([first, second], (1.0, -1.0))
    assert 0.935 <= covered(*found, 0) <= 0.99


def test_a_planted_document_effect_misleads_intervals_over_windows_but_not_these():
    """48 windows of 12 documents: their own effect is half of the windows' deviation, or twice."""
    rng = np.random.default_rng(3)
    for effect, least in ((0.5, 0.05), (2.0, 0.25)):
        windows = rng.normal(size=(TRIALS, 12, 4)) + effect * rng.normal(size=(TRIALS, 12, 1))
        by_window = crossed([windows.reshape(TRIALS, 1, 48)])
        by_document = crossed([windows.mean(2)[:, None, :]])
        assert covered(*by_window, 0) < 0.95 - least
        assert covered(*by_document, 0) == pytest.approx(0.95, abs=0.01)


def test_a_planted_effect_of_the_calibration_draw_misleads_intervals_over_documents_alone():
    rng = np.random.default_rng(4)
    table = planted(rng, 5, 24, 1.0, 0.5)
    assert covered(*crossed([table.mean(1, keepdims=True)]), 0.3) < 0.7
    assert covered(*crossed([table]), 0.3) > 0.935


# --------------------------------------------------------------------------------- many at once


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5]) == [0.5]
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_eight_parts_that_lie_on_their_thresholds_are_rarely_decided():
    rng = np.random.default_rng(5)
    estimate, error, freedom = crossed([rng.normal(size=(8 * 2_000, 5, 12))])
    p = (2 * stats.t.sf(np.abs(estimate / error), freedom)).reshape(2_000, 8)
    assert np.mean(p.min(1) < 0.05) > 0.08  # without a correction
    assert np.mean([min(holm(row)) < 0.05 for row in p.tolist()]) <= 0.055


@pytest.mark.parametrize(
    ("seeds", "groups", "words"),
    [
        ((1, 1), 1, "at least two seeds or two documents"),
        ((3, 4), 2, "the same seeds"),
    ],
)
def test_tables_that_cannot_be_judged_are_refused(seeds, groups, words):
    with pytest.raises(ValueError, match=words):
        crossed([np.zeros((s, 1 if groups == 1 else 3)) for s in seeds[:groups]], (1.0,) * groups)
