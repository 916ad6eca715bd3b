"""Instructions that need a kernel say so, in every chapter."""

import json

import pytest

from effnb.book import kernelless
from effnb.book.build import name_of, read_source, sources


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The panel rounds the model while you wait.", 1),
        ("When you run this page, the panel rounds the model while you wait.", 0),
        ("Things to try:\n\n- pin RTN at two bits;\n- look at 8 bits.", 1),
        ("Things to try when you run this page:\n\n- pin RTN at two bits.", 0),
        ("Things to try:\n\n- go to 32 texts at once.", 1),
        ("Things to try:\n\n- when you run this page, go to 32 texts\n  at once.", 0),
        ("Things to try:\n\n- several texts are written.", 0),
        ("After this chapter you can\n\n- write several texts at once.", 0),
        ("One could pin down the reason.", 0),
        ("Everything about texts at once is said in prose.", 0),
    ],
)
def test_what_needs_a_kernel_is_found(text, found):
    assert len(kernelless.unsaid(text, ("texts at once", "form"))) == found


def test_every_chapter_says_what_needs_a_kernel():
    found, panels = [], 0
    for path in sources():
        built = path.with_suffix(".ipynb")
        notebook = (
            json.loads(built.read_text(encoding="utf-8")) if built.exists() else {"cells": []}
        )
        labels = kernelless.still_knobs(notebook)
        panels += len(labels)
        for cell in read_source(path).cells:
            if cell.cell_type == "markdown":
                found += [
                    f"{name_of(path)}: {one}" for one in kernelless.unsaid(cell.source, labels)
                ]
    assert panels > 20, "it has looked"
    assert found == []
