"""Retrieval: a language model that looks things up in a datastore.

- `datastore`: keys and values, searched exactly or with FAISS.
- `knn_lm`: kNN-LM, next tokens mixed with those that followed the nearest contexts.
- `chunks`: a datastore of chunks of text and what followed them.
- `chunked_attention`, `neighbour_encoder`, `retro`: RETRO, a decoder that reads such chunks.
- `leakage`: how much of a text the datastore holds word for word.
- `worth`: how many parameters a datastore is worth.
"""

from effnb.design.retrieval.chunked_attention import ChunkedCrossAttention
from effnb.design.retrieval.chunks import ChunkStore, bag_of_words, mean_states
from effnb.design.retrieval.datastore import Datastore, FaissIndex, Neighbours
from effnb.design.retrieval.knn_lm import (
    KeyReader,
    KnnLm,
    Looked,
    build_datastore,
    interpolate,
    knn_log_probabilities,
    knn_target_log_probabilities,
    with_neighbours,
)
from effnb.design.retrieval.leakage import chunk_overlap, matched_lengths
from effnb.design.retrieval.neighbour_encoder import NeighbourEncoder
from effnb.design.retrieval.retro import Retro, readers, retro_loss
from effnb.design.retrieval.worth import (
    LogLine,
    PowerLaw,
    SizeCurve,
    Worth,
    fit_log_line,
    fit_power_law,
)

__all__ = [
    "ChunkStore",
    "ChunkedCrossAttention",
    "Datastore",
    "FaissIndex",
    "KeyReader",
    "KnnLm",
    "LogLine",
    "Looked",
    "NeighbourEncoder",
    "Neighbours",
    "PowerLaw",
    "Retro",
    "SizeCurve",
    "Worth",
    "bag_of_words",
    "build_datastore",
    "chunk_overlap",
    "fit_log_line",
    "fit_power_law",
    "interpolate",
    "knn_log_probabilities",
    "knn_target_log_probabilities",
    "matched_lengths",
    "mean_states",
    "readers",
    "retro_loss",
    "with_neighbours",
]
