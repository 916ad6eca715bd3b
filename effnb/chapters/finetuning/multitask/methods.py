"""The experiments of the chapter, small enough to be run by a reader and the same in its sweeps.

A question about the topic of a program is put to SmolLM2 with four examples in front; a small
decoder is trained on six tasks at once, or on a few answers to choose from, or on instructions.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from effnb.core.modules import clone
from effnb.core.training import TrainingSettings, causal_lm_loss, train
from effnb.finetuning import ia3
from effnb.finetuning.contextual_calibration import calibrate, content_free
from effnb.finetuning.instructions import Instance, InstructionTask
from effnb.finetuning.mixing import mixed_batches, mixing_rates
from effnb.finetuning.prompting import Pattern, Verbalizer, label_probabilities
from effnb.finetuning.t_few import (
    Choices,
    answer_log_probs,
    choices_of,
    rank,
    scores,
    t_few_loss,
)
from effnb.lab import load
from effnb.lab.task_inputs import as_texts, choose, decoder_batch, target_likelihoods
from effnb.lab.tasks import Example, Task, task

TOKENS = 64
"""Most tokens of a prompt with its answer, where a model is trained."""


# --------------------------------------------------------------------- prompts for SmolLM2


@dataclass(frozen=True)
class Question:
    """A choice between two labels of a task, put in words.

    Attributes:
        task: The task's name.
        labels: The two labels.
        words: What stands for them.
        pattern: How a text is put to the model.
    """

    task: str
    labels: tuple[str, str]
    words: tuple[str, str]
    pattern: Pattern

    @property
    def verbalizer(self) -> Verbalizer:
        """The words as the prompting module takes them."""
        return Verbalizer.of(self.words)

    def examples(self, split: str, count: int, seed: int) -> list[Example]:
        """As many of each label, in turn, one for each document."""
        found = task(self.task)
        chosen: dict[str, dict[str, Example]] = {label: {} for label in self.labels}
        rows = list(getattr(found, split))
        random.Random(f"{self.task} {split} {seed}").shuffle(rows)
        for example in rows:
            label = found.labels[example.label] if example.label >= 0 else ""
            if label in chosen:
                chosen[label].setdefault(example.document, example)
        pairs = zip(*(list(own.values())[: count // 2] for own in chosen.values()), strict=False)
        return list(itertools.chain.from_iterable(pairs))

    def label(self, example: Example) -> int:
        """0 or 1."""
        return self.labels.index(task(self.task).labels[example.label])

    def shot(self, example: Example) -> tuple[str, str]:
        """An example's text, shortened, and the word for its label."""
        return short(example), self.words[self.label(example)]


QUESTIONS = {
    "topic": Question(
        "section", ("games", "science"), ("games", "science"),
        Pattern("Program: {input}\nTopic:"),
    ),
    "language": Question(
        "language", ("French", "Spanish"), ("French", "Spanish"),
        Pattern("Text: {input}\nLanguage:"),
    ),
}  # fmt: skip
WORDS = 20
"""Words of a text that a prompt shows."""


def short(example: Example) -> str:
    """The first words of a text."""
    return " ".join(example.text.split()[:WORDS])


def ask(
    model: nn.Module,
    tokenizer: Any,
    question: Question,
    shots: Sequence[Example],
    texts: Sequence[Example],
) -> tuple[Tensor, Tensor]:
    """The labels' probabilities for each text behind these examples, and for no content."""
    shown = [question.shot(example) for example in shots]
    prompts = [question.pattern.prompt(short(example), shown) for example in texts]
    found = label_probabilities(model, tokenizer, prompts, question.verbalizer)
    nothing = content_free(
        model, tokenizer, lambda text: question.pattern.prompt(text, shown), question.verbalizer
    )
    return found, nothing


def right(question: Question, probabilities: Tensor, texts: Sequence[Example]) -> list[bool]:
    """Which texts get their own label."""
    chosen = probabilities.argmax(1).tolist()
    return [c == question.label(e) for c, e in zip(chosen, texts, strict=True)]


