"""Search: exact, in any sample, without one's own document; FAISS on one thread; bad input."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.design.retrieval.datastore import Datastore, FaissIndex


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def store(entries=50, width=6, seed=0, documents=5):
    return Datastore(
        randn(entries, width, seed=seed),
        torch.arange(entries) % 7,
        torch.arange(entries) % documents,
    )


def brute_force(keys, query, k):
    distances = (keys - query).square().sum(1)
    return sorted(range(len(keys)), key=lambda i: float(distances[i]))[:k]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.data())
def test_the_nearest_are_those_of_brute_force(entries, width, data):
    found = store(entries, width, seed=data.draw(st.integers(0, 1000)))
    k = data.draw(st.integers(1, entries))
    queries = randn(3, width, seed=7)
    near = found.search(queries, k)
    for i, query in enumerate(queries):
        assert near.rows[i].tolist() == brute_force(found.keys, query, k)
    assert (near.distances.diff(dim=1) >= 0).all()
    assert torch.equal(near.values, found.values[near.rows])


def test_far_from_the_origin_distances_stay_exact():
    """The expanded square loses all digits there; differences do not."""
    keys = randn(30, 4) + 3000
    near = Datastore(keys, torch.zeros(30).long(), torch.zeros(30).long()).search(keys[:5], 3)
    assert near.rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert near.distances[:, 0].eq(0).all()
    want = (keys.double()[near.rows] - keys.double()[:5, None]).square().sum(-1)
    torch.testing.assert_close(near.distances.double(), want, rtol=1e-5, atol=0)


def test_a_query_does_not_find_its_own_document():
    found = store()
    near = found.search(found.keys, 8, exclude=found.documents)
    assert (found.documents[near.rows] != found.documents[:, None]).all()
    assert found.search(found.keys, 1).distances.max() == 0


def test_where_a_query_has_fewer_than_k_left_the_distance_is_infinite():
    found = Datastore(randn(4, 2), torch.arange(4), torch.tensor([0, 0, 0, 1]))
    near = found.search(randn(1, 2, seed=3), 3, exclude=torch.tensor([0]))
    assert near.rows[0, 0] == 3
    assert near.distances.isinf().tolist() == [[False, True, True]]


def test_samples_of_one_seed_nest():
    found = store()
    small, large = (found.sample(n, seed=4) for n in (10, 30))
    assert torch.equal(large.keys[:10], small.keys)
    assert not torch.equal(found.sample(10, seed=5).keys, small.keys)


def test_joined_datastores_keep_their_documents_apart():
    joined = store(10).joined(store(10, seed=1))
    assert joined.documents[:10].max() < joined.documents[10:].min()
    assert len(joined) == 20 and joined.bytes == 20 * (6 * 4 + 4)


def test_an_index_over_every_list_is_exact_search():
    found, queries = store(200), randn(9, 6, seed=2)
    exact = found.search(queries, 5)
    for index in (FaissIndex(found), FaissIndex(found, "ivf", lists=10, probes=10)):
        near = index.search(queries, 5)
        assert torch.equal(near.rows, exact.rows)
        torch.testing.assert_close(near.distances, exact.distances, atol=1e-4, rtol=1e-4)
    assert index.lists == 10 and FaissIndex(found).lists == 1


def test_a_list_with_fewer_than_k_keys_gives_infinite_distances():
    found = store(40)
    near = FaissIndex(found, "ivf", lists=20, probes=1).search(randn(5, 6, seed=2), 20)
    assert near.distances.isinf().any()
    assert torch.isfinite(near.distances[:, 0]).any()


def test_faiss_has_as_many_threads_afterwards_as_before():
    import faiss

    before, ours = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(3)
    try:
        FaissIndex(store(), "ivf", lists=3, probes=1).search(randn(2, 6), 2)
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)
    assert torch.get_num_threads() == ours


def test_without_faiss_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match="pip install faiss-cpu"):
        FaissIndex(store())


EMPTY = (torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).long())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: Datastore(*EMPTY), "the datastore is empty"),
        (lambda: Datastore(randn(2, 2), torch.arange(3), torch.arange(3)), "2 keys and 3 values"),
        (lambda: Datastore(randn(2), torch.arange(2), torch.arange(2)), r"\(entries, width\)"),
        (
            lambda: Datastore(torch.full((1, 2), math.nan), torch.arange(1), torch.arange(1)),
            "NaN or infinite",
        ),
        (lambda: store().search(randn(2, 6), 51), "k is 51; .* from 1 to 50"),
        (lambda: store().search(randn(2, 6), 0), "k is 0"),
        (lambda: store().search(randn(2, 5), 1), "as wide as"),
        (lambda: store().search(randn(2, 6) / 0, 1), "query has entries"),
        (lambda: store().search(randn(2, 6), 1, exclude=torch.zeros(3).long()), "one document"),
        (
            lambda: store(documents=1).search(randn(1, 6), 1, exclude=torch.zeros(1).long()),
            "no entry left",
        ),
        (lambda: store().sample(51), "entries is 51"),
        (lambda: store().joined(store(width=5)), "one model"),
        (lambda: FaissIndex(store(), "tree"), '"flat" or "ivf"'),
        (lambda: FaissIndex(store(), "ivf", lists=51), "lists is 51"),
        (lambda: FaissIndex(store(), "ivf", lists=5, probes=6), "probes is 6"),
        (lambda: store().search(randn(2, 6), 3).first(4), "k is 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(unchecked, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrong()
