"""A key-value cache of few bits: what it stores, what attention reads, what it costs."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Cache, DynamicCache, MistralConfig

from effnb.core.outliers import inject_key_outliers
from effnb.evaluation import perplexity
from effnb.inference.quantization.hadamard import hadamard_matrix
from effnb.inference.quantization.kv_cache import KiviCache, decode_losses, kivi, quantize_kv
from effnb.inference.quantization.kv_layer import KiviLayer, PackedRows
from effnb.inference.quantization.rtn import rtn

SMALL = dict(group_size=8, residual=16)


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


def states(batch=2, heads=2, time=64, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, heads, time, size, generator=generator) for _ in range(2))


def on_grid(x, bits):
    """The equation, for groups on the last axis, with scale and minimum in half precision."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    m, s = low.half().float(), ((high - low) / (2**bits - 1)).half().float()
    s[s == 0] = 1
    return ((x - m) / s).round().clamp(0, 2**bits - 1) * s + m


@pytest.fixture
def long_llama(tiny_llama):
    """Contexts of 256 tokens."""
    return tiny_llama(max_position_embeddings=256)


@pytest.fixture
def text():
    return torch.randint(1, 128, (2, 96), generator=torch.Generator().manual_seed(0))


# Storage


@settings(max_examples=15)
@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 4),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([8, 16]),
    seed=st.integers(0, 99),
)
def test_rows_are_packed_as_the_equation_says(rows, groups, bits, group_size, seed):
    x = torch.randn(2, 1, rows, groups * group_size, generator=torch.Generator().manual_seed(seed))
    packed = PackedRows.of(x, bits, group_size)
    expected = on_grid(x.unflatten(-1, (groups, group_size)), bits).flatten(-2)
    torch.testing.assert_close(packed.read(torch.float32), expected, rtol=1e-6, atol=1e-6)
    assert packed.bytes == 2 * rows * groups * (bits * group_size // 8 + 2 + 2)
    again = PackedRows.of(packed.read(torch.float32), bits, group_size)
    torch.testing.assert_close(
        again.read(torch.float32), packed.read(torch.float32), atol=0.02, rtol=0
    )


def test_constant_groups_have_no_step():
    x = torch.full((1, 1, 1, 16), 0.5)
    x[..., 8:] = torch.arange(8) / 8
    packed = PackedRows.of(x, 2, 8)
    assert packed.scales[..., 0] == 1, "0 / 0 has no code"
    read = packed.read(torch.float32)
    assert torch.equal(read[..., :8], x[..., :8])
    assert read[..., 8:].unique().numel() == 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 7e4])
def test_numbers_that_half_precision_cannot_hold(bad):
    keys, values = states(time=32)
    values[0, 0, 3, 3] = bad
    with pytest.raises(ValueError, match="NaN or beyond half precision"):
        quantize_kv(keys, values, **SMALL)


# What attention reads


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_keys_by_channel_and_values_by_token(bits):
    keys, values = states(time=44)
    k, v = quantize_kv(keys, values, bits, **SMALL)
    # The last token meets 43 earlier ones: 32 keys in groups of 8 tokens, 27 values.
    by_channel = on_grid(keys[:, :, :32].mT.unflatten(-1, (-1, 8)), bits).flatten(-2).mT
    torch.testing.assert_close(k[:, :, :32], by_channel)
    assert torch.equal(k[:, :, 32:], keys[:, :, 32:])
    by_token = on_grid(values[:, :, :27].unflatten(-1, (-1, 8)), bits).flatten(-2)
    torch.testing.assert_close(v[:, :, :27], by_token)
    assert torch.equal(v[:, :, 27:], values[:, :, 27:])


