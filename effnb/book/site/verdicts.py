"""Claims, evidence and verdicts as HTML."""

from __future__ import annotations

import html
from dataclasses import fields
from typing import Any

from effnb.book.site.book import SiteError, up
from effnb.lab.claims import Evidence, ledger

MARKS = {
    "holds": ("holds", "✓"),
    "holds in part": ("in-part", "◐"),
    "does not hold at this scale": ("fails", "✗"),
    "cannot be tested here": ("untested", "–"),
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


def piece(part: dict[str, Any]) -> Evidence:
    """A piece of evidence from the form in which a notebook stores it."""
    return Evidence(**{field.name: part[field.name] for field in fields(Evidence)})


def certainty(part: dict[str, Any]) -> str:
    """How certain a number is, in words."""
    if part["kind"] == "exact":
        return "exact"
    interval = "t" if part["kind"] == "student" else "bootstrap"
    return f"n = {part['samples']}, 95 % {interval} interval"


def evidence_html(verdict: dict[str, Any]) -> str:
    """The evidence behind a verdict, as a list."""
    rows = "".join(
        f"<li><span>{html.escape(part['what'])}: <strong>{piece(part).measured()}</strong></span> "
        f'<span class="expected">{piece(part).expected()}: {part["outcome"]} '
        f"({certainty(part)})</span></li>"
        for part in verdict["parts"]
    )
    note = f'<p class="claim-note">{html.escape(verdict["note"])}</p>' if verdict["note"] else ""
    return (f"<ul>{rows}</ul>" if rows else "") + note


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
