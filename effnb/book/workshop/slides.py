"""A chapter as slides: one HTML file that needs no network and no kernel, with speaker notes.

Every heading of the chapter begins a slide, and every picture, panel, table or listing has one of
its own. A slide shows formulas, lists and how paragraphs begin; its notes hold the prose in full,
from the same cells. Panels are those of the web page: their sliders move, and they ask for a guess
first. An exercise's notes name its usual wrong answers; no slide shows its solution.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from effnb.book.site.book import REPOSITORY, source
from effnb.book.site.panels import VIEW, NoPanel, panel_html, stored_panel
from effnb.book.workshop import prose
from effnb.book.workshop.practice import wrong_html
from effnb.book.workshop.teaching import Step, Teaching
from effnb.lab.claims import MIME as CLAIMS
from effnb.lab.claims import ledger

ASSETS = REPOSITORY / ".make" / "workshop"
CODE_LINES = 14
"""The longest cell whose code a slide shows."""
VERDICTS = 3
"""So many verdicts on one slide."""
FEW = 2
"""So many sentences, or printed lines, join the picture before them in place of a slide."""
_HEADING = re.compile(r"^(#{1,4}) +(.+?)\s*#*$", re.MULTILINE)
_LISTING = re.compile(r"<figure[^>]*><figcaption[^>]*><code>.*?</figure>", re.DOTALL)
_VERDICT = '<div class="verdict">'
_LEFT_OUT = {"Further reading"}
"""Sections without slides."""


@dataclass
class Slide:
    """One slide.

    Attributes:
        title: Its heading, as Markdown.
        body: What it shows, as HTML.
        notes: What the speaker reads, as HTML.
        kind: "title", "text", "output" or "exercise".
        full: Whether nothing more is to be added.
    """

    title: str
    body: str
    notes: str
    kind: str = "text"
    full: bool = False


@dataclass
class _Deck:
    """The slides made so far, and the prose that belongs to the next one."""

    notebook: dict[str, Any]
    teaching: Teaching
    names: dict[int, str]
    slides: list[Slide] = field(default_factory=list)
    heading: str = ""
    waiting: list[str] = field(default_factory=list)
    panels: int = 0

    def flush(self) -> None:
        """Make a slide of the prose that waits."""
        text = "\n\n".join(self.waiting).strip()
        self.waiting = []
        shown = prose.points(text)
        if not shown:
            return
        body = "".join(prose.markdown(one) for one in shown)
        if len(shown) <= FEW and not any(map(prose.is_heavy, shown)) and self._continues():
            self._add(f'<div class="after">{body}</div>', prose.markdown(text))
        else:
            self.slides.append(Slide(self.heading, body, prose.markdown(text)))

    def _continues(self) -> bool:
        """Whether the last slide shows a picture or a table under the present heading."""
        last = self.slides[-1]
        return last.kind == "output" and last.title == self.heading and not last.full

    def _add(self, body: str, notes: str = "") -> None:
        """Put something short below what the last slide shows, so that it is not a slide alone."""
        last = self.slides[-1]
        last.body += body
        last.notes += notes
        last.full = last.body.count('class="after"') >= FEW

    def markdown(self, text: str, tags: list[str]) -> None:
        """Take a cell of prose."""
        if "hint" in tags:
            if self.slides:
                self.slides[-1].notes += f"<h3>Hint</h3>{prose.markdown(text)}"
            return
        at = 0
        for found in _headings(text):
            self._take(text[at : found.start()])
            self.flush()
            self.heading, at = found[2], found.end()
        self._take(text[at:])

    def _take(self, text: str) -> None:
        if text.strip() and self.heading not in _LEFT_OUT:
            self.waiting.append(text.strip())

    def code(self, number: int, cell: dict[str, Any], tags: list[str]) -> None:
        """Take a cell of code with its outputs."""
        if {"run-time", "solution"} & set(tags) or self.heading in _LEFT_OUT:
            return
        if "exercise" in tags:
            self._exercise(number, cell)
            return
        shown = [one for one in (self._output(o) for o in cell["outputs"]) if one]
        if not shown:
            return
        notes = "\n\n".join(self.waiting).strip()
        lead = ""
        if any(prose.is_heavy(block) for block in prose.blocks(notes)):
            self.flush()  # formulas and lists need room
        elif notes:
            lead = f'<p class="lead">{prose.inline(prose.opening(_last(notes)))}</p>'
        self.waiting = []
        printed = all(one.startswith("<pre") for one in shown)
        code = _code(source(cell)) if printed and "hide-input" not in tags else ""
        said = prose.markdown(notes) if lead else ""
        if printed and not code and not lead and self._continues():
            self._add(f'<div class="after">{"".join(shown)}</div>')
            return
        said += "".join(map(_evidence, cell["outputs"]))
        for part in _parts(shown):
            body = f'{lead}{code}<div class="output">{part}</div>'
            self.slides.append(Slide(self.heading, body, said, "output"))
            lead = code = said = ""

    def _output(self, output: dict[str, Any]) -> str:
        """One output as HTML; a panel whose frames are stored moves."""
        if output["output_type"] == "stream":
            return f"<pre>{html.escape(''.join(output['text']).rstrip())}</pre>"
        data = output.get("data", {})
        if VIEW in data:
            try:
                panel = stored_panel(self.notebook, data[VIEW]["model_id"])
            except NoPanel:
                return prose.unlinked("".join(data.get("text/html", "")))
            self.panels += 1
            return panel_html(panel, f"panel-{self.panels}", lambda content: content)
        if CLAIMS in data:
            return "".join(map(_verdict, _verdicts(data[CLAIMS])))
        if "text/html" in data:
            return prose.unlinked("".join(data["text/html"]))
        return f"<pre>{html.escape(''.join(data.get('text/plain', '')))}</pre>"

    def _exercise(self, number: int, cell: dict[str, Any]) -> None:
        """A slide of an exercise: what is asked, and the stub."""
        asked = "\n\n".join(self.waiting).strip()
        self.waiting = []
        name = self.names.get(number, "")
        practice = self.teaching.practice(name)
        body = prose.markdown(asked) + _code(source(cell), always=True)
        notes = wrong_html(practice) if practice else ""
        self.slides.append(Slide(name or self.heading, body, notes, "exercise"))


def _headings(text: str) -> list[re.Match[str]]:
    """The headings of a text, those in fenced code left out."""
    fenced = [m.span() for m in re.finditer(r"^```.*?^```", text, re.DOTALL | re.MULTILINE)]
    return [m for m in _HEADING.finditer(text) if not any(a <= m.start() < b for a, b in fenced)]


def _parts(shown: list[str]) -> list[str]:
    """What a cell shows, as what is put on one slide each: one listing, or a few verdicts."""
    whole = "".join(shown)
    listings = _LISTING.findall(whole)
    if len(listings) > 1 and not _LISTING.sub("", whole).strip():
        return listings
    verdicts = whole.split(_VERDICT)[1:]
    if len(verdicts) > VERDICTS and whole.startswith(_VERDICT):
        kept = [_VERDICT + one for one in verdicts]
        return ["".join(kept[i : i + VERDICTS]) for i in range(0, len(kept), VERDICTS)]
    return [whole]


def _verdicts(content: Any) -> list[dict[str, Any]]:
    """The verdicts of a claims table, as its output stores them."""
    content = json.loads(content) if isinstance(content, str) else content
    return content["verdicts"]


def _verdict(one: dict[str, Any]) -> str:
    """A verdict in short: the claim, what became of it, and how many parts came out how."""
    counted = Counter(part["outcome"] for part in one["parts"])
    parts = ", ".join(f"{count} {outcome}" for outcome, count in counted.most_common())
    claim = ledger()[one["id"]].claim if one["id"] in ledger() else ""
    told = f"<p>Its parts: {html.escape(parts)}.</p>" if parts else ""
    return (
        f"{_VERDICT}<p><strong>{html.escape(one['id'])}: "
        f"{html.escape(one['verdict'])}</strong></p><p>{html.escape(claim)}</p>{told}</div>"
    )


def _evidence(output: dict[str, Any]) -> str:
    """The whole evidence of a claims table for the notes; nothing for another output."""
    data = output.get("data", {})
    if CLAIMS not in data:
        return ""
    return prose.unlinked("".join(data.get("text/html", "")))


def _last(text: str) -> str:
    """The last paragraph of a text."""
    found = prose.blocks(text)
    return found[-1] if found else ""


def _code(text: str, always: bool = False) -> str:
    """A cell's code for a slide; what only prints the lab's sentences and tables is left out."""
    lines = text.strip().splitlines()
    furniture = re.compile(r"^(?:print\()?\s*(?:from |import |\w+ = |[\w.]*(?:tables|drawings)\.)")
    dull = all(furniture.match(line) or not line.strip() for line in lines)
    if not always and (dull or len(lines) > CODE_LINES):
        return ""
    return f'<pre class="code"><code>{html.escape(text.strip())}</code></pre>'


def plan_html(steps: tuple[Step, ...]) -> str:
    """The plan of a lesson: when each part begins, how long it takes, what happens."""
    rows, begins = [], 0
    for step in steps:
        rows.append(
            f"<tr><td>{begins}</td><td>{step.minutes} min</td>"
            f"<td>{prose.inline(step.does)}</td></tr>"
        )
        begins += step.minutes
    head = '<th scope="col">at</th><th scope="col">takes</th><th scope="col">what happens</th>'
    return (
        f'<table class="plan"><caption>{begins} minutes</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


# ------------------------------------------------------------------------------------ the deck


def slides(notebook: dict[str, Any], teaching: Teaching, names: dict[int, str]) -> list[Slide]:
    """The slides of a built chapter.

    Args:
        notebook: The chapter as read from its `.ipynb`.
        teaching: What its teacher needs.
        names: The exercises' names, by the number of the cell that holds the stub.

    Raises:
        ValueError: When the chapter does not begin with its title.
    """
    first, *rest = notebook["cells"]
    title, _, below = source(first).partition("\n")
    if first["cell_type"] != "markdown" or not title.startswith("# "):
        raise ValueError("the chapter does not begin with its title, `# …`.")
    claim = prose.blocks(below)[:1]
    goals = "".join(f"<li>{prose.inline(goal)}</li>" for goal in teaching.goals)
    body = f"{prose.markdown(claim[0]) if claim else ''}<p>Afterwards you can</p><ul>{goals}</ul>"
    notes = "<h3>Plans</h3>" + "".join(plan_html(steps) for steps in teaching.pacing.values())
    deck = _Deck(notebook, teaching, names)
    deck.slides.append(Slide(title[2:].strip(), body, notes + prose.markdown(below), "title"))
    deck.heading = title[2:].strip()
    for number, cell in enumerate(rest, 1):
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] == "markdown":
            deck.markdown(source(cell), tags)
        elif cell["cell_type"] == "code":
            deck.code(number, cell, tags)
    deck.flush()
    return deck.slides


def deck_html(title: str, made: list[Slide]) -> str:
    """Slides as one HTML file with everything in it: style, fonts, script, pictures."""
    parts = []
    for i, one in enumerate(made):
        heading = prose.inline(one.title)
        level = "h1" if one.kind == "title" else "h2"
        notes = f'<aside class="notes" aria-label="Notes">{one.notes}</aside>' if one.notes else ""
        parts.append(
            f'<section class="slide slide-{one.kind}" id="s{i + 1}" aria-labelledby="h{i + 1}">'
            f'<div class="stage"><{level} id="h{i + 1}">{heading}</{level}>'
            f'<div class="body">{one.body}</div></div>{notes}</section>'
        )
    whole = "".join(parts)
    style = (ASSETS / "slides.css").read_text(encoding="utf-8") + panel_style()
    moving = (prose.STATIC / "book.js").read_text(encoding="utf-8")
    script = (ASSETS / "slides.js").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}: slides</title>"
        f"<style>{prose.katex_style([whole])}\n{style}</style></head>"
        f'<body><main class="deck">{whole}</main>'
        '<p class="place" role="status" aria-live="polite"></p>'
        '<nav class="keys" aria-label="Keys"></nav>'
        f"<script>{moving}</script><script>{script}</script></body></html>\n"
    )


def panel_style() -> str:
    """The rules of the site's sheet that are about panels."""
    sheet = (prose.STATIC / "book.css").read_text(encoding="utf-8")
    _, _, after = sheet.partition("- panels */")
    inside, _, _ = after.partition("\n/* ---")
    return f".visually-hidden {{ position: absolute; left: -9999px; }}\n{inside}"
