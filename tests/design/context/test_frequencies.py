"""The tables of all methods: closed forms, limits, the papers' numbers, and what goes wrong."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effnb.design.context import (
    attention_factor,
    code_ramp,
    code_range,
    dynamic_ntk_frequencies,
    dynamic_scale,
    interpolation_error_bound,
    ntk_aware_base,
    ntk_aware_frequencies,
    ntk_by_parts_frequencies,
    paper_ramp,
    position_interpolation_frequencies,
    rope_frequencies,
    rotations,
    temperature,
    transformers_scale,
)
from effnb.kernels.rope import rope

FACTORS = st.floats(1.0, 64.0)
HALVES = st.integers(2, 64)
FIXED = {
    "position interpolation": position_interpolation_frequencies,
    "ntk-aware": ntk_aware_frequencies,
    "by parts, code": lambda f, s: ntk_by_parts_frequencies(f, s, 512),
    "by parts, paper": lambda f, s: ntk_by_parts_frequencies(f, s, 512, ramp="paper"),
    "dynamic": lambda f, s: dynamic_ntk_frequencies(f, round(512 * s), 512),
}


def double(dim, base=10_000.0):
    return rope_frequencies(dim, base, dtype=torch.float64)


@pytest.mark.parametrize("name", FIXED)
@given(HALVES, st.sampled_from([100.0, 1e4, 1e6]))
def test_a_factor_of_1_is_rope_itself(name, half, base):
    for inv_freq in (rope_frequencies(2 * half, base), double(2 * half, base)):
        assert torch.equal(FIXED[name](inv_freq, 1.0), inv_freq)


@pytest.mark.parametrize("name", FIXED)
@given(HALVES, FACTORS)
def test_every_point_lies_between_interpolation_and_no_change(name, half, factor):
    inv_freq = rope_frequencies(2 * half)
    found = FIXED[name](inv_freq, factor)
    assert found.dtype == torch.float32 and found.shape == inv_freq.shape
    ratio = (found / inv_freq).double()
    rounded = round(512 * factor) / 512 if name == "dynamic" else factor
    assert bool((ratio <= 1 + 1e-6).all() and (ratio >= 1 / rounded - 1e-6).all())
    # Never is a slower point slowed less than a faster one.
    assert bool((ratio.diff() <= 1e-6).all())


# --- position interpolation


@given(HALVES, FACTORS, st.integers(0, 100))
def test_squeezed_positions_are_divided_frequencies(half, factor, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 50, 2 * half, generator=generator, dtype=torch.float64)
    inv_freq, positions = double(2 * half), torch.arange(50)
    by_frequency = rope(q, k, position_interpolation_frequencies(inv_freq, factor), positions)
    by_position = rope(q, k, inv_freq, positions.double() / factor)
    for a, b in zip(by_frequency, by_position):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    if factor > 1.5:  # both at once is a mistake, and shows
        twice = rope(
            q, k, position_interpolation_frequencies(inv_freq, factor), positions.double() / factor
        )
        assert not torch.allclose(twice[0], by_frequency[0], atol=1e-2)


def test_in_float32_both_agree_to_rounding():
    q = torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(0))
    inv_freq, positions = rope_frequencies(32), torch.arange(64)
    a, _ = rope(q, q, position_interpolation_frequencies(inv_freq, 4.0), positions)
    b, _ = rope(q, q, inv_freq, positions / 4)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [8, 32, 64, 128])
def test_the_bound_on_interpolated_scores_holds_where_the_printed_one_does_not(dim):
    inv_freq, x = double(dim), torch.linspace(0, 1, 501, dtype=torch.float64)
    score = (x[:, None] * inv_freq).cos().sum(1)  # all products 1
    error = float((score - (1 - x) * score[0] - x * score[-1]).abs().max())
    printed = dim / (32 * math.log(10_000))
    assert printed < error <= interpolation_error_bound(inv_freq)
    assert 32 * math.log(10_000) == pytest.approx(294.73, abs=0.005)


@given(HALVES, st.integers(0, 1000), st.integers(0, 200))
def test_the_bound_holds_for_any_products(half, seed, start):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(half, generator=generator, dtype=torch.complex128)
    inv_freq = double(2 * half)
    x = start + torch.linspace(0, 1, 41, dtype=torch.float64)
    score = (h * torch.exp(1j * x[:, None] * inv_freq)).sum(1).real
    weight = x - start
    error = (score - (1 - weight) * score[0] - weight * score[-1]).abs().max()
    assert float(error) <= interpolation_error_bound(inv_freq, float(h.abs().max())) + 1e-12


# --- NTK-aware and dynamic


@given(HALVES, FACTORS, st.sampled_from([100.0, 1e4, 1e6]))
def test_the_ends_of_ntk_aware_scaling_are_exact(half, factor, base):
    inv_freq = double(2 * half, base)
    found = ntk_aware_frequencies(inv_freq, factor)
    assert found[0] == inv_freq[0]
    torch.testing.assert_close(found[-1], inv_freq[-1] / factor, rtol=1e-14, atol=0)
    by_base = double(2 * half, ntk_aware_base(base, factor, 2 * half))
    torch.testing.assert_close(found, by_base, rtol=1e-12, atol=0)


def test_the_exponent_is_neither_1_nor_half_the_dimension():
    """Toy heads exaggerate it: 1.333 for 8 numbers, 1.016 for 128."""
    for dim, exponent in ((8, 4 / 3), (128, 128 / 126)):
        assert math.log(ntk_aware_base(1e4, 4.0, dim) / 1e4, 4) == pytest.approx(exponent)
        inv_freq = double(dim)
        for wrong in (1.0, dim / 2):
            last = double(dim, 1e4 * 4**wrong)[-1]
            assert abs(float(last / (inv_freq[-1] / 4)) - 1) > 0.005
    # What a base of a million is, for heads of 128 numbers trained with ten thousand.
    assert ntk_aware_base(1e4, 100 ** (126 / 128), 128) == pytest.approx(1e6)
    assert ntk_aware_base(1e4, 93.0572, 128) == pytest.approx(1e6, rel=1e-6)


def test_the_dynamic_scale_follows_the_length():
    found = dynamic_scale(torch.tensor([1, 511, 512, 513, 1024, 5120]), 512)
    assert found.tolist() == [1, 1, 1, 513 / 512, 2, 10]
    inv_freq = double(32)
    rows = dynamic_ntk_frequencies(inv_freq, torch.tensor([[100, 1024], [2048, 3000]]), 512)
    assert rows.shape == (2, 2, 16)
    assert torch.equal(rows[0, 0], inv_freq)
    torch.testing.assert_close(rows[1, 0], ntk_aware_frequencies(inv_freq, 4.0), rtol=1e-14, atol=0)


def test_the_scale_of_transformers_dynamic_is_another():
    """f² - f + 1 at f times the length: 13 for 4 and 57 for 8; ours only with a factor of 1."""
    assert transformers_scale(4 * 512, 512, 4) == 13
    assert transformers_scale(8 * 512, 512, 8) == 57
    for length in (100, 512, 700, 5000):
        assert transformers_scale(length, 512, 1) == float(dynamic_scale(length, 512))


# --- NTK-by-parts and YaRN


def test_the_published_ramp_is_not_the_paper_s():
    """Heads of 64, 2,048 tokens: at point 12, of 10.3 rotations, 0.692 against 0.300."""
    inv_freq = double(64)
    assert code_range(64, 10_000.0, 2048) == (8, 21)
    assert float(rotations(inv_freq, 2048)[12]) == pytest.approx(10.3, abs=0.05)
    assert float(code_ramp(inv_freq, 2048)[12]) == pytest.approx(0.692, abs=5e-4)
    assert float(paper_ramp(inv_freq, 2048)[12]) == pytest.approx(0.300, abs=5e-4)
    for factor, apart in ((2, 0.25), (4, 0.44), (8, 0.59)):
        code, paper = (
            ntk_by_parts_frequencies(inv_freq, factor, 2048, ramp=ramp)
            for ramp in ("code", "paper")
        )
        assert float((1 - paper / code).max()) == pytest.approx(apart, abs=0.006)
        assert torch.equal(code[:6], paper[:6]) and torch.equal(code[-8:], paper[-8:])


def test_how_many_points_the_paper_s_ramp_leaves_alone():
    """Heads of 128, 4,096 tokens: 21 untouched, 25 within the ramp, 18 interpolated."""
    gamma = paper_ramp(double(128), 4096)
    counts = [
        int((gamma == 1).sum()),
        int(((gamma > 0) & (gamma < 1)).sum()),
        int((gamma == 0).sum()),
    ]
    assert counts == [21, 25, 18]


@pytest.mark.parametrize("ramp", ["paper", "code"])
@given(HALVES, FACTORS, st.integers(64, 8192))
def test_limits_of_the_ramp(ramp, half, factor, length):
    inv_freq = double(2 * half)
    found = ntk_by_parts_frequencies(inv_freq, factor, length, ramp=ramp)
    r = rotations(inv_freq, length)
    alone, squeezed = r >= 32, r <= 1
    if ramp == "code":  # its ends are rounded outwards, so those beyond are as said
        low, high = code_range(2 * half, 10_000.0, length)
        index = torch.arange(half)
        alone, squeezed = index <= low, index >= high
        if low == high:
            squeezed = index > high
        if r[0] < 32:  # clamped: the fastest point is alone whatever it rotates
            assert low == 0
    torch.testing.assert_close(found[alone], inv_freq[alone], rtol=1e-15, atol=0)
    torch.testing.assert_close(found[squeezed], inv_freq[squeezed] / factor, rtol=1e-14, atol=0)


def test_a_short_context_leaves_no_point_alone():
    """Below 2π · 32 = 201 tokens: the paper's ramp is then close to Position Interpolation."""
    inv_freq = double(64)
    assert float(paper_ramp(inv_freq, 202)[0]) == 1
    assert float(paper_ramp(inv_freq, 200)[0]) < 1
    assert float(paper_ramp(inv_freq, 128)[0]) == pytest.approx((128 / 2 / math.pi - 1) / 31)
    assert float(paper_ramp(inv_freq, 128, beta=16)[0]) == 1
    assert int((paper_ramp(inv_freq, 20) > 0.1).sum()) == 0


