"""The verdicts of the chapter on pruning, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. The stored tables are
those of `data/sweeps/05_inference/1_pruning_claims.py`; any that are given are searched for rows.
"""

from __future__ import annotations

from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

TABLES = tuple(
    f"05_inference/1_pruning_claims/{part}"
    for part in ("mini", "domains", "learning", "lottery", "smollm2", "speed")
)
"""The stored tables that the verdicts rest on."""


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


SETTING = (
    "mini-5m and SmolLM2 are judged on chapters of a novel that neither mini-5m nor any "
    "calibration has seen, one window a chapter."
)


def s_i1(*stored: StoredResult) -> Verdict:
    """Pruning reduces computation and memory by removing unimportant weights.

    Zeros in a dense matrix are multiplied like other numbers, and that part of the claim is judged
    by the clock like all others.
    """
    return judge(
        "S-I1",
        *stored,
        note=f"{SETTING} Size, speed and quality of the pruned SmolLM2 are those of one model. "
        "Pruning while a model learns is measured on mini-300k only: it learns German package "
        "descriptions, or novels from random weights. All that train see equally many tokens in "
        "their last run; a lottery ticket needs earlier runs to be found.",
    )


def c_1(*stored: StoredResult) -> Verdict:
    """Unstructured pruning keeps more quality, structured pruning gives speed."""
    return judge(
        "C-1",
        *stored,
        note=f"{SETTING} Both methods see equally much calibration text, and the structure that is "
        "timed has the shape of the one whose quality is measured. SparseGPT is free to remove any "
        "weight; whole rows and columns go where training left a neuron almost without weight. "
        "LoRAPrune is filed under unstructured pruning by the article, and prunes structures by "
        "its own paper.",
    )


def c_7(*stored: StoredResult) -> Verdict:
    """Compression hurts some kinds of text more than others: joint with quantization.

    The claim is measured by two chapters and gets one verdict: give the stored tables of both.
    """
    return judge(
        "C-7",
        *stored,
        note="One verdict for pruning and quantization. Compared are the kinds of text that "
        "mini-5m was trained on: all held-out chapters of a novel and of books of the Bible, and "
        "descriptions of packages spread over the whole test set; every document counts once. The "
        "rise is given in nats and in per cent of the document's own loss, because kinds of text "
        "with a higher loss have more to lose.",
    )
