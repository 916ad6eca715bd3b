"""Make a built notebook smaller, without taking anything from what its readers see.

    python -m effnb.book.build --shrink                     # the built notebooks as they lie there
    python -m effnb.book.build --shrink 05_inference/1_pruning

Every build ends with it; nothing is executed, and what is small already stays as it is. Four things
make a chapter large:

- **Pictures.** Shades of the edges of letters and lines are merged where they can hardly be told
  apart. Frames of panels, which only a browser with widgets shows, become WebP without loss, a
  third smaller than PNG; pictures that stand still remain PNG, which every reader of notebooks has.
- **Widgets that say what is the default.** What the state of a widget leaves out is the default of
  its class: ipywidgets stores it so itself (`Widget.get_manager_state(drop_defaults=True)`).
- **Equal widgets.** Most panels' parts have the same layout and the same style: one is kept.
- **White space.** Each output and each widget takes one line, so that git still compares them one
  by one; cells and their sources are indented as Jupyter does it.
"""

from __future__ import annotations

import functools
import io
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from typing import Any

import ipywidgets
import nbformat
import numpy as np
from PIL import Image
from traitlets import Undefined

WIDGETS = "application/vnd.jupyter.widget-state+json"
VIEW = "application/vnd.jupyter.widget-view+json"

ALIKE = 16
"""Colours whose red, green and blue differ by at most this, of 255, may be merged."""
RARE = 0.005
"""A colour that covers more than this part of a picture is never merged into another."""
SHADES = 64
"""A palette of more colours than these holds shades of a heat map; its colours stay."""

_PNG = re.compile(r'(?<=src=")data:image/png;base64,([A-Za-z0-9+/=]+)(?=")')
_WIDGET = "IPY_MODEL_"
_NEEDED = {"_options_labels", "children", "description", "index", "selected_index", "value"}
"""Properties that stay even at their default. The book's pages read them; and in the browser the
default of `index` is an empty word, which a link would hand on in place of no choice."""

Notebook = nbformat.NotebookNode


def shrink(notebook: Notebook) -> None:
    """Make an executed notebook smaller, in place.

    Args:
        notebook: The notebook; what its readers see stays the same.
    """
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            _shrink_output(output)
    state = _state(notebook)
    for widget in state.values():
        if widget["model_name"] == "HTMLModel":
            value = widget["state"].get("value", "")
            widget["state"]["value"] = _with_pictures(value, smaller_frame)
    drop_unseen(notebook)
    drop_defaults(notebook)
    merge_equal(notebook)


def _state(notebook: Notebook) -> dict[str, Any]:
    """The widgets of a notebook by their ids."""
    return notebook.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})


# ------------------------------------------------------------------------------------ pictures


def _shrink_output(output: Notebook) -> None:
    """Store an output's picture once, with few colours."""
    data = output.get("data", {})
    markup = data.get("text/html")
    if not isinstance(markup, str):
        return
    picture = "".join(data.get("image/png", "").split())
    if picture and picture in markup:
        del data["image/png"]
    data["text/html"] = _with_pictures(markup, smaller_png)


def _with_pictures(markup: str, smaller: Callable[[bytes], tuple[str, bytes]]) -> str:
    """HTML whose pictures have been made smaller."""

    def replaced(found: re.Match) -> str:
        kind, packed = smaller(b64decode(found[1]))
        return f"data:image/{kind};base64,{b64encode(packed).decode()}"

    return _PNG.sub(replaced, markup)


@functools.lru_cache(maxsize=64)
def smaller_png(png: bytes) -> tuple[str, bytes]:
    """A PNG with its colours merged, where that makes it smaller.

    Returns:
        The kind of file, and its bytes.
    """
    packed = _packed(_with_colours_merged(png), "png", optimize=True)
    return ("png", min(png, packed, key=len))


@functools.lru_cache(maxsize=64)
def smaller_frame(png: bytes) -> tuple[str, bytes]:
    """The same picture as WebP without loss, or as PNG where that is smaller.

    Returns:
        The kind of file, and its bytes.
    """
    pixels = _with_colours_merged(png)
    if pixels.mode == "P":
        pixels = pixels.convert("RGB")
    packed = _packed(pixels, "webp", lossless=True, quality=100, method=4)
    return min(("webp", packed), smaller_png(png), key=lambda one: len(one[1]))


