"""Weights laid out for the GPU's kernels: the same numbers, from every format that has a kernel."""

import pytest
import torch

from effnb.inference.quantization import QuantizedTensor, packed_linear, quantize, quantize_table
from effnb.inference.quantization.fast import Int4Tensor, PackedLinear, accelerate, no_int4
from effnb.inference.quantization.grid import Grid
from effnb.inference.quantization.linear import QuantizedLinear
from effnb.kernels.int4_matmul import int4_matmul


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(bits, group, symmetric):
    return lambda w: quantize(w, bits, group_size=group, symmetric=symmetric)


FORMATS = {
    "4 bits in groups": uniform(4, 64, False),
    "4 bits, symmetric": uniform(4, 32, True),
    "3 bits by rows": uniform(3, "row", False),
    "2 bits, one scale": uniform(2, "tensor", True),
    "4 bits, one zero point": uniform(4, "tensor", False),
    "groups longer than rows": uniform(4, 256, False),
    "nf4": lambda w: quantize_table(w, "nf4", block_size=64),
    "nf4, double": lambda w: quantize_table(w, "nf4", block_size=32, double=True),
    "fp4 by rows": lambda w: quantize_table(w, "fp4", block_size="row"),
    "e2m1": lambda w: quantize_table(w, "e2m1", block_size=128),
    "three entries": lambda w: quantize_table(w, torch.tensor([-1.0, 0.0, 1.0]), block_size=64),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_numbers_and_the_same_product(name):
    stored = FORMATS[name](randn(24, 128))
    laid_out = Int4Tensor.from_stored(stored)
    laid_out.check()
    assert torch.equal(laid_out.dequantize(), stored.dequantize())
    x = randn(3, 128, seed=1)
    expected = x.double() @ stored.dequantize(torch.float64).T
    for result in (
        packed_linear(x, laid_out),
        int4_matmul(x, laid_out.kernel_weight, backend="triton"),
        int4_matmul(x[:1], laid_out.kernel_weight, backend="triton"),
    ):
        torch.testing.assert_close(result.double(), expected[: len(result)], rtol=1e-4, atol=1e-4)


def test_columns_in_another_order():
    codes = torch.randint(0, 16, (6, 64), generator=torch.Generator().manual_seed(0))
    scales, order = (randn(6, 2).abs() + 1).half().float(), torch.randperm(64)
    stored = QuantizedTensor.from_codes(
        codes, scales, torch.full((6, 2), 5), Grid(4, 32), order=order
    )
    laid_out = Int4Tensor.from_stored(stored)
    laid_out.check()
    assert torch.equal(laid_out.dequantize(), stored.dequantize())
    x = randn(2, 3, 64, seed=1).requires_grad_()
    result = packed_linear(x, laid_out)
    torch.testing.assert_close(result, x @ stored.dequantize().T, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(result.sum(), x)
    expected = stored.dequantize().sum(0).expand(2, 3, 64)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_of_it_is_rebuilt_from_its_tensors():
    stored = quantize_table(randn(24, 128), "nf4", block_size=64)
    layer = PackedLinear(Int4Tensor.from_stored(stored), randn(24, seed=2))
    x = randn(5, 128, seed=1)
    expected = QuantizedLinear(stored, layer.bias)(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    again = Int4Tensor.from_parts(layer.quantized.describe(), layer.quantized.tensors())
    assert torch.equal(again.dequantize(), stored.dequantize())
    tensors = layer.quantized.tensors()
    tensors["scales"] = tensors["scales"].half()
    with pytest.raises(ValueError, match="scales is of torch.float16"):
        Int4Tensor.from_parts(layer.quantized.describe(), tensors)


def test_on_the_cpu_nothing_is_laid_out_for_a_gpu():
    layers = torch.nn.Sequential(QuantizedLinear(quantize(randn(64, 64), 4, group_size=64)))
    assert not isinstance(accelerate(layers)[0].quantized, Int4Tensor)


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (lambda w: quantize(w, 5), "codes of 5 bits"),
        (lambda w: quantize(w, 4, group_size=48), "groups of 48 in 96 columns"),
        (lambda w: quantize(w, 4, group_size=64), "groups of 64 in 96 columns"),
        (lambda w: quantize_table(w, "e4m3"), "256 entries"),
        (lambda w: quantize_table(w, "nf4", block_size=128), "reach over rows of 96"),
    ],
)
def test_formats_without_a_kernel(stored, words):
    weight = stored(randn(8, 96))
    assert words in no_int4(weight)
    with pytest.raises(ValueError, match=words):
        Int4Tensor.from_stored(weight)
