"""What is refused, in one sentence and before any work."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def check_dims(dims: Sequence[int], width: int) -> tuple[int, ...]:
    """Prefix lengths that nest: whole, rising, from 1 to the width of the vectors.

    Raises:
        ValueError: When there is none, one is not whole, or they do not nest.
    """
    found = tuple(dims)
    if not found:
        raise ValueError("there are no prefix lengths; give at least one, such as (8, 16, 32).")
    if any(isinstance(m, bool) or not isinstance(m, int) for m in found):
        raise ValueError(f"the prefix lengths are {list(found)}; they must be whole numbers.")
    if any(b <= a for a, b in pairwise(found)):
        raise ValueError(
            f"the prefix lengths {list(found)} do not nest: each must be longer than the one "
            "before it."
        )
    if found[0] < 1 or found[-1] > width:
        raise ValueError(
            f"the prefix lengths {list(found)} do not fit vectors of {width} numbers; they must "
            f"lie between 1 and {width}."
        )
    return found


def check_weights(weights: Sequence[float] | None, dims: Sequence[int]) -> tuple[float, ...]:
    """One weight above or at 0 for each prefix length; 1 for all when None.

    Raises:
        ValueError: When their number differs, or one is negative or not finite.
    """
    found = tuple(float(c) for c in weights) if weights is not None else (1.0,) * len(dims)
    if len(found) != len(dims):
        raise ValueError(
            f"there are {len(found)} weights for {len(dims)} prefix lengths; give one for each."
        )
    if not all(0 <= c < float("inf") for c in found) or not sum(found):
        raise ValueError(
            f"the weights are {list(found)}; they must be finite, not negative, and not all 0."
        )
    return found


def check_vectors(queries: Tensor, documents: Tensor) -> None:
    """Two sets of vectors of one width, finite and not empty.

    Raises:
        ValueError: When they are not.
    """
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1:] != documents.shape[1:]:
        raise ValueError(
            f"queries have shape {tuple(queries.shape)} and documents {tuple(documents.shape)}; "
            "both must be (number, width) with one width."
        )
    if not len(queries) or not len(documents) or not queries.shape[1]:
        raise ValueError("there is nothing to search for or in; give at least one vector of each.")
    if not bool(torch.isfinite(queries).all() and torch.isfinite(documents).all()):
        raise ValueError("a vector has entries that are NaN or infinite.")


def check_count(name: str, count: int, most: int, of: str) -> None:
    """A whole number from 1 to `most`.

    Raises:
        ValueError: When it is not.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        raise ValueError(f"{name} is {count}; it must be a whole number from 1 to {most} ({of}).")
