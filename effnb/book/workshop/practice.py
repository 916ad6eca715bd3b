"""A chapter's exercises as its notebook and its companion module have them, and the answer key.

A stub's cell ends with its check, `_ = exercises.saving.check(rank_of)`. The name on the left of
`check` leads to the `Exercise` in the companion module, with its reference, cases and diagnoses.
"""

from __future__ import annotations

import html
import importlib
import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from effnb.book.site.book import source
from effnb.book.workshop.teaching import NoTeaching, Teaching
from effnb.lab.checks import Exercise

_IMPORT = re.compile(r"^from (effnb\.chapters[\w.]*) import ([\w, ]+)", re.MULTILINE)
_CHECK = re.compile(r"^[ \t]*_ = (?P<which>[\w.]+)\.check\((?P<answer>\w+)\)[ \t]*$", re.M)


@dataclass(frozen=True)
class Task:
    """One exercise of a chapter.

    Attributes:
        number: The cell of the notebook that holds its stub.
        stub: The stub, without the check.
        check: The expression that is the exercise, such as `exercises.saving`.
        answers: The function that the learner writes; two names where it depends on the machine.
        asked: What is asked, as Markdown.
        hint: The hint, as Markdown; may be empty.
        exercise: The exercise itself.
    """

    number: int
    stub: str
    check: str
    answers: tuple[str, ...]
    asked: str
    hint: str
    exercise: Exercise

    @property
    def name(self) -> str:
        """The exercise's name."""
        return self.exercise.name

    @property
    def reference(self) -> str:
        """The source of the right answer."""
        return textwrap.dedent(inspect.getsource(inspect.unwrap(self.exercise.reference))).strip()


def tasks(notebook: dict[str, Any]) -> list[Task]:
    """The exercises of a chapter, in the order of the page.

    Raises:
        NoTeaching: When a stub's check does not lead to an exercise.
    """
    known: dict[str, Any] = {}
    found, asked = [], ""
    cells = notebook["cells"]
    for number, cell in enumerate(cells):
        tags, text = cell["metadata"].get("tags", ()), source(cell)
        if cell["cell_type"] == "markdown":
            asked = "" if "hint" in tags else text
            continue
        if cell["cell_type"] != "code":
            continue
        known |= _imported(text)
        checks = list(_CHECK.finditer(text))
        if "exercise" in tags and checks:
            following = cells[number + 1] if number + 1 < len(cells) else {}
            hinted = "hint" in following.get("metadata", {}).get("tags", ())
            found.append(
                Task(
                    number,
                    _without_checks(text),
                    checks[0]["which"],
                    tuple(check["answer"] for check in checks),
                    asked.strip(),
                    source(following).strip() if hinted else "",
                    _looked_up(checks[0]["which"], known),
                )
            )
    return found


def _imported(text: str) -> dict[str, Any]:
    """What a cell imports from the companion modules, by name."""
    found = {}
    for package, names in _IMPORT.findall(text):
        module = importlib.import_module(package)
        for name in re.findall(r"\w+", names):
            if hasattr(module, name):
                found[name] = getattr(module, name)
            else:
                found[name] = importlib.import_module(f"{package}.{name}")
    return found


def _looked_up(which: str, known: dict[str, Any]) -> Exercise:
    first, *rest = which.split(".")
    thing = known.get(first)
    for part in rest:
        thing = getattr(thing, part, None)
    if not isinstance(thing, Exercise):
        raise NoTeaching(f"{which} is checked in a chapter and is no exercise of its companion.")
    return thing


def _without_checks(text: str) -> str:
    """A stub's cell without the lines that check it."""
    return re.sub(r"\n{3,}", "\n\n", _CHECK.sub("", text)).strip()


def problems(found: list[Task], teaching: Teaching) -> list[str]:
    """Where a chapter's exercises and its file for teachers disagree, as sentences."""
    said = []
    here = {task.name for task in found}
    for task in found:
        practice = teaching.practice(task.name)
        if practice is None:
            said.append(f"the exercise {task.name!r} has no usual wrong answer.")
            continue
        for wrong in practice.wrong:
            fitting = [one for one in task.exercise.wrong if one.startswith(wrong.says)]
            if wrong.says and len(fitting) != 1:
                said.append(
                    f"{task.name!r}: {len(fitting)} diagnoses begin with {wrong.says!r}; name one."
                )
    said += [
        f"there is no exercise {one.name!r} in the chapter."
        for one in teaching.practices
        if one.name not in here
    ]
    return said


def diagnosis(task: Task, says: str) -> str:
    """The whole sentence that an exercise's check gives for a mistake."""
    return next((one for one in task.exercise.wrong if says and one.startswith(says)), "")


def key_html(found: list[Task], teaching: Teaching) -> str:
    """The answer key: each exercise with its reference, its wrong answers and its diagnoses."""
    from effnb.book.workshop import prose

    parts = []
    for task in found:
        practice = teaching.practice(task.name)
        rows = "".join(
            f"<li><code>{html.escape(one.answer)}</code><br>{prose.inline(one.why)}"
            + _said(diagnosis(task, one.says))
            + "</li>"
            for one in (practice.wrong if practice else ())
        )
        named = {diagnosis(task, one.says) for one in (practice.wrong if practice else ())}
        others = "".join(
            f"<li>{html.escape(one)}.</li>" for one in task.exercise.wrong if one not in named
        )
        more = f"<h3>What the check also recognizes</h3><ul>{others}</ul>" if others else ""
        parts.append(
            f"<section><h2>{html.escape(str(task.exercise))}</h2>{prose.markdown(task.asked)}"
            f"<h3>Answer</h3><pre><code>{html.escape(task.reference)}</code></pre>"
            f"<h3>Usual wrong answers</h3><ul>{rows}</ul>{more}</section>"
        )
    return "".join(parts)


def _said(words: str) -> str:
    return f"<br><em>The check says: {html.escape(words)}.</em>" if words else ""
