r"""Matryoshka classifiers: a head for every prefix, or one head for all; and stopping early.

$$\mathcal L = \sum_{m \in \mathcal M} c_m
  \operatorname{CE}\bigl(W^{(m)} z_{1:m} + b^{(m)},\, y\bigr)$$

MRL has a head $W^{(m)}$ of its own for each prefix length. MRL-E ties them: $W^{(m)}$ is the first
$m$ columns of one $W$, and the bias is shared, which halves the memory of the heads.

Kusupati et al., "Matryoshka Representation Learning", 2022, arXiv 2205.13147, eq. 1 and section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.inference.matryoshka.checks import check_dims, check_weights

Logits = Mapping[int, Float[Tensor, "texts classes"]]


class MatryoshkaHeads(nn.Module):
    """Linear classifiers on nested prefixes of a vector.

    Attributes:
        dims: Prefix lengths, rising.
        tied: Whether all prefixes share one weight (MRL-E) or have one each (MRL).
    """

    def __init__(self, width: int, classes: int, dims: Sequence[int], *, tied: bool = False):
        """Heads with random weights.

        Raises:
            ValueError: When the prefix lengths do not nest, or there are fewer than two classes.
        """
        super().__init__()
        self.dims, self.tied = check_dims(dims, width), tied
        if classes < 2:
            raise ValueError(f"there are {classes} classes; a classifier needs at least 2.")
        sizes = self.dims[-1:] if tied else self.dims
        self.heads = nn.ModuleList(nn.Linear(m, classes) for m in sizes)

    def forward(self, z: Float[Tensor, "texts dim"]) -> dict[int, Float[Tensor, "texts classes"]]:
        """The logits of every prefix, by its length."""
        if self.tied:
            W, b = self.heads[0].weight, self.heads[0].bias
            # $z_{1:m} W_{1:m}^\top + b$
            return {m: nn.functional.linear(z[:, :m], W[:, :m], b) for m in self.dims}
        # $z_{1:m} W^{(m)\top} + b^{(m)}$
        return {m: head(z[:, :m]) for m, head in zip(self.dims, self.heads)}


def matryoshka_cross_entropy(
    logits: Logits, labels: Int[Tensor, " texts"], weights: Sequence[float] | None = None
) -> Float[Tensor, ""]:
    r"""$\sum_m c_m \operatorname{CE}(\text{logits}_m, y)$, in nats.

    Raises:
        ValueError: When there is not one weight for each prefix.
    """
    scales = check_weights(weights, tuple(logits))
    return sum(
        (
            c * nn.functional.cross_entropy(found, labels)
            for c, found in zip(scales, logits.values())
        ),
        start=torch.zeros((), device=labels.device),
    )


@dataclass(frozen=True)
class Classified:
    """What an adaptive classifier answered.

    Attributes:
        labels: The class of each text.
        dims: The prefix length at which it stopped.
    """

    labels: Int[Tensor, " texts"]
    dims: Int[Tensor, " texts"]

    @property
    def mean_dims(self) -> float:
        """Numbers of the vector that were used, on average."""
        return float(self.dims.double().mean())


def adaptive_classification(logits: Logits, thresholds: Sequence[float]) -> Classified:
    r"""Stop at the first prefix whose largest probability reaches its threshold.

    Args:
        logits: Of every prefix, the shortest first.
        thresholds: $t_m$ in [0, 1] for all prefixes but the last, which answers what is left.
            A prefix with the threshold 1 is passed over unless it is certain.

    Raises:
        ValueError: When there is not one threshold for each prefix but the last, or one lies
            outside [0, 1].
    """
    dims = check_dims(tuple(logits), max(logits, default=1))
    if len(thresholds) != len(dims) - 1:
        raise ValueError(
            f"there are {len(thresholds)} thresholds for {len(dims)} prefixes; give one for each "
            "but the last."
        )
    if not all(0 <= t <= 1 for t in thresholds):
        raise ValueError(f"the thresholds are {list(thresholds)}; they must lie in [0, 1].")
    last = logits[dims[-1]]
    labels, used = last.argmax(-1), torch.full((len(last),), dims[-1], device=last.device)
    open_ = torch.ones(len(last), dtype=torch.bool, device=last.device)
    for m, t in zip(dims, thresholds):
        sure, label = logits[m].softmax(-1).max(-1)
        stops = open_ & (sure >= t)  # $\max_y p_m(y) \ge t_m$
        labels, used = torch.where(stops, label, labels), used.masked_fill(stops, m)
        open_ &= ~stops
    return Classified(labels, used)


def tune_thresholds(
    logits: Logits, labels: Int[Tensor, " texts"], *, tolerance: float = 0.0, steps: int = 100
) -> tuple[float, ...]:
    """For each prefix the lowest threshold that costs no accuracy on these texts.

    From the shortest prefix on, over the texts that have not stopped: the texts that stop must be
    answered as well, all in all, as the longest prefix answers them, less `tolerance` of the
    texts that are left. Tune on texts that are neither trained on nor reported on.

    Args:
        logits: Of every prefix, on held-out texts.
        labels: The right classes.
        tolerance: Share of the texts that a step may lose.
        steps: Thresholds that are tried, evenly from 0 to 1.

    Raises:
        ValueError: When there are no texts.
    """
    dims = check_dims(tuple(logits), max(logits, default=1))
    if not len(labels):
        raise ValueError("there are no texts to tune thresholds on; give at least one.")
    right_at_last = (logits[dims[-1]].argmax(-1) == labels).double()
    open_, found = torch.ones(len(labels), dtype=torch.bool, device=labels.device), []
    for m in dims[:-1]:
        sure, label = logits[m].softmax(-1).max(-1)
        gain = (label == labels).double() - right_at_last
        chosen = 1.0
        for t in torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist():
            stops = open_ & (sure >= t)
            if float(gain[stops].sum()) >= -tolerance * int(open_.sum()):
                chosen = t
                break
        found.append(chosen)
        open_ &= ~(sure >= chosen)
    return tuple(found)
