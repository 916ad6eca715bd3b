"""What every method refuses before it starts: weights that are absent, numbers without meaning."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_loaded(model: nn.Module) -> None:
    """Refuse a model whose weights are on the meta device, which holds shapes and no numbers.

    Libraries that offload weights to the CPU or to a disk leave such shells in the model and fill
    them while a layer runs; a model can also have been built without ever loading its weights.

    Raises:
        ValueError: When a parameter or buffer is on the meta device; the sentence names it.
    """
    for kind in (model.named_parameters(), model.named_buffers()):
        for name, tensor in kind:
            if tensor.is_meta:
                raise ValueError(
                    f"{name} is on the meta device, without numbers (offloaded, or never loaded); "
                    "load the whole model onto a device first."
                )


def check_finite(values: Tensor, what: str = "the weight", purpose: str = "used") -> None:
    """Refuse numbers that are NaN or infinite.

    Args:
        values: Any tensor.
        what: How the sentence calls it.
        purpose: What is to be done with it, as a participle.

    Raises:
        ValueError: When an entry is not a finite number, or the tensor is on the meta device.
    """
    if values.is_meta:
        raise ValueError(f"{what} is on the meta device, without numbers; load it first.")
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(
            f"{what} has {bad} entries that are NaN or infinite; only finite numbers can be "
            f"{purpose}."
        )
