"""The controls of a panel: all are native widgets, labelled, and work from the keyboard."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from effnb.lab.panels.knobs import Knob, numeric, say
from effnb.lab.panels.readout import CSS

if TYPE_CHECKING:
    from effnb.lab.panels.interactive import Panel


def piece(value: str) -> widgets.HTML:
    """A piece of HTML as a widget."""
    return widgets.HTML(value, layout=widgets.Layout(width="auto", margin="0"))


def side_by_side(children: Iterable[widgets.Widget], name: str) -> widgets.HBox:
    """Widgets side by side, under a class of the panel's style sheet."""
    made = widgets.HBox(list(children))
    made.add_class(name)
    return made


def stacked(children: Iterable[widgets.Widget], name: str) -> widgets.VBox:
    """Widgets under each other, under a class of the panel's style sheet."""
    made = widgets.VBox(list(children))
    made.add_class(name)
    return made


def heading(panel: Panel, more: str = "") -> widgets.HTML:
    """The style sheet and the title."""
    title = f'<div class="effnb-title">{html.escape(panel.title)}</div>' if panel.title else ""
    return piece(CSS + more + title)


def caption_of(panel: Panel) -> widgets.HTML:
    """The caption under the picture."""
    return piece(f'<div class="effnb-caption">{html.escape(panel.caption)}</div>')


def labelled(panel: Panel, name: str) -> dict[str, Any]:
    """Label and tooltip of a knob's control, and room for its label."""
    given, label = panel.knobs[name], panel.positions.label(name)
    said = (
        f"from {say(given.values[0])} to {say(given.values[-1])}"
        if given.kind != "choice"
        else f"one of {', '.join(map(say, given.values))}"
    )
    return {
        "description": label,
        "tooltip": f"{label}: {said}",
        "style": {"description_width": "auto"},
        "layout": widgets.Layout(width="320px", max_width="100%"),
    }


def choice_control(given: Knob, **options: Any) -> widgets.Widget:
    """A control for a list of values: a slider for numbers, else radio buttons side by side.

    Not a drop-down list: JupyterLab takes the arrow keys away from it. Each radio button is reached
    with Tab and chosen with the space bar.
    """
    if numeric(given.values):
        return widgets.SelectionSlider(continuous_update=False, **options)
    options["layout"] = widgets.Layout(width="auto", max_width="100%")
    return widgets.RadioButtons(orientation="horizontal", **options)


def knob_control(panel: Panel, name: str) -> widgets.Widget:
    """The live control of a knob."""
    given, options = panel.knobs[name], labelled(panel, name)
    if given.kind == "choice":
        named = [(say(value), value) for value in given.values]
        return choice_control(given, options=named, value=given.default, **options)
    make = widgets.IntSlider if given.kind == "integer" else widgets.FloatSlider
    if given.kind == "decimal":
        digits = max(len(say(v).partition(".")[2]) for v in given.values)
        options["readout_format"] = f".{digits}f"
    return make(
        value=given.default,
        min=given.values[0],
        max=given.values[-1],
        step=given.step,
        continuous_update=False,
        **options,
    )


def view_bundle(box: widgets.Widget) -> dict[str, Any]:
    """The part of an output by which front ends find a widget."""
    view = "application/vnd.jupyter.widget-view+json"
    return {view: {"version_major": 2, "version_minor": 0, "model_id": box.model_id}}


def button(description: str, tooltip: str, style: str = "") -> widgets.Button:
    """A button of the size of its words."""
    return widgets.Button(
        description=description,
        tooltip=tooltip,
        button_style=style,
        layout=widgets.Layout(width="auto"),
    )
