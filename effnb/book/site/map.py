"""The map of the chapters as a table for pages."""

from __future__ import annotations

import html

from effnb.book.site.book import Book, link
from effnb.lab.chapters import SECTIONS

MAP_HEAD = ("Chapter", "About", "Read", "Run", "Memory", "Claims")


def map_html(book: Book, page: str) -> str:
    """The table of all chapters, with what running them took when they were built.

    Args:
        book: The chapters.
        page: The page on which it is.
    """
    parts, later, seconds, minutes = [], [], 0, 0
    for key, section in SECTIONS.items():
        rows = []
        for chapter in (c for c in book.chapters if c.section == section):
            written = book.find(chapter.name)
            cells = [html.escape(chapter.title), html.escape(chapter.about)]
            if written is None:
                later.append(f"<li><strong>{cells[0]}</strong>: {cells[1]}</li>")
                continue
            cells[0] = link(chapter.title, page, f"{chapter.name}.html")
            taken = chapter.measured
            ids = sorted({one["id"] for one in written.verdicts})
            links = ", ".join(link(i, page, f"{chapter.name}.html#claim-{i}") for i in ids)
            run = f"{taken.seconds} s" if taken else "not measured"
            rows.append(
                [*cells, f"{chapter.minutes} min", run,
                 f"{taken.mebibytes:,} MiB" if taken else "", links]
            )  # fmt: skip
            seconds += taken.seconds if taken else 0
            minutes += chapter.minutes or 0
        if not rows:
            continue
        body = "".join(map(_row, rows))
        parts.append(
            f'<tbody id="{key}"><tr class="map-section"><th scope="rowgroup" colspan="6">'
            f"{html.escape(section)}</th></tr>{body}</tbody>"
        )
    heads = "".join(f'<th scope="col">{word}</th>' for word in MAP_HEAD)
    cores = sorted({w.chapter.measured.cores for w in book.written if w.chapter.measured})
    on = " or ".join(map(str, cores))
    total = (
        f"<p>The written chapters together: {minutes} minutes to read, exercises included, and "
        f"{_minutes(seconds)} to run, measured on {on} CPU cores when each was last built.</p>"
        if book.written
        else ""
    )
    be = "chapters are" if len(later) > 1 else "chapter is"
    rest = (
        f'<details class="unwritten"><summary>{len(later)} {be} not written yet'
        f"</summary><ul>{''.join(later)}</ul></details>"
        if later
        else ""
    )
    return (
        f'<table class="chapter-map"><thead><tr>{heads}</tr></thead>{"".join(parts)}</table>'
        f"{total}{rest}"
    )


def _row(cells: list[str]) -> str:
    """A row of the map."""
    columns = [f'<th scope="row">{cells[0]}</th>']
    for i, cell in enumerate(cells[1:], start=1):
        columns.append(f'<td data-label="{MAP_HEAD[i]}">{cell}</td>')
    return f"<tr>{''.join(columns)}</tr>"


def _minutes(seconds: int) -> str:
    return f"{seconds} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
