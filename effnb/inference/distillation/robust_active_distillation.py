r"""Robust active distillation: which inputs to send to a teacher that is sometimes wrong.

A budget allows b questions. The inputs of which the student is least sure, with gain
$g_i = 1 - \text{margin}_i$, teach most, and are those on which the teacher errs too. So the choice
is a game: one draws inputs with probabilities q, an adversary makes the teacher wrong on k of them,

$$\max_{q \in \Delta} \min_{|S| = k} \Bigl( \sum_{i \notin S} q_i g_i - \sum_{i \in S} q_i g_i
  \Bigr).$$

With $g_1 \ge g_2 \ge \dots$ and $H_I = \sum_{i \le I} 1 / g_i$ its solution is exact:

$$I^* = \arg\max_{I > 2k} \frac{I - 2k}{H_I}, \qquad q_i = \frac{1 / g_i}{H_{I^*}} \text{ for }
  i \le I^*, \qquad \text{value } \frac{I^* - 2k}{H_{I^*}}.$$

All $q_i g_i$ of the chosen ones are equal, so that the adversary has no favourite. The student's
margin is taken, not the teacher's, which would need the questions already asked.

Baykal, Trinh, Iliopoulos, Menghani, Vee, "Robust Active Distillation", ICLR 2023, arXiv 2210.01213;
solution derived here for this form of the game.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from effnb.inference.distillation.weighted_distillation import top_margin


@dataclass(frozen=True)
class RobustChoice:
    """The solution of the game.

    Attributes:
        probabilities: q, in the order of the gains.
        value: What is gained at least, whichever k answers are wrong.
        support: $I^*$, how many inputs are ever drawn.
    """

    probabilities: Float[Tensor, " inputs"] = field(repr=False)
    value: float
    support: int


def information_gain(student: Float[Tensor, "inputs classes"]) -> Float[Tensor, " inputs"]:
    r"""$g_i = 1 - (q_{(1)} - q_{(2)})$: 1 minus the student's margin between its two best classes.

    Never quite 0: the game divides by it.
    """
    return (1 - top_margin(student.cpu().double())).clamp(min=1e-9)


def robust_choice(gains: Float[Tensor, " inputs"], wrong: int) -> RobustChoice:
    """Solve the game exactly.

    Args:
        gains: g, each above 0.
        wrong: k, on how many inputs the teacher may err. Its error rate times their number is a
            natural choice.

    Raises:
        ValueError: Gains that are not above 0, or a k below 0 or of at least half the inputs, where
            every choice loses.
    """
    g = gains.cpu().double()
    if g.ndim != 1 or bool(((g <= 0) | ~g.isfinite()).any()):
        raise ValueError("gains must be finite numbers above 0, one for each input.")
    if not 0 <= 2 * wrong < len(g):
        raise ValueError(
            f"wrong is {wrong}; it must be at least 0 and less than half of the {len(g)} inputs."
        )
    order = g.argsort(descending=True, stable=True)
    harmonic = (1 / g[order]).cumsum(0)  # $H_I = \sum_{i \le I} 1 / g_i$
    size = torch.arange(1, len(g) + 1, dtype=g.dtype)
    # $(I - 2k) / H_I$ for $I > 2k$
    value = torch.where(size > 2 * wrong, (size - 2 * wrong) / harmonic, -torch.inf)
    best = int(value.argmax())
    q = torch.zeros_like(g)
    chosen = order[: best + 1]
    q[chosen] = (1 / g[chosen]) / harmonic[best]  # $q_i = (1 / g_i) / H_{I^*}$
    return RobustChoice(q, float(value[best]), best + 1)


def game_value(
    probabilities: Float[Tensor, " inputs"], gains: Float[Tensor, " inputs"], wrong: int
) -> float:
    r"""What a choice gains when the adversary answers best: $\sum q g$ minus twice its k largest.

    Raises:
        ValueError: A k below 0 or above the number of inputs.
    """
    if not 0 <= wrong <= len(gains):
        raise ValueError(f"wrong is {wrong}; it must lie between 0 and {len(gains)}.")
    worth = probabilities.cpu().double() * gains.cpu().double()
    return float(worth.sum() - 2 * worth.topk(wrong).values.sum())


def draw(
    choice: RobustChoice, budget: int, *, generator: torch.Generator | None = None
) -> Int[Tensor, " budget"]:
    """Which inputs to ask about: drawn one after another without replacement.

    After every draw the probabilities of the rest are scaled up to 1. When the budget is larger
    than the support, all of it is asked, and the rest drawn evenly from the other inputs.

    Args:
        choice: The game's solution.
        budget: How many inputs, at least 1 and at most all.
        generator: Where the draws come from.

    Raises:
        ValueError: A budget that does not fit.
    """
    q = choice.probabilities
    if not 1 <= budget <= len(q):
        raise ValueError(f"budget is {budget}; it must lie between 1 and {len(q)}.")
    drawn = torch.multinomial(
        q, min(budget, choice.support), replacement=False, generator=generator
    )
    if budget > choice.support:
        others = (q == 0).double()
        more = torch.multinomial(others, budget - choice.support, generator=generator)
        drawn = torch.cat([drawn, more])
    return drawn


def margin_sampling(gains: Float[Tensor, " inputs"], budget: int) -> Int[Tensor, " budget"]:
    """The inputs with the largest gains: what a choice that trusts its teacher asks.

    Raises:
        ValueError: A budget that does not fit.
    """
    if not 1 <= budget <= len(gains):
        raise ValueError(f"budget is {budget}; it must lie between 1 and {len(gains)}.")
    return gains.argsort(descending=True, stable=True)[:budget]
