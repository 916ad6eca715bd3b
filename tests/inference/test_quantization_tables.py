"""Table formats: exact constructions, nearest entries, layouts, and what they cost."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.inference.quantization.formats import quantize
from effnb.inference.quantization.stored import from_parts
from effnb.inference.quantization.tables import (
    TABLES,
    dynamic_levels,
    fp4_levels,
    make_table,
    named_table,
    nf4_levels,
    quantize_table,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the tables themselves ------------------------------------------------------------------------

# fmt: off
NF4 = [-1, -.69619280, -.52507305, -.39491749, -.28444138, -.18477343, -.09105004, 0,
       .07958030, .16093020, .24611230, .33791524, .44070983, .56261700, .72295684, 1]
# fmt: on


def test_nf4_is_the_published_table():
    torch.testing.assert_close(nf4_levels(), torch.tensor(NF4), rtol=0, atol=1e-7)


def test_nf4_is_made_of_equally_likely_quantiles():
    """Undone, the positive entries lie evenly in probability, from one half to delta."""
    delta = 1 - (1 / 32 + 1 / 30) / 2
    top = torch.special.ndtri(torch.tensor(delta, dtype=torch.float64))
    share = torch.special.ndtr(nf4_levels().double() * top)
    for part, parts in ((share[7:], 8), (share[:8], 7)):
        expected = torch.full((parts,), (delta - 0.5) / parts, dtype=torch.float64)
        torch.testing.assert_close(part.diff(), expected, rtol=1e-5, atol=0)


def test_fp4_has_its_magnitudes_out_of_order():
    expected = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
    torch.testing.assert_close(fp4_levels()[:8], torch.tensor(expected))
    assert torch.equal(fp4_levels()[8:], -fp4_levels()[:8])


def test_e2m1_is_the_standards_list():
    levels = named_table("e2m1").levels
    assert levels[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert levels[9:].tolist() == [-0.5, -1, -1.5, -2, -3, -4, -6]


@pytest.mark.parametrize(
    ("table", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_eight_bit_floats_are_torchs(table, dtype):
    """Every bit pattern, and the rounding of every kind of number, ties included."""
    levels = named_table(table).levels
    theirs = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = theirs.isfinite() & (torch.arange(256) != 128)  # 128 is -0
    assert torch.equal(levels[finite], theirs[finite]) and levels[~finite].isnan().all()
    used = levels[named_table(table).order]
    ties = (used[1:] + used[:-1]) / 2
    many = randn(20_000) * torch.logspace(-6, 1, 20_000)
    x = torch.cat([used, ties, ties.nextafter(torch.tensor(9e9)), many])
    x = x[x.abs() <= used.max()]
    codes = named_table(table).encode(x)
    assert torch.equal(levels[codes.long()], x.to(dtype).float())


def test_dynamic_map_by_its_definition():
    levels = dynamic_levels().double()
    assert len(levels) == 256 and levels.diff().min() > 0
    assert levels[127] == 0 and levels[-1] == 1  # 127 negative, 0, 127 positive, and 1
    assert torch.equal(levels[:127], -levels[128:255].flip(0))
    place = 128
    for i in range(7):
        middles = [(0.1 + 0.9 * (j + 0.5) / 2**i) * 10 ** (i - 6) for j in range(2**i)]
        expected = torch.tensor(middles, dtype=torch.float64)
        torch.testing.assert_close(levels[place : place + 2**i], expected, rtol=1e-6, atol=0)
        place += 2**i


@settings(max_examples=25)
@given(st.integers(2, 256), st.integers(0, 99))
def test_the_nearest_entry_is_found(entries, seed):
    levels = randn(entries, seed=seed)
    table = make_table(levels)
    x = randn(200, seed=seed + 1)
    codes = table.encode(x).long()
    nearest = (x[:, None] - levels).abs().amin(1)
    torch.testing.assert_close((x - levels[codes]).abs(), nearest, rtol=0, atol=1e-6)


def test_ties_go_to_the_lower_entry_or_to_the_even_code():
    levels = torch.tensor([0.0, 1.0, 2.0, 3.0])
    x = torch.tensor([0.5, 1.5, 2.5])
    assert make_table(levels).encode(x).tolist() == [0, 1, 2]
    assert make_table(levels, even=True).encode(x).tolist() == [0, 2, 2]


# --- blocks, packing, double quantization ---------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("flat", [True, False])
def test_against_a_plain_loop(table, flat):
    """Each number is the nearest entry times its block's scale, written out one by one."""
    weight = randn(3, 10)
    stored = quantize_table(weight, table, block_size=4, flat=flat)
    levels = named_table(table).levels
    levels = levels[~levels.isnan()]
    back = stored.dequantize()
    for i in range(3):
        for j in range(10):
            if flat:
                start = (10 * i + j) // 4 * 4
                block = weight.flatten()[start : start + 4]
            else:
                block = weight[i, j // 4 * 4 : j // 4 * 4 + 4]
            scaled = levels * (block.abs().max() / levels.max())
            nearest = (scaled - weight[i, j]).abs().min()
            torch.testing.assert_close(
                (back[i, j] - weight[i, j]).abs(), nearest, rtol=1e-5, atol=1e-6
            )
    blocks = math.ceil(30 / 4) if flat else 3 * 3
    assert stored.scales.shape == (blocks,)
    size = 30 if table.startswith(("e4", "e5")) else 15
    assert stored.bytes == size + 4 * blocks


def test_two_codes_in_a_byte_the_first_in_the_high_half():
    stored = quantize_table(torch.tensor([[1.0, -1.0, 0.0]]), "nf4", block_size=4)
    assert stored.codes.tolist() == [0xF0, 0x77]  # 15 0 | 7, filled up with the code of 0
    assert stored.integers().tolist() == [[15, 0, 7]]


@settings(max_examples=25)
@given(
    st.sampled_from(TABLES),
    st.one_of(st.integers(1, 80), st.sampled_from(["row", "tensor"])),
    st.booleans(),
    st.booleans(),
    st.integers(1, 5),
    st.integers(1, 40),
)
def test_every_shape_comes_back_and_quantizing_twice_changes_nothing(
    table, block_size, flat, double, rows, columns
):
    weight = randn(rows, columns, seed=rows * columns)
    stored = quantize_table(weight, table, block_size=block_size, flat=flat, double=double)
    stored.check()
    assert stored.dequantize().shape == weight.shape
    again = from_parts(stored.describe(), stored.tensors())
    assert torch.equal(again.dequantize(), stored.dequantize())
    if not double:
        twice = quantize_table(stored.dequantize(), table, block_size=block_size, flat=flat)
        assert torch.equal(twice.codes, stored.codes)


@pytest.mark.parametrize(("table", "expected"), [("nf4", 0.00846), ("fp4", 0.01486)])
def test_mean_squared_error_on_normal_numbers(table, expected):
    x = randn(1024, 256)
    error = float((quantize_table(x, table).dequantize() - x).square().mean())
    assert error == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("table", "block_size", "expected"),
    [
        ("nf4", 32, 0.067746),
        ("nf4", 64, 0.072798),
        ("nf4", 128, 0.076831),
        ("nf4", 256, 0.080337),
        ("nf4", 4096, 0.092547),
        ("fp4", 64, 0.096543),
    ],
)
def test_mean_absolute_error_on_normal_numbers(table, block_size, expected):
    """The values of the bitsandbytes test suite; 128 large blocks scatter by a per cent or so."""
    x = randn(512, 1024, seed=1)
    error = float((quantize_table(x, table, block_size=block_size).dequantize() - x).abs().mean())
    assert error == pytest.approx(expected, rel=0.005 if block_size < 4096 else 0.02)


