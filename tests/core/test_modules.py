"""Finding, sharing and replacing modules."""

import pytest
import torch
from torch import nn
from zoo import make

from effnb.core.linear_form import linear_form
from effnb.core.modules import (
    Layers,
    clone,
    find_blocks,
    find_stacks,
    in_several_blocks,
    linears,
    map_linears,
    matches,
    output_heads,
    replace_modules,
    settle_tying,
    share,
)


def test_share_copies_modules_and_keeps_tensors(llama, ids):
    copy = share(llama)
    for (name, a), (_, b) in zip(llama.named_parameters(), copy.named_parameters(), strict=True):
        assert a is b, name
    assert copy.model.layers[0] is not llama.model.layers[0]
    assert copy.config is not None
    torch.testing.assert_close(copy(ids).logits, llama(ids).logits, rtol=0, atol=0)


def test_share_keeps_tied_weights_tied(llama):
    copy = share(llama)
    assert copy.lm_head.weight is copy.model.embed_tokens.weight


def test_clone_shares_nothing(llama):
    copy = clone(llama)
    pointers = {p.data_ptr() for p in llama.parameters()}
    assert not pointers & {p.data_ptr() for p in copy.parameters()}


def test_replacing_leaves_the_original_alone(llama, ids):
    before = llama(ids).logits
    name = "model.layers.1.mlp.down_proj"
    zero = nn.Linear(48, 32, bias=False)
    nn.init.zeros_(zero.weight)
    new = replace_modules(llama, {name: zero})
    assert new.get_submodule(name) is zero
    assert llama.get_submodule(name) is not zero
    torch.testing.assert_close(llama(ids).logits, before, rtol=0, atol=0)
    assert not torch.allclose(new(ids).logits, before)
    assert new.model.layers[0].mlp.up_proj.weight is llama.model.layers[0].mlp.up_proj.weight


def test_linears_by_pattern(llama):
    assert len(linears(llama)) == 3 * 7
    assert "lm_head" not in linears(llama)
    assert "lm_head" in linears(llama, layers=Layers(exclude=()))
    assert set(linears(llama, "*.0.*q_proj")) == {"model.layers.0.self_attn.q_proj"}
    assert len(linears(llama, ["*q_proj", "*k_proj"])) == 6


def test_no_match_names_what_there_is(llama):
    with pytest.raises(ValueError, match=r"no Linear fits the pattern \*\.nothing; the model has"):
        linears(llama, "*.nothing")
    with pytest.raises(ValueError, match="none at all"):
        linears(nn.ReLU())


def test_unknown_name_is_refused(llama):
    with pytest.raises(KeyError, match="model.layers.9"):
        replace_modules(llama, {"model.layers.9": nn.Identity()})
    with pytest.raises(KeyError, match="no module named ''"):
        replace_modules(llama, {"": nn.Identity()})


def test_map_linears_sees_every_layer_once(llama):
    seen = []
    map_linears(llama, lambda name, layer: seen.append(name) or layer)
    assert sorted(seen) == sorted(linears(llama))


def test_find_blocks(llama):
    name, blocks = find_blocks(llama)
    assert name == "model.layers" and len(blocks) == 3
    with pytest.raises(ValueError, match="no list of equal blocks"):
        find_blocks(nn.Linear(2, 2))


def test_patterns():
    assert matches("a.b.c", "a.*") and matches("a.b.c", ["x", "*.c"]) and not matches("a.b", "b")


# --- other architectures --------------------------------------------------------------------------

HEAD_OF = {
    "llama": "lm_head",
    "gpt2": "lm_head",
    "gpt-neox": "lm_head",
    "t5": "lm_head",
    "bert": "cls.predictions.decoder",
    "roberta": "lm_head.decoder",
    "distilbert": "vocab_projector",
    "electra": "generator_lm_head",
    "modernbert": "decoder",
    "albert": "predictions.decoder",
}


