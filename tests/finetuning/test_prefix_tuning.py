"""Prefix tuning: the mixture, caches, padding, generation, the MLP, and refusals."""

import json
import math

import architectures
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from effnb.core.delta_files import open_delta, save_delta
from effnb.core.deltas import (
    delta_parameters,
    delta_state_dict,
    detach,
    hosts,
    load_delta,
    merge,
    set_active,
)
from effnb.core.training import TrainingSettings, train
from effnb.finetuning import lora, prefix_tuning, prompt_tuning

BUILT = ("Llama", "GPT2", "OPT", "BLOOM", "Qwen3", "BERT")


def close(a, b, off=2e-5):
    torch.testing.assert_close(a, b, atol=off, rtol=1e-4)


@examples(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5))
def test_a_prefix_is_a_gated_mixture(length, time, dim):
    """Attn(q, [P_k; K], [P_v; V]) = (1 - λ) Attn(q, K, V) + λ Attn(q, P_k, P_v), per head."""
    torch.manual_seed(length)
    q, K, V = (torch.randn(n, dim, dtype=torch.float64) for n in (3, time, time))
    P_k, P_v = (torch.randn(length, dim, dtype=torch.float64) for _ in range(2))

    def attention(keys, values):
        return torch.softmax(q @ keys.T / math.sqrt(dim), -1) @ values

    weights = torch.exp(q @ torch.cat([P_k, K]).T / math.sqrt(dim))
    lam = weights[:, :length].sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    whole = attention(torch.cat([P_k, K]), torch.cat([P_v, V]))
    mixture = (1 - lam) * attention(K, V) + lam * attention(P_k, P_v)
    torch.testing.assert_close(whole, mixture, atol=1e-12, rtol=1e-12)


def gpt(**changes):
    torch.manual_seed(0)
    options = dict(vocab_size=96, n_embd=64, n_layer=3, n_head=4, n_positions=64)
    config = transformers.GPT2Config(**options | changes, bos_token_id=1, eos_token_id=None)
    return transformers.GPT2LMHeadModel(config).eval()


def test_parameters_counted_in_closed_form():
    """2 L l d, and with an MLP l d + (d k + k) + (k 2 L d + 2 L d)."""
    plain = prefix_tuning.attach(gpt(), length=5, hidden=0)
    assert sum(p.numel() for p in plain.parameters() if p.requires_grad) == 1920
    mlp = prefix_tuning.attach(gpt(), length=5, hidden=32)
    assert sum(p.numel() for p in mlp.parameters() if p.requires_grad) == 15_072
    dropped = prefix_tuning.drop_reparametrization(mlp)
    assert sum(p.numel() for p in dropped.parameters() if p.requires_grad) == 1920


@torch.no_grad()
def test_it_is_what_a_filled_cache_gives_behind_shifted_positions():
    """The same as past_key_values by hand; positions that begin at 0 give something else."""
    model, ids = gpt(), torch.randint(0, 96, (2, 7))
    new = prefix_tuning.attach(model, length=5, hidden=0)
    (delta,) = (host.deltas["default"] for host in hosts(new).values())
    flat = delta.prefix.view(5, 6, 4, 16).permute(1, 2, 0, 3)  # (2L, heads, l, dim)
    found = []
    for start in (5, 0):
        cache = transformers.DynamicCache()
        for layer in range(3):
            keys, values = (flat[2 * layer + i].expand(2, -1, -1, -1) for i in (0, 1))
            cache.update(keys, values, layer)
        positions = torch.arange(start, start + 7)[None]
        mask = torch.ones(2, 12)
        found.append(
            model(ids, past_key_values=cache, attention_mask=mask, position_ids=positions).logits
        )
    close(new(ids).logits, found[0])
    assert float((new(ids).logits - found[1]).abs().max()) > 1e-3


