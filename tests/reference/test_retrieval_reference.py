"""Searches against FAISS and scikit-learn, the mixture against a second writing of knnlm's code."""

import faiss
import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from effnb.design.retrieval.datastore import Datastore, FaissIndex
from effnb.design.retrieval.knn_lm import interpolate, knn_log_probabilities


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def store(entries=400, width=16):
    return Datastore(randn(entries, width), torch.arange(entries) % 13, torch.arange(entries) % 9)


@pytest.fixture
def one_thread():
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.mark.parametrize("k", [1, 5, 64, 400])
def test_exact_search_is_that_of_scikit_learn(k):
    found, queries = store(), randn(25, 16, seed=1)
    theirs = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(found.keys.double().numpy())
    distances, rows = theirs.kneighbors(queries.double().numpy())
    ours = found.search(queries, k)
    # In 32 bits two keys may be equally far that are not in 64; only these may change places.
    gaps = np.diff(distances**2, axis=1)
    tied = np.pad(gaps < 1e-5, ((0, 0), (1, 0))) | np.pad(gaps < 1e-5, ((0, 0), (0, 1)))
    assert tied.mean() < 0.02
    np.testing.assert_array_equal(ours.rows.numpy()[~tied], rows[~tied])
    np.testing.assert_allclose(ours.distances.numpy(), distances**2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 64])
def test_exact_search_is_that_of_faiss(k, one_thread):
    found, queries = store(), randn(25, 16, seed=1)
    index = faiss.IndexFlatL2(16)
    index.add(found.keys.numpy())
    distances, rows = index.search(queries.numpy(), k)
    ours = found.search(queries, k)
    np.testing.assert_array_equal(ours.rows.numpy(), rows)
    np.testing.assert_allclose(ours.distances.numpy(), distances, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("probes", [1, 4, 20])
def test_lists_are_those_of_faisss_own_factory(probes, one_thread):
    found, queries = store(), randn(25, 16, seed=1)
    index = faiss.index_factory(16, "IVF20,Flat")
    index.nprobe = probes
    index.cp.min_points_per_centroid = 1
    index.train(found.keys.numpy())
    index.add(found.keys.numpy())
    distances, rows = index.search(queries.numpy(), 7)
    ours = FaissIndex(found, "ivf", lists=20, probes=probes).search(queries, 7)
    present = rows >= 0
    np.testing.assert_array_equal(ours.rows.numpy()[present], rows[present])
    np.testing.assert_array_equal(np.isinf(ours.distances.numpy()), ~present)
    np.testing.assert_allclose(ours.distances.numpy()[present], distances[present], rtol=1e-5)


def test_the_mixture_is_that_of_a_stacked_logsumexp():
    """As knnlm writes it: both logarithms stacked, with ln λ and ln(1 − λ), logsumexp over them."""
    near = store().search(randn(25, 16, seed=1), 32)
    log_lm = randn(25, 13, seed=2).log_softmax(-1)
    weights = torch.log_softmax(-near.distances, -1)
    for token in range(13):
        mask = torch.where(near.values == token, 0.0, -10000.0)
        knn = torch.logsumexp(weights + mask, -1)
        coefficients = torch.tensor([[1 - 0.25], [0.25]]).log()
        want = torch.logsumexp(torch.stack([log_lm[:, token], knn]) + coefficients, 0)
        got = interpolate(log_lm, knn_log_probabilities(near.distances, near.values, 13), 0.25)
        torch.testing.assert_close(got[:, token], want, atol=1e-5, rtol=1e-5)
