r"""Instruction training: many tasks in many wordings, judged by tasks of a kind never seen.

Each example of a task is written with one of the task's *templates*, drawn at random, and a model
is trained on the mixture (`effnb.finetuning.mixing`). What is asked afterwards is not how well it
does these tasks, but whether it follows an instruction for another kind of task. So whole
*clusters* of like tasks are held out, with every example that shares a document with them:

    split = hold_out(tasks, "pair")
    batch = instruction_batches(split.train, size=16, templates=3)
    pairs = batch(step)             # [(prompt, answer), ...]

Sanh et al., "Multitask Prompted Training Enables Zero-Shot Task Generalization" (T0), 2021, arXiv
2110.08207; Wei et al., "Finetuned Language Models Are Zero-Shot Learners" (FLAN), 2021, arXiv
2109.01652, who append the options to choose from.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from effnb.finetuning.mixing import mixed_batches, mixing_rates


@dataclass(frozen=True)
class Instance:
    """One example of a task.

    Attributes:
        fields: What the templates' places are filled with.
        answer: What is to be written.
        document: Where it is from; documents are not shared between training and held-out tasks.
    """

    fields: Mapping[str, str]
    answer: str
    document: str = ""


@dataclass(frozen=True)
class InstructionTask:
    """A task with its wordings.

    Attributes:
        name: Its name.
        cluster: The kind of task it is; tasks of one kind are held out together.
        templates: Wordings, each with places such as `{text}`.
        instances: Its examples.
        options: All answers to choose from; none where text is written freely.
    """

    name: str
    cluster: str
    templates: tuple[str, ...]
    instances: tuple[Instance, ...]
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse templates and answers that do not fit.

        Raises:
            ValueError: No template or example, a place that an example does not fill, or an answer
                that is none of the options.
        """
        if not self.templates or not self.instances:
            raise ValueError(f"the task {self.name!r} needs a template and an example.")
        for template in self.templates:
            places = {place for _, place, _, _ in string.Formatter().parse(template) if place}
            for instance in self.instances:
                if missing := places - instance.fields.keys():
                    raise ValueError(
                        f"a template of {self.name!r} has a place for {min(missing)!r}, which an "
                        "example does not fill."
                    )
        wrong = [i.answer for i in self.instances if self.options and i.answer not in self.options]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no option of the task {self.name!r}.")

    def prompt(self, instance: Instance, template: int, *, options: bool = False) -> str:
        """An example in one of the wordings.

        Args:
            instance: The example.
            template: Which wording.
            options: Whether to append the answers to choose from, as FLAN does.

        Raises:
            ValueError: When there is no such wording.
        """
        if not 0 <= template < len(self.templates):
            raise ValueError(f"{self.name!r} has {len(self.templates)} templates, from 0 on.")
        text = self.templates[template].format(**instance.fields)
        if options and self.options:
            text += "\nOPTIONS: " + ", ".join(self.options)
        return text


@dataclass(frozen=True)
class HeldOut:
    """A collection of tasks, cut in two by a cluster.

    Attributes:
        train: Tasks of other clusters, without examples that share a document with the held-out.
        held_out: The tasks of the cluster.
        left_out: How many training examples were dropped for sharing a document.
    """

    train: tuple[InstructionTask, ...]
    held_out: tuple[InstructionTask, ...]
    left_out: int


def hold_out(tasks: Sequence[InstructionTask], cluster: str) -> HeldOut:
    """Leave one cluster out, and whatever else would show its documents.

    Raises:
        ValueError: When two tasks have one name, no task is of the cluster or all are, or a task
            shares all of its documents with the cluster.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"two tasks have one name among {', '.join(names)}.")
    apart = tuple(task for task in tasks if task.cluster == cluster)
    if not apart or len(apart) == len(tasks):
        known = ", ".join(sorted({task.cluster for task in tasks}))
        raise ValueError(
            f"holding out {cluster!r} leaves nothing on one side; the clusters are {known}."
        )
    secret = {i.document for task in apart for i in task.instances if i.document}
    train, dropped = [], 0
    for task in tasks:
        if task.cluster == cluster:
            continue
        kept = tuple(i for i in task.instances if i.document not in secret)
        dropped += len(task.instances) - len(kept)
        if not kept:
            raise ValueError(f"every example of {task.name!r} is from a held-out document.")
        train.append(replace(task, instances=kept))
    return HeldOut(tuple(train), apart, dropped)


def instruction_batches(
    tasks: Sequence[InstructionTask],
    *,
    size: int,
    templates: int | None = None,
    cap: int | None = None,
    temperature: float = 1.0,
    options: bool = False,
    seed: int = 0,
) -> Callable[[int], list[tuple[str, str]]]:
    """From a step's number to pairs of a prompt and its answer.

    Args:
        tasks: The tasks to train on.
        size: Rows of a batch.
        templates: How many of each task's wordings to use, from the first on; all by default. The
            others are wordings that the model has not seen.
        cap: Most examples of a task that count for the mixture.
        temperature: Of the mixture; see `mixing_rates`.
        options: Whether the prompts list the answers to choose from.
        seed: Seed of tasks, examples and wordings.

    Raises:
        ValueError: No tasks, templates below 1, or as `mixing_rates` and `mixed_batches`.
    """
    if templates is not None and templates < 1:
        raise ValueError(f"templates is {templates}; each task needs at least 1.")
    by_name = {task.name: task for task in tasks}
    rates = mixing_rates(
        {name: len(task.instances) for name, task in by_name.items()},
        cap=cap,
        temperature=temperature,
    )
    instances = {name: task.instances for name, task in by_name.items()}
    mixed = mixed_batches(instances, rates, size, seed)

    def batch(step: int) -> list[tuple[str, str]]:
        rng = random.Random(f"{seed} templates {step}")
        rows = []
        for name, instance in mixed(step):
            task = by_name[name]
            count = min(templates or len(task.templates), len(task.templates))
            prompt = task.prompt(instance, rng.randrange(count), options=options)
            rows.append((prompt, instance.answer))
        return rows

    return batch