@torch.no_grad()
def test_from_ids_it_starts_as_if_the_text_came_after_them(llama, ids):
    for model in (llama, gpt(vocab_size=128)):
        new = prefix_tuning.attach(model, hidden=0, ids=ids[0, :6])
        whole = model(torch.cat([ids[:1, :6].expand(4, -1), ids[:, 6:]], 1)).logits
        close(new(ids[:, 6:]).logits, whole[:, 6:])


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("name", BUILT)
@torch.no_grad()
def test_caches_padding_and_generation(name, method):
    """What the model's caller sees is the text alone, however it comes."""
    model, ids = architectures.build(name), architectures.ids(batch=2, time=9, seed=9)
    if method == "prefix":
        new = prefix_tuning.attach(model, length=5, hidden=8)
    else:
        new = prompt_tuning.attach(model, length=5)
    whole = new(input_ids=ids, use_cache=False).logits
    assert whole.shape == model(ids).logits.shape
    assert float((whole - model(ids).logits).abs().max()) > 1e-2
    plain = architectures.batch(name)
    want = new(**plain).logits
    for side in ("left", "right"):
        batch = architectures.batch(name, side)
        for given_batch in (batch, {k: v for k, v in batch.items() if k != "position_ids"}):
            got = new(**given_batch).logits
            close(got[:, 4:] if side == "left" else got[:, : want.shape[1]], want)
    each = torch.cat([new(input_ids=row[None]).logits for row in ids])
    close(each, whole)
    embedded = new(inputs_embeds=new.get_input_embeddings()(ids)).logits
    close(embedded, whole)
    if name == "BERT":
        return
    out = new(input_ids=ids[:, :4], use_cache=True)
    parts = [out.logits]
    assert out.past_key_values.get_seq_length() == 4  # virtual tokens are not in it
    for t in (4, 6, 7):
        step = ids[:, t : t + (2 if t == 4 else 1)] if t < 7 else ids[:, 7:]
        out = new(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    close(torch.cat(parts, 1), whole)
    assert torch.equal(new(input_ids=ids, return_dict=False)[0], new(input_ids=ids).logits)


@pytest.mark.parametrize("method", [prefix_tuning, prompt_tuning])
@torch.no_grad()
def test_generation_with_every_cache_and_padding(llama, ids, method):
    llama.generation_config.eos_token_id = None
    new = method.attach(llama, length=4)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    text = ids[:2, :8]
    wanted = text
    for _ in range(6):
        wanted = torch.cat([wanted, new(wanted).logits[:, -1:].argmax(-1)], 1)
    mask = torch.ones_like(text)
    for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        got = new.generate(text, attention_mask=mask, **options, **more)
        assert torch.equal(got, wanted), more
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), text], 1)
    hidden = torch.cat([torch.zeros_like(mask[:, :3]), mask], 1)
    assert torch.equal(new.generate(padded, attention_mask=hidden, **options)[:, 3:], wanted)
    beams = [
        new.generate(text, attention_mask=mask, num_beams=3, **options, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*beams)
    cache = transformers.DynamicCache(config=llama.config)
    first = new.generate(text, attention_mask=mask, past_key_values=cache, **options | {
        "max_new_tokens": 3
    })  # fmt: skip
    again = new.generate(
        first, attention_mask=torch.ones_like(first), past_key_values=cache,
        **options | {"max_new_tokens": 3},
    )  # fmt: skip
    assert torch.equal(again, wanted)
    assert not torch.equal(llama.generate(text, attention_mask=mask, **options), wanted)


@torch.no_grad()
def test_masks_of_four_dimensions(llama, ids):
    text, new = ids[:, :6], prefix_tuning.attach(llama, length=3, hidden=0)
    prompt = prompt_tuning.attach(llama, length=3)
    causal = torch.ones(6, 6, dtype=torch.bool).tril().expand(4, 1, -1, -1)
    added = torch.zeros(4, 1, 6, 6).masked_fill(~causal, torch.finfo(torch.float32).min)
    for model in (new, prompt):
        for mask in (causal, added):
            close(model(text, attention_mask=mask).logits, model(text).logits)


@torch.no_grad()
def test_a_prefix_and_a_prompt_at_once(llama, ids):
    """In either order, with and without a cache; both are gone when both are detached."""
    a = prompt_tuning.attach(prefix_tuning.attach(llama, "f", length=3), "t", length=2)
    b = prefix_tuning.attach(prompt_tuning.attach(llama, "t", length=2), "f", length=3)
    two = prompt_tuning.attach(a, "u", length=2, seed=5)
    for model in (a, b, two):
        whole = model(ids, use_cache=False).logits
        out = model(ids[:, :10], use_cache=True)
        rest = model(ids[:, 10:], past_key_values=out.past_key_values).logits
        close(torch.cat([out.logits, rest], 1), whole)
        assert out.past_key_values.get_seq_length() == 24
    close(a(ids).logits, b(ids).logits)
    assert torch.equal(detach(detach(a, "f"), "t")(ids).logits, llama(ids).logits)
    assert torch.equal(set_active(two)(ids).logits, llama(ids).logits)
    only = prefix_tuning.attach(llama, "f", length=3)
    close(set_active(a, "f")(ids).logits, only(ids).logits)


def test_training_with_the_mlp_and_without_it_afterwards(llama, ids, tmp_path):
    before = {key: t.clone() for key, t in llama.state_dict().items()}
    new = prefix_tuning.attach(llama, length=4, hidden=16)

    def batch(step):
        return torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(step % 2))

    result = train(new, batch, TrainingSettings(steps=10, learning_rate=1e-2))
    assert result.losses[-1] < result.losses[0]
    assert all(p.grad is not None for p in delta_parameters(new, "default").values())
    with torch.no_grad():
        dropped = prefix_tuning.drop_reparametrization(new)
        close(dropped(ids).logits, new(ids).logits)
        for model in (new, dropped):
            save_delta(model, "default", tmp_path / "p")
            assert torch.equal(open_delta(llama, tmp_path / "p")(ids).logits, model(ids).logits)
        assert torch.equal(detach(dropped, "default")(ids).logits, llama(ids).logits)
    assert list(delta_state_dict(dropped, "default")) == ["model.prefix"]
    assert all(torch.equal(t, before[key]) for key, t in llama.state_dict().items())
    shared = {p.data_ptr() for p in llama.parameters()}
    own = set(delta_parameters(new, "default").values())
    assert all(p.data_ptr() in shared for p in new.parameters() if p not in own)
    with pytest.raises(ValueError, match="has no MLP to drop"):
        prefix_tuning.drop_reparametrization(dropped)
    with pytest.raises(ValueError, match="keys and values that do not depend on the text"):
        merge(dropped, "default")


