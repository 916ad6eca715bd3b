r"""NTK-by-parts: leave fast points alone, interpolate slow ones, and blend between.

A point that completes many rotations within the trained context has met all its angles, and only
tells how far apart two tokens are: it may go on as it is. A point that completes less than one
rotation tells where in the context a token is: beyond the trained length it would reach angles it
has never met, so it has to be interpolated. With $r_i = L\,\theta_i / 2\pi$ rotations,

$$h(\theta_i) = (1 - \gamma_i)\,\frac{\theta_i}{s} + \gamma_i\,\theta_i, \qquad
  \gamma_i = 0 \text{ for } r_i \le \alpha, \quad 1 \text{ for } r_i \ge \beta,$$

with $\alpha = 1$ and $\beta = 32$ for Llama. Between the two, $\gamma$ is a ramp, and there are
two of them:

- `ramp="paper"` is linear in the rotations: $\gamma_i = (r_i - \alpha) / (\beta - \alpha)$.
- `ramp="code"`, that of the authors' code, of transformers and of every published checkpoint, is
  linear in the index $i$, which is to say in $\log r_i$. The indices at which $r_i$ is $\beta$ and
  $\alpha$ are
  $$i(r) = \frac{d \ln(L / 2\pi r)}{2 \ln b},$$
  rounded outwards to whole ones and clamped to $0, \dots, d - 1$, and $\gamma$ falls from 1 to 0
  between them.

The ends are the same, the middle is not: with $d = 64$, $L = 2048$, $b = 10^4$ the point $i = 12$
makes 10.3 rotations; the paper gives it $\gamma = 0.30$, the code 0.69.

No point rotates more than $L / 2\pi$ times, so $\beta = 32$ leaves a point alone only if
$L \ge 64\pi \approx 201$; a model of a shorter context needs a lower $\beta$.

Peng, Quesnelle, Fan, Shippole, "YaRN: Efficient Context Window Extension of Large Language Models",
2023, arXiv 2309.00071, sec. 3.2 (the symbol $b'$ in its definition of $r$ must be read as $b$).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.core.modules import Model
from effnb.design.context.rope import rotations
from effnb.design.context.rotary_table import (
    RotaryTable,
    as_longrope,
    check_factor,
    extended_length,
    rotary_table,
    with_table,
)

RAMPS = ("code", "paper")


def paper_ramp(
    inv_freq: Float[Tensor, " half"], trained_length: int, alpha: float = 1.0, beta: float = 32.0
) -> Float[Tensor, " half"]:
    r"""$\gamma_i = \operatorname{clip}((r_i - \alpha) / (\beta - \alpha), 0, 1)$.

    Args:
        inv_freq: $\theta$.
        trained_length: $L$ in tokens.
        alpha: Rotations up to which a point is interpolated.
        beta: Rotations from which a point stays as it is.

    Raises:
        ValueError: Limits that are not $0 < \alpha < \beta$, or a length below 1.
    """
    _check(trained_length, alpha, beta)
    r = rotations(inv_freq, trained_length)
    return ((r - alpha) / (beta - alpha)).clamp(0, 1)  # γ = clip((r - α)/(β - α), 0, 1)


def code_range(
    dim: int,
    base: float,
    trained_length: int,
    alpha: float = 1.0,
    beta: float = 32.0,
    *,
    truncate: bool = True,
) -> tuple[float, float]:
    """The indices between which the ramp of the published code falls from 1 to 0.

    Args:
        dim: $d$.
        base: $b$.
        trained_length: $L$ in tokens.
        alpha: Rotations at the upper index.
        beta: Rotations at the lower index.
        truncate: Whether the indices are rounded outwards to whole ones.

    Raises:
        ValueError: As `paper_ramp`.
    """
    _check(trained_length, alpha, beta)

    def index(count: float) -> float:  # i(r) = d ln(L / 2πr) / (2 ln b)
        return dim * math.log(trained_length / (count * 2 * math.pi)) / (2 * math.log(base))

    low, high = index(beta), index(alpha)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


def code_ramp(
    inv_freq: Float[Tensor, " half"],
    trained_length: int,
    alpha: float = 1.0,
    beta: float = 32.0,
    *,
    base: float | None = None,
    truncate: bool = True,
) -> Float[Tensor, " half"]:
    r"""$\gamma_i$ as the published code has it: linear in the index.

    Args:
        inv_freq: $\theta$, of the form $b^{-2i/d}$.
        trained_length: $L$ in tokens.
        alpha: Rotations up to which a point is interpolated.
        beta: Rotations from which a point stays as it is.
        base: $b$; by default read from the slowest frequency.
        truncate: Whether the ends of the ramp are rounded outwards to whole indices.

    Raises:
        ValueError: As `paper_ramp`; or frequencies that do not fall by one ratio, for which an
            index says nothing of the rotations.
    """
    half = len(inv_freq)
    if base is None:
        base = _base_of(inv_freq)
    low, high = code_range(2 * half, base, trained_length, alpha, beta, truncate=truncate)
    if low == high:
        high += 0.001  # a step, as the code has it
    step = torch.arange(half, dtype=inv_freq.dtype, device=inv_freq.device)
    return 1 - ((step - low) / (high - low)).clamp(0, 1)


def _base_of(inv_freq: Tensor) -> float:
    """The base of frequencies that fall by one ratio."""
    half = len(inv_freq)
    logs = inv_freq.double().log()
    ratio = float(logs[-1]) / max(half - 1, 1)
    expected = ratio * torch.arange(half, dtype=torch.float64, device=inv_freq.device)
    if half < 2 or ratio >= 0 or not torch.allclose(logs, expected, rtol=0, atol=1e-4):
        raise ValueError(
            "the ramp of the published code is linear in the index, which needs frequencies that "
            "fall from 1 by one ratio; choose ramp='paper' for others."
        )
    return math.exp(-ratio * half)  # θ_i = b^(-2i/d), and d = 2 half


def ntk_by_parts_frequencies(
    inv_freq: Float[Tensor, " half"],
    factor: float,
    trained_length: int,
    *,
    ramp: str = "code",
    alpha: float = 1.0,
    beta: float = 32.0,
    base: float | None = None,
    truncate: bool = True,
) -> Float[Tensor, " half"]:
    r"""$h(\theta_i) = (1 - \gamma_i)\,\theta_i / s + \gamma_i\,\theta_i$.

    Args:
        inv_freq: $\theta$, the model's own.
        factor: $s$.
        trained_length: $L$ in tokens.
        ramp: "code" or "paper".
        alpha: Rotations up to which a point is interpolated.
        beta: Rotations from which a point stays as it is.
        base: For the ramp of the code: $b$; by default read from the slowest frequency.
        truncate: For the ramp of the code: whether its ends are whole indices.

    Raises:
        ValueError: A factor below 1, an unknown ramp, limits that are not
            $0 < \alpha < \beta$, or frequencies that the ramp cannot treat.
    """
    factor = check_factor(factor)
    if ramp not in RAMPS:
        raise ValueError(f"ramp is {ramp!r}; it must be 'code' or 'paper'.")
    if ramp == "paper":
        gamma = paper_ramp(inv_freq, trained_length, alpha, beta)
    else:
        gamma = code_ramp(inv_freq, trained_length, alpha, beta, base=base, truncate=truncate)
    if factor == 1:
        return inv_freq.clone()  # the sum below may round
    return (1 - gamma) * inv_freq / factor + gamma * inv_freq  # h = (1 - γ) θ/s + γ θ


def ntk_by_parts(
    model: Model,
    factor: float,
    *,
    ramp: str = "code",
    alpha: float = 1.0,
    beta: float = 32.0,
    trained_length: int | None = None,
) -> Model:
    r"""Interpolate the slow points of a model's rotary table only.

    Saved and loaded by transformers: with the ramp of the code as the `rope_type` "yarn" with an
    attention factor of 1, with that of the paper as "longrope".

    Args:
        model: A Hugging Face model with rotary positions; it is not changed.
        factor: $s$, the new context length divided by the trained one.
        ramp: "code", which published checkpoints use, or "paper".
        alpha: Rotations up to which a point is interpolated.
        beta: Rotations from which a point stays as it is.
        trained_length: Tokens of the trained context; by default the configuration's.

    Returns:
        A new model that shares all weights.

    Raises:
        ValueError: As `ntk_by_parts_frequencies`, or a model that `rotary_table` refuses.
    """
    table = rotary_table(model, trained_length)
    return blended(model, table, factor, ramp=ramp, alpha=alpha, beta=beta, attention_factor=1.0)


def blended(
    model: Model,
    table: RotaryTable,
    factor: float,
    *,
    ramp: str,
    alpha: float,
    beta: float,
    attention_factor: float,
) -> Model:
    """A model with blended frequencies and a factor on queries and keys: by-parts and YaRN."""
    inv_freq = ntk_by_parts_frequencies(
        table.inv_freq,
        factor,
        table.trained_length,
        ramp=ramp,
        alpha=alpha,
        beta=beta,
        base=table.base,
    )
    parameters: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": table.trained_length,
        "beta_fast": float(beta),
        "beta_slow": float(alpha),
        "attention_factor": attention_factor,
    }
    if ramp == "paper":
        parameters = as_longrope(table, inv_freq, float(factor), attention_factor)
    return with_table(
        model,
        table,
        inv_freq,
        parameters,
        attention_factor=attention_factor,
        length=extended_length(table, factor),
    )


def _check(trained_length: int, alpha: float, beta: float) -> None:
    if trained_length < 1:
        raise ValueError(f"trained_length is {trained_length}; it must be at least 1 token.")
    if not (0 < alpha < beta and math.isfinite(beta)):
        raise ValueError(
            f"alpha is {alpha} and beta {beta}; they count rotations and must be 0 < alpha < beta."
        )
