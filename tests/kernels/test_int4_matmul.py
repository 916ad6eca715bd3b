"""The 4-bit product: against float64, for uniform grids and tables, forward and backward."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from effnb.kernels import int4_matmul as kernel
from effnb.kernels.int4_matmul import Blocks, int4_matmul, pack_int4

NF4ISH = torch.tensor([-1, -0.7, -0.53, -0.4, -0.28, -0.18, -0.09, 0,
                       0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1])  # fmt: skip


def weight_of(n, k, group, kind, device="cpu", seed=0):
    """Random codes; the numbers they stand for, in float64, by the equation."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    scales = torch.rand(n, k // group, generator=generator) + 0.1
    spread = scales.half().double().repeat_interleave(group, 1)
    more = {}
    if kind == "affine":
        zeros = torch.randint(0, 16, scales.shape, generator=generator, dtype=torch.uint8)
        more["zeros"] = zeros.to(device)
        values = codes.double() - zeros.double().repeat_interleave(group, 1)
    elif kind == "table":
        more["table"] = NF4ISH.to(device)
        values = NF4ISH.double()[codes.long()]
    else:
        more["zero"] = 7
        values = codes.double() - 7
    scales = scales.half().float() if kind == "table" else scales.half()
    packed = pack_int4(codes.to(device), scales.to(device), group_size=group, **more)
    return packed, (values * spread).to(device)


@pytest.mark.parametrize("kind", ["symmetric", "affine", "table"])
@pytest.mark.parametrize(
    ("rows", "n", "k", "group"),
    [
        (1, 37, 256, 128),
        (1, 50, 96, 32),
        (1, 5, 37, 37),
        (3, 33, 192, 64),
        (17, 70, 70, 70),
        (130, 40, 64, 64),
        (0, 8, 64, 32),
    ],
)
def test_output_and_gradients(proof, dtype, kind, rows, n, k, group):
    weight, numbers = weight_of(n, k, group, kind, proof.device)
    x = proof.tensor(rows, k, dtype=dtype, grad=True)
    bias = proof.tensor(n, dtype=dtype, seed=1, grad=True)

    def plain(x, bias):
        return torch.nn.functional.linear(x, numbers.to(x.dtype), bias)

    def ours(x, bias):
        return int4_matmul(x, weight, bias, backend=proof.kernel)

    proof.compare(ours, plain, x, bias)


@pytest.mark.unsanitized
@examples(max_examples=12)
@given(
    st.integers(1, 40), st.integers(1, 70), st.integers(1, 4), st.sampled_from([32, 64, 128]),
    st.sampled_from(["symmetric", "affine", "table"]), st.integers(0, 99),
)  # fmt: skip
def test_any_shape(proof, rows, n, groups, group, kind, seed):
    weight, numbers = weight_of(n, groups * group, group, kind, proof.device, seed)
    x = proof.tensor(rows, groups * group, dtype=torch.float32, seed=seed)
    result = int4_matmul(x, weight, backend=proof.kernel)
    expected = x.double() @ numbers.T
    scale = float(expected.abs().max())
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
@pytest.mark.parametrize("rows", [1, 5])
def test_inputs_that_are_not_contiguous(proof, dtype, layout, rows):
    weight, numbers = weight_of(20, 128, 64, "affine", proof.device)
    x = proof.tensor(rows, 128, dtype=dtype, layout=layout, grad=True)
    bias = proof.tensor(20, dtype=dtype, layout=layout, seed=1, grad=True)
    assert not bias.is_contiguous() and (rows == 1 or not x.is_contiguous())
    proof.compare(
        lambda x, bias: int4_matmul(x, weight, bias, backend=proof.kernel),
        lambda x, bias: x @ numbers.to(x.dtype).T + bias,
        x,
        bias,
    )


@pytest.mark.parametrize("kind", ["affine", "table"])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_weight_whose_tensors_are_not_contiguous(proof, kind, rows):
    weight, _ = weight_of(20, 128, 64, kind, proof.device)
    spread = {
        name: torch.stack([t, t.flip(0)], -1)[..., 0]
        for name, t in vars(weight).items()
        if isinstance(t, torch.Tensor)
    }
    assert len(spread) == 3 and not any(t.is_contiguous() for t in spread.values())
    spread = dataclasses.replace(weight, **{k: proof.guarded(t) for k, t in spread.items()})
    x, results = proof.tensor(rows, 128, grad=True), []
    for w in (weight, spread):
        y = int4_matmul(x, w, backend=proof.kernel)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for expected, found in zip(*results):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("rows", [1, 3])
