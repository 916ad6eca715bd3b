"""RETRO: alignment, causality by gradients, a frozen decoder, and what it learns to copy."""

import copy

import pytest
import torch

from effnb.core.training import TrainingSettings, train
from effnb.design.retrieval.chunked_attention import (
    Attention,
    ChunkedCrossAttention,
    attending_groups,
    from_groups,
)
from effnb.design.retrieval.chunks import NONE, ChunkStore, bag_of_words, mean_states
from effnb.design.retrieval.retro import Retro, readers, retro_loss


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def words(*shape, seed=0, vocabulary=128):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def awake(module, seed=0):
    """New layers start with an output of 0; make it count."""
    draws = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith(("out.weight", "bias")):
            parameter.data = torch.randn(parameter.shape, generator=draws, dtype=parameter.dtype)
    return module


def cross(chunk=4, width=8, neighbour=8, dtype=torch.float64):
    torch.manual_seed(0)
    return awake(ChunkedCrossAttention(width, 2, chunk=chunk, neighbour=neighbour)).to(dtype)


# --- alignment ------------------------------------------------------------------------------------


def test_which_token_reads_which_neighbours_by_gradient():
    """With m = 4: 0 to 2 read none, 3 to 6 those of chunk 0, 7 to 10 of chunk 1, 15 of chunk 3."""
    layer, hidden = cross(), randn(1, 16, 8, dtype=torch.float64)
    encoded = randn(1, 4, 2, 8, 8, seed=1, dtype=torch.float64).requires_grad_()
    output = layer(hidden, encoded, torch.ones(1, 4, 2, 8, dtype=torch.bool))
    support = []
    for row in range(16):
        (gradient,) = torch.autograd.grad(output[0, row].sum(), encoded, retain_graph=True)
        support.append(set(gradient.abs().sum((0, 2, 3, 4)).nonzero().flatten().tolist()))
    assert support[:3] == [set()] * 3
    assert support[3:7] == [{0}] * 4
    assert support[7:11] == [{1}] * 4
    assert support[11:15] == [{2}] * 4
    assert support[15] == {3}
    assert [set(row.nonzero().flatten().tolist()) for row in readers(16, 4)] == support


