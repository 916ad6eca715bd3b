"""The stored measurements of `notebooks/05_inference/6_retrieval_distillation` (`make results`).

    python data/sweeps/05_inference/6_retrieval_distillation.py                # every part
    python data/sweeps/05_inference/6_retrieval_distillation.py depths --resume

Each part is written to `data/results/05_inference/6_retrieval_distillation/<part>.json`, row by
row, and goes on where it ended with `--resume`.

words   students without layers: embedding size, loss, documents frozen or not (1 minute)
depths  students of one and two layers, likewise (8 minutes)
sizes   dual encoders of several embedding sizes on labels and on a cross-encoder's scores, on
        training and on new queries (4 minutes)

Minutes are those of one idle core, estimated. One seed; what verdicts rest on is measured by
`6_retrieval_distillation_claims.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from effnb.chapters.inference.retrieval_distillation import rankers, students
from effnb.lab import sweeps
from effnb.lab.sweeps import timed

SIZES = (32, 128, 384)
STEPS, BATCH = 60, 32
RANKING_SIZES = (8, 64, 384)


class Table(sweeps.Table):
    """Rows of this chapter."""

    chapter = "05_inference/6_retrieval_distillation"


def _grid(part: str, depths: Sequence[int]) -> None:
    course = students.course()
    table = Table(
        part, model="minilm-l6", steps=STEPS, batch=BATCH, queries=students.TRAIN,
        documents=students.INDEX, asked=students.QUERIES,
    )  # fmt: skip
    for size in SIZES:
        table.add(
            {"loss": "teacher", "size": size},
            lambda size=size: students.judged(students.teacher_ranks(course, size)),
        )
    for depth in depths:
        for size in SIZES:
            for frozen in (True, False):

                def untrained(d: int = depth, s: int = size, f: bool = frozen) -> dict[str, Any]:
                    student = students.student_of(course, d, s, f)
                    return students.judged(students.ranks_of(student, course, s, f))

                about = {"depth": depth, "size": size, "frozen": frozen}
                table.add(about | {"loss": "none"}, untrained)
                for loss in students.LOSSES:

                    def run(about: dict[str, Any] = about, loss: str = loss) -> dict[str, Any]:
                        given = {"loss": loss, "steps": STEPS, "batch": BATCH}
                        student, seconds = timed(students.learn, course, **about, **given)
                        ranks = students.ranks_of(student, course, about["size"], about["frozen"])
                        return students.judged(ranks) | {"seconds": seconds}

                    table.add(about | {"loss": loss}, run)


def words() -> None:
    """Means of token embeddings, and a projection that learns."""
    _grid("words", (0,))


def depths() -> None:
    """Students with layers."""
    _grid("depths", (1, 2))


def sizes() -> None:
    """Dual encoders over their embedding size, on both kinds of queries."""
    task = rankers.task()
    table = Table(
        "sizes", model="minilm-l6", layers=rankers.LAYERS, queries=len(task.train.queries),
        candidates=rankers.CANDIDATES, steps=rankers.steps_of(task),
    )  # fmt: skip
    kept: list[rankers.Answers] = []

    def answers(teacher: Any) -> None:
        kept.append(rankers.answers_of(teacher, task, 0))

    def cross() -> dict[str, Any]:
        teacher = rankers.cross_encoder(task, 0)
        answers(teacher)
        return rankers.ranked(teacher, task)

    table.add({"method": "cross-encoder"}, cross)
    for size in RANKING_SIZES:
        for method in ("labels", "softmax KL"):

            def run(size: int = size, method: str = method) -> dict[str, Any]:
                if method != "labels" and not kept:  # a run that goes on
                    answers(rankers.cross_encoder(task, 0))
                given = None if method == "labels" else kept[0]
                student = rankers.dual_encoder(task, 0, method, given, size=size)
                return rankers.ranked(student, task)

            table.add({"method": method, "size": size}, run)


PARTS: dict[str, sweeps.Part] = {"words": words, "depths": depths, "sizes": sizes}


if __name__ == "__main__":
    sys.exit(sweeps.run(PARTS, __file__, __doc__.splitlines()[0]))