def test_places_beyond_32_bits(proof, rows):
    weight, _ = weight_of(5, 5, 5, "affine", proof.device)
    x = proof.tensor(rows, 5, dtype=torch.float16)
    for run in (
        lambda x: int4_matmul(x, weight, backend=proof.kernel),
        lambda dy: kernel.int4_matmul_transposed(dy, weight),
    ):
        assert torch.equal(run(proof.far(x)), run(x))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("wide", [torch.float16, torch.float32])
def test_a_bias_of_another_type(proof, rows, wide):
    """Both backends take any type; the kernel adds it before it rounds."""
    narrow = torch.float16 if wide == torch.float32 else torch.float32
    weight, numbers = weight_of(6, 64, 32, "affine", proof.device)
    x = proof.tensor(rows, 64, dtype=narrow)
    bias = proof.tensor(6, dtype=wide, seed=1, grad=True)
    expected = x.double() @ numbers.T + bias.double()
    for run in (
        lambda: int4_matmul(x, weight, bias, backend=proof.kernel),
        lambda: int4_matmul(x, weight, bias, backend="torch"),
        lambda: kernel.reference(x, weight, bias),
    ):
        y = run()
        assert y.dtype == narrow
        torch.testing.assert_close(y.double(), expected.detach(), rtol=2e-3, atol=2e-2)
        (grad,) = torch.autograd.grad(y.sum(), bias)
        assert torch.equal(grad, torch.full_like(bias, rows))


def test_learned_scales_and_tables_take_the_reference(proof):
    """Both backends give their gradient, or the kernel says that it does not."""
    for kind in ("affine", "table"):
        weight, _ = weight_of(4, 64, 32, kind, proof.device)
        name = "table" if kind == "table" else "scales"
        learned = getattr(weight, name).clone().requires_grad_()
        weight = dataclasses.replace(weight, **{name: learned})
        x = proof.tensor(3, 64)
        with pytest.raises(ValueError, match="no gradient for the scales and the table"):
            int4_matmul(x, weight, backend=proof.kernel)
        assert torch.autograd.grad(int4_matmul(x, weight).sum(), learned)[0].abs().sum() > 0
        with torch.no_grad():
            int4_matmul(x, weight, backend=proof.kernel)


def test_gradients_that_are_not_contiguous(proof):
    weight, numbers = weight_of(20, 64, 64, "table", proof.device)
    x = proof.tensor(6, 64, grad=True)
    dy = proof.tensor(20, 6, seed=3).T
    (dx,) = torch.autograd.grad(int4_matmul(x, weight, backend=proof.kernel), x, dy)
    torch.testing.assert_close(dx, (dy.double() @ numbers).float(), rtol=1e-5, atol=1e-5)


def test_leading_axes(proof):
    weight, numbers = weight_of(12, 64, 32, "symmetric", proof.device)
    x = proof.tensor(2, 3, 64)
    result = int4_matmul(x, weight, backend=proof.kernel)
    assert result.shape == (2, 3, 12)
    torch.testing.assert_close(result.double(), x.double() @ numbers.T, rtol=1e-5, atol=1e-5)
    assert int4_matmul(x[0, 0], weight, backend=proof.kernel).shape == (12,)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_parts_of_one_row_add_up_and_repeat_bit_for_bit(proof, dtype, parts):
    weight, numbers = weight_of(19, 2112, 32, "affine", proof.device)  # 17 units: none divides
    x = proof.tensor(1, 2112, dtype=dtype)
    blocks = Blocks(1, 16, parts)
    first, *_ = proof.compare(
        lambda x: int4_matmul(x, weight, backend=proof.kernel, blocks=blocks),
        lambda x: x @ numbers.to(x.dtype).T,
        x,
    )
    again = int4_matmul(x, weight, backend=proof.kernel, blocks=blocks)
    assert torch.equal(first, again)


@pytest.mark.parametrize("blocks", [Blocks(16, 16), Blocks(32, 64), Blocks(64, 128)])
def test_the_cut_into_blocks_changes_nothing_much(proof, blocks):
    weight, _ = weight_of(70, 128, 64, "table", proof.device)
    x = proof.tensor(33, 128)
    result = int4_matmul(x, weight, backend=proof.kernel, blocks=blocks)
    torch.testing.assert_close(result, kernel.reference(x, weight), rtol=1e-5, atol=1e-5)


