r"""SLaM: pass the student's prediction through the teacher's noise before comparing the two.

Instead of weighing a wrong label less, say what the label would look like if the student were
right. The teacher gives the best class with probability $\alpha(x)$ and otherwise another of its k
likeliest classes; so the student's prediction f is mixed in the same way,

$$\operatorname{mix}(f; \alpha, k) = \alpha f + \frac{1 - \alpha}{k - 1}\, (1 - f) \ast
  \operatorname{top}(y_s; k),$$

$\operatorname{top}(y_s; k)$ being 1 at the teacher's k largest classes and 0 elsewhere, and the
loss compares *that* with the teacher's label. For two classes it is $\alpha f + (1 - \alpha)
(1 - f)$: `forward_correction` with a symmetric noise matrix. The optimum is the clean answer, for
students of any size; this is what weights (`weighted_distillation`) cannot reach. The price: where
the teacher is right little more often than wrong, the mixture hardly depends on f, and such
examples teach almost nothing.

Kontonis, Iliopoulos, Trinh, Baykal, Menghani, Vee, "SLaM: Student-Label Mixing for Distillation
with Unlabeled Examples", 2023, arXiv 2302.03806.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.core.losses import check_logits
from effnb.inference.distillation.weighted_distillation import neighbour_mean, top_margin


def mix(
    prediction: Float[Tensor, "examples classes"],
    teacher: Float[Tensor, "examples classes"],
    alpha: Float[Tensor, " examples"],
    k: int,
) -> Float[Tensor, "examples classes"]:
    r"""$\alpha f + \frac{1 - \alpha}{k - 1} (1 - f) \ast \operatorname{top}(y_s; k)$.

    It adds up to 1 where f lies within the k classes, and to a little more elsewhere.

    Args:
        prediction: The student's probabilities f.
        teacher: The teacher's scores or probabilities; only their order counts.
        alpha: Probability that the teacher's first class is right, for each example.
        k: How many of the teacher's classes the right one is among.

    Raises:
        ValueError: A k below 2 or above the classes, or an alpha outside [0, 1].
    """
    classes = prediction.shape[1]
    if not 2 <= k <= classes:
        raise ValueError(f"k is {k}; it must lie between 2 and the {classes} classes.")
    if bool(((alpha < 0) | (alpha > 1) | alpha.isnan()).any()):
        raise ValueError("alpha holds probabilities; each must lie between 0 and 1.")
    among = torch.zeros_like(prediction).scatter(1, teacher.topk(k, -1).indices, 1.0)
    a = alpha[:, None]
    # $\alpha f + (1 - \alpha) / (k - 1)\, (1 - f) * \mathrm{top}(y_s; k)$
    return a * prediction + (1 - a) / (k - 1) * (1 - prediction) * among


def slam_loss(
    student: Float[Tensor, "examples classes"],
    teacher: Float[Tensor, "teacher_examples teacher_classes"],
    alpha: Float[Tensor, " examples"],
    k: int = 2,
    *,
    hard: bool = True,
) -> Float[Tensor, ""]:
    r"""$\operatorname{CE}(y_s, \operatorname{mix}(f; \alpha, k))$, the mean over examples.

    Args:
        student: The student's scores.
        teacher: The teacher's scores.
        alpha: As in `mix`.
        k: As in `mix`.
        hard: Whether the teacher's label is its first class, or all of its probabilities.

    Raises:
        ValueError: As `mix`, or scores that do not fit.
    """
    check_logits(student, teacher)
    teacher = teacher.detach()
    mixed = mix(student.softmax(-1), teacher, alpha, k)
    label = torch.zeros_like(mixed).scatter(1, teacher.argmax(1, keepdim=True), 1.0)
    label = label if hard else teacher.softmax(-1)
    return -(label * mixed.clamp(min=1e-12).log()).sum(1).mean()


def forward_correction(
    prediction: Float[Tensor, "examples classes"], noise: Float[Tensor, "classes noisy_classes"]
) -> Float[Tensor, "examples noisy_classes"]:
    r"""$f\, T$ with $T_{ij}$ the probability that the teacher says j where i is right.

    Raises:
        ValueError: Rows of T that are no probabilities.
    """
    if bool((noise < 0).any()) or not torch.allclose(
        noise.sum(1), torch.ones_like(noise[:, 0]), atol=1e-5
    ):
        raise ValueError("each row of the noise matrix must hold probabilities that add up to 1.")
    return prediction @ noise


def estimate_alpha(
    teacher: Float[Tensor, "examples classes"],
    known_teacher: Float[Tensor, "known classes"],
    labels: Tensor,
    *,
    neighbours: int = 10,
    least: float = 0.5,
) -> Float[Tensor, " examples"]:
    r"""How often the teacher is right among the labelled examples of the nearest margin.

    Args:
        teacher: The teacher's scores of unlabelled examples.
        known_teacher: Its scores of labelled examples.
        labels: Their classes.
        neighbours: How many of them.
        least: No value below this: at $1 / k$, k of `mix`, nothing is left of the prediction.

    Raises:
        ValueError: A number of neighbours that does not fit, or fewer than two classes.
    """
    points, known = (top_margin(x)[:, None] for x in (teacher, known_teacher))
    right = (known_teacher.argmax(1) == labels).to(points.dtype)
    return neighbour_mean(points, known, right, neighbours).clamp(min=least)
