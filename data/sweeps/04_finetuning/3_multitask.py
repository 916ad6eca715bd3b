"""The stored measurements of `notebooks/04_finetuning/3_multitask` (`make results`).

    python data/sweeps/04_finetuning/3_multitask.py                  # every part
    python data/sweeps/04_finetuning/3_multitask.py orders --resume  # what is missing of one

Each part is written to `data/results/04_finetuning/3_multitask/<part>.json`, row by row:

orders        SmolLM2 on two questions: four examples in all 24 orders, as they are and calibrated;
              32 texts (6 minutes)
majority      the same with 0 to 4 of the four examples of one label; two draws, 24 texts
              (2 minutes)
shots         0 to 8 examples, three draws of them; 24 texts (3 minutes)
rates         (IA)³ of `mini-1m` on five tasks at three learning rates, by validation texts
              (2 minutes)
mixing        one `mini-1m` for six tasks at three temperatures, with a cap, and one model for each
              task, two seeds (4 minutes)
few           16 examples of each label on `mini-1m`: (IA)³ by the language-model loss alone and
              with each of T-Few's other losses, three seeds (3 minutes)
instructions  `mini-1m` trained on instructions without pair tasks, in one wording of each task and
              in two: judged by new examples, new wordings and new tasks, three seeds (4 minutes)

Minutes are estimates for one idle core. Answers are stored as strings of 0 and 1, one for each
document.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from effnb.chapters.finetuning.multitask import methods
from effnb.chapters.finetuning.multitask.methods import MIXED, QUESTIONS, ask, both_ways
from effnb.chapters.finetuning.multitask.tables import LABELLED, costs_of
from effnb.finetuning.instructions import instruction_batches
from effnb.finetuning.prompting import orders as permutations
from effnb.finetuning.t_few import LOSSES
from effnb.lab import load
from effnb.lab.sweeps import Table as Rows
from effnb.lab.sweeps import chapter_of, run
from effnb.lab.task_inputs import choose
from effnb.lab.tasks import task

TEXTS = 32
"""Test texts that all orders are tried on."""
FEWER = 24
"""Those of the other tables of SmolLM2."""
SHOTS = (0, 1, 2, 4, 8)
DRAWS = (0, 1, 2)
SEEDS = (0, 1)
TEMPERATURES = {"1": 1.0, "2": 2.0, "∞": math.inf}
CAP = 256
MIXED_STEPS, ALONE_STEPS, FOLLOWED_STEPS = 120, 20, 100
"""Six tasks at once take as many steps as six models, each for one of them."""
RATES = (1e-2, 3e-2, 1e-1)
RATES_STEPS, VALIDATED = 100, 24
JUDGED = 40
"""Test documents of each task."""
FEW_TASKS = ("section", "match")
SUBSETS = {
    "LM": LOSSES[:1],
    "LM + UL": LOSSES[:2],
    "LM + LN": (LOSSES[0], LOSSES[2]),
    "LM + UL + LN": LOSSES,
}
TRAINED = ("section", "work", "language", "summary", "expand")
HELD_OUT = ("match", "origin")


class Table(Rows):
    """Rows of this chapter."""

    chapter = chapter_of(__file__)


def bits(correct: Sequence[Any]) -> str:
    """Answers as a string of 0 and 1."""
    return "".join("01"[int(one)] for one in correct)


def answered(loaded: Any, question: methods.Question, shots: Any, texts: Any) -> dict[str, Any]:
    """The two ways of answering behind these examples, and what the prompt says of nothing."""
    found, nothing = ask(loaded.model, loaded.tokenizer, question, shots, texts)
    ways = both_ways(question, found, nothing, texts)
    row: dict[str, Any] = {"nothing": [round(p, 4) for p in nothing.tolist()]}
    for name, correct in ways.items():
        row[name] = round(fmean(correct), 4)
        row[f"{name}_answers"] = bits(correct)
    return row


# ------------------------------------------------------------------------------------ SmolLM2


def orders() -> None:
    """All 24 orders of the same four examples."""
    loaded = load("smollm2-135m", device="cpu")
    costs = costs_of(loaded.tokenizer, loaded.model.config, TEXTS)
    table = Table("orders", texts=TEXTS, model="smollm2-135m", costs=costs)
    for name, question in QUESTIONS.items():
        texts = question.examples("test", TEXTS, 0)
        for number, shots in enumerate(permutations(question.examples("train", 4, 1))):
            pattern = "".join(str(question.label(e)) for e in shots)
            about = {"model": loaded.name, "question": name, "order": number, "labels": pattern}
            table.add(
                about,
                lambda q=question, shots=shots, texts=texts: answered(loaded, q, shots, texts),
            )


def majority() -> None:
    """Four examples of which 0 to 4 have the first label, two draws."""
    loaded = load("smollm2-135m", device="cpu")
    table = Table("majority", texts=FEWER, model="smollm2-135m")
    for name, question in QUESTIONS.items():
        texts = question.examples("test", FEWER, 0)
        for seed in SEEDS:
            pool = question.examples("train", 16, seed + 1)
            own = [[e for e in pool if question.label(e) == k] for k in (0, 1)]
            for first in range(5):
                shots = [*own[0][:first], *own[1][: 4 - first]]
                shots = sorted(shots, key=lambda e: e.text)  # an order that no label decides
                about = {"model": loaded.name, "question": name, "first": first, "seed": seed}
                table.add(
                    about,
                    lambda q=question, shots=shots, texts=texts: answered(loaded, q, shots, texts),
                )


def shots() -> None:
    """More and more examples, three draws; without any there is nothing to draw."""
    loaded = load("smollm2-135m", device="cpu")
    table = Table("shots", texts=FEWER, model="smollm2-135m")
    for name, question in QUESTIONS.items():
        texts = question.examples("test", FEWER, 0)
        for seed in DRAWS:
            pool = question.examples("train", max(SHOTS), seed + 1)
            for count in SHOTS if seed == DRAWS[0] else SHOTS[1:]:
                about = {"model": loaded.name, "question": name, "shots": count, "seed": seed}
                table.add(
                    about,
                    lambda q=question, given=pool[:count], texts=texts: answered(
                        loaded, q, given, texts
                    ),
                )


# -------------------------------------------------------------------------------- mini-1m


def rates() -> None:
    """Learning rates of (IA)³ on five tasks in equal parts."""
    loaded = load("mini-1m", device="cpu")
    table = Table("rates", steps=RATES_STEPS, documents=VALIDATED, model="mini-1m")
    sizes = dict.fromkeys(LABELLED, 512)
    equal = methods.mixture(sizes, cap=None, temperature=math.inf)

    def measure(rate: float) -> dict[str, Any]:
        tuned = methods.many_tasks(
            loaded.model, loaded.tokenizer, equal, steps=RATES_STEPS, sizes=sizes,
            method="(IA)³", rate=rate,
        )  # fmt: skip
        found = {
            name: fmean(methods.judged(tuned, loaded.tokenizer, name, VALIDATED, "validation"))
            for name in LABELLED
        }
        return {name: round(value, 4) for name, value in found.items()} | {
            "accuracy": round(fmean(found.values()), 4)
        }

    for rate in RATES:
        table.add({"model": loaded.name, "rate": rate}, lambda rate=rate: measure(rate))


def mixing() -> None:
    """One model for six tasks of unequal size, and one for each."""
    loaded = load("mini-1m", device="cpu")
    table = Table("mixing", sizes=MIXED, documents=JUDGED, model="mini-1m")

    def measure(rates: dict[str, float], method: str, seed: int, steps: int) -> dict[str, Any]:
        tuned = methods.many_tasks(
            loaded.model, loaded.tokenizer, rates, steps=steps, method=method, seed=seed,
            rate=methods.RATE[method],
        )  # fmt: skip
        row: dict[str, Any] = {"rates": {name: round(rate, 4) for name, rate in rates.items()}}
        for name in rates:
            found = methods.judged(tuned, loaded.tokenizer, name, JUDGED)
            written = not task(name).labels
            row[name] = round(fmean(found), 4)
            row[f"{name}_windows" if written else f"{name}_answers"] = (
                [round(nats, 3) for nats in found] if written else bits(found)
            )
        return row

    def untrained() -> dict[str, Any]:
        return {
            name: round(fmean(methods.judged(loaded.model, loaded.tokenizer, name, JUDGED)), 4)
            for name in MIXED
        }

    table.add({"model": loaded.name, "method": "none"}, untrained)
    for seed in SEEDS:
        common = {"model": loaded.name, "seed": seed}
        for label, temperature in TEMPERATURES.items():
            rates = methods.mixture(MIXED, cap=None, temperature=temperature)
            table.add(
                common | {"method": "full", "temperature": label},
                lambda rates=rates, seed=seed: measure(rates, "full", seed, MIXED_STEPS),
            )
        rates = methods.mixture(MIXED, cap=CAP, temperature=1.0)
        table.add(
            common | {"method": "full", "temperature": "1", "cap": CAP},
            lambda rates=rates, seed=seed: measure(rates, "full", seed, MIXED_STEPS),
        )
        rates = methods.mixture(MIXED, cap=None, temperature=math.inf)
        table.add(
            common | {"method": "(IA)³", "temperature": "∞"},
            lambda rates=rates, seed=seed: measure(rates, "(IA)³", seed, MIXED_STEPS),
        )
        for name in MIXED:
            table.add(
                common | {"method": "alone", "task": name},
                lambda name=name, seed=seed: measure({name: 1.0}, "full", seed, ALONE_STEPS),
            )


def few() -> None:
    """T-Few's losses, one after the other."""
    loaded = load("mini-1m", device="cpu")
    table = Table("few", shots=16, documents=JUDGED, model="mini-1m")
    for name in FEW_TASKS:
        found = task(name)
        test = methods.one_per_document(found.test, JUDGED)
        for seed in DRAWS:
            for label, losses in SUBSETS.items():

                def measure(
                    found: Any = found, test: Any = test, losses: Any = losses, seed: int = seed
                ) -> dict[str, Any]:
                    tuned = methods.t_few(
                        loaded.model, loaded.tokenizer, found, shots=16, losses=losses, seed=seed
                    )
                    correct = methods.ranked(tuned, loaded.tokenizer, found, test)
                    return {"accuracy": round(fmean(correct), 4), "answers": bits(correct)}

                table.add(
                    {"model": loaded.name, "task": name, "losses": label, "seed": seed}, measure
                )