def test_a_group_with_a_step_of_zero_gives_zeros(proof):
    codes = torch.full((4, 64), 15, dtype=torch.uint8, device=proof.device)
    scales = torch.zeros(4, 2, dtype=torch.float16, device=proof.device)
    weight = pack_int4(codes, scales, group_size=32)
    for rows in (1, 4):
        result = int4_matmul(proof.tensor(rows, 64), weight, backend=proof.kernel)
        assert torch.equal(result, torch.zeros(rows, 4, device=proof.device))


def test_the_layout_holds_every_code_once():
    """Word j of a unit: code j in its lowest bits, then the codes j + 16, j + 32 and so on."""
    codes = (torch.arange(2 * 256) * 7 % 16).to(torch.uint8).view(2, 256)
    weight = pack_int4(codes, torch.ones(2, 2, dtype=torch.float16), group_size=128, zero=0)
    assert weight.codes.shape == (2, 32)
    word = int(weight.codes[1, 16 + 3]) & 0xFFFFFFFF
    assert [word >> (4 * i) & 15 for i in range(8)] == codes[1, 128 + 3 :: 16].tolist()
    assert torch.equal(weight.dequantize(), codes.float())
    assert weight.bytes == 2 * 256 // 2 + 2 * 2 * 2  # half a byte a code, two bytes a step


@pytest.mark.parametrize("kind", ["symmetric", "affine", "table"])
def test_the_reference_is_the_equation(kind):
    weight, numbers = weight_of(6, 96, 32, kind)
    assert torch.equal(weight.dequantize(torch.float64), numbers)
    x = torch.randn(3, 96, dtype=torch.float64)
    torch.testing.assert_close(int4_matmul(x, weight), x @ numbers.T)


def codes(n=4, k=64):
    return torch.ones(n, k, dtype=torch.uint8)


def steps(n=4, groups=2):
    return torch.ones(n, groups, dtype=torch.float16)


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (ValueError, "48 do not divide the 64", lambda: pack_int4(codes(), steps(), group_size=48)),
        (ValueError, "multiples of 32", lambda: pack_int4(codes(), steps(4, 4), group_size=16)),
        (ValueError, "do not divide", lambda: pack_int4(codes(), steps(), group_size=0)),
        (ValueError, r"\(4, 3\).*\(4, 64\)",
         lambda: pack_int4(codes(), steps(4, 3), group_size=32)),
        (ValueError, "a code is 16", lambda: pack_int4(codes() * 16, steps(), group_size=32)),
        (TypeError, "int64", lambda: pack_int4(codes().long(), steps(), group_size=32)),
        (TypeError, "bfloat16", lambda: pack_int4(codes(), steps().bfloat16(), group_size=32)),
        (ValueError, "matrix", lambda: pack_int4(codes()[0], steps(), group_size=32)),
        (ValueError, "zeros has shape",
         lambda: pack_int4(codes(), steps(), codes(), group_size=32)),
        (ValueError, "table has shape",
         lambda: pack_int4(codes(), steps(), group_size=32, table=torch.ones(8))),
        (ValueError, "a zero point is 7.5; they are whole numbers from 0 to 15",
         lambda: pack_int4(codes(), steps(), steps() * 7.5, group_size=32)),
        (ValueError, "a zero point is -1;",
         lambda: pack_int4(codes(), steps(), -steps(), group_size=32)),
        (ValueError, "a zero point is 16;",
         lambda: pack_int4(codes(), steps(), codes(4, 2) * 16, group_size=32)),
        (ValueError, "a zero point is nan;",
         lambda: pack_int4(codes(), steps(), steps() * torch.nan, group_size=32)),
        (ValueError, "no zero points",
         lambda: pack_int4(codes(), steps(), codes(4, 2), group_size=32, table=torch.ones(16))),
    ],
)  # fmt: skip
def test_weights_that_cannot_be(error, words, make):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.float16, torch.float32])
def test_zero_points_of_any_type(kind):
    """Whole numbers from 0 to 15 are what they are, whatever holds them."""
    points = torch.tensor([[0, 15], [7, 8], [1, 2], [3, 14]])
    weight = pack_int4(codes(), steps(), points.to(kind), group_size=32)
    assert torch.equal(weight.zeros, points.byte())
    assert torch.equal(weight.dequantize()[:, ::32], 1 - points.float())


