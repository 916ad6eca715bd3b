"""Ranks by hand, ties, and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effnb.evaluation import retrieval


def test_ranks_by_hand():
    documents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    queries = torch.tensor([[1.0, 0.1], [0.9, 0.5], [0.0, 1.0]])
    found = retrieval(queries, documents)
    # scores: (1, .1, .68) -> 1; (.9, .5, .94) -> third; (0, 1, .8) -> second
    assert found.ranks == (1, 3, 2)
    assert found.recall_at_1 == pytest.approx(1 / 3)
    assert found.recall_at(2) == pytest.approx(2 / 3)
    assert found.mrr_at_10 == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert found.standard_error == pytest.approx((2 / 9 / 3) ** 0.5)


def test_a_search_that_cannot_tell_documents_apart_earns_nothing():
    found = retrieval(torch.ones(4, 3), torch.ones(12, 3))
    assert found.ranks == (12,) * 4
    assert found.mrr_at_10 == 0


def test_relevant_documents_may_stand_anywhere():
    documents = torch.eye(5)
    order = torch.tensor([3, 1, 4])
    assert retrieval(documents[order], documents, order).ranks == (1, 1, 1)


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 100))
def test_ranks_do_not_depend_on_a_rotation(n, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(n, dim, generator=generator)
    documents = torch.randn(n + 3, dim, generator=generator)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    plain = retrieval(queries, documents).ranks
    turned = retrieval(queries @ rotation, documents @ rotation).ranks
    assert sum(a == b for a, b in zip(plain, turned, strict=True)) >= n - 1  # rounding may tie
    assert all(1 <= rank <= n + 3 for rank in plain)


@pytest.mark.parametrize(
    ("queries", "documents", "relevant", "says"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), None, "one dim"),
        (torch.ones(0, 3), torch.ones(2, 3), None, "no queries"),
        (torch.full((1, 3), torch.nan), torch.ones(2, 3), None, "NaN"),
        (torch.ones(3, 3), torch.ones(2, 3), None, "from 0 to 1"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0]), "as many relevant"),
    ],
)
def test_refusals(queries, documents, relevant, says):
    with pytest.raises(ValueError, match=says):
        retrieval(queries, documents, relevant)
