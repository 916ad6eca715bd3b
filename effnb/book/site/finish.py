"""What is done to the pages when Sphinx has made them: heads, footers, terms, search, addresses.

Each page gets what other machines read of it (a description, a picture, its one address), loses the
scripts that nothing here needs, and ends with version, date and licence. Without JavaScript a page
has its colours, light or dark, and no control that does not move.
"""

from __future__ import annotations

import gzip
import html
import os
import re
import subprocess
import tomllib
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from effnb.book.site import glossary, search
from effnb.book.site.address import Home
from effnb.book.site.book import REPOSITORY, Book, up
from effnb.book.site.coded import linked_code
from effnb.book.site.numbers import numbered, referred
from effnb.book.site.reference import Reference

UNUSED = (
    *("searchtools.js", "language_data.js", "sphinx_highlight.js", "doctools.js"),
    *("base-stemmer.js", "english-stemmer.js", "searchindex.js"),
)
"""Scripts of Sphinx that no page needs."""

DARK = "noscript-dark.css"
_SCRIPT = re.compile(r'\s*<script[^>]*src="[^"]*?([\w.-]+\.js)[^"]*"[^>]*></script>')
_VIEWPORT = re.compile(r'\s*<meta name="viewport"[^>]*>|\s*<meta name="docsearch:[^>]*>')
_PICTURE = re.compile(r'<img[^>]*src="(?:\.\./)*(pictures/[\w]+\.png)"')


def finish(site: Path, book: Book, reference: Reference, home: Home | None = None) -> None:
    """Finish every page of a site that Sphinx has made.

    Args:
        site: The folder to publish.
        book: The chapters.
        reference: The public objects of the package.
        home: Where repository and site are on the web; nothing is said of it when None.
    """
    home = home or Home()
    pages = search.read(site)
    terms, chapters = glossary.entries(book), {one.name: one for one in book.written}
    day = build_day()
    for name, page in pages.items():
        new = page
        if name in chapters:
            new = referred(numbered(glossary.linked(page, name, terms)))
            new = with_sentences(linked_code(new, name, reference))
        new = with_head(new, name, home)
        new = with_footer(new, name, day)
        if name == "404" and home.site:
            new = new.replace("<head>", f'<head>\n<base href="{html.escape(home.site)}">', 1)
        if new != page:
            pages[name] = new
            (site / f"{name}.html").write_text(new, encoding="utf-8")
    index = search.as_script(search.build(pages, book, reference))
    (site / search.NAME).write_text(index, encoding="utf-8")
    for unused in UNUSED:
        for folder in (site, site / "_static"):
            (folder / unused).unlink(missing_ok=True)
    styles = [site / "_static" / one for one in ("pygments.css", "book.css")]
    said = "\n".join(dark_rules(one.read_text(encoding="utf-8")) for one in styles if one.exists())
    (site / "_static").mkdir(exist_ok=True)
    (site / "_static" / DARK).write_text(said, encoding="utf-8")
    used = used_words(site, pages)
    for style in (site / "_static").rglob("*.css"):
        if "theme" in style.name or "mystnb" in style.name:
            style.write_text(pruned(style.read_text(encoding="utf-8"), used), encoding="utf-8")
    if home.site:
        (site / "sitemap.xml").write_text(sitemap(pages, home.site, day), encoding="utf-8")


_OUTPUT = re.compile(
    r'(<div class="output (?:stream|text_plain)[^"]*">.*?<pre)(>)(.*?)</pre>', re.S
)


def with_sentences(page: str) -> str:
    """A page whose printed sentences may wrap; text with columns keeps to its lines.

    A text has columns where a line has two blanks in a row, or a tab.
    """

    def marked(found: re.Match[str]) -> str:
        text = re.sub(r"<[^>]+>", "", found[3])
        columns = re.search(r"\S(?:  +|\t)\S|^ ", text, re.M)
        return found[0] if columns else f'{found[1]} class="sentences">{found[3]}</pre>'

    return _OUTPUT.sub(marked, page)


@cache
def version() -> str:
    """The version of the package, from the one place that states it."""
    said = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    return said["project"]["version"]


