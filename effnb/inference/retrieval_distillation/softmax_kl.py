r"""Listwise distillation: the softmax over a query's documents is what the student copies.

$$\tau_S^2 \operatorname{KL}\bigl(\operatorname{softmax}(t_q / \tau_T) \|
  \operatorname{softmax}(s_q / \tau_S)\bigr)$$

of each query, the mean over queries. A constant added to all of a query's scores changes nothing; a
factor does, so scores of another scale (logits of $\pm 10$ against cosines in [-1, 1]) take
temperatures of their own.

Lin, Yang, Lin, "Distilling Dense Representations for Ranking using Tightly-Coupled Teachers", 2020,
arXiv 2010.11386.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from effnb.core.losses import check_temperature, kl_rows, log_softened
from effnb.inference.retrieval_distillation.checks import check_scores


def softmax_kl(
    student: Float[Tensor, "queries documents"],
    teacher: Float[Tensor, "teacher_queries teacher_documents"],
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
) -> Float[Tensor, ""]:
    r"""$\tau_S^2 \operatorname{KL}(p \| q)$ over each query's documents, in nats.

    Args:
        student: Scores of the student.
        teacher: Scores of the teacher.
        temperature: Of the student, and of the teacher where none is given for it.
        teacher_temperature: Of the teacher.

    Raises:
        ValueError: A temperature of 0 or below, scores of other queries or documents, or fewer than
            two documents, where there is nothing to order.
    """
    check_temperature(temperature)
    warm = temperature if teacher_temperature is None else teacher_temperature
    check_scores(student, teacher)
    log_p = log_softened(teacher.detach(), warm)  # $p = \mathrm{softmax}(t_q / \tau_T)$
    log_q = log_softened(student, temperature)  # $q = \mathrm{softmax}(s_q / \tau_S)$
    return temperature**2 * kl_rows(log_p.to(log_q), log_q).mean()
