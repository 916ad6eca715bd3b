"""Grids with a step and a minimum: by hand, twice in a row, beside llama.cpp's, and packed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.inference.quantization import (
    MinimumTensor,
    PackedLinear,
    PackedTensor,
    accelerate,
    dequantized,
    fast,
    packed,
    packed_linear,
    quantize,
    quantize_linears,
    quantize_minimum,
)

Q4_1 = GGMLQuantizationType.Q4_1


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_llama_cpp(weight):
    """Through llama.cpp's 4-bit format and back, by the code of its own package."""
    return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), Q4_1), Q4_1))


def on_minima(model, bits, *, group_size):
    grid = partial(quantize_minimum, bits=bits, group_size=group_size)
    return quantize_linears(model, grid)


def test_a_group_by_hand():
    """From 2 to 5 in three steps of 1: nothing is rounded, though 0 is far from every code."""
    w = torch.tensor([[2.0, 5.0, 3.0, 4.0], [-1.0, 0.5, 0.6, 0.4]])
    stored = quantize_minimum(w, 2, group_size="row")
    assert stored.integers().tolist() == [[0, 3, 1, 2], [0, 3, 3, 3]]
    assert stored.minima.flatten().tolist() == [2.0, -1.0]
    s = torch.tensor(1.6 / 3).half()
    assert stored.scales.flatten().tolist() == [1.0, float(s)]
    assert torch.equal(stored.dequantize()[0], w[0])
    torch.testing.assert_close(
        stored.dequantize()[1], torch.tensor([-1.0, 0.6, 0.6, 0.6]), atol=1e-3, rtol=0
    )
    assert (quantize(w, 2).dequantize()[0] - w[0]).abs().max() > 0.3, "with a zero point it is"


def test_q4_1_has_five_bits_and_is_the_default():
    stored = quantize_minimum(randn(8, 64))
    assert stored.bits_per_weight == 5
    assert (stored.bits, stored.group_size) == (4, 32)


def test_beside_llama_cpp():
    """The same grids up to how a step is rounded: at most a few codes in a thousand differ."""
    w = 0.1 * randn(64, 320) + 0.02
    stored, theirs = quantize_minimum(w), by_llama_cpp(w)
    step = stored.scales.float().repeat_interleave(32, 1)
    away = (stored.dequantize() - theirs).abs()
    assert float((away > 0.1 * step).float().mean()) < 5e-3
    assert (away <= 1.1 * step).all()
    ours, rival = (float((x - w).norm()) for x in (stored.dequantize(), theirs))
    assert ours == pytest.approx(rival, rel=2e-3)


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_weights_of_a_file_are_not_rounded_again(size):
    """What llama.cpp stored comes out bit for bit; a grid with a zero point moves it."""
    file = by_llama_cpp(size * (randn(32, 256, seed=1) + 0.4))
    assert torch.equal(quantize_minimum(file).dequantize(), file)
    moved = quantize(file, 4, group_size=32).dequantize() - file
    assert float(moved.norm() / file.norm()) > 0.02


@settings(max_examples=60)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    bits=st.integers(2, 8),
    group=st.sampled_from([1, 7, 32, "row", "tensor"]),
    shift=st.sampled_from([0.0, -3.0, 1000.0]),
    seed=st.integers(0, 99),
)
def test_no_weight_is_further_than_half_a_step(rows, columns, bits, group, shift, seed):
    r"""$|\hat w - w| \le s / 2$, beside what half precision rounds off the minimum and the step."""
    w = randn(rows, columns, seed=seed) + shift
    stored = quantize_minimum(w, bits, group_size=group)
    stored.check()
    again = MinimumTensor.from_parts(stored.describe(), stored.tensors())
    assert torch.equal(again.dequantize(), stored.dequantize())
    assert stored.dequantize().shape == w.shape

    def over(part):
        part = part.float()
        return part if isinstance(group, str) else part.repeat_interleave(group, 1)[:, :columns]

    s, m = over(stored.scales), over(stored.minima)
    top = 2**bits - 1
    bound = s / 2 + 2.0**-11 * (m.abs() + top * s) + 1e-5 * (1 + abs(shift))
    assert ((stored.dequantize() - w).abs() <= bound).all()


