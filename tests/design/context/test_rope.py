"""RoPE: frequencies, what a rotation keeps, both layouts and the way from one to the other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effnb.design.context import (
    convert_layout,
    convert_projection,
    rope_angles,
    rope_frequencies,
    rotations,
    wavelengths,
)
from effnb.kernels.rope import rope


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def turned(x, inv_freq, positions, **options):
    """One head at each position."""
    x = x.expand(len(positions), -1)[None, None]
    return rope(x, x, inv_freq, positions, **options)[0][0, 0]


@given(st.integers(1, 80), st.sampled_from([100.0, 10_000.0, 500_000.0, 1e6]))
def test_frequencies_are_powers_of_the_base(half, base):
    found = rope_frequencies(2 * half, base, dtype=torch.float64)
    expected = [base ** (-2 * i / (2 * half)) for i in range(half)]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0
    )
    assert found[0] == 1
    assert rope_frequencies(2 * half, base).dtype == torch.float32


def test_wavelengths_and_rotations():
    inv_freq = rope_frequencies(128, dtype=torch.float64)
    assert float(wavelengths(inv_freq)[0]) == pytest.approx(2 * math.pi)
    torch.testing.assert_close(rotations(inv_freq, 4096), 4096 / wavelengths(inv_freq))
    # The fastest point's do not depend on the base: 20.4 in 128 tokens.
    for base in (500.0, 1e4, 1e6):
        assert float(rotations(rope_frequencies(64, base), 128)[0]) == pytest.approx(
            20.37, abs=0.01
        )


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_the_distance_only_and_norms_stay(interleaved):
    q, k = randn(64, seed=1), randn(64, seed=2)
    inv_freq = rope_frequencies(64, dtype=torch.float64)
    at = torch.tensor([0, 10, 100, 1000])
    options = dict(interleaved=interleaved)
    queries, keys = turned(q, inv_freq, at + 5, **options), turned(k, inv_freq, at, **options)
    products = (queries * keys).sum(-1)
    torch.testing.assert_close(products, products[:1].expand(4), rtol=0, atol=1e-12)
    torch.testing.assert_close(queries.norm(dim=-1), q.norm().expand(4), rtol=1e-14, atol=0)
    other = turned(k, inv_freq, at + 1, **options)
    assert abs(float((queries * other).sum(-1)[0] - products[0])) > 0.1


def test_the_product_of_the_specification():
    """Heads of 64 from seed 0, frequencies in float32: 12.2506338567858 at any position."""
    torch.manual_seed(0)
    q, k = torch.randn(64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    inv_freq, at = rope_frequencies(64).double(), torch.tensor([0, 10, 100, 1000])
    products = (turned(q, inv_freq, at + 5) * turned(k, inv_freq, at)).sum(-1)
    torch.testing.assert_close(
        products, torch.full((4,), 12.2506338567858, dtype=torch.float64), rtol=0, atol=2e-13
    )


@given(st.integers(1, 20), st.integers(0, 5000))
def test_layouts_differ_by_an_order_of_numbers_only(half, position):
    x, inv_freq = randn(2 * half), rope_frequencies(2 * half, dtype=torch.float64)
    at = torch.tensor([position])
    halves = convert_layout(x)  # x is interleaved
    assert torch.equal(convert_layout(halves, "interleaved"), x)
    assert torch.equal(halves, torch.cat([x[0::2], x[1::2]]))
    there = turned(x, inv_freq, at, interleaved=True)
    torch.testing.assert_close(
        turned(halves, inv_freq, at), convert_layout(there), rtol=0, atol=1e-12
    )


def test_a_model_keeps_its_scores_when_both_projections_are_converted():
    heads, dim, width = 3, 8, 16
    w_q, w_k, x = (
        randn(heads * dim, width, seed=1),
        randn(heads * dim, width, seed=2),
        randn(9, width),
    )
    bias = randn(heads * dim, seed=3)
    inv_freq = rope_frequencies(dim, dtype=torch.float64)

    def scores(w_q, bias, w_k, interleaved):
        q, k = x @ w_q.T + bias, x @ w_k.T
        q, k = (t.view(1, 9, heads, dim).transpose(1, 2) for t in (q, k))
        q, k = rope(q, k, inv_freq, interleaved=interleaved)
        return q @ k.mT

    want = scores(w_q, bias, w_k, True)
    new = [convert_projection(w, heads) for w in (w_q, bias, w_k)]
    torch.testing.assert_close(scores(*new, False), want)
    assert not torch.allclose(scores(w_q, bias, w_k, False), want, atol=0.5)  # what mixing does
    assert not torch.allclose(scores(*new[:2], w_k, False), want, atol=0.5)
    back = [convert_projection(w, heads, "interleaved") for w in new]
    assert all(torch.equal(a, b) for a, b in zip(back, (w_q, bias, w_k)))


def test_angles_are_float32_for_any_type():
    positions = torch.arange(2048, 2060)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        angles = rope_angles(rope_frequencies(8).to(dtype), positions.to(torch.int32))
        assert angles.dtype == torch.float32 and angles.shape == (12, 4)
        torch.testing.assert_close(angles[:, 0], positions.float(), rtol=0, atol=0)
    # In bfloat16 neighbours beyond 2,048 share an angle, and the error is many radians.
    coarse = positions.bfloat16() * rope_frequencies(8)[0].bfloat16()
    assert len(coarse.unique()) == 2
    assert float((coarse.float() - positions).abs().max()) >= 4
    assert rope_angles(rope_frequencies(8, dtype=torch.float64), positions).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: rope_frequencies(7), "dim is 7"),
        (lambda: rope_frequencies(0), "dim is 0"),
        (lambda: rope_frequencies(8, 1.0), "base is 1.0"),
        (lambda: rope_frequencies(8, math.inf), "base is inf"),
        (lambda: rope_frequencies(8, dtype=torch.bfloat16), "too coarse"),
        (lambda: convert_layout(torch.ones(6), "halves"), "the layout is 'halves'"),
        (lambda: convert_layout(torch.ones(5)), "a head of 5 numbers"),
        (lambda: convert_projection(torch.ones(10, 4), 3), "10 rows do not consist of 3 heads"),
        (lambda: convert_projection(torch.ones(9, 4), 3), "a head of 3 numbers"),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