def both_ways(
    question: Question, found: Tensor, nothing: Tensor, texts: Sequence[Example]
) -> dict[str, list[bool]]:
    """Answers as the model gives them, and calibrated."""
    return {
        "raw": right(question, found, texts),
        "calibrated": right(question, calibrate(found, nothing), texts),
    }


def smollm2_here(name: str = "topic", count: int = 8) -> str:
    """Two orders of four examples on SmolLM2, here and now."""
    loaded = load("smollm2-135m")
    question = QUESTIONS[name]
    shots, texts = question.examples("train", 4, 1), question.examples("test", count, 0)
    first = sorted(shots, key=question.label)
    lines = []
    for order in (first, first[::-1]):
        ways = both_ways(
            question, *ask(loaded.model, loaded.tokenizer, question, order, texts), texts
        )
        said = ", ".join(question.words[question.label(example)] for example in order)
        lines.append(
            f"{said}: {sum(ways['raw'])} of {count} right, calibrated {sum(ways['calibrated'])}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------- one model for many tasks


MIXED = {"section": 2048, "match": 1024, "work": 512, "language": 256, "origin": 128, "summary": 64}
"""Tasks of the mixture, and of how many training examples each has some left."""

RATE = {"full": 1e-3, "(IA)³": 3e-2}
"""Learning rates for a few hundred steps; that of (IA)³ is the best of the stored part `rates`."""


def mixture(sizes: Mapping[str, int], *, cap: int | None, temperature: float) -> dict[str, float]:
    """The rates of the tasks."""
    return mixing_rates(sizes, cap=cap, temperature=temperature)


def many_tasks(
    model: nn.Module,
    tokenizer: Any,
    rates: Mapping[str, float],
    *,
    steps: int,
    sizes: Mapping[str, int] = MIXED,
    method: str = "full",
    size: int = 16,
    rate: float = 1e-3,
    seed: int = 0,
    progress: bool | Callable = False,
) -> nn.Module:
    """A copy of a decoder trained on a mixture of tasks, written as text.

    Args:
        model: A decoder; it is not changed.
        tokenizer: The decoder's.
        rates: The part of each task.
        steps: Steps of the optimizer.
        sizes: How many of its training examples each task has.
        method: "full", or "(IA)³" for a delta of one vector a layer.
        size: Rows of a batch.
        rate: Learning rate.
        seed: Seed of the batches.
        progress: As `effnb.core.training.train` takes it.
    """
    rows = {name: task(name).train[:count] for name, count in sizes.items() if name in rates}
    mixed = mixed_batches(rows, rates, size, seed)

    def batch(step: int) -> dict[str, Tensor]:
        prompts, answers = [], []
        for name, example in mixed(step):
            prompt, answer = as_texts(task(name), [example])
            prompts += prompt
            answers += answer
        return decoder_batch(tokenizer, prompts, answers, TOKENS)

    tuned = ia3.attach(model) if method == "(IA)³" else clone(model)
    settings = TrainingSettings(
        steps=steps, learning_rate=rate, warmup_steps=min(10, steps), seed=seed
    )
    train(tuned, batch, settings, loss=causal_lm_loss, progress=progress)
    return tuned.eval()


def judged(
    model: nn.Module, tokenizer: Any, name: str, count: int, split: str = "test"
) -> list[float]:
    """A task's held-out documents: right or wrong, or for a text to write its nats a token."""
    found = task(name)
    examples = one_per_document(getattr(found, split), count)
    if found.labels:
        chosen = choose(model, tokenizer, found, examples, tokens=TOKENS)
        return [float(c == e.label) for c, e in zip(chosen, examples, strict=True)]
    logs, counts = target_likelihoods(model, tokenizer, *as_texts(found, examples), tokens=TOKENS)
    return [-log / n for log, n in zip(logs, counts, strict=True)]


def one_per_document(examples: Sequence[Example], count: int) -> list[Example]:
    """The first example of each of the first documents."""
    chosen: dict[str, Example] = {}
    for example in examples:
        if len(chosen) == count:
            break
        chosen.setdefault(example.document, example)
    return list(chosen.values())


# ------------------------------------------------------------------------- a few examples


def few(found: Task, tokenizer: Any, examples: Sequence[Example]) -> Choices:
    """Examples of a task with all of its labels to choose from."""
    prompts = [found.prompt(example) for example in examples]
    answers = [list(found.labels)] * len(examples)
    return choices_of(tokenizer, prompts, answers, [e.label for e in examples], tokens=TOKENS)


def t_few(
    model: nn.Module,
    tokenizer: Any,
    found: Task,
    *,
    shots: int,
    losses: Sequence[str],
    steps: int = 60,
    rate: float = 1e-1,
    seed: int = 0,
    progress: bool | Callable = False,
) -> nn.Module:
    """(IA)³ trained by the chosen losses on a few examples of each label."""
    examples, _ = found.few_shot(shots, seed)
    order = random.Random(seed).sample(examples, len(examples))

    def batch(step: int) -> Choices:
        chosen = [order[(step * 4 + i) % len(order)] for i in range(4)]
        return few(found, tokenizer, chosen)

    tuned = ia3.attach(model)
    settings = TrainingSettings(
        steps=steps, learning_rate=rate, warmup_steps=min(4, steps), seed=seed
    )
    train(tuned, batch, settings, loss=lambda m, b: t_few_loss(m, b, losses), progress=progress)
    return tuned.eval()


def ranked(
    model: nn.Module, tokenizer: Any, found: Task, examples: Sequence[Example]
) -> list[bool]:
    """Which examples get their own label by the mean log-probability of its tokens."""
    rows: list[bool] = []
    for start in range(0, len(examples), 16):
        part = examples[start : start + 16]
        chosen = rank(model, few(found, tokenizer, part)).tolist()
        rows += [c == e.label for c, e in zip(chosen, part, strict=True)]
    return rows


@torch.inference_mode()
def chances(
    model: nn.Module, tokenizer: Any, found: Task, examples: Sequence[Example]
) -> tuple[float, float]:
    """The mean log-probability of a token of the right answers and of the wrong ones, in nats."""
    right, wrong = [], []
    for start in range(0, len(examples), 16):
        choices = few(found, tokenizer, examples[start : start + 16])
        beta = scores(answer_log_probs(model, choices), choices)
        right += beta[choices.right].tolist()
        wrong += beta[~choices.right].tolist()
    return fmean(right), fmean(wrong)


# ------------------------------------------------------------------------------ instructions


CLUSTERS = {
    "section": "classification", "language": "classification", "work": "classification",
    "match": "pair", "origin": "pair", "summary": "generation", "expand": "generation",
}  # fmt: skip


def instruction_task(name: str, split: str, count: int) -> InstructionTask:
    """A task of the corpora with all of its wordings."""
    found = task(name)
    rows = one_per_document(getattr(found, split), count)
    instances = tuple(
        Instance({"text": e.text, "pair": e.pair}, e.target, e.document) for e in rows
    )
    return InstructionTask(name, CLUSTERS[name], found.templates, instances, found.labels)


def follow(
    model: nn.Module,
    tokenizer: Any,
    batches: Callable[[int], list[tuple[str, str]]],
    *,
    steps: int,
    rate: float = 1e-3,
    seed: int = 0,
    progress: bool | Callable = False,
) -> nn.Module:
    """A copy of a decoder trained on pairs of a prompt and its answer."""

    def batch(step: int) -> dict[str, Tensor]:
        prompts, answers = zip(*batches(step), strict=True)
        return decoder_batch(tokenizer, prompts, [f" {a}" for a in answers], TOKENS)

    tuned = clone(model)
    settings = TrainingSettings(
        steps=steps, learning_rate=rate, warmup_steps=min(10, steps), seed=seed
    )
    train(tuned, batch, settings, loss=causal_lm_loss, progress=progress)
    return tuned.eval()
