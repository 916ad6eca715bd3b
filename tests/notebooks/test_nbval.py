"""The configuration under which nbval executes the chapters, tried on small notebooks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_nbval(folder, *cells, **options):
    """Test a notebook with this repository's conftest.py and pyproject.toml; what pytest said.

    Each cell is (source, printed output or None, tags).
    """
    notebook = nbformat.v4.new_notebook()
    for source, printed, tags in cells:
        cell = nbformat.v4.new_code_cell(source, execution_count=1, metadata={"tags": tags})
        if printed is not None:
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=printed)]
        notebook.cells.append(cell)
    (folder / "notebooks").mkdir(exist_ok=True)
    nbformat.write(notebook, folder / "notebooks" / "chapter.ipynb")
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "EFFNB"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--numprocesses=0", "-p", "no:cacheprovider"],
        cwd=folder,
        env=kept,
        capture_output=True,
        text=True,
        timeout=300,
    )


CHECKED = ["nbval-check-output"]


def test_notebooks_are_executed_under_the_right_conditions(tmp_path):
    done = run_nbval(
        tmp_path,
        ("import os, sys\nfrom pathlib import Path", None, []),
        ("print(os.environ['EFFNB_SWEEP'], os.environ['HF_HUB_OFFLINE'])", "1 1\n", CHECKED),
        ("print(os.environ['OMP_NUM_THREADS'])", "1\n", CHECKED),
        ("print(Path.cwd().name)", "notebooks\n", CHECKED),
        (f"print(sys.executable == {sys.executable!r})", "True\n", CHECKED),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


@pytest.mark.parametrize(
    ("cell", "passes"),
    [
        (("print(2)", "1\n", CHECKED), False),
        (("print(2)", "1\n", []), True),  # a timing, say: shown, and not compared
        (("raise ValueError('at another position')", None, []), False),
        (("1 / 0", None, CHECKED), False),
    ],
)
def test_only_tagged_cells_are_compared_and_every_error_counts(tmp_path, cell, passes):
    done = run_nbval(tmp_path, cell)
    assert (done.returncode == 0) == passes, done.stdout


def test_a_panel_that_raises_at_one_position_fails_its_chapter(tmp_path):
    panel = (
        "from effnb.lab import knob, panel\n"
        "def compute(bits):\n"
        "    return 1 / (bits - 5)\n"
        "panel(compute, lambda result, figure: figure.subplots().plot([result]), "
        "text=str, caption='A line', bits=knob(2, 8))"
    )
    done = run_nbval(tmp_path, (panel, None, []))
    assert done.returncode == 1
    assert "bits" in done.stdout
    assert "5" in done.stdout
    fine = panel.replace("bits - 5", "bits + 5")
    assert run_nbval(tmp_path, (fine, None, [])).returncode == 0


def test_an_exercise_whose_mistake_is_not_diagnosed_fails_its_chapter(tmp_path):
    exercise = (
        "from effnb.lab.checks import Exercise\n"
        "exercise = Exercise('one more', minutes=1, difficulty='easy', "
        "reference=lambda x: x + 1, cases=[(1,)], wrong={'it is two more': lambda x: x + 1})"
    )
    done = run_nbval(tmp_path, (exercise, None, []))
    assert done.returncode == 1
    assert run_nbval(tmp_path, (exercise.replace("x + 1})", "x + 2})"), None, [])).returncode == 0
