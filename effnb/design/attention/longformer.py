r"""Longformer: a sliding window for all tokens, and a few global ones with own projections.

A token sees the $w / 2$ tokens on either side of it, so that the cost is linear in the length and a
stack of $N$ layers sees $N w / 2$ tokens either way. Some tokens are global (a class token, those
of a question): they see all tokens, and all see them. Their queries, and the keys and values that
these meet, have projections of their own, $Q_g, K_g, V_g$, which start as copies:

$$o_i = \begin{cases}
  \operatorname{softmax}(s\,q^g_i \cdot k^g_j)\, v^g_j \text{ over all } j & i \text{ global} \\
  \operatorname{softmax}(s\,q_i \cdot k_j)\, v_j \text{ over } |i - j| \le w/2
    \text{ and global } j & \text{otherwise.}
\end{cases}$$

$O(T (w + g))$ pairs for $g$ global tokens. The window is computed tile by tile by
`effnb.kernels.local_attention`, and global rows apart.

Beltagy, Peters, Cohan, "Longformer: The Long-Document Transformer", 2020, arXiv 2004.05150.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.design.attention.checks import check_attention, check_count, check_heads, check_mask
from effnb.kernels.local_attention import local_attention


def dilated_attention(
    q: Float[Tensor, "batch heads time dim"],
    k: Float[Tensor, "batch heads time dim"],
    v: Float[Tensor, "batch heads time value_dim"],
    *,
    window: int,
    dilation: int,
    causal: bool = False,
) -> Float[Tensor, "batch heads time value_dim"]:
    """A sliding window of every so many tokens: it reaches further at the same cost.

    Tokens that are a multiple of the dilation apart are put side by side; each of these sequences
    has an ordinary window.

    Args:
        q: Queries.
        k: Keys.
        v: Values, as wide as the keys.
        window: Its width in tokens that are seen; see `effnb.kernels.local_attention`.
        dilation: Steps between them.
        causal: Whether nothing sees a later token.

    Raises:
        ValueError: Shapes that do not fit, a dilation or window below 1, or an odd window with two
            sides.
    """
    check_attention(q, k, v, same_length=True)
    time, extra = q.shape[2], -q.shape[2] % check_count("dilation", dilation)

    def apart(x):  # (batch, heads, T, d) -> (batch * dilation, heads, T / dilation, d)
        x = nn.functional.pad(x, (0, 0, 0, extra)).unflatten(2, (-1, dilation))
        return x.permute(0, 3, 1, 2, 4).flatten(0, 1)

    places = torch.arange(time + extra, device=q.device).view(-1, dilation).T
    padding = (places >= time).repeat(q.shape[0], 1)
    out = local_attention(
        apart(q), apart(k), apart(v), window=window, causal=causal, padding=padding
    )
    return out.unflatten(0, (-1, dilation)).permute(0, 2, 3, 1, 4).flatten(2, 3)[:, :, :time]


class LongformerAttention(nn.Module):
    """Longformer's attention layer.

    Args:
        dim: Width of the model.
        heads: Heads; they divide the width.
        window: w, the whole width of the window, even (causal: with the token itself).
        causal: Whether nothing sees a later token, global tokens included.
        bias: Whether the projections have biases.

    Raises:
        ValueError: A width that is not a multiple of the heads, a window below 1, or an odd one
            where it has two sides.
    """

    def __init__(
        self, dim: int, heads: int, window: int, *, causal: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        check_heads(dim, heads)
        if check_count("window", window) % 2 and not causal:
            raise ValueError(f"window is {window}; a window with two sides must be even.")
        self.heads, self.window, self.causal = heads, window, causal
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias) for _ in range(4))
        # A trained model's projections are where those of global tokens begin.
        self.query_global, self.key_global, self.value_global = (
            copy.deepcopy(p) for p in (self.query, self.key, self.value)
        )

    def copy_projections(self) -> None:
        """Set the global projections to the present values of the others."""
        for name in ("query", "key", "value"):
            source, target = getattr(self, name), getattr(self, f"{name}_global")
            target.load_state_dict(source.state_dict())

    def forward(
        self,
        hidden: Float[Tensor, "batch time dim"],
        *,
        global_tokens: Bool[Tensor, "batch time"] | Bool[Tensor, " time"] | None = None,
        padding: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time dim"]:
        """Attend.

        Args:
            hidden: Hidden states.
            global_tokens: True at global tokens; each sequence may have other ones.
            padding: True at tokens that are none: nothing sees them, and they gather nothing, so
                that the layer gives them the bias of its last projection.

        Raises:
            ValueError: Masks that are not boolean or do not fit.
        """
        shape = tuple(hidden.shape[:2])
        if global_tokens is not None and global_tokens.ndim == 1:
            global_tokens = global_tokens.expand(shape)
        check_mask("global_tokens", global_tokens, shape)
        check_mask("padding", padding, shape)
        q, k, v = (self._split(p(hidden)) for p in (self.query, self.key, self.value))
        out = local_attention(
            q, k, v, window=self.window, causal=self.causal,
            global_tokens=global_tokens, padding=padding,
        )  # fmt: skip
        if global_tokens is not None:
            real = global_tokens if padding is None else global_tokens & ~padding
            out = self._with_global_rows(hidden, out, real, padding)
        return self.out(out.transpose(1, 2).flatten(2))

    def _with_global_rows(
        self, hidden: Tensor, out: Tensor, chosen: Tensor, padding: Tensor | None
    ) -> Tensor:
        """Outputs with the rows of global tokens replaced: they see all, by their projections."""
        most = int(chosen.sum(1).max()) if chosen.numel() else 0
        if not most:
            return out
        # The places of the global tokens of each sequence; shorter lists end with other tokens.
        places = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        rows = places[..., None].expand(-1, -1, hidden.shape[2])
        q = self._split(self.query_global(hidden.gather(1, rows)))
        k, v = (self._split(p(hidden)) for p in (self.key_global, self.value_global))
        if padding is not None:
            hidden_keys = padding[:, None, None]
            v = v.masked_fill(padding[:, None, :, None], 0)
        else:
            hidden_keys = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=hidden.device)
        if self.causal:
            j = torch.arange(hidden.shape[1], device=hidden.device)
            hidden_keys = hidden_keys | (j > places[..., None])[:, None]
        is_global = chosen.gather(1, places)[:, None, :, None]
        scores = q @ k.mT * q.shape[3] ** -0.5
        # What fills up a list may see nothing; its row is not used.
        scores = scores.masked_fill(hidden_keys & is_global, -torch.inf)
        new = (scores.softmax(-1) @ v).to(out.dtype)
        index = places[:, None, :, None].expand_as(new)
        return out.scatter(2, index, torch.where(is_global, new, out.gather(2, index)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
