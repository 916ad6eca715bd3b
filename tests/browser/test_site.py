"""The book as a reader of the published folder meets it: every page, in a real browser."""

from __future__ import annotations

import json
import posixpath
import re
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page

from effnb.book import equations
from effnb.book.site.__main__ import build
from effnb.book.site.finish import first_load
from effnb.lab.chapters import NOTEBOOKS

PATIENCE = 60_000
PHONE, SCREEN = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder to publish, built once."""
    out = tmp_path_factory.mktemp("book") / "site"
    status, _ = build(out)
    assert status == 0, "Sphinx has warned, and a warning is an error"
    return out


def contents(folder: Path) -> list[dict]:
    """The groups of the sidebar."""
    stored = folder.with_name("site-sources") / "pages" / "contents.json"
    return json.loads(stored.read_text(encoding="utf-8"))


def pages(folder: Path) -> list[str]:
    """All pages of the theme, by their paths; those of the sources' listings are made apart."""
    found = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.html")))
    return [path for path in found if not path.startswith(("source/", "_static/"))]


def telling(read: dict[str, Reader], names: list[str]) -> list[str]:
    """Pages which together show every kind of element (tag, classes and role) that any page shows.

    Hundreds of pages of the reference have one form. All others are among them.
    """
    chosen = [name for name in names if not name.startswith("api/")]
    return chosen + cover(read, set(names) - set(chosen), chosen)


def cover(read: dict[str, Reader], names: Iterable[str], shown: Iterable[str] = ()) -> list[str]:
    """As few of these pages as show every kind of element that the pages shown before do not."""
    seen = set().union(*(read[name].kinds for name in shown))
    left, chosen = sorted(names), []
    while left:
        best = max(left, key=lambda name: len(read[name].kinds - seen))
        if not read[best].kinds - seen:
            break
        chosen.append(best)
        seen |= read[best].kinds
    return chosen


# ----------------------------------------------------------------------------- reading the files


