"""The methods that the chapter compares, each by one number for its size, and one run of training.

The panel, the pictures and the stored grid all train through `tune`: the same batches in the same
order for every method at a seed, AdamW with a rate that warms up and falls to 0, the new classifier
trained beside every method and counted with none.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from effnb.core.deltas import delta_parameters, set_trainable
from effnb.core.training import TrainingSettings, causal_lm_loss, train
from effnb.finetuning import (
    adapters,
    bitfit,
    dora,
    ia3,
    intrinsic_dimension,
    last_layers,
    lora,
    prefix_tuning,
    prompt_tuning,
    selective_modules,
)
from effnb.lab import load
from effnb.lab.task_inputs import (
    Classifier,
    as_texts,
    batches_of,
    classification_loss,
    classify,
    decoder_batch,
    encoder_batch,
)
from effnb.lab.tasks import Example, Task, task

DELTA = "task"
"""What every delta is called here."""
TOKENS = 32
"""Texts are cut to this many tokens, so that a reader can wait for a run."""
BATCH = 8
WARMUP = 5
CLASSIFIER_RATE = 5e-3
"""Learning rate of the new classifier, which starts at 0 and has to grow whatever else is tuned."""
ATTENTION = ("*.query", "*.value", "*.q_proj", "*.v_proj")
"""The layers that LoRA, DoRA and the intrinsic dimension change, under their names in both kinds of
model: queries and values, as in LoRA's paper."""

Attach = Callable[[nn.Module, int, int], nn.Module]


@dataclass(frozen=True)
class Method:
    """One way to tune a model.

    Attributes:
        family: "addition", "specification" or "reparametrization".
        what: What its size counts; empty where there is nothing to choose.
        size: The size that is compared.
        rate: The learning rate that is compared, chosen on a validation set.
        attach: From a model, a size and a seed to the model with the delta; None trains all.
        sizes: The sizes that a reader may choose.
    """

    family: str
    what: str
    size: int
    rate: float
    attach: Attach | None
    sizes: tuple[int, ...] = ()


def _lora(model: nn.Module, size: int, seed: int) -> nn.Module:
    return lora.attach(model, DELTA, rank=size, alpha=2 * size, layers=_present(model), seed=seed)


def _dora(model: nn.Module, size: int, seed: int) -> nn.Module:
    return dora.attach(model, DELTA, rank=size, alpha=2 * size, layers=_present(model), seed=seed)


def _adapter(model: nn.Module, size: int, seed: int) -> nn.Module:
    return adapters.attach(model, DELTA, placement="pfeiffer", size=size, seed=seed)


def _prefix(model: nn.Module, size: int, seed: int) -> nn.Module:
    """A prefix that starts from the keys and values of words, without an MLP."""
    embeddings = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    vocabulary = embeddings.num_embeddings
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary // 10, vocabulary // 3, (size,), generator=generator)
    return prefix_tuning.attach(model, DELTA, hidden=0, ids=ids, seed=seed)


def _prompt(model: nn.Module, size: int, seed: int) -> nn.Module:
    return prompt_tuning.attach(model, DELTA, length=size, seed=seed)


def _bitfit(model: nn.Module, size: int, seed: int) -> nn.Module:
    return bitfit.attach(model, DELTA)


def _ia3(model: nn.Module, size: int, seed: int) -> nn.Module:
    return ia3.attach(model, DELTA)


def _last(model: nn.Module, size: int, seed: int) -> nn.Module:
    return last_layers.attach(model, DELTA, count=size)


def _random(model: nn.Module, size: int, seed: int) -> nn.Module:
    """Whole modules drawn until `size` per cent of the model are trained."""
    return selective_modules.attach(model, DELTA, share=size / 100, seed=seed)


def _intrinsic(model: nn.Module, size: int, seed: int) -> nn.Module:
    return intrinsic_dimension.attach(
        model, DELTA, dimension=size, layers=_present(model), seed=seed
    )


def _present(model: nn.Module) -> list[str]:
    """Those of the patterns that the model's names fit."""
    names = [name for name, _ in model.named_modules()]
    return [p for p in ATTENTION if any(n.endswith(p[1:]) for n in names)]


