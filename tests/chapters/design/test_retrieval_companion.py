"""The companion of the chapter on retrieval: exercises, texts, live memory, sentences, panels."""

import math

import pytest
import torch

from effnb.chapters.design.retrieval import (
    drawings,
    exercises,
    fitting,
    live,
    memory,
    own_text,
    panels,
    tables,
    texts,
)
from effnb.design import retrieval
from effnb.lab import load, results

EXERCISES = [exercises.neighbours, exercises.mixing, exercises.alignment]


def words(*shape, seed=0, vocabulary=128):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


# --- exercises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


def test_references_agree_with_the_package():
    distances, values = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([1, 0, 1])
    ours = retrieval.knn_log_probabilities(distances[None], values[None], 4, 2.0).exp()[0]
    torch.testing.assert_close(exercises.from_neighbours(distances, values, 4, 2.0), ours)
    for lam in (0.0, 0.3, 1.0):
        for knn in (-2.0, -math.inf):
            got = retrieval.interpolate(torch.tensor([-1.0]), torch.tensor([knn]), lam)
            assert math.isclose(exercises.mixed(-1.0, knn, lam), float(got), rel_tol=1e-6)
    table = retrieval.readers(20, 4)
    for token in range(20):
        read = table[token].nonzero().flatten().tolist()
        assert read == [u] if (u := exercises.reads_chunk(token, 4)) >= 0 else not read


# --- texts ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return load("mini-300k", device="cpu").tokenizer


def test_the_library_holds_one_description_of_a_source(tokenizer):
    chosen = texts.order()
    assert len({p.source for p in chosen}) == len(chosen)
    assert {p.split for p in chosen} == {"train"}
    small, large = (texts.library(tokenizer, n) for n in (500, 2000))
    assert large[: len(small)] == small
    assert 2000 <= sum(len(ids) - 1 for ids in large) < 2000 + texts.LONGEST


def test_texts_are_cut_and_spread(tokenizer):
    found = texts.texts(tokenizer, "validation", 5, 20)
    assert len(found) == 5 and max(map(len, found)) <= 20
    assert texts.rows([[1, 2, 3], [1], [4, 5, 6, 7]], 3).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert len(texts.german(tokenizer, "test", 3, 20)) == 3


# --- memory ---------------------------------------------------------------------------------------


def test_a_lookup_of_several_texts_is_that_of_each(llama):
    shelf, judged = words(4, 20).tolist(), [words(9, seed=5).tolist(), words(6, seed=6).tolist()]
    store = memory.stored(llama, shelf)
    found = memory.look_up(llama, store, judged, k=5)
    setting = memory.Setting(0.4, 5, 2.0)
    model = retrieval.KnnLm(llama, store, lam=0.4, k=5, temperature=2.0)
    want = [float(model.look_up(torch.tensor([ids])).losses(0.4, 5, 2.0).mean()) for ids in judged]
    assert found.by_document(setting) == pytest.approx(want, abs=1e-4)
    assert found.lengths == (8, 5)
    assert found.loss(None) == pytest.approx(sum(found.by_document(None)) / 2, abs=1e-5)


def test_the_chosen_setting_has_the_least_loss(llama):
    shelf = words(4, 20).tolist()
    found = memory.look_up(llama, memory.stored(llama, shelf), shelf[:2], k=4)
    best = memory.chosen(found)
    assert best.k <= 4
    assert found.loss(best) <= min(found.loss(memory.Setting(lam, 4, 1.0)) for lam in memory.LAMS)
    assert best.lam == max(memory.LAMS), "texts that lie in the datastore are copied"


def test_only_some_tokens_of_a_text_can_be_judged(llama):
    ids = words(3, 40).tolist()
    found = memory.look_up(llama, memory.stored(llama, ids), ids[:2], k=2)
    only = torch.zeros(78, dtype=torch.bool)
    only[:10] = True
    assert found.by_document(None, only) == [round(float(found.tokens(None)[:10].mean()), 5)]


def test_chunks_that_share_a_long_run_are_told_apart():
    shared = list(range(100, 132))
    library = [[1, *shared, 2], list(range(8))]
    other = [200 + i for i in range(32)]
    little = memory.shares_little([[*shared, *other], other[:5]], library)
    assert little.tolist() == [False] * 31 + [True] * 32 + [True] * 4
    nine = [*range(100, 109), *other[:23]]
    assert not memory.shares_little([nine], library).any()
    eight = [*range(100, 108), *other[:24]]
    assert memory.shares_little([eight], library).all()


