"""LLM.int8(): what stays in floating point, and what the rest loses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.core.outliers import inject_outliers
from effnb.inference.quantization.activations import activation_codes, quantize_activations
from effnb.inference.quantization.formats import quantize
from effnb.inference.quantization.llm_int8 import (
    LLMInt8Linear,
    llm_int8,
    llm_int8_matmul,
    outlier_columns,
    outlier_fractions,
    vectorwise_codes,
)
from effnb.inference.quantization.rtn import dequantized, rtn


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


def test_by_hand():
    x = torch.tensor([[1.0, -8.0, 0.5], [2.0, 1.5, 0.0], [0.0, 7.0, 0.0]])
    codes, scales, outliers = vectorwise_codes(x, 6.0)
    assert outliers.tolist() == [False, True, False]
    # The second token's scale is its 2.0; had column 1 been taken out of it, 1.5 would not count.
    assert scales.flatten().tolist() == pytest.approx([1 / 127, 2 / 127, 1.0])
    assert codes.tolist() == [[127, 0, 64], [127, 0, 0], [0, 0, 0]]
    # An entry below the threshold counts for the scale even in a column that is taken out.
    _, scales, _ = vectorwise_codes(torch.tensor([[8.0, 0.1], [4.0, 1.0]]), 6.0)
    assert scales.flatten().tolist() == pytest.approx([0.1 / 127, 4 / 127])


@settings(max_examples=30)
@given(
    tokens=st.integers(1, 8),
    features=st.integers(1, 20),
    rows=st.integers(1, 9),
    threshold=st.sampled_from([0.0, 0.5, 1.0, 2.0, 6.0]),
    seed=st.integers(0, 99),
)
def test_the_product_is_the_equation(tokens, features, rows, threshold, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator).double()
    W = quantize(torch.randn(rows, features, generator=generator), 8, symmetric=True)
    dense = W.dequantize(torch.float64)
    large = x.abs() >= threshold if threshold else torch.zeros_like(x, dtype=torch.bool)
    out = large.any(0)
    top = x.masked_fill(large, 0).abs().amax(1, keepdim=True)
    s = torch.where(top > 0, top / 127, 1)
    rounded = torch.where(out, x, (x / s).round() * s)
    assert torch.equal(outlier_columns(x, threshold), out)
    torch.testing.assert_close(
        llm_int8_matmul(x, W, threshold), rounded @ dense.T, rtol=1e-12, atol=1e-12
    )


def test_the_ends_of_the_threshold():
    x, W = torch.randn(6, 20), torch.randn(5, 20)
    weight = quantize(W, 8, symmetric=True)
    torch.testing.assert_close(llm_int8_matmul(x, W, 1e-9), x @ weight.dequantize().T)
    codes, scales = activation_codes(x, 8)
    torch.testing.assert_close(llm_int8_matmul(x, W, 0.0), (codes * scales) @ weight.dequantize().T)
    assert torch.equal(llm_int8_matmul(x, W, 0.0), llm_int8_matmul(x, W, 100.0))


@pytest.mark.parametrize("threshold", [3.0, 4.0, 5.0])
def test_outlier_columns_of_gaussian_inputs(threshold):
    """The chance that 512 tokens reach the threshold somewhere, for 256 columns, within 4 sigma."""
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    chance = 1 - (1 - math.erfc(threshold / math.sqrt(2))) ** 512
    spread = math.sqrt(256 * chance * (1 - chance))
    assert abs(int(outlier_columns(x, threshold).sum()) - 256 * chance) <= 4 * spread + 0.5


def test_the_decomposition_saves_the_other_features():
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(64, 48, generator=generator), torch.randn(32, 48, generator=generator)
    x[:, 5] *= 60
    truth = x @ W.T
    plain, decomposed = (llm_int8_matmul(x, W, t) for t in (0.0, 6.0))
    others = torch.arange(48) != 5
    rest = truth - x[:, 5:6] @ W[:, 5:6].T
    assert relative(decomposed, truth) < 0.5 * relative(plain, truth)
    kept = decomposed - x[:, 5:6] @ quantize(W, 8, symmetric=True).dequantize()[:, 5:6].T
    assert relative(kept, rest) < 0.015
    assert relative(x[:, others] @ W[:, others].T, rest) < 1e-5


def test_models(llama, ids):
    injected = inject_outliers(llama, [3], 40.0)
    new = llm_int8(injected)
    assert sum(isinstance(m, LLMInt8Linear) for m in new.modules()) == 21
    with torch.no_grad():
        truth = llama(ids).logits
        plain = relative(quantize_activations(injected)(ids).logits, truth)
        assert relative(new(ids).logits, truth) < 0.6 * plain
        off = llm_int8(injected, 0.0)
        torch.testing.assert_close(off(ids).logits, quantize_activations(injected)(ids).logits)
        torch.testing.assert_close(
            dequantized(new)(ids).logits, new(ids).logits, rtol=1e-3, atol=1e-4
        )


def test_fractions(llama, ids):
    some = outlier_fractions(inject_outliers(llama, [3, 4], 60.0), ids, 12.0)
    assert len(some) == 21
    reads_a_norm = [v for n, v in some.items() if n.endswith(("q_proj", "gate_proj"))]
    assert reads_a_norm == [2 / 32] * 6
    assert set(outlier_fractions(llama, ids, 0.0).values()) == {0.0}
    assert set(outlier_fractions(llama, ids, 1e-9).values()) == {1.0}
    own = outlier_fractions(llm_int8(llama, 1e-9), ids, 100.0)
    assert set(own.values()) == {1.0}, "an LLM.int8() layer has its own threshold"


def test_bias_shapes_and_types():
    layer = nn.Linear(16, 4)
    new = llm_int8(nn.Sequential(layer))[0]
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(new(x), layer(x), atol=0.05, rtol=0.05)
    assert torch.equal(new(torch.zeros(1, 16)), layer.bias[None])
    half = llm_int8(nn.Sequential(nn.Linear(16, 4).bfloat16()))
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_bad_input_is_one_sentence(llama, ids):
    for threshold in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="threshold is .*; it must be above 0, or 0"):
            llm_int8(llama, threshold)
        with pytest.raises(ValueError, match="threshold is"):
            llm_int8_matmul(torch.ones(1, 2), torch.ones(1, 2), threshold)
        with pytest.raises(ValueError, match="threshold is"):
            outlier_fractions(llama, ids, threshold)
    with pytest.raises(ValueError, match="quantized already"):
        llm_int8(rtn(llama, 4))
    with pytest.raises(ValueError, match="no Linear fits the pattern nothing"):
        llm_int8(llama, layers="nothing")
    with pytest.raises(ValueError, match="1 entries that are NaN"):
        llm_int8_matmul(torch.ones(1, 2), torch.tensor([[1.0, torch.nan]]))
