"""Which tests run under compute-sanitizer, and what is done about what it says."""

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent
UNSANITIZED = {
    "test_any_shape",
    "test_every_candidate_compiles_within_shared_memory",
    "test_every_kernel_compiles",
    "test_kernel_on_any_shape",
    "test_no_kernel_got_slower_than_its_stored_report",
    "test_sizes_of_zero_and_one_compile",
    "test_the_compiler_says_when_it_cannot",
    "test_the_report_is_printed_and_stored_for_all_targets_only",
    "test_what_is_wrong_does_not_compile",
}


@pytest.fixture
def sanitize():
    path = HERE.parents[1] / ".make" / "sanitize.py"
    spec = importlib.util.spec_from_file_location("sanitize", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def marks_of(function):
    """The names of a test's own markers, as they are written above it."""
    calls = (d.func if isinstance(d, ast.Call) else d for d in function.decorator_list)
    return {ast.unparse(d).removeprefix("pytest.mark.") for d in calls}


def test_nothing_is_left_out_by_accident(sanitize):
    """Every test but those named above is selected, whatever letters are in its name."""
    place = sanitize.TESTS.index("-m", sanitize.TESTS.index("pytest"))
    assert sanitize.TESTS[place + 1] == sanitize.SELECTED
    assert "-k" not in sanitize.TESTS and sanitize.TESTS[-1] == "tests/kernels"
    selected, left_out = set(), set()
    for path in HERE.glob("test_*.py"):
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                has = marks_of(function)
                known = {name: name in has for name in ("unsanitized", "full", "bench")}
                runs = eval(sanitize.SELECTED, {}, known)  # such an expression is Python as well
                (selected if runs else left_out).add(function.name)
    assert left_out == UNSANITIZED and not selected & left_out
    assert {"test_many_users", "test_many_users_not_contiguous", "test_one_pass"} <= selected


def test_both_tools_run_and_the_first_finding_is_the_status(sanitize, monkeypatch, capsys):
    ran = []

    def run(command, *, cwd, env, check):
        ran.append((command[:3], command[5:], env["PYTORCH_NO_CUDA_MEMORY_CACHING"]))
        return SimpleNamespace(returncode=status[len(ran) - 1])

    monkeypatch.setattr(sanitize.subprocess, "run", run)
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: f"/bin/{name}")
    for status, checks in (([0, 0], 2), ([0, 9], 2), ([9, 0], 1)):
        ran.clear()
        assert sanitize.main() == max(status)
        tools = [["/bin/compute-sanitizer", "--tool", t] for t in ("memcheck", "racecheck")]
        assert ran == [(tool, sanitize.TESTS, "1") for tool in tools[:checks]]
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    monkeypatch.setattr(sanitize, "USUAL", Path("nowhere"))
    ran.clear()
    assert sanitize.main() == 0 and not ran
    assert "memcheck and racecheck were not run" in capsys.readouterr().out
