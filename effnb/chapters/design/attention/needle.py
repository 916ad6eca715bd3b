"""A value told once, somewhere in a text of noise: can attention carry it to the last token?

Tokens are noise but three: the first, always the same; the last, which asks; and one of eight
values at some place between them. The encoders differ in who sees whom, and in nothing else. Where
the first token sees all and is seen by all, the value can reach the end in two steps.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.chapters.design.attention.recurrence import muon_and_adamw
from effnb.core.training import TrainingSettings, train
from effnb.kernels.local_attention import local_attention

VALUES, NOISE, TOKENS = 8, 56, 256
FIRST, ASKS = VALUES + NOISE, VALUES + NOISE + 1
WINDOW, HEADS, WIDTH, LAYERS = 16, 1, 32, 2
KINDS = ("full", "window", "window and global")
STEPS, BATCH, RATE = 320, 16, 0.02
GROWTH = (1 / 8, 1 / 4, 1 / 2, 1)
"""Lengths of the texts in the four quarters of a training: the last is the whole length."""


class Needle(nn.Module):
    """A small encoder; `kind` says who sees whom."""

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.kind = kind
        self.embedding = nn.Embedding(ASKS + 1, WIDTH)
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.outputs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS + 1))
        self.readout = nn.Linear(WIDTH, VALUES)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer."""
        if self.kind == "full":
            return nn.functional.scaled_dot_product_attention(q, k, v)
        chosen = None
        if self.kind == "window and global":
            chosen = torch.zeros(len(q), q.shape[2], dtype=torch.bool)
            chosen[:, 0] = True
        return local_attention(q, k, v, window=WINDOW, global_tokens=chosen)

    def forward(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch values"]:
        """Scores of the values, read off the last token."""
        x = self.embedding(ids)
        for norm, projection, output in zip(self.norms, self.projections, self.outputs):
            q, k, v = projection(norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            x = x + output(self.mix(q, k, v).transpose(1, 2).flatten(2))
        return self.readout(self.norms[-1](x[:, -1]))


def texts(
    count: int, generator: torch.Generator, tokens: int = TOKENS, away: int = 1
) -> tuple[Int[Tensor, "texts time"], Int[Tensor, " texts"]]:
    """Texts with one value each, and the values.

    Args:
        count: How many.
        generator: Source of noise, values and places.
        tokens: Of a text.
        away: How far before the last token the value is at least.
    """
    ids = torch.randint(VALUES, FIRST, (count, tokens), generator=generator)
    values = torch.randint(VALUES, (count,), generator=generator)
    places = torch.randint(1, max(2, tokens - away), (count,), generator=generator)
    ids[torch.arange(count), places] = values
    ids[:, 0], ids[:, -1] = FIRST, ASKS
    return ids, values


def far_texts(count: int, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Texts whose value no stack of windows carries to the end; one draw for all encoders."""
    away = LAYERS * WINDOW // 2 + 1
    return texts(count, torch.Generator().manual_seed(10_000), tokens, away)


def lengths(steps: int = STEPS, tokens: int = TOKENS) -> list[int]:
    """The length of the texts of each step: short ones first, from which it is easier to learn."""
    return [int(tokens * GROWTH[4 * step // steps]) for step in range(steps)]


def trained(kind: str, seed: int, steps: int = STEPS, tokens: int = TOKENS) -> Needle:
    """An encoder after a short training."""
    model = Needle(kind, seed)
    generator = torch.Generator().manual_seed(seed)
    batches = [texts(BATCH, generator, length) for length in lengths(steps, tokens)]
    settings = TrainingSettings(
        steps=steps, learning_rate=RATE, warmup_steps=min(10, steps), schedule="wsd", seed=seed
    )

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    train(model, batches.__getitem__, settings, loss=loss, optimizers=muon_and_adamw)
    return model


@torch.inference_mode()
def judged(model: Needle, ids: Tensor, values: Tensor) -> tuple[list[float], float]:
    """Nats of the value of each text, and the share of right answers."""
    logits = torch.cat([model(part) for part in ids.split(16)])
    losses = nn.functional.cross_entropy(logits, values, reduction="none")
    right = (logits.argmax(-1) == values).float().mean()
    return [round(x, 5) for x in losses.tolist()], round(float(right), 4)
