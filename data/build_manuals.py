"""Build the corpus `manuals` from documentation that Debian packages (part of `make data`).

Free prose, paragraph by paragraph: code, tables, menus and headings are left out, and a paragraph
that was read before, in whichever work, is left out too. A document is a page of a manual, a book
of the World English Bible, a chapter of Moby-Dick or forty entries of WordNet. Whole documents
are held out; those books of the Bible that `novels` holds out are held out here as well.
"""

from __future__ import annotations

import hashlib
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = {  # Debian package: the work, its licence
    "python3.11-doc": ("Python documentation", "PSF-2.0"),
    "postgresql-doc-15": ("PostgreSQL documentation", "PostgreSQL"),
    "sqlite3-doc": ("SQLite documentation", "public domain"),
    "sword-text-web": ("World English Bible", "public domain"),
    "r-cran-tokenizers": ("Moby-Dick", "public domain"),
    "wordnet-base": ("WordNet 3.0", "WordNet-3.0"),
}
SHORTEST = 80
"""Characters below which a paragraph is a label more often than a sentence."""
HELD_OUT_BOOKS = {  # the books that `novels` holds out, in another translation
    "The Book of Ruth",
    "Ecclesiastes or, The Preacher",
    "The Book of Jonah",
    "The Good News According to John",
    "The Letter from James",
}
ASCII_MARKS = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "\xa0": " "}
)
ENTRIES = 40
"""Entries of WordNet that make one document."""

BLOCKS = {"p", "li", "dd", "blockquote", "div", "dt", "h1", "h2", "h3", "h4", "h5", "section"}
SKIPPED = {"pre", "table", "script", "style", "nav", "head", "footer", "form", "svg", "button"}
SKIPPED_CLASSES = {
    "sphinxsidebar", "related", "footer", "navheader", "navfooter", "toc", "headerlink",
    "highlight", "versionmodified", "toctree-wrapper", "nosearch", "codeblock", "fancy_toc",
}  # fmt: skip
VOID = {"br", "img", "hr", "input", "meta", "link", "col", "wbr", "area", "base"}


class Prose(HTMLParser):
    """The paragraphs of a page: what lies in <p>, <dd> and <li>, outside code, tables and menus."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._text: list[str] = []
        self._open: list[tuple[str, bool]] = []  # tag, whether what it holds is skipped

    def flush(self) -> None:
        """End the paragraph that is being read."""
        text = re.sub(r"\s+", " ", "".join(self._text)).strip()
        self._text = []
        if text:
            self.paragraphs.append(text)

    def handle_starttag(self, tag, attrs):
        """Open a paragraph or something skipped."""
        if tag in VOID:
            if tag == "br":
                self._text.append(" ")
            return
        if tag in BLOCKS:
            self.flush()
        classes = set((dict(attrs).get("class") or "").split())
        skipped = tag in SKIPPED or bool(classes & SKIPPED_CLASSES)
        inherited = bool(self._open) and self._open[-1][1]
        self._open.append((tag, skipped or inherited))

    def handle_endtag(self, tag):
        """Close down to the matching tag; browsers forgive unclosed ones, and so does this."""
        if tag in BLOCKS:
            self.flush()
        for i in range(len(self._open) - 1, -1, -1):
            if self._open[i][0] == tag:
                del self._open[i:]
                break

    def handle_data(self, data):
        """Keep text that is not skipped."""
        if not (self._open and self._open[-1][1]):
            self._text.append(data)


def is_prose(text: str) -> bool:
    """Whether a paragraph is made of sentences: long enough, mostly letters, with an end mark."""
    letters = sum(c.isalpha() or c == " " for c in text)
    return (
        len(text) >= SHORTEST and letters > 0.85 * len(text) and bool(re.search(r"[.:;!?]", text))
    )


def pages(folder: Path, pattern: str) -> Iterator[tuple[str, list[str]]]:
    """Each HTML page below a folder: its name and its paragraphs."""
    for path in sorted(folder.rglob(pattern)):
        reader = Prose()
        reader.feed(path.read_text(encoding="utf-8", errors="replace"))
        reader.flush()
        yield str(path.relative_to(folder)), [p for p in reader.paragraphs if is_prose(p)]


def sword(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The books of a SWORD module of type zText; a block without a title goes on with its book."""
    books: list[tuple[str, list[str]]] = []
    for testament in ("ot", "nt"):
        packed = (folder / f"{testament}.bzz").read_bytes()
        places = (folder / f"{testament}.bzs").read_bytes()
        blocks = [
            zlib.decompress(packed[start : start + size])
            for start, size, _ in struct.iter_unpack("<III", places)
        ]
        verses: list[list[tuple[int, int]]] = [[] for _ in blocks]
        for block, start, size in struct.iter_unpack(
            "<IIH", (folder / f"{testament}.bzv").read_bytes()
        ):
            if size:
                verses[block].append((start, size))
        for block, places_in_block in zip(blocks, verses):
            lines, titles = [], []
            for start, size in places_in_block:
                raw = block[start : start + size].decode("utf-8", errors="replace")
                if not lines:  # a book's title may be cut into several lines
                    found = re.findall(r'<title[^>]*type="main"[^>]*>(.*?)</title>', raw, re.S)
                    titles += [re.sub(r"<[^>]*>|\s+", " ", part).strip() for part in found]
                raw = re.sub(r"<(note|title)\b.*?</\1>", " ", raw, flags=re.S)
                text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", raw)).strip()
                text = re.sub(r" ([,.;:!?’”])", r"\1", text)
                if text:
                    lines.append(text)
            if titles or not books:
                books.append((" ".join(titles), lines))
            else:
                books[-1][1].extend(lines)
    yield from books


