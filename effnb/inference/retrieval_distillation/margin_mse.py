r"""MarginMSE: the student copies by how much the right document is ahead of each wrong one.

$$\frac1n \sum_j \bigl((s_+ - s_j) - (t_+ - t_j)\bigr)^2.$$

A constant added to all of a query's scores, of the student or of the teacher, changes nothing, so
that a dot product can learn from a cross-encoder whose scores lie elsewhere.

Hofstätter, Althammer, Schröder, Sertkan, Hanbury, "Improving Efficient Neural Ranking Models with
Cross-Architecture Knowledge Distillation", 2020, arXiv 2010.02666.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from effnb.inference.retrieval_distillation.checks import check_scores


def margins(scores: Float[Tensor, "queries documents"]) -> Float[Tensor, "queries wrong"]:
    r"""$s_+ - s_j$ of the first document, which is the right one, and each other.

    Raises:
        ValueError: Fewer than two documents.
    """
    check_scores(scores, scores)
    return scores[:, :1] - scores[:, 1:]


def margin_mse(
    student: Float[Tensor, "queries documents"],
    teacher: Float[Tensor, "teacher_queries teacher_documents"],
) -> Float[Tensor, ""]:
    r"""Mean of $((s_+ - s_j) - (t_+ - t_j))^2$; the first document is the right one.

    Raises:
        ValueError: Scores of other queries or documents, or fewer than two documents.
    """
    check_scores(student, teacher)
    # $(s_+ - s_j) - (t_+ - t_j)$
    return (margins(student) - margins(teacher.detach())).square().mean()
