import json
import re

import pytest

from effnb.lab import results
from effnb.lab._files import DamagedFile, data_folder

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


def test_a_missing_file_is_one_sentence_with_the_remedy():
    with pytest.raises(DamagedFile, match=r"sweep.json is missing: .* or `make results`\.$"):
        results.read("sweep")


def test_a_result_that_is_no_json_is_refused_and_leaves_the_old_one(own_folder):
    results.store("sweep", DATA, "x")
    for bad in ({"loss": float("nan")}, {"model": object()}):
        with pytest.raises(ValueError, match="cannot be stored as JSON"):
            results.store("sweep", bad, "x")
    assert results.read("sweep").data == DATA


@pytest.mark.parametrize("name", ["../secret", "a/b", "", "Sweep", ".hidden", "a b"])
def test_names_that_leave_the_folder_are_refused(name):
    with pytest.raises(ValueError, match="cannot name a stored result"):
        results.read(name)
    with pytest.raises(ValueError, match="cannot name a stored result"):
        results.store(name, 1, "x")


def test_every_result_of_the_repository_can_be_read(monkeypatch):
    monkeypatch.setattr(results, "data_folder", data_folder)
    for file in sorted((data_folder() / "results").glob("*.json")):
        found = results.read(file.stem)
        assert found.provenance.command
        assert json.dumps(found.data)


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