def build_day() -> str:
    """The day of what is built, as 2026-11-28: that of the last commit, or today's."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is None:
        try:
            asked = ["git", "-C", str(REPOSITORY), "log", "-1", "--format=%ct"]
            given = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
        except OSError:
            given = ""
    moment = datetime.fromtimestamp(int(given), UTC) if given.strip() else datetime.now(UTC)
    return moment.date().isoformat()


def description(page: str, length: int = 200) -> str:
    """What a page is about: its first paragraph, in words, cut between two words."""
    _, _, article = page.partition("<article")
    bar = article.find('<ul class="ways-out"')
    article = article[max(bar, 0) :]
    for found in re.finditer(r"<p(?: [^>]*)?>(.*?)</p>", article, re.DOTALL):
        bare = re.sub(r'<span class="katex-mathml">.*?</math></span>', "", found[1])
        bare = re.sub(r'<span class="term-means".*?</span>', "", bare, flags=re.DOTALL)
        words = html.unescape(re.sub(r"<[^>]+>", "", bare))
        words = re.sub(r"\s+", " ", words).strip()
        if len(words) > 40:
            return words if len(words) <= length else words[:length].rpartition(" ")[0] + " …"
    return "A workbook on efficient methods for language models."


def with_head(page: str, name: str, home: Home) -> str:
    """A page with one viewport, what it is about, its address, and without unused scripts."""
    page = _SCRIPT.sub(lambda found: "" if found[1] in UNUSED else found[0], page)
    page = _VIEWPORT.sub("", page)
    title = re.search(r"<title>(.*?)(?: &#8212; .*?)?</title>", page, re.DOTALL)
    said = html.escape(description(page))
    named = title[1].strip() if title else "effnb"
    kind = "website" if name == "index" else "article"
    top = up(name)
    lines = [
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta name="description" content="{said}">',
        f'<meta property="og:title" content="{named}">',
        f'<meta property="og:description" content="{said}">',
        f'<meta property="og:type" content="{kind}">',
        '<meta property="og:site_name" content="effnb">',
    ]
    if home.site and name != "404":
        address = html.escape(home.site + ("" if name == "index" else f"{name}.html"))
        lines += [
            f'<link rel="canonical" href="{address}">',
            f'<meta property="og:url" content="{address}">',
        ]
        picture = _PICTURE.search(page)
        if picture:
            lines.append(
                f'<meta property="og:image" content="{html.escape(home.site)}{picture[1]}">'
            )
    if name in ("404", "search"):
        lines.append('<meta name="robots" content="noindex">')
    # Last in the head: it has to come after the other sheets.
    without = (
        f'<noscript><link rel="stylesheet" href="{top}_static/{DARK}" '
        'media="(prefers-color-scheme: dark)"><style>.panel-control, .panel-guess, '
        ".panel-question button, .sidebar-toggle { display: none !important; }</style></noscript>"
    )
    # Without a script the colours are those of the light theme, and of the sheet above.
    page = page.replace('data-theme="auto"', 'data-theme="light"', 1)
    page = page.replace("</head>", f"  {without}\n  </head>", 1)
    return page.replace("</title>", "</title>\n    " + "\n    ".join(lines), 1)


def with_footer(page: str, name: str, day: str) -> str:
    """A page that ends with version, date and licence."""
    top = up(name)
    footer = (
        f'<footer class="book-footer"><p>effnb {version()}, built from the state of '
        f'<time datetime="{day}">{day}</time>. Text and code: '
        f'<a href="https://www.apache.org/licenses/LICENSE-2.0" rel="license">Apache License 2.0'
        f'</a>. Corpora and models: see the <a href="{top}datasheet.html">data sheet</a>.</p>'
        "</footer>"
    )
    head, mark, rest = page.partition('<footer class="prev-next-footer')
    inside, end, after = rest.partition("</footer>")
    return f"{head}{mark}{inside}{end}{footer}{after}" if end else page


def dark_rules(style: str) -> str:
    """The rules of a style sheet for the dark theme, for pages that no script gives a theme."""
    bare = re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL)
    rules = re.findall(r"([^{}]*\[data-theme=\"?dark\"?\][^{}]*)\{([^{}]*)\}", bare)
    return "\n".join(
        f"{re.sub(r'=.?dark.?]', ']', selectors.strip())} {{{body}}}" for selectors, body in rules
    )


def used_words(site: Path, pages: dict[str, str]) -> set[str]:
    """Every word that is a class or an id on some page, or stands in a script."""
    found = set()
    for page in pages.values():
        for one in re.findall(r' (?:class|id)="([^"]*)"', page):
            found.update(one.split())
    for script in [*(site / "_static").rglob("*.js")]:
        found.update(re.findall(r"[A-Za-z_][\w-]*", script.read_text(encoding="utf-8")))
    return found


def pruned(style: str, used: set[str]) -> str:
    """A style sheet without the rules that no page can need.

    A selector goes when it asks for a class or an id that occurs nowhere.

    Args:
        style: The sheet.
        used: Classes and ids of all pages, and the words of all scripts.
    """
    out, at = [], 0
    style = re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL)
    while at < len(style):
        brace = style.find("{", at)
        statement = style.find(";", at)
        if brace < 0 or 0 <= statement < brace:  # @charset, @import
            end = statement + 1 if statement >= 0 else len(style)
            out.append(style[at:end])
            at = end
            continue
        head, depth, end = style[at:brace].strip(), 1, brace + 1
        while depth and end < len(style):
            depth += {"{": 1, "}": -1}.get(style[end], 0)
            end += 1
        body = style[brace + 1 : end - 1]
        at = end
        if head.startswith(("@media", "@supports", "@layer")):
            inside = pruned(body, used)
            out.append(f"{head}{{{inside}}}" if inside.strip() else "")
        elif head.startswith("@"):
            out.append(f"{head}{{{body}}}")
        else:
            kept = [one for one in _selectors(head) if _possible(one, used)]
            out.append(f"{','.join(kept)}{{{body}}}" if kept else "")
    return "".join(out)


def _selectors(head: str) -> list[str]:
    """The selectors of a rule; a comma in parentheses separates none."""
    found, depth, last = [], 0, 0
    for at, letter in enumerate(head):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(letter, 0)
        if letter == "," and not depth:
            found.append(head[last:at].strip())
            last = at + 1
    return [*found, head[last:].strip()]


def _possible(selector: str, used: set[str]) -> bool:
    """Whether a page may have what a selector asks for."""
    bare = selector
    while re.search(r"\([^()]*\)", bare):  # what is in parentheses may be one of several
        bare = re.sub(r"\([^()]*\)", "", bare)
    bare = re.sub(r"\[[^\]]*\]", "", bare)
    return all(one.replace("\\", "") in used for one in re.findall(r"[.#]((?:[\w-]|\\.)+)", bare))


def sitemap(pages: dict[str, str], site: str, day: str) -> str:
    """The addresses of all pages, for search engines."""
    rows = "".join(
        f"<url><loc>{html.escape(site + ('' if name == 'index' else f'{name}.html'))}</loc>"
        f"<lastmod>{day}</lastmod></url>\n"
        for name in sorted(pages)
        if name not in ("404", "search")
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{rows}</urlset>\n'
    )


def first_load(site: Path, name: str) -> dict[str, int]:
    """Compressed bytes of each file that a page's first view fetches, by path.

    Text is counted as a host sends it, compressed; pictures and fonts as they are: every font that
    the page's own style names, and the pictures before the second heading.
    """
    page = (site / f"{name}.html").read_text(encoding="utf-8")
    found = {f"{name}.html": len(gzip.compress(page.encode(), 6))}
    base = (site / name).parent
    loads = re.findall(r'<script[^>]*src="([^"?]+)', page)
    bare = re.sub(r"<noscript>.*?</noscript>", "", page, flags=re.DOTALL)
    loads += re.findall(r'<link[^>]*href="([^"?]+\.(?:css|svg))', bare)
    parts = page.partition("<article")[2].split("<h2")
    loads += re.findall(r'<img[^>]*src="([^"]+)"', "".join(parts[:2]).split("hidden>")[0])
    for load in loads:
        path = Path(os.path.normpath(base / load))
        if path.is_file():
            data = path.read_bytes()
            small = path.suffix in (".js", ".css", ".svg")
            key = path.relative_to(site).as_posix()
            found[key] = len(gzip.compress(data, 6)) if small else len(data)
    fonts = [*(site / "_static" / "fonts").glob("*.woff2")]
    fonts += [
        site / "_static" / "katex" / "fonts" / f"KaTeX_{one}.woff2"
        for one in ("Main-Regular", "Math-Italic", "Size1-Regular")
    ]
    for font in fonts:
        if font.is_file():
            found[font.relative_to(site).as_posix()] = font.stat().st_size
    return found
