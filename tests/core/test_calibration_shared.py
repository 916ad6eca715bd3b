"""Layers that several blocks use: compressed on what they read in all of them, replaced in all."""

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertModel

from effnb.core.calibration import Calibration, Hessian, InputSample, layerwise
from effnb.core.modules import linears
from effnb.inference.pruning import wanda, wanda_mask
from effnb.inference.quantization import gptq, gptq_weight

UP = "model.layers.0.mlp.up_proj"


def inputs_by_place(model, ids, name):
    """What a layer reads, a tensor for each of its uses in one forward pass."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return [x.flatten(0, -2) for x in seen]


def hessian(x):
    return 2 * x.T @ x / len(x)


@pytest.fixture
def shared(llama):
    """The first and the last of three blocks use one up-projection; what they read differs."""
    layers = llama.model.layers
    layers[2].mlp.up_proj = layers[0].mlp.up_proj
    with torch.no_grad():
        for i, layer in enumerate(layers):  # by channel, so that not only the size differs
            gain = torch.linspace(0.2, 3, 1 + len(layer.post_attention_layernorm.weight))[1:]
            layer.post_attention_layernorm.weight.copy_(gain if i < 2 else gain.flip(0))
    return llama


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_inputs_of_all_places_enter(shared, ids, batch_size):
    found = {}
    layerwise(
        shared,
        Calibration(ids, batch_size=batch_size),
        lambda n, m: Hessian(m.in_features),
        lambda n, m, o: found.__setitem__(n, o),
        share_observers=True,
    )
    places = inputs_by_place(shared, ids, UP)
    assert len(places) == 2 and found[UP].tokens == 2 * ids.numel()
    torch.testing.assert_close(found[UP].value, hessian(torch.cat(places)), rtol=1e-4, atol=1e-5)
    first, second = map(hessian, places)
    assert (first - second).norm() > 0.5 * first.norm()
    # The gate reads what the first place of `up` reads, and nothing else.
    gate = found["model.layers.0.mlp.gate_proj"]
    assert gate is not found[UP] and gate.tokens == ids.numel()
    torch.testing.assert_close(gate.value, first, rtol=1e-4, atol=1e-5)


def test_gptq_rounds_for_the_sum_of_the_hessians(shared, ids):
    new = gptq(shared, ids, 3, layers="*.up_proj")
    assert new.model.layers[0].mlp.up_proj is new.model.layers[2].mlp.up_proj
    places = inputs_by_place(shared, ids, UP)
    weight = shared.get_submodule(UP).weight.detach()
    found = new.get_submodule(UP).weight
    joint = gptq_weight(weight, hessian(torch.cat(places)), 3).dequantize()
    torch.testing.assert_close(found, joint, rtol=1e-4, atol=1e-5)
    x = torch.cat(places)

    def error(w):
        return float(((w - weight) @ x.T).norm())

    for place in places:  # fitted to one place alone it is another, and worse over both
        alone = gptq_weight(weight, hessian(place), 3).dequantize()
        assert float((found - alone).norm()) > 0.05 * float(found.norm())
        assert error(found) < error(alone)


def test_wanda_counts_the_norms_of_all_places(shared, ids):
    new = wanda(shared, ids, 0.5, layers="*.up_proj")
    places = inputs_by_place(shared, ids, UP)
    weight = shared.get_submodule(UP).weight.detach()
    masks = [wanda_mask(weight, x.norm(dim=0), 0.5) for x in (torch.cat(places), *places)]
    found = new.get_submodule(UP).weight != 0
    assert torch.equal(found, masks[0])
    assert not torch.equal(found, masks[1]) and not torch.equal(found, masks[2])


@pytest.mark.parametrize("true_sequential", [False, True])
def test_what_lies_before_the_first_place_is_compressed_already(llama, ids, true_sequential):
    layers = llama.model.layers
    layers[2].mlp.down_proj = layers[1].mlp.down_proj
    down, seen = "model.layers.1.mlp.down_proj", {}

    def halve(name, layer, observer):
        seen[name] = observer.value
        new = nn.Linear(layer.in_features, layer.out_features, bias=False)
        new.weight = nn.Parameter(layer.weight.detach() * 0.5)
        return new

    def keep_late(name, layer, observer):
        late = name.startswith(("model.layers.1", "model.layers.2"))
        return None if late else halve(name, layer, observer)

    front = layerwise(llama, ids, lambda n, m: InputSample(), keep_late)
    expected = torch.cat(inputs_by_place(front, ids, down))
    new = layerwise(llama, ids, lambda n, m: InputSample(), halve, true_sequential=true_sequential)
    assert new.get_submodule(down) is new.model.layers[2].mlp.down_proj
    assert len(seen[down]) == len(expected) == 2 * ids.numel()
    # Within its own block, only true-sequential has seen what lies before it compressed.
    assert torch.allclose(seen[down], expected, rtol=1e-4, atol=1e-5) is not true_sequential


def test_layers_of_different_places_share_no_observer(llama, ids):
    """Queries of all blocks are one layer, keys of two, values of one: all read one tensor."""
    layers = llama.model.layers
    for i in (1, 2):
        layers[i].self_attn.q_proj = layers[0].self_attn.q_proj
    layers[1].self_attn.k_proj = layers[0].self_attn.k_proj
    found = {}
    layerwise(
        llama,
        ids,
        lambda n, m: Hessian(m.in_features),
        lambda n, m, o: found.__setitem__(n, o),
        share_observers=True,
    )
    count = ids.numel()
    for leaf, places in (("q_proj", 3), ("k_proj", 2), ("v_proj", 1)):
        name = f"model.layers.0.self_attn.{leaf}"
        inputs = torch.cat(inputs_by_place(llama, ids, name))
        assert found[name].tokens == len(inputs) == places * count
        torch.testing.assert_close(found[name].value, hessian(inputs), rtol=1e-4, atol=1e-5)


def test_padding_counts_in_no_place(shared, ids):
    mask = torch.ones_like(ids)
    mask[1, 10] = 0  # a gap, so that it cannot be cut off
    found = {}
    layerwise(
        shared,
        [{"input_ids": ids, "attention_mask": mask}],
        lambda n, m: InputSample(),
        lambda n, m, o: found.__setitem__(n, o.tokens),
        layers="*.up_proj",
    )
    assert found == {UP: 2 * int(mask.sum()), "model.layers.1.mlp.up_proj": int(mask.sum())}


def test_a_block_used_again_is_fitted_to_all_its_uses():
    """ALBERT's own block, which the model runs four times."""
    torch.manual_seed(0)
    model = AlbertModel(
        AlbertConfig(vocab_size=50, embedding_size=8, hidden_size=16, num_hidden_layers=4,
                     num_attention_heads=2, intermediate_size=24, max_position_embeddings=16)
    ).eval()  # fmt: skip
    ids = torch.randint(1, 50, (3, 8))
    found = {}
    layerwise(
        model,
        ids,
        lambda n, m: Hessian(m.in_features),
        lambda n, m, o: found.__setitem__(n, o),
    )
    inside = {n for n in linears(model) if "albert_layer_groups" in n}
    assert set(found) == inside and len(inside) == 6
    for name in inside:
        places = inputs_by_place(model, ids, name)
        assert len(places) == 4 and found[name].tokens == 4 * ids.numel()
        joint = hessian(torch.cat(places))
        torch.testing.assert_close(found[name].value, joint, rtol=1e-3, atol=1e-5)
