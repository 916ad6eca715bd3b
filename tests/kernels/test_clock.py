"""The bench's parts that need no GPU: medians, copies, the driver's words, and who may be timed."""

import subprocess
import sys

import pytest
import torch

from effnb.kernels import _clock, bench
from effnb.kernels._clock import Spread, clock, copies_for, machine, on_host
from effnb.kernels.compile import modules

CPU = torch.device("cpu")
CEILINGS = bench.Ceilings(1e9, dict.fromkeys(("float32", "float16", "bfloat16"), 1e9))
MB = 2**20


def test_a_median_has_its_quartiles():
    found = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.low, found.seconds, found.high, found.runs) == (2.0, 3.0, 4.0, 5)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="no run was timed"):
        Spread.of([])


@pytest.mark.parametrize(
    ("one", "l2", "copies"),
    [(50 * MB, 50 * MB, 2), (100 * MB, 50 * MB, 1), (9 * MB, 50 * MB, 12), (1, 50 * MB, 32)],
)
def test_copies_are_together_twice_the_cache(one, l2, copies):
    assert copies_for(one, l2) == copies
    assert copies == _clock.COPIES or copies * one >= 2 * l2
    assert copies == 1 or (copies - 1) * one < 2 * l2, "and no more than that takes"


def test_the_host_counts_its_own_runs():
    runs = []
    found = on_host(lambda: runs.append(0), repeats=50)
    assert found.runs == 5 and len(runs) == 7, "two are not counted"
    took = clock([lambda: None, lambda: 1 / 0], CPU)
    assert took.how == "host" and took.warm is None and took.cold.seconds >= 0


def test_the_driver_is_asked_for_clocks():
    asked = []

    def says(command):
        asked.extend(command)
        return "NVIDIA H100, 580.65.06, 1980 MHz, 2619 MHz, 1980 MHz, 700.00 W\n"

    found = machine(says)
    assert found["driver_version"] == "580.65.06" and found["clocks.sm"] == "1980 MHz"
    assert "--query-gpu=name,driver_version,clocks.sm" in asked[1]
    assert machine(lambda command: "what is this") == {}

    def missing(command):
        raise FileNotFoundError("nvidia-smi")

    assert machine(missing) == {}


# --- who may be timed -----------------------------------------------------------------------------


def case(**who):
    return bench.BenchCase("lora", "", torch.float32, 8, 8, lambda device: who)


def test_only_what_is_right_is_timed():
    x = torch.ones(3, dtype=torch.float64)
    runners = {
        "ours": lambda: x.float(),
        "close": lambda: x + 0.01,
        "wrong": lambda: x + 0.05,
        "nan": lambda: x * torch.nan,
        "other shape": lambda: x[:2],
        "another thing" + bench.OTHER: lambda: x[:1],
    }
    found = bench.measure(case(**{bench.EXACT: lambda: x}, **runners), CPU, CEILINGS)
    notes = {t.who: t.note for t in found}
    assert [t.who for t in found if t.seconds is not None] == [
        "ours", "close", "another thing" + bench.OTHER,
    ]  # fmt: skip
    assert "its error is 5.0e-02, above 2.0e-02" in notes["wrong"] and "nan" in notes["nan"]
    assert "of other shapes" in notes["other shape"]
    assert found[0].difference == 0.0 and found[1].difference == pytest.approx(0.01)
    assert found[0].low <= found[0].seconds <= found[0].high and found[0].how == "host"


def test_ours_must_be_right():
    x = torch.ones(3)
    wrong = {bench.EXACT: lambda: x, "ours": lambda: x + 0.1}
    with pytest.raises(ValueError, match="its error is 1.0e-01"):
        bench.measure(case(**wrong), CPU, CEILINGS)


def test_the_largest_error_of_several_results_counts():
    """A gradient that is small must not hide behind one that is large."""
    large, small = torch.full((4,), 1e6), torch.full((4,), 1e-3)
    assert bench.error((large, 2 * small), (large, small)) == pytest.approx(1.0)


@pytest.mark.parametrize("name", modules())
def test_every_case_has_its_exact_result(name):
    for one in bench.cases(name, small=True):
        who = list(one.make(CPU))
        assert who[:2] == [bench.EXACT, "ours"]


def test_the_table_shows_median_spread_and_error():
    line = bench.Timing(
        "lora", "M=1", "bfloat16", 8_000_000, 8, "ours", 1e-5, 8e11, 8e5, 0.24, 1e-3,
        low=0.9e-5, high=1.1e-5, how="graph of 32 copies",
    )  # fmt: skip
    text = bench.table([line, bench.unmeasured(case(ours=lambda: 0))])
    head, first, second = text.splitlines()
    assert head.split()[4:8] == ["median", "+-", "GB/s", "TFLOP/s"]
    assert "10.0 us  10%" in first and "1.0e-03" in first and "24%" in first
    assert "not measured" in second


def test_ours_is_pinned_to_the_compiled_kernel_on_a_gpu():
    assert bench.pinned(torch.device("cuda")) == "triton"
    assert bench.pinned(CPU) is None


def test_who_came_to_measure_is_told_that_there_is_no_gpu():
    done = subprocess.run(
        [sys.executable, "-m", "effnb.kernels.bench", "lora", "--gpu", "--store"],
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "There is no NVIDIA GPU here, and the bench measures on one." in done.stderr
