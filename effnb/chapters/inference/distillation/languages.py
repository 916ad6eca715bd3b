"""A small real task for distillation: which of twelve languages is a package description in?

Texts are the short descriptions of Debian packages with their translators' versions (the task
`language` of `effnb.lab.tasks`). A text is read as counts of its character n-grams, projected at
random to 192 numbers, and classified by a network with one hidden layer. Everything here trains in
seconds, so that a page can do it live.

The teacher learns from one half of the texts. The student's texts, the transfer set, are the other
half: what a teacher says of texts that it has learnt by heart is hardly more than their labels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.training import TrainingSettings
from effnb.inference import distillation
from effnb.lab.tasks import task

BUCKETS, DIM = 4096, 192
"""Buckets that n-grams are hashed into, and length of a text's features."""
TEACHER, STUDENT = 256, 32
"""Hidden units of the two networks."""
BATCH = 64
RATE = 1e-2
TAUGHT, FULL = 150, 300
"""Steps of a teacher and of a student."""


def n_grams(text: str) -> list[int]:
    """The buckets of all runs of one, two and three characters of a text."""
    text = f" {text.lower()} "
    return [
        zlib.crc32(text[start : start + length].encode()) % BUCKETS
        for length in (1, 2, 3)
        for start in range(len(text) - length + 1)
    ]


