"""The collection that the chapter searches: 10,000 package descriptions, and who asks for them.

A query is the one-line synopsis of a package; what it should find is the same package's long
description. Each source package gives one description, so that nothing in the collection is a
near-duplicate by birth. MiniLM turns each text into 384 numbers. That takes minutes, so the vectors
are computed once and kept in the cache; the chapter itself reads only prefixes that are shipped.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from effnb.lab import corpora, load, models
from effnb.lab._cache import cached_folder
from effnb.lab._files import note_use

DOCUMENTS = 10_000
"""Descriptions in the collection."""
PAIRS = 4_000
"""Pairs of synopsis and description to train a map with; none of them is in the collection."""
QUERIES = {"test": 1_000, "validation": 500}
"""Synopses that ask, of packages in the collection. Settings are chosen by those of `validation`,
and everything that is reported is measured on those of `test`."""
TOKENS = 64
"""A description is read up to this many tokens, more than most descriptions have."""
SHORTEST = 60
"""Descriptions of fewer characters say too little to be found by."""
CHUNK = 1_000
"""Texts that are encoded and kept together: an interrupted run goes on after the last chunk."""


@dataclass(frozen=True)
class Collection:
    """What is searched, what asks, and what a map is trained with.

    Attributes:
        documents: The packages whose descriptions are searched, in a fixed random order.
        pairs: Packages to train with, of other sources than those of the documents.
        asked: Rows in `documents` that each set of queries asks for, by "test" and "validation".
    """

    documents: tuple[corpora.Package, ...]
    pairs: tuple[corpora.Package, ...]
    asked: dict[str, tuple[int, ...]]


@lru_cache(maxsize=1)
def collection() -> Collection:
    """Choose the documents: all held-out sources, and as many others as are needed."""
    rng = random.Random(17)
    seen: set[str] = set()
    chosen: dict[str, list[corpora.Package]] = {}
    for split in ("test", "validation", "train"):
        packages = corpora.packages(split)
        rng.shuffle(packages)
        chosen[split] = []
        sources: set[str] = set()
        for package in packages:
            text = " ".join(package.text.lower().split())
            if package.source in sources or len(text) < SHORTEST or text in seen:
                continue
            sources.add(package.source)
            seen.add(text)
            chosen[split].append(package)
    held_out = chosen["test"] + chosen["validation"]
    others = DOCUMENTS - len(held_out)
    documents = held_out + chosen["train"][:others]
    pairs = chosen["train"][others : others + PAIRS]
    order = list(range(len(documents)))
    rng.shuffle(order)
    documents = [documents[i] for i in order]
    asked = {
        split: tuple(i for i, p in enumerate(documents) if p.split == split)[:count]
        for split, count in QUERIES.items()
    }
    return Collection(tuple(documents), tuple(pairs), asked)


@dataclass(frozen=True)
class Vectors:
    """MiniLM's vectors of length 1, all (texts, 384).

    Attributes:
        documents: Of the descriptions in the collection.
        queries: Of the synopses that ask, by "test" and "validation".
        pair_queries: Of the synopses to train with.
        pair_documents: Of the descriptions that belong to them.
    """

    documents: Float[Tensor, "documents dim"]
    queries: dict[str, Float[Tensor, "queries dim"]]
    pair_queries: Float[Tensor, "pairs dim"]
    pair_documents: Float[Tensor, "pairs dim"]


def _encode(texts: list[str], name: str) -> Float[Tensor, "texts dim"]:
    """The vectors of these texts, from the cache or computed now, a chunk at a time.

    The encoder runs in bfloat16, which halves the time on processors that know it and turns a
    vector by about a tenth of a degree; vectors are kept in 16 bits.
    """
    found = []
    for start in range(0, len(texts), CHUNK):
        part = texts[start : start + CHUNK]

        def write(folder: Path, part: list[str] = part) -> None:
            encoder = dataclasses.replace(load("minilm-l6", device="cpu"), max_tokens=TOKENS)
            with torch.autocast("cpu", torch.bfloat16):
                vectors = encoder.encode(part)
            save_file({"vectors": vectors.half()}, folder / "vectors.safetensors")

        folder = cached_folder(f"matryoshka-{name}-{start // CHUNK:02d}", write)
        found.append(load_file(folder / "vectors.safetensors")["vectors"].float())
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def vectors() -> Vectors:
    """All of MiniLM's vectors; about ten minutes on two idle cores, the first time.

    They count as use of the model and of the corpus, wherever they come from.
    """
    note_use("model minilm-l6", models.sha256("minilm-l6") or "not installed")
    note_use("corpus packages", corpora.sha256("packages"))
    return _vectors()


@lru_cache(maxsize=1)
def _vectors() -> Vectors:
    here = collection()
    queries = {
        split: _encode([here.documents[i].synopsis for i in rows], f"queries-{split}")
        for split, rows in here.asked.items()
    }
    return Vectors(
        documents=_encode([p.text for p in here.documents], "documents"),
        queries=queries,
        pair_queries=_encode([p.synopsis for p in here.pairs], "pair-queries"),
        pair_documents=_encode([p.text for p in here.pairs], "pair-documents"),
    )
