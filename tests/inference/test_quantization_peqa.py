"""Scale-only tuning: the gradient formula, the frozen integers, and tasks as scales."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from effnb.core.training import TrainingSettings, causal_lm_loss, train
from effnb.evaluation import parameter_count, stored_bytes
from effnb.finetuning import lora
from effnb.inference.quantization import QuantizedLinear, QuantizedTensor, quantize, rtn
from effnb.inference.quantization.activations import quantize_inputs
from effnb.inference.quantization.grid import Grid
from effnb.inference.quantization.llm_int8 import llm_int8
from effnb.inference.quantization.peqa import (
    ScaleTunedLinear,
    load_scales,
    peqa,
    scale_gradient,
    scales_state_dict,
    to_quantized,
    tune_scales,
)
from effnb.inference.quantization.rtn import quantize_linears
from effnb.inference.quantization.tables import quantize_table

SIZES = st.one_of(st.sampled_from(["row", "tensor"]), st.integers(1, 12))


def batch(step):
    return torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(step % 2))


def stored_with_order(weight, bits, group_size, symmetric, order):
    """A weight quantized with its columns in another order, as act-order does."""
    plain = quantize(weight[:, order], bits, group_size=group_size, symmetric=symmetric)
    return QuantizedTensor.from_codes(
        plain.integers(), plain.scales.float(), plain.zero_points(),
        Grid(bits, group_size, symmetric), order=order,
    )  # fmt: skip


@examples(max_examples=25)
@given(
    st.integers(2, 8), SIZES, st.booleans(), st.booleans(), st.integers(1, 5), st.integers(1, 25)
)  # fmt: skip
def test_the_gradient_is_the_formula(bits, group_size, symmetric, ordered, rows, columns):
    """The closed form against autograd through s (q - z), in float64, to 1e-9."""
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator)
    order = torch.randperm(columns, generator=generator) if ordered else torch.arange(columns)
    stored = stored_with_order(weight, bits, group_size, symmetric, order)
    scales = stored.scales.double().requires_grad_()
    # Which scale a column reads, by the definition of a group: stored column j is in group j // g.
    size = columns if isinstance(group_size, str) else group_size
    spread = scales.expand(rows, -1)[:, torch.arange(columns) // size]
    zero = stored.zero_points()
    z = 0 if zero is None else zero.double().expand(rows, -1)[:, torch.arange(columns) // size]
    read = torch.empty(rows, columns, dtype=torch.float64)
    read[:, order] = spread * (stored.integers().double() - z)
    torch.testing.assert_close(read.float(), stored.dequantize())
    upstream = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad((read * upstream).sum(), scales)
    found = scale_gradient(upstream, stored)
    assert found.shape == stored.scales.shape
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", ["tensor", "row", 8, 5])
def test_a_layers_gradients_are_those_of_plain_autograd(group_size, symmetric):
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 24), nn.Parameter(torch.randn(6))
    order = torch.randperm(24)
    stored = stored_with_order(weight, 4, group_size, symmetric, order)
    layer = ScaleTunedLinear(QuantizedLinear(stored, bias))
    with torch.no_grad():
        layer.delta.copy_(torch.rand_like(layer.delta) * 0.5)
    now = layer.quantized
    assert not torch.equal(now.scales, stored.scales) and torch.equal(now.codes, stored.codes)
    x = torch.randn(2, 3, 24, requires_grad=True)
    upstream = torch.randn(2, 3, 6)
    y = layer(x)
    y.backward(upstream)
    plain = now.dequantize().requires_grad_()
    again = x.detach().clone().requires_grad_()
    expected = nn.functional.linear(again, plain, bias)
    expected.backward(upstream)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, again.grad)
    torch.testing.assert_close(
        layer.delta.grad, scale_gradient(plain.grad, stored), rtol=1e-5, atol=1e-4
    )


def test_nothing_large_is_kept_for_the_backward_pass():
    """Neither the weight read back nor its integers: only the inputs, codes and scales."""
    layer = ScaleTunedLinear(rtn(nn.Sequential(nn.Linear(256, 256)), 4)[0])
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(torch.randn(2, 256, requires_grad=True))
    assert sum(kept.values()) < 256 * 256  # a byte for each weight would be more


@pytest.mark.parametrize("group_size", ["row", 16])
def test_untuned_it_is_rtn_bit_for_bit(llama, ids, group_size):
    model, rounded = peqa(llama, 3, group_size=group_size), rtn(llama, 3, group_size=group_size)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, rounded(ids).logits)
    layer = model.model.layers[0].mlp.up_proj
    expected = 48 * (1 if group_size == "row" else 2)
    assert layer.delta.numel() == expected  # m per row, m n / g per group
    assert parameter_count(model) == parameter_count(llama) + sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_training_moves_scales_alone(llama, ids, tmp_path):
    before = {n: t.clone() for n, t in llama.state_dict().items()}
    model = peqa(llama, 3, group_size=16)
    codes = {n: b.clone() for n, b in model.named_buffers()}
    settings = TrainingSettings(steps=15, learning_rate=3e-3)
    result = train(model, batch, settings, checkpoint=tmp_path / "run")
    assert result.losses[-1] < 0.9 * result.losses[0]
    for name, tensor in llama.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, codes[name])
    assert all(n.endswith(".delta") for n, p in model.named_parameters() if p.grad is not None)
    packed = to_quantized(model)
    assert {type(m) for m in packed.modules()} & {ScaleTunedLinear} == set()
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, model(ids).logits)
    assert stored_bytes(packed) == stored_bytes(rtn(llama, 3, group_size=16))
    again = train(peqa(llama, 3, group_size=16), batch, settings, checkpoint=tmp_path / "run")
    assert again.losses == result.losses


def test_small_steps_add_up(llama):
    """A step below half precision's resolution is kept, though the scale is not changed by it."""
    layer = peqa(llama, 4).model.layers[0].mlp.up_proj
    before = layer.tuned_scales().detach().clone()
    with torch.no_grad():
        layer.delta += before * 1e-4
    assert torch.equal(layer.tuned_scales(), before)
    with torch.no_grad():
        layer.delta += before * 9e-4
    assert not torch.equal(layer.tuned_scales(), before)


