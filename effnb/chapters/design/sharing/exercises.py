"""The exercises of the chapter on sharing: references, cases, and mistakes with diagnoses."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.lab import Exercise


def largest_e(tokens: int, hidden: int, kept: float) -> int:
    r"""$\lfloor \rho V d / (V + d) \rfloor$."""
    return int(kept * tokens * hidden / (tokens + hidden))


size = Exercise(
    "The width of a factorized embedding",
    minutes=5,
    difficulty="easy",
    reference=largest_e,
    cases=[(4096, 64, 0.5), (30_000, 768, 0.25), (49_152, 576, 0.3), (1000, 1000, 1.0)],
    wrong={
        "The second factor, E x d, counts as well": lambda V, d, kept: int(kept * d),
        "Round down: one more channel is over the budget": (
            lambda V, d, kept: math.ceil(kept * V * d / (V + d) + 1e-9)
        ),
        "Both factors have E rows or columns: divide by V + d, not by V": (
            lambda V, d, kept: int(kept * V * d / V) + 1
        ),
    },
)


def halting_weights(p: Float[Tensor, " steps"], epsilon: float) -> Float[Tensor, " steps"]:
    """Halting probabilities up to the step at which their sum is enough, and the remainder."""
    total, weights = 0.0, []
    for s, one in enumerate(p.tolist(), 1):
        if total + one >= 1 - epsilon or s == len(p):
            weights.append(1 - total)
            break
        weights.append(one)
        total += one
    return torch.tensor(weights + [0.0] * (len(p) - len(weights)))


def _no_remainder(p, epsilon):
    found = halting_weights(p, epsilon)
    last = int(found.nonzero().max())
    found[last] = p[last]
    return found


def _softmax(p, epsilon):
    return p / p.sum()


def _late(p, epsilon):
    total, weights = 0.0, []
    for s, one in enumerate(p.tolist(), 1):
        if total >= 1 - epsilon or s == len(p):
            weights.append(1 - total)
            break
        weights.append(min(one, 1 - total))
        total += weights[-1]
    return torch.tensor(weights + [0.0] * (len(p) - len(weights)))


halting = Exercise(
    "The weights of the steps",
    minutes=15,
    difficulty="medium",
    reference=halting_weights,
    cases=[
        (torch.tensor([0.2, 0.5, 0.4, 0.9]), 0.01),
        (torch.tensor([0.995, 0.5]), 0.01),
        (torch.tensor([0.1, 0.1, 0.1]), 0.01),
        (torch.tensor([0.6, 0.36, 0.7]), 0.05),
    ],
    wrong={
        "The last step gets the remainder, not its own probability: the weights add up to 1": (
            _no_remainder
        ),
        "Steps after the halt have no weight, and the others keep their probabilities": _softmax,
        "A step whose probability completes the sum is the last one": _late,
    },
)


def crossing(width: int, latents: int, layers: int) -> int:
    r"""The least M with $L M^2 > M N + L N^2$."""
    M = 1
    while layers * M * M <= M * latents + layers * latents * latents:
        M += 1
    return M


cross = Exercise(
    "When do latents pay?",
    minutes=10,
    difficulty="hard",
    reference=crossing,
    cases=[(64, 64, 8), (64, 256, 1), (512, 16, 4), (64, 1, 1)],
    wrong={
        "The input has to be read once: count the M N pairs of the cross-attention": (
            lambda width, N, L: N + 1
        ),
        "The input is read once, not in every layer": (
            lambda width, N, L: next(M for M in range(1, 10_000) if M * M > M * N + N * N)
        ),
        "At that length both compare as many pairs or the Perceiver more: go on by one": (
            lambda width, N, L: crossing(width, N, L) - 1
        ),
    },
)