def moby_dick(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Moby-Dick by chapters, from the R package's serialized character vector."""
    import rdata

    base = folder / "data" / "Rdata"
    index = rdata.read_rds(base.with_suffix(".rdx"))["variables"]
    start, length = (int(n) for n in index["mobydick"])
    data = zlib.decompress(base.with_suffix(".rdb").read_bytes()[start + 4 : start + length])
    text = "\n".join(str(s) for s in rdata.conversion.convert(rdata.parser.parse_data(data)))
    text = re.split(r"\bTHE END\b|End of (?:the )?Project Gutenberg", text)[0]
    chapters = re.split(r"(?m)^\s*(?:CHAPTER \d+[^\n]*|EPILOGUE[^\n]*)$", text)[1:]
    for number, chapter in enumerate(chapters, 1):
        paragraphs = [re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n", chapter)]
        yield f"chapter {number}", [p for p in paragraphs if p]


def wordnet(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Entries of WordNet that come with an example: words, gloss, examples."""
    for kind in ("noun", "verb", "adj", "adv"):
        entries = []
        for line in (folder / f"data.{kind}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  ") or '; "' not in line:
                continue  # the licence at the head, and glosses without an example
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            words = [fields[4 + 2 * i].split("(")[0] for i in range(int(fields[3], 16))]
            entries.append(f"{', '.join(words).replace('_', ' ')}: {gloss.strip()}")
        for start in range(0, len(entries), ENTRIES):
            yield f"{kind} {start // ENTRIES}", entries[start : start + ENTRIES]


def works(unpacked: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Every document of every package: the package, the document's name, its paragraphs."""
    doc = unpacked / "usr/share/doc"
    readers = {
        "python3.11-doc": pages(doc / "python3.11/html", "*.html"),
        "postgresql-doc-15": pages(doc / "postgresql-doc-15/html", "*.html"),
        "sqlite3-doc": pages(doc / "sqlite3", "*.html"),
        "sword-text-web": sword(unpacked / "usr/share/sword/modules/texts/ztext/engWEB2015eb"),
        "r-cran-tokenizers": moby_dick(unpacked / "usr/lib/R/site-library/tokenizers"),
        "wordnet-base": wordnet(unpacked / "usr/share/wordnet"),
    }
    for package, documents in readers.items():
        count = 0
        for name, paragraphs in documents:
            count += bool(paragraphs)
            yield package, name, paragraphs
        if not count:
            sys.exit(f"the package {package} holds no prose where this script looks for it.")


def split_of(package: str, name: str) -> str:
    """Train (90 %), validation or test, by a hash of the document's name; books by hand."""
    if package == "sword-text-web":
        return "test" if name in HELD_OUT_BOOKS else "train"
    part = int.from_bytes(hashlib.sha256(f"{package}/{name}".encode()).digest()[:8], "big") / 2**64
    return "train" if part < 0.9 else "validation" if part < 0.95 else "test"


def ascii_marks(text: str) -> str:
    """Quotation marks, dashes and spaces as the other corpora write them."""
    return text.translate(ASCII_MARKS)


def manuals(unpacked: Path) -> list[dict]:
    """The documents with at least 400 characters of prose, no paragraph twice."""
    seen: set[bytes] = set()
    records = []
    for package, name, paragraphs in works(unpacked):
        kept = []
        for paragraph in paragraphs:
            key = hashlib.sha256(re.sub(r"\W+", " ", paragraph.lower()).encode()).digest()
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
        joiner = "\n" if package in ("sword-text-web", "wordnet-base") else "\n\n"
        text = ascii_marks(joiner.join(kept))
        if len(text) < 400:
            continue
        title, licence = PACKAGES[package]
        records.append(
            {
                "work": title,
                "licence": licence,
                "document": name,
                "split": split_of(package, name),
                "text": text,
            }
        )
    return records
