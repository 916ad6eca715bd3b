r"""Where a student disobeys: it is surer than its teacher where that is sure, less where it is not.

A student that copied its teacher would lie on a diagonal: for the teacher's first class, the
student's $\operatorname{logit}(q)$ against the teacher's $\operatorname{logit}(p)$, with
$\operatorname{logit}(p) = \ln \frac{p}{1 - p}$. Usually, not always, the fitted slope is above 1:
the student exaggerates, and underfits what the teacher finds hard.

The linear model says why. Gradient flow for a time t learns the share $1 - e^{-\lambda t}$ along
a direction of the data of eigenvalue $\lambda$. A student of such a teacher learns
$(1 - e^{-\lambda t'})(1 - e^{-\lambda t})$: with equal progress on the largest direction it has
learnt less of all the others.

Nagarajan, Menon, Bhojanapalli, Mobahi, Kumar, "On student-teacher deviations in distillation: does
it pay to disobey?", 2023, arXiv 2301.12923.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from effnb.core.losses import check_logits


def confidence(
    logits: Float[Tensor, "examples classes"], classes: Int[Tensor, " examples"]
) -> Float[Tensor, " examples"]:
    r"""$\operatorname{logit}(p_c) = z_c - \ln \sum_{j \ne c} e^{z_j}$ of one class of each row.

    From the scores, without the probability in between: it would round to 1, its logit to infinity,
    and clipping it would hide what is to be seen.

    Raises:
        ValueError: Fewer than two classes.
    """
    if logits.shape[1] < 2:
        raise ValueError("the logit of a probability needs two classes; the scores have fewer.")
    z, at = logits.cpu().double(), classes.cpu()[:, None]
    rest = z.scatter(1, at, -torch.inf)
    return z.gather(1, at)[:, 0] - rest.logsumexp(1)


@dataclass(frozen=True)
class Deviations:
    """How a student's confidence follows its teacher's.

    Attributes:
        teacher: The teacher's logit of its first class, for each example.
        student: The student's logit of the same class.
        slope: Of the fitted line; above 1 the student exaggerates.
        intercept: Of the fitted line.
        standard_error: Of the slope, for independent examples.
    """

    teacher: Float[Tensor, " examples"] = field(repr=False)
    student: Float[Tensor, " examples"] = field(repr=False)
    slope: float
    intercept: float
    standard_error: float


def deviations(
    student: Float[Tensor, "examples classes"],
    teacher: Float[Tensor, "teacher_examples teacher_classes"],
) -> Deviations:
    r"""Fit $\operatorname{logit}(q) = a + b \operatorname{logit}(p)$ by least squares.

    Args:
        student: Scores of the student, at temperature 1.
        teacher: Scores of the teacher.

    Raises:
        ValueError: Scores that do not fit, fewer than three examples, or a teacher that is equally
            sure of all.
    """
    check_logits(student, teacher)
    if len(teacher) < 3:
        raise ValueError(f"there are {len(teacher)} examples; a line with an error needs three.")
    first = teacher.argmax(1)
    x, y = confidence(teacher, first), confidence(student, first)
    dx, dy = x - x.mean(), y - y.mean()
    spread = float(dx.square().sum())
    if not spread > 1e-12:
        raise ValueError("the teacher is equally sure of all examples; no slope can be fitted.")
    slope = float((dx * dy).sum()) / spread
    left = float((dy - slope * dx).square().sum())
    error = math.sqrt(left / (len(x) - 2) / spread)
    return Deviations(x, y, slope, float(y.mean() - slope * x.mean()), error)


def progress(eigenvalues: Float[Tensor, " directions"], time: float) -> Tensor:
    r"""$1 - e^{-\lambda t}$: what gradient flow has learnt along each direction.

    Raises:
        ValueError: A negative time or eigenvalue.
    """
    if not time >= 0 or bool((eigenvalues < 0).any()):
        raise ValueError("time and eigenvalues must not be negative.")
    return -torch.expm1(-eigenvalues * time)


def distilled_progress(
    eigenvalues: Float[Tensor, " directions"], teacher_time: float, student_time: float
) -> Tensor:
    r"""$(1 - e^{-\lambda t'})(1 - e^{-\lambda t})$: what a student of such a teacher has learnt.

    Raises:
        ValueError: A negative time or eigenvalue.
    """
    return progress(eigenvalues, student_time) * progress(eigenvalues, teacher_time)


def matched_time(
    eigenvalues: Float[Tensor, " directions"], teacher_time: float, student_time: float
) -> float:
    r"""For how long to train on labels alone, to learn as much of the largest direction.

    $t'' = -\ln(1 - (1 - e^{-\lambda_1 t'})(1 - e^{-\lambda_1 t})) / \lambda_1$.

    Raises:
        ValueError: Negative times, or no eigenvalue above 0.
    """
    top = eigenvalues.max()
    if not float(top) > 0:
        raise ValueError("no eigenvalue is above 0; nothing can be learnt.")
    reached = float(distilled_progress(top[None], teacher_time, student_time)[0])
    return -math.log1p(-reached) / float(top)
