"""What the chapter compares: maps from MiniLM's 384 numbers to numbers that can be cut.

`effnb.chapters.inference.matryoshka.collection` gives the vectors; every map here is trained with
the pairs that are not in the collection, and judged by test queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from effnb.chapters.inference.matryoshka.collection import Collection, Vectors
from effnb.core.training import TrainingSettings, train
from effnb.inference import matryoshka
from effnb.lab._cache import cached_folder

FULL = 384
"""Numbers that MiniLM gives."""
DIMS = (8, 16, 32, 64, 128, 256, 384)
"""Prefix lengths that the nested map is trained for."""
BETWEEN = (12, 24, 48, 96, 192)
"""Prefix lengths that it is never trained for."""
OWN = (8, 16, 32, 64, 128)
"""Sizes that a map of its own is trained for."""
STEPS, RATE, BATCH = 200, 2e-3, 256
"""Training of every map, chosen by a search among the training pairs alone."""
K = 10
"""Neighbours that a search is asked for."""


def trained_map(v: Vectors, dims: Sequence[int], seed: int) -> Float[Tensor, "width dim"]:
    """The map trained for these prefixes, from the cache or trained now (seconds)."""

    def write(folder: Path) -> None:
        found = matryoshka.train_map(
            v.pair_queries,
            v.pair_documents,
            dims,
            steps=STEPS,
            batch_size=BATCH,
            learning_rate=RATE,
            seed=seed,
        )
        save_file({"map": found}, folder / "map.safetensors")

    size = len(v.pair_queries)
    name = f"matryoshka-map-{'-'.join(map(str, dims))}-of-{size}-seed-{seed}"
    return load_file(cached_folder(name, write) / "map.safetensors")["map"]


def own_rows(rows: Sequence[int]) -> Int[Tensor, " queries"]:
    """The document that each query should find."""
    return torch.tensor(rows)


def means(
    found: matryoshka.Found, own: Int[Tensor, " queries"], exact: matryoshka.Found | None = None
) -> dict[str, Any]:
    """How often a search finds a query's own document first and among ten, and what it compared.

    Args:
        found: What was found.
        own: Each query's own document.
        exact: What 384 numbers find; the share of it that was found too is added.
    """
    row = {
        "first": round(float(found.finds(own).float().mean()), 4),
        "ten": round(float(found.finds(own, K).float().mean()), 4),
        "evaluations": round(float(found.evaluations.mean()), 1),
        "multiplications": round(float(found.multiplications.mean())),
    }
    if exact is not None:
        kept = matryoshka.neighbours_kept(found, exact)
        row["neighbours"] = round(float(kept.mean()), 4)
    return row


def not_divided(
    queries: Float[Tensor, "queries dim"], documents: Float[Tensor, "documents dim"], m: int
) -> matryoshka.Found:
    """Search by prefixes that keep their length: the mistake that the chapter shows."""
    rows = (queries[:, :m] @ documents[:, :m].T).topk(K, dim=1).indices
    cost = torch.full((len(rows),), float(len(documents)))
    return matryoshka.Found(rows, cost, cost * m)


# ---------------------------------------------------------------------------- classification

WIDTH, HIDDEN = 64, 128
"""Numbers of the learned representation, and of the layer before it."""
CLASS_DIMS = (2, 4, 8, 16, 32, 64)
CLASS_STEPS, CLASS_RATE, CLASS_BATCH = 400, 3e-3, 512


class Classifier(nn.Module):
    """A small network on MiniLM's vector, and heads on prefixes of what it gives."""

    def __init__(self, classes: int, dims: Sequence[int], seed: int, *, tied: bool = False) -> None:
        """Random weights of this seed; the last of `dims` is the width."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Linear(FULL, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, dims[-1])
            )
            self.heads = matryoshka.MatryoshkaHeads(dims[-1], classes, dims, tied=tied)

    def forward(self, e: Float[Tensor, "texts dim"]) -> dict[int, Float[Tensor, "texts classes"]]:
        """The logits of every prefix."""
        return self.heads(self.body(e))


def train_classifier(
    e: Float[Tensor, "texts dim"],
    labels: Int[Tensor, " texts"],
    dims: Sequence[int],
    seed: int,
    *,
    tied: bool = False,
    steps: int = CLASS_STEPS,
) -> Classifier:
    """A classifier trained on vectors; with one prefix length it is an ordinary one."""
    model = Classifier(int(labels.max()) + 1, dims, seed, tied=tied)
    draws = torch.Generator().manual_seed(seed)
    size = min(CLASS_BATCH, len(e))

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        return matryoshka.matryoshka_cross_entropy(model(e[rows]), labels[rows])

    settings = TrainingSettings(
        steps=steps,
        learning_rate=CLASS_RATE,
        warmup_steps=min(20, steps),
        schedule="cosine",
        weight_decay=0.05,
        seed=seed,
    )
    train(model, lambda _: torch.randperm(len(e), generator=draws)[:size], settings, loss=loss)
    return model.eval()


def linear_head(
    z: Float[Tensor, "texts m"], labels: Int[Tensor, " texts"], seed: int, steps: int = 200
) -> nn.Linear:
    """A linear classifier on features that stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(z.shape[1], int(labels.max()) + 1)
    settings = TrainingSettings(steps=steps, learning_rate=0.05, schedule="cosine", seed=seed)

    def loss(model: nn.Module, _: Any) -> Tensor:
        return nn.functional.cross_entropy(model(z), labels)

    train(head, lambda _: None, settings, loss=loss)
    return head


@torch.inference_mode()
def right(
    logits: Float[Tensor, "texts classes"], labels: Int[Tensor, " texts"]
) -> Bool[Tensor, " texts"]:
    """Whether each text is given its own class."""
    return logits.argmax(-1) == labels


def by_split(
    here: Collection, v: Vectors
) -> dict[str, tuple[Float[Tensor, "texts dim"], Int[Tensor, " texts"]]]:
    """Descriptions with their archive sections as labels, by split; pairs count as training.

    A section that no training description has is left out.
    """
    packages = [*here.documents, *here.pairs]
    e = torch.cat([v.documents, v.pair_documents])
    known = sorted({p.section for p in packages if p.split == "train"})
    number = {name: i for i, name in enumerate(known)}
    found = {}
    for split in ("train", "validation", "test"):
        rows = [i for i, p in enumerate(packages) if p.split == split and p.section in number]
        labels = torch.tensor([number[packages[i].section] for i in rows], dtype=torch.long)
        found[split] = (e[torch.tensor(rows, dtype=torch.long)], labels)
    return found
