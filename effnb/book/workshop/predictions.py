"""What a class guessed, and what came out: a summary of the guesses that learners exported.

    python -m effnb.book.workshop.predictions FOLDER [--out build/workshop/predictions]

A notebook keeps its guesses beside it as `NAME.guesses.json`, and `guesses()` offers them as CSV.
The command reads both kinds of files, wherever they lie below the folder: each folder directly in
it is one learner, and each file directly in it is one learner too. No name of a learner is written
anywhere.
"""

from __future__ import annotations

import argparse
import csv
import html
import io
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from effnb.lab.figures import PALETTE, CaptionedFigure, captioned, figure
from effnb.lab.tables import Table, table

NEAR = 0.05
"""A guess within this part of the answer counts as right, as in the panels."""
_NUMBER = re.compile(r"^[+\-−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][+\-]?\d+)?")


class NoGuesses(ValueError):
    """Nothing to summarize; one sentence says why."""


@dataclass(frozen=True)
class Said:
    """One guess of one learner.

    Attributes:
        learner: Which of the learners, as a number.
        question: What was asked.
        guess: A number or a choice; None when the question was skipped.
        answer: What came out; None when the file does not say.
    """

    learner: int
    question: str
    guess: float | str | None
    answer: float | str | None


@dataclass(frozen=True)
class Summary:
    """What a class made of one question.

    Attributes:
        question: What was asked.
        guesses: All guesses that were made.
        skipped: How many learners skipped it.
        answer: What came out: the median over the machines, or the most frequent choice.
        right: How many were right: within 5 %, or of the right choice.
        error: The most common error in words, with how many made it; empty without one.
    """

    question: str
    guesses: tuple[float | str, ...]
    skipped: int
    answer: float | str | None
    right: int
    error: str

    @property
    def numeric(self) -> bool:
        """Whether numbers were guessed."""
        return bool(self.guesses) and not isinstance(self.guesses[0], str)


# --------------------------------------------------------------------------------- reading


def read(folder: Path) -> list[Said]:
    """Every guess below a folder; a learner's second file on the same question counts once.

    Raises:
        NoGuesses: When the folder is missing, holds no such file, or one of them cannot be read.
    """
    if not folder.is_dir():
        raise NoGuesses(f"there is no folder {folder}; put the exported guesses into one.")
    files = [*folder.rglob("*.json"), *folder.rglob("*.csv")]
    files = sorted(p for p in files if not any(x.startswith(".") for x in p.parts[-2:]))
    if not files:
        raise NoGuesses(
            f"{folder} holds no guesses: learners export them with `guesses()` as CSV, or hand in "
            "the files NAME.guesses.json that lie beside their notebooks."
        )
    learners: dict[str, int] = {}
    found: dict[tuple[int, str], Said] = {}
    for path in files:
        key = path.relative_to(folder).parts[0]
        learner = learners.setdefault(key, len(learners) + 1)
        rows = _from_json(path) if path.suffix == ".json" else _from_csv(path)
        for question, guess, answer in rows:
            found.setdefault(
                (learner, question), Said(learner, question, _value(guess), _value(answer))
            )
    return list(found.values())


