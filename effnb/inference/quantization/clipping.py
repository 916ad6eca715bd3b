r"""From numbers to a grid: how much of their range it should cover.

The step of a uniform grid is the range it covers divided by the number of steps. Covering all
numbers (*min-max*) makes one outlier coarsen the grid for everyone; covering fewer (*clipping*)
moves the outliers to the grid's ends and rounds the rest more finely. The error of clipping and the
error of rounding pull in opposite directions, so there is a best range between:

- *percentile*: cover a given share of the numbers;
- *mse*: try ranges $p\,[\min, \max]$ for $p = 1, 0.99, \ldots, 0.21$, keep the one with the
  smallest $\sum |\hat x - x|^a$. The natural exponent is $a = 2$; the published code of GPTQ
  (Frantar et al., 2022, arXiv 2210.17323) uses $a = 2.4$, which cares more about outliers.

For numbers that are normally distributed the best range has a closed form up to a search in one
variable: `gaussian_error` and `gaussian_clip`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from effnb.inference.quantization.grid import Grid
from effnb.inference.quantization.stored import check_bits

SHRINKS = tuple(1 - i / 100 for i in range(80))
"""The shares of the range that "mse" tries: those of GPTQ's code."""

HALF_MAX, HALF_MIN = 65504, 2.0**-24
"""Largest number, and smallest above 0, that half precision can hold: the limits of a scale."""


def choose_grid(
    values: Num[Tensor, "*shape size"], grid: Grid, *, half_scales: bool = True
) -> tuple[Float[Tensor, "*shape"], Int[Tensor, "*shape"] | None]:
    """Scale and zero point for the numbers along the last axis.

    The scale is rounded to half precision first, the form it is stored in, so that quantizing uses
    the same number as reading back. Where all values are 0 the scale is 1.

    Args:
        values: The numbers; one grid for each position of all axes but the last.
        grid: Bits, symmetry and clipping; its group size is not asked.
        half_scales: Whether scales are rounded to half precision.

    Raises:
        ValueError: When a scale is too large for half precision.
    """
    if grid.clip == "percentile":
        values = percentile_range(values, grid.percentile, grid.symmetric)
    elif grid.clip == "mse":
        values = mse_range(values, grid, half_scales=half_scales)
    working = torch.promote_types(values.dtype, torch.float32)
    if grid.symmetric:
        span = values.abs().amax(-1).to(working) / grid.high
    else:
        low, high = (
            values.amin(-1).to(working).clamp(max=0),
            values.amax(-1).to(working).clamp(min=0),
        )
        span = (high - low) / grid.high
    if half_scales and float(span.max()) > HALF_MAX:
        raise ValueError(
            f"the weights are too large: a scale of {float(span.max()):.3g} does not fit into half "
            f"precision (at most {HALF_MAX})."
        )
    # A smaller scale would round to 0, and codes could not be computed.
    smallest = HALF_MIN if half_scales else torch.finfo(working).tiny
    scale = torch.where(span > 0, span.clamp(min=smallest), torch.ones_like(span))
    if half_scales:
        scale = scale.half().to(working)
    if grid.symmetric:
        return scale, None
    return scale, (-low / scale).round().clamp(0, grid.high).int()


def round_to_grid(
    values: Num[Tensor, "*shape"],
    scale: Float[Tensor, "*#shape"],
    zero: Int[Tensor, "*#shape"] | None,
    bits: int,
) -> Float[Tensor, "*shape"]:
    r"""The codes $q = \operatorname{clamp}(\operatorname{round}(x / s) + z)$, as whole floats.

    Args:
        values: Numbers $x$.
        scale: Steps $s$, of a shape that broadcasts.
        zero: Zero points $z$; None for the symmetric grid.
        bits: 2 to 8.
    """
    ratio = (values / scale).round()
    if zero is None:
        top = 2 ** (bits - 1) - 1
        return ratio.clamp(-top, top)
    return (ratio + zero).clamp(0, 2**bits - 1)


