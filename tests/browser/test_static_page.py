"""A reader of the built web page: no kernel, no other host, and the slider moves all the same."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest

from effnb.book.site.panels import panel_html, stored_panel

ROOT = Path(__file__).resolve().parents[2]
STATE = "application/vnd.jupyter.widget-state+json"
VIEW = "application/vnd.jupyter.widget-view+json"

CELL = """
from effnb.lab import knob, panel

def draw(bits, figure):
    axes = figure.subplots()
    axes.bar(["levels"], [2 ** bits])
    axes.set(ylim=(0, 256), title=f"{bits} bits")

panel(lambda bits, group: bits, draw,
      text=lambda bits: f"levels: {2 ** bits}\\nas text: {'|' * bits}",
      caption="Each bit doubles the levels.", title="Levels",
      bits=knob(2, 8, default=4), group=knob([32, 64]))
"""


@pytest.fixture(scope="module")
def small(built) -> nbformat.NotebookNode:
    return built(CELL)


def test_the_slider_moves_picture_and_numbers_with_no_kernel(site, small):
    panel, foreign = site.show("small.html", small)
    text, picture = panel.settled()
    assert "levels: 16" in text
    seen = {picture}
    for bits in (5, 6, 7):
        panel.press("bits", "ArrowRight")
        panel.wait_for(f"levels: {2**bits}\n")
        seen.add(panel.settled()[1])
        assert panel.readout("bits") == str(bits)
    assert len(seen) == 4
    panel.press("bits", "Home")
    panel.wait_for("levels: 4\n")
    assert panel.root.locator("img:visible").count() == 1
    assert "levels: 4" in panel.root.locator("img:visible").get_attribute("alt")
    assert "The other knobs need a running kernel; here group = 32." in panel.root.inner_text()
    assert foreign == [], "the page asked other hosts"
    panel.page.close()


def test_without_scripts_the_picture_and_its_numbers_are_there(site, small):
    """What GitHub and an untrusted JupyterLab show: the output without its widget."""
    plain = nbformat.from_dict(small)
    output = plain.cells[0].outputs[-1]
    assert set(output.data) == {VIEW, "text/html", "text/plain"}
    assert "levels: 16" in output.data["text/plain"]
    (site.folder / "plain.html").write_text(output.data["text/html"], encoding="utf-8")
    page, foreign = site.open("plain.html")
    assert page.locator("img").evaluate("image => image.complete && image.naturalWidth > 500")
    assert "levels: 16" in page.locator("img").get_attribute("alt")
    assert "levels: 16" in page.locator("pre").inner_text()
    assert foreign == []
    page.close()


def test_the_stored_state_is_what_github_accepts_and_small(small):
    state = small.metadata.widgets[STATE]["state"]
    assert small.metadata.widgets[STATE]["version_major"] == 2
    size = len(json.dumps(small))
    assert size < 400_000, f"one panel of seven simple frames takes {size:,} bytes"
    models = {model["model_name"] for model in state.values()}
    assert "LinkModel" in models
    assert not {"OutputModel"} & models  # nbval's strict comparison fails on these


TWO_KNOBS = """
from effnb.lab import guess, knob, panel

def compute(bits, method):
    return 2 ** bits if method == "plain" else 2

def draw(levels, figure):
    axes = figure.subplots()
    axes.bar(["levels"], [levels])
    axes.set(ylim=(0, 256), title=f"{levels} levels")

panel(compute, draw, text=lambda levels: f"Levels: {levels}", title="Levels of two methods",
      caption="Each bit doubles the levels of the plain method.",
      frames={"bits": [2, 4, 8], "method": None},
      predict=guess("How many levels have 4 bits?", ASKED answer=lambda levels: levels),
      ignored=lambda v: {"bits": "it has two levels"} if v["method"] == "binary" else {},
      bits=knob(2, 8, default=4), method=knob(["plain", "binary"]))
