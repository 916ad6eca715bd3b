"""The companion of the chapter on distillation: its experiments, students, sentences, exercises.

The task of twelve languages is replaced by one of twelve alphabets of syllables: small, and learnt
in a few steps.
"""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from effnb.chapters.inference.distillation import (
    drawings,
    exercises,
    experiments,
    panels,
    students,
    tables,
)
from effnb.chapters.inference.distillation import languages as own
from effnb.inference import distillation
from effnb.lab import load, results
from effnb.lab.results import NotMeasured

NAMES = (
    "English", "Danish", "German", "Spanish", "French", "Italian",
    "Japanese", "Korean", "Polish", "Portuguese", "Russian", "Chinese",
)  # fmt: skip


def made_up(count, seed):
    """Texts of random letters; each language prefers three that others use as well."""
    draw = random.Random(seed)
    letters = "abcdefghijkl"
    texts, labels = [], []
    for i in range(count):
        language = i % 12
        liked = [letters[(language + step) % 12] for step in (0, 1, 4)]
        texts.append("".join(draw.choice(liked if draw.random() < 0.6 else letters) for _ in
                             range(40)))  # fmt: skip
        labels.append(language)
    documents = tuple(f"package {i // 3}" for i in range(count))
    return own.Texts(own.features(texts), torch.tensor(labels), documents)


@pytest.fixture(scope="module")
def data():
    sizes = (240, 240, 120, 120)
    return own.Languages(NAMES, *(made_up(n, seed) for seed, n in enumerate(sizes)))


@pytest.fixture
def small(data, monkeypatch):
    """The made-up task in the place of the real one, and few steps."""
    monkeypatch.setattr(own, "languages", lambda: data)
    monkeypatch.setattr(experiments, "FULL", 60)
    for cached in (own.teacher, experiments.confidences):
        cached.cache_clear()
    yield data
    for cached in (own.teacher, experiments.confidences):
        cached.cache_clear()


# ------------------------------------------------------------------------------------ the task


def test_features_depend_on_the_text_alone():
    one = own.features(["abc def", "xyz"])
    assert torch.equal(one, own.features(["abc def", "xyz"]))
    assert torch.equal(one[1:], own.features(["xyz"]))
    assert one.shape == (2, own.DIM)
    assert own.n_grams("ab") != own.n_grams("ba")
    assert len(own.n_grams("ab")) == 4 + 3 + 2  # with a space at both ends


def test_a_start_depends_on_its_seed_and_draws_nothing():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    a, b, c = own.net(4, 0), own.net(4, 0), own.net(4, 1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(a[0].weight, b[0].weight)
    assert not torch.equal(a[0].weight, c[0].weight)
    assert len(own.net(0, 0)) == 1


def test_documents_are_means_of_their_texts():
    texts = own.Texts(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), ("b", "a", "b", "a"))
    assert own.by_document(torch.tensor([1.0, 0.0, 0.0, 0.0]), texts) == [0.0, 0.5]


def test_equal_compute_counts_the_teachers_answers():
    student, teacher = nn.Linear(9, 10), nn.Linear(99, 10)  # 100 and 1,000 numbers
    assert own.longer(192, student, teacher) == 192 * 2 * 1000 / (own.BATCH * 6 * 100)
    assert own.longer(192, student, teacher, runs=3) == 3 * own.longer(192, student, teacher)


def test_the_missing_class_comes_from_the_teacher_alone(monkeypatch):
    taught_by = own.net(0, 1)  # a linear teacher, which a linear student can copy from any texts

    def texts(count, seed):
        x = torch.randn(count, own.DIM, generator=torch.Generator().manual_seed(seed))
        return own.Texts(x, taught_by(x).argmax(1).detach(), tuple(map(str, range(count))))

    made = own.Languages(NAMES, *(texts(n, seed) for seed, n in enumerate((12, 600, 12, 240))))
    monkeypatch.setattr(own, "languages", lambda: made)
    monkeypatch.setattr(own, "teacher", lambda: taught_by)
    hard = own.missing_class("Danish", 0, hidden=0)
    soft = own.missing_class("Danish", 10, hidden=0)
    assert hard["missing"] == 0
    assert soft["missing"] > 0.3
    assert sum(soft["answers"].values()) == soft["texts"] == int((made.test.y == 1).sum())
    assert soft["accuracy"] > hard["accuracy"]
    with pytest.raises(ValueError, match="no 'Latin'; choose one of"):
        own.missing_class("Latin", 1)


# ----------------------------------------------------------------------------- the experiments


