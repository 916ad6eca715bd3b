"""The measurements behind the verdicts of `notebooks/04_finetuning/3_multitask`.

    python data/sweeps/04_finetuning/3_multitask_claims.py [tasks] [instructions] [smollm2]

tasks         `mini-1m` on five tasks with labels: one model or one (IA)³ for all, and one model for
              each with as many steps in all, five seeds (about 12 minutes on one idle core)
instructions  `mini-1m` trained on instructions without pair tasks, judged by pair tasks and by
              wordings that were held out, five seeds (about 5 minutes)
smollm2       two questions as bare text, put in words, and behind four examples, five draws (about
              5 minutes)

Minutes are estimates. Answers are stored document by document; no document is judged twice in a
row, whichever task it is in, since documents are what the verdicts resample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from effnb.chapters.finetuning.multitask import methods
from effnb.chapters.finetuning.multitask.methods import QUESTIONS, Question, ask, both_ways
from effnb.finetuning.instructions import hold_out, instruction_batches
from effnb.finetuning.prompting import Pattern, label_probabilities
from effnb.lab import claims_bench, load
from effnb.lab.claims_bench import SEEDS, Table
from effnb.lab.task_inputs import choose
from effnb.lab.tasks import Example, task

LABELLED = ("section", "match", "work", "language", "origin")
"""The tasks of the mixture, all as often."""
INSTRUCTED = ("section", "work", "language", "summary", "expand", "match", "origin")
HELD_OUT = "pair"
JUDGED = 40
"""Test documents of each task."""
TEXTS = 32
"""Validation documents of each question."""
EXAMPLES = 512
STEPS = 40
"""Steps for each task that is trained; one model for all takes the sum."""
WORDINGS = 2
"""Wordings trained of each task; the last one, the third, is held out."""
SHOTS = 4


def apart(names: Sequence[str]) -> dict[str, list[Example]]:
    """Test examples of each task, of documents that no other of the tasks is judged by."""
    used: set[str] = set()
    found: dict[str, list[Example]] = {}
    for name in names:
        fresh = [e for e in task(name).test if e.document not in used]
        found[name] = methods.one_per_document(fresh, JUDGED)
        used |= {e.document for e in found[name]}
    return found


def questioned() -> dict[str, list[Example]]:
    """As many validation texts of each label of both questions; none shares a document.

    The pictures of the chapter rest on test texts, these verdicts on others.

    Raises:
        ValueError: When a label has too few texts.
    """
    used: set[str] = set()
    found: dict[str, list[Example]] = {}
    for name, question in reversed(QUESTIONS.items()):  # languages first, of which there are fewer
        every = [e for e in question.examples("validation", 1000, 7) if e.document not in used]
        own: list[Example] = []
        for label in (0, 1):
            seen = {e.document for e in own}
            fresh = [e for e in every if question.label(e) == label and e.document not in seen]
            own += fresh[: TEXTS // 2]
        if len(own) < TEXTS // 2 * 2:
            raise ValueError(f"the question {name!r} has fewer than {TEXTS // 2} texts a label.")
        found[name] = own
        used |= {e.document for e in own}
    return found


def answers(
    model: nn.Module, tokenizer: Any, examples: dict[str, list[Example]], template: int = 0
) -> list[float]:
    """Right or wrong on every example of the tasks, one task behind the other."""
    rows: list[float] = []
    for name, own in examples.items():
        chosen = choose(model, tokenizer, task(name), own, template=template, tokens=methods.TOKENS)
        rows += [float(c == e.label) for c, e in zip(chosen, own, strict=True)]
    return rows


def tasks(table: Table) -> None:
    """One model for all tasks, and one for each."""
    loaded = load("mini-1m", device="cpu")
    test = apart(LABELLED)
    sizes = dict.fromkeys(LABELLED, EXAMPLES)
    equal = methods.mixture(sizes, cap=None, temperature=math.inf)
    steps = STEPS * len(LABELLED)

    def tuned(rates: dict[str, float], steps: int, seed: int, method: str = "full") -> nn.Module:
        return methods.many_tasks(
            loaded.model, loaded.tokenizer, rates, steps=steps, sizes=sizes, method=method,
            rate=methods.RATE[method], seed=seed,
        )  # fmt: skip

    def together(seed: int, method: str) -> dict[str, Any]:
        model = tuned(equal, steps, seed, method)
        return {"documents": answers(model, loaded.tokenizer, test), "steps": steps}

    def single(seed: int) -> dict[str, Any]:
        rows: list[float] = []
        for name, own in test.items():
            model = tuned({name: 1.0}, STEPS, seed)
            rows += answers(model, loaded.tokenizer, {name: own})
        return {"documents": rows, "steps": steps}

    about = {"model": loaded.name, "table": "tasks"}
    table.add(
        about | {"method": "untrained"},
        lambda: {"documents": answers(loaded.model, loaded.tokenizer, test), "steps": 0},
    )
    for seed in SEEDS:
        for name, method in (("mixture", "full"), ("(IA)³", "(IA)³")):
            table.add(
                about | {"method": name, "seed": seed},
                lambda seed=seed, method=method: together(seed, method),
            )
        table.add(about | {"method": "one for each", "seed": seed}, lambda seed=seed: single(seed))


def instructions(table: Table) -> None:
    """Held-out kinds of tasks, and held-out wordings of trained ones."""
    loaded = load("mini-1m", device="cpu")
    every = [methods.instruction_task(name, "train", EXAMPLES) for name in INSTRUCTED]
    split = hold_out(every, HELD_OUT)
    labelled = [one.name for one in split.train if task(one.name).labels]
    judged = {
        "new tasks": (apart([one.name for one in split.held_out]), 0),
        "new wordings": (apart(labelled), -1),
    }
    steps = STEPS * len(split.train)

    def add(method: str, make: Callable[[], nn.Module], steps: int, **drawn: int) -> None:
        made: list[nn.Module] = []  # trained once for both, and only where a row is missing

        def measure(examples: dict[str, list[Example]], template: int) -> dict[str, Any]:
            if not made:
                made.append(make())
            found = answers(made[0], loaded.tokenizer, examples, template)
            return {"documents": found, "steps": steps}

        for what, (examples, template) in judged.items():
            about = {"model": loaded.name, "table": "instructions", "method": method, **drawn}
            table.add(
                about | {"judged": what},
                lambda examples=examples, template=template: measure(examples, template),
            )

    def followed(seed: int) -> nn.Module:
        batches = instruction_batches(
            split.train, size=16, templates=WORDINGS, temperature=math.inf, seed=seed
        )
        return methods.follow(loaded.model, loaded.tokenizer, batches, steps=steps, seed=seed)

    add("untrained", lambda: loaded.model, 0)
    for seed in SEEDS:
        add("instructions", lambda seed=seed: followed(seed), steps, seed=seed)


def smollm2(table: Table) -> None:
    """The same texts as they are, in a pattern, and behind examples."""
    loaded = load("smollm2-135m", device="cpu")
    texts = questioned()

    def right(question: Question, found: Any, own: list[Example]) -> list[float]:
        return [float(one) for one in methods.right(question, found, own)]

    def asked(bare: bool) -> dict[str, Any]:
        rows: list[float] = []
        for name, question in QUESTIONS.items():
            pattern = Pattern("{input}") if bare else question.pattern
            prompts = [pattern.prompt(methods.short(one)) for one in texts[name]]
            found = label_probabilities(
                loaded.model, loaded.tokenizer, prompts, question.verbalizer
            )
            rows += right(question, found, texts[name])
        return {"documents": rows}

    def answered(seed: int) -> dict[str, list[float]]:
        rows: dict[str, list[float]] = {"raw": [], "calibrated": []}
        for name, question in QUESTIONS.items():
            shots = question.examples("train", SHOTS, 100 + seed)
            found, nothing = ask(loaded.model, loaded.tokenizer, question, shots, texts[name])
            for way, correct in both_ways(question, found, nothing, texts[name]).items():
                rows[way] += [float(one) for one in correct]
        return rows

    about = {"model": loaded.name}
    table.add(about | {"method": "words"}, lambda: asked(bare=False))
    for seed in SEEDS:
        made: dict[str, list[float]] = {}

        def measure(way: str, seed: int = seed, made: dict = made) -> dict[str, Any]:
            if not made:
                made.update(answered(seed))
            return {"documents": made[way]}

        for method, way in (("examples", "raw"), ("examples, calibrated", "calibrated")):
            table.add(
                about | {"method": method, "seed": seed},
                lambda way=way, measure=measure: measure(way),
            )
    table.add(about | {"method": "bare text"}, lambda: asked(bare=True))


PARTS = {"tasks": tasks, "instructions": instructions, "smollm2": smollm2}

if __name__ == "__main__":
    claims_bench.run(PARTS, __file__, __doc__.splitlines()[0])