def test_a_group_of_one_value_is_exact():
    w = torch.tensor([[0.25] * 32 + [0.0] * 32])
    stored = quantize_minimum(w)
    assert torch.equal(stored.dequantize(), w)
    assert int(stored.integers().max()) == 0 and stored.scales.tolist() == [[1.0, 1.0]]


# --- the kernels --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_the_layout_keeps_the_weights(bits, group):
    """Up to the rounding of steps and offsets to the kernel's type, far below half a step."""
    stored = quantize_minimum(0.1 * randn(72, 160) + 0.1, bits, group_size=group)
    laid_out = PackedTensor.from_quantized(stored)
    laid_out.check()
    assert laid_out.kind == ("int4" if bits <= 4 else "two int4")
    w, read = stored.dequantize(), laid_out.dequantize()
    middle = 8 if bits <= 4 else 136
    s, m = (
        part.float().repeat_interleave(group, 1)[:, :160] for part in (stored.scales, stored.minima)
    )
    t = middle * s + m
    offset = t.abs() if bits <= 4 else 0 * t  # that of two halves is split into two numbers
    if packed.machine().dtype == torch.bfloat16:
        bound = 2.0**-8 * ((w - t).abs() + offset) * 1.01
        assert ((read - w).abs() <= bound).all() and (read - w).abs().max() > 0
    else:
        torch.testing.assert_close(read, w, atol=1e-5, rtol=1e-5)
    for count in (1, 130):
        x = randn(count, 160, seed=count)
        y, expected = packed_linear(x, laid_out), x @ read.T
        assert (y - expected).norm() < 2.0**-6 * expected.norm()


def test_a_file_runs_from_packed_codes(llama, ids):
    """A model that was rounded once loses a tenth, by minima, of what it loses by zero points."""
    once = dequantized(on_minima(llama, 4, group_size=32))
    minima = fast(once, 4, group_size=32, head=False, source=on_minima)
    zeros = fast(once, 4, group_size=32, head=False)
    assert isinstance(minima.model.layers[0].mlp.up_proj, PackedLinear)
    with torch.inference_mode():
        expected = once(ids).logits
        ours, theirs = (float((m(ids).logits - expected).norm()) for m in (minima, zeros))
    assert 10 * ours < theirs


def test_bad_input_is_one_sentence(llama):
    w = randn(4, 64)
    for bad, problem in [
        (lambda: quantize_minimum(w, 9), "bits is 9; the uniform formats have 2 to 8"),
        (lambda: quantize_minimum(w, group_size=0), "group_size is 0; it must be"),
        (lambda: quantize_minimum(w[0]), "only non-empty matrices are quantized"),
        (lambda: quantize_minimum(w / 0), "finite"),
        (lambda: quantize_minimum(w * 1e6), "too large: a step or a minimum does not fit"),
        (lambda: quantize_minimum(-w.abs() - 7e4), "too large: a step or a minimum does not fit"),
    ]:
        with pytest.raises(ValueError, match=problem):
            bad()
    codes, ones = torch.zeros(4, 64), torch.ones(4, 2)
    for change, problem in [
        ({"codes": codes + 16}, "codes must be whole numbers from 0 to 15"),
        ({"codes": codes + 0.5}, "codes must be whole numbers from 0 to 15"),
        ({"scales": ones * 0.1}, "a scale is not a half-precision number"),
        ({"minima": ones * 0.1}, "a minimum is not a half-precision number"),
        ({"scales": ones[:, :1], "minima": ones[:, :1]}, "scales is of torch.float16 and shape"),
    ]:
        parts = {"codes": codes, "scales": ones, "minima": ones} | change
        with pytest.raises(ValueError, match=problem):
            MinimumTensor.from_codes(**parts, bits=4, group_size=32)
    with pytest.raises(ValueError, match="a minimum per row has no kernel; groups of a multiple"):
        PackedTensor.from_quantized(quantize_minimum(w, group_size="row"))
    with pytest.raises(ValueError, match="groups of 16 have no kernel; only multiples of 32"):
        accelerate(on_minima(llama, 4, group_size=16))
