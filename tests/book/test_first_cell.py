"""Where effnb is missing a page says in a sentence how to get it, and says nothing else."""

import os
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from effnb.book import build, first_cell
from effnb.lab.chapters import TABLE


def notebook(*sources, tags=first_cell.TAGS):
    """A notebook whose first code cell has these tags."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = list(tags)
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), *cells])


@pytest.fixture
def without_effnb(tmp_path, monkeypatch):
    """Kernels for which there is no effnb, as in Colab or a folder of downloads."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'effnb':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    hidden = subprocess.run([sys.executable, "-c", "import effnb"], capture_output=True, text=True)
    assert "ModuleNotFoundError" in hidden.stderr


def test_without_effnb_the_page_says_how_to_get_it(without_effnb):
    page = notebook(first_cell.first_cell("00_start_here"), "print('reached')")
    with pytest.raises(CellExecutionError):
        NotebookClient(page, kernel_name="python3", timeout=120).execute(env=dict(os.environ))
    (output,) = page.cells[1].outputs
    said = "".join(output.traceback)
    assert "make lab" in said
    assert "pip install" in said
    assert "\n" not in said.strip()
    assert "Traceback" not in said
    assert page.cells[2].outputs == []  # Run All stops there


def test_with_effnb_it_prints_the_time(capsys):
    exec(compile(first_cell.first_cell("00_start_here"), "cell", "exec"), {})
    assert "Reading: about" in capsys.readouterr().out


@pytest.mark.parametrize("name", TABLE)
def test_every_chapter_has_one_of_its_own(name):
    right = first_cell.first_cell(name)
    expected = name in first_cell.UNTIL_REBUILT
    assert first_cell.problems(notebook(right), name) == []
    wrong = [
        notebook(right.replace(name, "elsewhere")),
        notebook("import effnb", right),
        notebook(right, tags=["run-time"]),
    ]
    assert [first_cell.problems(page, name) == [] for page in wrong] == [expected] * 3


def test_the_builder_asks_for_it(monkeypatch, tmp_path):
    path = tmp_path / "01_data" / "1_filtering.py"
    path.parent.mkdir()
    path.write_text("# %%\nimport effnb\n")
    monkeypatch.setattr(build, "NOTEBOOKS", tmp_path)
    assert [problem for problem in build.problems(path) if "how to get effnb" in problem]
