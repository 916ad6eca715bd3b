"""Operations and bytes, counted: against PyTorch's counter, against sizes in memory, by hand."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from effnb.hardware.codesign import roofline
from effnb.hardware.codesign.roofline import Roof, Shape, Work

sizes = st.integers(1, 70)


def counted(function):
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return counter.get_total_flops()


@settings(max_examples=20)
@given(m=sizes, n=sizes, k=sizes, dtype=st.sampled_from([torch.float32, torch.float16]))
def test_a_product_counts_what_pytorch_counts_and_moves_its_tensors(m, n, k, dtype):
    a, b = torch.zeros(m, k, dtype=dtype), torch.zeros(k, n, dtype=dtype)
    bits = 8 * dtype.itemsize
    work = roofline.matmul(m, n, k, weight_bits=bits, activation_bits=bits)
    assert work.operations == counted(lambda: a @ b)
    assert work.bytes == a.nbytes + b.nbytes + (a @ b).nbytes
    assert work.operations_per_byte == work.operations / work.bytes


def test_few_tokens_have_an_intensity_of_16_m_over_the_bits():
    for bits in (16, 4.25):
        work = roofline.matmul(1, 8192, 8192, weight_bits=bits)
        assert work.operations_per_byte == pytest.approx(16 / bits, rel=2e-3)


def test_bits_of_a_weight_with_its_share_of_the_scale():
    assert roofline.weight_bits(4) == 4
    assert roofline.weight_bits(4, group_size=128) == 4.125
    assert roofline.weight_bits(4, group_size=32, zero_bits=4) == 4.625
    # What four bits can gain at most over sixteen, by group size (specification, 7.1).
    for group, gain in ((32, 3.556), (64, 3.765), (128, 3.879)):
        assert 16 / roofline.weight_bits(4, group_size=group) == pytest.approx(gain, abs=5e-4)


def test_two_of_four_weights_and_their_places():
    # Specification, 7.1: 56.25 % of the bytes of 16 bits; with int4 3 bits, 5.33 times fewer.
    assert roofline.sparse_bits(16) == 9 == 0.5625 * 16
    assert roofline.sparse_bits(4) == 3
    dense, sparse = (roofline.matmul(1, 512, 512, weight_bits=b) for b in (16, 3))
    vectors = 2 * 2 * 512  # bytes of inputs and results, which nothing makes smaller
    assert (dense.bytes - vectors) / (sparse.bytes - vectors) == 16 / 3
    assert round(16 / roofline.sparse_bits(4), 2) == 5.33
    assert roofline.sparse_bits(8, kept=1, of=2) == 4.5
    assert roofline.sparse_bits(8, kept=3, of=3) == 10
    assert roofline.sparse_bits(7, kept=1, of=1) == 7  # nothing to choose, no place to store


def test_the_places_are_those_of_pytorchs_own_sparse_format():
    """The values of two of four, and two bits for the place of each of them."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass as compress,
    )

    weight = torch.randn(32, 64, dtype=torch.float16)
    weight[:, 0::4] = weight[:, 3::4] = 0
    values, places = compress(weight)
    assert 8 * (values.nbytes + places.nbytes) / weight.numel() == roofline.sparse_bits(16)


def test_the_counts_are_those_of_quantized_weights_in_memory():
    from effnb.inference import quantization

    held = quantization.quantize(torch.randn(64, 256), 4, group_size=32, symmetric=True)
    assert roofline.weight_bits(4, group_size=32) == held.bits_per_weight


@pytest.mark.parametrize("tokens", [1, 7, 24])
def test_prefill_counts_what_pytorch_counts_on_a_real_model(tiny_llama, tokens):
    model = tiny_llama()
    shape = Shape.of(model.config)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    found = counted(lambda: model(input_ids=ids, use_cache=False))
    assert roofline.prefill(shape, tokens).operations == found


def test_a_decode_step_counts_what_pytorch_counts(tiny_llama):
    model = tiny_llama()
    shape = Shape.of(model.config)
    with torch.no_grad():
        past = model(input_ids=torch.zeros(3, 10, dtype=torch.long)).past_key_values
    new = torch.zeros(3, 1, dtype=torch.long)
    found = counted(lambda: model(input_ids=new, past_key_values=past, use_cache=True))
    step = roofline.decode_step(shape, 11, batch=3)
    assert step.operations == found
    # Bytes: all weights but the norms, and keys and values of all tokens.
    held = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    cache = sum(layer.keys.numel() + layer.values.numel() for layer in past.layers)
    assert shape.weights == held
    assert step.bytes == 2 * (held + cache)


def test_decoding_waits_for_memory_and_prefill_does_not(tiny_llama):
    shape = Shape(16, 2048, 8192, 32, 8, 64, 128_256)
    for roof in roofline.DATA_SHEETS.values():
        assert roof.memory_bound(roofline.decode_step(shape, 1024))
        assert not roof.memory_bound(roofline.prefill(shape, 1024))


def test_the_roof_and_its_ridge():
    roof = Roof("made up", 100.0, 10.0)
    assert roof.ridge_operations_per_byte == 10
    assert roof.attainable(5) == 50
    assert roof.attainable(10) == roof.attainable(1000) == 100
    assert roof.least_seconds(Work(200, 5)) == 2  # arithmetic
    assert roof.least_seconds(Work(200, 50)) == 5  # memory
    assert roof.memory_bound(Work(200, 50))
    assert not roof.memory_bound(Work(200, 5))
    assert Work(1, 2) + Work(10, 20) == Work(11, 22)


