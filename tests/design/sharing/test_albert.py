"""Shared layers: transformers' ALBERT, sums of gradients, caches, bad input."""

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from zoo import ZOO, make, texts

from effnb.core.modules import clone, linears
from effnb.design.sharing import (
    albert_parameters,
    layer_groups,
    sentence_order,
    share_layers,
    shared_places,
    unshare_layers,
)

ENCODER = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=64,
    hidden_act="gelu",
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def count(model):
    return sum(p.numel() for p in model.parameters())


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


# ---------------------------------------------------------------------------------- counting


@pytest.mark.parametrize(
    ("hidden", "feed_forward", "layers", "expected"),
    [
        (768, 3072, 12, 11_683_584),  # base
        (1024, 4096, 24, 17_683_968),  # large
        (4096, 16384, 12, 222_595_584),  # xxlarge
    ],
)
def test_counts_are_those_of_transformers_albert(hidden, feed_forward, layers, expected):
    config = hf.AlbertConfig(
        vocab_size=30000,
        embedding_size=128,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
    )
    with torch.device("meta"):
        model = hf.AlbertModel(config)
    assert count(model) == expected == albert_parameters(30000, 128, hidden, feed_forward, layers)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups_are_counted_as_transformers_counts_them(groups):
    config = hf.AlbertConfig(
        vocab_size=50, embedding_size=8, hidden_size=16, intermediate_size=24,
        num_hidden_layers=6, num_hidden_groups=groups, num_attention_heads=2,
        max_position_embeddings=20,
    )  # fmt: skip
    model = hf.AlbertModel(config)
    assert count(model) == albert_parameters(50, 8, 16, 24, 6, groups=groups, positions=20)
    group = [int(i / (6 / groups)) for i in range(6)]  # transformers' own rule
    assert layer_groups(6, groups) == group


def test_sharing_changes_the_count_and_not_the_multiplications(llama, ids):
    from torch.utils.flop_counter import FlopCounterMode

    def flops(model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids)
        return counter.get_total_flops()

    shared = share_layers(llama)
    block = count(llama.model.layers[0])
    assert count(llama) - count(shared) == 2 * block
    assert flops(shared) == flops(llama) > 0


# ------------------------------------------------------------------------------- the function