def test_the_base_is_read_from_the_frequencies():
    for base in (500.0, 1e4, 1e6):
        inv_freq = rope_frequencies(64, base)
        by_base = code_ramp(inv_freq, 2048, base=base)
        torch.testing.assert_close(code_ramp(inv_freq, 2048), by_base, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="one ratio"):
        code_ramp(ntk_by_parts_frequencies(rope_frequencies(64), 4.0, 2048), 2048)
    ends = code_range(64, 1e4, 2048, truncate=False)
    assert ends == (pytest.approx(8.06, abs=0.01), pytest.approx(20.11, abs=0.01))


def test_the_factors_of_yarn():
    said = {2: 1.0693, 4: 1.1386, 8: 1.2079, 16: 1.2773, 32: 1.3466}
    for factor, expected in said.items():
        assert attention_factor(factor) == pytest.approx(expected, abs=5e-5)
        # Scores grow by its square, so attention gets sharper; t itself is below 1.
        assert temperature(factor) == pytest.approx(1 / attention_factor(factor) ** 2)
        assert temperature(factor, version=1) == pytest.approx(1 / temperature(factor))
    assert attention_factor(2) ** 2 == pytest.approx(1.143, abs=5e-4)
    assert attention_factor(32) ** 2 == pytest.approx(1.813, abs=5e-4)
    assert attention_factor(4) ** 2 == pytest.approx(1.2965, abs=5e-5)
    assert attention_factor(1) == attention_factor(0.5) == 1


