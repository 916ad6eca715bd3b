import hashlib
import json
import re

import pytest

from effnb.lab import corpora, load, models, results
from effnb.lab._files import DamagedFile, data_folder, forget_use

PACKAGES = corpora.sha256("packages")
WITHOUT_MODELS = {
    "kernel_report",
    "kernels",
    *(f"02_design/1_attention_claims/{part}" for part in ("costs", "reading")),
    *(f"02_design/3_sharing_claims/{part}" for part in ("depth", "reading")),
    "02_design/3_sharing/universal",
    *(f"02_design/5_retention_claims/{part}" for part in ("decoding", "latency", "training")),
    "02_design/2_experts/speed",
    "05_inference/2_low_rank/latency",
    "06_hardware/2_codesign/experts",
    "06_hardware/2_codesign/scaling",
}
DATA = {"bits": [2, 3], "loss": [4.25, 3.5], "note": "Größe"}


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "data_folder", lambda: tmp_path)
    return tmp_path / "results"


def test_what_is_stored_is_read_with_its_origin():
    stored = results.store("sweep", DATA, "python -m something", device="an abacus")
    found = results.read("sweep")
    assert found == stored
    assert found.data == DATA
    about = found.provenance
    assert (about.command, about.device) == ("python -m something", "an abacus")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", about.date)
    assert {"python", "torch", "transformers"} <= set(about.versions)


def test_the_device_is_named_by_itself():
    assert re.match(r"(cpu|cuda|mps) \(.+\)", results.store("a", 1, "x").provenance.device)


def test_a_page_says_that_a_result_is_stored_and_where_from():
    stored = results.store("sweep", DATA, "make results < 1", device="cpu")
    assert str(stored).startswith("Stored result: sweep, computed on ")
    assert "by `make results < 1`." in str(stored)
    assert repr(stored) == str(stored)
    assert "make results &lt; 1" in stored._repr_html_()
    assert "<strong>Stored result:</strong>" in stored._repr_html_()


