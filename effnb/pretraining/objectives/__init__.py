"""Pre-training objectives: one network, and the questions that it can be asked about a text.

    from effnb.pretraining import objectives

    example = objectives.masked_lm(ids, 0.15, mask_token=4096, vocabulary=4096)
    loss = objectives.example_loss(model, example)

`causal_lm`, `masked_lm`, `prefix_lm` and `span_corruption(...).example()` make examples that any
Hugging Face model can be trained on; `Electra` holds the two networks of replaced-token detection.
`work_of` counts what an example asks and takes. `chinchilla` divides compute between parameters and
tokens.
"""

from effnb.pretraining.objectives.causal import causal_lm
from effnb.pretraining.objectives.chinchilla import (
    Allocation,
    ScalingLaw,
    chinchilla,
    fit_scaling_law,
    isoflop_minimum,
    training_flops,
)
from effnb.pretraining.objectives.electra import (
    Electra,
    Replaced,
    discriminator_loss,
    electra_masking,
    replace_tokens,
)
from effnb.pretraining.objectives.examples import (
    IGNORED,
    Example,
    asked_logits,
    example_loss,
    hidden_states,
)
from effnb.pretraining.objectives.masked import masked_lm, static_masking
from effnb.pretraining.objectives.prefix_lm import prefix_lm, prefix_visible
from effnb.pretraining.objectives.span_corruption import (
    SpanCorrupted,
    composition,
    noise_counts,
    noise_mask,
    raw_length,
    restore,
    span_corruption,
)
from effnb.pretraining.objectives.work import Work, electra_work, work_of

__all__ = [
    "Allocation",
    "Electra",
    "Example",
    "IGNORED",
    "Replaced",
    "ScalingLaw",
    "SpanCorrupted",
    "Work",
    "asked_logits",
    "causal_lm",
    "chinchilla",
    "composition",
    "discriminator_loss",
    "electra_masking",
    "electra_work",
    "example_loss",
    "fit_scaling_law",
    "hidden_states",
    "isoflop_minimum",
    "masked_lm",
    "noise_counts",
    "noise_mask",
    "prefix_lm",
    "prefix_visible",
    "raw_length",
    "replace_tokens",
    "restore",
    "span_corruption",
    "static_masking",
    "training_flops",
    "work_of",
]
