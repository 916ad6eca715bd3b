r"""Masked language modelling (MLM): hide some tokens, and fill them in from both sides.

A part of the positions is chosen (15 % in BERT). Of these, 80 % show a mask token, 10 % a random
token and 10 % what was there, so that no position can be trusted. Only chosen positions give a
loss:

$$\mathcal L = -\frac{1}{|T|} \sum_{t \in T} \ln p(x_t \mid \tilde x), \qquad
\mathbb E |T| = \rho\, n$$

Devlin, Chang, Lee, Toutanova, "BERT", 2018, arXiv 1810.04805, section 3.1. Liu et al., "RoBERTa",
2019, arXiv 1907.11692, section 4.1, draw new positions each time a text is read (dynamic masking);
BERT stored a few fixed maskings (static masking), with ten of which each was seen four times in 40
epochs. Wettig et al., "Should You Mask 15% in Masked Language Modeling?", 2022, arXiv 2202.08005,
mask 40 %.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from effnb.pretraining.objectives.examples import (
    IGNORED,
    Example,
    candidates,
    check_rate,
    drawn,
    full_visible,
    seen_text,
    text_of,
)

MASKED, RANDOM = 0.8, 0.1
"""Of the chosen positions: the part that shows the mask token, and the part with a random one."""


def masked_lm(
    ids: Int[Tensor, "batch time"],
    rate: float = 0.15,
    *,
    mask_token: int,
    vocabulary: int,
    special: Sequence[int] = (),
    mask: Tensor | None = None,
    masked: float = MASKED,
    random: float = RANDOM,
    generator: torch.Generator | None = None,
) -> Example:
    r"""Choose each position with probability $\rho$, corrupt it, and ask what was there.

    Called again with a generator that went on, it masks the same text in another way: that is
    dynamic masking. `static_masking` fixes a few maskings instead.

    Args:
        ids: Token ids, (batch, time).
        rate: $\rho$, the probability that a position is chosen; strictly between 0 and 1.
        mask_token: Id of the mask token.
        vocabulary: Random tokens are drawn from the ids below this number. As in transformers'
            collator they may be special tokens; a vocabulary whose special tokens come last can
            leave them out.
        special: Tokens that are never chosen, such as [CLS] and [SEP].
        mask: 1 where a token is text; padding is never chosen and never seen. All when None.
        masked: Part of the chosen positions that shows the mask token.
        random: Part that shows a random token; the rest is left as it is, and asked all the same.
        generator: Source of the draws.

    Raises:
        ValueError: A rate outside (0, 1), parts that are negative or add up to more than 1, an
            empty vocabulary, or ids and a mask that do not fit.

    Source: Devlin et al., 2018, section 3.1 and appendix A.1; Liu et al., 2019, section 4.1.
    """
    check_rate(rate)
    if masked < 0 or random < 0 or masked + random > 1:
        raise ValueError(
            f"masked is {masked} and random is {random}; neither may be negative, and together "
            "they are at most 1."
        )
    if vocabulary < 1:
        raise ValueError(f"vocabulary is {vocabulary}; random tokens need at least 1 to draw from.")
    text = text_of(ids, mask)
    allowed = candidates(ids, text, special)
    chosen = (drawn(ids.shape, generator, ids.device) < rate) & allowed  # P(t in T) = rho
    fate = drawn(ids.shape, generator, ids.device)
    words = (drawn(ids.shape, generator, ids.device) * vocabulary).long().clamp(max=vocabulary - 1)
    inputs = torch.where(chosen & (fate < masked), mask_token, ids)  # 80 %: the mask token
    random_places = chosen & (fate >= masked) & (fate < masked + random)
    inputs = torch.where(random_places, words.to(ids.dtype), inputs)  # 10 %: any token
    labels = torch.where(chosen, ids, IGNORED)  # the other 10 % show x_t, and are asked
    visible = full_visible(ids.shape[1], ids.device).expand(len(ids), -1, -1)
    return Example(inputs, labels, seen_text(visible, text), int(text.sum()))


def static_masking(
    ids: Int[Tensor, "batch time"],
    copies: int = 10,
    rate: float = 0.15,
    *,
    seed: int = 0,
    **settings: object,
) -> list[Example]:
    """A few fixed maskings of a text, made once and read again in every epoch.

    Args:
        ids: Token ids, (batch, time).
        copies: Number of maskings; BERT had 10, and read each four times in 40 epochs.
        rate: Probability that a position is chosen.
        seed: Seed of all of them.
        **settings: The other arguments of `masked_lm`, without the generator.

    Raises:
        ValueError: Fewer than one copy, and what `masked_lm` refuses.

    Source: Devlin et al., 2018; named static masking by Liu et al., 2019, section 4.1.
    """
    if copies < 1:
        raise ValueError(f"copies is {copies}; at least one masking is needed.")
    draws = torch.Generator().manual_seed(seed)
    return [masked_lm(ids, rate, generator=draws, **settings) for _ in range(copies)]
