"""The walk through a tensor-core kernel agrees with the kernel, and with its machine code."""

import pytest

from effnb.chapters.hardware.codesign import compiled, roofs
from effnb.kernels import linear_cross_entropy
from effnb.lab import results

ROWS = results.read("kernel_report").data["table"]


def test_a_turn_by_hand():
    """(128 + 128) x 64 numbers of two bytes; 128 x 128 sums of 64 products."""
    assert compiled.turn() == {
        "fetched": 32768, "operations": 2097152, "per_byte": 64, "sums": 64,
    }  # fmt: skip


@pytest.mark.parametrize("arch", compiled.GPUS)
def test_the_machine_code_has_the_instructions_that_the_tile_needs(arch):
    assert compiled.of_kernel(ROWS, arch)["products"] == compiled.products_of_a_warp(arch)


def test_the_tile_is_the_one_that_was_compiled():
    (case,) = (c for c in linear_cross_entropy.compile_cases() if c.name == compiled.KERNEL)
    tile = [case.constants[f"BLOCK_{x}"] for x in "MVH"]
    assert [*tile, case.warps, case.stages] == list(compiled.TILE.values())
    assert case.work.fetched == compiled.turn()["fetched"]
    under_way = compiled.TILE["stages"] - 1
    for arch in compiled.GPUS:
        row = compiled.of_kernel(ROWS, arch)
        full = row["bytes_in_flight"] / (under_way * case.work.fetched)
        assert full == row["resident_programs"] == 1
        assert row["bytes_in_flight"] > row["needed_in_flight"]


def test_the_table_shows_what_is_stored():
    shown = str(compiled.walk_table(ROWS))
    for arch in compiled.GPUS:
        row = compiled.of_kernel(ROWS, arch)
        assert f"{row['bound_us'] / 1e3:.1f} (" in shown
        assert str(row["registers"]) in shown
    assert "128 x 128 x 64" in shown and "64 operations for each byte" in shown


def test_the_picture_says_bound_and_roofline():
    said = compiled.bounds(ROWS, roofs.SHOWN).alt
    for name in roofs.SHOWN:
        (row,) = (r for r in ROWS if r["kernel"] == name and r["arch"] == 90)
        assert f"{row['bound_us'] * row['roofline_share']:,.1f} and {row['bound_us']:,.1f}" in said
