"""Learned masks: the threshold, its straight-through gradient, and one bit for each weight."""

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
    hosts,
    load_delta,
    merge,
    set_active,
)
from effnb.core.training import TrainingSettings, train
from effnb.finetuning import bitfit, learned_masks, lora
from effnb.inference.quantization import rtn


def scored(model, name="default", tau=0.01, seed=0):
    """Scores of which about half are above the threshold."""
    torch.manual_seed(seed)
    state = {k: tau + torch.randn_like(t) for k, t in delta_state_dict(model, name).items()}
    return load_delta(model, name, state)


@examples(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 0.99), st.booleans(), st.integers(0, 9))
def test_the_equation_the_gradient_and_the_bits(n_in, n_out, sparsity, random, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(n_in, n_out).double()
    model = nn.Sequential(layer)
    initial = "random" if random else "magnitude"
    new = learned_masks.attach(model, sparsity=sparsity, initial=initial, seed=seed)
    mask = learned_masks.masks_of(new)["0"]
    removed = round(sparsity * layer.weight.numel())
    assert int((~mask).sum()) == removed  # the initial sparsity is exact
    if not random and 0 < removed < mask.numel():
        assert layer.weight[~mask].abs().max() <= layer.weight[mask].abs().min()
    new = scored(new, seed=seed)
    mask = learned_masks.masks_of(new)["0"]
    x = torch.randn(4, n_in, dtype=torch.float64)
    upstream = torch.randn(4, n_out, dtype=torch.float64)
    want = x @ (layer.weight * mask).T + layer.bias
    torch.testing.assert_close(new(x), want, rtol=0, atol=1e-13)
    new(x).backward(upstream)
    grad = delta_parameters(new, "default")["0.scores"].grad
    torch.testing.assert_close(grad, (upstream.T @ x) * layer.weight, rtol=1e-13, atol=1e-13)
    merged = merge(new, "default")
    assert torch.equal(merged[0].weight, layer.weight * mask)
    hard = learned_masks.harden(new)
    assert torch.equal(hard(x), new(x))
    bits = delta_state_dict(hard, "default")["0.bits"]
    assert bits.dtype == torch.uint8 and len(bits) == -(-n_in * n_out // 8)
    assert torch.equal(learned_masks.masks_of(hard)["0"], mask)
    assert torch.equal(merge(hard, "default")[0].weight, merged[0].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_changes_at_the_start(llama, ids, dtype):
    model = llama.to(dtype)
    new = learned_masks.attach(model)
    with torch.no_grad():
        assert torch.equal(new(ids).logits, model(ids).logits)
    assert "lm_head" not in hosts(new)


def test_training_masks_weights_and_touches_none(llama, ids, tmp_path):
    def batch(step):
        return torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(step % 2))

    before = {n: p.detach().clone() for n, p in llama.named_parameters()}
    new = learned_masks.attach(llama)
    result = train(new, batch, TrainingSettings(steps=12, learning_rate=2e-3))
    assert result.losses[-1] < result.losses[0]
    masks = learned_masks.masks_of(new)
    assert (
        0
        < sum(int((~m).sum()) for m in masks.values())
        < 0.5 * sum(m.numel() for m in masks.values())
    )
    assert all(torch.equal(p, before[n]) for n, p in llama.named_parameters())
    hard = learned_masks.harden(new)
    size = save_delta(hard, "default", tmp_path / "x")
    assert size < sum(m.numel() for m in masks.values()) / 8 + 4000
    with torch.no_grad():
        again = open_delta(llama, tmp_path / "x")
        assert torch.equal(again(ids).logits, new(ids).logits)
        merged = merge(again, "default")
        torch.testing.assert_close(merged(ids).logits, new(ids).logits, atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in hard.parameters())


def test_beside_other_deltas(llama, ids):
    """A LoRA is not masked, and cannot be merged into the weight that the mask reads."""
    both = scored(learned_masks.attach(lora.attach(llama, "l", rank=2), "m"), "m")
    torch.manual_seed(4)
    state = {k: torch.randn_like(t) * 0.1 for k, t in lora.delta_state_dict(both, "l").items()}
    both = lora.load_delta(both, "l", state)
    with pytest.raises(ValueError, match="'l' cannot be merged beside 'm', which reads"):
        merge(both, "l")
    with torch.no_grad():
        one = merge(merge(both, "m"), "l")
        torch.testing.assert_close(one(ids).logits, both(ids).logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(set_active(both)(ids).logits, llama(ids).logits)
    with pytest.raises(ValueError, match="two of the sort 'mask' at once, 'm' and 'again'"):
        learned_masks.attach(both, "again")
    again = learned_masks.attach(set_active(both, "l"), "again")
    assert again.model.layers[0].mlp.up_proj.active == ("l", "again")
    with pytest.raises(ValueError, match="two of the sort 'mask' at once, 'again' and 'm'"):
        set_active(again, "again", "m")


def test_gpt2_s_layers_are_read_in_linear_form():
    model = make("gpt2")
    new = scored(learned_masks.attach(model))
    ids = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(learned_masks.attach(model)(ids).logits.argmax(-1),
                           model(ids).logits.argmax(-1))  # fmt: skip
        merged = merge(new, "default")
        torch.testing.assert_close(merged(ids).logits, new(ids).logits, atol=1e-10, rtol=1e-10)
    assert merged.state_dict().keys() == model.state_dict().keys()


def test_bad_input_is_one_sentence(llama):
    for settings, message in [
        ({"tau": 0}, "tau is 0; it must be above 0"),
        ({"sparsity": 1.0}, r"sparsity is 1.0; it must lie in \[0, 1\)"),
        ({"sparsity": -0.5}, "sparsity is -0.5"),
        ({"initial": "ones"}, "initial is 'ones'; it must be"),
        ({"layers": "zzz"}, "no linear layer fits the pattern zzz; the model has model"),
    ]:
        with pytest.raises(ValueError, match=message):
            learned_masks.attach(llama, **settings)
    with pytest.raises(ValueError, match="is stored quantized, and a mask needs weights of full"):
        learned_masks.attach(rtn(llama, 4, group_size=16))
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="is of kind 'bitfit', not a mask"):
        learned_masks.masks_of(bitfit.attach(model))
    new = learned_masks.attach(model, "a")
    with pytest.raises(ValueError, match="attached already"):
        learned_masks.attach(new, "a")
    with pytest.raises(ValueError, match=r"0\.scores has shape \(4, 5\), not \(4, 4\)"):
        attach_state(model, "b", "learned-mask", {"tau": 0.01}, {"0.scores": torch.ones(4, 5)})
    with pytest.raises(ValueError, match="0: a learned mask has scores; found x"):
        attach_state(model, "b", "learned-mask", {"tau": 0.01}, {"0.x": torch.ones(4, 4)})
    with pytest.raises(ValueError, match=r"0\.bits has shape \(3,\), not \(2,\)"):
        attach_state(model, "b", "binary-mask", {}, {"0.bits": torch.ones(3, dtype=torch.uint8)})
