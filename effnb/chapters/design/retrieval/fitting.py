"""RETRO fitted to a frozen decoder, as the chapter measures it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from effnb.core.training import TrainingSettings, train
from effnb.design.retrieval import ChunkStore, Retro, bag_of_words, retro_loss

CHUNK, LENGTH, NEIGHBOURS = 32, 128, 2
STEPS, BATCH, RATE = 200, 8, 2e-3
LAYERS = (1, 3)
READINGS = ("retrieved", "random", "none")


@dataclass(frozen=True)
class Course:
    """What a decoder is fitted on: texts with the neighbours of each of their chunks.

    Attributes:
        store: The chunks that are retrieved.
        ids: Texts to train on, all of them in the store.
        neighbours: The neighbours of each; never of the text itself.
    """

    store: ChunkStore
    ids: Int[Tensor, "texts time"]
    neighbours: Int[Tensor, "texts chunks k r"]


def course(documents: Sequence[Sequence[int]], vocabulary: int, length: int = LENGTH) -> Course:
    """Retrieve once for all training texts, by words in common."""
    store = ChunkStore(documents, bag_of_words(vocabulary), chunk=CHUNK)
    long_enough = [i for i, ids in enumerate(documents) if len(ids) >= length]
    ids = torch.tensor([list(documents[i][:length]) for i in long_enough])
    near = store.neighbours(ids, NEIGHBOURS, exclude=torch.tensor(long_enough))
    return Course(store, ids, near)


def fitted(decoder: nn.Module, course: Course, seed: int, steps: int = STEPS) -> Retro:
    """Train the encoder and the cross-attention; the decoder stays as it is."""
    blocks = decoder.config.num_hidden_layers
    layers = [layer for layer in LAYERS if layer < blocks]
    model = Retro(decoder, layers=layers, chunk=CHUNK, heads=4, seed=seed)
    draws = torch.Generator().manual_seed(1000 + seed)
    picks = torch.randint(len(course.ids), (steps, BATCH), generator=draws)

    def batch(step: int) -> dict[str, Tensor]:
        rows = picks[step]
        return {"input_ids": course.ids[rows], "neighbours": course.neighbours[rows]}

    settings = TrainingSettings(
        steps=steps, learning_rate=RATE, warmup_steps=steps // 10, seed=seed
    )
    train(model, batch, settings, loss=retro_loss)
    return model


@torch.inference_mode()
def by_document(model: nn.Module, ids: Tensor, neighbours: Tensor | None) -> list[float]:
    """Mean loss of each text, in nats per token."""
    found = []
    for i in range(len(ids)):
        row = ids[i : i + 1]
        if isinstance(model, Retro):
            near = None if neighbours is None else neighbours[i : i + 1]
            logits = model(row, near).logits
        else:
            logits = model(input_ids=row).logits
        losses = nn.functional.cross_entropy(logits[0, :-1].float(), row[0, 1:])
        found.append(round(float(losses), 5))
    return found


def neighbours_for(
    course: Course, ids: Tensor, reading: str, k: int = NEIGHBOURS, seed: int = 0
) -> Tensor | None:
    """What a text is given to read: retrieved chunks, random ones, or none.

    Raises:
        ValueError: When there is no such reading.
    """
    if reading == "none":
        return None
    if reading == "random":
        return course.store.random_neighbours(ids, k, seed=seed)
    if reading != "retrieved":
        raise ValueError(f'reading is "{reading}"; it must be one of {", ".join(READINGS)}.')
    return course.store.neighbours(ids, k)
