"""Names of the package in the code cells of a chapter, as links to the reference."""

from __future__ import annotations

import ast
import html
import re

from effnb.book.site.book import up
from effnb.book.site.reference import Reference

_CELL = re.compile(
    r'(?P<before><div class="cell_input.*?<pre>)(?P<code>.*?)(?P<after></pre>)', re.S
)
_PIECE = re.compile(r"<[^>]*>|[^<]+")


def linked_code(page: str, name: str, reference: Reference) -> str:
    """A chapter's page in which each cell's first use of a public object is a link.

    Args:
        page: The page's HTML.
        name: The chapter, by its path.
        reference: The public objects of the package.
    """
    earlier = ""

    def cell(found: re.Match[str]) -> str:
        nonlocal earlier
        code = html.unescape(re.sub(r"<[^>]+>", "", found["code"]))
        try:
            ast.parse(code)
        except SyntaxError:  # a magic of IPython
            return found[0]
        whole = earlier + code
        places = {
            at - len(earlier): full
            for full, at in reference.uses(whole)
            if at >= len(earlier)
        }  # fmt: skip
        earlier = whole.rstrip("\n") + "\n"
        return found["before"] + _linked(found["code"], places, name, reference) + found["after"]

    return _CELL.sub(cell, page)


def _linked(code: str, places: dict[int, str], page: str, reference: Reference) -> str:
    """Highlighted code, with links where names end."""
    out, at, done = [], 0, set()
    for piece in _PIECE.findall(code):
        if piece.startswith("<"):
            out.append(piece)
            continue
        at += len(html.unescape(piece))
        full = places.get(at)
        if full and full not in done and full.rpartition(".")[2] == piece:
            done.add(full)
            target = html.escape(up(page) + reference.page(full))
            piece = f'<a class="api-link" href="{target}">{piece}</a>'
        out.append(piece)
    return "".join(out)