def test_few_labels_and_many_answers(small):
    found = experiments.few_labels(0, count=2)
    mean = {name: sum(row["documents"]) for name, row in found.items()}
    assert mean["distilled"] > mean["labels alone"]
    assert found["distilled"]["steps"] == found["labels alone"]["steps"] == 60
    assert found["labels for longer"]["steps"] > 60
    assert {len(row["documents"]) for row in found.values()} == {40}


def test_few_of_each_takes_as_many_as_asked(small):
    counts = torch.bincount(experiments.few_of_each(small.transfer, 3, 0).y)
    assert counts.tolist() == [3] * 12
    tail = experiments.few_of_each(small.transfer, list(range(1, 13)), 0)
    assert torch.bincount(tail.y).tolist() == list(range(1, 13))


def test_swapping_spoils_first_choices_as_often_as_asked():
    scores = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0))
    noisy = experiments.swapped(scores, 0.4, 0)
    changed = noisy.argmax(1) != scores.argmax(1)
    assert float(changed.double().mean()) == pytest.approx(0.4, abs=0.03)
    assert torch.equal(noisy.sort(1).values, scores.sort(1).values)
    second = scores.topk(2).indices[:, 1]
    assert torch.equal(noisy.argmax(1)[changed], second[changed])
    assert torch.equal(experiments.swapped(scores, 0.0, 0), scores)


def test_uneven_noise_depends_on_the_language():
    scores = torch.eye(12)
    often = (experiments.uneven(scores) == experiments.OFTEN).nonzero()[:, 0].tolist()
    assert often == list(experiments.HARD_LANGUAGES)


def test_students_of_a_noisy_teacher(small):
    clean = experiments.noisy_teacher(0, 0.0, budget=120)
    noisy = experiments.noisy_teacher(0, 0.45, budget=120)
    assert set(noisy) == {*experiments.METHODS, "labels for longer"}
    assert sum(clean["plain"]["documents"]) > sum(noisy["plain"]["documents"])
    assert clean["labels for longer"] == noisy["labels for longer"]
    for how in ("weighted", "forward correction"):
        assert noisy[how]["documents"] != noisy["plain"]["documents"]


def test_three_ways_to_ask(small):
    found = experiments.asking(0, budget=24, labelled=2)
    assert {row["budget"] for row in found.values()} == {24}
    assert set(found) == {"robust", "random", "hardest first"}
    assert all(0 <= row["teacher_errors"] <= 1 for row in found.values())


def test_made_inputs_and_their_rivals(small):
    found = experiments.made_inputs(0, 3, steps=8)
    assert {found[n]["steps"] for n in ("by gradient", "at random", "distilled")} == {8}
    assert found["labels for longer"]["steps"] > 8 * 5  # the search asks the teacher many times


def test_states_of_a_teacher_grow_better(small):
    found = experiments.states(0)
    assert tuple(found) == experiments.STATES
    right = [float(own.right(model, small.test).mean()) for model in found.values()]
    assert right[0] < right[-1]


def test_shuffled_answers_are_the_measure_of_complexity(small):
    (found,) = experiments.complexity(0, 32, {own.TAUGHT: own.teacher()})
    assert 0 < found["share_of_shuffled"] < 1

    class Noise(nn.Module):
        def forward(self, x):
            return 3 * torch.randn(len(x), 12, generator=torch.Generator().manual_seed(1))

    (noise,) = experiments.complexity(0, 32, {1: Noise()})
    assert noise["share_of_shuffled"] == pytest.approx(1, abs=0.15)
    assert noise["share_of_shuffled"] > found["share_of_shuffled"]


def test_early_states_first_is_another_course(small):
    found = experiments.from_states(0)
    assert found["early states first"]["documents"] != found["last state"]["documents"]
    assert found["early states first"]["steps"] == found["last state"]["steps"]


def test_confidences_have_a_slope(small):
    assert experiments.confidences(0).slope > 0


# -------------------------------------------------------------------------------- the students


@pytest.fixture(scope="module")
def loaded():
    return load("mini-300k", device="cpu")


@pytest.fixture(scope="module")
def pool(loaded):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(2, 4000, (2, 16), generator=generator) for _ in range(3)]
    return students.Pool(load("mini-1m", device="cpu").model, batches)


def test_a_pool_asks_its_teacher_once(pool):
    fresh = students.Pool(pool.teacher, pool.batches)
    first = fresh.scores(0)
    direct = pool.teacher(input_ids=pool.batches[0]).logits
    torch.testing.assert_close(first.softmax(-1), direct.softmax(-1).detach(), rtol=0.05, atol=1e-3)
    fresh.teacher = None
    assert torch.equal(fresh.scores(0), first)