@pytest.mark.parametrize("time", [4, 5, 7, 8, 11, 15, 16, 3, 1])
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_the_shift_is_the_definition(time, chunk):
    """Row by row against eq. 5: rows (u+1)m−1 … (u+2)m−2 attend to E_u."""
    layer, hidden = cross(chunk), randn(2, time, 8, dtype=torch.float64)
    chunks = time // chunk
    encoded = randn(2, chunks, 3, 8, 8, seed=1, dtype=torch.float64)
    present = torch.ones(2, chunks, 3, 8, dtype=torch.bool)
    present[:, :, 1, 5:] = False
    want = torch.zeros_like(hidden)
    for u in range(chunks):
        rows = slice((u + 1) * chunk - 1, min((u + 2) * chunk - 1, time))
        want[:, rows] = layer.attention(
            layer.norm(hidden[:, rows]),
            encoded[:, u].flatten(1, 2),
            present[:, u].flatten(1),
            copies=3,
        )
    torch.testing.assert_close(layer(hidden, encoded, present), want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("time", [4, 6, 9])
def test_groups_go_back_to_their_places(time):
    hidden = randn(2, time, 3)
    back = from_groups(attending_groups(hidden, 4), time)
    assert torch.equal(back[:, 3:], hidden[:, 3:]) and not back[:, :3].any()


def test_attention_without_bias_is_torchs():
    layer = Attention(8, 2, queries=5, keys=6)
    q, kv = randn(3, 5, 8), randn(3, 6, 8, seed=1)
    present = torch.ones(3, 6, dtype=torch.bool)
    present[1, 4:] = False

    def heads(x):
        return x.unflatten(-1, (2, 4)).transpose(1, 2)

    want = torch.nn.functional.scaled_dot_product_attention(
        heads(layer.query(q)),
        heads(layer.key(kv)),
        heads(layer.value(kv)),
        attn_mask=present[:, None, None],
    )
    want = layer.out(want.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(q, kv, present), want, atol=1e-6, rtol=1e-5)


def test_a_place_in_a_neighbour_counts_from_its_own_start():
    """The order of the neighbours means nothing; the order within one does."""
    layer, hidden = cross(), randn(1, 8, 8, dtype=torch.float64)
    encoded = randn(1, 2, 2, 8, 8, seed=1, dtype=torch.float64)
    present = torch.ones(1, 2, 2, 8, dtype=torch.bool)
    first = layer(hidden, encoded, present)
    torch.testing.assert_close(layer(hidden, encoded.flip(2), present), first)
    assert not torch.allclose(layer(hidden, encoded.flip(3), present), first)


def test_without_any_neighbour_nothing_is_added_and_gradients_are_finite():
    layer, hidden = cross(), randn(1, 8, 8, dtype=torch.float64).requires_grad_()
    absent = torch.zeros(1, 2, 2, 8, dtype=torch.bool)
    output = layer(hidden, randn(1, 2, 2, 8, 8, seed=1, dtype=torch.float64), absent)
    assert not output.any()
    output.sum().backward()
    assert torch.isfinite(hidden.grad).all()


# --- the model ------------------------------------------------------------------------------------


@pytest.fixture
def decoder(tiny_llama):
    return tiny_llama()


def retro(decoder, **more):
    return awake(Retro(decoder, **(dict(layers=(1, 2), chunk=4, heads=2) | more)))


def logits(model, *given, **named):
    with torch.no_grad():
        return model(*given, **named).logits


def test_before_training_it_predicts_as_the_decoder(decoder):
    model, ids = Retro(decoder, layers=(1,), chunk=4, heads=2), words(2, 14)
    want = logits(decoder, input_ids=ids)
    assert torch.equal(logits(model, ids, words(2, 3, 2, 8)), want)
    assert torch.equal(logits(retro(decoder), ids), want)
    assert torch.equal(logits(retro(decoder), ids, words(2, 3, 0, 8)), want)
    assert torch.equal(logits(decoder, input_ids=ids), want), "the decoder was changed"


def test_no_token_reads_what_comes_after_it(decoder):
    """Of tokens and of neighbours, which were chosen by looking at a whole chunk."""
    model, ids, near = retro(decoder), words(1, 14), words(1, 3, 2, 8, seed=1)
    base = logits(model, ids, near)[0]
    for place in range(14):
        changed = ids.clone()
        changed[0, place] = (ids[0, place] + 1) % 128
        differs = (logits(model, changed, near)[0] - base).abs().amax(-1) > 1e-6
        assert not differs[:place].any() and differs[place]
    for u in range(3):
        changed = near.clone()
        changed[0, u] = words(2, 8, seed=9)
        differs = (logits(model, ids, changed)[0] - base).abs().amax(-1) > 1e-6
        assert not differs[: (u + 1) * 4 - 1].any() and differs[(u + 1) * 4 - 1]


def test_only_what_reads_neighbours_is_trained(decoder):
    model = retro(decoder)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith(("encoder.", "cross.")) for name in trained)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == model.new_parameters()
    held = model.decoder.get_input_embeddings().weight
    assert held.data_ptr() == decoder.get_input_embeddings().weight.data_ptr()
    assert model.decoder.get_output_embeddings().weight is held, "tied weights came apart"
    assert all(p.requires_grad for p in decoder.parameters())
    free = retro(decoder, frozen=False)
    assert all(p.requires_grad for p in free.parameters())
    assert free.decoder.model.embed_tokens.weight.data_ptr() != held.data_ptr()


def test_a_copy_is_a_model_by_itself(decoder):
    model, ids, near = retro(decoder), words(2, 9), words(2, 2, 1, 8)
    other = copy.deepcopy(model)
    want = logits(model, ids, near)
    for parameter in model.cross.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(other, ids, near), want)
    assert not torch.equal(logits(model, ids, near), want)


def test_a_pass_that_fails_leaves_nothing_behind(decoder):
    model, ids = retro(decoder), words(1, 9)
    want = logits(model, ids)
    with pytest.raises(ValueError):
        model(ids, words(1, 5, 1, 8))
    assert torch.equal(logits(model, ids), want)


