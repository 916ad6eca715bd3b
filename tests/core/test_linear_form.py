"""Conv1D layers and fused experts as linear layers, and back."""

import pytest
import torch
from torch import nn
from zoo import make, words

from effnb.core.coverage import LeftOut
from effnb.core.linear_form import ExpertLinears, in_linear_form, linear_form, restore
from effnb.core.modules import linears, map_linears, replace_modules

FUSED = ["mixtral", "qwen3-moe", "gpt-oss", "jamba"]


@pytest.mark.parametrize("name", ["gpt2", *FUSED])
def test_the_linear_form_computes_the_same_and_goes_back_to_the_same_tensors(name):
    model = make(name)
    form, made = linear_form(model)
    ids = words(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(form(ids).logits, model(ids).logits, rtol=1e-9, atol=1e-12)
    assert made and all(type(form.get_submodule(p)) is type(new) for p, (_, new) in made.items())
    before = dict(model.named_parameters())
    after = dict(restore(form, made).named_parameters())
    assert before.keys() == after.keys()
    assert all(after[key] is before[key] for key in before)


@pytest.mark.parametrize("name", ["gpt2", *FUSED])
def test_changed_matrices_go_back_into_their_places(name):
    model = make(name)

    @in_linear_form
    def doubled(form):
        def double(key, layer):
            new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            new.weight = nn.Parameter(layer.weight.detach() * 2)
            new.bias = layer.bias
            return new

        return map_linears(form, double)

    new = doubled(model)
    old = model.state_dict()
    layers = linears(linear_form(model)[0])
    twice = [key for key in old if key.removesuffix(".weight") in layers or f"{key}.0" in layers]
    assert len(twice) >= 6 and new.state_dict().keys() == old.keys()
    for key, value in new.state_dict().items():
        torch.testing.assert_close(value, old[key] * (2 if key in twice else 1), rtol=0, atol=0)


def test_experts_share_the_memory_of_the_fused_tensor():
    model = make("mixtral")
    form, _ = linear_form(model)
    experts = form.model.layers[0].mlp.experts
    fused = model.model.layers[0].mlp.experts
    for index, layer in enumerate(experts.down_proj):
        assert layer.weight.data_ptr() == fused.down_proj[index].data_ptr()
    assert isinstance(experts, ExpertLinears) and "experts.gate_up_proj.3" in str(linears(form))


def test_a_model_without_such_layers_is_itself():
    model = make("llama")
    assert linear_form(model) == (model, {})


def test_only_the_modules_of_given_names_change():
    _, made = linear_form(make("gpt2"), ["transformer.h.1.mlp.c_fc"])
    assert list(made) == ["transformer.h.1.mlp.c_fc"]
    _, made = linear_form(make("mixtral"), ["model.layers.2.mlp.experts.down_proj.0"])
    assert list(made) == ["model.layers.2.mlp.experts"]


def test_layers_of_another_kind_stay_until_they_are_ordinary_again():
    class Wrapped(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    model, ids = make("gpt2"), words(1, 6)
    name = "transformer.h.0.attn.c_proj"

    @in_linear_form
    def wrap(form):
        return replace_modules(form, {name: Wrapped(form.get_submodule(name))})

    new = wrap(model)
    assert isinstance(new.get_submodule(name), Wrapped)
    others = [k for k, m in new.named_modules() if type(m).__name__ == "Conv1D"]
    assert len(others) == 3 * 4 - 1
    back = restore(replace_modules(new, {name: new.get_submodule(name).layer}))
    assert back.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert torch.equal(back.get_submodule(name).weight, model.get_submodule(name).weight)


def test_experts_with_a_rule_of_another_kind_are_left_and_reported():
    model = make("mixtral")
    for layer in model.model.layers:
        experts = layer.mlp.experts
        old = experts.forward
        experts.forward = lambda *a, old=old, **k: old(*a, **k) + 1  # something a list cannot know
    form, made = linear_form(model)
    assert form is model and not made
    with pytest.warns(LeftOut, match=r"(?s)[89]\d% .*experts"):
        linears(form)
