"""Distilled retrievers: a fast encoder of queries and documents apart learns from a slow one.

What is matched: every score (`pointwise`), the softmax over a query's documents (`softmax_kl`),
margins (`margin_mse`), their order alone (`order_only`, the workbook's own), embeddings
(`embed_distill`). The models: `DualEncoder`, `CrossEncoder` (dual-pooled too), and a student that
keeps the teacher's documents (`inherit_documents`).
"""

from effnb.inference.retrieval_distillation.embed_distill import (
    METRICS,
    embed_distill,
    made_queries,
    score_gap_bound,
)
from effnb.inference.retrieval_distillation.encoders import (
    CrossEncoder,
    DualEncoder,
    inherit_documents,
    join,
    mean_pool,
    pair_scores,
)
from effnb.inference.retrieval_distillation.margin_mse import margin_mse, margins
from effnb.inference.retrieval_distillation.order_only import order_only
from effnb.inference.retrieval_distillation.pointwise import pointwise
from effnb.inference.retrieval_distillation.softmax_kl import softmax_kl

__all__ = [
    "METRICS",
    "CrossEncoder",
    "DualEncoder",
    "embed_distill",
    "inherit_documents",
    "join",
    "made_queries",
    "margin_mse",
    "margins",
    "mean_pool",
    "order_only",
    "pair_scores",
    "pointwise",
    "score_gap_bound",
    "softmax_kl",
]
