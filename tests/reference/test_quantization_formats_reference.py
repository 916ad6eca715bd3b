"""The number formats against torch, torchao and bitsandbytes, to the bit where the maths is one.

Two things differ by design and are neutralised where they would hide the rest: our scales are
rounded to half precision, so the others are given ours; and torch and torchao multiply by 1 / s
where we divide by s, so numbers half way between two grid points may fall either way, unless s is a
power of two.
"""

from __future__ import annotations

import pytest
import torch

from effnb.inference.quantization.formats import choose_grid, fake_quantize, quantize
from effnb.inference.quantization.grid import Grid
from effnb.inference.quantization.tables import (
    dynamic_levels,
    fp4_levels,
    named_table,
    nf4_levels,
    quantize_table,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- torch and torchao: uniform grids -------------------------------------------------------------


def integers(bits, symmetric):
    """Whole numbers whose grids have steps that are powers of two: nothing is rounded twice."""
    top = 2 ** (bits - 1) - 1
    span = (-top, top) if symmetric else (-(2 ** (bits - 2)), 2**bits - 1 - 2 ** (bits - 2))
    x = randn(8, 96, seed=bits) * span[1] / 2
    x = x.clamp(*span)
    x[:, ::32] = span[0]
    x[:, 1::32] = span[1]
    return x * 0.0625


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_torch_per_channel_to_the_bit(bits, symmetric):
    x = integers(bits, symmetric)
    stored = quantize(x, bits, symmetric=symmetric)
    top = 2 ** (bits - 1) - 1
    low, high = (-top, top) if symmetric else (0, 2**bits - 1)
    zeros = stored.zero_points()
    zeros = torch.zeros(8, dtype=torch.int32) if zeros is None else zeros.flatten().int()
    theirs = torch.fake_quantize_per_channel_affine(
        x, stored.scales.flatten().float(), zeros, 0, low, high
    )
    assert torch.equal(theirs, stored.dequantize())


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("symmetric", [False, True])
def test_torch_quantized_tensors_to_the_bit(symmetric):
    """Eight bits, per tensor and per row, in torch's own quantized types."""
    x = integers(8, symmetric)
    kind = torch.qint8 if symmetric else torch.quint8
    per_row = quantize(x, 8, symmetric=symmetric)
    zeros = torch.zeros(8) if symmetric else per_row.zero_points().flatten()
    theirs = torch.quantize_per_channel(x, per_row.scales.flatten().float(), zeros, 0, kind)
    assert torch.equal(theirs.int_repr().short(), per_row.integers())
    assert torch.equal(theirs.dequantize(), per_row.dequantize())
    whole = quantize(x, 8, group_size="tensor", symmetric=symmetric)
    zero = 0 if symmetric else int(whole.zero_points())
    theirs = torch.quantize_per_tensor(x, float(whole.scales), zero, kind)
    assert torch.equal(theirs.int_repr().short(), whole.integers())


GROUPS = [("row", (1, 96)), (32, (1, 32)), ("tensor", (8, 96))]


def torchao_grid(x, bits, symmetric, block):
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine

    top = 2 ** (bits - 1) - 1
    return choose_qparams_affine(
        x,
        MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        block,
        torch.int8 if symmetric else torch.uint8,
        quant_min=-top if symmetric else 0,
        quant_max=top if symmetric else 2**bits - 1,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("group_size", "block"), GROUPS)
def test_torchaos_scales_and_zero_points(bits, symmetric, group_size, block):
    """On any numbers, before rounding scales to half precision."""
    x = randn(8, 96, seed=bits)
    scale, zero = torchao_grid(x, bits, symmetric, block)
    grouped = {"row": x[:, None], 32: x.view(8, 3, 32), "tensor": x.view(1, 1, -1)}[group_size]
    ours, zeros = choose_grid(grouped, Grid(bits, symmetric=symmetric), half_scales=False)
    torch.testing.assert_close(ours.flatten(), scale.flatten(), rtol=3e-7, atol=0)
    if not symmetric:
        assert torch.equal(zeros.flatten(), zero.flatten().int())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("group_size", "block"), GROUPS)
