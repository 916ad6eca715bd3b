"""Chapters are built from one source, and what nbval would pass in silence is found."""

import copy
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from effnb.book import build
from effnb.lab.claims import MIME as VERDICTS

HEADER = """\
# ---
# jupyter:
#   effnb:
#     minutes: 7
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

"""
CHAPTER = (
    HEADER
    + '''\
# %% [markdown]
# # Rounding
#
# Half of 2.50 is a quarter of 5.

# %% tags=["hide-input", "run-time"]
print("not known yet")

# %% tags=["nbval-check-output"]
import os
from pathlib import Path

print(f"{5 / 2:.2f}")

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>Add one.</details>

# %%
from effnb.lab.checks import Exercise

exercise = Exercise(
    "one more",
    minutes=1,
    difficulty="easy",
    reference=lambda x: x + 1,
    cases=[(1,), (5,)],
    wrong={"it is two more": lambda x: x + 2},
)

# %% tags=["exercise"]
def one_more(x):
    """Return x + 1."""
    ...

exercise.check(one_more)

# %% tags=["solution"]
def one_more(x):
    """Return x + 1."""
    return x + 1

exercise.check(one_more)

# %%
import ipywidgets as widgets

slider = widgets.IntSlider(max=1, description="frame")
stack = widgets.Stack([widgets.HTML("a"), widgets.HTML("b")], selected_index=0)
link = widgets.jslink((slider, "value"), (stack, "selected_index"))
widgets.VBox([slider, stack])

# %%
print(os.environ["EFFNB_BUILD"], os.environ["HF_HUB_OFFLINE"], Path.cwd().name)
'''
)


def small(*cells):
    """The source of a chapter with these cells."""
    return HEADER + "\n\n".join(cells) + "\n"


