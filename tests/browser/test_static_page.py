"""A reader of the built web page: no kernel, no other host, and the slider moves all the same."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest

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