def test_torchaos_codes_and_numbers_to_the_bit(bits, symmetric, group_size, block):
    from torchao.quantization.quant_primitives import dequantize_affine, quantize_affine

    x = integers(bits, symmetric)
    scale, zero = torchao_grid(x, bits, symmetric, block)
    top = 2 ** (bits - 1) - 1
    low, high = (-top, top) if symmetric else (0, 2**bits - 1)
    kind = torch.int8 if symmetric else torch.uint8
    codes = quantize_affine(x, block, scale, zero, kind, low, high)
    stored = quantize(x, bits, group_size=group_size, symmetric=symmetric)
    assert torch.equal(stored.scales.float().flatten(), scale.flatten())
    assert torch.equal(stored.integers(), codes.short())
    back = dequantize_affine(codes, block, scale, zero, kind, low, high)
    assert torch.equal(stored.dequantize(), back)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_torchao_on_any_numbers_given_our_scales(bits, symmetric):
    """Equal but for ties, of which there are next to none."""
    from torchao.quantization.quant_primitives import quantize_affine

    x = randn(64, 96, seed=bits)
    stored = quantize(x, bits, group_size=32, symmetric=symmetric)
    top = 2 ** (bits - 1) - 1
    low, high = (-top, top) if symmetric else (0, 2**bits - 1)
    zero = torch.zeros(64, 3) if symmetric else stored.zero_points()
    codes = quantize_affine(
        x,
        (1, 32),
        stored.scales.float(),
        zero.int(),
        torch.int8 if symmetric else torch.uint8,
        low,
        high,
    )
    differ = codes.short() != stored.integers()
    assert differ.float().mean() < 1e-3
    assert (codes.short() - stored.integers()).abs().max() <= 1


def test_activations_per_token_are_torchaos():
    from torchao.quantization.quant_primitives import dequantize_affine, quantize_affine

    x = integers(8, True).view(2, 4, 96)
    scale, zero = torchao_grid(x, 8, True, (1, 1, 96))
    codes = quantize_affine(x, (1, 1, 96), scale, zero, torch.int8, -127, 127)
    back = dequantize_affine(codes, (1, 1, 96), scale, zero, torch.int8, -127, 127)
    assert torch.equal(fake_quantize(x, 8, symmetric=True), back)


# --- bitsandbytes: tables -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bnb():
    """Its functions; it runs on the CPU too."""
    from bitsandbytes import functional

    return functional


def read_back(bnb, packed, state):
    """bitsandbytes' own reading of a packed weight, as one long row.

    Given the true shape, its kernel for the processor (0.50.2) takes wrong scales where a block
    covers several rows; and rows of odd length it would compile for half a minute.
    """
    shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])
    with torch.compiler.set_stance("force_eager"):
        return bnb.dequantize_4bit(packed, state).view(shape)


def test_bitsandbytes_tables_to_the_bit(bnb):
    assert torch.equal(nf4_levels(), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(fp4_levels(), bnb.get_4bit_type("fp4", device="cpu"))
    assert torch.equal(dynamic_levels(), bnb.create_dynamic_map())


@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 256, 1024])
@pytest.mark.parametrize("shape", [(64, 128), (16, 100)])
def test_bitsandbytes_four_bits_to_the_bit(bnb, table, block_size, shape):
    """Bytes, scales, and numbers; (16, 100) ends in a short block."""
    weight = randn(*shape, seed=block_size)
    weight[3] = 0
    packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type=table)
    stored = quantize_table(weight, table, block_size=block_size)
    assert torch.equal(stored.scales, state.absmax)
    assert torch.equal(stored.codes, packed.flatten())
    assert torch.equal(stored.dequantize(), read_back(bnb, packed, state))


