"""The script of the stored measurements: what it stores, and that it asks for idle cores."""

import importlib.util
from pathlib import Path

import pytest

from effnb.hardware.codesign import gshard
from effnb.hardware.codesign.expert_parallel import Report

SCRIPT = Path(__file__).resolve().parents[2] / "data/sweeps/06_hardware/2_codesign.py"


@pytest.fixture
def sweep(monkeypatch):
    """The script, with processes that report at once: each needs a share of a second of work."""
    spec = importlib.util.spec_from_file_location("sweep", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run_processes(settings, *, seconds):
        settings.check()
        n = settings.devices
        sent = 2 * gshard.exchange_bytes(
            settings.groups // n, settings.slots, settings.experts, settings.model, n
        )
        error = 1e-7 if settings.factor == 0 else None
        about = (int(sent), 10**9 // n, error, 0, 0, 2**20 // n, 5.0 / n)
        return [Report(i, 0.5 / n + 0.01 * i, 0.1, 0.4 / n, *about) for i in range(n)]

    monkeypatch.setattr(module, "run_processes", run_processes)
    monkeypatch.setattr(module, "EXPERT_TURNS", 2)
    monkeypatch.setattr(module, "TURNS", 2)
    monkeypatch.setattr(module, "IDLE_TRIES", 3)
    return module


def test_experts_are_stored_for_every_number_of_experts_and_processes(sweep):
    found = sweep.experts()
    table = {(r["experts"], r["devices"]): r for r in found["table"]}
    assert list(table) == [(e, d) for e in (4, 8, 16) for d in (1, 2, 4)]
    row = table[8, 4]
    assert row["slots"] == gshard.capacity(found["sizes"]["tokens"], 8)
    assert row["busy_seconds"] == [0.1, 0.1]
    assert len(row["sent_bytes"]) == len(row["operations"]) == len(row["weight_bytes"]) == 4
    assert row["largest_error"] == 1e-7
    assert row["output_sum"] == 5.0


def test_times_are_those_of_the_slowest_process_on_idle_cores(sweep, monkeypatch):
    monkeypatch.setattr(sweep.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(sweep.psutil, "cpu_count", lambda: 2)
    loads = iter([50.0, 5.0] + 10 * [2.0])  # busy at first
    monkeypatch.setattr(sweep.psutil, "cpu_percent", lambda interval: next(loads))
    found = sweep.scaling()
    assert found["others_percent_of_a_core"] == 10
    table = {(r["experts"], r["devices"]): r for r in found["table"]}
    assert list(table) == [(e, d) for e in (4, 8, 16) for d in (1, 2)]
    assert table[4, 2]["seconds"] == [0.26, 0.26]
    assert table[4, 1]["seconds"] == [0.5, 0.5]
    assert table[16, 2]["exchange_seconds"] == [0.1, 0.1]


def test_a_busy_machine_is_not_measured(sweep, monkeypatch):
    monkeypatch.setattr(sweep.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(sweep.psutil, "cpu_percent", lambda interval: 90.0)
    with pytest.raises(SystemExit, match="needs two idle cores. Nothing was stored"):
        sweep.scaling()


def test_one_core_is_not_enough(sweep, monkeypatch):
    monkeypatch.setattr(sweep.os, "sched_getaffinity", lambda _: {1}, raising=False)
    with pytest.raises(SystemExit, match="without `taskset`"):
        sweep.scaling()
