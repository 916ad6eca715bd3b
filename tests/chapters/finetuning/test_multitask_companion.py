"""The companion of the chapter on many tasks: exercises, tables, drawings, panels, methods."""

import itertools
import math

import pytest
import torch

from effnb.chapters.finetuning.multitask import drawings, exercises, methods, panels, tables
from effnb.finetuning import t_few
from effnb.finetuning.contextual_calibration import calibrate
from effnb.finetuning.mixing import mixing_rates
from effnb.lab import load, results
from effnb.lab.tables import NOT_MEASURED
from effnb.lab.tasks import task

EXERCISES = [exercises.mixing, exercises.ranking, exercises.calibration]
MISSING = results.NotMeasured("04_finetuning/3_multitask/nothing")


def orders_rows(questions=("topic", "language")):
    """Prompts that follow their last example; calibrated, they do not."""
    rows = []
    for question in questions:
        for order, labels in enumerate(itertools.permutations((0, 1, 0, 1))):
            last = labels[-1]
            raw = "".join("01"[place % 2 == last or place < 2] for place in range(8))
            row = {"question": question, "order": order, "labels": "".join(map(str, labels))}
            row |= {"nothing": [0.8, 0.2] if last == 0 else [0.3, 0.7]}
            row |= {"raw": raw.count("1") / 8, "raw_answers": raw}
            better = "11111110" if order else raw[:-1] + "0"
            row |= {"calibrated": better.count("1") / 8, "calibrated_answers": better}
            rows.append(row)
    return rows


# --- exercises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


def test_references_agree_with_the_package():
    sizes = {"a": 900, "b": 400, "c": 25}
    package = mixing_rates(sizes, cap=300, temperature=2.0)
    assert exercises.rates(list(sizes.values()), 300, 2.0) == pytest.approx(list(package.values()))
    one = t_few.Choices.of([[1], [1]], [[[2], [3, 4]], [[5], [6], [7]]], [1, 0])
    logs = torch.where(one.answer, -torch.rand(one.ids.shape), 0)
    beta = t_few.scores(logs, one)
    each = [exercises.length_normalized(beta[:2], 1), exercises.length_normalized(beta[2:], 0)]
    assert float(sum(each)) / 2 == pytest.approx(float(t_few.length_normalized_loss(logs, one)))
    p, nothing = torch.rand(9, 3), torch.rand(4, 3)
    mean = (nothing / nothing.sum(1, keepdim=True)).mean(0)
    p = p / p.sum(1, keepdim=True)
    assert exercises.calibrated(p, nothing) == calibrate(p, mean).argmax(1).tolist()


# --- orders ---------------------------------------------------------------------------------------


def test_the_label_a_prompt_prefers_is_read_off_its_answers():
    # Texts carry both labels in turn: every second one right means one label for all.
    assert tables.preferred({"raw_answers": "11111111"}, "raw") == 0.5
    assert tables.preferred({"raw_answers": "10101010"}, "raw") == 1.0
    assert tables.preferred({"raw_answers": "01010101"}, "raw") == 1.0
    assert tables.preferred({"raw_answers": "11101010"}, "raw") == pytest.approx(7 / 8)


def test_a_panel_with_one_question_asks_about_that():
    shown = panels.orders(orders_rows(["topic"]))
    assert "games or science" in shown.predict.question
    assert "Right as they are" in shown.at(order=2).text


def test_orders_are_said_with_their_ends_and_with_what_calibration_did():
    rows = orders_rows()
    said = tables.orders_said(rows)
    assert "24 orders" in said
    assert "between 62 % and 62 %" in said
    assert "Calibration makes 1 of the 24 orders worse." in said
    assert tables.swing(rows, "topic", "calibrated") == pytest.approx(3 / 8)
    shown = tables.orders_table(rows)
    assert [row[:2] for row in shown.rows] == [
        (q, way) for q in ("topic", "language") for way in tables.WAYS
    ]
    assert shown.rows[0][-1] == "87.5"


def test_which_way_a_prompt_leans_is_said():
    rows = orders_rows()
    assert tables.recency_said(rows).count("it leans towards its last example") == 2
    turned = [row | {"nothing": row["nothing"][::-1]} for row in rows]
    assert "away from its last" in tables.recency_said(turned)
    level = [row | {"nothing": [0.6, 0.4]} for row in rows]
    assert "neither towards nor away" in tables.recency_said(level)


def test_the_picture_names_every_order_and_both_ends():
    found = drawings.orders(orders_rows())
    assert "in 24 orders" in found.caption
    assert "worst order 62 per cent" in found.alt
    worst_first = [row["raw"] for row in drawings.by_accuracy(orders_rows(), "topic")]
    assert worst_first == sorted(worst_first)


def test_the_panel_on_orders_shows_each_of_them_and_judges_the_guess():
    shown = panels.orders(orders_rows())
    at = shown.at(order=24, question="language", answers="calibrated")
    assert at.result["place"] == 24
    assert "Right as they are: 62%" in at.text
    assert shown.predict.answer(at.result) == "less than 10"
    assert panels.points_choice(0.26) == "25 to 40"
    assert panels.points_choice(0.5) == "more than 40"


