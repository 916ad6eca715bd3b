"""The verdicts of the chapter on retention, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. The stored tables are
those of `python data/sweeps/02_design/5_retention_claims.py`.
"""

from __future__ import annotations

from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

PARTS = ("forms", "decoding", "latency", "training", "short")
TABLES = tuple(f"02_design/5_retention_claims/{part}" for part in PARTS)
"""The stored tables that the verdicts rest on."""
TIMED = (
    "Time is the processor's on one thread of a CPU, for models of mini-1m's shape; the paper's "
    "numbers are from GPUs and models a thousand times as large."
)


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


def r_1(*stored: StoredResult) -> Verdict:
    """Three forms with equal outputs."""
    return judge(
        "R-1",
        *stored,
        note="Judged on the logits of the trained twin, after twelve texts, in float64: the "
        "largest difference over the largest logit. The published normalization of the scores is "
        "judged beside the claim, on a layer as it is before training.",
    )


def r_2(*stored: StoredResult) -> Verdict:
    """Memory and throughput of decoding stay constant over length."""
    return judge("R-2", *stored, note=TIMED)


def r_3(*stored: StoredResult) -> Verdict:
    """Chunkwise training against a Transformer, with and without FlashAttention."""
    return judge(
        "R-3",
        *stored,
        note=f"{TIMED} The output head, equal in all models, is left out. On a CPU, FlashAttention "
        "is PyTorch's fused kernel; retention is plain PyTorch. Bytes are counted, not sampled, so "
        "they do not count as evidence.",
    )


def r_4(*stored: StoredResult) -> Verdict:
    """Latency over batch and length."""
    return judge(
        "R-4",
        *stored,
        note=f"{TIMED} On a GPU that is not full, sixteen texts cost little more than one; a CPU "
        "has less to spare.",
    )


def r_5(*stored: StoredResult) -> Verdict:
    """Perplexity beside the Transformer's, and its trend over sizes."""
    return judge(
        "R-5",
        *stored,
        note="Two billion parameters are out of reach here: 20 tokens for each parameter make "
        "5 · 10²⁰ operations, centuries of work for one core. The trend is judged "
        "on short training runs of two small sizes, five seeds each.",
    )


def r_6(*stored: StoredResult) -> Verdict:
    """Beside RWKV and Hyena."""
    return judge(
        "R-6",
        *stored,
        note=f"{TIMED} Quality is judged on short training runs at 300k parameters, five seeds "
        "each; large sizes could not be tested.",
    )


ALL = (r_1, r_2, r_3, r_4, r_5, r_6)
