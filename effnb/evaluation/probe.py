r"""Linear probes: how much of a label a frozen representation gives away to a linear classifier.

The representation does not change; only a softmax layer on it is trained, to the minimum of

$$-\sum_i \ln \operatorname{softmax}(W h_i + b)_{y_i} + \tfrac{1}{2 c} \lVert W \rVert_F^2$$

It compares models whose own losses answer different questions. The features are centred and scaled
by the training set's deviations first, so that no representation gains by being large.

Alain and Bengio, "Understanding intermediate layers using linear classifier probes", 2016, arXiv
1610.01644.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from effnb.core.checks import check_finite


@dataclass(frozen=True)
class Probe:
    """A fitted linear classifier.

    Attributes:
        weight: $W$, for features that were centred and scaled.
        bias: $b$.
        mean: What was subtracted from the features.
        scale: What they were divided by.
        loss: The minimum that was found.
    """

    weight: Float[Tensor, "classes dim"]
    bias: Float[Tensor, " classes"]
    mean: Float[Tensor, " dim"]
    scale: Float[Tensor, " dim"]
    loss: float

    def scores(self, features: Float[Tensor, "examples dim"]) -> Float[Tensor, "examples classes"]:
        """Logits of the classes."""
        x = (features.double() - self.mean) / self.scale
        return x @ self.weight.T + self.bias

    def correct(
        self, features: Float[Tensor, "examples dim"], labels: Int[Tensor, " examples"]
    ) -> Bool[Tensor, " examples"]:
        """Which examples get their own label."""
        return self.scores(features).argmax(1) == labels


def linear_probe(
    features: Float[Tensor, "examples dim"],
    labels: Int[Tensor, " labels"],
    *,
    c: float = 1.0,
    iterations: int = 500,
) -> Probe:
    r"""Fit a softmax classifier on frozen features.

    Args:
        features: $h_i$, one row for each example.
        labels: $y_i$, from 0 on.
        c: How little the weights are held back; scikit-learn's `C`.
        iterations: Steps of L-BFGS at most; the loss is convex, and stops earlier.

    Raises:
        ValueError: Features and labels that do not pair up, fewer than two classes, a `c` that is
            not above 0, or features that are not finite.
    """
    if features.ndim != 2 or len(features) != len(labels) or not len(labels):
        raise ValueError(
            f"features of shape {tuple(features.shape)} and {len(labels)} labels do not pair up; "
            "each example has one row of features and one label."
        )
    if not (math.isfinite(c) and c > 0):
        raise ValueError(f"c is {c}; it must be above 0.")
    if int(labels.min()) < 0 or len(labels.unique()) < 2:
        raise ValueError("a probe needs labels from 0 on, of at least two classes.")
    check_finite(features, "the feature matrix", "probed")
    raw = features.detach().double()
    mean, deviation = raw.mean(0), raw.std(0, correction=0)
    scale = torch.where(deviation > 1e-12, deviation, 1.0)  # a constant feature says nothing
    x, classes = (raw - mean) / scale, int(labels.max()) + 1
    with torch.enable_grad():
        weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device)
        bias = torch.zeros(classes, dtype=x.dtype, device=x.device)
        weight.requires_grad_(), bias.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=iterations,
            tolerance_grad=1e-7,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            fit = torch.nn.functional.cross_entropy(x @ weight.T + bias, labels, reduction="sum")
            loss = (fit + weight.square().sum() / (2 * c)) / len(x)  # scaled: the minimum stays
            loss.backward()
            return loss

        optimizer.step(closure)
        loss = float(closure()) * len(x)
    return Probe(weight.detach(), bias.detach(), mean, scale, loss)
