"""The exercises of the chapter on distilled retrievers: references, cases, and diagnoses."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.inference.retrieval_distillation import embed_distill, margin_mse
from effnb.lab import Exercise


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


_s, _t = _randn(3, 4, seed=0), 4 * _randn(3, 4, seed=1) + 10


def margin_loss(
    s: Float[Tensor, "queries documents"], t: Float[Tensor, "queries documents"]
) -> Float[Tensor, ""]:
    r"""Mean of $((s_+ - s_j) - (t_+ - t_j))^2$."""
    return margin_mse(s, t)


margins = Exercise(
    "Margins",
    minutes=8,
    difficulty="easy",
    reference=margin_loss,
    cases=[(_s, _t), (_s, _s + 5.0), (_randn(1, 2, seed=2), _randn(1, 2, seed=3))],
    wrong={
        "The first document with itself has no margin: leave that column out": (
            lambda s, t: ((s[:, :1] - s) - (t[:, :1] - t)).square().mean()
        ),
        "This compares the scores themselves; subtract each from the first one's": (
            lambda s, t: (s - t).square().mean()
        ),
        "Square the difference: as it is, errors of either sign cancel": (
            lambda s, t: ((s[:, :1] - s[:, 1:]) - (t[:, :1] - t[:, 1:])).mean()
        ),
        "A mean over queries and documents, not a sum": (
            lambda s, t: ((s[:, :1] - s[:, 1:]) - (t[:, :1] - t[:, 1:])).square().sum()
        ),
    },
)


def distance(
    s: Float[Tensor, "texts student"],
    t: Float[Tensor, "texts teacher"],
    W: Float[Tensor, "teacher student"],
) -> Float[Tensor, ""]:
    r"""Mean of $\lVert t_i - W s_i \rVert_2$."""
    return embed_distill(s @ W.T, t)


_a, _b, _W = _randn(5, 3, seed=4), 2 * _randn(5, 4, seed=5), _randn(4, 3, seed=6)

lengths = Exercise(
    "Where the teacher puts a text",
    minutes=8,
    difficulty="medium",
    reference=distance,
    cases=[
        (_a, _b, _W),
        (_randn(2, 2, seed=11), _randn(2, 2, seed=12), torch.eye(2, dtype=torch.double)),
    ],
    wrong={
        "The length of the difference, not its square": (
            lambda s, t, W: (t - s @ W.T).square().sum(1).mean()
        ),
        "This is one length of the whole table; take one for each text, then their mean": (
            lambda s, t, W: (t - s @ W.T).norm()
        ),
        "Scaling one side to length 1 alone cannot match a teacher whose embeddings are longer": (
            lambda s, t, W: (t - torch.nn.functional.normalize(s @ W.T, dim=1)).norm(dim=1).mean()
        ),
        "Add up over the embedding's numbers, not over the texts": (
            lambda s, t, W: (t - s @ W.T).norm(dim=0).mean()
        ),
    },
)  # fmt: skip


def bound(
    q: Float[Tensor, " dim"],
    d: Float[Tensor, " dim"],
    a: Float[Tensor, " dim"],
    b: Float[Tensor, " dim"],
) -> Float[Tensor, ""]:
    r"""$\lVert a - q \rVert \lVert b \rVert + \lVert q \rVert \lVert b - d \rVert$."""
    return (a - q).norm() * b.norm() + q.norm() * (b - d).norm()


_q, _d, _u, _v = (_randn(4, seed=seed) for seed in (7, 8, 9, 10))

gap = Exercise(
    "How far can a score be off?",
    minutes=12,
    difficulty="hard",
    reference=bound,
    cases=[(_q, _d, _u, _v), (_q, _v, _u, _v), (2 * _q, _d, _q, _d)],
    wrong={
        "This is the gap itself, which needs the scores; bound it by the two distances": (
            lambda q, d, a, b: (a @ b - q @ d).abs()
        ),
        "A distance of queries is worth as much as the document is long: weigh both": (
            lambda q, d, a, b: (a - q).norm() + (b - d).norm()
        ),
        "The documents' distance is missing, which is 0 only if they are inherited": (
            lambda q, d, a, b: (a - q).norm() * b.norm()
        ),
        "Each distance is weighed by the other text's length": (
            lambda q, d, a, b: (a - q).norm() * a.norm() + d.norm() * (b - d).norm()
        ),
    },
)

ALL = (margins, lengths, gap)
"""In the order of the page."""
