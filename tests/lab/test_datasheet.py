"""The datasheet says what is so: its measurements are right, and its tables are in step."""

from __future__ import annotations

import importlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from effnb.lab import corpora, results

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def datasheet():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "data"))
        yield importlib.import_module("datasheet")


@pytest.fixture
def sheet(datasheet, tmp_path, monkeypatch):
    """A copy of the datasheet that the script takes for the real one."""
    copy = Path(shutil.copy(datasheet.SHEET, tmp_path / "DATASHEET.md"))
    monkeypatch.setattr(datasheet, "SHEET", copy)
    return copy


def run(datasheet, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["datasheet.py", *arguments])
    datasheet.main()


# -------------------------------------------------------------------------------- the sheet


def test_the_tables_are_in_step(datasheet, monkeypatch, capsys):
    run(datasheet, monkeypatch, "--check")
    assert capsys.readouterr().out == "DATASHEET.md is as it should be.\n"


def test_a_changed_number_is_found_and_written_again(datasheet, sheet, monkeypatch, capsys):
    good = sheet.read_text()
    sheet.write_text(good.replace("63,346", "63,347"))
    with pytest.raises(SystemExit, match="has old numbers; run `python data"):
        run(datasheet, monkeypatch, "--check")
    assert sheet.read_text() != good, "--check changes nothing"
    run(datasheet, monkeypatch)
    assert sheet.read_text() == good
    assert "new tables" in capsys.readouterr().out


def test_prose_is_left_alone(datasheet, sheet, monkeypatch):
    good = sheet.read_text()
    sheet.write_text(good.replace("Known problems:", "Known troubles:"))
    run(datasheet, monkeypatch)
    assert sheet.read_text() == good.replace("Known problems:", "Known troubles:")


def test_every_table_has_its_place(datasheet):
    with pytest.raises(ValueError, match="do not name the same tables: weather"):
        datasheet.render(datasheet.SHEET.read_text() + "<!-- table: weather -->\n<!-- end -->")


def test_models_that_do_not_exist_yet_are_left_out(datasheet, monkeypatch):
    monkeypatch.setattr(datasheet, "SHIPPED", ())
    assert datasheet.table_models()[0] == "No model has been trained yet."
    assert datasheet.table_recall() == ["No model has been scored yet."]
    assert not any("mini" in line for line in datasheet.table_losses())
    assert any("Kneser-Ney" in line for line in datasheet.table_losses())


def test_scores_of_older_weights_are_left_out(datasheet, monkeypatch):
    """A model that was trained again is not described by what was measured before."""
    manifest = {"mini-1m": {"model.safetensors": {"sha256": "new"}}}
    monkeypatch.setattr(datasheet, "_json", lambda path: manifest)
    for stored, expected in (("old", {}), ("new", {"mini-1m": {"weights_sha256": "new"}})):
        about = results.StoredResult("models", {"mini-1m": {"weights_sha256": stored}}, None)
        monkeypatch.setattr(results, "read", lambda name, about=about, **how: about)
        assert datasheet._scores() == expected


# ------------------------------------------------------------------------------ measurements


def test_counts_are_those_of_the_corpora(datasheet):
    splits = results.read("corpora").data["splits"]
    for name in corpora.NAMES:
        for split in corpora.SPLITS:
            texts = corpora.documents(name, split)
            about = splits[f"{name}, {split}"]
            assert about["documents"] == len(texts)
            assert about["bytes"] == sum(len(text.encode()) for text in texts)
    assert (
        sum("near" in about for about in results.read("corpora").data["duplicates"].values()) == 2
    )


def test_identical_descriptions_are_counted(datasheet):
    stored = results.read("corpora").data["duplicates"]
    training = {p.text for p in corpora.packages("train")}
    for split in ("validation", "test"):
        found = sum(p.text in training for p in corpora.packages(split))
        assert stored[split]["identical"] == found
        assert found <= stored[split]["near"]


def test_jaccard_by_hand(datasheet):
    assert datasheet.jaccard(np.array([1, 2, 3]), np.array([2, 3, 4, 5])) == 2 / 5


def test_minhash_agrees_as_often_as_the_sets(datasheet):
    """Sets of Jaccard 1/2 agree in about half of all rows, seeds averaged."""
    words = np.random.default_rng(0).integers(0, 2**63, 400, dtype=np.uint64)
    first, second = words[:300], words[100:]
    shares = []
    for seed in range(10):
        signatures = datasheet.minhash([np.sort(first), np.sort(second)], seed)
        shares.append((signatures[0] == signatures[1]).mean())
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)


def test_near_duplicates_are_those_an_exact_comparison_finds(datasheet):
    """Texts with a growing part of their words replaced: candidates from MinHash miss none."""
    rng = random.Random(0)
    words = [f"w{i}" for i in range(2000)]
    training = [" ".join(rng.choices(words, k=60)) for _ in range(40)]
    held = []
    for i in range(120):
        text = training[i % 40].split()
        text[20 : 20 + i // 10] = rng.choices(words, k=i // 10)
        held.append(" ".join(text))
    sets = [datasheet._hashes(datasheet._words(t), datasheet.SHINGLE) for t in held]
    known = [datasheet._hashes(datasheet._words(t), datasheet.SHINGLE) for t in training]
    expected = [max(datasheet.jaccard(s, k) for k in known) >= datasheet.LIKE for s in sets]
    assert 10 < sum(expected) < 110
    assert datasheet.near_duplicates(held, training) == expected


def test_copied_runs_by_hand(datasheet):
    """Ten words make three runs of eight; the first of them stands in the training text."""
    training = ["zero one two three four five six seven eight"]
    held = ["One two three four five, six seven: EIGHT nine ten"]
    assert datasheet.copied(held, training) == pytest.approx(1 / 3)


def test_sections_that_were_merged(datasheet, tmp_path, monkeypatch):
    import build_corpora

    sections = ["libs"] * 150 + ["tex"] * 3 + ["non-free/news"] * 2
    stanzas = [{"Package": f"p{i}", "Section": s} for i, s in enumerate(sections)]
    monkeypatch.setattr(build_corpora, "index_file", lambda folder, pattern: stanzas)
    assert datasheet.merged_sections(tmp_path) == {"tex": 3, "news": 2}


def test_merged_sections_are_no_labels():
    merged = results.read("corpora").data["merged_sections"]
    assert merged
    labels = {p.section for p in corpora.packages()}
    assert not labels & set(merged)
    assert "misc" in labels


def test_the_licence_notice_of_the_bible_is_kept():
    text = " ".join((ROOT / "data" / "DATASHEET.md").read_text().replace("> ", "").split())
    assert "provided for unrestricted use provided that this legend is included" in text
    assert json.loads((ROOT / "data" / "corpora" / "MANIFEST.json").read_text())["from"] in text
