r"""NTK-aware scaling: slow each point by as much as its frequency is low.

Dividing all frequencies by $s$ blurs the fast points. NTK-aware scaling changes the base instead,

$$b' = b\, s^{d/(d-2)}, \qquad h(\theta_i) = b'^{-2i/d} = \theta_i\, s^{-2i/(d-2)},$$

with the exponent chosen such that the fastest point ($i = 0$) stays as it is and the slowest
($i = d/2 - 1$) is divided by exactly $s$. Points between them are slowed by less than $s$, so some
of them leave the range they were trained in before the context is $s L$ tokens long: in practice
$s$ has to be larger than $L'/L$. A base of $10^6$ in the place of $10^4$, with heads of 128
numbers, is this with $s = 100^{126/128} \approx 93$.

It was published as a post by bloc97 in r/LocalLLaMA, June 2023; the equation is in Peng, Quesnelle,
Fan, Shippole, "YaRN: Efficient Context Window Extension of Large Language Models", 2023, arXiv
2309.00071, sec. 3.1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.core.modules import Model
from effnb.design.context.rope import rope_frequencies
from effnb.design.context.rotary_table import (
    check_factor,
    extended_length,
    rotary_table,
    with_table,
)


def ntk_aware_base(base: float, factor: float, dim: int) -> float:
    r"""$b' = b\, s^{d/(d-2)}$.

    Args:
        base: $b$.
        factor: $s$.
        dim: $d$, the rotated numbers of a head.

    Raises:
        ValueError: A factor below 1, or a `dim` below 4 or odd.
    """
    check_dim(dim)
    return base * check_factor(factor) ** (dim / (dim - 2))  # b' = b s^(d/(d-2))


def ntk_aware_frequencies(
    inv_freq: Float[Tensor, " half"], factor: float
) -> Float[Tensor, " half"]:
    r"""$h(\theta_i) = \theta_i\, s^{-2i/(d-2)}$.

    Args:
        inv_freq: $\theta$, the model's own, from the fastest to the slowest.
        factor: $s$.

    Raises:
        ValueError: A factor below 1, or fewer than two frequencies.
    """
    half = len(inv_freq)
    check_dim(2 * half)
    share = torch.arange(half, dtype=torch.float64, device=inv_freq.device) / (half - 1)
    slowed = check_factor(factor) ** share  # s^(2i/(d-2))
    return (inv_freq.double() / slowed).to(inv_freq.dtype)


def check_dim(dim: int) -> None:
    """Refuse heads that a change of base cannot stretch.

    Raises:
        ValueError: A `dim` below 4 or odd.
    """
    if dim < 4 or dim % 2:
        raise ValueError(
            f"heads have {dim} rotated numbers; a change of base needs an even number from 4, "
            "since the fastest pair never changes."
        )


def ntk_aware(model: Model, factor: float, *, trained_length: int | None = None) -> Model:
    """Change the base of a model's rotary frequencies.

    transformers has no `rope_type` for it and needs none: the new base is saved and loaded as
    `rope_theta`.

    Args:
        model: A Hugging Face model with rotary positions; it is not changed.
        factor: $s$. Choose it above the ratio of the lengths: at exactly $s$ times the trained
            length, points in the middle have left the range they were trained in.
        trained_length: Tokens of the trained context; by default the configuration's.

    Returns:
        A new model that shares all weights.

    Raises:
        ValueError: A factor below 1, heads of fewer than 4 rotated numbers, or a model that
            `rotary_table` refuses.
    """
    factor = check_factor(factor)
    table = rotary_table(model, trained_length)
    base = ntk_aware_base(table.base, factor, table.dim)
    return with_table(
        model,
        table,
        # From the base and not from θ, so that the table is bit for bit the one that is loaded.
        rope_frequencies(table.dim, base, device=table.inv_freq.device),
        {"rope_type": "default", "rope_theta": base},
        length=extended_length(table, factor),
    )
