"""The papers that the book cites: one file of BibTeX, and links wherever a page names a paper.

`.make/site/bibliography.bib` is what a reader may take away. On the pages every arXiv id and every
DOI becomes a link that says title and year, and so does "Author et al., year" where the same page
cites exactly one paper of that author and year by its id.
"""

from __future__ import annotations

import html
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).resolve().parents[3] / ".make" / "site" / "bibliography.bib"

_ENTRY = re.compile(r"^@(\w+)\{([^,\s]+),\n(.*?)^\}", re.DOTALL | re.MULTILINE)
_FIELD = re.compile(r"^\s*(\w+)\s*=\s*\{(.*)\},?$", re.MULTILINE)
_ARXIV = re.compile(r"\barXiv[:\s]\s*(\d{4}\.\d{4,5})\b")
_BARE = re.compile(r"^(\s*)(\d{4}\.\d{4,5})\b")
_DOI = re.compile(r"\b(?:doi:?\s*)?(10\.\d{4,9}/[^\s<>\"',;]+[^\s<>\"',;.])", re.IGNORECASE)
_NAMED = re.compile(r"\b([A-Z][\w'’-]+)(?: et al\.| and [A-Z][\w'’-]+)?,? \(?((?:19|20)\d{2})\b")
_TAG = re.compile(r"(<!--.*?-->|<[^>]+>)", re.DOTALL)
_ADDRESS = re.compile(r"https?://(?:www\.)?arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{4,5})")
_KEPT = ("a", "script", "style", "math", "svg", "button", "textarea", "title")


@dataclass(frozen=True)
class Paper:
    """One entry of the bibliography.

    Attributes:
        key: Its BibTeX key, which is its anchor on the page of papers.
        authors: Surnames; `others` at the end where there are more.
        title: In full.
        year: Of the version that is cited.
        arxiv: Its arXiv id, or nothing.
        doi: Its DOI, or nothing.
        bibtex: The entry as it stands in the file.
    """

    key: str
    authors: tuple[str, ...]
    title: str
    year: int
    arxiv: str
    doi: str
    bibtex: str

    @property
    def address(self) -> str:
        """Where it can be read."""
        return (
            f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else f"https://doi.org/{self.doi}"
        )

    @property
    def people(self) -> str:
        """The authors as a sentence names them."""
        first, *rest = self.authors
        if not rest:
            return first
        return (
            f"{first} and {rest[0]}" if len(rest) == 1 and rest != ["others"] else f"{first} et al."
        )


def read(path: Path = FILE) -> dict[str, Paper]:
    """The bibliography, by arXiv id or DOI.

    Raises:
        ValueError: When an entry lacks a title, a year, or a way to the paper, or stands twice.
    """
    found: dict[str, Paper] = {}
    for entry in _ENTRY.finditer(path.read_text(encoding="utf-8")):
        fields = dict(_FIELD.findall(entry[3]))
        missing = [name for name in ("author", "title", "year") if not fields.get(name)]
        name = fields.get("eprint") or fields.get("doi")
        if missing or not name:
            raise ValueError(f"{path.name}: {entry[2]} has no {(missing or ['eprint or doi'])[0]}.")
        if name in found:
            raise ValueError(f"{path.name}: {name} has two entries.")
        found[name] = Paper(
            entry[2],
            tuple(fields["author"].split(" and ")),
            fields["title"].replace(r"\&", "&").replace(r"\%", "%"),
            int(fields["year"]),
            fields.get("eprint", ""),
            fields.get("doi", ""),
            entry[0],
        )
    return found


@cache
def papers() -> dict[str, Paper]:
    """The book's own bibliography."""
    return read()


def cited(text: str) -> list[str]:
    """The arXiv ids that a text names, each once, in order."""
    named = re.findall(rf"{_ARXIV.pattern}|{_ADDRESS.pattern}", text)
    return list(dict.fromkeys(one or other for one, other in named))


def _anchor(paper: Paper | None, address: str, words: str) -> str:
    said = f' title="{html.escape(paper.title)}, {paper.year}"' if paper else ""
    return f'<a class="paper" href="{html.escape(address)}"{said}>{words}</a>'


