"""Model quality on fixed data, and cost measured on this machine."""

from effnb.evaluation.cost import (
    Cost,
    Timing,
    decode_tokens_per_second,
    flops,
    latency,
    measure,
    parameter_count,
    peak_memory,
    stored_bytes,
)
from effnb.evaluation.quality import (
    Choice,
    Perplexity,
    RankedChoice,
    perplexity,
    ranked_choice,
)
from effnb.evaluation.ranking import Retrieval, retrieval

__all__ = [
    "Choice",
    "Cost",
    "Perplexity",
    "RankedChoice",
    "Retrieval",
    "Timing",
    "decode_tokens_per_second",
    "flops",
    "latency",
    "measure",
    "parameter_count",
    "peak_memory",
    "perplexity",
    "ranked_choice",
    "retrieval",
    "stored_bytes",
]
