"""Model quality on fixed data, and cost measured on this machine."""

from effnb.evaluation.cost import (
    Cost,
    Timing,
    decode_tokens_per_second,
    file_bytes,
    flops,
    latency,
    measure,
    parameter_count,
    peak_memory,
    stored_bytes,
)
from effnb.evaluation.long_context import (
    ContextLosses,
    PositionLosses,
    RecallGrid,
    chunked_losses,
    context_losses,
    position_losses,
    recall_grid,
)
from effnb.evaluation.probe import Probe, linear_probe
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
    "ContextLosses",
    "Cost",
    "Perplexity",
    "PositionLosses",
    "Probe",
    "RankedChoice",
    "RecallGrid",
    "Retrieval",
    "Timing",
    "chunked_losses",
    "context_losses",
    "decode_tokens_per_second",
    "file_bytes",
    "flops",
    "latency",
    "linear_probe",
    "measure",
    "parameter_count",
    "peak_memory",
    "perplexity",
    "position_losses",
    "ranked_choice",
    "recall_grid",
    "retrieval",
    "stored_bytes",
]
