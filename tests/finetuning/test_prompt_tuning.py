"""Prompt tuning: what is in front of the text, how it starts, and refusals.

Caches, padding and generation are tested with those of prefixes, in `test_prefix_tuning`.
"""

import json

import architectures
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from effnb.core.delta_files import attach_state, open_delta, save_delta
from effnb.core.deltas import delta_parameters, delta_state_dict, detach, merge
from effnb.core.training import TrainingSettings, train
from effnb.finetuning import prompt_tuning
from effnb.finetuning.prompt_tuning import start_values


@torch.no_grad()
def test_it_is_the_embeddings_by_hand(llama, ids):
    """[P; E(x)] through inputs_embeds, in a decoder and an encoder; p d numbers are trained."""
    for model in (llama, architectures.build("BERT"), architectures.build("GPT2")):
        words = ids % 96
        new = prompt_tuning.attach(model, length=5)
        (prompt,) = delta_parameters(new, "default").values()
        assert sum(p.numel() for p in new.parameters() if p.requires_grad) == 5 * 32
        embedded = model.get_input_embeddings()(words)
        by_hand = torch.cat([prompt.expand(4, -1, -1), embedded], 1)
        expected = model(inputs_embeds=by_hand, use_cache=False).logits[:, 5:]
        found = new(input_ids=words, use_cache=False)
        torch.testing.assert_close(found.logits, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_from_ids_it_starts_as_a_text_with_them(llama, ids):
    text = ids[0, :6]
    new = prompt_tuning.attach(llama, start=text)
    whole = llama(torch.cat([text.expand(4, -1), ids], 1)).logits[:, 6:]
    torch.testing.assert_close(new(ids).logits, whole, atol=2e-5, rtol=1e-4)
    output = new(ids, output_hidden_states=True, labels=ids)
    assert all(h.shape == (4, 24, 32) for h in output.hidden_states)
    logits, labels = whole[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-4)


@examples(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(2, 6), st.integers(0, 3))
def test_starts(length, rows, dim, seed):
    table = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    make = lambda start: start_values(  # noqa: E731
        table, length, start, torch.Generator().manual_seed(seed)
    )
    chosen = make("vocabulary")
    assert chosen.shape == (length, dim)
    assert all(any(torch.equal(row, own) for own in table) for row in chosen)
    ids = list(range(rows))
    assert torch.equal(make(ids), table[[i % rows for i in range(length)]])
    if rows > 1:
        assert make("random").shape == (length, dim)


def test_random_starts_have_the_embeddings_scale():
    table = 0.02 * torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) + 0.1
    found = start_values(table, 4000, "random", torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.mean(0), table.mean(0), atol=2e-3, rtol=0)
    torch.testing.assert_close(found.std(0), table.std(0), atol=2e-3, rtol=0)


def test_seeds(llama):
    found = [
        delta_state_dict(prompt_tuning.attach(llama, start=start, seed=seed), "default")
        for start in prompt_tuning.STARTS
        for seed in (0, 0, 1)
    ]
    keys = [state["model.prompt"] for state in found]
    assert torch.equal(keys[0], keys[1]) and torch.equal(keys[3], keys[4])
    assert not torch.equal(keys[0], keys[2]) and not torch.equal(keys[3], keys[5])


@torch.no_grad()
def test_a_pooled_encoder_pools_the_text_s_first_token(ids):
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    ).eval()
    new = prompt_tuning.attach(model, length=3)
    words = ids % 96
    kinds = torch.ones_like(words)
    out = new(input_ids=words, token_type_ids=kinds)
    assert out.last_hidden_state.shape == (4, 24, 32)
    assert torch.equal(out.pooler_output, new.pooler(out.last_hidden_state))
    assert not torch.equal(out.last_hidden_state, new(input_ids=words).last_hidden_state)
    assert list(delta_state_dict(new, "default")) == ["prompt"]


