"""8-bit products: exact sums, the error of rounding, gradients, and the kernels against them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.kernels import int8_matmul as module
from effnb.kernels.int8_matmul import int8_matmul, int8_matmul_reference, quantize_rows


def weights(proof, outputs, inputs, seed=7):
    codes, scale = quantize_rows(proof.tensor(outputs, inputs, seed=seed))
    return codes, scale


# ---------------------------------------------------------------- the definition


def test_by_hand():
    x = torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0]])
    codes, scale = quantize_rows(x)
    assert codes.tolist() == [[127, -64, 32], [0, 0, 0]]  # 63.5 is rounded to the even number
    torch.testing.assert_close(scale, torch.tensor([1 / 127, 0.0]))
    weight = torch.tensor([[127, 0, 0], [0, 1, 1]], dtype=torch.int8)
    y = int8_matmul(x, weight, torch.tensor([2.0, 0.5]), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(y, torch.tensor([[2 * 127.0, 1 - 0.5 * 32 / 127], [0.0, 1.0]]))


def test_sums_are_those_of_64_bits():
    """Bit for bit, at the largest numbers there are."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (n, 5000), generator=generator) for n in (33, 18))
    a[0], b[0] = 127, -127
    found = module._product(a.to(torch.int8), b.to(torch.int8))
    assert torch.equal(found.long(), a @ b.T)


def test_sums_are_those_of_torchs_own_product():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=generator)
    codes, scale = quantize_rows(torch.randn(24, 64, generator=generator))
    mine, s = quantize_rows(x)
    expected = torch._int_mm(mine, codes.T).float() * s[:, None] * scale
    torch.testing.assert_close(int8_matmul(x, codes, scale), expected, rtol=1e-6, atol=1e-6)


def test_the_error_is_that_of_rounding_and_an_outlier_makes_it_large():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 512, generator=generator), torch.randn(32, 512, generator=generator)
    codes, scale = quantize_rows(w)

    def error(x):
        exact = x @ w.T
        return float((int8_matmul(x, codes, scale) - exact).norm() / exact.norm())

    assert error(x) < 0.015
    loud = x.clone()
    loud[:, 3] *= 50
    w[:, 3] = 0  # what is loud does not even count
    codes, scale = quantize_rows(w)
    assert error(loud) > 5 * error(x)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_with_a_nan_is_nan_and_the_others_are_not(proof, backend):
    x = proof.tensor(4, 32)
    x[1, 5], x[3, 7] = torch.nan, torch.inf
    y = int8_matmul(x, *weights(proof, 6, 32), backend=backend)
    assert y.isnan().all(1).tolist() == [False, True, False, True]
    assert y.isfinite().all(1).tolist() == [True, False, True, False]


def test_the_gradient_passes_through_the_rounding(proof):
    codes, scale = weights(proof, 6, 10)
    x, bias = proof.tensor(2, 3, 10, grad=True), proof.tensor(6, grad=True)
    g = proof.tensor(2, 3, 6, seed=4)
    dx, db = torch.autograd.grad(int8_matmul(x, codes, scale, bias), (x, bias), g)
    torch.testing.assert_close(dx, g @ (codes.float() * scale[:, None]))
    torch.testing.assert_close(db, g.sum((0, 1)))
    assert torch.autograd.grad(int8_matmul(x, codes, scale).sum(), x)[0].shape == x.shape


# ---------------------------------------------------------------- the kernels


def kernel(proof, codes, scale):
    def ours(x, *bias):
        held = proof.guarded(codes), proof.guarded(scale)
        return int8_matmul(x, *held, *bias, backend=proof.kernel)

    def definition(x, *bias):
        return int8_matmul_reference(x, codes, scale, *bias)

    return ours, definition


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "layout"),
    [
        (1, 8, 256, "contiguous"),
        (3, 70, 300, "transposed"),
        (40, 5, 33, "strided"),
        (70, 130, 260, "contiguous"),
    ],
)
def test_kernel(proof, dtype, rows, outputs, inputs, layout, with_bias):
    x = proof.tensor(rows, inputs, dtype=dtype, layout=layout)
    codes, scale = weights(proof, outputs, inputs)
    arguments = [x, proof.tensor(outputs, dtype=dtype, seed=3)] if with_bias else [x]
    ours, definition = kernel(proof, codes, scale)
    found, expected = ours(*map(proof.guarded, arguments)), definition(*arguments)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=2e-3 if dtype != torch.float32 else 2e-6,
                               atol=1e-5 * float(expected.abs().max()))  # fmt: skip


