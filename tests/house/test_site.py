"""The pages of the book are generated from what the chapters say, and grow with them.

The built pages are looked at in a browser by `tests/browser/test_site.py`.
"""

import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from effnb.book.site import __main__ as command
from effnb.book.site.api import module_page
from effnb.book.site.book import SiteError, formulas, read_book, resolve, slug, up
from effnb.book.site.docstrings import first_sentence, markdown
from effnb.book.site.guide import supported
from effnb.book.site.katex import SCRIPT, render
from effnb.book.site.panels import VIEW, NoPanel, panel_html, stored_panel
from effnb.book.site.reference import Reference, read_reference
from effnb.book.site.sources import write
from effnb.book.site.web import Web
from effnb.book.site.words import (
    Symbol,
    clashes,
    key,
    normal,
    read_words,
    symbols_in,
    unexplained,
)
from effnb.book.workshop.teaching import ENDING, read_teaching
from effnb.lab.claims import MIME, Contrast, Evidence, judged, ledger, student_point, untested

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / ".make" / "site"
START = json.loads((ROOT / "notebooks/00_start_here.ipynb").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def book():
    return read_book()


@pytest.fixture(scope="module")
def reference():
    return read_reference(ROOT)


# ------------------------------------------------------------------------------------ the book


@pytest.fixture(scope="module")
def sources(tmp_path_factory, book, reference):
    """The sources of all pages of the book as it is, and the complaints about docstrings."""
    folder = tmp_path_factory.mktemp("sources")
    return folder, write(folder / "pages", folder / "extra", book, reference)


def test_every_executed_chapter_has_a_page(sources, book):
    folder, _ = sources
    written = [one.name for one in book.chapters if one.written]
    assert written[0] == "00_start_here"
    for name in written:
        page = json.loads((folder / "pages" / f"{name}.ipynb").read_text(encoding="utf-8"))
        assert "widgets" not in page["metadata"]
        assert "data:image" not in json.dumps(page)
        assert "Run this chapter" in json.dumps(page["cells"][1])


def test_every_claim_is_on_the_claims_page_once(sources, book):
    text = (sources[0] / "pages" / "claims.md").read_text(encoding="utf-8")
    for name in ledger():
        assert text.count(f'id="{name}"') == 1
    cards = re.findall(r'<section class="claim[^"]*" id="([^"]+)".*?</section>', text, re.DOTALL)
    assert sorted(cards) == sorted(ledger())
    measured = {one["id"] for written in book.written for one in written.verdicts}
    still_open = re.findall(r'<section class="claim claim-open" id="([^"]+)"', text)
    assert set(still_open) == set(ledger()) - measured
    assert text.count("not yet measured") >= len(still_open) + 1  # each, and the summary


def test_the_map_says_what_the_last_build_measured(sources, book):
    text = (sources[0] / "pages" / "map.md").read_text(encoding="utf-8")
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</th>(.*?)</tr>", text, re.DOTALL)
    written = [chapter for chapter in book.chapters if chapter.written]
    assert len(rows) == len(written)
    apart = text.partition('<details class="unwritten">')[2]
    for chapter in book.chapters:
        assert (f"<li><strong>{chapter.title}</strong>" in apart) == (not chapter.written)
    for (title, rest), chapter in zip(rows, written):
        assert chapter.title in title
        if chapter.measured:
            assert f"{chapter.measured.seconds} s<" in rest
            assert f"{chapter.measured.mebibytes:,} MiB<" in rest


def test_every_symbol_of_the_book_is_introduced_once(book):
    declared = [(one.name, symbol) for one in book.written for symbol in one.words.symbols]
    assert clashes(declared) == []
    assert unexplained([(one.name, one.mathematics) for one in book.written], declared) == []


def test_files_beside_chapters_belong_to_one(book):
    endings = (".toml", ENDING)
    names = {f"{chapter.name}{ending}" for chapter in book.chapters for ending in endings}
    found = {p.relative_to(book.folder).as_posix() for p in book.folder.rglob("*.toml")}
    assert found
    assert found <= names
    for name in found:  # also of chapters that have not been executed yet
        read = read_teaching if name.endswith(ENDING) else read_words
        read(book.folder / name)


def test_docstrings_are_well_formed(sources):
    assert sources[1] == []


def test_the_run_button_says_what_the_readme_says(sources):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = (sources[0] / "pages" / "00_start_here.ipynb").read_text(encoding="utf-8")
    for line in ("make lab", "py .make/setup.py lab", "3.11, 3.12 or 3.13"):
        assert line in page
        assert line in readme


# --------------------------------------------------------------------------- a book that grows

CHAPTER = "05_inference/3_quantization"
WORDS = r"""
[[symbol]]
tex = 'H'
means = "second moments of a layer's inputs, two by two"

[[term]]
name = "calibration"
ja = "キャリブレーション"
means = "running a few texts through a model to see what its layers are given"
at = "The idea"

[[advice]]
goal = "The model takes too much memory"
when = "there is data to calibrate with"
use = "Take GPTQ."
because = [{ claim = "C-3", part = "quality-fine-tuning-3" }]
"""


def loss(low, high):
    part = ledger()["C-3"].parts["quality-fine-tuning-3"]
    error = (high - low) / 2 / student_point(0.95, 100)
    return Evidence(part, (Contrast("", (low + high) / 2, error, 100),), 5, 24, "2030-01-31")


def planted(folder, evidence=None, words=WORDS, prose="We use $H = X X^\\top$ of [start](X)."):
    """The book's folder with one more executed chapter in it."""
    shutil.copytree(ROOT / "notebooks" / "images", folder / "images")
    for name in ("00_start_here.ipynb", "00_start_here.toml"):
        shutil.copy(ROOT / "notebooks" / name, folder / name)
    evidence = evidence or loss(-0.3, -0.1)
    rest = [p for p in ledger()["C-3"].parts.values() if p != evidence.part]
    verdict = judged("C-3", [evidence, *(untested(p, "it takes days") for p in rest)], "Planted.")
    prose = prose.replace("(X)", "(../00_start_here.ipynb#the-map)")
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": "# Quantization\n\nFewer bits."},
        {"cell_type": "markdown", "metadata": {}, "source": f"## The idea\n\n{prose}"},
        {
            "cell_type": "code",
            "metadata": {},
            "source": "from effnb.inference import quantization\nquantization.rtn",
            "execution_count": 1,
            "outputs": [
                {
                    "output_type": "display_data",
                    "metadata": {},
                    "data": {MIME: {"verdicts": [verdict.data()]}, "text/html": "<p>…</p>"},
                }
            ],
        },
    ]
    measured = {"seconds": 40, "mebibytes": 1200, "cores": 2}
    notebook = START | {
        "cells": cells,
        "metadata": START["metadata"] | {"effnb": {"minutes": 25}, "measured": measured},
    }
    path = folder / f"{CHAPTER}.ipynb"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    path.with_suffix(".toml").write_text(words, encoding="utf-8")
    return read_book(folder)


