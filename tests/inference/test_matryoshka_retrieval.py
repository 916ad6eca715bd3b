"""Search by prefixes: exact, in two steps, in more, and with FAISS for the first."""

import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.inference import matryoshka as mat


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


QUERIES, DOCUMENTS = randn(9, 16), randn(80, 16, seed=1)


def recalls(found, exact):
    return mat.neighbours_kept(found, exact).mean().item()


def test_exact_search_by_hand():
    documents = torch.tensor([[1.0, 0.0, 9.0], [0.0, 2.0, 0.0], [3.0, 3.0, 0.0]])
    found = mat.search(torch.tensor([[1.0, 0.2, 0.0]]), documents, 3, dims=2)
    assert found.rows.tolist() == [[0, 2, 1]]
    assert found.evaluations.tolist() == [3]
    assert found.multiplications.tolist() == [6]
    assert mat.search(torch.tensor([[1.0, 0.2, 0.0]]), documents, 1).rows.tolist() == [[2]]


@given(
    seed=st.integers(0, 1000),
    dims=st.integers(1, 15),
    k=st.integers(1, 10),
)
@settings(max_examples=30, deadline=None)
def test_a_longer_shortlist_never_loses_a_neighbour(seed, dims, k):
    q, d = randn(5, 16, seed=seed), randn(40, 16, seed=seed + 1)
    exact = mat.search(q, d, k)
    kept = [
        mat.neighbours_kept(mat.adaptive_retrieval(q, d, k, dims=dims, shortlist=K), exact)
        for K in range(k, 41, 3)
    ]
    assert all((b >= a - 1e-6).all() for a, b in pairwise(kept))
    whole = mat.adaptive_retrieval(q, d, k, dims=dims, shortlist=40)
    assert torch.equal(whole.rows, exact.rows)


def test_the_cost_is_that_of_the_formula():
    found = mat.adaptive_retrieval(QUERIES, DOCUMENTS, 5, dims=4, shortlist=20)
    assert found.multiplications.tolist() == [80 * 4 + 20 * 16] * 9
    assert found.evaluations.tolist() == [100] * 9
    found = mat.funnel(QUERIES, DOCUMENTS, 5, dims=(2, 4, 8), shortlists=(30, 10))
    assert found.multiplications.tolist() == [80 * 2 + 30 * 4 + 10 * 8] * 9


def test_a_funnel_of_one_step_is_adaptive_retrieval():
    one = mat.funnel(QUERIES, DOCUMENTS, 5, dims=(4, 16), shortlists=(20,))
    two = mat.adaptive_retrieval(QUERIES, DOCUMENTS, 5, dims=4, shortlist=20)
    assert torch.equal(one.rows, two.rows)


def test_whether_its_own_document_is_found():
    found = mat.search(DOCUMENTS[:5], DOCUMENTS, 3)
    assert found.finds(torch.arange(5)).all()
    assert not found.finds(torch.arange(5) + 40).any()
    assert found.finds(found.rows[:, 2], 3).all()


