"""Show the code itself: the package's real source, highlighted and linked, never a copy of it.

Highlighting is by Pygments, with one short sheet of styles for each listing. A listing brings its
own light background, on which every colour has a contrast of at least 4.5 to 1; so it can be read
on a dark page too. Docstrings are shown by their first line: the file, one click away, has the
rest. Lines are broken at 80 columns, between words.
"""

from __future__ import annotations

import ast
import html
import inspect
import os
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from IPython.display import display
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from effnb.lab.figures import BLACK, PAPER

COLUMNS = 80
"""Where lines are broken on the page."""

REPOSITORY = Path(__file__).resolve().parents[2]
COLOURS = "xcode"
"""Of the colour schemes that come with Pygments, the one of highest contrast on light ground."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The source of a function, class or module.

    Attributes:
        name: Its dotted name.
        source: The source text, not indented.
        path: The file, relative to the repository; None for what a notebook's cell defines, or
            another package.
        line: Line of the file on which it begins, from 1.
    """

    name: str
    source: str
    path: Path | None
    line: int

    def __str__(self) -> str:
        """The source under a comment that says where it is."""
        return f"# {self.place()}\n{self.source}"

    def place(self) -> str:
        """Name, file and line in words."""
        where = f"{self.path.as_posix()}, line {self.line}" if self.path else "not a file of ours"
        return f"{self.name} ({where})"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/html": self.html(), "text/plain": str(self)}

    def html(self) -> str:
        """The highlighted source under its name, linked to the file where it has one."""
        name = f"<code>{html.escape(self.name)}</code>"
        if self.path:
            # Kernels run in the notebook's folder, so that this link is right on any machine.
            target = Path(os.path.relpath(REPOSITORY / self.path, Path.cwd())).as_posix()
            name += (
                f' · <a href="{html.escape(target)}#L{self.line}">'
                f"{html.escape(self.path.as_posix())}, line {self.line}</a>"
            )
        lines, styles = _coloured(self.source)
        return (
            '<figure style="margin: 0.5em 0">'
            f'<figcaption style="margin-bottom: 0.3em">{name}</figcaption>'
            f'<pre class="effnb-code" style="background: {PAPER}; color: {BLACK}; '
            "padding: 12px 16px; margin: 0; border: 1px solid #E3E2DC; border-radius: 8px; "
            "overflow-x: auto; line-height: 1.4; white-space: pre-wrap; overflow-wrap: normal; "
            f'word-break: normal; max-width: calc({COLUMNS}ch + 34px); box-sizing: border-box">'
            f"{lines}</pre><style>{styles}</style></figure>"
        )


def _coloured(source: str) -> tuple[str, str]:
    """Source as HTML with short classes, and the rules of those that it uses."""
    formatter = HtmlFormatter(nowrap=True, style=COLOURS)
    sheet = {}
    for rule in formatter.get_style_defs(".effnb-code").splitlines():
        found = re.match(r"\.effnb-code \.(\w+) \{ ?(.*?) ?\}", rule)
        if found and found[2] != "color: #000":  # that is the ink of all the rest
            sheet[found[1]] = found[2]
    coloured = highlight(source, PythonLexer(), formatter).rstrip("\n")
    # A word without a colour needs no element.
    coloured = re.sub(
        r'<span class="(\w+)">([^<]*)</span>',
        lambda word: word[0] if word[1] in sheet else word[2],
        coloured,
    ).split("\n")
    made, indents = [], set()
    for line, plain in zip(coloured, source.split("\n"), strict=False):
        indent = len(plain) - len(plain.lstrip())
        if len(plain) > COLUMNS - 20:  # on narrow pages shorter lines are broken too
            indents.add(indent)
            line = f'<span class="w{indent}">{line}</span>'
        made.append(line)
    lines = "\n".join(made)
    used = set(re.findall(r'class="(\w+)"', lines))
    rules = [f".effnb-code .{name}{{{rule}}}" for name, rule in sheet.items() if name in used]
    # What is broken goes on four columns further in.
    rules += [
        f".effnb-code .w{n}{{display:inline-block;padding-left:{n + 4}ch;text-indent:-{n + 4}ch}}"
        for n in sorted(indents)
    ]
    return lines, "".join(rules)


def _shortened(source: str) -> str:
    """Source whose docstrings end with their first line."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a lambda in the middle of a call
        return source
    lines = source.split("\n")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(tree):
        first = node.body[0] if isinstance(node, documented) and node.body else None
        words = getattr(getattr(first, "value", None), "value", None)
        if isinstance(first, ast.Expr) and isinstance(words, str) and "\n" in words:
            found.append((first.lineno - 1, first.end_lineno - 1))
    for start, end in sorted(found, reverse=True):
        opening = lines[start].rstrip()
        quotes = re.match(r"\s*[a-zA-Z]*(\"\"\"|\'\'\')", opening)
        if quotes is None:
            continue
        tail = lines[end].rstrip().rpartition(quotes[1])[2]
        lines[start : end + 1] = [opening.removesuffix("\\") + quotes[1] + tail]
    return "\n".join(lines)


def listing(thing: Any, *, docstrings: bool = False) -> Listing:
    """The source of a function, method, class or module.

    Args:
        thing: What is shown.
        docstrings: Whether docstrings are shown whole; only their first lines when False.

    Raises:
        TypeError: When it has none that Python can find: a built-in, a number, a model.
    """
    bare = inspect.unwrap(thing) if callable(thing) else thing
    name = getattr(bare, "__qualname__", getattr(bare, "__name__", type(thing).__name__))
    module = getattr(bare, "__module__", None)
    try:
        lines, line = inspect.getsourcelines(bare)
        file = Path(inspect.getsourcefile(bare) or "").resolve()
    except (TypeError, OSError):
        raise TypeError(
            f"the source of {name} cannot be shown: give a function, a class or a module that is "
            "written in Python."
        ) from None
    if module and module != "__main__" and not isinstance(bare, ModuleType):
        name = f"{module}.{name}"
    inside = file.is_relative_to(REPOSITORY) and file.is_file()
    path = file.relative_to(REPOSITORY) if inside else None
    source = textwrap.dedent("".join(lines)).strip("\n")
    return Listing(name, source if docstrings else _shortened(source), path, max(line, 1))


def show(thing: Any, *more: Any, docstrings: bool = False) -> None:
    """Display the source of functions, classes or modules, each with a link to its file.

    Args:
        thing: What is shown first.
        *more: What is shown after it.
        docstrings: Whether docstrings are shown whole; only their first lines when False.

    Raises:
        TypeError: When one has no source.
    """
    for one in [listing(each, docstrings=docstrings) for each in (thing, *more)]:
        display(one)