def test_an_affine_grid_beats_nf4_on_normal_numbers():
    x = randn(512, 512)
    affine = float((quantize(x, 4, group_size=64).dequantize() - x).square().mean())
    nf4 = float((quantize_table(x).dequantize() - x).square().mean())
    symmetric = float(
        (quantize(x, 4, group_size=64, symmetric=True).dequantize() - x).square().mean()
    )
    assert affine < nf4 < symmetric


def test_double_quantization_saves_what_it_says_and_costs_little():
    x = randn(1024, 512)
    plain, double = quantize_table(x), quantize_table(x, double=True)
    assert plain.bits_per_weight == 4.5
    exact = 4 + 8 / 64 + 32 / (64 * 256) + 32 / x.numel()
    assert double.bits_per_weight == exact == pytest.approx(4.127, abs=1e-3)
    assert torch.equal(double.codes, plain.codes)


def test_errors_on_a_million_normal_numbers():
    """NF4 in blocks of 64: what bitsandbytes gives, to the last digit that the sample fixes."""
    x = randn(1024, 1024)
    plain, double = (quantize_table(x, double=double).dequantize() - x for double in (False, True))
    assert float(plain.square().mean()) == pytest.approx(0.0084578, abs=1e-7)
    assert float(double.square().mean()) == pytest.approx(0.0084633, abs=2e-7)
    relative = [
        float(((quantize_table(y).dequantize() - y).abs() / (y.abs() + 1e-8)).mean())
        for y in (x, *(randn(1024, 1024, seed=seed) for seed in (1, 2, 3)))
    ]
    assert sum(relative) / 4 == pytest.approx(0.203339, rel=2e-3)


