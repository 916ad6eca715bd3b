"""What the models of this package refuse before they run."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor


def check_ids(
    ids: Tensor, vocabulary: int, mask: Tensor | None
) -> Bool[Tensor, "batch time"] | None:
    """Refuse ids that are none; the mask as booleans, or None where it hides nothing.

    Raises:
        ValueError: Ids of another shape, type or range; a mask of another shape, or one that leaves
            no text in a row.
    """
    if ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
        raise ValueError(
            f"the ids are of shape {tuple(ids.shape)} and {ids.dtype}; they must be whole numbers "
            "of shape (batch, time), at least one of them."
        )
    low, high = int(ids.min()), int(ids.max())
    if not 0 <= low <= high < vocabulary:
        raise ValueError(
            f"the ids reach from {low} to {high}; the model has the tokens 0 to {vocabulary - 1}."
        )
    if mask is None:
        return None
    if mask.shape != ids.shape:
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}; it must have the ids' {tuple(ids.shape)}."
        )
    mask = mask.to(ids.device).bool()
    if not bool(mask.any(1).all()):
        raise ValueError("a row of the mask has no text; every row needs at least one token.")
    return None if bool(mask.all()) else mask
