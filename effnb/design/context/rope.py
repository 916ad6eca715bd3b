r"""RoPE: positions enter attention as rotations of queries and keys.

The $d$ numbers of a head are taken as $d/2$ points of the plane. At position $m$, point $i$ is
turned by the angle $m\,\theta_i$ with the frequency

$$\theta_i = b^{-2i/d}, \qquad i = 0, \dots, d/2 - 1, \qquad b = 10\,000.$$

The product of a turned query at $m$ and a turned key at $n$ depends on $m - n$ only. Point $i$
returns to where it was after the wavelength $\lambda_i = 2\pi/\theta_i$, and a context of $L$
tokens holds $r_i = L / \lambda_i$ of its rotations. The methods of this package are functions of
$\theta$ and differ in how they treat points by their $r_i$: those that rotate often tell near
tokens apart, and those that never complete a rotation tell which part of the context a token is in.

Two layouts say which numbers form a point: interleaved $(2i, 2i + 1)$, the paper's, and half-split
$(i, i + d/2)$, that of Llama in `transformers`. Weights trained with one are useless with the other
until the rows of their projections are permuted (`convert_projection`).

Angles are computed in float32: bfloat16 has 8 significant bits, and so cannot tell position 2,049
from 2,048. `effnb.kernels.rope` turns queries and keys.

Su, Lu, Pan, Murtadha, Wen, Liu, "RoFormer: Enhanced Transformer with Rotary Position Embedding",
2021, arXiv 2104.09864, sec. 3.2 and 3.4.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

LAYOUTS = ("half-split", "interleaved")
"""Where the two numbers of a point lie in a head."""


def rope_frequencies(
    dim: int,
    base: float = 10_000.0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Float[Tensor, " half"]:
    r"""$\theta_i = b^{-2i/d}$ in radians per token, from the fastest to the slowest.

    In float32 they equal, bit for bit, those that models of `transformers` are trained with.

    Args:
        dim: $d$, the rotated numbers of a head; even.
        base: $b$.
        dtype: float32, or float64 for exact comparisons.
        device: Where the result lies.

    Raises:
        ValueError: An odd or too small `dim`, a base that is not above 1, or another type.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim is {dim}; a head consists of pairs, so it must be even, from 2.")
    if not (math.isfinite(base) and base > 1):
        raise ValueError(f"base is {base}; it must be a finite number above 1.")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"frequencies in {dtype} are too coarse; choose float32 or float64.")
    steps = torch.arange(0, dim, 2, dtype=dtype, device=device)
    return 1.0 / base ** (steps / dim)  # θ_i = b^(-2i/d)


def wavelengths(inv_freq: Float[Tensor, " half"]) -> Float[Tensor, " half"]:
    r"""$\lambda_i = 2\pi / \theta_i$ in tokens."""
    return 2 * math.pi / inv_freq


def rotations(inv_freq: Float[Tensor, " half"], length: float) -> Float[Tensor, " half"]:
    r"""$r_i = L / \lambda_i$, the rotations of each point within a context of `length` tokens.

    The fastest of a RoPE table has $L / 2\pi$ whatever the base: 20.4 for 128 tokens.
    """
    return length * inv_freq / (2 * math.pi)


def rope_angles(
    inv_freq: Float[Tensor, " half"], positions: Shaped[Tensor, "*positions"]
) -> Float[Tensor, "*positions half"]:
    r"""$m\,\theta_i$ in radians, at least in float32 whatever type the table has.

    Args:
        inv_freq: $\theta$.
        positions: $m$, whole or interpolated.
    """
    kind = torch.float64 if inv_freq.dtype == torch.float64 else torch.float32
    return positions.to(kind)[..., None] * inv_freq.to(kind)


def convert_layout(
    x: Float[Tensor, "*batch dim"], to: str = "half-split"
) -> Float[Tensor, "*batch dim"]:
    """Reorder the numbers of heads from one layout to the other.

    Turning in the one layout and reordering equals reordering and turning in the other.

    Args:
        x: Queries, keys or anything else whose last axis is a head.
        to: The layout wanted, "half-split" or "interleaved"; `x` is in the other one.

    Raises:
        ValueError: An unknown layout or an odd head.
    """
    return x[..., _order(x.shape[-1], to).to(x.device)]


def convert_projection(
    weight: Float[Tensor, "out *in"], heads: int, to: str = "half-split"
) -> Float[Tensor, "out *in"]:
    """Reorder the rows of a query or key projection, or of its bias, for the other layout.

    A model whose query and key rows are both reordered, and which then turns them in the new
    layout, computes what it did before: the products of queries and keys are sums over the same
    numbers.

    Args:
        weight: The matrix (heads · dim, in), or the bias (heads · dim).
        heads: Number of heads whose rows lie one after the other: query heads, or key heads.
        to: The layout wanted; `weight` is for the other one.

    Raises:
        ValueError: Rows that do not divide into this number of heads, an odd head, an unknown
            layout.
    """
    if heads < 1 or len(weight) % heads:
        raise ValueError(f"{len(weight)} rows do not consist of {heads} heads of equal size.")
    dim = len(weight) // heads
    order = _order(dim, to).to(weight.device)
    rows = torch.arange(heads, device=weight.device)[:, None] * dim + order
    return weight[rows.flatten()]


def _order(dim: int, to: str) -> Tensor:
    """Which number of the old layout comes where in the new one."""
    if to not in LAYOUTS:
        raise ValueError(f"the layout is {to!r}; it must be 'half-split' or 'interleaved'.")
    if dim % 2:
        raise ValueError(f"a head of {dim} numbers does not consist of pairs; it must be even.")
    number = torch.arange(dim)
    pairs = number.view(-1, 2).T if to == "half-split" else number.view(2, -1).T
    return pairs.flatten()
