"""Plain RoPE read beyond its length: the same function, a higher limit."""

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM

from effnb.design.context import extrapolation, rotary_table


def test_it_computes_what_the_model_does_and_only_lifts_its_limit():
    model, ids = zoo.make("llama"), zoo.words(2, 20)
    limit = model.config.max_position_embeddings
    longer = extrapolation(model, 4.0)
    with torch.no_grad():
        assert torch.equal(longer(input_ids=ids).logits, model(input_ids=ids).logits)
    assert longer.config.max_position_embeddings == 4 * limit
    assert model.config.max_position_embeddings == limit
    held = dict(model.named_parameters())
    assert all(p.data_ptr() == held[name].data_ptr() for name, p in longer.named_parameters())


def test_it_is_saved_as_a_plain_table(tmp_path):
    longer = extrapolation(zoo.make("llama"), 2.0)
    longer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters["rope_type"] == "default"
    assert again.config.max_position_embeddings == longer.config.max_position_embeddings


@pytest.mark.parametrize("factor", [0.5, float("nan"), float("inf")])
def test_it_refuses_what_is_no_scale(factor):
    with pytest.raises(ValueError, match="factor is"):
        extrapolation(zoo.make("llama"), factor)
    with pytest.raises(ValueError, match="extended already"):
        rotary_table(extrapolation(zoo.make("llama"), 2.0))
