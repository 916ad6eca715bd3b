"""What the chapter on retrieval reads: a library of package descriptions, and texts to judge on.

The library holds one description of each of some source packages of the training split; the texts
come from other source packages. German descriptions, which no model of the workbook was trained on,
stand for another domain.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from effnb.lab import corpora

LONGEST = 256
"""Tokens of a description that are read."""


@lru_cache(maxsize=1)
def order() -> tuple[corpora.Package, ...]:
    """One description of every source package of the training split, in a random order."""
    rng = random.Random("library")
    packages = list(corpora.packages("train"))
    rng.shuffle(packages)
    first = {package.source: package for package in reversed(packages)}
    chosen = [package for package in packages if first[package.source] is package]
    return tuple(chosen)


def encoded(tokenizer: Any, text: str, longest: int = LONGEST) -> list[int]:
    """The first tokens of a text."""
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)[:longest]


def library(tokenizer: Any, entries: int) -> list[list[int]]:
    """Tokens of descriptions that give about as many entries; a larger library holds a smaller.

    Args:
        tokenizer: Cuts the text into tokens.
        entries: Entries wanted: a description of n tokens gives n - 1.
    """
    found, count = [], 0
    for package in order():
        if count >= entries:
            break
        ids = encoded(tokenizer, package.document)
        found.append(ids)
        count += max(0, len(ids) - 1)
    return found


def texts(tokenizer: Any, split: str, count: int, longest: int = LONGEST) -> list[list[int]]:
    """Tokens of descriptions, spread over a split."""
    documents = [d for d in corpora.documents("packages", split) if len(d) >= 40]
    return _spread(tokenizer, documents, count, longest)


def german(tokenizer: Any, split: str, count: int, longest: int = LONGEST) -> list[list[int]]:
    """Tokens of German descriptions, spread over a split."""
    documents = [t.text for t in corpora.translations("de", split) if len(t.text) >= 40]
    return _spread(tokenizer, documents, count, longest)


def _spread(tokenizer: Any, documents: Sequence[str], count: int, longest: int) -> list[list[int]]:
    count = min(count, len(documents))
    chosen = [documents[i * len(documents) // count] for i in range(count)]
    return [encoded(tokenizer, text, longest) for text in chosen]


def rows(documents: Sequence[Sequence[int]], length: int) -> Int[Tensor, "texts length"]:
    """The first tokens of those documents that have as many."""
    return torch.tensor([list(ids[:length]) for ids in documents if len(ids) >= length])
