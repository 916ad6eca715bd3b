"""The ledger of claims: whole, readable, and registered before the measurement."""

import json
from collections import Counter

import pytest
from claim_rows import BEFORE, TODAY, content, part, plain, row, runs

from effnb.lab import claims
from effnb.lab._files import DamagedFile, data_folder
from effnb.lab.chapters import TABLE
from effnb.lab.claims import HOLDS, claims_from, judge, ledger

# --------------------------------------------------------------------------------- the ledger


def test_the_ledger_is_whole():
    rows = ledger()
    assert len(rows) == 68
    counts = Counter(name.split("-")[0] for name in rows)
    assert (counts["C"], counts["D"], counts["G"], counts["S"]) == (7, 13, 8, 27)
    assert rows["S-I3"].chapters == ("05_inference/3_quantization",)
    assert "memory and computation" in rows["S-I3"].claim
    assert "2209.00099" in rows["S-I3"].source


def test_every_claim_is_a_sentence_for_the_public():
    for one in ledger().values():
        text = one.claim
        assert text[0].isupper() and text.rstrip("])")[-1] in ".", one.id
        assert len(text) > 40
        for order in ("measure it", "measure the", "show what it", "print both", "over our"):
            assert order not in text.lower(), one.id


def test_every_claim_belongs_to_chapters_of_the_map():
    for one in ledger().values():
        assert one.chapters
        assert set(one.chapters) <= set(TABLE)
        assert {p.chapter for p in one.parts.values()} <= set(one.chapters)
    tested = {chapter for one in ledger().values() for chapter in one.chapters}
    assert tested == set(TABLE) - {"00_start_here"}


def test_a_damaged_ledger_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("effnb.lab.claims.registry.data_folder", lambda: tmp_path)
    ledger.cache_clear()
    try:
        with pytest.raises(DamagedFile, match=r"claims.json is missing; restore it with `git"):
            ledger()
        whole = (data_folder() / "claims.json").read_text()
        (tmp_path / "claims.json").write_text(whole[:5000])
        with pytest.raises(DamagedFile, match="claims.json is damaged"):
            ledger()
    finally:
        ledger.cache_clear()


# ------------------------------------------------------------------------------ registrations


def stored_ledger():
    return json.loads((data_folder() / "claims.json").read_text(encoding="utf-8"))


def test_registrations_are_as_they_were_dated():
    assert claims.changed_registrations() == []
    assert sum(bool(one.parts) for one in ledger().values()) == 54


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts[0].update(bound=0.3),
        lambda parts: parts[0].update(method={"method": "another"}),
        lambda parts: parts[0].update(seeds=3),
        lambda parts: parts.pop(),
    ],
    ids=["bound", "rows", "seeds", "part"],
)
def test_a_planted_post_hoc_bound_is_seen_in_the_ledger(change):
    planted = stored_ledger()
    change(planted["claims"]["C-4"]["parts"])
    assert claims.changed_registrations(planted) == ["C-4"]


def test_a_bound_that_is_younger_than_its_measurement_is_to_be_confirmed(register):
    register(row())
    for date, late in ((BEFORE, True), (TODAY, False)):
        found = judge("S-I3", rows=[*runs("quality", -0.1, date=date), plain(date=TODAY)])
        assert found.outcome == HOLDS
        assert found.post_hoc is late
        assert ("To be confirmed" in str(found)) is late
        assert bool(found.data()["confirm"]) is late


def test_no_part_may_choose_a_margin():
    with pytest.raises(ValueError, match="unknown key 'margin'"):
        claims_from(content(row(margin=0.5)))
    effects = stored_ledger()["smallest effects"]
    assert (effects["nats"], effects["accuracy"]) == (0.01, 0.01)
    for one in ledger().values():
        for each in one.parts.values():
            assert each.margin == effects[each.unit]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"expect": "better"}, "choose of"),
        ({"role": "proof"}, "choose of"),
        ({"expect": "nothing"}, "context, and nothing else"),
        ({"expect": "differ"}, "at least two groups"),
        ({"unit": "times"}, "bound above 0"),
        ({"unit": "furlongs"}, "smallest effect for nats"),
    ],
)
def test_registrations_that_cannot_be_judged_are_refused(more, words):
    with pytest.raises(ValueError, match=words):
        part(**more)


def test_two_parts_do_not_share_a_name():
    with pytest.raises(ValueError, match="two parts of S-I3 have the same name"):
        claims_from(content(row(), row()))
