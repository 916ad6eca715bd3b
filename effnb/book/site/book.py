"""What the book is made of: the executed chapters, with what each tells about itself.

Beside a chapter may lie a file of the same name that ends in `.toml`. It lists what the chapter
adds to the pages that collect from all chapters: the symbols that it introduces, the terms that it
explains, and the advice that its measurements support (see `effnb.book.site.words`).
"""

from __future__ import annotations

import html
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from effnb.book.site.words import Words, read_words
from effnb.lab.chapters import NOTEBOOKS, Chapter, chapters
from effnb.lab.claims import verdicts_in

REPOSITORY = NOTEBOOKS.parent


class SiteError(ValueError):
    """A page that cannot be made; the message says which, and what to do."""


@dataclass(frozen=True)
class Written:
    """A chapter that has been executed.

    Attributes:
        chapter: Its row in the map.
        notebook: The notebook as read from JSON.
        words: The symbols, terms and advice that it adds to the book.
    """

    chapter: Chapter
    notebook: dict[str, Any]
    words: Words

    @property
    def name(self) -> str:
        """Path below `notebooks/`, and below the top of the site, without an ending."""
        return self.chapter.name

    @cached_property
    def verdicts(self) -> list[dict[str, Any]]:
        """The verdicts that its cells computed."""
        return verdicts_in(self.notebook)

    @cached_property
    def headings(self) -> dict[str, str]:
        """Each heading in words, with its anchor on the page."""
        found: dict[str, str] = {}
        for cell in self.notebook["cells"]:
            if cell["cell_type"] == "markdown":
                prose = re.sub(r"^```.*?^```", "", source(cell), flags=re.DOTALL | re.MULTILINE)
                for words in re.findall(r"^#{1,6} +(.+?)\s*#*$", prose, re.MULTILINE):
                    found[words] = slug(words)
        return found

    @cached_property
    def mathematics(self) -> list[str]:
        """Every formula of its prose, in TeX."""
        prose = [source(c) for c in self.notebook["cells"] if c["cell_type"] == "markdown"]
        return formulas("\n\n".join(prose))


def source(cell: dict[str, Any]) -> str:
    """The text of a cell."""
    return "".join(cell["source"])


def formulas(markdown: str) -> list[str]:
    """The formulas of a text, in TeX; code is left out."""
    bare = re.sub(r"^```.*?^```|`[^`\n]*`", " ", markdown, flags=re.DOTALL | re.MULTILINE)
    bare = bare.replace(r"\$", " ")
    return [a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$([^$]+?)\$", bare, re.DOTALL)]


def slug(heading: str) -> str:
    """The anchor of a heading, as MyST and repository browsers make it."""
    plain = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return plain.replace(" ", "-")


@dataclass(frozen=True)
class Book:
    """All chapters, and those that are written.

    Attributes:
        folder: The notebooks.
        chapters: The whole map.
        written: The executed ones among them, in order.
    """

    folder: Path
    chapters: tuple[Chapter, ...]
    written: tuple[Written, ...]

    def find(self, name: str) -> Written | None:
        """The executed chapter of that name."""
        return next((one for one in self.written if one.name == name), None)


def read_book(folder: Path = NOTEBOOKS) -> Book:
    """Read every executed chapter of a folder.

    Raises:
        SiteError: When a notebook or the file beside it does not say what it should.
    """
    whole = tuple(chapters(folder))
    written = []
    for chapter in whole:
        if chapter.written:
            path = folder / f"{chapter.name}.ipynb"
            notebook = json.loads(path.read_text(encoding="utf-8"))
            try:
                words = read_words(path.with_suffix(".toml"))
            except ValueError as problem:
                raise SiteError(f"notebooks/{chapter.name}.toml: {problem}") from None
            written.append(Written(chapter, notebook, words))
    return Book(folder, whole, tuple(written))


def up(page: str) -> str:
    """The way from a page to the top of the site: `../` for 05_inference/1_pruning."""
    return "../" * page.count("/")


def resolve(page: str, target: str) -> str:
    """Where a relative link of a notebook leads: a path below the repository.

    Args:
        page: The notebook's path below `notebooks/`.
        target: The link, without its anchor.

    Raises:
        SiteError: When it leads out of the repository.
    """
    path = os.path.normpath(PurePosixPath("notebooks", page).parent / target).replace(os.sep, "/")
    if path.startswith("../"):
        raise SiteError(f"{page} links to {target}, which lies outside of the repository.")
    return path


def link(words: str, page: str, target: str) -> str:
    """A link in HTML from a page to a place below the top of the site."""
    return f'<a href="{up(page)}{target}">{html.escape(words)}</a>'
