"""A reader in a real JupyterLab: runs all cells, moves sliders with the keyboard, reads."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]

IMPORTS = """
import threading
import time

import torch

from effnb.lab import knob, panel

grid = torch.linspace(0, 1, 50)
main_thread = threading.get_ident()
"""

QUICK = """
def compute(bits, shape):
    if bits == 7:
        raise ValueError("seven bits do not fit into a box of six.")
    weight = torch.ones(3, requires_grad=True)
    return {
        "bits": bits,
        "shape": shape,
        "gradients": bool((weight * 2).requires_grad),
        "inference": torch.is_inference_mode_enabled(),
        "thread": "main" if threading.get_ident() == main_thread else "another",
    }

def draw(result, figure):
    axes = figure.subplots()
    steps = 2 ** result["bits"] - 1
    axes.plot(grid, grid ** 2, label="the curve")
    axes.step(grid, (grid ** 2 * steps).round() / steps, label=f"on {steps + 1} levels")
    axes.set(xlabel="input", ylabel="output", title="A curve on a grid")
    axes.legend()

def text(result):
    return (f"bits: {result['bits']}\\nlevels: {2 ** result['bits']}\\n"
            f"gradients: {result['gradients']}\\ninference: {result['inference']}\\n"
            f"thread: {result['thread']}\\nshape: {result['shape']}\\n"
            "what it says: Every value of the curve is moved to the nearest of a few levels, "
            "and the fewer there are, the coarser the steps.")

panel(compute, draw, text=text, title="Rounding to a grid",
      caption="A parabola and its copy on 2^bits levels: each bit halves the steps.",
      bits=knob(2, 8, default=4), shape=knob(["row", "column"]))
"""

SLOW = """
from pathlib import Path
visited = []

def train(bits):
    visited.append(bits)
    weight = torch.ones(3, requires_grad=True)
    while len(visited) > 1 and not Path("trained").exists():
        time.sleep(0.05)
    (weight * bits).sum().backward()
    return weight.grad

panel(train, lambda grad, figure: figure.subplots().bar(range(3), grad),
      text=lambda grad: f"gradient: {grad[0].item():.0f}\\nvisited: {' '.join(map(str, visited))}",
      caption="The gradient of a sum is the factor.", trains=True, bits=knob(1, 9, default=2))
"""

CELL_AT_WORK = """
from pathlib import Path
times_run = globals().get("times_run", 0) + 1
while times_run > 1 and not Path("enough").exists():
    time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def notebook(lab):
    """The small notebook, open, with all its cells run."""
    lab.write("small.ipynb", IMPORTS, QUICK, SLOW, CELL_AT_WORK)
    opened = lab.open("small.ipynb")
    opened.run_all()
    yield opened
    assert opened.errors == []
    assert opened.tracebacks() == 0
    opened.page.close()


def test_one_key_changes_picture_and_numbers(notebook):
    panel = notebook.panel()
    text, picture = panel.settled()
    assert "levels: 16" in text
    panel.press("bits", "ArrowRight")
    panel.wait_for("levels: 32")
    after, moved = panel.settled()
    assert panel.readout("bits") == "5"
    assert "levels: 32" in after
    assert moved != picture
    panel.press("bits", "ArrowLeft")
    panel.wait_for("levels: 16")
    assert panel.settled()[1] == picture  # one picture, redrawn in place
    assert panel.root.locator("img").count() == 1


def test_a_list_of_choices_works_from_the_keyboard(notebook):
    panel = notebook.panel()
    panel.settled()
    panel.root.get_by_label("row").focus()
    notebook.page.keyboard.press("Tab")
    notebook.page.keyboard.press("Space")
    panel.wait_for("shape: column")
    notebook.page.keyboard.press("Shift+Tab")
    notebook.page.keyboard.press("Space")
    panel.wait_for("shape: row")


def test_the_callback_has_its_own_grad_mode(notebook):
    panel = notebook.panel()
    panel.press("bits", "Home")
    panel.wait_for("levels: 4\n")
    text, _ = panel.settled()
    assert "thread: another" in text  # else this proves nothing about threads
    assert "gradients: False" in text
    assert "inference: False" in text  # else nothing later could learn from its tensors