def test_a_scale_stays_above_zero_and_can_come_back():
    layer = peqa(nn.Sequential(nn.Linear(8, 4)), 4)[0]
    with torch.no_grad():
        layer.delta.fill_(-10)
    assert bool((layer.tuned_scales() > 0).all())
    layer(torch.randn(3, 8)).sum().backward()
    assert bool(layer.delta.grad.any())


def test_the_task_is_the_scales(llama, ids):
    model = peqa(llama, 4, group_size=16)
    one, two = load_scales(model, scales_state_dict(model)), None
    train(one, batch, TrainingSettings(steps=2, learning_rate=1e-2))
    state = scales_state_dict(one)
    assert all(t.dtype == torch.float16 for t in state.values())
    assert sum(t.numel() * 2 for t in state.values()) == 2 * sum(
        p.numel() for p in one.parameters() if p.requires_grad
    )
    two = load_scales(model, state)
    deployed = load_scales(to_quantized(model), state)
    with torch.no_grad():
        assert torch.equal(two(ids).logits, one(ids).logits)
        assert torch.equal(deployed(ids).logits, one(ids).logits)
        back = load_scales(deployed, scales_state_dict(model))
        assert torch.equal(back(ids).logits, rtn(llama, 4, group_size=16)(ids).logits)
        assert not torch.equal(one(ids).logits, model(ids).logits)
    codes = "codes"
    path = "model.layers.2.self_attn.q_proj"
    assert getattr(deployed.get_submodule(path), codes) is getattr(model.get_submodule(path), codes)
    some = {f"{path}.scales": state[f"{path}.scales"]}
    partly = load_scales(to_quantized(model), some)
    assert torch.equal(partly.get_submodule(path).scales, some[f"{path}.scales"])