def test_both_queries_and_keys_carry_the_factor():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 9, 16, generator=generator, dtype=torch.float64)
    inv_freq, c = double(16), attention_factor(4)
    plain_q, plain_k = rope(q, k, inv_freq)
    q_c, k_c = rope(q, k, inv_freq, scaling=c)
    torch.testing.assert_close(q_c @ k_c.mT, c**2 * plain_q @ plain_k.mT)
    assert not torch.allclose(q_c @ plain_k.mT, c**2 * plain_q @ plain_k.mT, atol=0.1)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda f: position_interpolation_frequencies(f, 0.5), "factor is 0.5"),
        (lambda f: ntk_aware_frequencies(f, math.nan), "factor is nan"),
        (lambda f: ntk_aware_frequencies(f, math.inf), "factor is inf"),
        (lambda f: ntk_aware_frequencies(f[:1], 2.0), "2 rotated numbers"),
        (lambda f: ntk_aware_base(1e4, 2.0, 5), "5 rotated numbers"),
        (lambda f: dynamic_ntk_frequencies(f[:1], 9, 4), "have 2 rotated numbers"),
        (lambda f: ntk_by_parts_frequencies(f, 0.99, 512), "factor is 0.99"),
        (lambda f: ntk_by_parts_frequencies(f, 2.0, 512, ramp="line"), "ramp is 'line'"),
        (lambda f: ntk_by_parts_frequencies(f, 2.0, 0), "trained_length is 0"),
        (lambda f: ntk_by_parts_frequencies(f, 2.0, 512, alpha=32.0), "alpha is 32.0"),
        (lambda f: paper_ramp(f, 512, 0.0, 1.0), "alpha is 0.0"),
        (lambda f: attention_factor(0.0), "factor is 0.0"),
        (lambda f: temperature(2.0, version=0), "version is 0"),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call(rope_frequencies(16))
