"""Uniform formats: exact checks, torch as the oracle, and properties over shapes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effnb.inference.quantization import bits_per_weight, pack, quantize, unpack

SIZES = st.one_of(st.sampled_from(["row", "tensor"]), st.integers(1, 70))


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_packing_loses_nothing_and_wastes_nothing(bits, rows, n, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, n), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, math.ceil(n / 8) * bits)
    assert torch.equal(unpack(packed, bits, n), codes)


def test_packed_layout_by_hand():
    """3 bits: 1 + 2*8 + 3*64 + 4*512 + 5*4096 + 6*2**15 + 7*2**18 = 0x1F58D1, lowest byte first."""
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    assert pack(codes, 3).tolist() == [[0xD1, 0x58, 0x1F]]


@given(st.integers(2, 8), st.booleans(), SIZES, st.integers(1, 6), st.integers(1, 80))
def test_shapes_and_error_bound(bits, symmetric, group_size, rows, columns):
    """Every shape comes back, and no number moves by more than half a step."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    stored = quantize(weight, bits, group_size=group_size, symmetric=symmetric)
    back = stored.dequantize()
    assert back.shape == weight.shape
    per_group = columns if isinstance(group_size, str) else group_size
    steps = stored.scales.float().repeat_interleave(per_group, dim=1)[:, :columns]
    # A step rounded down to half precision may leave the extremes 2^-11 of the range outside.
    slack = steps * 2**bits * 2**-11
    assert ((back - weight).abs() <= steps / 2 + slack + 1e-7).all()
    assert stored.bits_per_weight == bits_per_weight(
        bits, (rows, columns), group_size, symmetric=symmetric
    )


@given(st.integers(2, 8), SIZES)
def test_quantizing_twice_changes_nothing(bits, group_size):
    """The largest magnitude keeps its code, so a symmetric grid finds itself again."""
    weight = torch.randn(3, 48, generator=torch.Generator().manual_seed(bits))
    once = quantize(weight, bits, group_size=group_size, symmetric=True)
    twice = quantize(once.dequantize(), bits, group_size=group_size, symmetric=True)
    assert torch.equal(twice.codes, once.codes)


@given(st.integers(2, 8), SIZES)
def test_grid_points_stay_where_they_are(bits, group_size):
    """Numbers read back from an affine grid have the very codes they were read from."""
    weight = torch.randn(3, 48, generator=torch.Generator().manual_seed(bits))
    stored = quantize(weight, bits, group_size=group_size)
    per_group = 48 if isinstance(group_size, str) else group_size
    spread = lambda x: x.repeat_interleave(per_group, 1)[:, :48]  # noqa: E731
    zeros = unpack(stored.zeros, bits, stored.scales.numel()).view_as(stored.scales).float()
    again = (stored.dequantize() / spread(stored.scales.float())).round() + spread(zeros)
    assert torch.equal(again, stored.integers().float())


@given(st.integers(2, 8), SIZES)
def test_symmetric_grids_are_odd_functions(bits, group_size):
    weight = torch.randn(3, 48, generator=torch.Generator().manual_seed(bits))
    plus = quantize(weight, bits, group_size=group_size, symmetric=True).dequantize()
    minus = quantize(-weight, bits, group_size=group_size, symmetric=True).dequantize()
    assert torch.equal(plus, -minus)


@pytest.mark.parametrize("shift", [-10.0, -0.1, 0.0, 3.0])
def test_affine_grids_hold_zero_exactly(shift):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) + shift
    weight[:, ::5] = 0
    back = quantize(weight, 4, group_size=16).dequantize()
    assert (back[:, ::5] == 0).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_affine_per_row_is_torchs_own(bits):
    """The same rounding, to the bit, given the same scale and zero point."""
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(bits))
    stored = quantize(weight, bits)
    zeros = unpack(stored.zeros, bits, 16).flatten().int()
    theirs = torch.fake_quantize_per_channel_affine(
        weight, stored.scales.flatten().float(), zeros, 0, 0, 2**bits - 1
    )
    # torch multiplies by 1 / s where we divide: a tie may fall either way.
    step = stored.scales.float()
    differ = (theirs - stored.dequantize()).abs() > 1e-6
    assert differ.float().mean() < 1e-3
    assert ((theirs - stored.dequantize()).abs() <= step * 1.001).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_per_row_is_torchs_own(bits):
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(bits))
    stored = quantize(weight, bits, symmetric=True)
    top = 2 ** (bits - 1) - 1
    theirs = torch.fake_quantize_per_channel_affine(
        weight, stored.scales.flatten().float(), torch.zeros(16, dtype=torch.int32), 0, -top, top
    )
    differ = (theirs - stored.dequantize()).abs() > 1e-6
    assert differ.float().mean() < 1e-3


@pytest.mark.parametrize(("symmetric", "expected"), [(True, 0.01160), (False, 0.00829)])
def test_mean_squared_error_on_gaussian_numbers(symmetric, expected):
    """Golden values for 4 bits in groups of 64 (any seed, within half a per cent)."""
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    back = quantize(x, 4, group_size=64, symmetric=symmetric).dequantize()
    assert float((back - x).square().mean()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "expected"),
    [
        (4, 128, True, 4.125),
        (4, 128, False, 4.15625),
        (8, "row", True, 8 + 16 / 256),
        (3, 64, False, 3 + 16 / 64 + 3 / 64),
        (2, 32, True, 2.5),
    ],
)
def test_bits_per_weight_count_scales_and_zeros(bits, group, symmetric, expected):
    stored = quantize(torch.randn(8, 256), bits, group_size=group, symmetric=symmetric)
    assert stored.bits_per_weight == pytest.approx(expected)
    assert stored.bytes == sum(
        t.numel() * t.element_size()
        for t in (stored.codes, stored.scales, stored.zeros)
        if t is not None
    )


def test_rounding_is_half_to_even():
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 7.0]])
    assert quantize(weight, 4, symmetric=True).dequantize().tolist() == [[0, 2, 2, 0, -2, 7]]


@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_and_tiny_groups(symmetric):
    """Groups of zeros stay zero, and numbers below half precision's range do not become NaN."""
    weight = torch.zeros(3, 16)
    weight[1] = 1e-30
    weight[2] = 0.25
    back = quantize(weight, 4, group_size=8, symmetric=symmetric).dequantize()
    assert torch.isfinite(back).all()
    assert (back[0] == 0).all() and (back[1].abs() < 1e-6).all()
    torch.testing.assert_close(back[2], weight[2], rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("weight", "bits", "group", "message"),
    [
        (torch.zeros(2, 2), 1, "row", "bits is 1"),
        (torch.zeros(2, 2), 9, "row", "2 to 8"),
        (torch.zeros(2, 2), 4, 0, "group_size is 0"),
        (torch.zeros(2, 2), 4, -3, "group_size is -3"),
        (torch.tensor([[math.nan, 1.0]]), 4, "row", "1 entries that are NaN or infinite"),
        (torch.tensor([[math.inf, math.nan]]), 4, "row", "2 entries"),
        (torch.full((2, 2), 1e9), 4, "row", "does not fit into half precision"),
        (torch.zeros(4), 4, "row", "only non-empty matrices"),
        (torch.zeros(0, 4), 4, "row", "only non-empty matrices"),
    ],
)
def test_bad_input_is_one_sentence(weight, bits, group, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight, bits, group_size=group)


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="a code of 4 does not fit into 2 bits"):
        pack(torch.tensor([[4]], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="2 bytes do not hold rows of 9 codes of 2 bits; 4 would"):
        unpack(torch.zeros(1, 2, dtype=torch.uint8), 2, 9)
