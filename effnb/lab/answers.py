"""How an exercise answers on the page: verdicts in colour, how much is done, and the solution.

The solution's code comes from the module that holds the exercises, never from the notebook, and it
is put on the page only when a reader asks for it. It runs where it was written, so that the
reader's own function keeps its name and its value.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from IPython import get_ipython
from IPython.display import display

from effnb.lab.listing import listing

if TYPE_CHECKING:
    from effnb.lab.checks import Exercise

_BADGES = {True: ("✓ Correct", "#00664B", "#009E73"), False: ("✗ Not yet", "#9A3D00", "#D55E00")}
"""Words, ground and edge: white on either ground has a contrast of more than 6 to 1."""


def is_compared() -> bool:
    """Whether outputs are plain, because a build stores them or a test compares them."""
    return "1" in (os.environ.get("EFFNB_BUILD"), os.environ.get("EFFNB_SWEEP"))


def verdict_html(right: bool, verdict: str) -> str:
    """A verdict as HTML: a mark, a word and a colour, which all say the same."""
    badge, ground, edge = _BADGES[right]
    words = verdict.removeprefix("Correct: " if right else "Not yet: ")
    return (
        f'<div role="status" style="border-left: 4px solid {edge}; padding: 6px 12px; '
        f"border-radius: 0 6px 6px 0; background: color-mix(in srgb, {edge} 10%, transparent); "
        f'max-width: 76ch"><b style="background: {ground}; color: #fff; padding: 1px 8px; '
        f'border-radius: 9px; margin-right: 8px; white-space: nowrap">{badge}</b>'
        f"{html.escape(words)}</div>"
    )


def done_so_far(exercises: Iterable[Exercise]) -> str:
    """How many exercises of the chapter are done, and which are open, in a sentence."""
    every = list(exercises)
    left = [one.name for one in every if not one.done]
    said = f"{len(every) - len(left)} of {len(every)} exercises done"
    return f"{said}; still open: {', '.join(left)}." if left else f"{said}. That was all of them."


def tell(right: bool, verdict: str, progress: str) -> None:
    """Show a verdict: in colour where a reader looks, as a line of text where it is compared."""
    if is_compared() or get_ipython() is None:
        print(verdict)
        return
    note = f'<p style="opacity: .75; margin: 4px 0 0 16px">{html.escape(progress)}</p>'
    display(
        {"text/html": verdict_html(right, verdict) + note, "text/plain": f"{verdict}\n{progress}"},
        raw=True,
    )


class Solution:
    """The solution of an exercise, behind a button; the last value of a cell shows it."""

    def __init__(self, exercise: Exercise) -> None:
        """Prepare the solution; nothing of it is shown yet."""
        self._exercise = exercise

    def __repr__(self) -> str:
        return f"Solution of {self._exercise.name}: run this cell to be offered it."

    def html(self) -> str:
        """The solution's code, and what its own check says of it."""
        right, verdict = self._exercise.judge(self._exercise.reference)
        code = listing(self._exercise.reference, docstrings=True).html()
        return code + verdict_html(right, verdict)

    def _ipython_display_(self) -> None:
        name = html.escape(self._exercise.name)
        if is_compared():
            # A page for readers, who have no kernel: folded.
            folded = f"<details><summary>Solution: {name}</summary>{self.html()}</details>"
            display({"text/html": folded, "text/plain": repr(self)}, raw=True)
            return
        self._offer()

    def _offer(self) -> None:
        import ipywidgets as widgets

        from effnb.lab.panels.controls import piece, view_bundle
        from effnb.lab.panels.saved import SAVED, hidden_while_live

        words = f"Show the solution: {self._exercise.name}"
        button = widgets.Button(
            description=words,
            tooltip="Your own answer stays as it is",
            layout=widgets.Layout(width="auto", align_self="flex-start"),
        )
        shown = piece("")
        box = widgets.VBox([button, shown])
        box.add_class("effnb-offer")
        saved = f"effnb-saved-{box.model_id}"
        hide = piece(hidden_while_live(saved))
        box.children = (hide, button, shown)

        def turn(_: object) -> None:
            shown.value = "" if shown.value else self.html()
            button.description = words.replace("Show", "Hide") if shown.value else words

        button.on_click(turn)
        display({**view_bundle(box), "text/plain": repr(self)}, raw=True)
        note = f'<div class="effnb-saved {saved}">{SAVED}<em>{html.escape(repr(self))}</em></div>'
        display({"text/html": note, "text/plain": ""}, raw=True)
