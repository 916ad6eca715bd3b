"""The method index is read from the package, complete, and fresh where it stands."""

import ast
import re
from pathlib import Path

import pytest

from effnb.book import methods
from effnb.book.site.reference import Module, Reference, Thing, read_reference
from effnb.lab.chapters import SECTIONS, TABLE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reference():
    return read_reference(ROOT)


@pytest.fixture(scope="module")
def index(reference):
    return methods.methods(reference)


def test_the_readme_shows_the_index_as_it_is_now(index):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert methods.readme_with_index(text, index) == text
    assert methods.readme_with_index(text, index[1:]) != text


def test_each_method_is_found_by_its_name(index):
    by_name = {method.name: method for method in index}
    for name, function, chapter, paper in (
        ("Wanda", "effnb.inference.pruning.wanda", "05_inference/1_pruning", "2306.11695"),
        ("GPTQ", "effnb.inference.quantization.gptq", "05_inference/3_quantization", "2210.17323"),
        ("SVD-LLM", "effnb.inference.low_rank.svd_llm", "05_inference/2_low_rank", "2403.07378"),
        ("KIVI", "effnb.inference.quantization.kivi", "05_inference/3_quantization", "2402.02750"),
        ("SpAtten", "effnb.hardware.codesign.spatten", "06_hardware/2_codesign", "2012.09852"),
    ):
        found = by_name[name]
        assert (found.function, found.chapter) == (function, chapter)
        assert paper in found.papers
    assert "Wanda" not in by_name["GPTQ"].papers.values()
    assert by_name["LoRA"].function == "effnb.finetuning.lora.attach"
    assert by_name["LoRA"].section == "Fine-tuning"


def test_what_the_index_names_exists(index, reference):
    assert len(index) > 35
    for method in index:
        assert reference.find(method.function) == method.home
        assert method.chapter in TABLE and method.section in SECTIONS.values()
        assert all(re.fullmatch(r"\d{4}\.\d{4,5}", paper) for paper in method.papers)
    names = [method.name for method in index]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    assert set(methods.NAMES) <= {method.home for method in index}


def test_every_method_module_with_a_paper_is_in_the_index(index, reference):
    """A module whose docstring cites a paper, and whose package passes a model function on."""
    known = {method.home.rpartition(".")[0] for method in index}
    missing = {
        module.name
        for module in reference.modules.values()
        if module.name.split(".")[1:2] in ([s.split("_", 1)[1]] for s in SECTIONS)
        and re.search(r"arXiv", module.doc)
        and any(methods.gives_a_model(thing, reference) for thing in module.things)
    }
    assert missing - known == set()


def made(doc, *things, name="effnb.inference.pruning.wanda"):
    return Module(name, Path("x.py"), doc, tuple(things))


def function(name, signature, doc=""):
    arguments = tuple(a.arg for a in ast.parse(f"def f{signature}: ...").body[0].args.args)
    return Thing(name, "function", signature, doc, 1, arguments)


MODEL = "(model: Model, sparsity: float) -> Model"


def test_names_and_papers_are_read_from_docstrings():
    doc = 'Fisher pruning: a way.\n\nA. B, "Some\nTitle", 2024, arXiv 2401.00001.'
    one = function("fisher", MODEL)
    (found,) = methods.methods(
        Reference([made(doc, one, name="effnb.inference.pruning.fisher")], [])
    )
    assert found.name == "Fisher pruning"
    assert found.papers == {"2401.00001": "Some Title"}
    one = function("fisher_b", MODEL, "After FisherB (arXiv 2402.00002).")
    (found,) = methods.methods(Reference([made(doc, one)], []))
    assert (found.name, found.papers) == ("FisherB", {"2402.00002": ""})


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("wanda", "(weight: Tensor) -> Tensor"),
        ("wanda", "(model: Model) -> float"),
        ("wanda", "(module: Model) -> Model"),
    ],
)
def test_what_gives_no_model_is_no_method(name, signature):
    doc = "Wanda: a way (arXiv 2306.11695)."
    assert methods.methods(Reference([made(doc, function(name, signature))], [])) == []


def test_what_holds_a_model_counts():
    result = Thing("Result", "class", "", "", 1, ("model", "seconds"))
    one = function("wanda", "(model: nn.Module) -> Result")
    doc = "Wanda: a way (arXiv 2306.11695)."
    assert [m.name for m in methods.methods(Reference([made(doc, one, result)], []))] == ["Wanda"]


def test_a_method_without_a_chapter_is_one_sentence():
    doc, name = "Spell: y (arXiv 2306.11695).", "effnb.inference.magic.spell"
    module = made(doc, function("spell", MODEL), name=name)
    with pytest.raises(ValueError, match=rf"no chapter has the name of {name}"):
        methods.methods(Reference([module], []))


def test_a_readme_without_its_marks_is_one_sentence():
    with pytest.raises(ValueError, match="around its index"):
        methods.readme_with_index("nothing", [])


def test_the_site_links_chapters_and_functions(reference):
    page = methods.page(reference, {"05_inference/1_pruning"})
    assert '<a href="05_inference/1_pruning.html">Pruning</a>' in page
    assert "<td>Low rank</td>" in page  # it has no page in this book
    assert (
        'href="api/effnb.inference.pruning.wanda.html#effnb.inference.pruning.wanda.wanda"' in page
    )
    assert page.count("<tr>") == page.count("</tr>") == len(methods.methods(reference)) + 1
