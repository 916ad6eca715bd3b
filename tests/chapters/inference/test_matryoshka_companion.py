"""The companion of the chapter on Matryoshka: exercises, collection, helpers, tables, panels."""

import math
from types import SimpleNamespace

import pytest
import torch

from effnb.chapters.inference.matryoshka import (
    collection,
    drawings,
    exercises,
    live,
    methods,
    panels,
    shipped,
    tables,
)
from effnb.inference import matryoshka
from effnb.lab import results

EXERCISES = [exercises.cutting, exercises.working, exercises.training]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- exercises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


def test_references_agree_with_the_package():
    q, d = randn(5, 8), randn(5, 8, seed=1)
    ours = matryoshka.prefix(q, 3) @ matryoshka.prefix(d, 3).T
    torch.testing.assert_close(exercises.cut_cosine(q, d, 3), ours)
    torch.testing.assert_close(
        exercises.nested_loss(q, d, (2, 8)), matryoshka.matryoshka_loss(q, d, (2, 8))
    )
    found = matryoshka.funnel(q, randn(40, 8), 5, dims=(2, 4, 8), shortlists=(20, 10))
    assert found.multiplications[0] == exercises.funnel_work(40, (2, 4, 8), (20, 10))
    assert tables.work(40, 2, 20, 8) == exercises.funnel_work(40, (2, 8), (20,))


# --- the collection -------------------------------------------------------------------------------


def test_nothing_that_is_searched_was_trained_with():
    here = collection.collection()
    assert len(here.documents) == collection.DOCUMENTS
    assert len(here.pairs) == collection.PAIRS
    sources = [p.source for p in here.documents]
    assert len(set(sources)) > 0.97 * len(sources)  # a source lies in one split, but for a few
    assert {p.split for p in here.pairs} == {"train"}
    texts = {" ".join(p.text.lower().split()) for p in here.documents}
    assert len(texts) == len(here.documents)
    assert not texts & {" ".join(p.text.lower().split()) for p in here.pairs}
    for split, rows in here.asked.items():
        assert len(rows) == len(set(rows)) == collection.QUERIES[split]
        assert {here.documents[i].split for i in rows} == {split}


def test_the_choice_is_the_same_each_time():
    before = collection.collection()
    collection.collection.cache_clear()
    again = collection.collection()
    assert again.asked == before.asked
    assert [p.name for p in again.documents] == [p.name for p in before.documents]


# --- what the sweep measures ----------------------------------------------------------------------


def test_prefixes_that_keep_their_length_are_ranked_by_it():
    q = torch.tensor([[1.0, 0.0, 0.0]]).repeat(1, 1)
    d = torch.zeros(12, 3)
    d[:, 0] = torch.linspace(0.1, 0.9, 12)
    d[:, 1] = torch.linspace(0.0, 0.8, 12)
    found = methods.not_divided(q, d, 2)
    assert found.rows[0, 0] == 11
    assert matryoshka.search(q, d, 10, dims=2).rows[0, 0] == 0


def test_means_of_a_search():
    q, d = randn(6, 8), randn(30, 8, seed=1)
    exact = matryoshka.search(q, d, methods.K)
    row = methods.means(matryoshka.search(q, d, methods.K, dims=4), exact.rows[:, 0], exact)
    assert 0 < row["neighbours"] < 1
    assert row["multiplications"] == 120
    assert row["first"] <= row["ten"]
    assert methods.means(exact, exact.rows[:, 0], exact)["first"] == 1


def test_a_nested_classifier_learns_and_a_cut_one_gets_a_head():
    y = torch.arange(120) % 3
    e = torch.nn.functional.normalize(randn(120, 384) + 3 * randn(3, 384, seed=1)[y], dim=1)
    model = methods.train_classifier(e, y, (2, 8), 0, steps=40)
    logits = model(e)
    shares = {m: float(methods.right(x, y).float().mean()) for m, x in logits.items()}
    assert shares[8] > 0.9
    assert shares[2] > 0.5
    other = methods.train_classifier(e, y, (2, 8), 1, tied=True, steps=2)
    assert len(other.heads.heads) == 1
    head = methods.linear_head(model.body(e).detach(), y, 0, steps=40)
    assert methods.right(head(model.body(e)), y).float().mean() > 0.9


