"""Dynamic NTK: one definition for passes and caches, against the formula written out."""

import math
import sys

import pytest
import torch
import transformers as hf
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from effnb.design.context import dynamic_ntk, dynamic_ntk_frequencies, rope_frequencies
from effnb.design.context import dynamic_ntk as method
from effnb.design.context.dynamic_ntk import BLOCK, distances, dynamic_scores, plain_scores
from effnb.kernels.rope import rope

LENGTH = 16
MODULE = sys.modules["effnb.design.context.dynamic_ntk"]  # the package's name is the function's


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **options).logits


@settings(max_examples=20)
@given(st.integers(2, 8), st.integers(1, 3), st.integers(1, 3), st.integers(1, 24))
def test_scores_are_those_of_one_table_for_each_query(half, groups, shared, count):
    """Query by query: turn it and all keys with the table of its length, and multiply."""
    generator = torch.Generator().manual_seed(count)
    q, k = (
        torch.randn(2, heads, count, 2 * half, generator=generator, dtype=torch.float64)
        for heads in (groups * shared, groups)
    )
    inv_freq = rope_frequencies(2 * half, dtype=torch.float64)
    positions = torch.arange(count)[None] + torch.tensor([[0], [3]])
    visible = torch.ones(2, count, count, dtype=torch.bool).tril()
    found = dynamic_scores(q, k, distances(visible, positions), positions, inv_freq, LENGTH)
    for row in range(2):
        for m in range(count):
            place = int(positions[row, m])
            table = dynamic_ntk_frequencies(inv_freq, place + 1, LENGTH)
            at = positions[row : row + 1]
            turned_q, turned_k = rope(q[row : row + 1], k[row : row + 1], table, at)
            want = turned_q[0, :, m, None] @ turned_k[0].repeat_interleave(shared, 0).mT
            torch.testing.assert_close(found[row, :, m], want[:, 0], rtol=0, atol=1e-11)


def test_blocks_and_the_shared_table_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 4, 30, 8, generator=generator, dtype=torch.float64)
    inv_freq, positions = rope_frequencies(8, dtype=torch.float64), torch.arange(30)[None]
    distance = positions[:, :, None] - positions[:, None].expand(2, -1, -1)
    want = dynamic_scores(q, k, distance, positions, inv_freq, LENGTH)
    monkeypatch.setattr(MODULE, "BLOCK", 2 * 4 * 30 * 8 * 3)  # three queries at a time
    assert BLOCK > 2 * 4 * 30 * 8 * 30
    assert torch.equal(dynamic_scores(q, k, distance, positions, inv_freq, LENGTH), want)
    first = plain_scores(q[:, :, :LENGTH], k, positions, inv_freq)
    torch.testing.assert_close(first, want[:, :, :LENGTH], rtol=0, atol=1e-12)


def test_distances_without_positions_count_what_is_seen():
    """The same as from positions: with padding on either side, with windows, with empty places."""
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    left, right = causal.clone(), causal.clone()
    left[:, :2] = False  # two places of padding before the text
    right[:, 2:4] = False  # two after a first part of it
    window = causal & ~causal.tril(-3)
    empty = torch.cat([causal, torch.zeros(6, 2, dtype=torch.bool)], 1)  # a static cache
    for mask, positions in (
        (causal, [0, 1, 2, 3, 4, 5]),
        (left, [0, 0, 0, 1, 2, 3]),
        (right, [0, 1, 0, 0, 2, 3]),
        (window, [0, 1, 2, 3, 4, 5]),
        (empty, [0, 1, 2, 3, 4, 5, 9, 9]),
    ):
        at = torch.tensor(positions)
        new = slice(4, 6)
        found = distances(mask[None, new], at[None, new])[0]
        want = (at[new, None] - at[None]).expand(2, -1)
        seen = mask[new]
        assert torch.equal(found[seen], want[seen])


def test_the_last_token_of_a_pass_is_the_paper_s(llama):
    """Its table is that of the whole text: with one layer, recomputing for every pass agrees."""
    options = zoo._DECODER | dict(num_hidden_layers=1)
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**options)).eval().double()
    found = dynamic_ntk(model, trained_length=LENGTH)
    for count in (5, LENGTH, LENGTH + 1, 50):
        ids = zoo.words(2, count)
        base = 10_000 * max(1, count / LENGTH) ** (8 / 6)
        model.model.rotary_emb.inv_freq = rope_frequencies(8, base)
        last = logits(model, ids)[:, -1]
        torch.testing.assert_close(logits(found, ids)[:, -1], last, rtol=0, atol=1e-5)