@pytest.mark.parametrize("groups", [1, 2])
def test_a_bert_whose_layers_share_is_transformers_albert(groups):
    """The same weights in both: E = d, and the mapping of the embedding the identity."""
    torch.manual_seed(0)
    bert = hf.BertModel(hf.BertConfig(**ENCODER)).double().eval()
    albert = hf.AlbertModel(
        hf.AlbertConfig(**ENCODER, embedding_size=32, num_hidden_groups=groups)
    ).double().eval()  # fmt: skip
    shared = share_layers(bert, groups=groups)
    target = albert.encoder
    with torch.no_grad():
        target.embedding_hidden_mapping_in.weight.copy_(torch.eye(32))
        target.embedding_hidden_mapping_in.bias.zero_()
        albert.embeddings.load_state_dict(bert.embeddings.state_dict())
        albert.pooler.load_state_dict(bert.pooler.dense.state_dict())
        for group in range(groups):
            ours = shared.encoder.layer[group * (4 // groups)]
            theirs = target.albert_layer_groups[group].albert_layers[0]
            for name in ("query", "key", "value"):
                source = getattr(ours.attention.self, name).state_dict()
                getattr(theirs.attention, name).load_state_dict(source)
            pairs = [
                (theirs.attention.dense, ours.attention.output.dense),
                (theirs.attention.LayerNorm, ours.attention.output.LayerNorm),
                (theirs.ffn, ours.intermediate.dense),
                (theirs.ffn_output, ours.output.dense),
                (theirs.full_layer_layer_norm, ours.output.LayerNorm),
            ]
            for into, source in pairs:
                into.load_state_dict(source.state_dict())
    batch = texts("bert", "right")[0]
    found = shared(**batch).last_hidden_state
    expected = albert(**batch).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    # The tables are E wide in ALBERT; without its mapping of d^2 + d numbers the counts agree.
    assert count(albert) - count(shared) == 32 * 32 + 32


def test_shared_gradients_are_the_sum_over_the_places(llama, ids):
    shared = clone(share_layers(llama.double(), "all"))
    untied = clone(unshare_layers(shared))
    for model in (shared, untied):
        model(input_ids=ids, labels=ids).loss.backward()
    for name, module in linears(shared).items():
        tail = name.removeprefix("model.layers.0.")
        parts = [untied.get_submodule(f"model.layers.{i}.{tail}").weight.grad for i in range(3)]
        assert all(part.abs().max() > 0 for part in parts)
        torch.testing.assert_close(module.weight.grad, sum(parts), atol=1e-10, rtol=1e-8)


def test_one_layer_that_shares_is_its_block_applied_again(tiny_llama, ids):
    one, three = tiny_llama(num_hidden_layers=1), tiny_llama()
    shared = share_layers(three)
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            shared.get_parameter(name).copy_(parameter)
        layer, seen = one.model.layers[0], []
        hook = layer.register_forward_hook(lambda m, args, kwargs, out: seen.append(
            (kwargs, out)), with_kwargs=True)  # fmt: skip
        one(ids, use_cache=False)
        hook.remove()
        keywords, x = seen[0]
        for _ in range(2):
            x = layer(x, **keywords)
        expected = one.lm_head(one.model.norm(x))
        torch.testing.assert_close(shared(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("what", ["all", "attention", "feed_forward"])
@pytest.mark.parametrize("name", sorted(set(ZOO) - {"albert"}))
def test_every_architecture_shares(name, what):
    model, batch = make(name), texts(name)[0]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    shared = share_layers(model, what)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert count(shared) < count(model)
    untied = unshare_layers(shared)
    assert count(untied) == count(model) and not _in_blocks(untied)
    with torch.no_grad():
        kept = shared(**batch)[0]
        torch.testing.assert_close(untied(**batch)[0], kept, atol=1e-10, rtol=0)
        assert (kept - model(**batch)[0]).abs().max() > 1e-6


def _in_blocks(model):
    embeddings = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding)
                  for p in m.parameters()}  # fmt: skip
    return [
        name
        for name in shared_places(model)
        if not {id(p) for p in model.get_submodule(name).parameters()} <= embeddings
    ]


def token_by_token(model, ids):
    """Logits of a text that is read one token at a time, through a cache."""
    parts, cache = [], None
    with torch.no_grad():
        for at in range(ids.shape[1]):
            out = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("what", ["all", "attention", "feed_forward"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_a_cache_gives_what_one_pass_gives(name, what):
    """Each layer keeps its own number, under which it caches keys and values."""
    model = share_layers(make(name), what)
    ids = texts(name)[0]["input_ids"]
    found, untied = token_by_token(model, ids), token_by_token(unshare_layers(model), ids)
    torch.testing.assert_close(found, untied, atol=1e-10, rtol=0)
    whole = logits(model, dict(input_ids=ids, use_cache=False))
    # Gemma 2 rounds its attention to float32 in a model of float64 as well.
    atol = 1e-6 if name == "gemma2" else 1e-9
    torch.testing.assert_close(found, whole, atol=atol, rtol=0)


def test_parts_share_what_their_names_say(llama):
    attention, feed_forward = share_layers(llama, "attention"), share_layers(llama, "feed_forward")
    first, last = (attention.model.layers[i] for i in (0, 2))
    assert first.self_attn.q_proj is last.self_attn.q_proj
    assert first.self_attn is not last.self_attn
    assert first.mlp.up_proj is not last.mlp.up_proj
    assert first.input_layernorm is not last.input_layernorm
    first, last = (feed_forward.model.layers[i] for i in (0, 2))
    assert first.mlp.up_proj is last.mlp.up_proj
    assert first.self_attn.q_proj is not last.self_attn.q_proj
    assert not shared_places(share_layers(llama, "none"))
    assert not shared_places(share_layers(llama, groups=3))


def test_means_are_means(llama):
    shared = share_layers(llama, initial="mean")
    layers = llama.model.layers
    expected = sum(layer.mlp.up_proj.weight.double() for layer in layers) / 3
    torch.testing.assert_close(shared.model.layers[1].mlp.up_proj.weight.double(), expected,
                               atol=1e-7, rtol=0)  # fmt: skip
    assert shared.model.layers[0].mlp.up_proj is shared.model.layers[2].mlp.up_proj


# -------------------------------------------------------------------------- properties, refusals


@given(layers=st.integers(1, 48), groups=st.integers(1, 48))
def test_groups_are_consecutive_and_of_one_size(layers, groups):
    if layers % groups:
        with pytest.raises(ValueError, match=f"does not divide the {layers} layers"):
            layer_groups(layers, groups)
        return
    found = layer_groups(layers, groups)
    assert found == sorted(found) and set(found) == set(range(groups))
    assert {found.count(g) for g in range(groups)} == {layers // groups}


def test_what_cannot_be_shared(llama):
    with pytest.raises(ValueError, match="groups is 2, which does not divide the 3 layers"):
        share_layers(llama, groups=2)
    with pytest.raises(ValueError, match="groups is 0"):
        share_layers(llama, groups=0)
    with pytest.raises(ValueError, match="what is 'ffn'; it must be one of all"):
        share_layers(llama, "ffn")
    with pytest.raises(ValueError, match="initial is 'last'"):
        share_layers(llama, initial="last")
    llama.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 40, bias=False)
    with pytest.raises(ValueError, match="mlp.up_proj of model.layers.0 and of model.layers.1"):
        share_layers(llama)
    share_layers(llama, "attention")
    with pytest.raises(ValueError, match="groups is 4"):
        albert_parameters(100, 8, 16, 32, 6, groups=4)
    with pytest.raises(ValueError, match="embedding is 0"):
        albert_parameters(100, 0, 16, 32, 6)


# ----------------------------------------------------------------------------- sentence order


@given(time=st.integers(2, 9), seed=st.integers(0, 99), separator=st.sampled_from([None, 7]))
def test_halves_are_swapped_or_kept(time, seed, separator):
    texts_ = torch.arange(8 * time).reshape(8, time) + 10
    found = sentence_order(texts_, separator=separator, seed=seed)
    middle = time // 2
    for row, ids, segments, label in zip(texts_, found.ids, found.segments, found.labels):
        halves = [row[:middle], row[middle:]]
        one, two = halves[::-1] if label else halves
        sep = [] if separator is None else [separator]
        assert ids.tolist() == [*one.tolist(), *sep, *two.tolist()]
        assert segments.tolist() == [0] * (len(one) + len(sep)) + [1] * len(two)


def test_about_half_are_swapped_and_one_token_is_refused():
    found = sentence_order(torch.zeros(4000, 2, dtype=torch.long))
    assert abs(found.labels.float().mean() - 0.5) < 3 * 0.5 / 4000**0.5
    with pytest.raises(ValueError, match="two segments take two tokens"):
        sentence_order(torch.zeros(3, 1, dtype=torch.long))
