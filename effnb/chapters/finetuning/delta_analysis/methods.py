"""Several deltas on one model, trained at once or in sequence, and decoders that name a topic.

The chapter's pictures, its exercises and its stored measurements train through these functions.
Every method is that of the chapter before (`effnb.chapters.finetuning.delta_tuning.methods`), with
the learning rate that was chosen there; what is combined keeps each method's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.chapters.finetuning.delta_tuning.methods import (
    BATCH,
    CLASSIFIER_RATE,
    METHODS,
    WARMUP,
    Run,
    Subject,
    one_per_document,
    tune,
)
from effnb.core.deltas import attached, delta_parameters, set_trainable
from effnb.core.modules import find_blocks
from effnb.core.training import TrainingSettings, causal_lm_loss, train
from effnb.finetuning import adapters, bitfit, prompt_tuning
from effnb.finetuning.prompting import word_log_probs
from effnb.lab import load
from effnb.lab.task_inputs import batches_of, classification_loss, decoder_batch
from effnb.lab.tasks import Example, Task, task

SIZES = {"prompt": 8, "BitFit": 0, "adapter": 8}
"""What is combined, and its size: vectors of the prompt, width of the adapters' bottlenecks.

Adapters sit behind both sublayers of a block, as in Houlsby et al. 2019: on linear layers, where
they bear with trained biases. Those on a norm do not.
"""
PARTS = tuple(SIZES)
SUBSETS = (
    (),
    ("prompt",),
    ("BitFit",),
    ("adapter",),
    ("prompt", "BitFit"),
    ("prompt", "adapter"),
    ("BitFit", "adapter"),
    ("prompt", "BitFit", "adapter"),
)
"""All ways to use some of them at once; without any, the new classifier alone is trained."""
RATES = {
    "full": 1e-3,
    "LoRA": 2e-3,
    "adapter": 8e-3,
    "prompt": 4e-2,
    "last layers": 1e-3,
    "random modules": 4e-3,
}
"""Learning rates on the decoders: those of the encoder, but for full tuning and the last layer,
whose rates such small models need larger."""


def attach(base: nn.Module, name: str, seed: int = 0) -> nn.Module:
    """One of the three methods, under its own name.

    Raises:
        ValueError: When it is none of the three.
    """
    if name == "adapter":
        return adapters.attach(base, name, placement="houlsby", size=SIZES[name], seed=seed)
    if name == "BitFit":
        return bitfit.attach(base, name)
    if name == "prompt":
        return prompt_tuning.attach(base, name, length=SIZES[name], seed=seed)
    raise ValueError(f"{name!r} cannot be combined here; choose of {', '.join(PARTS)}.")


def said(names: Sequence[str]) -> str:
    """A set of methods, as rows and pictures call it."""
    return " + ".join(names) or "classifier"


def rates_of(model: nn.Module, names: Sequence[str]) -> Callable[..., list]:
    """AdamW in which every delta has its own rate, and the new classifier its own."""

    def optimizers(model: nn.Module, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
        groups = [
            {"params": list(delta_parameters(model, n).values()), "lr": METHODS[n].rate}
            for n in names
        ]
        if new := [p for n, p in model.named_parameters() if n.startswith("classifier.")]:
            groups.append({"params": new, "lr": CLASSIFIER_RATE})
        return [torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=0.0)]

    return optimizers


def train_deltas(
    model: nn.Module,
    names: Sequence[str],
    batch: Callable[[Sequence[Example]], Any],
    examples: Sequence[Example],
    *,
    steps: int,
    seed: int = 0,
) -> nn.Module:
    """Train these deltas, and the new classifier if there is one, and leave all else as it is.

    Args:
        model: A classifier or a decoder that carries the deltas, and maybe others; it is not
            changed.
        names: The deltas to train.
        batch: From examples to a batch.
        examples: What to train on.
        steps: Steps of `BATCH` examples.
        seed: Seed of the order of the examples.
    """
    new = any(name.startswith("classifier.") for name, _ in model.named_parameters())
    result = set_trainable(model, *names, also="classifier.*" if new else ())
    chosen = batches_of(examples, BATCH, seed)
    settings = TrainingSettings(
        steps=steps, learning_rate=CLASSIFIER_RATE, warmup_steps=min(WARMUP, steps),
        schedule="linear", seed=seed,
    )  # fmt: skip
    train(
        result,
        lambda step: batch(chosen(step)),
        settings,
        loss=classification_loss if new else causal_lm_loss,
        optimizers=rates_of(result, names),
    )
    return result


def together(
    base: nn.Module,
    names: Sequence[str],
    batch: Callable[[Sequence[Example]], Any],
    examples: Sequence[Example],
    *,
    steps: int,
    seed: int = 0,
) -> nn.Module:
    """Attach several deltas and train all of them at once."""
    model = base
    for name in names:
        model = attach(model, name, seed)
    return train_deltas(model, names, batch, examples, steps=steps, seed=seed)


def next_in_line(
    model: nn.Module,
    name: str,
    batch: Callable[[Sequence[Example]], Any],
    examples: Sequence[Example],
    *,
    steps: int,
    seed: int = 0,
) -> nn.Module:
    """Freeze what a model carries, attach one more delta, and train that one; or train it on."""
    if name not in attached(model):
        model = attach(model, name, seed)
    return train_deltas(model, [name], batch, examples, steps=steps, seed=seed)


# ---------------------------------------------------------------------- decoders that name a topic


@dataclass(frozen=True)
class Decoder:
    """A decoder on a task with labels, asked through a hand-written template or by the bare text.

    Attributes:
        name: The model's name.
        bare: Whether the text stands alone; the answer follows it after a space.
        task_name: The task.
    """

    name: str = "mini-1m"
    bare: bool = False
    task_name: str = "section"

    @cached_property
    def loaded(self) -> Any:
        """The model and its tokenizer."""
        return load(self.name, device="cpu")

    @cached_property
    def task(self) -> Task:
        """The task."""
        return task(self.task_name)

    @property
    def model(self) -> nn.Module:
        """The model as it is."""
        return self.loaded.model

    def prompts(self, examples: Sequence[Example]) -> list[str]:
        """What the model reads of each example."""
        return [e.text if self.bare else self.task.prompt(e) for e in examples]

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch to train on; the answer and its end are labelled."""
        answers = [f" {e.target}" for e in examples]
        return decoder_batch(self.loaded.tokenizer, self.prompts(examples), answers)

    def label_log_probs(
        self, model: nn.Module, examples: Sequence[Example]
    ) -> Float[Tensor, "examples labels"]:
        r"""$\log p(\text{label} \mid \text{prompt})$, normalized over the labels."""
        logs = word_log_probs(
            model, self.loaded.tokenizer, self.prompts(examples), self.task.labels, batch_size=32
        )
        return logs.log_softmax(1)

    def right(self, model: nn.Module, examples: Sequence[Example]) -> list[float]:
        """1 for each example whose likeliest label is the right one, else 0."""
        chosen = self.label_log_probs(model, examples).argmax(1).tolist()
        return [float(a == e.label) for a, e in zip(chosen, examples, strict=True)]

    def tuned(
        self,
        method: str,
        examples: Sequence[Example],
        *,
        steps: int,
        seed: int = 0,
        size: float | None = None,
        **more: Any,
    ) -> Run:
        """The model, tuned by a method at the rate that decoders are tuned with."""
        more.setdefault("rate", RATES[method])
        return tune(
            self.model, method, self.batch, examples, steps=steps, size=size, seed=seed, **more
        )


