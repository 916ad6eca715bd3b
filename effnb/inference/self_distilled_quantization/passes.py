r"""What a training step costs, counted in passes through the network.

A backward pass takes about two forward passes. Training on labels is one forward and one backward
pass, 3 in all. A teacher adds its forward pass: 4, a third more. The teacher's *answers* can be
kept from an earlier epoch; its attention is too large for that, since it holds a matrix of tokens
by tokens for every head and layer, so self-distillation runs the teacher each time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from effnb.core.training import Loss


def step_passes(*, teacher: bool, teacher_stored: bool = False) -> int:
    """Forward passes that one step is worth: 3, or 4 with a teacher that runs."""
    return 4 if teacher and not teacher_stored else 3


def step_flops(student: nn.Module, loss: Loss, batch: Mapping[str, Tensor]) -> int:
    """Floating-point operations of one training step, counted by torch: forward and backward.

    Matrix products are counted, rounding and norms are not. Gradients are thrown away; the model
    is left as it was.
    """
    kept = [p.grad for p in student.parameters()]
    with (
        torch.enable_grad(),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        loss(student, batch).backward()
    for parameter, gradient in zip(student.parameters(), kept):
        parameter.grad = gradient
    return counter.get_total_flops()


def attention_bytes(layers: int, heads: int, tokens: int, texts: int = 1) -> int:
    r"""Bytes of the attention distributions of some texts in 16 bits: $2 N L H T^2$."""
    return 2 * texts * layers * heads * tokens**2
