"""Show the code itself: the package's real source, highlighted and linked, never a copy of it.

Highlighting is by Pygments, written into the HTML, so that it needs no style sheet and no script. A
listing brings its own light background, on which every colour has a contrast of at least 4.5 to 1;
so it can be read on a dark page too.
"""

from __future__ import annotations

import html
import inspect
import os
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
        """The source under a comment that says where it stands."""
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
        formatter = HtmlFormatter(noclasses=True, nowrap=True, style=COLOURS)
        code = highlight(self.source, PythonLexer(), formatter)
        return (
            '<figure style="margin: 0.5em 0">'
            f'<figcaption style="margin-bottom: 0.3em">{name}</figcaption>'
            f'<pre style="background: {PAPER}; color: {BLACK}; padding: 12px 16px; margin: 0; '
            'border: 1px solid #E3E2DC; border-radius: 8px; overflow-x: auto; line-height: 1.4">'
            f"{code}</pre></figure>"
        )


def listing(thing: Any) -> Listing:
    """The source of a function, method, class or module.

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
    return Listing(name, textwrap.dedent("".join(lines)).strip("\n"), path, max(line, 1))


def show(thing: Any, *more: Any) -> None:
    """Display the source of functions, classes or modules, each with a link to its file.

    Raises:
        TypeError: When one has no source.
    """
    for one in [listing(each) for each in (thing, *more)]:
        display(one)
