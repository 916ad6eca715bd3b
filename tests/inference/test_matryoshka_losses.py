"""Prefixes and the loss over them; maps; what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.inference import matryoshka as mat


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_prefix_has_length_one_again():
    z = torch.tensor([[3.0, 4.0, 12.0]])
    assert mat.prefix(z, 2).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]
    torch.testing.assert_close(mat.prefix(randn(4, 9), 5).norm(dim=1), torch.ones(4))


def test_the_full_width_alone_is_the_base_loss():
    q, d = randn(6, 8), randn(6, 8, seed=1)
    base = mat.in_batch_softmax(mat.prefix(q, 8), mat.prefix(d, 8))
    assert mat.matryoshka_loss(q, d, (8,)).item() == base.item()


def test_the_loss_by_hand():
    q = d = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # One number: both vectors become (1), every score is 20, and each softmax is a half.
    # Two numbers: the scores are 20 for its own document and 12 for the other.
    full = math.log(1 + math.exp(-8))
    found = mat.matryoshka_loss(q, d, (1, 2), weights=(1, 3))
    assert found.item() == pytest.approx(math.log(2) + 3 * full, abs=1e-5)


@given(
    width=st.integers(2, 12),
    data=st.data(),
    scale=st.floats(0.5, 30),
)
@settings(max_examples=30, deadline=None)
def test_the_sum_is_linear_in_its_weights(width, data, scale):
    dims = tuple(sorted(data.draw(st.sets(st.integers(1, width), min_size=1, max_size=4))))
    weights = [data.draw(st.floats(0.1, 3)) for _ in dims]
    q, d = randn(5, width, seed=width), randn(5, width, seed=width + 1)

    def loss(a, b):
        return mat.in_batch_softmax(a, b, scale)

    parts = [mat.matryoshka_loss(q, d, (m,), loss=loss).item() for m in dims]
    whole = mat.matryoshka_loss(q, d, dims, weights=weights, loss=loss).item()
    assert whole == pytest.approx(sum(c * p for c, p in zip(weights, parts)), rel=1e-4, abs=1e-4)
    # The length of a vector makes no difference.
    longer = mat.matryoshka_loss(7 * q, d, dims, weights=weights, loss=loss).item()
    assert longer == pytest.approx(whole, rel=1e-3, abs=1e-4)


def test_only_the_numbers_of_a_prefix_get_its_gradient():
    q, d = randn(5, 6).requires_grad_(), randn(5, 6, seed=1)
    mat.matryoshka_loss(q, d, (2, 4)).backward()
    assert q.grad[:, :4].abs().min() > 0
    assert not q.grad[:, 4:].any()


REFUSED = {
    "do not nest": lambda q: mat.matryoshka_loss(q, q, (4, 2)),
    "do not nest: each must be longer": lambda q: mat.matryoshka_loss(q, q, (4, 4)),
    "between 1 and 6": lambda q: mat.matryoshka_loss(q, q, (4, 8)),
    "lie between 1": lambda q: mat.matryoshka_loss(q, q, (0, 4)),
    "whole numbers": lambda q: mat.matryoshka_loss(q, q, (True, 4)),
    "give at least one": lambda q: mat.matryoshka_loss(q, q, ()),
    "give one for each": lambda q: mat.matryoshka_loss(q, q, (2, 4), weights=(1,)),
    "not negative": lambda q: mat.matryoshka_loss(q, q, (2, 4), weights=(1, -1)),
    "not all 0": lambda q: mat.matryoshka_loss(q, q, (2, 4), weights=(0, 0)),
    "NaN": lambda q: mat.matryoshka_loss(q / 0, q, (2, 4)),
    "pair up": lambda q: mat.matryoshka_loss(q, q[:3], (2, 4)),
    "one width": lambda q: mat.matryoshka_loss(q, q[:, :3], (2,)),
    "at least one vector": lambda q: mat.matryoshka_loss(q[:0], q[:0], (2,)),
    "scale is 0": lambda q: mat.in_batch_softmax(q, q, 0),
    "batch_size is 9": lambda q: mat.train_map(q, q, (2, 4), batch_size=9),
    "width is 7": lambda q: mat.principal_map(q, 7),
    "width is 0": lambda q: mat.random_dims(0, 6, 0),
    "fit vectors of 6": lambda q: mat.prefix(q, 7),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_bad_input_is_one_sentence(sentence):
    with pytest.raises(ValueError, match=sentence) as found:
        REFUSED[sentence](randn(5, 6))
    assert str(found.value).endswith((".", ")."))


def test_maps_that_are_not_trained():
    turn = mat.orthogonal(6, 6, 0)
    torch.testing.assert_close(turn @ turn.T, torch.eye(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(mat.orthogonal(2, 6, 0), turn[:2])
    assert not torch.equal(turn, mat.orthogonal(6, 6, 1))
    picked = mat.random_dims(3, 6, 0)
    assert picked.sum(1).tolist() == [1, 1, 1]
    assert picked.sum(0).max() == 1
    e = randn(50, 3) @ torch.diag(torch.tensor([1.0, 5.0, 2.0]))
    P = mat.principal_map(e)
    energy = (e @ P.T).square().sum(0)
    assert energy[0] > energy[1] > energy[2]
    torch.testing.assert_close(energy.sum(), e.square().sum())


def test_training_puts_what_matters_first():
    """What tells pairs apart lies in four of 16 numbers, and the rest is noise that differs."""
    signal = randn(400, 4)
    rotate = mat.orthogonal(16, 16, 9)
    q = torch.cat([signal, randn(400, 12, seed=1)], 1) @ rotate
    d = torch.cat([signal, randn(400, 12, seed=2)], 1) @ rotate

    def hits(A):
        found = mat.search(q[:100] @ A.T, d[:100] @ A.T, 1, dims=4)
        return found.finds(torch.arange(100)).float().mean().item()

    kwargs = dict(steps=60, batch_size=100, learning_rate=0.02)
    nested = mat.train_map(q[100:], d[100:], (4, 16), **kwargs)
    plain = mat.train_map(q[100:], d[100:], (16,), **kwargs)
    assert nested.shape == plain.shape == (16, 16)
    assert hits(nested) > max(hits(plain), hits(mat.orthogonal(16, 16, 0))) + 0.1
    again = mat.train_map(q[100:], d[100:], (4, 16), **kwargs)
    assert torch.equal(again, nested)
    assert not torch.equal(mat.train_map(q[100:], d[100:], (4, 16), seed=1, **kwargs), nested)
