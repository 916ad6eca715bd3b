r"""Entmax: a softmax that gives exact zeros.

$$\operatorname{entmax}_\alpha(z) = \arg\max_{p \in \Delta}\; p \cdot z + H_\alpha(p), \qquad
  p_i = [(\alpha - 1) z_i - \tau]_+^{1 / (\alpha - 1)},$$

with the Tsallis entropy $H_\alpha$ and the one $\tau$ for which the $p_i$ sum to 1. For
$\alpha = 1$ it is softmax, for 2 sparsemax; between them weights stay smooth and small ones become
0. For 1.5 and 2, $\tau$ follows from a sort; for any other $\alpha$ it is found by bisection. With
$s_i = p_i^{2 - \alpha}$ on the support (0 elsewhere), the Jacobian is

$$J = \operatorname{diag}(s) - s s^\top / \textstyle\sum s.$$

A key with weight 0 can be deleted without changing any other weight, since $\tau$ does not depend
on it. Sparsefinder rests on this.

Peters, Niculae, Martins, "Sparse Sequence-to-Sequence Models", 2019, arXiv 1905.05702. The gradient
with respect to $\alpha$: Correia, Niculae, Martins, "Adaptively Sparse Transformers", 2019, arXiv
1909.00015. Sparsemax: Martins, Astudillo, 2016, arXiv 1602.02068.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from effnb.design.attention.checks import check_attention, wide

ITERATIONS = 60
"""Halvings of an interval of length 1 at most: 2^-60 is below the resolution of float64."""


def _visible_rows(z: Tensor) -> tuple[Tensor, Tensor]:
    """Scores less their maximum in a wide type, and which rows have any key at all."""
    alive = (z > -torch.inf).any(-1, keepdim=True)
    z = torch.where(alive, z.to(wide(z)), 0)
    return z - z.amax(-1, keepdim=True), alive


def _sparsemax(z: Tensor) -> Tensor:
    s = z.sort(-1, descending=True).values
    k = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    sums = s.cumsum(-1)
    support = (1 + k * s > sums).sum(-1, keepdim=True)  # k* = #{k : 1 + k s_k > s_1 + ... + s_k}
    tau = (sums.gather(-1, support - 1) - 1) / support
    return (z - tau).clamp(min=0)  # p = [z - tau]_+


def _entmax15(z: Tensor) -> Tensor:
    z = z / 2  # (alpha - 1) z
    s = z.sort(-1, descending=True).values
    k = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    mean = s.cumsum(-1) / k  # M_k
    square = s.square().cumsum(-1) / k  # Q_k
    delta = ((1 - k * (square - mean.square())) / k).clamp(min=0)
    tau = mean - delta.sqrt()  # tau_k = M_k - sqrt(delta_k)
    support = (tau <= s).sum(-1, keepdim=True)  # k* = #{k : tau_k <= s_k}
    return (z - tau.gather(-1, support - 1)).clamp(min=0).square()  # p = [z - tau]_+^2


def _bisect(z: Tensor, alpha: Tensor | float) -> Tensor:
    z = (alpha - 1) * z
    power = 1 / (alpha - 1)
    # The largest alone gives 1 at its score - 1; all of them at most 1/n each at - n^(1 - alpha).
    top = z.amax(-1, keepdim=True)
    low, high = top - 1, top - float(z.shape[-1]) ** (1 - alpha)
    for _ in range(ITERATIONS):
        middle = (low + high) / 2
        above = (z - middle).clamp(min=0).pow(power).sum(-1, keepdim=True) >= 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    p = (z - low).clamp(min=0).pow(power)
    return p / p.sum(-1, keepdim=True)


class _Entmax(torch.autograd.Function):
    """One backward pass for every way to find tau."""

    @staticmethod
    def forward(ctx, z, alpha):
        shifted, alive = _visible_rows(z)
        if isinstance(alpha, Tensor):
            p = _bisect(shifted, alpha.to(shifted.dtype))
        else:
            exact = {1.5: _entmax15, 2.0: _sparsemax}.get(alpha)
            p = exact(shifted) if exact else _bisect(shifted, alpha)
        p = torch.where(alive, p, 0)
        ctx.alpha, ctx.type = alpha, z.dtype
        ctx.save_for_backward(p)
        return p.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (p,) = ctx.saved_tensors
        alpha, g = ctx.alpha, grad.to(p.dtype)
        power = 2 - (alpha.to(p.dtype) if isinstance(alpha, Tensor) else alpha)
        s = torch.where(p > 0, p.clamp(min=torch.finfo(p.dtype).tiny).pow(power), 0)
        total = s.sum(-1, keepdim=True)
        share = s / torch.where(total > 0, total, 1)
        dz = s * (g - (share * g).sum(-1, keepdim=True))  # J g = s g - s (s g) / sum(s)
        if not ctx.needs_input_grad[1]:
            return dz.to(ctx.type), None
        # dp/dalpha = (p - q) / (alpha - 1)^2 + (h - q sum(h)) / (alpha - 1), q = s / sum(s),
        # h = -p log p
        step = 1 - power
        h = -torch.special.xlogy(p, p)
        slope = (p - share) / step.square() + (h - share * h.sum(-1, keepdim=True)) / step
        dalpha = (slope * g).sum_to_size(alpha.shape)
        return dz.to(ctx.type), dalpha.to(alpha.dtype)


def sparsemax(z: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows keys"]:
    """Entmax with alpha = 2, by a sort: the point of the simplex that is nearest to the scores."""
    return entmax(z, 2.0)


def entmax15(z: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows keys"]:
    """Entmax with alpha = 1.5, by a sort."""
    return entmax(z, 1.5)


def entmax(
    z: Float[Tensor, "*rows keys"], alpha: float | Float[Tensor, "*alphas"] = 1.5
) -> Float[Tensor, "*rows keys"]:
    r"""$\operatorname{entmax}_\alpha$ over the last dimension.

    Args:
        z: Scores; minus infinity at hidden keys. A row without any other gives 0 everywhere.
        alpha: From 1, softmax. A tensor that broadcasts against the rows (its last dimension 1: a
            head's own alpha is of shape (heads, 1, 1)) gets a gradient, and must be above 1.

    Returns:
        Weights in the type of z that sum to 1, computed in float32 (float64 for float64).

    Raises:
        ValueError: An alpha below 1, a tensor of them that reaches 1 or does not broadcast, or no
            keys.
    """
    if not z.ndim or not z.shape[-1]:
        raise ValueError(f"the scores have shape {tuple(z.shape)}; there must be at least one key.")
    if isinstance(alpha, Tensor):
        if not bool((alpha > 1).all()):
            raise ValueError("an alpha of the tensor is not above 1; use the number 1 for softmax.")
        rows = (*z.shape[:-1], 1)
        try:
            fits = torch.broadcast_shapes(alpha.shape, rows) == rows
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"alpha has shape {tuple(alpha.shape)}; it must broadcast against the rows, {rows}."
            )
        return _Entmax.apply(z, alpha)
    if not alpha >= 1:
        raise ValueError(f"alpha is {alpha}; it must be at least 1, which is softmax.")
    if alpha == 1:
        dead = (z == -torch.inf).all(-1, keepdim=True)
        return torch.where(dead, 0, z).softmax(-1).masked_fill(dead, 0)
    return _Entmax.apply(z, float(alpha))


def entmax_attention(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch heads keys dim"],
    v: Float[Tensor, "batch heads keys value_dim"],
    *,
    alpha: float | Float[Tensor, "*alphas"] = 1.5,
    visible: Bool[Tensor, "*masks queries keys"] | None = None,
    scale: float | None = None,
) -> tuple[
    Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries keys"]
]:
    r"""$\operatorname{entmax}_\alpha(s\,QK^\top)\,V$ and its weights; the whole table is computed.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        alpha: See `entmax`.
        visible: True where a query may see a key; broadcasts against the scores.
        scale: $s$; $1 / \sqrt d$ by default.

    Raises:
        ValueError: As `entmax`, or shapes that do not fit.
    """
    check_attention(q, k, v)
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * q @ k.mT
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = entmax(scores, alpha)
    return weights @ v, weights
