r"""Delta tuning as optimal control: deltas steer the states of a frozen network.

A network's blocks are a dynamical system in discrete time, and what is trained is its control:

$$x_{t+1} = f_t(x_t, u_t), \qquad \min_u\ J(u) = \Phi(x_T) + \sum_t R(u_t), \qquad
  R(u) = \tfrac{\lambda}{2} \lVert u \rVert^2 .$$

With the Hamiltonian $H_t(x, p, u) = p \cdot f_t(x, u) - R(u)$, a solution satisfies Pontryagin's
conditions: the states run forward, the *costates* backward, and each control maximizes its own
Hamiltonian while everything else stands still,

$$p_T = -\frac{\partial \Phi}{\partial x_T}, \qquad
  p_t = \Bigl(\frac{\partial f_t}{\partial x_t}\Bigr)^{\!\top} p_{t+1}, \qquad
  u_t = \operatorname*{arg\,max}_u H_t(x_t, p_{t+1}, u).$$

The *method of successive approximations* repeats just that. Costates are what back-propagation
carries, $p_t = -\partial J / \partial x_t$, and $\partial H_t / \partial u_t = -\partial J /
\partial u_t$: with one gradient step in place of the maximum, the method is gradient descent.

Ding et al., "Parameter-efficient fine-tuning of large-scale pre-trained language models", 2023, doi
10.1038/s42256-023-00626-4; Pontryagin et al., "The Mathematical Theory of Optimal Processes", 1962;
Chernousko, Lyubushin, "Method of successive approximations for solution of optimal control
problems", 1982.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effnb.core.calibration import main_output
from effnb.core.deltas import freeze
from effnb.core.modules import find_blocks, refuse_encoder_decoder
from effnb.core.passage import Arguments
from effnb.core.training import next_token_loss

Step = Callable[[Tensor, Tensor], Tensor]
Controls = tuple[Tensor, ...]


@dataclass(frozen=True)
class ControlProblem:
    r"""A system to steer, and what a solution costs.

    Attributes:
        steps: $f_0, \dots, f_{T-1}$: from a state and a control to the next state, both of any
            shape. They must be differentiable, and draw nothing at random.
        start: $x_0$.
        terminal: $\Phi$, from the last state to a number.
        weight: $\lambda$, the price of a control, at least 0.
    """

    steps: tuple[Step, ...]
    start: Tensor
    terminal: Callable[[Tensor], Tensor]
    weight: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no problem.

        Raises:
            ValueError: No step, or a price below 0.
        """
        if not self.steps:
            raise ValueError("a control problem has at least one step.")
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight is {self.weight}; it must be at least 0.")

    def states(self, controls: Sequence[Tensor]) -> tuple[Tensor, ...]:
        r"""$x_0, \dots, x_T$.

        Raises:
            ValueError: When there is not one control for each step.
        """
        if len(controls) != len(self.steps):
            raise ValueError(
                f"there are {len(controls)} controls and {len(self.steps)} steps; they must be as "
                "many."
            )
        found = [self.start]
        for f, u in zip(self.steps, controls, strict=True):
            found.append(f(found[-1], u))  # $x_{t+1} = f_t(x_t, u_t)$
        return tuple(found)

    def price(self, control: Tensor) -> Tensor:
        r"""$R(u) = \frac{\lambda}{2} \lVert u \rVert^2$."""
        return self.weight / 2 * control.square().sum()

    def cost(self, controls: Sequence[Tensor]) -> Tensor:
        r"""$J(u) = \Phi(x_T) + \sum_t R(u_t)$."""
        return self.terminal(self.states(controls)[-1]) + sum(self.price(u) for u in controls)

    def costates(self, states: Sequence[Tensor], controls: Sequence[Tensor]) -> tuple[Tensor, ...]:
        r"""$p_0, \dots, p_T$, backward from the last state, one step at a time."""
        with torch.enable_grad():
            last = states[-1].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.terminal(last), last)
            p = [-gradient]  # $p_T = -\partial \Phi / \partial x_T$
            for f, x, u in reversed(list(zip(self.steps, states[:-1], controls, strict=True))):
                x = x.detach().requires_grad_()
                # $p_t = (\partial f_t / \partial x_t)^\top p_{t+1}$
                (before,) = torch.autograd.grad(f(x, u.detach()), x, p[-1])
                p.append(before)
        return tuple(reversed(p))

    def hamiltonian(self, t: int, state: Tensor, costate: Tensor, control: Tensor) -> Tensor:
        r"""$H_t(x_t, p_{t+1}, u) = p_{t+1} \cdot f_t(x_t, u) - R(u)$."""
        return (costate * self.steps[t](state, control)).sum() - self.price(control)


