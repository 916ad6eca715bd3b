"""A chapter in the form that fits a page: its cells, rewritten before Sphinx reads them.

Pictures become files, panels become plain HTML, listings are highlighted by the page's own colours,
verdicts become cards, and links between notebooks and into the repository become links of the site.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import html
import json
import re
import shutil
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from effnb.book import equations
from effnb.book.site.address import Home
from effnb.book.site.bar import bar_html
from effnb.book.site.bibliography import cited, papers_aside
from effnb.book.site.book import REPOSITORY, Book, SiteError, Written, resolve, source, up
from effnb.book.site.map import map_html
from effnb.book.site.panels import VIEW, NoPanel, panel_html, stored_panel
from effnb.book.site.reference import Reference
from effnb.book.site.verdicts import claim_html
from effnb.lab.chapters import chapter_map
from effnb.lab.claims import MIME as CLAIMS

_DATA_URI = re.compile(r'src="data:image/(png|jpeg|svg\+xml|gif|webp);base64,([^"]+)"')
_LISTING = re.compile(
    r"<figure[^>]*><figcaption[^>]*><code>(?P<name>[^<]+)</code>"
    r'(?: · <a href="(?P<href>[^"]+)">(?P<place>[^<]*)</a>)?</figcaption><pre'
)
_LISTED = re.compile(
    _LISTING.pattern + r"[^>]*>(?P<code>.*?)</pre>(?:<style>.*?</style>)?</figure>", re.DOTALL
)
_CODE = re.compile(r"(^```.*?^```[^\n]*$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?P<image>!?)\[(?P<words>[^\[\]]*)\]\((?P<target>[^()\s]+)\)")
_HREF = re.compile(r'<a href="(?P<target>[^"]+)"(?P<rest>[^>]*)>(?P<words>.*?)</a>', re.DOTALL)
_FOREIGN = re.compile(r"[a-z][a-z0-9+.-]*:|#")


class Web:
    """Turns chapters into pages, and remembers which files the pages need beside them."""

    def __init__(
        self, book: Book, reference: Reference, out: Path, extra: Path, home: Home | None = None
    ) -> None:
        """Work for a book.

        Args:
            book: The chapters.
            reference: The public objects of the package, for links to them.
            out: The folder that Sphinx reads.
            extra: The folder whose content is copied to the top of the site.
            home: The repository on the web; without one, chapters offer their downloads alone.
        """
        self.home = home or Home()
        self.cited: dict[str, list[tuple[str, str]]] = {}
        self.book, self.reference, self.out, self.extra = book, reference, out, extra
        self.sources: set[str] = set()
        self.shown: dict[str, list[tuple[str, str]]] = {}

    # ------------------------------------------------------------------------------ pictures

    def pictures(self, content: str, page: str) -> str:
        """HTML whose pictures are files that are fetched when they come into view."""

        def filed(match: re.Match[str]) -> str:
            ending = {"svg+xml": "svg", "jpeg": "jpg"}.get(match[1], match[1])
            data = base64.b64decode(match[2])
            name = f"pictures/{hashlib.sha256(data).hexdigest()[:16]}.{ending}"
            path = self.extra / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            return f'loading="lazy" src="{up(page)}{name}"'

        return _DATA_URI.sub(filed, content)

    # --------------------------------------------------------------------------------- links

    def target(self, page: str, link: str) -> str | None:
        """Where a notebook's link leads on the site, for Markdown; None when there is no page yet.

        Raises:
            SiteError: When it leads to what is not in the book.
        """
        if _FOREIGN.match(link):
            return link
        path, _, anchor = link.partition("#")
        inside = resolve(page, path)
        hash_ = f"#{anchor}" if anchor else ""
        if inside.startswith("notebooks/") and inside.endswith((".ipynb", ".py")):
            name = inside.removeprefix("notebooks/").rpartition(".")[0]
            if self.book.find(name):
                return f"/{name}.ipynb{hash_}"
            if any(chapter.name == name for chapter in self.book.chapters):
                return None
        if inside == "data/DATASHEET.md":
            return f"/datasheet.md{hash_}"
        if inside == "README.md":
            return "/index.md"
        if inside.endswith(".py") and (REPOSITORY / inside).is_file():
            line = re.fullmatch(r"L(\d+)", anchor)
            return self.listed(page, inside, int(line[1]) if line else 0)
        raise SiteError(f"{page} links to {link}, which is not in the book.")

    def listed(self, page: str, path: str, line: int) -> str:
        """The page that lists a file of the repository, at a line."""
        self.sources.add(path)
        lines = (REPOSITORY / path).read_text(encoding="utf-8").count("\n")
        anchor = f"#L-{line}" if 0 < line <= lines else ""  # the file may have changed since
        return f"{up(page)}source/{path}.html{anchor}"

    def address(self, page: str, link: str) -> str | None:
        """The same for HTML, which Sphinx does not look into."""
        found = self.target(page, link)
        if found is None or not found.startswith("/"):
            return found
        return up(page) + re.sub(r"\.(?:ipynb|md)(?=#|$)", ".html", found[1:])

    def prose(self, page: str, text: str) -> str:
        """Markdown whose links lead to pages of the site, and whose pictures come along."""

        def linked(match: re.Match[str]) -> str:
            if match["image"]:
                if not _FOREIGN.match(match["target"]):
                    self._bring(page, match["target"])
                return match[0]
            target = self.target(page, match["target"])
            if target is None:
                return match["words"]
            if "source/" in target and ".html" in target:  # no page of which Sphinx knows
                return f'<a href="{html.escape(target)}">{match["words"]}</a>'
            return f"[{match['words']}]({target})"

        pieces = _CODE.split(text)
        pieces[::2] = [
            _LINK.sub(linked, self.hypertext(page, equations.for_page(piece)))
            for piece in pieces[::2]
        ]
        return "".join(pieces)

    def hypertext(self, page: str, content: str) -> str:
        """HTML whose links lead to pages of the site."""

        def linked(match: re.Match[str]) -> str:
            target = self.address(page, html.unescape(match["target"]))
            if target is None:
                return match["words"]
            return f'<a href="{html.escape(target)}"{match["rest"]}>{match["words"]}</a>'

        return _HREF.sub(linked, content)

    def _bring(self, page: str, picture: str) -> None:
        """Copy a picture that a chapter shows to the place where its page looks for it."""
        inside = resolve(page, picture)
        origin = self.book.folder.parent / inside
        if not inside.startswith("notebooks/") or not origin.is_file():
            raise SiteError(f"{page} shows {picture}, which is no file below notebooks/.")
        target = self.out / inside.removeprefix("notebooks/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin, target)

    # ------------------------------------------------------------------------------- chapters

    def chapter(self, written: Written) -> dict[str, Any]:
        """A chapter's notebook as its page shows it.

        Raises:
            SiteError: When it has something that a page cannot show.
        """
        name = written.name
        cells: list[dict[str, Any]] = []
        used: dict[str, None] = {}
        section = ""
        code: list[str] = []
        for number, cell in enumerate(written.notebook["cells"]):
            text, tags = source(cell), cell["metadata"].get("tags", [])
            if cell["cell_type"] == "markdown":
                headings = [words for words in written.headings if f"# {words}" in text]
                section = written.headings[headings[-1]] if headings else section
                cells.append(_markdown(self.prose(name, text), tags))
                continue
            new = deepcopy(cell)
            new["metadata"] = _looks([*tags, *(["hide-input"] if prints_tables(cell) else [])])
            where = f"{name}, cell {number}"
            outputs = [self._output(output, written, where) for output in cell["outputs"]]
            new["outputs"] = [output for output in outputs if output]
            cells.append(new)
            code.append(text)
            here = self.reference.used_in("\n".join(code))
            fresh = [one for one in [*_listed(cell, self.reference), *here] if one not in used]
            for full in fresh:
                used[full] = None
                link = f"/{name}.ipynb" + (f"#{section}" if section else "")
                self.shown.setdefault(full, []).append((written.chapter.title, link))
        cells = _with_bar(cells, written, self.home)
        ids = cited("\n".join(source(one) for one in written.notebook["cells"]))
        for one in ids:
            self.cited.setdefault(one, []).append((written.chapter.title, f"{name}.html"))
        for ending in ("ipynb", "py"):
            self._download(f"{name}.{ending}")
        aside = papers_aside(ids, name)
        if aside:
            cells.append(_markdown(aside, []))
        if used:
            cells.append(_markdown(self._package(name, list(used)), []))
        metadata = {k: v for k, v in written.notebook["metadata"].items() if k != "widgets"}
        return {**written.notebook, "cells": cells, "metadata": metadata}

    def _download(self, name: str) -> None:
        """Put a file of a chapter where its page offers it."""
        origin, target = self.book.folder / name, self.extra / "download" / name
        if not origin.is_file():  # the source of a planted chapter
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin, target)

    def _package(self, page: str, used: list[str]) -> str:
        """The objects of the package that a chapter uses, with links to their descriptions."""
        homes = {full: self.reference.home(full) for full in used}
        named = Counter(thing.name for _, thing in homes.values())
        links = []
        for full in sorted(used, key=lambda name: (name.rpartition(".")[2].lower(), name)):
            module, thing = homes[full]
            several = named[thing.name] > 1  # the module tells them apart
            said = f"{module.name.rpartition('.')[2]}.{thing.name}" if several else thing.name
            links.append(f'<a href="{up(page)}{self.reference.page(full)}"><code>{said}</code></a>')
        return (
            '<aside class="from-package" aria-label="From the package"><p>'
            f"From the package, in the order of the alphabet: {', '.join(links)}.</p></aside>"
        )

    def _output(
        self, output: dict[str, Any], written: Written, where: str
    ) -> dict[str, Any] | None:
        """One output of a cell in the form that fits the page."""
        if output["output_type"] in ("stream", "error"):
            return output
        data = {
            kind: "".join(value) if isinstance(value, list) else value
            for kind, value in output["data"].items()
        }
        page = written.name
        made = None
        if VIEW in data:
            made = self._panel(data[VIEW]["model_id"], written, where)
        elif CLAIMS in data:
            content = data[CLAIMS]
            content = json.loads(content) if isinstance(content, str) else content
            made = "".join(claim_html(one, page) for one in content["verdicts"])
        elif "text/html" in data:
            made = self._listing(data, page) or self._solution(
                self.hypertext(page, self.pictures(data["text/html"], page)), page
            )
        elif data.get("text/markdown", "").startswith(chapter_map(self.book.folder)[:50]):
            made = map_html(self.book, page)  # the same table, in a form that fits a phone
        elif "text/markdown" in data:
            return _shown({"text/markdown": self.prose(page, data["text/markdown"])}, output)
        elif "text/plain" in data and not any(kind.startswith("image/") for kind in data):
            return _shown({"text/plain": data["text/plain"]}, output)
        if made is None:
            raise SiteError(f"{where} shows {', '.join(sorted(data))}, which no page can show.")
        return _shown({"text/html": made}, output)

    def _panel(self, model: str, written: Written, where: str) -> str:
        try:
            panel = stored_panel(written.notebook, model)
        except NoPanel as problem:
            raise SiteError(f"{where} shows a widget that is no stored panel: {problem}.") from None
        name = f"panel-{model[:8]}"
        return panel_html(panel, name, lambda content: self.pictures(content, written.name))

    def first_panel(self, written: Written, page: str) -> str:
        """The first panel of a chapter, for another page; nothing when the chapter has none."""
        for cell in written.notebook["cells"]:
            for output in cell.get("outputs", ()):
                view = output.get("data", {}).get(VIEW)
                if view:
                    panel = stored_panel(written.notebook, view["model_id"])
                    return panel_html(panel, "panel", lambda content: self.pictures(content, page))
        return ""

    def first_picture(self, written: Written, page: str) -> str:
        """The first picture of a chapter, for another page; nothing when it has none."""
        for cell in written.notebook["cells"]:
            for output in cell.get("outputs", ()):
                content = output.get("data", {}).get("text/html", "")
                found = re.search(r"<img[^>]*>", "".join(content))
                if found and _DATA_URI.search(found[0]):
                    bare = re.sub(r' (?:style|width|height)="[^"]*"', "", found[0])
                    return self.pictures(bare, page)
        return ""

    def _listing(self, data: dict[str, Any], page: str) -> str | None:
        """A listing in the page's own colours, with links to its file and to its description."""
        found = _LISTING.match(data["text/html"])
        if not found:
            return None
        target = None
        if found["href"] and not self.reference.find(html.unescape(found["name"])):
            target = self.address(page, html.unescape(found["href"]))
        return self._figure(found, data["text/plain"].partition("\n")[2], target or "", page)

    def _solution(self, content: str, page: str) -> str:
        """HTML whose listings have the page's own colours: a solution is folded around one.

        The page folds the whole cell, so that the fold inside of it is open.
        """
        content = re.sub(r"^<details>(?=<summary>Solution)", "<details open>", content)

        def figure(found: re.Match[str]) -> str:
            code = html.unescape(re.sub(r"<[^>]+>", "", found["code"]))
            return self._figure(found, code, html.unescape(found["href"] or ""), page)

        return _LISTED.sub(figure, content)

    def _figure(self, found: re.Match[str], code: str, target: str, page: str) -> str:
        """A listing under its name, which leads to its description and to its file."""
        name = html.unescape(found["name"])
        shown = f"<code>{html.escape(name).replace('.', '.<wbr>')}</code>"
        full = self.reference.find(name)
        place = found["place"]
        if full:
            shown = f'<a href="{up(page)}{self.reference.page(full)}">{shown}</a>'
            module, thing = self.reference.home(full)  # where it is now
            place = f"{module.path.as_posix()}, line {thing.line}"
            target = self.listed(page, module.path.as_posix(), thing.line)
        if target:
            shown += f' <a class="listing-place" href="{html.escape(target)}">{place}</a>'
        coloured = highlight(code, PythonLexer(), HtmlFormatter(nowrap=True))
        return (
            f'<figure class="listing"><figcaption>{shown}</figcaption>'
            '<div class="highlight-python notranslate"><div class="highlight">'
            f"<pre>{coloured}</pre></div></div></figure>"
        )


