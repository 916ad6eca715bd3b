"""DoRA: magnitude and direction, the identity at the start, the merge at the end."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn
from zoo import make

from effnb.core.delta_files import attach_state, open_delta, save_delta
from effnb.core.deltas import (
    delta_parameters,
    delta_state_dict,
    detach,
    load_delta,
    merge,
    set_active,
)
from effnb.finetuning import dora, lora
from effnb.inference.quantization import rtn


def trained(model, name="default", seed=0, scale=0.2, **settings):
    """A DoRA whose B is not 0 and whose magnitudes have moved."""
    new = dora.attach(model, name, seed=seed, **settings)
    torch.manual_seed(seed)
    state = delta_state_dict(new, name)
    for key, tensor in state.items():
        if not key.endswith(".A"):
            tensor += torch.randn_like(tensor) * scale
    return load_delta(new, name, state)


@examples(max_examples=25)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.floats(0.5, 32)
)  # fmt: skip
def test_the_equation(n_in, n_out, rank, rank_stabilized, alpha):
    rank = min(rank, n_in, n_out)
    torch.manual_seed(n_in)
    layer = nn.Linear(n_in, n_out).double()
    model = trained(nn.Sequential(layer), rank=rank, alpha=alpha, rank_stabilized=rank_stabilized)
    A, B, m = (delta_parameters(model, "default")[f"0.{key}"] for key in "ABm")
    s = alpha / (math.sqrt(rank) if rank_stabilized else rank)
    V = layer.weight + s * B @ A
    W = m[:, None] * V / V.norm(dim=1, keepdim=True)
    x = torch.randn(2, 3, n_in, dtype=torch.float64)
    expected = x @ W.T + layer.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    merged = merge(model, "default")
    torch.testing.assert_close(merged(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(merged[0].weight.norm(dim=1), m.abs(), rtol=1e-9, atol=1e-9)


def test_no_gradient_goes_through_the_norm():
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    model = trained(nn.Sequential(layer), rank=2, alpha=3.0)
    found = delta_parameters(model, "default")
    A, B, m = (found[f"0.{key}"].detach().clone().requires_grad_() for key in "ABm")
    x = torch.randn(7, 5, dtype=torch.float64)
    V = layer.weight.detach() + 1.5 * B @ A
    norm = V.norm(dim=1).detach()
    ((m / norm)[:, None] * V @ x.T).square().sum().backward()
    (model(x) - layer.bias).square().sum().backward()
    for key, ours in zip("ABm", (A, B, m)):
        torch.testing.assert_close(found[f"0.{key}"].grad, ours.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_start_nothing_changes_and_m_is_the_row_norms(llama, ids, dtype):
    model = llama.to(dtype)
    new = dora.attach(model, rank=4, dropout=0.3)
    with torch.no_grad():
        assert torch.equal(new(ids).logits, model(ids).logits)
        assert torch.equal(new.train()(ids).logits, model(ids).logits)
    key = "model.layers.0.mlp.up_proj"
    norms = model.get_submodule(key).weight.float().norm(dim=1)
    assert torch.equal(delta_state_dict(new, "default")[f"{key}.m"], norms)
    count = sum(p.numel() for p in new.parameters() if p.requires_grad)
    plain = sum(p.numel() for p in lora.attach(model, rank=4).parameters() if p.requires_grad)
    assert count == plain + 3 * (32 + 16 + 16 + 32 + 48 + 48 + 32)


def test_several_are_summed_swapped_and_merged_first(llama, ids):
    one = trained(llama, "one", seed=1, rank=2)
    two = trained(one, "two", seed=2, rank=3)
    with torch.no_grad():
        alone = trained(llama, "two", seed=2, rank=3)
        torch.testing.assert_close(detach(two, "one")(ids).logits, alone(ids).logits)
        torch.testing.assert_close(set_active(two, "two")(ids).logits, alone(ids).logits)
        assert torch.equal(set_active(two)(ids).logits, llama(ids).logits)
    layer = llama.model.layers[0].mlp.up_proj
    x = torch.randn(3, 32)
    change = [
        merge(m, n).model.layers[0].mlp.up_proj(x) - layer(x)
        for m, n in ((one, "one"), (alone, "two"))
    ]
    torch.testing.assert_close(
        two.model.layers[0].mlp.up_proj(x), layer(x) + sum(change), atol=1e-4, rtol=1e-4
    )
    with pytest.raises(ValueError, match="'one' cannot be merged beside 'two', which reads"):
        merge(two, "one")


def test_on_quantized_layers_and_through_a_file(llama, ids, tmp_path):
    base = rtn(llama, 4, group_size=16)
    with torch.no_grad():
        assert torch.equal(dora.attach(base, rank=2)(ids).logits, base(ids).logits)
        new = trained(base, rank=2, scale=0.05)
        want = new(ids).logits
        with pytest.raises(ValueError, match="is stored quantized"):
            merge(new, "default")
        merged = merge(new, "default", dequantize=True)
        torch.testing.assert_close(merged(ids).logits, want, atol=1e-4, rtol=1e-4)
        save_delta(new, "default", tmp_path / "x")
        assert torch.equal(open_delta(base, tmp_path / "x")(ids).logits, want)


def test_gpt2_s_layers_are_read_in_linear_form():
    model = make("gpt2")
    new = trained(model, rank=2)
    ids = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        merged = merge(new, "default")
        torch.testing.assert_close(merged(ids).logits, new(ids).logits, atol=1e-9, rtol=1e-9)
    assert merged.state_dict().keys() == model.state_dict().keys()


def test_bad_input_is_one_sentence(llama, tmp_path):
    for settings, message in [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"rank": 17}, r"k_proj: rank is 17; a layer of 32 inputs and 16 outputs has at most"),
        ({"alpha": 0}, "alpha is 0; it must be above 0"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must lie in \[0, 1\)"),
        ({"layers": "zzz"}, "no linear layer fits the pattern zzz; the model has model"),
        ({"name": "a.b"}, "cannot name a delta"),
    ]:
        with pytest.raises(ValueError, match=message):
            dora.attach(llama, **settings)
    new = dora.attach(llama, rank=2)
    with pytest.raises(ValueError, match="attached already"):
        dora.attach(new, rank=2)
    state = delta_state_dict(new, "default")
    settings = {"alpha": 1.0, "dropout": 0.0, "rank_stabilized": False}
    key = "model.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match="a DoRA consists of matrices A and B and magnitudes m"):
        attach_state(llama, "x", "dora", settings, {f"{key}.A": state[f"{key}.A"]})
    with pytest.raises(ValueError, match=r"q_proj\.m has shape \(9,\), not \(32,\)"):
        attach_state(llama, "x", "dora", settings, state | {f"{key}.m": torch.ones(9)})
    lora.save_peft(lora.attach(llama, rank=2), "default", tmp_path)
    with pytest.raises(ValueError, match="holds a LoRA without magnitudes"):
        dora.load_peft(llama, tmp_path)
    with pytest.raises(ValueError, match="not a LoRA"):
        lora.save_peft(bitfit_like(), "default", tmp_path)


def bitfit_like():
    from effnb.finetuning import bitfit

    return bitfit.attach(nn.Sequential(nn.Linear(2, 2)))
