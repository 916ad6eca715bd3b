"""The exercises of the chapter on low rank: references, cases, and mistakes with diagnoses."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.lab import Exercise


def rank_of(kept: float, m: int, n: int) -> int:
    r"""$\lfloor \rho\, m n / (m + n) \rfloor$, at least 1."""
    return max(1, int(kept * m * n / (m + n)))


saving = Exercise(
    "The rank for a budget",
    minutes=5,
    difficulty="easy",
    reference=rank_of,
    cases=[(0.5, 256, 256), (0.6, 688, 256), (0.25, 1536, 576), (0.01, 64, 64)],
    wrong={
        "This is a part of the full rank; two factors hold r (m + n) numbers": (
            lambda kept, m, n: max(1, int(kept * min(m, n)))
        ),
        "Round down: the next larger rank is over the budget": (
            lambda kept, m, n: max(1, math.ceil(kept * m * n / (m + n)))
        ),
        "At least one term has to stay, however small the budget": (
            lambda kept, m, n: int(kept * m * n / (m + n))
        ),
        "There are two factors: r columns of m numbers count as well": (
            lambda kept, m, n: max(1, int(kept * m))
        ),
    },
)


def truncate_scaled(
    W: Float[Tensor, "out in"], s: Float[Tensor, " in"], r: int
) -> Float[Tensor, "out in"]:
    r"""$U_r \Sigma_r V_r^\top \operatorname{diag}(s)^{-1}$ of $W \operatorname{diag}(s)$."""
    U, sigma, Vh = torch.linalg.svd(W * s, full_matrices=False)
    return (U[:, :r] * sigma[:r]) @ Vh[:r] / s


def _smallest(
    W: Float[Tensor, "out in"], s: Float[Tensor, " in"], r: int
) -> Float[Tensor, "out in"]:
    U, sigma, Vh = torch.linalg.svd(W * s, full_matrices=False)
    return (U[:, -r:] * sigma[-r:]) @ Vh[-r:] / s


_draw = torch.Generator().manual_seed(3)

scaling = Exercise(
    "Truncate and undo the scaling",
    minutes=10,
    difficulty="medium",
    reference=truncate_scaled,
    cases=[
        (torch.randn(4, 3, generator=_draw), torch.tensor([0.5, 2.0, 4.0]), 2),
        (torch.randn(3, 5, generator=_draw), torch.tensor([1.0, 3.0, 0.2, 2.0, 0.7]), 1),
    ],
    wrong={
        "The scaling is still in it: divide the columns by s again": (
            lambda W, s, r: truncate_scaled(W, s, r) * s
        ),
        "This is plain SVD: multiply the columns of W by s before decomposing": (
            lambda W, s, r: truncate_scaled(W, torch.ones_like(s), r)
        ),
        "These are the smallest terms; singular values come largest first": _smallest,
        "s scales the columns once, not twice": lambda W, s, r: truncate_scaled(W, s**2, r),
    },
    atol=1e-4,
)


def predict(W: Float[Tensor, "out in"], G: Float[Tensor, "in in"], r: int) -> Float[Tensor, ""]:
    r"""The eigenvalues of $W G W^\top$, all but the $r$ largest, added up."""
    return torch.linalg.eigvalsh(W @ G @ W.T).flip(0)[r:].sum()


_W = torch.tensor([[3.0, 0.0], [4.0, 5.0]])

damage = Exercise(
    "The damage before it is done",
    minutes=15,
    difficulty="hard",
    reference=predict,
    cases=[
        (_W, torch.tensor([[1.0, -0.9], [-0.9, 1.0]]), 1),
        (_W, torch.tensor([[1.0, 0.0], [0.0, 16.0]]), 1),
        (torch.randn(5, 4, generator=_draw), torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])), 2),
    ],
    wrong={
        "This is what plain SVD loses of the weight; G has to come in": (
            lambda W, G, r: torch.linalg.svdvals(W)[r:].square().sum()
        ),
        "Square the singular values: the error is a sum of squares": (
            lambda W, G, r: torch.linalg.svdvals(W @ torch.linalg.cholesky(G))[r:].sum()
        ),
        "That is the part that is kept; the damage is what lies behind the first r": (
            lambda W, G, r: torch.linalg.eigvalsh(W @ G @ W.T).flip(0)[:r].sum()
        ),
        "L L^T = G: multiply by the root of G, not by G itself": (
            lambda W, G, r: torch.linalg.svdvals(W @ G)[r:].square().sum()
        ),
    },
    atol=1e-3,
)