def test_inputs_that_cannot_be(proof):
    weight, _ = weight_of(4, 64, 32, "affine", proof.device)
    x = proof.tensor(3, 64)
    with pytest.raises(ValueError, match=r"\(3, 60\).*\(4, 64\)"):
        int4_matmul(x[:, :60], weight)
    with pytest.raises(ValueError, match=r"\(3,\).*\(4, 64\)"):
        int4_matmul(x, weight, x[0, :3])
    with pytest.raises(TypeError, match="x is of int64"):
        int4_matmul(x.long(), weight)
    with pytest.raises(ValueError, match="cannot run: the kernel has no float64"):
        int4_matmul(x.double(), weight, backend="triton")
    with pytest.raises(ValueError, match="meta"):
        int4_matmul(x.to("meta"), weight)


@pytest.mark.parametrize("kind", ["affine", "table"])
def test_many_rows_are_the_librarys(proof, kind):
    """The weight is written out and rounded once; float32 and what float16 cannot hold are not."""
    weight, numbers = weight_of(40, 192, 64, kind, proof.device)
    written = kernel.written_out(weight, torch.float32)
    torch.testing.assert_close(written.double(), numbers, rtol=1e-6, atol=1e-6)
    rows = kernel.LIBRARY_ROWS
    x = proof.tensor(rows, 192, dtype=torch.float16)
    expected = torch.nn.functional.linear(x, kernel.written_out(weight, torch.float16))
    assert torch.equal(int4_matmul(x, weight, backend=proof.kernel), expected)
    assert not weight.fits(torch.float32)
    wide = dataclasses.replace(weight, scales=torch.full_like(weight.scales, 60000.0))
    assert wide.fits(torch.bfloat16) and (kind == "table" or not wide.fits(torch.float16))


@pytest.mark.parametrize("kind", ["symmetric", "affine", "table"])
@pytest.mark.parametrize("rows", [3, kernel.LIBRARY_ROWS])
def test_the_gradient_of_the_input_is_that_of_the_dense_weight(proof, dtype, kind, rows):
    """dx = dy W, by the kernel for few rows and by the library for many: as QLoRA trains."""
    weight, numbers = weight_of(40, 192, 64, kind, proof.device)
    x = proof.tensor(rows, 192, dtype=dtype, grad=True)
    proof.compare(
        lambda x: int4_matmul(x, weight, backend=proof.kernel),
        lambda x: torch.nn.functional.linear(x, numbers.to(x.dtype)),
        x,
    )


@pytest.mark.parametrize("rows", [3, kernel.LIBRARY_ROWS])
def test_a_frozen_layer_keeps_its_codes_for_the_gradient_and_no_dense_weight(proof, rows):
    """Between forward and backward there is what the weight itself takes, and nothing of x."""
    weight, _ = weight_of(40, 192, 64, "affine", proof.device)
    x = proof.tensor(rows, 192, dtype=torch.float16, grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        int4_matmul(x, weight, backend=proof.kernel)
    assert sum(kept) == weight.bytes < 40 * 192


def test_a_learned_table_is_read_as_it_is_now():
    weight, _ = weight_of(4, 64, 64, "table")
    before = weight.pairs.clone()
    weight.table.mul_(2)
    first = weight.pairs.int().view(torch.float32)
    assert torch.equal(first.view(16, 16)[0], weight.table)
    assert not torch.equal(weight.pairs, before)


@pytest.mark.parametrize("kind", ["affine", "table"])
def test_a_weight_that_was_packed_in_inference_mode(proof, kind):
    with torch.inference_mode():
        weight, numbers = weight_of(8, 64, 64, kind, proof.device)
        x = proof.tensor(1, 64)
        result = int4_matmul(x, weight, backend=proof.kernel)
    torch.testing.assert_close(result.double(), x.double() @ numbers.T, rtol=1e-5, atol=1e-5)
    assert weight.fits(torch.float16)


def test_whether_scales_fit_is_found_again_when_they_change():
    weight, _ = weight_of(4, 64, 64, "affine")
    assert weight.fits(torch.float16)
    weight.scales.mul_(10000)
    assert not weight.fits(torch.float16)