def test_it_learns_to_copy_from_neighbours_and_not_from_random_ones(decoder):
    """Each text's neighbours hold what follows; nothing else could tell it."""
    model = Retro(decoder, layers=(0, 1, 2), chunk=4, heads=4)

    def batch(step, helpful=True):
        ids = words(16, 12, seed=step)
        following = torch.stack(
            [torch.cat([ids[:, u : u + 4], ids[:, u + 4 : u + 8]], 1) for u in (0, 4)], 1
        )[:, :, None]
        last = words(16, 1, 1, 8, seed=step + 999)
        near = torch.cat([following, last], 1)
        near = near if helpful else words(*near.shape, seed=step + 1)
        return {"input_ids": ids, "neighbours": near}

    settings = TrainingSettings(steps=150, learning_rate=5e-3, warmup_steps=10)
    with torch.no_grad():
        before = float(retro_loss(model, batch(9999)))
    train(model, batch, settings, loss=retro_loss)
    with torch.no_grad():
        told, untold = (float(retro_loss(model, batch(9999, h))) for h in (True, False))
    assert told < before - 1 and told < untold - 0.5


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda d: retro(d, layers=()), "no layer reads"),
        (lambda d: retro(d, layers=(3,)), "a layer is 3; .* from 0 to 2"),
        (lambda d: retro(d, layers=(1, 1)), "one twice"),
        (lambda d: retro(d, chunk=0), "chunk is 0"),
        (lambda d: retro(d, heads=5), "5 heads do not divide"),
        (lambda d: retro(d, encoder_layers=0), "layers is 0"),
        (lambda d: retro(d)(words(1, 9), words(1, 3, 1, 8)), "whole chunks"),
        (lambda d: retro(d)(words(1, 9), words(1, 2, 1, 9)), "at most 8 fit"),
        (lambda d: readers(0, 4), "time is 0"),
        (lambda d: attending_groups(torch.zeros(1, 4, 2), 0), "at least 1"),
    ],
)
def test_what_cannot_be_joined_is_refused(decoder, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrong(decoder)


# --- chunks ---------------------------------------------------------------------------------------


def documents():
    return [words(14, seed=s).tolist() for s in range(4)] + [[1, 2]]


def test_a_neighbour_is_a_chunk_and_what_followed_it():
    store = ChunkStore(documents(), bag_of_words(128), chunk=4)
    assert len(store) == 4 * 3
    ids = torch.tensor(documents()[2][:9])[None]
    near = store.neighbours(ids, 1)
    assert near.shape == (1, 2, 1, 8)
    assert near[0, 0, 0].tolist() == documents()[2][:8]
    assert near[0, 1, 0].tolist() == documents()[2][4:12]
    last = store.neighbours(torch.tensor(documents()[2][8:12])[None], 1)[0, 0, 0]
    assert last.tolist() == [*documents()[2][8:14], NONE, NONE]


def test_a_text_does_not_find_its_own_document():
    store = ChunkStore(documents(), bag_of_words(128), chunk=4)
    ids = torch.tensor(documents()[2][:8])[None]
    near = store.neighbours(ids, 2, exclude=torch.tensor([2]))
    own = {tuple(documents()[2][i : i + 4]) for i in range(0, 12, 4)}
    assert own.isdisjoint(tuple(n[:4].tolist()) for n in near.flatten(0, 2))


def test_no_neighbours_and_short_texts_give_none():
    store = ChunkStore(documents(), bag_of_words(128), chunk=4)
    assert store.neighbours(words(2, 9), 0).shape == (2, 2, 0, 8)
    assert store.neighbours(words(2, 3), 1).shape == (2, 0, 1, 8)
    assert store.random_neighbours(words(2, 9), 3).shape == (2, 2, 3, 8)


def test_chunks_can_be_found_by_a_models_states(decoder):
    embed = mean_states(decoder)
    store = ChunkStore(documents(), embed, chunk=4)
    chunk = torch.tensor(documents()[1][4:8])[None]
    with torch.no_grad():
        want = decoder(input_ids=chunk, output_hidden_states=True).hidden_states[-1].mean(1)
    torch.testing.assert_close(embed(chunk), want)
    assert store.neighbours(chunk, 1)[0, 0, 0, :4].tolist() == chunk[0].tolist()


def test_words_in_common_make_chunks_near():
    embed = bag_of_words(6)
    a, b, c = embed(torch.tensor([[0, 1, 2, 2], [2, 1, 2, 0], [0, 3, 4, 5]]))
    assert torch.equal(a, b)
    torch.testing.assert_close(a.square().sum(), torch.tensor(1.0))
    torch.testing.assert_close((a - c).square().sum(), torch.tensor(2 - 2 * 0.25))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: ChunkStore([[1, 2]], bag_of_words(9), chunk=4), "no document has a whole chunk"),
        (lambda: ChunkStore([], bag_of_words(9), chunk=4), "datastore would be empty"),
        (lambda: ChunkStore(documents(), bag_of_words(128), chunk=0), "chunk is 0"),
        (
            lambda: ChunkStore(documents(), bag_of_words(128), chunk=4).neighbours(words(1, 4), 13),
            "k is 13; .* from 0 to 12",
        ),
        (lambda: bag_of_words(0), "vocabulary is 0"),
    ],
)
def test_no_store_of_nothing(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrong()
