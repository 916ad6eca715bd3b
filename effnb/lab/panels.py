"""Interactive figures: a picture and its numbers that answer when a knob is turned.

    panel(compute, draw, text=text, caption="…", bits=knob(2, 8), method=knob(["RTN", "GPTQ"]))

In a running kernel the knobs are live: a position is computed once, on a thread of the panel's
own, and a request that a newer one has overtaken is dropped. While a chapter is built (the
environment variable `EFFNB_BUILD` is 1) the panel stores one frame for each of a few positions of
its main knob, joined to the slider in the browser, so that the built page moves with no kernel at
all. With `EFFNB_SWEEP` set to 1 every new panel first visits all its positions, and raises where
one fails.
"""

from __future__ import annotations

import contextvars
import html
import itertools
import math
import os
import random
import re
import sys
import threading
import time
from base64 import b64encode
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import ipywidgets as widgets
from IPython.display import display
from matplotlib.figure import Figure

from effnb.lab.figures import SIZE, Picture, blank, captioned, render

Values = dict[str, Any]

PATIENCE = 1.0
"""Seconds after which a panel says that it is still at work."""

FRAMES = 9
"""How many positions of the main knob a built page stores, unless the panel names them."""

_AT_WORK = threading.RLock()
"""Held while anything is computed or drawn: models are shared between panels, a laptop has few
cores, and neither forward hooks nor matplotlib's settings bear two threads at once."""


class PanelError(RuntimeError):
    """A panel fails at one of its positions; the message names the position."""


# ----------------------------------------------------------------------------------- knobs


@dataclass(frozen=True)
class Knob:
    """The values that one argument of `compute` may take.

    Attributes:
        values: All positions, in the order of the slider or of the list.
        default: Where the knob stands at first.
        label: What the control is called on the page; the argument's name when None.
        kind: "integer", "decimal" or "choice".
    """

    values: tuple
    default: Hashable
    label: str | None
    kind: str

    @property
    def step(self) -> float:
        """Distance of two neighbouring positions of a number's knob."""
        return self.values[1] - self.values[0]

    def spread(self, count: int) -> tuple:
        """At most `count` positions, evenly spread, both ends and the default among them."""
        last = len(self.values) - 1
        if last < count:
            return self.values
        chosen = {round(i * last / (count - 1)) for i in range(count)}
        home = self.values.index(self.default)
        if home not in chosen:
            inner = sorted(chosen - {0, last}) or [0]
            chosen.remove(min(inner, key=lambda position: abs(position - home)))
            chosen.add(home)
        return tuple(self.values[i] for i in sorted(chosen))


