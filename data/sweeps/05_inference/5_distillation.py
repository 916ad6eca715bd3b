"""The stored measurements of `notebooks/05_inference/5_distillation` (`make results`).

    python data/sweeps/05_inference/5_distillation.py                 # every part
    python data/sweeps/05_inference/5_distillation.py missing --resume

Each part is written to `data/results/05_inference/5_distillation/<part>.json`, row by row:

missing     students that never see one of twelve languages, at five temperatures, five seeds
            (4 minutes)
grid        temperature and weight for `mini-300k` and `mini-1m` under `mini-5m` (10 minutes)
noise       how often the teacher errs, and how many texts it answers: labels as they are, weighted,
            forward correction; three seeds (5 minutes)
complexity  how complex a teacher's answers are at each of its states, over temperature and the
            student's width; three seeds (1 minute)

Minutes are those of one idle core, estimated.
"""

from __future__ import annotations

import sys
from statistics import fmean
from typing import Any

from effnb.chapters.inference.distillation import experiments, students
from effnb.chapters.inference.distillation import languages as own
from effnb.evaluation.quality import token_losses
from effnb.lab import load
from effnb.lab.sweeps import Table as Rows
from effnb.lab.sweeps import chapter_of, held_out_novel, run, training_batches, windows_of

SEEDS = (0, 1, 2, 3, 4)
FEW_SEEDS = (0, 1, 2)
TEMPERATURES = (0, 1, 2, 4, 10)
"""0 trains on labels alone."""
LEFT_OUT = ("Portuguese", "Danish", "Korean", "Polish")
GRID_TEMPERATURES, WEIGHTS = (1, 2, 4), (0.5, 1.0)
SIZES = ("mini-300k", "mini-1m")
GRID_STEPS = 100
WINDOWS = 12
NOISES, BUDGETS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.45), (128, 512, 1024)
WIDTHS = (4, 32, 128)


class Table(Rows):
    """Rows of this chapter."""

    chapter = chapter_of(__file__)


def missing() -> None:
    """The language that the student never sees."""
    table = Table("missing", teacher=own.parameters(own.teacher()),
                  student=own.parameters(own.net(own.STUDENT, 0)))  # fmt: skip
    for seed in SEEDS:
        for language in LEFT_OUT:
            for temperature in TEMPERATURES:

                def measure(
                    language: str = language, temperature: int = temperature, seed: int = seed
                ) -> dict[str, Any]:
                    found = own.missing_class(language, temperature, seed=seed)
                    return {k: v for k, v in found.items() if k != "scores"}

                about = {"language": language, "temperature": temperature, "seed": seed}
                table.add(about, measure)


def grid() -> None:
    """Temperature, weight and the student's size, with text alone beside them."""
    teacher = load("mini-5m", device="cpu")
    windows = windows_of(teacher, held_out_novel(), WINDOWS)
    batches = training_batches(teacher, 0, students.POOL, students.SHAPE)
    pool = students.Pool(teacher.model, batches)
    table = Table("grid", steps=GRID_STEPS)

    def judged(model: Any) -> dict[str, Any]:
        found = [round(v, 5) for v in token_losses(model, windows).mean(1).tolist()]
        return {"loss": round(fmean(found), 5), "windows": found}

    table.add({"model": "mini-5m", "method": "teacher"}, lambda: judged(teacher.model))
    for name in SIZES:
        student = load(name, device="cpu").model
        more = students.steps_for_teacher(student, pool)
        table.add({"model": name, "method": "before"}, lambda student=student: judged(student))

        def longer(student: Any = student, more: int = more) -> dict[str, Any]:
            new = training_batches(teacher, 50, more, students.SHAPE)
            steps = GRID_STEPS + more
            model = students.learn(student, pool, steps, 0, weight=0, more=new)
            return judged(model) | {"steps": steps}

        table.add(
            {"model": name, "method": "text alone"},
            lambda student=student: judged(students.learn(student, pool, GRID_STEPS, 0, weight=0)),
        )
        table.add({"model": name, "method": "text alone for longer"}, longer)
        for temperature in GRID_TEMPERATURES:
            for weight in WEIGHTS:
                about = {"model": name, "method": "distilled", "temperature": temperature}
                table.add(
                    about | {"weight": weight},
                    lambda student=student, t=temperature, w=weight: judged(
                        students.learn(student, pool, GRID_STEPS, 0, temperature=t, weight=w)
                    ),
                )


def noise() -> None:
    """Students of a teacher that errs."""
    table = Table("noise")
    for seed in FEW_SEEDS:
        for budget in BUDGETS:
            for p in NOISES:
                found: dict[str, Any] = {}
                for method in (*experiments.METHODS, "labels for longer"):

                    def measure(
                        p: float = p, budget: int = budget, seed: int = seed,
                        method: str = method, found: dict = found,
                    ) -> dict[str, Any]:  # fmt: skip
                        if not found:
                            found.update(experiments.noisy_teacher(seed, p, budget=budget))
                        return {"accuracy": round(fmean(found[method]["documents"]), 4)}

                    about = {"noise": p, "budget": budget, "method": method, "seed": seed}
                    table.add(about, measure)


def complexity() -> None:
    """A teacher's states, seen by narrow and wide students."""
    table = Table("complexity")
    for seed in FEW_SEEDS:
        teachers = experiments.states(seed)
        for width in WIDTHS:
            for temperature in GRID_TEMPERATURES:
                about = {"width": width, "temperature": temperature, "seed": seed}
                table.add(
                    about,
                    lambda seed=seed, width=width, t=temperature, teachers=teachers: {
                        "states": experiments.complexity(seed, width, teachers, t)
                    },
                )


PARTS = {"missing": missing, "grid": grid, "noise": noise, "complexity": complexity}

if __name__ == "__main__":
    sys.exit(run(PARTS, __file__, __doc__.splitlines()[0]))
