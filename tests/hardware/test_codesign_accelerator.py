"""The simulated chip: its arithmetic by hand, its limits, and what goes in from measurements."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.hardware.codesign import PruningRecord, energon, pruning_record, spatten
from effnb.hardware.codesign.accelerator import (
    Accelerator,
    Kept,
    product_units,
    simulate_decode_attention,
    simulate_matmul,
)
from effnb.hardware.codesign.roofline import Shape
from effnb.hardware.codesign.roofline import matmul as counted

CHIP = Accelerator(multipliers=1024, bytes_per_cycle=32, comparisons_per_cycle=16, hertz=1e9)
SHAPE = Shape(2, 64, 128, 4, 2, 16, 100)


def test_products_take_small_multipliers():
    assert [product_units(*bits) for bits in ((4, 4), (8, 4), (8, 8), (16, 4), (16, 16))] == [
        1, 2, 4, 4, 16,
    ]  # fmt: skip
    assert product_units(2, 2) == product_units(4, 4), "below four bits an array gains nothing"
    assert product_units(12, 12) == 9


def test_a_product_by_hand():
    found = simulate_matmul(CHIP, 8, 64, 128, weight_bits=4, activation_bits=8)
    assert found.dram_bytes == 64 * 128 / 2 + 8 * (64 + 128)
    assert found.multiply_cycles == 8 * 64 * 128 * 2 / 1024
    assert found.memory_cycles == found.dram_bytes / 32
    assert found.select_cycles == 0
    assert found.cycles == max(found.multiply_cycles, found.memory_cycles)
    assert found.seconds == found.cycles / 1e9


def test_dense_bytes_are_those_of_the_roofline():
    assert simulate_matmul(CHIP, 8, 64, 128).dram_bytes == counted(8, 64, 128).bytes


def test_one_token_waits_for_memory_and_many_for_the_multipliers():
    assert simulate_matmul(CHIP, 1, 256, 256).bound == "memory"
    assert simulate_matmul(CHIP, 256, 256, 256).bound == "multipliers"
    # Fewer bits help the first in proportion, and the second not below what the array multiplies.
    for m, gain in ((1, 3.95), (256, 4.0)):
        wide, narrow = (simulate_matmul(CHIP, m, 256, 256, weight_bits=b).cycles for b in (16, 4))
        assert wide / narrow == pytest.approx(gain, rel=0.03)
    four, two = (simulate_matmul(CHIP, 256, 256, 256, weight_bits=b).cycles for b in (4, 2))
    assert four == two


def test_what_sparsity_gains_depends_on_what_the_chip_skips():
    dense = simulate_matmul(CHIP, 256, 256, 256)
    blind = simulate_matmul(CHIP, 256, 256, 256, sparsity=0.9)
    assert blind == dense
    pairs = simulate_matmul(CHIP, 256, 256, 256, sparsity=0.9, skip="2:4")
    assert pairs == simulate_matmul(CHIP, 256, 256, 256, sparsity=0.5, skip="2:4")
    assert dense.multiply_cycles / pairs.multiply_cycles == 2
    # 16 bits: half of the weights and two bits of position for each of them, 56.25 %.
    weights = dense.dram_bytes - 2 * 2 * 256 * 256
    assert (pairs.dram_bytes - 2 * 2 * 256 * 256) / weights == 0.5625
    free = simulate_matmul(CHIP, 256, 256, 256, sparsity=0.9, skip="any")
    assert dense.multiply_cycles / free.multiply_cycles == pytest.approx(10)
    # With four bits the bitmap costs a quarter, so that little sparsity fetches more than none.
    few = simulate_matmul(CHIP, 1, 256, 256, weight_bits=4, sparsity=0.2, skip="any")
    assert few.dram_bytes > simulate_matmul(CHIP, 1, 256, 256, weight_bits=4).dram_bytes


def test_attention_by_hand():
    numbers = 2 * 4 * 100 * 16  # layers, heads, context, dim
    full = simulate_decode_attention(CHIP, SHAPE, 100)
    assert full.dram_bytes == 2 * numbers * 12 / 8
    assert full.multiply_cycles == 2 * numbers * 9 / 1024
    assert full.select_cycles == 0
    pruned = simulate_decode_attention(
        CHIP, SHAPE, 100, Kept(0.5, 0.25, 12, high_bits=8, refetched=0.1, selects=True)
    )
    assert pruned.dram_bytes == pytest.approx(numbers * (0.5 * 8 + 0.5 * 0.1 * 4 + 0.25 * 12) / 8)
    units = numbers * (0.5 * 4 + 0.05 * 9 + 0.25 * 9)
    assert pruned.multiply_cycles == pytest.approx(units / 1024)
    assert pruned.select_cycles == pytest.approx(2 * 2 * 4 * 100 * 0.5 / 16)


def test_rounds_fetch_bit_planes():
    numbers = 2 * 4 * 100 * 16
    found = simulate_decode_attention(
        CHIP, SHAPE, 100, Kept(0.2, 0.2, 12, rounds=((2, 1.0), (4, 0.5)), selects=True)
    )
    # 2 bits of all keys, 2 more of a half, the other 8 of a fifth; values of a fifth.
    planes = 2 + 0.5 * 2 + 0.2 * 8 + 0.2 * 12
    assert found.dram_bytes == pytest.approx(numbers * planes / 8)
    assert found.select_cycles == pytest.approx(2 * 4 * 100 * 1.5 / 16)
    assert found.multiply_cycles == pytest.approx(numbers * (1 + 0.5 + 0.2 * 9 * 2) / 1024)


@settings(max_examples=25)
@given(keys=st.floats(0.01, 1), values=st.floats(0.01, 1), context=st.integers(1, 4096))
def test_leaving_out_more_never_costs_more(keys, values, context):
    full = simulate_decode_attention(CHIP, SHAPE, context)
    pruned = simulate_decode_attention(CHIP, SHAPE, context, Kept(keys, keys * values))
    assert pruned.dram_bytes <= full.dram_bytes
    assert pruned.cycles <= full.cycles


def test_measured_shares_go_in(llama, ids):
    model = spatten(llama, token_keep=0.5, head_keep=0.5, value_keep=0.5, msb_bits=6)
    model(input_ids=ids)
    record = pruning_record(model)
    kept = Kept.measured(record, bits=12, high_bits=6)
    assert (kept.keys, kept.values) == (record.pair_share, record.value_share)
    assert kept.refetched == record.refetch_share
    assert kept.selects
    filtered = energon(llama)
    filtered(input_ids=ids)
    record = pruning_record(filtered)
    kept = Kept.measured(record, rounds=(2, 4))
    assert kept.rounds == ((2, 1.0), (4, record.round_shares[1]))
    chip = simulate_decode_attention(CHIP, Shape.of(llama.config), 24, kept)
    assert chip.dram_bytes < simulate_decode_attention(CHIP, Shape.of(llama.config), 24).dram_bytes


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Accelerator(multipliers=0), "multipliers is 0"),
        (lambda: Accelerator(bytes_per_cycle=-1.0), "bytes per cycle is -1.0"),
        (lambda: product_units(0, 4), "0 by 4 bits"),
        (lambda: simulate_matmul(CHIP, 0, 1, 1), "m is 0"),
        (lambda: simulate_matmul(CHIP, 1, 1, 1, sparsity=1.0), "sparsity is 1.0"),
        (lambda: simulate_matmul(CHIP, 1, 1, 1, skip="some"), "skip is 'some'"),
        (lambda: simulate_matmul(CHIP, 1, 1, 1, sparsity=0.3, skip="2:4"), "at least a half"),
        (lambda: simulate_decode_attention(CHIP, SHAPE, 0), "context is 0"),
        (lambda: simulate_decode_attention(CHIP, SHAPE, 1, Kept(high_bits=13)), "13 high bits"),
        (lambda: Kept.measured(PruningRecord(), rounds=(2,)), "1 rounds are given"),
    ],
)
def test_bad_input_gets_a_sentence(call, said):
    with pytest.raises(ValueError, match=said):
        call()
