"""The layer-wise calibration pass against runs of the whole model."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from effnb.core.calibration import (
    Calibration,
    Hessian,
    InputNorm,
    InputSample,
    batches_of,
    layerwise,
    visit_blocks,
)
from effnb.core.modules import linears


def inputs_of(model, ids, name):
    """What a layer reads when the whole model runs."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.inference_mode():
        model(ids)
    hook.remove()
    return torch.cat([x.flatten(0, -2) for x in seen])


def test_observers_see_what_the_whole_model_sees(llama, ids):
    seen = {}

    def compress(name, layer, observer):
        seen[name] = observer.value

    same = layerwise(llama, Calibration(ids, batch_size=2), lambda n, m: InputSample(), compress)
    assert set(seen) == set(linears(llama))
    for name in seen:
        torch.testing.assert_close(seen[name], inputs_of(llama, ids, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(same(ids).logits, llama(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_later_blocks_see_the_compressed_ones(llama, ids, true_sequential):
    """With everything replaced, the last statistics are those of the finished model."""
    statistics = {}

    def halve(name, layer, observer):
        statistics[name] = observer.value
        new = nn.Linear(layer.in_features, layer.out_features, bias=False)
        new.weight = nn.Parameter(layer.weight.detach() * 0.5)
        return new

    new = layerwise(llama, ids, lambda n, m: InputSample(), halve, true_sequential=true_sequential)
    first_of_block = "model.layers.2.self_attn.q_proj"
    torch.testing.assert_close(
        statistics[first_of_block], inputs_of(new, ids, first_of_block), rtol=1e-4, atol=1e-5
    )
    # Behind q, k, v in the same block: only true-sequential has seen their compressed outputs.
    within = "model.layers.2.mlp.down_proj"
    agrees = torch.allclose(statistics[within], inputs_of(new, ids, within), rtol=1e-4, atol=1e-5)
    assert agrees is true_sequential


def test_the_original_is_untouched(llama, ids):
    before = {k: v.clone() for k, v in llama.state_dict().items()}

    def zero(name, layer, observer):
        new = nn.Linear(layer.in_features, layer.out_features, bias=False)
        nn.init.zeros_(new.weight)
        return new

    layerwise(llama, ids, lambda n, m: InputNorm(m.in_features), zero)
    for key, value in llama.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(m._forward_pre_hooks for m in llama.modules())


def test_hessian_is_the_second_moment(llama, ids):
    found = {}
    layerwise(
        llama,
        Calibration(ids, batch_size=1),
        lambda n, m: Hessian(m.in_features),
        lambda n, m, o: found.__setitem__(n, o),
        layers="*.0.*",
    )
    name = "model.layers.0.mlp.down_proj"
    x = inputs_of(llama, ids, name)
    torch.testing.assert_close(found[name].value, 2 * x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert found[name].tokens == ids.numel()


@pytest.mark.parametrize("features", [1, 7, 64, 65, 200, 600])
def test_hessian_of_any_size(features):
    """Only one triangle is accumulated, panel by panel; both are given."""
    torch.manual_seed(0)
    x = torch.randn(37, features)
    hessian = Hessian(features)
    for part in (*x.split(10), x[:0]):
        hessian.update(part)
    assert hessian.tokens == 37 and torch.equal(hessian.value, hessian.value.T)
    torch.testing.assert_close(hessian.value, 2 * x.T @ x / 37, rtol=1e-5, atol=1e-6)


def test_layers_with_one_input_share_an_observer(llama, ids):
    alone, shared = {}, {}
    for found, sharing in ((alone, False), (shared, True)):
        layerwise(
            llama,
            Calibration(ids, batch_size=3),
            lambda n, m: Hessian(m.in_features),
            lambda n, m, o, found=found: found.__setitem__(n, o),
            share_observers=sharing,
        )
    assert list(shared) == list(alone)
    for name, observer in shared.items():
        assert observer.tokens == ids.numel()
        torch.testing.assert_close(observer.value, alone[name].value, rtol=0, atol=0)
    for i in range(3):
        q, k, v, o, gate, up, down = (
            shared[f"model.layers.{i}.{n}"] for n in (
                "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
            )
        )  # fmt: skip
        assert q is k is v and gate is up and len({id(x) for x in (q, o, gate, down)}) == 4
    assert len({id(observer) for observer in alone.values()}) == 21


def test_layers_that_never_run_are_not_compressed(llama, ids):
    llama.model.layers[1].spare = nn.Linear(4, 4)
    names = []
    layerwise(llama, ids, lambda n, m: InputNorm(m.in_features), lambda n, m, o: names.append(n))
    assert len(names) == 21 and "model.layers.1.spare" not in names


def test_results_can_be_trained(llama, ids):
    """What is computed during the pass is no tensor of inference mode."""

    def double(name, layer, observer):
        new = nn.Linear(layer.in_features, layer.out_features, bias=False)
        new.weight = nn.Parameter(layer.weight * 2)
        return new

    new = layerwise(llama, ids, lambda n, m: InputNorm(m.in_features), double)
    new(ids, labels=ids).loss.backward()
    assert new.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_blocks_are_visited_with_what_the_changed_ones_before_give(llama, ids):
    inputs = {}

    def visit(name, block, calls):
        inputs[name] = torch.cat([call.hidden for call in calls])
        weight = block.mlp.down_proj.weight
        block.mlp.down_proj.weight = nn.Parameter(weight * 3)

    new = visit_blocks(llama, Calibration(ids, batch_size=3), visit)
    assert list(inputs) == [f"model.layers.{i}" for i in range(3)]
    with torch.no_grad():
        states = new(ids, output_hidden_states=True).hidden_states
    for state, found in zip(states[:3], inputs.values(), strict=True):
        torch.testing.assert_close(found, state)


def test_input_norm():
    x = torch.randn(50, 6)
    norm = InputNorm(6)
    for part in x.split(7):
        norm.update(part)
    torch.testing.assert_close(norm.value, x.norm(dim=0))


def test_padding_is_not_observed():
    torch.manual_seed(0)
    encoder = BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=24, max_position_embeddings=16)
    ).eval()  # fmt: skip
    ids = torch.randint(1, 50, (2, 8))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    samples = {}
    layerwise(
        encoder,
        [{"input_ids": ids, "attention_mask": mask}],
        lambda n, m: InputSample(),
        lambda n, m, o: samples.__setitem__(n, o.value),
    )
    assert {len(x) for x in samples.values()} == {13}


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.zeros(0, 8, dtype=torch.long), "calibration data is empty"),
        ([], "calibration data is empty"),
        (torch.zeros(8, dtype=torch.long), "need two dimensions"),
        (torch.zeros(1, 65, dtype=torch.long), "65 tokens; the model's context is 64"),
    ],
)
def test_bad_calibration_is_one_sentence(llama, calibration, message):
    with pytest.raises(ValueError, match=message):
        layerwise(llama, calibration, lambda n, m: InputSample(), lambda n, m, o: None)


def test_no_matching_layer(llama, ids):
    with pytest.raises(ValueError, match="no linear layer inside the blocks"):
        layerwise(llama, ids, lambda n, m: InputSample(), lambda n, m, o: None, layers="nope")


def test_batches_keep_every_sequence(ids):
    assert sum(len(b["input_ids"]) for b in batches_of(Calibration(ids, batch_size=3))) == len(ids)
