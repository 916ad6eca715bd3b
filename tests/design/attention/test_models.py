"""Attention in Hugging Face models: grouped queries, the cache, streaming, sliding windows."""

import copy
import importlib

import pytest
import torch
from architectures import NAMES, build
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.design.attention import kv_cache as kc
from effnb.design.attention.patterns import window_pattern

# Modules whose names the package gives to their functions.
gq = importlib.import_module("effnb.design.attention.grouped_query")
sw = importlib.import_module("effnb.design.attention.sliding_window")
sl = importlib.import_module("effnb.design.attention.streaming_llm")


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model, before):
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.config._attn_implementation != sw.NAME


GROUPED = {
    *("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Phi", "Cohere2"),
    *("GPT-OSS", "Mixtral", "Qwen3-MoE"),
}
STREAMS = {
    *("Llama", "Qwen2", "Qwen3", "Gemma", "Phi", "Phi3", "GPT-NeoX", "Falcon", "Mixtral"),
    "Qwen3-MoE",
}
WINDOWED = {
    *("Llama", "Qwen2", "Qwen3", "Gemma", "Phi", "Phi3", "GPT2", "OPT", "GPT-NeoX", "Mixtral"),
    "Qwen3-MoE",
}
"""What each method takes; it refuses the others."""


def refusal(call):
    """What a method says when it refuses, or None."""
    try:
        call()
    except ValueError as problem:
        return str(problem)
    return None


def mha(tiny_llama, **changes):
    return tiny_llama(num_key_value_heads=4, **changes)


# --- grouped queries


