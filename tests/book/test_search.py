"""The search: what people type finds the chapter and the section that explains it."""

import json

import pytest
import quickjs

from effnb.book.site import search
from effnb.book.site.book import REPOSITORY, read_book, source
from effnb.book.site.reference import read_reference

SCRIPT = REPOSITORY / ".make" / "site" / "static" / "search.js"
CALLS = """
const loaded = bookSearch.load(window.effnbIndex);
const call = (name, ...given) => JSON.stringify(
  name === "rank" ? bookSearch.rank(loaded, ...given) : bookSearch[name](...given));
"""


def interpreter(index):
    context = quickjs.Context()
    context.eval("var window = {};")
    context.eval(search.as_script(index))
    context.eval(SCRIPT.read_text(encoding="utf-8") + CALLS + "globalThis.call = call;")
    asked = context.get("call")
    return lambda name, *given: json.loads(asked(name, *given))


def as_page(cells):
    """The prose of a chapter as a page: headings become sections, as Sphinx makes them."""
    from effnb.book.site.book import slug

    parts = []
    for cell in cells:
        if cell["cell_type"] != "markdown":
            continue
        for line in source(cell).splitlines():
            words = line.lstrip("# ")
            if line.startswith("#"):
                level = min(len(line) - len(line.lstrip("#")), 4)
                parts.append(f'</section><section id="{slug(words)}"><h{level}>{words}</h{level}>')
            else:
                said = line.replace("&", "&amp;").replace("<", "&lt;")
                parts.append(f"<p>{said}</p>" if said else "")
    return f"<article><section>{''.join(parts)}</section></article>"


@pytest.fixture(scope="module")
def ask():
    book, reference = read_book(), read_reference(REPOSITORY)
    pages = {one.name: as_page(one.notebook["cells"]) for one in book.written}
    terms = "".join(
        f'<dt><span class="word-anchor" id="word-{i}">{term.name}</span> {term.ja}</dt>'
        f"<dd>{term.means.replace('<', '&lt;')}</dd>"
        for i, term in enumerate(term for one in book.written for term in one.words.terms)
    )
    pages["glossary"] = f"<article><h1>Glossary</h1>{terms}</article>"
    pages["api/effnb.inference.pruning.wanda"] = (
        '<article><h1>pruning.wanda</h1><dl><dt id="effnb.inference.pruning.wanda.wanda">wanda'
        "</dt><dd>Quantization is not pruning; perplexity.</dd></dl></article>"
    )
    return interpreter(search.build(pages, book, reference))


FIRST = {
    "quantization": ("05_inference/3_quantization", ""),
    "2:4": ("05_inference/1_pruning", "who-competes-with-whom"),
    "SNIP": ("05_inference/1_pruning", "gallery"),
    "GPTQ": ("05_inference/3_quantization", "what-counts-is-the-output"),
    "ゼロ点": ("00_start_here", "the-idea-on-five-numbers"),
    "量子化": ("05_inference/3_quantization", ""),
    "perplexity": ("00_start_here", "what-is-measured"),
    "speculative decoding": ("05_inference/7_adaptive_computation", "draft-and-check"),
    "pruned": ("05_inference/1_pruning", ""),
    "YaRN": ("02_design/6_context", "four-ways-to-slow-down"),
    "LoRA": ("04_finetuning/1_delta_tuning", "lora-a-change-of-low-rank"),
    "distilled students": ("05_inference/5_distillation", None),
}


@pytest.mark.parametrize("query", FIRST)
def test_a_query_finds_its_chapter_first(ask, query):
    page, anchor = FIRST[query]
    first = ask("rank", query)[0]
    assert first["path"] == page
    if anchor is not None:
        assert first["sections"][0]["anchor"] == anchor


def test_every_japanese_term_finds_the_chapter_that_explains_it(ask):
    lost, count = [], 0
    for written in read_book().written:
        for term in written.words.terms:
            found = [hit["path"] for hit in ask("rank", term.ja, 50)]
            count += 1
            if written.name not in found[:3] or "glossary" not in found:
                lost.append((written.name, term.ja, found[:3]))
    assert count > 100
    assert lost == []


def test_both_spellings_find_the_same(ask):
    for ending in ("ation", "ed"):
        one, other = f"quantiz{ending}", f"quantis{ending}"
        assert [hit["path"] for hit in ask("rank", one)] == [
            hit["path"] for hit in ask("rank", other)
        ]


def test_chapters_come_before_the_glossary_and_the_reference(ask):
    for query in ("perplexity", "pruning", "quantization"):
        kinds = [hit["kind"] for hit in ask("rank", query, 50)]
        assert kinds == sorted(kinds)
        assert {search.CHAPTER, search.GLOSSARY} <= set(kinds)
    assert search.REFERENCE in kinds


def test_nothing_is_found_where_nothing_is(ask):
    assert ask("rank", "xylophone") == []
    assert ask("rank", "  ?! ") == []


def test_a_word_that_is_being_typed_finds_what_begins_so(ask):
    assert ask("rank", "quantiz")[0]["path"] == "05_inference/3_quantization"
    assert ask("rank", "specul")[0]["path"] == "05_inference/7_adaptive_computation"


def test_forms_of_a_word_have_one_stem_and_other_words_another(ask):
    for forms in (
        "prune pruned pruning prunes",
        "quantize quanti-se quantization quanti-sation quantizer quantized",
        "distil distill distilled distilling distillation",
        "colour color colours",
        "layer layers",
        "memory memories",
    ):
        assert len({ask("stem", form) for form in forms.replace("-", "").split()}) == 1, forms
    assert ask("stem", "loss") == "loss"
    assert ask("stem", "token") != ask("stem", "tokenizer")
    assert len({ask("stem", w) for w in ("string", "strong", "state", "static", "prompt")}) == 5


def test_words_are_marked_where_they_stand(ask):
    text = "Pruned weights, and pruning; a plum. 2:4 is semi-structured, ゼロ点 is zero."
    marked = [text[a:b] for a, b in ask("marks", text, "prune 2:4 ゼロ点 structured")]
    assert marked == ["Pruned", "pruning", "2:4", "structured", "ゼロ点"]
    long = "word " * 100 + "needle " + "word " * 100
    piece = ask("snippet", long, "needles")
    assert "needle" in piece and piece.startswith("… ") and piece.endswith(" …")
    assert len(piece) < 200


def test_a_page_is_read_as_it_is_seen():
    title, parts = search.sections(
        '<nav>menu</nav><article><section id="a"><h1>Title<a class="headerlink">#</a></h1>'
        '<p>First <span class="katex">x<span>y</span></span>words<br>here.</p><pre>code</pre>'
        '<section id="b"><h2>Second</h2><ul><li>one</li><li>two</li></ul>'
        '<dl><dt id="f.g">g(x)</dt><dd>Does it.</dd></dl></section></section></article><p>foot</p>'
    )
    assert title == "Title"
    assert [(one.anchor, one.heading, one.text) for one in parts] == [
        ("", "Title", "First words here."),
        ("b", "Second", "one two"),
        ("f.g", "g(x)", "Does it."),
    ]


def test_the_index_waits_until_someone_searches():
    script = SCRIPT.read_text(encoding="utf-8")
    assert "search-index.js" in script
    conf = (SCRIPT.parents[1] / "conf.py").read_text(encoding="utf-8")
    assert "search-index" not in conf
