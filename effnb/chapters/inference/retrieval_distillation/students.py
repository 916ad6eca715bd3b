"""From a large dual encoder to a small one: MiniLM teaches its own first layers to search.

What the teacher says of a text depends on no student, so it is computed once. Its embeddings are
those of MiniLM, turned so that the first coordinates hold most; a smaller embedding is the first of
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.chapters.inference.retrieval_distillation.texts import (
    DOCUMENT_TOKENS,
    QUERY_TOKENS,
    Pairs,
    encoder,
    first_layers,
    padded,
    pairs,
)
from effnb.core.modules import clone
from effnb.core.training import TrainingSettings, train
from effnb.evaluation import retrieval
from effnb.inference.retrieval_distillation import (
    DualEncoder,
    embed_distill,
    inherit_documents,
    made_queries,
    mean_pool,
    softmax_kl,
)

TRAIN, INDEX, QUERIES, MADE = 512, 1000, 200, 512
"""Pairs to learn from, descriptions to search among, new queries, and queries that are made."""
WIDTH = 384
DEPTH = 6
"""Of MiniLM."""
SCALE = 20.0
"""What cosines are multiplied by before a softmax."""
BATCH, STEPS = 64, 80
RATES = {0: 1e-3}
RATE = 3e-4
"""Learning rates by depth, and of the depths that are not named."""
LOSSES = ("labels", "scores", "embeddings", "both")
FOUND = 10


@torch.no_grad()
def pooled(model: nn.Module, rows: Sequence[Sequence[int]], batch: int = 32) -> Tensor:
    """The mean of the last layer's vectors of each text, short texts with short ones."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = torch.zeros(len(rows), model.config.hidden_size)
    for at in range(0, len(order), batch):
        some = order[at : at + batch]
        ids, real = padded([rows[i] for i in some])
        hidden = model(input_ids=ids, attention_mask=real.long()).last_hidden_state
        out[some] = mean_pool(hidden, real)
    return out


@dataclass(frozen=True)
class Course:
    """What the teacher says of all texts, before its embeddings are turned and cut.

    Attributes:
        train: Pairs to learn from.
        test: New pairs; queries are taken from the first of them, all descriptions are searched.
        made: Queries made from descriptions of `train`.
        vectors: MiniLM's pooled vectors of "queries", "documents", "made", "new" and "index".
    """

    train: Pairs
    test: Pairs
    made: list[list[int]]
    vectors: dict[str, Float[Tensor, "texts dim"]]

    def basis(self, size: int) -> Float[Tensor, "size dim"]:
        """Directions that hold most of the descriptions' embeddings, the largest first."""
        unit = nn.functional.normalize(self.vectors["documents"], dim=-1)
        return torch.linalg.eigh(unit.T @ unit).eigenvectors.flip(1).T[:size].contiguous()

    def teacher(self, size: int) -> DualEncoder:
        """MiniLM as a dual encoder with embeddings of this size, scaled to length 1."""
        model = clone(encoder().model)
        made = DualEncoder(model, model, size=size, normalized=True)
        with torch.no_grad():
            made.projection.weight.copy_(self.basis(size))
        return made.eval()

    def embeddings(self, which: str, size: int) -> Float[Tensor, "texts size"]:
        """The teacher's embeddings of some of the texts."""
        return nn.functional.normalize(self.vectors[which] @ self.basis(size).T, dim=-1)


def course_of(train_pairs: Pairs, test: Pairs, queries: int, count: int) -> Course:
    """Let MiniLM read the texts of a course.

    Args:
        train_pairs: Pairs to learn from.
        test: New pairs.
        queries: How many of the new queries are asked.
        count: How many queries are made.
    """
    spans, real = made_queries(
        [torch.tensor(row) for row in train_pairs.documents],
        count,
        longest=QUERY_TOKENS,
        generator=torch.Generator().manual_seed(0),
    )
    made = [row[mask].tolist() for row, mask in zip(spans, real, strict=True)]
    texts = {
        "queries": train_pairs.queries,
        "documents": train_pairs.documents,
        "made": made,
        "new": test.queries[:queries],
        "index": test.documents,
    }
    model = encoder().model
    return Course(
        train_pairs, test, made, {name: pooled(model, rows) for name, rows in texts.items()}
    )


@lru_cache(maxsize=1)
def course() -> Course:
    """The course of the stored measurements; MiniLM takes most of a minute to read it."""
    return course_of(pairs("train", TRAIN), pairs("test", INDEX), QUERIES, MADE)


def student_of(course: Course, depth: int, size: int, frozen: bool) -> DualEncoder:
    """MiniLM's first layers as a student, its projection as it is in the teacher.

    Args:
        course: What is learned.
        depth: Layers of the student.
        size: Width of the embeddings.
        frozen: Whether it inherits the teacher's documents; if not, one small encoder reads both.
    """
    if frozen:
        made = inherit_documents(course.teacher(size), first_layers(depth))
    else:
        small = first_layers(depth)
        made = DualEncoder(small, small, size=size, normalized=True)
    with torch.no_grad():
        made.projection.weight.copy_(course.basis(size))
    return made