def test_labels_come_from_training_descriptions():
    def package(split, section):
        return SimpleNamespace(split=split, section=section)

    here = SimpleNamespace(
        documents=[package("test", "a"), package("test", "new"), package("train", "b")],
        pairs=[package("train", "a")],
    )
    v = SimpleNamespace(documents=torch.eye(3), pair_documents=torch.ones(1, 3))
    found = methods.by_split(here, v)
    assert found["train"][1].tolist() == [1, 0]
    assert found["test"][1].tolist() == [0]
    assert torch.equal(found["test"][0], torch.eye(3)[:1])


# --- what is shipped, and searched live -----------------------------------------------------------


def test_what_is_packed_comes_back_nearly():
    values = torch.nn.functional.normalize(randn(50, 16), dim=1)
    again = shipped._unpack(shipped._pack(values))
    assert (again - values).abs().max() <= values.std() / shipped.STEPS / 2 + 1e-6


@pytest.fixture(scope="module")
def searched():
    """A small collection in the place of the repository's."""
    documents = torch.nn.functional.normalize(randn(1200, 128), dim=1)
    queries = torch.nn.functional.normalize(documents[:20] + 0.05 * randn(20, 128, seed=1), dim=1)
    return live.Live(documents, queries, list(range(20)))


def test_live_answers_count_what_they_compare(searched):
    whole = searched.looks(128, 0)
    assert whole.neighbours == 1
    assert whole.multiplications == 1200 * 128
    twice = searched.looks(16, 100)
    assert twice.multiplications == 1200 * 16 + 100 * 128
    assert twice.neighbours >= searched.looks(16, 0).neighbours
    walked = searched.walk(128, 80)
    assert walked.evaluations < 1200
    assert walked.first == 1
    assert searched.seconds(16, 20, turns=1) > 0
    assert "1,200 descriptions" in repr(searched)


def test_panels_answer_at_every_position(searched, monkeypatch):
    monkeypatch.setattr(live, "name_of", lambda row: f"document {row}")
    monkeypatch.setattr(live, "synopsis_of", lambda query: f"query {query}")
    panels.two_looks(searched).sweep()
    panels.walk(searched).sweep()


def test_what_is_not_measured_says_so():
    missing = results.NotMeasured("05_inference/8_matryoshka/vectors")
    assert panels.two_looks(missing) is missing
    assert panels.walk(missing) is missing
    assert live.ask(missing, "anything") is missing
    assert drawings.result(missing, missing) is missing
    assert drawings.walks(missing) is missing
    for said in (
        tables.dimensions_said, tables.dimensions_table, tables.between_said,
        tables.shortlist_said, tables.cheapest_table, tables.rivals_said, tables.funnel_said,
        tables.walks_said, tables.walks_table, tables.classes_table, tables.stops_said,
        tables.undivided_said, tables.undivided_table,
    ):  # fmt: skip
        assert said(missing) is missing


# --- sentences ------------------------------------------------------------------------------------


def planted_dimensions():
    rows = []
    for method in (*tables.WAYS, "Matryoshka, not divided"):
        for m in (8, 12, 16, 32, 64, 128, 256, 384):
            if method == "own size" and m > 128:
                continue
            level = 0.3 if method == "Matryoshka" else 0.2
            row = {"method": method, "dims": m, "seed": 0, "first": level + 0.05 * math.log2(m / 8)}
            rows.append(row)
    return rows


def test_sentences_follow_the_numbers():
    rows = planted_dimensions()
    said = tables.dimensions_said(rows)
    assert "first 16 numbers alone for 35 %" in said
    assert "trained for 16 numbers only: 25 %" in said
    assert "Of 1 lengths that were never trained, 1 find" in tables.between_said(rows)
    assert "10 of 100 queries" in tables.undivided_said(rows)
    assert tables.dimensions_table(rows).rows[0][1] == "30"
    for row in rows:
        if row["method"] == "Matryoshka, not divided":
            row["first"] += 0.1
    assert "less than half a point" in tables.undivided_said(rows)