def _packed(pixels: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    pixels.save(file, kind, **options)
    return file.getvalue()


def _with_colours_merged(png: bytes) -> Image.Image:
    """A picture whose rare colours have been replaced by frequent ones next to them.

    Pictures without a palette, or with that of a heat map, stay as they are.
    """
    pixels = Image.open(io.BytesIO(png))
    pixels.load()
    if pixels.mode != "P" or "transparency" in pixels.info:
        return pixels
    counts = np.array(pixels.histogram()[:256])
    palette = np.zeros((256, 3), dtype=int)
    given = np.array(pixels.getpalette("RGB")).reshape(-1, 3)[:256]
    palette[: len(given)] = given
    used = np.flatnonzero(counts)
    if len(used) > SHADES:
        return pixels
    kept: list[int] = []
    new = [0] * 256
    for colour in sorted(used.tolist(), key=lambda i: (-counts[i], i)):
        far = [int(np.abs(palette[colour] - palette[k]).max()) for k in kept]
        rare = counts[colour] < RARE * counts.sum()
        if rare and min(far) <= ALIKE:
            new[colour] = far.index(min(far))
        else:
            new[colour] = len(kept)
            kept.append(colour)
    if len(kept) == len(used):
        return pixels
    merged = pixels.point(new)
    merged.putpalette(palette[kept].astype(np.uint8).tobytes())
    return merged


# ------------------------------------------------------------------------------------- widgets


@functools.cache
def _defaults() -> dict[tuple[str, str], dict[str, Any]]:
    """The defaults of every class of widgets, by its module's and its own name in the browser."""
    classes = set(_subclasses(ipywidgets.Widget))
    found = {}
    for one in sorted(classes, key=lambda c: (c.__module__, c.__qualname__)):
        traits = one.class_traits(sync=True)
        named = {
            key: trait.default_value
            for key, trait in traits.items()
            if trait.default_value is not Undefined
        }
        if one.__module__.startswith("ipywidgets."):
            found[named["_model_module"], named["_model_name"]] = named
    return found


def _subclasses(of: type) -> Iterator[type]:
    for one in of.__subclasses__():
        yield one
        yield from _subclasses(one)


def drop_defaults(notebook: Notebook) -> None:
    """Leave out what the state of a widget says of properties that have their defaults.

    A layout alone has about forty properties that are not set.
    """
    for widget in _state(notebook).values():
        default = _defaults().get((widget.get("model_module"), widget["model_name"]), {})
        widget["state"] = {
            key: value
            for key, value in widget["state"].items()
            if key in _NEEDED or not _is_default(key, value, default)
        }
        if "_options_labels" in widget["state"]:
            widget["state"].setdefault("index", None)  # which older builds left out


def _is_default(key: str, value: Any, default: dict[str, Any]) -> bool:
    """Whether a property says nothing: it is not set, empty, or what its class has by itself."""
    if value is None or (key in ("_dom_classes", "titles") and not any(value)):
        return True
    return key in default and default[key] == value


def merge_equal(notebook: Notebook) -> None:
    """Keep one of several widgets whose state is the same, and let all that showed them show it.

    Widgets that a reader turns, and those joined to one, stay on their own.
    """
    state = _state(notebook)
    still = {
        name
        for name, widget in state.items()
        if widget["model_name"] in ("LayoutModel", "HTMLModel")
        or widget["model_name"].endswith("StyleModel")
    }
    still -= {
        end[0].removeprefix(_WIDGET)
        for widget in state.values()
        for end in (widget["state"].get("source"), widget["state"].get("target"))
        if end
    }
    same: dict[str, str] = {}
    # Styles and layouts first: pieces of HTML are equal only when theirs are.
    for kind in ("LayoutModel", "StyleModel", "HTMLModel"):
        first: dict[str, str] = {}
        for name, widget in state.items():
            if name in still and widget["model_name"].endswith(kind):
                widget["state"] = _renamed(widget["state"], same)
                key = json.dumps(widget, sort_keys=True)
                if first.setdefault(key, name) != name:
                    same[name] = first[key]
    for name in same:
        del state[name]
    for widget in state.values():
        widget["state"] = nbformat.from_dict(_renamed(widget["state"], same))


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """A value with its references to some widgets replaced by references to others."""
    if isinstance(value, dict):
        return {key: _renamed(item, names) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_renamed(item, names) for item in value]
    if isinstance(value, str) and value.startswith(_WIDGET):
        name = value.removeprefix(_WIDGET)
        return _WIDGET + names.get(name, name)
    return value


def drop_unseen(notebook: Notebook) -> None:
    """Leave out widgets that no output shows, neither itself nor through others."""
    state = _state(notebook)
    shown = [
        output.data[VIEW]["model_id"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if VIEW in output.get("data", {})
    ]
    seen: set[str] = set()
    while shown:
        name = shown.pop()
        if name in seen or name not in state:
            continue
        seen.add(name)
        shown += _references(state[name]["state"])
    for name, widget in list(state.items()):
        ends = [end[0].removeprefix(_WIDGET) for end in _ends(widget["state"])]
        if name not in seen and not (ends and seen.issuperset(ends)):
            del state[name]


def _ends(state: dict[str, Any]) -> list[list[str]]:
    """The two ends of a link between widgets; nothing for other widgets."""
    return [state[end] for end in ("source", "target") if isinstance(state.get(end), list)]


def _references(value: Any) -> list[str]:
    """The ids of the widgets that a value refers to."""
    if isinstance(value, dict):
        return [name for item in value.values() for name in _references(item)]
    if isinstance(value, (list, tuple)):
        return [name for item in value for name in _references(item)]
    if isinstance(value, str) and value.startswith(_WIDGET):
        return [value.removeprefix(_WIDGET)]
    return []


# ----------------------------------------------------------------------------------- the file


def text_of(notebook: Notebook) -> str:
    """A notebook as the text of its file: a line for each output and each widget.

    The text is valid by nbformat and read by everything that reads notebooks; Jupyter writes it in
    its own way when a person saves it there.
    """
    whole = nbformat.reads(nbformat.writes(notebook), as_version=4)  # without what is passing
    lines: list[str] = []

    def on_a_line(value: Any) -> str:
        """A value that the text mentions by this name, until its one line takes its place."""
        lines.append(json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True))
        return f"\0{len(lines) - 1}\0"

    for cell in whole.cells:
        cell.source = cell.source.splitlines(keepends=True)
        cell.metadata = on_a_line(cell.metadata)
        if "outputs" in cell:
            cell.outputs = [on_a_line(output) for output in cell.outputs]
    state = _state(whole)
    for name, widget in state.items():
        state[name] = on_a_line(widget)
    text = json.dumps(whole, ensure_ascii=False, indent=1, sort_keys=True)
    return re.sub(r'"\\u0000(\d+)\\u0000"', lambda found: lines[int(found[1])], text) + "\n"