def texts(folder):
    return {p.stem: p.read_text(encoding="utf-8") for p in (folder / "pages").glob("*.md")}


def test_a_new_chapter_appears_everywhere_by_itself(tmp_path, reference):
    grown = planted(tmp_path / "notebooks")
    write(tmp_path / "pages", tmp_path / "extra", grown, reference)
    found = texts(tmp_path)
    assert f"/{CHAPTER}\n" in found["index"]
    assert "Written so far: 2 of 29" in found["index"]
    sidebar = json.loads((tmp_path / "pages" / "contents.json").read_text(encoding="utf-8"))
    pages = [[page["page"] for page in group["pages"]] for group in sidebar]
    assert pages[:2] == [["reading", "00_start_here"], [CHAPTER]]
    assert sidebar[1]["caption"] == "Inference"
    assert "1,200 MiB" in found["map"]
    assert "65 minutes" not in found["map"]
    assert "35 minutes to read" in found["map"]
    card = re.search(r'id="C-3".*?</section>', found["claims"], re.DOTALL)[0]
    assert "holds in part</span>" in card
    assert "It would hold in full if" in card
    assert "it takes days" in card
    assert f"{CHAPTER}.html#claim-C-3" in card
    assert "-0.2 [-0.3, -0.1]" in card
    assert "| $H$ | second moments" in found["notation"]
    assert "キャリブレーション" in found["glossary"]
    assert f"(/{CHAPTER}.ipynb#the-idea)" in found["glossary"]
    assert "Take GPTQ." in found["which"]
    assert f"{CHAPTER}.html#claim-C-3" in found["which"]
    rtn = (tmp_path / "pages" / "api" / "effnb.inference.quantization.rtn.md").read_text("utf-8")
    assert f"[Quantization](/{CHAPTER}.ipynb#the-idea)" in rtn
    page = (tmp_path / "pages" / f"{CHAPTER}.ipynb").read_text(encoding="utf-8")
    assert "(/00_start_here.ipynb#the-map)" in page
    assert (
        "../api/effnb.inference.quantization.rtn.html#effnb.inference.quantization.rtn.rtn" in page
    )


