"""Every architecture sees what an objective lets it see, or is refused in one sentence."""

from __future__ import annotations

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM
from zoo import ZOO, make, words

from effnb.pretraining import objectives
from effnb.pretraining.objectives.examples import check_heeds_mask

RIGHT = {
    "llama", "qwen2 window", "qwen3", "gemma2", "gemma3", "cohere2", "gpt2", "gpt-neox", "bert",
    "roberta", "distilbert", "electra",
}  # fmt: skip
"""Architectures that have to work."""


@pytest.mark.parametrize("name", ZOO)
def test_it_is_right_or_refused(name):
    model, ids = make(name), words(1, 9)
    example = objectives.prefix_lm(ids, torch.tensor([4]))
    try:
        loss = objectives.example_loss(model, example)
    except ValueError as caught:
        loss, said = None, str(caught)
    if loss is None:
        assert name not in RIGHT
        assert said.endswith(".")
        return
    asked = example.labels != objectives.IGNORED
    logits = model(input_ids=ids, attention_mask=example.bias(torch.float64)).logits
    wanted = torch.nn.functional.cross_entropy(logits[asked], example.labels[asked])
    torch.testing.assert_close(loss.double(), wanted, atol=1e-5, rtol=1e-5)
    hidden = objectives.hidden_states(model, example)
    for j in range(9):  # who notices that token j is another one?
        changed = ids.clone()
        changed[0, j] = int(ids[0, j]) % 60 + 20
        other = objectives.Example(changed, example.labels, example.visible, 9)
        moved = (objectives.hidden_states(model, other) - hidden)[0].abs().amax(-1) > 1e-9
        assert torch.equal(moved, example.visible[0, :, j]), j


def test_most_architectures_work():
    assert set(ZOO) >= RIGHT


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_two_stacks_are_sent_to_span_corruption(name):
    with pytest.raises(ValueError, match="use its own loss"):
        objectives.example_loss(make(name), objectives.causal_lm(words(1, 6)))


def test_a_recurrent_model_cannot_look_ahead():
    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(ValueError, match="does not look where a mask tells it to"):
        objectives.example_loss(
            model, objectives.masked_lm(words(1, 8), 0.5, mask_token=3, vocabulary=90)
        )


def test_a_model_in_training_stays_so_and_draws_nothing():
    model = make("bert")
    model.train()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    check_heeds_mask(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(module.training for module in model.modules())
