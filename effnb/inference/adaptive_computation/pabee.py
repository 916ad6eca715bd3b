r"""PABEE: leave when several layers in a row agree.

Every layer has a classifier; they are trained together on $\sum_j j \mathcal L_j / \sum_j j$. A
counter goes up when a layer predicts what the one before did, and back to 0 when it does not. The
input leaves when the counter reaches the patience $P$, at layer $P + 1$ at the earliest. One
over-confident early layer cannot end it alone. For regression two predictions agree when they
differ by less than $\tau$.

Zhou, Xu, Ge, McAuley, Xu, Wei, "BERT Loses Patience: Fast and Robust Inference with Early Exit",
2020, arXiv 2006.04152.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from effnb.inference.adaptive_computation.classifiers import Rule, exit_losses


def joint_loss(
    logits: Float[Tensor, "exits items classes"], labels: Int[Tensor, " items"]
) -> Float[Tensor, ""]:
    r"""$\sum_j j\, \mathcal L_j / \sum_j j$, layers counted from 1."""
    losses = exit_losses(logits, labels)
    return sum(j * loss for j, loss in enumerate(losses, 1)) / sum(range(1, len(losses) + 1))


def by_patience(patience: int, tolerance: float | None = None) -> Rule:
    r"""Leave when the last $P$ predictions each agreed with the one before.

    Args:
        patience: $P$; from the number of layers on, nothing leaves early.
        tolerance: $\tau$ of a regression, whose one "class" is the predicted number; None compares
            classes.

    Raises:
        ValueError: When the patience is below 1 or the tolerance not above 0.
    """
    if patience < 1:
        raise ValueError(f"patience is {patience}; it must be at least 1.")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}; it must be above 0, or None for classes.")

    def rule(history: Float[Tensor, "exits items classes"]) -> Bool[Tensor, " items"]:
        return counter(history, tolerance) >= patience

    return rule


def counter(
    history: Float[Tensor, "exits items classes"], tolerance: float | None = None
) -> Int[Tensor, " items"]:
    """How many of the latest predictions agreed with the one before, without a break."""
    if tolerance is None:
        found = history.argmax(-1)
        same = found[1:] == found[:-1]
    else:
        same = (history[1:, :, 0] - history[:-1, :, 0]).abs() < tolerance
    # 1 from the newest back to the last break, 0 before it
    return same.flip(0).long().cumprod(0).sum(0)
