"""The instructor's index on the site, and the slides, plans and answer keys that it leads to.

They are made from the stored chapters, like every other page; `make workshop` makes the same with
assignments beside them.
"""

from __future__ import annotations

from pathlib import Path

from effnb.book.site.book import Book, SiteError
from effnb.book.workshop import pack
from effnb.book.workshop.teaching import NoTeaching

PLACE = "_static/teach"
"""Where the pages lie: beside the theme's own files, since they are no pages of the theme."""


def lessons(book: Book) -> list[pack.Lesson]:
    """The chapters of a book that have a file for teachers.

    Raises:
        SiteError: When such a file does not say what it should.
    """
    try:
        found = pack.read_lessons(folder=book.folder)
    except NoTeaching as problem:
        raise SiteError(f"notebooks/{problem}") from None
    written = {one.name for one in book.written}
    return [one for one in found if one.name in written]


def teach_part(book: Book) -> str:
    """The chapters with links to their slides, plans, keys and learners' editions, as HTML."""
    found = lessons(book)
    if not found:
        return "<p>No chapter has a plan for teachers yet.</p>"
    return pack.table_html(found, f"{PLACE}/")


def write(site: Path, book: Book) -> None:
    """Write what the index leads to.

    Args:
        site: The folder to publish.
        book: The chapters.
    """
    pack.write_pages(site / PLACE, lessons(book))
