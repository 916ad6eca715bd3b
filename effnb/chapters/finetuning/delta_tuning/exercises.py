"""The exercises of the chapter on delta tuning: references, cases, and mistakes with diagnoses."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.lab import Exercise


def delta_size(method: str, size: int, d: int, layers: int) -> int:
    """How many numbers are trained; LoRA has two square matrices a layer, adapters are one."""
    return {
        "LoRA": layers * 2 * size * (d + d),
        "adapter": layers * (2 * d * size + size + d),
        "prefix": layers * 2 * size * d,
        "prompt": size * d,
    }[method]


def _without(part: str) -> object:
    def wrong(method: str, size: int, d: int, layers: int) -> int:
        right = delta_size(method, size, d, layers)
        if part == "biases" and method == "adapter":
            return layers * 2 * d * size
        if part == "values" and method == "prefix":
            return right // 2
        if part == "input" and method == "prompt":
            return right * layers
        if part == "matrices" and method == "LoRA":
            return right // 2
        return right

    return wrong


counting = Exercise(
    "How many numbers?",
    minutes=5,
    difficulty="easy",
    reference=delta_size,
    cases=[
        ("LoRA", 8, 384, 6),
        ("adapter", 16, 384, 6),
        ("prefix", 16, 384, 6),
        ("prompt", 24, 384, 6),
        ("adapter", 64, 768, 12),
    ],
    wrong={
        "An adapter's two layers have biases: m and d numbers more": _without("biases"),
        "A prefix holds values as well as keys": _without("values"),
        "A prompt lies in front of the first layer only": _without("input"),
        "LoRA has two thin matrices on each of the two weights": _without("matrices"),
    },
)


def lora_weight(
    W: Float[Tensor, "out in"], A: Float[Tensor, "r in"], B: Float[Tensor, "out r"], alpha: float
) -> Float[Tensor, "out in"]:
    r"""$W + \frac{\alpha}{r} B A$."""
    return W + alpha / len(A) * (B @ A)


_draw = torch.Generator().manual_seed(5)


def _matrices(out: int, rank: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((out, n), (rank, n), (out, rank))
    return tuple(torch.randn(*shape, generator=_draw) for shape in shapes)


merging = Exercise(
    "Merge a LoRA",
    minutes=10,
    difficulty="medium",
    reference=lora_weight,
    cases=[(*_matrices(4, 2, 3), 8.0), (*_matrices(3, 1, 5), 2.0), (*_matrices(3, 2, 3), 1.0)],
    wrong={
        "The scaling is alpha / r, not alpha": lambda W, A, B, alpha: W + alpha * (B @ A),
        "The scaling alpha / r is missing": lambda W, A, B, alpha: W + B @ A,
        "r is the number of rows of A; this divides by the number of its columns": (
            lambda W, A, B, alpha: W + alpha / A.shape[1] * (B @ A)
        ),
        "This is the change alone; add it to W": (lambda W, A, B, alpha: alpha / len(A) * (B @ A)),
    },
    atol=1e-5,
)


def prefix_share(
    q: Float[Tensor, " d"], P: Float[Tensor, "l d"], K: Float[Tensor, "n d"]
) -> Float[Tensor, ""]:
    r"""$\lambda$: the prefix's part of the softmax over $q \cdot k / \sqrt d$."""
    scores = torch.cat([P, K]) @ q / len(q) ** 0.5
    return scores.softmax(0)[: len(P)].sum()


def _unscaled(q: Tensor, P: Tensor, K: Tensor) -> Tensor:
    return (torch.cat([P, K]) @ q).softmax(0)[: len(P)].sum()


gate = Exercise(
    "How much of a query does a prefix take?",
    minutes=15,
    difficulty="hard",
    reference=prefix_share,
    cases=[
        tuple(torch.randn(*s, generator=_draw) for s in ((4,), (2, 4), (5, 4))),
        tuple(torch.randn(*s, generator=_draw) for s in ((8,), (1, 8), (3, 8))),
        (torch.zeros(4), torch.ones(1, 4), torch.ones(3, 4)),
    ],
    wrong={
        "Scores are divided by the root of d before the softmax": _unscaled,
        "That is the share of the text; the prefix has the rest": (
            lambda q, P, K: 1 - prefix_share(q, P, K)
        ),
        "The softmax runs over prefix and text together": (
            lambda q, P, K: (P @ q / len(q) ** 0.5).softmax(0).sum()
        ),
        "Counting positions is right only where all scores are equal": (
            lambda q, P, K: torch.tensor(len(P) / (len(P) + len(K)))
        ),
    },
    atol=1e-5,
)
