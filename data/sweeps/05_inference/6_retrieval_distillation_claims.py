"""The measurements behind the verdicts of `notebooks/05_inference/6_retrieval_distillation`.

    python data/sweeps/05_inference/6_retrieval_distillation_claims.py [search] [ranking]

search   students of one layer of a dual encoder of six: labels, scores, embeddings, both, with
         made queries, with documents of their own; five seeds (10 minutes)
ranking  a cross-encoder of two layers, plain and dual-pooled, and dual encoders of two layers on
         labels, on labels for longer, and on its answers by four losses; five seeds (22 minutes)

Minutes are those of one idle core, estimated. Rows are stored one by one and are not measured
again; `--fresh` forgets them.
"""

from __future__ import annotations

from typing import Any

from effnb.chapters.inference.retrieval_distillation import rankers, students
from effnb.lab import claims_bench
from effnb.lab.claims_bench import SEEDS, Table

DEPTH = 1
SEARCHES: dict[str, dict[str, Any]] = {
    "both": {"loss": "both"},
    "scores": {"loss": "scores"},
    "embeddings": {"loss": "embeddings"},
    "labels": {"loss": "labels"},
    "both, made queries": {"loss": "both", "made": True},
    "both, own documents": {"loss": "both", "frozen": False},
}
DISTILLED = (
    "softmax KL",
    "MarginMSE",
    "order only",
    "softmax KL and embeddings",
)
PLAIN = "cross-encoder, first token"


def search(table: Table) -> None:
    """From a large dual encoder to a small one."""
    course = students.course()
    about = {"model": "MiniLM, one layer", "setting": "search"}
    table.add(
        about | {"method": "teacher"}, lambda: students.judged(students.teacher_ranks(course))
    )
    more = students.layers_of_teacher(course, DEPTH)
    longer = {"labels for longer": {"loss": "labels", "steps": students.STEPS + more}}
    for seed in SEEDS:
        for method, given in (SEARCHES | longer).items():

            def run(seed: int = seed, given: dict[str, Any] = given) -> dict[str, Any]:
                student = students.learn(course, depth=DEPTH, seed=seed, **given)
                frozen = given.get("frozen", True)
                ranks = students.ranks_of(student, course, students.WIDTH, frozen)
                return students.judged(ranks) | {"steps": given.get("steps", students.STEPS)}

            table.add(about | {"method": method, "seed": seed}, run)


def ranking(table: Table) -> None:
    """From a cross-encoder to a dual encoder."""
    task = rankers.task()
    steps = rankers.steps_of(task)
    more = rankers.steps_for_answers(task)
    for seed in SEEDS:
        about = {"model": "MiniLM, two layers", "setting": "ranking", "seed": seed}
        methods = ("cross-encoder", *DISTILLED)
        known = {row["method"] for row in table.rows if row["seed"] == seed}
        if not known.issuperset(methods):  # a teacher is not stored: it is trained for its students
            teacher = rankers.cross_encoder(task, seed)
            answers = rankers.answers_of(teacher, task, seed)
            table.add(
                about | {"method": "cross-encoder"},
                lambda teacher=teacher: rankers.ranked(teacher, task) | {"steps": steps},
            )

            def taught(method: str, seed: int = seed, answers: Any = answers) -> dict[str, Any]:
                student = rankers.dual_encoder(task, seed, method, answers)
                return rankers.ranked(student, task) | {"steps": steps}

            for method in DISTILLED:
                table.add(about | {"method": method}, lambda method=method, t=taught: t(method))

        def alone(length: int, seed: int = seed) -> dict[str, Any]:
            student = rankers.dual_encoder(task, seed, steps=length)
            return rankers.ranked(student, task) | {"steps": length}

        table.add(about | {"method": "labels"}, lambda a=alone: a(steps))
        table.add(about | {"method": "labels for longer"}, lambda a=alone: a(steps + more))

        def plain(seed: int = seed) -> dict[str, Any]:
            model = rankers.cross_encoder(task, seed, dual_pooled=False)
            return rankers.ranked(model, task) | {"steps": steps}

        table.add(about | {"method": PLAIN}, plain)


PARTS = {"search": search, "ranking": ranking}

if __name__ == "__main__":
    claims_bench.run(PARTS, __file__, __doc__.splitlines()[0])
