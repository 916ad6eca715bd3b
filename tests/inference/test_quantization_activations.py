"""Integer inputs times integer weights, against the same in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.core.calibration import Calibration
from effnb.core.modules import linears
from effnb.core.outliers import inject_outliers
from effnb.inference.quantization import activations as module
from effnb.inference.quantization.activations import (
    QuantizedInputs,
    activation_codes,
    input_maxima,
    integer_matmul,
    quantize_activations,
    quantize_inputs,
    quantized_matmul,
)
from effnb.inference.quantization.formats import QuantizedTensor, quantize
from effnb.inference.quantization.grid import Grid
from effnb.inference.quantization.linear import QuantizedLinear
from effnb.inference.quantization.rtn import dequantized, quantize_linears, rtn
from effnb.inference.quantization.storage import load_quantized, save_quantized
from effnb.inference.quantization.tables import quantize_table


def random_codes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator).to(torch.int8)


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


# The integer product


@settings(max_examples=30)
@given(m=st.integers(1, 20), k=st.integers(1, 40), n=st.integers(1, 20), seed=st.integers(0, 99))
def test_integer_products_are_exact(m, k, n, seed):
    a, b = random_codes(m, k, seed=seed), random_codes(n, k, seed=seed + 1)
    expected = a.long() @ b.long().T
    assert torch.equal(integer_matmul(a, b).long(), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_has_integer_kernel", lambda device: False)
        assert torch.equal(integer_matmul(a, b).long(), expected)


@pytest.mark.parametrize("kernel", [True, False])
def test_the_largest_sums_are_exact(kernel, monkeypatch):
    """float32 alone would lose the last bits of sums beyond 2^24, which slices of 1,024 avoid."""
    if not kernel:
        monkeypatch.setattr(module, "_has_integer_kernel", lambda device: False)
    a, b = torch.full((2, 3001), 127, dtype=torch.int8), torch.full((3, 3001), 127).to(torch.int8)
    a[0, -1] = 126
    expected = torch.tensor([[127 * 127 * 3001 - 127] * 3, [127 * 127 * 3001] * 3])
    assert int(expected[0, 0]) > 2**24
    assert torch.equal(integer_matmul(a, b).long(), expected)


def test_a_kernel_that_saturates_is_not_used(monkeypatch):
    def saturates(a, b):
        pairs = (a.int().unsqueeze(-1) * b.int()).unflatten(1, (-1, 2)).sum(2)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(1, dtype=torch.int32)

    monkeypatch.setattr(torch, "_int_mm", saturates)
    module._has_integer_kernel.cache_clear()
    try:
        a, b = torch.full((2, 4), -128, dtype=torch.int8), torch.full((3, 4), -128).to(torch.int8)
        assert (integer_matmul(a, b) == 4 * 128 * 128).all()
        assert not module._has_integer_kernel("cpu")
    finally:
        module._has_integer_kernel.cache_clear()


# Codes


def test_codes_by_hand():
    x = torch.tensor([[3.5, -7.0, 0.9], [0.0, 0.0, 0.0]])
    codes, scales = activation_codes(x, 4)
    assert codes.tolist() == [[4, -7, 1], [0, 0, 0]]  # 3.5 rounds to the even 4
    assert scales.tolist() == [[1.0], [1.0]]
    codes, scales = activation_codes(x, 2, "tensor")
    assert codes.tolist() == [[0, -1, 0], [0, 0, 0]]
    assert scales.tolist() == [[7.0], [7.0]]
    codes, scales = activation_codes(x, 3, "static", maximum=torch.tensor(5.25))
    assert codes.tolist() == [[2, -3, 1], [0, 0, 0]]  # -7 is cut off at -5.25
    assert scales.tolist() == [[1.75], [1.75]]
    codes, scales = activation_codes(x, 3, clip_ratio=0.75)
    assert codes.tolist() == [[2, -3, 1], [0, 0, 0]]


@settings(max_examples=30)
@given(
    tokens=st.integers(1, 6),
    features=st.integers(1, 20),
    bits=st.integers(2, 8),
    granularity=st.sampled_from(["token", "tensor"]),
    seed=st.integers(0, 99),
)
def test_codes_round_to_nearest(tokens, features, bits, granularity, seed):
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed)).double()
    codes, scales = activation_codes(x, bits, granularity)
    assert codes.abs().max() == 2 ** (bits - 1) - 1
    assert ((codes * scales - x).abs() <= scales / 2 * (1 + 1e-9)).all()
    mirrored, _ = activation_codes(-x, bits, granularity)
    assert torch.equal(mirrored, -codes)
    again, _ = activation_codes(codes * scales, bits, granularity)
    assert torch.equal(again, codes)


def test_a_token_of_nan_spoils_its_own_output_only():
    weight = quantize(torch.randn(3, 4), 8, symmetric=True)
    x = torch.randn(3, 4)
    x[1, 2] = torch.nan
    for keywords in (
        dict(granularity="token"),
        dict(granularity="static", maximum=torch.tensor(3.0)),
    ):
        y = quantized_matmul(*activation_codes(x, 8, **keywords), weight)
        assert y.isnan().all(1).tolist() == [False, True, False]


# Products of both


@pytest.mark.parametrize("group_size", ["tensor", "row", 16, 7])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_integer_path_is_the_float64_product(group_size, symmetric, bits):
    generator = torch.Generator().manual_seed(bits)
    W, x = torch.randn(9, 33, generator=generator), torch.randn(5, 33, generator=generator).double()
    weight = quantize(W + 0.3, bits, group_size=group_size, symmetric=symmetric)
    codes, scales = activation_codes(x, 8)
    expected = (codes * scales) @ weight.dequantize(torch.float64).T
    torch.testing.assert_close(
        quantized_matmul(codes, scales, weight), expected, rtol=1e-12, atol=1e-12
    )


def test_columns_in_another_order():
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    codes = torch.randint(0, 16, (5, 24), generator=torch.Generator().manual_seed(1))
    weight = QuantizedTensor.from_codes(
        codes, torch.full((5, 3), 0.25), torch.full((5, 3), 7), Grid(4, 8), order=order
    )
    q, s = activation_codes(torch.randn(6, 24).double(), 8)
    torch.testing.assert_close(
        quantized_matmul(q, s, weight), (q * s) @ weight.dequantize(torch.float64).T
    )


def toy(seed):
    """The spec's: 512 Gaussian tokens of 256 features, one of them 60 times as large."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(512, 256, generator=generator)
    X[:, 7] *= 60
    return X, torch.randn(256, 256, generator=generator) / 16


