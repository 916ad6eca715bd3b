"""The panel on a compressed retriever says what its rows say, and "worse" only by an interval."""

import pytest

from effnb.lab import results
from effnb.lab.retrieval import retrieval_panel

GROUPS = {"row": "row", "64": "64 weights"}


@pytest.fixture
def stored():
    return results.read("05_inference/3_quantization/minilm").data


def test_minilm_at_two_bits_is_worse_and_gptq_brings_some_of_it_back(stored):
    shown = retrieval_panel(stored["table"], queries=stored["queries"], groups=GROUPS)
    assert "Compared with the original: indistinguishable" in shown.at().text
    shares = []
    for method in ("RTN", "GPTQ"):
        position = shown.at(bits=2, method=method, scale="row")
        assert "Compared with the original: worse" in position.text
        row = next(
            row
            for row in stored["table"]
            if (row["method"], row["bits"], row["group_size"]) == (method, 2, "row")
        )
        assert f"Right text first: {row['recall_at_1']:.0%}" in position.text
        shares.append(row["recall_at_1"])
    assert shares[1] > 2 * shares[0]


def test_every_position_can_be_shown(stored):
    visited = retrieval_panel(stored["table"], queries=stored["queries"], groups=GROUPS).sweep()
    assert len(visited) > 7


@pytest.mark.parametrize("left_out", ["original", "GPTQ"])
def test_rows_that_are_missing_are_named_before_anything_is_shown(stored, left_out):
    rows = [r for r in stored["table"] if not (r["method"] == left_out and r["bits"] in (32, 3))]
    with pytest.raises(ValueError, match="original" if left_out == "original" else "GPTQ"):
        retrieval_panel(rows, queries=400, groups=GROUPS)
