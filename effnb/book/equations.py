r"""Sentences that refer to an equation by its number, the same in the notebook and on its page.

An author marks the equation, with its number among all displayed equations of the chapter, or with
a name, and links to it by that number:

    … the grid has the step
    <a id="equation-1"></a>

    $$s = \frac{\max - \min}{2^b - 1}. \tag{1}$$

    A wide range makes the step of [equation 1](#equation-1) large.

A notebook then shows the numbers of those equations alone that the text speaks of, and a click
leads to them. A page numbers every equation by itself. `problems` finds a number that is no longer
right and a reference that leads nowhere; the build stops at either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

ANCHOR = re.compile(r'\n?<a id="equation-(\d+)"></a>')
REFERENCE = re.compile(r"\[([^\[\]]+)\]\(#equation-(\d+)\)")
_CODE = re.compile(r"^```.*?^```[^\n]*$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_DISPLAYED = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
_TAG = re.compile(r"\s*\\tag\{([^{}]*)\}")


@dataclass(frozen=True)
class Equation:
    """A displayed equation of a chapter.

    Attributes:
        tex: Its formula, without the number or name that it bears.
        tag: That number or name; empty when it bears none.
        anchor: The number of the anchor just before it; 0 when there is none.
    """

    tex: str
    tag: str
    anchor: int


def displayed(texts: Iterable[str]) -> list[Equation]:
    """The displayed equations of a chapter's cells of Markdown, in order."""
    found = []
    for text in texts:
        bare = _CODE.sub("", text)
        for one in _DISPLAYED.finditer(bare):
            tag = _TAG.search(one[1])
            before = re.search(ANCHOR.pattern + r"\s*\Z", bare[: one.start()])
            tex = " ".join(_TAG.sub("", one[1]).split())
            found.append(Equation(tex, tag[1] if tag else "", int(before[1]) if before else 0))
    return found


def problems(texts: list[str]) -> Iterator[str]:
    """What is wrong with the numbers of equations in cells of Markdown, as sentences."""
    equations = displayed(texts)
    for number, one in enumerate(equations, 1):
        if one.tag.isdigit() and int(one.tag) != number:
            yield f"equation {number} says \\tag{{{one.tag}}}: its number has changed."
        if one.anchor not in (0, number):
            yield f"the anchor equation-{one.anchor} lies before equation {number}."
        if one.anchor and not one.tag:
            yield f"equation {number} has an anchor and shows no number: add \\tag{{{number}}}."
    bare = [_CODE.sub("", text) for text in texts]
    anchors = [int(found[1]) for text in bare for found in ANCHOR.finditer(text)]
    placed = [one.anchor for one in equations if one.anchor]
    for lost in sorted(set(anchors) - set(placed)):
        yield f"the anchor equation-{lost} lies before no equation."
    for words, said in (found.groups() for text in bare for found in REFERENCE.finditer(text)):
        number = int(said)
        if number not in placed:
            yield f"“{words}” leads to equation {number}, which has no anchor."
        elif not _means(words, number, equations[number - 1].tag):
            yield f"“{words}” leads to equation {number}, and says neither number nor name of it."


def _means(words: str, number: int, tag: str) -> bool:
    """Whether a reference names the equation that it leads to."""
    return tag in words if not tag.isdigit() else re.search(rf"\b{number}\b", words) is not None


def for_page(text: str) -> str:
    """Markdown for a page that numbers its equations itself: without anchors and numbers of ours.

    References become HTML, because the page's anchors are made when it is finished.
    """
    text = re.sub(r"\s*\\tag\{\d+\}", "", ANCHOR.sub("", text))
    return REFERENCE.sub(r'<a class="equation-link" href="#equation-\2">\1</a>', text)
