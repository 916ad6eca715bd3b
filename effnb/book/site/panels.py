"""Panels on a page without a kernel: the frames that the notebook stores, and plain controls.

A built chapter stores each panel as widgets (see `effnb.lab.panels`). Here they are taken apart and
written as HTML that needs neither the widgets' own scripts, several megabytes of them, nor any
other host: an ordinary `<input>` for each stored knob, which every browser moves by mouse, finger
and keyboard, and a few lines of `book.js` that show the frame for their positions. A question that
the panel asks first is asked here too.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

STATE = "application/vnd.jupyter.widget-state+json"
VIEW = "application/vnd.jupyter.widget-view+json"

_STYLE = re.compile(r"<style>.*?</style>", re.DOTALL)
_LIVE = re.compile(r' role="status" aria-live="\w+" aria-atomic="\w+"')
_ASKED = re.compile(
    r'<div class="effnb-asked" data-kind="(?P<kind>\w+)" data-unit="(?P<unit>[^"]*)" '
    r'data-answer="(?P<answer>[^"]*)">(?P<words>.*)</div>',
    re.DOTALL,
)


class NoPanel(ValueError):
    """A widget that is not a stored panel."""


@dataclass(frozen=True)
class StoredKnob:
    """A knob that moves on the page.

    Attributes:
        label: Its name.
        positions: Its positions in words.
        start: Which of them is shown at first.
        slider: Whether it is a row of numbers; else a list of choices.
    """

    label: str
    positions: tuple[str, ...]
    start: int
    slider: bool


@dataclass(frozen=True)
class StoredQuestion:
    """What the panel asks before it answers; all words are HTML.

    Attributes:
        words: The question.
        choices: What there is to choose from; nothing where a number is asked for.
        unit: Unit of the number.
        answer: The answer, as a sentence; empty where the panel itself is the answer.
    """

    words: str
    choices: tuple[str, ...]
    unit: str
    answer: str


@dataclass(frozen=True)
class StoredPanel:
    """What a notebook stores of a panel.

    Attributes:
        title: Its heading as HTML, or nothing.
        knobs: One knob, or two.
        frames: What the panel shows, as HTML: pictures and their numbers, each once.
        grid: Which frame is shown: for each position of the first knob, in order, one for each
            position of the second.
        caption: Caption as HTML.
        note: What this page cannot move, as HTML.
        question: What is asked first, if anything.
    """

    title: str
    knobs: tuple[StoredKnob, ...]
    frames: tuple[str, ...]
    grid: tuple[int, ...]
    caption: str
    note: str
    question: StoredQuestion | None = None

    @property
    def start(self) -> int:
        """The frame that is shown at first."""
        place = 0
        for knob in self.knobs:
            place = place * len(knob.positions) + knob.start
        return self.grid[place]


class _Widgets:
    """The widget state of a notebook, by reference."""

    def __init__(self, notebook: dict[str, Any]) -> None:
        self._state = notebook["metadata"].get("widgets", {}).get(STATE, {}).get("state", {})

    def look(self, reference: str) -> dict[str, Any]:
        found = self._state.get(reference.removeprefix("IPY_MODEL_"))
        if found is None:
            raise NoPanel("its state was not stored")
        return found

    def children(self, of: dict[str, Any]) -> list[str]:
        return [one.removeprefix("IPY_MODEL_") for one in of["state"].get("children", ())]

    def source(self, target: str) -> str | None:
        """The control that moves a stack in the browser."""
        wanted = [f"IPY_MODEL_{target}", "selected_index"]
        for one in self._state.values():
            if one["model_name"] == "LinkModel" and one["state"].get("target") == wanted:
                return one["state"]["source"][0].removeprefix("IPY_MODEL_")
        return None


def stored_panel(notebook: dict[str, Any], model: str) -> StoredPanel:
    """A panel from the widget state of a built notebook.

    Args:
        notebook: The notebook as read from JSON.
        model: Id of the panel's outermost widget, as the cell's output names it.

    Raises:
        NoPanel: When that widget is not a panel with stored frames.
    """
    widgets = _Widgets(notebook)
    box = widgets.look(model)
    if "effnb-panel" not in box["state"].get("_dom_classes", ()):
        raise NoPanel(f"it is a {box['model_name']}")
    parts, question = widgets.children(box), None
    for part in parts:
        if "effnb-question" in widgets.look(part)["state"].get("_dom_classes", ()):
            question = _question(widgets, part)
    if question is not None:
        # The body is the same behind every choice: that of the first.
        lock = next(p for p in parts if widgets.look(p)["model_name"] == "StackModel")
        opened = widgets.children(widgets.look(lock))[0]
        body = widgets.children(widgets.look(opened))[1]
        parts = [parts[0], *widgets.children(widgets.look(body))]
    texts, stacks, controls = [], [], []
    for part in parts:
        found = widgets.look(part)
        if found["model_name"] == "HTMLModel":
            texts.append(_STYLE.sub("", found["state"].get("value", "")))
        elif found["model_name"] == "StackModel":
            stacks.append(part)
        else:
            controls += widgets.children(found)
    if len(stacks) != 1 or not 1 <= len(controls) <= 2:
        raise NoPanel("it has no stored frames; build the chapter with `make notebooks`")
    knobs = tuple(_knob(widgets.look(control)) for control in controls)
    frames, grid = _frames(widgets, stacks[0], controls, knobs)
    return StoredPanel(
        title=_inside(texts, "effnb-title"),
        knobs=knobs,
        frames=frames,
        grid=grid,
        caption=_inside(texts, "effnb-caption"),
        note=_inside(texts, "effnb-note"),
        question=question,
    )


def _knob(control: dict[str, Any]) -> StoredKnob:
    state = control["state"]
    return StoredKnob(
        state["description"],
        tuple(state["_options_labels"]),
        state["index"],
        control["model_name"] == "SelectionSliderModel",
    )


def _frames(
    widgets: _Widgets, stack: str, controls: list[str], knobs: tuple[StoredKnob, ...]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The different frames, and which of them belongs to which positions."""
    lines = [widgets.children(widgets.look(stack))]
    turned = False
    if len(controls) == 2:
        # The outer stack is moved by one of the two knobs, the inner ones by the other.
        turned = widgets.source(stack) == controls[1]
        lines = [widgets.children(widgets.look(inner)) for inner in lines[0]]
        if turned:
            lines = [list(column) for column in zip(*lines, strict=True)]
    wanted = [len(knob.positions) for knob in knobs]
    found = [len(lines), len(lines[0])] if len(controls) == 2 else [len(lines[0])]
    if wanted != found:
        raise NoPanel(
            f"it has {' × '.join(map(str, wanted))} positions and {' × '.join(map(str, found))} "
            "frames"
        )
    names = list(dict.fromkeys(name for line in lines for name in line))
    frames = tuple(_LIVE.sub("", widgets.look(name)["state"]["value"]) for name in names)
    return frames, tuple(names.index(name) for line in lines for name in line)


