"""Where scales can be folded is found by trying; and folding keeps the function."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GemmaConfig,
    GemmaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from effnb.core.folding import Fold, find_folds, fold_scales

SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
IDS = torch.randint(3, 60, (1, 10), generator=torch.Generator().manual_seed(0))


def random_scales(model, fold, seed=0):
    channels = model.get_submodule(fold.source).weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(channels, generator=generator, dtype=torch.float64) * 4 + 0.1


def pairs(folds, block):
    """Source and readers by their last names, within one block."""
    return {
        fold.source.split(".")[-1]: [name.split(".")[-1] for name in fold.readers]
        for fold in folds
        if f".{block}." in fold.source
    }


def with_random_norms(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower():
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.2)
    return model.eval()


def test_llama_with_grouped_queries(llama, ids):
    assert pairs(find_folds(llama, ids[:1, :8]), 1) == {
        "input_layernorm": ["q_proj", "k_proj", "v_proj"],
        "post_attention_layernorm": ["gate_proj", "up_proj"],
        "up_proj": ["down_proj"],
    }


def test_llama_with_as_many_value_as_query_heads(tiny_llama, ids):
    model = tiny_llama(num_key_value_heads=4)
    assert pairs(find_folds(model, ids[:1, :8]), 0)["v_proj"] == ["o_proj"]


MODELS = {
    "gemma": lambda: GemmaForCausalLM(
        GemmaConfig(**SIZES, intermediate_size=48, num_key_value_heads=1, head_dim=8)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)),
    "bert": lambda: BertModel(BertConfig(**SIZES, intermediate_size=48)),
}
NORMS = {
    "input_layernorm": ["q_proj", "k_proj", "v_proj"],
    "post_attention_layernorm": ["gate_proj", "up_proj"],
    "up_proj": ["down_proj"],
}
EXPECTED = {
    "gemma": NORMS,
    "qwen3": NORMS,
    "opt": {  # ReLU lets positive scales through
        "self_attn_layer_norm": ["q_proj", "k_proj", "v_proj"],
        "v_proj": ["out_proj"],
        "final_layer_norm": ["fc1"],
        "fc1": ["fc2"],
    },
    # Its norms feed the residual stream too, and GELU lets no scale through.
    "bert": {"value": ["dense"]},
}


@pytest.mark.parametrize("name", MODELS)
def test_architectures(name):
    torch.manual_seed(0)
    model = with_random_norms(MODELS[name]())
    folds = find_folds(model, IDS)
    assert pairs(folds, 0) == pairs(folds, 1) == EXPECTED[name]
    assert {f.offset for f in folds if "norm" in f.source} <= {1.0 if name == "gemma" else 0.0}


@pytest.mark.parametrize("name", MODELS)
def test_folding_keeps_the_function(name):
    model = with_random_norms(MODELS[name]()).double()
    folded = model
    folds = find_folds(model, IDS)
    for number, fold in enumerate(folds):
        folded = fold_scales(folded, fold, random_scales(model, fold, number))
    with torch.no_grad():
        truth, found = model(IDS)[0], folded(IDS)[0]
    # Gemma's norms compute in float32, whatever the model computes in.
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-5 if name == "gemma" else 1e-10)
    one = folds[0]
    ratio = folded.get_submodule(one.readers[0]).weight / model.get_submodule(one.readers[0]).weight
    torch.testing.assert_close(ratio, random_scales(model, one).expand_as(ratio))


def test_half_precision(llama, ids):
    assert find_folds(llama.to(torch.bfloat16), ids[:1]) == find_folds(llama.float(), ids[:1])


def test_the_original_is_untouched_and_the_rest_shared(llama, ids):
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    fold = find_folds(llama, ids[:1])[0]
    new = fold_scales(llama, fold, random_scales(llama, fold))
    for key, value in llama.state_dict().items():
        assert torch.equal(value, before[key])
    changed = {
        name
        for (name, p), (_, q) in zip(llama.named_parameters(), new.named_parameters(), strict=True)
        if p is not q
    }
    assert changed == {f"{fold.source}.weight", *(f"{name}.weight" for name in fold.readers)}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


class Block(nn.Module):
    """A norm whose output two layers read, one of which runs only for long inputs."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.always, self.sometimes = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden):
        normed = self.norm(hidden)
        return hidden + self.always(normed) + (self.sometimes(normed) if len(hidden[0]) > 5 else 0)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def test_blocks_with_layers_out_of_reach_are_left_out():
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    assert find_folds(Blocks(), ids[:, :4]) == []
    found = find_folds(Blocks(), ids)
    assert found[0] == Fold("blocks.0.norm", ("blocks.0.always", "blocks.0.sometimes"))


def test_bad_scales_are_one_sentence(llama, ids):
    fold = find_folds(llama, ids[:1])[0]
    with pytest.raises(ValueError, match=r"shape \(3,\); model.layers.0.input_layernorm has 32"):
        fold_scales(llama, fold, torch.ones(3))
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="every scale must be a finite number above 0"):
            fold_scales(llama, fold, torch.full((32,), bad))