def test_error_with_an_outlier_channel():
    """W8A8 golden values 0.0352 (token, row) and 0.109 (tensor, tensor), within 15%."""
    token, tensor = [], []
    for seed in range(4):
        X, W = toy(seed)
        by_row, whole = (quantize(W, 8, group_size=g, symmetric=True) for g in ("row", "tensor"))
        token.append(relative(quantized_matmul(*activation_codes(X, 8), by_row), X @ W.T))
        codes = activation_codes(X, 8, "tensor")
        tensor.append(relative(quantized_matmul(*codes, whole), X @ W.T))
    assert sum(token) / 4 == pytest.approx(0.0352, rel=0.15)
    assert sum(tensor) / 4 == pytest.approx(0.109, rel=0.15)


def test_what_shares_a_scale():
    layer = QuantizedLinear(quantize(torch.randn(6, 16), 8, symmetric=True))
    x = torch.randn(3, 16)
    other = x.clone()
    other[2] *= 64
    by_token, by_batch = QuantizedInputs(layer, 4), QuantizedInputs(layer, 4, "tensor")
    fixed = QuantizedInputs(layer, 4, "static", maximum=torch.tensor(0.5))
    assert torch.equal(by_token(other), by_token(x) * torch.tensor([[1.0], [1.0], [64.0]]))
    assert not torch.allclose(by_batch(other)[:2], by_batch(x)[:2])
    torch.testing.assert_close(fixed(x), fixed(x.clamp(-0.5, 0.5)))
    assert by_token(x.view(3, 1, 16)).shape == (3, 1, 6)


# Whole models


def test_every_layer_rounds_its_inputs(llama, ids):
    new = quantize_activations(llama, 8, 6, group_size=8)
    layers = {n: m for n, m in new.named_modules() if isinstance(m, QuantizedInputs)}
    assert layers.keys() == linears(llama).keys()
    x = torch.randn(2, 5, 32)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"):
        W = quantize(linears(llama)[name].weight, 8, group_size=8, symmetric=True)
        top = x.abs().amax(-1, keepdim=True) / 31
        expected = (x / top).round().mul(top) @ W.dequantize().T
        torch.testing.assert_close(layers[name](x), expected, rtol=1e-4, atol=1e-5)
    assert new.lm_head.weight is llama.lm_head.weight


