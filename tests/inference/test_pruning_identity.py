"""Nothing removed, nothing changed: sparsity 0 is the identity in every pruning method."""

from __future__ import annotations

import pytest
import torch
import transformers

from effnb.inference import pruning
from effnb.inference.pruning import magnitude, obd, obs, snip, sparsegpt, taylor, wanda

WEIGHTS = {
    "magnitude": lambda m, ids, pattern: magnitude(m, 0.0, pattern=pattern),
    "wanda": lambda m, ids, pattern: wanda(m, ids, 0.0, pattern=pattern),
    "sparsegpt": lambda m, ids, pattern: sparsegpt(m, ids, 0.0, pattern=pattern),
    "obs": lambda m, ids, pattern: obs(m, ids, 0.0, pattern=pattern),
    "obd": lambda m, ids, pattern: obd(m, ids, 0.0, pattern=pattern),
    "taylor": lambda m, ids, pattern: taylor(m, ids, 0.0, pattern=pattern),
    "snip": lambda m, ids, pattern: snip(m, ids, 0.0, pattern=pattern),
}
STRUCTURES = {
    "heads": lambda m, ids: pruning.prune_heads(m, ids, 0.0).model,
    "llm_pruner": lambda m, ids: pruning.llm_pruner(m, ids, 0.0, order="mixed").model,
    "width": lambda m, ids: pruning.width(m, ids, heads=0.0, neurons=0.0, hidden=0.0).model,
    "layers": lambda m, ids: pruning.drop_layers(m, []).model,
}


def silent(kind: str) -> torch.nn.Module:
    """A model some of whose neurons and channels are 0 on every text."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    if kind == "opt":  # ReLU silences neurons
        config = transformers.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32)
        model = transformers.OPTForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("fc1.bias"):
                parameter.data[:20] = -2.0
    else:  # a channel that no norm lets through
        config = transformers.Qwen2Config(**sizes, intermediate_size=48, num_key_value_heads=2)
        model = transformers.Qwen2ForCausalLM(config)
        for layer in model.model.layers:
            layer.input_layernorm.weight.data[3] = 0
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["opt", "qwen2"])
@pytest.mark.parametrize("method", WEIGHTS)
def test_sparsity_zero_returns_every_weight(method, kind, dtype, ids):
    model = silent(kind).to(dtype)
    for pattern in ("row", "4:4"):
        new = dict(WEIGHTS[method](model, ids, pattern).named_parameters())
        assert all(torch.equal(p, new[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("method", STRUCTURES)
def test_a_ratio_of_zero_removes_no_structure(method, llama, ids):
    new = dict(STRUCTURES[method](llama, ids).named_parameters())
    assert all(torch.equal(p, new[n]) for n, p in llama.named_parameters())