"""
CHOICES = "choices=[8, 16, 256],"


@pytest.fixture(scope="module")
def two_knobs(built) -> nbformat.NotebookNode:
    return built(TWO_KNOBS.replace("ASKED", CHOICES))


def test_a_stored_question_comes_before_its_panel_and_two_knobs_move(site, two_knobs):
    panel, foreign = site.show("two.html", two_knobs)
    assert panel.root.locator("img:visible").count() == 0
    assert "Levels: 16" not in panel.root.inner_text()
    panel.root.get_by_label("256", exact=True).focus()
    panel.page.keyboard.press("Space")
    panel.wait_for("Levels: 16")
    said = panel.root.inner_text()
    assert "Your guess: 256. The answer: 16." in said
    panel.press("bits", "ArrowRight")
    panel.wait_for("Levels: 256")
    panel.root.get_by_label("binary").focus()
    panel.page.keyboard.press("Space")
    panel.wait_for("Levels: 2")
    assert "bits does nothing here: it has two levels." in panel.root.inner_text()
    panel.root.get_by_label("plain").focus()
    panel.page.keyboard.press("Space")
    panel.wait_for("Levels: 256")
    assert panel.root.locator("img:visible").count() == 1
    assert foreign == []
    panel.page.close()


def test_equal_frames_are_stored_once(two_knobs):
    state = two_knobs.metadata.widgets[STATE]["state"]
    shown = [m for m in state.values() if "<img" in str(m["state"].get("value", ""))]
    assert len(shown) == 4  # three positions of one method, and one of the other
    assert len(json.dumps(two_knobs)) < 100_000


def on_the_site(site, notebook, name):
    """The panel of a notebook as the book's pages have it, with the book's script and styles."""
    static = ROOT / ".make" / "site" / "static"
    for file in ("book.js", "book.css"):
        (site.folder / file).write_bytes((static / file).read_bytes())
    (model,) = (output.data[VIEW]["model_id"] for output in notebook.cells[0].outputs)
    made = panel_html(stored_panel(notebook, model), "panel-1", lambda content: content)
    page = (
        '<!doctype html><html lang="en" data-theme="THEME"><meta charset="utf-8">'
        "<title>Panel</title>"
        f'<link rel="stylesheet" href="book.css"><main style="max-width: 760px">{made}</main>'
        '<script src="book.js"></script></html>'
    )
    (site.folder / name).write_text(page.replace("THEME", "light"), encoding="utf-8")
    (site.folder / f"dark-{name}").write_text(page.replace("THEME", "dark"), encoding="utf-8")
    return site.open(name)


def test_the_books_page_asks_first_and_moves_two_knobs(site, two_knobs):
    page, foreign = on_the_site(site, two_knobs, "book.html")
    panel = page.locator("section.panel")
    assert panel.locator("img:visible").count() == 0
    panel.get_by_role("button", name="Commit").press("Enter")
    assert "Not yet: choose one." in panel.inner_text()
    panel.get_by_label("8", exact=True).press("Space")
    panel.get_by_role("button", name="Commit").press("Enter")
    assert "Your guess: 8. The answer: 16." in panel.inner_text()
    numbers = panel.locator(".effnb-numbers:visible")
    assert "16" in numbers.inner_text()
    panel.get_by_role("slider", name="bits").press("ArrowRight")
    assert "256" in numbers.inner_text()
    panel.get_by_label("binary").press("Space")
    assert "256" not in numbers.inner_text()
    assert "bits does nothing here" in panel.inner_text()
    assert panel.locator("img:visible").count() == 1
    page.wait_for_function(
        "() => document.querySelector('.panel-said').textContent.includes('method binary')"
    )
    assert foreign == []
    page.close()


def test_the_books_page_takes_a_number_or_a_skip(site, built):
    notebook = built(TWO_KNOBS.replace("ASKED", "unit='levels',"))
    page, _ = on_the_site(site, notebook, "number.html")
    panel = page.locator("section.panel")
    guess = panel.get_by_label("Your guess")
    guess.fill("many")
    guess.press("Enter")
    assert "Not yet: type a number." in panel.inner_text()
    assert panel.locator("img:visible").count() == 0
    guess.fill("12")
    guess.press("Enter")
    assert "Your guess: 12 levels. The answer: 16 levels." in panel.inner_text()
    assert panel.locator("img:visible").count() == 1
    page.reload()
    assert panel.locator("img:visible").count() == 0
    panel.get_by_role("button", name="Skip").press("Enter")
    assert "The answer: 16 levels." in panel.inner_text()
    assert "Your guess:" not in panel.inner_text()
    page.close()


def test_the_first_panel_of_the_workbook(site):
    """The tour as it is built: its first panel's knob `bits` moves with no kernel."""
    notebook = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", as_version=4)
    panel, foreign = site.show("tour.html", notebook)
    text, picture = panel.settled()
    stood = panel.readout("bits")
    panel.press("bits", "ArrowLeft")
    panel.wait_for_change(text)
    after, moved = panel.settled()
    assert panel.readout("bits") != stood
    assert after != text
    assert moved != picture
    assert foreign == [], "the page asked other hosts"
    panel.page.close()
