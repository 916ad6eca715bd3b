r"""Causal language modelling (CLM): predict every token from those before it.

$$\mathcal L = -\frac{1}{n - 1} \sum_{t=1}^{n-1} \ln p(x_{t+1} \mid x_{\le t})$$

Every position but the last is asked something. `share` asks a random part of them only, with the
same inputs, the same mask and the same network: what it costs to learn from fewer positions can
then be measured without changing the task.

Radford, Narasimhan, Salimans, Sutskever, "Improving Language Understanding by Generative
Pre-Training", 2018, eq. 1.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from effnb.pretraining.objectives.examples import (
    IGNORED,
    Example,
    causal_visible,
    drawn,
    seen_text,
    text_of,
)


def causal_lm(
    ids: Int[Tensor, "batch time"],
    *,
    mask: Tensor | None = None,
    share: float = 1.0,
    generator: torch.Generator | None = None,
) -> Example:
    r"""Next-token prediction: $\text{labels}_t = x_{t+1}$, and position t sees $x_{\le t}$.

    Args:
        ids: Token ids, (batch, time).
        mask: 1 where a token is text; padding neither asks nor answers. All when None.
        share: Part of the positions that are asked, drawn at random one by one; 1 for all.
        generator: Source of the draws.

    Raises:
        ValueError: Fewer than two tokens of text in a row, a mask of another shape, or a share
            outside (0, 1].

    Source: Radford et al., 2018, eq. 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must lie above 0 and be at most 1.")
    text = text_of(ids, mask, least=2)
    labels = torch.full_like(ids, IGNORED)
    asked = text[:, :-1] & text[:, 1:]
    labels[:, :-1] = torch.where(asked, ids[:, 1:], IGNORED)  # labels_t = x_{t+1}
    if share < 1:
        labels[drawn(ids.shape, generator, ids.device) >= share] = IGNORED
    visible = causal_visible(ids.shape[1], ids.device).expand(len(ids), -1, -1)
    return Example(ids, labels, seen_text(visible, text), int(text.sum()))