def test_advice_that_a_measurement_no_longer_supports_disappears(tmp_path):
    for name, evidence in (("undecided", loss(-0.3, 0.1)), ("contradicted", loss(0.1, 0.3))):
        grown = planted(tmp_path / name / "notebooks", evidence)
        assert list(supported(grown.find(CHAPTER))) == []
    wanted = WORDS.replace(
        'part = "quality-fine-tuning-3"', 'part = "quality-fine-tuning-3", outcome = "contradicted"'
    )
    grown = planted(tmp_path / "wanted" / "notebooks", loss(0.1, 0.3), wanted)
    assert len(list(supported(grown.find(CHAPTER)))) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('part = "quality-fine-tuning-3"', 'part = "speed"'), "rests on 0 measurements of C-3"),
        (('claim = "C-3"', 'claim = "C-4"'), "rests on 0 measurements of C-4"),
        (('at = "The idea"', 'at = "The end"'), "no such heading"),
        (('name = "calibration"', 'name = "Perplexity"'), "both explain the term"),
        (("tex = 'H'", "tex = 'b'"), "which 00_start_here introduces already"),
        (("means = ", "mean = "), "unexpected keyword argument 'mean'"),
        (('ja = "キャリブレーション"', 'ja = ""'), "'ja' is empty"),
        (("[[term]]", "[[terms]]"), "'terms' is none of"),
        (('[{ claim = "C-3", part = "quality-fine-tuning-3" }]', "[]"), "names no measurement"),
        (
            ('part = "quality-fine-tuning-3"', 'part = "quality-fine-tuning-3", outcome = "fine"'),
            "is no outcome",
        ),
    ],
)
def test_what_a_chapter_adds_is_checked(tmp_path, change, said):
    with pytest.raises(SiteError, match=re.escape(said)):
        write(
            tmp_path / "pages",
            tmp_path / "extra",
            planted(tmp_path / "notebooks", words=WORDS.replace(*change)),
            Reference([], []),
        )


@pytest.mark.parametrize(
    ("prose", "said"),
    [
        ("[a](../../secret.txt)", "lies outside"),
        ("[a](nowhere.ipynb)", "which is not in the book"),
        ("![a](images/none.png)", "no file below notebooks"),
    ],
)
def test_links_of_chapters_lead_into_the_book(tmp_path, prose, said):
    prose = prose.replace("../../", "../../../")
    with pytest.raises(SiteError, match=said):
        write(
            tmp_path / "pages",
            tmp_path / "extra",
            planted(tmp_path / "notebooks", prose=prose),
            Reference([], []),
        )


def test_links_change_with_their_targets(tmp_path, book, reference):
    web = Web(book, reference, tmp_path / "pages", tmp_path / "extra")
    page = "05_inference/1_pruning"
    assert web.prose(page, "[t](../00_start_here.ipynb)") == "[t](/00_start_here.ipynb)"
    assert web.prose(page, "[data](../../data/DATASHEET.md#x)") == "[data](/datasheet.md#x)"
    assert web.prose(page, "[out](https://a.b/c)") == "[out](https://a.b/c)"
    assert web.prose(page, "`[t](../nowhere.ipynb)`") == "`[t](../nowhere.ipynb)`"
    unwritten = next(one for one in book.chapters if not one.written)
    assert web.prose("00_start_here", f"[later]({unwritten.name}.ipynb)") == "later"
    code = web.prose(page, "[code](../../effnb/lab/checks.py#L7)")
    assert code == '<a href="../source/effnb/lab/checks.py.html#L-7">code</a>'
    assert web.sources == {"effnb/lab/checks.py"}


def test_paths_and_anchors():
    assert up("05_inference/1_pruning") == "../"
    assert up("index") == ""
    assert resolve("05_inference/1_pruning", "../../data/x.md") == "data/x.md"
    assert slug("What it costs, and saves") == "what-it-costs-and-saves"
    assert formulas("a $b$ `$c$` \\$5 $$\nd\n$$\n```\n$e$\n```") == ["b", "\nd\n"]


# --------------------------------------------------------------------------------------- symbols


