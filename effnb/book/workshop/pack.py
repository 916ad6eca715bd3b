"""Write the teacher's pack: a folder of pages, notebooks and assignments that needs no network."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnb.book.workshop import prose
from effnb.book.workshop.practice import key_html, names, wrong_html
from effnb.book.workshop.slides import ASSETS, deck_html, plan_html, slides
from effnb.book.workshop.teaching import LENGTHS, NoTeaching, Teaching, path_for, read_teaching
from effnb.lab.chapters import NOTEBOOKS, TABLE

MARK = ".workshop"
"""Lies in every pack, so that no other folder is ever emptied."""


@dataclass(frozen=True)
class Lesson:
    """A chapter that can be taught.

    Attributes:
        name: Its path below `notebooks/` without an ending.
        notebook: The chapter as it is stored.
        teaching: What its teacher needs.
    """

    name: str
    notebook: dict[str, Any]
    teaching: Teaching

    @property
    def title(self) -> str:
        """The chapter's title."""
        return "".join(self.notebook["cells"][0]["source"]).partition("\n")[0].lstrip("# ")


def read_lessons(wanted: Sequence[str] | None = None, folder: Path = NOTEBOOKS) -> list[Lesson]:
    """Chapters that are built, with their files for teachers, in the order of the map.

    Args:
        wanted: Their names; when None, every built chapter that has such a file.
        folder: The notebooks.

    Raises:
        NoTeaching: When a wanted chapter is not built, or its file is not as it should be.
    """
    known = [*TABLE, *(name for name in wanted or () if name not in TABLE)]
    found = []
    for name in known:
        path = folder / f"{name}.ipynb"
        if wanted is None and not (path.is_file() and path_for(path).is_file()):
            continue
        if wanted is not None and name not in wanted:
            continue
        if not path.is_file():
            raise NoTeaching(f"{name} has no built notebook; build it with `make notebooks`.")
        notebook = json.loads(path.read_text(encoding="utf-8"))
        try:
            lesson = Lesson(name, notebook, read_teaching(path_for(path)))
            names(notebook, lesson.teaching)
        except NoTeaching as problem:
            raise NoTeaching(f"{name}: {problem}") from None
        found.append(lesson)
    return found


# --------------------------------------------------------------------------------------- pages


def page_html(title: str, body: str) -> str:
    """A page by itself, with its style and its fonts in it."""
    style = (ASSETS / "slides.css").read_text(encoding="utf-8")
    more = (ASSETS / "pack.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>"
        f"<style>{prose.katex_style([body])}\n{style}\n{more}</style></head>"
        f'<body class="page"><main>{body}</main></body></html>\n'
    )


def lesson_html(lesson: Lesson) -> str:
    """Goals, plans and exercises of a chapter, without an answer."""
    goals = "".join(f"<li>{prose.inline(goal)}</li>" for goal in lesson.teaching.goals)
    plans = "".join(plan_html(lesson.teaching.pacing[length]) for length in LENGTHS)
    exercises = "".join(
        f"<h2>{html.escape(one.name)}</h2>{wrong_html(one)}" for one in lesson.teaching.practices
    )
    return (
        f"<h1>{html.escape(lesson.title)}: goals and plans</h1>"
        f"<h2>Learning goals</h2><p>After it, a learner can</p><ul>{goals}</ul>"
        f"<h2>Plans</h2>{plans}{exercises}"
    )


