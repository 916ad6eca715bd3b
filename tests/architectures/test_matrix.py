"""The table of methods and architectures as a whole; its rows are tested beside this file."""

import json
from pathlib import Path

import architectures
import matrix
import methods
import pytest
import torch


def test_every_architecture_has_its_row_in_one_of_the_files():
    folder = Path(__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("test_*.py"))
    assert [name for name in architectures.NAMES if text.count(f'"{name}"') != 1] == []


def test_the_table_has_every_architecture_and_method():
    table = json.loads(matrix.TABLE.read_text())
    assert tuple(table) == architectures.NAMES
    for row in table.values():
        assert tuple(row["methods"]) == tuple(methods.METHODS)


@pytest.mark.parametrize("name", architectures.NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_the_zoo_itself_does_not_see_padding(name, side):
    """The table's premise: these models compute the same with padding that a mask hides."""
    model = architectures.build(name)
    plain, padded_batch = architectures.batch(name), architectures.batch(name, side)
    want, found = model(**plain).logits, model(**padded_batch).logits
    if name not in architectures.ENCODER_DECODERS:
        found = found[:, 4:] if side == "left" else found[:, : want.shape[1]]
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
