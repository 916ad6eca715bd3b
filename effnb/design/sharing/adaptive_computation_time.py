r"""Adaptive computation time: every position decides after how many steps it has thought enough.

After step $s$ a position in state $h_s$ halts with probability $p_s = \sigma(w \cdot h_s + b)$. It
takes $N$ steps, the least number for which $\sum_{s \le N} p_s \ge 1 - \varepsilon$, and at most
$S$. What is left over, $R = 1 - \sum_{s < N} p_s$, is the weight of its last step:

$$\text{output} = \sum_{s < N} p_s h_s + R\, h_N, \qquad \text{ponder cost} = N + R.$$

The weights add up to 1. A position that has halted keeps its last state, which others still read.

Graves, "Adaptive Computation Time for Recurrent Neural Networks", 2016, arXiv 1603.08983, eq. 5 to
13; as used by Dehghani, Gouws, Vinyals, Uszkoreit, Kaiser, "Universal Transformers", ICLR 2019,
arXiv 1807.03819.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from effnb.design.attention.checks import check_count


@dataclass(frozen=True)
class Halting:
    """What came of a run.

    Attributes:
        output: The weighted states.
        weights: Weight of each step; they add up to 1 at each position.
        steps: N at each position, from 1 to S.
        remainder: R at each position, in (0, 1].
    """

    output: Float[Tensor, "batch time dim"]
    weights: Float[Tensor, "batch time steps"]
    steps: Int[Tensor, "batch time"]
    remainder: Float[Tensor, "batch time"]

    @property
    def ponder_cost(self) -> Float[Tensor, "batch time"]:
        """N + R; its gradient is R's, because N moves in jumps."""
        return self.steps + self.remainder


def check_epsilon(epsilon: float) -> float:
    """Refuse what leaves no step or all of them.

    Raises:
        ValueError: Outside (0, 1).
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon is {epsilon}; it must lie between 0 and 1, both excluded.")
    return epsilon


def adaptive_computation_time(
    state: Float[Tensor, "batch time dim"],
    step: Callable[[Tensor, int], Tensor],
    halting: Callable[[Tensor], Tensor],
    *,
    max_steps: int,
    epsilon: float = 0.01,
) -> Halting:
    """Apply a step until every position has halted.

    Args:
        state: h_0.
        step: From (state, number of the step from 0) to the next state of every position.
        halting: From a state to p, (batch, time), between 0 and 1.
        max_steps: S; the positions that are left halt there.
        epsilon: So that a single step can be enough although p stays below 1.

    Raises:
        ValueError: No step, or an epsilon outside (0, 1).
    """
    check_count("max_steps", max_steps)
    check_epsilon(epsilon)
    total = state.new_zeros(state.shape[:-1])
    running = torch.ones_like(total, dtype=torch.bool)
    output = torch.zeros_like(state)
    steps = torch.zeros_like(total, dtype=torch.long)
    remainder = torch.zeros_like(total)
    weights: list[Tensor] = []
    for s in range(max_steps):
        state = torch.where(running[..., None], step(state, s), state)  # the halted are copied
        p = halting(state)
        last = torch.full_like(running, s == max_steps - 1)
        halts = running & ((total + p >= 1 - epsilon) | last)
        rest = 1 - total  # R = 1 - sum_{s<N} p_s
        weight = torch.where(halts, rest, p) * running
        output = output + weight[..., None] * state  # sum_s p_s h_s
        weights.append(weight)
        remainder = torch.where(halts, rest, remainder)
        steps = steps + running
        total = total + weight
        running = running & ~halts
        if not bool(running.any()):
            break
    return Halting(output, torch.stack(weights, -1), steps, remainder)
