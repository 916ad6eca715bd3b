import csv
import io
import re

import numpy as np
import pytest

from effnb.lab import NOT_MEASURED, table

ROWS = [
    {"method": "RTN", "perplexity": 1234.56, "bytes": 5_000_000, "right": 0.5},
    {"method": "GPTQ <b>", "perplexity": np.float32(27.25), "bytes": NOT_MEASURED, "right": None},
]
COLUMNS = {"method": "", "perplexity": ".1f", "bytes": ",", "right": ".0%"}


def test_text_is_aligned_and_says_what_is_missing():
    made = table(ROWS, COLUMNS, caption="At 3 bits.")
    assert str(made).splitlines() == [
        "At 3 bits.",
        "method    perplexity         bytes         right",
        "RTN           1234.6     5,000,000           50%",
        "GPTQ <b>        27.2  not measured  not measured",
    ]
    assert repr(made) == str(made)


def test_the_page_has_caption_headings_and_aligned_numbers():
    page = table(ROWS, COLUMNS, caption="At <3> bits.")._repr_html_()
    assert "<caption>At &lt;3&gt; bits.</caption>" in page
    assert re.findall(r'<th scope="row"[^>]*>(.*?)</th>', page) == ["RTN", "GPTQ &lt;b&gt;"]
    assert page.count('scope="col"') == 4
    assert '<td class="n">1234.6</td>' in page
    assert '<td class="m">not measured</td>' in page
    assert "style=" not in page  # one sheet, not a style for every cell


def test_columns_come_from_the_first_row_and_rows_may_be_bare():
    assert table([{"a": 1, "b": "x"}], caption="C.").columns == ("a", "b")
    assert table([(1, "x"), (2, "y")], ["a", "b"], caption="C.").rows == (("1", "x"), ("2", "y"))


def test_cells_are_written_as_numbers_are_read():
    row = table([[1234, 0.123456, True, float("nan"), -2]], list("abcde"), caption="C.").rows[0]
    assert row == ("1,234", "0.1235", "yes", "not measured", "-2")


def test_csv_has_a_heading():
    rows = list(csv.reader(io.StringIO(table(ROWS, COLUMNS, caption="C.").csv())))
    assert rows[0] == list(COLUMNS)
    assert rows[2] == ["GPTQ <b>", "27.2", "not measured", "not measured"]


def test_a_missing_result_is_false_and_one_of_its_kind():
    import copy
    import pickle

    assert not NOT_MEASURED
    assert copy.deepcopy(NOT_MEASURED) is NOT_MEASURED
    assert pickle.loads(pickle.dumps(NOT_MEASURED)) is NOT_MEASURED


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        ([], ["a"], "at least one row"),
        ([(1,)], None, "names of its columns"),
        ([(1, 2)], ["a"], "row 1 has 2 cells; there are 1 columns"),
        ([{"a": 1}, {"b": 1}], None, "row 2 has the unknown column 'b'"),
        ([(1, 2)], ["a", "a"], "different names"),
    ],
)
def test_nonsense_is_refused(rows, columns, words):
    with pytest.raises(ValueError, match=words):
        table(rows, columns, caption="C.")


def test_a_table_needs_a_caption():
    with pytest.raises(ValueError, match="needs a caption"):
        table(ROWS, caption=" ")
