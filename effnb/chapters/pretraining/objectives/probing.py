"""The probe that judges every objective alike: which section a package belongs to.

A network reads a description without the package's name, which would give the section away. The
mean of its last layer is all that a linear classifier sees. Sections are equally frequent, so
guessing is right once in ten.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from effnb.evaluation import linear_probe
from effnb.lab import corpora

SECTIONS = (
    "admin", "doc", "java", "javascript", "libs", "net", "perl", "python", "science", "utils",
)  # fmt: skip
LEARN, JUDGE = 100, 60
"""Descriptions of each section that the probe learns from, and is judged by."""
TOKENS = 48
GROUPS = 48
"""Parts that the judged descriptions are divided into, by their sources: what verdicts resample."""
HELD_BACK = 0.1
"""The probe's `c`: how little its weights are held back."""


@dataclass(frozen=True)
class Texts:
    """Descriptions and their sections.

    Attributes:
        learn: What the probe learns from.
        learn_labels: Their sections.
        judge: What it is judged by, sorted by source package.
        judge_labels: Their sections.
    """

    learn: tuple[str, ...]
    learn_labels: Int[Tensor, " learn"]
    judge: tuple[str, ...]
    judge_labels: Int[Tensor, " judge"]


@cache
def texts() -> Texts:
    """Descriptions drawn once, equally many of each section; none of a source is in both parts."""

    def drawn(split: str, each: int) -> list[corpora.Package]:
        found = []
        for section in SECTIONS:
            some = [p for p in corpora.packages(split) if p.section == section]
            found += random.Random(f"{split} {section}").sample(some, each)
        return found

    learn = drawn("train", LEARN)
    judge = sorted(drawn("test", JUDGE), key=lambda p: (p.source, p.name))

    def said(packages: Sequence[corpora.Package]) -> tuple[str, ...]:
        return tuple(f"{p.synopsis}. {p.text}" for p in packages)

    def labels(packages: Sequence[corpora.Package]) -> Int[Tensor, " texts"]:
        return torch.tensor([SECTIONS.index(p.section) for p in packages])

    return Texts(said(learn), labels(learn), said(judge), labels(judge))


def tokens(
    said: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int = TOKENS
) -> list[Int[Tensor, " time"]]:
    """The beginnings of texts."""
    return [
        torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False)[:length])
        for text in said
    ]


def probed(
    read: Callable[[Sequence[Tensor]], Float[Tensor, "texts hidden"]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[bool]:
    """Which of the judged descriptions a probe on a network's features puts into their section.

    Args:
        read: From token ids to features, one row for each text.
        tokenizer: The network's.
    """
    given = texts()
    probe = linear_probe(read(tokens(given.learn, tokenizer)), given.learn_labels, c=HELD_BACK)
    return probe.correct(read(tokens(given.judge, tokenizer)), given.judge_labels).tolist()


def grouped(correct: Sequence[bool]) -> list[float]:
    """Part of the right answers in each group of neighbouring sources."""
    edges = [round(i * len(correct) / GROUPS) for i in range(GROUPS + 1)]
    return [round(sum(correct[a:b]) / (b - a), 4) for a, b in pairwise(edges)]
