"""SpAtten and Energon inside real architectures.

Nothing pruned, nothing changed; otherwise, what a model computes without those tokens.
"""

import pytest
import torch
from torch import nn

from effnb.hardware.codesign import attention_pruning as core
from effnb.hardware.codesign import energon, kept_tokens, mean_of_kept, pruning_record, spatten


@pytest.fixture(scope="module")
def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=128,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


@pytest.fixture
def padded(ids):
    """Ids and a mask in which the last sequence is shorter."""
    mask = torch.ones_like(ids)
    mask[-1, -7:] = 0
    return dict(input_ids=ids, attention_mask=mask)


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits


@torch.no_grad()
def hidden(model, **inputs):
    return model(**inputs).last_hidden_state


def test_keeping_everything_changes_nothing(tiny_llama, bert, padded):
    llama = tiny_llama(attn_implementation="eager")
    assert torch.equal(logits(spatten(llama), **padded), logits(llama, **padded))
    assert torch.equal(hidden(spatten(bert), **padded), hidden(bert, **padded))
    assert torch.equal(logits(energon(llama, alpha=-1.0), **padded), logits(llama, **padded))
    assert torch.equal(hidden(energon(bert, alpha=-1.0), **padded), hidden(bert, **padded))


def test_the_original_stays_as_it_was_and_weights_are_shared(llama, ids):
    before = logits(llama, input_ids=ids)
    implementation = llama.config._attn_implementation
    pruned = spatten(llama, token_keep=0.3)
    assert not torch.equal(logits(pruned, input_ids=ids), before)
    assert torch.equal(logits(llama, input_ids=ids), before)
    assert llama.config._attn_implementation == implementation
    ours = {p.data_ptr() for p in pruned.parameters()}
    assert ours == {p.data_ptr() for p in llama.parameters()}


@torch.no_grad()
def test_an_encoder_from_which_tokens_are_really_taken(bert, ids):
    """Layer by layer on fewer and fewer tokens, chosen here once more, gives the same vectors."""
    pruned = spatten(bert, token_keep=0.4)
    found = hidden(pruned, input_ids=ids)
    kept = kept_tokens(pruned)
    counts = [24, 20, 15, 10]  # 24 times 1, 0.8, 0.6, 0.4, rounded up
    assert [k.sum(-1).unique().tolist() for k in kept] == [[n] for n in counts]
    for row in range(len(ids)):
        x = bert.embeddings(input_ids=ids[row : row + 1])
        places = torch.arange(24)
        total = torch.zeros(24)
        for number, layer in enumerate(bert.encoder.layer):
            chosen = kept[number][row][places]
            x, places = x[:, chosen], places[chosen]
            attention = layer.attention.self(x)[1]
            x = layer(x)
            total[places] += attention[0].sum((0, 1))
            if number + 1 < 4:
                others = total[places[1:]].topk(counts[number + 1] - 1).indices + 1
                expected = {0, *places[others].tolist()}
                assert set(kept[number + 1][row].nonzero().flatten().tolist()) == expected
        torch.testing.assert_close(found[row, places], x[0], rtol=1e-4, atol=1e-5)


def test_padding_is_no_token(bert, padded):
    pruned = spatten(bert, token_keep=0.5, head_keep=0.5, value_keep=0.5)
    found = hidden(pruned, **padded)
    last = kept_tokens(pruned)[-1]
    assert last.sum(-1).tolist() == [12, 12, 12, 9]  # half of 24, and of 17
    assert not (last & ~padded["attention_mask"].bool()).any()
    alone = hidden(spatten(bert, token_keep=0.5, head_keep=0.5, value_keep=0.5),
                   input_ids=padded["input_ids"][-1:, :17])  # fmt: skip
    where = last[-1, :17]
    torch.testing.assert_close(found[-1, :17][where], alone[0][where], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("average", [False, True])
def test_decoding_with_a_cache_prunes_like_a_single_pass(llama, ids, average):
    """No token is judged by what came after it: the future changes nothing."""
    options = dict(token_keep=0.4, head_keep=0.5, value_keep=0.6, msb_bits=4, average=average)
    at_once = spatten(llama, **options)
    expected = logits(at_once, input_ids=ids)
    pruned = spatten(llama, **options)
    with torch.no_grad():
        out = pruned(input_ids=ids[:, :5], use_cache=True)
        steps = [out.logits]
        for t in range(5, ids.shape[1]):
            out = pruned(
                input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True
            )
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)
    one, other = pruning_record(at_once), pruning_record(pruned)
    assert (one.pairs_kept, one.values_kept, one.pairs) == (
        other.pairs_kept,
        other.values_kept,
        other.pairs,
    )
    assert torch.equal(kept_tokens(at_once)[-1], kept_tokens(pruned)[-1])


