"""A cell that is run alone says which cell comes first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jupyter_client.kernelspec import NoSuchKernel
from jupyter_client.manager import KernelManager

from effnb.lab.notebook_kernels import EXTENSION, PYTHON, ExplainingKernels
from effnb.lab.order import missing

ROOT = Path(__file__).resolve().parents[2]

CELLS = [
    "",  # prose
    "import torch\nfrom effnb.lab import knob as turn",
    "def method(weight):\n    inner = weight\n    return inner\n\nmodel, (left, right) = 1, (2, 3)",
    "for step in range(3):\n    total = step",
    "this is no Python",
]


def raised(code, name="__main__", **names):
    """The NameError of a cell, and its traceback."""
    try:
        exec(compile(code, "cell", "exec"), {"__name__": name, **names})
    except NameError:
        _, problem, trace = sys.exc_info()
        return problem, trace
    raise AssertionError("the cell has raised nothing")


@pytest.mark.parametrize(
    ("name", "number", "begins"),
    [
        ("turn", 1, "import torch"),
        ("method", 2, "def method(weight):"),
        ("right", 2, "def method(weight):"),
        ("total", 3, "for step in range(3):"),
    ],
)
def test_a_missing_name_is_led_back_to_its_cell(name, number, begins):
    said = missing(*raised(f"print({name})"), CELLS)
    assert said.startswith(f"'{name}' does not exist yet: code cell {number}, ")
    assert begins in said
    assert "Run All Above" in said


@pytest.mark.parametrize("name", ["inner", "knob", "nowhere"])
def test_names_that_no_cell_makes_are_left_alone(name):
    assert missing(*raised(f"print({name})"), CELLS) is None


def test_a_mistake_inside_a_module_is_no_matter_of_cells():
    assert missing(*raised("print(model)", name="some.module"), CELLS) is None


def test_a_local_name_that_is_read_too_early_is_left_alone():
    code = "def f():\n    print(model)\n    model = 1\nf()"
    assert missing(*raised(code), CELLS) is None


def test_without_the_notebooks_file_nothing_is_said():
    assert missing(*raised("print(model)"), []) is None


# ------------------------------------------------------------------- before the first cell is run


def test_make_lab_starts_kernels_that_explain_from_the_start(tmp_path):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")}
    ours = {"JUPYTER_CONFIG_PATH": ROOT / ".make" / "jupyter", "JUPYTER_CONFIG_DIR": tmp_path}
    shown = subprocess.run(
        [sys.executable, "-m", "jupyter_server", "--show-config-json"],
        env={**kept, **{name: str(folder) for name, folder in ours.items()}},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    settings = json.loads(shown.stdout)["ServerApp"]
    home = ExplainingKernels.__module__
    assert settings["kernel_spec_manager_class"] == f"{home}.{ExplainingKernels.__name__}"
    spec = ExplainingKernels().get_kernel_spec(PYTHON)
    assert spec.argv.count(EXTENSION) == 1
    with pytest.raises(NoSuchKernel):
        ExplainingKernels().get_kernel_spec("no-such-kernel")


def test_a_new_kernel_says_which_cell_comes_first_and_is_light(monkeypatch, tmp_path):
    cells = ["import torch", "weights = [1, 2]", "sum(weights)"]
    written = [{"cell_type": "code", "source": source} for source in cells]
    path = tmp_path / "chapter.ipynb"
    path.write_text(json.dumps({"cells": written}))
    monkeypatch.setenv("JPY_SESSION_NAME", str(path))
    manager = KernelManager(kernel_name=PYTHON, kernel_spec_manager=ExplainingKernels())
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        reply = client.execute_interactive(cells[-1], timeout=60, output_hook=lambda _: None)
        assert reply["content"]["ename"] == "NameError"
        (said,) = reply["content"]["traceback"]
        assert "'weights' does not exist yet: code cell 2" in said
        printed = []
        client.execute_interactive(
            "import sys\nprint('torch' in sys.modules, 'effnb' in globals())",
            timeout=60,
            output_hook=lambda message: printed.append(message["content"].get("text", "")),
        )
        assert "".join(printed).strip() == "False False"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
