"""Axes that can be read: plain numbers, no label over another, and curves named where they end."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Stroke, withStroke
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FuncFormatter, LogFormatter, LogLocator
from matplotlib.transforms import Bbox

INK = (0.106, 0.122, 0.141)
"""The colour of text, as red, green and blue."""


def readable(figure: Figure) -> bool:
    """Make the axes of a drawn figure readable, and tell whether anything has changed.

    Logarithmic axes get plain numbers; a number that would be printed over another is left out;
    names of categories are broken into lines, and slanted where that is not enough; a title that is
    wider than its axes is broken at a space.
    """
    changed = False
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            changed |= _plain_numbers(axis)
    if changed:
        figure.draw_without_rendering()
    for axes in figure.axes:
        changed |= _wrap_title(axes)
        for axis in (axes.xaxis, axes.yaxis):
            changed |= _without_overlap(axis)
    return changed


def _number(value: float, _: int | None = None) -> str:
    return f"{value:,.10g}" if 1e-4 <= abs(value) < 1e7 else f"{value:.4g}"


def _plain_numbers(axis: Axis) -> bool:
    """Plain numbers in place of powers of ten, within a range that people read as numbers."""
    low, high = sorted(axis.get_view_interval())
    if axis.get_scale() != "log" or low < 1e-4 or high > 1e7:
        return False
    if not isinstance(axis.get_major_formatter(), LogFormatter):
        return False
    axis.set_major_formatter(FuncFormatter(_number))
    if high / low < 1000:
        axis.set_minor_locator(LogLocator(subs=(2.0, 3.0, 5.0) if high / low < 20 else (2.0, 5.0)))
        axis.set_minor_formatter(FuncFormatter(_number))
    return True


def _labels(axis: Axis) -> list[tuple[Text, Bbox, bool]]:
    """The visible labels of an axis, each with the room it takes, and whether it is a minor one."""
    low, high = sorted(axis.get_view_interval())
    slack = 1e-9 * (high - low)
    found = []
    for minor, ticks in ((False, axis.get_major_ticks()), (True, axis.get_minor_ticks())):
        for tick in ticks:
            text = tick.label1
            inside = low - slack <= tick.get_loc() <= high + slack
            if inside and text.get_visible() and text.get_text().strip():
                found.append((text, text.get_window_extent(), minor))
    return found


def _crossing(boxes: Sequence[Bbox], pad: float = 2.0) -> bool:
    grown = [box.padded(pad) for box in boxes]
    return any(a.overlaps(b) for i, a in enumerate(grown) for b in grown[:i])


def _without_overlap(axis: Axis) -> bool:
    labels = _labels(axis)
    if not _crossing([box for _, box, _ in labels]):
        return False
    words = [text.get_text() for text, _, minor in labels if not minor]
    if any(character.isalpha() for word in words for character in word):
        return _break_names(axis)
    # Numbers: major ones first, then the round ones among the minor; the ends before the middle.
    kept: list[Bbox] = []
    order = sorted(range(len(labels)), key=lambda i: (labels[i][2], _roughness(labels[i][0]), i))
    majors = [i for i in order if not labels[i][2]]
    step = 1
    while _crossing([labels[i][1] for i in majors[::step]]) and step < len(majors):
        step += 1
    chosen = [*majors[::step], *(i for i in order if labels[i][2])]
    for i, (text, _, _) in enumerate(labels):
        if i not in chosen:
            text.set_visible(False)
    for i in chosen:
        text, box, _ = labels[i]
        if any(box.padded(2).overlaps(other.padded(2)) for other in kept):
            text.set_visible(False)
        else:
            kept.append(box)
    return True


def _roughness(text: Text) -> int:
    """How far a number is from a round one: 1, then 5 and 2, then the others."""
    digit = text.get_text().replace(",", "").lstrip("0.")[:1]
    return {"1": 0, "5": 1, "2": 2}.get(digit, 3)


def _break_names(axis: Axis) -> bool:
    """Names of categories in several lines; slanted where they still cross."""
    if axis.axis_name != "x":
        return False
    ticks = axis.get_major_ticks()
    names = [tick.label1.get_text() for tick in ticks]
    axis.set_ticks([tick.get_loc() for tick in ticks])
    broken = ["\n".join(textwrap.wrap(name, 12, break_long_words=False)) for name in names]
    axis.set_major_formatter(FixedFormatter(broken))
    axis.axes.get_figure().draw_without_rendering()
    if _crossing([box for _, box, _ in _labels(axis)]):
        axis.set_major_formatter(FixedFormatter(names))
        for label in axis.get_ticklabels():
            label.set(rotation=25, ha="right", rotation_mode="anchor")
    return True


def _wrap_title(axes: Axes) -> bool:
    """A title that is wider than its axes, broken at spaces."""
    changed = False
    room = axes.get_window_extent().width
    for title in (axes._left_title, axes.title, axes._right_title):
        words = title.get_text()
        if not words.strip() or "\n" in words:
            continue
        width = title.get_window_extent().width
        if width > room * 1.02:
            per_line = max(8, int(len(words) * room / width))
            title.set_text(textwrap.fill(words, per_line, break_long_words=False))
            changed = True
    return changed


# ------------------------------------------------------------------------------ named curves


PAPER = "#FAF9F6"
"""The ground of every picture."""


def haloed() -> Stroke:
    """An edge of paper round letters, so that a line behind them does not cross them."""
    return withStroke(linewidth=3, foreground=PAPER)


def legible(colour: object) -> tuple[float, float, float]:
    """A line's colour, darkened until it can be read as text on paper (4.5 to 1)."""

    def luminance(rgb: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    rgb = to_rgb(colour)
    for _ in range(20):
        if 0.99 / (luminance(rgb) + 0.05) >= 4.5:
            break
        rgb = tuple(0.9 * c + 0.1 * ink for c, ink in zip(rgb, INK, strict=True))
    return rgb


def name_lines(axes: Axes, lines: Sequence[Line2D] | None = None, size: float = 8.5) -> list[Text]:
    """Write each curve's label where the curve ends, in its colour, none over another.

    Grey curves are told apart in this way, as no legend can. Call it when everything is drawn.

    Args:
        axes: The axes with the curves.
        lines: The curves to name; all that have a label when None.
        size: Size of the names in points.
    """
    chosen = [
        line
        for line in (axes.get_lines() if lines is None else lines)
        if not str(line.get_label()).startswith("_") and len(line.get_xdata())
    ]
    if not chosen:
        return []
    figure = axes.get_figure()
    figure.draw_without_rendering()
    ends = []
    for line in chosen:
        points = sorted(zip(line.get_xdata(), line.get_ydata(), strict=True), key=lambda p: p[0])
        ends.append(points[-1])
    heights = [axes.transData.transform(end)[1] for end in ends]
    gap = size * figure.dpi / 72 * 1.15
    order = sorted(range(len(ends)), key=heights.__getitem__)
    places = dict(zip(order, _apart([heights[i] for i in order], gap), strict=True))
    named = []
    for i, (line, end) in enumerate(zip(chosen, ends, strict=True)):
        shift = (places[i] - heights[i]) * 72 / figure.dpi
        words = axes.annotate(
            line.get_label(),
            end,
            xytext=(6, shift),
            textcoords="offset points",
            va="center",
            fontsize=size,
            color=legible(line.get_color()),
            annotation_clip=False,
        )
        words.set_path_effects([haloed()])
        named.append(words)
        line.set_label(f"_{line.get_label()}")  # a legend would name it a second time
    return named


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Sorted heights, moved as little as needed to be at least a gap apart."""
    groups = [[h, 1] for h in heights]  # centre and size of heaps that are moved together
    merged: list[list[float]] = []
    for group in groups:
        merged.append(group)
        while len(merged) > 1:
            (a, n), (b, m) = merged[-2:]
            if b - a >= gap * (n + m) / 2:
                break
            merged[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    found = []
    for centre, count in merged:
        found += [centre + gap * (i - (count - 1) / 2) for i in range(int(count))]
    return found
