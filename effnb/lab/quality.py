"""The common panel: one model, some methods, their knobs; quality, size and text, before and after.

    quality_panel(Subject(model, look), {"RTN": rtn, "GPTQ": gptq}, caption="…", bits=knob(2, 8))

A chapter gives its methods as functions of the model and of the knobs they use. A knob that a
method does not take is greyed while that method is chosen.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol

from matplotlib.figure import Figure

from effnb.lab.axes import haloed, legible, name_lines
from effnb.lab.differences import Paired, paired, paired_answers
from effnb.lab.figures import GREY, PALETTE
from effnb.lab.panels import Guess, Knob, Panel, panel
from effnb.lab.panels.knobs import Values


class Look(Protocol):
    """What one look at a model finds; `effnb.lab.Quality` is one."""

    losses: Sequence[float]
    correct: Sequence[bool]
    bytes: int
    text: str


@dataclass(frozen=True)
class Quality:
    """What one look at a model found.

    Attributes:
        losses: Nats per token of each held-out window, in an order that is always the same.
        correct: Which questions of the ranked choice were answered, in an order that is the same.
        bytes: What the model takes as it is stored.
        text: What it wrote after a fixed prompt.
    """

    losses: tuple[float, ...]
    correct: tuple[bool, ...]
    bytes: int
    text: str


@dataclass(frozen=True)
class Subject:
    """What the methods are tried on.

    Attributes:
        model: The original.
        look: Evaluates a model on fixed data.
        chance: Accuracy of guessing in the ranked choice.
        documents: To which document each window belongs; None when the windows are independent.
    """

    model: Any
    look: Callable[[Any], Look]
    chance: float = 0.25
    documents: Sequence[Any] | None = None


@dataclass(frozen=True)
class Compared:
    """One setting beside the original; what a quality panel's `compute` returns.

    Attributes:
        method: Name of the method.
        now: The new model's look.
        was: The original's.
        loss: Difference of the losses, nats per token.
        choice: Difference of the accuracies.
    """

    method: str
    now: Look
    was: Look
    loss: Paired
    choice: Paired


@dataclass(frozen=True)
class Curves:
    """What is known from stored results, drawn in grey behind the panel's own point.

    Attributes:
        points: For each name, MiB stored and perplexity relative to the original's, in order.
    """

    points: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)


def quality_panel(
    subject: Subject,
    methods: Mapping[str, Callable[..., Any]],
    *,
    caption: str,
    title: str | None = None,
    curves: Curves | None = None,
    idle: Mapping[str, str] | None = None,
    frames: Any = None,
    predict: Guess | None = None,
    **knobs: Knob,
) -> Panel:
    """A panel of one model, some methods and their knobs.

    Args:
        subject: The model, and how to look at one.
        methods: By name, functions of the model and of some of the knobs, which give a new model.
            Which knobs a method uses is read from its arguments.
        caption: One or two sentences: what to see in the picture.
        title: A heading of a few words.
        curves: Stored results to draw behind the panel's own point.
        idle: For methods that leave a knob alone, the reason; "METHOD does not use it" by default.
        frames: What a built page stores; see `panel`. The first knob alone when None.
        predict: A question that keeps the panel locked; its `answer` gets a `Compared`.
        **knobs: A `knob(…)` for each argument of the methods; one called `method` is added.

    Raises:
        ValueError: When there is no method, or a method takes an argument that is no knob.
    """
    if not methods:
        raise ValueError('quality_panel needs at least one method: {"RTN": rtn}.')
    uses = {name: _used(name, method, knobs) for name, method in methods.items()}
    reasons = dict(idle or {})
    looked: list[Look] = []

    def compute(method: str = "", **values: Any) -> Compared:
        method = method or next(iter(methods))
        if not looked:
            looked.append(subject.look(subject.model))
        made = methods[method](subject.model, **{name: values[name] for name in uses[method]})
        now, was = subject.look(made), looked[0]
        return Compared(
            method,
            now,
            was,
            paired(now.losses, was.losses, subject.documents),
            paired_answers(now.correct, was.correct),
        )

    def ignored(values: Values) -> dict[str, str]:
        name = values.get("method", next(iter(methods)))
        reason = reasons.get(name, f"{name} does not use it")
        return {knob: reason for knob in knobs if knob not in uses[name]}

    def draw(result: Compared, figure: Figure, pinned: Compared | None = None) -> None:
        _draw(result, pinned, figure, curves or Curves(), subject.chance)

    controls = dict(knobs)
    if len(methods) > 1:
        controls["method"] = Knob(tuple(methods), next(iter(methods)), None, "choice")
    return panel(
        compute,
        draw,
        text=said,
        caption=caption,
        title=title,
        frames=frames,
        predict=predict,
        ignored=ignored,
        **controls,
    )


def _used(name: str, method: Callable[..., Any], knobs: Mapping[str, Knob]) -> tuple[str, ...]:
    """The knobs that a method takes: its arguments after the model."""
    arguments = list(inspect.signature(method).parameters.values())[1:]
    if any(one.kind is one.VAR_KEYWORD for one in arguments):
        return tuple(knobs)
    unknown = [a.name for a in arguments if a.name not in knobs and a.default is a.empty]
    if unknown:
        raise ValueError(
            f"the method {name!r} takes {unknown[0]!r}; the knobs are {', '.join(knobs)}."
        )
    return tuple(one.name for one in arguments if one.name in knobs)


def perplexity_of(look: Look) -> float:
    """The exponential of the mean loss (infinity where that overflows)."""
    nats = fmean(look.losses)
    return math.exp(nats) if nats < 700 else math.inf


def accuracy_of(look: Look) -> float:
    """Part of the questions that were answered."""
    return fmean(map(float, look.correct))


def said(result: Compared) -> str:
    """The numbers of a setting beside the original's, and what they mean, as lines."""
    now, was, loss, choice = result.now, result.was, result.loss, result.choice
    # exp of a mean loss: an interval of nats is one of the ratio of the perplexities.
    ratio = [math.exp(min(v, 700.0)) for v in (loss.difference, loss.low, loss.high)]
    points = [100 * v for v in (choice.difference, choice.low, choice.high)]
    sure = f"{loss.confidence:.0%} interval"
    return "\n".join(
        [
            f"Method: {result.method}",
            f"Perplexity: {perplexity_of(now):.4g}",
            f"Original's: {perplexity_of(was):.4g}",
            f"Right answers: {accuracy_of(now):.1%}",
            f"Original's right answers: {accuracy_of(was):.1%}",
            f"Stored: {now.bytes / 2**20:.2f} MiB",
            f"Original's size: {was.bytes / 2**20:.2f} MiB",
            f"Perplexity is: {loss.outcome()}, × {ratio[0]:.3g} "
            f"({sure} × {ratio[1]:.3g} to {ratio[2]:.3g}, {loss.count} pairs)",
            f"Answers are: {choice.outcome(lower_is_better=False)}, {points[0]:+.1f} points "
            f"({sure} {points[1]:+.1f} to {points[2]:+.1f}, {choice.count} questions)",
            f"The original writes: {was.text} …",
            f"Now it writes: {now.text} …",
        ]
    ).replace(" -", " −")


