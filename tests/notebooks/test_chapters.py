"""Every chapter: agrees with its source, hides no failure, and works without its solutions.

nbval executes each chapter once, beside these tests, and visits every position of every panel on
the way. Here each chapter gets a class of its own, so that several can be tested at a time.
"""

import ast

import nbformat
import pytest

from effnb.book import build
from effnb.lab import chapters


def verdicts(notebook):
    """What the checks of exercises said, one text for each cell that calls one."""
    return [
        "".join(build.printed(output) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code" and ".check(" in cell.source
    ]


def names(source):
    """The names that a cell binds, and those that it uses, wherever in the cell."""
    bound, used = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            (bound if isinstance(node.ctx, ast.Store) else used).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
    return bound, used


def needs_solutions(notebook):
    """Names that a later cell would not find, or find as a blank stub, without the solutions."""
    missing, found = set(), []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        bound, used = names(cell.source)
        if "solution" in build.tags(cell):
            missing |= bound - {"_"}
        else:
            found += sorted((used - bound) & missing)
            missing -= bound
    return found


def what_exercises_need(notebook):
    """The cells of the exercises, and of those before them the ones that bind what they use."""
    kept, wanted = [], set()
    for cell in reversed([cell for cell in notebook.cells if cell.cell_type == "code"]):
        bound, used = names(cell.source)
        if "exercise" in build.tags(cell) or bound & wanted:
            kept.insert(0, cell)
            wanted = (wanted - bound) | (used - bound)
    return kept


def answers_not_yet(notebook, folder):
    """Run an edition for learners, in which every stub is blank and says so."""
    assert not any("solution" in build.tags(cell) for cell in notebook.cells)
    stubs = sum("exercise" in build.tags(cell) for cell in notebook.cells)
    build.execute(notebook, folder)
    said = verdicts(notebook)
    assert bool(said) == bool(stubs)
    assert [text for text in said if not text.startswith("Not yet")] == []


def chapter_tests(path):
    """The tests of one chapter, as a class."""

    class Chapter:
        def test_it_agrees_with_its_source_and_hides_nothing(self):
            assert build.problems(path) == []

        def test_it_is_on_the_map(self):
            assert build.name_of(path) in chapters.TABLE

        def test_no_cell_needs_a_solution(self):
            assert needs_solutions(build.read_source(path)) == []

        def test_in_its_edition_for_learners_exercises_answer_not_yet(self, monkeypatch):
            """On the cells that they need; nbval has run the others."""
            monkeypatch.delenv("EFFNB_SWEEP", raising=False)
            notebook = build.learners_edition(path)
            notebook.cells = what_exercises_need(notebook)
            answers_not_yet(notebook, path.parent)

        @pytest.mark.full  # the tests above and nbval's execution show the same
        def test_its_whole_edition_for_learners_runs(self, monkeypatch):
            monkeypatch.delenv("EFFNB_SWEEP", raising=False)
            notebook = build.learners_edition(path)
            notebook.cells = [c for c in notebook.cells if "real-model" not in build.tags(c)]
            answers_not_yet(notebook, path.parent)

    return Chapter


for _path in build.sources():
    _name = build.name_of(_path)
    globals()[f"Test_{_name.replace('/', '_')}"] = chapter_tests(_path)


def test_every_pair_is_whole():
    assert [problem for problem in build.check() if "beside it" in problem] == []


def test_the_verdicts_of_exercises_are_read():
    notebook = nbformat.v4.new_notebook()
    cell = nbformat.v4.new_code_cell("exercise.check(answer)")
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="Not yet: begin.\n")]
    notebook.cells = [cell, nbformat.v4.new_code_cell("1 + 1")]
    assert verdicts(notebook) == ["Not yet: begin.\n"]


@pytest.mark.parametrize("line", ["answer = 1", "raise SystemError('gone')"])
def test_a_chapter_that_needs_its_solution_would_be_found(tmp_path, line):
    """The check above can fail: a later cell uses what only the solution defines."""
    path = tmp_path / "chapter.py"
    path.write_text(f'# %% tags=["solution"]\n{line}\n\n# %%\nprint(answer)\n')
    notebook = build.learners_edition(path)
    with pytest.raises(build.BuildError, match="NameError: name 'answer' is not defined"):
        build.execute(notebook, tmp_path)


@pytest.mark.parametrize(
    ("solution", "later", "needed"),
    [
        ("answer = 1", "print(answer)", ["answer"]),
        ("def answer():\n    return 1", "print(answer())", ["answer"]),
        ("import math as m", "print(m.pi)", ["m"]),
        ("answer = 1", "answer = 2\nprint(answer)", []),
        ("_ = exercise.check(1)", "print(_)", []),
        ("print(1)", "print(answer)", []),
    ],
)
def test_a_cell_that_needs_a_solution_is_found_without_running_it(solution, later, needed):
    stub = nbformat.v4.new_code_cell("def answer():\n    raise NotImplementedError")
    solved = nbformat.v4.new_code_cell(solution, metadata={"tags": ["solution"]})
    notebook = nbformat.v4.new_notebook(cells=[stub, solved, nbformat.v4.new_code_cell(later)])
    assert needs_solutions(notebook) == needed