def prints_tables(cell: dict[str, Any]) -> bool:
    """Whether a cell does nothing but show tables: its code is folded then."""
    content = ["".join(one.get("data", {}).get("text/html", "")) for one in cell["outputs"]]
    if not any("<table" in one for one in content):
        return False
    try:
        statements = ast.parse(source(cell)).body
    except SyntaxError:
        return False
    calls = [one for one in statements if not isinstance(one, ast.Import | ast.ImportFrom)]
    return bool(calls) and all(
        isinstance(one, ast.Expr)
        and isinstance(one.value, ast.Call)
        and re.search(r"table|_said$|^print$", ast.unparse(one.value.func)) is not None
        for one in calls
    )


def _listed(cell: dict[str, Any], reference: Reference) -> list[str]:
    """The public objects whose source a cell shows."""
    found = []
    for output in cell["outputs"]:
        content = "".join(output.get("data", {}).get("text/html", ""))
        match = _LISTING.match(content)
        full = reference.find(html.unescape(match["name"])) if match else None
        found += [full] if full else []
    return found


def _markdown(text: str, tags: list[str]) -> dict[str, Any]:
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    metadata = {"tags": tags} if tags else {}
    return {"cell_type": "markdown", "id": name, "metadata": metadata, "source": text}


def _shown(data: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
    return {**output, "data": data, "metadata": {}}


def _looks(tags: list[str]) -> dict[str, Any]:
    """How a page shows a code cell with these tags."""
    if "run-time" in tags:
        return {"tags": ["remove-cell"]}  # the bar under the title says it
    if "solution" in tags:
        words = {"code_prompt_show": "Solution", "code_prompt_hide": "Solution"}
        return {"tags": ["solution", "hide-cell"], "mystnb": words}
    kept = [tag for tag in tags if tag in ("exercise", "hide-input", "real-model")]
    return {"tags": kept}


def _with_bar(cells: list[dict[str, Any]], written: Written, home: Home) -> list[dict[str, Any]]:
    """The cells with a bar under the title: how long the chapter takes, and how it is run."""
    first, *rest = cells
    title, found, below = first["source"].partition("\n")
    if first["cell_type"] != "markdown" or not title.startswith("# "):
        raise SiteError(f"{written.name} does not begin with its title, `# …`.")
    bar = _markdown(bar_html(written, home), [])
    return [_markdown(title, []), bar, *([_markdown(below, [])] if found else []), *rest]
