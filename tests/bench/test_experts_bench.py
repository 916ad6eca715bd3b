"""The layer of experts beside transformers' Mixtral block, as a ratio in one run (`make bench`)."""

from __future__ import annotations

import pytest
import timing
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from effnb.design.experts import MIXTRAL, ExpertLayer

pytestmark = pytest.mark.bench
TOKENS, HIDDEN, WIDTH, EXPERTS = 512, 128, 256, 8
NOISE = 1.05
"""At least as fast, but for the scatter of two medians."""


def measure_layers():
    """Median seconds of reading, and of a step of training, on the same weights in turn."""
    torch.manual_seed(0)
    theirs = MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
        )
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.05)
    ours = ExpertLayer(HIDDEN, WIDTH, EXPERTS, MIXTRAL)
    state = {k.replace("gate.weight", "router.weight"): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(state)
    x = torch.randn(1, TOKENS, HIDDEN)
    assert torch.allclose(ours(x), theirs(x), atol=1e-4)
    functions = {}
    for name, layer in (("ours", ours), ("transformers", theirs)):

        def read(layer=layer):
            with torch.no_grad():
                layer(x)

        functions[f"{name} reading"] = read
        functions[f"{name} training"] = lambda layer=layer: layer(x).square().sum().backward()
    return timing.in_turn(functions, 21)


def test_experts_are_as_fast_as_those_of_transformers():
    seconds = timing.measured(__file__, "layers")
    for what in ("reading", "training"):
        ratio = seconds[f"ours {what}"] / seconds[f"transformers {what}"]
        print(f"\n{what}: {ratio:.2f} of the time of transformers' block")
        assert ratio <= NOISE


if __name__ == "__main__":
    timing.answer(globals())
