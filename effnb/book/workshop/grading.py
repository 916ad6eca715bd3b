"""A chapter's exercises as an assignment for nbgrader.

Each stub becomes an autograded answer, with the right one between `### BEGIN SOLUTION` and
`### END SOLUTION`, and a locked test of its own after it. The test asks the exercise's own check,
so that a wrong answer fails with its diagnosis. nbgrader makes the students' version from this one
(`nbgrader generate_assignment`), by cutting what is between the two marks.

The metadata are those of nbgrader's cell schema, version 3: `schema_version`, `grade`, `solution`,
`locked` and `task` in every such cell, `grade_id` (letters, digits, `_` and `-`, each once in a
notebook), and `points` where `grade` is true.
"""

from __future__ import annotations

import ast
import hashlib
import re
import textwrap
from typing import Any

import nbformat

from effnb.book.workshop.practice import Task

SCHEMA = 3
KEYS = {
    "schema_version": int,
    "grade": bool,
    "locked": bool,
    "solution": bool,
    "task": bool,
    "grade_id": str,
    "points": int | float,
    "checksum": str,
    "cell_type": str,
}
"""What the schema knows, and of which kind it is."""
REQUIRED = ("schema_version", "grade", "locked", "solution")
POINTS = {"easy": 1, "medium": 2, "hard": 3}
"""Points of an exercise by its difficulty; a teacher changes them in the assignment."""


def assignment(notebook: dict[str, Any], found: list[Task], name: str) -> nbformat.NotebookNode:
    """The instructor's version of an assignment: a chapter's exercises, with their answers.

    Args:
        notebook: The chapter, for its kernel and its title.
        found: Its exercises.
        name: The chapter as the map names it.
    """
    made = nbformat.v4.new_notebook()
    made.metadata = nbformat.from_dict(
        {key: notebook["metadata"][key] for key in ("kernelspec",) if key in notebook["metadata"]}
    )
    stem = slug(name)
    title = "".join(notebook["cells"][0]["source"]).partition("\n")[0].lstrip("# ")
    intro = (
        f"# {title}: exercises\n\nRun the cells in order. Each test says what is wrong, in words; "
        "it may be run as often as you like."
    )
    made.cells.append(_locked(nbformat.v4.new_markdown_cell(intro), f"{stem}-intro"))
    imports = _imports(notebook, found)
    made.cells.append(_locked(nbformat.v4.new_code_cell(imports), f"{stem}-imports"))
    for i, task in enumerate(found, 1):
        asked = f"{task.stub.asked}\n\n*{task.exercise}*"
        made.cells.append(_locked(nbformat.v4.new_markdown_cell(asked), f"{stem}-{i}-text"))
        answer = nbformat.v4.new_code_cell(solved(task))
        made.cells.append(_graded(answer, f"{stem}-{i}-answer", solution=True))
        test = (
            f"right, verdict = {task.check}.judge({_written(task)})\n"
            "assert right, verdict\n"
            "print(verdict)"
        )
        points = POINTS[task.exercise.difficulty]
        cell = nbformat.v4.new_code_cell(test)
        made.cells.append(_graded(cell, f"{stem}-{i}-test", points=points))
    for cell in made.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()
        cell["id"] = digest[:12]
    return made


def solved(task: Task) -> str:
    """A stub's cell with the right answer between nbgrader's two marks.

    The marks stand where the stub raises, so that nbgrader's own stub comes into the same place.
    The answer calls the exercise's reference, whose source stands there as a comment: it may need
    what its module has. A GPU kernel cannot call it, and gets the reference's own body.
    """
    lines = task.given.splitlines()
    found = [
        (function, node)
        for function in ast.walk(ast.parse(task.given))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node)
    ]
    for function, node in sorted(found, key=lambda one: -one[1].lineno):
        answer = ["### BEGIN SOLUTION", *_answer(task, function), "### END SOLUTION"]
        space = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [f"{space}{line}".rstrip() for line in answer]
    return "\n".join(lines)


