r"""Distillation: a student learns from a teacher's softened probabilities, not from labels alone.

A teacher's wrong classes carry what the label does not say: a 7 looks more like a 1 than like an 8.
A temperature $\tau$ brings these small probabilities out. With teacher scores v and student
scores z,

$$L = a\, \tau^2 \operatorname{KL}(p^\tau \| q^\tau) + (1 - a) \operatorname{CE}(y, q^1), \qquad
  p^\tau = \operatorname{softmax}(v / \tau),\ q^\tau = \operatorname{softmax}(z / \tau).$$

The gradient of the first part is $\tau (q^\tau - p^\tau)$. For large $\tau$ it becomes
$((z - \bar z) - (v - \bar v)) / N$: the student then copies the teacher's scores themselves.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.losses import check_logits, check_share, check_teacher, log_softened, temperature_kl
from effnb.core.training import Loss
from effnb.inference.distillation.tokens import Tokens, said, teach


def soften(
    logits: Float[Tensor, "*batch classes"], temperature: float
) -> Float[Tensor, "*batch classes"]:
    r"""$\operatorname{softmax}(z / \tau)$.

    Raises:
        ValueError: A temperature of 0 or below.
    """
    return log_softened(logits, temperature).exp().to(logits.dtype)


def hinton_loss(
    student: Float[Tensor, "*batch classes"],
    teacher: Float[Tensor, "*teacher_batch teacher_classes"],
    labels: Int[Tensor, "*labelled"] | None = None,
    *,
    temperature: float = 2.0,
    weight: float = 0.5,
) -> Float[Tensor, ""]:
    r"""$a \tau^2 \operatorname{KL}(p^\tau \| q^\tau) + (1 - a) \operatorname{CE}(y, q^1)$, in nats.

    Args:
        student: Scores of the student, z.
        teacher: Scores of the teacher, v, for the same classes and positions.
        labels: The true classes, -100 where there is none: such positions have the teacher only.
            Without any labels, `weight` has to be 1.
        temperature: $\tau$.
        weight: $a$, the teacher's share.

    Raises:
        ValueError: A temperature of 0 or below, a weight outside [0, 1], a weight below 1 without
            labels, or scores and labels that do not fit.

    Source: Hinton et al. 2015, section 2.
    """
    check_share("weight", weight)
    check_logits(student, teacher)
    if weight < 1 and (labels is None or not bool((labels != -100).any())):
        raise ValueError(f"weight is {weight} and there are no labels; it must then be 1.")
    if labels is not None and labels.shape != student.shape[:-1]:
        raise ValueError(
            f"the labels have shape {tuple(labels.shape)}; one for each of the positions "
            f"{tuple(student.shape[:-1])} is needed."
        )
    # $a\, \tau^2\, \mathrm{KL}(p^\tau \| q^\tau)$
    loss = weight * temperature_kl(student, teacher, temperature)
    if weight < 1:
        flat = student.reshape(-1, student.shape[-1])
        wide = flat if flat.dtype == torch.float64 else flat.float()
        hard = nn.functional.cross_entropy(wide, labels.reshape(-1))  # $\mathrm{CE}(y, q^1)$
        loss = loss + (1 - weight) * hard
    return loss


def hinton(teacher: nn.Module, *, temperature: float = 2.0, weight: float = 0.5) -> Loss:
    """The loss of (student, batch) for language models that share a vocabulary.

    Args:
        teacher: A causal language model in evaluation mode; it is not trained.
        temperature: As in `hinton_loss`.
        weight: As in `hinton_loss`; 0 trains on the text alone, and the teacher does not run.

    Raises:
        ValueError: A teacher in training mode, and what `hinton_loss` refuses.
    """
    check_teacher(teacher)
    check_share("weight", weight)
    log_softened(torch.zeros(1), temperature)  # refuses the temperature before any work

    def loss(student: nn.Module, batch: Tokens) -> Tensor:
        own = said(student, batch)
        if weight == 0:
            return nn.functional.cross_entropy(own.logits.float(), own.labels)
        taught = teach(teacher, batch)
        return hinton_loss(
            own.logits, taught.logits, own.labels, temperature=temperature, weight=weight
        )

    return loss


def soft_gradient(
    student: Float[Tensor, "*batch classes"],
    teacher: Float[Tensor, "*batch classes"],
    temperature: float,
) -> Float[Tensor, "*batch classes"]:
    r"""$\partial\, \tau^2 \operatorname{KL} / \partial z = \tau (q^\tau - p^\tau)$ of each row.

    Raises:
        ValueError: A temperature of 0 or below.
    """
    q, p = log_softened(student, temperature).exp(), log_softened(teacher, temperature).exp()
    return (temperature * (q - p)).to(student.dtype)


def matching_gradient(
    student: Float[Tensor, "*batch classes"], teacher: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch classes"]:
    r"""What `soft_gradient` becomes for $\tau \to \infty$: $((z - \bar z) - (v - \bar v)) / N$.

    It is the gradient of $\frac{1}{2N} \lVert z - v \rVert^2$ for centred scores.
    """
    z = student - student.mean(-1, keepdim=True)
    v = teacher - teacher.mean(-1, keepdim=True)
    return (z - v) / student.shape[-1]


def bias_scan(
    logits: Float[Tensor, "examples classes"],
    labels: Int[Tensor, " examples"],
    missing: int,
    biases: Sequence[float],
) -> list[dict[str, float]]:
    """Accuracy after raising one class's score, as for a class that no training example had.

    A student that never saw the class scores it too low. If one number added to its score brings it
    back, the student had learnt from the teacher's soft answers what the class looks like.

    Args:
        logits: The student's scores on labelled examples.
        labels: Their classes.
        missing: The class to raise.
        biases: Numbers to add to its score, one at a time.

    Returns:
        For each bias: "bias", "accuracy", and "accuracy_missing" on the examples of that class.

    Raises:
        ValueError: A class that is not among the scores or has no example.

    Source: Hinton et al. 2015, section 3, the transfer set without the digit 3.
    """
    if not 0 <= missing < logits.shape[1]:
        raise ValueError(f"class {missing} is not among the {logits.shape[1]} that are scored.")
    of_it = labels == missing
    if not bool(of_it.any()):
        raise ValueError(f"no example is of class {missing}; its accuracy cannot be measured.")
    found = []
    for bias in biases:
        raised = logits.clone()
        raised[:, missing] += bias
        right = (raised.argmax(1) == labels).double()
        found.append({
            "bias": float(bias),
            "accuracy": float(right.mean()),
            "accuracy_missing": float(right[of_it].mean()),
        })  # fmt: skip
    return found
