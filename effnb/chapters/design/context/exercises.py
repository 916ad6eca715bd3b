"""The exercises of the chapter on context: references, cases, and mistakes with diagnoses."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.lab import Exercise


def new_base(b: float, s: float, d: int) -> float:
    r"""$b' = b\, s^{d/(d-2)}$."""
    return b * s ** (d / (d - 2))


base = Exercise(
    "The base that divides the slowest by s",
    minutes=10,
    difficulty="easy",
    reference=new_base,
    cases=[(10_000.0, 4.0, 32), (10_000.0, 8.0, 128), (500_000.0, 2.0, 64), (10_000.0, 1.0, 16)],
    wrong={
        "The slowest pair is number d/2 - 1, not d/2: the exponent is a little above 1": (
            lambda b, s, d: b * s
        ),
        "The exponent is upside down": lambda b, s, d: b * s ** ((d - 2) / d),
        "A larger base makes slower frequencies: multiply, do not divide": (
            lambda b, s, d: b / s ** (d / (d - 2))
        ),
        "There are d/2 pairs: count pairs in both places, or numbers in both": (
            lambda b, s, d: b * s ** (d / (d / 2 - 1))
        ),
    },
    atol=1e-3,
)


def blend(
    theta: Float[Tensor, " half"], s: float, L: int, alpha: float, beta: float
) -> Float[Tensor, " half"]:
    r"""$(1 - \gamma)\,\theta / s + \gamma\,\theta$ with the ramp of the paper."""
    r = L * theta / (2 * math.pi)
    gamma = ((r - alpha) / (beta - alpha)).clamp(0, 1)
    return (1 - gamma) * theta / s + gamma * theta


def _without_clip(theta, s, L, alpha, beta):
    gamma = (L * theta / (2 * math.pi) - alpha) / (beta - alpha)
    return (1 - gamma) * theta / s + gamma * theta


def _exchanged(theta, s, L, alpha, beta):
    gamma = ((L * theta / (2 * math.pi) - alpha) / (beta - alpha)).clamp(0, 1)
    return gamma * theta / s + (1 - gamma) * theta


def _radians(theta, s, L, alpha, beta):
    gamma = ((L * theta - alpha) / (beta - alpha)).clamp(0, 1)
    return (1 - gamma) * theta / s + gamma * theta


def _stretched(theta, s, L, alpha, beta):
    return blend(theta, s, int(s * L), alpha, beta)


_eight = 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
_sixteen = 10_000.0 ** (-torch.arange(0, 32, 2) / 32)

parts = Exercise(
    "NTK-by-parts",
    minutes=15,
    difficulty="medium",
    reference=blend,
    cases=[(_sixteen, 4.0, 512, 1.0, 32.0), (_eight, 8.0, 512, 1.0, 16.0)],
    wrong={
        "Outside of the ramp γ stays 0 or 1: clip it": _without_clip,
        "The wrong ones are slowed: γ = 1 leaves a frequency alone": _exchanged,
        "r counts whole rotations; L θ is an angle in radians": _radians,
        "Count rotations within the trained length, not the new one": _stretched,
        "This is Position Interpolation: every frequency is divided": (
            lambda theta, s, L, alpha, beta: theta / s
        ),
    },
    atol=1e-6,
)


def sharpen(scores: Float[Tensor, " keys"], s: float) -> Float[Tensor, " keys"]:
    r"""$\operatorname{softmax}$ of scores whose queries and keys were both multiplied."""
    return torch.softmax(scores * (0.1 * math.log(s) + 1) ** 2, -1)


_scores = torch.tensor([2.0, 1.0, 0.0, -1.0])

sharper = Exercise(
    "What the temperature does to a row of attention",
    minutes=10,
    difficulty="medium",
    reference=sharpen,
    cases=[(_scores, 4.0), (_scores * 2, 16.0), (_scores, 1.0)],
    wrong={
        "Queries and keys are both multiplied: a score gets the factor twice": (
            lambda scores, s: torch.softmax(scores * (0.1 * math.log(s) + 1), -1)
        ),
        "Scores are divided by t, and t is below 1: they grow": (
            lambda scores, s: torch.softmax(scores / (0.1 * math.log(s) + 1) ** 2, -1)
        ),
        "ln is the natural logarithm": (
            lambda scores, s: torch.softmax(scores * (0.1 * math.log10(s) + 1) ** 2, -1)
        ),
        "Weights of attention add up to 1: take the softmax": (
            lambda scores, s: scores * (0.1 * math.log(s) + 1) ** 2
        ),
    },
    atol=1e-6,
)
