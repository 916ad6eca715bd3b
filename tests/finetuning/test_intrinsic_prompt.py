"""Intrinsic prompts: the linear auto-encoder finds the principal subspace; tuning stays in it."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from effnb.finetuning.intrinsic_prompt import (
    FEWEST_PROMPTS,
    IntrinsicPrompt,
    PromptSubspace,
    learn_subspace,
    principal_subspace,
    random_subspace,
    tune,
)


def planted(tasks=40, tokens=3, dim=4, rank=3, noise=0.05, seed=0):
    """Prompts near a plane of a few directions of unequal strength."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    directions = torch.linalg.qr(draw(tokens * dim, rank)).Q
    strengths = torch.arange(rank, 0, -1, dtype=torch.float64)
    flat = (draw(tasks, rank) * strengths) @ directions.T + noise * draw(tasks, tokens * dim) + 0.5
    return flat.view(tasks, tokens, dim), directions


def largest_angle(A, B):
    """Sine of the largest principal angle between the columns of two matrices."""
    A, B = torch.linalg.qr(A).Q, torch.linalg.qr(B).Q
    return float((A - B @ (B.T @ A)).norm())


def test_the_linear_auto_encoder_is_principal_components():
    prompts, directions = planted()
    learned = learn_subspace(prompts, 3, steps=1500, learning_rate=2e-2)
    exact = principal_subspace(prompts, 3)
    ours, theirs = learned.decoder[0].weight, exact.decoder[0].weight
    assert largest_angle(ours, theirs) < 1e-2
    assert largest_angle(theirs, directions) < 0.1
    assert largest_angle(random_subspace(prompts, 3, seed=7).decoder[0].weight, directions) > 0.5
    errors = [float((s(prompts) - prompts).square().mean()) for s in (exact, learned)]
    assert errors[0] <= errors[1] < 1.05 * errors[0]


def test_learning_can_begin_at_the_principal_subspace():
    """Its error is the least already: one step of a small rate hardly moves it."""
    prompts, _ = planted()
    exact = principal_subspace(prompts, 3)
    before = exact.decoder[0].weight.clone()
    learned = learn_subspace(prompts, 3, start=exact, steps=1, learning_rate=1e-6)
    torch.testing.assert_close(learned.decoder[0].weight, before, atol=1e-5, rtol=0)
    assert torch.equal(exact.decoder[0].weight, before)
    with pytest.raises(ValueError, match="start is a subspace of 3 numbers"):
        learn_subspace(prompts, 2, start=exact)


def test_principal_components_by_the_eigenvalues():
    """The error that is left is the sum of the eigenvalues that were left out."""
    prompts, _ = planted(noise=0.5)
    flat = prompts.flatten(1) - prompts.flatten(1).mean(0)
    values = torch.linalg.eigvalsh(flat.T @ flat)
    for d in (1, 4, 7):
        left = (principal_subspace(prompts, d)(prompts) - prompts).square().sum()
        torch.testing.assert_close(left, values[: len(values) - d].sum())


def test_the_tasks_losses_are_part_of_the_objective():
    """A task that sees one direction only makes the subspace turn towards it."""
    prompts, _ = planted(rank=2, noise=0.4)
    weak = torch.zeros(12, dtype=torch.float64)
    weak[0] = 1.0

    def error(subspace):
        return float((((subspace(prompts) - prompts).flatten(1) @ weak).square()).mean())

    seen = []

    def loss(task, prompt):
        seen.append(task)
        return 50 * ((prompt - prompts[task]).flatten() @ weak).square()

    plain = learn_subspace(prompts, 2, steps=300)
    told = learn_subspace(prompts, 2, steps=300, task_loss=loss)
    assert set(seen) == set(range(40))
    assert error(told) < 0.5 * error(plain)


def test_a_curved_subspace_needs_a_hidden_layer():
    angle = torch.linspace(-2, 2, 60, dtype=torch.float64)
    prompts = torch.stack([angle.sin(), angle.cos() * 2], 1).view(60, 1, 2)
    straight = principal_subspace(prompts, 1)
    curved = learn_subspace(prompts, 1, hidden=16, steps=1200, learning_rate=2e-2)
    error = [float((s(prompts) - prompts).square().mean()) for s in (straight, curved)]
    assert error[1] < 0.3 * error[0]
    assert not any(p.requires_grad for p in curved.parameters())


