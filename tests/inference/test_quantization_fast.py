"""Layers that run from packed codes: the same numbers as reading back, by every route."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.core.modules import linears, share
from effnb.evaluation import flops, parameter_count, stored_bytes
from effnb.inference.quantization import (
    PackedLinear,
    PackedTensor,
    QuantizedLinear,
    QuantizedTensor,
    accelerate,
    dequantized,
    fast,
    gptq,
    packed,
    packed_linear,
    quantize,
    quantize_linears,
    quantize_table,
    rtn,
    save_quantized,
)
from effnb.inference.quantization.grid import Grid

EPS = 2.0**-7
"""Distance of two neighbours in bfloat16, relative; rounding changes a number by half of it."""

FORMATS = [
    # bits, group_size, symmetric, kind
    (2, 32, False, "int4"),
    (3, "row", False, "int4"),
    (4, 64, False, "int4"),
    (4, 64, True, "int4"),
    (4, 128, False, "int4"),
    (4, "tensor", True, "int4"),
    (5, "row", True, "int8"),
    (8, "row", True, "int8"),
    (8, "tensor", True, "int8"),
    (7, "row", True, "two int4"),
    (6, 96, True, "two int4"),
    (8, "row", False, "two int4"),
    (8, 32, False, "two int4"),
]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nf4(weight):
    return quantize_table(weight, "nf4", block_size=32)


def weight_of(bits, group_size, symmetric, rows=72, columns=160):
    matrix = randn(rows, columns, seed=bits) + 0.3  # zero points off the middle
    return quantize(matrix, bits, group_size=group_size, symmetric=symmetric)


def lay_out(weight, kind):
    """For the kind of kernel asked for, whichever is the faster here."""
    laid_out = PackedTensor.from_quantized(weight, "int8" if kind == "int8" else "two int4")
    assert laid_out.kind == kind
    return laid_out


def close(y, x, weight, *, narrow=True):
    """Whether `y` is `x @ weight.T`, up to the rounding that the module's docstring states."""
    rounded = x.bfloat16() if narrow else x
    exact = rounded.double() @ weight.double().T
    sums = rounded.double().abs() @ weight.double().abs().T
    bound = (EPS / 2 * exact.abs() if narrow else 0) + 1e-5 * sums
    return bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "kind"), FORMATS)
def test_the_layout_keeps_the_weights(bits, group_size, symmetric, kind):
    """Exactly with one scale per row; with groups, up to the rounding of scales and offsets."""
    weight = weight_of(bits, group_size, symmetric)
    laid_out = lay_out(weight, kind)
    laid_out.check()
    change = (laid_out.dequantize() - weight.dequantize()).abs()
    if isinstance(group_size, str):
        assert change.max() == 0
        return
    top = 2 ** (bits - 1) - 1
    zeros = torch.full_like(weight.scales, top) if symmetric else weight.zero_points()
    offset = (weight.scales.float() * (8 - zeros.float()).abs()).repeat_interleave(group_size, 1)
    if kind == "two int4":
        offset *= 0  # its offset is split into two numbers
    bound = EPS / 2 * (weight.dequantize().abs() + offset[:, :160]) * (1 + EPS)
    assert (change <= bound).all()
    if packed.machine().dtype == torch.bfloat16:
        assert change.max() > 0, "scales of this test do not fit into bfloat16"


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "kind"), FORMATS)
def test_every_route_computes_the_product(bits, group_size, symmetric, kind):
    weight = lay_out(weight_of(bits, group_size, symmetric), kind)
    matrix, bias = weight.dequantize(), randn(72, seed=3)
    for count in (1, 7, 130):  # by the kernel, and by reading back
        x = randn(count, 160, seed=count)
        y = packed_linear(x, weight)
        assert y.dtype == torch.float32
        if count < weight.rows_limit:
            assert close(y, x, matrix, narrow=packed.machine().dtype == torch.bfloat16)
        else:  # the weight is rounded to bfloat16 as well, where products are made in it
            assert close(y, x, matrix, narrow=False) or (
                (y - x @ matrix.T).norm() <= EPS * (x @ matrix.T).norm()
            )
        with_bias = packed_linear(x, weight, bias)
        torch.testing.assert_close(with_bias, y + bias)
        double = packed_linear(x.double(), weight)
        torch.testing.assert_close(double, x.double() @ matrix.double().T, atol=1e-5, rtol=1e-6)
    assert weight.rows_limit < 130


