"""The stored measurements of `notebooks/04_finetuning/1_delta_tuning` (`make results`).

    python data/sweeps/04_finetuning/1_delta_tuning.py               # every part
    python data/sweeps/04_finetuning/1_delta_tuning.py grid --resume # what is missing of the grid

Each part is written to `data/results/04_finetuning/1_delta_tuning/<part>.json`, row by row:

rates       learning rates: every method at three, on one task, judged on validation (4 minutes)
steep       full tuning at the rate that this chooses, on the tasks of the grid (6 minutes)
grid        the shared grid: nine methods on four tasks of `minilm-l6` and five on two of `mini-1m`,
            five seeds; 80 steps of 8 texts of at most 32 tokens (13 minutes a seed, 65 in all)
memory      bytes that a step holds, counted, at batches of 1 and 32 (1 minute)
smollm2     the same for SmolLM2-135M, on one text (1 minute)
intrinsic   `minilm-l6`: random subspaces of growing dimension, five seeds (6 minutes)
scale       the same on `mini-300k`, `mini-1m` and `mini-5m` (8 minutes)
shared      `mini-1m`: a subspace of the prompts of 20 small tasks, tested on 14 others, five seeds
            (30 minutes)
few         16 examples of each label in place of 2,048 examples: five methods (10 minutes)

Minutes are those of one idle core. The grid serves D-2, D-3 and D-5 here, and D-9 and D-11 in the
next chapter: a row holds accuracy on training texts beside that on new ones. Seeds are the outer
loop, so that a grid that was interrupted has whole seeds. Answers are stored as strings of 0 and 1,
one for each document; every task is judged on equally many documents, so that their mean is the
mean over tasks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch

from effnb.chapters.finetuning.delta_tuning import memory, methods, shared_prompts
from effnb.chapters.finetuning.delta_tuning.methods import METHODS, Subject, tune
from effnb.core.training import causal_lm_loss
from effnb.finetuning import diff_pruning
from effnb.lab import load
from effnb.lab.sweeps import Table as Rows
from effnb.lab.sweeps import chapter_of, held_out_novel, run, windows_of
from effnb.lab.task_inputs import (
    as_texts,
    choose,
    classification_loss,
    encoder_batch,
    overlap,
    target_likelihoods,
    write,
)
from effnb.lab.tasks import Example, Task, task

SEEDS = (0, 1, 2, 3, 4)
ENCODER_TASKS = ("section", "language", "match", "origin")
DECODER_TASKS = ("summary", "expand")
COMPARED = {
    "full": ("full", None),
    "LoRA": ("LoRA", None),
    "LoRA, rank 1": ("LoRA", 1),
    "prompt": ("prompt", None),
    "prefix": ("prefix", None),
    "adapter": ("adapter", None),
    "BitFit": ("BitFit", None),
    "last layers": ("last layers", None),
    "random modules": ("random modules", None),
}
"""What the grid compares: a method and its size, by the name of its rows."""
WRITERS = ("full", "LoRA", "adapter", "prefix", "prompt")
"""Those that are compared on the decoder as well, which has no biases for BitFit."""
STEPS = 80
POINTS = (5, 10, 20, 40, 80)
DOCUMENTS, WATCHED = 180, 64
"""Test documents of each task, and validation documents that a learning curve looks at."""
WRITTEN = 48
"""Test documents for which a decoder writes its answer."""
TRIED = {
    "adapter": (5e-4, 2e-3, 8e-3),
    "LoRA": (5e-4, 2e-3, 8e-3),
    "prompt": (1e-2, 4e-2, 1.6e-1),
    "prefix": (1e-2, 4e-2, 1.6e-1),
    "full": (2.5e-5, 1e-4, 4e-4),
    "BitFit": (5e-4, 2e-3, 8e-3),
    "last layers": (7.5e-5, 3e-4, 1.2e-3),
    "random modules": (1e-3, 4e-3, 1.6e-2),
}
"""Learning rates that are tried; `METHODS` has the one with the highest accuracy on validation, and
of equals the one with the lower loss, unless it is `TOO_HIGH`. The new classifier has the same rate
beside all of them."""
DIMENSIONS = (4, 16, 64, 256, 1024)
SIZES = ("mini-300k", "mini-1m", "mini-5m")
MEMORY_TOKENS = 128
MEMORY_BATCHES = {0: 1, 1: 6, 8: 1, 32: 6}
"""Sizes of batches, and how many are drawn of each; texts are as long as they are."""
MEASURED = (
    "full", "LoRA", "adapter", "prefix", "prompt", "(IA)³", "BitFit", "last layers", "diff pruning"
)  # fmt: skip


class Table(Rows):
    """Rows of this chapter."""

    chapter = chapter_of(__file__)


def bits(correct: Sequence[float]) -> str:
    """Answers as a string of 0 and 1."""
    return "".join("01"[int(one)] for one in correct)


def about_run(subject: Subject, name: str, seed: int) -> dict[str, Any]:
    """What tells a run from all others; one at another learning rate is another run."""
    rate = METHODS[COMPARED[name][0]].rate
    about = {"model": subject.name, "task": subject.task.name, "method": name}
    return about | {"seed": seed, "rate": rate}


def watched(subject: Subject, examples: Sequence[Example]) -> Callable[..., dict[str, Any]]:
    """What a learning curve notes: which validation texts are right, and the mean loss."""

    def watch(model: torch.nn.Module) -> dict[str, Any]:
        found = subject.judged(model, examples)
        return {"correct": bits(found["correct"]), "loss": round(fmean(found["losses"]), 4)}

    return watch


def classified(
    subject: Subject, name: str, seed: int, train: Sequence[Example], steps: int = STEPS,
    rate: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One run of a method on an encoder: its curve, and its answers on new and on old texts."""
    method, size = COMPARED[name]
    test = methods.one_per_document(subject.task.test, DOCUMENTS)
    validation = methods.one_per_document(subject.task.validation, WATCHED)
    found = tune(
        subject.base, method, subject.batch, train, steps=steps, size=size, seed=seed,
        rate=rate, watch=watched(subject, validation), points=POINTS,
    )  # fmt: skip
    new = subject.judged(found.model, test)
    old = subject.judged(found.model, list(train)[:WATCHED])
    return {
        "parameters": found.parameters,
        "accuracy": round(fmean(new["correct"]), 4),
        "loss": round(fmean(new["losses"]), 4),
        "train_accuracy": round(fmean(old["correct"]), 4),
        "train_loss": round(fmean(old["losses"]), 4),
        "answers": bits(new["correct"]),
        "curve_losses": [point["loss"] for point in found.seen],
        "curve": [point["correct"] for point in found.seen],
        "step_ms": round(1000 * found.step_seconds, 1),
    }


