"""What the sweeps behind the verdicts share: documents to judge on, and tables of runs.

`data/claims.json` registers which rows are compared, before they are measured. A row is one run on
one model with one seed; it says how many tokens calibrated and trained it, and holds the loss of
every document on its own, since documents are what the verdicts resample. A row without a seed is
of a method that draws nothing. What is compared by a random choice or by any text that a method
sees is run with five seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effnb.evaluation.quality import token_losses
from effnb.lab import corpora, load, results
from effnb.lab.sweeps import calibration, chapter_of, held_out_novel
from effnb.lab.texts import CALIBRATION

SEEDS = (0, 1, 2, 3, 4)
LONG, SHORT = 512, 256
"""Tokens of a document that `mini-5m` is judged by; SmolLM2, and kinds of text, by 256."""
PACKAGES = 96
"""Package descriptions, spread over the test set; of novel and Bible all held-out chapters."""


def documents_of(loaded: Any, texts: Sequence[str], count: int, length: int) -> list[Tensor]:
    """The first `length` tokens of `count` texts, spread evenly over those of 40 characters on."""
    texts = [text for text in texts if len(text) >= 40]
    count = min(count, len(texts))
    encode = loaded.tokenizer.encode
    return [
        torch.tensor(
            encode(texts[i * len(texts) // count], add_special_tokens=False, verbose=False)[:length]
        )
        for i in range(count)
    ]


def domains_of(loaded: Any) -> dict[str, list[Tensor]]:
    """Documents that represent each kind of text: all of it, not its first windows."""
    bible = [c.text for c in corpora.novels("test") if c.kind == "bible"]
    return {
        "novel": documents_of(loaded, held_out_novel(), 10_000, SHORT),
        "Bible": documents_of(loaded, bible, 10_000, SHORT),
        "packages": documents_of(loaded, corpora.documents("packages", "test"), PACKAGES, SHORT),
    }


@torch.inference_mode()
def by_document(model: nn.Module, documents: Sequence[Tensor], batch: int = 4) -> list[float]:
    """The mean loss of each document, in nats per token; shorter ones are padded on the right."""
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    found = [0.0] * len(documents)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = nn.utils.rnn.pad_sequence([documents[i] for i in chosen], batch_first=True)
        losses = token_losses(model, rows)  # causal: what follows a document does not change it
        for i, row in zip(chosen, losses):
            found[i] = round(float(row[: len(documents[i]) - 1].mean()), 5)
    return found


class Bench:
    """A model, the documents it is judged on, and calibration sets by seed."""

    def __init__(self, name: str) -> None:
        """Load the model and cut the held-out documents."""
        self.name, self.loaded = name, load(name, device="cpu")
        self.model = self.loaded.model
        length = SHORT if name.startswith("smollm2") else LONG
        self.documents = documents_of(self.loaded, held_out_novel(), 24, length)
        self.shape = (16, 256) if name.startswith("smollm2") else CALIBRATION

    def calibration(self, seed: int) -> Tensor:
        """The text that every method sees, equally much for all."""
        return calibration(self.loaded, seed, self.shape)

    def judged(self, model: nn.Module, seen: Tensor | None = None) -> dict[str, Any]:
        """The loss of each document, and how much text calibrated the model."""
        return {
            "documents": by_document(model, self.documents),
            "calibration_tokens": 0 if seen is None else seen.numel(),
        }


class Table:
    """Rows that are stored one by one; those that are stored are not measured again."""

    fresh = False

    def __init__(self, name: str, command: str) -> None:
        """Begin or go on with a stored table."""
        self.name, self.command = name, command
        self.rows: list[dict[str, Any]] = []
        if not self.fresh:
            old = results.read(name)
            self.rows = old.data["table"] if old else []

    def add(self, about: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> None:
        """Measure one run, unless it is stored."""
        keys = {"table": None, "seed": None, **about}
        if any(all(row.get(k) == v for k, v in keys.items()) for row in self.rows):
            return
        self.rows.append(dict(about) | dict(measure()))
        results.store(self.name, {"table": self.rows}, self.command)
        print(
            {k: v for k, v in self.rows[-1].items() if not isinstance(v, list | dict)}, flush=True
        )


def run(parts: Mapping[str, Callable[[Table], None]], script: str, about: str) -> None:
    """Measure the parts that the command line asks for, row by row.

    Args:
        parts: What each part adds to its table, by its name.
        script: The script's `__file__`; the results have its path below `data/sweeps/`.
        about: One line on what it is for.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; all by default")
    parser.add_argument("--fresh", action="store_true", help="forget the rows that are stored")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.parts) - set(parts)):
        parser.error(f"there is no part {unknown[0]!r}; choose from {', '.join(parts)}.")
    Table.fresh = arguments.fresh
    for part in arguments.parts or parts:
        chapter = chapter_of(Path(script))
        command = f"python data/sweeps/{chapter}.py {part}"
        parts[part](Table(f"{chapter}/{part}", command))
