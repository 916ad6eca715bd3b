import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.core.muon import NEWTON_SCHULZ, Muon, hidden_matrices, orthogonalize


def quintic(s, steps):
    """What the iteration does to one singular value."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return s


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 7), st.integers(0, 2**16))
def test_each_singular_value_follows_the_quintic_and_its_vectors_stay(rows, columns, steps, seed):
    G = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    want = U @ torch.diag(quintic(s / s.norm(), steps)) @ Vh
    found = orthogonalize(G, steps, torch.float64)
    assert torch.allclose(found, want, atol=1e-8)
    assert found.shape == G.shape


def test_after_five_steps_all_directions_are_about_as_long():
    G = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    before = torch.linalg.svdvals(G)
    after = torch.linalg.svdvals(orthogonalize(G))
    assert before.max() / before.min() > 5
    assert 0.6 < after.min() < after.max() < 1.3


def test_a_step_is_the_equation_written_out():
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(6, 3, dtype=torch.float64))
    optimizer = Muon([W], lr=0.1, momentum=0.9, weight_decay=0.2, dtype=torch.float64)
    M, want = torch.zeros_like(W), W.detach().clone()
    for _ in range(3):
        G = torch.randn(6, 3, dtype=torch.float64)
        W.grad = G.clone()
        optimizer.step()
        M = 0.9 * M + 0.1 * G
        U, s, Vh = torch.linalg.svd(0.1 * G + 0.9 * M, full_matrices=False)
        update = U @ torch.diag(quintic(s / s.norm(), 5)) @ Vh
        want = (1 - 0.1 * 0.2) * want - 0.1 * math.sqrt(6 / 3) * update
    assert torch.allclose(W.detach(), want, atol=1e-10)


def test_the_scale_of_the_gradient_does_not_matter():
    steps = []
    for scale in (1.0, 1e-3, 1e4):
        W = nn.Parameter(torch.eye(4))
        W.grad = scale * torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
        Muon([W], lr=0.1).step()
        steps.append(W.detach() - torch.eye(4))
    assert torch.allclose(steps[0], steps[1], atol=1e-5)
    assert torch.allclose(steps[0], steps[2], atol=1e-5)


def test_a_gradient_of_zeros_moves_nothing():
    W = nn.Parameter(torch.eye(4))
    W.grad = torch.zeros(4, 4)
    Muon([W], lr=0.1).step()
    assert torch.equal(W.detach(), torch.eye(4))


def test_a_matrix_without_a_gradient_stays():
    W = nn.Parameter(torch.eye(4))
    Muon([W], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(W.detach(), torch.eye(4))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.inner = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


def test_heads_embeddings_and_frozen_layers_are_not_hidden_matrices():
    model = Tied()
    assert [id(w) for w in hidden_matrices(model)] == [id(model.inner.weight)]
    model.head.weight = nn.Parameter(torch.zeros(10, 4))
    model.get_output_embeddings = lambda: model.head
    assert [id(w) for w in hidden_matrices(model)] == [id(model.inner.weight)]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"lr": 0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -1}, "weight_decay"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        Muon([nn.Parameter(torch.eye(2))], **arguments)


def test_only_matrices_are_taken():
    with pytest.raises(ValueError, match="AdamW"):
        Muon([nn.Parameter(torch.ones(3))])
    with pytest.raises((ValueError, TypeError)):  # tests check the shapes of signatures first
        orthogonalize(torch.ones(3))
    with pytest.raises(ValueError, match="steps"):
        orthogonalize(torch.eye(3), steps=0)
