"""The exercises of the chapter on distillation: references, cases, and mistakes with diagnoses."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.lab import Exercise

_draw = torch.Generator().manual_seed(7)


def soft_loss(
    z: Float[Tensor, "rows classes"], v: Float[Tensor, "rows classes"], t: float
) -> Float[Tensor, ""]:
    r"""$\tau^2 \operatorname{KL}(p^\tau \| q^\tau)$, the mean over rows."""
    p, log_q = (v / t).softmax(-1), (z / t).log_softmax(-1)
    return t**2 * (p * ((v / t).log_softmax(-1) - log_q)).sum(-1).mean()


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    return (p * (log_p - log_q)).sum(-1).mean()


def _reversed(z: Tensor, v: Tensor, t: float) -> Tensor:
    return soft_loss(v, z, t)


def _one_side(z: Tensor, v: Tensor, t: float) -> Tensor:
    p = (v / t).softmax(-1)
    return t**2 * _kl(p, (v / t).log_softmax(-1), z.log_softmax(-1))


_cases = [
    (torch.tensor([[1.0, -0.5, -0.5]]), torch.tensor([[2.0, -1.5, -0.5]]), 4.0),
    (torch.randn(3, 5, generator=_draw), 3 * torch.randn(3, 5, generator=_draw), 2.0),
]

loss = Exercise(
    "The softened loss",
    minutes=10,
    difficulty="easy",
    reference=soft_loss,
    cases=_cases,
    wrong={
        "The factor of the squared temperature is missing": (
            lambda z, v, t: soft_loss(z, v, t) / t**2
        ),
        "The divergence is reversed: the teacher's probabilities weigh the logarithms": _reversed,
        "Both sides have the temperature, the student's too": _one_side,
        "Average over rows only; the classes are added up": (
            lambda z, v, t: soft_loss(z, v, t) / z.shape[1]
        ),
    },
    atol=1e-5,
)


def mixed(
    f: Float[Tensor, "rows classes"], first: Tensor, second: Tensor, alpha: float
) -> Float[Tensor, " rows"]:
    r"""$\alpha f_1 + (1 - \alpha)(1 - f_1)$ of the teacher's first class, where k is 2."""
    one = f.gather(1, first[:, None])[:, 0]
    return alpha * one + (1 - alpha) * (1 - one)


_f = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]])

correction = Exercise(
    "Forward correction",
    minutes=10,
    difficulty="medium",
    reference=mixed,
    cases=[
        (_f, torch.tensor([0, 0]), torch.tensor([1, 1]), 0.6),
        (_f, torch.tensor([2, 1]), torch.tensor([0, 2]), 0.9),
    ],
    wrong={
        "This is the student's probability as it is; mix in what the noise would do": (
            lambda f, first, second, alpha: f.gather(1, first[:, None])[:, 0]
        ),
        "The two shares are exchanged: the teacher is right with probability alpha": (
            lambda f, first, second, alpha: mixed(f, first, second, 1 - alpha)
        ),
        "Mix the label's class with 1 minus itself, not with the second class": (
            lambda f, first, second, alpha: (
                alpha * f.gather(1, first[:, None])[:, 0]
                + (1 - alpha) * f.gather(1, second[:, None])[:, 0]
            )
        ),
    },
    atol=1e-6,
)


def shares(g: Float[Tensor, " inputs"], k: int) -> Float[Tensor, " inputs"]:
    r"""$q_i = (1 / g_i) / H_{I^*}$ for the $I^*$ largest gains; the gains fall."""
    harmonic = (1 / g).cumsum(0)
    size = torch.arange(1, len(g) + 1, dtype=g.dtype)
    value = torch.where(size > 2 * k, (size - 2 * k) / harmonic, torch.tensor(-torch.inf).to(g))
    last = int(value.argmax())
    q = torch.zeros_like(g)
    q[: last + 1] = 1 / g[: last + 1] / harmonic[last]
    return q


def _all_of_them(g: Tensor, k: int) -> Tensor:
    return (1 / g) / (1 / g).sum()


def _by_gain(g: Tensor, k: int) -> Tensor:
    q = shares(g, k)
    return torch.where(q > 0, g, torch.zeros_like(g)) / g[q > 0].sum()


def _not_normalized(g: Tensor, k: int) -> Tensor:
    return torch.where(shares(g, k) > 0, 1 / g, torch.zeros_like(g))


game = Exercise(
    "The robust choice",
    minutes=20,
    difficulty="hard",
    reference=shares,
    cases=[
        (torch.tensor([1.0, 0.9, 0.8, 0.5, 0.2, 0.1, 0.05]), 1),
        (torch.tensor([0.9, 0.8, 0.75, 0.7, 0.6, 0.1]), 2),
    ],
    wrong={
        "Inputs that gain too little are never drawn: find the best number of inputs first": (
            _all_of_them
        ),
        "Draw large gains less often, so that each input is worth as much to an adversary": (
            _by_gain
        ),
        "Probabilities add up to 1": _not_normalized,
    },
    atol=1e-5,
)