def test_generating_begins_anew_with_each_text(llama, ids):
    pruned = spatten(llama, token_keep=0.5)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    first = pruned.generate(ids[:1, :8], **options)
    pruned.generate(ids[1:2, :11], **options)
    assert torch.equal(pruned.generate(ids[:1, :8], **options), first)


def test_texts_side_by_side_are_refused(llama, ids):
    """Two continuations behind one context must not judge each other's keys."""
    visible = torch.ones(24, 24, dtype=torch.bool).tril()
    visible[16:, 8:16] = False
    mask = torch.zeros(4, 1, 24, 24).masked_fill(~visible, torch.finfo(torch.float32).min)
    with pytest.raises(ValueError, match="continuations side by side"):
        logits(spatten(llama, token_keep=0.5), input_ids=ids, attention_mask=mask)
    for model in (spatten(llama), energon(llama, alpha=-1.0)):
        found = logits(model, input_ids=ids, attention_mask=mask)
        exact = logits(llama, input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


def test_the_mean_is_over_the_tokens_that_are_left(bert, padded):
    pruned = spatten(bert, token_keep=0.5)
    vectors = hidden(pruned, **padded)
    kept = kept_tokens(pruned)[-1]
    by_hand = torch.stack([v[k].mean(0) for v, k in zip(vectors, kept)])
    torch.testing.assert_close(mean_of_kept(pruned, vectors), by_hand)
    with pytest.raises(ValueError, match=r"batch of \(4, 24\) tokens, and these vectors are"):
        mean_of_kept(pruned, vectors[:2])


def test_a_cache_of_another_text_is_refused(llama, ids):
    pruned = spatten(llama, token_keep=0.5)
    with torch.no_grad():
        old = pruned(input_ids=ids[:1, :8], use_cache=True).past_key_values
        pruned(input_ids=ids[:1, :5])
        with pytest.raises(ValueError, match="another text"):
            pruned(input_ids=ids[:1, 8:9], past_key_values=old)
        full = llama(input_ids=ids[:1, :8], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="filled by another model"):
            spatten(llama, token_keep=0.5)(input_ids=ids[:1, 8:9], past_key_values=full)


def test_pairs_and_heads_are_counted(llama, ids):
    pruned = spatten(llama, token_keep=0.5, head_keep=0.5)
    logits(pruned, input_ids=ids)
    record = pruning_record(pruned)
    batch, time, heads = *ids.shape, 4
    assert record.pairs == 3 * batch * heads * time * (time + 1) // 2
    assert record.all_queries == 3 * batch * heads * time
    # Shares 1, 0.75, 0.5 of keys and of 4 heads: 4, 3 and 2 heads.
    counts = [sum(-(-share * (t + 1) // 1) for t in range(time)) for share in (1, 0.75, 0.5)]
    assert record.pairs_kept == batch * sum(h * n for h, n in zip((4, 3, 2), counts))
    assert record.queries == batch * time * (4 + 3 + 2)
    assert record.head_share == 0.75
    assert record.values_kept == record.pairs_kept
    assert pruning_record(pruned).pairs == 0, "reading the record clears it"
    logits(pruned, input_ids=ids)
    assert pruning_record(pruned, clear=False) == record
    assert pruning_record(pruned) == record


def test_values_are_counted_where_they_are_read(llama, ids):
    pruned = spatten(llama, value_keep=0.5)
    logits(pruned, input_ids=ids)
    record = pruning_record(pruned)
    time = ids.shape[1]
    assert record.values_kept == 3 * len(ids) * 4 * sum(-(-(t + 1) // 2) for t in range(time))
    assert record.pair_share == 1.0
    assert record.recall == 1.0


def test_low_bits_are_counted_where_they_are_fetched(llama, ids):
    never, always = (spatten(llama, msb_bits=8, threshold=t) for t in (0.0, 2.0))
    exact = logits(llama, input_ids=ids)
    errors = [(logits(m, input_ids=ids) - exact).abs().mean() for m in (never, always)]
    assert errors[1] < errors[0]
    assert pruning_record(never).refetch_share == 0
    assert pruning_record(always).refetch_share == 1


@torch.no_grad()
def test_pruned_heads_are_heads_whose_output_is_zero(llama, ids):
    """In the last layer half of the heads are gone: as if those columns of o_proj were 0."""
    pruned = spatten(llama, head_keep=0.5)
    seen = {}
    last = pruned.model.layers[-1].self_attn.o_proj
    handle = last.register_forward_pre_hook(lambda m, given: seen.update(out=given[0]))
    logits(pruned, input_ids=ids)
    handle.remove()
    size = seen["out"].unflatten(-1, (4, 8)).abs().sum(-1)
    assert ((size == 0).sum(-1) == 2).all()


def test_energon_is_attention_with_a_mask(llama, ids):
    """The first layer by hand: filtered keys at minus infinity, nothing else."""
    pruned = energon(llama, rounds=(3,), alpha=0.2)
    caught = {}

    def catch(name, model):
        layer = model.model.layers[0].self_attn
        return layer.register_forward_hook(lambda m, a, out: caught.update({name: out[0]}))

    for name, model in (("pruned", pruned), ("full", llama)):
        handle = catch(name, model)
        logits(model, input_ids=ids)
        handle.remove()
    layer = llama.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(llama.model.embed_tokens(ids))
        attention = layer.self_attn
        shape = (*ids.shape, -1, 8)
        q, k, v = (
            p(x).view(shape).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        cos, sin = llama.model.rotary_emb(x, torch.arange(24)[None])
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        visible = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
        keep = core.filter_keys(q, k, visible.expand(4, 1, 24, 24), rounds=(3,), alpha=0.2)[-1]
        keep = keep | torch.eye(24, dtype=torch.bool)
        scores = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~keep, -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(caught["pruned"], attention.o_proj(out), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(caught["pruned"], caught["full"], atol=1e-3)


def test_energon_counts_rounds_and_recall(llama, ids):
    pruned = energon(llama, rounds=(2, 4), alpha=0.0)
    logits(pruned, input_ids=ids)
    record = pruning_record(pruned)
    first, second = record.round_shares
    assert first == 1.0 > second > record.pair_share > 0
    assert record.pair_share < record.recall < 1.0, "better than as many keys at random"
    chance = energon(llama, choose="random")
    logits(chance, input_ids=ids)
    blind = pruning_record(chance)
    assert blind.recall < record.recall


def test_a_random_choice_keeps_as_many(llama, ids):
    records = []
    for choose in ("importance", "random"):
        pruned = spatten(llama, token_keep=0.5, head_keep=0.5, choose=choose)
        logits(pruned, input_ids=ids)
        records.append(pruning_record(pruned))
    assert records[0].pairs_kept == records[1].pairs_kept
    assert records[0].recall != records[1].recall


def test_averages_forgive_young_tokens(llama, ids):
    """The sum grows with age: with it, older keys are kept than with the average."""
    ages = []
    for average in (False, True):
        pruned = spatten(llama, token_keep=0.4, average=average)
        logits(pruned, input_ids=ids)
        kept = kept_tokens(pruned)[-1]
        ages.append((kept * torch.arange(24.0)).sum() / kept.sum())
    assert ages[0] < ages[1]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: spatten(m, token_keep=0.0), "share to keep is 0.0"),
        (lambda m: spatten(m, head_keep=1.5), "share to keep is 1.5"),
        (lambda m: spatten(m, value_keep=0.0), "value_keep is 0.0"),
        (lambda m: spatten(m, token_keep=0.5, first_layer=3), "the model's last one is 2"),
        (lambda m: spatten(m, msb_bits=1), "1 high and 4 low bits"),
        (lambda m: spatten(m, choose="best"), "choose is 'best'"),
        (lambda m: spatten(m, top_k=0), "top_k is 0"),
        (lambda m: energon(m, rounds=()), "the rounds are"),
        (lambda m: energon(m, alpha=2.0), "alpha is 2.0"),
        (lambda m: spatten(energon(m)), "pruned already"),
        (lambda m: spatten(nn.Linear(2, 2)), "no attention that can be replaced"),
        (lambda m: pruning_record(m), "is not pruned"),
        (lambda m: kept_tokens(spatten(m)), "no tokens are pruned"),
        (lambda m: kept_tokens(energon(m)), "no tokens are pruned: run"),
    ],
)
def test_bad_input_gets_a_sentence(llama, call, said):
    with pytest.raises(ValueError, match=said):
        call(llama)
