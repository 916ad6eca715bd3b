r"""Last layers: train the blocks at the top of a model and freeze those below.

Of $L$ blocks, the parameters of the last $k$ change: $\theta' = \theta + \Delta\theta$ in blocks
$L - k + 1, \dots, L$. The backward pass ends where the trained blocks begin, so that no activation
below them has to be kept: of all delta methods, this one saves the most memory in training.

Lee, Tang, Lin, "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning", 2019,
arXiv 1911.03090.
"""

from __future__ import annotations

from torch import nn

from effnb.core.checks import check_loaded
from effnb.core.deltas import check_name, merge
from effnb.core.differences import Chosen, Difference, attach_differences, own_parameters
from effnb.core.modules import Model, find_blocks, in_several_blocks, refuse_encoder_decoder

__all__ = ["LastLayers", "attach", "last_layers", "merge"]


class LastLayers(Difference):
    r"""The difference $\Delta\theta$ of one module inside the last blocks."""

    kind = "last-layers"


def last_layers(model: nn.Module, count: int) -> Chosen:
    """The parameters of the last blocks, by the modules that hold them.

    Raises:
        ValueError: When the model has an encoder and a decoder or no list of equal blocks, when the
            count is out of range, or when blocks share modules.
        TypeError: When the count is not a whole number.
    """
    check_loaded(model)
    refuse_encoder_decoder(model, "tuning the last layers")
    path, blocks = find_blocks(model)
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"count is {count!r}; it must be a whole number.")
    if not 1 <= count <= len(blocks):
        raise ValueError(f"count is {count}; the model has {len(blocks)} blocks, so 1 to that.")
    places = [f"{path}.{i}" for i, one in enumerate(blocks) if list(blocks).count(one) > 1]
    shared = places + in_several_blocks(model)
    if shared:
        raise ValueError(
            f"{shared[0]} is used by several blocks, so that training the last ones would change "
            "earlier ones too."
        )
    last = tuple(f"{path}.{i}" for i in range(len(blocks) - count, len(blocks)))
    return own_parameters(
        model,
        lambda place, leaf, p: place in last or place.startswith(tuple(f"{b}." for b in last)),
    )


def attach(model: Model, name: str = "default", *, count: int = 1) -> Model:
    r"""Freeze a model and train differences of all parameters of its last blocks.

    The function is unchanged, bit for bit, until they are trained. A classifier on top is trained
    with them by `set_trainable(model, name, also="classifier.*")`.

    Args:
        model: A model with a stack of equal blocks; it is not changed.
        name: What to call this delta.
        count: $k$, how many blocks; a quarter of them is the paper's advice.

    Returns:
        A new model on the same frozen tensors; only the differences require gradients.

    Raises:
        ValueError: A model without such a stack, with two, or whose blocks share modules; a count
            out of range; a name that is taken.
        TypeError: When the count is not a whole number.
    """
    check_name(model, name)
    return attach_differences(model, name, last_layers(model, count), LastLayers)