def test_more_bits_less_error(llama, ids):
    with torch.no_grad():
        truth = llama(ids).logits
        errors = [relative(quantize_activations(llama, 8, b)(ids).logits, truth) for b in (3, 5, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.06


def test_outliers_hurt_a_shared_scale_most(llama, ids):
    injected = inject_outliers(llama, [3], 40.0)
    with torch.no_grad():
        truth = llama(ids).logits
        plain, token, tensor = (
            relative(quantize_activations(m, 8, 8, granularity=g)(ids).logits, truth)
            for m, g in ((llama, "tensor"), (injected, "token"), (injected, "tensor"))
        )
    assert plain < token < tensor


def test_floating_point_gives_the_same(llama, ids):
    """With ordinary weights inside, and for formats without integer codes."""
    new = quantize_activations(llama, 4, 8, group_size=16, symmetric=False)
    with torch.no_grad():
        torch.testing.assert_close(
            dequantized(new)(ids).logits, new(ids).logits, rtol=1e-4, atol=1e-4
        )
        table = quantize_linears(llama, lambda weight: quantize_table(weight, "nf4"))
        rounded = quantize_inputs(table, 8)
        reference = quantize_inputs(dequantized(table), 8)
        torch.testing.assert_close(rounded(ids).logits, reference(ids).logits)
    assert relative(rounded(ids).logits, table(ids).logits) < 0.05


def test_static_scales_are_the_maxima_of_the_calibration_data(llama, ids):
    new = quantize_activations(
        llama, 8, 8, granularity="static", calibration=Calibration(ids, batch_size=3)
    )
    weights = rtn(llama, 8, symmetric=True)
    name, seen = "model.layers.1.mlp.down_proj", []
    weights.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        weights(ids)
    torch.testing.assert_close(new.get_submodule(name).maximum, seen[0].abs().max())
    with torch.no_grad():
        assert relative(new(ids).logits, llama(ids).logits) < 0.1


def test_padding_does_not_count(llama, ids):
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    other = ids.clone()
    other[:, 20:] = 5
    name = "model.layers.0.self_attn.q_proj"
    found = [
        input_maxima(llama, [{"input_ids": x, "attention_mask": mask}], [name])[name]
        for x in (ids, other)
    ]
    assert torch.equal(*found)
    whole = input_maxima(llama, ids, [name])[name]
    assert (whole >= found[0]).all() and (whole > found[0]).any()
    assert not llama.model.layers[0].self_attn.q_proj._forward_pre_hooks


def test_progress_and_training_mode(llama, ids):
    llama.train()
    steps = []
    watched = Calibration(ids, batch_size=2, progress=lambda *step: steps.append(step))
    quantize_inputs(llama, granularity="static", calibration=watched)
    assert steps == [(1, 2), (2, 2)] and llama.training


def test_state_survives_a_file(llama, ids, tmp_path):
    """A file holds the weights; it is read into the model that rounds its inputs alike."""
    new = quantize_activations(llama, 4, 8, group_size=16)
    save_quantized(new, tmp_path / "w4a8.safetensors")
    again = load_quantized(quantize_inputs(llama, 8), tmp_path / "w4a8.safetensors")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, new(ids).logits)


def test_half_precision_and_bias():
    layer = nn.Linear(16, 4)
    new = quantize_activations(nn.Sequential(layer), 8, 8)[0]
    x = torch.randn(3, 16)
    torch.testing.assert_close(new(x), layer(x), atol=0.05, rtol=0.05)
    assert new.layer.bias is layer.bias
    half = quantize_activations(nn.Sequential(nn.Linear(16, 4).bfloat16()), 8, 8)
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_bad_input_is_one_sentence(llama, ids):
    with pytest.raises(ValueError, match="bits is 9; the uniform formats have 2 to 8"):
        quantize_activations(llama, 8, 9)
    with pytest.raises(ValueError, match="bits is 1; the uniform formats"):
        quantize_activations(llama, 1, 8)
    with pytest.raises(ValueError, match="granularity is 'channel'; it must be one of token"):
        quantize_activations(llama, granularity="channel")
    with pytest.raises(ValueError, match="clip_ratio is 0; it must be above 0"):
        quantize_activations(llama, clip_ratio=0)
    with pytest.raises(ValueError, match='"static" needs calibration data'):
        quantize_activations(llama, granularity="static")
    with pytest.raises(ValueError, match="calibration data is empty"):
        quantize_inputs(llama, granularity="static", calibration=ids[:0])
    with pytest.raises(ValueError, match="no Linear or QuantizedLinear fits the pattern nothing"):
        quantize_inputs(llama, layers="nothing")
    with pytest.raises(ValueError, match="quantized already"):
        quantize_activations(rtn(llama, 4))
    with pytest.raises(ValueError, match="inputs are quantized already"):
        quantize_inputs(quantize_inputs(llama))
    with pytest.raises(ValueError, match='goes with granularity "static", and only with it'):
        activation_codes(torch.ones(1, 2), 8, "static")
    with pytest.raises(ValueError, match="goes with granularity"):
        activation_codes(torch.ones(1, 2), 8, "token", maximum=torch.tensor(1.0))
    spare = nn.ModuleList([nn.Linear(32, 32)])
    llama.add_module("spare", spare)
    with pytest.raises(ValueError, match=r"never reaches the layer spare\.0"):
        quantize_inputs(llama, granularity="static", calibration=ids)
    with torch.no_grad():
        llama.model.embed_tokens.weight[int(ids[0, 0])] = torch.nan
    with pytest.raises(ValueError, match=r"the inputs of .* are NaN or infinite"):
        quantize_inputs(llama, granularity="static", calibration=ids)
