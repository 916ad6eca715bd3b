"""The verdicts of the chapter on quantization, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. The stored tables are
those of `python data/sweep_claims_quantization.py`; C-7 also takes those of pruning.
"""

from __future__ import annotations

from effnb.chapters.inference.pruning.verdicts import c_7
from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

TABLES = tuple(
    f"quantization_claims_{part}"
    for part in (
        "mini",
        "domains",
        "mixed",
        "training",
        "smollm2",
        "smollm2_mixed",
        "smollm2_training",
        "speed",
    )
)
"""The stored tables that the verdicts rest on."""


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


__all__ = ["TABLES", "c_3", "c_7", "s_i3", "stored"]


def s_i3(*stored: StoredResult) -> Verdict:
    """Quantization cuts memory and computation; training with it, and mixed precision, help."""
    return judge(
        "S-I3",
        *stored,
        note="Size, speed and quality of the packed model are those of one model, head and all; "
        "its file is compared with 16 bits a number. SmolLM2's weights already lie on a 4-bit "
        "grid, so that its quality at 4 bits says nothing about other models. Training with "
        "quantization is compared with the same training without it, rounded afterwards. The "
        "measures that choose the bits of each layer see the calibration text that GPTQ sees, and "
        "the bytes of uniform 2 bits in groups of 32 (2.56 bits a weight) are compared as well as "
        "those of 3 bits.",
    )


def c_3(*stored: StoredResult) -> Verdict:
    """Quantizing after, while fine-tuning and during training: what each costs and gives."""
    return judge(
        "C-3",
        *stored,
        note="All three start from the same model and see the same batches: the first trains at "
        "full precision and is rounded by GPTQ; the second is rounded by GPTQ and then trains a "
        "LoRA; the third starts from the same GPTQ weights and trains them with rounding. Each "
        "number of bits is judged on its own.",
    )