def last_layer_share(model: nn.Module) -> float:
    """Parameters of the last block of a decoder, in per cent of all of them."""
    _, blocks = find_blocks(model)
    last = sum(p.numel() for p in blocks[-1].parameters())
    return 100 * last / sum(p.numel() for p in model.parameters())


def energy(before: Tensor, after: Tensor, rank: int = 8) -> float:
    r"""Part of the squared change that its largest singular directions hold.

    $\sum_{i \le r} \sigma_i^2 / \lVert \Delta W \rVert_F^2$ with $\sigma_i$ the singular values of
    $\Delta W = W' - W$.
    """
    values = torch.linalg.svdvals((after - before).double()).square()
    return float(values[:rank].sum() / values.sum())


def changed_energy(before: nn.Module, after: nn.Module, rank: int = 8) -> list[float]:
    """`energy` of each query and value matrix of a decoder that was tuned as a whole."""
    old = dict(before.named_parameters())
    return [
        energy(old[name].detach(), new.detach(), rank)
        for name, new in after.named_parameters()
        if name.endswith(("q_proj.weight", "v_proj.weight"))
    ]


def encoder() -> Subject:
    """MiniLM on topics, as the chapter before has it."""
    return Subject(task("section"))


__all__ = [
    "PARTS", "RATES", "SIZES", "SUBSETS", "Decoder", "attach", "changed_energy", "encoder",
    "energy", "last_layer_share", "next_in_line", "one_per_document", "rates_of", "said",
    "together", "train_deltas",
]  # fmt: skip
