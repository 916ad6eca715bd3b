"""What training holds in memory: counted exactly, from the tensors themselves.

Adam keeps a weight, its gradient and two moments for what is trained, and the weight alone for what
is frozen. The backward pass needs activations besides, and those grow with the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ADAM = 2
"""Numbers that Adam keeps for each trained one: the moments m and v."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a step of training holds at its fullest.

    Attributes:
        weights: All parameters.
        gradients: Of what is trained.
        moments: What the optimizer keeps.
        activations: What is saved for the backward pass, beside the parameters themselves.
    """

    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def state(self) -> int:
        """Everything that does not depend on the batch."""
        return self.weights + self.gradients + self.moments

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.activations


def state_bytes(parameters: int, trained: int, number_bytes: int = 4, kept: int = ADAM) -> int:
    r"""$b\,N + (1 + k)\,b\,M$ for $N$ parameters of which $M$ are trained.

    With Adam ($k = 2$) and four bytes a number that is $16 N$ when all are trained and $4 N + 12 M$
    otherwise: at most three quarters less.
    """
    return number_bytes * (parameters + (1 + kept) * trained)


def training_memory(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, kept: int = ADAM
) -> Memory:
    """Count what one step holds, by running its forward pass.

    Every storage that autograd saves counts once, however many tensors share it; those of
    parameters count as weights.

    Args:
        model: The model, ready to be trained; it is not changed.
        loss: From (model, batch) to a scalar.
        batch: The batch.
        kept: Numbers that the optimizer keeps for each trained one: 2 for Adam, 0 for plain SGD.
    """
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            # Held on to, so that its address is not given to another; a tensor with its graph would
            # hold itself, and never be freed.
            saved[storage.data_ptr()] = storage
        return tensor.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        value = loss(model, batch)
    found = sum(storage.nbytes() for storage in saved.values())
    del value
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Memory(weights, trained, kept * trained, found)