def test_on_a_bare_backbone_and_beside_lora(llama, ids):
    inner = llama.model
    new = prefix_tuning.attach(inner, length=3, hidden=0)
    assert list(delta_state_dict(new, "default")) == ["prefix"]
    assert type(new).__name__ == "LlamaModel" and isinstance(new, type(inner))
    state = {"prefix": torch.zeros_like(delta_state_dict(new, "default")["prefix"])}
    changed = load_delta(new, "default", state)
    with torch.no_grad():
        # Zero keys take their share of the softmax and bring nothing.
        assert not torch.equal(changed(ids)[0], inner(ids)[0])
        both = lora.attach(prefix_tuning.attach(llama, "p", length=3), "l", rank=2)
        assert {k.split(".")[1] for k in delta_state_dict(both, "l")} == {"layers"}
        close(both(ids).logits, set_active(both, "p")(ids).logits)


def test_every_setting_that_is_not_understood_is_refused(llama, tmp_path):
    prefix_tuning.save_peft(prefix_tuning.attach(llama, length=3), "default", tmp_path)
    config = tmp_path / "adapter_config.json"
    about = json.loads(config.read_text())
    for key, value, message in [
        ("modules_to_save", ["lm_head"], "uses modules_to_save"),
        ("num_transformer_submodules", 2, "uses num_transformer_submodules = 2"),
        ("task_type", "SEQ_2_SEQ_LM", "uses task_type"),
        ("a_setting_of_next_year", 1, "uses a_setting_of_next_year"),
        ("peft_type", "PROMPT_TUNING", "holds PROMPT_TUNING, not PREFIX_TUNING"),
        ("num_virtual_tokens", 4, "says num_virtual_tokens = 4, but its matrix has 3 rows"),
    ]:
        config.write_text(json.dumps(about | {key: value}))
        with pytest.raises(ValueError, match=message):
            prefix_tuning.load_peft(llama, tmp_path)


def test_bad_input_is_one_sentence(llama, tiny_llama, ids, tmp_path):
    for settings, message in [
        ({"length": 0}, "length is 0"),
        ({"hidden": -1}, "hidden is -1"),
        ({"length": 64}, "a prefix of 64 are longer than the model's context of 64"),
        ({"ids": ids[0]}, "only without an MLP"),
        ({"name": "a.b"}, "cannot name a delta"),
    ]:
        with pytest.raises(ValueError, match=message):
            prefix_tuning.attach(llama, **settings)
    new = prefix_tuning.attach(llama, length=41, hidden=0)
    with pytest.raises(ValueError, match="24 tokens and a prefix of 41 are longer .* of 64"):
        new(ids)
    new(ids[:, :23])
    with pytest.raises(ValueError, match="attached already"):
        prefix_tuning.attach(new)
    with pytest.raises(ValueError, match="holds no Hugging Face transformer"):
        prefix_tuning.attach(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="not every layer of ModernBertModel reads"):
        prefix_tuning.attach(architectures.build("ModernBERT"))
    with pytest.raises(ValueError, match="only attend to near tokens"):
        prefix_tuning.attach(architectures.build("Mistral"))
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        prefix_tuning.attach(architectures.build("T5"))
    with pytest.raises(ValueError, match="the mask covers 12 tokens; there are 0 in the cache and"):
        new(ids[:, :7], attention_mask=torch.ones(4, 12))
    with pytest.raises(ValueError, match="texts packed into one row"):
        new(ids[:, :6], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    short = prefix_tuning.attach(llama, length=3, hidden=0)
    save_delta(short, "default", tmp_path / "a")
    with pytest.raises(ValueError, match=r"model\.prefix has shape \(3, 96\), not \(3, 64\)"):
        open_delta(tiny_llama(num_hidden_layers=2), tmp_path / "a")
    with pytest.raises(ValueError, match="the model has no such module"):
        open_delta(architectures.build("GPT2"), tmp_path / "a")
    llama.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing drops the cache"):
        prefix_tuning.attach(llama, length=3).train()(ids)
