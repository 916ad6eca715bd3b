"""What keeps a chapter one sitting: the order of its sections, its size, and no answer given away.

`python -m effnb.book.build --lines` prints the table of all chapters; the build and the tests fail
when one passes a limit.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import nbformat

from effnb.lab.checks import Exercise

FILE_LINES = 900
WORDS = (1_500, 2_800)
CELL_LINES = 25
HIDDEN_SHARE = 0.2
BYTES = 450_000
"""Lines of the `.py`, words of prose, lines of a cell, part of the code hidden, size when built."""

ORDER = (
    ("The picture", "The result first"),
    ("The idea",),
    ("The code",),
    ("Turn the knob",),
    ("Does it hold?",),
    ("What it costs and saves",),
    ("On a real model",),
    ("Where it breaks",),
    ("Exercises",),
    ("Further reading",),
)
"""The headings of a chapter's sections in their order, after its title; others may lie between."""
TOLD_TOKENS = 12
"""So many tokens of a solution in a row, standing elsewhere, give it away."""

Notebook = nbformat.NotebookNode


def tags(cell: Notebook) -> tuple[str, ...]:
    """The tags of a cell."""
    return tuple(cell.metadata.get("tags", ()))


# --------------------------------------------------------------------------------- counting


@dataclass(frozen=True)
class Counts:
    """The size of one chapter.

    Attributes:
        file_lines: Lines of the `.py`.
        prose_lines: Lines of Markdown that are not empty.
        visible_lines: Lines of code that a reader sees, empty ones left out.
        hidden_lines: Lines of code in cells tagged `hide-input`.
        solution_lines: Lines of code in solutions.
        words: Words of prose, mathematics and code left out.
        longest_cell_lines: Lines of the longest cell of code that is not hidden.
        kilobytes: Size of the built notebook; None when it was never built.
    """

    file_lines: int
    prose_lines: int
    visible_lines: int
    hidden_lines: int
    solution_lines: int
    words: int
    longest_cell_lines: int
    kilobytes: float | None

    @property
    def hidden_share(self) -> float:
        """Hidden lines, as a part of all code but the solutions."""
        return self.hidden_lines / max(1, self.hidden_lines + self.visible_lines)


def counts(path: Path, source: Notebook) -> Counts:
    """The size of a chapter, given by its `.py` file and by what that holds."""
    prose = visible = hidden = solutions = words = longest = 0
    for cell in source.cells:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        if cell.cell_type == "markdown":
            prose += len(lines)
            words += word_count(cell.source)
        elif "hide-input" in tags(cell):
            hidden += len(lines)
        else:
            longest = max(longest, len(cell.source.splitlines()))
            if "solution" in tags(cell):
                solutions += len(lines)
            else:
                visible += len(lines)
    built = path.with_suffix(".ipynb")
    return Counts(
        len(path.read_text(encoding="utf-8").splitlines()),
        prose,
        visible,
        hidden,
        solutions,
        words,
        longest,
        built.stat().st_size / 1000 if built.exists() else None,
    )


