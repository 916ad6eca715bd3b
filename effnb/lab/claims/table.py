"""Claims, evidence and verdicts on a page, with a form for programs."""

from __future__ import annotations

import html
import json
from typing import Any

from IPython.display import display

from effnb.lab.claims.verdicts import FAILS, HOLDS, IN_PART, OPEN, Verdict

MIME = "application/vnd.effnb.claims+json"
"""Under this type, a cell's output carries the verdicts for programs to read."""

_MARKS = {
    HOLDS: ("✓", "#009E73"),
    IN_PART: ("◐", "#E69F00"),
    FAILS: ("✗", "#D55E00"),
    OPEN: ("?", "#56B4E9"),
}


def _row(one: Verdict) -> str:
    mark, colour = _MARKS.get(one.outcome, ("–", "#8A919C"))
    evidence = "".join(
        f'<li style="margin: 3px 0">{html.escape(part.what())}: '
        f"<strong>{html.escape(part.measured())}</strong> "
        f'<span style="opacity: 0.8">({html.escape(part.part.expected())}: '
        f"<em>{html.escape(part.outcome)}</em>; {html.escape(part.basis())})</span></li>"
        for part in one.parts
    )
    listed = f'<ul style="margin: 6px 0 0; padding-left: 20px">{evidence}</ul>' if evidence else ""
    below = "".join(
        f'<div style="opacity: 0.8; margin-top: 6px">{html.escape(text)}</div>'
        for text in (one.change(), one.confirmation(), one.note)
        if text
    )
    cell = 'style="text-align: left; vertical-align: top; padding: 10px 18px 10px 0"'
    return (
        f'<tr style="border-top: 1px solid rgba(128, 128, 128, 0.35)">'
        f'<th scope="row" {cell}><span style="white-space: nowrap">{one.claim.id}</span></th>'
        f'<td {cell}><div style="max-width: 62ch">{html.escape(one.claim.claim)}{listed}{below}'
        f'</div></td><td {cell}><span style="white-space: nowrap; border-left: 5px solid {colour}; '
        f'padding-left: 8px; font-weight: 600">{mark} {html.escape(one.outcome)}</span></td></tr>'
    )


def claims_table(*verdicts: Verdict) -> None:
    """Display claims, evidence and verdicts as a table, with a form of it for programs.

    Raises:
        ValueError: When no verdict, or two verdicts on one claim, are given.
    """
    names = [one.claim.id for one in verdicts]
    if not names or len(set(names)) < len(names):
        raise ValueError("a claims table takes one verdict for each claim, and at least one.")
    head = "".join(
        f'<th scope="col" style="text-align: left; padding: 4px 18px 8px 0">{word}</th>'
        for word in ("Id", "Claim and evidence", "Verdict")
    )
    table = (
        '<table aria-label="Claims and verdicts" style="border-collapse: collapse">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(map(_row, verdicts))}</tbody></table>"
    )
    display(
        {
            MIME: {"verdicts": [one.data() for one in verdicts]},
            "text/html": table,
            "text/plain": "\n\n".join(map(str, verdicts)),
        },
        raw=True,
    )


def verdicts_in(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The verdicts that an executed notebook carries in its outputs, as `Verdict.data` gives them.

    Args:
        notebook: The notebook as read from JSON.
    """
    found = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            content = output.get("data", {}).get(MIME)
            if isinstance(content, str):
                content = json.loads(content)
            found += content["verdicts"] if content else []
    return found
