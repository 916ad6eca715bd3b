"""Numbers of figures and equations in a chapter, each with an anchor that can be linked."""

from __future__ import annotations

import re

_FIGURE = re.compile(
    r"(?P<open><figure[^>]*>)(?P<inside>(?:(?!</?figure).)*?<figcaption[^>]*>)"
    r'|(?P<caption><p class="panel-caption">)(?=[^<]|<(?!/p>))',
    re.DOTALL,
)
_EQUATION = re.compile(r'<div class="math-block">(?!<span class="eqno">)')


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
        if found["open"] and 'class="listing"' in found["open"]:
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
        return (
            f'<div class="math-block" id="equation-{equations}"><a class="eqno" '
            f'href="#equation-{equations}" aria-label="Equation {equations}">({equations})</a>'
        )

    article = _FIGURE.sub(figure, page[start:end])
    return page[:start] + _EQUATION.sub(equation, article) + page[end:]
