"""kNN-LM: the mixture, its limits, and a decoder that remembers what it never trained on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.design.retrieval import knn_lm
from effnb.design.retrieval.datastore import FaissIndex
from effnb.design.retrieval.knn_lm import (
    KeyReader,
    KnnLm,
    build_datastore,
    interpolate,
    knn_log_probabilities,
    knn_target_log_probabilities,
)


def texts(seed=0, documents=3, time=20, vocabulary=64):
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (documents, time), generator=draws)


@pytest.fixture
def model(tiny_llama):
    return tiny_llama().eval()


@pytest.fixture
def vocabulary(model):
    return model.config.vocab_size


def stored(model, ids, **more):
    return build_datastore(model, ids.tolist(), dtype=torch.float32, **more)


# --- the mixture ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.floats(0, 1), st.floats(0.01, 100), st.integers(0, 99))
def test_probabilities_sum_to_one(k, lam, temperature, seed):
    draws = torch.Generator().manual_seed(seed)
    distances = torch.rand(4, k, generator=draws) * 50
    values = torch.randint(11, (4, k), generator=draws)
    log_knn = knn_log_probabilities(distances, values, 11, temperature)
    log_lm = torch.randn(4, 11, generator=draws).log_softmax(-1)
    p = interpolate(log_lm, log_knn, lam).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(4), atol=1e-5, rtol=0)
    # e^(ln p) against the plain formula
    want = lam * log_knn.exp() + (1 - lam) * log_lm.exp()
    torch.testing.assert_close(p, want, atol=1e-6, rtol=1e-4)
    some = values[:, 0]
    torch.testing.assert_close(
        knn_target_log_probabilities(distances, values, some, temperature),
        log_knn.gather(1, some[:, None])[:, 0],
    )


def test_three_neighbours_by_hand():
    """Weights e^0, e^-1, e^-1; two neighbours share a token."""
    p = knn_log_probabilities(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[2, 0, 2]]), 4).exp()
    z = 1 + 2 / math.e
    torch.testing.assert_close(p, torch.tensor([[1 / math.e / z, 0, (1 + 1 / math.e) / z, 0]]))


def test_a_neighbour_at_infinite_distance_does_not_count():
    p = knn_log_probabilities(torch.tensor([[1.0, math.inf]]), torch.tensor([[0, 1]]), 2).exp()
    assert p.tolist() == [[1, 0]]


def test_hotter_neighbours_count_more_alike():
    far = torch.tensor([[0.0, 4.0]]), torch.tensor([[0, 1]])
    cold, hot = (knn_log_probabilities(*far, 2, t).exp()[0, 0] for t in (0.5, 50))
    assert cold > 0.99 and 0.5 < hot < 0.53


# --- keys -----------------------------------------------------------------------------------------


def test_keys_are_the_input_of_the_last_feed_forward_after_its_norm(model):
    ids = texts()
    seen = []
    last = model.model.layers[-1]
    last.post_attention_layernorm.register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    logits, keys = KeyReader(model)(ids)
    assert torch.equal(keys, seen[-1])
    with torch.no_grad():
        assert torch.equal(logits, model(input_ids=ids).logits)
        assert torch.equal(
            KeyReader(model, "output")(ids)[1], model.model(input_ids=ids).last_hidden_state
        )
    assert KeyReader(model, "output").module == "lm_head"


def test_an_entry_for_each_token_that_another_follows(model):
    ids = texts()
    store = stored(model, ids)
    assert len(store) == 3 * 19
    assert store.values.tolist() == ids[:, 1:].flatten().tolist()
    assert store.documents.tolist() == [d for d in range(3) for _ in range(19)]
    keys = KeyReader(model)(ids)[1]
    torch.testing.assert_close(store.keys, keys[:, :-1].flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_windows_and_padding_change_no_value(model):
    ids = texts().tolist()
    ids[1] = ids[1][:7]
    store = build_datastore(model, ids, context=8, batch_size=2, dtype=torch.float32)
    assert store.values.tolist() == [i for document in ids for i in document[1:]]
    # A window starts with its own tokens: entry 8 is the second window's first.
    alone = KeyReader(model)(torch.tensor([ids[0][8:16]]))[1][0]
    torch.testing.assert_close(store.keys[8:16], alone, atol=1e-5, rtol=1e-5)


# --- the model ------------------------------------------------------------------------------------


def test_without_neighbours_it_is_the_decoder(model):
    ids = texts()
    joined = KnnLm(model, stored(model, ids), lam=0.0, k=4)
    with torch.no_grad():
        want = model(input_ids=ids).logits.log_softmax(-1)
    assert torch.equal(joined(ids).logits, want)


def test_a_text_that_is_in_the_store_is_certain_with_one_neighbour(model):
    ids = texts()
    joined = KnnLm(model, stored(model, ids), lam=1.0, k=1)
    losses = joined.look_up(ids).losses(1.0, 1)
    assert losses.abs().max() < 1e-5
    assert torch.equal(joined(ids).logits[:, :-1].argmax(-1), ids[:, 1:])


def test_without_its_own_document_nothing_is_copied(model):
    ids = texts()
    joined = KnnLm(model, stored(model, ids), lam=1.0, k=4)
    looked = joined.look_up(ids, exclude=torch.arange(3))
    own = torch.arange(3).repeat_interleave(19)
    assert (joined.store.documents[looked.neighbours.rows] != own[:, None]).all()


def test_a_text_looked_up_once_gives_what_the_model_gives(model):
    store = stored(model, texts())
    ids = texts(seed=1)
    looked = KnnLm(model, store, k=9).look_up(ids)
    for lam, k, t in ((0.3, 5, 1.0), (0.9, 9, 20.0), (0.0, 1, 1.0)):
        log_p = KnnLm(model, store, lam=lam, k=k, temperature=t)(ids).logits[:, :-1]
        want = -log_p.gather(2, ids[:, 1:, None]).flatten()
        torch.testing.assert_close(looked.losses(lam, k, t), want, atol=1e-5, rtol=1e-5)


def test_an_index_serves_as_well_as_the_datastore(model):
    store = stored(model, texts())
    ids = texts(seed=1)
    exact, indexed = (KnnLm(model, s, k=5)(ids).logits for s in (store, FaissIndex(store)))
    torch.testing.assert_close(exact, indexed, atol=1e-3, rtol=1e-3)


def test_a_changed_model_leaves_the_first_alone(model):
    first = KnnLm(model, stored(model, texts()), lam=0.2, k=3)
    second = first.changed(lam=0.7)
    assert (first.lam, second.lam, second.k) == (0.2, 0.7, 3)
    assert second.store is first.store
    with pytest.raises(ValueError, match="width is no setting"):
        first.changed(width=3)


def test_sixteen_bits_keep_the_neighbours(model):
    half = build_datastore(model, texts().tolist())
    assert half.keys.dtype == torch.float16
    queries = KeyReader(model)(texts(seed=1))[1].flatten(0, 1)
    full = stored(model, texts())
    same = half.search(queries, 1).rows == full.search(queries, 1).rows
    assert same.float().mean() > 0.95


@pytest.mark.parametrize("lam", [-0.01, 1.01, math.nan, math.inf])
def test_a_share_outside_zero_to_one_is_refused(model, lam):
    store = stored(model, texts())
    with pytest.raises(ValueError, match="lambda is .* between 0 and 1"):
        KnnLm(model, store, lam=lam, k=2)
    with pytest.raises(ValueError, match="lambda is"):
        interpolate(torch.zeros(2), torch.zeros(2), lam)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda m, s: KnnLm(m, s, k=0), "k is 0"),
        (lambda m, s: KnnLm(m, s, k=1000), "k is 1000; .* from 1 to 57"),
        (lambda m, s: KnnLm(m, s, k=2, temperature=0), "temperature is 0"),
        (lambda m, s: KnnLm(m, s, k=2, at="middle"), '"feedforward" or "output"'),
        (lambda m, s: KnnLm(m, s, k=2).look_up(texts()[:, :1]), "one token each"),
        (lambda m, s: KnnLm(m, s, k=2).look_up(texts()[:, :0]), "at least one"),
        (lambda m, s: build_datastore(m, [[1], []]), "the datastore would be empty"),
        (lambda m, s: build_datastore(m, []), "no document has two tokens"),
        (lambda m, s: build_datastore(m, [[1, 2]], context=0), "context is 0"),
        (
            lambda m, s: KnnLm(m, FaissIndex(s), k=2).look_up(texts(), exclude=torch.arange(3)),
            "cannot exclude",
        ),
        (
            lambda m, s: knn_log_probabilities(torch.zeros(1, 2), torch.tensor([[0, 5]]), 5),
            "between 0 and 4",
        ),
        (lambda m, s: interpolate(torch.zeros(2), torch.zeros(3), 0.5), "must agree"),
        (
            lambda m, s: knn_target_log_probabilities(
                torch.zeros(1, 2), torch.zeros(1, 2).long(), torch.zeros(2).long()
            ),
            "one for each query",
        ),
        (
            lambda m, s: knn_log_probabilities(torch.zeros(1, 0), torch.zeros(1, 0).long(), 5),
            "at least one neighbour",
        ),
    ],
)
def test_what_makes_no_mixture_is_refused(unchecked, model, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrong(model, stored(model, texts()))


def test_neighbours_of_another_search_take_the_place_of_the_first(model):
    joined = KnnLm(model, stored(model, texts()), k=6)
    looked = joined.look_up(texts(seed=1))
    fewer = knn_lm.with_neighbours(looked, looked.neighbours.first(2))
    assert torch.equal(fewer.losses(0.5), looked.losses(0.5, 2))
