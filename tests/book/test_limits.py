"""The limits of a chapter find what passes them, and an answer that stands where it should not."""

import sys
from types import ModuleType

import nbformat
import pytest
import torch

from effnb.book import build, limits
from effnb.book.first_cell import first_cell
from effnb.lab import Exercise, checks

TITLE = "# Rounding\n\n**Fewer bits are enough.**"
SECTIONS = [names[0] for names in limits.ORDER]
WORDS = " ".join(["word"] * 160)


def markdown(text, *tags):
    return nbformat.v4.new_markdown_cell(text, metadata={"tags": list(tags)})


def code(text, *tags):
    return nbformat.v4.new_code_cell(text, metadata={"tags": list(tags)})


def chapter(*more, sections=SECTIONS, title=TITLE):
    """A chapter that keeps to all limits, with these cells at its end."""
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [markdown(title)]
    notebook.cells += [markdown(f"## {heading}\n\n{WORDS}") for heading in sections]
    notebook.cells += [code("x = 1\ny = 2\nz = 3\nx"), *more]
    return notebook


@pytest.fixture
def found(tmp_path):
    """What is wrong with a chapter, as sentences."""

    def look(notebook, name="05_inference/1_pruning", lines=100, size=1000):
        path = tmp_path / "chapter.py"
        path.write_text("#\n" * lines)
        path.with_suffix(".ipynb").write_bytes(b" " * size)
        return limits.violations(path, notebook, name)

    return look


def test_a_chapter_within_all_limits_is_fine(found):
    assert found(chapter()) == []
    more = ["A toy", "The mathematics"]
    assert found(chapter(sections=[*SECTIONS[:2], *more, *SECTIONS[2:]])) == []
    assert found(chapter(sections=["The result first", *SECTIONS[1:]])) == []


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"lines": 901}, "the .py has 901 lines; 900 are allowed"),
        ({"size": 450_001}, "450 are allowed"),
    ],
)
def test_files_that_are_too_large(found, how, said):
    (problem,) = found(chapter(), **how)
    assert said in problem


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (markdown(WORDS * 9), "words of prose"),
        (code("\n".join(["x = 1"] * 26)), "a cell has 26 visible lines; 25 are allowed"),
        (code("a = 1\nb = 2", "hide-input"), "33% of its code is hidden; 20% is allowed"),
        (code("from effnb.core.modules import _name"), "private name effnb.core.modules._name"),
        (code("from effnb.kernels._launch import jit"), "private name effnb.kernels._launch.jit"),
        (code("import effnb._x"), "private name effnb._x"),
        (code("gptq._step(1)"), "private name gptq._step"),
    ],
)
def test_one_thing_too_many(found, more, said):
    (problem,) = found(chapter(more))
    assert said in problem


def test_too_few_words(found):
    assert any("words of prose" in problem for problem in found(chapter(sections=[])))


def test_solutions_are_not_counted_as_hidden_and_public_names_are_fine(found):
    solution = code("first.solution()\nsecond.solution()\nthird.solution()", "solution")
    public = code(
        "from effnb.inference import pruning\nimport torch\nx = torch.__version__\n"
        "problem._render_traceback_ = x  # a name of Jupyter's protocol"
    )
    assert found(chapter(solution, public)) == []


@pytest.mark.parametrize("missing", range(len(SECTIONS)))
def test_a_missing_section_is_named(found, missing):
    others = [s for i, s in enumerate(SECTIONS) if i != missing]
    notebook = chapter(markdown(WORDS), sections=others)
    assert found(notebook) == [f"it has no section {SECTIONS[missing]!r}."]


def test_sections_out_of_order_are_named(found):
    swapped = [*SECTIONS[:4], SECTIONS[5], SECTIONS[4], *SECTIONS[6:]]
    assert found(chapter(sections=swapped)) == [
        "its section 'What it costs and saves' comes too early."
    ]
    assert "title" in found(chapter(title="Some text first."))[0]
    assert found(chapter(sections=[*SECTIONS[1:], SECTIONS[0]]), name="00_start_here") == []


