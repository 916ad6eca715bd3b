"""Terms of the glossary in the chapters: a link at the first use, with its definition beside it.

The definition opens under the pointer and under the keyboard's focus, without a script. A word that
also belongs to everyday English is linked in the chapter that explains it, and nowhere else.
"""

from __future__ import annotations

import html
import re
import unicodedata
from dataclasses import dataclass

from effnb.book.site.book import Book, slug

ORDINARY = {
    *("cache", "classifier", "clipping", "confidence", "decay", "delta", "divergence", "exit"),
    *("factor", "factors", "frozen", "fusion", "gate", "in sequence", "index", "margin", "merge"),
    *("mixture", "panel", "prefix", "prompt", "rank", "retention", "shot", "state", "student"),
    *("teacher", "template", "tiling", "twin", "verdict", "temperature", "granularity", "token"),
    *("calibration", "outlier", "sparsity", "embedding", "cascade", "compaction", "adapter"),
}
ALIASES = {
    "Cholesky decomposition": ("Cholesky",),
    "key-value cache": ("KV cache",),
    "singular value decomposition": ("SVD",),
}
"""Other words for a term of the glossary."""

_TAG = re.compile(r"(<[^>]+>)")
_CLASS = re.compile(r'class="([^"]*)"')
_VOID = {"img", "br", "input", "hr", "meta", "link", "wbr", "source", "col"}
_HOLDS = {"p", "li"}
_KEPT = {"a", "code", "pre", "h1", "h2", "h3", "h4", "figure", "table", "button", "summary", "form"}
_KEPT |= {"section.panel", "section.claim", "aside", "script", "style", "nav", "details"}
_KEPT_CLASSES = {"katex", "math-block", "chapter-bar", "cell_output", "cell_input", "highlight"}


@dataclass(frozen=True)
class Entry:
    """A term as a page links it.

    Attributes:
        name: The term.
        anchor: Its id in the glossary.
        means: Its definition, as HTML.
        chapter: The chapter that explains it.
    """

    name: str
    anchor: str
    means: str
    chapter: str

    @property
    def pattern(self) -> str:
        """What it looks like in a sentence, in the plural too."""
        words = "|".join(
            re.escape(html.escape(one)).replace(r"\ ", r"[ \n]")
            for one in (self.name, *ALIASES.get(self.name, ()))
        )
        # A name keeps its capitals; a word may begin a sentence.
        return f"(?:{words})" if re.search("[A-Z]", self.name) else f"(?i:{words})"


def anchor(term: str) -> str:
    """The id of a term in the glossary."""
    return f"word-{slug(unicodedata.normalize('NFKC', term))}"


def entries(book: Book) -> list[Entry]:
    """The terms of all chapters, longest first: "2:4 sparsity" before "sparsity"."""
    found = [
        Entry(
            term.name,
            anchor(term.name),
            html.escape(f"{term.means[0].upper()}{term.means[1:].rstrip('.')}."),
            written.name,
        )
        for written in book.written
        for term in written.words.terms
        if "$" not in term.means
    ]
    return sorted(found, key=lambda one: -len(one.name))


def linked(page: str, name: str, terms: list[Entry]) -> str:
    """A chapter's page, in which each term is a link where it is first used.

    Args:
        page: The page's HTML.
        name: The chapter, by its path.
        terms: The terms, longest first.
    """
    wanted = [one for one in terms if one.name not in ORDINARY or one.chapter == name]
    start, end = page.find("<article"), page.find("</article>")
    if start < 0 or not wanted:
        return page
    groups = "|".join(f"(?P<t{i}>{one.pattern})" for i, one in enumerate(wanted))
    every = re.compile(rf"(?<![\w-])(?:{groups})(?P<plural>s|es)?(?![\w-])")
    top, used = "../" * name.count("/"), set()

    def link(found: re.Match[str]) -> str:
        number = int(found.lastgroup[1:]) if found.lastgroup != "plural" else None
        if number is None:
            number = next(i for i in range(len(wanted)) if found[f"t{i}"])
        if number in used:
            return found[0]
        used.add(number)
        one = wanted[number]
        return (
            f'<span class="term"><a href="{top}glossary.html#{one.anchor}" '
            f'aria-describedby="means-{one.anchor}">{found[0]}</a>'
            f'<span class="term-means" role="tooltip" id="means-{one.anchor}">{one.means}'
            "</span></span>"
        )

    out, stack = [], []
    for piece in _TAG.split(page[start:end]):
        if not piece.startswith("<"):
            prose = any(tag in _HOLDS for tag, _ in stack) and not any(kept for _, kept in stack)
            out.append(every.sub(link, piece) if prose else piece)
            continue
        out.append(piece)
        tag = re.match(r"</?([a-zA-Z0-9]+)", piece)
        if not tag or tag[1] in _VOID or piece.endswith("/>"):
            continue
        if piece.startswith("</"):
            while stack and stack.pop()[0] != tag[1]:
                pass
            continue
        classes = set((_CLASS.search(piece) or ("", ""))[1].split())
        kept = tag[1] in _KEPT or bool(classes & _KEPT_CLASSES)
        kept |= any(f"{tag[1]}.{one}" in _KEPT for one in classes)
        stack.append((tag[1], kept))
    return page[:start] + "".join(out) + page[end:]
