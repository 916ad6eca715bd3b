"""A cross-encoder that is trained here, and dual encoders that learn to rank from it.

Both start from MiniLM's first layers and see the same queries, each with its own description and
three wrong ones that share words with it. They are judged on eight candidates a query.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.chapters.inference.retrieval_distillation.students import draws
from effnb.chapters.inference.retrieval_distillation.texts import (
    SEPARATOR,
    START,
    Pairs,
    first_layers,
    like,
    padded,
    pairs,
)
from effnb.core.training import TrainingSettings, train
from effnb.inference.retrieval_distillation import (
    CrossEncoder,
    DualEncoder,
    embed_distill,
    join,
    margin_mse,
    order_only,
    pair_scores,
    pointwise,
    softmax_kl,
)

TRAIN, JUDGED = 320, 128
LAYERS = 2
WRONG, NEAR, CANDIDATES = 3, 10, 8
"""Wrong documents of a step, out of how many that share most with the query; and when judged."""
BATCH, ROUNDS = 16, 2
RATE = 2e-4
MARGIN = 3.0
"""From where on a teacher's margin is wide enough for the loss on the order alone."""

Lists = Int[Tensor, "queries candidates"]


@dataclass(frozen=True)
class Task:
    """Queries with candidates.

    Attributes:
        train: Pairs to learn from.
        new: Pairs to be judged on.
        near: For each training query, the wrong documents that share most with it.
        train_lists: Candidates by which training queries are judged; the first is right.
        new_lists: The same of new queries.
    """

    train: Pairs
    new: Pairs
    near: Lists
    train_lists: Lists
    new_lists: Lists

    @property
    def judged(self) -> int:
        """How many queries of each kind are judged."""
        return len(self.new_lists)

    def lists(self, seed: int, wrong: int = WRONG) -> Lists:
        """For each training query its own document and a few near ones."""
        draw = torch.Generator().manual_seed(seed)
        picks = torch.rand(self.near.shape, generator=draw).argsort(1)[:, :wrong]
        return torch.cat([_own(len(self.near)), self.near.gather(1, picks)], 1)


def _own(count: int) -> Int[Tensor, "count 1"]:
    return torch.arange(count)[:, None]


def task_of(train_pairs: Pairs, new: Pairs, judged: int) -> Task:
    """Find the candidates of all queries.

    Args:
        train_pairs: Pairs to learn from.
        new: Pairs to be judged on.
        judged: Queries of each that are judged.
    """
    near, far = like(train_pairs, NEAR), like(new, CANDIDATES - 1)
    return Task(
        train_pairs,
        new,
        near,
        torch.cat([_own(judged), near[:judged, : CANDIDATES - 1]], 1),
        torch.cat([_own(judged), far[:judged]], 1),
    )


@lru_cache(maxsize=1)
def task() -> Task:
    """The task of the stored measurements."""
    return task_of(pairs("train", TRAIN), pairs("test", 4 * JUDGED), JUDGED)


Scorer = Callable[[Pairs, Int[Tensor, " rows"], Lists], Float[Tensor, "rows candidates"]]


def _joined(given: Pairs, rows: Tensor, lists: Lists) -> dict[str, Tensor]:
    """Every query with each of its candidates, one text each."""
    asked = [given.queries[i] for i in rows.repeat_interleave(lists.shape[1]).tolist()]
    texts = [given.documents[i] for i in lists.flatten().tolist()]
    return join(asked, texts, start=START, separator=SEPARATOR)


def cross_scores(model: CrossEncoder) -> Scorer:
    """A cross-encoder as a function from lists to scores."""

    def score(given: Pairs, rows: Tensor, lists: Lists) -> Tensor:
        return model(_joined(given, rows, lists)).view(lists.shape)

    return score


def dual_scores(model: DualEncoder) -> Scorer:
    """A dual encoder as a function from lists to scores."""

    def score(given: Pairs, rows: Tensor, lists: Lists) -> Tensor:
        queries = model.encode_queries(*padded([given.queries[i] for i in rows.tolist()]))
        texts = [given.documents[i] for i in lists.flatten().tolist()]
        documents = model.encode_documents(*padded(texts))
        return pair_scores(queries, documents.view(*lists.shape, -1))

    return score


@torch.inference_mode()
def firsts(scorer: Scorer, given: Pairs, lists: Lists) -> list[int]:
    """Whether each query's own document has the highest score of its candidates; ties do not."""
    found: list[int] = []
    for at in range(0, len(lists), BATCH):
        some = lists[at : at + BATCH]
        scores = scorer(given, torch.arange(at, at + len(some)), some)
        found += (scores[:, 0] > scores[:, 1:].amax(1)).int().tolist()
    return found


def judged(scorer: Scorer, task: Task) -> dict[str, list[int]]:
    """New queries, as many training queries, and how much better each of the latter does."""
    new = firsts(scorer, task.new, task.new_lists)
    old = firsts(scorer, task.train, task.train_lists)
    drop = [a - b for a, b in zip(old, new, strict=True)]
    return {"documents": new, "train_documents": old, "drop_documents": drop}


def steps_of(task: Task) -> int:
    """Steps of a run."""
    return ROUNDS * len(task.train.queries) // BATCH


def _fit(
    model: nn.Module, task: Task, steps: int, seed: int,
    loss: Callable[[Int[Tensor, " rows"]], Tensor],
) -> None:  # fmt: skip
    batches = draws(len(task.train.queries), BATCH, steps, seed)
    settings = TrainingSettings(
        steps=steps, learning_rate=RATE, warmup_steps=min(4, steps), schedule="linear", seed=seed
    )
    train(model, batches.__getitem__, settings, loss=lambda _, rows: loss(rows))


