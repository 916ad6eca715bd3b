r"""Performer (FAVOR+): random features whose products are, on average, the exponentials of softmax.

After dividing queries and keys by $d^{1/4}$ each, softmax needs $\mathrm{SM} = e^{q \cdot k}$. With
$w_j \sim \mathcal N(0, I)$, the *positive* features

$$\phi(x)_j = m^{-1/2} \exp(w_j \cdot x - \lVert x \rVert^2 / 2)$$

have $\mathbb E[\phi(q) \cdot \phi(k)] = \mathrm{SM}$, and attention is that of
`linear_attention`: no table, $O(T m d)$. Their mean squared error is in closed form, and so is that
of the *trigonometric* features
$e^{\lVert x \rVert^2 / 2} m^{-1/2} [\sin w_j \cdot x, \cos w_j \cdot x]$:

$$\frac{\mathrm{SM}^2 (e^{\lVert q + k \rVert^2} - 1)}{m} \quad\text{(positive)}, \qquad
  \frac{e^{\lVert q + k \rVert^2} (1 - e^{-\lVert q - k \rVert^2})^2}{2 m\, \mathrm{SM}^2}
  \quad\text{(trigonometric)}.$$

Positive features are exact where SM is small, as most of a softmax is; trigonometric ones have
errors there that are larger than what they estimate, and may be negative. Both grow with the norms
of queries and keys. *Orthogonal* $w_j$ (blocks of $d$ rows, with the lengths of Gaussian vectors)
lower the error further. Features are drawn again every so often in training.

Exponentials are kept in range by subtracting a maximum. For a query any number will do, since it
cancels; keys must share **one**, or they are weighted by their own maxima.

Choromanski, Likhosherstov, Dohan, Song, Gane, Sarlos, Hawkins, Davis, Mohiuddin, Kaiser, Belanger,
Colwell, Weller, "Rethinking Attention with Performers", 2020, arXiv 2009.14794.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from effnb.design.attention.checks import check_attention, check_count, check_mask, wide
from effnb.design.attention.linear_attention import feature_attention

KINDS = ("positive", "trigonometric")


def default_features(dim: int) -> int:
    r"""$m = \lceil d \ln d \rceil$, the number that the paper's bound asks for; at least 1."""
    return max(1, math.ceil(dim * math.log(dim)))


def gaussian_features(
    count: int, dim: int, *, orthogonal: bool = True, seed: int = 0, like: Tensor | None = None
) -> Float[Tensor, "features dim"]:
    r"""The random directions $w_j$, one a row.

    Args:
        count: m.
        dim: d.
        orthogonal: Whether rows come in blocks of d that are orthogonal, each as long as a Gaussian
            vector; the last block may be smaller.
        seed: Of the choice. Features are drawn again by taking another.
        like: A tensor whose type and device they get; float32 on the CPU by default.

    Raises:
        ValueError: A count below 1.
    """
    check_count("count", count)
    check_count("dim", dim)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    if orthogonal:
        lengths = torch.randn(count, dim, generator=generator, dtype=torch.float64).norm(dim=1)
        blocks = []
        for start in range(0, count, dim):
            block = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(block)
            q = q * r.diagonal().sign()  # without it, directions would not be uniform
            blocks.append(q[: min(dim, count - start)])
        rows = torch.cat(blocks) * lengths[:, None]
    return rows.to(like) if like is not None else rows.float()


def softmax_features(
    x: Float[Tensor, "*rows dim"], w: Float[Tensor, "features dim"], kind: str = "positive"
) -> Float[Tensor, "*rows mapped"]:
    r"""$\phi(x)$ with $\mathbb E[\phi(q) \cdot \phi(k)] = e^{q \cdot k}$, without a stabilizer.

    Args:
        x: Queries or keys, divided by $d^{1/4}$ already.
        w: From `gaussian_features`.
        kind: "positive", or "trigonometric" for twice as many numbers.

    Raises:
        ValueError: Another kind, or directions of another width.
    """
    _check_features(x, w, kind)
    products, half = x @ w.T, x.square().sum(-1, keepdim=True) / 2
    if kind == "positive":
        return (products - half).exp() / len(w) ** 0.5
    return half.exp() * torch.cat([products.sin(), products.cos()], -1) / len(w) ** 0.5