@pytest.mark.parametrize("groups", [1, 2])
def test_tied_heads_lose_nothing(tiny_llama, ids, groups):
    """If all heads of a group are equal, the pooled one is that head bit for bit.

    Logits agree to 1e-12 in float64. A difference of 0.0 would depend on the order in which a
    library adds up products of matrices with fewer rows.
    """
    model = mha(tiny_llama)
    with torch.no_grad():
        for layer in model.model.layers:
            for p in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                heads = p.weight.unflatten(0, (groups, 4 // groups, -1))
                heads[:] = heads[:, :1].clone()
        before = state(model)
        found = gq.grouped_query(model, groups)
        assert found.config.num_key_value_heads == groups
        for new, old in zip(found.model.layers, model.model.layers):
            for leaf in ("k_proj", "v_proj"):
                heads = getattr(old.self_attn, leaf).weight.unflatten(0, (groups, 4 // groups, -1))
                pooled = getattr(new.self_attn, leaf).weight
                assert torch.equal(pooled, heads[:, 0].flatten(0, 1))
        torch.testing.assert_close(found(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
        unchanged(model, before)
        assert model.config.num_key_value_heads == 4
        wide = copy.deepcopy(model).double()
        again = gq.grouped_query(wide, groups)
        assert (again(ids).logits - wide(ids).logits).abs().max() < 1e-12


def test_groups_are_consecutive_heads():
    weight = torch.arange(8.0).repeat_interleave(2)[:, None].expand(-1, 3)  # 8 heads of width 2
    assert gq.pool_heads(weight, 8, 2)[:, 0].tolist() == [1.5, 1.5, 5.5, 5.5]
    assert gq.pool_heads(weight, 8, 4, pooling="first")[::2, 0].tolist() == [0, 2, 4, 6]
    new = gq.pool_heads(
        torch.randn(64, 500), 8, 2, pooling="random", generator=torch.Generator().manual_seed(1)
    )
    assert new.shape == (16, 500) and float(new.std()) == pytest.approx(1, rel=0.05)


@settings(max_examples=15)
@given(groups=st.integers(1, 4), each=st.integers(1, 3), width=st.integers(1, 3))
def test_pooling_to_as_many_heads_changes_nothing(groups, each, width):
    weight = torch.randn(groups * each * width, 2, dtype=torch.float64)
    assert torch.equal(gq.pool_heads(weight, groups * each, groups * each), weight)
    in_steps = gq.pool_heads(gq.pool_heads(weight, groups * each, groups), groups, 1)
    torch.testing.assert_close(in_steps, gq.pool_heads(weight, groups * each, 1))


@pytest.mark.parametrize("pooling", gq.POOLINGS)
def test_the_new_model_generates_and_is_saved_and_loaded(tiny_llama, ids, tmp_path, pooling):
    from transformers import AutoModelForCausalLM

    model = mha(tiny_llama, attention_bias=True)
    found = gq.grouped_query(model, 2, pooling=pooling)
    assert found.model.layers[0].self_attn.k_proj.weight.shape == (16, 32)
    assert (
        found.model.layers[0].self_attn.q_proj.weight
        is model.model.layers[0].self_attn.q_proj.weight
    )
    options = dict(max_new_tokens=6, do_sample=False)
    with_cache, without = (found.generate(ids[:2], use_cache=c, **options) for c in (True, False))
    assert torch.equal(with_cache, without)
    found.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.num_key_value_heads == 2
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, found(ids).logits)
        cache = found(ids, use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (4, 2, 24, 8)
    shape = kc.CacheShape.of(found)
    assert kc.stored_cache_bytes(cache) == shape.bytes(24, batch=4, bytes_per_number=4)
    assert shape.bytes(1) == kc.CacheShape.of(model).bytes(1) / 2


def test_the_mean_keeps_more_than_the_first_head_or_chance(tiny_llama, ids):
    """Heads that differ little from their group's mean, as the paper's order supposes."""
    model = mha(tiny_llama)
    with torch.no_grad():
        for layer in model.model.layers:
            for p in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                heads = p.weight.unflatten(0, (2, 2, -1))
                heads[:] = heads[:, :1].clone() + 0.05 * torch.randn_like(heads)
        exact = model(ids).logits.log_softmax(-1)
        lost = {}
        for pooling in gq.POOLINGS:
            logits = gq.grouped_query(model, 2, pooling=pooling)(ids).logits.log_softmax(-1)
            lost[pooling] = float((exact.exp() * (exact - logits)).sum(-1).mean())
    assert lost["mean"] < lost["first"] < lost["random"]


def test_grouped_models_can_be_grouped_further(llama, ids):
    found = gq.grouped_query(llama, 1)
    assert kc.CacheShape.of(found) == kc.CacheShape(3, 4, 1, 8)
    assert found(ids).logits.isfinite().all()
    same = gq.grouped_query(llama, 2)
    with torch.no_grad():
        assert torch.equal(same(ids).logits, llama(ids).logits)


def test_new_projections_can_be_trained(llama, ids):
    with torch.inference_mode():
        found = gq.grouped_query(llama, 1)
    out = found(ids, labels=ids)
    out.loss.backward()
    assert found.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    assert llama.model.layers[0].self_attn.k_proj.weight.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_grouped_rightly_or_refused(name):
    """Right: heads of a group made equal beforehand give the same logits."""
    model = build(name)
    before = state(model)
    said = refusal(lambda: gq.grouped_query(model, 1))
    assert (said is None) == (name in GROUPED), said
    unchanged(model, before)
    if said is not None:
        assert said.endswith((".", ")")) and len(said) < 250
        return
    old = model.config.get_text_config().num_key_value_heads
    with torch.no_grad():
        for module in model.modules():
            for leaf in ("k_proj", "v_proj"):
                if isinstance(layer := getattr(module, leaf, None), torch.nn.Linear):
                    for rows in (layer.weight, layer.bias):
                        if rows is not None:
                            heads = rows.unflatten(0, (old, -1))
                            heads[:] = heads[:1].clone()
        text = torch.arange(3, 15)[None]
        logits = gq.grouped_query(model, 1)(input_ids=text)[0]
        torch.testing.assert_close(logits, model(input_ids=text)[0], atol=1e-5, rtol=1e-4)


def test_grouping_is_refused(llama):
    with pytest.raises(ValueError, match="kv_heads is 3; it must divide"):
        gq.grouped_query(llama, 3)
    with pytest.raises(ValueError, match="kv_heads is 0"):
        gq.grouped_query(llama, 0)
    with pytest.raises(ValueError, match="pooling is 'median'"):
        gq.grouped_query(llama, 1, pooling="median")
    with pytest.raises(ValueError, match="cannot be cut into 3"):
        gq.pool_heads(torch.zeros(8, 2), 4, 3)
    changed = copy.deepcopy(llama)
    changed.model.layers[1].self_attn.v_proj = torch.nn.Sequential(torch.nn.Linear(32, 16))
    with pytest.raises(ValueError, match="is a Sequential"):
        gq.grouped_query(changed, 1)
    with pytest.raises(ValueError, match="no attention with layers k_proj"):
        gq.grouped_query(torch.nn.Linear(2, 2), 1)


# --- the cache


def test_bytes():
    """SmolLM2-135M's shape: 23,040 bytes a token in 16 bits, three times that without groups."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    )
    shape = kc.CacheShape.of(config)
    assert shape == kc.CacheShape(30, 9, 3, 64)
    assert shape.bytes(1) == 23_040
    config.num_key_value_heads = 9
    assert kc.CacheShape.of(config).bytes(1) == 69_120
    assert shape.bytes(2048, batch=4, bytes_per_number=0.5) == 2 * 30 * 3 * 64 * 2048 * 4 / 2


def test_smollm2_shape_has_its_parameters():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_attention_operations():
    shape = kc.CacheShape(2, 3, 1, 5)
    pair = 4 * 5 * 3 * 2
    assert shape.attention_operations(10, 2) == pair * (11 + 12)
    assert shape.attention_operations(10, 2, cached=False) == pair * (66 + 78)
    long, longer = (shape.attention_operations(0, n, cached=False) for n in (1000, 2000))
    assert longer / long == pytest.approx(8, rel=0.01)
    long, longer = (shape.attention_operations(0, n) for n in (1000, 2000))
    assert longer / long == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("chunk", [1, 5])
def test_with_a_cache_logits_are_those_of_the_whole_text(llama, ids, chunk):
    with torch.no_grad():
        torch.testing.assert_close(
            kc.decode_logits(llama, ids, chunk=chunk), llama(ids).logits, atol=2e-5, rtol=1e-5
        )
        wide = llama.double()
        assert (kc.decode_logits(wide, ids, chunk=chunk) - wide(ids).logits).abs().max() < 1e-10


def test_cache_numbers_are_refused(llama, ids):
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="kv_heads is 0"):
        kc.kv_bytes(1, layers=1, kv_heads=0, head_dim=2)
    with pytest.raises(ValueError, match="bytes_per_number is 0"):
        kc.kv_bytes(1, layers=1, kv_heads=1, head_dim=2, bytes_per_number=0)
    with pytest.raises(ValueError, match="encoder-decoder"):
        kc.CacheShape.of(build("T5"))
    with pytest.raises(ValueError, match="sliding_attention"):
        kc.CacheShape.of(build("Gemma3"))
    with pytest.raises(ValueError, match="chunk is 0"):
        kc.decode_logits(llama, ids, chunk=0)
    full = DynamicCache()
    llama(ids, past_key_values=full)
    with pytest.raises(ValueError, match="holds another text"):
        kc.decode_logits(llama, ids, full)


# --- streaming


def streaming_by_hand(model, text, window, sinks):
    """A Llama's forward, token by token, with positions counted among the keys that are kept."""
    config, text = model.config, text[0].tolist()
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, 8
    frequencies = model.model.rotary_emb.inv_freq.double()

    def rotate(x, position):  # (heads, dim)
        a, b = x[:, : dim // 2], x[:, dim // 2 :]
        cos, sin = (position * frequencies).cos(), (position * frequencies).sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], 1)

    kept = [[] for _ in model.model.layers]
    logits = []
    for token in text:
        h = model.model.embed_tokens.weight[token]
        for layer, past in zip(model.model.layers, kept):
            x, attention = layer.input_layernorm(h), layer.self_attn
            q = attention.q_proj(x).view(heads, dim)
            past.append((attention.k_proj(x).view(kv, dim), attention.v_proj(x).view(kv, dim)))
            if len(past) > sinks + window:
                del past[sinks]
            last = len(past) - 1
            keys = torch.stack([rotate(k, n) for n, (k, _) in enumerate(past)], 1)
            values = torch.stack([v for _, v in past], 1)
            keys, values = (y.repeat_interleave(heads // kv, 0) for y in (keys, values))
            weights = (keys @ rotate(q, last)[..., None] / dim**0.5).softmax(1)
            h = h + attention.o_proj((weights * values).sum(1).flatten())
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        logits.append(model.lm_head(model.model.norm(h)))
    return torch.stack(logits)


@pytest.mark.parametrize(("window", "sinks"), [(5, 2), (4, 0), (3, 4), (1, 1)])
def test_streaming_counts_positions_inside_the_cache(llama, ids, window, sinks):
    """Against a forward pass written out by hand, with renumbered positions: float64, 1e-6.

    The model computes its own angles in float32, which is where the rest comes from.
    """
    model, text = llama.double(), ids[:1]
    cache = sl.StreamingCache(model, window=window, sinks=sinks)
    found = kc.decode_logits(model, text, cache)[0]
    with torch.no_grad():
        expected = streaming_by_hand(model, text, window, sinks)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert cache.stored == window + sinks and cache.get_seq_length() == 24
    whole = model(text).logits[0]
    assert (found - whole).abs().max() > 1e-3


def test_a_cache_that_holds_everything_changes_nothing(llama, ids):
    cache = sl.StreamingCache(llama, window=30, sinks=2)
    with torch.no_grad():
        found = kc.decode_logits(llama, ids, cache, chunk=5)
        torch.testing.assert_close(found, llama(ids).logits, atol=2e-5, rtol=1e-5)


def test_the_cache_stays_small_and_distant_texts_do_not_matter(llama):
    """A text far beyond the trained positions reads as its sinks and its end do."""
    model = llama.double()
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(1, 128, (1, 80), generator=generator)
    other = text.clone()
    other[:, 4:45] = torch.randint(1, 128, (1, 41), generator=generator)
    logits = []
    for one in (text, other):
        cache = sl.StreamingCache(model, window=8, sinks=4)
        past = []
        for part in one.split(1, 1):
            with torch.no_grad():
                past.append(model(part, past_key_values=cache).logits)
        assert kc.stored_cache_bytes(cache) == 3 * 2 * 2 * 12 * 8 * 8
        logits.append(torch.cat(past, 1))
    # Three layers of a window of 8 pass information over at most 3 * 7 tokens.
    torch.testing.assert_close(logits[0][:, 66:], logits[1][:, 66:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_a_streaming_cache(llama, ids, beams):
    prompt, options = ids[:2, :6], dict(max_new_tokens=20, do_sample=False, num_beams=beams)
    streaming = sl.streaming_llm(llama, window=6, sinks=2)
    out = streaming.generate(prompt, **options)
    cache = sl.StreamingCache(llama, window=6, sinks=2)
    assert torch.equal(out, llama.generate(prompt, past_key_values=cache, **options))
    assert cache.stored == 8
    if beams == 1:
        text = prompt
        past = sl.StreamingCache(llama, window=6, sinks=2)
        with torch.no_grad():
            step = llama(text, past_key_values=past).logits[:, -1:]
            while text.shape[1] < out.shape[1]:
                token = step[:, -1].argmax(-1, keepdim=True)
                text = torch.cat([text, token], 1)
                step = llama(token, past_key_values=past).logits
        agree = (text == out) | (out == 0)  # after its end a text is filled up
        assert agree.all()
    assert not llama._forward_pre_hooks


def test_a_cache_can_be_used_again(llama, ids):
    cache = sl.StreamingCache(llama, window=4, sinks=1)
    first = kc.decode_logits(llama, ids, cache)
    cache.reset()
    assert torch.equal(kc.decode_logits(llama, ids, cache), first)
    cache.crop(0)
    with pytest.raises(ValueError, match="cannot be taken back"):
        cache.crop(-1)


def test_rotating_keys_is_moving_them():
    frequencies = torch.tensor([1.0, 0.1])
    keys = torch.randn(1, 2, 3, 6).double()
    there = sl.rotate_keys(keys, 1000, frequencies)
    torch.testing.assert_close(sl.rotate_keys(there, -1000, frequencies), keys)
    torch.testing.assert_close(
        sl.rotate_keys(sl.rotate_keys(keys, 7, frequencies), 5, frequencies),
        sl.rotate_keys(keys, 12, frequencies),
    )
    assert torch.equal(there[..., 4:], keys[..., 4:]), "channels without a position stay"


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_streams_rightly_or_is_refused(name):
    model = build(name)
    before = state(model)
    text = torch.arange(3, 19)[None]
    said = refusal(lambda: sl.StreamingCache(model, window=30, sinks=2))
    assert (said is None) == (name in STREAMS), said
    unchanged(model, before)
    if said is not None:
        assert said.endswith((".", ")")) and len(said) < 250
        return
    cache = sl.StreamingCache(model, window=30, sinks=2)
    with torch.no_grad():
        whole = model(input_ids=text).logits
        torch.testing.assert_close(
            kc.decode_logits(model, text, cache), whole, atol=1e-3, rtol=1e-3
        )
    small = sl.StreamingCache(model, window=4, sinks=2)
    assert kc.decode_logits(model, text, small).isfinite().all() and small.stored == 6


def test_streaming_is_refused(llama, ids, tiny_llama):
    with pytest.raises(ValueError, match="window is 0"):
        sl.streaming_llm(llama, window=0)
    with pytest.raises(ValueError, match="sinks is -1"):
        sl.streaming_llm(llama, window=4, sinks=-1)
    with pytest.raises(ValueError, match="streams already"):
        sl.streaming_llm(sl.streaming_llm(llama, window=4), window=4)
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ValueError, match="of the type dynamic"):
        sl.streaming_llm(tiny_llama(rope_parameters=dynamic), window=4)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="the batch has padding"):
        sl.streaming_llm(llama, window=4)(ids, attention_mask=mask)


# --- sliding windows


def with_table(model, ids, window, sinks, padding=None):
    """The original model under a table of all pairs."""
    time = ids.shape[1]
    table = window_pattern(time, window, causal=True)[None].repeat(len(ids), 1, 1)
    real = torch.ones_like(ids).bool() if padding is None else padding.bool()
    first = (real.cumsum(1) <= sinks) & real
    table = (table | (first[:, None] & torch.ones(time, time).bool().tril())) & real[:, None]
    table = table | torch.eye(time).bool()  # padding sees itself, lest its softmax be empty
    positions = (real.cumsum(1) - 1).clamp(min=0)
    mask = torch.zeros(table.shape).masked_fill(~table, torch.finfo(torch.float32).min)
    return model(ids, attention_mask=mask[:, None].to(model.dtype), position_ids=positions).logits


@settings(max_examples=12)
@given(window=st.integers(1, 30), sinks=st.integers(0, 5), pad=st.sampled_from(["", "l", "r"]))
def test_a_window_is_the_model_under_its_table(window, sinks, pad):
    from effnb_tiny import model, text

    mask = torch.ones_like(text)
    if pad:
        mask[1, :5] = 0
        mask = mask if pad == "l" else mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = sw.sliding_window(model, window, sinks=sinks)(
            text, attention_mask=mask, position_ids=positions
        ).logits
        expected = with_table(model, text, window, sinks, mask)
    keep = mask.bool()
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-10, rtol=1e-10)


@pytest.fixture(autouse=True)
def _tiny_module(tiny_llama, ids, monkeypatch):
    """One float64 model and text that hypothesis tests can import, since they take no fixtures."""
    import sys
    import types

    module = types.ModuleType("effnb_tiny")
    module.model, module.text = tiny_llama().double(), ids[:2, :17]
    monkeypatch.setitem(sys.modules, "effnb_tiny", module)


def test_the_model_is_not_changed_and_weights_are_shared(llama, ids):
    before = state(llama)
    found = sw.sliding_window(llama, 4)
    unchanged(llama, before)
    assert all(a is b for a, b in zip(found.parameters(), llama.parameters(), strict=True))
    with torch.no_grad():
        assert (found(ids).logits - llama(ids).logits).abs().max() > 1e-3
        whole = sw.sliding_window(llama, 100, sinks=0)
        torch.testing.assert_close(whole(ids).logits, llama(ids).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 24])
def test_a_window_with_a_cache_is_the_same(llama, ids, chunk):
    found = sw.sliding_window(llama, 6, sinks=2)
    with torch.no_grad():
        torch.testing.assert_close(
            kc.decode_logits(found, ids, chunk=chunk), found(ids).logits, atol=2e-5, rtol=1e-5
        )


@pytest.mark.parametrize("pad", [False, True])
def test_generation_with_a_window(llama, ids, pad):
    found = sw.sliding_window(llama, 6, sinks=2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0 if pad else 1
    options = dict(max_new_tokens=8, do_sample=False, attention_mask=mask)
    with_cache, without = (found.generate(ids, use_cache=c, **options) for c in (True, False))
    assert torch.equal(with_cache, without)
    if pad:
        alone = found.generate(ids[1:2, 7:], max_new_tokens=8, do_sample=False)
        assert torch.equal(with_cache[1, 7 : 7 + alone.shape[1]], alone[0])


def test_many_queries_behind_a_cache_come_in_tiles(monkeypatch):
    monkeypatch.setattr(sw, "TILE", 3)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 20, 4, generator=generator).double() for h in (4, 2, 2))
    padding = torch.arange(20).expand(2, -1) < torch.tensor([[0], [3]])
    for pad in (None, padding):
        whole = sw.sliding_window_attention(q, k, v, window=4, sinks=2, padding=pad)
        part = sw.sliding_window_attention(q[:, :, 9:], k, v, window=4, sinks=2, padding=pad)
        torch.testing.assert_close(part, whole[:, :, 9:], atol=1e-12, rtol=1e-12)


def test_gradients_reach_the_window_and_the_sinks_alone(llama, ids):
    found = sw.sliding_window(llama, 3, sinks=1)
    found.model.layers = found.model.layers[:1]
    found.config.num_hidden_layers = 1
    embedded = found.model.embed_tokens(ids[:1]).detach().requires_grad_()
    out = found(inputs_embeds=embedded).logits[0, 12]
    (gradient,) = torch.autograd.grad((out * torch.arange(128)).sum(), embedded)
    seen = (gradient[0].abs().sum(-1) > 0).nonzero().flatten().tolist()
    assert seen == [0, 10, 11, 12]


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_has_the_window_it_should_or_is_refused(name):
    model = build(name).double()
    before = state(model)
    text = torch.arange(3, 19)[None].repeat(2, 1)
    said = refusal(lambda: sw.sliding_window(model, 4, sinks=1))
    assert (said is None) == (name in WINDOWED), said
    unchanged(model, before)
    if said is not None:
        assert said.endswith((".", ")")) and len(said) < 250
        return
    found = sw.sliding_window(model, 4, sinks=1)
    with torch.no_grad():
        expected = with_table(model, text, 4, 1)
        # Norms and rotations are computed in float32 whatever the type, which later layers amplify.
        torch.testing.assert_close(found(text).logits, expected, atol=1e-5, rtol=1e-4)


def test_windows_are_refused(unchecked, llama, ids):
    with pytest.raises(ValueError, match="window is 0"):
        sw.sliding_window(llama, 0)
    with pytest.raises(TypeError, match="whole number"):
        sw.sliding_window(llama, 2.5)
    with pytest.raises(ValueError, match="has a sliding window already"):
        sw.sliding_window(sw.sliding_window(llama, 4), 4)
    with pytest.raises(ValueError, match="sees later tokens"):
        sw.sliding_window(build("BERT"), 4)
    with pytest.raises(ValueError, match="windows of its own"):
        sw.sliding_window(build("Mistral"), 4)
    found = sw.sliding_window(llama, 4)
    table = torch.zeros(4, 1, 24, 24)
    with pytest.raises(ValueError, match="mask of all pairs"):
        found(ids, attention_mask=table)
    packed = torch.arange(12).repeat(2)[None].expand(4, -1)
    with pytest.raises(ValueError, match="not just causal"):
        # With a cache transformers takes positions that begin again for one text.
        found(ids, position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match="queries are the last"):
        sw.sliding_window_attention(
            torch.zeros(1, 1, 3, 2), *(torch.zeros(1, 1, 2, 2),) * 2, window=2
        )
