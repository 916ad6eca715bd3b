"""GPTQ and AWQ against torchao's prototypes of both.

torchao runs GPTQ on CUDA only and takes its four-bit grid from a library of CUDA kernels. Here its
own source runs on the CPU: the two lines that ask for CUDA are taken out, and the grid is handed to
it. What is compared is the whole recursion: damping, dead inputs, the order of updates, blocks, and
grids that follow the current weights. llm-awq's and GPTQ's first repositories are no packages.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from effnb.inference.quantization.awq import awq_scales
from effnb.inference.quantization.clipping import choose_grid
from effnb.inference.quantization.gptq import gptq_weight

ASKS_FOR_CUDA = (
    'assert device.type == "cuda", "GPTQ only supports CUDA currently"',
    "torch.cuda.synchronize()",
)


def torchao_gptq():
    """torchao's `gptq_quantize`, and the dictionary in which it leaves the codes."""
    from torchao.prototype.gptq import api

    source = inspect.getsource(api.gptq_quantize)
    for line in ASKS_FOR_CUDA:
        assert source.count(line) == 1, "torchao has changed; look at its source again"
        source = source.replace(line, "pass")
    kept = {}

    def grid(values, group_size):
        """Our grid as torchao writes it: the value of the code 8 instead of the code of 0."""
        scale, zero = choose_grid(values, 4, symmetric=False)
        return None, scale[None], ((8 - zero) * scale)[None]

    def keep(codes):
        return kept.setdefault("codes", codes)

    names = dict(vars(api)) | {"int4_row_quantize_zp": grid, "pack_int4": keep}
    exec(source, names)
    return names["gptq_quantize"], kept


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
    from torchao.quantization import Int4WeightOnlyConfig

    weight, x = layer()
    x[:, 7] = 0
    hessian = 2 / len(x) * x.T @ x
    quantize, kept = torchao_gptq()
    setting = SimpleNamespace(
        gptq_quantize_block_size=block_size,
        percdamp=0.01,
        base_config=Int4WeightOnlyConfig(group_size=group_size),
    )
    expected = quantize(hessian.clone(), weight.clone(), setting)
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