def test_keys_by_token_and_rotated():
    keys, values = states(time=44)
    k, _ = quantize_kv(keys, values, 2, **SMALL, key_axis="token")
    by_token = on_grid(keys[:, :, :27].unflatten(-1, (-1, 8)), 2).flatten(-2)
    torch.testing.assert_close(k[:, :, :27], by_token)
    k, v = quantize_kv(keys, values, 2, **SMALL, rotate_keys=True)
    H = hadamard_matrix(16).float() / 4
    turned = on_grid((keys @ H)[:, :, :32].mT.unflatten(-1, (-1, 8)), 2).flatten(-2).mT @ H.T
    torch.testing.assert_close(k[:, :, :32], turned, rtol=1e-4, atol=1e-4)
    assert torch.equal(v, quantize_kv(keys, values, 2, **SMALL)[1])


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    key_axis=st.sampled_from(["channel", "token"]),
    bits=st.sampled_from([2, 4]),
)
def test_steps_of_any_size(sizes, key_axis, bits):
    """Each step reads its own tokens exactly, all in order, near the truth; nothing is lost."""
    keys, values = states(batch=1, heads=1, time=sum(sizes))
    layer = KiviLayer(bits, 8, 16, key_axis)
    done = 0
    for size in sizes:
        new = slice(done, done + size)
        k, v = layer.update(keys[:, :, new], values[:, :, new])
        done += size
        assert layer.get_seq_length() == done == k.shape[2] == v.shape[2]
        assert torch.equal(k[:, :, new], keys[:, :, new])
        assert torch.equal(v[:, :, new], values[:, :, new])
        step = 6.0 / (2**bits - 1)
        assert (k - keys[:, :, :done]).abs().max() <= step
        assert (v - values[:, :, :done]).abs().max() <= step
    if key_axis == "channel":
        assert layer.keys.shape[2] < 16 and (done - layer.keys.shape[2]) % 8 == 0
    assert layer.values.shape[2] == min(done, 16)


@pytest.mark.parametrize("time", [1, 15, 16])
def test_within_the_residual_nothing_changes(time):
    keys, values = states(time=time)
    k, v = quantize_kv(keys, values, 2, **SMALL)
    assert torch.equal(k, keys) and torch.equal(v, values)


def logit_error(axis, factor, rescaled=False):
    """Of attention logits at 2 bits, with one key channel larger than the others."""
    errors = []
    for seed in range(10):
        keys, values = states(batch=1, heads=1, time=288, size=64, seed=seed)
        queries, _ = states(batch=1, heads=1, time=64, size=64, seed=100 + seed)
        keys[..., 5] *= factor
        queries[..., 5] /= factor if rescaled else 1
        k, _ = quantize_kv(keys, values, 2, residual=32, key_axis=axis)
        k, keys = k[:, :, :256], keys[:, :, :256]  # those that are packed either way
        errors.append(relative(queries @ k.mT, queries @ keys.mT))
    return sum(errors) / 10


def test_a_large_key_channel_wants_its_own_grid():
    """The spec's toy, channel times 20, within 15%: 0.367 by channel, 0.412 by token."""
    assert logit_error("channel", 20) == pytest.approx(0.367, rel=0.15)
    assert logit_error("token", 20) == pytest.approx(0.412, rel=0.15)
    assert logit_error("token", 20) > 1.05 * logit_error("channel", 20)


def test_by_channel_the_size_of_a_channel_does_not_matter():
    """Queries divided by what keys are multiplied by: the function is that of equal channels."""
    plain = logit_error("channel", 1)
    assert logit_error("channel", 64, rescaled=True) == pytest.approx(plain, rel=0.02)
    assert logit_error("token", 1) == pytest.approx(plain, rel=0.1)
    assert logit_error("token", 64, rescaled=True) > 2 * plain


# Bytes


def test_three_bits_per_element():
    cache = KiviCache(bits=2, group_size=32, residual=128)
    keys, values = states(heads=3, time=512, size=64)
    cache.update(keys, values, 0)
    cache.update(keys, values, 1)
    packed = 2 * 2 * 3 * 64 * (512 + 384)  # layers, batch, heads, channels, tokens of both
    assert cache.bytes - cache.residual_bytes == packed * 3 / 8
    assert cache.residual_bytes == 4 * 2 * 2 * 3 * 64 * 128
    assert cache.fp16_bytes == 2 * 2 * 2 * 3 * 64 * 2 * 512
    held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    held += [
        getattr(rows, name)
        for layer in cache.layers
        for rows in (layer.packed_keys, layer.packed_values)
        for name in ("codes", "scales", "minima")
    ]
    assert cache.bytes == sum(t.untyped_storage().nbytes() for t in held), "nothing hidden is held"


def test_an_empty_cache(long_llama):
    cache = KiviCache(long_llama.config, **SMALL)
    assert (cache.bytes, cache.fp16_bytes, cache.residual_bytes, cache.get_seq_length()) == (0,) * 4
    assert KiviCache().bytes == 0


# In a model