def knob(
    low: float | Sequence[Hashable],
    high: float | None = None,
    step: float = 1,
    default: Hashable = None,
    label: str | None = None,
) -> Knob:
    """One knob of a panel: a range of numbers, or a list of choices.

    Args:
        low: The first number; or the choices, and then neither `high` nor `step` is given.
        high: The last number. It is reached when it is a whole number of steps away.
        step: Distance between two positions. The knob gives `int`s if all three are `int`s.
        default: Where the knob stands at first: the middle of a range, the first choice.
        label: What the control is called on the page; the argument's name if not given.

    Raises:
        ValueError: When there are fewer than two positions, or the default is none of them.
    """
    if isinstance(low, (int, float)) and not isinstance(low, bool):
        if high is None:
            raise ValueError(f"knob({low}) has no end: give knob(low, high) or a list of choices.")
        if step <= 0 or high <= low:
            raise ValueError(
                f"knob({low}, {high}, {step}) has no positions: it needs low < high and step > 0."
            )
        count = int((high - low) / step + 1e-9) + 1
        whole = all(isinstance(number, int) for number in (low, high, step))
        # Ten digits after the first significant one of the step: 0.1 + 0.2 becomes 0.3 again.
        values = tuple(
            low + i * step if whole else float(f"{low + i * step:.10g}") for i in range(count)
        )
        kind = "integer" if whole else "decimal"
        home = values[(count - 1) // 2]
    else:
        values, kind = tuple(low), "choice"
        home = values[0] if values else None
    if len(values) < 2 or len(set(values)) < len(values):
        raise ValueError(f"a knob needs at least two different positions, and has {values}.")
    if default is not None:
        found = _match(values, default)
        if not found:
            raise ValueError(f"the default {default!r} is not among the knob's positions {values}.")
        home = found[0]
    return Knob(values, home, label, kind)


def _match(values: Sequence, wanted: object) -> list:
    """The one position that is meant, or none; 0.1 + 0.2 means 0.3."""
    same = [v for v in values if type(v) is type(wanted) and v == wanted]
    if same or not _numeric([wanted]):
        return same
    return [v for v in values if _numeric([v]) and math.isclose(v, wanted, rel_tol=1e-9)][:1]


def _say(value: object) -> str:
    """A knob's value as the page prints it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------- the read-out

_CSS = """<style>
.effnb-panel{max-width:760px;padding:12px 16px 14px;margin:4px 0;border-radius:10px;
border:1px solid color-mix(in srgb,currentColor 16%,transparent);
background:color-mix(in srgb,currentColor 2.5%,transparent);
overflow:visible;box-sizing:border-box}
.effnb-panel,.effnb-panel :is(.jupyter-widgets,.widget-label,.widget-readout,label){
color:inherit!important}
.effnb-panel .widget-html,.effnb-panel .widget-html-content{line-height:1.45;height:auto;margin:0;
overflow:visible}
.effnb-panel .effnb-title{font-weight:600;font-size:1.08em;padding:0 0 6px}
.effnb-panel .effnb-caption{opacity:.8;padding:8px 0 0;max-width:68ch}
.effnb-controls{flex-flow:row wrap;gap:2px 22px;overflow:visible;padding:0 0 8px}
.effnb-controls .widget-label{width:auto;
min-width:64px;padding-right:10px;text-align:left;font-weight:600}
.effnb-controls .widget-readout{font-variant-numeric:tabular-nums}
.effnb-controls .widget-radio{display:flex;flex-direction:row!important;align-items:baseline;
overflow:visible;margin:0 2px}
.effnb-controls .widget-radio-box{display:flex;flex-wrap:wrap;margin:0!important;gap:0 10px}
.effnb-controls .widget-radio-box label{height:auto;white-space:nowrap}
.effnb-controls .noUi-handle:focus-visible{outline:3px solid #0072B2;outline-offset:2px}
.effnb-panel img{background:#FAF9F6;transition:opacity .15s;
box-shadow:0 0 0 1px color-mix(in srgb,currentColor 9%,transparent)}
.effnb-stale img,.effnb-stale .effnb-numbers{opacity:.35}
.effnb-numbers{padding-top:10px}
.effnb-tiles{display:flex;flex-wrap:wrap;gap:6px 26px;margin:0 0 8px}
.effnb-tile{display:flex;flex-direction:column}
.effnb-name{font-size:.84em;opacity:.75}
.effnb-colon{font-size:0}
.effnb-tile .effnb-value{font-size:1.22em;font-weight:600;font-variant-numeric:tabular-nums}
.effnb-line{white-space:pre-wrap;margin:0 0 6px;max-width:76ch;overflow-wrap:anywhere}
.effnb-line .effnb-name{font-size:1em;opacity:1;font-weight:600}
.effnb-error{border-left:4px solid #D55E00;padding:6px 12px;margin:8px 0 0;white-space:pre-wrap;
background:color-mix(in srgb,#D55E00 10%,transparent);border-radius:0 6px 6px 0}
.effnb-busy{display:flex;align-items:center;gap:10px;padding-top:8px;opacity:.9}
.effnb-busy i{width:12px;height:12px;border-radius:50%;border:2px solid #0072B2;
border-top-color:transparent;animation:effnb-turn 1s linear infinite}
.effnb-note{opacity:.7;font-size:.9em;padding-top:6px}
@keyframes effnb-turn{to{transform:rotate(1turn)}}
@media (prefers-reduced-motion:reduce){.effnb-busy i{animation:none}}
</style>"""

_PAIR = re.compile(r"([^:\n]{1,40}): (\S.*)")
_TILE = 22
"""A value of at most this many characters is shown large, beside its neighbours."""


def _numbers(text: str) -> str:
    """Lines of text as HTML: short `name: value` lines side by side, all others as they are.

    The words and their order stay those of the text, colons included, for those who hear the page.
    """
    parts: list[str] = []
    tiles: list[str] = []

    def close() -> None:
        if tiles:
            parts.append('<div class="effnb-tiles">' + "\n".join(tiles) + "</div>")
            tiles.clear()

    for line in text.strip("\n").splitlines():
        pair = _PAIR.fullmatch(line)
        if pair and len(pair[2]) <= _TILE:
            tiles.append(
                f'<div class="effnb-tile"><span class="effnb-name">{html.escape(pair[1])}'
                '<span class="effnb-colon">: </span></span>'
                f'<span class="effnb-value">{html.escape(pair[2])}</span></div>'
            )
            continue
        close()
        words = html.escape(line)
        if pair:
            words = (
                f'<span class="effnb-name">{html.escape(pair[1])}:</span> {html.escape(pair[2])}'
            )
        parts.append(f'<div class="effnb-line">{words or "&nbsp;"}</div>')
    close()
    # A polite live region: a screen reader reads the new numbers when they change.
    return (
        '<div class="effnb-numbers" role="status" aria-live="polite" aria-atomic="true">'
        + "\n".join(parts)
        + "</div>"
    )


# ---------------------------------------------------------------------------------- panels


@dataclass(frozen=True, slots=True)
class Position:
    """What a panel shows at one position of its knobs.

    Attributes:
        values: The knobs' values.
        result: What `compute` returned.
        picture: What `draw` drew.
        text: What `text` said.
        alt: Alternative text of the picture: caption, knobs and numbers.
    """

    values: Values
    result: Any
    picture: Picture
    text: str
    alt: str


@contextmanager
def _torch_settings(trains: bool, device: Any) -> Iterator[None]:
    """Torch's grad mode and default device, set here because each thread has its own."""
    import torch

    with ExitStack() as settings:
        settings.enter_context(torch.enable_grad() if trains else torch.inference_mode())
        if device is not None and device.type != "cpu":
            settings.enter_context(device)
        yield


class Panel:
    """A picture, its numbers and the knobs that change them; the last value of a cell shows it."""

    def __init__(
        self,
        compute: Callable[..., Any],
        draw: Callable[[Any, Figure], object],
        *,
        text: Callable[[Any], str],
        caption: str,
        alt: Callable[[Any], str] | None = None,
        main: str | None = None,
        frames: Sequence[Hashable] | None = None,
        title: str | None = None,
        figsize: tuple[float, float] = SIZE,
        trains: bool = False,
        cache_size: int = 64,
        **knobs: Knob,
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
        self.knobs = knobs
        self.caption, self.title, self.figsize, self.trains = caption, title, figsize, trains
        given = knobs[self.main]
        found = [_match(given.values, v) for v in frames or given.spread(FRAMES)]
        if len(found) < 2 or not all(found):
            raise ValueError(f"frames must name at least two positions of the knob {self.main}.")
        self.frames = tuple(value for (value,) in found)
        self._compute, self._draw, self._text, self._alt = compute, draw, text, alt
        self._cache_size = cache_size
        self._cache: OrderedDict[tuple, Position] = OrderedDict()
        self._cache_lock = threading.Lock()
        self._lock = threading.RLock()
        torch = sys.modules.get("torch")
        self._device = torch.get_default_device() if torch else None
        self._wanted: tuple[int, Values] | None = None
        self._newest = 0
        self._worker: threading.Thread | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._shown: Values | None = None
        self.error: BaseException | None = None
        """What the position asked for last raised; None when it is on the page."""
        self._view: _View | None = None
        if os.environ.get("EFFNB_SWEEP") == "1":
            self.sweep()
        self._stored: list[Position] = []
        if os.environ.get("EFFNB_BUILD") == "1":
            # Computed here and not when shown: an exception then ends the cell, as it should.
            self._stored = [self._checked({**self.defaults, self.main: v}) for v in self.frames]

    def __repr__(self) -> str:
        knobs = ", ".join(f"{name} = {_say(value)}" for name, value in self.defaults.items())
        return f"Panel {self.title or self.caption} ({knobs})"

    @property
    def defaults(self) -> Values:
        """Where the knobs stand at first."""
        return {name: given.default for name, given in self.knobs.items()}

    def at(self, **values: Any) -> Position:
        """What the panel shows at these values, the other knobs at their defaults.

        Every position is computed once and kept while it is among the last used ones.

        Raises:
            ValueError: When there is no such knob, or the knob has no such position.
        """
        values = self._complete(values)
        # True == 1 == 1.0 as keys of a dictionary: the type tells such positions apart.
        key = tuple((type(value), value) for value in values.values())
        found = self._look_up(key)
        if found is not None:
            return found
        with _AT_WORK:
            found = self._look_up(key)  # another thread may have been computing it
            if found is None:
                with _torch_settings(self.trains, self._device):
                    result = self._compute(**values)
                    picture = render(lambda figure: self._draw(result, figure), self.figsize)
                    text = self._text(result)
                    said = self._alt(result) if self._alt else text
                alt = f"{self.caption} {self._where(values)}. {' '.join(said.split())}"
                found = Position(values, result, picture, text, alt)
                with self._cache_lock:
                    self._cache[key] = found
                    while len(self._cache) > self._cache_size:
                        self._cache.popitem(last=False)
        return found

    def _complete(self, values: Values) -> Values:
        """The values of all knobs: those given, snapped to positions, and the defaults."""
        whole = self.defaults
        for name, value in values.items():
            if name not in self.knobs:
                raise ValueError(
                    f"there is no knob {name!r}; this panel has {', '.join(self.knobs)}."
                )
            found = _match(self.knobs[name].values, value)
            if not found:
                raise ValueError(f"the knob {name} has no position {value!r}.")
            whole[name] = found[0]
        return whole

    def _look_up(self, key: tuple) -> Position | None:
        with self._cache_lock:
            if key in self._cache:
                self._cache.move_to_end(key)
            return self._cache.get(key)

    def _where(self, values: Values) -> str:
        return ", ".join(f"{self._label(name)} = {_say(value)}" for name, value in values.items())

    def _label(self, name: str) -> str:
        return self.knobs[name].label or name.replace("_", " ")

    def _checked(self, values: Values) -> Position:
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
            self._checked(values)
        return visits

    # ------------------------------------------------------------------------------ on the page

    def _ipython_display_(self) -> None:
        if self._stored:
            self._show_frames()
            return
        with self._lock:
            first = self._view is None
            if first:
                self._view = _View(self)
                number = self._number()
        display(
            {**_bundle(self._view.box), "text/plain": f"{self!r}. Run this cell to see it."},
            raw=True,
        )
        if first:  # shown a second time, it is the same widgets in two places
            self._follow(number, self.defaults)

    def move(self, **values: Any) -> None:
        """Turn knobs from code; picture, numbers and controls follow as if a hand had done it."""
        target = self._complete({**(self._view.values() if self._view else {}), **values})
        if self._view:
            self._view.turn(target)
        self._ask(target)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the panel shows what was asked for last; False when that takes too long."""
        return self._idle.wait(seconds)

    def _number(self) -> int:
        """A number for a new request, which makes all earlier ones stale."""
        self._newest += 1
        return self._newest

    def _ask(self, values: Values) -> None:
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
        with _Busy(self, values):
            try:
                outcome: Position | Exception = self.at(**values)
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
                self._shown = values
                self._view.show(outcome)

    def _sentence(self, values: Values, problem: Exception) -> str:
        reason = " ".join(str(problem).split()) or type(problem).__name__
        if not isinstance(problem, (ValueError, RuntimeError)):
            reason = f"{type(problem).__name__}: {reason}"
        last = f" The picture is still that of {self._where(self._shown)}." if self._shown else ""
        return f"At {self._where(values)} this fails: {reason.rstrip('.')}.{last}"

    def _stands_still(self) -> str:
        """What a page without a kernel cannot move, in a sentence or two."""
        main = self._label(self.main)
        moves = f"This stored page moves {main} among {len(self.frames)} positions."
        others = {name: v for name, v in self.defaults.items() if name != self.main}
        if others:
            return f"{moves} The other knobs need a running kernel; here {self._where(others)}."
        if len(self.frames) < len(self.knobs[self.main].values):
            return f"{moves} The positions between them need a running kernel."
        return moves

    def _show_frames(self) -> None:
        """Show the stored frames, joined in the browser to the main knob."""
        stored, given = self._stored, self.knobs[self.main]
        home = self.frames.index(given.default) if given.default in self.frames else 0
        names = [(_say(value), i) for i, value in enumerate(self.frames)]
        control = _choices(given, options=names, index=home, **_words(self, self.main))
        stack = widgets.Stack([_html(_shown(position)) for position in stored], selected_index=home)
        widgets.jslink((control, "index"), (stack, "selected_index"))
        note = _html(f'<div class="effnb-note">{html.escape(self._stands_still())}</div>')
        box = _card(self, [control], stack, note)
        shown = stored[home]
        fallback = captioned(shown.picture, self.caption, shown.alt) + (
            f"<p>{html.escape(self._where(shown.values))}</p>"
            f'<pre style="white-space: pre-wrap">{html.escape(shown.text)}</pre>'
            "<p><em>Run this notebook to turn the knobs.</em></p>"
        )
        display(
            {
                **_bundle(box),
                "text/html": fallback,
                "image/png": b64encode(shown.picture.png).decode(),
                "text/plain": f"{self!r}\n{shown.text}",
            },
            raw=True,
        )


class _Busy:
    """Tells the page that work goes on, once it has gone on for a second."""

    def __init__(self, panel: Panel, values: Values) -> None:
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
                    where = self._panel._where(self._values)
                    self._panel._view.progress(f"Computing {where} … {seconds} s")


class _View:
    """The live widgets of a panel. Only the holder of the panel's lock changes them."""

    def __init__(self, panel: Panel) -> None:
        self._panel = panel
        self.controls = {name: _control(panel, name) for name in panel.knobs}
        # An empty card keeps the page from jumping when the first picture comes.
        self.shown = _html(blank(panel.figsize).html("Not computed yet."))
        self.status = _html("")
        self.box = _card(panel, self.controls.values(), self.shown, self.status)
        self._following = True
        for control in self.controls.values():
            control.observe(self._turned, names="value")

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
            self._panel._ask(self.values())

    def show(self, position: Position) -> None:
        self.shown.value = _shown(position)
        self.status.value = ""
        self.box.remove_class("effnb-stale")

    def fail(self, sentence: str) -> None:
        self.box.add_class("effnb-stale")
        self.status.value = f'<div class="effnb-error" role="alert">{html.escape(sentence)}</div>'

    def progress(self, sentence: str) -> None:
        self.box.add_class("effnb-stale")
        # Not a live region: once a second would talk over everything else.
        self.status.value = f'<div class="effnb-busy"><i></i>{html.escape(sentence)}</div>'


def _numeric(values: Sequence) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def _html(value: str) -> widgets.HTML:
    return widgets.HTML(value, layout=widgets.Layout(width="auto", margin="0"))


def _words(panel: Panel, name: str) -> dict[str, Any]:
    """Label and tooltip of a knob's control, and room for its label."""
    given, label = panel.knobs[name], panel._label(name)
    said = (
        f"from {_say(given.values[0])} to {_say(given.values[-1])}"
        if given.kind != "choice"
        else f"one of {', '.join(map(_say, given.values))}"
    )
    return {
        "description": label,
        "tooltip": f"{label}: {said}",
        "style": {"description_width": "auto"},
        "layout": widgets.Layout(width="320px", max_width="100%"),
    }


def _choices(given: Knob, **words: Any) -> widgets.Widget:
    """A control for a list of values: a slider for numbers, else radio buttons side by side.

    Not a drop-down list: JupyterLab takes the arrow keys away from it. Each radio button is reached
    with Tab and chosen with the space bar.
    """
    if _numeric(given.values):
        return widgets.SelectionSlider(continuous_update=False, **words)
    words["layout"] = widgets.Layout(width="auto", max_width="100%")
    return widgets.RadioButtons(orientation="horizontal", **words)


def _control(panel: Panel, name: str) -> widgets.Widget:
    """The live control of a knob: all are native, and work from the keyboard."""
    given, words = panel.knobs[name], _words(panel, name)
    if given.kind == "choice":
        options = [(_say(value), value) for value in given.values]
        return _choices(given, options=options, value=given.default, **words)
    make = widgets.IntSlider if given.kind == "integer" else widgets.FloatSlider
    if given.kind == "decimal":
        digits = max(len(_say(v).partition(".")[2]) for v in given.values)
        words["readout_format"] = f".{digits}f"
    return make(
        value=given.default,
        min=given.values[0],
        max=given.values[-1],
        step=given.step,
        continuous_update=False,
        **words,
    )


def _shown(position: Position) -> str:
    """Picture and numbers as one piece of HTML, so that both change at the same moment.

    The widget called Image would be the obvious choice, but it cannot carry alternative text.
    """
    return position.picture.html(position.alt) + _numbers(position.text)


def _card(
    panel: Panel, controls: Iterable[widgets.Widget], body: widgets.Widget, foot: widgets.HTML
) -> widgets.VBox:
    title = f'<div class="effnb-title">{html.escape(panel.title)}</div>' if panel.title else ""
    row = widgets.HBox(list(controls))
    row.add_class("effnb-controls")
    caption = _html(f'<div class="effnb-caption">{html.escape(panel.caption)}</div>')
    box = widgets.VBox([_html(_CSS + title), row, body, caption, foot])
    box.add_class("effnb-panel")
    return box


def _bundle(box: widgets.Widget) -> dict[str, Any]:
    """The part of an output by which front ends find a widget."""
    view = "application/vnd.jupyter.widget-view+json"
    return {view: {"version_major": 2, "version_minor": 0, "model_id": box.model_id}}


def panel(
    compute: Callable[..., Any],
    draw: Callable[[Any, Figure], object],
    *,
    text: Callable[[Any], str],
    caption: str,
    alt: Callable[[Any], str] | None = None,
    main: str | None = None,
    frames: Sequence[Hashable] | None = None,
    title: str | None = None,
    figsize: tuple[float, float] = SIZE,
    trains: bool = False,
    cache_size: int = 64,
    **knobs: Knob,
) -> Panel:
    """An interactive figure: turn a knob, and a picture and its numbers answer.

    Args:
        compute: Takes the knobs' values by name and returns anything. It is called once for each
            position, in inference mode (see `trains`), never twice at once; it must not change what
            other cells use.
        draw: Draws such a result on the `matplotlib.figure.Figure` it is given, never on pyplot.
        text: The result's numbers, and what a model wrote, as plain lines. A short line of the form
            `name: value` is shown as a number with its name.
        caption: One or two sentences: what to see in the picture.
        alt: What the picture says for those who cannot see it, if `text` does not say it. Caption
            and knobs are added.
        main: The knob that moves on a page without a kernel; the first when None.
        frames: Which of its positions such a page stores: at most nine, evenly spread, when None.
        title: A heading of a few words.
        figsize: Width and height of the picture in inches.
        trains: Whether `compute` trains, and so needs gradients.
        cache_size: How many positions are kept.
        **knobs: One `knob(…)` for each argument of `compute`.

    Raises:
        ValueError: When the knobs, `main` and `frames` do not fit each other.
        PanelError: In a sweep or a build, when a position fails.
    """
    return Panel(
        compute,
        draw,
        text=text,
        caption=caption,
        alt=alt,
        main=main,
        frames=frames,
        title=title,
        figsize=figsize,
        trains=trains,
        cache_size=cache_size,
        **knobs,
    )
