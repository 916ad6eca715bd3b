"""The exercises of the chapter: references, cases, and mistakes with diagnoses."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from effnb.lab import Exercise


def noisy(
    W: Float[Tensor, "out in"], Q: Float[Tensor, "out in"], drawn: Bool[Tensor, "out blocks"]
) -> Float[Tensor, "out in"]:
    """Q where a block is drawn, W elsewhere; blocks divide the columns evenly."""
    size = W.shape[1] // drawn.shape[1]
    return torch.where(drawn.repeat_interleave(size, 1), Q, W)


_draw = torch.Generator().manual_seed(5)
_W = torch.randn(3, 8, generator=_draw)
_Q = (2 * _W).round() / 2

blocks = Exercise(
    "Noise in blocks",
    minutes=10,
    difficulty="easy",
    reference=noisy,
    cases=[
        (_W, _Q, torch.rand(3, 4, generator=_draw) < 0.5),
        (_W, _Q, torch.rand(3, 2, generator=_draw) < 0.5),
        (_W, _Q, torch.ones(3, 8, dtype=torch.bool)),
    ],
    wrong={
        "The blocks that were drawn are the ones that are rounded, not the others": (
            lambda W, Q, drawn: noisy(W, Q, ~drawn)
        ),
        "A block is a run of neighbours: repeat each entry of the mask, not the whole mask": (
            lambda W, Q, drawn: torch.where(drawn.repeat(1, W.shape[1] // drawn.shape[1]), Q, W)
        ),
        "Everything is rounded: that is quantization-aware training, without noise": (
            lambda W, Q, drawn: Q.clone()
        ),
        "Drawn blocks are rounded; dropping them is the proxy for codewords": (
            lambda W, Q, drawn: noisy(W, torch.zeros_like(W), drawn)
        ),
    },
)


def attention_loss(
    student: Float[Tensor, "layers heads time dim"],
    teacher: Float[Tensor, "layers heads time dim"],
    real: Bool[Tensor, " time"],
) -> Float[Tensor, ""]:
    r"""$\frac{1}{L H} \sum_{l,h} \operatorname{MSE}$ over real tokens."""
    return (student - teacher)[:, :, real].square().mean()


_S, _T = (torch.randn(2, 3, 5, 4, generator=_draw) for _ in range(2))
_real = torch.tensor([True, True, True, False, False])

matching = Exercise(
    "Match attention",
    minutes=10,
    difficulty="medium",
    reference=attention_loss,
    cases=[(_S, _T, _real), (_T, _S, torch.ones(5, dtype=torch.bool)), (_S, _S, _real)],
    wrong={
        "Padding counts as well: take the real tokens only": (
            lambda s, t, real: (s - t).square().mean()
        ),
        "Padding was set to 0 but still counted in the mean": (
            lambda s, t, real: ((s - t) * real[:, None]).square().mean()
        ),
        "This is the sum over layers and heads; divide by L H": (
            lambda s, t, real: (s - t)[:, :, real].square().mean((2, 3)).sum()
        ),
        "The distance is the squared error, not the absolute one": (
            lambda s, t, real: (s - t)[:, :, real].abs().mean()
        ),
    },
)


def unfair(before: dict[str, float], after: dict[str, float], seen: list[str]) -> float:
    """Mean loss of unseen languages minus mean loss of seen ones."""
    lost = {g: before[g] - after[g] for g in before}
    ours = [lost[g] for g in lost if g in seen]
    others = [lost[g] for g in lost if g not in seen]
    return sum(others) / len(others) - sum(ours) / len(ours)


_before = {"en": 0.9, "de": 0.86, "ja": 0.7, "ko": 0.66, "ru": 0.71}
_after = {"en": 0.89, "de": 0.83, "ja": 0.6, "ko": 0.64, "ru": 0.65}

fairness = Exercise(
    "Who pays?",
    minutes=5,
    difficulty="easy",
    reference=unfair,
    cases=[(_before, _after, ["en", "de"]), (_before, _before, ["en"])],
    wrong={
        "The sign is turned: above 0 should mean that unseen languages lose more": (
            lambda before, after, seen: -unfair(before, after, seen)
        ),
        "This compares what is left; subtract what there was before": (
            lambda before, after, seen: unfair(
                dict.fromkeys(after, 0.0), {g: -a for g, a in after.items()}, seen
            )
        ),
        "These are sums; there are more unseen languages than seen ones": (
            lambda before, after, seen: (
                sum(before[g] - after[g] for g in before if g not in seen)
                - sum(before[g] - after[g] for g in before if g in seen)
            )
        ),
    },
    atol=1e-6,
)