def features(texts: Sequence[str]) -> Float[Tensor, "texts features"]:
    """Square roots of the counts of all buckets, scaled to length 1 and projected at random."""
    rows = [torch.bincount(torch.tensor(n_grams(t)), minlength=BUCKETS) for t in texts]
    counts = nn.functional.normalize(torch.stack(rows).float().sqrt(), dim=1)
    return counts @ torch.randn(BUCKETS, DIM, generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Texts:
    """Texts as a classifier takes them.

    Attributes:
        x: Features.
        y: Languages, as indices.
        documents: The source package of each text: the unit of resampling.
    """

    x: Float[Tensor, "texts features"] = field(repr=False)
    y: Int[Tensor, " texts"] = field(repr=False)
    documents: tuple[str, ...] = field(repr=False)

    def __len__(self) -> int:
        """How many texts."""
        return len(self.y)

    def at(self, rows: Tensor) -> Texts:
        """Some of the texts."""
        return Texts(self.x[rows], self.y[rows], tuple(self.documents[i] for i in rows.tolist()))


@dataclass(frozen=True)
class Languages:
    """The task: its names, texts to learn from, a few labelled ones to tune by, and new ones.

    Attributes:
        names: The languages.
        taught: Texts that teachers learn from.
        transfer: Texts that students learn from, with or without their labels.
        known: Texts for estimates of how often a teacher errs.
        test: Texts to report.
    """

    names: tuple[str, ...]
    taught: Texts
    transfer: Texts
    known: Texts
    test: Texts


@cache
def languages() -> Languages:
    """The task with its features."""
    found = task("language")
    splits = [
        Texts(
            features([e.text for e in examples]),
            torch.tensor([e.label for e in examples]),
            tuple(e.document for e in examples),
        )
        for examples in (found.train, found.validation, found.test)
    ]
    train, known, test = splits
    half = len(train) // 2
    rows = torch.arange(len(train))
    return Languages(found.labels, train.at(rows[:half]), train.at(rows[half:]), known, test)


def net(hidden: int, seed: int, classes: int = 12) -> nn.Sequential:
    """A network with one hidden layer, or none; its start depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not hidden:
            return nn.Sequential(nn.Linear(DIM, classes)).eval()
        return nn.Sequential(nn.Linear(DIM, hidden), nn.ReLU(), nn.Linear(hidden, classes)).eval()


def parameters(model: nn.Module) -> int:
    """How many numbers a model holds."""
    return sum(p.numel() for p in model.parameters())


RowLoss = Callable[[nn.Module, Tensor], Tensor]
"""From a student and the rows of a batch to a loss."""


def fit(
    model: nn.Module, count: int, loss: RowLoss, *, steps: int, seed: int, rate: float = RATE
) -> nn.Module:
    """A trained copy of a classifier, in evaluation mode.

    Args:
        model: The classifier; it is not changed.
        count: How many rows there are to draw from.
        loss: From the student and the rows of a batch to a loss.
        steps: Steps, each on `BATCH` rows.
        seed: Which rows are drawn.
        rate: Peak learning rate; it falls linearly.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    rows = torch.randint(0, count, (steps, BATCH), generator=generator)
    settings = TrainingSettings(steps, rate, schedule="linear", clip_norm=10.0)
    return distillation.distill(model, lambda step: rows[step], settings, loss=loss).model.eval()


def on_labels(
    model: nn.Module, texts: Texts, *, steps: int, seed: int, y: Tensor | None = None
) -> nn.Module:
    """Train on labels alone: those of the texts, or others in their place."""
    y = texts.y if y is None else y

    def loss(student: nn.Module, rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(student(texts.x[rows]), y[rows])

    return fit(model, len(texts), loss, steps=steps, seed=seed)


def on_teacher(
    model: nn.Module,
    x: Float[Tensor, "texts features"],
    scores: Float[Tensor, "texts classes"],
    *,
    steps: int,
    seed: int,
    temperature: float = 2.0,
    labels: Tensor | None = None,
    weight: float = 1.0,
) -> nn.Module:
    """Train on a teacher's scores, which were computed once, by Hinton's loss."""

    def loss(student: nn.Module, rows: Tensor) -> Tensor:
        return distillation.hinton_loss(
            student(x[rows]), scores[rows], None if labels is None else labels[rows],
            temperature=temperature, weight=weight,
        )  # fmt: skip

    return fit(model, len(x), loss, steps=steps, seed=seed)


@torch.no_grad()
def scores_of(model: nn.Module, texts: Texts) -> Float[Tensor, "texts classes"]:
    """A classifier's scores."""
    return model(texts.x)


def right(model: nn.Module, texts: Texts) -> Tensor:
    """Which texts a classifier has right, as 0 and 1."""
    return (scores_of(model, texts).argmax(1) == texts.y).double()


def by_document(correct: Tensor, texts: Texts) -> list[float]:
    """The share of right answers among the texts of each document."""
    names = sorted(set(texts.documents))
    index = torch.tensor([names.index(one) for one in texts.documents])
    total = torch.zeros(len(names), dtype=torch.double).index_add(0, index, correct.double())
    return [round(v, 4) for v in (total / torch.bincount(index)).tolist()]


@cache
def teacher(seed: int = 0, hidden: int = TEACHER, steps: int = TAUGHT) -> nn.Module:
    """A network trained on the teachers' half of the texts."""
    return on_labels(net(hidden, 500 + seed), languages().taught, steps=steps, seed=500 + seed)


def longer(texts: int, model: nn.Module, taught_by: nn.Module, runs: int = 1) -> int:
    r"""Steps of a student that cost what the teacher's answers cost.

    A teacher's answer takes $2 P_T$ operations a text, a student's step $6 P_S$ a text.

    Args:
        texts: How many texts the teacher answers.
        model: The student.
        taught_by: The teacher.
        runs: How many times it answers each of them.
    """
    operations = runs * texts * 2 * parameters(taught_by)
    return -(-operations // (BATCH * 6 * parameters(model)))


# ------------------------------------------------------------------- the class that never appears


def missing_class(
    language: str, temperature: float, *, hidden: int = STUDENT, steps: int = FULL, seed: int = 0
) -> dict[str, object]:
    """A student whose transfer set has no text of one language.

    Args:
        language: The language that is left out; the teacher knows it.
        temperature: Of the teacher's answers; 0 trains on labels alone.
        hidden: The student's hidden units.
        steps: The student's steps.
        seed: The student's start and batches.

    Returns:
        The student's scores of the test texts ("scores"), "accuracy" over all of them, that of the
        missing language ("missing"), the teacher's ("teacher"), and how the student answers texts
        of that language, by language ("answers").

    Raises:
        ValueError: A language that is not among the twelve.
    """
    found = languages()
    if language not in found.names:
        raise ValueError(f"there is no {language!r}; choose one of {', '.join(found.names)}.")
    gone = found.names.index(language)
    seen = found.transfer.at((found.transfer.y != gone).nonzero()[:, 0])
    student = net(hidden, seed)
    if temperature == 0:
        model = on_labels(student, seen, steps=steps, seed=seed)
    else:
        model = on_teacher(
            student, seen.x, scores_of(teacher(), seen), steps=steps, seed=seed,
            temperature=temperature,
        )  # fmt: skip
    scores = scores_of(model, found.test)
    of_it = found.test.y == gone
    answers = torch.bincount(scores[of_it].argmax(1), minlength=len(found.names))
    return {
        "scores": scores,
        "accuracy": float((scores.argmax(1) == found.test.y).double().mean()),
        "missing": float((scores.argmax(1)[of_it] == gone).double().mean()),
        "teacher": float(right(teacher(), found.test)[of_it].mean()),
        "answers": dict(zip(found.names, answers.tolist())),
        "texts": int(of_it.sum()),
    }