def objective(
    name: str,
    queries: Float[Tensor, "batch size"],
    documents: Float[Tensor, "batch size"],
    taught: tuple[Float[Tensor, "batch size"], Float[Tensor, "batch size"]],
    frozen: bool,
) -> Tensor:
    """The loss of a batch; all of its documents are candidates of each of its queries.

    Args:
        name: One of `LOSSES`.
        queries: The student's embeddings.
        documents: Those that it scores with.
        taught: The teacher's embeddings of both.
        frozen: Whether documents are the teacher's, so that there is nothing to match.

    Raises:
        ValueError: An unknown loss.
    """
    if name not in LOSSES:
        raise ValueError(f"the loss is {name!r}; choose {', '.join(LOSSES)}.")
    scores = SCALE * queries @ documents.T
    if name == "labels":
        return nn.functional.cross_entropy(scores, torch.arange(len(scores)))
    value = torch.zeros(())
    if name in ("scores", "both"):
        value = value + softmax_kl(scores, SCALE * taught[0] @ taught[1].T)
    if name in ("embeddings", "both"):
        value = value + embed_distill(queries, taught[0])
        if not frozen:
            value = value + embed_distill(documents, taught[1])
    return value


def draws(count: int, batch: int, steps: int, seed: int) -> list[Int[Tensor, " batch"]]:
    """Which texts are in each batch: all of them in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(steps * batch / count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
    return list(order[: steps * batch].view(steps, batch))


def learn(
    course: Course,
    *,
    depth: int,
    size: int = WIDTH,
    loss: str = "both",
    frozen: bool = True,
    made: bool = False,
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
) -> DualEncoder:
    """Train a student.

    Args:
        course: What is learned.
        depth: Layers of the student.
        size: Width of the embeddings.
        loss: One of `LOSSES`.
        frozen: Whether the teacher's documents are inherited.
        made: Whether every other batch is of made queries, which have no right document.
        steps: Steps of training.
        batch: Queries of a step.
        seed: Of the order of the texts, and of dropout.

    Raises:
        ValueError: An unknown loss, or made queries with labels.
    """
    if made and loss == "labels":
        raise ValueError("made queries have no labels; choose scores, embeddings or both.")
    student = student_of(course, depth, size, frozen)
    real = draws(len(course.train.queries), batch, steps, seed)
    spare = draws(max(1, len(course.made)), batch, steps, seed + 1_000)
    queries, documents, invented = (
        course.embeddings(name, size) for name in ("queries", "documents", "made")
    )

    def step_loss(model: nn.Module, step: int) -> Tensor:
        rows = real[step]
        texts, taught = course.train.queries, queries[rows]
        asked = rows
        if made and step % 2:
            texts, asked = course.made, spare[step]
            taught = invented[asked]
        mine = model.encode_queries(*padded([texts[i] for i in asked.tolist()]))
        theirs = documents[rows]
        used = theirs
        if not frozen:
            used = model.encode_documents(
                *padded([course.train.documents[i] for i in rows.tolist()])
            )
        return objective(loss, mine, used, (taught, theirs), frozen)

    settings = TrainingSettings(
        steps=steps, learning_rate=RATES.get(depth, RATE), warmup_steps=min(5, steps),
        schedule="linear", seed=seed,
    )  # fmt: skip
    train(student, lambda step: step, settings, loss=step_loss)
    return student


@torch.inference_mode()
def ranks_of(student: DualEncoder, course: Course, size: int, frozen: bool) -> list[int]:
    """On which rank each new query finds its own description."""

    def encoded(encode: Any, rows: Sequence[Sequence[int]]) -> Tensor:
        parts = [encode(*padded(rows[at : at + 50])) for at in range(0, len(rows), 50)]
        return torch.cat(parts)

    index = course.embeddings("index", size)  # the teacher's index is the student's
    if not frozen:
        index = encoded(student.encode_documents, course.test.documents)
    asked = course.test.queries[: len(course.vectors["new"])]
    return list(retrieval(encoded(student.encode_queries, asked), index).ranks)


def teacher_ranks(course: Course, size: int = WIDTH) -> list[int]:
    """The same of the teacher."""
    return list(retrieval(course.embeddings("new", size), course.embeddings("index", size)).ranks)


def judged(ranks: Sequence[int]) -> dict[str, Any]:
    """What is stored of a run: whether each query found its own among the first ten, and MRR@10."""
    return {
        "documents": [int(rank <= FOUND) for rank in ranks],
        "mrr": round(sum(1 / r for r in ranks if r <= FOUND) / len(ranks), 4),
    }


def layers_of_teacher(course: Course, depth: int, batch: int = BATCH) -> int:
    """Steps on labels alone for the compute that the teacher's answers to all queries cost.

    A layer's backward pass counts as two forward ones; with inherited documents, only queries are
    read in training.

    Raises:
        ValueError: A depth below 1: without layers there is nothing to count.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}; it must be at least 1.")
    return math.ceil(DEPTH * len(course.train.queries) / (3 * depth * batch))


def query_parameters(depth: int, size: int = WIDTH) -> int:
    """Parameters of a query encoder of this depth, its embeddings of tokens included."""
    model = encoder().model
    layer = sum(p.numel() for p in model.encoder.layer[0].parameters())
    words = sum(p.numel() for p in model.embeddings.parameters())
    return words + depth * layer + WIDTH * size


def query_multiplications(depth: int, tokens: int = QUERY_TOKENS + 2) -> int:
    """Multiplications of weights and tokens that reading one query takes."""
    layer = sum(
        m.weight.numel() for m in encoder().model.encoder.layer[0].modules()
        if isinstance(m, nn.Linear)
    )  # fmt: skip
    return tokens * depth * layer


def index_bytes(size: int, documents: int, bits: int = 32) -> int:
    """Bytes of the embeddings of an index."""
    return documents * size * bits // 8


LONGEST = DOCUMENT_TOKENS