def test_double_quantization_by_its_equation():
    x = randn(600, 64) * torch.logspace(-1, 1, 600)[:, None]
    stored = quantize_table(x, double=True)
    scales = x.abs().amax(1)
    mean = scales.mean()
    assert stored.mean == mean
    assert stored.second_scales.shape == (3,)  # 600 scales in blocks of 256
    levels = dynamic_levels()
    for block in range(3):
        part = scales[256 * block : 256 * (block + 1)] - mean
        second = part.abs().max()
        assert stored.second_scales[block] == second
        nearest = (part[:, None] - levels * second).abs().amin(1)
        found = stored.block_scales()[256 * block : 256 * (block + 1)] - mean
        torch.testing.assert_close((found - part).abs(), nearest, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("double", [False, True])
def test_zeros_constants_and_tiny_numbers(table, double):
    weight = torch.zeros(4, 64)
    weight[1] = 0.5
    weight[2, 0] = 1e-39  # below the normal range of single precision
    back = quantize_table(weight, table, block_size="row", double=double).dequantize()
    assert torch.isfinite(back).all()
    if not double:
        assert (back[0] == 0).all() and torch.equal(back[1], weight[1])


def test_a_table_of_your_own():
    """Ternary as a table; its entries travel with the tensor and are counted."""
    levels = torch.tensor([-1.0, 0.0, 1.0])
    stored = quantize_table(torch.tensor([[2.0, -0.3, -1.5, 0.1]]), levels, block_size=4)
    assert stored.dequantize().tolist() == [[2, 0, -2, 0]]
    assert stored.bytes == 2 + 4 + 3 * 4
    assert stored.describe()["table"] == "custom"
    again = from_parts(stored.describe(), stored.tensors())
    assert torch.equal(again.dequantize(), stored.dequantize())
    large = quantize_table(randn(4, 64), randn(100), block_size=16)
    assert large.codes.numel() == 256  # more than 16 entries take a byte each
    large.check()


def test_read_back_in_any_type():
    stored = quantize_table(randn(4, 64), double=True)
    assert torch.equal(stored.dequantize(torch.bfloat16), stored.dequantize().bfloat16())


@pytest.mark.parametrize(
    ("weight", "how", "message"),
    [
        (torch.ones(2, 2), {"table": "nf3"}, "'nf3' is no table; known are nf4, fp4"),
        (torch.ones(2, 2), {"table": "dynamic"}, "'dynamic' is no table"),
        (torch.ones(2, 2), {"table": torch.ones(1)}, "it must be a list of 2 to 256"),
        (torch.ones(2, 2), {"table": torch.ones(300)}, "it must be a list of 2 to 256"),
        (torch.ones(2, 2), {"table": torch.ones(2, 2)}, "it must be a list of 2 to 256"),
        (torch.ones(2, 2), {"table": torch.zeros(3)}, "not only 0"),
        (torch.ones(2, 2), {"table": torch.tensor([1.0, math.inf])}, "finite numbers"),
        (torch.ones(2, 2), {"block_size": 0}, "block_size is 0"),
        (torch.ones(2, 2), {"block_size": "column"}, "block_size is 'column'"),
        (torch.ones(4), {}, "only non-empty matrices"),
        (torch.tensor([[math.nan]]), {}, "1 entries that are NaN"),
    ],
)
def test_bad_input_is_one_sentence(weight, how, message):
    with pytest.raises(ValueError, match=message):
        quantize_table(weight, **how)


@pytest.mark.parametrize(
    ("change", "parts", "message"),
    [
        ({"table": "dynamic"}, {}, "neither known nor among the parts"),
        ({"table": "custom"}, {}, "neither known nor among the parts"),
        ({"table": "nf5"}, {}, "'nf5' is no table"),
        ({"block_size": 32}, {}, r"scales is of .* it should be of torch.uint8 and shape \(4,\)"),
        ({"table": "e4m3"}, {}, r"codes is of .* shape \(128,\)"),
        ({}, {"scales": torch.ones(2)}, "scales is of torch.float32"),
        ({}, {"mean": torch.ones(1)}, "mean is of"),
        ({}, {"second_scales": torch.ones(2)}, "second_scales is of"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, parts, message):
    stored = quantize_table(randn(2, 64), double=True)
    with pytest.raises(ValueError, match=message):
        from_parts(stored.describe() | change, stored.tensors() | parts)


def test_codes_outside_the_table_are_refused():
    stored = quantize_table(randn(2, 8), "e4m3")
    parts = stored.tensors() | {"codes": torch.full((16,), 127, dtype=torch.uint8)}  # a NaN code
    with pytest.raises(ValueError, match="stands for no entry"):
        from_parts(stored.describe(), parts)
    stored = quantize_table(randn(2, 8), torch.tensor([-1.0, 0.0, 1.0]))
    parts = stored.tensors() | {"codes": torch.full((8,), 0x33, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="stands for no entry"):
        from_parts(stored.describe(), parts)
