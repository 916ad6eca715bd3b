"""Entmax: the closed forms, an independent bisection, gradients, and zeros that can be deleted."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

# Modules whose names the package gives to their functions.
em = importlib.import_module("effnb.design.attention.entmax")


def randn(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double() * scale


def by_hand(row, alpha):
    """The definition, one number at a time: the tau for which the weights sum to 1."""
    scores = [(alpha - 1) * z for z in row.tolist()]

    def weights(tau):
        return [max(s - tau, 0.0) ** (1 / (alpha - 1)) for s in scores]

    low, high = max(scores) - 1, max(scores)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if math.fsum(weights(middle)) >= 1 else (low, middle)
    return torch.tensor(weights(low), dtype=torch.float64)


@settings(max_examples=25)
@given(
    keys=st.integers(1, 12),
    alpha=st.sampled_from([1.1, 1.3, 1.5, 1.7, 2.0, 3.0]),
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.1, 2.0, 30.0]),
)
def test_every_way_agrees_with_the_definition(keys, alpha, seed, scale):
    z = randn(keys, seed=seed, scale=scale)
    p = em.entmax(z, alpha)
    torch.testing.assert_close(p, by_hand(z, alpha), atol=1e-10, rtol=1e-8)
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(em.entmax(z + 7.0, alpha), p, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_the_sort_and_the_bisection_agree(alpha):
    z = randn(40, 30)
    bisected = em.entmax(z, torch.full((1, 1), alpha).double())
    torch.testing.assert_close(em.entmax(z, alpha), bisected, atol=1e-12, rtol=0)
    assert torch.equal(em.entmax15(z), em.entmax(z, 1.5))
    assert torch.equal(em.sparsemax(z), em.entmax(z, 2.0))


def test_between_softmax_and_sparsemax():
    z = randn(20, 10)
    assert torch.equal(em.entmax(z, 1.0), z.softmax(-1))
    torch.testing.assert_close(em.entmax(z, 1.001), z.softmax(-1), atol=1e-2, rtol=0)
    counts = [(em.entmax(z, a) > 0).sum().item() for a in (1.0, 1.25, 1.5, 2.0, 4.0)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 200


def test_typical_support():
    """N(0, 2²) scores of 30 keys: 13.0 % of the weights are above 0, and 6.7 % for sparsemax.

    Means of 40,000 rows, each known to 0.03 %; a tenth of the rows is allowed three times more.
    """
    z = randn(4000, 30)
    assert float((em.entmax15(z) > 0).double().mean()) == pytest.approx(0.130, abs=0.003)
    assert float((em.sparsemax(z) > 0).double().mean()) == pytest.approx(0.067, abs=0.002)


def test_keys_without_weight_can_be_deleted():
    """Entmax on any superset of its support is unchanged (0.0); softmax is not."""
    z = randn(200, 20, seed=3)
    keep = torch.rand(z.shape, generator=torch.Generator().manual_seed(4)) < 0.3
    for alpha, tolerance in ((1.5, 1e-12), (2.0, 1e-12), (1.3, 1e-12)):
        p = em.entmax(z, alpha)
        restricted = em.entmax(z.masked_fill(~(keep | (p > 0)), -torch.inf), alpha)
        assert (restricted - p).abs().max() < tolerance
    kept = keep | (em.entmax15(z) > 0)
    change = z.masked_fill(~kept, -torch.inf).softmax(-1) - z.softmax(-1)
    assert change.abs().max() > 0.1


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.5, 2.0, 2.5])
def test_gradients(alpha):
    z = randn(3, 6, seed=5, scale=1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: em.entmax(x, alpha), z, atol=1e-5)


def test_the_jacobian_is_the_closed_form():
    z = randn(8, seed=6)
    jacobian = torch.autograd.functional.jacobian(em.entmax15, z)
    s = em.entmax15(z).sqrt()
    torch.testing.assert_close(jacobian, s.diag() - torch.outer(s, s) / s.sum())


def test_each_head_can_learn_its_alpha():
    z = randn(1, 3, 2, 4, seed=7, scale=1.0).requires_grad_()
    alpha = torch.tensor([1.2, 1.5, 1.9], dtype=torch.float64).view(3, 1, 1).requires_grad_()
    assert torch.autograd.gradcheck(em.entmax, (z, alpha), atol=1e-4, rtol=1e-3)
    p = em.entmax(z, alpha)
    for head, a in enumerate((1.2, 1.5, 1.9)):
        torch.testing.assert_close(p[:, head], em.entmax(z[:, head], a), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_hidden_keys_and_rows(alpha):
    z = randn(3, 5).requires_grad_()
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[0], hidden[1, 2:] = True, True
    p = em.entmax(z.masked_fill(hidden, -torch.inf), alpha)
    assert (p[0] == 0).all() and (p[1, 2:] == 0).all()
    torch.testing.assert_close(p[1, :2], em.entmax(z[1, :2], alpha), atol=1e-12, rtol=1e-12)
    (gradient,) = torch.autograd.grad((p * torch.arange(5)).sum(), z)
    assert gradient.isfinite().all() and (gradient[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types(dtype):
    z = randn(50, 30).to(dtype)
    p = em.entmax(z, 1.3)
    assert p.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(p.double(), em.entmax(z.double(), 1.3), atol=tolerance, rtol=1e-2)


def test_attention():
    q, k, v = (randn(2, 3, 5, 4, seed=s) for s in range(3))
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    out, weights = em.entmax_attention(q, k, v, visible=visible)
    scores = (q @ k.mT / 2).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(weights, em.entmax15(scores))
    torch.testing.assert_close(out, weights @ v)
    dense, _ = em.entmax_attention(q, k, v, alpha=1.0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(dense, expected, atol=1e-12, rtol=1e-12)


def test_what_is_refused(unchecked):
    z = randn(3, 4)
    with pytest.raises(ValueError, match=r"alpha is 0\.9; it must be at least 1"):
        em.entmax(z, 0.9)
    with pytest.raises(ValueError, match="alpha is nan"):
        em.entmax(z, math.nan)
    with pytest.raises(ValueError, match="not above 1"):
        em.entmax(z, torch.ones(3, 1))
    with pytest.raises(ValueError, match="must broadcast against the rows"):
        em.entmax(z, torch.full((3, 4), 1.5))
    with pytest.raises(ValueError, match="at least one key"):
        em.entmax(z[:, :0])
    with pytest.raises(ValueError, match="one width"):
        em.entmax_attention(*(randn(1, 1, 2, d) for d in (3, 4, 4)))
