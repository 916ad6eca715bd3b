"""Write what Sphinx reads: the chapters, and the pages that are generated from all of them."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from effnb.book import architectures
from effnb.book.methods import page as methods_page
from effnb.book.site import bibliography
from effnb.book.site.address import Home
from effnb.book.site.api import module_page
from effnb.book.site.book import REPOSITORY, Book, SiteError, link, read_book, up
from effnb.book.site.docstrings import first_sentence
from effnb.book.site.extension import CONTENTS
from effnb.book.site.guide import advice_part, tables
from effnb.book.site.map import map_html
from effnb.book.site.pages import (
    claims_part,
    in_words,
    methods_part,
    raw,
    summary_part,
    symbols_part,
    terms_part,
    verdicts_on,
)
from effnb.book.site.reference import Reference, page_of, read_reference
from effnb.book.site.teach import teach_part
from effnb.book.site.web import Web
from effnb.book.site.words import clashes
from effnb.lab.chapters import SECTIONS
from effnb.lab.claims import ledger

PAGES = REPOSITORY / ".make" / "site" / "pages"
"""The prose of the pages beside the chapters; `<!-- … -->` marks where generated parts go."""

LOOK_UP = (
    *("map", "methods", "architectures", "which", "claims", "papers", "notation", "glossary"),
    *("datasheet", "teach", "api/index"),
)


def write(
    out: Path,
    extra: Path,
    book: Book | None = None,
    reference: Reference | None = None,
    home: Home | None = None,
) -> list[str]:
    """Write the sources of all pages.

    Args:
        out: The folder that Sphinx will read; it is emptied first.
        extra: The folder whose content goes to the top of the site as it is; emptied first.
        book: The chapters; those of the repository when None.
        reference: The public objects of the package; read from the repository when None.
        home: The repository on the web; pages offer their downloads alone when None.

    Returns:
        What is ill-formed without stopping the book, as sentences: docstrings.

    Raises:
        SiteError: When a page cannot be made.
    """
    for folder in (out, extra):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    book = book or read_book()
    declared = [(one.name, symbol) for one in book.written for symbol in one.words.symbols]
    for problem in clashes(declared):
        raise SiteError(problem)
    reference = reference or read_reference(REPOSITORY)
    web = Web(book, reference, out, extra, home)
    for written in book.written:
        text = json.dumps(web.chapter(written), ensure_ascii=False)
        _put(out / f"{written.name}.ipynb", text)
    generated = {
        "index": {
            "panel": _cover_panel(book, web),
            "gallery": raw(_gallery(book, web)),
            "contents": _contents(book),
            "facts": _facts(book),
        },
        "map": {"map": raw(map_html(book, "map"))},
        "which": {"advice": advice_part(book)},
        "claims": {"summary": summary_part(book), "claims": claims_part(book)},
        "notation": {"symbols": symbols_part(book)},
        "glossary": {"terms": terms_part(book), "methods": methods_part(book, reference)},
        "search": {},
        "404": {},
        "methods": {"methods": raw(methods_page(reference, {one.name for one in book.written}))},
        "architectures": {"architectures": raw(architectures.page(architectures.read()))},
        "api/index": {"modules": _modules(reference)},
        "reading": {},
        "teach": {"chapters": raw(teach_part(book))},
        "papers": {"papers": raw(bibliography.papers_part(web.cited))},
    }
    for page, parts in generated.items():
        _put(out / f"{page}.md", _filled(page, parts))
    contents = json.dumps(_sidebar(book, reference), ensure_ascii=False)
    _put(out / CONTENTS, contents)
    sheet = (REPOSITORY / "data" / "DATASHEET.md").read_text(encoding="utf-8")
    _put(out / "datasheet.md", _sheet(sheet, web))
    for module in reference.modules.values():
        if module.name == "effnb":
            continue  # it only says what the package is
        _put(out / f"{page_of(module.name)}.md", module_page(module, reference, web.shown))
        web.sources.add(module.path.as_posix())
    for path in sorted(web.sources):
        _put(extra / "source" / f"{path}.html", _source_page(path, reference, web.shown))
    for name in tables(book):
        target = extra / "results" / f"{name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / "data" / "results" / f"{name}.json", target)
    shutil.copyfile(bibliography.FILE, extra / bibliography.FILE.name)
    unknown = sorted(set(web.cited) - set(bibliography.papers()))
    return reference.problems + [
        f"{web.cited[one][0][0]} cites arXiv {one}, which is not in .make/site/bibliography.bib."
        for one in unknown
    ]


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def _filled(page: str, parts: dict[str, str]) -> str:
    """The prose of a page with its generated parts."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    for name, part in parts.items():
        mark = f"<!-- {name} -->"
        if mark not in text:
            raise SiteError(f"{page}.md has no place for {name}: put {mark} where it belongs.")
        text = text.replace(mark, part)
    return text


# ------------------------------------------------------------------------------------- the cover


def _cover_panel(book: Book, web: Web) -> str:
    for written in book.written:
        panel = web.first_panel(written, "index")
        if panel:
            where = link(written.chapter.title, "index", f"{written.name}.html")
            return raw(f'{panel}<p class="cover-from">From the chapter {where}.</p>')
    return ""


def _gallery(book: Book, web: Web) -> str:
    """The map with a picture of each chapter's result."""
    parts = []
    for section in SECTIONS.values():
        inside = [one for one in book.written if one.chapter.section == section]
        cards = "".join(
            f'<li><a href="{one.name}.html">{web.first_picture(one, "index")}'
            f"<strong>{html.escape(one.chapter.title)}</strong></a>"
            f"<span>{html.escape(one.chapter.about)}</span></li>"
            for one in inside
        )
        if cards:
            parts.append(
                '<section class="gallery-section">'
                f'<p class="gallery-name">{html.escape(section)}</p>'
                f'<ul class="gallery">{cards}</ul></section>'
            )
    return "".join(parts)


