"""A learner in a real JupyterLab: guesses, pins, resets, takes numbers away, saves, comes back.

Set EFFNB_SHOTS to a folder to look at what the tests see.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
from pathlib import Path

import nbformat
import pytest

START = """
import os

from effnb.lab import PALETTE, Exercise, guess, guesses, knob, panel

def draw(result, figure):
    axes = figure.subplots()
    axes.bar(["kept", "lost"], [result["kept"], 100 - result["kept"]], color=PALETTE[:2])
    axes.set(ylim=(0, 100), ylabel="%", title=f"{result['bits']} bits, {result['method']}")

def text(result):
    return (f"Kept: {result['kept']} %\\nError: {result['error']:.3f}\\n"
            f"It writes: {'word ' * result['bits']}… ({result['method']})")

def compute(bits, method):
    gain = 8 if method == "careful" else 0
    return {"bits": bits, "method": method, "kept": 10 * bits + gain, "error": 2.0 ** -bits}

about = dict(text=text, caption="What rounding keeps: more bits lose less.",
             bits=knob(2, 8, default=4), method=knob(["plain", "careful", "fixed"]),
             ignored=lambda v: {"bits": "fixed has its own"} if v["method"] == "fixed" else {})
print(os.getpid())
"""

CHOICE = """
panel(compute, draw, title="Rounding", **about,
      predict=guess("How much is kept at 4 bits?", ["20 %", "40 %", "80 %"],
                    answer=lambda found: f"{found['kept']} %"))
"""

NUMBER = """
panel(compute, draw, title="Rounding, a number", **about,
      predict=guess("How much is kept at 6 bits?", at={"bits": 6}, unit="%",
                    answer=lambda found: found["kept"]))
"""

OPEN = 'panel(compute, draw, title="Open", **about)'

STUB = """
import companion

def absolute(x):
    return x

