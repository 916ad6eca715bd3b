"""Stored runs of the kernels' benchmark, as the benchmark itself writes them, measured or not."""

import json

import pytest
import torch

from effnb.hardware.codesign import kernel_results
from effnb.hardware.codesign.kernel_results import (
    Contestant,
    gpu_roof,
    kernel_cases,
    measured_on,
)
from effnb.hardware.codesign.roofline import DATA_SHEETS
from effnb.kernels import bench

SHEET = DATA_SHEETS["H100 SXM"]
CEILINGS = bench.Ceilings(3e12, {"bfloat16": 7e14, "float32": 5e13})


def stored(timings, ceilings, device):
    """What the benchmark writes, after a round through JSON."""
    content = json.loads(json.dumps(bench.content(timings, ceilings, device)))
    return content["data"], content["provenance"]["device"]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A run as a GPU would store it: ours, two peers, one for scale, and one that is absent."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    case = bench.BenchCase("lora", "M=1 N=4096", torch.bfloat16, 3 * 10**8, 10**9, None)
    about = (case.kernel, case.shape, "bfloat16", case.bytes, case.flops)
    least = CEILINGS.seconds(case)

    def line(who, seconds):
        rates = (case.bytes / seconds, case.flops / seconds, least / seconds)
        return bench.Timing(*about, who, seconds, *rates, 0.0)

    timings = [
        line("ours", 2e-4),
        line("torch", 4e-4),
        line("peft", 1.5e-4),
        line("the layer alone" + bench.OTHER, 1e-4),
        bench.Timing(*about, "Liger", note="liger_kernel cannot be imported here."),
        bench.Timing("rope", "T=16", "bfloat16", 64, 10**6, "ours", 1e-6, 1.0, 1.0, 0.25),
    ]
    return stored(timings, CEILINGS, torch.device("cuda"))


@pytest.fixture(scope="module")
def on_none():
    """A run without a GPU, of every case that the benchmark has."""
    return stored([bench.unmeasured(case) for case in bench.cases(small=True)], None, None)


def test_the_words_are_the_benchmarks():
    assert kernel_results.FOR_SCALE == bench.OTHER


def test_measured_ceilings_replace_the_data_sheet(on_a_gpu):
    roof, measured = gpu_roof(*on_a_gpu, SHEET)
    assert measured
    assert measured_on(*on_a_gpu) == "NVIDIA H100 80GB HBM3"
    assert roof.name == "NVIDIA H100 80GB HBM3, bfloat16, measured"
    assert (roof.operations_per_second, roof.bytes_per_second) == (7e14, 3e12)
    assert gpu_roof(*on_a_gpu, SHEET, "float32")[0].operations_per_second == 5e13
    # A run of one kernel may lack a type: the name says which one was taken.
    assert gpu_roof(*on_a_gpu, SHEET, "float16")[0].name.endswith("bfloat16, measured")


def test_without_a_gpu_the_data_sheet_stays_and_says_so(on_none):
    assert measured_on(*on_none) is None
    assert gpu_roof(*on_none, SHEET) == (SHEET, False)
    assert "data sheet" in SHEET.name


def test_times_of_a_processor_are_no_gpus():
    line = bench.Timing("rope", "T=16", "bfloat16", 64, 10**6, "ours", 1e-6, 1.0, 1.0, 0.25)
    data, device = stored([line], CEILINGS, torch.device("cpu"))
    assert measured_on(data, device) is None
    (case,) = kernel_cases(data, device)
    assert case.ours == Contestant("ours", None, None, "no GPU was available")
    assert gpu_roof(data, device, SHEET) == (SHEET, False)


def test_cases_hold_ours_and_the_fastest_rival(on_a_gpu):
    lora, rope = kernel_cases(*on_a_gpu)
    assert (lora.kernel, lora.shape, lora.dtype) == ("lora", "M=1 N=4096", "bfloat16")
    assert (lora.work.operations, lora.work.bytes) == (10**9, 3 * 10**8)
    assert lora.ours == Contestant("ours", 2e-4, 3e8 / 3e12 / 2e-4, "")
    assert lora.best_peer.who == "peft"  # the layer alone is faster, and no rival
    assert [c.who for c in lora.contestants if not c.rival] == [
        "ours",
        "the layer alone (for scale)",
        "Liger",
    ]
    assert rope.best_peer is None


def test_a_case_without_ours_is_refused(on_a_gpu):
    data = on_a_gpu[0] | {"timings": [t for t in on_a_gpu[0]["timings"] if t["who"] != "ours"]}
    with pytest.raises(ValueError, match="lora at M=1 N=4096 has no line of ours"):
        kernel_cases(data, "cuda")