def test_words_are_those_of_the_prose():
    text = (
        "Half of *it* is `code` and $x + y$.\n\n$$a = b$$\n\n```python\nx = 1\n```\n"
        "[A link](https://example.org/a/b) and <b>bold</b> co-design."
    )
    assert limits.word_count(text) == 5 + 3 + 2  # one line of the text after the other


# ------------------------------------------------------------------------------------- answers


def reference(w, bits):
    """The step."""
    return w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)


COMPANION = code("from effnb.chapters import example")
SOLUTION = code("example.step.solution()", "solution")
STUB = code(
    'def scale(w, bits):\n    """The step."""\n    raise NotImplementedError\n\n\n'
    "_ = step.check(scale)",
    "exercise",
)
TOLD = markdown(
    "<details><summary>Hint</summary>`w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)`"
    "</details>",
    "hint",
)
HINT = markdown(
    "<details><summary>Hint</summary>Which way does `amax` run, and how large is the largest "
    "code, `2 ** (bits - 1) - 1`?</details>",
    "hint",
)


@pytest.fixture
def companion(monkeypatch):
    """A chapter's companion module with one exercise."""
    monkeypatch.setattr(checks, "registry", {})
    module = ModuleType("effnb.chapters.example")
    module.step = Exercise(
        "Step",
        minutes=1,
        difficulty="easy",
        reference=reference,
        cases=[(torch.ones(2, 2), 4)],
        wrong={},
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("companion")
@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (TOLD, "a hint repeats a line of a solution"),
        (code("ours = w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)"), "code repeats"),
        (markdown("Take `w.abs( ).amax(1,keepdim=True)/(2**(bits-1)-1)`."), "the text repeats"),
        (code("step = Exercise('step', reference=scale)"), "makes an exercise with its reference"),
    ],
)
def test_an_answer_outside_of_the_solution_is_found(found, cell, said):
    (problem,) = found(chapter(COMPANION, STUB, cell, SOLUTION))
    assert said in problem


def test_a_solution_that_takes_the_place_of_the_readers_own_is_found(found):
    (problem,) = found(chapter(STUB, code("def scale(w, bits):\n    return w", "solution")))
    assert "is a solution that defines a function" in problem


def test_hooks_that_ipython_looks_for_are_not_private(found):
    """Such as the one of every chapter's first cell, which must not be a violation itself."""
    first = code(first_cell("05_inference/1_pruning"), "run-time")
    assert "_render_traceback_" in first.source
    assert found(chapter(first, code("shown._repr_html_()"))) == []


@pytest.mark.usefixtures("companion")
def test_a_stub_and_a_hint_that_only_hints_are_fine(found):
    assert found(chapter(COMPANION, STUB, HINT, SOLUTION)) == []


@pytest.mark.usefixtures("companion")
def test_the_learners_edition_holds_no_answer(tmp_path, monkeypatch):
    notebook = chapter(COMPANION, STUB, HINT, TOLD, SOLUTION)
    monkeypatch.setattr(build, "read_source", lambda path: notebook)
    edition = build.learners_edition(tmp_path / "chapter.py")
    text = "\n".join(cell.source for cell in edition.cells)
    assert "amax(1" not in text
    assert "Which way does" in text and "raise NotImplementedError" in text
    assert list(limits.answers_told(edition)) == []


def test_the_table_marks_what_is_beyond(tmp_path):
    path = tmp_path / "chapter.py"
    path.write_text("#\n" * 901)
    said = limits.table({"05_inference/1_pruning": limits.counts(path, chapter())})
    assert "901 *" in said and "not built" in said
    assert said.count("*") == 1


# -------------------------------------------------------------------- the chapters that are here


def test_no_chapter_is_beyond_the_limits():
    assert build.beyond_limits(build.sources()) == []
