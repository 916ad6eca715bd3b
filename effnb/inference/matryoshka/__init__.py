"""Matryoshka representations: vectors whose prefixes are vectors that work.

Training sums a loss over nested prefixes (`matryoshka_loss` for retrieval, `MatryoshkaHeads` with
`matryoshka_cross_entropy` for classification, one head for each prefix or one for all). Afterwards
a vector can be cut to any length (`prefix`), a classifier stops when it is sure
(`adaptive_classification`), and a search looks twice (`adaptive_retrieval`, `funnel`), with
approximate search for the first look (`Hnsw`, `Ivf`).
"""

from effnb.inference.matryoshka.approximate import Hnsw, Ivf
from effnb.inference.matryoshka.classification import (
    Classified,
    MatryoshkaHeads,
    adaptive_classification,
    matryoshka_cross_entropy,
    tune_thresholds,
)
from effnb.inference.matryoshka.losses import in_batch_softmax, matryoshka_loss, prefix
from effnb.inference.matryoshka.maps import orthogonal, principal_map, random_dims, train_map
from effnb.inference.matryoshka.retrieval import (
    Found,
    adaptive_retrieval,
    funnel,
    neighbours_kept,
    rerank,
    search,
)

__all__ = [
    "Classified",
    "Found",
    "Hnsw",
    "Ivf",
    "MatryoshkaHeads",
    "adaptive_classification",
    "adaptive_retrieval",
    "funnel",
    "in_batch_softmax",
    "matryoshka_cross_entropy",
    "matryoshka_loss",
    "neighbours_kept",
    "orthogonal",
    "prefix",
    "principal_map",
    "random_dims",
    "rerank",
    "search",
    "train_map",
    "tune_thresholds",
]
