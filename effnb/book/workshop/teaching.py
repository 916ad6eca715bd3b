"""What a teacher needs of a chapter: goals, a plan of the time, the usual wrong answers.

It is written once, in a file beside the chapter (`notebooks/05_inference/2_low_rank.teach.toml`):

    goals = ["Say below which rank two factors hold fewer numbers than one matrix.", ...]

    pacing_50 = [                      # minutes and what happens in them; they add up to 50
      [5, "The picture, with the guess taken by a show of hands."],
      ...
    ]
    pacing_120 = [...]                 # the same for two hours, breaks included

    [[exercise]]
    name = "The rank for a budget"     # as the exercise itself is named
    [[exercise.wrong]]
    answer = "int(kept * min(m, n))"
    why = "They take a part of the rank and not of the numbers; ask how many numbers a rank costs."
    says = "This is a part of the full rank"

`says` is the beginning of the diagnosis that the exercise's check gives for this answer, so that a
teacher knows what stands on the learner's screen; without it the check only shows the difference.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENDING = ".teach.toml"
LENGTHS = (50, 120)
"""Minutes of the two lessons that every chapter is planned for."""
GOALS = (3, 6)
"""The fewest and the most learning goals of a chapter."""


class NoTeaching(ValueError):
    """A chapter's file for teachers is missing or not as described; one sentence says how."""


@dataclass(frozen=True)
class Step:
    """One part of a lesson: its minutes, and what happens in them."""

    minutes: int
    does: str


@dataclass(frozen=True)
class Wrong:
    """A usual wrong answer.

    Attributes:
        answer: What the learner writes or says.
        why: Why they do, and what to answer.
        says: How the check's diagnosis begins; empty where the check has none for it.
    """

    answer: str
    why: str
    says: str = ""


@dataclass(frozen=True)
class Practice:
    """An exercise as its teacher knows it: its name, and its usual wrong answers."""

    name: str
    wrong: tuple[Wrong, ...]


@dataclass(frozen=True)
class Teaching:
    """Everything that a teacher needs of one chapter.

    Attributes:
        goals: What a learner can do afterwards, sentences that begin with a verb.
        pacing: The plan of a lesson, by its length in minutes.
        practices: The exercises, in the order of the page.
    """

    goals: tuple[str, ...]
    pacing: dict[int, tuple[Step, ...]]
    practices: tuple[Practice, ...]

    def practice(self, name: str) -> Practice | None:
        """The exercise of that name."""
        return next((one for one in self.practices if one.name == name), None)


def path_for(chapter: Path) -> Path:
    """The teacher's file of a chapter, given its `.py` or `.ipynb`."""
    return chapter.with_name(chapter.name.rpartition(".")[0] + ENDING)


def read_teaching(path: Path) -> Teaching:
    """Read a chapter's file for teachers.

    Raises:
        NoTeaching: When it is missing, or not as this module describes.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NoTeaching(
            f"{path.name} is missing: a chapter needs its goals, plans and usual wrong answers."
        ) from None
    except tomllib.TOMLDecodeError as problem:
        raise NoTeaching(f"{path.name} is not TOML: {problem}.") from None
    known = {"goals", "exercise", *(f"pacing_{length}" for length in LENGTHS)}
    unknown = sorted(set(content) - known)
    if unknown:
        raise NoTeaching(f"{path.name}: {unknown[0]!r} is none of {', '.join(sorted(known))}.")
    goals = tuple(content.get("goals", ()))
    if not GOALS[0] <= len(goals) <= GOALS[1] or not all(map(_said, goals)):
        raise NoTeaching(
            f"{path.name} has {len(goals)} goals; {GOALS[0]} to {GOALS[1]} sentences are allowed."
        )
    pacing = {length: _steps(path.name, content, length) for length in LENGTHS}
    practices = tuple(_practice(path.name, row) for row in content.get("exercise", ()))
    return Teaching(goals, pacing, practices)


def _said(value: Any) -> bool:
    """Whether a value is text that says something."""
    return isinstance(value, str) and bool(value.strip())


def _steps(name: str, content: dict[str, Any], length: int) -> tuple[Step, ...]:
    """The plan of a lesson."""
    rows = content.get(f"pacing_{length}", ())
    for row in rows:
        fits = isinstance(row, list) and len(row) == 2
        if not fits or not isinstance(row[0], int) or row[0] < 1 or not _said(row[1]):
            raise NoTeaching(f"{name}: a step of pacing_{length} is [minutes, words], not {row}.")
    total = sum(row[0] for row in rows)
    if total != length:
        raise NoTeaching(f"{name}: the steps of pacing_{length} add up to {total} minutes.")
    return tuple(Step(*row) for row in rows)


def _practice(name: str, row: dict[str, Any]) -> Practice:
    """One exercise's usual wrong answers."""
    unknown = sorted(set(row) - {"name", "wrong"})
    if unknown or not _said(row.get("name")):
        raise NoTeaching(f"{name}: an exercise has a name and a list `wrong`, not {sorted(row)}.")
    wrong = []
    for one in row.get("wrong", ()):
        strange = sorted(set(one) - {"answer", "why", "says"})
        if strange or not _said(one.get("answer")) or not _said(one.get("why")):
            raise NoTeaching(
                f"{name}: a wrong answer of {row['name']!r} has `answer`, `why` and perhaps "
                f"`says`, not {sorted(one)}."
            )
        wrong.append(Wrong(one["answer"], one["why"], one.get("says", "")))
    if not wrong:
        raise NoTeaching(f"{name}: the exercise {row['name']!r} needs a usual wrong answer.")
    return Practice(row["name"], tuple(wrong))