# --- more examples, and most of one label ---------------------------------------------------------


def shots_rows():
    level = {0: 4, 1: 5, 2: 6, 4: 5}
    return [
        {
            "question": question, "shots": count, "seed": seed, "raw": (right + seed) / 8,
            "calibrated": (right + 1) / 8, "raw_answers": "1" * (right + seed) + "0" * 8,
        }
        for question in ("topic", "language")
        for count, right in level.items()
        for seed in ((0,) if count == 0 else (0, 1))
    ]  # fmt: skip


def test_more_examples_are_summed_up():
    rows = shots_rows()
    said = tables.shots_said(rows)
    assert "topic: from 50 % with 0 examples to 69 % with 4; the best mean is at 2" in said
    assert "not steady" in said
    lines = tables.shots_table(rows).rows
    assert lines[1] == ("topic", "1", "68.8", "62.5", "75.0", "75.0")
    assert "topic, calibrated: 62 per cent with 0" in drawings.shots(rows).alt


def test_a_draw_that_is_missing_is_left_out():
    rows = [row for row in shots_rows() if row["question"] == "topic" or row["shots"] < 2]
    assert "language, calibrated" not in drawings.shots(rows).alt
    assert len(tables.shots_table(rows).rows) == 6


def test_majorities_are_shown_for_each_count():
    rows = [
        {
            "question": "topic", "first": first, "seed": seed,
            "nothing": [first / 4, 1 - first / 4], "raw": 0.5, "calibrated": 0.75,
            "raw_answers": "10" * 4,
        }
        for first in range(5)
        for seed in (0, 1)
    ]  # fmt: skip
    found = tables.majority_table(rows)
    assert [row[1:3] for row in found.rows] == [
        (f"{first} of 4 games", f"{25.0 * first:.1f}") for first in range(5)
    ]


# --- mixtures -------------------------------------------------------------------------------------


def mixing_rows():
    names = tables.with_labels()
    rows = [{"method": "none", **dict.fromkeys(names, 0.1)}]
    for seed in (0, 1):
        rows += [
            {"method": "full", "temperature": "1", "seed": seed, **dict.fromkeys(names, 0.5)},
            {"method": "full", "temperature": "∞", "seed": seed, **dict.fromkeys(names, 0.4)},
            {"method": "full", "temperature": "1", "cap": 256, "seed": seed}
            | dict.fromkeys(names, 0.45),
        ]
        rows += [{"method": "alone", "task": n, "seed": seed, n: 0.6} for n in names]
    return rows


def test_mixtures_stand_beside_one_model_each():
    found = tables.mixing_table(mixing_rows())
    assert [row[0] for row in found.rows] == [
        "untrained", "T = 1", "T = 1, K = 256", "T = ∞", "one model each",
    ]  # fmt: skip
    assert [row[-1] for row in found.rows] == ["10.0", "50.0", "45.0", "40.0", "60.0"]
    assert "section −10.0" in tables.mixing_said(mixing_rows())


def test_a_mixture_that_stopped_half_way_says_so():
    rows = [row for row in mixing_rows() if row.get("task") != "work"][:-2]
    last = tables.mixing_table(rows).rows[-1]
    assert repr(NOT_MEASURED) in last
    assert last[-1] == repr(NOT_MEASURED)
    assert isinstance(tables.mixing_said(rows[:2]), results.NotMeasured)


def test_repeats_are_counted():
    seen = tables.repeats({"large": 90, "small": 10}, 100, cap=None, temperature=1.0)
    assert seen == pytest.approx({"large": 1.0, "small": 1.0})
    seen = tables.repeats({"large": 90, "small": 10}, 100, cap=None, temperature=math.inf)
    assert seen == pytest.approx({"large": 50 / 90, "small": 5.0})
    assert len(tables.repeats_table().rows) == 4


def test_the_panel_on_mixtures_answers_its_question():
    shown = panels.mixture()
    at = shown.at(**shown.predict.at)
    roots = [math.sqrt(size) for size in methods.MIXED.values()]
    assert shown.predict.answer(at.result) == round(100 * min(roots) / sum(roots), 1)
    assert list(shown.at(tasks=2).result["rates"]) == list(methods.MIXED)[-2:]
    equal = shown.at(temperature="∞").result["rates"]
    assert set(equal.values()) == {1 / 6}


# --- few examples, instructions, tasks, prompts ---------------------------------------------------


def test_losses_are_compared_seed_by_seed():
    rows = [
        {"task": "section", "losses": losses, "seed": seed, "accuracy": value + seed / 10}
        for losses, value in (("LM", 0.3), ("LM + UL + LN", 0.4))
        for seed in (0, 1)
    ]
    said = tables.few_said(rows)
    assert "+10.0 points; better in 2 of 2 seeds" in said
    assert tables.few_table(rows).rows[0] == ("LM", "35.0", "30.0 to 40.0")
    assert tables.few_said(rows[:3]).endswith("1 of 1 seed.")


