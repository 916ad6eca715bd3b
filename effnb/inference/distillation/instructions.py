"""Distilling the following of instructions: a teacher answers, and asks more where it is needed.

A teacher's answers to instructions are the student's training data. Where only they are wanted,
`answer` writes them. A loop in three steps makes the data follow the student: it *imitates* the
answers; a *referee* compares its own answers with the teacher's, and finds the instructions that
are still hard; more like these (and, so that nothing is forgotten, more unlike them) are
*generated*. New instructions too like old ones are left out.

In the spirit of Jiang et al., "Lion: Adversarial Distillation of Proprietary Large Language
Models", 2023, arXiv 2305.12870; the loop here takes the three roles as functions. The limit on
likeness: Wang et al., "Self-Instruct: Aligning Language Models with Self-Generated Instructions",
2022, arXiv 2212.10560.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Answers = Callable[[str], str]
"""A model as a function from an instruction to its answer."""


@dataclass(frozen=True)
class Lesson:
    """An instruction with the teacher's answer.

    Attributes:
        instruction: What is asked.
        response: What the teacher answers.
    """

    instruction: str
    response: str


@dataclass(frozen=True)
class Judged:
    """An instruction with both answers and the referee's scores.

    Attributes:
        lesson: The instruction and the teacher's answer.
        own: The student's answer.
        teacher_score: The referee's score of the teacher.
        student_score: The referee's score of the student.
    """

    lesson: Lesson
    own: str
    teacher_score: float
    student_score: float

    @property
    def gap(self) -> float:
        """By how much the teacher is better."""
        return self.teacher_score - self.student_score


def answer(teacher: Answers, instructions: Iterable[str]) -> list[Lesson]:
    """The teacher's answer to every instruction; empty answers are left out."""
    lessons = (Lesson(text, teacher(text)) for text in instructions)
    return [lesson for lesson in lessons if lesson.response.strip()]


def judge(
    lessons: Sequence[Lesson], student: Answers, referee: Callable[[str, str], float]
) -> list[Judged]:
    """Both answers to every instruction, scored.

    Args:
        lessons: Instructions with the teacher's answers.
        student: The student.
        referee: From (instruction, answer) to a score, the higher the better; the referee does not
            learn who answered.
    """
    found = []
    for lesson in lessons:
        own = student(lesson.instruction)
        scores = (referee(lesson.instruction, text) for text in (lesson.response, own))
        found.append(Judged(lesson, own, *scores))
    return found


def split_hard(judged: Sequence[Judged], threshold: float) -> tuple[list[Lesson], list[Lesson]]:
    """Instructions on which the teacher is better by at least `threshold`, hardest first; the rest.

    Raises:
        ValueError: A threshold of 0 or below, by which what the student does as well would be hard.
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}; it must be above 0.")
    ordered = sorted(judged, key=lambda item: -item.gap)
    hard = [item.lesson for item in ordered if item.gap >= threshold]
    return hard, [item.lesson for item in ordered if item.gap < threshold]


def rouge_l(first: str, second: str) -> float:
    """How much two texts share in order: F1 of their longest common subsequence of words.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.
    """
    a, b = first.lower().split(), second.lower().split()
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return 2 * row[-1] / (len(a) + len(b))  # F1 of LCS / |a| and LCS / |b|


def unlike(candidates: Iterable[str], known: Iterable[str], limit: float = 0.7) -> list[str]:
    """Of new instructions those whose ROUGE-L with all others, old or new, is below a limit.

    Raises:
        ValueError: A limit outside (0, 1].
    """
    if not 0 < limit <= 1:
        raise ValueError(f"limit is {limit}; it must lie in (0, 1].")
    kept, taken = [], list(known)
    for text in candidates:
        if text.strip() and all(rouge_l(text, other) < limit for other in taken):
            kept.append(text)
            taken.append(text)
    return kept


@dataclass(frozen=True)
class Round:
    """What one turn of the loop gives.

    Attributes:
        lessons: Old and new instructions with the teacher's answers: what to train on next.
        hard: Instructions that the student answers worse than the teacher.
        new: Instructions that were generated and kept.
    """

    lessons: list[Lesson]
    hard: list[Lesson]
    new: list[Lesson]


def next_round(
    lessons: Sequence[Lesson],
    student: Answers,
    teacher: Answers,
    referee: Callable[[str, str], float],
    vary: Callable[[str, int], Sequence[str]],
    *,
    count: int,
    threshold: float = 1.0,
    hard_share: float = 0.5,
    limit: float = 0.7,
) -> Round:
    """Judge, find what is hard, and generate more: half like the hard, half like the others.

    Args:
        lessons: The instructions so far, on which the student was trained.
        student: The student.
        teacher: The teacher, who answers the new instructions.
        referee: As in `judge`.
        vary: From (instruction, number) to that many instructions like it.
        count: How many instructions to generate, before those like old ones are left out.
        threshold: As in `split_hard`.
        hard_share: Share of the new ones that are made like the hard ones.
        limit: As in `unlike`.

    Raises:
        ValueError: No lessons, a count below 1, a share outside [0, 1], and what `split_hard` and
            `unlike` refuse.
    """
    if not lessons or count < 1 or not 0 <= hard_share <= 1:
        raise ValueError(
            f"there are {len(lessons)} lessons, count is {count} and hard_share {hard_share}; at "
            "least one lesson and one new instruction are needed, and a share between 0 and 1."
        )
    hard, easy = split_hard(judge(lessons, student, referee), threshold)
    wanted = round(count * hard_share) if hard else 0
    wanted = count if not easy else wanted
    made = []
    for source, number in ((hard, wanted), (easy, count - wanted)):
        for i, lesson in enumerate(source):
            # As evenly as whole numbers allow, the first ones getting one more.
            share = number // len(source) + (i < number % len(source))
            made += list(vary(lesson.instruction, share))[:share] if share else []
    new = answer(teacher, unlike(made, [lesson.instruction for lesson in lessons], limit))
    return Round([*lessons, *new], hard, new)