def test_routes_are_taken_by_the_number_of_inputs(monkeypatch):
    fast_module = sys.modules["effnb.inference.quantization.fast"]
    taken = []
    for name in ("_kernel", "_dense"):
        function = getattr(fast_module, name)
        monkeypatch.setattr(
            fast_module, name, lambda x, w, f=function, n=name: (taken.append(n), f(x, w))[1]
        )
    here = packed.Machine(
        torch.bfloat16, "int8", {"int4": 5, "two int4": 3, "int8": 2}, torch.float32
    )
    monkeypatch.setattr(packed, "machine", lambda: here)
    monkeypatch.setattr(fast_module, "machine", lambda: here)
    for (bits, group_size, symmetric), limit in {
        (4, 64, False): 5,
        (8, 64, False): 3,
        (8, "row", True): 2,
    }.items():
        weight = PackedTensor.from_quantized(weight_of(bits, group_size, symmetric))
        for count in (1, limit - 1, limit, limit + 1):
            taken.clear()
            packed_linear(randn(1, count, 160), weight)
            assert taken == ["_kernel" if count < limit else "_dense"], (bits, count)
        taken.clear()
        packed_linear(randn(1, 160).requires_grad_(), weight)
        packed_linear(randn(1, 160).double(), weight)
        assert taken == ["_dense", "_dense"]


@pytest.mark.parametrize("kind", ["int4", "two int4", "int8"])
def test_codes_go_through_the_kernel_unchanged(kind):
    """With a scale of 1 per row, the product with one-hot inputs is the codes themselves."""
    bits = 4 if kind == "int4" else 8
    top = 2 ** (bits - 1) - 1
    signed = kind == "int8"
    codes = torch.arange(64 * 96).reshape(64, 96) * 7 % (2 * top + 1) - (top if signed else 0)
    zeros = None if signed else torch.arange(64).reshape(64, 1) * 5 % (2 * top)
    weight = QuantizedTensor.from_codes(
        codes, torch.ones(64, 1), zeros, Grid(bits, symmetric=signed)
    )
    laid_out = lay_out(weight, kind)
    expected = (codes if signed else codes - zeros).T.float()
    for column in range(96):
        one = torch.zeros(1, 96)
        one[0, column] = 1
        assert torch.equal(packed_linear(one, laid_out)[0], expected[column])


@settings(max_examples=25)
@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 150),
    count=st.sampled_from([1, 3, 100]),
    choice=st.sampled_from(FORMATS),
)
def test_any_shape(rows, columns, count, choice):
    """Rows and columns that are no whole panels or groups are filled up, which changes nothing."""
    bits, group_size, symmetric, kind = choice
    weight = quantize(
        randn(rows, columns, seed=rows), bits, group_size=group_size, symmetric=symmetric
    )
    laid_out = lay_out(weight, kind)
    laid_out.check()
    matrix = laid_out.dequantize()
    assert matrix.shape == (rows, columns)
    torch.testing.assert_close(matrix, weight.dequantize(), atol=0.05, rtol=EPS)
    x = randn(2, count, columns, seed=columns)
    y = packed_linear(x, laid_out)
    assert y.shape == (2, count, rows)
    assert y.is_contiguous()
    error = (y - x @ matrix.T).abs()
    assert (error <= 3 * EPS * (x.abs() @ matrix.abs().T) + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "group_size", "symmetric", "kind"), FORMATS[::3])