def test_the_same_result_is_the_same_file_and_lines_can_be_compared(own_folder):
    results.store("sweep", DATA, "x", device="cpu")
    first = (own_folder / "sweep.json").read_bytes()
    results.store("sweep", DATA, "x", device="cpu")
    assert (own_folder / "sweep.json").read_bytes() == first
    assert first.count(b"\n") > 8
    assert [path.name for path in own_folder.iterdir()] == ["sweep.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"data"', '"dato"'),
        lambda text: text.replace('"command"', '"commando"'),
    ],
    ids=["cut", "empty", "list", "no data", "no command"],
)
def test_a_damaged_file_is_one_sentence_with_the_remedy(own_folder, damage):
    results.store("sweep", DATA, "x")
    file = own_folder / "sweep.json"
    file.write_text(damage(file.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(DamagedFile, match=r"sweep.json is damaged: restore it with `git checkout"):
        results.read("sweep")


def test_bytes_that_are_no_text_are_damage_too(own_folder):
    own_folder.mkdir()
    (own_folder / "sweep.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedFile, match="is damaged"):
        results.read("sweep")


def test_a_missing_result_is_a_value_that_says_so():
    missing = results.read("05_inference/1_pruning/nothing")
    assert not missing
    assert missing == results.NotMeasured("05_inference/1_pruning/nothing")
    assert f"{missing.data['table'][0]['loss']:.2f}" == "not measured"
    assert list(missing.data["table"]) == [] and len(missing.data) == 0
    for said in (str(missing), repr(missing), missing._repr_html_()):
        assert "python data/sweeps/05_inference/1_pruning.py nothing" in said
    assert results.read("nothing").command == "make results"


def test_a_result_that_is_no_json_is_refused_and_leaves_the_old_one(own_folder):
    results.store("sweep", DATA, "x")
    for bad in ({"loss": float("nan")}, {"model": object()}):
        with pytest.raises(ValueError, match="cannot be stored as JSON"):
            results.store("sweep", bad, "x")
    assert results.read("sweep").data == DATA


@pytest.mark.parametrize(
    "name", ["../secret", "a/../b", "/a", "a//b", "a/", "", "Sweep", "a/.hidden", ".hidden", "a b"]
)
def test_names_that_leave_the_folder_are_refused(name):
    with pytest.raises(ValueError, match="cannot name a stored result"):
        results.read(name)
    with pytest.raises(ValueError, match="cannot name a stored result"):
        results.store(name, 1, "x")


def test_results_of_a_chapter_lie_in_its_folder(own_folder):
    results.store("05_inference/1_pruning/methods", DATA)
    results.store("kernels", DATA, "x")
    assert (own_folder / "05_inference/1_pruning/methods.json").is_file()
    assert results.names() == ["05_inference/1_pruning/methods", "kernels"]
    found = results.read("05_inference/1_pruning/methods")
    assert found.provenance.command == "python data/sweeps/05_inference/1_pruning.py methods"


# ------------------------------------------------------------------------- models and corpora


def test_what_was_read_is_stored_with_its_checksum():
    forget_use()
    assert results.store("empty", 1, "x").provenance.sha256 == {}
    load("mini-300k", device="cpu")
    corpora.choice_items(3)
    corpora.documents("novels", "test")
    found = results.store("sweep", 1, "x").provenance.sha256
    weights = data_folder() / "models/mini-300k/model.safetensors"
    assert found == {
        "corpus novels": corpora.sha256("novels"),
        "corpus packages": corpora.sha256("packages"),
        "model mini-300k": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    forget_use()
    corpora.choice_items(3)  # from the cache: it was read all the same
    assert list(results.store("sweep", 1, "x").provenance.sha256) == ["corpus packages"]


@pytest.mark.parametrize(
    "what", ["model mini-300k", "corpus novels", "corpus translations/de", "model of yesterday"]
)
def test_a_result_of_another_model_or_corpus_is_refused(what):
    results.store(
        "sweep", DATA, "python it.py", sha256={"corpus packages": PACKAGES, what: "0" * 64}
    )
    with pytest.raises(results.Outdated, match=rf"another {what} .* again with `python it\.py`\.$"):
        results.read("sweep")
    assert results.read("sweep", any_model=True).data == DATA


def test_a_model_that_is_not_installed_cannot_differ(monkeypatch):
    monkeypatch.setattr(models.metadata, "files", lambda name: None)
    results.store("sweep", DATA, "x", sha256={"model smollm2-135m": "0" * 64})
    assert results.read("sweep").data == DATA


def test_every_result_of_the_repository_can_be_read(monkeypatch):
    monkeypatch.setattr(results, "data_folder", data_folder)
    for name in results.names():
        found = results.read(name)
        assert found.provenance.command
        assert json.dumps(found.data)
        assert found.provenance.sha256 or name in WITHOUT_MODELS


READS = re.compile(
    r'def (\w+)\(part: str\)[^"]*"""[^"]*"""\s*return results\.read\(f"([^"]+)/\{part\}"'
)


def test_every_result_that_a_chapter_reads_is_stored_or_is_known_to_be_missing(monkeypatch):
    """What is missing is a part of the chapter's sweep, and the page says that it is."""
    monkeypatch.setattr(results, "data_folder", data_folder)
    root, named = data_folder().parent, set()
    for path in (
        one for top in ("notebooks", "effnb", "data") for one in (root / top).rglob("*.py")
    ):
        text = path.read_text(encoding="utf-8")
        named |= set(re.findall(r'results\.read\(\s*"([^"]+)"', text))
        # A chapter's companion reads `stored("methods")`, the chapter's name before it.
        for function, chapter in READS.findall(text):
            if "{CHAPTER}" in chapter:
                files = (one.read_text(encoding="utf-8") for one in path.parent.glob("*.py"))
                named_once = (re.findall(r'^CHAPTER = "([^"]+)"', one, re.M) for one in files)
                own = next(found[0] for found in named_once if found)
                chapter = chapter.replace("{CHAPTER}", own)
            page = root / "notebooks" / f"{chapter.removesuffix('_claims')}.py"
            for other in (page, *path.parent.glob("*.py")):
                source = other.read_text(encoding="utf-8")
                parts = re.findall(rf'\b{function}\("([^"]+)"', source)
                named |= {f"{chapter}/{part}" for part in parts}
    assert len(named) > 40
    for missing in sorted(named - set(results.names())):
        chapter, _, part = missing.rpartition("/")
        sweep = (data_folder() / "sweeps" / f"{chapter}.py").read_text(encoding="utf-8")
        assert f'"{part}": {part}' in sweep, missing
        page = root / "notebooks" / f"{chapter.removesuffix('_claims')}.ipynb"
        assert "Not measured here" in page.read_text(encoding="utf-8"), missing


def test_results_of_chapters_have_a_sweep(monkeypatch):
    monkeypatch.setattr(results, "data_folder", data_folder)
    for name in results.names():
        chapter = name.rpartition("/")[0]
        if chapter:
            assert (data_folder() / "sweeps" / f"{chapter}.py").is_file()
            assert results.read(name).provenance.command == results.command_of(name)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, True),
        ({"EFFNB_BUILD": "1"}, False),
        ({"EFFNB_SWEEP": "1"}, False),
        ({"EFFNB_SWEEP": "1", "EFFNB_FULL": "1"}, True),
    ],
)
def test_real_models_run_for_readers_and_in_full_tests_only(monkeypatch, variables, expected):
    for name in ("EFFNB_BUILD", "EFFNB_SWEEP", "EFFNB_FULL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert results.live() is expected
