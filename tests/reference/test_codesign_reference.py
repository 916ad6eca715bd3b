"""GShard's gating against NLLB-MoE's in transformers, which follows the same algorithm."""

from __future__ import annotations

import pytest
import torch
from transformers import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

from effnb.hardware.codesign.gshard import route


@pytest.mark.parametrize(("tokens", "experts", "slots"), [(24, 4, 12), (24, 4, 3), (40, 8, 40)])
def test_gates_and_dropped_choices_are_nllbs(tokens, experts, slots):
    """NLLB-MoE routes one group at a time, and does not say which place a token takes."""
    config = NllbMoeConfig(
        num_experts=experts,
        expert_capacity=slots,
        second_expert_policy="all",
        normalize_router_prob_before_dropping=True,
        batch_prioritized_routing=False,
        moe_eval_capacity_token_fraction=-1.0,
    )
    router = NllbMoeTop2Router(config).eval()
    logits = torch.randn(2, tokens, experts, generator=torch.Generator().manual_seed(slots))
    ours = route(logits, slots)
    for group, combine in zip(logits, ours.combine):
        first, theirs = router.route_tokens(group)
        torch.testing.assert_close(combine.sum(-1), theirs)
        best = torch.nn.functional.one_hot(group.argmax(-1), experts)
        assert torch.equal((combine.sum(-1) * best) > 0, first.bool())
    if slots == 3:
        assert ours.dropped_choices > 0
