import os
import sys
from types import SimpleNamespace

import pytest
import torch

from effnb.lab import devices
from effnb.lab.devices import Machine, device, machine, memory_bytes


@pytest.mark.parametrize(
    ("cuda", "mps", "best"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_best_device_present_is_chosen(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert device() == torch.device(best)


def test_this_machine_is_described():
    here = machine()
    assert 1 <= here.cores <= os.cpu_count()
    assert here.memory_bytes > 2**28
    assert here.torch == torch.__version__
    assert here.device == device().type
    assert (here.gpu is not None) == (here.device != "cpu")
    for words in ("Processor cores", "Memory", "GPU", "Triton", here.python):
        assert words in str(here)
        assert words in here._repr_html_()


def test_a_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    about = SimpleNamespace(name="Some <GPU>", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    here = machine()
    assert (here.gpu, here.device) == ("Some <GPU>", "cuda")
    assert "Some <GPU>, 80 GiB" in str(here)
    assert "Some &lt;GPU&gt;" in here._repr_html_()


def test_apple_silicon_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert "Apple silicon" in machine().gpu


def test_what_is_not_known_is_said_to_be_unknown():
    bare = Machine("Plan9 mips", 1, 1, None, None, None, "cpu", "3.11", "2.11", "5.0", None)
    assert "unknown" in str(bare)
    assert "none: everything runs on the CPU" in str(bare)
    assert "not installed" in str(bare)


def test_a_container_has_less_memory_than_its_machine(tmp_path):
    whole = memory_bytes(tmp_path / "missing")
    limit = tmp_path / "memory.max"
    limit.write_text("1073741824\n")
    assert memory_bytes(limit) == 2**30
    limit.write_text("max\n")
    assert memory_bytes(limit) == whole
    limit.write_text(str(whole * 10))
    assert memory_bytes(limit) == whole


def test_systems_that_tell_less(monkeypatch, tmp_path):
    def unknown(name):
        raise ValueError(name)

    monkeypatch.setattr(os, "sysconf", unknown, raising=False)
    assert memory_bytes(tmp_path / "missing") is None
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert devices.cores() == 1


def test_windows_is_asked_in_its_own_way(monkeypatch, tmp_path):
    import ctypes

    def status(pointer):
        found = pointer._obj
        assert found.length == ctypes.sizeof(found) >= 64
        found.total = 8 * 2**30
        return 1

    windows = SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=status))
    monkeypatch.setattr(ctypes, "windll", windows, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert memory_bytes(tmp_path / "missing") == 8 * 2**30


def test_a_package_that_is_missing_has_no_version():
    assert devices.installed("torch")
    assert devices.installed("surely-no-such-package") is None
