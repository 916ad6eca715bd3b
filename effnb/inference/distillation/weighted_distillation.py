r"""Weighted distillation: weigh each teacher's label by how wrong it may be.

On unlabelled inputs the teacher is sometimes wrong: its label is y with probability $1 - p(x)$, and
a wrong one, $y'$, with probability $p(x)$. With the *distortion* D, how much more the wrong label
would cost,

$$w_f(x) = \frac{1}{1 + p(x)\,(D_f(x) - 1)}, \qquad
  D_f(x) = \frac{\ell(y', f(x))}{\ell(y, f(x))},$$

makes the expected weighted loss the clean one: $\mathbb{E}[w_f\, \ell(\bar y, f)] = \ell(y, f)$.

**Where it cannot help.** Weights are held constant in a gradient step. One example's gradient is
then $w\,[(1 - p)\nabla \ell(y) + p \nabla \ell(y')]$, which vanishes at $f = 1 - p$ for *every*
weight: a student large enough to fit each example by itself ends where it would have ended without.
Weights act where examples compete, in a student that cannot fit all of them.

Iliopoulos, Kontonis, Baykal, Menghani, Trinh, Vee, "Weighted Distillation with Unlabeled Examples",
NeurIPS 2022, arXiv 2210.06711. How p and D are estimated here, from neighbours in the plane of both
margins, is in its spirit.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def weight_of(
    noise: Float[Tensor, "*examples"], distortion: Float[Tensor, "*examples"]
) -> Float[Tensor, "*examples"]:
    r"""$w = 1 / (1 + p (D - 1))$.

    Args:
        noise: p, the probability that the teacher is wrong.
        distortion: D, above 0.

    Raises:
        ValueError: A probability outside [0, 1], a distortion of 0 or below, or p = 1 with D = 0.
    """
    if bool(((noise < 0) | (noise > 1) | noise.isnan()).any()):
        raise ValueError("noise holds probabilities; each must lie between 0 and 1.")
    if bool((~(distortion > 0)).any()):
        raise ValueError("distortion is a ratio of two losses; each must be above 0.")
    return 1 / (1 + noise * (distortion - 1))  # $w_f(x) = 1 / (1 + p(x) (D_f(x) - 1))$


def distortion_of(
    logits: Float[Tensor, "examples classes"],
    label: Int[Tensor, " examples"],
    wrong: Int[Tensor, " examples"],
) -> Float[Tensor, " examples"]:
    r"""$D_f(x) = \ell(y', f(x)) / \ell(y, f(x))$ with cross-entropy, of the student's scores.

    Losses of less than 1e-12 count as that: a student that is quite sure would divide by 0.
    """
    costs = -logits.detach().log_softmax(-1)
    right, other = (costs.gather(1, x[:, None])[:, 0] for x in (label, wrong))
    return other.clamp(min=1e-12) / right.clamp(min=1e-12)


def weighted_loss(
    student: Float[Tensor, "examples classes"],
    teacher_labels: Int[Tensor, " labelled"],
    weights: Float[Tensor, " weighted"],
) -> Float[Tensor, ""]:
    r"""$\frac1n \sum_i w_i\, \ell(\bar y_i, f(x_i))$; the weights have no gradient.

    Raises:
        ValueError: A weight that is negative or not finite, or other numbers of examples.
    """
    if not len(student) == len(teacher_labels) == len(weights) or not len(student):
        raise ValueError(
            f"there are {len(student)} rows of scores, {len(teacher_labels)} labels and "
            f"{len(weights)} weights; their numbers must agree."
        )
    if bool(((weights < 0) | ~weights.isfinite()).any()):
        raise ValueError("the weights must be finite, and none negative.")
    losses = nn.functional.cross_entropy(student, teacher_labels, reduction="none")
    return (weights.detach() * losses).mean()  # $w_f(x)\, \ell(\bar y, f(x))$


def top_margin(logits: Float[Tensor, "examples classes"]) -> Float[Tensor, " examples"]:
    """The difference of the two largest probabilities of each row: how sure a model is.

    Raises:
        ValueError: Fewer than two classes.
    """
    if logits.shape[1] < 2:
        raise ValueError("a margin is between two classes; the scores have fewer.")
    top = logits.softmax(-1).topk(2, -1).values
    return top[:, 0] - top[:, 1]


def neighbour_mean(
    points: Float[Tensor, "queries dim"],
    known: Float[Tensor, "known dim"],
    values: Float[Tensor, " known"],
    k: int,
) -> Float[Tensor, " queries"]:
    """Mean of the values of the k nearest known points.

    Raises:
        ValueError: A k below 1 or above the number of known points.
    """
    if not 1 <= k <= len(known):
        raise ValueError(f"k is {k}; it must lie between 1 and the {len(known)} known points.")
    nearest = torch.cdist(points, known).topk(k, largest=False).indices
    return values[nearest].mean(1)


def estimate_weights(
    student: Float[Tensor, "examples classes"],
    teacher: Float[Tensor, "examples classes"],
    known_student: Float[Tensor, "known classes"],
    known_teacher: Float[Tensor, "known classes"],
    labels: Int[Tensor, " known"],
    *,
    k: int = 10,
    largest: float = 10.0,
) -> Float[Tensor, " examples"]:
    """Weights of unlabelled examples, from a few labelled ones; once an epoch is enough.

    On the labelled examples it is known where the teacher is wrong (p), and what its label costs
    the student beside the right one (D; of the second-best label where the teacher is right). Both
    are averaged over the k nearest in the plane of teacher's and student's margins.

    Args:
        student: The student's scores of the unlabelled examples.
        teacher: The teacher's.
        known_student: The student's scores of the labelled examples.
        known_teacher: The teacher's.
        labels: Their classes.
        k: Neighbours.
        largest: No weight above this.

    Raises:
        ValueError: A k that does not fit, or fewer than two classes.
    """
    margins = torch.stack([top_margin(teacher), top_margin(student)], 1)
    known = torch.stack([top_margin(known_teacher), top_margin(known_student)], 1)
    said = known_teacher.argmax(1)
    wrong = (said != labels).to(margins.dtype)
    p = neighbour_mean(margins, known, wrong, k)
    # The adversary's label: the teacher's where it is wrong, its second choice where it is right.
    second = known_teacher.topk(2, -1).indices[:, 1]
    adversary = torch.where(said != labels, said, second)
    d = neighbour_mean(margins, known, distortion_of(known_student, labels, adversary).log(), k)
    return weight_of(p, d.exp()).clamp(max=largest)
