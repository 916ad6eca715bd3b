"""The one style of the workbook's pictures, and captioned figures with alternative text.

Pictures are drawn on `matplotlib.figure.Figure` and never through pyplot, whose global state a
panel's thread and a reader's cell would share. They stand on an opaque, paper-coloured card, so
that the same picture can be read on a light page and on a dark one.

Colours: Okabe and Ito, "Color Universal Design", 2008, which readers with any common colour-vision
deficiency can tell apart.
"""

from __future__ import annotations

import html
import io
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from PIL import Image as Pixels

from effnb.lab.axes import PAPER, readable

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, BLACK, GREY = "#56B4E9", "#CC79A7", "#1B1F24", "#6B7280"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
"""The order in which series take their colours."""

SIZE = (7.2, 3.4)
"""Width and height of a picture in inches; at 100 points per inch it fills a notebook's column."""

DOTS = 144
"""Pixels per inch of the file: enough for screens of double density."""

FEW = 48
"""Colours of a picture without shades; the steps between a line and its ground are among them."""

POINTS = 100
"""Pixels per inch as shown on the page."""

_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#9AA1AB",
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.labelcolor": BLACK,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.10,
    "figure.constrained_layout.w_pad": 0.10,
    "figure.facecolor": PAPER,
    "figure.titlesize": 12,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.color": "#E3E2DC",
    "grid.linewidth": 0.8,
    "image.cmap": "cividis",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 2.2,
    "lines.markersize": 6,
    "text.color": BLACK,
    "xtick.color": "#4B5563",
    "xtick.labelsize": 9,
    "ytick.color": "#4B5563",
    "ytick.labelsize": 9,
}


@contextmanager
def style() -> Iterator[None]:
    """Everything drawn inside this context has the workbook's look.

    Matplotlib's settings are global to the process: two threads that draw must not do so at once.
    Panels draw one at a time.
    """
    from cycler import cycler

    with rc_context({**_STYLE, "axes.prop_cycle": cycler(color=PALETTE)}):
        yield


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn picture.

    Attributes:
        png: The file's bytes.
        width: Width on the page, in CSS pixels; the file has more pixels than that.
        height: Height on the page, in CSS pixels.
    """

    png: bytes
    width: int
    height: int

    def html(self, alt: str) -> str:
        """An `<img>` that carries the picture and its alternative text inside itself."""
        return (
            f'<img alt="{html.escape(alt, quote=True)}" decoding="sync" '
            f'width="{self.width}" height="{self.height}" '
            'style="max-width: 100%; height: auto; border-radius: 8px; display: block" '
            f'src="data:image/png;base64,{b64encode(self.png).decode()}">'
        )


def _has_shades(axes: Axes) -> bool:
    """Whether something like a heat map is drawn on it."""
    return bool(axes.images) or any(isinstance(drawn, QuadMesh) for drawn in axes.collections)


def render(draw: Callable[[Figure], object], figsize: tuple[float, float] = SIZE) -> Picture:
    """Draw on a new figure in the workbook's style and give the picture.

    The file is the same whenever the drawing is: it carries no date and no version. Its colours are
    reduced to a palette, which makes it about three times smaller. A heat map has no grid. Axes are
    made readable: see `effnb.lab.axes`.

    Args:
        draw: Draws on the figure it is given.
        figsize: Width and height in inches.
    """
    with style():
        figure = Figure(figsize=figsize, dpi=DOTS, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        shaded = [axes for axes in figure.axes if _has_shades(axes)]
        for axes in shaded:
            axes.grid(visible=False)  # its lines would cross the cells
        canvas.draw()  # once: `savefig` would lay everything out twice
        if readable(figure):
            canvas.draw()
    pixels = Pixels.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    # The octree is quick and keeps rare colours; only median cut keeps shades.
    method = Pixels.Quantize.MEDIANCUT if shaded else Pixels.Quantize.FASTOCTREE
    few = pixels.quantize(256 if shaded else FEW, method, dither=Pixels.Dither.NONE)
    packed = io.BytesIO()
    few.save(packed, format="png", optimize=True)
    width, height = (round(side * POINTS) for side in figsize)
    return Picture(packed.getvalue(), width, height)


def blank(figsize: tuple[float, float] = SIZE) -> Picture:
    """An empty card of the size that `render` gives."""
    width, height = (round(side * POINTS) for side in figsize)
    packed = io.BytesIO()
    Pixels.new("RGB", (width, height), PAPER).save(packed, format="png", optimize=True)
    return Picture(packed.getvalue(), width, height)


def captioned(picture: Picture, caption: str, alt: str) -> str:
    """A picture and its caption as an HTML figure."""
    return (
        f'<figure style="margin: 0.5em 0; max-width: {picture.width}px">{picture.html(alt)}'
        '<figcaption style="margin-top: 0.5em; font-size: 0.92em; opacity: 0.85">'
        f"{html.escape(caption)}</figcaption></figure>"
    )


class CaptionedFigure:
    """A drawn figure with its caption; the last value of a cell, it shows itself."""

    def __init__(self, picture: Picture, caption: str, alt: str) -> None:
        """Keep a picture, what it shows (`caption`) and what it says (`alt`)."""
        self.picture, self.caption, self.alt = picture, caption, alt

    def __repr__(self) -> str:
        return f"Figure: {self.caption}\n[{self.alt}]"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {
            "text/html": captioned(self.picture, self.caption, self.alt),  # holds the picture, once
            "text/plain": repr(self),
        }


def figure(
    draw: Callable[[Figure], object],
    caption: str,
    alt: str,
    *,
    figsize: tuple[float, float] = SIZE,
) -> CaptionedFigure:
    """Draw a figure that does not change.

    Args:
        draw: Draws on the `matplotlib.figure.Figure` it is given.
        caption: One or two sentences under the picture: what to see in it.
        alt: What the picture says, for those who cannot see it: its axes, its shape, its numbers.
        figsize: Width and height in inches.

    Raises:
        ValueError: When the caption or the alternative text is empty.
    """
    for name, words in (("caption", caption), ("alt", alt)):
        if not words.strip():
            raise ValueError(f"a figure needs a {name}: say in a sentence what there is to see.")
    return CaptionedFigure(render(draw, figsize), caption, alt)
