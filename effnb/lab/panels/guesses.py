"""Guesses: what a reader expects of a panel, taken before the panel answers, and kept.

    panel(…, predict=guess("How much worse is 3 bits than 8?", answer=lambda found: found["ratio"]))

Every guess is part of the panel's saved output. Where the notebook's own file is known, guesses are
also kept beside it, in `<notebook>.guesses.json`, so that a notebook that is run again does not ask
twice. `effnb.lab.guesses()` shows all of them, and gives them away as CSV.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from effnb.lab.panels.knobs import numeric, say
from effnb.lab.panels.readout import csv_link
from effnb.lab.tables import Table, table


@dataclass(frozen=True)
class Guess:
    """A question that a panel asks before it answers.

    Attributes:
        question: The question, as a sentence.
        choices: What there is to choose from; nothing where a number is asked for.
        answer: Gives the right choice, or the right number, from what `compute` returned; None
            where the panel itself is the answer.
        at: The knobs' values that the question is about; the others stand at their defaults.
        unit: Unit of the number, such as "%".
    """

    question: str
    choices: tuple[str, ...] = ()
    answer: Callable[[Any], Any] | None = None
    at: Mapping[str, Any] = field(default_factory=dict)
    unit: str = ""

    def read(self, words: str) -> str | float:
        """A guess from what a reader typed or chose.

        Raises:
            ValueError: When it is no number, or none of the choices.
        """
        words = words.strip()
        if self.choices:
            if words not in self.choices:
                raise ValueError(f"choose one of: {', '.join(self.choices)}.")
            return words
        bare = words.removesuffix(self.unit).strip() if self.unit else words
        # A comma is a decimal point, unless it separates groups of three digits.
        bare = re.sub(r",(?=\d{3}(?:\D|$))", "", bare).replace(",", ".").replace("−", "-")
        try:
            number = float(bare)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError("a guess is one number, such as 12.5." if words else "type a number.")
        return number

    def say(self, value: object) -> str:
        """A guess, or an answer, in words with its unit."""
        if not numeric([value]):
            return say(value)
        return f"{value:.4g} {self.unit}".strip()

    def verdict(self, value: str | float | None, result: Any) -> str:
        """The guess beside the answer, in one or two sentences; `value` is None when skipped."""
        said = "No guess was made." if value is None else f"Your guess: {self.say(value)}."
        if self.answer is None:
            return said
        right = self.answer(result)
        said += f" The answer: {self.say(right)}."
        if value is None:
            return said
        if self.choices:
            return (
                f"{said} {'You were right.' if say(right) == value else 'Not what you expected.'}"
            )
        gap = abs(value - right)
        if gap <= 0.05 * abs(right):
            return f"{said} That is within 5 %."
        by = f"{gap:.4g} points" if self.unit == "%" else self.say(gap)
        return f"{said} You were {by} too {'high' if value > right else 'low'}."


def guess(
    question: str,
    choices: Sequence[object] | None = None,
    *,
    answer: Callable[[Any], Any] | None = None,
    at: Mapping[str, Any] | None = None,
    unit: str = "",
) -> Guess:
    """A question that keeps a panel locked until the reader has guessed, or skipped.

    Args:
        question: The question, as a sentence.
        choices: What there is to choose from; a number is asked for when None.
        answer: Gives the right choice or number from what `compute` returned.
        at: The knobs' values that the question is about; the others stand at their defaults.
        unit: Unit of the number, such as "%".

    Raises:
        ValueError: When there is no question, or there are fewer than two different choices.
    """
    if not question.strip():
        raise ValueError("a guess needs a question: say in a sentence what is to be guessed.")
    words = tuple(say(choice) for choice in choices or ())
    if choices is not None and len(set(words)) < max(2, len(words)):
        raise ValueError(f"a guess needs at least two different choices, and has {words}.")
    return Guess(question.strip(), words, answer, dict(at or {}), unit)


# ------------------------------------------------------------------------------- kept guesses


@dataclass(frozen=True)
class Made:
    """A guess that was made.

    Attributes:
        question: What was asked.
        guess: What was guessed; None when the question was skipped.
        answer: What came out, in words; empty where the panel itself is the answer.
        unit: Unit of a guessed number.
    """

    question: str
    guess: str | float | None
    answer: str
    unit: str = ""

    def words(self) -> str:
        """The guess in words."""
        if self.guess is None:
            return "skipped"
        if isinstance(self.guess, str):
            return self.guess
        return f"{self.guess:.4g} {self.unit}".strip()


_made: dict[str, Made] = {}
"""The guesses of this kernel, by question."""


def notebook_file() -> Path | None:
    """The notebook that this kernel runs for, where the server says so and the file is there."""
    named = os.environ.get("JPY_SESSION_NAME")
    path = Path(named) if named else None
    return path if path and path.suffix == ".ipynb" and path.is_file() else None


def _keeping() -> Path | None:
    """The file that keeps the notebook's guesses; None where it is not known, or in a build."""
    if os.environ.get("EFFNB_BUILD") == "1" or os.environ.get("EFFNB_SWEEP") == "1":
        return None
    notebook = notebook_file()
    return notebook.with_suffix(".guesses.json") if notebook else None


def _load() -> None:
    """Add what is kept beside the notebook; a file that cannot be read holds no guesses."""
    path = _keeping()
    if path is None:
        return
    try:
        for one in json.loads(path.read_text(encoding="utf-8")):
            made = Made(one["question"], one["guess"], one["answer"], one.get("unit", ""))
            _made.setdefault(made.question, made)
    except (OSError, ValueError, KeyError, TypeError):
        return


def earlier(question: str) -> Made | None:
    """What was guessed before, in this kernel or when the notebook was last open."""
    _load()
    return _made.get(question)


def keep(made: Made) -> None:
    """Keep a guess, beside the notebook where that is known and can be written."""
    _load()
    _made[made.question] = made
    path = _keeping()
    if path is None:
        return
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(json.dumps([asdict(m) for m in _made.values()], indent=1), encoding="utf-8")
        new.replace(path)
    except OSError:  # a folder that cannot be written: the guess is still in the saved output
        return


class Guesses:
    """All guesses of a notebook; the last value of a cell shows them."""

    def __init__(self, made: Sequence[Made]) -> None:
        """Keep the guesses, in the order in which they were made."""
        self.made = tuple(made)

    def table(self) -> Table:
        """Question, guess and answer, one row each."""
        return table(
            [
                {
                    "question": one.question,
                    "guess": one.words(),
                    "answer": one.answer or "see the panel",
                }
                for one in self.made
            ],
            columns=["question", "guess", "answer"],
            caption="Your guesses in this notebook.",
        )

    def csv(self) -> str:
        """The same as CSV, with a heading."""
        return self.table().csv()

    def __repr__(self) -> str:
        return repr(self.table()) if self.made else "No guess has been made in this notebook yet."

    def _repr_html_(self) -> str:
        if not self.made:
            return f"<p>{html.escape(repr(self))}</p>"
        return self.table()._repr_html_() + csv_link(self.csv(), "my guesses")


def guesses() -> Guesses:
    """Every guess that was made in this notebook, to look at and to take away as CSV."""
    _load()
    return Guesses(list(_made.values()))