def right_first(scores: Float[Tensor, "rows candidates"]) -> Float[Tensor, ""]:
    """The labels' loss: the first candidate is the right one."""
    return nn.functional.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))


def cross_encoder(
    task: Task, seed: int, *, dual_pooled: bool = True, steps: int | None = None
) -> CrossEncoder:
    """Train a cross-encoder on labels."""
    model = CrossEncoder(first_layers(LAYERS), dual_pooled=dual_pooled, seed=seed)
    lists, score = task.lists(seed), cross_scores(model)
    _fit(
        model, task, steps or steps_of(task), seed,
        lambda rows: right_first(score(task.train, rows, lists[rows])),
    )  # fmt: skip
    return model


@dataclass(frozen=True)
class Answers:
    """What a cross-encoder says of the training queries' lists, computed once.

    Attributes:
        scores: Of every candidate.
        queries: The query's embedding, read together with its own document.
        documents: That document's, read together with the query.
    """

    scores: Float[Tensor, "queries candidates"]
    queries: Float[Tensor, "queries dim"]
    documents: Float[Tensor, "queries dim"]


@torch.no_grad()
def answers_of(teacher: CrossEncoder, task: Task, seed: int) -> Answers:
    """Let a dual-pooled cross-encoder answer."""
    lists = task.lists(seed)
    scores, queries, documents = [], [], []
    for at in range(0, len(lists), BATCH):
        some = lists[at : at + BATCH]
        q, d = teacher.embeddings(_joined(task.train, torch.arange(at, at + len(some)), some))
        scores.append((q * d).sum(-1).view(some.shape))
        queries.append(q.view(*some.shape, -1)[:, 0])
        documents.append(d.view(*some.shape, -1)[:, 0])
    return Answers(torch.cat(scores), torch.cat(queries), torch.cat(documents))


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pointwise": pointwise,
    "softmax KL": softmax_kl,
    "MarginMSE": margin_mse,
    "order only": lambda s, t: order_only(s, t, MARGIN),
}
"""Losses on the scores of a list, the student's and the teacher's."""


def dual_encoder(
    task: Task,
    seed: int,
    method: str = "labels",
    answers: Answers | None = None,
    *,
    size: int | None = None,
    steps: int | None = None,
) -> DualEncoder:
    """Train a dual encoder on labels, or on what a cross-encoder says.

    Args:
        task: Queries with candidates.
        seed: Of the lists, the order of queries, dropout, and a projection's first values.
        method: "labels", one of `METHODS`, or one of them "and embeddings".
        answers: The teacher's, unless labels are learned.
        size: Width of the embeddings; MiniLM's own when None.
        steps: Steps of training, as many as the teacher's by default.

    Raises:
        ValueError: A method that there is not, or no answers for one that needs them.
    """
    base, _, extra = method.partition(" and ")
    if method != "labels" and (base not in METHODS or extra not in ("", "embeddings")):
        raise ValueError(f"the method is {method!r}; choose labels, {', '.join(METHODS)}.")
    if method != "labels" and answers is None:
        raise ValueError(f"{method} needs a teacher's answers, and none were given.")
    small = first_layers(LAYERS)
    model = DualEncoder(small, small, size=size, seed=seed)
    lists, score = task.lists(seed), dual_scores(model)

    def loss(rows: Tensor) -> Tensor:
        if method == "labels":
            return right_first(score(task.train, rows, lists[rows]))
        chosen = lists[rows]
        queries = model.encode_queries(*padded([task.train.queries[i] for i in rows.tolist()]))
        texts = [task.train.documents[i] for i in chosen.flatten().tolist()]
        documents = model.encode_documents(*padded(texts)).view(*chosen.shape, -1)
        value = METHODS[base](pair_scores(queries, documents), answers.scores[rows])
        if extra:
            value = value + embed_distill(queries, answers.queries[rows])
            value = value + embed_distill(documents[:, 0], answers.documents[rows])
        return value

    _fit(model, task, steps or steps_of(task), seed, loss)
    return model


def steps_for_answers(task: Task) -> int:
    """Steps on labels alone for the compute of the cross-encoder's answers to all lists.

    A step reads a query and its candidates apart, with a backward pass that counts as two forward
    ones; the teacher reads the query once more with every candidate.
    """
    query, document = (
        sum(map(len, rows)) / len(rows) + 2 for rows in (task.train.queries, task.train.documents)
    )
    lists = 1 + WRONG
    answers = len(task.train.queries) * lists * (query + document - 1)
    return math.ceil(answers / (3 * BATCH * (query + lists * document)))


def ranked(model: CrossEncoder | DualEncoder, task: Task) -> dict[str, Any]:
    """What is stored of a run."""
    scorer = cross_scores(model) if isinstance(model, CrossEncoder) else dual_scores(model)
    return judged(scorer, task)


def texts_read(documents: int, kind: str) -> int:
    """Texts that a model reads to answer one query among so many documents.

    Args:
        documents: How many there are.
        kind: "cross-encoder", or "dual encoder", whose documents are read already.

    Raises:
        ValueError: Another kind.
    """
    if kind not in ("cross-encoder", "dual encoder"):
        raise ValueError(f"the kind is {kind!r}; choose cross-encoder or dual encoder.")
    return documents if kind == "cross-encoder" else 1