@pytest.mark.parametrize(
    ("tex", "symbols"),
    [
        (r"\hat{W}_{ij} = s\,(Q_{ij} - z)", {r"\hat W", "s", "Q", "z"}),
        (r"H = \frac{2}{N} X X^\top", {"H", "N", "X"}),
        (r"\mathbf{x}_t^{T}, \mathcal{L}(\theta)", {r"\mathbf x", r"\mathcal L", r"\theta"}),
        (r"\operatorname{softmax}(z/\tau), \text{where } x > 0", {"z", r"\tau", "x"}),
        (r"a_\text{max} + b_{i_{j}} - 2^{k-1}", {"a", "b", "k"}),
        (r"\begin{aligned} a &= b \\ c &= d \end{aligned}", set("abcd")),
        (r"e^{-x}, \log_2 p, \min, \lVert v \rVert_2", {"x", "p", "v"}),
        (r"s = \frac{\max - \min}{2^b - 1}", {"s", "b"}),
        (r"\alpha\beta \bar x", {r"\alpha", r"\beta", r"\bar x"}),
    ],
)
def test_symbols_of_a_formula(tex, symbols):
    assert symbols_in(tex) == symbols


def test_a_symbol_without_meaning_and_one_with_two_are_found():
    b, other = Symbol("b", "bits"), Symbol(r"\hat{w}", "read back")
    assert normal(other.tex) == normal(r"\hat w")
    [said] = unexplained([("one", ["b + c"])], [("one", b)])
    assert "one uses the symbol c" in said
    [said] = unexplained([("one", ["b"])], [("one", b), ("one", other)])
    assert "never used there" in said
    [said] = clashes([("one", b), ("two", Symbol("b", "bias"))])
    assert "two introduces the symbol b, which one introduces already" in said
    assert clashes([("one", b), ("two", Symbol("b", "bias", local=True))]) == []
    assert unexplained([("one", ["b"]), ("two", ["b"])], [("one", b)]) == []
    # A hat is explained once, whatever wears it.
    hat = Symbol(r"\hat{\cdot}", "read back")
    assert unexplained([("one", [r"\hat b", "b"])], [("one", b), ("one", hat)]) == []
    assert len(unexplained([("one", [r"\hat c"])], [("one", hat)])) == 1
    assert [key(tex) for tex in (r"\Omega_i(b)", "e_i", r"\hat{W}_{ij}", "b")] == [
        *(r"\Omega", "e", r"\hat W", "b"),
    ]
    # What is local to one chapter explains nothing in another.
    local = replace(b, local=True)
    assert len(unexplained([("one", ["b"]), ("two", ["b"])], [("one", local)])) == 1


# ---------------------------------------------------------------------------------------- panels


def views(notebook):
    return [
        output["data"][VIEW]["model_id"]
        for cell in notebook["cells"]
        for output in cell.get("outputs", ())
        if VIEW in output.get("data", {})
    ]


def test_a_stored_panel_becomes_plain_html():
    panel = stored_panel(START, views(START)[-1])
    (knob,) = panel.knobs
    assert knob.label == "bits"
    assert knob.positions == ("2", "3")
    assert knob.positions[knob.start] == "2"
    assert panel.question is None
    page = panel_html(panel, "p1", lambda content: content)
    assert page.count('class="panel-frame"') == 2
    assert page.count(" hidden>") == 1
    assert '<input type="range" id="p1-knob" min="0" max="1" step="1" value="0"' in page
    assert 'aria-valuetext="2"' in page
    assert page.count("aria-live") == 0  # frames do not all speak; one line does
    assert page.count('role="status"') == 1
    assert "<style" not in page


def test_a_choice_becomes_radio_buttons():
    panel = stored_panel(START, views(START)[-1])
    choice = replace(panel.knobs[0], slider=False, label='a "b"')
    panel = replace(panel, knobs=(choice,), title="")
    page = panel_html(panel, "p1", lambda content: content)
    assert page.count('type="radio"') == 2
    assert page.count(" checked>") == 1
    assert "<legend>a &quot;b&quot;</legend>" in page
    assert 'aria-label="a &quot;b&quot;"' in page