def hamiltonian_gradients(problem: ControlProblem, controls: Sequence[Tensor]) -> Controls:
    r"""$\partial H_t / \partial u_t$ along the path, equal to $-\partial J / \partial u_t$."""
    with torch.no_grad():
        x = problem.states(controls)
    p = problem.costates(x, controls)
    found = []
    with torch.enable_grad():
        for t, u in enumerate(controls):
            u = u.detach().requires_grad_()
            found += torch.autograd.grad(problem.hamiltonian(t, x[t], p[t + 1], u), u)
    return tuple(found)


@dataclass(frozen=True)
class ControlSolution:
    r"""Controls, and how they were found.

    Attributes:
        controls: One for each step.
        costs: J before the first round and after each.
        residual: The largest entry of any $\\partial H_t / \\partial u_t$ at the end; 0 at a
            stationary point.
    """

    controls: Controls
    costs: tuple[float, ...]
    residual: float


def successive_approximations(
    problem: ControlProblem,
    controls: Sequence[Tensor],
    *,
    rounds: int = 50,
    damping: float = 1.0,
    tolerance: float = 1e-9,
    inner: int = 10,
) -> ControlSolution:
    r"""Maximize each control's Hamiltonian in turn with the path, until the cost stands still.

    The exact maximum may jump beyond the region in which the costates are right, and the iteration
    then diverges. So each round maximizes $H_t(u) - \frac{\rho}{2} \lVert u - u^{old} \rVert^2$,
    and $\rho$ grows fourfold when the cost would not fall and shrinks again when it does.

    Args:
        problem: The system and its cost.
        controls: Where to start; they are not changed.
        rounds: Most rounds of forward, backward and maximization.
        damping: $\rho$ at the start, above 0.
        tolerance: The fall of the cost in a round at which to stop.
        inner: Most steps of L-BFGS in one maximization.

    Raises:
        ValueError: A number out of range, a cost that is not finite, or controls that do not fit.
    """
    _check(rounds, tolerance)
    if not (damping > 0 and math.isfinite(damping)):
        raise ValueError(f"damping is {damping}; it must be above 0.")
    controls = tuple(u.detach().clone() for u in controls)
    costs = [_cost(problem, controls)]
    rho = damping
    for _ in range(rounds):
        with torch.no_grad():
            x = problem.states(controls)
        p = problem.costates(x, controls)
        while rho < 1e12 * damping:
            new = tuple(
                _maximized(problem, t, x[t], p[t + 1], u, rho, inner)
                for t, u in enumerate(controls)
            )
            cost = _cost(problem, new, refuse=False)
            moved = max(float((v - u).abs().max()) for v, u in zip(new, controls, strict=True))
            # A jump across the valley to where it is as high gains nothing: jump less far.
            if cost < costs[-1] or (cost == costs[-1] and moved < 1e-6):
                break
            rho *= 4
        else:
            break  # no step helps: the controls are stationary to rounding
        controls, rho = new, rho / 2
        costs.append(cost)
        if costs[-2] - cost < tolerance:
            break
    return _solution(problem, controls, costs)


def _maximized(
    problem: ControlProblem, t: int, x: Tensor, p: Tensor, u: Tensor, rho: float, inner: int
) -> Tensor:
    r"""$\arg\max_v H_t(x_t, p_{t+1}, v) - \frac{\rho}{2} \lVert v - u \rVert^2$."""
    v = u.detach().clone().requires_grad_()

    def negative() -> Tensor:
        gain = problem.hamiltonian(t, x, p, v) - rho / 2 * (v - u).square().sum()
        return -gain

    _minimize([v], negative, inner)
    return v.detach()