def test_students_learn_from_a_pool(loaded, pool):
    def distance(model):
        return sum(students.divergences(model, pool.teacher, list(pool.batches[0])))

    taught = students.learn(loaded.model, pool, 12, 0, weight=1.0)
    alone = students.learn(loaded.model, pool, 12, 0, weight=0)
    assert distance(taught) < distance(loaded.model)
    assert distance(taught) < distance(alone)
    more = [pool.batches[2]] * 2
    longer = students.learn(loaded.model, pool, 14, 0, weight=0, more=more)
    assert distance(longer) != distance(alone)


def test_relations_come_nearer(loaded, pool):
    documents = list(pool.batches[0])
    taught = students.learn_relations(loaded.model, pool, 12, 0)
    before, after = (
        sum(students.relation_divergences(m, pool.teacher, documents))
        for m in (loaded.model, taught)
    )
    assert after < before


def test_every_batch_is_seen_before_one_comes_back():
    order = students.orders(5, 12, 3)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert order == students.orders(5, 12, 3) != students.orders(5, 12, 4)


def test_the_steps_that_a_teacher_costs(loaded, pool):
    ratio = students.matmul_parameters(pool.teacher) / students.matmul_parameters(loaded.model)
    assert students.steps_for_teacher(loaded.model, pool) == round(len(pool.batches) * ratio / 3)


def test_a_context_is_learnt(loaded):
    context = torch.randint(2, 4000, (24,), generator=torch.Generator().manual_seed(5))
    batches = [torch.randint(2, 4000, (4, 12), generator=torch.Generator().manual_seed(6))] * 12
    taught = students.in_context(loaded.model, context, batches, 0, True)
    before, after = (
        sum(students.divergences(m, loaded.model, list(batches[0]), context))
        for m in (loaded.model, taught)
    )
    assert after < before


@pytest.mark.parametrize("way", students.WAYS)
def test_sums_are_read_in_equal_measure(loaded, way):
    items = students.sums(40, 0)
    model, steps = students.learn_sums(loaded.model, loaded.tokenizer, items, way, 2000, 0, size=8)
    assert steps >= 2
    written = [items[0].reasoning + distillation.chain_of_thought.THEREFORE + items[0].answer]
    right = students.right_sums(model, loaded.tokenizer, items[:1], lambda *_, **__: written)
    wrong = students.right_sums(model, loaded.tokenizer, items[:1], lambda *_, **__: ["1"])
    assert (right, wrong) == ([1.0], [0.0])
    assert len({item.question for item in items}) == 40


# ------------------------------------------------------------------- sentences, tables, pictures


def missing_rows(level=(0.0, 0.3, 0.6)):
    return [
        {"language": language, "temperature": t, "seed": seed, "missing": value, "teacher": 0.8,
         "accuracy": 0.7}
        for language in ("Danish", "Korean") for t, value in zip((0, 1, 10), level)
        for seed in range(2)
    ]  # fmt: skip


def grid_rows(gain=0.05):
    rows = [{"model": "mini-5m", "method": "teacher", "loss": 3.0, "windows": [3.0, 3.1]}]
    for model in tables.SIZES:
        rows += [
            {"model": model, "method": name, "loss": loss, "windows": [loss, loss + 0.1, loss]}
            for name, loss in (("before", 4.1), ("text alone", 4.0), ("text alone for longer", 3.9))
        ]
        rows += [
            {"model": model, "method": "distilled", "temperature": t, "weight": w,
             "loss": 3.9 - gain * t, "windows": [3.9 - gain * t, 4.001 - gain * t, 3.9 - gain * t]}
            for t in (1, 2) for w in (0.5, 1.0)
        ]  # fmt: skip
    return rows


def noise_rows():
    return [
        {"noise": p, "budget": b, "method": m, "seed": s, "accuracy": a - p * (m == "plain")}
        for p in (0.0, 0.2, 0.4) for b in (128, 1024) for s in range(2)
        for m, a in (("plain", 0.8), ("weighted", 0.79), ("forward correction", 0.78),
                     ("labels for longer", 0.7))
    ]  # fmt: skip


def complexity_rows():
    return [
        {"width": w, "temperature": t, "seed": s,
         "states": [{"step": 5, "share_of_shuffled": 0.4}, {"step": 150, "share_of_shuffled": v}]}
        for w, v in ((4, 0.9), (128, 0.6)) for t in (1, 2) for s in range(2)
    ]  # fmt: skip


