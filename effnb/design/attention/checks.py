"""What every form of attention refuses before it starts: shapes and numbers that fit nothing."""

from __future__ import annotations

import operator

import torch
from torch import Tensor


def check_count(name: str, value: int, *, least: int = 1) -> int:
    """A whole number that is large enough, as Python's own.

    Raises:
        TypeError: When it is not a whole number.
        ValueError: When it is below `least`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be a whole number.") from None
    if number < least:
        raise ValueError(f"{name} is {number}; it must be at least {least}.")
    return number


def check_heads(dim: int, heads: int) -> None:
    """Refuse a width that heads do not divide.

    Raises:
        ValueError: The sentence has both numbers.
    """
    if check_count("dim", dim) % check_count("heads", heads):
        raise ValueError(f"dim is {dim}; it must be a multiple of the number of heads, {heads}.")


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, same_length: bool = False
) -> None:
    """Refuse queries, keys and values that no attention takes.

    Args:
        q: Queries, (batch, heads, queries, dim).
        k: Keys, (batch, heads, keys, dim).
        v: Values, (batch, heads, keys, value dim).
        causal: Whether the queries are the last tokens of those that the keys belong to.
        same_length: Whether there must be one query for each key.

    Raises:
        ValueError: Shapes that do not fit each other, or types that differ.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"the shapes are {shapes}; each must be (batch, heads, time, dim).")
    if not (q.shape[:2] == k.shape[:2] == v.shape[:2]) or k.shape[2] != v.shape[2]:
        raise ValueError(
            f"the shapes are {shapes}; batch and heads must agree, and every key needs a value."
        )
    if q.shape[3] != k.shape[3] or not q.shape[3]:
        raise ValueError(f"the shapes are {shapes}; queries and keys must have one width, above 0.")
    if same_length and q.shape[2] != k.shape[2]:
        raise ValueError(f"the shapes are {shapes}; there must be one query for each key.")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(
            f"the shapes are {shapes}; causal queries are the last of the tokens that have keys, "
            "so there cannot be more of them."
        )
    kinds = sorted({str(x.dtype).removeprefix("torch.") for x in (q, k, v)})
    if len(kinds) > 1 or not q.is_floating_point():
        raise ValueError(f"q, k and v are of {', '.join(kinds)}; they must be of one float type.")


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse a mask that is not boolean, or not of the expected shape.

    Raises:
        ValueError: The sentence has the shape or type found, and the one allowed.
    """
    if mask is None:
        return
    if mask.dtype != torch.bool:
        kind = str(mask.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is of {kind}; it must be bool, True at such tokens.")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; it must be {tuple(shape)}.")


def wide(x: Tensor) -> torch.dtype:
    """The type in which sums are taken: float64 if the tensor has it, and float32 otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
