r"""Distillation for the worst class: weigh classes so that none pays for the average.

A student that is better on average may be worse on rare classes. The mean over examples is replaced
by the worst mixture of class losses,

$$\min_f \max_{\lambda \in \Delta} \sum_y \lambda_y \hat L_y(f), \qquad
  \hat L_y(f) = \frac{1}{n \hat\pi_y} \sum_i p^T_y(x_i)\, \ell(y, f(x_i)), \qquad
  \hat\pi_y = \frac1n \sum_i p^T_y(x_i),$$

with the teacher's probabilities $p^T$ in the place of labels. The weights follow the losses,
$\lambda_y \leftarrow \lambda_y\, e^{\gamma \hat L_y} / Z$ (exponentiated gradient), in turns with
steps on f.

Wang, Narasimhan, Zhou, Hooker, Lukasik, Menon, "Robust Distillation for Worst-class Performance",
2022, arXiv 2206.06479; the form of the equations is in its spirit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.losses import check_logits, check_share
from effnb.core.modules import clone
from effnb.core.training import TrainingResult, TrainingSettings, train


def class_losses(
    student: Float[Tensor, "examples classes"],
    teacher: Float[Tensor, "teacher_examples teacher_classes"],
) -> Float[Tensor, " classes"]:
    r"""$\hat L_y$ for every class, from the student's scores and the teacher's probabilities.

    A class of which the teacher sees nothing in these examples has loss 0.

    Raises:
        ValueError: Shapes that do not fit, or rows of the teacher that are no probabilities.
    """
    check_logits(student, teacher)
    teacher = teacher.detach()
    if bool((teacher < 0).any()) or bool(((teacher.sum(1) - 1).abs() > 1e-3).any()):
        raise ValueError("the teacher's rows must be probabilities that add up to 1, not scores.")
    costs = -student.log_softmax(-1)
    mass = teacher.sum(0)  # $n \hat\pi_y$
    # $\hat L_y = \frac{1}{n \hat\pi_y} \sum_i p^T_y(x_i)\, \ell(y, f(x_i))$
    return (teacher * costs).sum(0) / mass.clamp(min=1e-12)


def update_weights(
    weights: Float[Tensor, " classes"], losses: Float[Tensor, " classes"], gamma: float
) -> Float[Tensor, " classes"]:
    r"""$\lambda_y \leftarrow \lambda_y\, e^{\gamma \hat L_y} / Z$.

    Raises:
        ValueError: A negative $\gamma$, or weights that are not above 0: these never come back.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma is {gamma}; it must not be negative.")
    if bool((~(weights > 0)).any()):
        raise ValueError("every weight must be above 0; a class at 0 would stay there for ever.")
    return (weights.log() + gamma * losses.detach()).softmax(0)


def worst_class_loss(
    student: Float[Tensor, "examples classes"],
    teacher: Float[Tensor, "teacher_examples teacher_classes"],
    weights: Float[Tensor, " classes"],
    trade: float = 1.0,
) -> Float[Tensor, ""]:
    r"""$(1 - a)\, \text{average} + a \sum_y \lambda_y \hat L_y$.

    Args:
        student: The student's scores.
        teacher: The teacher's probabilities.
        weights: $\lambda$.
        trade: $a$; 0 is ordinary distillation, the mean over examples.

    Raises:
        ValueError: A trade outside [0, 1], and what `class_losses` refuses.
    """
    check_share("trade", trade)
    losses = class_losses(student, teacher)
    average = (teacher.detach().mean(0) * losses).sum()  # $\sum_y \hat\pi_y \hat L_y$
    return (1 - trade) * average + trade * (weights.detach() * losses).sum()


@dataclass(frozen=True)
class WorstClass:
    r"""A student trained for its worst class.

    Attributes:
        model: The student.
        training: Losses of all steps.
        weights: (updates + 1, classes), $\lambda$ from its even start on.
    """

    model: nn.Module = field(repr=False)
    training: TrainingResult = field(repr=False)
    weights: Float[Tensor, "updates classes"] = field(repr=False)


def worst_class(
    model: nn.Module,
    batches: Callable[[int], tuple[Tensor, Tensor]],
    validation: tuple[Tensor, Tensor],
    settings: TrainingSettings,
    *,
    gamma: float = 0.5,
    trade: float = 1.0,
    update_every: int = 10,
    progress: bool | Callable[[int, int, float], None] = False,
) -> WorstClass:
    r"""Train a classifier in turns with the weights of its classes.

    Args:
        model: From inputs to scores; it is not changed.
        batches: From the step to (inputs, the teacher's probabilities).
        validation: The same, held out; the weights follow the losses on it. One-hot rows give the
            vanilla loss, the teacher's probabilities the distilled one.
        settings: Steps, rates, seeds.
        gamma: $\gamma$, how fast the weights follow; a fast pursuit runs in circles.
        trade: As in `worst_class_loss`.
        update_every: Steps between two updates of the weights.
        progress: True for a progress bar; or a function of (steps done, steps, loss).

    Raises:
        ValueError: Numbers out of range, or what `class_losses` refuses.
    """
    check_share("trade", trade)
    if update_every < 1:
        raise ValueError(f"update_every is {update_every}; it must be at least 1.")
    inputs, truth = validation
    student = clone(model)
    history = [torch.full((truth.shape[1],), 1 / truth.shape[1], dtype=truth.dtype)]
    update_weights(history[0], torch.zeros_like(history[0]), gamma)  # refuses gamma before any work

    def loss(student: nn.Module, batch: tuple[int, tuple[Tensor, Tensor]]) -> Tensor:
        step, (x, probabilities) = batch
        if step and step % update_every == 0:
            student.eval()
            with torch.no_grad():
                found = class_losses(student(inputs), truth)
            student.train()
            history.append(update_weights(history[-1], found.cpu(), gamma))
        return worst_class_loss(student(x), probabilities, history[-1].to(x.device), trade)

    training = train(
        student, lambda step: (step, batches(step)), settings, loss=loss, progress=progress
    )
    return WorstClass(student, training, torch.stack(history))


def accuracy_by_class(
    logits: Float[Tensor, "examples classes"], labels: Int[Tensor, " examples"]
) -> Float[Tensor, " classes"]:
    """Share of right answers among the examples of each class; NaN for a class without any."""
    right = (logits.argmax(1) == labels).double()
    one_hot = nn.functional.one_hot(labels, logits.shape[1]).double()
    return (one_hot.T @ right) / one_hot.sum(0)
