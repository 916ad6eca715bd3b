r"""How far is one text from another? Losses in [0, 1] that a calibration can bound.

Textual consistency compares the early text with the full model's and needs no reference. Risk
consistency compares how much worse the early text is against a reference.

Schuster et al., 2022, arXiv 2207.07061, section 2.1 (eq. 2 and 3); ROUGE-L: Lin, 2004.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

Tokens = Sequence[Hashable]


def token_f1(found: Tokens, wanted: Tokens) -> float:
    r"""$2 |A \cap B| / (|A| + |B|)$ over tokens counted with their repetitions; 1 if both empty."""
    if not found and not wanted:
        return 1.0
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def rouge_l(found: Tokens, wanted: Tokens) -> float:
    """F1 of the longest common subsequence; 1 if both are empty."""
    if not found and not wanted:
        return 1.0
    row = [0] * (len(wanted) + 1)
    for a in found:
        diagonal = 0
        for j, b in enumerate(wanted, 1):
            above = row[j]
            row[j] = diagonal + 1 if a == b else max(row[j], row[j - 1])
            diagonal = above
    return 2 * row[-1] / (len(found) + len(wanted))


def textual_distance(
    early: Tokens, full: Tokens, likeness: Callable[[Tokens, Tokens], float] = rouge_l
) -> float:
    r"""$D(Y_{early}, Y_{full}) = 1 - \operatorname{likeness}$: eq. 2 of CALM bounds its mean."""
    return 1.0 - likeness(early, full)


def risk_difference(
    early: Tokens,
    full: Tokens,
    reference: Tokens,
    likeness: Callable[[Tokens, Tokens], float] = rouge_l,
) -> float:
    r"""$\max(0, R(Y_{early}) - R(Y_{full}))$ against a reference, eq. 3 of CALM, kept in [0, 1]."""
    worse = textual_distance(early, reference, likeness) - textual_distance(
        full, reference, likeness
    )
    return min(1.0, max(0.0, worse))
