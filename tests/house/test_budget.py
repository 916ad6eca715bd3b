"""A run names the chapters whose checks took longer than they may, and no others."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(monkeypatch):
    """The module conftest.py of the top, with its environment variables put back afterwards."""
    spec = importlib.util.spec_from_file_location("top_conftest", ROOT / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "load", lambda: 1.0)
    return module


def report(name, seconds):
    return SimpleNamespace(nodeid=name, duration=seconds)


CELL = "notebooks/05_inference/1_pruning.ipynb::Cell {}"
CHECK = "tests/notebooks/test_chapters.py::Test_05_inference_1_pruning::test_it"


def said(times):
    """What the run says at its end."""
    lines = []
    times.pytest_terminal_summary(
        SimpleNamespace(
            section=lambda title, **_: lines.append(title),
            line=lambda text, **_: lines.append(text),
        )
    )
    return "\n".join(lines)


def test_the_cells_and_the_tests_of_a_chapter_are_added_up(run):
    times = run.ChapterTimes()
    times.pytest_runtest_logreport(report(CELL.format(1), 40))
    times.pytest_runtest_logreport(report(CHECK, 34))
    times.pytest_runtest_logreport(report("notebooks/00_start_here.ipynb::Cell 0", 74))
    times.pytest_runtest_logreport(report("tests/lab/test_panels.py::test_one", 500))
    assert list(times.over()) == []
    assert "OVER BUDGET" not in said(times)
    times.pytest_runtest_logreport(report(CELL.format(2), 2))
    assert [chapter for chapter, *_ in times.over()] == ["05_inference_1_pruning"]
    assert "the checks of 05_inference_1_pruning took 76 s" in said(times)
    assert "slowest: 05_inference_1_pruning" in said(times)


def test_a_loaded_machine_gives_more_time(run, monkeypatch):
    for load, over in ((0.2, 1), (1.0, 1), (3.0, 0)):
        monkeypatch.setattr(run, "load", lambda load=load: load)
        times = run.ChapterTimes()
        times.pytest_runtest_logreport(report(CELL.format(1), 100))
        assert len(list(times.over())) == over


def test_a_run_without_chapters_says_nothing_of_them(run):
    times = run.ChapterTimes()
    times.pytest_runtest_logreport(report("tests/lab/test_panels.py::test_one", 1))
    assert said(times) == ""
