"""Quantized activations, LLM.int8(), SmoothQuant, Hadamard and KIVI against other libraries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effnb.inference.quantization.activations import (
    QuantizedInputs,
    activation_codes,
    integer_matmul,
    quantize_activations,
    quantized_matmul,
)
from effnb.inference.quantization.formats import QuantizedTensor, quantize
from effnb.inference.quantization.grid import Grid
from effnb.inference.quantization.hadamard import (
    hadamard_matrix,
    hadamard_transform,
    random_hadamard,
)
from effnb.inference.quantization.kv_layer import PackedRows
from effnb.inference.quantization.linear import QuantizedLinear
from effnb.inference.quantization.llm_int8 import LLMInt8Linear, llm_int8_matmul, vectorwise_codes
from effnb.inference.quantization.smoothquant import smooth_scales


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(seed=0):
    """Half-precision numbers, so that bitsandbytes' cast to float16 changes nothing."""
    x = randn(64, 256, seed=seed)
    x[:, 5] *= 30
    x[3, 100] = 7.5
    x[7] = 0
    return x.half().float()


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


# --- bitsandbytes: LLM.int8() ---------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [6.0, 3.0, 0.0])
def test_vectorwise_codes_are_those_of_bitsandbytes(threshold):
    """Row maxima and outlier columns are equal; codes differ only at half-way points."""
    import bitsandbytes  # noqa: F401 - it registers its operations

    x = with_outliers()
    codes, scales, outliers = vectorwise_codes(x, threshold)
    theirs, rows, columns = torch.ops.bitsandbytes.int8_vectorwise_quant(
        x.half().clone(), threshold
    )
    below = x.masked_fill(x.abs() >= threshold, 0) if threshold else x
    assert torch.equal(rows, below.abs().amax(1))
    filled = rows > 0  # theirs is 0 / 0 for a token of zeros
    torch.testing.assert_close(scales.flatten()[filled] * 127, rows[filled])
    found = [] if columns is None else columns.tolist()
    assert outliers.nonzero().flatten().tolist() == found
    different = (codes != theirs)[filled][:, ~outliers]
    assert different.float().mean() < 1e-3
    assert (codes.int() - theirs.int())[filled][:, ~outliers].abs().max() <= 1


@pytest.mark.parametrize("bias", [True, False])
def test_linear8bitlt(bias):
    """To 2e-3: float16 outputs there, half-precision scales here.

    In training mode bitsandbytes only dequantizes the weight on a CPU, so it is put to `eval`.
    """
    import bitsandbytes

    torch.manual_seed(0)
    layer, x = nn.Linear(256, 128, bias=bias), with_outliers()[torch.arange(64) != 7]
    theirs = bitsandbytes.nn.Linear8bitLt(
        256, 128, bias=bias, has_fp16_weights=False, threshold=6.0
    )
    theirs.load_state_dict(layer.state_dict())
    theirs = theirs.to("cpu").eval()
    ours = LLMInt8Linear(QuantizedLinear(quantize(layer.weight, 8, symmetric=True), layer.bias))
    with torch.no_grad():
        expected = theirs(x.half()).float()
        assert relative(ours(x), expected) < 2e-3
        error = relative(ours(x), layer(x))
        assert error == pytest.approx(relative(expected, layer(x)), rel=0.05)
        assert error > 2 * relative(ours(x), expected)


def test_the_int8_product_of_bitsandbytes():
    """Same codes and scales on both sides: to 1e-4 (their constant for 1 / 127² is rounded)."""
    import bitsandbytes  # noqa: F401 - it registers its operations

    x, W = randn(16, 64), randn(24, 64, seed=1)
    q, s = activation_codes(x, 8)
    weight = quantize(W, 8, symmetric=True)
    theirs = torch.ops.bitsandbytes.int8_scaled_mm(
        q,
        weight.integers().to(torch.int8),
        s.flatten() * 127,
        weight.scales.float().flatten() * 127,
        dtype=torch.float32,
    )
    torch.testing.assert_close(quantized_matmul(q, s, weight), theirs, rtol=1e-4, atol=1e-4)


# --- torchao: integer products, dynamic activations, SmoothQuant ----------------------------------


def test_torchaos_integer_products():
    from torchao.kernel.intmm import int_matmul, int_scaled_matmul

    a, b = (torch.randint(-127, 128, (32, 64), dtype=torch.int8) for _ in range(2))
    assert torch.equal(integer_matmul(a, b), int_matmul(a, b.T))
    weight = QuantizedTensor.from_codes(b, torch.ones(32, 1), None, Grid(8, symmetric=True))
    scales = torch.rand(32, 1)
    torch.testing.assert_close(
        quantized_matmul(a, scales, weight), int_scaled_matmul(a, b.T, scales).float()
    )