REFUSED = {
    "80 .documents in the collection": lambda: mat.adaptive_retrieval(
        QUERIES, DOCUMENTS, 5, dims=4, shortlist=81
    ),
    "k is 21": lambda: mat.adaptive_retrieval(QUERIES, DOCUMENTS, 21, dims=4, shortlist=20),
    "do not nest": lambda: mat.adaptive_retrieval(QUERIES, DOCUMENTS, dims=16, shortlist=20),
    "shortlist before it": lambda: mat.funnel(
        QUERIES, DOCUMENTS, 5, dims=(2, 4, 8), shortlists=(10, 30)
    ),
    "2 shortlists for 2": lambda: mat.funnel(
        QUERIES, DOCUMENTS, 5, dims=(2, 4), shortlists=(10, 5)
    ),
    "k is 0": lambda: mat.search(QUERIES, DOCUMENTS, 0),
    "17": lambda: mat.search(QUERIES, DOCUMENTS, 1, dims=17),
    "one width": lambda: mat.search(QUERIES[:, :3], DOCUMENTS, 1),
    "NaN": lambda: mat.search(QUERIES / 0, DOCUMENTS, 1),
    "equally many": lambda: mat.neighbours_kept(
        mat.search(QUERIES, DOCUMENTS, 1), mat.search(QUERIES, DOCUMENTS, 2)
    ),
    "ef is 3": lambda: mat.Hnsw(DOCUMENTS).search(QUERIES, 5, ef=3),
    "links is 1": lambda: mat.Hnsw(DOCUMENTS, links=1),
    "least the 16": lambda: mat.Hnsw(DOCUMENTS).search(QUERIES[:, :8], 5, ef=9),
    "lists is 81": lambda: mat.Ivf(DOCUMENTS, lists=81),
    "probes is 9": lambda: mat.Ivf(DOCUMENTS, lists=8).search(QUERIES, 5, probes=9),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_bad_input_is_one_sentence(sentence):
    with pytest.raises(ValueError, match=sentence):
        REFUSED[sentence]()


def test_without_faiss_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match="pip install faiss-cpu"):
        mat.Hnsw(DOCUMENTS)


# ------------------------------------------------------------------------------------ FAISS


def test_a_wide_walk_finds_what_exact_search_finds():
    exact = mat.search(QUERIES, DOCUMENTS, 5, dims=6)
    found = mat.Hnsw(DOCUMENTS, dims=6).search(QUERIES, 5, ef=80)
    assert recalls(found, exact) == 1
    assert (found.evaluations >= 40).all()
    assert torch.equal(found.multiplications, 6 * found.evaluations)


def test_a_narrow_walk_compares_with_fewer():
    documents, queries = randn(2000, 16, seed=2), randn(20, 16, seed=3)
    exact, index = mat.search(queries, documents, 5), mat.Hnsw(documents)
    costs, kept = [], []
    for ef in (5, 20, 80, 320):
        found = index.search(queries, 5, ef=ef)
        costs.append(found.evaluations.mean().item())
        kept.append(recalls(found, exact))
    assert costs == sorted(costs)
    assert costs[0] < 500
    assert kept[-1] > 0.98 > kept[0]
    again = mat.Hnsw(documents).search(queries, 5, ef=20)  # the same graph, the same walk
    assert torch.equal(again.rows, index.search(queries, 5, ef=20).rows)


def test_lists_are_compared_by_centres_and_members():
    index, exact = mat.Ivf(DOCUMENTS, lists=8), mat.search(QUERIES, DOCUMENTS, 5)
    whole = index.search(QUERIES, 5, probes=8)
    assert torch.equal(whole.rows, exact.rows)
    assert whole.evaluations.tolist() == [8 + 80] * 9
    one = index.search(QUERIES, 5, probes=1)
    sizes = {index.index.invlists.list_size(i) for i in range(8)}
    assert set((one.evaluations - 8).int().tolist()) <= sizes
    assert recalls(one, exact) < 1


def test_places_that_a_search_left_empty_are_no_documents():
    index = mat.Ivf(DOCUMENTS, lists=40)
    short = index.search(QUERIES, 60, probes=1)
    assert (short.rows == -1).any()
    found = mat.rerank(QUERIES, DOCUMENTS, short, 5)
    compared = (short.rows >= 0).sum(1)
    assert torch.equal(found.evaluations, short.evaluations + compared)
    full = compared >= 5
    assert (found.rows[full] >= 0).all()


def test_an_approximate_first_look_is_reranked_like_an_exact_one():
    index = mat.Hnsw(DOCUMENTS, dims=4)
    found = mat.rerank(QUERIES, DOCUMENTS, index.search(QUERIES, 20, ef=80), 5)
    exact = mat.adaptive_retrieval(QUERIES, DOCUMENTS, 5, dims=4, shortlist=20)
    assert recalls(found, exact) == 1