def test_it_is_a_cache_of_transformers(long_llama):
    cache = KiviCache(long_llama.config, **SMALL)
    assert isinstance(cache, Cache) and isinstance(cache, KiviCache)
    assert len(cache) == 3 and cache.get_max_length() == -1
    assert not cache.is_compileable and not any(cache.is_sliding)
    cache.update(*states(time=20, size=8), 0)
    assert cache.get_mask_sizes(5, 0) == cache.layers[0].get_mask_sizes(torch.arange(5)) == (25, 0)
    copied = copy.deepcopy(cache)
    assert isinstance(copied, KiviCache) and len(copied) == 3


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_a_residual_as_long_as_the_text_changes_nothing(long_llama, text, axis):
    with torch.no_grad():
        plain = long_llama(text, past_key_values=DynamicCache()).logits
        wide = kivi(long_llama, 2, group_size=8, residual=96, key_axis=axis)
        assert torch.equal(wide(text, use_cache=False).logits, plain)
        text = text[:1, :40]
        for chunk in (1, 7):
            exact, ours = (
                decode_losses(long_llama, text, cache, chunk=chunk)
                for cache in (
                    DynamicCache(),
                    KiviCache(long_llama.config, bits=2, group_size=8, residual=96, key_axis=axis),
                )
            )
            assert torch.equal(exact, ours)


