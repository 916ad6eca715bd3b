"""What is collected from all chapters: claims, symbols and terms."""

from __future__ import annotations

import html
import re
from typing import Any

from effnb.book.methods import methods
from effnb.book.site.book import Book, SiteError, Written, link
from effnb.book.site.docstrings import first_sentence
from effnb.book.site.glossary import anchor
from effnb.book.site.katex import render
from effnb.book.site.reference import Reference, page_of
from effnb.book.site.verdicts import badge, evidence_html
from effnb.lab.chapters import SECTIONS
from effnb.lab.claims import joint, ledger

OPEN = "not yet measured"


def raw(content: str) -> str:
    """HTML inside of Markdown, as it is."""
    return f"```{{raw}} html\n{content}\n```"


# ------------------------------------------------------------------------------------ the claims


def verdicts_on(book: Book, claim: str) -> list[tuple[Written, dict[str, Any]]]:
    """The verdicts on a claim; first that of the chapter which the ledger names."""
    found = [(w, one) for w in book.written for one in w.verdicts if one["id"] == claim]
    return sorted(found, key=lambda pair: pair[0].name not in ledger()[claim].chapters)


def joint_on(book: Book, claim: str) -> dict[str, Any] | None:
    """The one verdict on a claim, of all chapters that the ledger names for it; None without."""
    found = verdicts_on(book, claim)
    own = [one for written, one in found if written.name in ledger()[claim].chapters]
    return joint(own or [one for _, one in found]) if found else None


def summary_part(book: Book) -> str:
    """How many claims have which verdict."""
    counted: dict[str, int] = {}
    for name in ledger():
        found = joint_on(book, name)
        verdict = found["verdict"] if found else OPEN
        counted[verdict] = counted.get(verdict, 0) + 1
    items = "".join(
        f"<li><strong>{counted[verdict]}</strong> {badge(verdict)}</li>"
        for verdict in sorted(counted, key=lambda v: (v == OPEN, -counted[v], v))
    )
    return raw(f'<ul class="claims-summary">{items}</ul>')


def claims_part(book: Book) -> str:
    """All claims, under the articles that make them."""
    parts, sources = [claims_filter(book)], {}
    for name, claim in ledger().items():
        sources.setdefault(claim.source, []).append(name)
    # Articles of which something was measured come first, and so do the measured claims of each.
    for source, names in sorted(
        sources.items(), key=lambda pair: not any(joint_on(book, one) for one in pair[1])
    ):
        title, _, rest = source.partition(", ")
        parts.append(f"\n## {title}\n\n{rest}.\n")
        names = sorted(names, key=lambda one: joint_on(book, one) is None)
        parts.append(raw("".join(_claim(book, one) for one in names)))
    return "\n".join(parts)


def section_of(claim: str) -> str:
    """The section of the book in which a claim is judged."""
    return SECTIONS[ledger()[claim].chapters[0].split("/")[0]]


def claims_filter(book: Book) -> str:
    """Two lists to choose from: an outcome, and a section of the book."""
    found = {name: joint_on(book, name) for name in ledger()}
    outcomes = {one["verdict"] if one else OPEN for one in found.values()}
    outcomes = sorted(outcomes, key=lambda one: (one == OPEN, one))
    sections = [one for one in SECTIONS.values() if one in {section_of(name) for name in found}]

    def choices(name: str, words: str, options: list[str]) -> str:
        listed = "".join(f"<option>{html.escape(one)}</option>" for one in options)
        return (
            f'<label>{words} <select name="{name}" autocomplete="off">'
            f'<option value="">all</option>{listed}</select></label>'
        )

    return raw(
        f'<form class="claims-filter pst-js-only">{choices("outcome", "Outcome", outcomes)} '
        f"{choices('section', 'Section', sections)}"
        f'<p role="status">{len(found)} claims</p></form>'
    )


def _claim(book: Book, name: str) -> str:
    """One row of the ledger, with the one verdict of the chapters that measured it."""
    claim, found, verdict = ledger()[name], verdicts_on(book, name), joint_on(book, name)
    titles = {chapter.name: chapter.title for chapter in book.chapters}
    parts = []
    if verdict:
        where = " and ".join(
            link(titles[written.name], "claims", f"{written.name}.html#claim-{name}")
            + ("" if written.name in claim.chapters else " (a first look)")
            for written, _ in found
        )
        parts.append(
            f'<div class="claim-verdict"><p>{badge(verdict["verdict"])} '
            f'<span class="claim-where">in {where}</span></p>{evidence_html(verdict)}</div>'
        )
    missing = [c for c in claim.chapters if c not in {written.name for written, _ in found}]
    wanted = " and ".join(
        f"{html.escape(titles[c])} ({'no verdict there' if book.find(c) else 'not written yet'})"
        for c in missing
    )
    still = f'{badge(OPEN)} <span class="claim-where">in {wanted}</span>' if missing else ""
    if found and missing:
        parts.append(f'<div class="claim-verdict"><p>{still}</p></div>')
    kind = "" if found else " claim-open"
    return (
        f'<section class="claim{kind}" id="{name}" aria-label="Claim {name}" '
        f'data-outcome="{verdict["verdict"] if verdict else OPEN}" '
        f'data-section="{html.escape(section_of(name))}">'
        f'<p class="claim-head"><a class="claim-id" href="#{name}">{name}</a>'
        f"{'' if found else still}</p>"
        f'<p class="claim-words">{html.escape(claim.claim)}</p>{"".join(parts)}</section>'
    )


