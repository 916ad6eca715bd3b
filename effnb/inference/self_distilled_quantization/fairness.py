r"""How evenly a loss is spread: a compressed model may keep its mean and ruin one group.

For a quality $a_g$ of every group (a language), before and after compression,

$$\text{spread} = \max_g a_g - \min_g a_g, \qquad
  \text{loss}_g = a_g^\text{before} - a_g^\text{after}, \qquad
  \text{gap} = \overline{\text{loss}}_\text{unseen} - \overline{\text{loss}}_\text{seen}.$$

The spread of a fairer model is smaller; a gap above 0 says that groups which were not seen in
fine-tuning pay more. Hooker, Moorosi, Clark, Bengio, Denton, "Characterising Bias in Compressed
Models", 2020, arXiv 2010.03058, ask the question; the numbers here are the plainest ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping


def spread(quality: Mapping[str, float]) -> float:
    r"""$\max_g a_g - \min_g a_g$.

    Raises:
        ValueError: When there is no group, or a number is not finite.
    """
    _check(quality)
    return max(quality.values()) - min(quality.values())


def deviation(quality: Mapping[str, float]) -> float:
    """The standard deviation of the groups' qualities, over all groups (not a sample)."""
    _check(quality)
    mean = sum(quality.values()) / len(quality)
    return math.sqrt(sum((a - mean) ** 2 for a in quality.values()) / len(quality))


def losses(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What every group lost.

    Raises:
        ValueError: When the groups are not the same.
    """
    _check(before)
    _check(after)
    if set(before) != set(after):
        only = sorted(set(before) ^ set(after))
        raise ValueError(f"the group {only[0]} is on one side only; compare the same groups.")
    return {group: before[group] - after[group] for group in before}


def gap(before: Mapping[str, float], after: Mapping[str, float], seen: Iterable[str]) -> float:
    """The mean loss of the groups that were not seen in training minus that of those that were.

    Raises:
        ValueError: When one of the two sides has no group.
    """
    lost, seen = losses(before, after), set(seen)
    ours = [value for group, value in lost.items() if group in seen]
    others = [value for group, value in lost.items() if group not in seen]
    if not ours or not others:
        raise ValueError("both sides need a group: some that were seen, and some that were not.")
    return sum(others) / len(others) - sum(ours) / len(ours)


def _check(quality: Mapping[str, float]) -> None:
    if not quality:
        raise ValueError("there is no group; at least one is needed.")
    bad = next((g for g, a in quality.items() if not math.isfinite(a)), None)
    if bad is not None:
        raise ValueError(f"the quality of {bad} is {quality[bad]}; it must be a finite number.")
