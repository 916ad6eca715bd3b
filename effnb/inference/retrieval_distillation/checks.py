"""What every loss on scores of documents refuses before it starts."""

from __future__ import annotations

from torch import Tensor


def check_scores(student: Tensor, teacher: Tensor, least: int = 2) -> None:
    """Refuse scores of other queries or documents, or of too few documents.

    Raises:
        ValueError: The sentence has both shapes.
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(
            f"the student's scores are {tuple(student.shape)} and the teacher's "
            f"{tuple(teacher.shape)}; both must be (queries, documents) of the same."
        )
    if student.shape[1] < least or not len(student):
        raise ValueError(
            f"the scores are of {len(student)} queries and {student.shape[1]} documents each; at "
            f"least one query and {least} documents are needed."
        )