def _draw(
    result: Compared, pinned: Compared | None, figure: Figure, curves: Curves, chance: float
) -> None:
    """Perplexity over size on the left, right answers on the right."""
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for name, points in curves.points.items():
        left.plot(*zip(*points), "o-", color="0.72", markersize=3, linewidth=1.5, label=name)
    named = {}
    settings = [("original", None, PALETTE[2])]
    settings += [("pinned", pinned, PALETTE[3])] if pinned else []
    settings += [("now", result, PALETTE[1])]
    for name, one, colour in settings:
        look = one.now if one else result.was
        spread = (1.0, 1.0, 1.0)
        if one:
            spread = tuple(
                math.exp(min(v, 50.0)) for v in (one.loss.difference, one.loss.low, one.loss.high)
            )
        left.errorbar(
            look.bytes / 2**20,
            spread[0],
            [[spread[0] - spread[1]], [spread[2] - spread[0]]],
            fmt="o",
            color=colour,
            markersize=8,
            capsize=3,
        )
        named[name] = (look.bytes / 2**20, spread[0], colour)
    left.axhline(1, color="0.5", linestyle="--", linewidth=1)
    left.set_yscale("log")
    left.margins(x=0.12, y=0.16)
    left.set_xlabel("MiB stored")
    left.set_title("perplexity ÷ the original's")
    name_lines(left)
    middle = sum(left.get_xlim()) / 2
    for name, (x, y, colour) in named.items():
        side = 1 if x < middle else -1
        below = name == "original"  # beside it, the curves end
        words = left.annotate(
            name,
            (x, y),
            xytext=(0, -9) if below else (9 * side, 0),
            textcoords="offset points",
            ha="center" if below else "left" if side > 0 else "right",
            va="top" if below else "center",
            color=legible(colour),
            fontweight="bold",
            fontsize=9,
        )
        words.set_path_effects([haloed()])
    for y, (_, one, colour) in enumerate(settings):
        look = one.now if one else result.was
        accuracy = accuracy_of(look)
        error = math.sqrt(accuracy * (1 - accuracy) / len(look.correct))
        right.barh(y, accuracy, xerr=error, color=colour, height=0.55, ecolor=GREY)
    right.axvline(chance, color="0.4", linestyle="--", linewidth=1)
    right.annotate(
        "guessing",
        (chance, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, -2),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color=GREY,
    )
    right.set_xlim(0, 1)
    right.set_ylim(-0.6, len(settings) - 0.1)
    right.set_yticks(range(len(settings)), [name for name, _, _ in settings])
    right.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.set_title("right answers")
