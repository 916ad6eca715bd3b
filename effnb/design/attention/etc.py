r"""ETC: a short global input beside a long one, and attention that knows structure.

The text is a *long* input of $n_l$ tokens that see each other up to a distance $r$. Beside it comes
a *global* input of $n_g$ tokens, for example one for each sentence, that see everything and that
everything sees. Four pieces, global to global, global to long, long to global, and long to long:

$$n_g (n_g + n_l) + n_l (n_g + 2r + 1) \text{ pairs.}$$

Pairs carry *labels*: within an input the distance, clipped at $\pm c$, so $2c + 1$ of them; between
the inputs whether a token belongs to a global token's part of the text. A label is a learned vector
that is added to the key, $\text{score} = q_i \cdot (k_j + a_{l(i, j)}) / \sqrt d$. That is how the
structure of a text (sentences, fields, links) enters the model.

Long tokens are computed by blocks of $r$: a block meets itself and its neighbours.

Ainslie, Ontanon, Alberti, Cvicek, Fisher, Pham, Ravula, Sanghai, Wang, Yang, "ETC: Encoding Long
and Structured Inputs in Transformers", 2020, arXiv 2004.08483. Their pre-training objective is not
part of this module.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnb.design.attention.checks import check_count, check_heads, check_mask
from effnb.kernels.local_attention import local_attention


def etc_pairs(global_count: int, long_count: int, radius: int) -> int:
    """$n_g (n_g + n_l) + n_l (n_g + 2r + 1)$, the window counted whole at both ends of the text."""
    return global_count * (global_count + long_count) + long_count * (global_count + 2 * radius + 1)


class EtcAttention(nn.Module):
    """Attention over a global and a long input.

    Args:
        dim: Width of the model.
        heads: Heads; they divide the width.
        radius: r, how far long tokens see each other.
        clip: c, the largest distance with a label of its own; 0 is without labels. Then pairs are
            those of a window with global tokens, and run through `effnb.kernels.local_attention`.
        separate: Whether the global input has projections of its own.

    Raises:
        ValueError: A width that is not a multiple of the heads, a radius below 1, or a negative
            clip.
    """

    def __init__(
        self, dim: int, heads: int, radius: int, *, clip: int = 8, separate: bool = True
    ) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads, self.radius = heads, check_count("radius", radius)
        self.clip = check_count("clip", clip, least=0)
        self.long = nn.ModuleList(nn.Linear(dim, dim) for _ in range(4))  # q, k, v, o
        if separate:
            self.globals = nn.ModuleList(nn.Linear(dim, dim) for _ in range(4))
        else:
            self.globals = self.long
        if clip:
            # Distances -c .. c; then: another part of the text, the same part.
            labels = torch.randn(heads, 2 * clip + 3, dim // heads) * 0.02
            self.labels = nn.Parameter(labels)

    def forward(
        self,
        long: Float[Tensor, "batch long dim"],
        global_input: Float[Tensor, "batch global dim"],
        *,
        part: Int[Tensor, "batch long"] | None = None,
        padding: Bool[Tensor, "batch long"] | None = None,
    ) -> tuple[Float[Tensor, "batch long dim"], Float[Tensor, "batch global dim"]]:
        """Attend.

        Args:
            long: The text.
            global_input: The global tokens, without padding.
            part: The global token to whose part of the text each token belongs; -1 for none.
                Without it no pair of the two inputs is labelled as belonging together.
            padding: True at long tokens that are none: nothing sees them, and they gather nothing.

        Raises:
            ValueError: Parts without labels, or that are not global tokens; masks or inputs that do
                not fit each other; or neither a global nor a long token.
        """
        batch, n, _ = long.shape
        g = global_input.shape[1]
        if not n or not g:
            raise ValueError(f"there are {g} global and {n} long tokens; each input needs one.")
        check_mask("padding", padding, (batch, n))
        if part is not None:
            if not self.clip:
                raise ValueError("without labels (clip is 0), parts of the text cannot be told.")
            if tuple(part.shape) != (batch, n) or not bool(((part >= -1) & (part < g)).all()):
                raise ValueError(
                    f"part must have shape {(batch, n)} and name one of the {g} global tokens, or "
                    "-1 for none."
                )
        (ql, kl, vl), (qg, kg, vg) = (
            [self._split(p(x)) for p in three[:3]]
            for three, x in ((self.long, long), (self.globals, global_input))
        )
        if padding is not None:
            kl, vl = (x.masked_fill(padding[:, None, :, None], 0) for x in (kl, vl))
        if self.clip:
            out_long = self._long_rows(ql, kl, vl, kg, vg, part, padding)
            out_global = self._global_rows(qg, kg, vg, kl, vl, part, padding)
        else:
            out_global, out_long = self._through_kernel(
                *(torch.cat(pair, 2) for pair in ((qg, ql), (kg, kl), (vg, vl))), g, padding
            )
        return tuple(
            three[3](out.transpose(1, 2).flatten(2))
            for three, out in ((self.long, out_long), (self.globals, out_global))
        )

    def _through_kernel(self, q, k, v, count, padding):
        """Without labels: a window with global tokens, which come first."""
        is_global = torch.arange(q.shape[2], device=q.device) < count
        if padding is not None:
            padding = nn.functional.pad(padding, (count, 0), value=False)
        out = local_attention(
            q, k, v, window=2 * self.radius, global_tokens=is_global, padding=padding
        )
        return out[:, :, :count], out[:, :, count:]

    def _distance_scores(self, q: Tensor, distances: Tensor) -> Tensor:
        r"""$q_i \cdot a_{l}$ of distances j - i, (..., queries, keys), for q (..., queries, d)."""
        labels = self.labels[:, : 2 * self.clip + 1]
        each = torch.einsum("bh...d,hld->bh...l", q, labels)
        index = distances.clamp(-self.clip, self.clip) + self.clip
        return each.gather(-1, index.expand(*each.shape[:-1], index.shape[-1]))

    def _part_scores(self, q: Tensor, same: Tensor) -> Tensor:
        """The same between the inputs, by whether a token belongs to the global token's part."""
        other, own = torch.einsum("bhid,hld->lbhi", q, self.labels[:, -2:])
        return torch.where(same, own[..., None], other[..., None])

    def _same(self, part: Tensor | None, g: int, long: Tensor) -> Tensor:
        """Which long token (rows) belongs to which global token (columns)."""
        if part is None:
            return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=long.device)
        return (part[..., None] == torch.arange(g, device=long.device))[:, None]

    def _global_rows(self, q, kg, vg, kl, vl, part, padding):
        """Global to global and global to long, in one softmax."""
        g = q.shape[2]
        i = torch.arange(g, device=q.device)
        to_global = q @ kg.mT + self._distance_scores(q, i - i[:, None])
        to_long = q @ kl.mT + self._part_scores(q, self._same(part, g, q).mT)
        if padding is not None:
            to_long = to_long.masked_fill(padding[:, None, None], -torch.inf)
        scores = torch.cat([to_global, to_long], -1) / q.shape[3] ** 0.5
        return scores.softmax(-1) @ torch.cat([vg, vl], 2)

    def _long_rows(self, q, k, v, kg, vg, part, padding):
        """Long to global and long to long, in one softmax; blocks of r meet three blocks of r."""
        n, r = q.shape[2], self.radius
        blocks = -(-n // r)
        extra = blocks * r - n
        unseen = (
            torch.zeros(1, n, dtype=torch.bool, device=q.device) if padding is None else padding
        )
        # Behind the end, and before the beginning, lies padding.
        unseen = nn.functional.pad(unseen, (r, extra + r), value=True).unfold(1, 3 * r, r)

        def three(x):  # (batch, heads, n, d) -> (batch, heads, blocks, 3 r, d)
            return nn.functional.pad(x, (0, 0, r, extra + r)).unfold(2, 3 * r, r).mT

        queries = nn.functional.pad(q, (0, 0, 0, extra)).unflatten(2, (blocks, r))
        distances = torch.arange(3 * r, device=q.device) - r
        distances = distances - torch.arange(r, device=q.device)[:, None]  # j - i
        near = queries @ three(k).mT + self._distance_scores(queries, distances)
        hidden = unseen[:, None, :, None] | (distances.abs() > r)
        near = near.masked_fill(hidden, -torch.inf)
        far = q @ kg.mT + self._part_scores(q, self._same(part, kg.shape[2], q))
        far = nn.functional.pad(far, (0, 0, 0, extra)).unflatten(2, (blocks, r))
        weights = (torch.cat([far, near], -1) / q.shape[3] ** 0.5).softmax(-1)
        far, near = weights.split([kg.shape[2], 3 * r], -1)
        out = (far @ vg[:, :, None] + near @ three(v)).flatten(2, 3)[:, :, :n]
        return out if padding is None else out.masked_fill(padding[:, None, :, None], 0)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
