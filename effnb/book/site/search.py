"""The index of the search: what every page says, section by section, as data for `search.js`.

The index is read from the finished pages, so that it says what a reader sees. Chapters come before
the glossary, the glossary before the other pages, and these before the reference; the ranking is in
`.make/site/static/search.js`. A method's name and a term in Japanese lead to the section of the
chapter that explains it, whether or not the words stand there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from effnb.book.methods import methods
from effnb.book.site.book import Book
from effnb.book.site.reference import Reference

CHAPTER, GLOSSARY, PAGE, REFERENCE = range(4)
"""The kinds of pages, in the order in which hits are listed."""

NAME = "search-index.js"
TOP = "#"
"""In place of an anchor: the top of the page."""

LEFT_OUT = ("search", "404", "index")
"""Pages that only lead to others."""

JAPANESE = {
    "01_data/1_filtering": ("フィルタリング", "データ選別"),
    "01_data/2_active_learning": ("能動学習",),
    "01_data/3_curriculum": ("カリキュラム学習",),
    "02_design/1_attention": ("アテンション", "注意機構"),
    "02_design/2_experts": ("混合エキスパート",),
    "02_design/3_sharing": ("パラメータ共有",),
    "02_design/6_context": ("文脈長", "コンテキスト長"),
    "03_pretraining/1_objectives": ("事前学習",),
    "04_finetuning/1_delta_tuning": ("デルタチューニング",),
    "04_finetuning/3_multitask": ("マルチタスク学習",),
    "05_inference/1_pruning": ("枝刈り", "プルーニング"),
    "05_inference/2_low_rank": ("低ランク近似",),
    "05_inference/3_quantization": ("量子化",),
    "05_inference/5_distillation": ("蒸留", "知識蒸留"),
    "05_inference/8_matryoshka": ("マトリョーシカ表現学習",),
}
"""What a chapter's topic is called in Japanese."""

_APART = {"Does it hold?", "Exercises", "Further reading", "Where it breaks", "The map"}
"""Sections that speak of what other sections explain."""

_VOID = {"img", "br", "input", "hr", "meta", "link", "wbr", "source", "col"}
_SKIPPED_TAGS = {"script", "style", "button", "form", "svg", "pre", "nav", "template"}
_SKIPPED = {
    *("katex", "headerlink", "chapter-bar", "from-package", "panel-frames", "panel-control"),
    *("claims-filter", "term-means", "source-link", "papers-aside", "eqno", "cell_input"),
}
_BLOCKS = {
    "p",
    "li",
    "td",
    "th",
    "dd",
    "dt",
    "figcaption",
    "h2",
    "h3",
    "h4",
    "div",
    "tr",
    "summary",
}


@dataclass
class Section:
    """One section of a page, as the search knows it.

    Attributes:
        anchor: Its id on the page; nothing for the top of the page.
        heading: Its heading.
        text: What it says.
        names: Methods and terms that are explained there.
    """

    anchor: str
    heading: str
    text: str = ""
    names: list[str] = field(default_factory=list)


class _Reader(HTMLParser):
    """Reads the article of a page: its sections by headings, its terms and its objects."""

    def __init__(self) -> None:
        super().__init__()
        self.sections = [Section("", "")]
        self.title = ""
        self._open: list[tuple[str, bool, bool]] = []  # tag, whether skipped, whether a new entry
        self._inside = self._heading = self._skipped = 0
        self._anchor = ""
        self._words: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        named = dict(attributes)
        classes = set((named.get("class") or "").split())
        if tag == "article":
            self._inside += 1
        if not self._inside or tag in _VOID:
            self._words += [" "] if tag == "br" else []
            return
        skipped = tag in _SKIPPED_TAGS or bool(classes & _SKIPPED)
        self._words += [" "] if skipped else []
        self._skipped += skipped
        if tag == "section" and named.get("id"):
            self._anchor = named["id"]
        heading = tag in ("h1", "h2", "h3", "h4") or (tag == "dt" and bool(named.get("id")))
        if heading and not self._skipped:
            self._close()
            self._heading += 1
            anchor = "" if tag == "h1" else named.get("id") or self._anchor
            if tag != "h1":
                self.sections.append(Section(anchor, ""))
        if tag == "span" and "word-anchor" in classes:
            self.sections[-1].anchor = named["id"]
        if tag in _BLOCKS:
            self._words.append(" ")
        self._open.append((tag, skipped, heading and not self._skipped))

    def handle_endtag(self, tag: str) -> None:
        if not self._inside:
            return
        while self._open:
            name, skipped, heading = self._open.pop()
            self._skipped -= skipped
            if heading:
                words = _plain("".join(self._words))
                self._words = []
                self._heading -= 1
                self.sections[-1].heading = words
                if name == "h1":
                    self.title = words
            if name == tag:
                break
        if tag == "article":
            self._close()
            self._inside -= 1

    def handle_data(self, data: str) -> None:
        if self._inside and not self._skipped:
            self._words.append(data)

    def _close(self) -> None:
        """What was read belongs to the section before."""
        said = _plain("".join(self._words))
        self._words = []
        if said:
            self.sections[-1].text = f"{self.sections[-1].text} {said}".strip()