def test_training_touches_the_prompt_only(llama, ids, tmp_path):
    before = {key: t.clone() for key, t in llama.state_dict().items()}
    new = prompt_tuning.attach(llama, length=6)
    start = delta_state_dict(new, "default")["model.prompt"]

    def batch(step):
        return torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(step % 2))

    result = train(new, batch, TrainingSettings(steps=10, learning_rate=5e-2))
    assert result.losses[-1] < result.losses[0]
    state = delta_state_dict(new, "default")
    assert bool((state["model.prompt"] != start).all())
    assert all(torch.equal(t, before[key]) for key, t in llama.state_dict().items())
    with torch.no_grad():
        save_delta(new, "default", tmp_path / "p")
        assert torch.equal(open_delta(llama, tmp_path / "p")(ids).logits, new(ids).logits)
        assert torch.equal(detach(new, "default")(ids).logits, llama(ids).logits)
    with pytest.raises(ValueError, match="a part of what the model reads"):
        merge(new, "default")


def test_every_setting_that_is_not_understood_is_refused(llama, tmp_path):
    prompt_tuning.save_peft(prompt_tuning.attach(llama, length=3), "default", tmp_path)
    config = tmp_path / "adapter_config.json"
    about = json.loads(config.read_text())
    for key, value, message in [
        ("modules_to_save", ["lm_head"], "uses modules_to_save"),
        ("num_transformer_submodules", 2, "uses num_transformer_submodules = 2"),
        ("task_type", "SEQ_CLS", "uses task_type"),
        ("prompt_tuning_init", "NEXT_YEAR", "uses prompt_tuning_init"),
        ("peft_type", "PREFIX_TUNING", "holds PREFIX_TUNING, not PROMPT_TUNING"),
        ("num_virtual_tokens", 4, "says num_virtual_tokens = 4, but its matrix has 3 rows"),
    ]:
        config.write_text(json.dumps(about | {key: value}))
        with pytest.raises(ValueError, match=message):
            prompt_tuning.load_peft(llama, tmp_path)


def test_bad_input_is_one_sentence(llama, tiny_llama, ids, tmp_path):
    for settings, message in [
        ({"length": 0}, "length is 0"),
        ({"length": 64}, "a prompt of 64 are longer than the model's context of 64"),
        ({"start": "words"}, "choose one of vocabulary, random"),
        ({"start": []}, "from ids, one or more, of 0 to 127"),
        ({"start": [128]}, "from ids, one or more, of 0 to 127"),
        ({"name": "keys"}, "cannot name a delta"),
    ]:
        with pytest.raises(ValueError, match=message):
            prompt_tuning.attach(llama, **settings)
    new = prompt_tuning.attach(llama, length=41)
    with pytest.raises(ValueError, match="24 tokens and a prompt of 41 are longer .* of 64"):
        new(ids)
    new(ids[:, :23])
    with pytest.raises(ValueError, match="attached already"):
        prompt_tuning.attach(new)
    with pytest.raises(ValueError, match="only attend to near tokens"):
        prompt_tuning.attach(architectures.build("Gemma2"))
    filled = llama(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled without this prompt"):
        prompt_tuning.attach(llama, length=3)(ids, past_key_values=filled)
    save_delta(prompt_tuning.attach(llama, length=3), "default", tmp_path / "a")
    wider = tiny_llama(hidden_size=40, num_attention_heads=5, num_key_value_heads=1)
    with pytest.raises(ValueError, match=r"vectors of 40 numbers here.*\(3, 32\)"):
        open_delta(wider, tmp_path / "a")
    with pytest.raises(ValueError, match="sits on a whole transformer"):
        attach_state(llama, "x", "prompt", {}, {"model.norm.prompt": torch.ones(2, 32)})
    with pytest.raises(ValueError, match="a prompt is one matrix"):
        attach_state(llama, "x", "prompt", {}, {"model.P": torch.ones(2, 32)})