def _facts(book: Book) -> str:
    written = len(book.written)
    measured = sum(1 for name in ledger() if verdicts_on(book, name))
    return (
        f"Written so far: {written} of {len(book.chapters)}. Of the {len(ledger())} claims that "
        f"the papers make, {measured} {'has' if measured == 1 else 'have'} been measured."
    )


def _groups(book: Book) -> list[tuple[str, list[str]]]:
    """The pages of the book in order, under their captions.

    A section that has one chapter of its own name needs no caption.
    """
    groups: list[tuple[str, list[str]]] = [("", ["reading"])]
    for section in SECTIONS.values():
        inside = [one for one in book.written if one.chapter.section == section]
        names = [one.name for one in inside]
        alone = len(inside) == 1 and inside[0].chapter.title == section
        if alone and groups[-1][0] == "":
            groups[-1][1].extend(names)
        elif names:
            groups.append(("" if alone else section, names))
    return [*groups, ("Look up", list(LOOK_UP))]


def _contents(book: Book) -> str:
    """The table of contents, hidden: it orders the pages."""
    return "\n\n".join(_toctree(caption, pages) for caption, pages in _groups(book))


def _sidebar(book: Book, reference: Reference) -> list[dict[str, Any]]:
    """The contents of the book as the sidebar shows them."""
    titles = {written.name: written.chapter.title for written in book.written}
    modules = [
        {"page": page_of(name), "title": name.removeprefix("effnb.")}
        for name in sorted(reference.modules)
        if name != "effnb"
    ]

    def entry(page: str) -> dict[str, Any]:
        title = titles.get(page) or _title(page)
        return {"page": page, "title": title, "below": modules if page == "api/index" else []}

    return [
        {"caption": caption, "pages": [entry(page) for page in pages]}
        for caption, pages in _groups(book)
    ]


def _title(page: str) -> str:
    """The title of a page whose prose is written by hand."""
    if page == "datasheet":
        return "Data sheet"
    return (PAGES / f"{page}.md").read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def _toctree(caption: str, pages: list[str]) -> str:
    named = f":caption: {caption}\n" if caption else ""
    return (
        f"```{{toctree}}\n:hidden:\n{named}\n" + "\n".join(f"/{page}" for page in pages) + "\n```"
    )


# ------------------------------------------------------------------------------ the API reference


def _modules(reference: Reference) -> str:
    groups: dict[str, list[str]] = {}
    for module in reference.modules.values():
        if module.name == "effnb":
            continue
        groups.setdefault(module.name.split(".")[1], []).append(module.name)
    parts = []
    last = {"core": 1, "kernels": 2, "lab": 3}
    for group in sorted(groups, key=lambda name: (last.get(name, 0), name)):
        rows = [f"## effnb.{group}", ""]
        for name in sorted(groups[group]):
            module = reference.modules[name]
            count = f"{len(module.things)}" if module.things else ""
            said = in_words(first_sentence(module.doc))
            rows.append(
                f'<tr><th scope="row">{link(name, "api/index", f"{page_of(name)}.html")}</th>'
                f"<td>{said}</td><td>{count}</td></tr>"
            )
        head = '<th scope="col">Module</th><th scope="col">About</th><th scope="col">Names</th>'
        table = "".join(rows[2:])
        parts.append(
            "\n".join(rows[:2])
            + "\n"
            + raw(
                f'<table class="modules"><thead><tr>{head}</tr></thead>'
                f"<tbody>{table}</tbody></table>"
            )
        )
    names = [page_of(name) for name in reference.modules if name != "effnb"]
    return "\n\n".join([*parts, _toctree("", sorted(names))])


def _described(path: str, reference: Reference, shown: dict[str, list[tuple[str, str]]]) -> str:
    """Links from a file to its page in the reference, and to the chapters that show it."""
    module = next((m for m in reference.modules.values() if m.path.as_posix() == path), None)
    if module is None or module.name == "effnb":
        return ""
    page = f"source/{path}"
    chapters: dict[str, str] = {}
    for thing in module.things:
        for title, target in shown.get(f"{module.name}.{thing.name}", ()):
            place = target.removeprefix("/").replace(".ipynb", ".html")
            chapters.setdefault(title, link(title, page, place))
    said = f"Described in {link(module.name, page, f'{page_of(module.name)}.html')}."
    return said + (f" Shown in {', '.join(chapters.values())}." if chapters else "")


def _source_page(path: str, reference: Reference, shown: dict[str, list[tuple[str, str]]]) -> str:
    """A file of the repository as a separate page, on which every line has an anchor."""
    code = (REPOSITORY / path).read_text(encoding="utf-8")
    formatter = HtmlFormatter(nowrap=False, linenos="inline", lineanchors="L", anchorlinenos=True)
    coloured = highlight(code, PythonLexer(), formatter)
    template = (PAGES.parent / "source.html").read_text(encoding="utf-8")
    coloured = bibliography.linked(coloured)
    place = {
        "top": up(f"source/{path}"),
        "path": html.escape(path),
        "described": _described(path, reference, shown),
        "code": coloured,
    }
    return re.sub(r"\{\{ (\w+) \}\}", lambda found: place[found[1]], template)


def _sheet(text: str, web: Web) -> str:
    """The data sheet, whose links start from the folder `data/`."""

    def linked(match: re.Match[str]) -> str:
        target = match[2]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        if target.endswith(".py"):
            web.sources.add(f"data/{target}")
            return f'<a href="source/data/{target}.html">{match[1]}</a>'
        return match[1]

    return re.sub(r"(?<!!)\[([^\[\]]*)\]\(([^()\s]+)\)", linked, text)
