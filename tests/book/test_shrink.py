"""A built notebook takes fewer bytes, and its readers see the same."""

import base64
import io
import json
import re
from pathlib import Path

import ipywidgets as widgets
import nbformat
import numpy as np
import pytest
from PIL import Image

from effnb.book import build, shrink
from effnb.book.shrink import VIEW, WIDGETS
from effnb.lab import figures

SHOWN = re.compile(r'src="data:image/(\w+);base64,([^"]+)"')


def pixels(file):
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)


def decoded(markup):
    return [(kind, base64.b64decode(data)) for kind, data in SHOWN.findall(markup)]


def drawing(canvas):
    axes = canvas.subplots()
    axes.plot([1, 2, 3], [3, 1, 2], label="one")
    axes.plot([1, 2, 3], [1, 3, 2], label="other")
    axes.axvspan(1, 1.5, color="#F1F0EC")  # as faint as a background can be
    axes.legend()


@pytest.fixture
def notebook():
    """A notebook of one panel: two frames, a slider, their link, and a figure."""
    picture = figures.render(drawing)
    frames = [
        widgets.HTML(f"{picture.html('One')} 1", layout=widgets.Layout(width="auto")),
        widgets.HTML(f"{picture.html('Two')} 2", layout=widgets.Layout(width="auto")),
        widgets.HTML("the same", layout=widgets.Layout(width="auto")),
        widgets.HTML("the same", layout=widgets.Layout(width="auto")),
    ]
    stack = widgets.Stack(frames, selected_index=0)
    knob = widgets.SelectionSlider(options=["2", "3", "4", "8"], index=0, description="bits")
    link = widgets.jslink((knob, "index"), (stack, "selected_index"))
    box = widgets.VBox([knob, stack])
    unseen = widgets.HTML("never displayed")
    made = [knob, stack, link, box, unseen, *frames]
    made += [one.layout for one in made if hasattr(one, "layout")]
    made += [one.style for one in made if hasattr(one, "style")]
    state = {one.model_id: one._get_embed_state() for one in made}
    cell = nbformat.v4.new_code_cell("panel(\n    bits\n)", execution_count=1)
    cell.metadata.tags = ["hide-input"]
    cell.outputs = [
        nbformat.v4.new_output(
            "display_data",
            {
                VIEW: {"version_major": 2, "version_minor": 0, "model_id": box.model_id},
                "text/html": figures.captioned(picture, "A caption.", "Two lines"),
                "image/png": base64.b64encode(picture.png).decode(),
            },
        ),
        nbformat.v4.new_output("stream", name="stdout", text="one line\nand “another”\n"),
    ]
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A title\n\nö"), cell])
    made.metadata.widgets = {
        WIDGETS: {"version_major": 2, "version_minor": 0, "state": nbformat.from_dict(state)}
    }
    return made


def state_of(notebook):
    return notebook.metadata.widgets[WIDGETS]["state"]


def of_kind(notebook, kind):
    return [w["state"] for w in state_of(notebook).values() if w["model_name"] == kind]


def test_less_is_stored_and_a_second_time_changes_nothing(notebook):
    before = len(nbformat.writes(notebook))
    shrink.shrink(notebook)
    text = shrink.text_of(notebook)
    assert len(text) < before / 2
    again = nbformat.reads(text, as_version=4)
    nbformat.validate(again)
    assert again == notebook
    shrink.shrink(again)
    assert shrink.text_of(again) == text


def test_pictures_look_the_same_and_only_frames_are_no_png(notebook):
    original = pixels(decoded(notebook.cells[1].outputs[0].data["text/html"])[0][1])
    shrink.shrink(notebook)
    data = notebook.cells[1].outputs[0].data
    assert "image/png" not in data  # it is in the HTML
    ((kind, still),) = decoded(data["text/html"])
    assert kind == "png"
    frames = [decoded(s["value"]) for s in of_kind(notebook, "HTMLModel") if "<img" in s["value"]]
    assert [frame[0][0] for frame in frames] == ["webp", "webp"]
    for shown in (still, frames[0][0][1], frames[1][0][1]):
        assert abs(pixels(shown) - original).max() <= shrink.ALIKE
        # A wide surface keeps its colour, however near it is to that beside it.
        for colour in np.unique(original.reshape(-1, 3), axis=0):
            wide = (original == colour).all(axis=-1)
            if wide.mean() > shrink.RARE:
                assert (pixels(shown)[wide] == colour).all()
    assert len(frames[0][0][1]) < 0.8 * len(still)


def test_a_heat_map_and_a_photograph_keep_all_their_colours():
    ramp = np.tile(np.linspace(0, 1, 200), (40, 1))
    map_ = figures.render(lambda canvas: canvas.subplots().imshow(ramp)).png
    file = io.BytesIO()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file, "png")
    for png in (map_, file.getvalue()):
        for smaller in (shrink.smaller_png, shrink.smaller_frame):
            _, packed = smaller(png)
            assert (pixels(packed) == pixels(png)).all()
            assert len(packed) <= len(png)


def test_a_picture_that_cannot_be_made_smaller_stays():
    file = io.BytesIO()
    Image.new("P", (1, 1)).save(file, "png", optimize=True)
    assert shrink.smaller_png(file.getvalue()) == ("png", file.getvalue())


