"""The report by hand: instructions read, room on a multiprocessor, and the bounds."""

import functools
import os
import subprocess
import sys

import pytest
import triton

from effnb.kernels import compile as compiler
from effnb.kernels import report
from effnb.kernels.assembly import read
from effnb.kernels.report import DEVICES, Bound, Work, bound, in_flight, resident

TEXT = """
        /*0000*/                   S2R R6, SR_TID.X ;
.L_x_0:
        /*0010*/               @P1 LDG.E.128 R2, desc[UR12][R10.64] ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.64 [R1], desc[UR4][R2.64] ;
        /*0030*/              @!P2 LDG.E.U16 R15, desc[UR12][R12.64] ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/                   LDG.E R0, desc[UR12][R4.64] ;
        /*0060*/              @!P0 BRA `(.L_x_1) ;
        /*0070*/                   FADD R0, R1, R2 ;
        /*0080*/               @P2 BRA `(.L_x_0) ;
        /*0090*/                   STG.E desc[UR12][R2.64], R5 ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
        /*00c0*/                   NOP;
"""


def test_the_instructions_are_read():
    found = read(TEXT)
    assert len(found.instructions) == 11, "what fills up the end is no instruction"
    loop = found.main_loop()
    assert [i.name for i in loop] == [
        "LDGSTS.E.BYPASS.64", "LDG.E.U16", "HMMA.16816.F32", "LDG.E", "BRA",
    ]  # fmt: skip
    assert found.load_widths() == {8: 1, 4: 1, 2: 1}
    assert found.asynchronous == 1
    assert found.products == 1
    assert not found.wide_products


def test_a_kernel_without_a_loop_is_its_own_turn():
    straight = "\n".join(TEXT.splitlines()[1:4]) + "\n        /*0020*/      EXIT ;\n"
    assert [i.name for i in read(straight).main_loop()] == ["S2R", "LDG.E.128", "EXIT"]
    with pytest.raises(ValueError, match="no instructions"):
        read("nothing here")


def test_a_second_loop_beside_the_first_is_counted_for_itself():
    second = """
        /*0072*/                   FADD R0, R1, R2 ;
.L_x_3:
        /*0074*/                   LDG.E R0, desc[UR12][R4.64] ;
        /*0075*/                   FADD R0, R1, R2 ;
        /*0076*/                   FADD R0, R1, R2 ;
        /*0077*/                   FADD R0, R1, R2 ;
        /*0078*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0079*/               @!P0 BRA `(.L_x_3) ;
"""
    lines = TEXT.splitlines()
    found = read("\n".join([*lines[:10], *second.splitlines()[1:], *lines[11:]]))
    assert [len(found.main_loop()), len(found.other_loop())] == [5, 6]
    assert read(TEXT).other_loop() == (), "a loop around the main one is not beside it"
    work = Work("two loops", "tile", 1, 10, 100, 0, 1, 1, other_turns=3)
    device = DEVICES[90]
    found = bound(device, work, 1, instructions=5, other=6, warps=4, mma=True)
    assert found.issue == pytest.approx(100 * 4 * (5 * 10 + 6 * 3) / (4 * 132 * 1.83e9))


def test_the_loop_that_loads_is_chosen_where_nothing_multiplies():
    text = TEXT.replace("HMMA.16816.F32", "FFMA")
    assert read(text).main_loop()[0].name == "LDG.E.128", "the outer loop loads more"


def test_room_on_a_multiprocessor_by_hand():
    h100 = DEVICES[90]
    # 40 registers of 128 threads are 5,120: twelve programs of the 65,536 registers.
    assert resident(h100, registers=40, shared_bytes=64, warps=4) == 12
    # 41 are given out as 48.
    assert resident(h100, registers=41, shared_bytes=64, warps=4) == 10
    # 64 warps: sixteen programs of four, however few registers they take.
    assert resident(h100, registers=16, shared_bytes=0, warps=4) == 16
    # 100 KiB and the driver's one: two of 228 KiB.
    assert resident(h100, registers=16, shared_bytes=100 * 1024, warps=4) == 2
    with pytest.raises(ValueError, match="finds no room"):
        resident(h100, registers=255, shared_bytes=0, warps=16)


def work(**changes):
    about = dict(
        what="", item="weight", items=2048, turns=16, programs=528, fetched=1024,
        bytes=3_350_000, flops=989_000_000,
    )  # fmt: skip
    return Work(**about | changes)


def test_bytes_in_flight_by_hand():
    h100 = DEVICES[90]
    # 528 programs on 132 multiprocessors are four each, though twelve would fit.
    assert in_flight(h100, work(), 12, asynchronous=False, stages=4) == 4 * 1024
    assert in_flight(h100, work(), 3, asynchronous=False, stages=4) == 3 * 1024
    assert in_flight(h100, work(), 12, asynchronous=True, stages=4) == 3 * 4 * 1024
    assert h100.needed_in_flight == pytest.approx(3.35e12 * 500e-9 / 132)


def test_the_bounds_by_hand():
    found = bound(DEVICES[90], work(), 4096, instructions=167, warps=4, mma=True)
    assert found.memory == pytest.approx(1e-6)
    assert found.arithmetic == pytest.approx(1e-6)
    assert found.issue == pytest.approx(528 * 4 * 167 * 16 / (4 * 132 * 1.83e9))
    assert found.flight == pytest.approx(3_350_000 * 500e-9 / (132 * 4096))
    assert found.by == "issue"
    assert found.share == pytest.approx(1e-6 / found.issue)


def test_the_bound_is_the_largest():
    assert Bound(1.0, 2.0, 3.0, 4.0).seconds == 4.0
    assert Bound(1.0, 2.0, 3.0, 4.0).by == "flight"
    assert Bound(1.0, 2.0, 1.5, 0.5).share == 1.0


@pytest.mark.unsanitized
def test_the_report_is_printed_and_stored_for_all_targets_only():
    command = [sys.executable, "-m", "effnb.kernels.compile", "--report", "rope", "--arch", "80"]
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = functools.partial(
        subprocess.run, env=plain, capture_output=True, text=True, timeout=600, check=False
    )
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == report.HEAD
    assert "rope: half-split forward fp16" in done.stdout
    refused = run([*command, "--store"])
    assert refused.returncode == 2
    assert "--store goes with --report, for all targets" in refused.stderr
    refused = run([*command[:3], "--store"])
    assert refused.returncode == 2


def test_lines_of_other_kernels_stay_where_the_same_compiler_wrote_them():
    rows = [{"kernel": name} for name in ("lora: a", "rope: b", "lora: c", "int4_matmul: d")]
    data = {"triton": triton.__version__, "devices": compiler._devices(), "table": rows}
    assert compiler.of_others({"data": data}, ["lora"]) == [rows[1], rows[3]]
    with pytest.raises(ValueError, match="by Triton 1.0, and this is another"):
        compiler.of_others({"data": data | {"triton": "1.0"}}, ["lora"])
    with pytest.raises(ValueError, match="other data sheets"):
        compiler.of_others({"data": data | {"devices": {}}}, ["lora"])
