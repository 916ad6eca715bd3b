"""Transformer-XL, trained shortly on the characters of novels: with a memory, and without."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.modules import share
from effnb.core.muon import Muon, hidden_matrices
from effnb.core.training import TrainingSettings, train
from effnb.design.attention import TransformerXL

LETTERS = "\n " + string.ascii_letters + string.digits + ".,;:!?'\"()-_&"
"""The characters that are told apart; all others are one."""
SEGMENT, MEMORY, LONGER, ROWS, STEPS = 64, 64, 256, 16, 240
ARMS = {  # characters of a segment, of the memory; texts read side by side
    "memory": (SEGMENT, MEMORY, ROWS),
    "none": (SEGMENT, 0, ROWS),
    "long segments": (2 * SEGMENT, 0, ROWS // 2),
}
READINGS = {"memory": MEMORY, "none": 0, "longer memory": LONGER, "another text's": MEMORY}
JUDGED = (256, 1024)
"""Characters of a text that are judged: behind the longest memory, the same in every reading."""
EDGE = 8
"""Characters at the beginning of a segment that have little before them without a memory."""
_PLACE = {letter: number for number, letter in enumerate(LETTERS, 1)}


def encode(text: str) -> Int[Tensor, " characters"]:
    """Characters as numbers, 0 for those that are not told apart."""
    return torch.tensor([_PLACE.get(letter, 0) for letter in text])


def build(seed: int, memory: int) -> TransformerXL:
    """An untrained model of 230,000 weights."""
    torch.manual_seed(seed)
    return TransformerXL(
        len(LETTERS) + 1, dim=96, heads=4, layers=2, memory=memory, pre_norm=True
    ).eval()


class Streams:
    """Long texts side by side, cut into segments: row b of a batch goes on where b ended before."""

    def __init__(self, text: Int[Tensor, " characters"], rows: int, segment: int) -> None:
        length = len(text) // rows
        self.rows, self.segment = text[: rows * length].view(rows, length), segment
        self.count = (length - 1) // segment

    def __call__(self, step: int) -> tuple[Tensor, Tensor, bool]:
        """Characters of a segment, those that follow them, and whether texts begin again."""
        start = step % self.count * self.segment
        ids = self.rows[:, start : start + self.segment + 1]
        return ids[:, :-1], ids[:, 1:], step % self.count == 0


class RecurrentLoss:
    """The loss of segments in turn; what a segment leaves is handed to the next one."""

    def __init__(self) -> None:
        self.memories: Sequence[Tensor] | None = None

    def __call__(self, model: TransformerXL, batch: tuple[Tensor, Tensor, bool]) -> Tensor:
        """Mean nats per character."""
        ids, following, fresh = batch
        out = model(ids, None if fresh else self.memories)
        self.memories = out.memories
        return nn.functional.cross_entropy(out.logits.flatten(0, 1), following.flatten())


def muon_and_adamw(model: nn.Module, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside a model, AdamW for its embedding, norms and vectors."""
    matrices = hidden_matrices(model)
    mine = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in mine]
    return [
        Muon(matrices, lr=settings.learning_rate, weight_decay=settings.weight_decay),
        torch.optim.AdamW(others, lr=3e-3, betas=settings.betas, weight_decay=0.0),
    ]


def trained(
    arm: str, text: Int[Tensor, " characters"], seed: int, steps: int = STEPS
) -> tuple[TransformerXL, int]:
    """A model of one of the `ARMS`, and how many characters it has read.

    Args:
        arm: Its name.
        text: What it is trained on; the seed says where it begins.
        seed: Of the first weights and of the place in the text.
        steps: Steps of training, each of as many characters in all arms.
    """
    segment, memory, rows = ARMS[arm]
    place = int(torch.randint(len(text), (), generator=torch.Generator().manual_seed(seed)))
    batches = Streams(text.roll(-place), rows, segment)
    model = build(seed, memory)
    settings = TrainingSettings(
        steps=steps, learning_rate=0.02, warmup_steps=min(20, steps), schedule="wsd",
        weight_decay=0.05, betas=(0.9, 0.95), seed=seed,
    )  # fmt: skip
    train(model, batches, settings, loss=RecurrentLoss(), optimizers=muon_and_adamw)
    return model, steps * rows * segment


@torch.inference_mode()
def read(
    model: TransformerXL,
    texts: Int[Tensor, "texts characters"],
    reading: str,
    segment: int = SEGMENT,
) -> Float[Tensor, "texts characters"]:
    """Nats of each character but the first, read segment by segment.

    Args:
        model: A trained model.
        texts: Beginnings of texts, equally long.
        reading: One of `READINGS`. With another text's memory, each segment sees what the model has
            made of another text up to the same place.
        segment: Characters of a segment.
    """
    reader = share(model)
    reader.memory = READINGS[reading]
    memories, logits = None, []
    for part in texts[:, :-1].split(segment, 1):
        out = reader(part, memories)
        if reading == "another text's" and memories is not None:
            logits.append(reader(part, [m.roll(1, 0) for m in memories]).logits)
        else:
            logits.append(out.logits)
        memories = out.memories if reader.memory else None
    found = torch.cat(logits, 1)
    return nn.functional.cross_entropy(found.mT, texts[:, 1:], reduction="none")


def judged(
    model: TransformerXL, texts: Int[Tensor, "texts characters"], reading: str, segment: int
) -> dict[str, Any]:
    """Nats of each text over the judged characters, over the edges of segments, and by place."""
    first, last = JUDGED
    losses = read(model, texts, reading, segment)[:, first:last]
    by_segment = losses.unflatten(1, (-1, SEGMENT))
    places = by_segment.mean((0, 1)).unflatten(0, (-1, 4)).mean(1)
    return {
        "documents": [round(x, 5) for x in losses.mean(1).tolist()],
        "start_documents": [round(x, 5) for x in by_segment[..., :EDGE].mean((1, 2)).tolist()],
        "places": [round(x, 4) for x in places.tolist()],
    }  # fmt: skip


@torch.inference_mode()
def reach_calls(seed: int = 0, characters: int = 256) -> dict[str, Callable[[], Tensor]]:
    """Two ways to read characters that each see at least a memory's length before them.

    With recurrence, segment by segment. Without it, a window is read again for every character,
    all windows in one batch.
    """
    model = build(seed, MEMORY)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, len(LETTERS), (1, characters + MEMORY), generator=draw)
    with torch.inference_mode():
        begun = model(ids[:, :MEMORY]).memories
    windows = ids[0].unfold(0, MEMORY + 1, 1)[:characters].contiguous()

    @torch.inference_mode()
    def recurrence() -> Tensor:
        memories, logits = begun, []
        for part in ids[:, MEMORY:].split(SEGMENT, 1):
            out = model(part, memories)
            logits.append(out.logits)
            memories = out.memories
        return torch.cat(logits, 1)

    @torch.inference_mode()
    def windowed() -> Tensor:
        return model(windows).logits[:, -1]

    return {"recurrence": recurrence, "window anew": windowed}
