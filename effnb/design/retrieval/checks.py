"""What is refused, in one sentence and before any work."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_share(name: str, value: float) -> float:
    """A number from 0 to 1.

    Raises:
        ValueError: When it lies outside, or is no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it is a share, and must lie between 0 and 1.")
    return float(value)


def check_positive(name: str, value: float) -> float:
    """A finite number above 0.

    Raises:
        ValueError: When it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be a finite number above 0.")
    return float(value)


def check_count(
    name: str, value: int, most: int | None = None, of: str = "", least: int = 1
) -> int:
    """A whole number from `least` to `most`.

    Raises:
        ValueError: When it is not.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(
            f"{name} is {value}; it must be a whole number {limits}{f' ({of})' if of else ''}."
        )
    return value


def check_keys(keys: Tensor, values: Tensor, documents: Tensor) -> None:
    """Keys (entries, width), one value and one document each; finite, not empty.

    Raises:
        ValueError: When they are not.
    """
    if keys.ndim != 2 or values.ndim != 1 or values.shape != documents.shape:
        raise ValueError(
            f"keys have shape {tuple(keys.shape)}, values {tuple(values.shape)} and documents "
            f"{tuple(documents.shape)}; keys must be (entries, width), the others (entries,)."
        )
    if len(keys) != len(values):
        raise ValueError(f"there are {len(keys)} keys and {len(values)} values; give one for each.")
    if not keys.numel():
        raise ValueError("the datastore is empty; give it at least one key and its value.")
    if not bool(torch.isfinite(keys).all()):
        raise ValueError("a key has entries that are NaN or infinite.")


def check_queries(queries: Tensor, width: int) -> None:
    """Queries (number, width), finite.

    Raises:
        ValueError: When they are not.
    """
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(
            f"queries have shape {tuple(queries.shape)}; they must be (number, {width}), as wide "
            "as the datastore's keys."
        )
    if not bool(torch.isfinite(queries).all()):
        raise ValueError("a query has entries that are NaN or infinite.")


def check_ids(ids: Tensor) -> None:
    """Tokens of shape (batch, time), with at least one.

    Raises:
        ValueError: When they are not.
    """
    if ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
        raise ValueError(
            f"the tokens have shape {tuple(ids.shape)} and type {ids.dtype}; they must be whole "
            "numbers of shape (batch, time), at least one."
        )