def test_no_property_that_matters_is_lost(notebook):
    """What is left out is what ipywidgets' own classes say when they are told nothing."""
    full = json.loads(json.dumps(state_of(notebook)))
    shrink.drop_defaults(notebook)
    plain = {
        "LayoutModel": widgets.Layout(),
        "StackModel": widgets.Stack(),
        "VBoxModel": widgets.VBox(),
        "HTMLModel": widgets.HTML(),
        "SelectionSliderModel": widgets.SelectionSlider(options=["x"]),
    }
    looked_at = 0
    for name, widget in state_of(notebook).items():
        default = plain.get(widget["model_name"])
        for key in full[name]["state"].keys() - widget["state"].keys():
            value = full[name]["state"][key]
            if default is not None and key != "titles":
                got = getattr(default, key)
                assert (list(got) if isinstance(got, tuple) else got) == value, key
                looked_at += 1
    assert looked_at > 100
    (slider,) = of_kind(notebook, "SelectionSliderModel")
    assert slider["index"] == 0  # its default, but the book's pages read it
    assert slider["_options_labels"] == ["2", "3", "4", "8"]
    assert {layout.get("width") for layout in of_kind(notebook, "LayoutModel")} == {None, "auto"}


@pytest.mark.parametrize("lost", [False, True], ids=["stored", "left out by an older build"])
def test_that_no_choice_is_made_yet_is_kept(lost):
    """The browser takes a missing index for an empty word, and a link would hand that on."""
    options = widgets.RadioButtons(options=["a", "b"], index=None)
    stack = widgets.Stack([widgets.HTML("a"), widgets.HTML("b")], selected_index=None)
    made = {one.model_id: nbformat.from_dict(one._get_embed_state()) for one in (options, stack)}
    if lost:
        del made[options.model_id]["state"]["index"]
    notebook = nbformat.v4.new_notebook()
    notebook.metadata.widgets = {WIDGETS: {"version_major": 2, "state": made}}
    shrink.drop_defaults(notebook)
    (shown,) = of_kind(notebook, "RadioButtonsModel")
    assert shown["index"] is None
    (shown,) = of_kind(notebook, "StackModel")
    assert shown["selected_index"] is None


def test_equal_widgets_are_one_and_no_reference_is_lost(notebook):
    shrink.shrink(notebook)
    state = state_of(notebook)
    assert len(of_kind(notebook, "HTMLModel")) == 3  # two frames, and one that is shown twice
    (stack,) = of_kind(notebook, "StackModel")
    assert len(stack["children"]) == 4
    assert stack["children"][2] == stack["children"][3]
    assert len(of_kind(notebook, "LayoutModel")) == 2  # one is empty, one has a width
    assert "never displayed" not in json.dumps(state)
    references = re.findall(r"IPY_MODEL_(\w+)", json.dumps(state))
    assert references
    assert set(references) <= state.keys()
    (link,) = of_kind(notebook, "LinkModel")
    assert state[link["target"][0].removeprefix("IPY_MODEL_")]["model_name"] == "StackModel"


def test_a_widget_that_is_joined_to_a_control_is_not_merged():
    one, other = widgets.HTML("a"), widgets.HTML("a")
    knobs = widgets.Text("b"), widgets.Text("c")
    links = [
        widgets.jslink((knob, "value"), (html, "value"))
        for knob, html in zip(knobs, (one, other), strict=True)
    ]
    made = [one, other, *knobs, *links]
    notebook = nbformat.v4.new_notebook()
    notebook.metadata.widgets = {
        WIDGETS: {"state": {w.model_id: w._get_embed_state() for w in made}, "version_major": 2}
    }
    shrink.merge_equal(notebook)
    assert len(of_kind(notebook, "HTMLModel")) == 2


def test_each_output_and_each_widget_has_a_line(notebook):
    shrink.shrink(notebook)
    lines = shrink.text_of(notebook).splitlines()
    outputs = [line for line in lines if '"output_type":' in line]
    assert len(outputs) == 2
    assert sum('"model_name":' in line for line in lines) == len(state_of(notebook))
    assert '    "panel(\\n",' in lines  # a source as Jupyter writes it, line by line
    assert any("ö" in line for line in lines)


def test_notebooks_without_widgets_or_outputs_are_left_as_they_are():
    plain = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("words")])
    before = json.dumps(plain)
    shrink.shrink(plain)
    assert json.dumps(plain) == before
    assert nbformat.reads(shrink.text_of(plain), as_version=4) == plain


# ------------------------------------------------------------------------------- the command


def chapter(folder: Path, text: str | None) -> Path:
    path = folder / "1_chapter.py"
    path.write_text("# %%\nprint(1)\n", encoding="utf-8")
    if text is not None:
        path.with_suffix(".ipynb").write_text(text, encoding="utf-8")
    return path


def test_the_command_shrinks_what_is_built_and_executes_nothing(notebook, tmp_path, capsys):
    path = chapter(tmp_path, nbformat.writes(notebook))
    before = path.with_suffix(".ipynb").stat().st_size
    assert build.main(["--shrink"], tmp_path) == 0
    after = path.with_suffix(".ipynb").stat().st_size
    assert after < before / 2
    assert (
        f"1_chapter: {before / 1000:.0f} kB, now {after / 1000:.0f} kB" in capsys.readouterr().out
    )
    stored = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert stored.cells[1].outputs[1].text == "one line\nand “another”\n"
    assert build.main(["--shrink", "1_chapter"], tmp_path) == 0
    assert path.with_suffix(".ipynb").stat().st_size == after


@pytest.mark.parametrize(("text", "why"), [(None, "never been built"), ("{", "not a valid")])
def test_what_cannot_be_shrunk_is_said_and_kept(tmp_path, capsys, text, why):
    path = chapter(tmp_path, text)
    assert build.main(["--shrink"], tmp_path) == 1
    assert why in capsys.readouterr().err
    if text is not None:
        assert path.with_suffix(".ipynb").read_text() == text
