"""A panel: what it computes, which positions it has, and how its requests are served."""

from __future__ import annotations

import contextvars
import itertools
import os
import random
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from effnb.lab.figures import SIZE
from effnb.lab.panels.frames import Frames, chosen_frames
from effnb.lab.panels.guesses import Guess
from effnb.lab.panels.knobs import Knob, Values, say
from effnb.lab.panels.positions import Position, Positions, Work
from effnb.lab.panels.readout import Pairs, pairs
from effnb.lab.panels.view import Busy, View


class PanelError(RuntimeError):
    """A panel fails at one of its positions; the message names the position."""


class Panel:
    """A picture, its numbers and the knobs that change them; the last value of a cell shows it."""

    def __init__(
        self,
        work: Work,
        knobs: Mapping[str, Knob],
        *,
        title: str | None = None,
        main: str | None = None,
        frames: Sequence[Hashable] | Mapping[str, Sequence[Hashable] | None] | None = None,
        predict: Guess | None = None,
    ) -> None:
        """Describe a panel; see `panel` for the arguments."""
        if not knobs:
            raise ValueError("a panel needs at least one knob: panel(…, bits=knob(2, 8)).")
        for name, given in knobs.items():
            if not isinstance(given, Knob):
                raise TypeError(f"{name} is not a knob: write {name}=knob(low, high).")
        self.main = main if main is not None else next(iter(knobs))
        if self.main not in knobs:
            raise ValueError(f"main is {self.main!r}; this panel has {', '.join(knobs)}.")
        self.knobs, self.title, self.caption = dict(knobs), title, work.caption
        self.predict = predict
        self.positions = Positions(self.knobs, work)
        self.frames = chosen_frames(self.knobs, self.main, frames)
        if predict is not None:
            self.positions.complete(dict(predict.at))  # raises now, not when it is asked
        self._lock = threading.RLock()
        self._wanted: tuple[int, Values] | None = None
        self._newest = 0
        self._worker: threading.Thread | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._shown: Position | None = None
        self.pinned: Position | None = None
        """The position with which the next ones are compared."""
        self.visited: dict[tuple, Pairs] = {}
        """Knobs and numbers of the positions that were shown, in the order of the first visit."""
        self.error: BaseException | None = None
        """What the position asked for last raised; None when it is on the page."""
        self._view: View | None = None
        if os.environ.get("EFFNB_SWEEP") == "1":
            self.sweep()
        self._stored: Frames | None = None
        if os.environ.get("EFFNB_BUILD") == "1":
            # Computed here and not when shown: an exception then ends the cell, as it should.
            self._stored = Frames(self)

    def __repr__(self) -> str:
        knobs = ", ".join(f"{name} = {say(value)}" for name, value in self.defaults.items())
        return f"Panel {self.title or self.caption} ({knobs})"

    @property
    def defaults(self) -> Values:
        """Where the knobs stand at first."""
        return self.positions.defaults

    def at(self, **values: Any) -> Position:
        """What the panel shows at these values, the other knobs at their defaults.

        Every position is computed once and kept while it is among the last used ones.

        Raises:
            ValueError: When there is no such knob, or the knob has no such position.
        """
        return self.positions.at(self.positions.complete(values))

    def checked(self, values: Values) -> Position:
        """The same for complete values.

        Raises:
            PanelError: When computing, drawing or wording raises.
        """
        try:
            return self.at(**values)
        except Exception as problem:
            raise PanelError(
                f"the panel {self.title or self.caption!r} fails at "
                f"{', '.join(f'{name}={value!r}' for name, value in values.items())}: "
                f"{type(problem).__name__}: {problem}"
            ) from problem

    def sweep(self, pairs: int = 8, seed: int = 0) -> list[Values]:
        """Visit every position of each knob, the others at their defaults, and some pairs.

        Args:
            pairs: How many positions with two knobs away from their defaults are drawn.
            seed: Seed of that draw.

        Returns:
            The positions visited, in order, each as a dictionary of the knobs' values.

        Raises:
            PanelError: At the first position where computing, drawing or wording raises.
        """
        home = self.defaults
        visits = [home] + [
            {**home, name: value}
            for name, given in self.knobs.items()
            for value in given.values
            if value != given.default
        ]
        crossed = [
            {**home, a: x, b: y}
            for a, b in itertools.combinations(self.knobs, 2)
            for x in self.knobs[a].values
            for y in self.knobs[b].values
            if x != home[a] and y != home[b]
        ]
        visits += random.Random(seed).sample(crossed, min(pairs, len(crossed)))
        for values in visits:
            self.checked(values)
        if self.predict is not None:
            asked = self.checked(self.positions.complete(dict(self.predict.at)))
            try:
                self.predict.verdict(None, asked.result)
            except Exception as problem:
                raise PanelError(
                    f"the guess of the panel {self.title or self.caption!r} has no answer: "
                    f"{type(problem).__name__}: {problem}"
                ) from problem
        return visits

    # ------------------------------------------------------------------------------ on the page

    def _ipython_display_(self) -> None:
        if self._stored is not None:
            self._stored.display()
            return
        with self._lock:
            first = self._view is None
            if first:
                self._view = View(self)
                number = self._number()
        self._view.display()
        try:
            if first:  # shown a second time, it is the same widgets in two places
                self._follow(number, self.defaults)
        finally:
            with self._lock:
                self._view.save()

    def move(self, **values: Any) -> None:
        """Turn knobs from code; picture, numbers and controls follow as if a hand had done it."""
        target = self.positions.complete(values, self._view.values() if self._view else None)
        if self._view:
            self._view.turn(target)
        self.ask(target)

    def pin(self) -> None:
        """Keep the shown position to compare the next ones with; a second time lets it go."""
        with self._lock:
            self.pinned = self._shown if self.pinned is None else None
        if self._view:
            self.ask(self._view.values())

    def reset(self) -> None:
        """Let the pinned position go, and turn all knobs to their defaults."""
        self.pinned = None
        self.move(**self.defaults)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the panel shows what was asked for last; False when that takes too long."""
        return self._idle.wait(seconds)

    def _number(self) -> int:
        """A number for a new request, which makes all earlier ones stale."""
        self._newest += 1
        return self._newest

    def ask(self, values: Values) -> None:
        """Ask for a position; a request that was still waiting is dropped."""
        with self._lock:
            self._wanted = (self._number(), values)
            self._idle.clear()
            if self._worker is None:
                # The callback's context tells ipykernel which request the new outputs belong to.
                serve = contextvars.copy_context().run
                self._worker = threading.Thread(
                    target=serve, args=(self._serve,), name="effnb panel", daemon=True
                )
                self._worker.start()

    def _serve(self) -> None:
        while True:
            with self._lock:
                request, self._wanted = self._wanted, None
                if request is None:
                    self._worker = None
                    self._idle.set()
                    return
            try:
                self._follow(*request)
            except BaseException:  # such as SystemExit: the next move starts a new thread
                with self._lock:
                    self._worker = None
                    self._idle.set()
                raise

    def _follow(self, number: int, values: Values) -> None:
        """Compute a position and put it on the page, unless a newer one has been asked for."""
        with Busy(self, values):
            pinned = self.pinned
            try:
                outcome: Position | Exception = self.at(**values)
                overlaid = None
                if pinned and pinned is not outcome and self.positions.overlays:
                    overlaid = self.positions.overlaid(outcome, pinned)
            except Exception as problem:  # noqa: BLE001 - whatever it is, the page says it
                outcome = problem
        with self._lock:
            if number != self._newest or self._view is None:
                return
            if isinstance(outcome, Exception):
                self.error = outcome
                self._view.fail(self._sentence(values, outcome))
            else:
                self.error = None
                self._shown = outcome
                self.visited[self.positions.key(outcome.values)] = self._row(outcome)
                self._view.show(outcome, pinned, overlaid)

    def _sentence(self, values: Values, problem: Exception) -> str:
        reason = " ".join(str(problem).split()) or type(problem).__name__
        if not isinstance(problem, (ValueError, RuntimeError)):
            reason = f"{type(problem).__name__}: {reason}"
        where, shown = self.positions.where, self._shown
        last = (
            f" The picture is still that of {where(shown.values, shown.ignored)}." if shown else ""
        )
        return f"At {where(values)} this fails: {reason.rstrip('.')}.{last}"

    def _row(self, position: Position) -> Pairs:
        """Knobs and numbers of a position; a knob that is ignored there has no value."""
        knobs = [
            (self.positions.label(name), "" if name in position.ignored else say(value))
            for name, value in position.values.items()
        ]
        return knobs + pairs(position.text)


def panel(
    compute: Callable[..., Any],
    draw: Callable[..., object],
    *,
    text: Callable[[Any], str],
    caption: str,
    alt: Callable[[Any], str] | None = None,
    main: str | None = None,
    frames: Sequence[Hashable] | Mapping[str, Sequence[Hashable] | None] | None = None,
    title: str | None = None,
    figsize: tuple[float, float] = SIZE,
    trains: bool = False,
    cache_size: int = 64,
    predict: Guess | None = None,
    ignored: Callable[[Values], Mapping[str, str]] | None = None,
    **knobs: Knob,
) -> Panel:
    """An interactive figure: turn a knob, and a picture and its numbers answer.

    Args:
        compute: Takes the knobs' values by name and returns anything. It is called once for each
            position, without gradients (see `trains`), never twice at once; it must not change what
            other cells use.
        draw: Draws such a result on the `matplotlib.figure.Figure` it is given, never on pyplot.
            Where it also takes `pinned`, it gets the pinned result and draws both in one picture;
            else the pinned picture is shown under the new one.
        text: The result's numbers, and what a model wrote, as plain lines. A short line of the form
            `name: value` is shown as a number with its name; such lines are compared with those of
            a pinned position, and make the columns of the CSV file.
        caption: One or two sentences: what to see in the picture.
        alt: What the picture says for those who cannot see it, if `text` does not say it. Caption
            and knobs are added.
        main: The knob that moves on a page without a kernel; the first when None.
        frames: Which of its positions such a page stores: at most nine, evenly spread, when None.
            For two knobs, the positions of each by name: `{"bits": [2, 3, 4], "method": None}`,
            where None means all. At most 24 frames.
        title: A heading of a few words.
        figsize: Width and height of the picture in inches.
        trains: Whether `compute` trains, and so needs gradients.
        cache_size: How many positions are kept.
        predict: A question that keeps the panel locked until the reader has guessed or skipped;
            see `guess`.
        ignored: For the knobs' values, the knobs that do nothing there, each with the reason: they
            are greyed, and `compute` gets their defaults.
        **knobs: One `knob(…)` for each argument of `compute`.

    Raises:
        ValueError: When the knobs, `main`, `frames` and `predict` do not fit each other.
        PanelError: In a sweep or a build, when a position fails.
    """
    work = Work(compute, draw, text, caption, alt, ignored, figsize, trains, cache_size)
    return Panel(work, knobs, title=title, main=main, frames=frames, predict=predict)