def test_the_result_is_of_the_inputs_type(bits, group_size, symmetric, kind, dtype):
    weight = lay_out(weight_of(bits, group_size, symmetric), kind)
    for count in (2, 130):
        x = randn(count, 160).to(dtype)
        y = packed_linear(x, weight, randn(72).to(dtype))
        assert y.dtype == dtype
        expected = x.double() @ weight.dequantize().double().T + randn(72).to(dtype).double()
        assert (y.double() - expected).norm() < 3 * EPS * expected.norm()


def test_inputs_that_are_views_into_something_larger():
    """The int8 kernel loads whole registers, which must not start anywhere."""
    weight = lay_out(weight_of(8, "row", True), "int8")
    storage = randn(4 * 160 + 7).bfloat16()
    for start in range(7):
        x = storage[start : start + 320].view(2, 160)
        assert torch.equal(packed_linear(x, weight), packed_linear(x.clone(), weight))
    across = randn(160, 3)
    torch.testing.assert_close(
        packed_linear(across.T, weight), packed_linear(across.T.contiguous(), weight)
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_flow_through_the_inputs(bits):
    weight = PackedTensor.from_quantized(weight_of(bits, 32, False))
    x = randn(3, 160).requires_grad_()
    out = randn(3, 72, seed=5)
    (packed_linear(x, weight) * out).sum().backward()
    torch.testing.assert_close(x.grad, out @ weight.dequantize())


def test_columns_in_another_order():
    """GPTQ stores columns in the order of their importance; inputs follow them."""
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0))
    plain = weight_of(4, 32, False)
    weight = QuantizedTensor.from_codes(
        plain.integers(),
        plain.scales.float(),
        plain.zero_points(),
        Grid(4, 32),
        order=order,
    )
    laid_out = PackedTensor.from_quantized(weight)
    torch.testing.assert_close(laid_out.dequantize(), weight.dequantize(), atol=0.03, rtol=EPS)
    assert laid_out.bytes == PackedTensor.from_quantized(plain).bytes + 4 * 160
    for count in (2, 130):
        x = randn(count, 160)
        expected = x @ laid_out.dequantize().T
        assert (packed_linear(x, laid_out) - expected).norm() < 2 * EPS * expected.norm()