def written(subject: Subject, name: str, seed: int) -> dict[str, Any]:
    """One run of a method on a decoder: nats of each test document, and what it writes."""
    method, size = COMPARED[name]
    test = methods.one_per_document(subject.task.test, DOCUMENTS)
    validation = methods.one_per_document(subject.task.validation, WATCHED)

    def nats(model: torch.nn.Module, examples: Sequence[Example]) -> list[float]:
        logs, counts = target_likelihoods(
            model, subject.loaded.tokenizer, *as_texts(subject.task, examples)
        )
        return [round(-log / count, 3) for log, count in zip(logs, counts, strict=True)]

    found = tune(
        subject.base, method, subject.batch, subject.task.train, steps=STEPS, size=size, seed=seed,
        watch=lambda model: {"loss": round(fmean(nats(model, validation)), 4)}, points=POINTS,
    )  # fmt: skip
    model = found.model
    prompts, targets = as_texts(subject.task, test[:WRITTEN])
    texts = write(model, subject.loaded.tokenizer, prompts, most=16)
    new = nats(model, test)
    return {
        "parameters": found.parameters,
        "loss": round(fmean(new), 4),
        "train_loss": round(fmean(nats(model, subject.task.train[:WATCHED])), 4),
        "overlap": round(fmean(map(overlap, texts, targets)), 4),
        "wrote": texts[0],
        "windows": new,
        "curve_losses": [point["loss"] for point in found.seen],
        "step_ms": round(1000 * found.step_seconds, 1),
    }


# ------------------------------------------------------------------------------------ parts


