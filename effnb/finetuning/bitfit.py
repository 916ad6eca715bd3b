r"""BitFit: train the biases of a model and nothing else.

In every layer $y = W x + b$, in the projections, the feed-forward layers and the layer norms alike,
only $b$ moves: $b' = b + \Delta b$. These are about one thousandth of BERT's parameters. The bias
of the key projection is one of them, although no gradient ever reaches it in softmax attention:
$q^\top (k_j + b_k)$ adds the same number to the score of every position $j$.

Ben Zaken, Ravfogel, Goldberg, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
Masked Language-models", 2021, arXiv 2106.10199. The paper trains a new classifier as well:
`set_trainable(model, name, also="classifier.*")`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from effnb.core.deltas import check_name, merge
from effnb.core.differences import (
    Chosen,
    Difference,
    attach_differences,
    fitting_parameters,
    own_parameters,
)
from effnb.core.modules import LayerChoice, Model, chooses_layers

__all__ = ["BitFit", "attach", "biases", "merge"]


class BitFit(Difference):
    r"""The difference $\Delta b$ of one module's biases."""

    kind = "bitfit"

    @classmethod
    def check_leaves(cls, leaves: Iterable[str]) -> None:
        """Refuse what is no bias."""
        for leaf in leaves:
            if not is_bias(leaf):
                raise ValueError(f"BitFit changes biases only; {leaf!r} is not one.")


def is_bias(leaf: str) -> bool:
    """Whether a parameter's own name is that of a bias: "bias", "in_proj_bias", …."""
    return leaf == "bias" or leaf.endswith("_bias")


def biases(model: nn.Module, layers: LayerChoice = "*") -> Chosen:
    """The biases of a model by the modules that hold them; those of output heads are left out.

    Raises:
        ValueError: When the model has none, or none fits the patterns; the sentence says what there
            is.
    """
    every = own_parameters(model, lambda path, leaf, p: is_bias(leaf))
    if not every:
        raise ValueError(
            f"{type(model).__name__} has no biases, as is usual for models in the manner of Llama "
            "and T5, so that BitFit has nothing to train; tune it with LoRA, or take a model with "
            "biases such as BERT."
        )
    return fitting_parameters(model, layers, lambda path, leaf, p: is_bias(leaf), "biases")


@chooses_layers
def attach(model: Model, name: str = "default", *, layers: LayerChoice = "*") -> Model:
    r"""Freeze a model and train differences of its biases.

    The function is unchanged, bit for bit, until they are trained. `delta_state_dict` gives
    $\Delta b$ under the names that the biases have in the model.

    Args:
        model: A model with biases; it is not changed.
        name: What to call this delta.
        layers: Name patterns of the modules. `["*.query", "*.intermediate.dense"]` is the paper's
            smaller variant on BERT.

    Returns:
        A new model on the same frozen tensors; only the differences require gradients.

    Raises:
        ValueError: When the model has no biases, none fits, a bias is tied to one elsewhere, or the
            name is taken.
    """
    check_name(model, name)
    return attach_differences(model, name, biases(model, layers), BitFit)