def _question(widgets: _Widgets, box: str) -> StoredQuestion:
    asked, field = (widgets.look(child) for child in widgets.children(widgets.look(box)))
    found = _ASKED.search(asked["state"]["value"])
    if not found:
        raise NoPanel("its question cannot be read")
    options = tuple(html.escape(word) for word in field["state"]["_options_labels"][:-1])
    return StoredQuestion(
        found["words"],
        options if found["kind"] == "choice" else (),
        found["unit"],
        found["answer"],
    )


def _inside(texts: list[str], name: str) -> str:
    """What the `<div>` of a class holds, in whichever of these texts it is."""
    found = (re.search(rf'<div class="{name}">(.*)</div>', text, re.DOTALL) for text in texts)
    return next((match[1].strip() for match in found if match), "")


# --------------------------------------------------------------------------------- as HTML


def panel_html(panel: StoredPanel, name: str, pictures: Callable[[str], str]) -> str:
    """A panel as HTML for a page.

    Args:
        panel: The panel.
        name: An id that no other panel of the page has.
        pictures: Replaces the pictures inside of a piece of HTML by files.
    """
    frames = "".join(
        f'<div class="panel-frame"{"" if i == panel.start else " hidden"}>{pictures(frame)}</div>'
        for i, frame in enumerate(panel.frames)
    )
    title = f'<p class="panel-title" id="{name}-title">{panel.title}</p>' if panel.title else ""
    label = _quoted(panel.knobs[0].label)
    named = f'aria-labelledby="{name}-title"' if title else f'aria-label="{label}"'
    controls = "".join(
        (_slider if knob.slider else _choices)(knob, f"{name}-knob{i or ''}")
        for i, knob in enumerate(panel.knobs)
    )
    question = _asked(panel.question, name) if panel.question else ""
    return (
        f'<section class="panel" id="{name}" {named}>{title}{question}'
        f'<div class="panel-body">{controls}'
        f'<div class="panel-frames" data-grid="{" ".join(map(str, panel.grid))}">{frames}</div>'
        '<p class="panel-said visually-hidden" role="status"></p>'
        f'<p class="panel-caption">{panel.caption}</p>'
        f'<p class="panel-note">{panel.note}</p></div></section>'
    )


def _asked(question: StoredQuestion, name: str) -> str:
    """The question; without scripts it is only read, and the panel is open."""
    if question.choices:
        field = "".join(
            f'<label><input type="radio" name="{name}-guess" value="{i}" autocomplete="off">'
            f"{word}</label>"
            for i, word in enumerate(question.choices)
        )
    else:
        field = (
            '<label>Your guess <input type="text" inputmode="decimal" size="8" autocomplete="off">'
            f" {question.unit}</label>"
        )
    return (
        f'<form class="panel-question" data-answer="{question.answer}" '
        f'data-unit="{question.unit}"><fieldset><legend>{question.words}</legend>'
        f'<div class="panel-guess">{field}</div>'
        '<button type="submit" class="panel-commit">Commit my guess</button> '
        '<button type="button" class="panel-skip">Skip</button></fieldset>'
        '<p class="panel-verdict" role="status"></p></form>'
    )


def _slider(knob: StoredKnob, name: str) -> str:
    last = len(knob.positions) - 1
    ticks = "".join(f"<span>{html.escape(word)}</span>" for word in knob.positions)
    return (
        f'<div class="panel-control panel-slider"><label for="{name}">'
        f"{html.escape(knob.label)}</label>"
        # Hidden from screen readers, to whom the slider itself says its value.
        '<span class="panel-value" aria-hidden="true">'
        f"{html.escape(knob.positions[knob.start])}</span>"
        f'<div class="panel-track"><input type="range" id="{name}" min="0" max="{last}" '
        f'step="1" value="{knob.start}" autocomplete="off" '
        f'aria-valuetext="{_quoted(knob.positions[knob.start])}">'
        f'<div class="panel-ticks" aria-hidden="true">{ticks}</div></div></div>'
    )


def _choices(knob: StoredKnob, name: str) -> str:
    buttons = "".join(
        f'<label><input type="radio" name="{name}" value="{i}" autocomplete="off"'
        f"{' checked' if i == knob.start else ''}>{html.escape(word)}</label>"
        for i, word in enumerate(knob.positions)
    )
    return (
        f'<fieldset class="panel-control panel-choices"><legend>{html.escape(knob.label)}</legend>'
        f"{buttons}</fieldset>"
    )


def _quoted(words: str) -> str:
    return html.escape(words, quote=True)
