"""Heads, footers and terms of finished pages, on small pages."""

import re

import pytest

from effnb.book.methods import breakable, methods
from effnb.book.site import finish, glossary
from effnb.book.site.address import Home
from effnb.book.site.book import REPOSITORY, read_book
from effnb.book.site.coded import linked_code
from effnb.book.site.katex import render
from effnb.book.site.numbers import numbered, referred
from effnb.book.site.pages import claims_part, in_words, methods_part, terms_part
from effnb.book.site.reference import read_reference
from effnb.book.site.web import prints_tables

SITE = Home("https://github.com/o/n", "main", "https://o.github.io/n/")
PAGE = """<!DOCTYPE html>
<html lang="en" data-content_root="../" data-theme="auto">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1.0" /><meta name="viewport" c="1">
<title>Pruning &#8212; effnb: a book</title>
<script src="../_static/doctools.js?v=1"></script><script src="../_static/book.js?v=2"></script>
<script src="../searchindex.js"></script><meta name="docsearch:language" content="en"/>
</head>
<body><p>Not in the article, though it is a long paragraph of more than forty letters.</p>
<article><h1>Pruning</h1><ul class="ways-out"><li>Download</li></ul>
<p>Weights that are <em>small</em> &amp; unimportant are set to zero here, one after the other.</p>
<img alt="a picture" src="../pictures/0123456789abcdef.png"><h2 id="x">Next</h2></article>
<footer class="prev-next-footer">next</footer></body></html>"""


@pytest.fixture(scope="module")
def book():
    return read_book()


def test_a_head_says_what_the_page_is():
    page = finish.with_head(PAGE, "05_inference/1_pruning", SITE)
    said = "Weights that are small &amp; unimportant are set to zero here, one after the other."
    assert f'<meta name="description" content="{said}">' in page
    assert '<meta property="og:title" content="Pruning">' in page
    address = "https://o.github.io/n/05_inference/1_pruning.html"
    assert f'<link rel="canonical" href="{address}">' in page
    image = "https://o.github.io/n/pictures/0123456789abcdef.png"
    assert f'<meta property="og:image" content="{image}">' in page
    assert page.count('name="viewport"') == 1
    assert "docsearch" not in page and "doctools" not in page and "searchindex" not in page
    assert "book.js" in page


def test_without_an_address_none_is_invented():
    page = finish.with_head(PAGE, "05_inference/1_pruning", Home())
    assert "canonical" not in page and "og:url" not in page and "og:image" not in page
    assert 'name="description"' in page


def test_a_page_without_scripts_has_colours_and_no_dead_controls():
    page = finish.with_head(PAGE, "05_inference/1_pruning", SITE)
    assert 'data-theme="light"' in page and 'data-theme="auto"' not in page
    without = re.search(r"<noscript>(.*?)</noscript>", page, re.DOTALL)[1]
    assert f'href="../_static/{finish.DARK}" media="(prefers-color-scheme: dark)"' in without
    assert ".panel-control" in without and "display: none" in without
    rules = finish.dark_rules(
        'a { b: c } html[data-theme="light"] { x: y }\n/* no */ html[data-theme="dark"] .k { d: e }'
    )
    assert rules == "html[data-theme] .k { d: e }"


def test_a_page_ends_with_version_date_and_licence():
    page = finish.with_footer(PAGE, "05_inference/1_pruning", "2026-11-28")
    footer = re.search(r'<footer class="book-footer">.*?</footer>', page, re.DOTALL)[0]
    assert finish.version() in footer and "2026-11-28" in footer
    assert "Apache License 2.0" in footer and 'href="../datasheet.html"' in footer
    assert finish.with_footer("<p>no footer</p>", "a", "2026-11-28") == "<p>no footer</p>"


