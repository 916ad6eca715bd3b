"""The chapter's live memory: `mini-300k` with a library of package descriptions."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from effnb.chapters.design.retrieval import memory, texts
from effnb.design.retrieval import Datastore
from effnb.lab import load

ENTRIES, JUDGED, TOKENS = 30_000, 16, 64
SIZES = (1_000, 5_000, 30_000)


@dataclass(frozen=True)
class Answer:
    """What one setting gives on the live texts.

    Attributes:
        setting: Share, neighbours, temperature.
        entries: Entries of the datastore.
        loss: Mean over the texts, in nats per token.
        alone: The decoder's own.
        gains: Nats saved on each token.
    """

    setting: memory.Setting
    entries: int
    loss: float
    alone: float
    gains: Tensor

    @property
    def helped(self) -> float:
        """Share of the tokens whose loss falls."""
        return float((self.gains > 0).float().mean())


class Live:
    """A decoder, its datastore, and texts that are looked up once for each size.

    Attributes:
        tokenizer: The decoder's.
        shelf: Tokens of the library's descriptions.
        store: One entry for each of their tokens that another follows.
        judged: Texts of other source packages.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        shelf: Sequence[Sequence[int]],
        judged: Sequence[Sequence[int]],
    ) -> None:
        """Read the library; the texts are looked up when they are first asked for."""
        self.model, self.tokenizer = model, tokenizer
        self.shelf, self.judged = [ids for ids in shelf if len(ids) > 1], judged
        self.store: Datastore = memory.stored(model, self.shelf)
        self.starts = [0, *accumulate(len(ids) - 1 for ids in self.shelf)]
        self._found: dict[int, memory.Texts] = {}

    def found(self, entries: int) -> memory.Texts:
        """The texts, looked up in the first entries."""
        entries = min(entries, len(self.store))
        if entries not in self._found:
            store = self.store.rows(torch.arange(entries))
            self._found[entries] = memory.look_up(self.model, store, self.judged)
        return self._found[entries]

    def answer(self, lam: float, k: int, temperature: float, entries: int) -> Answer:
        """Loss of one setting."""
        found, setting = self.found(entries), memory.Setting(lam, k, temperature)
        gains = found.tokens(None) - found.tokens(setting)
        return Answer(setting, entries, found.loss(setting), found.loss(None), gains)

    def place(self, row: int) -> tuple[int, int]:
        """The description of an entry, and the number of the token that came next in it."""
        document = bisect.bisect_right(self.starts, row) - 1
        return document, row - self.starts[document] + 1

    def context(self, row: int, tokens: int = 6) -> tuple[str, str]:
        """The last tokens before an entry's value, and the value."""
        document, at = self.place(row)
        ids = self.shelf[document]
        before = self.tokenizer.decode(ids[max(0, at - tokens) : at])
        return " ".join(before.split()), self.tokenizer.decode([ids[at]])

    def best(self, entries: int, k: int = 16, *, lam: float = 0.3) -> int:
        """Number of the token that the datastore helps most, among those it copies no run for."""
        return int(self.answer(lam, k, 1.0, entries).gains.argmax())

    def example(self, entries: int, token: int, count: int = 5) -> list[tuple[str, str, float]]:
        """The nearest entries of a token: what stood before, what followed, squared distance."""
        near = self.found(entries).looked.neighbours
        rows, distances = near.rows[token, :count].tolist(), near.distances[token, :count].tolist()
        return [(*self.context(row), d) for row, d in zip(rows, distances, strict=True)]

    def asked(self, token: int, tokens: int = 6) -> tuple[str, str]:
        """What stood before a token of the texts, and the token."""
        lengths = [len(ids) - 1 for ids in self.judged]
        starts = [0, *accumulate(lengths)]
        text = bisect.bisect_right(starts, token) - 1
        ids, at = self.judged[text], token - starts[text] + 1
        before = self.tokenizer.decode(list(ids[max(0, at - tokens) : at]))
        return " ".join(before.split()), self.tokenizer.decode([ids[at]])

    def __repr__(self) -> str:
        """What is there, in a line."""
        return (
            f"{len(self.shelf):,} descriptions with {len(self.store):,} entries, "
            f"{self.store.bytes / 1e6:.1f} MB; {len(self.judged)} texts to judge on."
        )


@lru_cache(maxsize=1)
def live() -> Live:
    """`mini-300k` and the first descriptions of the library."""
    loaded = load("mini-300k", device="cpu")
    shelf = texts.library(loaded.tokenizer, ENTRIES)
    judged = texts.texts(loaded.tokenizer, "test", JUDGED, TOKENS)
    return Live(loaded.model, loaded.tokenizer, shelf, judged)


def example_said(here: Live, entries: int = ENTRIES) -> str:
    """The token that the datastore helps most, and what it found there."""
    token = here.best(entries)
    before, value = here.asked(token)
    lines = [f"The text: … {before} → {value!r}", "Found, nearest first:"]
    lines += [f"   … {c} → {v!r}" for c, v, _ in here.example(entries, token)]
    return "\n".join(lines)
