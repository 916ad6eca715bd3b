"""Rounding to nearest on whole models."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from effnb.core.modules import linears
from effnb.evaluation import parameter_count, stored_bytes
from effnb.inference.quantization import QuantizedLinear, dequantized, quantize, rtn


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
    some = rtn(llama, 4, include="*.mlp.*")
    assert sum(isinstance(m, QuantizedLinear) for m in some.modules()) == 9
    everything = rtn(llama, 4, exclude=())
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
        rtn(llama, 4, include="nothing")
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: the weight has 1 entries"):
        rtn(llama, 4)
    with pytest.raises(ValueError, match="no QuantizedLinear fits"):
        dequantized(llama)
