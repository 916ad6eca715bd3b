"""Positions of a panel: computed once, drawn once, and kept."""

from __future__ import annotations

import inspect
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from effnb.lab.figures import Picture, render
from effnb.lab.panels.knobs import Knob, Values, match, say

AT_WORK = threading.RLock()
"""Held while anything is computed or drawn: models are shared between panels, a laptop has few
cores, and neither forward hooks nor matplotlib's settings bear two threads at once."""

Key = tuple
"""A position as a dictionary's key: the type of each value, and the value."""


@dataclass(frozen=True, slots=True)
class Position:
    """What a panel shows at one position of its knobs.

    Attributes:
        values: The knobs' values; those that are ignored there stand at their defaults.
        result: What `compute` returned.
        picture: What `draw` drew.
        text: What `text` said.
        alt: Alternative text of the picture: caption, knobs and numbers.
        ignored: Knobs that do nothing here, each with the reason.
    """

    values: Values
    result: Any
    picture: Picture
    text: str
    alt: str
    ignored: Mapping[str, str]


@contextmanager
def _torch_settings(trains: bool, device: Any) -> Iterator[None]:
    """Torch's grad mode and default device, set here because each thread has its own.

    No gradients are recorded, but the tensors are ordinary ones: tensors of inference mode could
    take no part in the gradients of anything later.
    """
    import torch

    with ExitStack() as settings:
        settings.enter_context(torch.inference_mode(False))
        settings.enter_context(torch.enable_grad() if trains else torch.no_grad())
        if device is not None and device.type != "cpu":
            settings.enter_context(device)
        yield


@dataclass(frozen=True)
class Work:
    """What a panel does at a position; see `effnb.lab.panel` for the meaning of each."""

    compute: Callable[..., Any]
    draw: Callable[..., object]
    text: Callable[[Any], str]
    caption: str
    alt: Callable[[Any], str] | None
    ignored: Callable[[Values], Mapping[str, str]] | None
    figsize: tuple[float, float]
    trains: bool
    cache_size: int


class Positions:
    """The positions of some knobs, computed when they are first asked for."""

    def __init__(self, knobs: Mapping[str, Knob], work: Work) -> None:
        """Nothing is computed yet."""
        self.knobs, self.work = knobs, work
        self._cache: OrderedDict[Key, Position] = OrderedDict()
        self._lock = threading.Lock()
        torch = sys.modules.get("torch")
        self._device = torch.get_default_device() if torch else None
        self.overlays = "pinned" in inspect.signature(work.draw).parameters
        """Whether `draw` itself draws a pinned result beside its own."""

    @property
    def defaults(self) -> Values:
        """Where the knobs stand at first."""
        return {name: given.default for name, given in self.knobs.items()}

    def key(self, values: Values) -> Key:
        """The position as a key; True == 1 == 1.0, so that the type tells such positions apart."""
        return tuple((type(values[name]), values[name]) for name in self.knobs)

    def complete(self, values: Values, others: Values | None = None) -> Values:
        """The values of all knobs: those given, snapped to positions, and the others.

        Raises:
            ValueError: When there is no such knob, or the knob has no such position.
        """
        whole = {**self.defaults, **(others or {})}
        for name, value in values.items():
            if name not in self.knobs:
                raise ValueError(
                    f"there is no knob {name!r}; this panel has {', '.join(self.knobs)}."
                )
            found = match(self.knobs[name].values, value)
            if not found:
                raise ValueError(f"the knob {name} has no position {value!r}.")
            whole[name] = found[0]
        return whole

    def ignored(self, values: Values) -> dict[str, str]:
        """The knobs that do nothing at this position, each with the reason."""
        if self.work.ignored is None:
            return {}
        found = dict(self.work.ignored(dict(values)))
        for name in found:
            if name not in self.knobs:
                raise ValueError(f"ignored names {name!r}; the knobs are {', '.join(self.knobs)}.")
        return found

    def at(self, values: Values) -> Position:
        """What is shown at these complete values."""
        ignored = self.ignored(values)
        values = {**values, **{name: self.knobs[name].default for name in ignored}}
        key = self.key(values)
        found = self._look_up(key)
        if found is not None:
            return found
        with AT_WORK:
            found = self._look_up(key)  # another thread may have been computing it
            if found is None:
                found = self._make(values, ignored)
                with self._lock:
                    self._cache[key] = found
                    while len(self._cache) > self.work.cache_size:
                        self._cache.popitem(last=False)
        return found

    def _make(self, values: Values, ignored: Mapping[str, str]) -> Position:
        work = self.work
        with _torch_settings(work.trains, self._device):
            result = work.compute(**values)
            picture = render(lambda figure: work.draw(result, figure), work.figsize)
            text = work.text(result)
            said = work.alt(result) if work.alt else text
        alt = f"{work.caption} {self.where(values, ignored)}. {' '.join(said.split())}"
        return Position(values, result, picture, text, alt, ignored)

    def overlaid(self, position: Position, pinned: Position) -> Picture:
        """The position's picture with the pinned result in it, by a `draw` that takes it."""
        work = self.work

        def draw(figure: Figure) -> None:
            work.draw(position.result, figure, pinned=pinned.result)

        with AT_WORK, _torch_settings(work.trains, self._device):
            return render(draw, work.figsize)

    def _look_up(self, key: Key) -> Position | None:
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
            return self._cache.get(key)

    def label(self, name: str) -> str:
        """What a knob is called on the page."""
        return self.knobs[name].label or name.replace("_", " ")

    def where(self, values: Values, ignored: Mapping[str, str] = {}) -> str:
        """The position in words; knobs that are ignored there are left out."""
        return ", ".join(
            f"{self.label(name)} = {say(value)}"
            for name, value in values.items()
            if name not in ignored
        )

    def why_idle(self, position: Position) -> str:
        """Which knobs are ignored at a position, and why, in sentences; or nothing."""
        return " ".join(
            f"{self.label(name)} does nothing here: {reason.rstrip('.')}."
            for name, reason in position.ignored.items()
        )
