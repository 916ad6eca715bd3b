r"""YaRN: NTK-by-parts, with attention that is made sharper.

In a longer context a softmax spreads over more tokens. YaRN makes up for that by a temperature $t$,

$$\operatorname{softmax}\!\left(\frac{q^\top k}{t \sqrt{d}}\right), \qquad
  \sqrt{1/t} = 0.1 \ln s + 1,$$

without touching attention itself: the cosines and sines, and so queries *and* keys, are multiplied
by $\sqrt{1/t}$, and scores by its square. The factor is above 1, so scores grow and attention gets
sharper; $t$ itself is below 1. At $s = 4$ queries and keys are multiplied by 1.1386 and scores by
1.2965. (The first version of the paper calls the reciprocal $t$ and prints $\sqrt{t}$; what is
computed is the same.)

Frequencies are those of NTK-by-parts, with either ramp (`effnb.design.context.ntk_by_parts`). With
`attention=False` nothing but the temperature is left out, which shows what it brings.

Peng, Quesnelle, Fan, Shippole, "YaRN: Efficient Context Window Extension of Large Language Models",
2023, arXiv 2309.00071, sec. 3.3 and 3.4.
"""

from __future__ import annotations

import math

from effnb.core.modules import Model
from effnb.design.context.ntk_by_parts import blended
from effnb.design.context.rotary_table import check_factor, rotary_table


def attention_factor(factor: float) -> float:
    r"""$\sqrt{1/t} = 0.1 \ln s + 1$, by which queries and keys are both multiplied.

    Args:
        factor: $s$; at 1 and below the result is 1.

    Raises:
        ValueError: A factor that is not a finite number above 0.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"factor is {factor}; it must be a finite number above 0.")
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0  # √(1/t) = 0.1 ln s + 1


def temperature(factor: float, *, version: int = 2) -> float:
    r"""$t$ as a version of the paper defines it.

    From version 2 on, scores are divided by $t = 1 / (0.1 \ln s + 1)^2 \le 1$. Version 1 prints the
    reciprocal, by which scores are multiplied.

    Args:
        factor: $s$.
        version: Of the paper on arXiv: 1, or 2 and later.

    Raises:
        ValueError: As `attention_factor`, or a version below 1.
    """
    if version < 1:
        raise ValueError(f"version is {version}; the paper's versions are counted from 1.")
    score = attention_factor(factor) ** 2
    return score if version == 1 else 1 / score


def yarn(
    model: Model,
    factor: float,
    *,
    ramp: str = "code",
    alpha: float = 1.0,
    beta: float = 32.0,
    attention: float | bool = True,
    trained_length: int | None = None,
) -> Model:
    r"""Blend the frequencies of a model as NTK-by-parts does, and sharpen its attention.

    Saved and loaded by transformers: with the ramp of the code as the `rope_type` "yarn", with that
    of the paper as "longrope". The factor is fixed: beyond $s L$ tokens the model fails as the
    original does beyond $L$.

    Args:
        model: A Hugging Face model with rotary positions; it is not changed.
        factor: $s$, the new context length divided by the trained one.
        ramp: "code", which published checkpoints use, or "paper".
        alpha: Rotations up to which a point is interpolated.
        beta: Rotations from which a point stays as it is.
        attention: True for the paper's factor on queries and keys, False for none, or a number.
        trained_length: Tokens of the trained context; by default the configuration's.

    Returns:
        A new model that shares all weights.

    Raises:
        ValueError: As `ntk_by_parts`; an attention factor that is not above 0; a model that rotates
            a part of each head only, whose scores the factor would not reach as a whole.
    """
    factor = check_factor(factor)
    table = rotary_table(model, trained_length)
    by_default = attention_factor(factor) if attention else 1.0
    scale = by_default if isinstance(attention, bool) else float(attention)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"attention is {attention}; it must be True, False or a number above 0.")
    if scale != 1 and table.dim != table.head_dim:
        raise ValueError(
            f"this model rotates {table.dim} of the {table.head_dim} numbers of a head, and YaRN's "
            "factor reaches only those; choose attention=False, or ntk_by_parts."
        )
    return blended(model, table, factor, ramp=ramp, alpha=alpha, beta=beta, attention_factor=scale)
