"""The arithmetic of the mixers: float32, or float64 for such inputs, whatever the layers around do.

States add up over a whole text, so they are never kept or computed in 16 bits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide(x: Tensor) -> torch.dtype:
    """The type that a mixer computes in for such an input."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast, which would compute products in 16 bits, switched off on the tensor's device."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda", "mps") else nullcontext()