@pytest.mark.parametrize("layout", ["64 halves", "32 halves", "64 pairs", "32 pairs", "16 pairs"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_laid_out_on_another_machine(bits, layout):
    """It is read back, right, whatever order its kernel wanted."""
    here = PackedTensor.from_quantized(weight_of(bits, 32, False))
    codes = packed._unpanel(here.codes, here.layout).T  # rows, columns
    size, kind = layout.split()
    panels = codes.unflatten(0, (-1, int(size))).transpose(1, 2)  # panels, columns, rows
    if kind == "halves":
        low, high = panels.chunk(2, 2)
    else:
        low, high = panels[..., ::2], panels[..., 1::2]
    there = PackedTensor.from_parts(
        here.describe() | {"layout": layout},
        here.tensors() | {"codes": (low | high << 4).contiguous().view_as(here.codes)},
    )
    assert torch.equal(there.dequantize(), here.dequantize())
    x = randn(2, 160)
    assert there.rows_limit == (here.rows_limit if layout == here.layout else 0)
    torch.testing.assert_close(
        packed_linear(x, there), packed_linear(x, here), atol=0.2, rtol=2 * EPS
    )


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_processors(capability):
    """The same tests where the kernels are others, or slow; PyTorch lets a process pretend."""
    code = (
        "import torch;"
        "from effnb.inference.quantization import *;"
        "from effnb.inference.quantization import packed;"
        "torch.manual_seed(0); print(packed.native_layout(), packed.machine().dtype);"
        "x = torch.randn(2, 160);"
        "formats = [(4, 64, False), (8, 64, False), (8, 'row', True), (3, 'row', False)];"
        "weights = [quantize(torch.randn(72, 160), b, group_size=g, symmetric=s)"
        " for b, g, s in formats];"
        "packs = [PackedTensor.from_quantized(w) for w in weights];"
        "pairs = [(packed_linear(x, p), x @ w.dequantize().T) for p, w in zip(packs, weights)];"
        "print(max(float((y - e).norm() / e.norm()) for y, e in pairs))"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    told, error = done.stdout.splitlines()
    assert not told.startswith("unknown")
    assert float(error) < EPS
    if told.endswith("None"):  # no kernel: read back, in float32
        assert float(error) < 1e-3


def test_where_there_is_no_kernel(monkeypatch):
    """On Windows, say: weights keep all bits of their scales, and are read back in float32."""
    nowhere = packed.Machine(None, "int8", {"int4": 0, "two int4": 0, "int8": 0}, torch.float32)
    fast_module = sys.modules["effnb.inference.quantization.fast"]
    monkeypatch.setattr(packed, "machine", lambda: nowhere)
    monkeypatch.setattr(fast_module, "machine", lambda: nowhere)
    for bits, group_size, symmetric, _ in FORMATS:
        weight = weight_of(bits, group_size, symmetric)
        laid_out = PackedTensor.from_quantized(weight)
        torch.testing.assert_close(laid_out.dequantize(), weight.dequantize(), atol=1e-5, rtol=1e-5)
        x = randn(1, 160)
        torch.testing.assert_close(
            packed_linear(x, laid_out), x @ weight.dequantize().T, atol=1e-3, rtol=1e-4
        )


# --- models ---------------------------------------------------------------------------------------


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (4, {"group_size": 32}),
        (8, {"symmetric": True}),
        (8, {"group_size": 32}),
        (2, {}),
    ],
)
def test_an_accelerated_model_computes_the_same(llama, ids, bits, options):
    slow = rtn(llama, bits, **options)
    quick = accelerate(slow)
    for name in linears(llama):
        assert isinstance(quick.get_submodule(name), PackedLinear)
        assert type(slow.get_submodule(name)) is QuantizedLinear
    assert quick.model.embed_tokens.weight is llama.model.embed_tokens.weight
    with torch.inference_mode():
        expected = slow(ids).logits
        assert relative(quick(ids).logits, expected) < 0.02
        assert relative(quick(ids[:1, :3]).logits, slow(ids[:1, :3]).logits) < 0.02
        out = quick(ids[:1, :3], use_cache=True)  # one token at a time, as in decoding
        out = quick(ids[:1, 3:4], past_key_values=out.past_key_values)
        assert relative(out.logits[:, -1], slow(ids[:1, :4]).logits[:, -1]) < 0.03
    assert relative(dequantized(quick)(ids).logits, expected) < 0.02
    assert relative(accelerate(quick)(ids).logits, expected) < 0.02


def test_bytes_are_those_of_the_tensors(llama):
    quick = accelerate(rtn(llama, 4, group_size=32))
    layer = quick.model.layers[0].mlp.up_proj  # 48 x 32, rows filled up to 64
    assert layer.quantized.bytes == 64 * 32 // 2 + 64 * 1 * 4
    assert stored_bytes(layer) == layer.quantized.bytes
    assert layer.quantized.bits_per_weight == 8 * layer.quantized.bytes / (48 * 32)
    packed_bytes = sum(m.quantized.bytes for m in quick.modules() if isinstance(m, PackedLinear))
    rest = sum(p.numel() * 4 for p in quick.parameters())
    assert stored_bytes(quick) == packed_bytes + rest
    assert parameter_count(quick) == parameter_count(llama)


def test_operations_of_the_kernels_are_counted(tiny_llama, ids):
    """As many as with ordinary layers, by the kernel and by reading back.

    Eight bits as two matrices of four, which some machines multiply faster, take twice as many.
    """
    llama = tiny_llama(0, hidden_size=64, intermediate_size=128, num_key_value_heads=4)
    quick = fast(llama, 4)
    for part in (ids[:1, :3], ids):
        head, tokens = quick.lm_head.quantized, part.numel()
        twice = head.kind == "two int4" and head.rows_limit > tokens
        more = 2 * tokens * 64 * 128 if twice else 0
        assert flops(partial(quick, part)) == flops(partial(llama, part)) + more
    for kind, times in {"int8": 1, "two int4": 2}.items():
        layer = PackedLinear(lay_out(weight_of(8, "row", True, 64, 64), kind))
        counted = flops(partial(layer, randn(3, 64)))
        assert counted == 2 * 3 * 64 * 64 * (times if layer.quantized.rows_limit > 3 else 1)


def test_gptq_with_act_order_is_accelerated(llama, ids):
    slow = gptq(llama, ids, 4, group_size=32, act_order=True)
    assert any(m.quantized.order is not None for m in slow.modules() if hasattr(m, "quantized"))
    with torch.inference_mode():
        assert relative(accelerate(slow)(ids).logits, slow(ids).logits) < 0.02


@pytest.mark.parametrize("bits", [4, 8])
def test_fast_quantizes_the_head_and_leaves_the_embedding(llama, ids, bits):
    before = {name: p.clone() for name, p in llama.named_parameters()}
    quick = fast(llama, bits)
    assert isinstance(quick.lm_head, PackedLinear)
    assert quick.model.embed_tokens.weight is llama.model.embed_tokens.weight
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    kind = "int4" if bits == 4 else packed.machine().eight
    kinds = [m.quantized.kind for m in quick.modules() if isinstance(m, PackedLinear)]
    assert set(kinds) == {kind, packed.machine().eight}
    assert quick.lm_head.quantized.kind == packed.machine().eight  # whatever the rest has
    with torch.inference_mode():
        assert relative(quick(ids).logits, dequantized(quick)(ids).logits) < 0.02
        assert relative(quick(ids).logits, llama(ids).logits) < (0.4 if bits == 4 else 0.06)
    for name, parameter in llama.named_parameters():
        assert torch.equal(parameter, before[name])


def test_fast_with_other_heads_and_sources(llama, ids):
    assert fast(llama, 4, head=True).lm_head.quantized.kind == "int4"
    plain = fast(llama, 4, head=False)
    assert plain.lm_head.weight is llama.lm_head.weight
    wide = fast(llama, 4, group_size=32, head=8)
    assert wide.lm_head.quantized.kind == "two int4"
    assert wide.model.layers[0].mlp.up_proj.quantized.kind == "int4"
    asked = []

    def source(model, bits, **options):
        asked.append((bits, options))
        return rtn(model, bits, **options)

    fast(llama, 3, source=source)
    fast(llama, 8, source=source)
    fast(llama, 8, group_size="row", source=source)
    assert asked == [
        (3, {"group_size": 64}),
        (8, {"group_size": "row", "symmetric": True}),
        (8, {"group_size": "row"}),
    ]
    calibrated = fast(llama, 4, group_size=32, source=partial(_gptq, calibration=ids))
    with torch.inference_mode():
        assert relative(calibrated(ids).logits, llama(ids).logits) < 0.5


def _gptq(model, bits, *, calibration, **options):
    return gptq(model, calibration, bits, **options)


def test_a_model_without_a_head(llama):
    body = fast(llama.model, 4)
    assert isinstance(body.layers[0].mlp.up_proj, PackedLinear)


def test_a_model_in_bfloat16(llama, ids):
    quick = fast(llama.bfloat16(), 4)
    with torch.inference_mode():
        expected = dequantized(quick)(ids).logits.float()
        assert quick(ids).logits.dtype == torch.bfloat16
        assert relative(quick(ids).logits.float(), expected) < 0.05


def test_packed_layers_are_shared_copied_and_loaded(llama, ids):
    quick = fast(llama, 4)
    with torch.inference_mode():
        expected = quick(ids[:1, :2]).logits
        twin = share(quick)
        assert twin.lm_head.codes is quick.lm_head.codes
        assert torch.equal(twin(ids[:1, :2]).logits, expected)
        other = fast(llama, 4, source=lambda m, b, **k: rtn(m, b, symmetric=True, **k))
        assert not torch.equal(other(ids[:1, :2]).logits, expected)
        other = copy.deepcopy(quick)
        for name, tensor in other.state_dict().items():
            if "embed" not in name and "norm" not in name:
                tensor.zero_()
        assert not torch.equal(other(ids[:1, :2]).logits, expected)
        other.load_state_dict(quick.state_dict())
        assert torch.equal(other(ids[:1, :2]).logits, expected)
        moved = copy.deepcopy(quick).to(torch.float64)  # codes and scales keep their types
        assert moved.lm_head.scales.dtype == quick.lm_head.scales.dtype
        assert relative(moved(ids[:1, :2]).logits, expected) < 0.02


def test_what_is_laid_out_for_one_machine_is_not_saved(llama, tmp_path):
    with pytest.raises(ValueError, match="is a PackedLinear, which does more than store a weight"):
        save_quantized(fast(llama, 4), tmp_path / "model")


def test_layers_without_a_kernel_stay_as_they_are(llama, ids):
    mixed = rtn(llama, 4, group_size=32, layers="*.mlp.*")
    for name in linears(llama, "*.self_attn.*"):
        layer = llama.get_submodule(name)
        parent, _, leaf = name.rpartition(".")
        setattr(mixed.get_submodule(parent), leaf, QuantizedLinear(nf4(layer.weight)))
    quick = accelerate(mixed)
    kinds = {type(quick.get_submodule(n)) for n in linears(llama, "*.self_attn.*")}
    assert kinds == {QuantizedLinear}
    assert isinstance(quick.model.layers[1].mlp.down_proj, PackedLinear)
    with torch.inference_mode():
        assert relative(quick(ids).logits, mixed(ids).logits) < 0.02


def test_any_stored_weight_is_multiplied():
    weight = nf4(randn(64, 64))
    x = randn(3, 64)
    assert torch.equal(packed_linear(x, weight), x @ weight.dequantize().T)
    uniform = weight_of(4, 64, False)
    layer = PackedLinear(uniform)  # what stands off the CPU, until there is a kernel
    x = randn(3, 160)
    torch.testing.assert_close(layer(x), x @ uniform.dequantize().T)


def test_bad_input_is_one_sentence(llama):
    with pytest.raises(ValueError, match="groups of 48 have no kernel; only multiples of 32"):
        PackedTensor.from_quantized(quantize(randn(64, 96), 4, group_size=48))
    with pytest.raises(ValueError, match="groups of 16 have no kernel; only multiples of 32"):
        fast(llama, 4, group_size=16)
    with pytest.raises(ValueError, match="bits is 9; the uniform formats have 2 to 8"):
        fast(llama, 9)
    with pytest.raises(ValueError, match="bits is 1; the uniform formats have 2 to 8"):
        fast(llama, 4, head=1)
    with pytest.raises(ValueError, match="no QuantizedLinear fits"):
        accelerate(llama)
    with pytest.raises(ValueError, match=r"no layer can run packed; .*q_proj: groups of 16 have"):
        accelerate(rtn(llama, 4, group_size=16))
    with pytest.raises(ValueError, match="the format 'table' has no kernel; only uniform"):
        accelerate(quantize_linears(llama, nf4))
    with pytest.raises(ValueError, match="quantized already"):
        fast(rtn(llama, 4))
    weight = PackedTensor.from_quantized(weight_of(4, 64, False))
    with pytest.raises(ValueError, match="the inputs have 161 features; the weight has 160"):
        packed_linear(randn(2, 161), weight)
    with pytest.raises(ValueError, match="codes has shape"):
        PackedTensor.from_parts(weight.describe(), weight.tensors() | {"codes": weight.codes[:64]})
    with pytest.raises(
        ValueError, match=r"scales has shape \(5, 128, 1\); it should be \(5, 128, 2\)"
    ):
        PackedTensor.from_parts(
            weight.describe(), weight.tensors() | {"scales": weight.scales[:, :, :1]}
        )
    with pytest.raises(ValueError, match="'int5' is no packed kind"):
        PackedTensor.from_parts(weight.describe() | {"kind": "int5"}, weight.tensors())