mine = absolute
_ = companion.absolute_value.check(absolute)
"""

COMPANION = '''
from effnb.lab import Exercise


def reference(x):
    """The distance from zero."""
    return x if x > 0 else -x


absolute_value = Exercise("Absolute value", reference=reference, cases=[(-1,), (2,)],
                          wrong={"a negative number loses its sign": lambda x: x})
'''

SOLUTION = "companion.absolute_value.solution()"
STILL_MINE = 'print("still mine" if absolute is mine else "redefined")'
ALL = "guesses()"
ALONE = ["from effnb.lab import knob", "weights = [1, 2, 3]", "sum(weights)"]


def shot(place, name):
    """A picture for those who look at it."""
    if os.environ.get("EFFNB_SHOTS"):
        place.screenshot(path=str(Path(os.environ["EFFNB_SHOTS"]) / f"{name}.png"))


@pytest.fixture(scope="module")
def notebook(lab):
    (lab.folder / "companion.py").write_text(COMPANION)
    lab.write("learner.ipynb", START, CHOICE, NUMBER, OPEN, STUB, SOLUTION, STILL_MINE, ALL)
    opened = lab.open("learner.ipynb")
    opened.run_all()
    yield opened
    assert opened.errors == []
    opened.page.close()


def outputs(notebook):
    return notebook.page.locator(f"{notebook.SHOWN} .jp-Cell-outputArea")


def save(notebook):
    notebook.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")


def saved(lab, name="learner.ipynb"):
    return nbformat.read(lab.folder / name, as_version=4)


def kernel(lab):
    return int(saved(lab).cells[0].outputs[0].text)


def test_run_all_shows_no_answer_and_no_solution(notebook, lab):
    assert notebook.tracebacks() == 0
    shot(notebook.page, "1-run-all")
    for index in (0, 1):
        words = notebook.panel(index).root.inner_text()
        assert "Predict first" in words
        assert "Kept" not in words
        assert notebook.panel(index).root.locator("img").count() == 0
    everything = " ".join(outputs(notebook).all_inner_texts())
    assert "def reference" not in everything
    assert "still mine" in everything
    save(notebook)
    # The number that a locked panel keeps back is not in the saved file either.
    for cell in saved(lab).cells[1:3]:
        assert "Kept" not in json.dumps(cell.outputs)
    assert "reference" not in json.dumps(saved(lab).cells[5])


def test_a_choice_is_guessed_by_keyboard_alone(notebook):
    panel, keys = notebook.panel(0), notebook.page.keyboard
    panel.root.get_by_label("20 %").focus()
    keys.press("Tab")
    keys.press("Space")  # 40 %
    keys.press("Tab")
    keys.press("Tab")
    shot(panel.root, "2-chosen")
    assert panel.root.get_by_role("button", name="Commit").evaluate(
        "button => button === document.activeElement"
    )
    keys.press("Enter")
    panel.root.locator("img").wait_for()
    panel.wait_for("Kept: 40 %")
    panel.root.get_by_text("You were right.").wait_for()  # said after the panel is drawn
    shot(panel.root, "3-unlocked")
    assert "Your guess: 40 %. The answer: 40 %. You were right." in panel.root.inner_text()
    assert panel.root.get_by_role("button", name="Commit").count() == 0


def test_a_number_is_guessed_and_nothing_typed_is_lost(notebook):
    panel = notebook.panel(1)
    field = panel.root.get_by_role("textbox")
    field.fill("much")
    panel.root.get_by_role("button", name="Commit").press("Enter")
    panel.root.get_by_role("alert").wait_for()
    assert "a guess is one number" in panel.alert()
    shot(panel.root, "4-number")
    assert field.input_value() == "much"
    field.fill("")
    field.press_sequentially("50 %")  # no letter is left behind by the click that follows at once
    panel.root.get_by_role("button", name="Commit").press("Enter")
    panel.wait_for("Kept: 60 %")
    assert panel.readout("bits") == "6"
    said = "Your guess: 50 %. The answer: 60 %. You were 10 points too low."
    assert said in panel.root.inner_text()


def test_guesses_are_kept_beside_the_notebook_and_in_it(notebook, lab):
    kept = json.loads((lab.folder / "learner.guesses.json").read_text())
    assert [(one["guess"], one["answer"]) for one in kept] == [("40 %", "40 %"), (50.0, "60 %")]
    save(notebook)
    html = saved(lab).cells[1].outputs[1].data["text/html"]
    assert "Your guess: 40 %. The answer: 40 %." in html
    notebook.page.evaluate(
        """async () => {
            const notebook = window.jupyterapp.shell.currentWidget.content;
            notebook.activeCellIndex = notebook.widgets.length - 1;
            await window.jupyterapp.commands.execute("notebook:run-cell");
        }"""
    )
    table = outputs(notebook).last.locator("table")
    assert "How much is kept at 6 bits?" in table.inner_text()
    assert "50 %" in table.inner_text()
    shot(outputs(notebook).last, "5-guesses")


def test_a_position_is_pinned_compared_and_reset_by_keyboard(notebook):
    panel = notebook.panel(2)
    panel.settled()
    panel.root.get_by_role("button", name="Pin").focus()
    notebook.page.keyboard.press("Enter")
    panel.root.get_by_text("Turn a knob to compare").wait_for()
    panel.press("bits", "ArrowRight", "ArrowRight")
    panel.root.locator("table[aria-label^='Compared']").wait_for()
    panel.wait_for("Kept: 60 %")
    compared = panel.root.locator("table[aria-label^='Compared']")
    assert re.split(r"\s*\t\s*", compared.locator("tbody tr").first.inner_text()) == [
        *("Kept", "60 %", "40 %", "+20 points")
    ]
    assert panel.root.locator("img").count() == 2
    shot(panel.root, "6-pinned")
    panel.root.get_by_role("button", name="Reset").focus()
    notebook.page.keyboard.press("Enter")
    panel.wait_for("Kept: 40 %")
    compared.wait_for(state="detached")
    assert panel.readout("bits") == "4"
    assert panel.root.locator("img").count() == 1


def test_visited_positions_are_taken_away_as_csv(notebook):
    panel = notebook.panel(2)
    panel.press("bits", "End")
    panel.wait_for("Kept: 80 %")
    panel.root.locator("summary").focus()
    notebook.page.keyboard.press("Enter")
    link = panel.root.get_by_role("link", name="Save as CSV")
    link.focus()
    with notebook.page.expect_download() as caught:
        notebook.page.keyboard.press("Enter")
    assert caught.value.suggested_filename == "open.csv"
    rows = list(csv.DictReader(io.StringIO(Path(caught.value.path()).read_text())))
    assert [(row["bits"], row["Kept"]) for row in rows][:1] == [("4", "40 %")]
    assert ("8", "80 %") in [(row["bits"], row["Kept"]) for row in rows]
    assert rows[0]["It writes"].startswith("word word")


def test_a_knob_that_does_nothing_is_greyed_with_a_reason(notebook):
    panel = notebook.panel(2)
    panel.root.get_by_label("fixed").focus()
    notebook.page.keyboard.press("Space")
    panel.root.get_by_text("bits does nothing here: fixed has its own.").wait_for()
    slider = panel.root.locator(".widget-slider .noUi-target")
    assert slider.get_attribute("disabled") is not None
    shot(panel.root, "7-idle")
    panel.root.get_by_label("plain").focus()
    notebook.page.keyboard.press("Space")
    panel.root.get_by_text("does nothing here").wait_for(state="detached")


def test_a_solution_comes_on_demand_and_redefines_nothing(notebook):
    exercise = outputs(notebook).nth(4)
    assert "✗ Not yet" in exercise.inner_text()
    assert "a negative number loses its sign" in exercise.inner_text()
    assert "0 of 1 exercises done; still open: Absolute value." in exercise.inner_text()
    button = notebook.page.get_by_role("button", name="Show the solution: Absolute value")
    button.focus()
    notebook.page.keyboard.press("Enter")
    code = notebook.page.locator(f"{notebook.SHOWN} .effnb-offer pre")
    code.wait_for()
    assert "def reference(x):" in code.inner_text()
    assert "✓ Correct" in notebook.page.locator(f"{notebook.SHOWN} .effnb-offer").inner_text()
    shot(notebook.page, "8-solution")
    assert notebook.page.get_by_role("button", name="Hide the solution").count() == 1


@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_words_can_be_read_in_both_themes(notebook, theme):
    notebook.theme(theme)
    panel = notebook.panel(0)
    shot(panel.root, f"9-{theme[-5:].strip().lower()}")
    parts = (".effnb-asked", ".effnb-question [role=status]", ".jupyter-button", "summary")
    page = brightness(notebook.page.locator(f"{notebook.SHOWN} .jp-Notebook"), "background-color")
    for part in parts:
        ink = brightness(panel.root.locator(part).first, "color")
        dark, light = sorted((page, ink))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, part


def brightness(place, name):
    """Relative luminance of a CSS colour of an element."""
    colour = place.evaluate("(e, name) => getComputedStyle(e).getPropertyValue(name)", name)
    channels = [float(number) / 255 for number in re.findall(r"[\d.]+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_while_the_panel_lives_its_copy_is_out_of_sight(notebook):
    assert notebook.page.locator(f"{notebook.SHOWN} .effnb-saved").count() >= 3
    assert notebook.page.locator(f"{notebook.SHOWN} .effnb-saved:visible").count() == 0


def test_a_dead_kernel_is_said_in_the_panel(notebook, lab):
    """Its knobs are gone, also from the keyboard; picture and numbers are still there."""
    panel = notebook.panel(2)
    panel.press("bits", "Home", "ArrowRight")
    panel.wait_for("Kept: 30 %")
    save(notebook)
    os.kill(kernel(lab), signal.SIGKILL)
    panel.root.get_by_role("alert").filter(has_text="kernel behind this panel").wait_for()
    notebook.page.get_by_role("button", name="Ok").click()
    shot(panel.root, "10-dead")
    assert panel.root.locator(".noUi-handle:visible").count() == 0
    assert panel.root.get_by_role("button").count() == 0
    assert "Kept: 30 %" in panel.text()
    assert "bits = 3, method = plain" in panel.root.inner_text()
    assert panel.root.locator("img:visible").count() == 1


def test_a_reopened_notebook_shows_what_was_saved(notebook, lab):
    """After the kernel's death, in a new page with a new kernel, with nothing run."""
    again = lab.open("learner.ipynb")
    copies = again.page.locator(f"{again.SHOWN} .effnb-saved:visible")
    copies.nth(2).wait_for()
    again.page.wait_for_timeout(3000)  # the front end gives up looking for the widgets after 2 s
    everything = " ".join(outputs(again).all_inner_texts())
    assert "model not found" not in everything
    assert "Loading widget" not in everything
    words = copies.nth(2).inner_text()
    assert "bits = 3, method = plain" in words  # the knobs as they stood
    assert "Kept" in words
    picture = copies.nth(2).locator("img").first
    assert picture.evaluate("image => image.complete && image.naturalWidth > 500")
    assert "bits = 3" in picture.get_attribute("alt")
    assert "Your guess: 40 %." in copies.nth(0).inner_text()
    shot(again.page, "11-reopened")
    # Run again, it asks no question twice.
    again.run_all()
    panel = again.panel(0)
    panel.wait_for("Kept: 40 %")
    assert "Your guess: 40 %. The answer: 40 %. You were right." in panel.root.inner_text()
    assert again.errors == []
    again.page.close()


@pytest.mark.parametrize("order", [[0, 2], [2]], ids=["after the first cell", "before any other"])
def test_a_cell_that_is_run_alone_says_which_comes_first(lab, order):
    name = f"alone-{len(order)}.ipynb"
    lab.write(name, *ALONE)
    opened = lab.open(name)
    opened.page.evaluate(
        """async order => {
            const notebook = window.jupyterapp.shell.currentWidget.content;
            for (const index of order) {
                notebook.activeCellIndex = index;
                await window.jupyterapp.commands.execute("notebook:run-cell");
            }
        }""",
        order,
    )
    outputs(opened).last.get_by_text("NameError").wait_for()
    assert opened.tracebacks() == 1
    said = outputs(opened).last.inner_text()
    assert "'weights' does not exist yet: code cell 2" in said
    assert "Traceback" not in said
    shot(opened.page, f"12-alone-{len(order)}")
    opened.page.close()
