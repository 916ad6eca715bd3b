r"""EmbedDistill: the student copies where the teacher puts queries and documents, not only scores.

$$R_Q = \frac1n \sum_q \lVert E^T_Q(q) - W E^S_Q(q) \rVert_2, \qquad
  R_D = \frac1m \sum_d \lVert E^T_D(d) - W E^S_D(d) \rVert_2,$$

the length itself, not its square, with a projection W where the widths differ. A score is a product
of two embeddings, so a student whose embeddings are near has scores that are near:

$$|\langle q_T, d_T \rangle - \langle q_S, d_S \rangle| \le \lVert q_T - q_S \rVert\,
  \lVert d_T \rVert + \lVert q_S \rVert\, \lVert d_T - d_S \rVert.$$

A student that inherits the teacher's document encoder and leaves it frozen has no second term: only
a small query encoder is trained, and the teacher's index of documents is the student's. Embeddings
need no labels, so queries can be made (`made_queries`).

Kim, Rawat, Zaheer, Jayasumana, Sadhanala, Jitkrittum, Menon, Fergus, Kumar, "EmbedDistill: A
Geometric Knowledge Distillation for Information Retrieval", 2023, arXiv 2301.12005, eqs. 7 and 8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

METRICS = ("l2", "mse", "cosine")


def embed_distill(
    student: Float[Tensor, "texts dim"],
    teacher: Float[Tensor, "teacher_texts teacher_dim"],
    *,
    projection: nn.Module | None = None,
    metric: str = "l2",
) -> Float[Tensor, ""]:
    r"""$\frac1n \sum_i \lVert E^T(x_i) - W E^S(x_i) \rVert_2$ of queries, or of documents.

    Args:
        student: The student's embeddings.
        teacher: The teacher's, of the same texts; no gradient reaches it.
        projection: W, which belongs to the student and is kept at inference; None for equal widths.
        metric: "l2" is the paper's; "mse" its square by the width; "cosine" 1 minus the cosine.

    Raises:
        ValueError: An unknown metric, or embeddings of other texts or widths.
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; choose {', '.join(METRICS)}.")
    projected = student if projection is None else projection(student)
    if projected.shape != teacher.shape or not len(teacher):
        raise ValueError(
            f"the student's embeddings are {tuple(projected.shape)} and the teacher's "
            f"{tuple(teacher.shape)}; give the same texts, and a projection to the teacher's width."
        )
    teacher = teacher.detach()
    if metric == "mse":
        return nn.functional.mse_loss(projected, teacher)
    if metric == "cosine":
        return (1 - nn.functional.cosine_similarity(projected, teacher, -1)).mean()
    return (teacher - projected).norm(dim=-1).mean()  # $\lVert E^T - W E^S \rVert_2$


def score_gap_bound(
    student: tuple[Float[Tensor, "pairs dim"], Float[Tensor, "pairs dim"]],
    teacher: tuple[Float[Tensor, "pairs dim"], Float[Tensor, "pairs dim"]],
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    r"""By how much scores differ, and the most that the distances of embeddings allow.

    Args:
        student: Embeddings of queries and of documents, one pair a row.
        teacher: The teacher's, of the same width.

    Returns:
        $|\langle q_T, d_T \rangle - \langle q_S, d_S \rangle|$ and
        $\lVert q_T - q_S \rVert \lVert d_T \rVert + \lVert q_S \rVert \lVert d_T - d_S \rVert$.
    """
    (q_s, d_s), (q_t, d_t) = student, teacher
    gap = ((q_t * d_t).sum(-1) - (q_s * d_s).sum(-1)).abs()
    bound = (q_t - q_s).norm(dim=-1) * d_t.norm(dim=-1)
    return gap, bound + q_s.norm(dim=-1) * (d_t - d_s).norm(dim=-1)


def made_queries(
    documents: Sequence[Int[Tensor, " _"]],
    count: int,
    *,
    longest: int = 16,
    dropout: float = 0.2,
    pad: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "queries time"], Bool[Tensor, "queries time"]]:
    """Queries without a generator: spans of documents with words left out; (ids, real).

    They replace the queries that a sequence-to-sequence model writes in the paper.

    Args:
        documents: Token ids of each, without special tokens.
        count: How many queries to make.
        longest: Tokens of the longest span.
        dropout: With which probability a token is left out; one always stays.
        pad: The token of the padding, on the right.
        generator: Where the draws come from.

    Raises:
        ValueError: No document, an empty one, a count below 1, or a probability outside [0, 1).
    """
    if not documents or any(not len(d) for d in documents):
        raise ValueError("every document needs at least one token, and there must be a document.")
    if count < 1 or longest < 1 or not 0 <= dropout < 1:
        raise ValueError(
            f"count is {count}, longest {longest} and dropout {dropout}; the first two must be at "
            "least 1, the third in [0, 1)."
        )
    rows = []
    for _ in range(count):
        text = documents[int(torch.randint(len(documents), (), generator=generator))]
        most = min(longest, len(text))
        length = int(torch.randint(1, most + 1, (), generator=generator))
        start = int(torch.randint(len(text) - length + 1, (), generator=generator))
        span = text[start : start + length]
        kept = torch.rand(length, generator=generator) >= dropout
        kept[int(torch.randint(length, (), generator=generator))] = True
        rows.append(span[kept.to(span.device)])
    width = max(len(row) for row in rows)
    ids = torch.full((count, width), pad, dtype=torch.long)
    real = torch.zeros(count, width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], real[i, : len(row)] = row, True
    return ids, real
