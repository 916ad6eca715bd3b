"""What is drawn can be read: numbers, names of categories, titles, names of curves."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from effnb.lab import figures, name_lines
from effnb.lab.axes import readable
from effnb.lab.figures import DOTS, SIZE, render, style


def drawn(draw):
    """A figure after `draw` and `readable`, laid out."""
    with style():
        figure = Figure(figsize=SIZE, dpi=DOTS, layout="constrained")
        FigureCanvasAgg(figure).draw()
        draw(figure)
        figure.draw_without_rendering()
        if readable(figure):
            figure.draw_without_rendering()
    return figure


def labels(axis):
    low, high = sorted(axis.get_view_interval())
    return [
        tick.label1
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        if tick.label1.get_visible() and tick.label1.get_text() and low <= tick.get_loc() <= high
    ]


def crossing(texts):
    boxes = [text.get_window_extent() for text in texts]
    return [
        (a.get_text(), b.get_text())
        for (a, p), (b, q) in itertools.combinations(zip(texts, boxes), 2)
        if p.overlaps(q)
    ]


@pytest.mark.parametrize(("low", "high"), [(1, 1.6), (0.9, 40), (1, 2000), (20, 90), (0.01, 0.5)])
def test_logarithmic_axes_have_plain_numbers_that_do_not_cross(low, high):
    def draw(figure):
        axes = figure.subplots()
        axes.plot([1, 2, 3], np.geomspace(low, high, 3))
        axes.set_yscale("log")

    (axes,) = drawn(draw).axes
    words = [text.get_text() for text in labels(axes.yaxis)]
    assert len(words) >= 2
    assert not any(sign in word for word in words for sign in ("^", "mathdefault", "times"))
    assert crossing(labels(axes.yaxis)) == []


def test_minor_numbers_that_a_chapter_asked_for_are_thinned():
    def draw(figure):
        axes = figure.subplots()
        axes.plot([1, 2], [10, 100])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")

    (axes,) = drawn(draw).axes
    assert crossing(labels(axes.yaxis)) == []
    assert {"10", "100"} <= {text.get_text() for text in labels(axes.yaxis)}


def test_many_numbers_are_thinned_evenly():
    def draw(figure):
        axes = figure.subplots(1, 3)[0]
        axes.plot(range(0, 900_000, 30_000), range(30))
        axes.set_xticks(range(0, 900_000, 30_000))

    axes = drawn(draw).axes[0]
    found = [float(text.get_text().replace(",", "")) for text in labels(axes.xaxis)]
    assert crossing(labels(axes.xaxis)) == []
    assert len(set(np.diff(sorted(found)))) == 1
    assert len(found) >= 2


def test_names_of_categories_are_never_left_out():
    names = ["rotate, then RTN", "inputs too: SmoothQuant", "LLM.int8()", "per row", "ternary", "x"]

    def draw(figure):
        figure.subplots(1, 2)[0].bar(names, range(6))

    axes = drawn(draw).axes[0]
    shown = [text.get_text().replace("\n", " ") for text in labels(axes.xaxis)]
    assert shown == names


def test_a_title_wider_than_its_axes_is_broken_between_words():
    words = "perplexity of the quantized model, relative to the original's, on the novels"

    def draw(figure):
        left, right = figure.subplots(1, 2)
        left.set_title(words)
        right.set_title("right answers")

    left, right = drawn(draw).axes
    assert left._left_title.get_text().replace("\n", " ") == words
    assert "\n" in left._left_title.get_text()
    assert crossing([left._left_title, right._left_title]) == []


def test_pictures_are_made_readable_and_stay_the_same_file():
    def draw(figure):
        axes = figure.subplots()
        axes.plot([1, 2, 3], [1, 3, 90])
        axes.set_yscale("log")

    assert render(draw).png == render(draw).png


def test_curves_are_named_where_they_end_without_crossing():
    named = []

    def draw(figure):
        axes = figure.subplots()
        for i in range(6):
            axes.plot([0, 1, 2], [0, i, 1 + 0.01 * i], color="0.8", label=f"curve {i}")
        axes.plot([0, 2], [2, 2], label="_not named")
        named.extend(name_lines(axes))

    figure = drawn(draw)
    assert [text.get_text() for text in named] == [f"curve {i}" for i in range(6)]
    assert crossing(named) == []
    heights = [text.get_window_extent().y0 for text in named]
    assert heights == sorted(heights)  # in the order in which the curves end
    right = max(text.get_window_extent().x1 for text in named)
    assert right <= figure.bbox.x1  # inside the picture
    for text in named:
        assert contrast(text.get_color(), figures.PAPER) >= 4.5


def contrast(one, other):
    from matplotlib.colors import to_rgb

    def luminance(colour):
        linear = [
            c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