def test_bitsandbytes_odd_sizes_to_the_bit(bnb):
    weight = randn(5, 13)
    packed, state = bnb.quantize_4bit(weight, blocksize=32, quant_type="nf4")
    stored = quantize_table(weight, block_size=32)
    assert torch.equal(stored.codes, packed.flatten())
    assert torch.equal(stored.dequantize(), read_back(bnb, packed, state))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bitsandbytes_half_precision_weights(bnb, dtype):
    weight = randn(32, 128).to(dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    stored = quantize_table(weight)
    assert torch.equal(stored.codes, packed.flatten())
    assert torch.equal(stored.dequantize(dtype), read_back(bnb, packed, state))


def scales_of(rows, seed=0):
    """Scales of blocks as double quantization sees them, mean subtracted."""
    scales = randn(rows, 64, seed=seed).abs().amax(1)
    return scales - scales.mean()


def test_dynamic_codes_are_bitsandbytes_nearest_entries(bnb):
    """Its plain implementation, which it takes for other types, finds the very same codes."""
    centred = scales_of(4096)
    codes, second = torch.ops.bitsandbytes.quantize_blockwise(
        centred.double(), bnb.create_dynamic_map(), 256
    )
    blocks = centred.view(-1, 256)
    ours = named_table("dynamic").encode(blocks * (1 / second)[:, None])
    assert torch.equal(ours.flatten(), codes)


def test_double_quantization_is_bitsandbytes(bnb):
    """To the bit in every part but the codes of scales, where its compiled code rounds first.

    Its kernel for the processor looks numbers up after rounding them to sixteen bits; so where a
    number lies within 1.6e-5 of half way between two entries, it may take the other one.
    """
    weight = randn(2048, 64) * torch.logspace(-0.5, 0.5, 2048)[:, None]
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    stored = quantize_table(weight, double=True)
    assert torch.equal(stored.codes, packed.flatten())
    assert torch.equal(stored.mean, state.offset)
    assert torch.equal(stored.second_scales, state.state2.absmax)
    differ = stored.scales != state.absmax
    assert differ.float().mean() < 0.005
    scaled = (weight.abs().amax(1) - stored.mean) / stored.second_scales.repeat_interleave(256)
    bounds = named_table("dynamic").bounds
    distance = (scaled[differ, None] - bounds).abs().amin(1)
    assert (distance < 1.6e-5).all()
    # Everything that follows from the same codes is the same to the bit: give it ours.
    state.absmax = stored.scales
    assert torch.equal(stored.dequantize(), read_back(bnb, packed, state))


# --- torch's small floats -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "dtype", "largest"),
    [("e4m3", torch.float8_e4m3fn, 448.0), ("e5m2", torch.float8_e5m2, 57344.0)],
)
@pytest.mark.parametrize("block_size", ["row", 32])
def test_eight_bit_floats_to_the_bit(table, dtype, largest, block_size):
    weight = randn(16, 96)
    blocks = weight.view(-1, 96 if block_size == "row" else 32)
    scale = blocks.abs().amax(1, keepdim=True) / largest
    theirs = (blocks * (1 / scale)).to(dtype)
    stored = quantize_table(weight, table, block_size=block_size)
    assert torch.equal(stored.dequantize(), (theirs.float() * scale).view(16, 96))
    same = theirs.view(torch.uint8).view(16, 96) == stored.integers()
    assert same[stored.dequantize() != 0].all()  # a 0 may be -0 there


def test_torchaos_four_bit_float_to_the_bit():
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, f32_to_f4_unpacked

    table = named_table("e2m1")
    levels = f4_unpacked_to_f32(torch.arange(16, dtype=torch.uint8))
    used = table.levels.isfinite()
    assert torch.equal(table.levels[used], levels[used]) and int(used.sum()) == 15
    x = torch.cat([randn(5000) * 3, torch.arange(-28, 29) / 4])  # with every tie
    theirs = f4_unpacked_to_f32(f32_to_f4_unpacked(x))
    assert torch.equal(table.levels[table.encode(x).long()], theirs)
