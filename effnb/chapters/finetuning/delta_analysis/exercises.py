"""The exercises of the chapter on the analysis of delta tuning, with mistakes and diagnoses."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from effnb.lab import Exercise

_draw = torch.Generator().manual_seed(11)


def serve_rows(
    x: Float[Tensor, "rows n"],
    W: Float[Tensor, "out n"],
    A: Float[Tensor, "users r n"],
    B: Float[Tensor, "users out r"],
    s: Float[Tensor, " users"],
    user: Int[Tensor, " rows"],
) -> Float[Tensor, "rows out"]:
    r"""$y_m = W x_m + s_u B_u A_u x_m$ with u the user of row m."""
    narrow = torch.einsum("mrn,mn->mr", A[user], x)
    return x @ W.T + s[user, None] * torch.einsum("mkr,mr->mk", B[user], narrow)


def _case(rows: int, out: int, n: int, users: int, rank: int) -> tuple[Tensor, ...]:
    shapes = ((rows, n), (out, n), (users, rank, n), (users, out, rank))
    numbers = [torch.randn(*shape, generator=_draw) for shape in shapes]
    user = torch.randint(users, (rows,), generator=_draw)
    user[0], user[-1] = 0, users - 1  # not all rows are of one user
    return (*numbers, 0.5 + torch.rand(users, generator=_draw), user)


def _one_for_all(x, W, A, B, s, user):
    return serve_rows(x, W, A, B, s, torch.full_like(user, int(user[0])))


serving = Exercise(
    "Rows of different users",
    minutes=10,
    difficulty="medium",
    reference=serve_rows,
    cases=[_case(5, 4, 3, 3, 2), _case(4, 3, 3, 2, 1), _case(6, 2, 5, 4, 2)],
    wrong={
        "All rows got the first row's LoRA; each has its own user": _one_for_all,
        "The scaling of each user is missing": (
            lambda x, W, A, B, s, user: serve_rows(x, W, A, B, torch.ones_like(s), user)
        ),
        "This is the update alone; the frozen layer's output is missing": (
            lambda x, W, A, B, s, user: serve_rows(x, 0 * W, A, B, s, user)
        ),
        "That is the sum of all users' updates; a row gets one": (
            lambda x, W, A, B, s, user: (
                x @ W.T + sum(s[u] * x @ A[u].T @ B[u].T for u in range(len(A)))
            )
        ),
    },
    atol=1e-5,
)


def kept(untuned: float, moved: float, own: float) -> float:
    """Of the nats that a task's own delta saves, the part that another task's delta saves."""
    return (untuned - moved) / (untuned - own)


transfer = Exercise(
    "How much of a delta arrives?",
    minutes=5,
    difficulty="easy",
    reference=kept,
    cases=[(4.0, 3.0, 2.0), (5.0, 5.5, 1.0), (3.2, 2.1, 2.1)],
    wrong={
        "A ratio of losses says little: compare what was saved": lambda a, b, c: c / b,
        "Divide by what the task's own delta saves, not by the untuned loss": (
            lambda a, b, c: (a - b) / a
        ),
        "That is the part that got lost; one minus it arrives": (
            lambda a, b, c: 1 - (a - b) / (a - c)
        ),
        "The sign is the wrong way round: a lower loss is a saving": (
            lambda a, b, c: (b - a) / (a - c)
        ),
    },
    atol=1e-6,
)


def control_round(
    x0: float, u: list[float], goal: float, weight: float, damping: float
) -> list[float]:
    r"""$u_t \leftarrow (p + \rho u_t) / (\lambda + \rho)$ with $p = goal - x_T$."""
    p = goal - (x0 + sum(u))
    return [(p + damping * one) / (weight + damping) for one in u]


control = Exercise(
    "One round of successive approximations",
    minutes=15,
    difficulty="hard",
    reference=control_round,
    cases=[
        (0.0, [0.0, 0.0], 3.0, 1.0, 1.0),
        (1.0, [0.5, 0.0, -1.0], 2.0, 0.5, 2.0),
        (-1.0, [0.2, 0.3], 0.5, 0.25, 4.0),
    ],
    wrong={
        "The damping is missing: what holds a control near its old value?": (
            lambda x0, u, goal, weight, damping: [(goal - x0 - sum(u)) / weight for _ in u]
        ),
        "The costate is goal − x_T; its sign is the wrong way round": (
            lambda x0, u, goal, weight, damping: [
                (x0 + sum(u) - goal + damping * one) / (weight + damping) for one in u
            ]
        ),
        "x_T is where the path ends: x_0 and all controls": (
            lambda x0, u, goal, weight, damping: [
                (goal - x0 + damping * one) / (weight + damping) for one in u
            ]
        ),
        "All controls of a round are computed along one path": (
            lambda x0, u, goal, weight, damping: _in_turn(x0, u, goal, weight, damping)
        ),
    },
    atol=1e-6,
)


def _in_turn(x0: float, u: list[float], goal: float, weight: float, damping: float) -> list[float]:
    found = list(u)
    for t, one in enumerate(u):
        p = goal - (x0 + sum(found))
        found[t] = (p + damping * one) / (weight + damping)
    return found