def test_every_task_has_its_own_part_of_the_documents():
    rows = [
        {"method": "untrained", "documents": [0.0] * 10},
        *(
            {"method": "mixture", "seed": seed, "documents": [1.0, 0, 0, 0, 0, 0, 0, 0, 1, 1]}
            for seed in range(2)
        ),
    ]
    found = tables.tasks_table(rows, tables.LABELLED)
    assert found.rows[1] == ("all: one model", "50.0", "0.0", "0.0", "0.0", "100.0", "30.0")


def test_wordings_and_ways_of_asking_have_tables():
    rows = [
        {"wordings": n, "section, known wording": 0.5, "section, known wording_answers": "10"}
        | {"section, last wording": 0.25, "section, last wording_answers": "10"}
        for n in (0, 1)
    ]
    assert [row[-1] for row in tables.wordings_table(rows).rows] == ["50.0", "25.0"] * 2
    rows = [{"method": "examples", "seed": s, "documents": [1.0, s / 2]} for s in range(3)]
    assert tables.smollm2_table(rows).rows == (
        ("a pattern and four examples", "100.0", "50.0", "75.0", "50.0", "100.0"),
    )
    rows = [
        {"judged": what, "method": method, "seed": 0, "documents": [value]}
        for what in tables.KINDS
        for method, value in (("untrained", 0.25), ("instructions", 0.5))
    ]
    assert tables.instructions_table(rows).rows[0][1:3] == ("25.0", "50.0")
    assert "25 per cent before, 50 after" in drawings.instructions(rows).alt


# --- costs ----------------------------------------------------------------------------------------


def test_kept_bytes_are_those_of_a_cache_and_of_a_delta(tiny_llama, ids):
    from effnb.core.deltas import delta_state_dict
    from effnb.finetuning import ia3

    model = tiny_llama(0)
    vectors = delta_state_dict(ia3.attach(model), "default").values()
    assert tables.ia3_bytes(model.config) == 2 * sum(t.numel() for t in vectors)
    with torch.inference_mode():
        cache = model(ids[:1], use_cache=True).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert tables.cache_bytes(model.config, ids.shape[1]) == 2 * kept


def test_a_question_behind_examples_is_longer():
    loaded = load("mini-300k", device="cpu")
    costs = tables.costs_of(loaded.tokenizer, loaded.model.config, 4)
    alone, behind = costs["tokens"]
    assert behind > 3 * alone
    lines = tables.cost_table(costs).rows
    assert [row[1] for row in lines] == [f"{n:,.0f}" for n in (alone, behind, alone, alone)]


# --- live -----------------------------------------------------------------------------------------


def test_chances_are_those_by_which_answers_are_ranked():
    loaded, found = load("mini-300k", device="cpu"), task("language")
    examples = methods.one_per_document(found.test, 3)
    right, wrong = methods.chances(loaded.model, loaded.tokenizer, found, examples)
    choices = methods.few(found, loaded.tokenizer, examples)
    beta = t_few.scores(t_few.answer_log_probs(loaded.model, choices), choices)
    assert right == pytest.approx(float(beta[choices.right].mean()), abs=1e-5)
    assert wrong == pytest.approx(float(beta[~choices.right].mean()), abs=1e-5)


def test_two_orders_can_be_tried_live(monkeypatch):
    monkeypatch.setattr(methods, "load", lambda name: load("mini-300k", device="cpu"))
    first, second = methods.smollm2_here(count=2).splitlines()
    assert first.startswith("games, games, science, science: ")
    assert second.startswith("science, science, games, games: ")
    assert "of 2 right, calibrated" in second


def test_the_rate_that_is_used_is_the_best_of_those_that_were_tried():
    rows = tables.stored("rates").data["table"]
    if rows:
        best = max(rows, key=lambda row: row["accuracy"])
        assert methods.RATE["(IA)³"] == best["rate"]
        assert len(tables.rates_table(rows).rows) == len(rows)


@pytest.mark.parametrize("make", [panels.few, panels.instructions])
def test_panels_that_train_answer_at_every_position(make, monkeypatch):
    monkeypatch.setenv("EFFNB_SWEEP", "1")
    shown = make()
    assert shown.at().text


def test_the_guess_about_wrong_answers_names_the_direction():
    assert panels.moved(0.5) == "raises it too"
    assert panels.moved(-0.5) == "lowers it"
    assert panels.moved(0.05) == "leaves it within a tenth of a nat"


# --- nothing measured -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "show",
    [
        tables.orders_said, tables.orders_table, tables.recency_said, tables.majority_table,
        tables.shots_table, tables.shots_said, tables.mixing_table, tables.mixing_said,
        tables.few_table, tables.few_said, tables.instructions_table, tables.wordings_table,
        tables.rates_table, tables.tasks_table, tables.smollm2_table, tables.cost_table,
        drawings.orders, drawings.shots, drawings.instructions, panels.orders,
    ],
    ids=lambda function: f"{function.__module__}.{function.__name__}",
)  # fmt: skip
def test_what_is_missing_says_so(show):
    assert show(MISSING) is MISSING
