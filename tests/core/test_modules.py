"""Finding, sharing and replacing modules."""

import pytest
import torch
from torch import nn

from effnb.core.modules import (
    clone,
    find_blocks,
    linears,
    map_linears,
    matches,
    replace_modules,
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
    assert "lm_head" in linears(llama, exclude=())
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
