"""Intrinsic prompt tuning on many small tasks: one label against another, of three tasks.

A subspace is learned from the soft prompts of most of the tasks and tested on those that are left,
beside a prompt with all its numbers, a random subspace of the same size, and the average prompt,
which is where both begin.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.finetuning import intrinsic_prompt, prompt_tuning
from effnb.finetuning.intrinsic_prompt import PromptSubspace
from effnb.lab import load
from effnb.lab.task_inputs import batches_of
from effnb.lab.tasks import Example, Task, task

PARENTS = ("section", "language", "work")
LENGTH, TOKENS = 8, 64
"""Vectors of a prompt, and tokens of a text: the last ones, where the question stands."""
BATCH, STEPS = 8, 60
LEARNED = 30
"""Steps in which the tasks' own losses move the principal subspace."""
RATE, INSIDE_RATE = 3e-2, 0.5
"""Learning rates of a prompt with all its numbers, and of a place in a subspace."""
COMPARED = ("no prompt", "average prompt", "prompt", "intrinsic prompt", "random subspace")
"""What is compared on tasks that the subspace has not seen."""
DIMENSION = 8
"""Numbers that a place in the subspace has."""
UNSEEN = 14
"""Tasks that the subspace is tested on; it is learned from the other 20."""
JUDGED = 80
"""Test texts of each task, as far as there are so many of documents of their own."""


@cache
def contrasts() -> tuple[Task, ...]:
    """All the tasks: every pair of topics, and neighbors in the lists of languages and of works."""
    found = []
    for name in PARENTS:
        parent = task(name)
        count = len(parent.labels)
        if name == "section":
            pairs = list(itertools.combinations(range(count), 2))
        else:
            pairs = [(i, (i + 1) % count) for i in range(count)]
        found += [_contrast(parent, *pair) for pair in pairs]
    return tuple(found)


def _contrast(parent: Task, one: int, other: int) -> Task:
    """Of a task, the examples of two labels."""

    def of(examples: Sequence[Example]) -> tuple[Example, ...]:
        kept = (e for e in examples if e.label in (one, other))
        return tuple(replace(e, label=int(e.label == other)) for e in kept)

    labels = parent.labels[one], parent.labels[other]
    return replace(
        parent,
        name=f"{labels[0]} or {labels[1]}",
        labels=labels,
        train=of(parent.train),
        validation=of(parent.validation),
        test=of(parent.test),
    )


def split() -> tuple[list[Task], list[Task]]:
    """Tasks that a subspace is learned from, and tasks that it has not seen."""
    drawn = random.Random("contrasts").sample(contrasts(), len(contrasts()))
    return drawn[UNSEEN:], drawn[:UNSEEN]


@dataclass(frozen=True)
class Reader:
    """A decoder that chooses between two labels by the first token of each, behind a prompt.

    Attributes:
        name: The model's name.
    """

    name: str = "mini-1m"

    @cached_property
    def loaded(self) -> Any:
        """The model and its tokenizer."""
        return load(self.name, device="cpu")

    def logits(
        self, of: Task, prompt: Float[Tensor, "tokens dim"] | None, examples: Sequence[Example]
    ) -> Float[Tensor, "examples 2"]:
        """Logits of the two labels behind each example; without a prompt where it is None."""
        tokenizer, model = self.loaded.tokenizer, self.loaded.model
        encoded = [tokenizer.encode(of.prompt(e), add_special_tokens=False) for e in examples]
        rows = [torch.tensor(ids[-TOKENS:]) for ids in encoded]
        # What is behind the last token does not change it: the model is causal.
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        embedded = model.get_input_embeddings()(padded).detach()
        last = torch.tensor([len(row) - 1 for row in rows])
        if prompt is not None:
            embedded = torch.cat([prompt.expand(len(rows), -1, -1), embedded], 1)
            last = last + len(prompt)
        found = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        words = [tokenizer.encode(f" {label}", add_special_tokens=False)[0] for label in of.labels]
        return found[torch.arange(len(rows)), last] @ model.lm_head.weight[words].T

    def losses(self, of: Task, seed: int) -> Callable[[Tensor], Tensor]:
        """A task's loss as a function of the prompt; every call sees the next batch."""
        chosen, steps = batches_of(of.train, BATCH, seed), itertools.count()

        def loss(prompt: Float[Tensor, "tokens dim"]) -> Tensor:
            examples = chosen(next(steps))
            labels = torch.tensor([e.label for e in examples])
            return nn.functional.cross_entropy(self.logits(of, prompt, examples), labels)

        return loss

    def start(self) -> Tensor:
        """Where the prompts of all tasks begin: embeddings of random tokens."""
        table = self.loaded.model.get_input_embeddings().weight.detach()
        generator = torch.Generator().manual_seed(0)
        return prompt_tuning.start_values(table, LENGTH, "vocabulary", generator)

    def prompt(self, of: Task, seed: int) -> Tensor:
        """A prompt with all its numbers, tuned for a task: a subspace that leaves nothing out."""
        start = self.start()
        everything = PromptSubspace(*start.shape, start.numel()).requires_grad_(False)
        everything.encoder[0].weight.copy_(torch.eye(start.numel()))
        everything.decoder[0].weight.copy_(torch.eye(start.numel()))
        return self.inside(everything, of, seed, RATE, start)

    def inside(
        self,
        subspace: PromptSubspace,
        of: Task,
        seed: int,
        rate: float = INSIDE_RATE,
        start: Tensor | None = None,
    ) -> Tensor:
        """A prompt tuned for a task inside a subspace, from its average prompt or from a start."""
        found = intrinsic_prompt.tune(
            subspace, self.losses(of, seed), steps=STEPS, learning_rate=rate, start=start
        )
        return found().detach()

    @torch.inference_mode()
    def right(
        self, of: Task, prompt: Float[Tensor, "tokens dim"] | None, examples: Sequence[Example]
    ) -> list[int]:
        """Which examples are answered right behind a prompt, or without one."""
        chosen = self.logits(of, prompt, examples).argmax(1).tolist()
        return [int(a == e.label) for a, e in zip(chosen, examples, strict=True)]


def subspaces(reader: Reader, tasks: Sequence[Task], seed: int) -> dict[str, PromptSubspace]:
    """The subspace that these tasks' prompts share, and a random one around their average."""
    prompts = torch.stack([reader.prompt(one, seed) for one in tasks])
    losses = [reader.losses(one, seed + 1000) for one in tasks]
    learned = intrinsic_prompt.learn_subspace(
        prompts,
        DIMENSION,
        task_loss=lambda i, prompt: losses[i](prompt),
        start=intrinsic_prompt.principal_subspace(prompts, DIMENSION),
        steps=LEARNED,
        learning_rate=1e-3,
        seed=seed,
    )
    return {
        "intrinsic prompt": learned,
        "random subspace": intrinsic_prompt.random_subspace(prompts, DIMENSION, seed),
    }


def accuracies(reader: Reader, tasks: Sequence[Task], make: Callable[[Task], Any]) -> list[float]:
    """Share of each task's test texts answered right, behind the prompt that is made for it."""
    found = []
    for one in tasks:
        texts = list({e.document: e for e in reversed(one.test)}.values())[:JUDGED]
        found.append(round(fmean(reader.right(one, make(one), texts)), 4))
    return found
