r"""Linformer: keys and values are projected along the length, from T tokens to k.

$$O = \operatorname{softmax}\big(Q (E K)^\top / \sqrt d\big)\, (F V), \qquad E, F \in
  \mathbb R^{k \times T},$$

because the table of attention weights was found to be of low rank. $O(T k)$ pairs. The projections
fix the longest text. **Linformer is not causal**: each of the k mixed keys holds all tokens, later
ones too, so a language model would see what it is to predict. It is for encoders.

Wang, Li, Khabsa, Fang, Ma, "Linformer: Self-Attention with Linear Complexity", 2020, arXiv
2006.04768.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.design.attention.checks import check_attention, check_count, check_heads, check_mask

SHARING = ("none", "heads", "key-value")


def linformer_attention(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch heads keys dim"],
    v: Float[Tensor, "batch heads keys value_dim"],
    E: Float[Tensor, "#heads projected keys"],
    F: Float[Tensor, "#heads projected keys"],
    *,
    padding: Bool[Tensor, "batch keys"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "batch heads queries value_dim"]:
    r"""$\operatorname{softmax}(Q (EK)^\top / \sqrt d)\,(FV)$.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        E: Projection of the keys' length; for all heads (1 first) or each.
        F: That of the values.
        padding: True at keys that count as 0. They still share in the softmax through the
            projected keys, as in the paper, which has no other masks.
        causal: Must be False.

    Raises:
        ValueError: When causal; shapes that do not fit.
    """
    if causal:
        raise ValueError(
            "Linformer cannot be causal: each projected key mixes all tokens, later ones too."
        )
    check_attention(q, k, v)
    check_mask("padding", padding, (k.shape[0], k.shape[2]))
    for name, matrix in dict(E=E, F=F).items():
        wrong = matrix.ndim != 3 or matrix.shape[0] not in (1, q.shape[1])
        if wrong or matrix.shape[2] != k.shape[2] or matrix.shape[1] != E.shape[1]:
            raise ValueError(
                f"{name} has shape {tuple(matrix.shape)}; it must be (1 or {q.shape[1]}, projected "
                f"length, {k.shape[2]}), E and F alike."
            )
    if padding is not None:
        k, v = (x.masked_fill(padding[:, None, :, None], 0) for x in (k, v))
    scores = q @ (E @ k).mT / q.shape[3] ** 0.5  # Q (E K)^T / sqrt(d)
    return scores.softmax(-1) @ (F @ v)


class LinformerAttention(nn.Module):
    """Linformer's attention layer.

    Args:
        dim: Width of the model.
        heads: Heads; they divide the width.
        length: T, the longest text. Shorter ones use the first columns of the projections.
        projected: k, the length after the projection.
        sharing: What shares a projection: "none" (each head has an E and an F), "heads" (one E and
            one F for all heads), or "key-value" (E = F, for all heads). To share one over layers as
            well, hand a layer's `E` on to the others.

    Raises:
        ValueError: A width that is not a multiple of the heads, a projected length above the
            longest text, or another kind of sharing.
    """

    def __init__(
        self, dim: int, heads: int, length: int, projected: int, *, sharing: str = "heads"
    ) -> None:
        super().__init__()
        check_heads(dim, heads)
        if sharing not in SHARING:
            raise ValueError(f"sharing is {sharing!r}; it must be one of {', '.join(SHARING)}.")
        if check_count("projected", projected) > check_count("length", length):
            raise ValueError(
                f"projected is {projected}; a text of at most {length} tokens is not made longer."
            )
        self.heads, self.length = heads, length
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        shape = heads if sharing == "none" else 1, projected, length
        self.E = nn.Parameter(torch.randn(shape) / projected**0.5)
        if sharing == "key-value":
            self.F = self.E
        else:
            self.F = nn.Parameter(torch.randn(shape) / projected**0.5)

    def forward(
        self,
        hidden: Float[Tensor, "batch time dim"],
        *,
        padding: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time dim"]:
        """Attend.

        Raises:
            ValueError: A text longer than the projections.
        """
        time = hidden.shape[1]
        if time > self.length:
            raise ValueError(
                f"the text has {time} tokens; the projections are for {self.length} at most."
            )
        q, k, v = (
            p(hidden).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for p in (self.query, self.key, self.value)
        )
        out = linformer_attention(q, k, v, self.E[..., :time], self.F[..., :time], padding=padding)
        return self.out(out.transpose(1, 2).flatten(2))


def cumulative_energy(weights: Float[Tensor, "*tables queries keys"]) -> Float[Tensor, "*tables n"]:
    """Which share of a table's squared singular values the first 1, 2, … of them hold.

    The paper's motivation: for trained attention weights, few hold nearly all.
    """
    squares = torch.linalg.svdvals(weights.to(torch.promote_types(weights.dtype, torch.float32)))
    squares = squares.square()
    return squares.cumsum(-1) / squares.sum(-1, keepdim=True)
