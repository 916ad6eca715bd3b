"""RWKV-4 against the model of transformers, weights copied over."""

import pytest
import torch
from transformers import RwkvConfig, RwkvForCausalLM
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from effnb.design.retention import RWKVLM, RWKVConfig, initial_mix, wkv

NAMES = {  # ours: theirs
    "embedding": "rwkv.embeddings",
    "norm": "rwkv.ln_out",
    "norm0": "pre_ln",
    "norm1": "ln1",
    "norm2": "ln2",
    "time_mix": "attention",
    "channel_mix": "feed_forward",
    "mix_key": "time_mix_key",
    "mix_value": "time_mix_value",
    "mix_receptance": "time_mix_receptance",
    "lm_head": "head",
    "blocks": "rwkv.blocks",
}


@pytest.fixture(scope="module")
def pair():
    """Their model with random weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = RwkvForCausalLM(
        RwkvConfig(
            vocab_size=31,
            hidden_size=8,
            attention_hidden_size=8,
            intermediate_size=20,
            num_hidden_layers=3,
            context_length=32,
            rescale_every=0,  # dividing the weights while decoding is for float16 only
            tie_word_embeddings=True,
        )
    ).eval()
    ours = RWKVLM(RWKVConfig(hidden=8, layers=3, feed_forward=20, vocabulary=31)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            mix = "time_mix" in name
            parameter.copy_(torch.rand(parameter.shape) if mix else torch.randn(parameter.shape))
        state = theirs.state_dict()
        state["head.weight"] = state["rwkv.embeddings.weight"]
        theirs.load_state_dict(state)
        for name, parameter in ours.named_parameters():
            other = ".".join(NAMES.get(part, part) for part in name.split("."))
            parameter.copy_(state[other].reshape(parameter.shape))
    return ours, theirs


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("begins", [True, False])
def test_wkv_equals_the_reference(form, begins):
    torch.manual_seed(1)
    decay, u = torch.randn(2, 6)
    k, v = 3 * torch.randn(2, 2, 13, 6)
    state = None if begins else [torch.randn(2, 6), torch.rand(2, 6) + 0.1, torch.randn(2, 6)]
    expected, end = rwkv_linear_attention_cpu(decay, u, k, v, state=state, return_state=True)
    out, found = wkv(decay.exp(), u, k, v, None if begins else tuple(state), form=form)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    for a, b, p in (found, end):  # the same numbers, however they are split from their exponent
        torch.testing.assert_close(a / b, end[0] / end[1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(b.log() + p, end[1].log() + end[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_the_model_equals_the_reference(pair, form):
    ours, theirs = pair
    ids = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(input_ids=ids, use_cache=False).logits
        assert expected.std() > 1
        torch.testing.assert_close(ours(ids, form=form), expected, atol=2e-4, rtol=1e-4)


def test_decoding_from_a_state_equals_the_reference(pair):
    ours, theirs = pair
    # One text: of several, its steps add the predecessors of all texts to each of them
    ids = torch.randint(0, 31, (1, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        read = theirs(input_ids=ids[:, :5], use_cache=True)
        _, state = ours.advance(ids[:, :5])
        for t in range(5, 9):
            read = theirs(input_ids=ids[:, t : t + 1], state=read.state, use_cache=True)
            hidden, state = ours.advance(ids[:, t : t + 1], state, form="recurrent")
            torch.testing.assert_close(ours.lm_head(hidden), read.logits, atol=2e-4, rtol=1e-4)


def test_initial_values_are_the_references_but_for_its_bonus():
    theirs = RwkvForCausalLM(
        RwkvConfig(vocab_size=31, hidden_size=8, attention_hidden_size=8, num_hidden_layers=3)
    )
    for number, block in enumerate(theirs.rwkv.blocks):
        ours, mix = initial_mix(8, number, 3), block.attention
        torch.testing.assert_close(mix.time_decay.data, ours["decay"])
        for name in ("key", "value", "receptance"):
            torch.testing.assert_close(getattr(mix, f"time_mix_{name}").data.flatten(), ours[name])
        assert mix.time_first.unique().tolist() == [1]  # ones_like of the zigzag
        assert ours["first"].unique().numel() == 3
