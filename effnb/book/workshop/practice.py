"""A chapter's exercises, as its built notebook has them and as its companion module has them.

What the pages show needs the notebook alone: the stub, what is asked, the hint, and the solution
that is stored in the output of its cell. An assignment and the full diagnoses need the `Exercise`
itself: a stub's cell ends with its check, `_ = exercises.saving.check(rank_of)`, whose name leads
to the companion module.
"""

from __future__ import annotations

import html
import importlib
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effnb.book.site.book import source
from effnb.book.workshop import prose
from effnb.book.workshop.teaching import NoTeaching, Practice, Teaching

if TYPE_CHECKING:
    from effnb.lab.checks import Exercise

_IMPORT = re.compile(r"^from (effnb\.chapters[\w.]*) import ([\w, ]+)", re.MULTILINE)
_CHECK = re.compile(r"^[ \t]*_ = (?P<which>[\w.]+)\.check\((?P<answer>\w+)\)[ \t]*$", re.M)
_FOLDED = re.compile(r"<details[^>]*>\s*<summary>.*?</summary>(.*)</details>", re.DOTALL)


@dataclass(frozen=True)
class Stub:
    """An exercise in a built notebook.

    Attributes:
        number: The cell of the notebook that holds the stub.
        text: The cell's code.
        asked: What is asked, as Markdown.
        hint: The hint, as Markdown; may be empty.
        solution: The solution as HTML; empty where the notebook stores none.
    """

    number: int
    text: str
    asked: str
    hint: str
    solution: str


@dataclass(frozen=True)
class Task:
    """An exercise in a notebook together with the exercise of its companion module.

    Attributes:
        stub: What the notebook has.
        check: The expression that is the exercise, such as `exercises.saving`.
        answers: The function that the learner writes; two names where it depends on the machine.
        exercise: The exercise itself.
    """

    stub: Stub
    check: str
    answers: tuple[str, ...]
    exercise: Exercise

    @property
    def name(self) -> str:
        """The exercise's name."""
        return self.exercise.name

    @property
    def given(self) -> str:
        """The stub without the lines that check it."""
        return re.sub(r"\n{3,}", "\n\n", _CHECK.sub("", self.stub.text)).strip()

    @property
    def reference(self) -> str:
        """The source of the right answer."""
        return textwrap.dedent(inspect.getsource(inspect.unwrap(self.exercise.reference))).strip()


# ------------------------------------------------------------------------- from the notebook


def stubs(notebook: dict[str, Any]) -> list[Stub]:
    """The exercises of a built chapter, in the order of the page."""
    found: list[Stub] = []
    asked, cells = "", notebook["cells"]
    for number, cell in enumerate(cells):
        tags, text = cell["metadata"].get("tags", ()), source(cell)
        if cell["cell_type"] == "markdown":
            asked = "" if "hint" in tags else text.strip()
        elif "exercise" in tags and _CHECK.search(text):
            hint, solution = _following(cells[number + 1 : number + 3])
            found.append(Stub(number, text, asked, hint, solution))
    return found


def _following(cells: list[dict[str, Any]]) -> tuple[str, str]:
    """The hint and the stored solution among the cells behind a stub."""
    hint = solution = ""
    for cell in cells:
        tags = cell["metadata"].get("tags", ())
        if "hint" in tags:
            hint = source(cell).strip()
        if "solution" in tags:
            parts = ["".join(o.get("data", {}).get("text/html", "")) for o in cell["outputs"]]
            folded = _FOLDED.search("".join(parts))
            solution = prose.unlinked(folded[1] if folded else "".join(parts))
    return hint, solution


def names(notebook: dict[str, Any], teaching: Teaching) -> dict[int, str]:
    """The exercises' names by the numbers of their cells.

    Raises:
        NoTeaching: When the file for teachers has more exercises than the chapter, or fewer.
    """
    found, known = stubs(notebook), teaching.practices
    if len(found) != len(known):
        raise NoTeaching(
            f"the chapter has {len(found)} exercises and its file for teachers {len(known)}."
        )
    return {stub.number: practice.name for stub, practice in zip(found, known, strict=True)}


# ------------------------------------------------------------------- with the companion module