# --- RETRO ----------------------------------------------------------------------------------------


def test_a_course_never_gives_a_text_itself(llama):
    documents = [*words(6, 70).tolist(), [1, 2]]
    course = fitting.course(documents, 128, length=64)
    assert course.ids.shape == (6, 64) and course.neighbours.shape == (6, 2, 2, 64)
    for ids, near in zip(course.ids.tolist(), course.neighbours.flatten(1, 2)):
        for neighbour in near.tolist():
            assert neighbour[:32] not in (ids[:32], ids[32:])
    model = fitting.fitted(llama, course, 0, steps=2)
    assert model.layers == (1,)
    judged = words(2, 64, seed=9)
    for reading in fitting.READINGS:
        near = fitting.neighbours_for(course, judged, reading)
        assert len(fitting.by_document(model, judged, near)) == 2
    none = fitting.by_document(model, judged, None)
    assert none == pytest.approx(fitting.by_document(llama, judged, None), abs=1e-5)
    with pytest.raises(ValueError, match="retrieved, random, none"):
        fitting.neighbours_for(course, judged, "best")


# --- live -----------------------------------------------------------------------------------------


class Words:
    """In the place of a tokenizer."""

    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids)


@pytest.fixture(scope="module")
def here(tiny_llama):
    shelf = words(50, 24).tolist()
    judged = [words(10, seed=3).tolist(), shelf[4][:12]]
    return live.Live(tiny_llama(), Words(), shelf, judged)


def test_an_entry_is_found_again_in_its_text(here):
    for row in (0, 22, 23, 500):
        document, at = here.place(row)
        assert here.shelf[document][at] == int(here.store.values[row])
    assert here.context(23)[1] == f"w{here.shelf[1][1]}"
    assert here.asked(0) == (f"w{here.judged[0][0]}", f"w{here.judged[0][1]}")
    assert here.asked(9)[1] == f"w{here.judged[1][1]}"


def test_the_live_memory_helps_where_it_holds_the_text(here):
    answer = here.answer(0.3, 4, 1.0, 1_000)
    assert answer.loss < answer.alone
    assert answer.gains[9:].min() > 0
    assert here.best(1_000) >= 9
    assert "Found, nearest first" in live.example_said(here, 1_000)
    assert here.answer(0.0, 4, 1.0, 1_000).helped == 0
    assert "50 descriptions" in repr(here)


def test_panels_answer_at_every_position(here):
    panels.memory(here).sweep()
    panels.alignment().sweep()


def test_only_retro_reads_all_it_may_and_no_more():
    retro, own, late = (panels.aligned(4, start) for start in panels.STARTS)
    assert not retro.leaks.any() and not late.leaks.any()
    assert retro.reads.sum() == 21 and late.reads.sum() == 20
    assert own.leaks.sum() == 18
    with pytest.raises(ValueError, match="start is"):
        panels.aligned(4, "anywhere")


def test_a_memory_of_ones_own_text_is_recited(llama, monkeypatch):
    ids = words(12, seed=4).tolist()

    class Loaded:
        model = llama
        tokenizer = type(
            "T", (Words,), {"encode": lambda self, text, **_: [int(w[1:]) for w in text.split()]}
        )()

    monkeypatch.setattr(own_text, "load", lambda *_, **__: Loaded)
    said = own_text.told(Words().decode(ids))
    assert said.endswith(f"with the memory: {Words().decode(ids[7:])}")
    with pytest.raises(ValueError, match="at least two words"):
        own_text.told("w1")


# --- sentences ------------------------------------------------------------------------------------


def planted_sizes(gain=0.1):
    rows = []
    for number, (model, n) in enumerate(zip(tables.MODELS, (1e5, 1e6, 1e7))):
        for step, entries in enumerate((1_000, 10_000, 100_000)):
            alone = 4.5 - 0.5 * number
            rows.append({
                "model": model, "entries": entries, "parameters": int(n), "alone": alone,
                "loss": alone - gain * step, "bytes": 128 * entries, "lam": 0.2, "k": 16,
                "temperature": 1.0,
            })  # fmt: skip
    return rows