def test_tuning_moves_z_only_and_finds_the_best_point_of_the_subspace():
    prompts, _ = planted()
    subspace = principal_subspace(prompts, 3)
    before = {k: t.clone() for k, t in subspace.state_dict().items()}
    frozen = nn.Linear(12, 12).double()
    target, _ = planted(tasks=20, seed=9)
    goal = target[0]
    tuned = tune(subspace, lambda p: (p - goal).square().sum(), steps=400)
    # The nearest point of the subspace is the projection that the encoder computes.
    torch.testing.assert_close(tuned().detach(), subspace(goal), atol=1e-3, rtol=0)
    assert [n for n, _ in tuned.named_parameters()] == ["z"] and tuned.z.numel() == 3
    assert list(tuned.state_dict()) == ["z"]
    assert all(torch.equal(subspace.state_dict()[k], t) for k, t in before.items())
    tune(subspace, lambda p: frozen(p.flatten()).square().sum(), steps=2)
    assert all(p.grad is None for p in frozen.parameters())
    start = IntrinsicPrompt(subspace, prompts[4])
    torch.testing.assert_close(start(), subspace(prompts[4]))
    torch.testing.assert_close(IntrinsicPrompt(subspace)(), prompts.mean(0))


def test_a_learned_subspace_serves_a_new_task_better_than_a_random_one():
    """Twenty linear probes that share three directions; the twenty-first is new."""
    prompts, _ = planted(tasks=21, noise=0.02)
    loss = lambda p: (p - prompts[20]).square().sum()  # noqa: E731
    other = functools.partial(random_subspace, seed=7)
    found = {}
    for name, make in (("learned", principal_subspace), ("random", other)):
        tuned = tune(make(prompts[:20], 3), loss, steps=200)
        found[name] = float(loss(tuned()).detach())
    assert found["learned"] < 0.1 * found["random"]


@examples(max_examples=15)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_shapes(tokens, dim, d, deep):
    d = min(d, tokens * dim)
    subspace = PromptSubspace(tokens, dim, d, hidden=3 if deep else None)
    prompts = torch.randn(6, tokens, dim)
    assert subspace.encode(prompts).shape == (6, d)
    assert subspace(prompts).shape == prompts.shape
    assert IntrinsicPrompt(subspace)().shape == (tokens, dim)
    state = PromptSubspace(tokens, dim, d, hidden=3 if deep else None, seed=1)
    state.load_state_dict(subspace.state_dict())
    assert torch.equal(state(prompts), subspace(prompts))


def test_bad_input_is_one_sentence():
    prompts, _ = planted()
    few = prompts[: FEWEST_PROMPTS - 1]
    for function in (learn_subspace, principal_subspace, random_subspace):
        with pytest.raises(ValueError, match="19 training prompts are too few.*at least 20"):
            function(few, 2)
        for d in (0, 13):
            with pytest.raises(
                ValueError, match=f"dimension is {d}; 40 prompts of 12 numbers span"
            ):
                function(prompts, d)
    with pytest.raises(ValueError, match="span 1 to 19"):
        principal_subspace(torch.randn(20, 5, 8), 20)
    bad = prompts.clone()
    bad[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="the prompts has|NaN or infinite"):
        principal_subspace(bad, 2)
    with pytest.raises(ValueError, match="are the same, and span no subspace"):
        principal_subspace(torch.ones(20, 2, 2), 1)
    with pytest.raises(ValueError, match=r"steps \(0\) must be at least 1"):
        learn_subspace(prompts, 2, steps=0)
    with pytest.raises(ValueError, match="dimension is 9; a prompt of 2 tokens of 4 numbers"):
        PromptSubspace(2, 4, 9)
    with pytest.raises(ValueError, match="hidden is 0"):
        PromptSubspace(2, 4, 2, hidden=0)
    with pytest.raises(ValueError, match=r"learning_rate \(0\) above 0"):
        tune(principal_subspace(prompts, 2), lambda p: p.sum(), learning_rate=0)
    with pytest.raises(FloatingPointError, match="loss of the task is nan"):
        tune(principal_subspace(prompts, 2), lambda p: p.sum() * torch.nan)