def linked(body: str, known: dict[str, Paper] | None = None) -> str:
    """A page's HTML, in which every paper that is named is a link.

    Args:
        body: The page, or a part of it.
        known: The bibliography; the book's own when None.
    """
    known = papers() if known is None else known
    here = defaultdict(set)
    for name in cited(re.sub(r"\s+", " ", _TAG.sub("", body))):
        if name in known:
            here[known[name].authors[0], known[name].year].add(name)

    def id_link(name: str, words: str) -> str:
        return _anchor(known.get(name), f"https://arxiv.org/abs/{name}", words)

    def doi(found: re.Match[str]) -> str:
        return _anchor(known.get(found[1]), f"https://doi.org/{found[1]}", found[0])

    def named(found: re.Match[str]) -> str:
        fitting = here.get((found[1], int(found[2])), ())
        if len(fitting) != 1:
            return found[0]
        paper = known[next(iter(fitting))]
        return _anchor(paper, paper.address, found[0])

    out, inside, code, split = [], 0, 0, False
    for piece in _TAG.split(body):
        if piece.startswith("<"):
            tag = re.match(r"</?([a-zA-Z0-9]+)", piece)
            name = tag[1].lower() if tag else ""
            if name in _KEPT and not piece.endswith("/>"):
                inside += -1 if piece.startswith("</") else 1
            if name in ("pre", "code"):
                code += -1 if piece.startswith("</") else 1
            if name == "a" and (to := _ADDRESS.search(piece)) and " title=" not in piece:
                paper = known.get(to[1])
                said = f' title="{html.escape(paper.title)}, {paper.year}">' if paper else ">"
                piece = piece[:-1] + said
        elif not inside:
            before = piece
            if split:  # "arXiv" ended the line before, as in a listing
                piece = _BARE.sub(lambda m: m[1] + id_link(m[2], m[2]), piece)
            split = piece.rstrip().endswith("arXiv") or (split and not piece.strip())
            piece = _ARXIV.sub(lambda m: id_link(m[1], m[0]), piece)
            piece = _DOI.sub(doi, piece) if piece == before else piece
            piece = _NAMED.sub(named, piece) if not code and piece == before else piece
            if not code and piece != before:  # names that stand beside an id, outside of its link
                parts = re.split(r"(<a .*?</a>)", piece)
                parts[::2] = [_NAMED.sub(named, part) for part in parts[::2]]
                piece = "".join(parts)
        out.append(piece)
    return "".join(out)


def papers_aside(names: list[str], page: str) -> str:
    """What a chapter cites, as the last part of its page; nothing when it cites nothing."""
    rows = "".join(
        f'<li>{html.escape(paper.people)}, <a class="paper" href="{paper.address}">'
        f"{html.escape(paper.title)}</a>, {paper.year}. "
        f'<a class="bibtex-link" href="{"../" * page.count("/")}papers.html#{paper.key}" '
        f'aria-label="BibTeX of {html.escape(paper.title)}">BibTeX</a></li>'
        for paper in map(papers().get, names)
        if paper
    )
    if not rows:
        return ""
    return (
        '<details class="chapter-papers"><summary>'
        f"Papers cited in this chapter ({rows.count('<li>')})</summary><ul>{rows}</ul></details>"
    )


def papers_part(where: dict[str, list[tuple[str, str]]]) -> str:
    """Every paper with its link, where it is cited, and its BibTeX, as HTML.

    Args:
        where: For an arXiv id, the titles of the chapters that cite it with their pages.
    """
    rows = []
    for name, paper in sorted(papers().items(), key=lambda p: (p[1].authors[0].lower(), p[1].year)):
        links = ", ".join(
            f'<a href="{page}">{html.escape(title)}</a>' for title, page in where.get(name, ())
        )
        rows.append(
            f'<li id="{paper.key}"><p>{html.escape(paper.people)}, '
            f'<a class="paper" href="{paper.address}">{html.escape(paper.title)}</a>, '
            f"{paper.year}{f', arXiv {name}' if paper.arxiv else f', doi {name}'}.</p>"
            f"{f'<p class=cited-in>Cited in {links}.</p>' if links else ''}"
            f"<details><summary>BibTeX</summary><pre>{html.escape(paper.bibtex)}</pre></details></li>"
        )
    return f'<ul class="papers">{"".join(rows)}</ul>'