def _answer(task: Task, function: ast.FunctionDef) -> list[str]:
    """The lines that answer one function of a stub."""
    written = ast.parse(task.reference).body[0]
    if not function.decorator_list:
        arguments = ", ".join(one.arg for one in function.args.args)
        comment = [f"# {line}".rstrip() for line in task.reference.splitlines()]
        return [*comment, f"return {task.check}.reference({arguments})"]
    if not isinstance(written, ast.FunctionDef) or written.name != function.name:
        return ["raise NotImplementedError  # this machine has no reference for it"]
    body = task.reference.splitlines()[written.body[1].lineno - 1 :]  # behind the docstring
    return textwrap.dedent("\n".join(body)).splitlines()


def _written(task: Task) -> str:
    """The learner's function; where a cell offers two, the one that was made."""
    if len(task.answers) == 1:
        return task.answers[0]
    return f"next(globals()[name] for name in {task.answers!r} if name in globals())"


def slug(name: str) -> str:
    """A chapter's name in the letters that nbgrader allows."""
    return re.sub(r"[^a-zA-Z0-9_-]+", "-", name)


def _imports(notebook: dict[str, Any], found: list[Task]) -> str:
    """The imports that the exercises need, as the chapter has them."""
    wanted = {task.check.partition(".")[0] for task in found}
    lines = ["import math", "", "import torch", ""]
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        for line in "".join(cell["source"]).splitlines():
            names = re.match(r"from effnb\.chapters[\w.]* import ([\w, ]+)$", line)
            if names and wanted & set(re.findall(r"\w+", names[1])) and line not in lines:
                lines.append(line)
    return "\n".join(lines)


def _graded(
    cell: nbformat.NotebookNode, name: str, *, solution: bool = False, points: int = 0
) -> nbformat.NotebookNode:
    """A cell for the learner's answer, or the test of one."""
    about = {
        "schema_version": SCHEMA,
        "grade_id": name,
        "grade": not solution,
        "solution": solution,
        "locked": not solution,
        "task": False,
    }
    if not solution:
        about["points"] = points
    cell.metadata["nbgrader"] = about
    return cell


def _locked(cell: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """A cell that is only read."""
    cell.metadata["nbgrader"] = {
        "schema_version": SCHEMA,
        "grade_id": name,
        "grade": False,
        "solution": False,
        "locked": True,
        "task": False,
    }
    return cell


# --------------------------------------------------------------------------------- the schema


def violations(notebook: dict[str, Any]) -> list[str]:
    """Where a notebook does not keep to nbgrader's schema of version 3, as sentences."""
    found, seen = [], set()
    for number, cell in enumerate(notebook["cells"]):
        about = cell["metadata"].get("nbgrader")
        if about is None:
            continue
        found += [f"cell {number}: {one}" for one in _cell_violations(cell["cell_type"], about)]
        name = about.get("grade_id")
        if name in seen:
            found.append(f"cell {number}: the grade_id {name!r} is not the first of its name.")
        seen.add(name)
    return found


def _cell_violations(kind: str, about: dict[str, Any]) -> list[str]:
    """What is wrong with the metadata of one cell."""
    found = [f"{one!r} is missing." for one in REQUIRED if one not in about]
    found += [f"{one!r} is unknown to the schema." for one in sorted(set(about) - set(KEYS))]
    for key, value in about.items():
        right = KEYS.get(key)
        if right and (not isinstance(value, right) or (right is not bool and value is True)):
            found.append(f"{key!r} is {value!r}.")
    if found:
        return found
    if about["schema_version"] != SCHEMA:
        found.append(f"the schema is of version {about['schema_version']}.")
    graded, solution = about["grade"], about["solution"]
    name = about.get("grade_id", "")
    if (graded or solution or about["locked"]) and not re.fullmatch(r"[a-zA-Z0-9_-]+", name):
        found.append(f"the grade_id {name!r} is empty or has other letters than it may.")
    if graded and about.get("points", -1) < 0:
        found.append("a graded cell has points, 0 or more.")
    if about.get("task", False) and kind != "markdown":
        found.append("a task is a Markdown cell.")
    if kind == "markdown" and not about.get("task", False) and graded != solution:
        found.append("a Markdown cell is graded if and only if it is a solution.")
    return found