def rates() -> None:
    """Three learning rates for every method, on one task, after 20 steps."""
    subject = Subject(task("section"))
    validation = methods.one_per_document(subject.task.validation, WATCHED)
    watch = watched(subject, validation)
    table = Table("rates", task="section", steps=20, documents=WATCHED)
    for name, tried in TRIED.items():
        for rate in tried:

            def measure(name: str = name, rate: float = rate) -> dict[str, Any]:
                found = tune(
                    subject.base, name, subject.batch, subject.task.train, steps=20, rate=rate,
                    seed=100, watch=watch, points=(20,),
                )  # fmt: skip
                (end,) = found.seen
                return {"accuracy": end["correct"].count("1") / WATCHED, "loss": end["loss"]}

            table.add({"method": name, "rate": rate}, measure)


def steep() -> None:
    """Full tuning as in the grid, at the rate that looked best after a few steps on one task."""
    rate = methods.TOO_HIGH[methods.FULL]
    table = Table("steep", steps=STEPS, documents=DOCUMENTS)
    subjects = [Subject(task(name)) for name in ENCODER_TASKS]
    for seed in SEEDS[:2]:
        for subject in subjects:
            table.add(
                about_run(subject, "full", seed) | {"rate": rate},
                lambda s=subject, k=seed: classified(s, "full", k, s.task.train, rate=rate),
            )


def grid() -> None:
    """Every method on every task, seed by seed."""
    about = {"steps": STEPS, "batch": methods.BATCH, "tokens": methods.TOKENS}
    table = Table("grid", points=POINTS, documents=DOCUMENTS, watched=WATCHED, **about)
    subjects = [Subject(task(name)) for name in ENCODER_TASKS]
    writers = [Subject(task(name), "mini-1m") for name in DECODER_TASKS]
    for seed in SEEDS:
        for subject in subjects:
            for name in COMPARED:
                table.add(
                    about_run(subject, name, seed),
                    lambda s=subject, n=name, k=seed: classified(s, n, k, s.task.train),
                )
        for subject in writers:
            for name in WRITERS:
                table.add(
                    about_run(subject, name, seed),
                    lambda s=subject, n=name, k=seed: written(s, n, k),
                )


def few() -> None:
    """The low-resource setting: 16 examples of each label, 60 steps over them."""
    table = Table("few", shots=16, steps=60, documents=DOCUMENTS)
    subjects = [Subject(task(name)) for name in ENCODER_TASKS]
    for seed in SEEDS:
        for name in WRITERS:
            for subject in subjects:
                train, _ = subject.task.few_shot(16, seed)
                table.add(
                    about_run(subject, name, seed),
                    lambda s=subject, n=name, k=seed, t=train: classified(s, n, k, t, 60),
                )


def training_bytes() -> None:
    """What a step holds, counted, for batches of several sizes drawn several times."""
    subject = Subject(task("match"))
    table = Table("memory", tokens=MEMORY_TOKENS)
    for name in MEASURED:
        for batch, draws in MEMORY_BATCHES.items():
            about = {"model": subject.name, "method": name, "batch": batch}
            table.add(about, lambda n=name, b=batch, d=draws: held(subject, n, b, d))


def held(subject: Subject, name: str, batch: int, draws: int) -> dict[str, Any]:
    """The bytes of one method at one size of batch; for 0, those that no batch changes."""
    if name == "diff pruning":
        model = diff_pruning.attach(subject.base, methods.DELTA, layers="encoder.*")
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    else:
        ready = methods.prepared(subject.base, name)
        model, parameters = ready.model, ready.parameters
    size, train = max(1, batch), subject.task.train
    drawn = [
        memory.training_memory(
            model,
            classification_loss,
            encoder_batch(
                subject.loaded.tokenizer, train[i * size : (i + 1) * size], MEMORY_TOKENS
            ),
        )
        for i in range(draws)
    ]
    row = {"parameters": parameters, "state_bytes": drawn[0].state}
    if batch:
        row["bytes"] = [one.total for one in drawn]
        row["activations"] = [one.activations for one in drawn]
    return row


