"""What is found by running a model is what its architecture calls by these names."""

import architectures
import pytest
import torch
from torch import nn

from effnb.core.sublayers import find_sublayers

FOUND = {
    "Llama": ("self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj", ""),
    "Phi": ("self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc2", ""),
    "OPT": ("self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc2", ""),
    "GPT-J": ("attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.fc_out", ""),
    "Phi3": ("", "", "self_attn.o_proj", "mlp.down_proj", ""),
    "Gemma2": ("self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj", ""),
    "BERT": (
        *("attention.self.key", "attention.self.value", "attention.output.dense"),
        *("output.dense", "output.LayerNorm"),
    ),
}


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_every_block(name, dtype):
    blocks = find_sublayers(architectures.build(name, dtype=dtype))
    assert len(blocks) == 2
    for index, b in enumerate(blocks):
        assert b.block.endswith(f".{index}") and b.width == 32
        parts = (b.keys, b.values, b.attention_out, b.feedforward_out, b.norm)
        assert tuple(part.removeprefix(f"{b.block}.") for part in parts) == FOUND[name]


@pytest.mark.parametrize("name", ["Mixtral", "GPT-OSS"])
def test_experts_are_not_understood(name):
    with pytest.raises(ValueError, match="could be told to be its feedforward out.* or experts"):
        find_sublayers(architectures.build(name), "feedforward_out")


def test_what_does_not_run_on_ids_is_said():
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))

    class Numbers(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = blocks

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="Numbers does not run on input_ids alone"):
        find_sublayers(Numbers(), "keys")
    with pytest.raises(ValueError, match="no linear layer fits|no list of equal blocks"):
        find_sublayers(nn.Sequential(nn.ReLU()))