def kernel_mse(
    q: Float[Tensor, "*rows dim"],
    k: Float[Tensor, "*rows dim"],
    count: int,
    kind: str = "positive",
) -> Float[Tensor, "*rows"]:
    r"""Mean squared error of the estimate of $e^{q \cdot k}$ by m independent features.

    Raises:
        ValueError: Another kind, or a count below 1.
    """
    check_count("count", count)
    total, difference = (q + k).square().sum(-1), (q - k).square().sum(-1)
    product = (q * k).sum(-1)
    if kind == "positive":
        return (2 * product).exp() * torch.expm1(total) / count
    if kind == "trigonometric":
        return (total - 2 * product).exp() * torch.expm1(-difference).square() / (2 * count)
    raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}.")


def performer_attention(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch heads keys dim"],
    v: Float[Tensor, "batch heads keys value_dim"],
    w: Float[Tensor, "features dim"],
    *,
    kind: str = "positive",
    causal: bool = False,
    padding: Bool[Tensor, "batch keys"] | None = None,
    chunk: int = 64,
) -> Float[Tensor, "batch heads queries value_dim"]:
    r"""Attention $D^{-1} \phi(Q) (\phi(K)^\top V)$, an estimate of softmax attention.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        w: The random directions, shared by all heads.
        kind: "positive" or "trigonometric". With the latter a denominator may come near 0.
        causal: Whether a query sees no later key; there is a query for each key then. The maximum
            of the keys is that of the whole text: it cancels, but for rounding.
        padding: True at keys that nothing sees.
        chunk: Tokens that are read together, see `linear_attention.feature_attention`.

    Raises:
        ValueError: Shapes, masks or directions that do not fit, or another kind.
    """
    check_attention(q, k, v, same_length=causal)
    check_mask("padding", padding, (k.shape[0], k.shape[2]))
    _check_features(q, w, kind)
    type_ = wide(q)
    w = w.to(type_)
    q, k = (x.to(type_) * x.shape[-1] ** -0.25 for x in (q, k))
    hidden = None if padding is None else padding[:, None, :, None]
    if hidden is not None:
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    if kind == "positive":
        phi_q = _stable(q, w, dims=(-1,))
        phi_k = _stable(k, w, dims=(-2, -1), hidden=hidden)  # one maximum for all keys
    else:
        phi_q, phi_k = _bounded(q, k, w, hidden)
    if hidden is not None:
        phi_k = phi_k.masked_fill(hidden, 0)
    epsilon = torch.finfo(type_).tiny  # where all keys are hidden or underflow, 0 / 0 becomes 0
    out, _ = feature_attention(phi_q, phi_k, v, causal=causal, chunk=chunk, epsilon=epsilon)
    return out


def _stable(x: Tensor, w: Tensor, dims: tuple[int, ...], hidden: Tensor | None = None) -> Tensor:
    """Positive features, divided by the largest along some dimensions."""
    exponent = x @ w.T - x.square().sum(-1, keepdim=True) / 2
    seen = exponent if hidden is None else exponent.masked_fill(hidden, -torch.inf)
    largest = seen.detach().amax(dims, keepdim=True)
    largest = torch.where(largest == -torch.inf, 0, largest)
    return (exponent - largest).exp() / len(w) ** 0.5


def _bounded(q: Tensor, k: Tensor, w: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Trigonometric features; a query's own factor cancels, keys keep theirs over the largest."""
    half = k.square().sum(-1, keepdim=True) / 2
    seen = half if hidden is None else half.masked_fill(hidden, 0)
    size = (half - seen.detach().amax(-2, keepdim=True)).exp()
    phi_q, phi_k = (
        torch.cat([(x @ w.T).sin(), (x @ w.T).cos()], -1) / len(w) ** 0.5 for x in (q, k)
    )
    return phi_q, phi_k * size


def _check_features(x: Tensor, w: Tensor, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}.")
    if w.ndim != 2 or w.shape[1] != x.shape[-1] or not len(w):
        raise ValueError(
            f"w has shape {tuple(w.shape)}; it must hold directions as wide as queries and keys, "
            f"{x.shape[-1]}."
        )