def planted_looks():
    rows = []
    for method in ("Matryoshka", "principal components"):
        for m, kept, share in ((384, 0, 1.0), (8, 200, 0.92), (16, 200, 0.995), (32, 200, 1.0)):
            rows.append(
                {
                    "method": method, "dims": m, "shortlist": kept, "seed": 0,
                    "first": 0.7 * share, "ten": 0.9,
                    "neighbours": share - 0.02 * (method != "Matryoshka"),
                    "multiplications": tables.work(10_000, m, kept) if kept else 3_840_000,
                }
            )  # fmt: skip
    return rows


def test_the_cheapest_setting_is_the_cheapest_that_is_enough():
    found = {tuple(row[:2]): row[2:] for row in tables.cheapest_table(planted_looks()).rows}
    near = "90 % of the ten nearest", "99 % of the ten nearest"
    assert found[near[0], "nested map"] == ("8", "200", "24.5", "64")
    assert found[near[1], "nested map"] == ("16", "200", "16.2", "70")
    assert found[near[1], "principal components"] == ("not measured",) * 4
    assert found["right one first, within a point", "nested map"][:2] == ("16", "200")
    assert "does not keep the right answers better" in tables.rivals_said(planted_looks())
    rows = planted_looks()
    for row in rows:
        if row["method"] == "Matryoshka":
            row["first"], row["neighbours"] = row["first"] + 0.1, row["neighbours"] - 0.1
    assert "and principal components the neighbours" in tables.rivals_said(rows)
    said = tables.shortlist_said(planted_looks())
    assert "16.2 times fewer" in said
    assert "99.5 % are found" in said


def planted_walks(cut):
    rows = []
    for m, cost in ((16, cut), (384, 200_000)):
        for ef, share in ((20, 0.9), (80, 0.97)):
            rows.append(
                {
                    "method": "HNSW", "dims": m, "ef": ef, "seed": 0, "neighbours": share,
                    "first": 0.7, "evaluations": 500, "multiplications": cost * ef / 80,
                }
            )  # fmt: skip
    return rows


def test_walks_say_whether_the_prefix_helps():
    assert "another 2.0 times fewer" in tables.walks_said(planted_walks(100_000), 0.95)
    assert "1.5 times as many;" in tables.walks_said(planted_walks(300_000), 0.95)
    assert "No walk" in tables.walks_said(planted_walks(100_000), 0.99)
    rows = tables.walks_table(planted_walks(100_000), 0.95).rows
    assert rows[0][:2] == ("HNSW, 16 numbers, then all", "ef 80")


def test_what_is_stored_can_be_said():
    """Whatever has been measured by now."""
    dimensions, looks = (tables.stored(p).data["table"] for p in ("dimensions", "shortlist"))
    drawings.result(dimensions, looks)
    drawings.walks(tables.stored("approximate").data["table"])
    for said, part in (
        (tables.dimensions_said, "dimensions"),
        (tables.undivided_table, "dimensions"),
        (tables.shortlist_said, "shortlist"),
        (tables.cheapest_table, "shortlist"),
        (tables.walks_table, "approximate"),
        (tables.classes_table, "classes"),
        (tables.classes_said, "classes"),
        (tables.stops_said, "classes"),
    ):
        assert str(said(tables.stored(part).data["table"]))
    assert "16.2" in str(tables.storage_table()) or "23." in str(tables.storage_table())


def test_what_one_network_for_all_sizes_costs():
    rows = [
        {"method": method, "dims": m, "seed": 0, "accuracy": level + 0.05 * m}
        for method, level in (
            ("MRL", 0.3),
            ("own size", 0.34),
            ("plain, principal components", 0.2),
        )
        for m in (2, 4)
    ]
    said = tables.classes_said(rows)
    assert "4 points behind a network of its own at" in said
    assert "components at every length" in said
    for row in rows:
        row["accuracy"] += 0.3 * (row["method"].startswith("plain") and row["dims"] == 4)
    assert "only at 2" in tables.classes_said(rows)
