"""The layer of experts on real processes: the same numbers, the bytes of the formula."""

import json
import os
import subprocess
import sys

import pytest
import torch

from effnb.hardware.codesign import expert_parallel
from effnb.hardware.codesign.expert_parallel import Settings, main, run_device, run_processes
from effnb.hardware.codesign.gshard import exchange_bytes, expert_operations, moe_layer

TIGHT = Settings(devices=2, experts=4, groups=4, tokens=24, model=16, hidden=24, repeats=2)


@pytest.fixture(scope="module")
def two():
    return run_processes(TIGHT)


def test_two_processes_compute_what_one_does(two):
    """With capacity, so that places in queries matter too; compared by the sum of squares."""
    x, experts = TIGHT.inputs()
    with torch.no_grad():
        out, routing = moe_layer(x, experts, TIGHT.slots)
    assert routing.dropped_choices > 0
    for report, part in zip(two, out.split(2)):
        assert report.output_sum == pytest.approx(part.double().square().sum().item(), rel=1e-5)
    assert sum(r.dropped_choices for r in two) == routing.dropped_choices
    assert sum(r.lost_tokens for r in two) == routing.lost_tokens


def test_two_processes_send_the_bytes_of_the_formula(two):
    expected = 2 * exchange_bytes(2, TIGHT.slots, 4, 16, 2)
    assert [r.sent_bytes for r in two] == [expected] * 2
    assert [r.device for r in two] == [0, 1]
    assert all(0 < r.exchange_seconds < r.seconds and r.busy_seconds > 0 for r in two)
    _, experts = TIGHT.inputs()
    assert [2 * r.weight_bytes for r in two] == [experts.up.nbytes + experts.down.nbytes] * 2


def test_the_operations_counted_are_those_of_router_slots_and_experts(two):
    s = TIGHT
    router = 2 * 2 * s.tokens * s.model * s.experts  # 2 groups on each device
    to_slots_and_back = 2 * (2 * 2 * s.tokens * s.experts * s.slots * s.model)
    experts = expert_operations(2, s.slots, s.experts, s.model, s.hidden)
    assert [r.operations for r in two] == [router + to_slots_and_back + experts] * 2


def test_with_room_for_all_two_processes_are_the_loop_over_tokens():
    reports = run_processes(
        Settings(devices=2, experts=4, groups=2, tokens=12, model=8, hidden=16, factor=0, repeats=1)
    )
    assert all(r.largest_error < 1e-6 for r in reports)
    assert all(r.dropped_choices == 0 for r in reports)


def test_one_device_needs_no_other():
    settings = Settings(devices=1, experts=4, groups=2, tokens=12, model=8, hidden=16, factor=0)
    report = run_device(settings, 0)
    assert report.largest_error < 1e-6
    assert report.sent_bytes == 0


def test_the_command_line(capsys):
    sizes = dict(devices=1, experts=4, groups=2, tokens=8, model=8, hidden=8, rank=0)
    words = [f"--{name}={value}" for name, value in sizes.items()]
    main([*words, "--store=unused"])
    assert json.loads(capsys.readouterr().out)["device"] == 0
    with pytest.raises(SystemExit):
        main(["--devices=3"])
    assert "8 experts cannot be shared equally by 3 devices" in capsys.readouterr().err


def test_a_process_that_fails_is_told(monkeypatch):
    original = subprocess.Popen

    def broken(command, **options):
        return original([sys.executable, "-c", "raise SystemExit('out of luck')"], **options)

    monkeypatch.setattr(expert_parallel.subprocess, "Popen", broken)
    with pytest.raises(RuntimeError, match="one of the processes failed: out of luck"):
        run_processes(TIGHT)


def test_processes_that_hang_are_stopped(monkeypatch):
    original, started = subprocess.Popen, []

    def hang(command, **options):
        started.append(original([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        return started[-1]

    monkeypatch.setattr(expert_parallel.subprocess, "Popen", hang)
    with pytest.raises(RuntimeError, match="did not finish within 1 s"):
        run_processes(TIGHT, seconds=1)
    assert all(process.poll() is not None for process in started)


def test_gloo_stays_on_this_machine(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(
        expert_parallel.socket, "if_nameindex", lambda: [(1, "eth0"), (2, "lo0")], raising=False
    )
    monkeypatch.setattr(expert_parallel.sys, "platform", "darwin")
    expert_parallel._loopback()
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == "lo0"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"devices": 3}, "8 experts cannot be shared equally by 3 devices"),
        ({"groups": 3}, "3 groups cannot be shared equally by 2 devices"),
        ({"devices": 0}, "devices is 0"),
        ({"tokens": 0}, "tokens is 0"),
        ({"experts": 1}, "experts is 1"),
        ({"factor": -1.0}, "capacity factor is -1.0"),
    ],
)
def test_bad_settings_start_no_process(monkeypatch, changes, said):
    monkeypatch.setattr(expert_parallel.subprocess, "Popen", None)
    with pytest.raises(ValueError, match=said):
        run_processes(Settings(**changes))
