"""Panels on a page without a kernel: the frames that the notebook stores, and a plain control.

A built chapter stores each panel as widgets (see `effnb.lab.panels`). Here they are taken apart and
written as HTML that needs neither the widgets' own scripts, several megabytes of them, nor any
other host: an ordinary `<input>`, which every browser moves by mouse, finger and keyboard, and a
few lines of `book.js` that show the frame it stands on.
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


class NoPanel(ValueError):
    """A widget that is not a stored panel."""


@dataclass(frozen=True)
class StoredPanel:
    """What a notebook stores of a panel.

    Attributes:
        title: Its heading as HTML, or nothing.
        label: Name of the knob that moves.
        positions: Its positions in words.
        start: Which of them is shown at first.
        slider: Whether the knob is a row of numbers; else a list of choices.
        frames: What stands at each position, as HTML: a picture and its numbers.
        caption: Caption as HTML.
        note: What this page cannot move, as HTML.
    """

    title: str
    label: str
    positions: tuple[str, ...]
    start: int
    slider: bool
    frames: tuple[str, ...]
    caption: str
    note: str


def stored_panel(notebook: dict[str, Any], model: str) -> StoredPanel:
    """A panel from the widget state of a built notebook.

    Args:
        notebook: The notebook as read from JSON.
        model: Id of the panel's outermost widget, as the cell's output names it.

    Raises:
        NoPanel: When that widget is not a panel with stored frames.
    """
    state = notebook["metadata"].get("widgets", {}).get(STATE, {}).get("state", {})

    def look(reference: str) -> dict[str, Any]:
        found = state.get(reference.removeprefix("IPY_MODEL_"))
        if found is None:
            raise NoPanel("its state was not stored")
        return found

    def children(of: dict[str, Any]) -> list[dict[str, Any]]:
        return [look(child) for child in of["state"].get("children", ())]

    box = look(model)
    if "effnb-panel" not in box["state"].get("_dom_classes", ()):
        raise NoPanel(f"it is a {box['model_name']}")
    texts, stacks, controls = [], [], []
    for child in children(box):
        if child["model_name"] == "HTMLModel":
            texts.append(_STYLE.sub("", child["state"].get("value", "")))
        elif child["model_name"] == "StackModel":
            stacks.append(child)
        else:
            controls += children(child)
    if len(stacks) != 1 or len(controls) != 1:
        raise NoPanel("it has no stored frames; build the chapter with `make notebooks`")
    knob = controls[0]
    frames = tuple(_LIVE.sub("", child["state"]["value"]) for child in children(stacks[0]))
    positions = tuple(knob["state"]["_options_labels"])
    if len(frames) != len(positions):
        raise NoPanel(f"it has {len(positions)} positions and {len(frames)} frames")
    return StoredPanel(
        title=_inside(texts, "effnb-title"),
        label=knob["state"]["description"],
        positions=positions,
        start=knob["state"]["index"],
        slider=knob["model_name"] == "SelectionSliderModel",
        frames=frames,
        caption=_inside(texts, "effnb-caption"),
        note=_inside(texts, "effnb-note"),
    )


def _inside(texts: list[str], name: str) -> str:
    """What the `<div>` of a class holds, in whichever of these texts it stands."""
    found = (re.search(rf'<div class="{name}">(.*)</div>', text, re.DOTALL) for text in texts)
    return next((match[1].strip() for match in found if match), "")


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
    named = f'aria-labelledby="{name}-title"' if title else f'aria-label="{_quoted(panel.label)}"'
    return (
        f'<section class="panel" id="{name}" {named}>{title}'
        f"{_slider(panel, name) if panel.slider else _choices(panel, name)}"
        f'<div class="panel-frames">{frames}</div>'
        '<p class="panel-said visually-hidden" role="status"></p>'
        f'<p class="panel-caption">{panel.caption}</p>'
        f'<p class="panel-note">{panel.note}</p></section>'
    )


def _slider(panel: StoredPanel, name: str) -> str:
    last = len(panel.positions) - 1
    ticks = "".join(f"<span>{html.escape(word)}</span>" for word in panel.positions)
    return (
        f'<div class="panel-control panel-slider"><label for="{name}-knob">'
        f"{html.escape(panel.label)}</label>"
        # Hidden from screen readers, to whom the slider itself says its value.
        '<span class="panel-value" aria-hidden="true">'
        f"{html.escape(panel.positions[panel.start])}</span>"
        f'<div class="panel-track"><input type="range" id="{name}-knob" min="0" max="{last}" '
        f'step="1" value="{panel.start}" autocomplete="off" '
        f'aria-valuetext="{_quoted(panel.positions[panel.start])}">'
        f'<div class="panel-ticks" aria-hidden="true">{ticks}</div></div></div>'
    )


def _choices(panel: StoredPanel, name: str) -> str:
    buttons = "".join(
        f'<label><input type="radio" name="{name}-knob" value="{i}" autocomplete="off"'
        f"{' checked' if i == panel.start else ''}>{html.escape(word)}</label>"
        for i, word in enumerate(panel.positions)
    )
    return (
        f'<fieldset class="panel-control panel-choices"><legend>{html.escape(panel.label)}</legend>'
        f"{buttons}</fieldset>"
    )


def _quoted(words: str) -> str:
    return html.escape(words, quote=True)
