import re
from pathlib import Path

import pytest
import torch

from effnb.lab import figures, listing
from effnb.lab.listing import Listing, show


def visible(markup):
    import html

    return html.unescape(re.sub(r"<style>.*?</style>|<[^>]*>", "", markup))


@pytest.fixture
def displayed(monkeypatch):
    found = []
    monkeypatch.setattr(listing, "display", found.append)
    return found


def test_a_function_is_shown_as_it_stands_in_its_file(displayed, monkeypatch):
    monkeypatch.chdir(listing.REPOSITORY / "data")  # any folder of the repository
    show(figures.render, docstrings=True)
    (one,) = displayed
    assert one.name == "effnb.lab.figures.render"
    assert one.path == Path("effnb/lab/figures.py")
    lines = (listing.REPOSITORY / one.path).read_text().splitlines()
    assert lines[one.line - 1].startswith("def render(")
    assert one.source in (listing.REPOSITORY / one.path).read_text()
    markup = one.html()
    assert one.source in visible(markup)
    target = re.search(r'href="([^"#]*)#L(\d+)"', markup)
    assert target[1] == "../effnb/lab/figures.py"
    assert int(target[2]) == one.line
    assert (Path.cwd() / target[1]).resolve().is_file()


def test_several_things_are_shown_in_order(displayed):
    show(figures.Picture, figures.Picture.html, figures)
    assert [one.name for one in displayed] == [
        "effnb.lab.figures.Picture",
        "effnb.lab.figures.Picture.html",
        "effnb.lab.figures",
    ]
    assert displayed[1].source.startswith("def html(self")  # not indented
    assert displayed[2].source.startswith('"""The one style')
    assert displayed[2].line == 1


def test_decorated_functions_show_themselves(displayed):
    show(figures.style)
    assert "@contextmanager" in displayed[0].source
    assert "def style()" in displayed[0].source


def test_what_a_reader_defines_is_shown_without_a_link(displayed, tmp_path, monkeypatch):
    (tmp_path / "my_method.py").write_text("def half(x):\n    return x / 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    import my_method

    show(my_method.half)
    assert displayed[0].source == "def half(x):\n    return x / 2"
    assert displayed[0].path is None
    assert "href" not in displayed[0].html()


@pytest.mark.parametrize("thing", [len, 3, torch.ones(2), "text"])
def test_what_has_no_source_is_refused_in_a_sentence(displayed, thing):
    with pytest.raises(TypeError, match="cannot be shown: give a function"):
        show(thing)
    assert displayed == []


def test_nothing_is_displayed_when_one_of_several_fails(displayed):
    with pytest.raises(TypeError):
        show(figures.render, len)
    assert displayed == []


def test_code_with_markup_stays_code():
    one = Listing("f", 'x = "<script>alert(1)</script>" & y', None, 1)
    assert "<script>" not in one.html()
    assert one.source in visible(one.html())
    assert "<script>" in str(one)


def planted(tmp_path, monkeypatch, source):
    (tmp_path / "planted_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "planted_module", raising=False)
    import planted_module

    return planted_module


LONG = '''
def method(weight, *, a_long_name_of_an_argument=1.0, another_long_name="of an argument, too"):
    r"""The first line, $x^2$.

    Args:
        weight: It is not shown.
    """

    def inner():
        """One line."""
        return "a docstring\'s quotes: \\"\\"\\""

    return weight
'''


def test_docstrings_are_shown_by_their_first_line(displayed, tmp_path, monkeypatch):
    module = planted(tmp_path, monkeypatch, LONG)
    show(module.method)
    assert displayed[0].source.splitlines()[1] == '    r"""The first line, $x^2$."""'
    assert "Args" not in displayed[0].source
    assert '"""One line."""' in displayed[0].source
    compile(displayed[0].source, "shown", "exec")
    show(module.method, docstrings=True)
    assert "It is not shown" in displayed[1].source


def test_long_lines_are_broken_between_words_and_go_on_further_in(tmp_path, monkeypatch):
    module = planted(tmp_path, monkeypatch, LONG)
    markup = listing.listing(module.method).html()
    assert "max-width: calc(80ch" in markup
    assert "overflow-wrap: normal" in markup
    assert '<span class="w0">' in markup
    assert ".w0{display:inline-block;padding-left:4ch;text-indent:-4ch}" in markup


def test_a_listing_is_small():
    one = listing.listing(figures.render)
    assert len(one.html()) < 3 * len(one.source) + 1500


def test_every_colour_can_be_read_on_the_paper():
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    markup = listing.listing(listing).html()
    colours = set(re.findall(r"(?<![\w-])color: (#[0-9A-Fa-f]{6})", markup))
    assert len(colours) >= 4
    assert "<span style=" not in markup  # one sheet, not a style at each word
    paper = luminance(figures.PAPER)
    for colour in colours:
        assert (paper + 0.05) / (luminance(colour) + 0.05) >= 4.5, colour
