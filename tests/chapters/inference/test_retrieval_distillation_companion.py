"""The companion of the chapter on distilled retrievers, on a small encoder and short texts."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel

from effnb.chapters.inference.retrieval_distillation import (
    drawings,
    exercises,
    panels,
    rankers,
    students,
    tables,
)
from effnb.chapters.inference.retrieval_distillation import texts as own
from effnb.lab import results
from effnb.lab.changes import Change

NOTHING = results.NotMeasured("05_inference/6_retrieval_distillation/nothing")
SIZE = 8


def some_pairs(count, seed=0, first=200):
    """Queries that are pieces of their documents."""
    draw = torch.Generator().manual_seed(seed)
    documents = torch.randint(first, first + 100, (count, 9), generator=draw)
    return own.Pairs(documents[:, 2:6].tolist(), documents.tolist())


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A small encoder in MiniLM's place."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=400, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=32, initializer_range=0.5,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    loaded = SimpleNamespace(model=model, tokenizer=None)
    for module in (own, students, tables):
        monkeypatch.setattr(module, "encoder", lambda: loaded)
    return loaded


@pytest.fixture
def course(small):
    return students.course_of(some_pairs(24), some_pairs(20, seed=1), 12, 10)


@pytest.fixture
def task(monkeypatch):
    monkeypatch.setattr(rankers, "BATCH", 8)
    monkeypatch.setattr(rankers, "RATE", 3e-3)
    return rankers.task_of(some_pairs(16), some_pairs(30, seed=1), 10)


# --- exercises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", exercises.ALL, ids=lambda exercise: exercise.name)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


# --- texts ----------------------------------------------------------------------------------------


def test_pairs_are_of_different_sources(monkeypatch):
    def tokenizer(texts, **_):
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    monkeypatch.setattr(own, "encoder", lambda: SimpleNamespace(tokenizer=tokenizer))
    found = own.pairs.__wrapped__("validation", 50)
    assert len(found.queries) == len(found.documents) == 50
    assert all(0 < len(row) <= own.QUERY_TOKENS for row in found.queries)
    assert all(0 < len(row) <= own.DOCUMENT_TOKENS for row in found.documents)
    with pytest.raises(ValueError, match="such pairs, not 1000000"):
        own.pairs.__wrapped__("validation", 10**6)


def test_texts_get_their_special_tokens():
    ids, real = own.padded([[7, 8], [9]])
    assert ids.tolist() == [[101, 7, 8, 102], [101, 9, 102, 0]]
    assert real.tolist() == [[True] * 4, [True, True, True, False]]


def test_first_layers_are_copies_with_frozen_words(small):
    for count in (0, 2):
        part = own.first_layers(count)
        assert len(part.encoder.layer) == part.config.num_hidden_layers == count
        assert not any(p.requires_grad for p in part.embeddings.parameters())
    assert len(small.model.encoder.layer) == 3
    assert all(p.requires_grad for p in small.model.parameters())
    torch.testing.assert_close(
        part.encoder.layer[1].output.dense.weight, small.model.encoder.layer[1].output.dense.weight
    )
    ids, real = own.padded([[7, 8]])
    hidden = own.first_layers(0)(input_ids=ids, attention_mask=real.long()).last_hidden_state
    torch.testing.assert_close(hidden, small.model.embeddings(ids))
    with pytest.raises(ValueError, match="count is -1"):
        own.first_layers(-1)


def test_rare_shared_tokens_make_documents_alike():
    given = own.Pairs([[1, 2], [3], [9]], [[1, 5], [2, 3, 5], [2, 4, 5]])
    shared = own.overlaps(given)
    rare, common = torch.tensor(3.0).log(), torch.tensor(1.5).log()
    torch.testing.assert_close(
        shared, torch.tensor([[rare, common, common], [0, rare, 0], [0, 0, 0]])
    )
    near = own.like(given, 1)
    assert near[0].item() in (1, 2)
    assert all(int(i) != row for row, i in enumerate(near[:, 0]))


# --- from a large to a small dual encoder ---------------------------------------------------------


def test_a_teachers_embeddings_are_its_encoders(course):
    teacher = course.teacher(SIZE)
    with torch.no_grad():
        found = teacher.encode_queries(*own.padded(course.train.queries[:3]))
    torch.testing.assert_close(found, course.embeddings("queries", SIZE)[:3], atol=1e-5, rtol=1e-5)
    basis = course.basis(16)
    torch.testing.assert_close(basis @ basis.T, torch.eye(16), atol=1e-5, rtol=1e-5)
    kept = [float(course.embeddings("documents", 16)[:, :n].square().sum()) for n in (4, 8, 16)]
    assert kept == sorted(kept)
    assert kept[0] > 0.25 * kept[-1]  # the first quarter of the numbers holds more than a quarter


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("loss", students.LOSSES)
def test_students_learn(course, loss, frozen):
    def value(student):
        mine = student.encode_queries(*own.padded(course.train.queries))
        theirs = course.embeddings("documents", SIZE)
        used = theirs if frozen else student.encode_documents(*own.padded(course.train.documents))
        taught = course.embeddings("queries", SIZE), theirs
        return float(students.objective(loss, mine, used, taught, frozen))

    with torch.no_grad():
        before = value(students.student_of(course, 1, SIZE, frozen))
        after = value(
            students.learn(course, depth=1, size=SIZE, loss=loss, frozen=frozen, steps=15, batch=12)
        )
    assert after < before


def test_a_student_searches_its_teachers_index(course):
    student = students.learn(course, depth=1, size=SIZE, made=True, steps=4, batch=8)
    teacher = course.teacher(SIZE)
    given = own.padded(course.test.documents)
    with torch.no_grad():
        assert torch.equal(student.encode_documents(*given), teacher.encode_documents(*given))
    ranks = students.ranks_of(student, course, SIZE, True)
    assert len(ranks) == 12
    assert ranks == students.ranks_of(student, course, SIZE, False)  # the same index
    found = students.judged([1, 2, 11])
    assert found == {"documents": [1, 1, 0], "mrr": 0.5}
    # A student with all layers and the teacher's map finds what its teacher finds.
    whole = students.student_of(course, 3, SIZE, True)
    assert students.ranks_of(whole, course, SIZE, True) == students.teacher_ranks(course, SIZE)


def test_made_queries_change_every_other_step(course):
    plain, made = (
        students.learn(course, depth=0, size=SIZE, made=way, steps=2, batch=8).projection.weight
        for way in (False, True)
    )
    assert not torch.equal(plain, made)
    with pytest.raises(ValueError, match="made queries have no labels"):
        students.learn(course, depth=0, loss="labels", made=True)
    with pytest.raises(ValueError, match="the loss is 'order'"):
        students.objective("order", None, None, (None, None), True)


def test_batches_go_through_all_texts():
    found = students.draws(10, 5, 4, 0)
    assert sorted(torch.cat(found[:2]).tolist()) == list(range(10))
    assert torch.cat(found).tolist() != torch.cat(students.draws(10, 5, 4, 1)).tolist()


def test_compute_is_counted(course):
    # 24 queries through 6 layers forward; a step of 8 queries costs 3 x 8 x depth.
    assert students.layers_of_teacher(course, 1, batch=8) == 6
    assert students.layers_of_teacher(course, 2, batch=8) == 3
    with pytest.raises(ValueError, match="depth is 0"):
        students.layers_of_teacher(course, 0)
    layer = 4 * 16 * 16 + 2 * 16 * 24
    assert students.query_multiplications(2, tokens=5) == 10 * layer
    assert students.query_parameters(1) - students.query_parameters(0) > layer
    assert students.index_bytes(32, 10) == 1280
    assert rankers.texts_read(50, "cross-encoder") == 50
    assert rankers.texts_read(50, "dual encoder") == 1
    with pytest.raises(ValueError, match="the kind is 'both'"):
        rankers.texts_read(5, "both")


# --- from a cross-encoder to a dual encoder -------------------------------------------------------


def test_candidates_are_near_and_own_comes_first(task):
    assert task.judged == 10
    for lists in (task.train_lists, task.new_lists):
        assert lists.shape == (10, rankers.CANDIDATES)
        assert lists[:, 0].tolist() == list(range(10))
        assert all(len(set(row)) == len(row) for row in lists.tolist())
    lists = task.lists(0)
    assert lists.shape == (16, 1 + rankers.WRONG)
    assert all(set(row[1:]) <= set(near) for row, near in zip(lists.tolist(), task.near.tolist()))
    assert not torch.equal(lists, task.lists(1))


def test_a_tie_is_not_a_first_place(task):
    lists = task.new_lists
    assert rankers.firsts(lambda g, r, some: torch.zeros(some.shape), task.new, lists) == [0] * 10
    best = rankers.firsts(lambda g, r, some: -(some - r[:, None]).abs().float(), task.new, lists)
    assert best == [1] * 10
    found = rankers.judged(lambda g, r, some: -(some - r[:, None]).abs().float(), task)
    assert found["drop_documents"] == [0] * 10


def loss_on(model, task, seed):
    lists = task.lists(seed)
    score = (
        rankers.cross_scores(model)
        if isinstance(model, rankers.CrossEncoder)
        else rankers.dual_scores(model)
    )
    with torch.no_grad():
        return float(rankers.right_first(score(task.train, torch.arange(len(lists)), lists)))


@pytest.mark.parametrize("dual_pooled", [True, False])
def test_a_cross_encoder_learns(task, dual_pooled):
    first = rankers.CrossEncoder(own.first_layers(2), dual_pooled=dual_pooled, seed=0)
    model = rankers.cross_encoder(task, 0, dual_pooled=dual_pooled, steps=20)
    assert loss_on(model, task, 0) < loss_on(first, task, 0)


def test_dual_encoders_learn_from_it(task):
    teacher = rankers.cross_encoder(task, 0, steps=6)
    answers = rankers.answers_of(teacher, task, 0)
    score = rankers.cross_scores(teacher)
    with torch.no_grad():
        lists = task.lists(0)
        torch.testing.assert_close(
            answers.scores, score(task.train, torch.arange(16), lists), atol=1e-4, rtol=1e-4
        )
    torch.testing.assert_close(
        (answers.queries * answers.documents).sum(1), answers.scores[:, 0], atol=1e-4, rtol=1e-4
    )

    def gap(model, method):
        with torch.no_grad():
            found = rankers.dual_scores(model)(task.train, torch.arange(16), lists)
            return float(rankers.METHODS[method](found, answers.scores))

    small = own.first_layers(2)
    untrained = rankers.DualEncoder(small, small)
    for method in rankers.METHODS:
        model = rankers.dual_encoder(task, 0, method, answers, steps=15)
        assert gap(model, method) <= gap(untrained, method)
    both = rankers.dual_encoder(task, 0, "softmax KL and embeddings", answers, steps=4)
    alone = rankers.dual_encoder(task, 0, "softmax KL", answers, steps=4)
    assert not torch.equal(
        both.query.encoder.layer[0].output.dense.weight,
        alone.query.encoder.layer[0].output.dense.weight,
    )
    narrow = rankers.dual_encoder(task, 0, size=4, steps=2)
    assert narrow.encode_queries(*own.padded([[5, 6]])).shape == (1, 4)
    found = rankers.ranked(narrow, task)
    assert set(found) == {"documents", "train_documents", "drop_documents"}
    with pytest.raises(ValueError, match="the method is 'labels and embeddings'"):
        rankers.dual_encoder(task, 0, "labels and embeddings", answers)
    with pytest.raises(ValueError, match="needs a teacher's answers"):
        rankers.dual_encoder(task, 0, "MarginMSE")


def test_labels_may_train_for_longer_at_equal_compute(task):
    # Queries have 6 tokens and documents 11 with special ones; a joined pair has 16.
    assert rankers.steps_for_answers(task) == -(-16 * 4 * 16 // (3 * 8 * (6 + 4 * 11)))
    assert rankers.steps_of(task) == 4


# --- stored rows ----------------------------------------------------------------------------------


def grid_rows(depths=(0, 1)):
    """What a sweep might store."""
    rows = [
        {"loss": "teacher", "size": size, "documents": [1] * 18 + [0] * 2, "mrr": 0.8}
        for size in (32, 384)
    ]
    for depth in depths:
        for size in (32, 384):
            for frozen in (True, False):
                for i, loss in enumerate(("none", *students.LOSSES)):
                    count = 8 + 2 * i + depth + 2 * (not frozen)
                    rows.append(
                        {
                            "depth": depth, "size": size, "frozen": frozen, "loss": loss,
                            "documents": [1] * count + [0] * (20 - count), "mrr": 0.5,
                        }
                    )  # fmt: skip
    return rows


def sizes_rows():
    one = {"train_documents": [1, 1, 1, 0], "documents": [1, 1, 0, 0]}
    rows = [{"method": m, "size": s} | one for s in (8, 384) for m in ("labels", "softmax KL")]
    return [{"method": "cross-encoder"} | one, *rows]


def test_only_whole_depths_are_shown():
    rows = grid_rows()
    assert tables.depths_of(rows) == [0, 1]
    assert tables.depths_of(rows[:-1]) == [0]


def test_tables_and_sentences_follow_their_rows():
    rows = grid_rows()
    said = tables.picture_said(rows)
    assert "finds 90%" in said
    assert "no layers finds 40% before" in said
    assert "80% after copying" in said
    assert str(tables.grid_table(rows)).count("its own") == 2
    lines = tables.frozen_said(rows).splitlines()
    assert len(lines) == 8
    assert lines[0].startswith("no layers, labels: 50% with the teacher's documents, 60%")
    change = Change.between([1] * 10 + [0] * 10, [1] * 12 + [0] * 8)
    assert lines[0].endswith(change.word(lower_is_better=False))
    shown = str(tables.sizes_table(sizes_rows()))
    assert "75%" in shown
    assert "+25%" in shown


def test_a_missing_result_says_so():
    for shown in (
        drawings.found(NOTHING), drawings.sizes(NOTHING["table"]), panels.search(NOTHING),
        tables.grid_table(NOTHING), tables.picture_said(NOTHING), tables.frozen_said(NOTHING),
        tables.sizes_table(NOTHING["table"]),
    ):  # fmt: skip
        assert "Not measured here" in str(shown)


def test_the_grid_takes_what_is_stored(monkeypatch):
    kept = {"words": SimpleNamespace(data={"table": [1, 2]}), "depths": NOTHING}
    monkeypatch.setattr(tables, "stored", kept.__getitem__)
    monkeypatch.setattr(tables.results, "StoredResult", SimpleNamespace)
    assert tables.grid() == [1, 2]
    monkeypatch.setattr(tables, "stored", lambda part: NOTHING)
    assert tables.grid() is NOTHING


# --- on the page ----------------------------------------------------------------------------------


def test_losses_are_blind_where_the_page_says_so():
    shown = tables.losses_of(tables.TEACHER_SCORES + 3, tables.TEACHER_SCORES)
    assert [name for name, value in shown.items() if value > 1e-6] == ["pointwise"]
    ahead = tables.TEACHER_SCORES + torch.tensor([[2.0, 0, 0]])
    shown = tables.losses_of(ahead, tables.TEACHER_SCORES)
    assert shown["order only (ours)"] == 0
    assert shown["MarginMSE"] == pytest.approx(4)
    assert "MarginMSE" in str(tables.losses_table())


def test_a_turned_student_needs_its_own_index():
    (q, d), (a, b) = tables.turned(60)
    torch.testing.assert_close(q @ d.T, a @ b.T)
    assert int((q @ b.T).argmax()) != int((a @ b.T).argmax()) == 0
    said = tables.turned_said()
    assert "MarginMSE 0.000" in said
    assert "document 1 is first" not in drawings.geometry().alt
    assert "document 1 is first" in drawings.geometry(0).alt


def test_words_on_costs(small):
    assert "1.54 GB at 384" in tables.index_said()
    assert "100%" not in str(tables.costs_table((0, 1)))
    assert tables.scale_said().count("\n") == 1

    def wrong():
        raise ValueError("the reason.")

    assert tables.refusals({"right": lambda: None, "wrong": wrong}) == "- wrong: the reason."


def test_what_the_page_runs_live(monkeypatch):
    monkeypatch.setattr(tables, "pairs", lambda split, count: some_pairs(count, len(split)))
    monkeypatch.setattr(students, "WIDTH", 16)
    assert tables.same_index().endswith("yes")
    assert "found among the first ten" in tables.live_said(24, steps=3)
    assert "ms with six layers" in tables.timed_said()


def test_pictures_say_their_numbers():
    alt = drawings.found(grid_rows()).alt
    assert "The teacher finds 90%" in alt
    assert alt.count("before training") == 4
    assert "75% and 50% at 8" in drawings.sizes(sizes_rows()).alt


def test_panels_pass_over_their_knobs():
    panels.search(grid_rows()).sweep()
    panels.search(grid_rows((0,))).sweep()  # one depth: there is no knob for it
    panels.scores().sweep()