def by_backpropagation(
    problem: ControlProblem,
    controls: Sequence[Tensor],
    *,
    rounds: int = 50,
    tolerance: float = 1e-9,
) -> ControlSolution:
    r"""Minimize $J(u)$ over all controls at once by L-BFGS on the gradients of back-propagation.

    Args:
        problem: The system and its cost.
        controls: Where to start; they are not changed.
        rounds: Most rounds, of up to 20 steps each.
        tolerance: The fall of the cost in a round at which to stop.

    Raises:
        ValueError: A number out of range, a cost that is not finite, or controls that do not fit.
    """
    _check(rounds, tolerance)
    found = [u.detach().clone().requires_grad_() for u in controls]
    costs = [_cost(problem, found)]
    for _ in range(rounds):
        _minimize(found, lambda: problem.cost(found), 20)
        costs.append(_cost(problem, found))
        if costs[-2] - costs[-1] < tolerance:
            break
    return _solution(problem, tuple(u.detach() for u in found), costs)


def _minimize(variables: list[Tensor], function: Callable[[], Tensor], steps: int) -> None:
    """L-BFGS on a few tensors, in place."""
    optimizer = torch.optim.LBFGS(
        variables, max_iter=steps, line_search_fn="strong_wolfe", tolerance_change=0
    )

    def closure() -> Tensor:
        value = function()
        for variable, gradient in zip(variables, torch.autograd.grad(value, variables)):
            variable.grad = gradient
        return value.detach()

    with torch.enable_grad():
        optimizer.step(closure)


@torch.no_grad()
def _cost(problem: ControlProblem, controls: Sequence[Tensor], *, refuse: bool = True) -> float:
    cost = float(problem.cost(controls))
    if refuse and not math.isfinite(cost):
        raise ValueError(f"the controls to start from cost {cost}; the cost must be finite.")
    return cost if math.isfinite(cost) else math.inf


def _check(rounds: int, tolerance: float) -> None:
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1.")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; it must be at least 0.")


def _solution(
    problem: ControlProblem, controls: Controls, costs: Sequence[float]
) -> ControlSolution:
    gradients = hamiltonian_gradients(problem, controls)
    return ControlSolution(controls, tuple(costs), max(float(g.abs().max()) for g in gradients))


def steer_blocks(
    model: nn.Module, batch: Mapping[str, Any], *, weight: float = 0.0
) -> tuple[ControlProblem, Controls]:
    r"""A language model's frozen blocks as a system whose controls are a vector behind each block.

    $f_t(x, u) = \text{block}_t(x) + u$, the same u for all tokens: a bias on the residual stream.
    $\Phi$ is the rest of the model (its last norm and its head) and the loss of the next tokens.

    Args:
        model: A decoder with one stack of blocks; it is not changed.
        batch: `input_ids`, and what else the model takes; `labels` as `next_token_loss` reads them.
        weight: $\lambda$.

    Returns:
        The problem, and controls of 0 to start from.

    Raises:
        ValueError: When the model has two stacks, or none, or the batch has no ids.
    """
    if "input_ids" not in batch:
        raise ValueError("the batch has no input_ids.")
    refuse_encoder_decoder(model, "steering the blocks")
    frozen = freeze(model).eval()
    _, blocks = find_blocks(frozen)
    given: dict[int, Arguments] = {}
    hooks = [
        block.register_forward_pre_hook(
            lambda _, arguments, keywords, t=t: (
                given.setdefault(t, Arguments.of(arguments, keywords)) and None
            ),
            with_kwargs=True,
        )
        for t, block in enumerate(blocks)
    ]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        frozen(**inputs)
    for hook in hooks:
        hook.remove()
    if len(given) < len(blocks) or not given[0].positional:
        raise ValueError(f"not every block of {type(model).__name__} is called with hidden states.")

    def step(t: int) -> Step:
        rest, keywords = given[t].positional[1:], given[t].keywords
        return lambda x, u: main_output(blocks[t](x, *rest, **keywords)) + u

    def terminal(x: Tensor) -> Tensor:
        def instead(_: nn.Module, __: tuple, output: Any) -> Any:
            return (x, *output[1:]) if isinstance(output, tuple) else x

        hook = blocks[-1].register_forward_hook(instead)
        try:
            return next_token_loss(frozen, batch)
        finally:
            hook.remove()

    start = given[0].positional[0].detach()
    controls = tuple(start.new_zeros(start.shape[-1]) for _ in blocks)
    steps = tuple(step(t) for t in range(len(blocks)))
    return ControlProblem(steps, start, terminal, weight), controls
