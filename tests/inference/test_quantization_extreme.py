"""Binary and ternary weights: levels, shares, best scales, and bytes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.inference.quantization.extreme import (
    BinaryTensor,
    TernaryTensor,
    binarize,
    pack_digits,
    ternarize,
    unpack_digits,
)
from effnb.inference.quantization.stored import from_parts


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30)
@given(st.sampled_from([(3, 5), (4, 4), (2, 8)]), st.integers(1, 60), st.integers(0, 99))
def test_digits_come_back_and_waste_less_than_a_byte(layout, n, seed):
    base, per_byte = layout
    digits = torch.randint(0, base, (n,), generator=torch.Generator().manual_seed(seed))
    packed = pack_digits(digits.to(torch.uint8), base, per_byte)
    assert packed.numel() == math.ceil(n / per_byte)
    assert unpack_digits(packed, base, per_byte, n).tolist() == digits.tolist()


def test_packed_layout_by_hand():
    """1 + 2*3 + 0*9 + 1*27 + 2*81 = 196; 1 + 2*4 + 0*16 + 1*64 = 73."""
    digits = torch.tensor([1, 2, 0, 1, 2], dtype=torch.uint8)
    assert pack_digits(digits, 3, 5).tolist() == [196]
    assert pack_digits(digits, 4, 4).tolist() == [73, 2]


def test_bitnet_by_its_equation():
    weight = randn(16, 24)
    gamma = weight.abs().mean()
    stored = ternarize(weight)
    assert torch.equal(stored.dequantize(), gamma * (weight / gamma).round().clamp(-1, 1))
    assert set(stored.integers().unique().tolist()) == {-1, 0, 1}
    assert stored.scales.shape == (1, 1)  # one gamma for the whole matrix


def test_share_of_zeros_on_normal_weights():
    """P(|w| < gamma / 2) = erf(sqrt(2 / pi) / 2 / sqrt(2)) = 0.3101."""
    share = math.erf(math.sqrt(2 / math.pi) / 2 / math.sqrt(2))
    assert share == pytest.approx(0.3101, abs=1e-4)
    zeros = (ternarize(randn(512, 512)).integers() == 0).float().mean()
    assert float(zeros) == pytest.approx(share, abs=3e-3)


@pytest.mark.parametrize("group_size", ["tensor", "row"])
def test_twn_by_its_equation(group_size):
    weight = randn(6, 50) * torch.logspace(-1, 1, 6)[:, None]
    stored = ternarize(weight, method="twn", group_size=group_size)
    for row, (values, back) in enumerate(zip(weight, stored.dequantize(), strict=True)):
        of = weight.flatten() if group_size == "tensor" else weight[row]
        threshold = 0.7 * of.abs().mean()
        alpha = of[of.abs() > threshold].abs().mean()
        expected = torch.where(values.abs() > threshold, alpha * values.sign(), 0.0)
        torch.testing.assert_close(back, expected, rtol=1e-6, atol=1e-7)


def test_twns_scale_is_the_best_for_its_codes():
    """alpha is the least-squares fit: the error is orthogonal to the codes."""
    weight = randn(8, 64)
    stored = ternarize(weight, method="twn", group_size="row")
    error = weight - stored.dequantize()
    assert (error * stored.integers()).sum(1).abs().max() < 1e-4


@pytest.mark.parametrize("group_size", ["tensor", "row"])
def test_binary_by_its_equation_and_best_of_all_scales(group_size):
    weight = randn(6, 50)
    weight[0, 0] = 0
    stored = binarize(weight, group_size=group_size)
    alpha = weight.abs().mean(1, keepdim=True) if group_size == "row" else weight.abs().mean()
    signs = torch.where(weight < 0, -1.0, 1.0)
    torch.testing.assert_close(stored.dequantize(), alpha * signs)
    error = (weight - stored.dequantize()).square().sum()
    for factor in (0.97, 1.03):
        assert (weight - factor * stored.dequantize()).square().sum() > error
    # Known in closed form: ||W - alpha sign(W)||^2 = ||W||^2 - n alpha^2.
    expected = weight.square().sum() - (alpha.square() * torch.ones_like(weight)).sum()
    torch.testing.assert_close(error, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("stored", "bits"),
    [
        (lambda w: ternarize(w), 1.6),
        (lambda w: ternarize(w, packing="two_bits"), 2.0),
        (lambda w: binarize(w, group_size="tensor"), 1.0),
    ],
)
def test_bits_per_weight(stored, bits):
    weight = randn(40, 100)
    stored = stored(weight)
    assert stored.bits_per_weight == bits + 32 / 4000
    assert stored.bytes == 4000 * bits / 8 + 4
    assert binarize(weight).bits_per_weight == 1 + 32 / 100  # a scale per row


def test_both_packings_hold_the_same():
    weight = randn(7, 9)
    first, second = ternarize(weight), ternarize(weight, packing="two_bits")
    assert torch.equal(first.dequantize(), second.dequantize())


@settings(max_examples=30)
@given(
    st.sampled_from(["base3", "two_bits", "binary"]),
    st.sampled_from(["tensor", "row"]),
    st.integers(1, 7),
    st.integers(1, 13),
)
def test_taken_apart_and_rebuilt(kind, group_size, rows, columns):
    weight = randn(rows, columns, seed=rows * columns)
    if kind == "binary":
        stored = binarize(weight, group_size=group_size)
    else:
        stored = ternarize(weight, group_size=group_size, packing=kind)
    again = from_parts(stored.describe(), stored.tensors())
    assert type(again) is type(stored)
    assert torch.equal(again.dequantize(), stored.dequantize())
    codes = stored.integers()
    same = (
        BinaryTensor.from_codes(codes, stored.scales)
        if kind == "binary"
        else TernaryTensor.from_codes(codes, stored.scales, packing=kind)
    )
    assert torch.equal(same.codes, stored.codes)


def test_matrices_of_zeros_stay_zero():
    weight = torch.zeros(2, 5)
    for stored in (ternarize(weight), ternarize(weight, method="twn"), binarize(weight)):
        assert torch.equal(stored.dequantize(), weight)


@pytest.mark.parametrize("method", ["absmean", "twn"])
def test_equal_magnitudes_are_kept_exactly(method):
    weight = torch.tensor([[0.5, -0.5, 0.5, -0.5]])
    assert torch.equal(ternarize(weight, method=method).dequantize(), weight)
    assert torch.equal(binarize(weight).dequantize(), weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: ternarize(w, method="median"), "method is 'median'"),
        (lambda w: ternarize(w, group_size="column"), "group_size is 'column'"),
        (lambda w: ternarize(w, packing="dense"), "packing is 'dense'"),
        (lambda w: binarize(w, group_size="block"), "group_size is 'block'"),
        (lambda w: binarize(w[0]), "only non-empty matrices"),
        (lambda w: ternarize(w / 0), "NaN or infinite"),
        (lambda w: TernaryTensor.from_codes(w + 2, torch.ones(1, 1)), "must be -1, 0 or 1"),
        (lambda w: BinaryTensor.from_codes(w * 0, torch.ones(1, 1)), "must be -1 or 1"),
        (lambda w: BinaryTensor.from_codes(w, torch.ones(3, 1)), r"shape \(1, 1\) or \(2, 1\)"),
        (
            lambda w: TernaryTensor.from_codes(w, torch.ones(3, 1)),
            r"torch.float32 and shape \(3, 1\)",
        ),
    ],
)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 4))


@pytest.mark.parametrize(
    ("packing", "codes", "message"),
    [
        ("base3", [243, 0], "more than five ternary digits"),
        ("two_bits", [0, 0, 3], "none of -1, 0 and 1"),
        ("base3", [0], "codes is of"),
    ],
)
def test_damaged_codes_are_refused(packing, codes, message):
    stored = ternarize(randn(2, 5), packing=packing)
    parts = stored.tensors() | {"codes": torch.tensor(codes, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=message):
        from_parts(stored.describe(), parts)
