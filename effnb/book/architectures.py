"""Which method works on which model: the table that the tests measured, as a page of the book.

`tests/architectures` runs every method on a tiny random model of every architecture and stores what
came out in `data/architectures.json`; nothing here is typed.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

HEADS = ("Architecture", "Right", "In part", "Refused")
RESULT = Path(__file__).resolve().parents[2] / "data" / "architectures.json"


def read(path: Path = RESULT) -> dict[str, dict[str, Any]]:
    """By architecture: its "traits", and by method what it does."""
    return json.loads(path.read_text(encoding="utf-8"))


def page(found: dict[str, dict[str, Any]]) -> str:
    """As HTML: the whole table at a glance, then each architecture with its reasons, folded."""
    return glance(found) + _each(found)


MARKS = {"right": ("●", "right"), "part": ("◐", "in part"), "refused": ("–", "refused")}
"""How an outcome is drawn, and what a screen reader says."""


def outcome(one: dict[str, Any]) -> str:
    """One of "right", "part" (weights left out, or not saved as the class) and "refused"."""
    if "refused" in one:
        return "refused"
    return "part" if "left out" in one or "not saved" in one else "right"


def glance(found: dict[str, dict[str, Any]]) -> str:
    """Methods down, architectures across, a mark in each place."""
    names = list(found)
    head = "".join(f'<th scope="col"><span>{html.escape(name)}</span></th>' for name in names)
    rows = []
    for method in dict.fromkeys(one for row in found.values() for one in row["methods"]):
        marks = (
            MARKS[outcome(one)] if (one := found[name]["methods"].get(method)) else ("", "not run")
            for name in names
        )
        cells = "".join(
            f'<td><span aria-hidden="true">{mark}</span>'
            f'<span class="visually-hidden">{said}</span></td>'
            for mark, said in marks
        )
        rows.append(f'<tr><th scope="row">{html.escape(method)}</th>{cells}</tr>')
    legend = ", ".join(f"{mark} {said}" for mark, said in MARKS.values())
    return (
        '<div class="architecture-glance" tabindex="0" role="region" '
        'aria-label="Methods and architectures"><table>'
        f"<caption>{legend}; the reasons stand below.</caption>"
        f'<thead><tr><th scope="col">Method</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _each(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, row in found.items():
        methods = row["methods"]
        works = [m for m, one in methods.items() if one.get("works") and "left out" not in one]
        partly = {m: one["left out"] for m, one in methods.items() if "left out" in one}
        refused = {m: one["refused"] for m, one in methods.items() if "refused" in one}
        unsaved = {m: one["not saved"] for m, one in methods.items() if "not saved" in one}
        cells = [
            f"{len(works)} of {len(methods)}: {html.escape(', '.join(works))}",
            _reasons(partly, "leaves weights out and says which"),
            _reasons(refused, "refused in a sentence"),
        ]
        if unsaved:
            cells[0] += _reasons(unsaved, "works, but is not saved as the class")
        rows.append(
            f'<tr><th scope="row">{html.escape(name)}<br><small>{html.escape(row["traits"])}'
            f"</small></th>"
            + "".join(
                f'<td data-label="{label}">{cell}</td>' for label, cell in zip(HEADS[1:], cells)
            )
            + "</tr>"
        )
    head = "".join(f'<th scope="col">{one}</th>' for one in HEADS)
    return (
        f'<table class="architectures"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _reasons(found: dict[str, str], label: str) -> str:
    """Methods that share a sentence, together; folded."""
    if not found:
        return "none"
    together: dict[str, list[str]] = {}
    for method, sentence in found.items():
        together.setdefault(sentence, []).append(method)
    items = "".join(
        f"<li>{html.escape(', '.join(methods))}: {html.escape(sentence)}</li>"
        for sentence, methods in together.items()
    )
    return f"<details><summary>{len(found)} {label}</summary><ul>{items}</ul></details>"
