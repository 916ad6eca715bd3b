"""The Matryoshka loss against sentence-transformers, and searches against FAISS's exact one."""

import faiss
import numpy as np
import pytest
import torch
from sentence_transformers import losses
from torch import nn

from effnb.inference import matryoshka as mat


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Given(nn.Module):
    """In the place of a model: a feature holds the embeddings already."""

    device = torch.device("cpu")

    def get_embedding_dimension(self):
        return 24

    def forward(self, features):
        return {"sentence_embedding": features["given"]}


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0]])
@pytest.mark.parametrize("scale", [20.0, 5.0])
def test_the_loss_and_its_gradient_are_those_of_sentence_transformers(weights, scale):
    dims = [4, 12, 24]
    model = Given()
    base = losses.MultipleNegativesRankingLoss(model, scale=scale)
    theirs = losses.MatryoshkaLoss(model, base, dims, matryoshka_weights=weights)
    sides = [[randn(10, 24, seed=s).requires_grad_() for s in (0, 1)] for _ in range(2)]
    reference = theirs([{"given": side} for side in sides[0]], None)
    ours = mat.matryoshka_loss(
        *sides[1],
        dims,
        weights=weights,
        loss=lambda q, d: mat.in_batch_softmax(q, d, scale),
    )
    torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-6)
    reference.backward()
    ours.backward()
    for one, other in zip(*sides):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dims", [3, 16, 24])
def test_exact_search_is_that_of_faiss(dims):
    queries, documents = randn(20, 24), randn(500, 24, seed=1)

    def rows(vectors):
        cut = np.ascontiguousarray(vectors[:, :dims].numpy())
        faiss.normalize_L2(cut)
        return cut

    index = faiss.index_factory(dims, "Flat", faiss.METRIC_INNER_PRODUCT)
    index.add(rows(documents))
    expected = index.search(rows(queries), 10)[1]
    assert mat.search(queries, documents, 10, dims=dims).rows.tolist() == expected.tolist()


@pytest.mark.parametrize("build", ["HNSW16,Flat", "IVF16,Flat"])
def test_our_indexes_are_those_of_the_index_factory(build):
    documents = np.ascontiguousarray(randn(400, 8, seed=1).numpy())
    queries = randn(10, 8)
    faiss.normalize_L2(documents)
    index = faiss.index_factory(8, build, faiss.METRIC_INNER_PRODUCT)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        if build.startswith("HNSW"):
            index.hnsw.efConstruction, index.hnsw.efSearch = 80, 30
            found = mat.Hnsw(torch.from_numpy(documents)).search(queries, 10, ef=30)
        else:
            index.cp.seed, index.nprobe = 1, 4
            found = mat.Ivf(torch.from_numpy(documents), lists=16).search(queries, 10, probes=4)
        index.train(documents)
        index.add(documents)
        expected = index.search(mat.prefix(queries, 8).numpy(), 10)[1]
    finally:
        faiss.omp_set_num_threads(before)
    assert found.rows.tolist() == expected.tolist()
