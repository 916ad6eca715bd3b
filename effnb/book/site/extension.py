"""What the pages need beyond Sphinx itself: mathematics, links of types, contents.

As an extension this module is called `effnb.book.site.extension`.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.util import logging

from effnb.book.site.bibliography import linked
from effnb.book.site.book import REPOSITORY
from effnb.book.site.katex import render
from effnb.book.site.reference import read_reference

CONTENTS = "contents.json"
"""The file in which `effnb.book.site.sources` leaves the contents of the book."""

LOGGER = logging.getLogger(__name__)


def set_formula(translator: Any, node: nodes.Element, display: bool) -> None:
    """Write a formula to the page; what KaTeX does not understand is a warning."""
    tex = node.astext()
    try:
        done = render(tex, display)
    except ValueError as problem:
        LOGGER.warning("the formula %r cannot be set: %s", tex, problem, location=node)
        done = f"<code>{html.escape(tex)}</code>"
    if display:
        number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
        translator.body.append(f'<div class="math-block">{number}{done}</div>')
    else:
        translator.body.append(f'<span class="math">{done}</span>')
    raise nodes.SkipNode


def tidy_signatures(app: Any, tree: nodes.document) -> None:
    """Shapes in double quotes, as the sources have them; and fields of a class are attributes."""
    for string in tree.findall(addnodes.desc_sig_literal_string):
        text = string.astext()
        if text[:1] == text[-1:] == "'" and '"' not in text:
            string[:] = [nodes.Text(f'"{text[1:-1]}"')]
    for name in tree.findall(nodes.field_name):
        if name.astext() == "Variables":
            name[:] = [nodes.Text("Attributes")]


def resolve_types(app: Any, tree: nodes.document) -> None:
    """Let the names in signatures lead to the objects that they mean where they stand.

    Left alone, Sphinx takes any object of that name, and a `bytes` in a signature would lead to a
    method called `bytes`.
    """
    reference = app.effnb_reference
    for node in list(tree.findall(addnodes.pending_xref)):
        if node.get("refdomain") != "py" or node.get("refexplicit"):
            continue
        module, target = node.get("py:module") or "effnb", node["reftarget"]
        attempts = (f"{module}.{target}", target if target.startswith("effnb.") else "")
        full = next(filter(None, map(reference.find, filter(None, attempts))), None)
        if full is None:
            node.replace_self(node.children)
        else:
            node["reftarget"] = full
            node["reftype"] = "obj"
            node.attributes.pop("refspecific", None)
            node.attributes.pop("py:module", None)
            node.attributes.pop("py:class", None)


def add_contents(app: Any, _page: str, _template: str, context: dict[str, Any], _tree: Any) -> None:
    """Give every page the contents of the book, for its sidebar."""
    if not hasattr(app, "effnb_contents"):
        path = Path(app.srcdir) / CONTENTS
        app.effnb_contents = json.loads(path.read_text(encoding="utf-8"))
    context["book_nav"] = app.effnb_contents
    if "body" in context:
        context["body"] = linked(accessible(context["body"]))


def accessible(body: str) -> str:
    """A page's body, mended where its HTML confuses screen readers."""
    # The label of a fold would hide the words that it shows.
    body = body.replace(' aria-label="Toggle hidden content"', "")
    # A corner that heads nothing is no heading.
    body = re.sub(r"<th[^>]*>(?:<p>)?\s*(?:</p>)?</th>", "<td></td>", body)
    # Parameters on separate lines are a list of definitions without terms.
    return re.sub(
        r'<dt class="sig .*?</dt>',
        lambda found: (
            re.sub(r"<(/?)d[ld]>", r"<\1span>", found[0]).replace(
                "<span>\n<span>", '<span class="parameters">\n<span>'
            )
            if "<dl>" in found[0]
            else found[0]
        ),
        body,
        flags=re.DOTALL,
    )


def setup(app: Any) -> dict[str, Any]:
    """Tell Sphinx about all of it."""
    app.effnb_reference = read_reference(REPOSITORY)
    # The book has its own search: see effnb.book.site.search.
    app.connect("builder-inited", lambda app: setattr(app.builder, "search", False))
    app.connect("doctree-read", resolve_types)
    app.connect("doctree-read", tidy_signatures)
    app.connect("html-page-context", add_contents)
    app.add_html_math_renderer(
        "katex",
        inline_renderers=(lambda translator, node: set_formula(translator, node, False), None),
        block_renderers=(lambda translator, node: set_formula(translator, node, True), None),
    )
    app.add_css_file("katex/katex.min.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