def test_sentences_follow_their_numbers():
    said = tables.missing_said(missing_rows())
    assert "0% with labels alone, 30% with the teacher's answers" in said
    assert "60% at temperature 10" in said
    better, worse = tables.grid_said(grid_rows()), tables.grid_said(grid_rows(-0.2))
    assert "mini-300k, at its best (temperature 2, weight 0.5), is better than" in better
    assert "temperature 1" in worse
    assert "is worse than" in worse
    noise = tables.noise_said(noise_rows())
    assert "From a noise of 20% on" in noise
    assert "Forward correction changes accuracy by between −2.0 points (noise 0%)" in noise
    narrow = tables.complexity_said(complexity_rows())
    assert "90% to a student with 4 hidden units, 60% to one with 128" in narrow


def test_what_is_not_measured_says_so():
    nothing = NotMeasured("05_inference/5_distillation/nothing")
    for function in (
        tables.missing_said, tables.grid_said, tables.grid_table, tables.noise_said,
        tables.complexity_said, drawings.missing, drawings.noise, panels.grid, panels.noise,
        panels.complexity,
    ):  # fmt: skip
        assert function(nothing.data) is nothing


def test_softened_answers_are_those_of_the_specification():
    text = str(tables.softened_table())
    for number in ("0.1345", "0.3293", "+0.365", "−0.304", "−0.061"):
        assert number.replace("−", "-") in text or number in text


def test_pictures_say_what_they_show():
    assert "60% with τ = 10" in drawings.missing(missing_rows()).alt
    assert "0% with labels" in drawings.missing(missing_rows()).alt
    assert "mean -0.80" in drawings.two_humps().alt
    assert "plain" not in drawings.noise(noise_rows()).alt
    assert "as they are: 80% at 0%" in drawings.noise(noise_rows()).alt


def test_confidence_is_drawn(small):
    assert "slope" in drawings.confidence().alt


@pytest.mark.parametrize(
    ("slope", "word"), [(0.6, "more cautious"), (1.01, "about as sure"), (1.4, "exaggerates")]
)
def test_a_slope_is_put_in_words(slope, word, monkeypatch):
    monkeypatch.setattr(experiments, "confidences", lambda seed: SimpleNamespace(slope=slope))
    assert word in tables.slope_said()


def test_operations_are_counted(loaded, pool):
    text = str(tables.operations_table(pool.teacher, loaded.model))
    assert "MiniLLM" in text
    assert "100" in text


def test_live_training_reports_both(loaded, pool):
    assert tables.live_said(pool.teacher, loaded.model, steps=1).startswith("KL of the teacher")


# ------------------------------------------------------------------------------------- panels


def test_panels_move_over_all_their_positions():
    panels.jump().sweep()
    panels.grid(grid_rows()).sweep()
    panels.noise(noise_rows()).sweep()
    panels.complexity(complexity_rows()).sweep()


def test_the_first_panel_trains(small, monkeypatch):
    real = own.missing_class
    monkeypatch.setattr(own, "missing_class", lambda *a, **k: real(*a, **{**k, "steps": 3}))
    panels.missing().sweep()


def test_stored_results_belong_to_this_chapter():
    found = results.read(f"{tables.CHAPTER}/missing")
    assert isinstance(tables.stored("missing"), type(found) if found else NotMeasured)
    assert isinstance(tables.stored("no_such_part"), NotMeasured)


# ----------------------------------------------------------------------------------- exercises


@pytest.mark.parametrize(
    "exercise", [exercises.loss, exercises.correction, exercises.game], ids=lambda one: one.name
)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


def test_references_agree_with_the_package():
    z, v = torch.randn(4, 6), torch.randn(4, 6)
    theirs = distillation.hinton_loss(z, v, temperature=3.0, weight=1.0)
    torch.testing.assert_close(exercises.soft_loss(z, v, 3.0), theirs)
    f = torch.randn(4, 3).softmax(-1)
    top = v[:, :3].topk(2).indices
    mixed = distillation.mix(f, v[:, :3], torch.full((4,), 0.7), 2)
    torch.testing.assert_close(
        exercises.mixed(f, top[:, 0], top[:, 1], 0.7), mixed.gather(1, top[:, :1])[:, 0]
    )
    g = torch.tensor([1.0, 0.9, 0.5, 0.3, 0.05])
    torch.testing.assert_close(
        exercises.shares(g, 1).double(), distillation.robust_choice(g, 1).probabilities
    )
