"""Weights laid out for the CPU kernels, against torchao's tensors for the same kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchao.prototype.quantization.int4 import Int4OpaqueTensor
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.quantization.quant_primitives import _dequantize_affine_tinygemm
from torchao.quantization.utils import unpack_tinygemm_scales_and_zeros

from effnb.inference.quantization import PackedTensor, QuantizedTensor, packed_linear, quantize
from effnb.inference.quantization.grid import Grid


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts_of(laid_out):
    """Codes, scales and offsets of a weight in groups, row by row, rows not filled up."""
    from effnb.inference.quantization.packed import _unpanel

    rows = laid_out.shape[0]
    scales, zeros = unpack_tinygemm_scales_and_zeros(laid_out.scales)
    return _unpanel(laid_out.codes, laid_out.layout).T[:rows], scales[:rows], zeros[:rows]


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True])
def test_torchao_reads_the_same_weights(group_size, symmetric):
    """Its formula for these offsets, (q - 8) s + z, on our codes, scales and offsets."""
    weight = quantize(randn(96, 256), 4, group_size=group_size, symmetric=symmetric)
    laid_out = PackedTensor.from_quantized(weight)
    codes, scales, zeros = parts_of(laid_out)
    expected = _dequantize_affine_tinygemm(
        codes.to(torch.int32),
        (1, group_size),
        scales.float(),
        zeros.float(),
        torch.int32,
        0,
        15,
        output_dtype=torch.float32,
    )
    torch.testing.assert_close(laid_out.dequantize(), expected, atol=1e-6, rtol=1e-6)
    integers = weight.integers() + (7 if symmetric else 0)
    assert torch.equal(codes.to(torch.int16), integers)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_torchaos_int4_layer_gives_the_same_outputs(group_size):
    weight = quantize(randn(128, 256), 4, group_size=group_size)
    laid_out = PackedTensor.from_quantized(weight)
    theirs = Int4OpaqueTensor(
        laid_out.codes, laid_out.scales, [1, group_size], torch.Size(laid_out.shape)
    )
    for count in (1, 3, 40):
        x = randn(count, 256, seed=count).bfloat16()
        expected = nn.functional.linear(x, theirs)
        assert torch.equal(packed_linear(x, laid_out), expected)
        # With float32 inputs ours differs in the type of the result only.
        assert torch.equal(packed_linear(x.float(), laid_out), expected.float())


def test_torchaos_int8_layer_gives_the_same_outputs():
    """Its codes and scales, put into our format."""
    layer = nn.Linear(256, 96, bias=False)
    with torch.no_grad():
        layer.weight.copy_(randn(96, 256))
    theirs = copy.deepcopy(layer)
    quantize_(theirs, Int8WeightOnlyConfig())
    scales = theirs.weight.scale.half()
    theirs.weight.scale.copy_(scales)
    codes = theirs.weight.qdata.clamp(-127, 127)  # our symmetric grids have no -128
    theirs.weight.qdata.copy_(codes)
    weight = QuantizedTensor.from_codes(codes, scales.float(), None, Grid(8, symmetric=True))
    for kind in ("int8", "two int4"):
        ours = PackedTensor.from_quantized(weight, kind)
        assert ours.kind == kind
        for count in (1, 3, 100):
            x = randn(count, 256, seed=count)
            expected = theirs(x)
            found = packed_linear(x, ours)
            assert (found - expected).norm() < 2**-7 * expected.norm()  # bfloat16 in and out


def test_rounding_is_as_good_as_torchaos():
    """From the same weights: the error of the output, at 8 and at 4 bits."""
    from torchao.prototype.quantization.int4.inference_workflow import (
        PrototypeInt4WeightOnlyConfig,
    )

    layer = nn.Linear(256, 128, bias=False).bfloat16()
    with torch.no_grad():
        layer.weight.copy_(randn(128, 256))
    x = randn(5, 256).bfloat16()
    exact = x.double() @ layer.weight.detach().double().T
    for bits, config, options in (
        (8, Int8WeightOnlyConfig(), {"symmetric": True}),
        (4, PrototypeInt4WeightOnlyConfig(group_size=32), {"group_size": 32}),
    ):
        theirs = copy.deepcopy(layer)
        quantize_(theirs, config)
        ours = PackedTensor.from_quantized(quantize(layer.weight, bits, **options))
        with torch.no_grad():
            outputs = packed_linear(x, ours), theirs(x)
        errors = [float((y.double() - exact).norm()) for y in outputs]
        assert errors[0] < 1.1 * errors[1], bits
