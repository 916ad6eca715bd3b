"""What a built page stores of a panel: a few positions of one or two knobs, and plain controls.

The controls and the frames are joined in the browser, so that the page moves with no kernel. A
frame that looks like another, because a knob does nothing there, is stored once.
"""

from __future__ import annotations

import html
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import ipywidgets as widgets
from IPython.display import display

from effnb.lab.figures import captioned
from effnb.lab.panels.controls import (
    caption_of,
    choice_control,
    heading,
    labelled,
    piece,
    side_by_side,
    stacked,
    view_bundle,
)
from effnb.lab.panels.knobs import Knob, match, say
from effnb.lab.panels.positions import Position
from effnb.lab.panels.readout import numbers, sentences

if TYPE_CHECKING:
    from effnb.lab.panels.interactive import Panel

FRAMES = 9
"""How many positions of the main knob a built page stores, unless the panel names them."""

MOST = 24
"""How many frames a built page stores at most."""


def chosen_frames(
    knobs: Mapping[str, Knob],
    main: str,
    frames: Sequence[Hashable] | Mapping[str, Sequence[Hashable] | None] | None,
) -> dict[str, tuple]:
    """The stored positions of the main knob, and of a second one where `frames` names one.

    Raises:
        ValueError: When `frames` names no such knob or position, too many knobs or too many frames.
    """
    named = dict(frames) if isinstance(frames, Mapping) else {main: frames}
    unknown = [name for name in named if name not in knobs]
    if unknown or main not in named or len(named) > 2:
        raise ValueError(
            f"frames names the main knob ({main}) and at most one other of {', '.join(knobs)}."
        )
    found = {}
    for name in (main, *(other for other in named if other != main)):
        given, wanted = knobs[name], named[name]
        if wanted is None:
            wanted = given.spread(FRAMES) if name == main else given.values
        positions = [match(given.values, value) for value in wanted]
        if len(positions) < 2 or not all(positions):
            raise ValueError(f"frames must name at least two positions of the knob {name}.")
        found[name] = tuple(value for (value,) in positions)
    count = 1
    for positions in found.values():
        count *= len(positions)
    if count > MOST:
        raise ValueError(f"frames asks for {count} stored frames; {MOST} are the most.")
    return found