def percentile_range(
    values: Num[Tensor, "*shape size"], percentile: float, symmetric: bool
) -> Float[Tensor, "*shape ends"]:
    """The ends of the range that holds a given percentage of the numbers along the last axis.

    Symmetric: that percentile of the magnitudes, once. Affine: two ends, each of which leaves out
    half of the rest. Between two numbers the percentile is interpolated linearly.
    """
    share = percentile / 100
    working = torch.promote_types(values.dtype, torch.float32)
    ordered = (values.abs() if symmetric else values).to(working).sort(-1).values
    ends = [share] if symmetric else [(1 - share) / 2, (1 + share) / 2]
    found = []
    for end in ends:
        # torch.quantile takes at most 2^24 numbers, fewer than one large matrix has.
        place = end * (ordered.shape[-1] - 1)
        below, above = math.floor(place), math.ceil(place)
        found.append(torch.lerp(ordered[..., below], ordered[..., above], place - below))
    return torch.stack(found, -1)


def mse_range(
    values: Num[Tensor, "*shape size"], grid: Grid, *, half_scales: bool = True
) -> Float[Tensor, "*shape 2"]:
    r"""The ends $p\,[\min, \max]$ whose grid has the smallest $\sum |\hat x - x|^a$.

    Args:
        values: The numbers; one range for each position of all axes but the last.
        grid: Bits, symmetry and the power $a$, `grid.exponent`.
        half_scales: Whether scales are rounded to half precision.
    """
    covering = replace(grid, clip="minmax")
    working = torch.promote_types(values.dtype, torch.float32)
    values = values.to(working)
    ends = torch.stack([values.amin(-1), values.amax(-1)], -1)
    best, least = ends, torch.full_like(ends[..., 0], torch.inf)
    for shrink in SHRINKS:
        tried = ends * shrink
        scale, zero = choose_grid(tried, covering, half_scales=half_scales)
        scale, zero = scale.unsqueeze(-1), zero if zero is None else zero.unsqueeze(-1)
        codes = round_to_grid(values, scale, zero, grid.bits)
        read_back = scale * (codes if zero is None else codes - zero)
        error = (read_back - values).abs().pow(grid.exponent).sum(-1)
        better = error < least
        best, least = (
            torch.where(better.unsqueeze(-1), tried, best),
            torch.where(better, error, least),
        )
    return best


def gaussian_error(clip: float, bits: int) -> float:
    r"""Mean squared error of the symmetric grid up to `clip` on numbers from $N(0, 1)$.

    With $K = 2^{b-1} - 1$, step $s = c / K$ and cells that end half way between two levels, it is
    $\sum_{k=-K}^{K} \int_{\text{cell } k} (x - k s)^2 \varphi(x)\,dx$, whose parts are
    $\int x^2 \varphi = \Phi - x \varphi$, $\int x \varphi = -\varphi$ and $\int \varphi = \Phi$.

    Args:
        clip: Largest level $c$, in standard deviations.
        bits: 2 to 8.

    Raises:
        ValueError: Bits outside the format, or a `clip` that is not above 0.
    """
    check_bits(bits)
    if not clip > 0:
        raise ValueError(f"clip is {clip!r}; it must be above 0.")
    top = 2 ** (bits - 1) - 1
    levels = torch.arange(-top, top + 1, dtype=torch.float64) * (clip / top)
    inner = (levels[1:] + levels[:-1]) / 2
    far = torch.tensor([40.0], dtype=torch.float64)  # the density is 0 there in double precision
    edges = torch.cat([-far, inner, far])
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    below = torch.special.ndtr(edges)
    mass, first = below.diff(), -density.diff()
    second = (below - edges * density).diff()
    return float((second - 2 * levels * first + levels.square() * mass).sum())


def gaussian_clip(bits: int) -> float:
    """The `clip` with the least `gaussian_error`, in standard deviations, to about 1e-6.

    Raises:
        ValueError: Bits outside the format.
    """
    low, high = 0.5, 8.0
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-6:  # golden-section search: the error falls, then rises
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if gaussian_error(left, bits) < gaussian_error(right, bits):
            high = right
        else:
            low = left
    return (low + high) / 2
