"""The measurements behind the verdicts of `notebooks/05_inference/5_distillation`.

    python data/sweeps/05_inference/5_distillation_claims.py [languages] [text] [context] [sums]

languages  students of the task of twelve languages: few labels, noisy teachers, which texts to ask
           about, made inputs, complexity, deviations, early states; five seeds (5 minutes)
text       `mini-300k` taught by `mini-5m`: on outputs, on relations, on text alone, and on text
           alone for longer, five seeds (12 minutes)
context    `mini-300k` taught to act as if it had read examples, five seeds (2 minutes)
sums       `mini-300k` taught sums by a program: answers alone, predict and explain, and reasoning
           first, equal tokens, five seeds (10 minutes)

Minutes are those of one idle core, estimated. Rows are stored one by one and are not measured
again; `--fresh` forgets them. A row's `setting` says which experiment it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from effnb.chapters.inference.distillation import experiments, students
from effnb.chapters.inference.distillation import languages as own
from effnb.evaluation import file_bytes
from effnb.lab import claims_bench, corpora, load
from effnb.lab.claims_bench import SEEDS, Bench, Table, by_document, documents_of
from effnb.lab.sweeps import training_batches
from effnb.lab.task_inputs import write

STEPS = 100
SHORT = 128
"""Tokens of a document on which distributions and relations are compared."""
CONTEXT_STEPS, CONTEXT_TOKENS, CONTEXT_TEXTS = 40, 96, 24
SUM_TOKENS, SUMS, JUDGED = 120_000, 2000, 48
LIMITED = 5

Experiment = Callable[[int], dict[str, dict[str, Any]]]

EXPERIMENTS: dict[str, Experiment] = {
    "few labels": experiments.few_labels,
    "even noise": lambda seed: experiments.noisy_teacher(
        seed, 0.4, methods=("plain", "forward correction")
    ),
    "uneven noise, small": lambda seed: experiments.noisy_teacher(
        seed, "uneven", hidden=0, methods=("plain", "weighted")
    ),
    "uneven noise, large": lambda seed: experiments.noisy_teacher(
        seed, "uneven", hidden=own.TEACHER, methods=("plain", "weighted")
    ),
    "asking": experiments.asking,
    "limited": lambda seed: experiments.made_inputs(seed, LIMITED),
    "long tail": lambda seed: experiments.made_inputs(seed, experiments.TAIL),
    "states": experiments.from_states,
}


def add_all(table: Table, about: dict[str, Any], seed: int, run: Experiment) -> None:
    """The rows of one experiment and seed; it is run once, and only where a row is missing."""
    about |= {"seed": seed}
    if any(about.items() <= row.items() for row in table.rows):
        return
    for method, found in run(seed).items():
        table.add(about | {"method": method}, lambda found=found: found)


def why(seed: int) -> dict[str, dict[str, Any]]:
    """Complexity of the teacher's answers to a narrow and to a wide student."""
    last = {own.TAUGHT: own.teacher(seed)}
    return {
        name: experiments.complexity(seed, hidden, last)[0]
        for name, hidden in (("narrow", experiments.NARROW), ("wide", experiments.WIDE))
    }


def over_states(seed: int) -> dict[str, dict[str, Any]]:
    """Complexity of a teacher's first state and of its last."""
    found = experiments.complexity(seed, own.STUDENT, experiments.states(seed))
    return {"first state": found[0], "last state": found[-1]}


def deviating(seed: int) -> dict[str, dict[str, Any]]:
    """How a student's confidence follows its teacher's."""
    found = experiments.confidences(seed)
    return {"distilled": {"slope": round(found.slope, 4)}}


def languages(table: Table) -> None:
    """Everything on the task of twelve languages."""
    for seed in SEEDS:
        for setting, run in EXPERIMENTS.items():
            add_all(table, {"model": "n-gram student", "setting": setting}, seed, run)
        for setting, run, keep in (
            ("complexity", why, "share_of_shuffled"),
            ("complexity", over_states, "complexity"),
            ("deviations", deviating, "slope"),
        ):
            # Two experiments have this setting: their methods differ.
            def one(seed: int, run: Experiment = run, keep: str = keep) -> dict[str, Any]:
                return {name: {keep: found[keep]} for name, found in run(seed).items()}

            about = {"model": "n-gram student", "setting": setting, "of": keep}
            add_all(table, about, seed, one)