def instructions() -> None:
    """New examples, new wordings and new tasks, after one wording of each task and after two."""
    loaded = load("mini-1m", device="cpu")
    table = Table("instructions", documents=JUDGED, model="mini-1m", held_out=list(HELD_OUT))
    trained = [methods.instruction_task(name, "train", 512) for name in TRAINED]

    def judge(model: Any) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for name in (*TRAINED, *HELD_OUT):
            found = task(name)
            if not found.labels:
                continue
            test = methods.one_per_document(found.test, JUDGED)
            for what, template in (("known wording", 0), ("last wording", -1)):
                chosen = choose(
                    model, loaded.tokenizer, found, test, template=template, tokens=methods.TOKENS
                )
                correct = [c == e.label for c, e in zip(chosen, test, strict=True)]
                row[f"{name}, {what}"] = round(fmean(correct), 4)
                row[f"{name}, {what}_answers"] = bits(correct)
        return row

    table.add({"model": loaded.name, "wordings": 0}, lambda: judge(loaded.model))
    for seed in DRAWS:
        for wordings in (1, 2):

            def measure(wordings: int = wordings, seed: int = seed) -> dict[str, Any]:
                batches = instruction_batches(
                    trained, size=16, templates=wordings, temperature=math.inf, seed=seed
                )
                tuned = methods.follow(
                    loaded.model, loaded.tokenizer, batches, steps=FOLLOWED_STEPS, seed=seed
                )
                return judge(tuned)

            table.add({"model": loaded.name, "wordings": wordings, "seed": seed}, measure)


PARTS = {
    "orders": orders, "majority": majority, "shots": shots, "rates": rates, "mixing": mixing,
    "few": few, "instructions": instructions,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(run(PARTS, __file__, __doc__.splitlines()[0]))
