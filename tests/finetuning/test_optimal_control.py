"""Pontryagin's conditions, by hand, by automatic differentiation and on a language model."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from zoo import make

from effnb.finetuning.optimal_control import (
    ControlProblem,
    by_backpropagation,
    hamiltonian_gradients,
    steer_blocks,
    successive_approximations,
)

F64 = {"dtype": torch.float64}


def net(steps=4, width=3, weight=0.1, seed=0):
    """Residual tanh blocks with a bias as control, in float64, and a target to reach."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(width, width, generator=generator, **F64) for _ in range(steps)]
    target = torch.randn(width, generator=generator, **F64)
    start = torch.randn(2, width, generator=generator, **F64)
    problem = ControlProblem(
        tuple(lambda x, u, w=w: x + torch.tanh(x @ w.T + u) for w in matrices),
        start,
        lambda x: (x - target).square().sum() / 2,
        weight,
    )
    return problem, tuple(torch.randn(width, generator=generator, **F64) for _ in range(steps))


def test_a_scalar_system_solved_by_hand():
    r"""$x_{t+1} = a x_t + u_t$ with $\Phi = (x_T - c)^2/2$: $u_t = a^{T-1-t} e / \lambda$."""
    a, c, weight, steps, first = 2.0, 5.0, 0.5, 3, 1.0
    problem = ControlProblem(
        (lambda x, u: a * x + u,) * steps,
        torch.tensor(first, **F64),
        lambda x: (x - c).square() / 2,
        weight,
    )
    zero = (torch.zeros((), **F64),) * steps
    powers = [a ** (steps - 1 - t) for t in range(steps)]
    # x_T = a^T x_0 + sum_t a^(T-1-t) u_t, and u_t = a^(T-1-t) p / λ with p = c - x_T.
    gain = sum(k * k for k in powers) / weight
    p = (c - a**steps * first) / (1 + gain)
    for solve in (successive_approximations, by_backpropagation):
        found = solve(problem, zero, rounds=200, tolerance=1e-15)
        for u, k in zip(found.controls, powers, strict=True):
            assert abs(float(u) - k * p / weight) < 1e-6
        assert found.residual < 1e-6
    states = problem.states(found.controls)
    costates = problem.costates(states, found.controls)
    assert [round(float(q) / p, 6) for q in costates] == [a**3, a**2, a, 1.0]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 50))
@examples(max_examples=25, deadline=None)
def test_costates_are_what_back_propagation_carries(steps, width, seed):
    problem, controls = net(steps, width, seed=seed)
    inputs = [u.clone().requires_grad_() for u in controls]
    expected = torch.autograd.grad(problem.cost(inputs), inputs)
    for found, want in zip(hamiltonian_gradients(problem, controls), expected, strict=True):
        torch.testing.assert_close(found, -want, atol=1e-12, rtol=1e-12)
    states = problem.states(controls)
    p = problem.costates(states, controls)
    assert [q.shape for q in p] == [x.shape for x in states]
    start = problem.start.clone().requires_grad_()
    again = ControlProblem(problem.steps, start, problem.terminal, problem.weight)
    (gradient,) = torch.autograd.grad(again.cost(controls), start)
    torch.testing.assert_close(p[0], -gradient, atol=1e-12, rtol=1e-12)


def test_both_ways_end_at_the_same_controls():
    problem, controls = net(weight=2.0)
    zero = tuple(torch.zeros_like(u) for u in controls)
    one = successive_approximations(problem, zero, rounds=150, tolerance=1e-13)
    two = by_backpropagation(problem, zero, rounds=50, tolerance=1e-14)
    assert one.costs[-1] < 0.9 * one.costs[0]
    assert all(b <= a for a, b in pairwise(one.costs))
    assert max(one.residual, two.residual) < 1e-4
    for u, v in zip(one.controls, two.controls, strict=True):
        torch.testing.assert_close(u, v, atol=1e-4, rtol=1e-4)


def test_undamped_jumps_would_raise_the_cost():
    """Why the method is damped: one exact maximization from 0 overshoots."""
    problem, controls = net(weight=0.02)
    u = tuple(torch.zeros_like(v) for v in controls)
    jump = successive_approximations(problem, u, rounds=1, damping=1e-9)
    assert jump.costs[-1] <= jump.costs[0]  # ρ grew until the cost fell
    states = problem.states(u)
    p = problem.costates(states, u)
    far = tuple(
        torch.linspace(-40, 40, 801, **F64)[
            torch.stack([
                problem.hamiltonian(t, states[t], p[t + 1], torch.full_like(u[t], float(v)))
                for v in torch.linspace(-40, 40, 801)
            ]).argmax()
        ].expand_as(u[t])
        for t in range(len(u))
    )  # fmt: skip
    assert float(problem.cost(far)) > jump.costs[0]


def test_blocks_of_a_language_model():
    """The uncontrolled system costs the model's loss; its gradients are those of biases."""
    model = make("llama").double()
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    problem, zero = steer_blocks(model, batch, weight=0.3)
    loss = torch.nn.functional.cross_entropy(
        model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(problem.cost(zero), loss, atol=1e-6, rtol=1e-6, check_dtype=False)
    found = successive_approximations(problem, zero, rounds=30, damping=0.3)
    assert found.costs[-1] < found.costs[0] - 0.1
    same = by_backpropagation(problem, zero, rounds=20)
    assert abs(found.costs[-1] - same.costs[-1]) < 0.05 * (found.costs[0] - same.costs[-1])
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bad_input():
    problem, controls = net()
    with pytest.raises(ValueError, match="at least one step"):
        ControlProblem((), problem.start, problem.terminal)
    with pytest.raises(ValueError, match=r"weight is -1; it must be at least 0\."):
        ControlProblem(problem.steps, problem.start, problem.terminal, -1)
    with pytest.raises(ValueError, match="3 controls and 4 steps"):
        problem.states(controls[:3])
    with pytest.raises(ValueError, match="damping is 0"):
        successive_approximations(problem, controls, damping=0)
    with pytest.raises(ValueError, match="rounds is 0"):
        by_backpropagation(problem, controls, rounds=0)
    with pytest.raises(ValueError, match="tolerance is -1"):
        by_backpropagation(problem, controls, tolerance=-1)
    bad = tuple(u * float("nan") for u in controls)
    with pytest.raises(ValueError, match="cost must be finite"):
        successive_approximations(problem, bad)
    with pytest.raises(ValueError, match="no input_ids"):
        steer_blocks(make("llama"), {})


def test_a_jump_across_the_valley_is_no_end():
    """From 3/2 to 1/2 for both controls the cost stays 9/4; the lowest is 3/2, at 1."""
    walk = ControlProblem(
        (lambda x, u: x + u, lambda x, u: x + u),
        torch.tensor(0.0),
        lambda x: 0.5 * (x - 3) ** 2,
        weight=1.0,
    )
    found = successive_approximations(walk, (torch.tensor(0.0), torch.tensor(0.0)))
    assert [float(u) for u in found.controls] == pytest.approx([1.0, 1.0], abs=1e-3)
    assert found.costs[-1] == pytest.approx(1.5, abs=1e-5)