def test_a_widget_that_is_no_panel_is_refused():
    state = START["metadata"]["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    slider = next(key for key, one in state.items() if one["model_name"] == "SelectionSliderModel")
    with pytest.raises(NoPanel, match="SelectionSlider"):
        stored_panel(START, slider)
    with pytest.raises(NoPanel, match="not stored"):
        stored_panel(START, "nothing")
    bare = json.loads(json.dumps(START))
    stacks = bare["metadata"]["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    for one in stacks.values():
        if one["model_name"] == "StackModel":
            one["state"]["children"].pop()
    with pytest.raises(NoPanel, match="2 positions and 1 frame"):
        stored_panel(bare, views(START)[-1])


# ------------------------------------------------------------------------------------- reference

MODULE = '''
r"""Planted: a module. It has $x^2$.

    from effnb.planted import double
"""
from __future__ import annotations
from dataclasses import dataclass, field

LIMIT = 3
"""How many."""
UNSAID = 4


@dataclass(frozen=True)
class Pair:
    """Two.

    Attributes:
        left: The first, see `double`.
    """

    left: int
    right: list[int] = field(default_factory=list)

    @property
    def both(self) -> int:
        """The sum."""

    @both.setter
    def both(self, value: int) -> None:
        """Put another in its place."""

    def _hidden(self):
        pass

    @classmethod
    def of(cls, value: int, /, *, twice: bool = False) -> Pair:
        """One of it."""


def double(weight: Float[Tensor, "out in"], *rest, bits: int = 4, **more: int) -> Pair:
    r"""Twice $\\frac{1}{2}$ and `Pair.both`, for <b> & [x].

    Args:
        weight: A matrix;
            more of it.
        **more: Anything.

    Returns:
        A pair.

    Raises:
        ValueError: When it is odd.
    """


def half_written(x):
    """Has $\\\\frac{1$, costs $5 and has `an open tick.

    Args:
        y: Not taken.

    Nonsense:
        $$
        x
    {weird} ::: (a)=
    """


def _private():
    """Hidden."""
'''


@pytest.fixture
def package(tmp_path):
    """A planted repository, read."""
    folder = tmp_path / "effnb" / "planted"
    folder.mkdir(parents=True)
    (tmp_path / "effnb" / "__init__.py").write_text('"""All."""\n')
    (folder / "__init__.py").write_text('"""Passes on."""\nfrom .inner import double as double\n')
    (folder / "inner.py").write_text(MODULE, encoding="utf-8")
    (folder / "_hidden.py").write_text("def f():\n    pass\n")
    (folder / "broken.py").write_text("def f(:\n")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "matmul.py").write_text(
        '"""A kernel."""\n\n\ndef matmul(a):\n    """C."""\n'
    )
    return read_reference(tmp_path)


def test_what_is_public_is_found_by_walking(package):
    assert set(package.modules) == {
        "effnb", "effnb.planted", "effnb.planted.inner", "effnb.kernels.matmul",
    }  # fmt: skip
    things = {thing.name: thing for thing in package.modules["effnb.planted.inner"].things}
    assert list(things) == ["LIMIT", "Pair", "double", "half_written"]
    assert things["LIMIT"].signature == " = 3"
    assert things["double"].signature == (
        "(weight: Float[Tensor, 'out in'], *rest, bits: int = 4, **more: int) -> Pair"
    )
    assert things["Pair"].signature == "(left: int, right: list[int] = list())"
    members = {one.name: one for one in things["Pair"].members}
    assert [one.name for one in things["Pair"].members] == ["Pair.both", "Pair.of"]
    assert members["Pair.both"].kind == "property"
    assert members["Pair.of"].signature == "(value: int, /, *, twice: bool = False) -> Pair"
    assert members["Pair.of"].options == ("classmethod",)


def test_names_lead_to_where_they_are_defined(package, reference):
    assert package.find("effnb.planted.double") == "effnb.planted.inner.double"
    assert package.find("effnb.planted.inner.Pair.both") == "effnb.planted.inner.Pair.both"
    assert package.find("effnb.planted.nothing") is None
    assert package.shortest("effnb.planted.inner.double") == "effnb.planted"
    rtn = "effnb.inference.quantization.rtn"
    assert reference.find(rtn) == f"{rtn}.rtn"  # a function stands before the module of its name
    # Looked up when it is used, and defined in a module of the package.
    assert reference.find("effnb.lab.panel") == "effnb.lab.panels.interactive.panel"
    code = (
        "from effnb.inference import quantization as q\nq.rtn(1)\nfrom effnb.lab import load\nload"
    )
    assert reference.used_in(code) == [f"{rtn}.rtn", "effnb.lab.models.load"]
    assert reference.used_in("this is not (python") == []


def test_ill_formed_docstrings_are_reported_and_stop_nothing(package):
    said = "\n".join(package.problems)
    assert "broken.py cannot be read" in said
    assert "half_written describes 'y', which it does not take" in said
    assert re.search(r"half_written has the formula", said)
    assert "double" not in said
    assert "Pair" not in said
    for module in package.modules.values():
        assert module_page(module, package, {})


def test_docstrings_become_markdown(package):
    module = package.modules["effnb.planted.inner"]
    things = {thing.name: thing for thing in module.things}
    said = markdown(things["double"].doc, package, module)
    assert ":param weight: A matrix;\n  more of it." in said
    assert ":param **more: Anything." in said
    assert ":returns: A pair." in said
    assert ":raises ValueError: When it is odd." in said
    assert "\\<b>" in said
    assert "{py:obj}`Pair.both <effnb.planted.inner.Pair.both>`" in said
    assert "```python\nfrom effnb.planted import double\n```" in markdown(
        module.doc, package, module
    )
    assert first_sentence("One, e.g. this. Two.\n\nThree.") == "One, e.g."
    assert first_sentence("All of\nit\n\nrest") == "All of it"


def test_an_empty_reference_has_nothing():
    assert Reference([], []).find("effnb.x") is None


# ------------------------------------------------------------------------------------ mathematics


def test_formulas_are_set_without_a_browser():
    assert "katex-mathml" in render(r"\frac{a}{b}")
    assert "katex-display" in render("a", display=True)
    with pytest.raises(ValueError, match="Unexpected end of input"):
        render(r"\frac{a")


VENDORED = {  # file below .make/site: npm package, SHA-256
    "vendor/katex.min.js": (
        "katex@0.19.1",
        "fa140498b8cfc8302cbe5e7cb1bdbc1f952bc38b3fa258ede09e73edbf9a74bc",
    ),
    "static/katex/katex.min.css": (
        "katex@0.19.1",
        "00e0b094171b07f58422075f469b4feac2b2f7bce1aeec943c08da4d697f4dcf",
    ),
}


def test_files_of_others_are_what_was_published():
    for name, (package, digest) in VENDORED.items():
        found = hashlib.sha256((SITE / name).read_bytes()).hexdigest()
        assert found == digest, f"{name} is not the file of {package}"
    assert SCRIPT == SITE / "vendor/katex.min.js"
    for folder in ("static/katex", "static/fonts"):
        assert (SITE / folder / "LICENSE").stat().st_size > 500
    style = (SITE / "static/katex/katex.min.css").read_text()
    wanted = set(re.findall(r"url\((fonts/[^)]+\.woff2)\)", style))
    assert wanted == {f"fonts/{p.name}" for p in (SITE / "static/katex/fonts").iterdir()}
    own = (SITE / "static/book.css").read_text()
    assert {f"fonts/{p.name}" for p in (SITE / "static/fonts").glob("*.woff2")} == set(
        re.findall(r"url\((fonts/[^)]+)\)", own)
    )


# -------------------------------------------------------------------------------------- building


def sphinx(folder, text, package=None):
    """Build one page, and the reference of a planted package, as `make site` does."""
    pages = folder / "pages"
    pages.mkdir()
    below = []
    for module in (package.modules if package else {}).values():
        (pages / f"{module.name}.md").write_text(module_page(module, package, {}), encoding="utf-8")
        below.append(module.name)
    tree = "\n".join(["", "```{toctree}", *below, "```"]) if below else ""
    (pages / "index.md").write_text(f"# Title\n\n{text}\n{tree}\n", encoding="utf-8")
    (pages / "contents.json").write_text("[]")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going"),
            *("-c", str(SITE), "-d", str(folder / "trees"), str(pages), str(folder / "out")),
        ],
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


def test_half_written_docstrings_give_no_warning(tmp_path, package):
    status, said = sphinx(tmp_path, "Fine: $x^2$.", package)
    assert said == ""
    assert status == 0
    page = (tmp_path / "out" / "effnb.planted.inner.html").read_text(encoding="utf-8")
    assert '[Tensor, "out in"]' in html.unescape(re.sub(r"<[^>]+>", "", page))
    assert "Attributes" in page
    assert "katex" in page


def test_a_warning_is_an_error(tmp_path):
    status, said = sphinx(tmp_path, "A formula $\\frac{a$ and a [link](nowhere.md).")
    assert status != 0
    assert "cannot be set" in said
    assert "nowhere.md" in said


def test_a_folder_that_is_no_site_is_not_emptied(tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("mine")
    assert command.main(["--out", str(tmp_path)]) == 1
    assert "no site" in capsys.readouterr().err
    assert (tmp_path / "precious.txt").read_text() == "mine"