def test_a_single_pass_shows_an_error_only_if_asked_to(long_llama, text):
    with torch.no_grad():
        plain = long_llama(text).logits
        cache = KiviCache(long_llama.config, bits=2, **SMALL)
        assert torch.equal(long_llama(text, past_key_values=cache).logits, plain)
        errors = [relative(kivi(long_llama, b, **SMALL)(text).logits, plain) for b in (2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1 > 0.05 > errors[2] > 0


def test_losses_of_decoding(long_llama, text):
    """In small chunks it is what generation meets: exact within the residual, then less so."""
    short = text[:1, :40]
    logits = long_llama(short).logits[:, :-1].detach()
    truth = torch.nn.functional.cross_entropy(logits.mT, short[:, 1:], reduction="none")
    plain = decode_losses(long_llama, short, DynamicCache(), chunk=5)
    torch.testing.assert_close(plain, truth, rtol=1e-4, atol=1e-4)
    errors = []
    for bits in (2, 4, 8):
        found = decode_losses(long_llama, short, KiviCache(bits=bits, **SMALL), chunk=1)
        torch.testing.assert_close(found[:, :16], truth[:, :16], rtol=1e-4, atol=1e-4)
        errors.append(float((found - truth)[:, 16:].abs().mean()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 > 0.02 > errors[2]


def test_key_outliers_leave_no_trace_by_channel(long_llama, text):
    """A channel's own grid scales with it (and its rotary partner); a token's grid coarsens."""
    injected = inject_key_outliers(long_llama, [1], 16.0)
    with torch.no_grad():
        truth = long_llama(text).logits
        channel, token = (
            [
                relative(kivi(m, 4, **SMALL, key_axis=axis)(text).logits, truth)
                for m in (long_llama, injected)
            ]
            for axis in ("channel", "token")
        )
    assert channel[1] == pytest.approx(channel[0], rel=0.02)
    assert token[1] > 2 * token[0]


def test_generation(long_llama, text):
    prompt = text[:, :20]
    options = dict(max_new_tokens=18, do_sample=False)
    plain = long_llama.generate(prompt, **options)
    wide = KiviCache(long_llama.config, group_size=8, residual=64)
    assert torch.equal(long_llama.generate(prompt, past_key_values=wide, **options), plain)
    cache = KiviCache(long_llama.config, bits=8, **SMALL)
    ours = long_llama.generate(prompt, past_key_values=cache, **options)
    assert cache.get_seq_length() == 37 and cache.bytes < 0.75 * cache.fp16_bytes * 2
    wrapped = kivi(long_llama, 8, **SMALL, quantized_prompt=False)
    assert torch.equal(wrapped.generate(prompt, **options), ours)
    cache.reset()
    assert torch.equal(long_llama.generate(prompt, past_key_values=cache, **options), ours)


def test_beams(long_llama, text):
    prompt = text[:, :20]
    options = dict(max_new_tokens=12, do_sample=False, num_beams=3)
    plain = long_llama.generate(prompt, **options)
    wide = KiviCache(long_llama.config, group_size=8, residual=64)
    assert torch.equal(long_llama.generate(prompt, past_key_values=wide, **options), plain)
    narrow = KiviCache(long_llama.config, bits=8, group_size=8, residual=8)
    assert long_llama.generate(prompt, past_key_values=narrow, **options).shape == plain.shape


def test_sequences_move_together():
    """Reordering, repeating and selecting act on packed and exact tokens alike."""
    keys, values = states(batch=3, heads=1, time=40, size=8)
    layer = KiviLayer(4, **SMALL)
    layer.update(keys, values)
    k, v = layer.read()
    order = torch.tensor([2, 0, 0])
    for act, expected in (
        (lambda x: x.reorder_cache(order), order),
        (lambda x: x.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
        (lambda x: x.batch_select_indices(torch.tensor([1])), torch.tensor([1])),
    ):
        other = copy.deepcopy(layer)
        act(other)
        assert torch.equal(other.read()[0], k[expected]) and torch.equal(
            other.read()[1], v[expected]
        )
    KiviLayer().reorder_cache(order)  # an empty layer has nothing to move


def test_taking_back_the_latest_tokens():
    keys, values = states(time=20)
    layer = KiviLayer(2, **SMALL)
    layer.update(keys, values)
    layer.crop(-3)
    k, v = layer.read()
    assert k.shape[2] == v.shape[2] == layer.get_seq_length() == 17
    assert torch.equal(k[:, :, 16:], keys[:, :, 16:17])
    layer.crop(0)
    for tokens in (-5, 3):
        with pytest.raises(ValueError, match="only the latest 1 tokens can be taken back"):
            layer.crop(tokens)


def test_quality_is_measured_as_ever(long_llama, text):
    ids = text.flatten()
    plain = perplexity(long_llama, ids, context=96)
    assert perplexity(kivi(long_llama, 2, group_size=8, residual=96), ids, context=96) == plain
    assert perplexity(kivi(long_llama, 2, **SMALL), ids, context=96) != plain


def test_the_given_model_keeps_its_cache(long_llama, text):
    new = kivi(long_llama, 2, **SMALL)
    assert new.model.layers[0].mlp.up_proj.weight is long_llama.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        assert type(new(text).past_key_values).__name__ == "KiviCache"
        assert type(long_llama(text).past_key_values) is DynamicCache
        weights_too = rtn(new, 8)
        assert type(weights_too(text).past_key_values).__name__ == "KiviCache"
        assert relative(weights_too(text).logits, new(text).logits) > 0


def test_half_precision(long_llama, text):
    half = long_llama.bfloat16()
    new = kivi(half, 4, **SMALL)
    with torch.no_grad():
        out = new(text)
        assert out.logits.dtype == torch.bfloat16
        assert out.past_key_values.layers[0].keys.dtype == torch.bfloat16
        assert relative(out.logits.float(), half(text).logits.float()) < 0.5


def test_bad_input_is_one_sentence(long_llama, text):
    for make in (KiviCache, lambda **keywords: kivi(long_llama, **keywords)):
        with pytest.raises(ValueError, match="bits is 1; the uniform formats have 2 to 8"):
            make(bits=1)
        for group_size in (0, 12, -8):
            with pytest.raises(ValueError, match="must be a multiple of 8, from 8"):
                make(group_size=group_size)
        for residual in (0, 40):
            with pytest.raises(ValueError, match=f"residual is {residual}; it must be a multiple"):
                make(group_size=16, residual=residual)
        with pytest.raises(ValueError, match="key_axis is 'head'; it must be"):
            make(key_axis="head")
    with pytest.raises(ValueError, match="heads of 8 channels do not consist of groups of 16"):
        KiviCache(long_llama.config, group_size=16)
    with pytest.raises(ValueError, match="heads of 8 channels"):
        long_llama(text, past_key_values=KiviCache(group_size=16))
    with pytest.raises(ValueError, match="heads of 8 channels"):
        kivi(long_llama)
    windows = MistralConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=2)
    windows.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="layers all attend to everything"):
        KiviCache(windows, **SMALL)
    with pytest.raises(ValueError, match="cache is quantized already"):
        kivi(kivi(long_llama, **SMALL), **SMALL)
    with pytest.raises(ValueError, match="chunk is 0"):
        decode_losses(long_llama, text, KiviCache(**SMALL), chunk=0)
    with pytest.raises(ValueError, match="the text has 1 tokens"):
        decode_losses(long_llama, text[:, :1], KiviCache(**SMALL))
    full = KiviCache(**SMALL)
    decode_losses(long_llama, text, full)
    with pytest.raises(ValueError, match="holds another text"):
        decode_losses(long_llama, text, full)
    with pytest.raises(ValueError, match="residual is 8"):
        quantize_kv(*states(), residual=8)
    keys, values = states(size=12)
    with pytest.raises(ValueError, match="heads of 12 channels"):
        quantize_kv(keys, values, **SMALL)
