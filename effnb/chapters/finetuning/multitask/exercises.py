"""The exercises of the chapter on many tasks: references, cases, and mistakes with diagnoses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.lab import Exercise


def rates(sizes: Sequence[int], cap: int, temperature: float) -> list[float]:
    r"""$\min(e_m, K)^{1/T}$, divided by its sum over the tasks."""
    powers = [min(size, cap) ** (1 / temperature) for size in sizes]
    return [power / sum(powers) for power in powers]


def _by(power: Callable[[int, int, float], float]) -> Callable[..., list[float]]:
    def wrong(sizes: Sequence[int], cap: int, temperature: float) -> list[float]:
        powers = [power(size, cap, temperature) for size in sizes]
        return [one / math.fsum(powers) for one in powers]

    return wrong


mixing = Exercise(
    "Mix the tasks",
    minutes=5,
    difficulty="easy",
    reference=rates,
    cases=[
        ([100, 4], 1000, 2.0),
        ([900, 400, 25], 400, 2.0),
        ([8, 8, 1], 64, 3.0),
        ([5, 1], 2, 1.0),
    ],
    wrong={
        "The exponent is 1 / T: a larger temperature draws the parts together": _by(
            lambda size, cap, t: min(size, cap) ** t
        ),
        "The cap limits the number of examples; it comes before the power": _by(
            lambda size, cap, t: min(size ** (1 / t), cap)
        ),
        "The temperature is missing": _by(lambda size, cap, t: min(size, cap)),
        "The cap is missing": _by(lambda size, cap, t: size ** (1 / t)),
        "The parts have to add up to 1: divide by their sum": lambda sizes, cap, t: [
            min(size, cap) ** (1 / t) for size in sizes
        ],
    },
)


def length_normalized(beta: Float[Tensor, " answers"], right: int) -> Float[Tensor, ""]:
    r"""$-\log$ of the softmax of $\beta$ at the right answer."""
    return torch.logsumexp(beta, 0) - beta[right]


ranking = Exercise(
    "Put the right answer ahead",
    minutes=10,
    difficulty="medium",
    reference=length_normalized,
    cases=[
        (torch.tensor([-0.15, -1.1667, -3.0]), 0),
        (torch.tensor([-2.0, -0.5]), 0),
        (torch.tensor([-1.0, -1.0, -2.0, -4.0]), 3),
    ],
    wrong={
        "That is the first loss: the wrong answers do not take part": lambda b, right: -b[right],
        "The right answer belongs to the sum below the fraction too": lambda b, right: (
            torch.logsumexp(torch.cat([b[:right], b[right + 1 :]]), 0) - b[right]
        ),
        "This is the probability; the loss is minus its logarithm": lambda b, right: b.softmax(0)[
            right
        ],
        "The sign is turned: a loss falls when the right answer gets ahead": lambda b, right: (
            b[right] - torch.logsumexp(b, 0)
        ),
    },
    atol=1e-4,
)


def calibrated(
    p: Float[Tensor, "texts labels"], nothing: Float[Tensor, "inputs labels"]
) -> list[int]:
    r"""The label with the largest $\hat p / \hat p_{cf}$, where $\hat p_{cf}$ is a mean."""
    preference = (nothing / nothing.sum(1, keepdim=True)).mean(0)
    return (p / preference).argmax(1).tolist()


_TEXTS = torch.tensor([[0.60, 0.40], [0.80, 0.20], [0.30, 0.70], [0.68, 0.32]])
_THREE = torch.tensor([[0.50, 0.30, 0.20], [0.30, 0.45, 0.25], [0.55, 0.25, 0.20]])


calibration = Exercise(
    "Ask about nothing",
    minutes=15,
    difficulty="medium",
    reference=calibrated,
    cases=[
        (_TEXTS, torch.tensor([[0.07, 0.03], [0.06, 0.04]])),
        (_TEXTS, torch.tensor([[0.10, 0.30], [0.009, 0.001]])),
        (_THREE, torch.tensor([[0.60, 0.30, 0.10], [0.50, 0.20, 0.30]])),
    ],
    wrong={
        "Nothing has changed: divide by what the prompt says of nothing": lambda p, nothing: (
            p.argmax(1).tolist()
        ),
        "Divide, do not multiply: what the prompt prefers anyway has to count less": (
            lambda p, nothing: (
                (p * (nothing / nothing.sum(1, keepdim=True)).mean(0)).argmax(1).tolist()
            )
        ),
        "Normalize each row of `nothing` before the mean: likely words outweigh the others": (
            lambda p, nothing: (p / nothing.mean(0)).argmax(1).tolist()
        ),
        "Average over the inputs without content; this uses the first alone": lambda p, nothing: (
            (p / nothing[0]).argmax(1).tolist()
        ),
    },
)