def write(folder, text, name="05_inference/1_pruning"):
    """Put a source where chapters lie."""
    path = folder / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A chapter that was built: (source, notebook, what was measured)."""
    folder = tmp_path_factory.mktemp("once")
    path = write(folder, CHAPTER)
    measured = build.build(path, folder)
    return path, nbformat.read(path.with_suffix(".ipynb"), 4), measured


@pytest.fixture
def built(once, tmp_path):
    """A copy of it that a test may damage: a function of a change to the notebook."""
    path, notebook, _ = once
    mine = write(tmp_path, path.read_text())

    def change(function=lambda notebook: None):
        damaged = copy.deepcopy(notebook)
        function(damaged)
        nbformat.write(damaged, mine.with_suffix(".ipynb"))
        return build.problems(mine)

    change.path = mine
    change.folder = tmp_path
    return change


def cell_with(notebook, text):
    """The cell that contains a text."""
    return next(cell for cell in notebook.cells if text in cell.source)


def said(notebook, text):
    """What the cell that contains a text printed."""
    return "".join(build.printed(output) for output in cell_with(notebook, text).outputs)


# --- building -----------------------------------------------------------------------------------


def test_a_chapter_is_executed_in_its_folder_offline_and_as_a_build(once):
    _, notebook, _ = once
    assert said(notebook, "Path.cwd") == "1 1 05_inference\n"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all("execution" not in cell.metadata for cell in code)  # no timestamps


def test_what_was_measured_stands_at_the_top_and_in_the_metadata(once):
    _, notebook, measured = once
    assert notebook.metadata.effnb == {"minutes": 7}
    assert notebook.metadata.measured == {
        "seconds": measured.seconds,
        "mebibytes": measured.mebibytes,
        "cores": os.cpu_count(),
    }
    assert measured.mebibytes >= 100  # a kernel is larger than nothing
    top = said(notebook, "not known yet")
    assert f"about 7 minutes, exercises included. Running all cells: {measured.seconds} s" in top


def test_widgets_keep_their_state_and_their_frames(once):
    _, notebook, _ = once
    state = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    models = {model["model_name"] for model in state.values()}
    assert {"IntSliderModel", "StackModel", "LinkModel"} <= models
    shown = cell_with(notebook, "jslink").outputs[0].data
    assert shown["application/vnd.jupyter.widget-view+json"]["model_id"] in state
    # Every reference from one widget to another leads somewhere.
    for word in json.dumps(state).split('"'):
        if word.startswith("IPY_MODEL_"):
            assert word.removeprefix("IPY_MODEL_") in state


def test_a_second_build_gives_the_same_file(once, tmp_path):
    path, _, measured = once
    first = path.with_suffix(".ipynb").read_text()
    again = write(tmp_path, path.read_text())
    remeasured = build.build(again, tmp_path)
    second = again.with_suffix(".ipynb").read_text()
    for key in ("seconds", "mebibytes"):  # the one thing that may differ
        old, new = getattr(measured, key), getattr(remeasured, key)
        second = second.replace(f'"{key}": {new}', f'"{key}": {old}')
    second = second.replace(
        f"{remeasured.seconds} s and {remeasured.mebibytes} MiB",
        f"{measured.seconds} s and {measured.mebibytes} MiB",
    )
    assert first == second


def test_solutions_are_folded_and_cells_have_lasting_names(once):
    path, notebook, _ = once
    solution = next(cell for cell in notebook.cells if "solution" in build.tags(cell))
    assert solution.metadata.jupyter.source_hidden
    ids = {cell.source: cell.id for cell in notebook.cells}
    assert len(set(ids.values())) == len(notebook.cells)
    more = path.read_text().replace('# %% tags=["nbval', '# %%\nnew = 1\n\n# %% tags=["nbval')
    longer = write(path.parent.parent, more, "05_inference/longer")
    source = build.read_source(longer)
    longer.unlink()
    assert len(source.cells) == len(notebook.cells) + 1
    assert {cell.source: cell.id for cell in source.cells}.items() >= ids.items()


def test_nothing_pairs_the_files(once):
    _, notebook, _ = once
    assert "jupytext" not in notebook.metadata


def test_a_cell_that_raises_is_named_and_the_old_notebook_stays(tmp_path):
    path = write(tmp_path, small("# %%\nx = 1", "# %%\nx / 0"))
    path.with_suffix(".ipynb").write_text("old")
    with pytest.raises(build.BuildError, match=r"cell 1 \('x / 0'\) raised ZeroDivisionError"):
        build.build(path, tmp_path)
    assert path.with_suffix(".ipynb").read_text() == "old"
    assert {entry.suffix for entry in path.parent.iterdir()} == {".ipynb", ".py"}


def test_a_cell_that_hangs_is_named(tmp_path):
    path = write(tmp_path, small("# %%\nx = 1", "# %%\nimport time; time.sleep(600)"))
    notebook = build.read_source(path)
    start = time.monotonic()
    with pytest.raises(build.BuildError, match=r"cell 1 .* ran for more than 10 s"):
        build.execute(notebook, path.parent, cell_seconds=10)  # cell 0 takes none of them
    assert time.monotonic() - start < 300


def test_a_cell_that_kills_its_kernel_is_named(tmp_path):
    path = write(tmp_path, small("# %%\nx = 1", "# %%\nimport os; os._exit(9)"))
    with pytest.raises(build.BuildError, match=r"cell 1 .* took its kernel down"):
        build.build(path, tmp_path)


def test_the_memory_of_a_kernel_is_seen(tmp_path):
    cell = "# %%\nimport time\nx = bytearray(300 * 2**20)\ntime.sleep(3)"
    path = write(tmp_path, small(cell))
    _, peak = build.execute(build.read_source(path), path.parent)
    assert 300 * 2**20 < peak < 1000 * 2**20


# --- the command --------------------------------------------------------------------------------


def test_the_command_builds_checks_and_names(tmp_path, capsys):
    source = small("# %% [markdown]\n# # A title", "# %%\nprint(1)")
    write(tmp_path, source)
    write(tmp_path, source, "00_start_here")
    assert build.main(["--check"], tmp_path) == 1
    assert capsys.readouterr().err.count("it has never been built") == 2
    assert build.main(["1_pruning"], tmp_path) == 0
    assert re.search(r"05_inference/1_pruning: \d+ s, \d+ MiB, \d+ kB", capsys.readouterr().out)
    assert build.main(["--lines"], tmp_path) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == [
        "chapter",
        "00_start_here",
        "05_inference/1_pruning",
    ]
    assert build.main(["--check", "05_inference/1_pruning"], tmp_path) == 0
    assert build.main(["--check"], tmp_path) == 1
    assert build.main([str(tmp_path / "00_start_here.py")], tmp_path) == 0
    assert build.main(["--check"], tmp_path) == 0
    assert build.main(["nonsense"], tmp_path) == 1
    assert "there are: 00_start_here, 05_inference/1_pruning." in capsys.readouterr().err


def test_the_map_on_a_page_follows_what_is_built(tmp_path):
    """The tour shows which chapters are written; it is not built again when another one is."""
    show = "# %% tags=[\"map\"]\nfrom IPython.display import Markdown\n\nMarkdown('old')"
    tour = write(tmp_path, small(show), "00_start_here").with_suffix(".ipynb")
    assert build.main(["00_start_here"], tmp_path) == 0
    first = tour.read_text()
    assert "[Pruning]" not in first
    source = write(tmp_path, small("# %% [markdown]\n# # Pruning", "# %%\nprint(1)"))
    build.build(source, tmp_path)
    assert [p for p in build.check(tmp_path) if "map" in p] == [
        "00_start_here: its map of the chapters is old; build any chapter."
    ]
    assert build.renew_maps(tmp_path) == [tour]
    assert build.check(tmp_path) == []
    assert "[Pruning]" in tour.read_text()
    assert build.renew_maps(tmp_path) == []
    tour.write_text("{")
    assert "not a valid notebook" in build.check(tmp_path)[0]
    assert build.renew_maps(tmp_path) == []


def test_a_failing_build_ends_with_a_sentence(tmp_path, capsys):
    write(tmp_path, small("# %%\nraise ValueError('no such bits')"))
    assert build.main([], tmp_path) == 1
    assert "raised ValueError: no such bits" in capsys.readouterr().err


def test_no_chapters_is_nothing_wrong(tmp_path):
    assert build.main([], tmp_path) == 0
    assert build.main(["--check"], tmp_path) == 0


def test_the_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "effnb.book.build", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--learners FOLDER" in done.stdout


# --- checking -----------------------------------------------------------------------------------


def test_a_built_chapter_has_no_problems(built):
    assert built() == []


def change_source(notebook):
    cell_with(notebook, "5 / 2").source += "\n"


def change_tags(notebook):
    cell_with(notebook, "5 / 2").metadata.tags = []


def change_kind(notebook):
    notebook.cells[0] = nbformat.v4.new_code_cell(notebook.cells[0].source, execution_count=9)


def drop_cell(notebook):
    notebook.cells.pop()


def add_cell(notebook):
    notebook.cells.append(nbformat.v4.new_markdown_cell("more"))


def change_minutes(notebook):
    notebook.metadata.effnb.minutes = 8


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (change_source, "cell 2 ('import os') differs in the .ipynb; run `make notebooks`."),
        (change_tags, "cell 2 ('import os') differs"),
        (change_kind, "cell 0 ('# Rounding') differs"),
        (drop_cell, "only the .py has cell 8"),
        (add_cell, "only the .ipynb has cell 9 ('more')"),
        (change_minutes, "the header's `effnb` differs"),
    ],
)
def test_a_pair_out_of_step_is_found(built, damage, sentence):
    assert any(sentence in problem for problem in built(damage))


def output(kind, /, **content):
    """A change that adds an output to the cell that prints 2.50."""

    def change(notebook):
        cell_with(notebook, "5 / 2").outputs.append(nbformat.v4.new_output(kind, **content))

    return change


def never_executed(notebook):
    cell_with(notebook, "5 / 2").execution_count = None


def silent(notebook):
    cell_with(notebook, "5 / 2").outputs = []


def lost_state(notebook):
    del notebook.metadata["widgets"]


def state_without_its_key(notebook):
    widgets = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]
    widgets["model"] = widgets.pop("state")


def wrong_solution(notebook):
    cell = next(cell for cell in notebook.cells if "solution" in build.tags(cell))
    cell.outputs[0].text = "Not yet: …"


def right_stub(notebook):
    cell = next(cell for cell in notebook.cells if "exercise" in build.tags(cell))
    cell.outputs[0].text = "Correct: …"


def too_large(notebook):
    notebook.metadata.ballast = "x" * build.SIZE_LIMIT


PART = {"name": "found later", "expect": "below", "bound": 0.5, "margin": 0.0}
PICTURE = {"image/png": "iVBORw0KGgo="}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (never_executed, "was never executed"),
        (silent, "prints nothing"),
        (output("error", ename="KeyError", evalue="'a'", traceback=[]), "raised KeyError: 'a'"),
        (output("stream", name="stdout", text="UsageError: Line magic"), "shows a UsageError"),
        (output("stream", name="stderr", text="Warning: old"), "wrote to stderr: 'Warning: old'"),
        (output("stream", name="stdout", text="in /" + "home/ada/effnb"), "path of the machine"),
        (output("display_data", data=PICTURE), "picture without alternative text"),
        (
            output("display_data", data={"text/html": '<img src="a.png" alt=" ">'}),
            "an <img> without alternative text ('a.png')",
        ),
        (lost_state, "state was not saved"),
        (state_without_its_key, "lacks the key `state`"),
        (wrong_solution, "should answer 'Correct' and says 'Not yet: …"),
        (right_stub, "should answer 'Not yet' and says 'Correct: …"),
        (too_large, f"{build.SIZE_LIMIT:,} is the limit"),
        (
            output("display_data", data={VERDICTS: {"verdicts": [{"id": "C-4", "parts": [PART]}]}}),
            "C-4 judges 'found later', which is not registered.",
        ),
    ],
)
def test_what_nbval_would_pass_is_found(built, damage, sentence):
    assert any(sentence in problem for problem in built(damage))


@pytest.mark.parametrize(
    "data",
    [
        PICTURE | {"text/html": '<figure><img src="data:," alt="A falling line"></figure>'},
        {"text/html": '<img src="rule.png" role="presentation">'},
        {"text/html": '<img src="rule.png" aria-hidden="true">'},
    ],
)
def test_described_and_decorative_pictures_are_fine(built, data):
    assert built(output("display_data", data=data)) == []


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("    minutes: 7", "    hours: 1", "put `effnb: {minutes: 20}` there"),
        ('tags=["solution"]', 'tags=["solutions"]', "unknown tag 'solutions'; there are exercise"),
        ("#   kernelspec:", "#   jupytext:\n#     formats: ipynb,py\n#   kernelspec:", "pairs the"),
        ("import os\n", "%matplotlib inline\n", "uses a magic or a shell command"),
        ("import os\n", "!pip install torch\n", "uses a magic or a shell command"),
        ("import os\n", "print?\n", "uses a magic or a shell command"),
        ("<details><summary>", "<b>", "a hint that is not folded"),
        ('[markdown] tags=["hint"]', 'tags=["hint"]', "a hint, which is Markdown"),
        ("# # Rounding", "# ![](images/a.png)", "a picture without alternative text"),
        ("# # Rounding", '# <img src="a.png">', "an <img> without alternative text"),
        ("exercise.check(one_more)", "one_more(1)", "none is checked"),
        ("is a quarter of 5", "is 9.75", "says 9.75, which no cell tagged nbval-check-output"),
    ],
)
def test_what_an_author_must_not_write_is_found(tmp_path, old, new, sentence):
    text = CHAPTER.replace(old, new)
    assert text != CHAPTER
    path = write(tmp_path, text)
    notebook = build.read_source(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = 1
    nbformat.write(notebook, path.with_suffix(".ipynb"))
    assert any(sentence in problem for problem in build.problems(path))


def test_a_notebook_without_source_and_a_broken_one_are_found(built):
    (built.folder / "orphan.ipynb").write_text("{}")
    built.path.with_suffix(".ipynb").write_text('{"cells": [')
    found = build.check(built.folder)
    assert "orphan: the .ipynb has no .py beside it." in found
    assert any("not a valid notebook" in problem for problem in found)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("It fell to 3.86, by 12 % or 12.5%.", ["3.86", "12 %", "12.5%"]),
        ("About 1,234.5 tokens.", ["1,234.5"]),
        ("Use 4 bits and 512 tokens.", []),
        ("Python 3.11, arXiv 2306.11695, section 2.1, eq. 1.2, torch 2.13", []),
        ("`x = 0.5`, $\\alpha = 0.5$, [link](page-1.5.html), <img alt='0.5'>", []),
        ("```\n0.5\n```", []),
        ("version 1.2.3 and 5.0.", ["5.0"]),
    ],
)
def test_the_numbers_that_a_text_states(text, numbers):
    assert build.quoted_numbers(text) == numbers


def test_new_prose_is_brought_in_and_new_code_is_not(built, capsys):
    built()
    path, text = built.path, built.path.read_text(encoding="utf-8")
    outputs = [
        c.outputs for c in nbformat.read(path.with_suffix(".ipynb"), 4).cells if "outputs" in c
    ]
    added = "# %% [markdown]\n# A new thought.\n\n# %%\nimport ipywidgets"
    changed = text.replace("# # Rounding", "# # Rounding again").replace(
        "# %%\nimport ipywidgets", added
    )
    path.write_text(changed, encoding="utf-8")
    assert build.problems(path) != []
    assert build.main(["--words"], built.folder) == 0
    assert build.problems(path) == []
    renewed = nbformat.read(path.with_suffix(".ipynb"), 4)
    assert renewed.cells[0].source.startswith("# Rounding again")
    assert [cell.outputs for cell in renewed.cells if "outputs" in cell] == outputs
    path.write_text(changed.replace("return x + 1", "return 1 + x"), encoding="utf-8")
    before = path.with_suffix(".ipynb").read_bytes()
    assert build.main(["--words"], built.folder) == 1
    assert "has new code: build it" in capsys.readouterr().err
    assert path.with_suffix(".ipynb").read_bytes() == before


# --- the learners' edition ----------------------------------------------------------------------


def test_learners_get_everything_but_the_solutions(tmp_path, capsys):
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    path = write(folder, CHAPTER)
    (path.parent / "images").mkdir()
    (path.parent / "images" / "a.png").write_bytes(b"picture")
    assert build.main(["--learners", str(out)], folder) == 0
    assert "1 chapters without solutions" in capsys.readouterr().out
    notebook = nbformat.read(out / "05_inference" / "1_pruning.ipynb", 4)
    assert (out / "05_inference" / "images" / "a.png").read_bytes() == b"picture"
    assert not any("solution" in build.tags(cell) for cell in notebook.cells)
    assert "return x + 1" not in "".join(cell.source for cell in notebook.cells)
    assert any("hint" in build.tags(cell) for cell in notebook.cells)
    assert len(notebook.cells) == len(build.read_source(path).cells) - 1
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_the_learners_edition_runs_and_answers_not_yet(tmp_path):
    path = write(tmp_path, CHAPTER)
    notebook = build.learners_edition(path)
    build.execute(notebook, path.parent, {"EFFNB_BUILD": "1"})
    assert said(notebook, "exercise.check").startswith("Not yet")


def test_every_source_is_found_in_order(tmp_path):
    for name in ("09_capstone", "01_data/1_filtering", "00_start_here"):
        write(tmp_path, HEADER, name)
    write(tmp_path, HEADER, ".ipynb_checkpoints/00_start_here-checkpoint")
    names = [build.name_of(path, tmp_path) for path in build.sources(tmp_path)]
    assert names == ["00_start_here", "01_data/1_filtering", "09_capstone"]
    assert isinstance(build.NOTEBOOKS, Path)
