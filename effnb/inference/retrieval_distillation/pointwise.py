r"""Pointwise distillation: the student copies every score by itself.

$\frac1n \sum_{q,d} (s_{qd} - t_{qd})^2$, or, for teachers whose scores are logits of relevance, the
cross-entropy $\operatorname{CE}(\sigma(t), \sigma(s))$. Both ask for the scores themselves, where a
ranking needs their order only: a constant added to all of a query's scores costs as much as a wrong
order.

The simplest of the losses that Menon, Jayasumana, Rawat, Kim, Reddi, Kumar, "In defense of
dual-encoders for neural ranking", ICML 2022, sets out from.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from effnb.inference.retrieval_distillation.checks import check_scores


def pointwise(
    student: Float[Tensor, "queries documents"],
    teacher: Float[Tensor, "teacher_queries teacher_documents"],
    *,
    logistic: bool = False,
) -> Float[Tensor, ""]:
    r"""$\frac1n \sum_{q,d} (s_{qd} - t_{qd})^2$, or the logistic form.

    Args:
        student: Scores of the student, s.
        teacher: Scores of the teacher, t.
        logistic: Whether scores are logits of relevance, compared as probabilities.

    Raises:
        ValueError: Scores of other queries or documents.
    """
    check_scores(student, teacher, 1)
    teacher = teacher.detach()
    if logistic:  # $\mathrm{CE}(\sigma(t), \sigma(s))$
        return nn.functional.binary_cross_entropy_with_logits(student, teacher.sigmoid())
    return nn.functional.mse_loss(student, teacher)  # $(s_{qd} - t_{qd})^2$
