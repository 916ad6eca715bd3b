"""Markdown of the chapters as HTML for pages without a network, and what of it a slide shows.

Mathematics is set by KaTeX while the pages are made, as on the site; the fonts that a page needs
are written into it.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable
from functools import cache

from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

from effnb.book.equations import ANCHOR
from effnb.book.site.book import REPOSITORY
from effnb.book.site.katex import render

STATIC = REPOSITORY / ".make" / "site" / "static"
FONTS = {
    "Main-Regular": r'class="katex"',
    "Main-Italic": r"\b(?:mathit|textit)\b",
    "Main-Bold": r"\b(?:mathbf|textbf)\b",
    "Main-BoldItalic": r"\bboldsymbol\b",
    "Math-Italic": r"\b(?:mathnormal|mathit)\b",
    "Math-BoldItalic": r"\bboldsymbol\b",
    "AMS-Regular": r"\b(?:amsrm|mathbb)\b",
    "Caligraphic-Regular": r"\bmathcal\b",
    "Caligraphic-Bold": r"\bmathbfcal\b",
    "Fraktur-Regular": r"\bmathfrak\b",
    "SansSerif-Regular": r"\b(?:mathsf|textsf)\b",
    "Script-Regular": r"\bmathscr\b",
    "Typewriter-Regular": r"\b(?:mathtt|texttt)\b",
    "Size1-Regular": r"\b(?:size1|small-op|delimsizing|delimsizinginner)\b",
    "Size2-Regular": r"\b(?:size2|large-op|delimsizing)\b",
    "Size3-Regular": r"\b(?:size3|delimsizing)\b",
    "Size4-Regular": r"\b(?:size4|delim-size4|delimsizing)\b",
}
"""Fonts of KaTeX, each with the pattern of the classes that need it."""

_FACE = re.compile(r"@font-face\{[^}]*?url\(fonts/KaTeX_(?P<name>[\w-]+)\.woff2\)[^}]*\}")
_HIDDEN = re.compile(r"\$\$.*?\$\$|\$[^$\n]+\$|`[^`\n]+`|\[[^\]]*\]\([^)]*\)", re.DOTALL)
_END = re.compile(r"(?<=[.!?])(?:\*\*|”|\))?\s+(?=[“(*`$\x00A-Z0-9])")
_ABBREVIATED = re.compile(r"(?:\bet al|\be\.g|\bi\.e|\bvs|\bFig|\bNo|\bcf|\b[A-Z])\.$")


@cache
def _parser() -> MarkdownIt:
    def formula(tex: str, about: dict) -> str:
        return render(tex.strip(), bool(about.get("display_mode")))

    return MarkdownIt("commonmark", {"html": True}).enable("table").use(
        dollarmath_plugin, allow_space=False, allow_digits=False, renderer=formula
    )  # fmt: skip


def markdown(text: str) -> str:
    """Markdown as HTML; links that lead to other files of the repository become plain words.

    Raises:
        ValueError: When KaTeX does not understand a formula.
    """
    return _parser().render(_without_links(text))


def inline(text: str) -> str:
    """One line of Markdown as HTML, without a paragraph around it."""
    return _parser().renderInline(_without_links(text))


def _without_links(text: str) -> str:
    """The text without links into the repository, which a page by itself cannot follow."""
    text = ANCHOR.sub("", text)
    return re.sub(r"(?<!!)\[([^\[\]]+)\]\((?![a-z]+:)[^()\s]+\)", r"\1", text)


def unlinked(content: str) -> str:
    """HTML without links into the repository, which lead nowhere from a page by itself."""
    return re.sub(r'<a href="(?![a-z]+:|#)[^"]*"[^>]*>(.*?)</a>', r"\1", content, flags=re.DOTALL)


# ------------------------------------------------------------------------------- what is shown


def blocks(text: str) -> list[str]:
    """The blocks of a text: paragraphs, lists, formulas, tables, fenced code and HTML."""
    found, open_block, fence = [], [], ""
    for line in text.splitlines():
        bare = line.strip()
        if fence:
            open_block.append(line)
            closed = bare.endswith(fence) if fence == "$$" else bare == fence
            if closed or (fence == "</details>" and fence in bare):
                fence = ""
            continue
        if not bare:
            if open_block:
                found.append("\n".join(open_block))
            open_block = []
            continue
        opens = next((f for f in ("```", "$$") if bare.startswith(f)), "")
        if opens == "$$" and len(bare) > 4 and bare.endswith("$$"):
            opens = ""
        if bare.startswith("<details"):
            opens = "" if "</details>" in bare else "</details>"
        fence = opens
        open_block.append(line)
    if open_block:
        found.append("\n".join(open_block))
    return found


def first_sentence(paragraph: str) -> str:
    """The first sentence of a paragraph of Markdown; stops inside of formulas do not end it."""
    kept: list[str] = []

    def hide(match: re.Match[str]) -> str:
        kept.append(match[0])
        return "\x00" * len(match[0])

    flat = " ".join(paragraph.split())
    masked = _HIDDEN.sub(hide, flat)
    for end in _END.finditer(masked):
        before = masked[: end.start()]
        if not _ABBREVIATED.search(before):
            cut = flat[: end.end()].rstrip()
            return cut + "**" if cut.count("**") % 2 else cut
    return flat


def opening(paragraph: str) -> str:
    """How a paragraph begins: its first sentence, and the next one where that is a word or two."""
    first = first_sentence(paragraph)
    rest = " ".join(paragraph.split())[len(first) :].strip()
    return f"{first} {first_sentence(rest)}" if rest and len(first.split()) <= 3 else first


def points(text: str, most: int = 6) -> list[str]:
    """What a slide shows of a text, as Markdown: formulas and lists, and how paragraphs begin.

    Args:
        text: Markdown without headings.
        most: So many blocks at most; formulas and lists come before paragraphs.
    """
    found = [one for one in blocks(text) if not one.lstrip().startswith("<details")]
    heavy = [i for i, one in enumerate(found) if is_heavy(one)]
    light = [i for i, one in enumerate(found) if not is_heavy(one)]
    chosen = sorted([*heavy[:most], *light[: max(0, most - len(heavy))]])
    return [found[i] if i in heavy else opening(found[i]) for i in chosen]


def is_heavy(block: str) -> bool:
    """Whether a block is shown as a whole: a displayed formula, a list, a table, code."""
    bare = block.lstrip()
    return bare.startswith(("$$", "- ", "* ", "1. ", "|", "```")) or bare.endswith("$$")


# --------------------------------------------------------------------------------------- fonts


def katex_style(pages: Iterable[str]) -> str:
    """The style of KaTeX with the fonts that some pages need written into it; none without any."""
    text = "\n".join(pages)
    if 'class="katex' not in text:
        return ""
    classes = " ".join(re.findall(r'class="[^"]*"', text))
    needed = {name for name, sign in FONTS.items() if re.search(sign, classes)}
    style = (STATIC / "katex" / "katex.min.css").read_text(encoding="utf-8")

    def face(match: re.Match[str]) -> str:
        if match["name"] not in needed:
            return ""
        data = (STATIC / "katex" / "fonts" / f"KaTeX_{match['name']}.woff2").read_bytes()
        packed = base64.b64encode(data).decode()
        return re.sub(
            r"src:[^;}]*", f'src:url(data:font/woff2;base64,{packed}) format("woff2")', match[0]
        )

    return _FACE.sub(face, style)


def escaped(words: str) -> str:
    """Words for HTML."""
    return html.escape(words, quote=True)
