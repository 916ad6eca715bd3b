"""Claims, evidence and verdicts as HTML."""

from __future__ import annotations

import html
from typing import Any

from effnb.book.site.book import SiteError, up
from effnb.lab.claims import FAILS, HOLDS, IN_PART, OPEN, UNTESTED, ledger

MARKS = {
    HOLDS: ("holds", "✓"),
    IN_PART: ("in-part", "◐"),
    FAILS: ("fails", "✗"),
    OPEN: ("undecided", "?"),
    UNTESTED: ("untested", "–"),
    "not yet measured": ("open", "·"),
}
"""For each verdict: its class on the page, and its mark."""


def badge(verdict: str) -> str:
    """A verdict as HTML."""
    kind, mark = MARKS[verdict]
    return (
        f'<span class="verdict verdict-{kind}"><span aria-hidden="true">{mark}</span> '
        f"{html.escape(verdict)}</span>"
    )


def measured(part: dict[str, Any]) -> str:
    """The number of a piece of evidence, with its interval.

    Chapters that were built before parts were registered do not carry it in words.
    """
    if "measured" in part:
        return part["measured"]
    if part["low"] == part["high"]:
        return f"{part['estimate']:.3g}"
    return f"{part['estimate']:.3g} [{part['low']:.3g}, {part['high']:.3g}]"


def expected(part: dict[str, Any]) -> str:
    """What the claim expects of it, in words."""
    if "expected" in part:
        return part["expected"]
    return f"expected {part['expect']} {part['bound']:.3g}, margin {part['margin']:.3g}"


def certainty(part: dict[str, Any]) -> str:
    """What a number rests on: seeds and documents, or a formula."""
    return part.get("basis") or f"n = {part['samples']}"


def evidence_html(verdict: dict[str, Any]) -> str:
    """The evidence behind a verdict as a list, what would have changed it, and its setting."""
    rows = "".join(
        f"<li><span>{html.escape(part['what'])}: "
        f"<strong>{html.escape(measured(part))}</strong></span> "
        f'<span class="expected">{html.escape(expected(part))}: {html.escape(part["outcome"])} '
        f"({html.escape(certainty(part))})</span></li>"
        for part in verdict["parts"]
    )
    notes = "".join(
        f'<p class="claim-note">{html.escape(verdict[key])}</p>'
        for key in ("change", "confirm", "note")
        if verdict.get(key)
    )
    return (f"<ul>{rows}</ul>" if rows else "") + notes


def claim_html(verdict: dict[str, Any], page: str) -> str:
    """A verdict as a card of the chapter that computed it."""
    name = verdict["id"]
    if name not in ledger():
        raise SiteError(f"{page} judges the claim {name}, which is not in the ledger.")
    return (
        f'<section class="claim" id="claim-{name}" aria-label="Claim {name}"><p class="claim-head">'
        f'<a class="claim-id" href="{up(page)}claims.html#{name}">{name}</a>'
        f"{badge(verdict['verdict'])}</p>"
        f'<p class="claim-words">{html.escape(ledger()[name].claim)}</p>'
        f"{evidence_html(verdict)}</section>"
    )
