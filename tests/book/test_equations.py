"""References to equations lead to what they name, in the notebook and on the page."""

import re

import pytest

from effnb.book import equations
from effnb.book.build import chosen, problems, read_source
from effnb.book.site.katex import render
from effnb.book.site.numbers import numbered
from effnb.book.workshop import prose
from effnb.lab.chapters import NOTEBOOKS

CHAPTERS = [
    path.relative_to(NOTEBOOKS).with_suffix("").as_posix() for path in chosen([], NOTEBOOKS)
]
GOOD = r"""The step is
<a id="equation-1"></a>

$$s = \frac{m}{7}, \tag{1}$$

then, in the [recurrent form](#equation-2) and by [equation 1](#equation-1),
<a id="equation-2"></a>

$$S = \gamma S \tag{recurrent}$$

`$$no$$`

```
$$neither$$ [equation 9](#equation-9)
```

$$x$$"""


def cells(name):
    source = read_source(NOTEBOOKS / f"{name}.py")
    return [cell.source for cell in source.cells if cell.cell_type == "markdown"]


def test_displayed_equations_are_counted_as_a_page_counts_them():
    found = equations.displayed([GOOD])
    assert [(one.tag, one.anchor) for one in found] == [("1", 1), ("recurrent", 2), ("", 0)]
    assert found[0].tex == r"s = \frac{m}{7},"
    assert list(equations.problems([GOOD])) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("The step is\n", "$$new$$\n\nThe step is\n", "its number has changed"),
        ('<a id="equation-1"></a>\n', "", "which has no anchor"),
        ('"equation-1"', '"equation-7"', "lies before equation 1"),
        (r" \tag{1}", "", "shows no number"),
        ("[equation 1]", "[equation 3]", "neither number nor name"),
        ("[recurrent form]", "[chunked form]", "neither number nor name"),
        ("(#equation-1)", "(#equation-3)", "which has no anchor"),
        ("$$x$$", '<a id="equation-4"></a>', "lies before no equation"),
    ],
)
def test_a_number_that_is_no_longer_right_stops_the_build(old, new, said):
    assert old in GOOD
    found = list(equations.problems([GOOD.replace(old, new, 1)]))
    assert any(said in one for one in found), found


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_reference_of_a_chapter_resolves(name):
    text = cells(name)
    assert list(equations.problems(text)) == []
    refers = [found for one in text for found in equations.REFERENCE.finditer(one)]
    assert refers or not equations.displayed(text)
    assert not [one for one in problems(NOTEBOOKS / f"{name}.py") if "equation" in one]


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_learners_edition_keeps_the_numbers(name):
    """What it may leave out holds no equation, so the others keep their places."""
    for cell in read_source(NOTEBOOKS / f"{name}.py").cells:
        if {"solution", "hint"} & set(cell.metadata.get("tags", ())):
            assert cell.cell_type == "code" or not equations.displayed([cell.source])


def test_a_page_numbers_its_equations_itself_and_keeps_the_links():
    page = equations.for_page(GOOD.partition("`")[0])
    assert "\\tag{1}" not in page and "<a id=" not in page
    assert r"\tag{recurrent}" in page, "a name is shown"
    links = re.findall(r'<a class="equation-link" href="#equation-(\d)">([^<]+)</a>', page)
    assert links == [("2", "recurrent form"), ("1", "equation 1")]
    blocks = "".join(
        f'<div class="math-block">{render(one.tex + tag, True)}</div>'
        for one, tag in zip(equations.displayed([page]), ("", r"\tag{recurrent}"), strict=True)
    )
    done = numbered(f"<article>{page}{blocks}</article>")
    assert re.findall(r'<div class="math-block" id="equation-(\d)"', done) == ["1", "2"]


def test_a_slide_says_the_number_and_has_no_anchor():
    slide = prose.markdown(GOOD.partition("`")[0])
    assert "<a " not in slide and "by equation 1," in slide
    assert slide.count('class="katex-tag"') == 2
