"""The question of a locked panel, as widgets and as plain HTML."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from effnb.lab.panels.controls import button, piece, side_by_side, stacked
from effnb.lab.panels.guesses import Guess, Made, earlier, keep


class Question:
    """Takes one guess, unlocks the panel, and says guess and answer side by side."""

    def __init__(self, guess: Guess, unlock: Callable[[], None]) -> None:
        """Ask; or show what was guessed before, when this notebook was last open."""
        self._guess, self._unlock = guess, unlock
        self._value: str | float | None = None
        self._verdict = ""
        self.done = self.settled = False
        self._asked = piece(_asked(guess))
        self._field = _field(guess)
        self._problem = piece("")
        self._commit = button("Commit my guess", "Commit the guess", "primary")
        self._skip = button("Skip", "Show the answer without a guess")
        self._commit.on_click(lambda _: self._committed())
        self._skip.on_click(lambda _: self._finish(None))
        row = [self._commit, self._skip]
        if not guess.choices:
            unit = [piece(html.escape(guess.unit))] if guess.unit else []
            row = [self._field, *unit, *row]
        inside = [self._asked, *([self._field] if guess.choices else [])]
        self.box = stacked(
            [*inside, side_by_side(row, "effnb-row"), self._problem], "effnb-question"
        )
        before = earlier(guess.question)
        if before is not None:
            self._value, self.done = before.guess, True
            self._show()

    def _committed(self) -> None:
        words = self._field.value
        try:
            value = self._guess.read(words if words is not None else "")
        except ValueError as problem:
            said = html.escape(f"Not yet: {problem}")
            self._problem.value = f'<div class="effnb-error" role="alert">{said}</div>'
            return
        self._finish(value)

    def _finish(self, value: str | float | None) -> None:
        if self.done:
            return
        self._value, self.done = value, True
        self._show()
        keep(Made(self._guess.question, value, "", self._guess.unit))
        self._unlock()

    def settle(self, result: Any) -> None:
        """Say guess and answer, now that the answer is known."""
        self.settled = True
        self._verdict = self._guess.verdict(self._value, result)
        answer = ""
        if self._guess.answer is not None:
            answer = self._guess.say(self._guess.answer(result))
        self._show()
        keep(Made(self._guess.question, self._value, answer, self._guess.unit))

    def _show(self) -> None:
        self._asked.value = _asked(self._guess) + _said(self._words())
        self.box.children = (self._asked,)

    def _words(self) -> str:
        """Guess and answer, as far as both are known."""
        if self._verdict or not self.done:
            return self._verdict
        if self._value is None:
            return "No guess was made."
        return f"Your guess: {self._guess.say(self._value)}."

    def html(self) -> str:
        """The question for a saved notebook."""
        said = self._words() or "No guess has been made yet."
        return f'<div class="effnb-question">{_asked(self._guess)}{_said(said)}</div>'

    def plain(self) -> str:
        """The same as text."""
        return f"{self._guess.question} {self._words() or 'No guess has been made yet.'}"


def _asked(guess: Guess) -> str:
    return f'<div class="effnb-asked">Predict first: {html.escape(guess.question)}</div>'


def _said(words: str) -> str:
    return f'<div role="status">{html.escape(words)}</div>' if words else ""


def _field(guess: Guess) -> widgets.Widget:
    """Where the guess is entered.

    Words are sent once, when the field is left: a field that sends each letter holds the later ones
    back while the kernel is busy, and a click, which is never held back, would overtake them.
    """
    if guess.choices:
        return widgets.RadioButtons(
            options=list(guess.choices),
            index=None,
            orientation="horizontal",
            layout=widgets.Layout(width="auto", max_width="100%"),
        )
    return widgets.Text(
        placeholder="your guess",
        description="Your guess",
        tooltip="Your guess: a number",
        continuous_update=False,
        style={"description_width": "auto"},
    )
