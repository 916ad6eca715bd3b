"""Uniform formats: exact checks, torch as the oracle, and properties over shapes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.inference.quantization import bits_per_weight, pack, quantize, unpack
from effnb.inference.quantization.formats import QuantizedTensor, choose_grid, fake_quantize
from effnb.inference.quantization.grid import Grid
from effnb.inference.quantization.stored import from_parts

FEW = settings(max_examples=30)
SIZES = st.one_of(st.sampled_from(["row", "tensor"]), st.integers(1, 70))


@FEW
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


@FEW
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


@FEW
@given(st.integers(2, 8), SIZES)
def test_quantizing_twice_changes_nothing(bits, group_size):
    """The largest magnitude keeps its code, so a symmetric grid finds itself again."""
    weight = torch.randn(3, 48, generator=torch.Generator().manual_seed(bits))
    once = quantize(weight, bits, group_size=group_size, symmetric=True)
    twice = quantize(once.dequantize(), bits, group_size=group_size, symmetric=True)
    assert torch.equal(twice.codes, once.codes)


@FEW
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


@FEW
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


# --- codes chosen elsewhere, and columns stored in another order ----------------------------------


@FEW
@given(st.integers(2, 8), st.booleans(), SIZES, st.integers(1, 5), st.integers(1, 40))
def test_codes_of_a_method_are_stored_and_read_back(bits, symmetric, group_size, rows, columns):
    generator = torch.Generator().manual_seed(rows * columns)
    top = 2 ** (bits - 1) - 1
    low, high = (-top, top) if symmetric else (0, 2**bits - 1)
    codes = torch.randint(low, high + 1, (rows, columns), generator=generator)
    groups = 1 if isinstance(group_size, str) else math.ceil(columns / group_size)
    shape = (1, 1) if group_size == "tensor" else (rows, groups)
    scales = torch.rand(shape, generator=generator).add(0.1).half().float()
    zeros = None
    if not symmetric:
        zeros = torch.randint(0, 2**bits, shape, generator=generator)
    order = torch.randperm(columns, generator=generator)
    stored = QuantizedTensor.from_codes(
        codes, scales, zeros, Grid(bits, group_size, symmetric), order=order
    )
    assert torch.equal(stored.integers().long(), codes)
    plain = QuantizedTensor.from_codes(
        codes, scales, zeros, Grid(bits, group_size, symmetric)
    ).dequantize()
    for j, place in enumerate(order.tolist()):  # stored column j is column order[j]
        assert torch.equal(stored.dequantize()[:, place], plain[:, j])
        group = 0 if isinstance(group_size, str) else j // group_size
        z = 0 if zeros is None else zeros[:, group]
        assert torch.equal(plain[:, j], scales[:, group] * (codes[:, j] - z))
    assert stored.bytes == bits * rows * math.ceil(columns / 8) + 2 * scales.numel() + (
        0 if symmetric else bits * math.ceil(scales.numel() / 8)
    ) + 2 * columns  # fmt: skip


def test_order_of_many_columns_needs_more_bytes():
    codes = torch.zeros(1, 2**15 + 1, dtype=torch.int8)
    stored = QuantizedTensor.from_codes(
        codes, torch.ones(1, 1), None, Grid(2, symmetric=True), order=torch.arange(2**15 + 1)
    )
    assert stored.order.dtype == torch.int32
    stored.check()


def test_eight_bit_codes_given_as_bytes_do_not_wrap_around():
    codes = torch.tensor([[-127, 0, 127]], dtype=torch.int8)
    stored = QuantizedTensor.from_codes(codes, torch.ones(1, 1), None, Grid(8, symmetric=True))
    assert stored.dequantize().tolist() == [[-127, 0, 127]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.full((2, 4), 8)}, "codes must be whole numbers from -7 to 7"),
        ({"codes": torch.full((2, 4), -8)}, "codes must be whole numbers from -7 to 7"),
        ({"codes": torch.full((2, 4), 0.5)}, "codes must be whole numbers"),
        ({"scales": torch.ones(2, 1)}, r"scales has shape \(2, 1\); it must be \(2, 2\)"),
        ({"scales": torch.full((2, 2), 0.1)}, "not a half-precision number"),
        ({"scales": torch.full((2, 2), math.nan)}, "not a half-precision number"),
        ({"zeros": torch.zeros(2, 2)}, "has no zero points"),
        ({"symmetric": False}, "an affine one needs them"),
        (
            {"symmetric": False, "zeros": torch.full((2, 2), 16), "codes": torch.ones(2, 4)},
            "zeros must be whole numbers from 0 to 15",
        ),
        ({"order": torch.tensor([0, 1, 2, 2])}, "each of the 4 columns exactly once"),
        ({"order": torch.arange(3)}, "each of the 4 columns exactly once"),
        ({"bits": 1}, "bits is 1"),
        ({"group_size": 0}, "group_size is 0"),
    ],
)
def test_wrong_codes_are_refused(change, message):
    given_ = {
        "codes": torch.ones(2, 4),
        "scales": torch.ones(2, 2),
        "zeros": None,
        "bits": 4,
        "group_size": 2,
        "symmetric": True,
        "order": None,
    } | change
    kind = [given_.pop(name) for name in ("bits", "group_size", "symmetric")]
    with pytest.raises(ValueError, match=message):
        QuantizedTensor.from_codes(grid=Grid(*kind), **given_)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", ["tensor", "row", 5])
def test_taken_apart_and_rebuilt(symmetric, group_size):
    stored = quantize(torch.randn(6, 13), 3, group_size=group_size, symmetric=symmetric)
    again = from_parts(stored.describe(), stored.tensors())
    assert torch.equal(again.dequantize(), stored.dequantize())
    assert again.describe() == stored.describe() and again.bytes == stored.bytes
    assert ("zeros" in stored.describe()["tensors"]) is not symmetric


@pytest.mark.parametrize(
    ("change", "parts", "message"),
    [
        ({"format": "exotic"}, {}, "'exotic' is no stored format; known are"),
        ({"bits": 4}, {}, r"codes is of torch.uint8 and shape \(4, 6\); it should be"),
        ({"bits": 9}, {}, "bits is 9"),
        ({"shape": [4, 17]}, {}, "codes is of"),
        ({"shape": [4]}, {}, "not that of a matrix"),
        ({"group_size": 3}, {}, "scales is of"),
        ({}, {"zeros": None}, "are not those described"),
        ({"tensors": ["codes", "more", "scales", "zeros"]}, {"more": torch.ones(1)}, "are not"),
        ({}, {"scales": torch.ones(4, 2)}, "scales is of torch.float32"),
        ({"tensors": ["codes", "zeros"]}, {"scales": None}, "not those of the format 'uniform'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, parts, message):
    stored = quantize(torch.randn(4, 16), 3, group_size=8)
    tensors = {k: v for k, v in (stored.tensors() | parts).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        from_parts(stored.describe() | change, tensors)


# --- rounding without packing ---------------------------------------------------------------------


@FEW
@given(
    st.integers(2, 8),
    st.booleans(),
    SIZES,
    st.sampled_from(["minmax", "percentile", "mse"]),
    st.integers(1, 4),
    st.integers(1, 40),
)
def test_fake_quantize_is_quantize_and_back(bits, symmetric, group_size, clip, rows, columns):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    how = {"group_size": group_size, "symmetric": symmetric, "clip": clip, "percentile": 90.0}
    stored = quantize(weight, bits, **how)
    assert torch.equal(fake_quantize(weight, bits, half_scales=True, **how), stored.dequantize())


def test_fake_quantize_of_activations_has_a_grid_per_token():
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    x[1, 2] *= 1000  # one loud token must not touch the others
    rounded = fake_quantize(x, 8, symmetric=True)
    step = x.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(rounded, (x / step).round() * step, rtol=1e-6, atol=0)
    together = fake_quantize(x, 8, symmetric=True, group_size="tensor")
    assert (together[0] == 0).float().mean() > 0.5


def test_fake_quantize_keeps_type_and_precision():
    x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = x.abs().amax(-1, keepdim=True) / 7
    rounded = fake_quantize(x, 4, symmetric=True)
    torch.testing.assert_close(rounded, (x / step).round() * step, rtol=1e-14, atol=0)
    assert fake_quantize(x.bfloat16(), 4).dtype == torch.bfloat16
    assert fake_quantize(torch.zeros(0, 4), 4).shape == (0, 4)
    assert fake_quantize(x[0], 4).shape == (8,)
    # In half precision this step would be 0.
    tiny = torch.full((1, 4), 1e-20)
    torch.testing.assert_close(fake_quantize(tiny, 4), tiny)


@pytest.mark.parametrize(
    ("x", "how", "message"),
    [
        (torch.zeros(()), {}, "a single number has no grid"),
        (torch.tensor([1.0, math.inf]), {}, "the tensor has 1 entries"),
        (torch.zeros(4), {"group_size": "column"}, "group_size is 'column'"),
        (torch.zeros(4), {"group_size": True}, "group_size is True"),
        (torch.zeros(4), {"clip": "entropy"}, "clip is 'entropy'; it must be"),
    ],
)
def test_fake_quantize_refuses_in_one_sentence(x, how, message):
    with pytest.raises(ValueError, match=message):
        fake_quantize(x, 4, **how)


def test_a_short_last_group_has_a_grid_of_its_own_numbers():
    weight = torch.cat([torch.full((1, 4), 100.0), torch.tensor([[1.0, 2.0, 3.0]])], 1)
    stored = quantize(weight, 4, group_size=4, clip="percentile", percentile=50.0, symmetric=True)
    # Half of the last three magnitudes lie below 2; counting a filled-up 0 it would be 1.5.
    torch.testing.assert_close(stored.scales[0, 1].float(), torch.tensor(2 / 7), rtol=1e-3, atol=0)


def test_steps_are_rounded_to_half_only_for_storage():
    values = torch.tensor([[0.1, -0.3]])
    exact, _ = choose_grid(values, Grid(4, symmetric=True), half_scales=False)
    stored, _ = choose_grid(values, Grid(4, symmetric=True))
    assert exact.item() == (torch.tensor(0.3) / 7).item()
    assert stored.item() == (torch.tensor(0.3) / 7).half().item() != exact.item()


def test_weights_of_whole_numbers_are_refused():
    with pytest.raises(Exception, match="int64|Float"):
        quantize(torch.ones(2, 2, dtype=torch.int64), 4)
