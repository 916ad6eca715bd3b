"""Rounding to nearest on whole models."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from effnb.core.modules import Layers, linears
from effnb.evaluation import parameter_count, stored_bytes
from effnb.inference.quantization import QuantizedLinear, dequantized, quantize, rtn
from effnb.inference.quantization.extreme import binarize, ternarize
from effnb.inference.quantization.linear import refuse_quantized
from effnb.inference.quantization.rtn import quantize_linears
from effnb.inference.quantization.tables import quantize_table


def test_layers_become_their_rounded_weights(llama, ids):
    new = rtn(llama, 4, group_size=16)
    for name, layer in linears(llama).items():
        quantized = new.get_submodule(name)
        assert isinstance(quantized, QuantizedLinear)
        assert torch.equal(quantized.weight, quantize(layer.weight, 4, group_size=16).dequantize())
    dense = dequantized(new)
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, new(ids).logits)


def test_the_rest_is_shared_and_the_original_untouched(llama, ids):
    before = {name: p.clone() for name, p in llama.named_parameters()}
    new = rtn(llama, 2)
    assert new.model.embed_tokens.weight is llama.model.embed_tokens.weight
    assert new.lm_head.weight is llama.lm_head.weight
    new(ids)
    for name, parameter in llama.named_parameters():
        assert torch.equal(parameter, before[name])


def test_more_bits_less_error(llama, ids):
    with torch.no_grad():
        truth = llama(ids).logits
        errors = [float((rtn(llama, b)(ids).logits - truth).norm()) for b in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.03 * float(truth.norm())


def test_bytes_are_those_of_the_formats(llama):
    new = rtn(llama, 3, group_size=16, symmetric=True)
    kept = sum(
        p.numel() * 4 for n, p in llama.named_parameters() if n.split(".")[-2] not in
        {name.split(".")[-1] for name in linears(llama)}
    )  # fmt: skip
    packed = sum(m.quantized.bytes for m in new.modules() if isinstance(m, QuantizedLinear))
    assert stored_bytes(new) == kept + packed
    assert parameter_count(new) == parameter_count(llama)


def test_state_survives_a_file(llama, ids, tmp_path):
    new = rtn(llama, 4, group_size=16)
    path = tmp_path / "quantized.safetensors"
    state = new.state_dict()
    state.pop("lm_head.weight")  # tied to the embedding
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    other = rtn(llama, 4, group_size=16)
    for buffer in other.buffers():
        buffer.zero_()
    missing, unexpected = other.load_state_dict(load_file(path), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    with torch.no_grad():
        assert torch.equal(other(ids).logits, new(ids).logits)


def test_bias_is_kept():
    layer = nn.Linear(16, 4)
    quantized = rtn(nn.Sequential(layer), 8)[0]
    assert quantized.bias is layer.bias
    x = torch.randn(3, 16)
    torch.testing.assert_close(quantized(x), layer(x), atol=0.05, rtol=0.05)


def test_pattern_and_head(llama):
    some = rtn(llama, 4, layers="*.mlp.*")
    assert sum(isinstance(m, QuantizedLinear) for m in some.modules()) == 9
    everything = rtn(llama, 4, layers=Layers(exclude=()))
    assert isinstance(everything.lm_head, QuantizedLinear)


def test_half_precision_models(llama, ids):
    half = llama.to(torch.bfloat16)
    assert rtn(half, 8)(ids).logits.dtype == torch.bfloat16


def test_bad_input_is_one_sentence(llama):
    with pytest.raises(ValueError, match="bits is 12; the uniform formats have 2 to 8"):
        rtn(llama, 12)
    with pytest.raises(ValueError, match="quantized already"):
        rtn(rtn(llama, 4), 4)
    with pytest.raises(ValueError, match="no Linear fits the pattern nothing"):
        rtn(llama, 4, layers="nothing")
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: the weight has 1 entries"):
        rtn(llama, 4)
    with pytest.raises(ValueError, match="no QuantizedLinear fits"):
        dequantized(llama)


FORMATS = {
    "nf4": quantize_table,
    "nf4 double": lambda w: quantize_table(w, double=True),
    "e4m3": lambda w: quantize_table(w, "e4m3", block_size="row"),
    "custom": lambda w: quantize_table(w, torch.tensor([-1.0, -0.3, 0.0, 0.3, 1.0])),
    "ternary": ternarize,
    "binary": binarize,
}


@pytest.mark.parametrize("name", FORMATS)
def test_any_format_for_every_layer(name, llama, ids):
    function = FORMATS[name]
    new = quantize_linears(llama, function)
    packed = 0
    for layer_name, layer in linears(llama).items():
        quantized = new.get_submodule(layer_name)
        expected = function(layer.weight)
        assert torch.equal(quantized.weight, expected.dequantize())
        assert quantized.quantized.bytes == expected.bytes
        assert set(quantized.state_dict()) == set(expected.tensors())
        packed += expected.bytes
    kept = llama.model.embed_tokens.weight.numel() * 4 + sum(
        p.numel() * 4 for n, p in llama.named_parameters() if "norm" in n
    )
    assert stored_bytes(new) == kept + packed
    assert parameter_count(new) == parameter_count(llama)
    with torch.no_grad():
        torch.testing.assert_close(dequantized(new)(ids).logits, new(ids).logits)


def test_clipping_reaches_the_layers(llama):
    for clip in ("percentile", "mse"):
        how = {"symmetric": True, "clip": clip, "percentile": 95.0, "exponent": 2.4}
        new = rtn(llama, 3, layers="*.1.mlp.*", **how)
        for name, layer in linears(llama, "*.1.mlp.*").items():
            expected = quantize(layer.weight, 3, **how)
            assert torch.equal(new.get_submodule(name).weight, expected.dequantize())


def test_clipping_for_least_error_lowers_the_error_of_three_bits(llama):
    def error(clip):
        layers = named_layers(rtn(llama, 3, clip=clip, symmetric=True, layers="*.0.*"))
        return sum(
            float((m.weight - llama.get_submodule(n).weight).square().sum())
            for n, m in layers.items()
        )

    with torch.no_grad():
        assert error("mse") < 0.9 * error("minmax")


def named_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def test_half_precision_models_read_back_in_their_own_type(llama, ids):
    half = llama.to(torch.bfloat16)
    dense = dequantized(rtn(half, 8))
    assert dense.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert dense(ids).logits.dtype == torch.bfloat16
    exact = dequantized(rtn(half, 8), torch.float64)
    assert exact.model.layers[0].mlp.up_proj.weight.dtype == torch.float64


@pytest.mark.parametrize("name", ["nf4 double", "ternary"])
def test_changing_the_models_type_leaves_stored_numbers_alone(name, llama, ids):
    new = quantize_linears(llama, FORMATS[name])
    before = {n: m.weight for n, m in named_layers(new).items()}
    size = {n: m.quantized.bytes for n, m in named_layers(new).items()}
    new = new.to(torch.bfloat16)
    for n, m in named_layers(new).items():
        assert torch.equal(m.weight, before[n]) and m.quantized.bytes == size[n]
    assert new(ids).logits.dtype == torch.bfloat16


def test_layers_move_to_another_device(llama):
    layer = next(iter(named_layers(quantize_linears(llama, FORMATS["nf4 double"])).values()))
    moved = layer.to("meta")
    assert moved.weight.device.type == "meta" and moved.weight.shape == layer.weight.shape


def test_the_layer_says_what_it_is():
    layer = QuantizedLinear(quantize(torch.randn(4, 16), 3, group_size=8, symmetric=True))
    assert repr(layer) == (
        "QuantizedLinear(in_features=16, out_features=4, format='uniform', bits=3, group_size=8, "
        "symmetric=True)"
    )


def test_quantized_models_are_refused_of_any_kind(llama):
    refuse_quantized(llama)
    with pytest.raises(ValueError, match="quantized already"):
        quantize_linears(quantize_linears(llama, binarize), binarize)
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantized already"):
        refuse_quantized(nn.Sequential(layer))  # as other libraries pack their weights


def test_wrong_settings_are_refused_before_any_work(llama):
    with torch.no_grad():
        llama.model.layers[0].self_attn.q_proj.weight[0, 0] = torch.nan
    for how, message in (
        ({"group_size": "column"}, "group_size is 'column'"),
        ({"clip": "none"}, "clip is 'none'"),
        ({"clip": "percentile", "percentile": 200.0}, "percentile is 200"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            rtn(llama, 4, **how)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: the weight has 1 entries"):
        quantize_linears(llama, binarize)