def tasks(notebook: dict[str, Any]) -> list[Task]:
    """The exercises of a chapter with those of its companion module.

    Raises:
        NoTeaching: When a stub's check does not lead to an exercise.
    """
    code = "\n".join(source(one) for one in notebook["cells"] if one["cell_type"] == "code")
    found = []
    for stub in stubs(notebook):
        checks = list(_CHECK.finditer(stub.text))
        which = checks[0]["which"]
        answers = tuple(check["answer"] for check in checks)
        found.append(Task(stub, which, answers, _looked_up(which, code)))
    return found


def _imported(name: str, code: str) -> Any:
    """What a name of a chapter's code is, if it comes from a companion module."""
    for package, imported in _IMPORT.findall(code):
        for there, here in re.findall(r"(\w+)(?: as (\w+))?", imported):
            if name == (here or there):
                module = importlib.import_module(package)
                if hasattr(module, there):
                    return getattr(module, there)
                return importlib.import_module(f"{package}.{there}")
    return None


def _looked_up(which: str, code: str) -> Exercise:
    """The exercise that an expression of a chapter's code is."""
    from effnb.lab.checks import Exercise

    first, *rest = which.split(".")
    thing = _imported(first, code)
    for part in rest:
        thing = getattr(thing, part, None)
    if not isinstance(thing, Exercise):
        raise NoTeaching(f"{which} is checked in a chapter and is no exercise of its companion.")
    return thing


def problems(found: Sequence[Task], teaching: Teaching) -> list[str]:
    """Where a chapter's exercises and its file for teachers disagree, as sentences."""
    here, said = [task.name for task in found], [one.name for one in teaching.practices]
    if here != said:
        return [f"the chapter's exercises are {here}, and its file for teachers has {said}."]
    wrong = []
    for task, practice in zip(found, teaching.practices, strict=True):
        for one in practice.wrong:
            fitting = [d for d in task.exercise.wrong if d.startswith(one.says)]
            if one.says and len(fitting) != 1:
                wrong.append(
                    f"{task.name!r}: {len(fitting)} diagnoses begin with {one.says!r}; name one."
                )
    return wrong


# ------------------------------------------------------------------------------ the answer key


def key_html(
    notebook: dict[str, Any], teaching: Teaching, diagnoses: Mapping[str, Sequence[str]]
) -> str:
    """The answer key: each exercise with its solution and its usual wrong answers.

    Args:
        notebook: The built chapter.
        teaching: What its teacher needs.
        diagnoses: For the exercises by name, every sentence that its check may give; may be empty.
    """
    parts, named = [], names(notebook, teaching)
    for stub in stubs(notebook):
        practice = teaching.practice(named[stub.number])
        every = diagnoses.get(practice.name, ())
        hint = f"<h3>Hint</h3>{prose.markdown(stub.hint)}" if stub.hint else ""
        parts.append(
            f"<section><h2>{html.escape(practice.name)}</h2>{prose.markdown(stub.asked)}"
            f"<h3>Answer</h3><div class='output'>{stub.solution}</div>"
            f"{wrong_html(practice, every)}{_others(practice, every)}{hint}</section>"
        )
    return "".join(parts)


def wrong_html(practice: Practice, every: Sequence[str] = ()) -> str:
    """The usual wrong answers of an exercise as HTML.

    Args:
        practice: The exercise as its teacher knows it.
        every: All sentences of its check, so that they are quoted in full.
    """
    rows = ""
    for one in practice.wrong:
        whole = next((d for d in every if one.says and d.startswith(one.says)), "")
        quoted = f"{whole}." if whole else f"{one.says} …"
        said = f"<br><em>The check says:</em> “{html.escape(quoted)}”" if one.says else ""
        why = prose.inline(one.why)
        rows += f"<li><code>{html.escape(one.answer)}</code><br>{why}{said}</li>"
    return f"<h3>Usual wrong answers</h3><ul>{rows}</ul>"


def _others(practice: Practice, every: Sequence[str]) -> str:
    """The diagnoses of a check that the teacher's file does not mention."""
    known = tuple(one.says for one in practice.wrong if one.says)
    rest = [one for one in every if not one.startswith(known)] if known else list(every)
    rows = "".join(f"<li>{html.escape(one)}.</li>" for one in rest)
    return f"<h3>What the check recognizes besides</h3><ul>{rows}</ul>" if rows else ""
