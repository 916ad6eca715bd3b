"""What the sweeps of stored measurements share: the runner, tables that resume, the bench's rows.

    python data/sweeps/05_inference/3_quantization.py                    # every part
    python data/sweeps/05_inference/3_quantization.py methods domains    # these parts
    python data/sweeps/05_inference/3_quantization.py --resume           # what is not stored yet

A sweep lies where its chapter lies: `data/sweeps/<chapter>.py` stores
`data/results/<chapter>/<part>.json`. Quality is that of `effnb.lab.bench`: the loss of each window
and each answer are stored, so that two settings can be compared pair by pair.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effnb.lab import bench, corpora, results, texts
from effnb.lab._files import DamagedFile, data_folder, forget_use
from effnb.lab.texts import CALIBRATION, CONTEXT_TOKENS

CONTEXT = CONTEXT_TOKENS
WINDOWS = bench.WINDOWS
QUESTIONS = bench.QUESTIONS
SEEDS = (0, 1, 2)
SMOLLM2_WINDOWS = 32
"""Windows that every stored table of SmolLM2 rests on: 16,384 tokens."""
LONG = ("windows", "answers", "layers", "domains", "curve")
"""Columns that are stored and not printed."""


def windows_of(
    loaded: Any, documents: list[str], count: int, length: int = CONTEXT
) -> torch.Tensor:
    """The first `count` windows of the documents' tokens, one behind the other."""
    return texts.windows_of(loaded.tokenizer, documents, count, length)


def calibration(loaded: Any, seed: int, shape: tuple[int, int] = CALIBRATION) -> torch.Tensor:
    """Random sequences of the training corpora, in equal parts."""
    return texts.calibration_sequences(loaded.tokenizer, seed, shape)


def training_batches(
    loaded: Any, seed: int, steps: int, shape: tuple[int, int] = (8, 128)
) -> list[torch.Tensor]:
    """A batch for each step, other text than any `calibration` of a small seed."""
    return texts.training_batches(loaded.tokenizer, seed, steps, shape)


def held_out_novel() -> list[str]:
    """The chapters of the novel that no model of the bench was trained on."""
    return [c.text for c in corpora.novels("test") if c.kind == "novel"]


def domain_windows(loaded: Any, count: int, length: int) -> dict[str, torch.Tensor]:
    """Windows of each kind of held-out text: known domains, and languages no model learned."""
    return texts.domain_windows(loaded.tokenizer, count, length)


class Bench(bench.Bench):
    """The bench, with rows for tables."""

    def __init__(
        self, name: str = "mini-5m", questions: int = QUESTIONS, windows: int = WINDOWS
    ) -> None:
        """Load the model and cut the held-out texts; no questions are asked if there are 0."""
        super().__init__(name, windows=windows, questions=questions)

    @property
    def items(self) -> tuple[corpora.ChoiceItem, ...]:
        """The ranked-choice questions."""
        return self.questions

    def row(self, model: nn.Module, bytes_: int | None = None, **about: Any) -> dict[str, Any]:
        """Quality of a model, and its bytes: its file's, plain weights in 16 bits, unless given."""
        row = about | self.quality(model)
        row["bytes"] = bench.file_bytes(model) if bytes_ is None else bytes_
        print({k: v for k, v in row.items() if k not in LONG}, flush=True)
        return row

    def quality(self, model: nn.Module, *, ask: bool = True) -> dict[str, Any]:
        """Mean loss, the loss of each window, and the answers, if there are questions."""
        losses = self.losses(model)
        row = {"loss": round(sum(losses) / len(losses), 5), "windows": losses}
        if ask and self.questions:
            correct = self.answers(model)
            found = bench.share(correct)
            row["accuracy"] = round(found.value, 4)
            row["standard_error"] = round(
                (found.value * (1 - found.value) / len(correct)) ** 0.5, 4
            )
            row["answers"] = "".join("01"[one] for one in correct)
        return row


def timed(method: Callable[..., Any], *arguments: Any, **keywords: Any) -> tuple[Any, float]:
    """A method's result and its seconds."""
    began = time.perf_counter()
    result = method(*arguments, **keywords)
    return result, round(time.perf_counter() - began, 2)


# ---------------------------------------------------------------------------------- the runner


class Table:
    """Rows that are stored one by one, and not measured again when a run goes on.

    A sweep makes a class of its own of it, with its chapter's name.
    """

    chapter = ""
    resume = False

    def __init__(self, part: str, **about: Any) -> None:
        """Begin the table of a part; `about` is stored beside it.

        Raises:
            Outdated: When a run goes on that was begun with another model or corpus.
        """
        self.name, self.about = f"{self.chapter}/{part}", about
        self.rows: list[dict[str, Any]] = []
        old = results.read(self.name) if Table.resume else None
        self.old: list[dict[str, Any]] = list(old.data["table"]) if old else []

    def add(self, about: dict[str, Any], measure: Callable[[], dict[str, Any] | None]) -> None:
        """Measure one point, unless it is stored; a measurement of None is left out."""
        row = next((r for r in self.old if about.items() <= r.items()), None)
        if row is None:
            found = measure()
            if found is None:
                return
            row = about | found
            print({k: v for k, v in row.items() if k not in LONG}, flush=True)
        self.rows.append(row)
        self.store()

    def store(self, **more: Any) -> None:
        """Write what is there; it is not complete before its part has ended."""
        self.about |= more
        results.store(self.name, self.about | {"table": self.rows}, complete=False)


def chapter_of(script: str | Path) -> str:
    """The chapter whose results a sweep measures: its path below `data/sweeps/`.

    Raises:
        ValueError: When the script lies elsewhere.
    """
    try:
        return (
            Path(script)
            .resolve()
            .relative_to((data_folder() / "sweeps").resolve())
            .with_suffix("")
            .as_posix()
        )
    except ValueError:
        raise ValueError(f"{Path(script).name} does not lie in data/sweeps/.") from None


Part = Callable[[], Mapping[str, Any] | None]


def run(parts: Mapping[str, Part], script: str | Path, about: str) -> int:
    """Measure the parts that the command line asks for, and store each when it is done.

    A part returns what is to be stored, or stores a `Table` row by row and returns nothing. With
    `--resume` parts that are complete are left alone, and tables go on where they ended.

    Args:
        parts: What each part computes, by its name.
        script: The sweep's `__file__`.
        about: One line on what it is for.

    Returns:
        Exit status: 1 when a run cannot go on because a model, a corpus or a file is not what it
        was, else 0.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; all by default")
    parser.add_argument("--resume", action="store_true", help="measure only what is not stored")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.parts) - set(parts)):
        parser.error(f"there is no part {unknown[0]!r}; choose from {', '.join(parts)}.")
    Table.resume = arguments.resume
    try:
        for part in arguments.parts or parts:
            name = f"{chapter_of(script)}/{part}"
            if arguments.resume and (old := results.read(name)) and old.provenance.complete:
                print(f"{name} is stored already", flush=True)
                continue
            forget_use()
            data = parts[part]()
            # A table has stored its rows itself; what it read is still known.
            results.store(name, results.read(name).data if data is None else data)
            print(f"stored {name}", flush=True)
    except (results.Outdated, DamagedFile) as problem:
        print(f"{problem} Without --resume it is measured from the beginning.", file=sys.stderr)
        return 1
    return 0
