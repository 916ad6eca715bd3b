"""The live widgets of a panel, and the plain copy of them that a saved notebook keeps."""

from __future__ import annotations

import contextvars
import html
import threading
import time
from typing import TYPE_CHECKING

from IPython.display import display

from effnb.lab.figures import Picture, blank
from effnb.lab.panels.controls import (
    button,
    caption_of,
    heading,
    knob_control,
    piece,
    side_by_side,
    stacked,
    view_bundle,
)
from effnb.lab.panels.knobs import Values
from effnb.lab.panels.positions import Position
from effnb.lab.panels.question import Question
from effnb.lab.panels.readout import CSS, as_csv, as_table, compared, csv_link, numbers, pairs
from effnb.lab.panels.saved import SAVED, hidden_while_live

if TYPE_CHECKING:
    from effnb.lab.panels.interactive import Panel

PATIENCE = 1.0
"""Seconds after which a panel says that it is still at work."""

_DEAD = (
    '<div class="effnb-dead" role="alert">The kernel behind this panel has stopped, so its knobs '
    "no longer move. Below is what it showed last; run the cell again to go on.</div>"
)


class Busy:
    """Tells the page that work goes on, once it has gone on for a second."""

    def __init__(self, panel: Panel, values: Values) -> None:
        """Begin with `with`."""
        self._panel, self._values = panel, values
        self._started = time.monotonic()
        self._over = threading.Event()

    def __enter__(self) -> None:
        watch = contextvars.copy_context().run
        threading.Thread(target=watch, args=(self._watch,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(PATIENCE):
            with self._panel._lock:
                if self._panel._view is not None and not self._over.is_set():
                    seconds = round(time.monotonic() - self._started)
                    where = self._panel.positions.where(self._values)
                    self._panel._view.progress(f"Computing {where} … {seconds} s")


class View:
    """The live widgets of a panel. Only the holder of the panel's lock changes them."""

    def __init__(self, panel: Panel) -> None:
        """Make the widgets; nothing is displayed yet."""
        self._panel = panel
        self.controls = {name: knob_control(panel, name) for name in panel.knobs}
        # An empty card keeps the page from jumping when the first picture comes.
        self.shown = piece(blank(panel.positions.work.figsize).html("Not computed yet."))
        self.idle, self.status, self.visited = (piece("") for _ in range(3))
        self.pin, self.reset = (button(words, tip) for words, tip in _BUTTONS)
        self.pin.on_click(lambda _: panel.pin())
        self.reset.on_click(lambda _: panel.reset())
        self._body = (
            side_by_side(self.controls.values(), "effnb-controls"),
            self.idle,
            self.shown,
            caption_of(panel),
            self.status,
            side_by_side([self.pin, self.reset], "effnb-row"),
            self.visited,
        )
        self.question = Question(panel.predict, self._unlock) if panel.predict else None
        self.box = stacked([], "effnb-panel")
        self.box.add_class("effnb-live")
        saved = f"effnb-saved-{self.box.model_id}"
        self._saved_class, self._saved, self._saved_html = saved, False, ""
        self._head = heading(panel, hidden_while_live(saved))
        self._dead = piece(_DEAD)
        self._said: tuple[Position, Position | None, Picture | None] | None = None
        self._following = True
        for control in self.controls.values():
            control.observe(self._turned, names="value")
        self._arrange()

    def _arrange(self) -> None:
        """Put the widgets into the box; a locked panel has its question and no answer."""
        asked = [self.question.box] if self.question else []
        rest = [self.status] if self.locked else self._body
        self.box.children = (self._head, self._dead, *asked, *rest)

    @property
    def locked(self) -> bool:
        """Whether the panel waits for a guess."""
        return self.question is not None and not self.question.done

    def _unlock(self) -> None:
        with self._panel._lock:
            self._arrange()
            self._settle_question()
            self.save()
        self._panel.move(**self._panel.predict.at)

    def _settle_question(self) -> None:
        """Say guess and answer, once the position that the question is about has been computed."""
        panel = self._panel
        if self.question is None or self.locked or self.question.settled or self._said is None:
            return
        position = self._said[0]
        asked = panel.positions.complete(dict(panel.predict.at))
        if panel.positions.key(asked) == panel.positions.key(position.values):
            self.question.settle(position.result)

    def values(self) -> Values:
        """Where the knobs stand; a slider's decimals are snapped to the knob's positions."""
        found = {}
        for name, control in self.controls.items():
            given = self._panel.knobs[name]
            found[name] = control.value
            if given.kind == "decimal":
                found[name] = min(given.values, key=lambda v: abs(v - control.value))
        return found

    def turn(self, values: Values) -> None:
        """Set the controls without asking for anything."""
        self._following = False
        try:
            for name, value in values.items():
                self.controls[name].value = value
        finally:
            self._following = True

    def _turned(self, _change: object) -> None:
        if self._following:
            self._panel.ask(self.values())

    # ---------------------------------------------------------------------------- on the page

    def show(self, position: Position, pinned: Position | None, overlaid: Picture | None) -> None:
        """Show a position, beside the pinned one where there is one."""
        panel = self._panel
        self._said = (position, pinned, overlaid)
        self._settle_question()
        self.shown.value = self._picture_and_numbers(live=True)
        self.status.value = ""
        self.box.remove_class("effnb-stale")
        why = panel.positions.why_idle(position)
        self.idle.value = f'<div class="effnb-note">{html.escape(why)}</div>' if why else ""
        for name, control in self.controls.items():
            control.disabled = name in position.ignored
            (control.add_class if control.disabled else control.remove_class)("effnb-idle")
        self.pin.description = "Unpin" if pinned else "Pin this position"
        rows = list(panel.visited.values())
        count = "1 visited position" if len(rows) == 1 else f"{len(rows)} visited positions"
        self.visited.value = (
            f'<details class="effnb-visited"><summary>{count}</summary>'
            f"{as_table(rows, 'Visited positions')}"
            f"{csv_link(as_csv(rows), panel.title or panel.caption[:40])}</details>"
        )
        if self._saved:
            self.save()

    def fail(self, sentence: str) -> None:
        """Say that a position fails; picture and numbers stay those of the last one."""
        self.box.add_class("effnb-stale")
        self.status.value = f'<div class="effnb-error" role="alert">{html.escape(sentence)}</div>'

    def progress(self, sentence: str) -> None:
        """Say that work goes on."""
        self.box.add_class("effnb-stale")
        # Not a live region: once a second would talk over everything else.
        self.status.value = f'<div class="effnb-busy"><i></i>{html.escape(sentence)}</div>'

    def _picture_and_numbers(self, live: bool) -> str:
        """Picture and numbers as one piece of HTML, so that both change at the same moment.

        The widget called Image would be the obvious choice, but it carries no alternative text.
        """
        position, pinned, overlaid = self._said
        made = (overlaid or position.picture).html(position.alt) + numbers(position.text)
        where = self._panel.positions.where(position.values, position.ignored)
        if live:  # in sight when the controls are gone
            made = f'<div class="effnb-where">{html.escape(where)}</div>{made}'
        else:
            made = made.replace(' role="status" aria-live="polite" aria-atomic="true"', "")
        if pinned is None:
            return made
        where = self._panel.positions.where(pinned.values, pinned.ignored)
        said = f"<b>Pinned:</b> {html.escape(where)}"
        if pinned is position:
            return f'{made}<div class="effnb-pinned">{said}. Turn a knob to compare with it.</div>'
        table = compared(pairs(position.text), pairs(pinned.text), where)
        picture = "" if overlaid else pinned.picture.html(f"Pinned: {pinned.alt}")
        return f'{made}<div class="effnb-pinned">{said}{table}{picture}</div>'

    # -------------------------------------------------------------------- in the saved notebook

    def display(self) -> None:
        """Show the widgets where the cell shows its outputs."""
        note = "The panel as it was when the notebook was saved; run this cell to turn its knobs."
        self._saved = False
        display({**view_bundle(self.box), "text/plain": note}, raw=True)

    def save(self) -> None:
        """Put a plain copy of the panel beside its widgets, or bring the copy up to date."""
        made, plain = self._plain()
        if self._saved and made == self._saved_html:
            return
        display(
            {"text/html": made, "text/plain": plain},
            raw=True,
            display_id=self._saved_class,
            **({"update": True} if self._saved else {}),
        )
        self._saved, self._saved_html = True, made

    def _plain(self) -> tuple[str, str]:
        """The copy as HTML, and as text."""
        panel = self._panel
        parts, lines = [], [repr(panel)]
        if panel.title:
            parts.append(f'<div class="effnb-title">{html.escape(panel.title)}</div>')
        if self.question:
            parts.append(self.question.html())
            lines.append(self.question.plain())
        if self._said is None:
            parts.append("<p>Not computed yet.</p>")
        elif not self.locked:
            position = self._said[0]
            where = panel.positions.where(position.values, position.ignored)
            lines = [f"Panel {panel.title or panel.caption} ({where})", *lines[1:], position.text]
            rows = list(panel.visited.values())
            parts += [
                f"<p><b>{html.escape(where)}</b></p>",
                self._picture_and_numbers(live=False),
                f'<div class="effnb-caption">{html.escape(panel.caption)}</div>',
                f"<details><summary>Visited positions: {len(rows)}</summary>"
                f"{as_table(rows, 'Visited positions')}</details>"
                if len(rows) > 1
                else "",
            ]
        parts.append(
            '<div class="effnb-note">Saved from a running panel; run this cell to turn its knobs.'
            "</div>"
        )
        made = f'<div class="effnb-saved {self._saved_class}">{CSS}{SAVED}{"".join(parts)}</div>'
        return made, "\n".join(filter(None, lines))


_BUTTONS = (
    ("Pin this position", "Keep this position, and compare the next ones with it"),
    ("Reset", "Let the pinned position go, and turn all knobs to their defaults"),
)