def word_count(markdown: str) -> int:
    """Words of a text, without its code, mathematics, addresses and HTML tags."""
    prose = re.sub(r"^```.*?^```", " ", markdown, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(
        r"`[^`]*`|\$\$.*?\$\$|\$[^$\n]+\$|\]\([^)]*\)|<[^>]*>", " ", prose, flags=re.DOTALL
    )
    return len(re.findall(r"[^\W_][\w'’-]*", prose))


def table(chapters: dict[str, Counts]) -> str:
    """The sizes of chapters as lines of text, those beyond a limit marked with a star."""
    head = ("chapter", ".py", "prose", "visible", "hidden", "solutions", "words", "kB")
    rows = [head]
    for name, c in chapters.items():
        size = "not built" if c.kilobytes is None else f"{c.kilobytes:.0f}"
        rows.append(
            (
                name,
                f"{c.file_lines:,}{_star(c.file_lines > FILE_LINES)}",
                f"{c.prose_lines:,}",
                f"{c.visible_lines:,}{_star(c.longest_cell_lines > CELL_LINES)}",
                f"{c.hidden_lines:,}{_star(c.hidden_share > HIDDEN_SHARE)}",
                f"{c.solution_lines:,}",
                f"{c.words:,}{_star(not WORDS[0] <= c.words <= WORDS[1])}",
                f"{size}{_star((c.kilobytes or 0) * 1000 > BYTES)}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _star(beyond: bool) -> str:
    return " *" if beyond else ""


# --------------------------------------------------------------------------------- the limits


def violations(path: Path, source: Notebook, name: str) -> list[str]:
    """What a chapter does not keep to, as sentences.

    Args:
        path: Its `.py` file.
        source: What the file holds.
        name: Its path below `notebooks/`; the tour and the capstone have an order of their own.
    """
    size = counts(path, source)
    found = []
    if size.file_lines > FILE_LINES:
        found.append(f"the .py has {size.file_lines:,} lines; {FILE_LINES} are allowed.")
    if not WORDS[0] <= size.words <= WORDS[1]:
        found.append(
            f"it has {size.words:,} words of prose; {WORDS[0]:,} to {WORDS[1]:,} are allowed."
        )
    if size.longest_cell_lines > CELL_LINES:
        found.append(
            f"a cell has {size.longest_cell_lines} visible lines; {CELL_LINES} are allowed."
        )
    if size.hidden_share > HIDDEN_SHARE:
        found.append(
            f"{size.hidden_share:.0%} of its code is hidden; {HIDDEN_SHARE:.0%} is allowed: move "
            "drawings, exercises and verdicts into its companion module."
        )
    if size.kilobytes is not None and size.kilobytes * 1000 > BYTES:
        found.append(f"the .ipynb takes {size.kilobytes:.0f} kB; {BYTES // 1000} are allowed.")
    if "/" in name:
        found += order_problems(source)
    found += private_names(source)
    found += answers_told(source)
    return found


def headings(source: Notebook) -> list[str]:
    """The headings of the second level, in order."""
    return [
        line[3:].strip()
        for cell in source.cells
        if cell.cell_type == "markdown"
        for line in re.sub(r"^```.*?^```", "", cell.source, flags=re.S | re.M).splitlines()
        if line.startswith("## ")
    ]


def order_problems(source: Notebook) -> Iterator[str]:
    """Sections that are missing or out of order, as sentences."""
    first = source.cells[0] if source.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        yield "it does not begin with a title and its claim."
    found, place = headings(source), 0
    for names in ORDER:
        at = next((i for i, heading in enumerate(found) if heading in names), None)
        if at is None:
            yield f"it has no section {names[0]!r}."
        elif at < place:
            yield f"its section {found[at]!r} comes too early."
        else:
            place = at


def private_names(source: Notebook) -> Iterator[str]:
    """Private names that a chapter imports or reaches for, as sentences.

    Names with an underscore at either end, such as `_repr_html_`, are hooks that IPython looks for.
    """
    found: set[str] = set()
    for cell in source.cells:
        if cell.cell_type != "code":
            continue
        try:
            tree = ast.parse(cell.source)
        except SyntaxError:
            continue  # what is wrong with it shows when it is executed
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = [f"{node.value.id}.{node.attr}"]
            found |= {name for name in names if any(map(_is_private, name.split(".")))}
    for name in sorted(found):
        yield f"it uses the private name {name}."


def _is_private(part: str) -> bool:
    """Whether a name is for its own module alone; `_repr_html_` and its like are Jupyter's."""
    return part.startswith("_") and not part.endswith("_")


# ---------------------------------------------------------------------------------- answers


def answers_told(source: Notebook) -> Iterator[str]:
    """Answers of exercises that stand outside of their solutions, as sentences."""
    known = answers(source)
    for index, cell in enumerate(source.cells):
        if "solution" in tags(cell):
            if re.search(r"^\s*def ", cell.source, flags=re.M):
                yield (
                    f"cell {index} is a solution that defines a function, in place of the reader's "
                    "own: show it with the exercise's solution()."
                )
            continue
        if cell.cell_type == "code" and re.search(r"\bExercise\(", cell.source):
            yield (
                f"cell {index} makes an exercise with its reference: put it into the companion "
                "module of the chapter."
            )
        elif tells(cell, known):
            kind = (
                "a hint"
                if "hint" in tags(cell)
                else "the text"
                if cell.cell_type != "code"
                else "code"
            )
            yield f"cell {index} tells an answer: {kind} repeats a line of a solution."


def answers(source: Notebook) -> list[str]:
    """The code of a chapter's answers: its solution cells, and its companion's references."""
    found = [cell.source for cell in source.cells if "solution" in tags(cell)]
    for module in _companions(source):
        for exercise in vars(module).values():
            if isinstance(exercise, Exercise):
                with contextlib.suppress(OSError):
                    found.append(textwrap.dedent(inspect.getsource(exercise.reference)))
    return found


def _companions(source: Notebook) -> Iterator[ModuleType]:
    """The modules of `effnb.chapters` that a chapter's code imports."""
    for cell in source.cells:
        if cell.cell_type != "code":
            continue
        for package, names in re.findall(
            r"^from (effnb\.chapters[\w.]*) import ([\w, ]+)", cell.source, flags=re.M
        ):
            for name in re.findall(r"(\w+)(?: as \w+)?", names):
                with contextlib.suppress(ModuleNotFoundError):
                    yield importlib.import_module(f"{package}.{name}")


def tells(cell: Notebook, answers: list[str]) -> bool:
    """Whether a cell outside of the solutions repeats a long enough part of an answer's code."""
    shown = [cell.source]
    if cell.cell_type == "markdown":
        shown = re.findall(r"```(?:python)?\n(.*?)```|`([^`]+)`", cell.source, flags=re.S)
        shown = ["".join(parts) for parts in shown]
    told = [run for text in shown for run in [_tokens(text)]]
    for answer in answers:
        for statement in answer_lines(answer):
            tokens = _tokens(statement)
            for start in range(len(tokens) - TOLD_TOKENS + 1):
                part = tokens[start : start + TOLD_TOKENS]
                if any(_holds(run, part) for run in told):
                    return True
    return False


def answer_lines(solution: str) -> list[str]:
    """The statements of a solution that are its answer: functions' bodies, without docstrings."""
    try:
        tree = ast.parse(solution)
    except SyntaxError:
        return []
    found = []
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for statement in function.body:
                docstring = isinstance(statement, ast.Expr) and isinstance(
                    statement.value, ast.Constant
                )
                if not docstring:
                    found.append(ast.get_source_segment(solution, statement) or "")
    return found


def _tokens(code: str) -> list[str]:
    """The tokens of a piece of Python, as far as it is Python."""
    found = []
    layout = {
        tokenize.NEWLINE,
        tokenize.NL,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.COMMENT,
        tokenize.ENDMARKER,
    }
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type not in layout:
                found.append(token.string)
    except (tokenize.TokenError, IndentationError, SyntaxError):
        pass
    return found


def _holds(run: list[str], part: list[str]) -> bool:
    return any(run[i : i + len(part)] == part for i in range(len(run) - len(part) + 1))
