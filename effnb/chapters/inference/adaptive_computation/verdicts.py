"""The verdicts of the chapter on adaptive computation, from its stored measurements.

What is compared, and with which bounds, is registered in `data/claims.json`. The stored tables are
those of `python data/sweeps/05_inference/7_adaptive_computation_claims.py`.
"""

from __future__ import annotations

from effnb.lab.claims import Verdict, available, judge
from effnb.lab.results import StoredResult

TABLES = (
    *(
        f"05_inference/7_adaptive_computation_claims/{part}"
        for part in ("read", "sections", "calm", "time", "defer")
    ),
    "02_design/2_experts_claims/by_input",
)
"""The stored tables that the verdicts rest on; the last is of the chapter on experts."""


def stored() -> list[StoredResult]:
    """Those of the tables that have been measured."""
    return available(*TABLES)


def s_i4(*stored: StoredResult) -> Verdict:
    """Early exits and experts let a model spend more on hard inputs and less on easy ones.

    The claim is measured by two chapters and gets one verdict: give the stored tables of both.
    """
    return judge(
        "S-I4",
        *stored,
        note="One verdict for exits and experts. mini-5m-exits "
        "reads held-out chapters; MiniLM reads package descriptions, with heads trained on five "
        "draws. The same exits, given to other tokens or texts, cost the same and ignore the "
        "input. Thresholds were chosen on text that is not judged. Experts: small decoders whose "
        "router gives each token a number of its own; exchanged among the tokens of a text, the "
        "same numbers cost the same. A token that gets more than it asked for gains nothing by "
        "construction, so that part shows what the others lose.",
    )


def g_6(*stored: StoredResult) -> Verdict:
    """CALM: a third of the layers, two to three times faster, with a guarantee."""
    return judge(
        "G-6",
        *stored,
        note="mini-5m-exits continues 200 held-out beginnings by 20 tokens; 120 of them calibrate "
        "the threshold (five draws), the others judge it. The promise: the mean distance 1 − "
        "ROUGE-L from the full model's text is at most 0.2, with probability 95 %. The paper's "
        "models have 8 layers in the decoder and are trained for one task each.",
    )


def g_7(*stored: StoredResult) -> Verdict:
    """Losses for deferral underfit the base model; a rule learned afterwards does not touch it."""
    return judge(
        "G-7",
        *stored,
        note="Six sections of package descriptions. The base reads MiniLM's first layer, the "
        "expert its last and was trained on three of the six sections only, five draws of "
        "training data. The rule learned afterwards sees held-out texts that the joint loss does "
        "not; the base model is the same before and after by construction.",
    )