def test_an_exception_is_a_sentence_in_the_panel(notebook):
    panel = notebook.panel()
    panel.press("bits", "Home", "PageUp")
    panel.settled()
    panel.press("bits", "End", "ArrowLeft")  # 8, then 7, which fails
    panel.root.get_by_role("alert").wait_for()
    sentence = panel.alert()
    assert "bits = 7" in sentence
    assert "seven bits do not fit into a box of six." in sentence
    assert notebook.tracebacks() == 0
    assert "Traceback" not in panel.root.inner_text()
    panel.press("bits", "ArrowLeft")
    panel.wait_for("levels: 64")
    panel.settled()
    assert panel.alert() == ""


def test_quick_moves_end_at_the_last_and_training_has_gradients(notebook, lab):
    """Training ends when a file appears, which is after the panel has said that it works."""
    panel = notebook.panel(1)
    text, before = panel.settled()
    assert "gradient: 2" in text
    panel.press("bits", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight")
    panel.root.locator(".effnb-busy").wait_for()  # it says that it works, after a second
    assert "Computing bits = 3" in panel.root.locator(".effnb-busy").inner_text()
    (lab.folder / "trained").touch()
    panel.wait_for("gradient: 6")
    text, after = panel.settled()
    assert panel.readout("bits") == "6"
    assert after != before
    visited = text.split("visited: ")[1].split()
    assert visited[0] == "2"
    assert visited[-1] == "6"
    assert len(visited) <= 4, f"stale requests were computed: {visited}"


def test_a_panel_answers_while_a_cell_runs(notebook, lab):
    """The cell at work ends when a file appears, which is after the panel has answered."""
    panel = notebook.panel()
    panel.press("bits", "Home")
    panel.wait_for("levels: 4\n")
    panel.settled()
    notebook.start_last_cell()
    panel.press("bits", "ArrowRight")
    panel.wait_for("levels: 8\n")
    assert notebook.last_cell_runs()
    (lab.folder / "enough").touch()
    notebook.wait_for_last_cell()


def test_a_notebook_nobody_trusts_yet_shows_the_picture_and_its_numbers(lab, built):
    """As cloned: JupyterLab shows no widgets then, and must not show `VBox(children=…)`."""
    nbformat.write(built(f"{IMPORTS}\n{QUICK}".replace("if bits == 7", "if bits == 0")),
                   lab.folder / "cloned.ipynb")  # fmt: skip
    opened = lab.open("cloned.ipynb")
    picture = opened.page.locator(f"{opened.SHOWN} .jp-OutputArea-output img")
    picture.wait_for()
    assert picture.evaluate("image => image.complete && image.naturalWidth > 500")
    assert "levels: 16" in picture.get_attribute("alt")
    output = opened.page.locator(f"{opened.SHOWN} .jp-OutputArea-output").inner_text()
    assert "levels: 16" in output
    assert "VBox(" not in output
    opened.page.close()


@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_words_can_be_read_in_both_themes(notebook, theme):
    notebook.theme(theme)
    panel = notebook.panel()
    page = brightness(panel.page.locator(f"{notebook.SHOWN} .jp-Notebook"), "background-color")
    assert (page < 0.2) == (theme == "JupyterLab Dark")
    for part in (".effnb-title", ".effnb-value", ".effnb-line", ".widget-label", ".widget-readout"):
        ink = brightness(panel.root.locator(part).first, "color")
        dark, light = sorted((page, ink))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, part


def brightness(place, name):
    """Relative luminance of a CSS colour of an element."""
    colour = place.evaluate("(e, name) => getComputedStyle(e).getPropertyValue(name)", name)
    channels = [float(number) / 255 for number in re.findall(r"[\d.]+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_first_panel_of_the_workbook(lab):
    """The tour's own first panel, whose main knob is called `bits`."""
    folder = lab.folder / "notebooks"
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / "00_start_here.ipynb", folder)
    opened = lab.open("notebooks/00_start_here.ipynb")
    opened.run_all()
    panel = opened.panel()
    before, picture = panel.settled(seconds=120)
    stood = panel.readout("bits")
    panel.press("bits", "ArrowLeft")
    panel.wait_for_change(before)
    after, moved = panel.settled(seconds=120)
    assert panel.readout("bits") != stood
    assert after != before
    assert moved != picture
    assert panel.alert() == ""
    assert opened.tracebacks() == 0
    assert opened.errors == []
    opened.page.close()