FULL = "full"
METHODS = {
    FULL: Method("", "", 0, 1e-4, None),
    "LoRA": Method("reparametrization", "rank", 8, 2e-3, _lora, (1, 2, 4, 8, 16, 32)),
    "adapter": Method("addition", "bottleneck", 16, 8e-3, _adapter, (1, 2, 4, 8, 16, 32)),
    "prefix": Method("addition", "length", 16, 4e-2, _prefix, (1, 2, 4, 8, 16, 32)),
    "prompt": Method("addition", "length", 24, 4e-2, _prompt, (1, 2, 4, 8, 16, 24, 32)),
    "BitFit": Method("specification", "", 0, 8e-3, _bitfit),
    "last layers": Method("specification", "layers", 2, 3e-4, _last, (1, 2, 3, 4, 5, 6)),
    "random modules": Method("specification", "per cent", 1, 4e-3, _random, (1, 2, 4, 8, 16)),
    "intrinsic": Method(
        "reparametrization", "dimension", 256, 3e-2, _intrinsic, (4, 16, 64, 256, 1024)
    ),
    "(IA)³": Method("addition", "", 0, 1e-2, _ia3),
    "DoRA": Method("reparametrization", "rank", 8, 2e-3, _dora, (1, 2, 4, 8, 16, 32)),
}
"""The methods by the names that readers see."""
TOO_HIGH = {FULL: 4e-4}
"""A rate that was best after 20 steps on topics, and at which the method then stayed at guessing on
pairs of texts (the part `steep` of the sweep); the method has the best of the others."""


@dataclass(frozen=True)
class Prepared:
    """A model ready to be trained: what is trained, and how many numbers that is.

    Attributes:
        model: The model; training changes it in place.
        parameters: Trained numbers, without the new classifier.
        delta: Whether it carries a delta; full tuning does not.
    """

    model: nn.Module
    parameters: int
    delta: bool

    @property
    def bytes(self) -> int:
        """Bytes to store for the task, at 16 bits a number."""
        return 2 * self.parameters


def prepared(base: nn.Module, method: str, size: int | None = None, seed: int = 0) -> Prepared:
    """A model to tune by a method, on the frozen tensors of `base`.

    Full tuning works on a copy of everything. A `Classifier`'s new layer is trained by all.
    """
    about = METHODS[method]
    also = "classifier.*" if isinstance(base, Classifier) else ()
    if about.attach is None:
        model = copy.deepcopy(base)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        head = isinstance(base, Classifier) and sum(p.numel() for p in base.classifier.parameters())
        return Prepared(model, sum(p.numel() for p in model.parameters()) - head, False)
    model = about.attach(base, about.size if size is None else size, seed)
    count = sum(p.numel() for p in delta_parameters(model, DELTA).values())
    return Prepared(set_trainable(model, DELTA, also=also), count, True)


@dataclass(frozen=True)
class Run:
    """What came of tuning.

    Attributes:
        model: The tuned model.
        parameters: Trained numbers, without the new classifier.
        losses: Training loss of every step, in nats.
        seen: What was watched, each with its "step".
        seconds: Time spent on the steps alone.
    """

    model: nn.Module = field(repr=False)
    parameters: int
    losses: list[float] = field(repr=False)
    seen: list[dict[str, Any]]
    seconds: float

    @property
    def step_seconds(self) -> float:
        """Mean time of a step."""
        return self.seconds / len(self.losses)


def optimizers(model: nn.Module, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """AdamW with a rate of its own for the new classifier, the same one beside every method."""
    new = [p for n, p in model.named_parameters() if n.startswith("classifier.")]
    known = {id(p) for p in new}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [{"params": rest, "lr": settings.learning_rate}]
    if new:
        groups.append({"params": new, "lr": CLASSIFIER_RATE})
    return [torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=0.0)]