def test_earlier_tokens_know_nothing_of_the_length():
    found, ids = dynamic_ntk(zoo.make("llama"), trained_length=LENGTH), zoo.words(2, 50)
    whole = logits(found, ids)
    for count in (7, LENGTH, 17, 33):
        part = logits(found, ids[:, :count])
        torch.testing.assert_close(part, whole[:, :count], rtol=0, atol=1e-12)
    short = logits(zoo.make("llama"), ids[:, :LENGTH])
    torch.testing.assert_close(whole[:, :LENGTH], short, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2 window", "gemma2"])
def test_every_kind_of_cache(name):
    model = zoo.make(name)
    found, ids = dynamic_ntk(model, trained_length=LENGTH), zoo.words(2, 40)
    want = logits(found, ids)
    for cache in (
        DynamicCache(),
        DynamicCache(config=found.config),
        StaticCache(config=found.config, max_cache_len=48),
    ):
        parts, at = [], 0
        for step in (9, 1, 13, 1, 1, 15):
            new = ids[:, at : at + step]
            with torch.no_grad():
                parts.append(found(input_ids=new, past_key_values=cache, use_cache=True).logits)
            at += step
        torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=1e-12)


def test_a_cache_is_cropped_and_its_rows_exchanged():
    found, ids = dynamic_ntk(zoo.make("llama"), trained_length=LENGTH), zoo.words(2, 40)
    want, cache = logits(found, ids), DynamicCache()
    with torch.no_grad():
        found(input_ids=ids[:, :30], past_key_values=cache, use_cache=True)
        cache.crop(-5)
        cache.reorder_cache(torch.tensor([1, 0]))
        out = found(input_ids=ids[[1, 0], 25:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(out, want[[1, 0], 25:], rtol=0, atol=1e-12)


def test_beams_are_the_same_with_and_without_a_cache():
    found = dynamic_ntk(zoo.make("llama"), trained_length=LENGTH)
    found.generation_config.eos_token_id = None
    ids = zoo.words(2, 14)
    options = dict(
        attention_mask=torch.ones_like(ids), max_new_tokens=8, num_beams=3, do_sample=False,
        pad_token_id=2,
    )  # fmt: skip
    with_cache = found.generate(ids, use_cache=True, **options)
    assert torch.equal(with_cache, found.generate(ids, use_cache=False, **options))


def test_texts_side_by_side_behind_one_head():
    """Positions and masks as a ranked choice lays them: each text as if it were alone."""
    found = dynamic_ntk(zoo.make("llama"), trained_length=LENGTH)
    head, one, two = zoo.words(1, 20, 1), zoo.words(1, 5, 2), zoo.words(1, 7, 3)
    ids = torch.cat([head, one, two], 1)
    positions = torch.cat([torch.arange(20), 20 + torch.arange(5), 20 + torch.arange(7)])[None]
    visible = torch.ones(32, 32, dtype=torch.bool).tril()
    visible[25:, 20:25] = False
    for mask in (
        visible[None, None],
        torch.zeros(1, 1, 32, 32).double().masked_fill(~visible, torch.finfo(torch.float64).min),
    ):
        together = logits(found, ids, position_ids=positions, attention_mask=mask)
        alone = [logits(found, torch.cat([head, part], 1))[:, 20:] for part in (one, two)]
        torch.testing.assert_close(together[:, 20:], torch.cat(alone, 1), rtol=0, atol=1e-12)


def test_dropout_and_the_eager_implementation():
    model = zoo.make("llama")
    model.config._attn_implementation = "eager"
    found, ids = dynamic_ntk(model, trained_length=LENGTH), zoo.words(1, 30)
    want = logits(dynamic_ntk(zoo.make("llama"), trained_length=LENGTH), ids)
    assert torch.equal(logits(found, ids), want)
    for layer in found.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert torch.equal(logits(found, ids), want)
    torch.manual_seed(0)
    assert not torch.allclose(logits(found.train(), ids), want)


def test_scores_turn_by_the_distance():
    inv_freq = rope_frequencies(4, dtype=torch.float64)
    q = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)[None, None, None]
    k = q.expand(1, 1, 9, 4)
    positions = torch.tensor([[8]])
    found = dynamic_scores(q, k, 8 - torch.arange(9)[None, None], positions, inv_freq, 4)
    want = [math.cos(8 - n) for n in range(9)]  # the fastest point never changes
    torch.testing.assert_close(found[0, 0, 0], torch.tensor(want).double(), rtol=0, atol=1e-7)


def test_other_attention_is_refused():
    model = zoo.make("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention'"):
        method(model)
    options = zoo._DECODER | dict(head_dim=2)
    with pytest.raises(ValueError, match="2 rotated numbers"):
        method(hf.LlamaForCausalLM(hf.LlamaConfig(**options)))


def test_attention_that_is_more_than_scores_is_refused():
    attend = MODULE.attend
    x = torch.ones(1, 1, 2, 4)
    module = zoo.make("llama").model.layers[0].self_attn
    with pytest.raises(ValueError, match="uses s_aux"):
        attend(module, x, x, x, None, scaling=1.0, position_ids=torch.arange(2)[None], s_aux=x)
    with pytest.raises(ValueError, match="gives no position_ids"):
        attend(module, x, x, x, None, scaling=1.0)
