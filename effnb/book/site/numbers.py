"""Numbers of figures and equations in a chapter, each with an anchor that can be linked."""

from __future__ import annotations

import re

_FIGURE = re.compile(
    r"(?P<open><figure[^>]*>)(?P<inside>(?:(?!</?figure).)*?<figcaption[^>]*>)"
    r'|(?P<caption><p class="panel-caption">)(?=[^<]|<(?!/p>))',
    re.DOTALL,
)
_EQUATION = re.compile(
    r'<div class="math-block">(?!<span class="eqno">)(?P<set>.*?</div>)?', re.DOTALL
)


def numbered(page: str) -> str:
    """A chapter's page whose figures, panels and displayed equations are numbered.

    A listing is no figure, and neither is a panel without a caption.

    Args:
        page: The page's HTML.
    """
    start, end = page.find("<article"), page.find("</article>")
    if start < 0:
        return page
    figures = equations = 0

    def figure(found: re.Match[str]) -> str:
        nonlocal figures
        if found["open"] and "<img" not in found["inside"]:  # code has a caption, too
            return found[0]
        figures += 1
        number = (
            f'<a class="number" id="figure-{figures}" href="#figure-{figures}">'
            f"Figure {figures}.</a> "
        )
        return found[0] + number

    def equation(found: re.Match[str]) -> str:
        nonlocal equations
        equations += 1
        if re.search(r'class="(?:katex-)?tag"', found["set"] or ""):  # it has a name of its own
            return found[0].replace(">", f' id="equation-{equations}">', 1)
        return (
            f'<div class="math-block" id="equation-{equations}"><a class="eqno" '
            f'href="#equation-{equations}" aria-label="Equation {equations}">({equations})</a>'
            f"{found['set'] or ''}"
        )

    article = _FIGURE.sub(figure, page[start:end])
    return page[:start] + _EQUATION.sub(equation, article) + page[end:]


_PLACE = re.compile(
    r"\b(?:the (?P<first>first|second) (?P<kind>picture|panel)|the (?P<top>panel) at the top"
    r"|the (?:picture|panel) (?P<side>above|below)|the next (?P<next>picture|panel)"
    r"|the (?P<half>left|right) picture"
    r"|the picture of (?P<about>\w+))\b(?!<)",
    re.IGNORECASE,
)
_MARK = re.compile(r'<a class="number" id="figure-(\d+)"[^>]*>[^<]*</a>')
_TOKEN = re.compile(r"(<[^>]+>)")
_PROSE = ("p", "li")


def referred(page: str) -> str:
    """A numbered page in which "the first picture" and the like are followed by "(Figure 1)".

    Only words in paragraphs and lists are looked at, never captions, code or what cells print.

    Args:
        page: The page's HTML, numbered.
    """
    start, end = page.find("<article"), page.find("</article>")
    if start < 0:
        return page
    article = page[start:end]
    figures = [
        (at.start(), int(at[1]), _is_panel(article, at.start()), _caption(article, at.end()))
        for at in _MARK.finditer(article)
    ]
    out, stack, at, skipping = [], [], 0, 0
    for piece in _TOKEN.split(article):
        here, at = at, at + len(piece)
        if piece.startswith("</"):
            tag = piece[2:-1].strip()
            while stack and stack.pop()[0] != tag:
                pass
        elif piece.startswith("<") and not _single(piece):
            stack.append((re.match(r"<([\w-]+)", piece)[1], bool(_NO_PROSE.search(piece))))
        elif not piece.startswith("<") and piece:
            skipping = any(skip for _, skip in stack)
            if not skipping and any(tag in _PROSE for tag, _ in stack):
                piece = _PLACE.sub(lambda found, here=here: _refer(found, figures, here), piece)
        out.append(piece)
    return page[:start] + "".join(out) + page[end:]


_NO_PROSE = re.compile(
    r'<(?:a|code|pre|figure|table|form|h\d|summary|details|aside|section class="(?:panel|claim))\b'
    r'|class="[^"]*(?:cell_output|cell_input|katex|chapter-bar|term-means|math-block)'
)


def _single(piece: str) -> bool:
    return piece.endswith("/>") or bool(
        re.match(r"<(?:img|br|input|hr|meta|link|wbr|source|col|!)", piece)
    )


def _is_panel(article: str, at: int) -> bool:
    return article.rfind('class="panel-caption"', 0, at) > article.rfind("<figcaption", 0, at)


def _caption(article: str, at: int) -> str:
    return re.sub(r"<[^>]+>", "", article[at : at + 600].partition("</p>")[0]).lower()


def _refer(found: re.Match[str], figures: list[tuple[int, int, bool, str]], here: int) -> str:
    """The words with the number of the figure that they mean; alone where none fits."""
    wanted = None
    if found["first"] or found["top"]:
        kind = (found["kind"] or "panel").lower()
        fitting = [n for _, n, panel, _ in figures if panel == (kind == "panel")]
        place = 1 if (found["first"] or "").lower() == "second" else 0
        wanted = fitting[place] if len(fitting) > place else None
    elif found["about"]:
        word = found["about"].lower()
        wanted = next((n for _, n, _, said in figures if word in said), None)
    else:
        said = found["side"] or found["next"] or "above"
        later = said.lower() != "above"
        if later:
            wanted = next((n for where, n, _, _ in figures if where > here), None)
        else:
            wanted = next((n for where, n, _, _ in reversed(figures) if where < here), None)
    if wanted is None:
        return found[0]
    return f'{found[0]} (<a class="figure-link" href="#figure-{wanted}">Figure {wanted}</a>)'