class Frames:
    """The stored frames of a panel, computed when they are made."""

    def __init__(self, panel: Panel) -> None:
        """Compute every frame.

        Raises:
            PanelError: When a position fails.
        """
        self._panel = panel
        self.main, *rest = panel.frames
        self.second = rest[0] if rest else None
        across = panel.frames[self.second] if self.second else (None,)
        self.positions = [
            [panel.checked(self._values(value, other)) for value in panel.frames[self.main]]
            for other in across
        ]
        self.asked: Position | None = None
        if panel.predict is not None:
            self.asked = panel.checked(panel.positions.complete(dict(panel.predict.at)))

    def _values(self, value: Hashable, other: Hashable) -> dict[str, Hashable]:
        values = {**self._panel.defaults, self.main: value}
        return values | ({self.second: other} if self.second else {})

    def display(self) -> None:
        """Show the frames, joined in the browser to their controls."""
        box, shown = self._box()
        panel = self._panel
        question = f"<p><b>{html.escape(panel.predict.question)}</b></p>" if panel.predict else ""
        where = panel.positions.where(shown.values, shown.ignored)
        fallback = (
            question
            + captioned(shown.picture, panel.caption, shown.alt)
            + (
                f"<p>{html.escape(where)}</p>"
                f'<pre style="white-space: pre-wrap">{html.escape(shown.text)}</pre>'
                "<p><em>Run this notebook to turn the knobs.</em></p>"
            )
        )
        display(
            {
                **view_bundle(box),
                "text/html": fallback,
                "text/plain": f"{panel!r}\n{shown.text}",
            },
            raw=True,
        )

    def _box(self) -> tuple[widgets.VBox, Position]:
        panel = self._panel
        home = {name: _home(panel, name) for name in panel.frames}
        stored: dict[str, widgets.HTML] = {}

        def frame(position: Position) -> widgets.HTML:
            made = self._frame(position)
            if made not in stored:
                stored[made] = piece(made)
            return stored[made]

        stacks = [
            widgets.Stack([frame(one) for one in line], selected_index=home[self.main])
            for line in self.positions
        ]
        knobs = {name: self._control(name, home[name]) for name in panel.frames}
        for stack in stacks:
            widgets.jslink((knobs[self.main], "index"), (stack, "selected_index"))
        shown = stacks[0]
        line = self.positions[0]
        if self.second:
            shown = widgets.Stack(stacks, selected_index=home[self.second])
            widgets.jslink((knobs[self.second], "index"), (shown, "selected_index"))
            line = self.positions[home[self.second]]
        note = piece(f'<div class="effnb-note">{html.escape(self.stands_still())}</div>')
        # As in a running panel: in the order in which the knobs were given.
        ordered = [knobs[name] for name in panel.knobs if name in knobs]
        body = [side_by_side(ordered, "effnb-controls"), shown, caption_of(panel), note]
        if panel.predict is not None:
            body = self._locked(body)
        box = stacked([heading(panel), *body], "effnb-panel")
        return box, line[home[self.main]]

    def _locked(self, body: list[widgets.Widget]) -> list[widgets.Widget]:
        """The body behind its question: it comes into sight when a choice is made, or skipped."""
        guess = self._panel.predict
        kind = "choice" if guess.choices else "number"
        options = [*guess.choices] if guess.choices else ["I have written down my guess"]
        answer = guess.verdict(None, self.asked.result).removeprefix("No guess was made.").strip()
        asked = piece(
            f'<div class="effnb-asked" data-kind="{kind}" data-unit="{html.escape(guess.unit)}" '
            f'data-answer="{html.escape(answer)}">Predict first: {html.escape(guess.question)}'
            "</div>"
        )
        field = widgets.RadioButtons(
            options=[*options, "Skip: show the answer"],
            index=None,
            orientation="horizontal",
            layout=widgets.Layout(width="auto", max_width="100%"),
        )
        hidden = widgets.VBox(body)
        said = []
        for option in [*options, None]:
            value = option if guess.choices else None
            words = guess.verdict(value, self.asked.result) if guess.choices else answer
            said.append(piece(f'<div class="effnb-note" role="status">{words}</div>'))
        opened = widgets.Stack(
            [widgets.VBox([words, hidden]) for words in said], selected_index=None
        )
        widgets.jslink((field, "index"), (opened, "selected_index"))
        return [stacked([asked, field], "effnb-question"), opened]

    def _control(self, name: str, home: int) -> widgets.Widget:
        panel = self._panel
        named = [(say(value), i) for i, value in enumerate(panel.frames[name])]
        given = panel.knobs[name]
        return choice_control(given, options=named, index=home, **labelled(panel, name))

    def _frame(self, position: Position) -> str:
        """Picture and numbers, and which knob does nothing there."""
        why = self._panel.positions.why_idle(position)
        note = f'<div class="effnb-note">{html.escape(why)}</div>' if why else ""
        return position.picture.html(position.alt) + numbers(position.text) + note

    def stands_still(self) -> str:
        """What a page without a kernel cannot move, in a sentence or two."""
        panel = self._panel
        label = panel.positions.label
        moves = " and ".join(
            f"{label(name)} among {len(values)} positions" for name, values in panel.frames.items()
        )
        moves = f"This stored page moves {moves}."
        others = {name: v for name, v in panel.defaults.items() if name not in panel.frames}
        if others:
            where = panel.positions.where(others)
            return sentences([moves, f"The other knobs need a running kernel; here {where}."])
        if any(len(panel.knobs[name].values) > len(v) for name, v in panel.frames.items()):
            return sentences([moves, "The positions between them need a running kernel."])
        return moves


def _home(panel: Panel, name: str) -> int:
    """Where a knob's stored positions begin."""
    frames, default = panel.frames[name], panel.knobs[name].default
    return frames.index(default) if default in frames else 0
