r"""Order-only distillation: margins count up to a limit, and a student may be ahead of its teacher.

$$\frac1n \sum_j \max\bigl(0,\ \min(t_+ - t_j, m) - (s_+ - s_j)\bigr)^2.$$

MarginMSE pulls a student back whose margin is larger than the teacher's, and spends its capacity on
the size of margins that no ranking needs. Here a margin is wanted only as far as m, and more of it
costs nothing. This loss is the workbook's own, to show what keeping the order alone does; it is not
a published one. The point it illustrates: Menon, Jayasumana, Rawat, Kim, Reddi, Kumar, "In defense
of dual-encoders for neural ranking", ICML 2022.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from effnb.inference.retrieval_distillation.checks import check_scores
from effnb.inference.retrieval_distillation.margin_mse import margins


def order_only(
    student: Float[Tensor, "queries documents"],
    teacher: Float[Tensor, "teacher_queries teacher_documents"],
    margin: float = 1.0,
) -> Float[Tensor, ""]:
    r"""Mean of $\max(0, \min(t_+ - t_j, m) - (s_+ - s_j))^2$; the first document is the right one.

    Args:
        student: Scores of the student.
        teacher: Scores of the teacher.
        margin: m, above 0.

    Raises:
        ValueError: A margin of 0 or below, scores of other queries or documents, or fewer than two
            documents.
    """
    if not margin > 0:
        raise ValueError(f"margin is {margin}; it must be above 0.")
    check_scores(student, teacher)
    wanted = margins(teacher.detach()).clamp(max=margin)  # $\min(t_+ - t_j, m)$
    return (wanted - margins(student)).clamp(min=0).square().mean()
