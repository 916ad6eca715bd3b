"""Rounding that is trained through, against PyTorch's own operators and torchao's."""

import pytest
import torch
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

from effnb.inference.quantization.estimators import (
    LearnedGrid,
    RangeGrid,
    TokenGrid,
    lsq_quantize,
    quantize_ste,
)
from effnb.inference.quantization.grid import Grid


def run(function, *tensors, upstream):
    """A result, and the gradients of the tensors that want one."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    out.backward(upstream)
    return out.detach(), [t.grad for t in leaves]


@pytest.mark.parametrize(("low", "high", "zero"), [(-128, 127, 0), (0, 15, 5), (-4, 3, 0)])
def test_ste_is_torch_fake_quantize_per_tensor(low, high, zero):
    """Equal, values and gradients, numbers outside the grid included."""
    torch.manual_seed(0)
    scale = 2.0**-4  # a power of two, so that dividing and multiplying by its inverse are the same
    x = torch.randn(2000) * scale * (high - low)
    upstream = torch.randn(2000)
    ours, (grad,) = run(
        lambda t: quantize_ste(t, torch.tensor(scale), zero, low, high), x, upstream=upstream
    )
    theirs, (expected,) = run(
        lambda t: torch.fake_quantize_per_tensor_affine(t, scale, zero, low, high),
        x,
        upstream=upstream,
    )
    assert torch.equal(ours, theirs) and torch.equal(grad, expected)
    assert 0.05 < float((grad == 0).float().mean()) < 0.95


def test_ste_is_torch_fake_quantize_per_channel():
    torch.manual_seed(1)
    scales, zeros = 2.0 ** -torch.arange(1.0, 7), torch.arange(6, dtype=torch.int32)
    x, upstream = torch.randn(6, 300) * 3, torch.randn(6, 300)
    ours, (grad,) = run(
        lambda t: quantize_ste(t, scales[:, None], zeros[:, None], 0, 15), x, upstream=upstream
    )
    theirs, (expected,) = run(
        lambda t: torch.fake_quantize_per_channel_affine(t, scales, zeros, 0, 0, 15),
        x,
        upstream=upstream,
    )
    assert torch.equal(ours, theirs) and torch.equal(grad, expected)


def away_from_the_ends(x, step, low, high):
    """PyTorch cuts off where the rounded code leaves the grid, the paper half a step before."""
    ratio = x / step
    near = ((ratio > high) & (ratio < high + 0.6)) | ((ratio < low) & (ratio > low - 0.6))
    return torch.where(near, step * 1.3 * (1 if high > 1 else -1), x)


@pytest.mark.parametrize(("low", "high"), [(-8, 7), (0, 15), (-2, 1)])
def test_lsq_is_torchs_learnable_fake_quantize_per_tensor(low, high):
    """Values equal; gradients for numbers and step to 1e-5."""
    torch.manual_seed(2)
    step = torch.tensor([0.25])
    x = away_from_the_ends(torch.randn(1000) * 0.25 * (high - low), step, low, high)
    upstream, g = torch.randn(1000), 0.37
    ours, grads = run(lambda t, s: lsq_quantize(t, s, low, high, g), x, step, upstream=upstream)
    theirs, expected = run(
        lambda t, s: torch._fake_quantize_learnable_per_tensor_affine(
            t, s, torch.zeros(1), low, high, g
        ),
        x,
        step,
        upstream=upstream,
    )
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(grads[0], expected[0])
    torch.testing.assert_close(grads[1], expected[1], rtol=1e-5, atol=1e-5)


def test_a_learned_grid_is_torchs_learnable_fake_quantize_per_channel():
    """A step for each row, half-precision steps as both start from; gradients to 1e-4."""
    torch.manual_seed(3)
    weight = torch.randn(5, 40)
    grid = LearnedGrid.of_weight(weight, 4, "row")
    with torch.no_grad():
        grid.step.copy_(grid.step.half().float())
    step = grid.step.detach().clone()
    weight = away_from_the_ends(weight, step[:, None], -8, 7)
    upstream = torch.randn(5, 40)
    ours, (grad,) = run(grid, weight, upstream=upstream)
    theirs, expected = run(
        lambda t, s: torch._fake_quantize_learnable_per_channel_affine(
            t, s, torch.zeros(5), 0, -8, 7, (40 * 7) ** -0.5
        ),
        weight,
        step,
        upstream=upstream,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grid.step.grad, expected[1], rtol=1e-4, atol=1e-5)


def torchao_weights(dtype, group_size):
    where = PerAxis(0) if group_size == "row" else PerGroup(group_size)
    return IntxFakeQuantizer(IntxFakeQuantizeConfig(dtype, where, is_symmetric=True))


@pytest.mark.parametrize("group_size", ["row", 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_torchaos_grid(group_size, bits):
    """On the scales that torchao chose, values and gradients agree to 1e-5.

    Its largest number lies half way between two codes, where the last bit decides: not compared.
    """
    torch.manual_seed(4)
    weight, upstream = torch.randn(6, 64), torch.randn(6, 64)
    theirs_of = torchao_weights(torch.int8 if bits == 8 else torch.int4, group_size)
    theirs, (expected,) = run(theirs_of, weight, upstream=upstream)
    size = 64 if group_size == "row" else group_size
    scales = theirs_of.scale.detach().view(6, -1).repeat_interleave(size, 1)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ours, (grad,) = run(lambda t: quantize_ste(t, scales, 0, low, high), weight, upstream=upstream)
    clear = ((weight / scales).frac().abs() - 0.5).abs() > 1e-4
    assert int((~clear).sum()) <= 6 * 64 // size
    torch.testing.assert_close(ours[clear], theirs[clear], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad[clear], expected[clear], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group_size", ["row", 16])
def test_a_grid_from_the_range_differs_from_torchaos_by_its_spare_code(group_size):
    """At 8 bits: 127 steps to the largest number here, 127.5 there; both within half a step."""
    torch.manual_seed(5)
    weight = torch.randn(6, 64)
    ours = RangeGrid(Grid(8, group_size, True))(weight)
    theirs = torchao_weights(torch.int8, group_size)(weight)
    step = float(weight.abs().max()) / 127
    assert float((ours - theirs).abs().max()) <= 1.1 * step
    assert float((ours - weight).abs().mean()) == pytest.approx(
        float((theirs - weight).abs().mean()), rel=0.1
    )


def test_tokens_round_as_torch_does():
    """Per-token absmax: the same as torch's per-channel operator with a token in each row."""
    torch.manual_seed(6)
    x, upstream = torch.randn(7, 33) * 10, torch.randn(7, 33)
    scales = x.abs().amax(1) / 127
    ours, (grad,) = run(TokenGrid(8), x, upstream=upstream)
    theirs, (expected,) = run(
        lambda t: torch.fake_quantize_per_channel_affine(
            t, scales, torch.zeros(7, dtype=torch.int32), 0, -127, 127
        ),
        x,
        upstream=upstream,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(grad, expected)