def test_the_day_of_a_build_can_be_repeated(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert finish.build_day() == "1970-01-02"


def test_the_sitemap_has_every_page_but_the_helpers():
    said = finish.sitemap({"index": "", "claims": "", "404": "", "search": ""}, SITE.site, "2026")
    assert re.findall("<loc>(.*?)</loc>", said) == [
        "https://o.github.io/n/claims.html",
        "https://o.github.io/n/",
    ]


def test_rules_that_no_page_needs_go():
    style = (
        "@charset 'a';.gone{a:b}.gone, .here{c:d}.here .gone{e:f}#one:not(.gone):is(.x, .y){g:h}"
        "@media print{.gone{i:j}}@media (min-width:1px){p{k:l}}@font-face{m:n}a[b='.q'] p{o:p}"
    )
    assert finish.pruned(style, {"here", "one"}) == (
        "@charset 'a';.here{c:d}#one:not(.gone):is(.x, .y){g:h}"
        "@media (min-width:1px){p{k:l}}@font-face{m:n}a[b='.q'] p{o:p}"
    )


def test_what_a_first_view_fetches_is_added_up(tmp_path):
    folder = tmp_path / "05_inference"
    folder.mkdir()
    (folder / "1_pruning.html").write_text(PAGE)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0123456789abcdef.png").write_bytes(b"x" * 1000)
    fonts = tmp_path / "_static" / "fonts"
    fonts.mkdir(parents=True)
    (fonts / "a.woff2").write_bytes(b"y" * 500)
    (tmp_path / "_static" / "book.js").write_text("z" * 10_000)
    found = finish.first_load(tmp_path, "05_inference/1_pruning")
    assert found["pictures/0123456789abcdef.png"] == 1000
    assert found["_static/fonts/a.woff2"] == 500
    assert 0 < found["_static/book.js"] < 1000, "text is counted compressed"
    assert len(found) == 4


# ------------------------------------------------------------------------------------- the terms

TERMS = [
    glossary.Entry("2:4 sparsity", "word-24-sparsity", "Two of four.", "a/other"),
    glossary.Entry("sparsity", "word-sparsity", "Share of zeros.", "a/other"),
    glossary.Entry("Hessian", "word-hessian", "Second &lt;derivatives&gt;.", "a/other"),
    glossary.Entry("state", "word-state", "What it keeps.", "a/other"),
    glossary.Entry("nat", "word-nat", "Unit.", "a/other"),
]


def links(page):
    return re.findall(r'<a href="[./]*glossary\.html#([^"]+)"[^>]*>([^<]*)</a>', page)


def test_a_term_is_linked_where_it_is_first_used():
    page = glossary.linked(
        "<p>Hessian outside</p><article><h2>The Hessian</h2><p>A <code>Hessian</code> and"
        " <a href='#'>Hessian</a>; <em>Hessian</em> of 2:4 sparsity, the Hessian, two nats."
        " Nature has a state; hessians.</p><pre>nat</pre></article>",
        "a/here",
        TERMS,
    )
    assert links(page) == [
        ("word-hessian", "Hessian"),
        ("word-24-sparsity", "2:4 sparsity"),
        ("word-nat", "nats"),
    ]
    assert "<em><span" in page and "Second &lt;derivatives&gt;." in page
    described = set(re.findall(r'aria-describedby="([^"]+)"', page))
    assert described == set(re.findall(r'role="tooltip" id="([^"]+)"', page))


def test_everyday_words_are_linked_in_their_own_chapter_only():
    page = "<article><p>The state and the sparsity.</p></article>"
    assert [one for one, _ in links(glossary.linked(page, "a/here", TERMS))] == []
    own = [one for one, _ in links(glossary.linked(page, "a/other", TERMS))]
    assert own == ["word-state", "word-sparsity"]


def test_the_definition_opens_by_pointer_and_keyboard_and_closes():
    static = REPOSITORY / ".make" / "site" / "static"
    style = (static / "book.css").read_text(encoding="utf-8")
    assert ".term:is(:hover, :focus-within) > .term-means { display: block; }" in style
    assert "term-closed" in (static / "book.js").read_text(encoding="utf-8")


def test_every_method_and_the_terms_that_were_missed_are_in_the_glossary(book):
    reference = read_reference(REPOSITORY)
    page = terms_part(book) + methods_part(book, reference)
    anchors = re.findall(r'class="word-anchor" id="([^"]+)"', page)
    assert len(anchors) == len(set(anchors))
    for method in methods(reference):
        assert glossary.anchor(method.name) in anchors, method.name
    for word in ("nat", "Hessian", "Cholesky decomposition", "residual stream"):
        assert glossary.anchor(word) in anchors
    linked = {one.anchor for one in glossary.entries(book)}
    assert linked <= set(anchors)


def test_measured_claims_come_first_and_can_be_chosen(book):
    page = claims_part(book)
    assert 'select name="outcome"' in page and 'select name="section"' in page
    by_article = [re.findall(r'data-outcome="([^"]+)"', one) for one in page.split("\n## ")[1:]]
    for article in by_article:
        still = [outcome == "not yet measured" for outcome in article]
        assert still == sorted(still), "measured first"
    whole = [all(o == "not yet measured" for o in article) for article in by_article]
    assert whole == sorted(whole)
    assert page.count("data-section=") == page.count("data-outcome=") > 50


def test_figures_and_equations_are_numbered_in_order():
    page = numbered(
        '<div class="math-block">0</div><article><figure style="a"><img alt="b">'
        '<figcaption>One</figcaption></figure><div class="math-block">x</div>'
        '<figure style="b"><figcaption>code</figcaption></figure>'
        '<p class="panel-caption">Two</p><p class="panel-caption"></p><figure><img></figure>'
        '<div class="math-block">y</div><figure><img><figcaption>Three</figcaption></figure>'
        "</article>"
    )
    text = re.sub(r"<[^>]+>", "", page)
    assert text == "0Figure 1. One(1)xcodeFigure 2. Two(2)yFigure 3. Three"
    assert re.findall(r'id="([^"]+)"', page) == [
        *("figure-1", "equation-1", "figure-2", "equation-2", "figure-3"),
    ]


# ------------------------------------------------------------------------------------- the cells


@pytest.mark.parametrize(
    ("code", "shows", "folds"),
    [
        ("from a import tables\n\ntables.costs(1)", "<table>", True),
        ("claims_table(one)\nprint(tables.said(2))", "<table>", True),
        ("claims_table(one)", "<p>", False),
        ("x = tables.stored('a')\nclaims_table(x)", "<table>", False),
        ("wanda(model, 0.5)", "<table>", False),
        ("%matplotlib inline", "<table>", False),
    ],
)
def test_cells_that_only_print_tables_fold(code, shows, folds):
    cell = {"source": code, "outputs": [{"data": {"text/html": shows}}]}
    assert prints_tables(cell) == folds


def test_some_cells_of_the_book_fold_and_most_do_not(book):
    cells = [
        cell
        for written in book.written
        for cell in written.notebook["cells"]
        if cell["cell_type"] == "code"
    ]
    folded = sum(map(prints_tables, cells))
    assert 5 < folded < len(cells) / 4


# --------------------------------------------------------------------- references, code, outputs


FIGURE = "<figure><img><figcaption>{}</figcaption></figure>"
PANEL = '<section class="panel"><p>the first picture</p><p class="panel-caption">{}</p></section>'


def said_of(page):
    return re.findall(r"([\w ]+) \((?:<[^>]+>)?(Figure \d)", referred(numbered(page)))


def test_words_that_mean_a_figure_lead_to_it():
    page = (
        f"<article><p>See the picture below.</p>{FIGURE.format('One.')}"
        f"{PANEL.format('Two, of training.')}<ul><li>Like the first picture, or the picture above,"
        " or the panel at the top; the picture of training.</li></ul>"
        f"<p>In the next panel, a <em>small</em> thing.</p>{PANEL.format('Three.')}"
        "<p>The second panel, the right picture and the third panel.</p></article>"
    )
    assert [number for _, number in said_of(page)] == [
        *("Figure 1", "Figure 1", "Figure 2", "Figure 2", "Figure 2"),
        *("Figure 3", "Figure 3", "Figure 3"),
    ]
    assert 'href="#figure-1">Figure 1</a>)' in referred(numbered(page))


def test_words_that_mean_no_figure_stay_alone():
    page = f"<article><p>the picture above</p><pre><p>the picture below</p></pre>{FIGURE}</article>"
    assert said_of(page) == []
    assert said_of("<article><p>the first panel, the picture of health</p></article>") == []
    assert referred("<p>the first picture</p>") == "<p>the first picture</p>"


def test_an_equation_with_a_name_keeps_it():
    named = render(r"x \tag{a}", display=True)
    page = numbered(f'<article><div class="math-block">{named}</div></article>')
    assert 'class="eqno"' not in page and 'id="equation-1"' in page


def test_names_in_code_lead_to_the_reference():
    reference = read_reference(REPOSITORY)
    cell = '<div class="cell_input docutils"><div class="highlight"><pre>{}</pre></div></div>'
    first = cell.format(
        "<span>from</span> effnb.inference <span>import</span> <span>pruning</span>"
    )
    magic = cell.format("%matplotlib inline")
    text = "x <span>=</span> &quot;ä&quot;; <span>pruning</span>.<span>wanda</span>(x)\n"
    page = linked_code(first + magic + cell.format(text * 2), "05_inference/1_pruning", reference)
    links = re.findall(r'<a class="api-link" href="([^"]+)">(\w+)</a>', page)
    home = "../api/effnb.inference.pruning.wanda.html#effnb.inference.pruning.wanda.wanda"
    assert links == [(home, "wanda")], "once in a cell"


def test_printed_sentences_wrap_and_columns_do_not():
    page = '<div class="output stream highlight"><div class="highlight"><pre>{}</pre></div></div>'
    for text, wraps in (
        ("One long sentence. Another one.", True),
        ("<span>name</span>    value\na       1", False),
        ("  indented", False),
        ("a\tb", False),
    ):
        done = finish.with_sentences(page.format(text))
        assert ('class="sentences"' in done) == wraps, text


def test_a_sentence_of_a_docstring_has_its_formulas_set():
    done = in_words("Keep $x < 1$ of `a < b`, & more.")
    assert 'class="katex"' in done and "$" not in re.sub(r"<annotation.*?</annotation>", "", done)
    assert done.endswith(" of <code>a &lt; b</code>, &amp; more.")


def test_no_entry_of_the_glossary_shows_tex(book):
    reference = read_reference(REPOSITORY)
    said = re.sub(
        r"<annotation.*?</annotation>", "", methods_part(book, reference), flags=re.DOTALL
    )
    assert said.count('class="katex"') > 5 and not re.search(r"\$|\\[a-z]{2}", said)


def test_a_dotted_name_breaks_between_its_words():
    assert breakable("a.b_c.De") == "a.<wbr>b_<wbr>c.<wbr>De"
    assert breakable("_private.x") == "_private.<wbr>x"
