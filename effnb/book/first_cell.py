"""The first code cell of every chapter: where `effnb` is missing, it says how to get it.

    python -m effnb.book.first_cell 05_inference/1_pruning    # print it, to paste into the source

A notebook may be opened in Colab, in Binder, or from a folder of downloads, where the package is
not installed. Instead of a traceback the reader then gets one sentence, and *Run All* stops there.
IPython prints what an exception's `_render_traceback_` returns, in Colab's old version as well.
"""

from __future__ import annotations

import sys

from nbformat import NotebookNode

TAGS = ("run-time", "hide-input")
TEXT = """\
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("{name}")"""
UNTIL_REBUILT: set[str] = set()
"""Chapters that were built before there was such a cell; one that is rebuilt leaves this list."""


def first_cell(name: str) -> str:
    """The source of a chapter's first code cell.

    Args:
        name: The chapter as the map names it.
    """
    return TEXT.format(name=name)


def problems(source: NotebookNode, name: str) -> list[str]:
    """What is wrong with the first code cell of a chapter, as sentences."""
    if name in UNTIL_REBUILT:
        return []
    first = next((cell for cell in source.cells if cell.cell_type == "code"), None)
    if first is None or first.source.strip() != first_cell(name):
        return [
            "its first code cell does not say how to get effnb where it is missing; put there what "
            f"`python -m effnb.book.first_cell {name}` prints."
        ]
    if set(first.metadata.get("tags", ())) != set(TAGS):
        return [f"its first code cell needs the tags {' and '.join(TAGS)}."]
    return []


if __name__ == "__main__":
    tags = ", ".join(f'"{tag}"' for tag in TAGS)
    for chapter in sys.argv[1:]:
        print(f"# %% tags=[{tags}]\n{first_cell(chapter)}")
