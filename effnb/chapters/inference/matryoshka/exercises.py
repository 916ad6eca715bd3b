"""The exercises of the chapter on Matryoshka: references, cases, and mistakes with diagnoses."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.lab import Exercise

_draw = torch.Generator().manual_seed(5)


def cut_cosine(
    q: Float[Tensor, "queries dim"], d: Float[Tensor, "documents dim"], m: int
) -> Float[Tensor, "queries documents"]:
    """The cosines of the first m numbers."""
    q, d = q[:, :m], d[:, :m]
    return (q / q.norm(dim=1, keepdim=True)) @ (d / d.norm(dim=1, keepdim=True)).T


def _whole_length(q: Tensor, d: Tensor, m: int) -> Tensor:
    q, d = (x / x.norm(dim=1, keepdim=True) for x in (q, d))
    return q[:, :m] @ d[:, :m].T


def _one_side(q: Tensor, d: Tensor, m: int) -> Tensor:
    return cut_cosine(q, d, m) * d[:, :m].norm(dim=1)


cutting = Exercise(
    "Cut, and compare",
    minutes=5,
    difficulty="easy",
    reference=cut_cosine,
    cases=[
        (torch.randn(3, 6, generator=_draw), torch.randn(4, 6, generator=_draw), 2),
        (torch.randn(2, 5, generator=_draw), torch.randn(3, 5, generator=_draw), 5),
        (torch.tensor([[0.6, 0.0, 0.8]]), torch.tensor([[0.1, 0.1, 0.9], [0.9, 0.3, 0.1]]), 2),
    ],
    wrong={
        "Divide after cutting: the length of the whole vector is not that of its prefix": (
            _whole_length
        ),
        "The prefixes keep their lengths; cosines divide by both": (
            lambda q, d, m: q[:, :m] @ d[:, :m].T
        ),
        "The documents are not divided by their length": _one_side,
        "These are the last m numbers; a prefix is the first m": (
            lambda q, d, m: cut_cosine(q.flip(1), d.flip(1), m)
        ),
        "All numbers are compared: m is not used": lambda q, d, m: cut_cosine(q, d, q.shape[1]),
    },
    atol=1e-5,
)


def funnel_work(documents: int, dims: tuple[int, ...], shortlists: tuple[int, ...]) -> int:
    """Multiplications of a funnel."""
    compared = (documents, *shortlists)
    return sum(count * m for count, m in zip(compared, dims, strict=True))


working = Exercise(
    "What a funnel takes",
    minutes=10,
    difficulty="medium",
    reference=funnel_work,
    cases=[
        (10_000, (16, 384), (200,)),
        (1_000_000, (8, 16, 64, 384), (400, 100, 20)),
        (50, (2, 4), (50,)),
    ],
    wrong={
        "The first look compares every document, not only those of a shortlist": (
            lambda n, dims, kept: sum(k * m for k, m in zip(kept, dims[1:]))
        ),
        "What a step compares was kept by the step before it: pair the first shortlist with the "
        "second prefix": lambda n, dims, kept: (
            n * dims[-1] + sum(k * m for k, m in zip(kept, dims))
        ),
        "Each later look compares a shortlist, not the whole collection": (
            lambda n, dims, kept: n * sum(dims)
        ),
        "Counted are multiplications: each comparison takes as many as the numbers compared": (
            lambda n, dims, kept: n + sum(kept)
        ),
        "A later look compares all of its numbers again, not only the new ones": (
            lambda n, dims, kept: (
                n * dims[0] + sum(k * (b - a) for k, a, b in zip(kept, dims, dims[1:]))
            )
        ),
    },
)


def nested_loss(
    q: Float[Tensor, "pairs dim"], d: Float[Tensor, "pairs dim"], dims: tuple[int, ...]
) -> Float[Tensor, ""]:
    """The sum over prefixes of the in-batch softmax loss, scale 20."""
    labels = torch.arange(len(q))
    return sum(torch.nn.functional.cross_entropy(20 * cut_cosine(q, d, m), labels) for m in dims)


def _loss(scores: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))


training = Exercise(
    "The nested loss",
    minutes=15,
    difficulty="hard",
    reference=nested_loss,
    cases=[
        (torch.randn(5, 8, generator=_draw), torch.randn(5, 8, generator=_draw), (2, 4, 8)),
        (torch.randn(3, 6, generator=_draw), torch.randn(3, 6, generator=_draw), (1, 6)),
    ],
    wrong={
        "That is the mean over the prefixes; the loss is their sum": (
            lambda q, d, dims: nested_loss(q, d, dims) / len(dims)
        ),
        "Only the longest prefix is trained: this is the ordinary loss": (
            lambda q, d, dims: nested_loss(q, d, dims[-1:])
        ),
        "Divide each prefix by its own length before comparing": (
            lambda q, d, dims: sum(_loss(20 * _whole_length(q, d, m)) for m in dims)
        ),
        "The scores are multiplied by 20 before the softmax": (
            lambda q, d, dims: sum(_loss(cut_cosine(q, d, m)) for m in dims)
        ),
        "The softmax runs over the documents of a query, not over the queries of a document": (
            lambda q, d, dims: sum(_loss(20 * cut_cosine(q, d, m).T) for m in dims)
        ),
    },
    atol=1e-4,
)