def text(table: Table) -> None:
    """Outputs, relations and text alone, for `mini-300k`."""
    bench, teacher = Bench("mini-300k"), load("mini-5m", device="cpu").model
    short = [ids[:SHORT] for ids in bench.documents]
    pool = students.Pool(teacher, training_batches(bench.loaded, 0, students.POOL, students.SHAPE))
    more = students.steps_for_teacher(bench.model, pool)
    about = {"model": "mini-300k", "setting": "text"}
    table.add(
        about | {"method": "teacher"},
        lambda: {"documents": by_document(teacher, bench.documents), "bytes": file_bytes(teacher)},
    )

    def judged(model: Any, steps: int, kept: bool = True) -> dict[str, Any]:
        found = {"documents": by_document(model, bench.documents), "steps": steps}
        if kept:
            found["divergence_documents"] = students.divergences(model, teacher, short)
            found["relation_documents"] = students.relation_divergences(model, teacher, short)
        return found | {"bytes": file_bytes(model)}

    for seed in SEEDS:
        runs = {
            "distilled": lambda s: students.learn(bench.model, pool, STEPS, s),
            "labels alone": lambda s: students.learn(bench.model, pool, STEPS, s, weight=0),
            "relations": lambda s: students.learn_relations(bench.model, pool, STEPS, s),
        }
        for method, run in runs.items():
            table.add(
                about | {"method": method, "seed": seed},
                lambda run=run, seed=seed: judged(run(seed), STEPS),
            )

        def longer(seed: int = seed) -> dict[str, Any]:
            new = training_batches(bench.loaded, 50 + seed, more, students.SHAPE)
            model = students.learn(
                bench.model, pool, STEPS + more, seed, weight=0, more=new
            )  # fmt: skip
            return judged(model, STEPS + more, kept=False)

        table.add(about | {"method": "labels for longer", "seed": seed}, longer)


def context(table: Table) -> None:
    """Examples of German descriptions in front, or not."""
    loaded = load("mini-300k", device="cpu")
    rows = [f"{t.synopsis}\n{t.text}" for t in corpora.translations("de", "train")]
    texts = documents_of(loaded, rows, 8 * CONTEXT_STEPS + 8, 64)
    texts = [ids for ids in texts if len(ids) == 64]
    given, rest = torch.cat(texts[:2])[:CONTEXT_TOKENS], texts[2:]
    new = [f"{t.synopsis}\n{t.text}" for t in corpora.translations("de", "test")]
    judged_by = documents_of(loaded, new, CONTEXT_TEXTS, 64)
    batches = [torch.stack(rest[i : i + 8]) for i in range(0, len(rest) - 7, 8)]
    tokens = sum(b.numel() for b in batches)
    for seed in SEEDS:
        for method, taught in (("distilled", True), ("labels alone", False)):

            def run(seed: int = seed, taught: bool = taught) -> dict[str, Any]:
                model = students.in_context(loaded.model, given, batches, seed, taught)
                found = students.divergences(model, loaded.model, judged_by, given)
                return {"documents": found, "tokens": tokens}

            about = {"model": "mini-300k", "setting": "context", "method": method, "seed": seed}
            table.add(about, run)


def sums(table: Table) -> None:
    """Additions of two numbers of two digits."""
    loaded = load("mini-300k", device="cpu")
    items = students.sums(SUMS + JUDGED, 0)
    train, test = items[:SUMS], items[SUMS:]
    for seed in SEEDS:
        for way in students.WAYS:

            def run(seed: int = seed, way: str = way) -> dict[str, Any]:
                model, steps = students.learn_sums(
                    loaded.model, loaded.tokenizer, train, way, SUM_TOKENS, seed
                )
                found = students.right_sums(model, loaded.tokenizer, test, write)
                return {"documents": found, "tokens": SUM_TOKENS, "steps": steps}

            about = {"model": "mini-300k", "setting": "sums", "method": way, "seed": seed}
            table.add(about, run)


PARTS = {"languages": languages, "text": text, "context": context, "sums": sums}

if __name__ == "__main__":
    claims_bench.run(PARTS, __file__, __doc__.splitlines()[0])
