"""Tokens to measure and to calibrate on, drawn from the corpora the same way everywhere.

Held-out text is drawn over all documents of the test splits, text that calibrates or trains from
the training splits. Every draw has a seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from effnb.lab import corpora

CONTEXT_TOKENS = 512
"""Tokens of a held-out window."""
CALIBRATION = (32, 256)
"""Sequences and tokens of each that calibrate a method."""
SEED = 0
"""Seed of the order of held-out documents, and of the places in them."""


def held_out_windows(
    tokenizer: PreTrainedTokenizerBase, count: int, length: int = CONTEXT_TOKENS, seed: int = SEED
) -> tuple[Int[Tensor, "windows time"], tuple[str, ...], tuple[str, ...]]:
    """Windows drawn over all held-out documents of all corpora, the corpora in turn.

    Within a corpus the documents are shuffled once. Each gives one window, at a place drawn at
    random, before any gives a second. A document that is shorter than a window is followed by the
    next ones, an end-of-text token after each; together they count as one document.

    Args:
        tokenizer: Cuts the text into tokens; every tokenizer meets the same documents, at the same
            places.
        count: Number of windows.
        length: Tokens of each.
        seed: Seed of the order and the places.

    Returns:
        The windows, the corpus of each, and the name of the document of each.
    """
    streams = {
        name: _windows_of(tokenizer, named_documents(name), length, random.Random(f"{seed} {name}"))
        for name in corpora.NAMES
    }
    rows, of_corpus, of_document = [], [], []
    for number in range(count):
        name = corpora.NAMES[number % len(corpora.NAMES)]
        document, ids = next(streams[name])
        rows.append(ids)
        of_corpus.append(name)
        of_document.append(document)
    return torch.tensor(rows), tuple(of_corpus), tuple(of_document)


def named_documents(name: str) -> list[tuple[str, str]]:
    """Name and text of every held-out document of a corpus."""
    if name == "novels":
        return [(f"{c.work} {c.chapter}", c.text) for c in corpora.novels("test")]
    if name == "packages":
        return [(p.name, p.document) for p in corpora.packages("test")]
    return [(f"{m.work}: {m.document}", m.text) for m in corpora.manuals("test")]


def _windows_of(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[tuple[str, str]],
    length: int,
    rng: random.Random,
) -> Iterator[tuple[str, list[int]]]:
    """Endless windows: the document and its tokens."""
    end = tokenizer.eos_token_id
    order = rng.sample(range(len(texts)), len(texts))
    while True:
        waiting = iter(order)
        for first in waiting:
            document, text = texts[first]
            ids = [*tokenizer.encode(text, add_special_tokens=False, verbose=False), end]
            place = rng.random()  # drawn for every document, so that all tokenizers draw alike
            if len(ids) >= length:
                at = int(place * (len(ids) - length + 1))
                yield document, ids[at : at + length]
                continue
            while len(ids) < length:
                following = next(waiting, order[0])
                ids += tokenizer.encode(
                    texts[following][1], add_special_tokens=False, verbose=False
                )
                ids.append(end)
            yield document, ids[:length]


def calibration_sequences(
    tokenizer: PreTrainedTokenizerBase, seed: int, shape: tuple[int, int] = CALIBRATION
) -> Int[Tensor, "sequences time"]:
    """Random sequences of the training corpora, in equal parts and in a random order.

    The order lets a method that needs fewer take the first ones, which come from all corpora.

    Args:
        tokenizer: Cuts the text into tokens.
        seed: Seed of the draw.
        shape: Number of sequences, and tokens of each.

    Raises:
        ValueError: When there is nothing to draw.
    """
    sequences, length = shape
    if sequences < 1 or length < 1:
        raise ValueError(f"shape is {shape}; calibration needs at least one sequence of one token.")
    rng = random.Random(seed)
    rows: list[Tensor] = []
    for number, name in enumerate(corpora.NAMES, 1):
        texts = corpora.documents(name, "train")
        while len(rows) < sequences * number // len(corpora.NAMES):
            ids: list[int] = []
            while len(ids) < length:
                ids += tokenizer.encode(rng.choice(texts), add_special_tokens=False, verbose=False)
            start = rng.randrange(len(ids) - length + 1)
            rows.append(torch.tensor(ids[start : start + length]))
    rng.shuffle(rows)
    return torch.stack(rows)


def training_batches(
    tokenizer: PreTrainedTokenizerBase, seed: int, steps: int, shape: tuple[int, int] = (8, 128)
) -> list[Int[Tensor, "sequences time"]]:
    """A batch for each step, other text than any calibration of a small seed."""
    return [
        calibration_sequences(tokenizer, 1000 * (seed + 1) + step, shape) for step in range(steps)
    ]


def windows_of(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], count: int, length: int
) -> Int[Tensor, "windows time"]:
    """The first `count` windows of the texts' tokens, one behind the other."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=False, verbose=False)
        ids.append(tokenizer.eos_token_id)
        if len(ids) >= count * length:
            break
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)[:count]


def domain_windows(
    tokenizer: PreTrainedTokenizerBase, count: int, length: int
) -> dict[str, Int[Tensor, "windows time"]]:
    """Windows spread evenly over each kind of held-out text: known domains, unknown languages."""
    texts = {
        "novel": [c.text for c in corpora.novels("test") if c.kind == "novel"],
        "Bible": [c.text for c in corpora.novels("test") if c.kind == "bible"],
        "packages": corpora.documents("packages", "test"),
        **{
            f"packages in {name}": [t.text for t in corpora.translations(code, "test")]
            for name, code in (("German", "de"), ("French", "fr"), ("Japanese", "ja"))
        },
    }
    found = {}
    for name, of in texts.items():
        windows = windows_of(tokenizer, of, 1_000_000, length)
        number = min(count, len(windows))
        found[name] = windows[[i * len(windows) // number for i in range(number)]]
    return found


def long_texts(
    tokenizer: PreTrainedTokenizerBase, length: int, split: str = "test", count: int | None = None
) -> Int[Tensor, "chapters time"]:
    """The first tokens of each chapter of the novels that is long enough, in order.

    Args:
        tokenizer: Cuts the text into tokens.
        length: Tokens of each.
        split: "test" for the novel that no model was trained on, or "train".
        count: How many chapters, spread evenly over those there are; all when None.

    Raises:
        ValueError: When no chapter is so long, or fewer are than were asked for.
    """
    rows = []
    for chapter in corpora.novels(split):
        if chapter.kind == "novel":
            ids = tokenizer.encode(chapter.text, add_special_tokens=False, verbose=False)
            if len(ids) >= length:
                rows.append(torch.tensor(ids[:length]))
    wanted = len(rows) if count is None else count
    if not 1 <= wanted <= len(rows):
        raise ValueError(
            f"{wanted} chapters of {length:,} tokens were asked for; the {split} split has "
            f"{len(rows)}."
        )
    return torch.stack([rows[i * len(rows) // wanted] for i in range(wanted)])