def test_models_quantized_by_other_methods(llama, ids):
    base = rtn(llama, 4, clip="mse")
    model = tune_scales(base, layers="*.mlp.*")
    assert sum(p.requires_grad for p in model.parameters()) == 9
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
    assert all(p.requires_grad for p in llama.parameters())
    layer = model.model.layers[0].mlp.up_proj
    torch.testing.assert_close(layer.dequantized().weight, base.model.layers[0].mlp.up_proj.weight)


def test_a_lora_on_a_tuned_model(llama, ids):
    tuned = peqa(llama, 4)
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.delta += 0.01
    new = lora.attach(tuned, rank=2)
    with torch.no_grad():
        assert torch.equal(new(ids).logits, tuned(ids).logits)
    causal_lm_loss(new, ids).backward()
    assert new.model.layers[0].mlp.up_proj.base.delta.grad is None
    merged = lora.merge(new, "default", dequantize=True)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, new(ids).logits, atol=1e-5, rtol=1e-5)


def test_half_precision_models(llama, ids):
    model = peqa(llama.to(torch.bfloat16), 4)
    causal_lm_loss(model, ids).backward()
    assert model.model.layers[0].mlp.up_proj.delta.grad.dtype == torch.float32


def test_bad_input_is_one_sentence(llama):
    with pytest.raises(ValueError, match="bits is 1"):
        peqa(llama, 1)
    with pytest.raises(ValueError, match="quantized already"):
        peqa(rtn(llama, 4), 4)
    with pytest.raises(ValueError, match="no QuantizedLinear fits"):
        tune_scales(llama)
    with pytest.raises(ValueError, match="tuned already"):
        tune_scales(peqa(llama, 4))
    for rounding in (quantize_inputs(rtn(llama, 4), 8), llm_int8(llama)):
        with pytest.raises(ValueError, match="rounds its inputs"):
            tune_scales(rounding)
    table = quantize_linears(llama, quantize_table)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is stored as 'table'"):
        tune_scales(table)
    with pytest.raises(ValueError, match="a weight of format 'table' has no integers"):
        ScaleTunedLinear(table.model.layers[0].mlp.up_proj)
    for function in (scales_state_dict, to_quantized):
        with pytest.raises(ValueError, match=r"no layer on a uniform grid|no ScaleTunedLinear"):
            function(llama)
    model = peqa(llama, 4)
    state = scales_state_dict(model)
    key = "model.layers.0.mlp.up_proj.scales"
    with pytest.raises(ValueError, match=r"they lack model\.layers\.0\.mlp\.up_proj"):
        load_scales(model, {k: t for k, t in state.items() if k != key})
    with pytest.raises(ValueError, match=r"they have x\.scales, which the model has not"):
        load_scales(model, state | {"x.scales": torch.ones(1)})
    with pytest.raises(ValueError, match="they lack"):
        load_scales(to_quantized(model), {})
    with pytest.raises(ValueError, match=r"has shape \(3, 1\); the model's is \(48, 1\)"):
        load_scales(model, state | {key: torch.ones(3, 1)})
    for bad in (torch.full((48, 1), 0.1), torch.zeros(48, 1), torch.full((48, 1), torch.inf)):
        with pytest.raises(ValueError, match="no half-precision number above 0"):
            load_scales(model, state | {key: bad})


def test_integers_are_those_of_the_format():
    """By hand: one row, scale 0.5, codes 1 and 3 around the zero point 2, gradient 10 and 100."""
    stored = QuantizedTensor.from_codes(
        torch.tensor([[1, 3]]), torch.tensor([[0.5]]), torch.tensor([[2]]), Grid(2),
    )  # fmt: skip
    assert stored.dequantize().tolist() == [[-0.5, 0.5]]
    assert scale_gradient(torch.tensor([[10.0, 100.0]]), stored).tolist() == [[90.0]]
    moved = replace(stored, scales=torch.tensor([[0.75]]).half())
    assert moved.dequantize().tolist() == [[-0.75, 0.75]]