def learners(notebook: dict[str, Any]) -> dict[str, Any]:
    """A stored chapter as learners get it: without solutions, outputs and widgets."""
    kept = deepcopy(notebook)
    kept["metadata"].pop("widgets", None)
    kept["cells"] = [
        one for one in kept["cells"] if "solution" not in one["metadata"].get("tags", ())
    ]
    for cell in kept["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    return kept


def write_pages(
    out: Path, lessons: Sequence[Lesson], diagnoses: Mapping[str, Mapping] | None = None
) -> None:
    """Write slides, plans, answer key and the learners' edition of chapters below a folder.

    Args:
        out: The folder; each chapter gets one of its name in it.
        lessons: The chapters.
        diagnoses: For each chapter and exercise, every sentence of its check, where known.
    """
    for lesson in lessons:
        place = out / lesson.name
        place.mkdir(parents=True, exist_ok=True)
        named = names(lesson.notebook, lesson.teaching)
        made = slides(lesson.notebook, lesson.teaching, named)
        every = (diagnoses or {}).get(lesson.name, {})
        key = key_html(lesson.notebook, lesson.teaching, every)
        title = f"{lesson.title}: answer key"
        pages = {
            "slides.html": deck_html(lesson.title, made),
            "plan.html": page_html(f"{lesson.title}: goals and plans", lesson_html(lesson)),
            "key.html": page_html(title, f"<h1>{html.escape(title)}</h1>{key}"),
            "learners.ipynb": json.dumps(learners(lesson.notebook), ensure_ascii=False, indent=1),
        }
        for name, text in pages.items():
            (place / name).write_text(text, encoding="utf-8", newline="\n")


def table_html(lessons: Sequence[Lesson], top: str = "", assignments: bool = False) -> str:
    """The chapters with links to what was written for each.

    Args:
        lessons: The chapters.
        top: The way from the page to the folder of `write_pages`, with a slash at its end.
        assignments: Whether assignments for nbgrader were written too.
    """
    rows = []
    for one in lessons:
        links = [
            (f"{one.name}/slides.html", "slides"),
            (f"{one.name}/plan.html", "goals and plans"),
            (f"{one.name}/key.html", "answer key"),
            (f"{one.name}/learners.ipynb", "learners' edition"),
        ]
        if assignments:
            stem = one.name.replace("/", "-")
            links.append((f"nbgrader/source/{stem}/{stem}.ipynb", "assignment"))
        cells = "".join(
            f'<td><a href="{top}{target}" aria-label="{html.escape(one.title)}: {words}">'
            f"{words}</a></td>"
            for target, words in links
        )
        rows.append(f'<tr><th scope="row">{html.escape(one.title)}</th>{cells}</tr>')
    heads = ["Chapter", "Slides", "Plans", "Key", "Learners", *(["nbgrader"] * assignments)]
    head = "".join(f'<th scope="col">{words}</th>' for words in heads)
    return (
        f'<table class="teach"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


# ------------------------------------------------------------------------------------ the pack


def write(
    out: Path, wanted: Sequence[str] | None = None, folder: Path = NOTEBOOKS
) -> tuple[list[Lesson], list[str]]:
    """Write the whole pack.

    Args:
        out: Its folder; an older pack in it is replaced, its wheels excepted.
        wanted: Names of chapters; every chapter that can be taught when None.
        folder: The notebooks.

    Returns:
        The chapters, and what their files for teachers say that is not so, as sentences.

    Raises:
        NoTeaching: When a chapter cannot be taught, or the folder holds something else.
    """
    from effnb.book.build import write_learners
    from effnb.book.workshop.grading import assignment, slug, violations
    from effnb.book.workshop.practice import problems, tasks

    lessons = read_lessons(wanted, folder)
    if not lessons:
        raise NoTeaching("no built chapter has a file for teachers, NAME.teach.toml.")
    _empty(out)
    found, said = {}, []
    for lesson in lessons:
        found[lesson.name] = tasks(lesson.notebook)
        wrong = problems(found[lesson.name], lesson.teaching)
        said += [f"{lesson.name}: {one}" for one in wrong]
        made = assignment(lesson.notebook, found[lesson.name], lesson.name)
        said += [f"{lesson.name}: {one}" for one in violations(made)]
        place = out / "nbgrader" / "source" / slug(lesson.name) / f"{slug(lesson.name)}.ipynb"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(made, ensure_ascii=False, indent=1), encoding="utf-8")
    diagnoses = {
        name: {task.name: list(task.exercise.wrong) for task in some}
        for name, some in found.items()
    }
    write_pages(out, lessons, diagnoses)
    write_learners(folder, out / "learners", [folder / f"{one.name}.py" for one in lessons])
    index = (ASSETS / "index.html").read_text(encoding="utf-8")
    body = index.replace("<!-- chapters -->", table_html(lessons, assignments=True))
    (out / "index.html").write_text(page_html("The teacher's pack", body), encoding="utf-8")
    return lessons, said


def _empty(out: Path) -> None:
    """Make room for a pack; only an older pack is ever removed, and its wheels stay.

    Raises:
        NoTeaching: When the folder holds something that is no pack.
    """
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise NoTeaching(f"{out} has something in it that is no pack: name another folder.")
    out.mkdir(parents=True, exist_ok=True)
    for old in out.iterdir():
        if old.name not in ("wheels", MARK, "predictions"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    (out / MARK).touch()
