import base64
import colorsys
import io
import re

import matplotlib
import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from PIL import Image as Pixels

from effnb.lab import figures
from effnb.lab.figures import PALETTE, PAPER, figure, render, style


def line(canvas):
    canvas.subplots().plot([1, 2, 3], [3, 1, 2])


def pixels(png):
    return np.asarray(Pixels.open(io.BytesIO(png)).convert("RGB"))


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_a_picture_is_opaque_sharp_and_small():
    picture = render(line)
    image = Pixels.open(io.BytesIO(picture.png))
    assert (picture.width, picture.height) == (720, 340)
    assert image.size[0] > picture.width  # more pixels than it takes on the page
    assert image.convert("RGBA").getextrema()[3] == (255, 255)
    corner = pixels(picture.png)[0, 0].astype(int)
    assert abs(corner - list(bytes.fromhex(PAPER[1:]))).max() <= 3  # the palette is an octree's
    assert len(picture.png) < 40_000


def test_a_heat_map_keeps_its_shades_and_has_no_grid():
    ramp = np.tile(np.linspace(0, 1, 100), (20, 1))
    for plot in ("imshow", "pcolormesh"):
        picture = render(lambda canvas, plot=plot: getattr(canvas.subplots(), plot)(ramp))
        middle = pixels(picture.png)[pixels(picture.png).shape[0] // 2].astype(int)
        inside = middle[200:-200]  # from dark to light without a step or a line
        assert len(np.unique(inside, axis=0)) > 50
        assert abs(np.diff(inside, axis=0)).max() < 16


def test_the_same_drawing_is_the_same_file():
    assert render(line).png == render(line).png


def test_the_settings_of_others_are_left_alone():
    before = dict(matplotlib.rcParams)
    with style():
        assert matplotlib.rcParams["axes.facecolor"] == PAPER
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(ZeroDivisionError):
        render(lambda canvas: 1 // 0)
    assert dict(matplotlib.rcParams) == before


def test_no_pyplot_state_is_left():
    import matplotlib.pyplot as plt

    plt.close("all")
    render(line)
    assert plt.get_fignums() == []


def test_series_are_told_apart_by_colour_and_by_lightness():
    assert len(set(PALETTE)) == len(PALETTE) >= 7
    assert all(contrast(colour, PAPER) > 1.9 for colour in PALETTE)
    assert contrast(figures.BLACK, PAPER) > 7
    # The first three differ in hue and in lightness, for those who see one of the two badly.
    lightness = [colorsys.rgb_to_hls(*(v / 255 for v in bytes.fromhex(c[1:])))[0] for c in PALETTE]
    assert len({round(hue, 1) for hue in lightness[:3]}) == 3


def test_a_figure_has_caption_and_alternative_text():
    made = figure(line, 'A "zigzag" <line>', "Falls from 3 to 1 & rises to 2.")
    data, _ = DisplayFormatter().format(made)
    assert 'alt="Falls from 3 to 1 &amp; rises to 2."' in data["text/html"]
    assert "&lt;line&gt;</figcaption>" in data["text/html"]
    png = re.search(r"data:image/png;base64,([^\"]+)", data["text/html"])[1]
    assert pixels(base64.b64decode(png)).std() > 5
    assert "image/png" not in data  # a notebook stores the picture once
    assert "Falls from 3 to 1" in data["text/plain"]


@pytest.mark.parametrize("missing", ["caption", "alt"])
def test_a_figure_without_words_is_refused(missing):
    words = {"caption": "Seen.", "alt": "Said."} | {missing: " "}
    with pytest.raises(ValueError, match=f"needs a {missing}"):
        figure(line, **words)


def test_a_blank_card_has_the_size_of_a_picture():
    empty = figures.blank((4, 2))
    assert (empty.width, empty.height) == (400, 200)
    assert set(map(tuple, pixels(empty.png).reshape(-1, 3))) == {tuple(bytes.fromhex(PAPER[1:]))}