def _from_json(path: Path) -> list[tuple[str, object, object]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
        return [(row["question"], row["guess"], row["answer"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        raise NoGuesses(f"{path.name} does not hold guesses as a notebook keeps them.") from None


def _from_csv(path: Path) -> list[tuple[str, object, object]]:
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
        return [(row["question"], row["guess"], row["answer"]) for row in rows]
    except (OSError, ValueError, KeyError, csv.Error):
        raise NoGuesses(
            f"{path.name} does not have the columns question, guess and answer of a notebook's CSV."
        ) from None


def _value(given: object) -> float | str | None:
    """A guess or an answer as a number, a choice, or nothing."""
    if given is None or isinstance(given, bool):
        return None
    if isinstance(given, (int, float)):
        return float(given)
    words = str(given).strip()
    if words in ("", "skipped", "see the panel"):
        return None
    number = _NUMBER.match(words)
    unit = words[number.end() :].strip() if number else ""
    if number and re.fullmatch(r"%|[^\W\d_]*(?:[ /][^\W\d_]+)*", unit):
        return float(number[0].replace(",", "").replace("−", "-"))
    return words


# ----------------------------------------------------------------------------- summarizing


def summarize(said: Sequence[Said]) -> list[Summary]:
    """One summary for each question, in the order in which the questions were met."""
    questions = dict.fromkeys(one.question for one in said)
    return [_one([one for one in said if one.question == question]) for question in questions]


def _one(rows: list[Said]) -> Summary:
    made = [one.guess for one in rows if one.guess is not None]
    answers = [one.answer for one in rows if one.answer is not None]
    words = any(isinstance(one, str) for one in [*made, *answers])
    if words:  # a choice such as “64” looks like a number
        made, answers = ([_as_words(one) for one in some] for some in (made, answers))
    answer: float | str | None = None
    if answers:
        answer = Counter(answers).most_common(1)[0][0] if words else statistics.median(answers)
    right = [one for one in made if answer is not None and _is_right(one, answer)]
    wrong = [one for one in made if answer is not None and not _is_right(one, answer)]
    error = (_wrong_choice if words else _wrong_number)(wrong, answer)
    skipped = sum(one.guess is None for one in rows)
    return Summary(rows[0].question, tuple(made), skipped, answer, len(right), error)


def _as_words(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _is_right(guess: float | str, answer: float | str) -> bool:
    if isinstance(guess, str) or isinstance(answer, str):
        return guess == answer
    return abs(guess - answer) <= NEAR * abs(answer)


def _wrong_choice(wrong: list[str], answer: object) -> str:
    if not wrong:
        return ""
    choice, count = Counter(wrong).most_common(1)[0]
    return f"“{choice}”, {count} of {len(wrong)} wrong answers"


def _wrong_number(wrong: list[float], answer: float | None) -> str:
    """Whether most were too high or too low, and by how much the middle one was."""
    if not wrong or answer is None:
        return ""
    high = [one for one in wrong if one > answer]
    low = [one for one in wrong if one < answer]
    side, of = ("high", high) if len(high) >= len(low) else ("low", low)
    middle = statistics.median(of)
    by = f"{abs(middle - answer):.3g}"
    if answer > 0 and middle > 0:
        factor = max(middle / answer, answer / middle)
        by = f"a factor of {factor:.2g}" if factor >= 1.5 else f"{factor - 1:.0%}"
    return f"too {side}, {len(of)} of {len(wrong)} wrong guesses, typically by {by}"


# ------------------------------------------------------------------------------- as output


def _shown(value: float | str | None) -> str:
    if value is None:
        return "see the panel"
    return value if isinstance(value, str) else f"{value:.4g}"


def _middle(one: Summary) -> str:
    """What was guessed, in a few words."""
    if not one.guesses:
        return "nothing"
    if not one.numeric:
        return ", ".join(f"{choice}: {n}" for choice, n in Counter(one.guesses).most_common())
    low, high = min(one.guesses), max(one.guesses)
    return f"median {statistics.median(one.guesses):.4g}, from {low:.4g} to {high:.4g}"


def as_table(found: Sequence[Summary]) -> Table:
    """A row for each question."""
    return table(
        [
            {
                "question": one.question,
                "guesses": len(one.guesses),
                "skipped": one.skipped,
                "guessed": _middle(one),
                "came out": _shown(one.answer),
                "right": one.right,
                "most common error": one.error or "none",
            }
            for one in found
        ],
        columns=[
            *("question", "guesses", "skipped", "guessed", "came out"),
            *("right", "most common error"),
        ],
        caption="What the class guessed, and what came out.",
    )


def picture(one: Summary) -> CaptionedFigure:
    """Guesses and answer of one question."""

    def draw(canvas: Figure) -> None:
        axes = canvas.subplots()
        if one.numeric:
            for height, value in enumerate(sorted(one.guesses)):
                right = one.answer is not None and _is_right(value, one.answer)
                axes.plot(value, height + 1, "o", color=PALETTE[2] if right else PALETTE[1])
            if isinstance(one.answer, float):
                axes.axvline(one.answer, color=PALETTE[0], label=f"answer {one.answer:.4g}")
                axes.legend()
            axes.set_xlabel("guess")
            axes.set_ylabel("learners, in order")
            axes.yaxis.get_major_locator().set_params(integer=True)
            positive = [v for v in one.guesses if v > 0]
            if len(positive) == len(one.guesses) and max(positive) > 20 * min(positive):
                axes.set_xscale("log")
            return
        counts = Counter(one.guesses)
        names = [*dict.fromkeys([*counts, *([one.answer] if one.answer else [])])]
        colours = [PALETTE[2] if name == one.answer else "0.7" for name in names]
        axes.barh(range(len(names)), [counts[name] for name in names], color=colours)
        axes.set_yticks(range(len(names)), [str(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlabel("learners")
        axes.xaxis.get_major_locator().set_params(integer=True)

    kind = "Each dot is a guess" if one.numeric else "Each bar is a choice"
    caption = f"{one.question} {kind}; green is right. Most common error: {one.error or 'none'}."
    alt = f"Guessed: {_middle(one)}. Came out: {_shown(one.answer)}. Right: {one.right}."
    return figure(draw, caption=caption, alt=alt)


def page(found: Sequence[Summary]) -> str:
    """The summary as one HTML file."""
    parts = [as_table(found)._repr_html_()]
    for one in found:
        if one.guesses:
            shown = picture(one)
            parts.append(f"<h2>{html.escape(one.question)}</h2>")
            parts.append(captioned(shown.picture, shown.caption, shown.alt))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>What the class guessed</title><style>:root{color-scheme:light dark}"
        "body{font:1.1rem/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "img{max-width:100%;height:auto}"
        "@media (max-width:700px){table{display:block;overflow-x:auto}}</style></head>"
        f"<body><h1>What the class guessed</h1>{''.join(parts)}</body></html>\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m effnb.book.workshop.predictions",
        description="Summarize the guesses that a class exported.",
    )
    parser.add_argument("folder", type=Path, help="where the exported guesses lie")
    parser.add_argument("--out", type=Path, help="write predictions.html and predictions.csv here")
    options = parser.parse_args(arguments)
    try:
        found = summarize(read(options.folder))
    except NoGuesses as problem:
        print(str(problem)[0].upper() + str(problem)[1:], file=sys.stderr)
        return 1
    summary = as_table(found)
    print(summary)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "predictions.html").write_text(page(found), encoding="utf-8")
        (options.out / "predictions.csv").write_text(summary.csv(), encoding="utf-8")
        print(f"The pictures are in {options.out / 'predictions.html'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
