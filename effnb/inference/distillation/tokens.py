"""What a language model says at the positions that count, and the run that trains a student on it.

Every method here is a loss. Those named `…_loss` compare tensors; the others take a teacher and
give what `distill` and `effnb.core.training.train` take: a function of (student, batch).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from effnb.core.losses import check_teacher
from effnb.core.modules import clone
from effnb.core.training import (
    Batches,
    Loss,
    TrainingResult,
    TrainingSettings,
    causal_lm_loss,
    targets,
    train,
)


@dataclass(frozen=True)
class Distilled:
    """A student after training.

    Attributes:
        model: The trained student.
        training: Losses of all steps, evaluations, seconds.
    """

    model: nn.Module = field(repr=False)
    training: TrainingResult = field(repr=False)


def distill(
    model: nn.Module,
    batches: Batches,
    settings: TrainingSettings,
    *,
    loss: Loss,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: bool | Callable[[int, int, float], None] = False,
) -> Distilled:
    """Train a copy of a student on what a loss takes from its teacher.

    With `loss=effnb.core.training.causal_lm_loss` it is the comparison that every claim about
    distillation needs: the same student, steps and batches, on labels alone.

    Args:
        model: The student; it is not changed.
        batches: From the step's number to its batch.
        settings: Steps, rates, seeds.
        loss: From (student, batch) to a scalar, such as `hinton(teacher)`.
        evaluate: From the student to named numbers, as in `effnb.core.training.train`.
        progress: True for a progress bar; or a function of (steps done, steps, loss).

    Raises:
        ValueError: What the loss refuses, and what `train` refuses.
    """
    student = clone(model)
    training = train(
        student, batches, settings, loss=loss, evaluate=evaluate, progress=progress
    )  # fmt: skip
    return Distilled(student, training)


def steps_at_equal_compute(
    model: nn.Module,
    batch: Any,
    steps: int,
    *,
    loss: Loss,
    instead: Loss = causal_lm_loss,
) -> int:
    r"""How many steps on labels alone take the compute of these steps with a teacher.

    $\lfloor n \cdot F / F' \rfloor$, with F the floating-point operations of a step's forward and
    backward passes, the teacher's and the drawing of texts included, and F' those of the other
    loss, counted by PyTorch on one batch.

    Args:
        model: The student; it gets no gradients.
        batch: A batch that both losses take.
        steps: n.
        loss: From (student, batch) to a scalar, such as `hinton(teacher)`.
        instead: What it is compared with.

    Raises:
        ValueError: Fewer steps than 1, and what the losses refuse.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1.")
    trained = [p for p in model.parameters() if p.requires_grad]

    def operations(of: Loss) -> int:
        # The fused attention of CPUs is unknown to the counter.
        counter = FlopCounterMode(display=False)
        quiet = torch.random.fork_rng(devices=[])  # a loss may draw
        with quiet, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            torch.autograd.grad(of(model, batch), trained, allow_unused=True)
        return counter.get_total_flops()

    return steps * operations(loss) // operations(instead)


@dataclass(frozen=True)
class Said:
    """What a model says of one batch.

    Attributes:
        output: All that the model returned.
        logits: (counted, vocabulary), scores at the positions whose next token counts.
        labels: (counted,), that next token.
    """

    output: Any = field(repr=False)
    logits: Float[Tensor, "counted vocabulary"] = field(repr=False)
    labels: Int[Tensor, " counted"] = field(repr=False)


Tokens = Tensor | tuple[Tensor, Tensor] | Mapping[str, Any]
"""A batch: token ids; (ids, labels) with -100 where nothing counts; or a model's own arguments."""


def arguments(batch: Tokens) -> dict[str, Any]:
    """A batch as keyword arguments, with `labels` only where they were given."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, tuple):
        return {"input_ids": batch[0], "labels": batch[1]}
    return {"input_ids": batch}


def said(model: nn.Module, batch: Tokens, *, causal: bool = True, **more: Any) -> Said:
    """Run a model and keep what counts.

    Args:
        model: A language model with logits.
        batch: The tokens.
        causal: Whether position t foresees token t + 1. A model of masked words foresees its own
            position; its batch then has `labels`, which are -100 wherever nothing was masked.
        more: Further arguments of the model, such as `output_hidden_states=True`.

    Raises:
        ValueError: When the sequences are longer than the model's positions, no position counts, or
            a masked batch has no labels.
    """
    given = arguments(batch)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    length = given["input_ids"].shape[-1] if "input_ids" in given else 0
    if isinstance(limit, int) and length > limit > 0:
        raise ValueError(
            f"the sequences have {length} tokens; {type(model).__name__} has {limit} positions."
        )
    if not causal and "labels" not in given:
        raise ValueError("a batch for masked words needs `labels`, -100 where nothing is masked.")
    labels = targets(given) if causal else given["labels"]
    passed = {key: value for key, value in given.items() if key != "labels"}
    if causal and getattr(getattr(model, "config", None), "use_cache", None) is not None:
        passed = {"use_cache": False, **passed}
    output = model(**passed, **more)
    logits = output.logits
    if causal and "decoder_input_ids" not in given:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counts = labels != -100
    if not bool(counts.any()):
        raise ValueError("no position of the batch counts; give at least one label.")
    return Said(output, logits[counts], labels[counts])


def teach(teacher: nn.Module, batch: Tokens, **more: Any) -> Said:
    """What a teacher says, without a gradient.

    Raises:
        ValueError: A teacher in training mode, and what `said` refuses.
    """
    check_teacher(teacher)
    with torch.no_grad():
        return said(teacher, batch, **more)
