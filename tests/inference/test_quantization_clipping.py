"""How much of its numbers a grid covers: closed forms, brute force, and the curve between."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.inference.quantization.clipping import (
    SHRINKS,
    choose_grid,
    gaussian_clip,
    gaussian_error,
    mse_range,
    percentile_range,
    round_to_grid,
)
from effnb.inference.quantization.formats import fake_quantize, quantize
from effnb.inference.quantization.grid import Grid


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Best clip and mean squared error of the symmetric grid on N(0, 1), by numerical search elsewhere.
GOLDEN = {
    2: (1.224, 0.19017),
    3: (1.952, 0.04686),
    4: (2.474, 0.012889),
    5: (2.899, 0.003693),
    6: (3.270, 0.001069),
    8: (3.920, 0.000088),
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_the_best_clip_of_normal_numbers(bits):
    clip, error = GOLDEN[bits]
    assert gaussian_clip(bits) == pytest.approx(clip, abs=6e-4)
    assert gaussian_error(gaussian_clip(bits), bits) == pytest.approx(error, rel=6e-3)


@pytest.mark.parametrize(("bits", "clip"), [(2, 0.7), (3, 2.5), (4, 2.0), (8, 4.5)])
def test_the_closed_form_is_the_integral(bits, clip):
    """A trapezoid sum of (q(x) - x)^2 times the density; the grid itself does the rounding."""
    x = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    step = torch.tensor(clip / (2 ** (bits - 1) - 1), dtype=torch.float64)
    error = (step * round_to_grid(x, step, None, bits) - x).square()
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    expected = float(torch.trapezoid(error * density, x))
    assert gaussian_error(clip, bits) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
def test_searching_finds_the_closed_form(bits):
    """On 200,000 normal numbers the search ends at the best clip, up to its one per cent grid."""
    x = randn(1, 200_000)
    stored = quantize(x, bits, symmetric=True, clip="mse")
    reach = float(stored.scales) * (2 ** (bits - 1) - 1)
    assert reach == pytest.approx(gaussian_clip(bits), abs=0.06)
    error = float((stored.dequantize() - x).square().mean())
    assert error == pytest.approx(GOLDEN[bits][1], rel=0.01)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("exponent", [2.0, 2.4])
def test_searching_finds_the_least_error_of_all_tried(symmetric, exponent):
    """Brute force over all shares, one row at a time, through the public rounding."""
    weight = randn(5, 48, seed=3)
    found = fake_quantize(weight, 3, symmetric=symmetric, clip="mse", exponent=exponent)
    gained = 0
    for row, best in zip(weight, found, strict=True):
        errors = []
        for share in SHRINKS:
            ends = share * torch.stack([row.min(), row.max()])
            scale, zero = choose_grid(ends, Grid(3, symmetric=symmetric), half_scales=False)
            q = round_to_grid(row, scale, zero, 3)
            back = scale * (q if zero is None else q - zero)
            errors.append(float((back - row).abs().pow(exponent).sum()))
        assert float((best - row).abs().pow(exponent).sum()) == pytest.approx(min(errors), rel=1e-5)
        gained += min(errors) < errors[0]
    assert gained >= 3  # of the five rows, clipping helps most


def test_the_exponent_weighs_outliers():
    """A higher power of the error keeps more of the range."""
    weight = randn(64, 256, seed=1) ** 3
    reach = [
        float(quantize(weight, 3, symmetric=True, clip="mse", exponent=a).scales.float().mean())
        for a in (1.0, 2.0, 2.4, 6.0)
    ]
    assert reach == sorted(reach) and reach[1] < reach[2]


@pytest.mark.parametrize("group_size", ["tensor", "row", 16, 13])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_searching_is_never_worse_than_the_extremes(bits, symmetric, group_size):
    weight = randn(8, 64, seed=bits)
    how = {"group_size": group_size, "symmetric": symmetric}
    errors = [
        float((fake_quantize(weight, bits, clip=clip, **how) - weight).square().sum())
        for clip in ("minmax", "mse")
    ]
    assert errors[1] <= errors[0] * (1 + 1e-6)


def test_the_error_falls_and_rises_with_the_clip():
    """The U-shaped curve: rounding dominates on one side, clipping on the other."""
    x = randn(1, 50_000, seed=2)
    errors = [
        float((fake_quantize(x, 4, symmetric=True, clip="percentile", percentile=p) - x)
              .square().mean())
        for p in (70.0, 90.0, 98.5, 99.9, 100.0)
    ]  # fmt: skip
    assert errors[0] > errors[1] > errors[2] < errors[3] < errors[4]


@settings(max_examples=30)
@given(st.integers(1, 40), st.floats(1, 100), st.booleans())
def test_percentiles_are_torchs_quantiles(n, percentile, symmetric):
    x = randn(3, n, seed=n)
    ends = percentile_range(x, percentile, symmetric)
    share = percentile / 100
    if symmetric:
        expected = torch.quantile(x.abs(), torch.tensor([share]), dim=1).T
    else:
        expected = torch.quantile(x, torch.tensor([(1 - share) / 2, (1 + share) / 2]), dim=1).T
    torch.testing.assert_close(ends, expected, rtol=1e-4, atol=1e-5)


def test_a_percentile_leaves_out_so_many():
    x = randn(1, 100_000)
    low, high = percentile_range(x, 90.0, False)[0].tolist()
    assert float(((x < low) | (x > high)).float().mean()) == pytest.approx(0.1, abs=1e-4)
    assert float((x < low).float().mean()) == pytest.approx(0.05, abs=1e-4)
    (reach,) = percentile_range(x, 90.0, True)[0].tolist()
    assert float((x.abs() > reach).float().mean()) == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_whole_percentile_is_min_and_max(symmetric):
    weight = randn(4, 40)
    for group_size in ("tensor", "row", 7):
        how = {"group_size": group_size, "symmetric": symmetric}
        everything = quantize(weight, 4, clip="percentile", percentile=100.0, **how)
        assert torch.equal(everything.dequantize(), quantize(weight, 4, **how).dequantize())


@pytest.mark.parametrize("clip", ["percentile", "mse"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_zeros_and_constants_survive(clip, symmetric):
    weight = torch.stack([torch.zeros(16), torch.full((16,), 0.5), torch.full((16,), -3.0)])
    back = quantize(weight, 4, symmetric=symmetric, clip=clip).dequantize()
    torch.testing.assert_close(back, weight, rtol=1e-3, atol=0)


def test_ranges_that_are_tried_keep_their_sign():
    """One-signed numbers: the grid still holds 0, and only the far end moves."""
    ends = mse_range(randn(3, 64).abs() + 1, Grid(4, clip="mse"))
    assert (ends[:, 0] > 0).all() and (ends[:, 1] > ends[:, 0]).all()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"clip": "kl"}, 'clip is \'kl\'; it must be "minmax", "percentile" or "mse"'),
        ({"percentile": 0.0}, "percentile is 0.0; it must lie above 0 and at most at 100"),
        ({"percentile": 100.5}, "percentile is 100.5"),
        ({"percentile": math.nan}, "percentile is nan"),
        ({"exponent": 0.0}, "exponent is 0.0; it must be above 0"),
        ({"exponent": math.nan}, "exponent is nan"),
    ],
)
def test_bad_input_is_one_sentence(how, message):
    with pytest.raises(ValueError, match=message):
        quantize(torch.ones(2, 2), 4, **how)
    with pytest.raises(ValueError, match=message):
        Grid(4, symmetric=True, **how)


def test_closed_form_refuses_what_has_none():
    with pytest.raises(ValueError, match=r"clip is 0\.0; it must be above 0"):
        gaussian_error(0.0, 4)
    with pytest.raises(ValueError, match="bits is 1"):
        gaussian_clip(1)