@pytest.mark.parametrize("name", HEAD_OF)
def test_output_heads_are_known_by_what_they_are(name):
    model = make(name)
    assert HEAD_OF[name] in output_heads(model)
    found = linears(linear_form(model)[0])
    assert HEAD_OF[name] not in found and len(found) >= 6
    assert HEAD_OF[name] in linears(model, Layers(HEAD_OF[name], ()))


def test_heads_of_models_that_say_nothing():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inner = nn.Embedding(5, 3), nn.Linear(3, 3)
            self.scores, self.lm_head = nn.Linear(3, 5, bias=False), nn.Linear(3, 5)
            self.scores.weight = self.table.weight

    assert set(output_heads(Plain())) == {"scores", "lm_head"}
    assert set(linears(Plain())) == {"inner"}


def test_a_module_in_two_places_is_replaced_in_both(llama):
    layers = llama.model.layers
    layers[2].mlp.up_proj = layers[0].mlp.up_proj
    assert len(linears(llama)) == 3 * 7 - 1
    new = map_linears(llama, lambda name, layer: nn.Linear(32, 48) if "up_proj" in name else layer)
    first, last = (new.model.layers[i].mlp.up_proj for i in (0, 2))
    assert first is last and first is not layers[0].mlp.up_proj
    # Named by either place, or each with a module of its own.
    for name in ("model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"):
        other = replace_modules(llama, {name: nn.Identity()})
        assert all(type(other.model.layers[i].mlp.up_proj) is nn.Identity for i in (0, 2))
    each = {f"model.layers.{i}.mlp.up_proj": nn.Linear(32, 48) for i in (0, 2)}
    parted = replace_modules(llama, each)
    assert all(parted.get_submodule(name) is module for name, module in each.items())
    assert set(in_several_blocks(llama)) == {"model.layers.0.mlp.up_proj"}
    assert in_several_blocks(make("gemma3")) == []


def test_a_head_with_a_weight_of_its_own_is_not_called_tied(llama):
    assert llama.config.tie_word_embeddings
    same = replace_modules(llama, {"model.layers.0.mlp.up_proj": nn.Linear(32, 48)})
    assert same.config.tie_word_embeddings
    for name, module in {
        "lm_head": nn.Linear(32, 128, bias=False),
        "model.embed_tokens": nn.Embedding(128, 32),
    }.items():
        new = replace_modules(llama, {name: module})
        assert not new.config.tie_word_embeddings
        assert llama.config.tie_word_embeddings and output_heads(llama) == ["lm_head"]
    untied = make("mixtral")
    assert settle_tying(untied) is untied
    assert isinstance(settle_tying(nn.Linear(2, 2)), nn.Linear)


def test_stacks_of_blocks():
    names = {
        "llama": ["model.layers"],
        "t5": ["encoder.block", "decoder.block"],
        "bart": ["model.encoder.layers", "model.decoder.layers"],
        "mixtral": ["model.layers"],
        "jamba": ["model.layers"],  # blocks of two classes
        "albert": ["albert.encoder.albert_layer_groups"],
    }
    for name, stacks in names.items():
        assert sorted(find_stacks(make(name))) == sorted(stacks)
    leaves = nn.ModuleDict({"only": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    assert list(find_stacks(leaves)) == ["only"]
    with pytest.raises(ValueError, match="no list of equal blocks"):
        find_stacks(nn.Linear(2, 2))


def test_layers_may_be_chosen_by_two_names(llama):
    from effnb.inference.pruning import magnitude, masks_of

    def sparse(**choice):
        masks = masks_of(magnitude(llama, 0.5, **choice), layers=Layers(exclude=()))
        return {name for name, mask in masks.items() if not mask.all()}

    assert sparse(include="lm_head", exclude=()) == {"lm_head"}
    assert sparse(include="*.q_proj") == sparse(layers="*.q_proj")
    assert sparse(exclude="*.mlp.*") == sparse(layers=Layers(exclude="*.mlp.*"))
    with pytest.raises(TypeError, match="magnitude takes either layers, or include and exclude"):
        magnitude(llama, 0.5, layers="*", include="*")
