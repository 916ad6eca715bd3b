"""Muon against torch.optim.Muon, whose products are rounded to bfloat16."""

import pytest
import torch
from torch import nn

from effnb.core.muon import Muon


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_equals_torch(shape, decay):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = Muon([ours], lr=0.02, weight_decay=decay, dtype=torch.bfloat16)
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=decay)
    for _ in range(5):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    moved = (theirs - start).norm()
    assert moved > 0.1
    # The same operations in the same type; torch divides by the norm after rounding.
    assert (ours - theirs).norm() < 0.01 * moved


def test_float32_differs_from_bfloat16_by_rounding_only():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(32, 32, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a, b = Muon([ours], lr=0.02), torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0)
    ours.grad = torch.randn(32, 32, generator=generator)
    theirs.grad = ours.grad.clone()
    a.step()
    b.step()
    assert (ours - theirs).norm() < 0.05 * (theirs - start).norm()
