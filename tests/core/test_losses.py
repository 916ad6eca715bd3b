import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.core.losses import linear_cross_entropy


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(2, 11), st.integers(1, 12))
def test_loss_and_gradients_equal_all_logits_at_once(tokens, dim, vocabulary, chunk):
    generator = torch.Generator().manual_seed(tokens * 100 + vocabulary)
    hidden = torch.randn(tokens, dim, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, dim, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.1
    a = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    b = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    found = linear_cross_entropy(*a, targets, weights, chunk)
    each = torch.nn.functional.cross_entropy(b[0] @ b[1].T, targets, reduction="none")
    want = (each * weights).sum() / weights.sum()
    (3 * found).backward()
    (3 * want).backward()
    assert found.item() == pytest.approx(want.item(), rel=1e-5)
    for x, y in zip(a, b):
        assert torch.allclose(x.grad, y.grad, atol=1e-6)


def test_tokens_of_weight_0_do_not_count():
    hidden, weight = torch.randn(4, 3), torch.randn(7, 3)
    targets = torch.tensor([1, 2, 3, 4])
    some = linear_cross_entropy(hidden, weight, targets, torch.tensor([1.0, 0, 1, 0]))
    only = linear_cross_entropy(hidden[[0, 2]], weight, targets[[0, 2]])
    assert float(some) == pytest.approx(float(only), rel=1e-5)


def test_what_cannot_work_is_refused():
    hidden, weight, targets = torch.randn(2, 3), torch.randn(7, 3), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="chunk"):
        linear_cross_entropy(hidden, weight, targets, chunk=0)
    with pytest.raises(ValueError, match="nothing"):
        linear_cross_entropy(hidden, weight, targets, torch.zeros(2))