def tune(
    base: nn.Module,
    method: str,
    batch: Callable[[Sequence[Example]], Any],
    examples: Sequence[Example],
    *,
    steps: int,
    size: int | None = None,
    rate: float | None = None,
    seed: int = 0,
    watch: Callable[[nn.Module], dict[str, Any]] | None = None,
    points: Sequence[int] = (),
    progress: Callable[[int, int, float], None] | bool = False,
) -> Run:
    """Tune a model by one method.

    Args:
        base: A `Classifier` or a decoder; it is not changed.
        method: One of `METHODS`.
        batch: From examples to a batch.
        examples: What to train on.
        steps: Steps of `BATCH` examples.
        size: Rank, bottleneck, length and so on; the method's own where None.
        rate: Learning rate; the method's own where None.
        seed: Seed of the delta and of the order of examples.
        watch: From the model to named numbers.
        points: Numbers of steps after which to watch.
        progress: As for `effnb.core.training.train`.
    """
    ready = prepared(base, method, size, seed)
    chosen = batches_of(examples, BATCH, seed)
    seen: list[dict[str, Any]] = []
    watching = 0.0

    def look(step: int) -> None:
        nonlocal watching
        if watch is not None and step in points:
            began = time.perf_counter()
            training = ready.model.training
            seen.append({"step": step} | watch(ready.model.eval()))
            ready.model.train(training)
            watching += time.perf_counter() - began

    def batches(step: int) -> Any:
        look(step)  # as it is after so many steps
        return batch(chosen(step))

    settings = TrainingSettings(
        steps=steps,
        learning_rate=METHODS[method].rate if rate is None else rate,
        warmup_steps=min(WARMUP, steps),
        schedule="linear",
        seed=seed,
    )
    loss = classification_loss if isinstance(base, Classifier) else causal_lm_loss
    result = train(
        ready.model, batches, settings, loss=loss, progress=progress, optimizers=optimizers
    )
    seconds = result.seconds - watching
    look(steps)
    return Run(ready.model, ready.parameters, result.losses, seen, seconds)


# ------------------------------------------------------------------------------- tasks on models


@dataclass(frozen=True)
class Subject:
    """A task on a model: how its examples become batches, and how the model is judged.

    Attributes:
        task: The task.
        name: The model's name.
    """

    task: Task
    name: str = "minilm-l6"

    @cached_property
    def loaded(self) -> Any:
        """The model and its tokenizer."""
        return load(self.name)

    @cached_property
    def base(self) -> nn.Module:
        """What is tuned: the encoder with a new classifier, or the decoder as it is."""
        model = self.loaded.model
        return Classifier(model, len(self.task.labels)) if self.name == "minilm-l6" else model

    def batch(self, examples: Sequence[Example]) -> dict[str, Any]:
        """A batch as the model reads it."""
        tokenizer = self.loaded.tokenizer
        if self.name == "minilm-l6":
            found = encoder_batch(tokenizer, examples, TOKENS)
        else:
            found = decoder_batch(tokenizer, *as_texts(self.task, examples))
        return {key: tensor.to(self.loaded.model.device) for key, tensor in found.items()}

    def judged(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, list[float]]:
        """Of each example, whether a classifier was right, and its loss in nats."""
        chosen, losses = classify(model, self.loaded.tokenizer, examples, tokens=TOKENS)
        right = [float(a == e.label) for a, e in zip(chosen, examples, strict=True)]
        return {"correct": right, "losses": [round(x, 4) for x in losses]}


def one_per_document(examples: Sequence[Example], count: int) -> list[Example]:
    """The first `count` examples with the first of every document only.

    Raises:
        ValueError: When there are fewer documents.
    """
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.document, example)
    if len(first) < count:
        raise ValueError(f"there are {len(first)} documents, fewer than {count}.")
    return list(first.values())[:count]


# ----------------------------------------------------------------------------------- here and now


def times(subject: Subject, names: Sequence[str], turns: int = 4) -> list[tuple[str, float]]:
    """The shortest of a few training steps of each method, in seconds; methods take turns."""
    batch = subject.batch(subject.task.train[:BATCH])
    models = {name: prepared(subject.base, name).model for name in names}
    settings = TrainingSettings(steps=1, learning_rate=1e-6)
    steppers = {name: optimizers(model, settings)[0] for name, model in models.items()}
    found: dict[str, list[float]] = {name: [] for name in names}
    with torch.enable_grad():
        for _ in range(turns):
            for name, model in models.items():
                began = time.perf_counter()
                classification_loss(model, batch).backward()
                steppers[name].step()
                steppers[name].zero_grad()
                found[name].append(time.perf_counter() - began)
    return [(name, min(seconds)) for name, seconds in found.items()]


def smollm2_here(steps: int = 3) -> str:
    """A few steps of LoRA on SmolLM2-135M, on a description of a package, in a sentence."""
    task_ = task("summary")
    subject = Subject(task_, "smollm2-135m")
    found = tune(subject.base, "LoRA", subject.batch, task_.train[:BATCH], steps=steps, rate=1e-3)
    return (
        f"SmolLM2-135M, LoRA of rank {METHODS['LoRA'].size}: {found.parameters:,} numbers; "
        f"{found.step_seconds:.1f} s a step of {BATCH} texts; loss {found.losses[0]:.2f} before "
        f"and {found.losses[-1]:.2f} after {steps - 1} steps, on the same texts."
    )
