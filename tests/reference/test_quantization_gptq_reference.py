"""GPTQ and AWQ against torchao's prototypes of both.

torchao runs GPTQ on CUDA only; tests/shared/torchao_gptq.py lets its own source run on the CPU.
What is compared is the whole recursion: damping, dead inputs, the order of updates, blocks, and
grids that follow the current weights. llm-awq's and GPTQ's first repositories are no packages.
"""

from __future__ import annotations

import pytest
import torch
from torchao_gptq import torchao_gptq

from effnb.inference.quantization.awq import awq_scales
from effnb.inference.quantization.gptq import gptq_weight


def layer(rows=40, columns=192, tokens=500):
    """A weight and correlated inputs of different strength."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(20, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator)
    x = x + torch.randn(tokens, 20, generator=generator) @ shared
    return torch.randn(rows, columns, generator=generator), x * torch.linspace(0.2, 3, columns)


@pytest.mark.parametrize(("group_size", "block_size"), [(32, 64), (32, 256), (64, 64), (128, 128)])
def test_gptq_gives_torchao_s_codes(group_size, block_size):
    """Codes and scales are equal (torchao cuts groups at blocks, so blocks hold whole groups)."""
    weight, x = layer()
    x[:, 7] = 0
    hessian = 2 / len(x) * x.T @ x
    quantize, kept = torchao_gptq(group_size, block_size)
    expected = quantize(weight, hessian)
    found = gptq_weight(weight, hessian, 4, group_size=group_size)
    torch.testing.assert_close(found.scales.float(), expected.scale.T, rtol=2e-3, atol=0)
    # float32 against float64 in the factorization: a number half way between two codes may tip.
    assert float((found.integers() - 8 == kept["codes"]).float().mean()) > 0.998


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 64])
def test_awq_finds_torchao_s_scales(bits, group_size):
    """The search over exponents by the layer's own output: the same scales to 1e-5.

    (torchao searches with scales in float32, we with the half-precision ones that are stored. At
    eight bits that is a share of the error, and the best exponent may be the next one.)
    """
    from torchao.prototype.awq.core import AWQObserver
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup

    weight, x = layer(48, 192, 300)
    x[:, ::40] *= 8
    setting = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group_size),
        mapping_type=MappingType.ASYMMETRIC,
    )
    observer = AWQObserver(weight, None, setting)
    for part in x.split(100):
        observer(part, None)
    found = awq_scales(weight, x, bits, group_size=group_size)
    assert 0 < found.exponent < 0.95
    torch.testing.assert_close(found.scales, observer.calculate_qparams(), rtol=1e-5, atol=1e-6)