def test_kernel_rounds_to_the_very_same_codes(proof, dtype):
    x = proof.tensor(50, 300, dtype=dtype)
    x[3] = 0
    x[4, :5] = torch.tensor([1.0, 0.5, -0.5, 63.5 / 127, 1.5 / 127])
    x[4, 5:] = 0
    found = module._quantize(proof.guarded(x))
    expected = quantize_rows(x)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-7, atol=0)


@pytest.mark.unsanitized
@settings(max_examples=8)
@given(rows=st.integers(0, 70), outputs=st.integers(1, 70), inputs=st.integers(1, 300))
def test_kernel_on_any_shape(proof, rows, outputs, inputs):
    x, (codes, scale) = proof.tensor(rows, inputs), weights(proof, outputs, inputs)
    found = int8_matmul(x, codes, scale, backend=proof.kernel)
    assert found.shape == (rows, outputs)
    expected = int8_matmul_reference(x, codes, scale)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-5)


def test_kernel_finds_places_beyond_32_bits(proof):
    x, (codes, scale) = proof.tensor(5, 16, dtype=torch.float16), weights(proof, 4, 16)
    near = int8_matmul(x, codes, scale, backend=proof.kernel)
    for axis in (0, 1):
        again = int8_matmul(proof.far(x, axis=axis), codes, scale, backend=proof.kernel)
        assert torch.equal(again, near)


def test_leading_axes_are_rows(proof):
    x, (codes, scale) = proof.tensor(2, 3, 20), weights(proof, 4, 20)
    for backend in ("torch", proof.kernel):
        found = int8_matmul(x, codes, scale, backend=backend)
        assert torch.equal(
            found.view(6, 4), int8_matmul(x.view(6, 20), codes, scale, backend=backend)
        )


def test_tiles_follow_the_number_of_rows():
    tiles = [module._settings(module._tile(rows)) for rows in (1, 16, 17, 64, 65, 5000)]
    sizes = [tile["BLOCK_M"] for tile in tiles]
    assert sizes == [16, 16, 64, 64, 128, 128]


# ---------------------------------------------------------------- bad input


def test_what_does_not_fit():
    x, codes, scale = torch.ones(3, 8), torch.ones(4, 8, dtype=torch.int8), torch.ones(4)
    with pytest.raises(ValueError, match=r"x has shape \(3, 7\).*must be \(3, 8\)"):
        int8_matmul(x[:, 1:], codes, scale)
    with pytest.raises(ValueError, match=r"scale has shape \(3,\).*must be \(4,\)"):
        int8_matmul(x, codes, scale[1:])
    with pytest.raises(ValueError, match=r"bias has shape \(8,\).*must be \(4,\)"):
        int8_matmul(x, codes, scale, torch.ones(8))
    with pytest.raises(ValueError, match="must be .outputs, inputs. and .*inputs."):
        int8_matmul(x, codes[0], scale)
    with pytest.raises(TypeError, match="codes are of float32; they must be int8"):
        int8_matmul(x, codes.float(), scale)
    with pytest.raises(TypeError, match="x is of int64"):
        int8_matmul(x.long(), codes, scale)
    long = torch.empty(1, module.LONGEST + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="inputs may add up beyond 32 bits; 133144 is the most"):
        int8_matmul(torch.empty(1, module.LONGEST + 1), long, scale[:1])
    wide = torch.ones(1, module.WIDEST + 1)
    with pytest.raises(ValueError, match="32769 inputs are too many"):
        int8_matmul(wide, wide.to(torch.int8), scale[:1], backend="triton")
    assert float(int8_matmul(wide, wide.to(torch.int8), scale[:1])) == pytest.approx(32769)
    nothing = int8_matmul(torch.ones(2, 0), torch.ones(4, 0, dtype=torch.int8), scale)
    assert nothing.shape == (2, 4) and not nothing.any()
