"""Computation by need: easy inputs take less of it.

Classifiers leave at a layer that is sure (`branchynet`, `deebert`, `pabee`, on `classifiers`).
Decoders do so token by token: `exits` trains all layers to answer, `calm` generates, `confidence`
says how sure a layer is, and `learn_then_test` chooses the threshold with a guarantee on the losses
of `consistency`. `speculative` and `layerskip` draft cheaply and check, without changing a word.
`cascades` and `deferral` hand hard inputs to a larger model, and `mixture_of_depths` lets only some
tokens of a sequence through a block.
"""

from effnb.inference.adaptive_computation import (
    branchynet,
    calm,
    cascades,
    classifiers,
    confidence,
    consistency,
    deebert,
    deferral,
    exits,
    layers,
    layerskip,
    learn_then_test,
    mixture_of_depths,
    pabee,
    speculative,
)

__all__ = [
    "branchynet",
    "calm",
    "cascades",
    "classifiers",
    "confidence",
    "consistency",
    "deebert",
    "deferral",
    "exits",
    "layers",
    "layerskip",
    "learn_then_test",
    "mixture_of_depths",
    "pabee",
    "speculative",
]
