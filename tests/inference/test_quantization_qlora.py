"""QLoRA: four bits below, a LoRA beside, and a gradient through both."""

import copy

import pytest
import torch
from torch import nn

from effnb.core.delta_hosts import WithDeltas
from effnb.core.training import TrainingSettings, causal_lm_loss, train
from effnb.evaluation import parameter_count, stored_bytes
from effnb.finetuning import lora
from effnb.inference.quantization import QuantizedLinear, dequantized, quantize, rtn
from effnb.inference.quantization.qlora import qlora
from effnb.inference.quantization.rtn import quantize_linears
from effnb.inference.quantization.tables import quantize_table


def batch(step):
    return torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(step % 2))


@pytest.mark.parametrize("table", ["nf4", "fp4", "int4"])
def test_untrained_it_is_the_quantized_model(llama, ids, table):
    model = qlora(llama, table=table, block_size=16, double=False)
    if table == "int4":
        base = rtn(llama, 4, group_size=16, symmetric=True)
    else:
        base = quantize_linears(llama, lambda w: quantize_table(w, table, block_size=16))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
        assert torch.equal(lora.detach(model, "default")(ids).logits, base(ids).logits)


def test_double_quantization_is_the_default_and_a_table_of_ones_own_works(llama):
    layer = qlora(llama).model.layers[0].mlp.up_proj.base.quantized
    assert layer.double and layer.table == "nf4" and layer.block_size == 64
    own = qlora(llama, table=torch.linspace(-1, 1, 16)).model.layers[0].mlp.up_proj.base.quantized
    assert own.table == "custom"


def test_bits_of_the_base():
    """4 bits and a scale of 8 bits for 64 weights, of which 256 share 32 bits: 4.127."""
    model = qlora(nn.Sequential(nn.Linear(512, 512, bias=False)), rank=4)
    base = model[0].base
    assert isinstance(base, QuantizedLinear)
    assert base.quantized.bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=2e-4)
    assert parameter_count(model) == 512 * 512 + 2 * 4 * 512
    assert stored_bytes(model) == base.quantized.bytes + 4 * 2 * 4 * 512


def test_training_lowers_the_loss_above_a_frozen_base(llama, ids, tmp_path):
    before = copy.deepcopy(llama.state_dict())
    model = qlora(llama, rank=4, dropout=0.05)
    codes = {name: b.clone() for name, b in model.named_buffers()}
    settings = TrainingSettings(steps=12, learning_rate=1e-2)
    result = train(model, batch, settings, checkpoint=tmp_path / "run")
    assert result.losses[-1] < 0.9 * result.losses[0]
    for name, tensor in llama.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, codes[name])
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())
    path = tmp_path / "task.safetensors"
    lora.save_delta(model, "default", path)
    base = lora.detach(model, "default")
    again = lora.open_delta(base, path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="stored quantized"):
        lora.merge(model, "default")
    merged = lora.merge(model, "default", dequantize=True)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_merging_into_four_bits_would_lose_the_training(llama, ids):
    """Why it is refused: rounding the sum makes an error of the size of the change itself."""
    model = qlora(llama, rank=4)
    train(model, batch, TrainingSettings(steps=12, learning_rate=1e-2))
    merged = lora.merge(model, "default", dequantize=True)
    again = quantize_linears(merged, lambda w: quantize_table(w, double=True))
    with torch.no_grad():
        best, lost = causal_lm_loss(merged, batch(0)), causal_lm_loss(again, batch(0))
        kept = causal_lm_loss(model, batch(0))
    assert float(abs(best - kept)) < 1e-3
    assert float(lost) > float(kept) + 0.02


def test_gradients_are_those_through_the_weights_read_back(llama, ids):
    """The gradient that reaches every A and B, and every input, is that of ordinary layers."""
    model = qlora(llama, rank=2, block_size=32)
    torch.manual_seed(0)
    state = {
        k: torch.randn_like(t) * 0.1 for k, t in lora.delta_state_dict(model, "default").items()
    }
    model = lora.load_delta(model, "default", state)
    plain = lora.load_delta(
        lora.attach(dequantized(lora.detach(model, "default")), rank=2), "default", state
    )
    for one in (model, plain):
        causal_lm_loss(one, ids).backward()
    found, expected = (lora.delta_parameters(one, "default") for one in (model, plain))
    for name, parameter in found.items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_the_inputs():
    torch.manual_seed(0)
    layer = nn.Linear(24, 10)
    model = qlora(nn.Sequential(layer), rank=2, block_size=8)
    x = torch.randn(3, 5, 24, requires_grad=True)
    upstream = torch.randn(3, 5, 10)
    model(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ model[0].base.weight)  # B is 0
    with torch.no_grad():
        assert not model(x).requires_grad
    quantized = quantize_linears(nn.Sequential(layer), quantize_table)
    again = x.detach().clone().requires_grad_()
    quantized(again).backward(upstream)  # without a delta too
    torch.testing.assert_close(again.grad, upstream @ quantized[0].weight)


def test_the_weight_is_not_kept_for_the_backward_pass():
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = qlora(nn.Sequential(nn.Linear(256, 256)), rank=2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(torch.randn(2, 256, requires_grad=True)).sum().backward()
    assert sum(kept.values()) < 0.1 * 4 * 256 * 256


def test_several_tasks_on_one_base(llama, ids):
    one = qlora(llama, "one", rank=2, seed=1)
    two = lora.attach(one, "two", rank=2, seed=2)
    train(two, batch, TrainingSettings(steps=2, learning_rate=1e-2))
    with torch.no_grad():
        assert torch.equal(lora.set_active(two, "one")(ids).logits, one(ids).logits)
        assert not torch.equal(two(ids).logits, one(ids).logits)
    assert two.model.layers[0].mlp.up_proj.base.codes is one.model.layers[0].mlp.up_proj.base.codes


def test_half_precision_models(llama, ids):
    model = qlora(llama.to(torch.bfloat16))
    assert model(ids).logits.dtype == torch.bfloat16
    causal_lm_loss(model, ids).backward()
    assert lora.delta_parameters(model, "default")["model.layers.0.mlp.up_proj.B"].grad is not None


def test_only_layers_with_a_lora_are_quantized(llama):
    model = qlora(llama, layers="*.q_proj")
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 3
    assert sum(isinstance(m, WithDeltas) for m in model.modules()) == 3
    assert isinstance(model.lm_head, nn.Linear)


def test_bad_input_is_one_sentence(llama):
    for settings, message in [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 17}, "k_proj: rank is 17"),
        ({"alpha": -1.0}, "alpha is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"table": "nf5"}, "'nf5' is no table"),
        ({"block_size": 0}, "block_size is 0"),
        ({"table": "int4", "block_size": 0}, "group_size is 0"),
        ({"layers": "nothing"}, "no linear layer fits"),
        ({"name": ""}, "cannot name a delta"),
    ]:
        with pytest.raises(ValueError, match=message):
            qlora(llama, **settings)
    with pytest.raises(ValueError, match="quantized already"):
        qlora(rtn(llama, 4))
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\S*: the weight has 1 entries"):
        qlora(llama)


def test_int4_is_the_uniform_grid(llama):
    weight = llama.model.layers[0].mlp.up_proj.weight
    base = qlora(llama, table="int4", block_size=8).model.layers[0].mlp.up_proj.base
    expected = quantize(weight, 4, group_size=8, symmetric=True)
    assert torch.equal(base.quantized.codes, expected.codes)