def smollm2() -> None:
    """The same for a decoder of 135 million parameters, on one text of 128 tokens."""
    loaded = load("smollm2-135m", device="cpu")
    ids = windows_of(loaded, held_out_novel(), 1, 128)
    table = Table("smollm2", tokens=128)
    for name in ("full", "LoRA", "adapter", "prefix", "prompt"):

        def measure(name: str = name) -> dict[str, Any]:
            ready = methods.prepared(loaded.model, name)
            found = memory.training_memory(ready.model, causal_lm_loss, ids)
            about = {"parameters": ready.parameters, "state_bytes": found.state}
            return about | {"activations": found.activations, "bytes": found.total}

        table.add({"model": "smollm2-135m", "method": name}, measure)


def intrinsic() -> None:
    """Random subspaces of an encoder, over their dimension, beside full tuning."""
    subject = Subject(task("section"))
    test = methods.one_per_document(subject.task.test, DOCUMENTS)
    table = Table("intrinsic", task="section", steps=STEPS, documents=DOCUMENTS)
    for seed in SEEDS:
        for dimension in (0, *DIMENSIONS):

            def measure(dimension: int = dimension, seed: int = seed) -> dict[str, Any]:
                found = tune(
                    subject.base, "intrinsic" if dimension else "full", subject.batch,
                    subject.task.train, steps=STEPS, size=dimension or None, seed=seed,
                )  # fmt: skip
                new = subject.judged(found.model, test)
                return {
                    "accuracy": round(fmean(new["correct"]), 4),
                    "loss": round(fmean(new["losses"]), 4),
                    "answers": bits(new["correct"]),
                }

            table.add({"model": subject.name, "dimension": dimension, "seed": seed}, measure)


def scale() -> None:
    """Random subspaces of decoders of three sizes, which choose the likeliest topic."""
    table = Table("scale", task="section", steps=60, documents=DOCUMENTS)
    subjects = [Subject(task("section"), name) for name in SIZES]
    for seed in SEEDS:
        for subject in subjects:
            test = methods.one_per_document(subject.task.test, DOCUMENTS)
            for dimension in (0, 16, 64, 256):

                def measure(
                    subject: Subject = subject, dimension: int = dimension, seed: int = seed,
                    test: list[Example] = test,
                ) -> dict[str, Any]:  # fmt: skip
                    found = tune(
                        subject.base, "intrinsic" if dimension else "full", subject.batch,
                        subject.task.train, steps=60, size=dimension or None, seed=seed,
                        rate=None if dimension else 1e-3,
                    )  # fmt: skip
                    chosen = choose(found.model, subject.loaded.tokenizer, subject.task, test)
                    right = [a == e.label for a, e in zip(chosen, test, strict=True)]
                    return {"accuracy": round(fmean(right), 4), "answers": bits(right)}

                table.add({"model": subject.name, "dimension": dimension, "seed": seed}, measure)


def shared() -> None:
    """Prompts for tasks that a subspace has not seen, in it and in all their numbers."""
    reader = shared_prompts.Reader()
    known, unseen = shared_prompts.split()
    table = Table(
        "shared", known=[t.name for t in known], unseen=[t.name for t in unseen],
        dimension=shared_prompts.DIMENSION, steps=shared_prompts.STEPS,
    )  # fmt: skip
    for seed in SEEDS:
        found: dict[str, Any] = {}

        def made(name: str, seed: int = seed, found: dict = found) -> Callable[[Task], Any]:
            """How a task gets its prompt; the subspaces are learned once for a seed."""
            if name == "no prompt":
                return lambda one: None
            if name == "prompt":
                return lambda one: reader.prompt(one, seed)
            if not found:
                found.update(shared_prompts.subspaces(reader, known, seed))
            if name == "average prompt":
                return lambda one: found["random subspace"].mean
            return lambda one: reader.inside(found[name], one, seed)

        for name in shared_prompts.COMPARED:
            table.add(
                {"model": reader.name, "method": name, "seed": seed},
                lambda name=name, made=made: {
                    "accuracies": shared_prompts.accuracies(reader, unseen, made(name))
                },
            )


PARTS: dict[str, Callable[[], dict | None]] = {
    "rates": rates,
    "steep": steep,
    "grid": grid,
    "memory": training_bytes,
    "smollm2": smollm2,
    "intrinsic": intrinsic,
    "scale": scale,
    "shared": shared,
    "few": few,
}


if __name__ == "__main__":
    sys.exit(run(PARTS, __file__, __doc__.splitlines()[0]))
