"""Dependency groups against torch-pruning's, which follows the graph that autograd records."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch_pruning as tp

from effnb.inference.pruning import structures_of


def members(model, layer, indices):
    """Parameters and indices of torch-pruning's group of some outputs of a layer."""
    names = {id(m): name for name, m in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(
            model,
            example_inputs={"input_ids": torch.arange(1, 9)[None]},
            forward_fn=lambda m, x: m(**x, use_cache=False).logits,
        )
        group = graph.get_pruning_group(layer, tp.prune_linear_out_channels, idxs=indices)
    found = {}
    for item in group:
        dep, at = item.dep, item.idxs
        name = names.get(id(dep.target.module))
        if name is None:  # an operation, or a parameter that stands alone: a norm's gains
            if isinstance(dep.target.module, torch.nn.Parameter):
                norm = next(n for n, p in model.named_parameters() if p is dep.target.module)
                found[norm, 0] = sorted(at)
            continue
        # An embedding's "outputs" are its columns; a linear layer's inputs are too.
        embedding = isinstance(dep.target.module, torch.nn.Embedding)
        inputs = "in_channels" in dep.handler.__name__
        found[f"{name}.weight", int(inputs or embedding)] = sorted(at)
    return found


def ours(structure):
    return {(s.parameter, s.dim): list(s.indices) for s in structure.slices}


@pytest.fixture
def untied(tiny_llama):
    model = tiny_llama(num_key_value_heads=4, num_hidden_layers=2, tie_word_embeddings=False)
    model.config._attn_implementation = "eager"
    return model


@pytest.mark.parametrize("part", ["gate_proj", "up_proj"])
def test_a_neuron(untied, part):
    """From the gate's or the up projection's row: both rows, and the column of down."""
    layer = getattr(untied.model.layers[1].mlp, part)
    structure = [s for s in structures_of(untied, "neurons") if s.layer == 1][13]
    assert members(untied, layer, [13]) == ours(structure)
    several = [s for s in structures_of(untied, "neurons") if s.layer == 1][:3]
    found = members(untied, layer, [0, 1, 2])
    assert found == {key: [0, 1, 2] for key in ours(several[0])}


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
def test_a_head(untied, part):
    layer = getattr(untied.model.layers[1].self_attn, part)
    structure = [s for s in structures_of(untied, "heads") if s.layer == 1][2]
    assert members(untied, layer, list(range(16, 24))) == ours(structure)


def test_a_channel_runs_through_the_whole_model(untied):
    found = members(untied, untied.model.layers[0].self_attn.o_proj, [5])
    assert found == ours(structures_of(untied, "channels")[5])


def test_removing_neurons_leaves_as_many_parameters(untied):
    from effnb.inference.pruning import prune_structures, random_scores

    small = prune_structures(untied, random_scores(untied), {"neurons": 6})
    before = sum(p.numel() for p in untied.parameters())
    example = {"input_ids": torch.arange(1, 9)[None]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(
            untied, example_inputs=example, forward_fn=lambda m, x: m(**x, use_cache=False).logits
        )
        for layer, row in zip(untied.model.layers, small.kept.neurons):
            gone = sorted(set(range(48)) - set(row))
            graph.get_pruning_group(
                layer.mlp.up_proj, tp.prune_linear_out_channels, idxs=gone
            ).prune()
    assert sum(p.numel() for p in untied.parameters()) == small.parameters_after
    assert small.parameters_after == before - 2 * 6 * 3 * 32
    for name, parameter in untied.named_parameters():
        assert torch.equal(parameter, small.model.get_parameter(name)), name
