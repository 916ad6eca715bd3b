"""A cell that is run alone says which cell comes first."""

import sys

import pytest

from effnb.lab.order import missing

CELLS = [
    "",  # prose
    "import torch\nfrom effnb.lab import knob as turn",
    "def method(weight):\n    inner = weight\n    return inner\n\nmodel, (left, right) = 1, (2, 3)",
    "for step in range(3):\n    total = step",
    "this is no Python",
]


def raised(code, name="__main__", **names):
    """The NameError of a cell, and its traceback."""
    try:
        exec(compile(code, "cell", "exec"), {"__name__": name, **names})
    except NameError:
        _, problem, trace = sys.exc_info()
        return problem, trace
    raise AssertionError("the cell has raised nothing")


@pytest.mark.parametrize(
    ("name", "number", "begins"),
    [
        ("turn", 1, "import torch"),
        ("method", 2, "def method(weight):"),
        ("right", 2, "def method(weight):"),
        ("total", 3, "for step in range(3):"),
    ],
)
def test_a_missing_name_is_led_back_to_its_cell(name, number, begins):
    said = missing(*raised(f"print({name})"), CELLS)
    assert said.startswith(f"'{name}' does not exist yet: code cell {number}, ")
    assert begins in said
    assert "Run All Above" in said


@pytest.mark.parametrize("name", ["inner", "knob", "nowhere"])
def test_names_that_no_cell_makes_are_left_alone(name):
    assert missing(*raised(f"print({name})"), CELLS) is None


def test_a_mistake_inside_a_module_is_no_matter_of_cells():
    assert missing(*raised("print(model)", name="some.module"), CELLS) is None


def test_a_local_name_that_is_read_too_early_is_left_alone():
    code = "def f():\n    print(model)\n    model = 1\nf()"
    assert missing(*raised(code), CELLS) is None


def test_without_the_notebooks_file_nothing_is_said():
    assert missing(*raised("print(model)"), []) is None
