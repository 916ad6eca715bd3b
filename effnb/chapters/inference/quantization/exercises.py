"""The exercises of the chapter on quantization: references, cases, and mistakes with diagnoses."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.lab import Exercise


def bits_of(bits: int, group: int, symmetric: bool) -> float:
    r"""$b + (16 + b) / g$, without the zero point's $b$ bits where the grid is symmetric."""
    return bits + (16 + (0 if symmetric else bits)) / group


cost = Exercise(
    "What a format costs",
    minutes=5,
    difficulty="easy",
    reference=bits_of,
    cases=[(4, 64, False), (3, 32, False), (2, 16, True), (8, 128, True)],
    wrong={
        "The scale is missing: each group stores 16 bits besides its codes": (
            lambda bits, group, symmetric: float(bits)
        ),
        "A group of weights shares one scale, so divide its 16 bits by the size of the group": (
            lambda bits, group, symmetric: bits + 16 + (0 if symmetric else bits)
        ),
        "A symmetric grid has no zero point to store": (
            lambda bits, group, symmetric: bits + (16 + bits) / group
        ),
        "An affine grid also stores a zero point of b bits for each group": (
            lambda bits, group, symmetric: bits + 16 / group
        ),
    },
)


def scales_of(
    x: Float[Tensor, "tokens in"], w: Float[Tensor, "out in"], alpha: float
) -> Float[Tensor, " in"]:
    r"""$s_j = \max|X_j|^\alpha / \max|W_{:j}|^{1 - \alpha}$."""
    return x.abs().amax(0) ** alpha / w.abs().amax(0) ** (1 - alpha)


smooth = Exercise(
    "SmoothQuant's scales",
    minutes=10,
    difficulty="medium",
    reference=scales_of,
    cases=[
        (
            torch.tensor([[1.0, -9.0, 0.5], [2.0, 4.0, -0.25], [-1.5, 3.0, 1.0]]),
            torch.tensor([[0.5, 1.0, -2.0], [0.25, -0.125, 1.0]]),
            0.5,
        ),
        (torch.tensor([[3.0, -1.0], [-6.0, 0.5]]), torch.tensor([[0.2, -0.8], [-0.4, 0.1]]), 0.75),
    ],
    wrong={
        "These are the maxima of each token; a scale belongs to an input channel, so take the "
        "maximum over the tokens": (
            lambda x, w, alpha: x.abs().amax(1) ** alpha / w.abs().amax(0) ** (1 - alpha)
        ),
        "Take the magnitudes before the maximum: the largest value may be negative": (
            lambda x, w, alpha: (
                x.amax(0).clamp(min=1e-5) ** alpha / w.amax(0).clamp(min=1e-5) ** (1 - alpha)
            )
        ),
        "The exponents are exchanged: the inputs get alpha, the weights 1 - alpha": (
            lambda x, w, alpha: x.abs().amax(0) ** (1 - alpha) / w.abs().amax(0) ** alpha
        ),
        "The weights' maxima divide: a channel whose weights are large can take in less": (
            lambda x, w, alpha: x.abs().amax(0) ** alpha * w.abs().amax(0) ** (1 - alpha)
        ),
    },
    atol=1e-4,
)


def hand_on(
    w: Float[Tensor, "out in"],
    u: Float[Tensor, "in in"],
    i: int,
    rounded: Float[Tensor, " out"],
) -> Float[Tensor, "out in"]:
    r"""$W_{:,j} - e_i U_{ij}$ for $j > i$, with $e_i = (W_{:,i} - \hat W_{:,i}) / U_{ii}$."""
    error = (w[:, i] - rounded) / u[i, i]
    return torch.cat([w[:, : i + 1], w[:, i + 1 :] - error.outer(u[i, i + 1 :])], 1)


_W = torch.tensor([[0.4, 0.7, -0.2], [1.3, -0.6, 0.9]])
_U = torch.tensor([[2.0, -0.8, 0.3], [0.0, 1.5, -0.4], [0.0, 0.0, 1.2]])

step = Exercise(
    "One column of GPTQ",
    minutes=15,
    difficulty="hard",
    reference=hand_on,
    cases=[(_W, _U, 0, torch.tensor([0.0, 1.0])), (_W, _U, 1, torch.tensor([1.0, -1.0]))],
    wrong={
        "Divide the error by U[i, i] as well": (
            lambda w, u, i, rounded: torch.cat(
                [w[:, : i + 1], w[:, i + 1 :] - (w[:, i] - rounded).outer(u[i, i + 1 :])], 1
            )
        ),
        "The sign is wrong: the error is w - rounded, and the update is subtracted": (
            lambda w, u, i, rounded: torch.cat(
                [
                    w[:, : i + 1],
                    w[:, i + 1 :] + ((w[:, i] - rounded) / u[i, i]).outer(u[i, i + 1 :]),
                ],
                1,
            )
        ),
        "Columns up to i are settled; only those after it may change": (
            lambda w, u, i, rounded: w - ((w[:, i] - rounded) / u[i, i]).outer(u[i])
        ),
        "Use row i of U, not column i: its entries left of the diagonal are all zero": (
            lambda w, u, i, rounded: torch.cat(
                [
                    w[:, : i + 1],
                    w[:, i + 1 :] - ((w[:, i] - rounded) / u[i, i]).outer(u[i + 1 :, i]),
                ],
                1,
            )
        ),
    },
    atol=1e-5,
)


def pass_back(
    x: Float[Tensor, " n"], scale: float, low: int, high: int, upstream: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The incoming gradient where the rounded code lies on the grid, and 0 where it is cut off."""
    code = (x / scale).round()
    return upstream * ((code >= low) & (code <= high))


straight_through = Exercise(
    "A gradient for rounding",
    minutes=10,
    difficulty="medium",
    reference=pass_back,
    cases=[
        (
            torch.tensor([-2.9, -1.7, -0.2, 0.7, 1.9, 3.1]),
            0.5,
            -4,
            3,
            torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 2.0]),
        ),
        (torch.tensor([0.24, -0.6, 1.1]), 0.25, -2, 1, torch.tensor([2.0, 1.0, -1.0])),
    ],
    wrong={
        "This is the true derivative of rounding, 0 almost everywhere: nothing would be learned": (
            lambda x, scale, low, high, upstream: torch.zeros_like(x)
        ),
        "Beyond the ends of the grid the value no longer depends on x: the gradient there is 0": (
            lambda x, scale, low, high, upstream: upstream.clone()
        ),
        "low and high are codes: compare them with x / scale, not with x": (
            lambda x, scale, low, high, upstream: upstream * ((x >= low) & (x <= high))
        ),
        "This is a mask of ones and zeros: multiply the gradient that arrives by it": (
            lambda x, scale, low, high, upstream: (
                ((x / scale).round() >= low) & ((x / scale).round() <= high)
            ).to(x.dtype)
        ),
    },
)