def _plain(words: str) -> str:
    return re.sub(r"\s+", " ", words).strip()


def sections(page: str) -> tuple[str, list[Section]]:
    """The title of a page, and its sections in order.

    Args:
        page: The page's HTML.
    """
    reader = _Reader()
    begin = page.find("<article")  # what is around it is long, and the same on every page
    reader.feed(page[begin : page.rfind("</article>") + len("</article>")] if begin >= 0 else "")
    reader.close()
    return reader.title, [one for one in reader.sections if one.heading or one.text]


def kind(name: str, chapters: set[str]) -> int:
    """What kind of page this is, by its path without an ending."""
    if name in chapters:
        return CHAPTER
    if name == "glossary":
        return GLOSSARY
    return REFERENCE if name.startswith("api/") else PAGE


def names(book: Book, reference: Reference) -> Iterator[tuple[str, str, list[str]]]:
    """What is explained where: chapter, anchor (nothing when it is to be found), and names."""
    for written in book.written:
        for term in written.words.terms:
            yield written.name, written.headings.get(term.at, ""), [term.name, term.ja]
        if written.name in JAPANESE:
            yield written.name, TOP, [*JAPANESE[written.name]]
    terms = {(w.name, term.name.lower()) for w in book.written for term in w.words.terms}
    done = {written.name for written in book.written}
    for method in methods(reference):
        if method.chapter in done and (method.chapter, method.name.lower()) not in terms:
            plain = re.sub(r"\s*\([^)]*\)$", "", method.name)
            yield method.chapter, "", list(dict.fromkeys((method.name, plain)))


def build(
    pages: dict[str, str], book: Book, reference: Reference
) -> list[tuple[int, str, str, list[Section]]]:
    """The index: kind, path, title and sections of every page.

    Args:
        pages: HTML of each page, by its path without an ending.
        book: The chapters.
        reference: The public objects of the package.
    """
    chapters = {written.name for written in book.written}
    found = []
    for name, page in sorted(pages.items()):
        if name in LEFT_OUT:
            continue
        title, parts = sections(page)
        sort = kind(name, chapters)
        if sort == REFERENCE:
            parts = [Section(one.anchor, one.heading, one.text[:240]) for one in parts]
        found.append((sort, name, title, parts))
    explained: dict[str, list[tuple[str, list[str]]]] = {}
    for chapter, anchor, said in names(book, reference):
        explained.setdefault(chapter, []).append((anchor, said))
    for _, name, _, parts in found:
        for anchor, said in explained.get(name, ()):
            place = _place(parts, anchor, said[0])
            place.names += [one for one in said if one and one not in place.names]
    return found


def _place(parts: list[Section], anchor: str, name: str) -> Section:
    """The section of a chapter that explains a name: by its anchor, heading or words."""
    if anchor == TOP:
        return parts[0]
    if anchor:
        return next((one for one in parts if one.anchor == anchor), parts[0])
    word = re.compile(rf"(?<!\w){re.escape(re.sub(r' *[(].*', '', name))}(?!\w)", re.IGNORECASE)
    for look in (lambda one: one.heading, lambda one: one.text):
        fitting = [one for one in parts if word.search(look(one))]
        fitting = [one for one in fitting if one.heading not in _APART] or fitting
        if fitting:
            return max(fitting, key=lambda one: len(word.findall(look(one))))
    return parts[0]


def as_script(index: list[tuple[int, str, str, list[Section]]]) -> str:
    """The index as a script, which a page that is opened from a folder may load too."""
    pages = [
        [sort, name, title, [_row(one) for one in parts]] for sort, name, title, parts in index
    ]
    said = json.dumps({"pages": pages}, ensure_ascii=False, separators=(",", ":"))
    return f"window.effnbIndex={said};\n"


def _row(one: Section) -> list:
    row = [one.anchor, one.heading, one.text]
    return [*row, one.names] if one.names else row


def read(site: Path) -> dict[str, str]:
    """The pages of a site that the search knows, by path without an ending."""
    found = {}
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix().removesuffix(".html")
        if not name.startswith(("_static/", "source/", "download/")):
            found[name] = path.read_text(encoding="utf-8")
    return found