def test_ridges_of_the_data_sheets():
    found = [round(r.ridge_operations_per_byte) for r in roofline.DATA_SHEETS.values()]
    assert found == [153, 295, 206]


def test_fusing_moves_two_instead_of_two_k():
    apart = roofline.elementwise(1000, 5, fused=False, bits=32)
    fused = roofline.elementwise(1000, 5, fused=True, bits=32)
    assert (apart.operations, fused.operations) == (5000, 5000)
    assert apart.bytes == 2 * 5 * 1000 * 4
    assert fused.bytes == 2 * 1000 * 4


@settings(max_examples=30)
@given(m=sizes, n=sizes, k=sizes, tile_m=sizes, tile_n=sizes)
def test_tiled_traffic_is_what_a_tile_loop_reads(m, n, k, tile_m, tile_n):
    moved = 0
    a, b = torch.zeros(m, k), torch.zeros(k, n)
    for i in range(0, m, tile_m):
        for j in range(0, n, tile_n):
            rows, columns = a[i : i + tile_m], b[:, j : j + tile_n]
            moved += rows.numel() + columns.numel() + len(rows) * columns.shape[1]
    found = roofline.tiled_bytes(m, n, k, tile_m=tile_m, tile_n=tile_n, bits=8)
    assert found == moved


def test_one_tile_for_all_is_the_least():
    least = roofline.matmul(64, 32, 48).bytes
    assert roofline.tiled_bytes(64, 32, 48, tile_m=64, tile_n=32) == least
    assert roofline.tiled_bytes(64, 32, 48, tile_m=1, tile_n=1) == 2 * 64 * 32 * (2 * 48 + 1)
    assert roofline.tile_bytes(64, 32, 16, bits=16) == 2 * (64 + 32) * 16 + 4 * 64 * 32


def test_measured_ceilings_are_times_of_what_was_asked(monkeypatch):
    """With a clock that ticks once a call, rates are counts per tick."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    roof = roofline.measure_roof(mebibytes=1, size=16, runs=3)
    assert roof.bytes_per_second == 2 * 2**20
    assert roof.operations_per_second == 2 * 16**3


def test_the_median_is_taken_after_a_warm_up():
    seen = []
    assert roofline.median_seconds(seen.append, 4) > 0
    assert seen == [0, 0, 1, 2, 3]


def test_weights_take_turns_so_that_none_is_in_the_cache(monkeypatch):
    used = []
    original = torch.Tensor.__matmul__

    def spy(a, b):
        used.append(b.data_ptr())
        return original(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    assert roofline.measure_matmul(2, 256, 256, cold_mebibytes=1, runs=5) > 0
    assert len(set(used)) == 1 * 2**20 / (256 * 256 * 4) + 1


def test_a_real_machine_is_not_faster_than_its_roof():
    """Nothing obeys the counts and beats the measured ceilings, up to the noise of timing."""
    roof = roofline.measure_roof(mebibytes=64, size=384, runs=3)
    work = roofline.matmul(1, 1024, 1024, weight_bits=32, activation_bits=32)
    seconds = roofline.measure_matmul(1, 1024, 1024, cold_mebibytes=64, runs=5)
    assert 0 < roof.bytes_per_second < math.inf
    assert seconds > 0.1 * roof.least_seconds(work)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: roofline.matmul(0, 1, 1), "m is 0; it has to be above 0"),
        (lambda: roofline.matmul(1, 1, 1, weight_bits=0), "weight bits is 0"),
        (lambda: roofline.weight_bits(4, group_size=0), "group size is 0"),
        (lambda: roofline.sparse_bits(0), "bits is 0"),
        (lambda: roofline.sparse_bits(4, kept=0), "kept is 0"),
        (lambda: roofline.sparse_bits(4, kept=5), "5 of 4 weights cannot be kept"),
        (lambda: roofline.elementwise(0, 1, fused=True), "numbers is 0"),
        (lambda: roofline.tiled_bytes(1, 1, 1, tile_m=0, tile_n=1), "tile m is 0"),
        (lambda: roofline.measure_roof(mebibytes=0), "mebibytes is 0"),
        (lambda: roofline.measure_matmul(1, 1, 1, runs=0), "runs is 0"),
        (lambda: roofline.median_seconds(print, 0), "runs is 0; it has to be above 0"),
        (lambda: roofline.decode_step(Shape(1, 1, 1, 1, 1, 1, 1), 0), "context is 0"),
        (lambda: roofline.prefill(Shape(1, 1, 1, 1, 1, 1, 1), 0), "tokens is 0"),
    ],
)
def test_bad_input_gets_a_sentence(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_shapes_without_grouped_heads():
    class Configuration:
        num_hidden_layers, hidden_size, intermediate_size = 2, 8, 12
        num_attention_heads, vocab_size = 4, 10

    shape = Shape.of(Configuration)
    assert (shape.kv_heads, shape.head_dim) == (4, 2)
    linears = [nn.Linear(8, 8, bias=False)] * 4 + [nn.Linear(8, 12, bias=False)] * 3
    per_layer = sum(layer.weight.numel() for layer in linears)
    assert shape.weights == 2 * per_layer + 8 * 10
    assert shape.cache_numbers(5) == 2 * 2 * 4 * 2 * 5