def test_worth_follows_the_numbers():
    said = tables.worth_said(planted_sizes(0.125))
    assert "with 100,000 entries 4.25" in said
    assert f"{10**0.5:.1f} times its parameters" in said
    assert "at least 100.0 times" in tables.worth_said(planted_sizes(0.6))
    assert tables.worth_table(planted_sizes()).rows[0][4].startswith("2.5 times")
    assert "230" not in tables.growth_said(planted_sizes())
    per = 1000 * 0.1 / math.log(10) * math.log(2)
    assert f"mini-300k {per:.0f}" in tables.growth_said(planted_sizes())
    assert "about 10,000,000,000,000 entries" in tables.growth_said(planted_sizes())
    assert "reaches the loss of mini-5m" in tables.growth_said(planted_sizes(0.6))
    assert "does not gain from more entries" in tables.growth_said(planted_sizes(-0.1))
    drawings.result(planted_sizes())


def planted_knobs(whole):
    values = {"lam": (0.0, 0.3, 1.0), "k": (1, 16), "temperature": (1.0, 10.0)}
    losses = {"lam": (4.5, 4.2, whole), "k": (4.4, 4.2), "temperature": (4.2, 4.3)}
    return [
        {"knob": knob, "value": v, "loss": y}
        for knob in values
        for v, y in zip(values[knob], losses[knob])
    ]


def test_knobs_and_keys_follow_the_numbers():
    said = tables.knobs_said(planted_knobs(None))
    assert "Best share: 0.3" in said and "1 gives infinite loss" in said
    assert "1 gives 6.00 nats" in tables.knobs_said(planted_knobs(6.0))
    drawings.knobs(planted_knobs(None))
    rows = [{"at": "feedforward", "loss": 4.2, "alone": 4.5},
            {"at": "output", "loss": 4.3, "alone": 4.5}]  # fmt: skip
    assert "the lower loss here." in tables.keys_said(rows)
    rows[0]["loss"] = 4.304
    assert "higher loss here (a difference of less than" in tables.keys_said(rows)


def test_other_tables_follow_the_numbers():
    rows = [{"probes": p, "lists": 9, "neighbours": s, "loss": 4.4 - 0.1 * s, "alone": 4.4,
             "exact": 4.3} for p, s in ((4, 0.9), (1, 0.5))]  # fmt: skip
    assert tables.approximate_table(rows).rows[0] == ("1 of 9", "50", "4.350", "50")
    points = [[0.0, 0.1], [0.125, 0.2], [0.3, 1.0], [1.0, 3.0]]
    rows = [{"leaked": flag, "points": points, "loss": 4.0 - flag, "alone": 4.5}
            for flag in (False, True)]  # fmt: skip
    assert [row[1] for row in tables.overlap_table(rows).rows] == ["2", "1", "1"]
    assert "with it 4.00, with the texts themselves in it 3.00" in tables.leaked_said(rows)
    rows = [{"method": "alone", "documents": [4.0, 5.0]},
            {"method": "kNN-LM", "documents": [3.0, 4.0], "entries": 1000, "lam": 0.6}]  # fmt: skip
    assert "4.50 nats per token alone, 3.50 with 1,000" in tables.adaptation_said(rows)
    rows = [{"method": "alone", "documents": [4.0]}] + [
        {"method": "RETRO", "read": read, "seed": s, "documents": [y], "new_parameters": 10}
        for s in range(5)
        for read, y in (("retrieved", 3.9), ("random", 4.1), ("none", 4.0))
    ]
    assert "(5 seeds, 10 new parameters): 3.900" in tables.retro_said(rows)
    assert "0.100 lower" in tables.retro_said(rows)
    rows = [{"read": r, "k": k, "loss": 4.0} for r in ("retrieved", "random") for k in (0, 2)]
    assert tables.neighbours_table(rows).rows[1][1:] == ("4.000", "4.000")


def test_what_is_not_measured_says_so():
    missing = results.NotMeasured("02_design/4_retrieval/nothing")
    for said in (
        tables.worth_said, tables.worth_table, tables.growth_said, tables.knobs_said,
        tables.keys_said, tables.approximate_table, tables.overlap_table, tables.leaked_said,
        tables.adaptation_said, tables.retro_said, tables.neighbours_table, drawings.result,
        drawings.knobs,
    ):  # fmt: skip
        assert said(missing) is missing