class Reader(HTMLParser):
    """Collects what a page refers to, its anchors, and the images that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.silent: list[str] = []
        self.kinds: set[str] = set()
        self.title = ""
        self._in_title = False

    def handle_starttag(self, tag: str, attributes: list) -> None:
        named = dict(attributes)
        classes = " ".join(sorted((named.get("class") or "").split()))
        self.kinds.add(f"{tag} {classes} {named.get('role') or ''}")
        self.anchors |= {named[key] for key in ("id", "name") if named.get(key)}
        if tag == "a" and "href" in named:
            self.links.append(named["href"])
        if tag in ("img", "script", "iframe", "source", "video") and named.get("src"):
            self.loads.append(named["src"])
        if tag == "link" and named.get("href") and named.get("rel") != "canonical":
            self.loads.append(named["href"])
        if tag == "img" and "alt" not in named:
            self.silent.append(named.get("src", ""))
        in_article = not (named.get("src") or "").endswith("icon.svg")
        if tag == "img" and in_article and len((named.get("alt") or "").split()) < 3:
            self.silent.append(named.get("src", ""))
        self._in_title = tag == "title"

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data

    def handle_endtag(self, tag: str) -> None:
        self._in_title = False


@pytest.fixture(scope="module")
def read(folder: Path) -> dict[str, Reader]:
    """Every HTML file of the site, read."""
    found = {}
    for path in folder.rglob("*.html"):
        if "_static" not in path.parts:
            reader, text = Reader(), path.read_text(encoding="utf-8")
            if path.is_relative_to(folder / "source"):  # most of a listing is colours
                text = re.sub(r"</?span[^>]*>", "", text)
            reader.feed(text)
            found[path.relative_to(folder).as_posix()] = reader
    return found


@pytest.fixture(scope="module")
def files(folder: Path) -> set[str]:
    """Every file of the site."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def missing(files: set[str], read: dict[str, Reader], page: str, link: str) -> bool:
    """Whether an internal link leads nowhere."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return False
    path = posixpath.join(posixpath.dirname(page), unquote(parts.path)) if parts.path else page
    target, anchor = posixpath.normpath(path), unquote(parts.fragment)
    if target not in files:
        return True
    return bool(anchor) and target in read and anchor not in read[target].anchors


def test_every_link_leads_somewhere(files, read):
    assert len(read) > 30
    broken = [
        f"{page}: {link}"
        for page, reader in read.items()
        for link in {*reader.links, *reader.loads}
        if missing(files, read, page, link)
    ]
    assert broken == []


def test_a_broken_link_would_be_found(files, read):
    assert missing(files, read, "index.html", "nowhere.html")
    assert missing(files, read, "index.html", "claims.html#no-such-claim")
    assert missing(files, read, "map.html", "#nothing")
    assert not missing(files, read, "index.html", "claims.html#S-I3")


def test_nothing_is_loaded_from_elsewhere(folder, read):
    foreign = [f"{p}: {u}" for p, r in read.items() for u in r.loads if urlsplit(u).netloc]
    styles = [path for path in folder.rglob("*.css") if "@import url(http" in path.read_text()]
    assert foreign == []
    assert styles == []
    fetched = re.compile(r"""(?:fetch|importScripts|import)\(\s*["'`]https?:""")
    for script in folder.rglob("*.js"):
        assert not fetched.search(script.read_text(encoding="utf-8")), script.name


def test_every_picture_says_what_it_shows(read):
    assert [f"{page}: {src}" for page, reader in read.items() for src in reader.silent] == []
    assert sum(len(reader.loads) for reader in read.values()) > 100  # it has looked


def test_every_chapter_and_every_page_beside_them_is_in_the_sidebar(folder, read):
    listed = {page["page"] + ".html" for group in contents(folder) for page in group["pages"]}
    below = {
        one["page"] + ".html"
        for group in contents(folder)
        for page in group["pages"]
        for one in page["below"]
    }
    assert set(pages(folder)) - {"index.html", "search.html", "404.html"} == listed | below
    for page in listed:
        assert {link.rpartition("/")[2] for link in read[page].links} >= {
            other.rpartition("/")[2] for other in listed - {page}
        }


def test_pages_are_light(folder):
    """A phone on a slow line: what every page loads, and the largest page."""
    scripts = sum(path.stat().st_size for path in folder.rglob("_static/**/*.js"))
    assert scripts < 600_000
    assert not list(folder.rglob("*.map"))
    largest = max((folder / page).stat().st_size for page in pages(folder))
    assert largest < 1_500_000, "pictures belong into files of their own"


def test_a_chapter_loads_in_400_kilobytes(folder):
    """The first view, compressed; every font of the book is counted, used or not."""
    chapters = [path.relative_to(folder).as_posix()[:-5] for path in folder.glob("0*.html")]
    chapters += [path.relative_to(folder).as_posix()[:-5] for path in folder.glob("0*/*.html")]
    assert len(chapters) > 10
    loads = {name: sum(first_load(folder, name).values()) for name in chapters}
    assert {name: size for name, size in loads.items() if size > 400_000} == {}


def test_every_page_has_one_viewport_and_says_what_it_is(folder):
    said = set()
    for name in pages(folder):
        text = (folder / name).read_text(encoding="utf-8")
        assert text.count('name="viewport"') == 1, name
        said.add(re.search(r'<meta name="description" content="([^"]+)"', text)[1])
        assert 'class="book-footer"' in text or name in ("search.html", "404.html"), name
        assert "search-index.js" not in text, "the index waits until someone searches"
    assert len(said) > 0.5 * len(pages(folder))


def test_the_home_page_shows_every_written_chapter(folder):
    text = (folder / "index.html").read_text(encoding="utf-8")
    cards = re.findall(r'<li><a href="([^"]+)"><img [^>]*alt="[^"]+', text)
    assert len(cards) > 10 and all((folder / card).is_file() for card in cards)
    listed = {page["page"] + ".html" for group in contents(folder) for page in group["pages"]}
    chapters = {name for name in listed if name[:2].isdigit()}
    assert set(cards) == chapters


def test_five_questions_are_two_clicks_away(folder, read):
    assert "which.html" in read["index.html"].links
    for place in (
        "05_inference/3_quantization.html#turn-the-knob",
        "05_inference/3_quantization.html#gallery",
        "05_inference/1_pruning.html#what-it-costs-and-saves",
        "05_inference/1_pruning.html#gallery",
        "02_design/6_context.html#four-ways-to-slow-down",
    ):
        assert place in read["which.html"].links


# ------------------------------------------------------------------------------ in the browser


class Quiet(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def end_headers(self) -> None:
        """Let the browser keep what all pages share, as a host does."""
        self.send_header("Cache-Control", "max-age=600")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@dataclass
class Book:
    """The served site, and what went wrong in the browser."""

    context: BrowserContext
    address: str
    foreign: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def page(self, **options) -> Page:
        """A new page that lets nothing through to other hosts."""
        page = self.context.new_page()
        page.set_default_timeout(PATIENCE)
        if options:
            page.set_viewport_size(options)
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.errors.append(f"{page.url}: {error}"))
        return page

    def _said(self, message) -> None:
        if message.type == "error":
            self.errors.append(f"{message.location.get('url')}: {message.text}")

    def guard(self, route) -> None:
        if route.request.url.startswith((self.address, "data:", "blob:")):
            route.continue_()
        else:
            self.foreign.append(route.request.url)
            route.abort()


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def book(browser: Browser, served: str) -> Iterator[Book]:
    context = browser.new_context(viewport=SCREEN, color_scheme="light", has_touch=True)
    opened = Book(context, served)
    # Only what is not ours is looked at: asking about every file would slow all of them down.
    context.route(re.compile(rf"^(?!{re.escape(served)}/|data:|blob:)"), opened.guard)
    yield opened
    context.close()
    assert opened.foreign == [], "the book asked other hosts"
    assert opened.errors == []


def test_a_page_that_asks_another_host_or_fails_would_be_found(browser, served):
    context = browser.new_context()
    opened = Book(context, served)
    context.route(re.compile(rf"^(?!{re.escape(served)}/|data:|blob:)"), opened.guard)
    page = opened.page()
    page.goto(f"{served}/reading.html")
    page.evaluate("fetch('https://fonts.example/a.css').catch(() => 0)")
    page.evaluate("setTimeout(() => { throw new Error('planted'); })")
    end = time.monotonic() + 60
    while "planted" not in "".join(opened.errors) and time.monotonic() < end:
        page.wait_for_timeout(100)
    assert opened.foreign == ["https://fonts.example/a.css"]
    assert "planted" in "".join(opened.errors)
    context.close()


@pytest.mark.parametrize("which", ["kinds", pytest.param("all", marks=pytest.mark.full)])
def test_every_page_opens_on_a_phone(book, folder, read, which):
    """Without an error, without another host, and without anything wider than the screen.

    The hundreds of pages of the reference have one form: every run opens those that together show
    every kind of element, and the full run opens all.
    """
    names = pages(folder) if which == "all" else telling(read, pages(folder))
    page = book.page(**PHONE)
    wide = []
    for name in names:
        page.goto(f"{book.address}/{name}", wait_until="load")
        if page.evaluate("document.documentElement.scrollWidth") > PHONE["width"]:
            wide.append(name)
    assert len(names) > 40 and wide == []


def test_titles_tell_pages_apart(folder, read):
    names = pages(folder)
    assert len({read[name].title for name in names}) > 0.9 * len(names)


SETTLED = """async () => {
    const moving = () => document.getAnimations().filter(a => a.playState === 'running');
    do {
        await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
        await Promise.allSettled(moving().map(a => a.finished));
    } while (moving().length);
}"""


def problems(page: Page, axe: str, where: str, *rules: str) -> list[str]:
    """What axe finds wrong on the page that is open, by all rules or by some."""
    page.evaluate(f"window.axe || (() => {{ {axe} }})()")
    chosen = {"resultTypes": ["violations"]} | ({"runOnly": [*rules]} if rules else {})
    found = page.evaluate("chosen => axe.run(document, chosen)", chosen)
    return [
        f"{where}: {rule['id']} ({node['target'][0]}): {node['failureSummary'][:160]}"
        for rule in found["violations"]
        for node in rule["nodes"][:3]
    ]


def look_at(book, page_files, names, dark) -> list[str]:
    axe = next(page_files.glob("*-axe.min.js")).read_text(encoding="utf-8")
    page = book.page(**SCREEN)
    found = []
    for name in names:
        page.emulate_media(color_scheme="light")
        page.goto(f"{book.address}/{name}", wait_until="load")
        for theme in ("light", "dark") if name in dark else ("light",):
            page.emulate_media(color_scheme=theme)
            page.wait_for_function(f"document.documentElement.dataset.theme === '{theme}'")
            # Colours that are still fading from one theme to the other belong to neither.
            page.evaluate(SETTLED)
            # The theme changes colours alone: what a page says, and its build, is looked at once.
            rules = ["color-contrast", "link-in-text-block"] if theme == "dark" else []
            found += problems(page, axe, f"{name}, {theme}", *rules)
    return found


@pytest.mark.parametrize("which", ["kinds", pytest.param("all", marks=pytest.mark.full)])
def test_words_can_be_read_and_heard_in_light_and_dark(book, folder, page_files, read, which):
    """Every page in light; in dark those that together show every kind of element, or all."""
    names = telling(read, pages(folder))
    assert len(names) > 20 and any(name.startswith("api/") for name in names)
    dark = names if which == "all" else cover(read, names)
    assert len(dark) > 8
    assert look_at(book, page_files, names, dark) == []


def test_pale_words_would_be_found(book, page_files):
    axe = next(page_files.glob("*-axe.min.js")).read_text(encoding="utf-8")
    page = book.page(**SCREEN)
    page.goto(f"{book.address}/reading.html")
    page.evaluate("document.querySelector('article p').style.color = '#bbb'")
    assert "color-contrast" in "".join(problems(page, axe, ""))
    assert "color-contrast" in "".join(problems(page, axe, "", "color-contrast"))


def visible_numbers(panel) -> str:
    return panel.locator(".panel-frame:visible .effnb-numbers").text_content()


def test_a_panel_moves_in_every_chapter_that_has_one(book, folder):
    page = book.page(**SCREEN)
    moved = 0
    chapters = [
        path for path in pages(folder) if 'class="panel"' in (folder / path).read_text("utf-8")
    ]
    assert "00_start_here.html" in chapters
    for name in chapters:
        page.goto(f"{book.address}/{name}")
        panel = page.locator("section.panel").first
        question = panel.locator(".panel-question")
        if question.count():
            assert panel.locator(".panel-frame:visible").count() == 0, "it opens with the guess"
            question.get_by_role("button", name="Skip").click()
        numbers, source = visible_numbers(panel), panel.locator("img:visible").get_attribute("src")
        assert panel.locator(".panel-frame:visible").count() == 1
        knob = panel.locator("input[type=range]").first
        if knob.count():
            knob.focus()
            at_end = knob.get_attribute("value") == knob.get_attribute("max")
            page.keyboard.press("ArrowLeft" if at_end else "ArrowRight")
            assert panel.locator(".panel-value").first.text_content() == knob.get_attribute(
                "aria-valuetext"
            )
        else:
            panel.get_by_role("radio", checked=False).first.check()
        assert panel.locator(".panel-frame:visible").count() == 1
        assert visible_numbers(panel) != numbers
        assert panel.locator("img:visible").get_attribute("src") != source
        picture = panel.locator("img:visible")
        loaded = "image => image.complete && image.naturalWidth > 500"
        page.wait_for_function(loaded, arg=picture.element_handle())
        moved += 1
    assert moved == len(chapters)


def test_a_panel_answers_keyboard_mouse_and_finger(book):
    page = book.page(**PHONE)
    page.goto(f"{book.address}/index.html")
    panel = page.locator("section.panel")
    knob = panel.get_by_role("slider", name="bits")
    output = panel.locator(".panel-value")
    knob.focus()
    page.keyboard.press("Home")
    first = panel.locator(".panel-ticks span").first.text_content()
    assert output.text_content() == first
    page.keyboard.press("ArrowRight")
    second = output.text_content()
    assert second != first
    # A screen reader hears the new numbers, once.
    said = panel.get_by_role("status")
    page.wait_for_function("e => e.textContent", arg=said.element_handle())
    assert f"bits {second}" in said.text_content()
    assert "Probability of “Paris”" in said.text_content()
    knob.scroll_into_view_if_needed()
    box = knob.bounding_box()
    page.mouse.click(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)
    last = panel.locator(".panel-ticks span").last.text_content()
    assert output.text_content() == last
    page.touchscreen.tap(box["x"] + 14, box["y"] + box["height"] / 2)
    same = "([element, text]) => element.textContent === text"
    page.wait_for_function(same, arg=[output.element_handle(), first])
    assert "bits = " in panel.locator("img:visible").get_attribute("alt")


def test_search_finds_english_and_japanese(book):
    page = book.page(**SCREEN)
    for word, expected in (
        ("perplexity", "00_start_here.html"),
        ("ゼロ点", "glossary.html"),
        ("量子化", "05_inference/3_quantization.html"),
        ("枝刈り", "05_inference/1_pruning.html"),
    ):
        page.goto(f"{book.address}/search.html?q={word}")
        page.locator(f"#search-results a[href*='{expected}']").first.wait_for()


SIZES = [{"width": width, "height": 900} for width in (390, 768, 1440)]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_hit_leads_to_its_section_and_marks_the_word(book, theme):
    page = book.page(**SCREEN)
    page.emulate_media(color_scheme=theme)
    for size in SIZES:
        page.set_viewport_size(size)
        page.goto(f"{book.address}/search.html?q=SNIP")
        page.locator("#search-results a").first.click()
        page.wait_for_url("**/05_inference/1_pruning.html?highlight=SNIP#gallery")
        assert page.locator("article mark").first.text_content() == "SNIP"
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        page.keyboard.press("Escape")
        assert page.locator("article mark").count() == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_term_opens_under_the_focus_and_escape_closes_it(book, theme):
    page = book.page(**SCREEN)
    page.emulate_media(color_scheme=theme)
    for size in SIZES:
        page.set_viewport_size(size)
        page.goto(f"{book.address}/05_inference/3_quantization.html")
        term = page.locator(".term", has_text="GPTQ").first
        assert not term.get_by_role("tooltip").is_visible()
        term.locator("a").focus()
        box = term.get_by_role("tooltip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= size["width"]
        page.keyboard.press("Escape")
        assert not term.get_by_role("tooltip").is_visible()
    page.mouse.move(0, 0)
    term.locator("a").blur()
    term.hover()
    assert term.get_by_role("tooltip").is_visible(), "a mouse opens it as well"


COVERED = """() => {
    const choice = document.querySelector('.claims-filter').getBoundingClientRect();
    const header = document.querySelector('.bd-header-article').getBoundingClientRect();
    return choice.bottom <= 0 ? 0 : header.bottom - choice.top;
}"""


def test_claims_can_be_chosen_and_sections_fold(book):
    page = book.page(**SCREEN)
    page.goto(f"{book.address}/claims.html")
    every = page.locator("section.claim:visible").count()
    page.get_by_label("Outcome").select_option("holds")
    shown = page.locator("section.claim:visible").count()
    assert 0 < shown < every
    assert page.locator(".claims-filter [role=status]").text_content() == f"{shown} claims"
    for where in everywhere(page):
        assert page.locator("section.claim:visible").count() == shown, where
        assert page.get_by_label("Section").is_visible(), where
        page.evaluate("scrollTo(0, 2500)")
        page.wait_for_function("scrollY >= 2490")
        covered = page.evaluate(COVERED)
        assert covered <= 0, f"{where}: the header covers {covered} pixels of the choice"
    page.set_viewport_size(SCREEN)
    link = page.locator(".book-nav a", has_text="Matryoshka")
    assert not link.is_visible()
    page.locator(".book-nav summary", has_text="Inference").click()
    assert link.is_visible()


def everywhere(page: Page) -> Iterator[str]:
    """The open page in both themes at all widths; it is not loaded again."""
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        for size in SIZES:
            page.set_viewport_size(size)
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= size["width"], f"{page.url} is {wide} pixels wide at {size['width']}"
            yield f"{theme}, {size['width']}"


BROKEN_LINES = r"""() => [...document.querySelectorAll(
    '.cell_output .output:not(.text_html) pre:not(.sentences)')].filter(pre => {
    if (!pre.offsetParent) return false;
    const style = getComputedStyle(pre), text = pre.textContent.replace(/\n$/, '');
    const around = parseFloat(style.paddingTop) + parseFloat(style.paddingBottom);
    const lines = text.split('\n').length;
    return pre.clientHeight - around > (lines + 0.6) * parseFloat(style.lineHeight);
}).map(pre => pre.textContent.slice(0, 80))"""
LOST = """() => [...document.querySelectorAll('.cell_output :is(pre, table)')].filter(one => {
    if (!one.offsetParent || one.closest('.panel')) return false;
    if (one.getBoundingClientRect().right <= innerWidth && one.scrollWidth <= one.clientWidth + 1)
        return false;
    for (let box = one; box && box.tagName !== 'ARTICLE'; box = box.parentElement)
        if (['auto', 'scroll'].includes(getComputedStyle(box).overflowX)) return false;
    return true;
}).map(one => one.textContent.slice(0, 80))"""
TALL_CELLS = """() => [...document.querySelectorAll(
    '.cell_output .output.text_html td')].filter(cell =>
    cell.offsetParent && cell.clientHeight > 2.4 * parseFloat(getComputedStyle(cell).lineHeight)
).map(cell => cell.textContent)"""


def test_every_output_of_every_chapter_can_be_read_at_every_width(book, folder):
    """Lines of columns never break, tables never re-wrap, and what is wider scrolls."""
    page = book.page(**PHONE)
    bad, seen = {}, 0
    for number, name in enumerate(path for path in pages(folder) if re.match(r"0\d", path)):
        page.emulate_media(color_scheme=("light", "dark")[number % 2])
        page.goto(f"{book.address}/{name}")
        seen += page.locator(".cell_output .output:not(.text_html) pre:not(.sentences)").count()
        for size in SIZES:
            page.set_viewport_size(size)
            wide = page.evaluate("document.documentElement.scrollWidth")
            found = [f"{wide} pixels wide"] if wide > size["width"] else []
            for what in (BROKEN_LINES, LOST, TALL_CELLS):
                found += page.evaluate(what)
            if found:
                bad.setdefault(f"{name} at {size['width']}", []).extend(found)
    assert seen > 20
    assert bad == {}
    page.add_style_tag(content=".cell_output pre { white-space: pre-wrap !important }")
    first = page.locator(".cell_output .output:not(.text_html) pre:not(.sentences)").first
    first.evaluate("pre => pre.textContent = 'a  b '.repeat(99)")
    assert len(page.evaluate(BROKEN_LINES)) > 0, "a line that breaks would be found"


def paper_at(page: Page, box, side: str) -> float:
    """The part of a box's edge, three pixels wide, that has the colour of the page."""
    place = box.bounding_box()
    x = place["x"] + (0 if side == "left" else place["width"] - 3)
    clip = {"x": x, "y": place["y"] + 4, "width": 3, "height": place["height"] - 8}
    strip = Image.open(BytesIO(page.screenshot(clip=clip))).convert("RGB")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    wanted = tuple(int(part) for part in re.findall(r"\d+", paper)[:3])
    data = strip.tobytes()
    pixels = [data[at : at + 3] for at in range(0, len(data), 3)]
    alike = [one for one in pixels if max(abs(a - b) for a, b in zip(one, wanted)) < 6]
    return len(alike) / len(pixels)


WIDE_OUTPUT = """() => {
    const wide = [...document.querySelectorAll('.cell_output .output.text_html')].find(
        box => box.offsetParent && box.scrollWidth > box.clientWidth + 40
            && box.clientHeight < 500 && !box.closest('details, .panel'));
    if (wide) wide.id = 'wide';
    return !!wide;
}"""


def test_what_goes_on_sideways_has_a_shade_at_that_edge_and_none_at_the_end(book):
    page = book.page(**SCREEN)
    page.goto(f"{book.address}/05_inference/3_quantization.html")
    shaded = 0
    for where in everywhere(page):
        page.evaluate("document.getElementById('wide')?.removeAttribute('id')")
        if not page.evaluate(WIDE_OUTPUT):
            continue
        shaded += 1
        box = page.locator("#wide")
        box.evaluate("box => { box.scrollLeft = 0; box.scrollIntoView({block: 'center'}) }")
        page.evaluate(SETTLED)
        assert paper_at(page, box, "right") < 0.2, f"{where}: nothing says that it goes on"
        assert paper_at(page, box, "left") > 0.5, f"{where}: it begins here"
        box.evaluate("box => box.scrollLeft = box.scrollWidth")
        page.evaluate(SETTLED)
        assert paper_at(page, box, "right") > 0.5, f"{where}: it ends here"
        assert paper_at(page, box, "left") < 0.2, f"{where}: nothing says where it began"
    assert shaded >= 2, "a phone has something to scroll, in light and dark"


def test_a_solution_has_the_colours_of_the_page(book):
    page = book.page(**SCREEN)
    page.goto(f"{book.address}/02_design/2_experts.html")
    page.evaluate("document.querySelectorAll('article details').forEach(one => one.open = true)")
    code = page.locator(".cell_output details .listing pre").first
    for where in everywhere(page):
        page.evaluate(SETTLED)
        assert code.is_visible(), where
        raised = page.evaluate(
            "getComputedStyle(document.documentElement).getPropertyValue('--raised')"
        )
        ground = code.evaluate("one => getComputedStyle(one).backgroundColor")
        assert "#{:02x}{:02x}{:02x}".format(*map(int, re.findall(r"\d+", ground)[:3])) == raised
    assert code.text_content().startswith("def ")


def test_a_second_knob_moves_where_it_is_stored(book, folder):
    page = book.page(**SCREEN)
    page.goto(f"{book.address}/00_start_here.html")
    panel = page.locator("section.panel").first
    other = panel.locator(".panel-control").nth(1)
    page.locator("section.panel input[type=range]").first.focus()
    for _ in everywhere(page):
        numbers = visible_numbers(panel)
        other.get_by_role("radio", checked=False).first.check()
        assert panel.locator(".panel-frame:visible").count() == 1
        assert visible_numbers(panel) != numbers
    two = [
        name
        for name in pages(folder)
        if re.search(
            r'id="panel-\w+-knob1"|name="panel-\w+-knob1"', (folder / name).read_text("utf-8")
        )
    ]
    assert len(two) > 4, "other chapters store a second knob, too"


def test_the_guide_is_a_click_away_and_leads_to_its_tables(book):
    page = book.page(**SCREEN)
    page.goto(f"{book.address}/index.html")
    page.get_by_role("link", name="Which method should I use?").first.click()
    page.wait_for_url("**/which.html")
    card = page.locator(".advice", has_text="What does a cache of two bits save?")
    for _ in everywhere(page):
        assert re.search(
            r"becomes \d\.\d times smaller", card.locator(".advice-says").text_content()
        )
    for box in page.locator(".advice").all():
        assert re.search(r"\d", box.locator(".advice-says").text_content())
        assert box.locator(".advice-table a").count() >= 3
    stored = card.locator(".advice-table a", has_text=".json").get_attribute("href")
    answer = page.request.get(f"{book.address}/{stored}")
    assert answer.ok and "table" in answer.json()["data"]
    card.locator(".advice-table a").first.click()
    page.wait_for_url("**/05_inference/3_quantization.html#gallery")
    assert page.locator("#gallery").is_visible()


ASKED = {  # what a reader wants to know: the link that is the second click, and what is read there
    "GPTQ or AWQ": ("Turn the knob", r"GPTQ[\s\S]*AWQ|AWQ[\s\S]*GPTQ"),
    "cache of two bits": ("KIVI", r"KIVI"),
    "2:4 faster": ("What it costs and saves", r"2:4"),
    "SNIP": ("Taylor and SNIP", r"SNIP"),
    "context stretched": ("Four ways to slow down", r"NTK-aware scaling"),
}
BELOW = """id => {
    let one = document.getElementById(id), box = one.closest('section');
    return box.textContent;
}"""


@pytest.mark.parametrize("question", ASKED)
def test_a_reader_finds_each_answer_in_two_clicks(book, question):
    """The questions together are asked at every width in light and in dark."""
    words, told = ASKED[question]
    themes = ["light", "dark", "light", "dark"][list(ASKED).index(question) % 2 :][:3]
    page = book.page(**SCREEN)
    for theme, size in zip(themes, SIZES, strict=True):
        page.set_viewport_size(size)
        page.emulate_media(color_scheme=theme)
        page.goto(f"{book.address}/index.html")
        page.locator("article").get_by_role("link", name="Which method should I use?").click()
        page.wait_for_url("**/which.html")
        asked = page.locator("article li", has_text=question)
        assert asked.count() == 1
        asked.get_by_role("link", name=words).click()
        page.wait_for_url("**.html#*")
        anchor = page.url.partition("#")[2]
        assert re.search(told, page.evaluate(BELOW, anchor))
        page.wait_for_function(
            "id => (y => y >= 0 && y < innerHeight)"
            "(document.getElementById(id).getBoundingClientRect().top)",
            arg=anchor,
        )


def test_words_lead_to_the_figure_that_they_mean(book, read):
    linked = [name for name, one in read.items() if any("#figure-" in li for li in one.links)]
    assert len(linked) > 10
    page = book.page(**SCREEN)
    page.goto(f"{book.address}/05_inference/1_pruning.html")
    reference = page.locator("a.figure-link").first
    for _ in everywhere(page):
        reference.click()
        target = page.locator(reference.get_attribute("href"))
        assert reference.text_content() in target.text_content()
        page.wait_for_function(
            "e => (y => y >= 0 && y < innerHeight)(e.getBoundingClientRect().top)",
            arg=target.element_handle(),
        )


def test_words_lead_to_the_equation_that_they_mean(book, folder):
    """Every reference of every chapter: to the equation that the source has in that place."""
    page, followed = book.page(**SCREEN), 0
    for name in [path for path in pages(folder) if re.match(r"0\d", path)]:
        built = json.loads((NOTEBOOKS / name).with_suffix(".ipynb").read_text(encoding="utf-8"))
        texts = ["".join(c["source"]) for c in built["cells"] if c["cell_type"] == "markdown"]
        meant, written = equations.displayed(texts), "\n".join(texts)
        wanted = [int(found[2]) for found in equations.REFERENCE.finditer(written)]
        page.goto(f"{book.address}/{name}")
        shown = page.evaluate(
            """() => [...document.querySelectorAll('article .math-block')].map(block => [
                block.id, block.querySelector('annotation').textContent,
                block.querySelectorAll('.eqno, .katex-tag').length])"""
        )
        assert [number for number, _, _ in shown] == [
            f"equation-{i}" for i in range(1, len(meant) + 1)
        ]
        assert [named for _, _, named in shown] == [1] * len(meant), "one number or one name"
        for one, (_, tex, _) in zip(meant, shown, strict=True):
            assert " ".join(re.sub(r"\s*\\tag\{\w+\}", "", tex).split()) == one.tex
        links = page.locator("article a.equation-link")
        led = links.evaluate_all("all => all.map(link => link.getAttribute('href'))")
        assert sorted(led) == sorted(f"#equation-{number}" for number in wanted), name
        followed += len(led)
    assert followed > 25
    page.goto(f"{book.address}/02_design/2_experts.html")
    link = page.locator("article a.equation-link").first
    for _ in everywhere(page):
        link.click()
        target = page.locator(link.get_attribute("href"))
        assert link.text_content() == target.locator(".eqno").get_attribute("aria-label").lower()
        page.wait_for_function(
            "e => (y => y >= 0 && y < innerHeight)(e.getBoundingClientRect().top)",
            arg=target.element_handle(),
        )


def test_ways_out_of_a_chapter_are_open(book, folder):
    page = book.page(**SCREEN)
    page.goto(f"{book.address}/05_inference/2_low_rank.html")
    ways = page.get_by_role("list", name="Take this chapter along").get_by_role("link")
    papers = page.locator("article a[href^='https://arxiv.org/abs/']")
    for where in everywhere(page):
        for way in ways.all():
            box = way.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= page.viewport_size["width"], where
        assert papers.locator("visible=true").count() >= 3, where
    for ending in ("ipynb", "py"):
        with page.expect_download() as taken:
            ways.filter(has_text=f"Download .{ending}").click()
        assert taken.value.suggested_filename == f"2_low_rank.{ending}"
    book_of_papers = page.request.get(f"{book.address}/bibliography.bib")
    assert book_of_papers.ok and "@" in book_of_papers.text()


def test_a_teacher_finds_every_chapter_and_its_slides(book, folder):
    page = book.page(**SCREEN)
    page.goto(f"{book.address}/teach.html")
    slides = page.get_by_role("link", name=re.compile("slides$"))
    chapters = [path for path in pages(folder) if re.match(r"0\d", path)]
    assert slides.count() == len(chapters)
    for where in everywhere(page):
        table = page.locator("table.teach")
        assert table.is_visible(), where
        for link in table.get_by_role("link").all()[:8]:
            box = link.bounding_box()
            right = box["x"] + box["width"]
            assert box["x"] >= 0 and right <= page.viewport_size["width"], where
            assert box["height"] < 30, f"{where}: {link.text_content()} is broken in two"
    slides.first.click()
    page.wait_for_url("**/_static/teach/00_start_here/slides.html*")
    assert page.locator(".slide.here h1").is_visible()


def test_code_reference_and_chapters_lead_to_each_other(book):
    page = book.page(**SCREEN)
    page.goto(f"{book.address}/05_inference/1_pruning.html")
    name = page.locator(".cell_input a.api-link:visible").first
    for _ in everywhere(page):
        assert name.is_visible()
    said = name.text_content()
    name.click()
    page.wait_for_url("**/api/effnb.*")
    described = page.url
    assert described.endswith(f".{said}")
    entry = page.locator("dl.py").filter(has=page.locator(f'[id="{described.partition("#")[2]}"]'))
    entry.get_by_role("link", name="Pruning").first.click()
    page.wait_for_url("**/05_inference/1_pruning.html*")
    page.goto(described)
    entry.locator("a.source-link").first.click()
    page.wait_for_url("**/source/effnb/**")
    for _ in everywhere(page):
        assert page.locator("header").is_visible()
    assert page.locator("main > p").get_by_role("link", name="Pruning", exact=True).is_visible()
    page.locator("main > p a", has_text="effnb.").click()
    page.wait_for_url(f"{described.partition('#')[0]}*")


def test_a_page_that_is_not_there_says_where_to_go(book):
    page = book.page(**SCREEN)
    page.goto(f"{book.address}/404.html")
    for _ in everywhere(page):
        assert page.get_by_role("heading", name="This page is not here").is_visible()
        for name in ("map of the chapters", "method index", "glossary"):
            assert page.locator("article").get_by_role("link", name=name).is_visible()
    page.locator("article").get_by_role("link", name="glossary").click()
    page.wait_for_url("**/glossary.html")


def test_code_can_be_copied(book):
    book.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = book.page(**SCREEN)
    page.goto(f"{book.address}/05_inference/1_pruning.html")
    cell = page.locator(".cell_input:visible").first
    # The element itself: while it says "Copied" no button is called "Copy".
    button = cell.get_by_role("button", name="Copy").element_handle()
    for _ in everywhere(page):
        page.wait_for_function("e => e.textContent === 'Copy'", arg=button)
        button.focus()
        page.keyboard.press("Enter")
        page.wait_for_function("e => e.textContent === 'Copied'", arg=button)
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() and copied.strip() in cell.locator("pre").inner_text()


def test_the_home_page_and_the_footer_fit_everywhere(book):
    page = book.page(**SCREEN)
    page.goto(f"{book.address}/index.html")
    for where in everywhere(page):
        assert page.locator(".gallery a:visible").count() > 10, where
        assert page.locator(".book-footer a[rel=license]").is_visible()
        loaded = page.locator(".gallery img").first
        assert loaded.evaluate("image => image.getBoundingClientRect().width") > 100


def test_a_button_says_how_to_run_the_chapter(book):
    page = book.page(**PHONE)
    page.goto(f"{book.address}/00_start_here.html")
    command = page.get_by_text("make lab", exact=True)
    assert not command.is_visible()
    page.get_by_text("Run this chapter").click()
    assert command.is_visible()
    assert page.get_by_text("my/00_start_here.ipynb").is_visible()
    assert page.get_by_text("py .make/setup.py lab", exact=True).is_visible()


def test_the_theme_can_be_chosen_and_pages_lead_on(book):
    page = book.page(**SCREEN)
    page.goto(f"{book.address}/reading.html")
    page.get_by_role("button", name="Color mode").click()
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.get_by_role("link", name=re.compile("next", re.I)).click()
    page.wait_for_url("**/00_start_here.html")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.get_by_role("link", name=re.compile("previous", re.I)).click()
    page.wait_for_url("**/reading.html")


def test_a_printed_chapter_is_sensible(book, tmp_path):
    page = book.page(**SCREEN)
    page.goto(f"{book.address}/00_start_here.html")
    page.emulate_media(media="print", color_scheme="dark")
    shown = {
        name: page.locator(name).locator("visible=true").count()
        for name in (".bd-sidebar-primary", ".bd-header-article", ".prev-next-footer", ".run-it")
    }
    assert set(shown.values()) == {0}, shown
    panel = page.locator("section.panel").first
    assert panel.locator("img:visible").count() == 1
    assert panel.locator("input:visible").count() == 0
    assert "Probability of “Paris”" in visible_numbers(panel)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    wide = page.evaluate(
        "[...document.querySelectorAll('pre')].filter(e => e.offsetParent !== null"
        " && e.scrollWidth > e.clientWidth + 1).length"
    )
    assert wide == 0, "code is cut off at the edge of the paper"
    file = tmp_path / "chapter.pdf"
    page.pdf(path=file, format="A4")
    sheets = len(re.findall(rb"/Type\s*/Page\b", file.read_bytes()))
    assert 6 <= sheets <= 24


def test_it_can_be_read_without_scripts(browser, served):
    context = browser.new_context(java_script_enabled=False, viewport=PHONE)
    page = context.new_page()
    page.goto(f"{served}/00_start_here.html")
    assert page.locator(".katex").first.is_visible()
    panel = page.locator("section.panel").first
    assert panel.locator("img:visible").count() == 1
    assert "Probability of “Paris”" in visible_numbers(panel)
    assert page.locator(".panel input:visible, .panel button:visible").count() == 0
    paper = "getComputedStyle(document.body).backgroundColor"
    for theme, colour in (("light", "rgb(253, 252, 250)"), ("dark", "rgb(21, 24, 28)")):
        page.emulate_media(color_scheme=theme)
        page.wait_for_timeout(500)
        assert page.evaluate(paper) == colour
        for size in SIZES:
            page.set_viewport_size(size)
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
            assert panel.locator("img:visible").count() == 1
    context.close()
