"""Tables: rows and columns with a caption, for eyes, for ears and for tests.

    table(rows, columns={"method": "method", "perplexity": ".1f"}, caption="At 3 bits.")

A notebook shows an HTML table whose headings belong to their rows and columns, with numbers aligned
at the right; its plain text, which tests compare, is aligned too. A number that is missing is said
to be missing, never zero and never blank.
"""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


class _NotMeasured:
    """A result that does not exist; there is one of its kind."""

    def __repr__(self) -> str:
        return "not measured"

    def __bool__(self) -> bool:
        return False

    def __reduce__(self) -> str:
        return "NOT_MEASURED"  # a copy is the same thing


NOT_MEASURED = _NotMeasured()
"""The value of a result that was not measured: false, and said in words wherever it is shown."""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, (bool, np.bool_))


def _say(value: object, form: str) -> str:
    """A cell's words."""
    if value is None or value is NOT_MEASURED or (_is_number(value) and math.isnan(value)):
        return repr(NOT_MEASURED)
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if not _is_number(value):
        return str(value)
    if form:
        return format(value, form)
    return f"{value:,}" if isinstance(value, (int, np.integer)) else f"{value:,.4g}"


@dataclass(frozen=True)
class Table:
    """A table; the last value of a cell shows it.

    Attributes:
        columns: The headings.
        rows: The cells in words, row by row.
        caption: What the table shows, in a sentence or two.
        right: For each column, whether it holds numbers and is aligned at the right.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str
    right: tuple[bool, ...]

    def __str__(self) -> str:
        """The table as aligned text under its caption."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, self.right, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.caption, *text])

    def __repr__(self) -> str:
        """The same: a cell of a notebook shows the table."""
        return str(self)

    def csv(self) -> str:
        """The table as CSV with a heading."""
        packed = io.StringIO()
        writer = csv.writer(packed, lineterminator="\n")
        writer.writerows([self.columns, *self.rows])
        return packed.getvalue()

    def _repr_html_(self) -> str:
        # JupyterLab aligns every cell at the right and pays no heed to headings: one sheet for the
        # table, by classes, so that a long table does not repeat its styles. A page that takes
        # style sheets away still shows rows, columns and caption.
        def line(cells: Sequence[str], tag: str) -> str:
            made = []
            for i, (cell, right) in enumerate(zip(cells, self.right, strict=True)):
                kind = ' class="n"' if right else ""
                if tag == "th":
                    made.append(f'<th scope="col"{kind}>{html.escape(cell)}</th>')
                elif i == 0:
                    made.append(f'<th scope="row"{kind}>{html.escape(cell)}</th>')
                else:
                    missing = ' class="m"' if cell == repr(NOT_MEASURED) else kind
                    made.append(f"<td{missing}>{html.escape(cell)}</td>")
            return f"<tr>{''.join(made)}</tr>"

        body = "".join(line(row, "td") for row in self.rows)
        caption = html.escape(self.caption)
        return (
            f'{TABLE_STYLE}<table class="effnb-table"><caption>{caption}</caption>'
            f"<thead>{line(self.columns, 'th')}</thead><tbody>{body}</tbody></table>"
        )


TABLE_STYLE = (
    "<style>table.effnb-table{border-collapse:collapse;font-variant-numeric:tabular-nums;"
    "margin:.4em 0;font-size:inherit}"
    ".effnb-table caption{caption-side:top;text-align:left;padding:0 0 .5em;max-width:68ch;"
    "opacity:.85}"
    ".effnb-table :is(th,td){text-align:left!important;padding:.3em 1.2em .3em 0;"
    "vertical-align:baseline;white-space:normal;"
    "border-bottom:1px solid color-mix(in srgb,currentColor 14%,transparent)}"
    ".effnb-table :is(th,td).n{text-align:right!important;white-space:nowrap}"
    ".effnb-table tbody th{font-weight:500}"
    ".effnb-table td.m{text-align:right!important;font-style:italic;opacity:.75}</style>"
)


def table(
    rows: Sequence[Mapping[str, Any] | Sequence[Any]],
    columns: Sequence[str] | Mapping[str, str] | None = None,
    *,
    caption: str,
) -> Table:
    """A table with a caption; its first column names the rows.

    Args:
        rows: For each row a dictionary by heading, or its cells in order. A heading that a
            dictionary lacks, None, "not a number" and `NOT_MEASURED` are all said to be not
            measured.
        columns: The headings, in order; or for each heading how its numbers are written, such as
            ".1f", ".0%" or "". The keys of the first row when None.
        caption: What the table shows, in a sentence or two.

    Raises:
        ValueError: When there is no caption, no row or no column, or a row has too many or too few
            cells.
    """
    if not caption.strip():
        raise ValueError("a table needs a caption: say in a sentence what it shows.")
    if not rows:
        raise ValueError("a table needs at least one row.")
    if columns is None:
        if not isinstance(rows[0], Mapping):
            raise ValueError("a table of bare rows needs the names of its columns.")
        columns = list(rows[0])
    forms = dict(columns) if isinstance(columns, Mapping) else dict.fromkeys(columns, "")
    if not forms or len(forms) < len(columns):
        raise ValueError(f"a table needs columns with different names, and has {list(columns)}.")
    cells = []
    for number, row in enumerate(rows, 1):
        if isinstance(row, Mapping):
            unknown = [str(name) for name in row if name not in forms]
            if unknown:
                raise ValueError(f"row {number} has the unknown column {unknown[0]!r}.")
            row = [row.get(name) for name in forms]
        if len(row) != len(forms):
            raise ValueError(f"row {number} has {len(row)} cells; there are {len(forms)} columns.")
        cells.append(list(row))
    missing = (type(None), _NotMeasured)
    right = tuple(
        all(_is_number(v) or isinstance(v, missing) for v in column)
        and any(_is_number(v) for v in column)
        for column in zip(*cells)
    )
    said = tuple(tuple(_say(v, form) for v, form in zip(row, forms.values())) for row in cells)
    return Table(tuple(str(name) for name in forms), said, caption.strip(), right)