def test_torchaos_dynamic_int8():
    """The model-level recipe (grids of 255 steps; ours have 254): both are as far from the truth.

    The two round to different points, so their errors are as good as independent.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128))
    x = randn(64, 256)
    with torch.no_grad():
        truth = model(x)
        ours = quantize_activations(model)(x)
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        theirs = model(x)
    assert relative(ours, truth) == pytest.approx(relative(theirs, truth), rel=0.1)
    assert relative(ours, theirs) < 1.6 * relative(theirs, truth)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_torchaos_smoothing_factors(alpha):
    """To 1e-4: theirs adds float32's epsilon to both maxima."""
    from torchao.prototype.smoothquant.core import SmoothQuantObserver

    x, W = randn(4, 16, 48), randn(32, 48, seed=1)
    x[..., 5] *= 60
    observer = SmoothQuantObserver(W, alpha)
    for part in x.split(2):
        observer(part)
    theirs, _, _ = observer.calculate_qparams()
    ours = smooth_scales(x.flatten(0, 1).abs().amax(0), [W], alpha)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def test_smoothing_beats_plain_quantization_by_torchaos_measure():
    """Their own test's: a smaller loss than without, and more than 20 dB of signal to noise."""
    from torchao.quantization.utils import compute_error

    x, W = randn(128, 64), randn(32, 64, seed=1)
    x[:, 5] *= 60
    truth = x @ W.T
    s = smooth_scales(x.abs().amax(0), [W], 0.5)
    plain, smoothed = (
        QuantizedInputs(QuantizedLinear(quantize(w, 8, symmetric=True)))(inputs)
        for inputs, w in ((x, W), (x / s, W * s))
    )
    assert compute_error(truth, smoothed) > compute_error(truth, plain) + 6
    assert compute_error(truth, smoothed) > 20


# --- scipy and torchao: Hadamard ------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 16, 256])
def test_scipys_hadamard(n):
    from scipy import linalg

    theirs = torch.from_numpy(linalg.hadamard(n)).double()
    assert torch.equal(hadamard_matrix(n), theirs)
    x = randn(3, n).double()
    torch.testing.assert_close(hadamard_transform(x), x @ theirs / n**0.5)


def test_torchaos_hadamard_transform():
    """Equal for powers of two; for others both are orthogonal, of entries of one magnitude."""
    from torchao.prototype.spinquant.hadamard_utils import get_hadK, matmul_hadU

    x = randn(3, 64).double()
    torch.testing.assert_close(hadamard_transform(x), matmul_hadU(x, *get_hadK(64)))
    for n in (12, 20, 28, 36, 48, 172 * 2):
        eye = torch.eye(n, dtype=torch.float64)
        theirs = matmul_hadU(eye, *get_hadK(n)).double()
        for Q in (theirs, random_hadamard(n), hadamard_transform(eye)):
            torch.testing.assert_close(Q @ Q.T, eye, rtol=0, atol=1e-6)
            torch.testing.assert_close(Q.abs(), torch.full((n, n), n**-0.5).double())


# --- torchao: the grid of KIVI --------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_kv_grid_is_torchaos_grid_with_a_floating_zero(bits):
    """Groups of 32 with a scale and a minimum of their own; theirs says the middle instead."""
    from torchao.quantization import quant_primitives as primitives

    x = randn(2, 3, 5, 64)
    packed = PackedRows.of(x, bits, 32)
    scales, minima = packed.scales.float().flatten(), packed.minima.float().flatten()
    rows = x.reshape(-1, 32)
    middle = minima + scales * 2 ** (bits - 1)
    codes = primitives._quantize_affine_tinygemm(
        rows, (1, 32), scales.unsqueeze(1), middle.unsqueeze(1), torch.uint8, 0, 2**bits - 1
    )
    theirs = primitives._dequantize_affine_tinygemm(
        codes, (1, 32), scales.unsqueeze(1), middle.unsqueeze(1), torch.uint8, 0, 2**bits - 1
    )
    ours = packed.read(torch.float32).reshape(-1, 32)
    same = (ours - theirs).abs() < 1e-4
    assert same.float().mean() > 0.999  # a number half way between two points may fall either way
    assert ((ours - theirs).abs() <= scales.unsqueeze(1) * 1.001).all()
    chosen, _ = primitives._choose_qparams_affine_tinygemm(
        rows, primitives.MappingType.ASYMMETRIC, (1, 32), torch.uint8, 0, 2**bits - 1
    )
    torch.testing.assert_close(scales, chosen.flatten().float(), rtol=1e-3, atol=0)


def test_the_whole_product_of_the_paper():
    """Equation by equation in float64, for the plainest case: nothing rounded that need not be."""
    x, W = with_outliers().double(), randn(24, 256, seed=1)
    weight = quantize(W, 8, symmetric=True)
    out = (x.abs() >= 6).any(0)
    inside = x[:, ~out]
    s = inside.abs().amax(1, keepdim=True) / 127
    below = x.masked_fill(x.abs() >= 6, 0).abs().amax(1, keepdim=True) / 127
    s = torch.where(below > 0, below, 1)
    dense = weight.dequantize(torch.float64)
    expected = (inside / s).round() * s @ dense[:, ~out].T + x[:, out] @ dense[:, out].T
    torch.testing.assert_close(llm_int8_matmul(x, weight), expected, rtol=1e-12, atol=1e-12)