# ------------------------------------------------------------------------- notation and glossary


def symbols_part(book: Book) -> str:
    """The symbols of all chapters, as a table."""
    rows = [
        (symbol, written)
        for written in book.written
        for symbol in written.words.symbols
    ]  # fmt: skip
    if not rows:
        return "No chapter has introduced a symbol yet."
    order = sorted(rows, key=lambda row: (row[0].local, _bare(row[0].tex).lower(), row[0].tex))
    lines = ["| symbol | meaning | introduced in |", "|---|---|---|"]
    for symbol, written in order:
        only = " (in this chapter only)" if symbol.local else ""
        where = f"[{written.chapter.title}](/{written.name}.ipynb)"
        lines.append(f"| ${symbol.tex}$ | {symbol.means}{only} | {where} |")
    return "\n".join(["```{rst-class} symbols", "```", "", *lines])


def _bare(tex: str) -> str:
    """A symbol without its hat, and Greek after Latin."""
    letters = re.sub(r"\\(?:hat|bar|tilde|mathbf|mathcal|mathbb|boldsymbol)\b|[{} ]", "", tex)
    return ("~" if letters.startswith("\\") else "") + letters.lstrip("\\")


def in_words(sentence: str) -> str:
    """A sentence of a docstring as HTML: its code as code, its formulas set."""
    pieces = re.split(r"`([^`]+)`|\$([^$]+)\$", sentence)
    done = [html.escape(one) for one in pieces[::3]]
    for i, (code, tex) in enumerate(zip(pieces[1::3], pieces[2::3], strict=True)):
        done[i] += f"<code>{html.escape(code)}</code>" if code else render(tex)
    return "".join(done)


def methods_part(book: Book, reference: Reference) -> str:
    """The methods whose names are no terms of a chapter, as entries of the glossary."""
    known = {anchor(term.name) for written in book.written for term in written.words.terms}
    rows = {}
    for method in methods(reference):
        if anchor(method.name) in known or method.name.lower() in rows:
            continue
        module, thing = reference.home(method.home)
        said = in_words(first_sentence(thing.doc))
        place = f"{page_of(module.name)}.html#{method.home}"
        chapter = next((one for one in book.chapters if one.name == method.chapter), None)
        where = f'<a href="{place}"><code>{html.escape(thing.name)}</code></a>'
        if chapter and book.find(method.chapter):
            where += f", {link(chapter.title, 'glossary', f'{method.chapter}.html')}"
        rows[method.name.lower()] = (
            f'<dt class="word-anchor" id="{anchor(method.name)}">'
            f"{html.escape(method.name)}</dt><dd><p>{said} {where}</p></dd>"
        )
    return raw(f'<dl class="simple glossary">{"".join(rows[one] for one in sorted(rows))}</dl>')


def terms_part(book: Book) -> str:
    """The terms that the chapters explain, in the order of the alphabet."""
    found: dict[str, Written] = {}
    lines = []
    rows = [(term, written) for written in book.written for term in written.words.terms]
    for term, written in sorted(rows, key=lambda row: row[0].name.lower()):
        if term.name.lower() in found:
            raise SiteError(
                f"{written.name} and {found[term.name.lower()].name} both explain the term "
                f"{term.name!r}: keep the better of the two."
            )
        found[term.name.lower()] = written
        if term.at not in written.headings:
            raise SiteError(
                f"notebooks/{written.name}.toml: the term {term.name!r} is said to be explained "
                f"under {term.at!r}, and the chapter has no such heading."
            )
        where = f"[{written.chapter.title}](/{written.name}.ipynb#{written.headings[term.at]})"
        ja = f' <span class="ja" lang="ja">{html.escape(term.ja)}</span>'
        lines += [
            f'<span class="word-anchor" id="{anchor(term.name)}">{html.escape(term.name)}</span>'
            f"{'' if term.ja == term.name else ja}",
            f": {term.means[0].upper()}{term.means[1:].rstrip('.')}. {where}",
            "",
        ]
    if not lines:
        return "No chapter has explained a term yet."
    return "\n".join(["{.glossary}", *lines])
