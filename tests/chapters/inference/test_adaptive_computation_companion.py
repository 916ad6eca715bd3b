"""The companion of the chapter on adaptive computation: exercises, tables, drawings, panels."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from effnb.chapters.inference.adaptive_computation import (
    drawings,
    exercises,
    methods,
    panels,
    tables,
    verdicts,
)
from effnb.lab import results

# ------------------------------------------------------------------------------------ exercises


@pytest.mark.parametrize(
    "exercise",
    [exercises.leaving, exercises.rejecting, exercises.walking],
    ids=["leaving", "rejecting", "walking"],
)
def test_exercises_know_right_from_wrong(exercise):
    exercise.selftest()


# ------------------------------------------------------------------------------- computed live


@pytest.fixture(scope="module")
def writer():
    """A writer on the smallest model: what it writes is not what is tested."""
    return methods.Writer("mini-300k", tokens=12)


def test_the_writer_writes_once_for_each_setting(writer):
    full, early = writer.write(1.0), writer.write(0.0)
    assert writer.write(1.0) is full
    assert set(full.layers) == {2} and set(early.layers) == {1}
    found = writer.early(0.5)
    assert 1 <= len(found.pieces) <= 12
    assert 0 <= found.same <= 1
    assert found.speed > 0
    assert writer.early(1.0).same == 1


def test_all_tokens_are_drawn_and_none_is_broken(writer):
    pieces = drawings.pieces_of(writer, writer.write(0.5))
    lines = drawings.lines_of(pieces, width=40)
    assert sum(len(line) for line in lines) == len(pieces) >= 2
    assert all(column + len(text) <= 40 for line in lines for column, text, _ in line)
    shown = drawings.texts(writer, (1.0, 0.0))
    assert "Threshold 0, 1.0 layers per token" in shown.alt
    assert shown.alt.count("; layers") == 2


def test_shades_get_darker():
    shades = [sum(drawings.shade(i, 6)[:3]) for i in range(1, 7)]
    assert shades == sorted(shades, reverse=True)


def test_the_example_comes_out_as_the_target_says():
    found = methods.sampled(methods.P, methods.Q, draws=4000)
    assert float((found - methods.P).abs().max()) < 0.03


def test_a_pair_writes_the_same_text():
    from effnb.lab.bench import Bench

    bench = Bench("mini-300k", questions=0, windows=1)
    same, rate, passed, faster = methods.pair_here(bench, bench, 2, tokens=6)
    assert same and rate == 1 and passed == 3 and faster > 0


# ---------------------------------------------------------------------------- planted results


def exit_rows():
    rows = []
    for model, shift in (("mini-5m", 1.0), ("mini-5m-exits", 0.0)):
        for e in range(1, 7):
            loss = 3 + (shift * 2 + 1) * (6 - e) / 5 + (0.1 if shift == 0 else 0)
            rows.append({"model": model, "exit": e, "loss": loss, "agrees": e / 6})
        for measure, worse in (("softmax", 0.0), ("saturation", 0.4), ("classifier", 0.2)):
            for at, layers in ((0.2, 2.0), (0.5, 4.0), (1.0, 6.0)):
                rows.append(
                    {"model": model, "measure": measure, "threshold": at, "layers": layers,
                     "loss": 3.1 + worse * (6 - layers) / 4, "agrees": layers / 6}
                )  # fmt: skip
        rows.append({"model": model, "measure": "oracle", "threshold": 1.0, "layers": 2.5,
                     "loss": 3.2, "agrees": 1.0})  # fmt: skip
    return rows


def test_exits_are_told_as_planted():
    rows = exit_rows()
    said = tables.exits_said(rows)
    assert "from 4.80 to 3.70 nats" in said
    assert "costs the last exit 0.10 nats" in said
    measures = tables.measures_said(rows)
    assert measures.startswith("softmax +0.00 nats at 4.0 layers")
    assert "oracle needs 2.5 of 6 layers" in measures
    assert len(tables.exits_table(rows).rows) == 6
    assert tables.measures_table(rows).rows[1][2:4] == ("4.00", "+0.200")
    assert "softmax: 3.10 nats and 33% at 2.0 layers" in drawings.curves(rows).alt
    words = tables.words_said(rows)
    assert "full model's word in 67% of the cases, 0% " in words and "0.40 nats lower" in words


def calm_rows(count=20):
    rows = []
    for at, loss in ((0.9, 0.02), (0.5, 0.15), (0.2, 0.6)):
        rows.append(
            {"setting": "texts", "threshold": at, "distance": [loss] * count,
             "risk": [loss / 2] * count, "layers": [at] * count}
        )  # fmt: skip
    for seed in range(2):
        rows.append(
            {"setting": "calm", "method": "calibrated", "seed": seed, "threshold": 0.9,
             "distance": [0.02, 0.04], "layers": [0.9, 0.7]}
        )  # fmt: skip
    return rows


def test_the_promise_is_told_and_turned():
    rows = calm_rows(200)
    said = tables.calm_said(rows)
    assert "chose the threshold 0.9" in said
    assert "lie 0.030 from" in said and "pass 80% of the layers" in said
    shown = panels.guarantee(rows)
    strict, lenient = (shown.at(delta=d, epsilon=0.05, loss="textual") for d in (0.05, 0.4))
    assert "Threshold by fixed sequence: 0.9" in strict.text.replace("none", "-") or (
        "none" in strict.text
    )
    assert "Threshold by fixed sequence: 0.5" in lenient.text
    assert "Layers passed, of all: 50%" in lenient.text
    assert shown.predict.answer(lenient.result) == 50


def test_promises_of_a_rule_are_counted_over_drawn_prompts():
    rows = [
        {"setting": "texts", "threshold": at, "distance": ([1.0] * bad + [0.0] * (100 - bad))}
        for at, bad in ((0.9, 2), (0.5, 22), (0.2, 60))
    ]
    assert "naive rule in " in tables.resampled_said(rows)
    naive = tables.resampled(rows, 0.2, 0.05, "naive", repetitions=200)
    walk = tables.resampled(rows, 0.2, 0.05, "fixed sequence", repetitions=200)
    assert naive > 0.2 > 0.05 >= walk


def speed_rows():
    found = [
        {"measure": m, "threshold": 0.5, "layers": 3.0, "times_faster": [t] * 5, "same_tokens": 0.8}
        for m, t in (("softmax", 0.9), ("saturation", 1.5), ("classifier", 1.2))
    ]
    return [*found, {"measure": "parts", "threshold": 0.0, "layer": 1.0, "head": 1.3, "copy": 0.2}]


def test_time_is_told_as_planted():
    said = tables.speed_said(speed_rows())
    assert "softmax is never faster, at best at 0.90 times" in said
    assert "saturation is fastest at 1.50 times" in said
    assert "head takes 1.30 times" in tables.parts_said(speed_rows())
    assert [row[3] for row in tables.speed_table(speed_rows()).rows] == ["0.90", "1.50", "1.20"]


def draft_rows():
    rows = [
        {"target": "mini-5m", "draft": d, "gamma": g, "alpha": a, "cost": c,
         "tokens_per_pass": 2.0, "times_faster": [t] * 5}
        for d, a, c, t in (("mini-300k", 0.5, 0.3, 0.8), ("mini-1m", 0.7, 0.6, 1.1))
        for g in (2, 4)
    ]  # fmt: skip
    return [*rows, {"target": "mini-5m", "draft": "first 2", "gamma": 4, "alpha": 0.1,
                    "cost": 0.33, "tokens_per_pass": 1.1, "times_faster": [0.5] * 5}]  # fmt: skip


def test_drafts_are_told_as_planted():
    rows = draft_rows()
    assert "Of 4 settings with a draft model 2 are faster" in tables.speculative_said(rows)
    shown = tables.speculative_table(rows)
    assert [row[1] for row in shown.rows] == ["mini-300k", "mini-1m", "first 2"]
    assert "mini-1m: 1.10 (predicted" in drawings.drafts(rows).alt
    turned = panels.speculation(rows)
    costly = turned.at(alpha=0.1, gamma=4, cost=0.5)
    assert "Best length: no draft at all" in costly.text
    assert turned.predict.answer(turned.at(alpha=0.6, gamma=4, cost=0.1).result) == 1.65


def defer_rows():
    rows = []
    for cost, css, accuracy in ((0.0, 0.2, 0.7), (0.4, 0.5, 0.4)):
        for method, loss, right in (
            ("CSS", css, accuracy), ("post hoc", 0.3, 0.7), ("confidence", 0.35, 0.7),
            ("plain", 0.3, 0.7),
        ):  # fmt: skip
            rows.append(
                {"method": method, "cost": cost, "seed": 0, "mean_loss": loss, "accuracy": right,
                 "deferred": 0.1}
            )  # fmt: skip
    return rows


def test_deferral_is_told_as_planted():
    rows = defer_rows()
    said = tables.deferral_said(rows)
    assert "on 70.0% where deferral is free and on 40.0% where it costs 0.4" in said
    assert "lower loss at 1 of 2 costs; against confidence alone, at 2 of 2 costs" in said
    assert len(tables.deferral_table(rows).rows) == 2
    assert panels.worse(0.0) == "about the same"
    assert panels.worse(-0.2) == "it gets worse"
    assert panels.worse(0.2) == "it gets better"


def cascade_rows():
    return [
        {"model": m, "right": r, "confidence": c, "parameters": p}
        for m, r, c, p in (
            ("mini-300k", [1, 0, 0, 1], [0.99, 0.2, 0.4, 0.96], 300),
            ("mini-1m", [1, 1, 0, 1], [0.99, 0.5, 0.4, 0.96], 1000),
            ("mini-5m", [1, 1, 1, 1], [0.99, 0.99, 0.99, 0.99], 5000),
        )
    ]


def test_a_cascade_is_drawn_as_planted():
    rows = cascade_rows()
    curve = tables.curve_of(rows, "mini-300k", "mini-5m")
    assert [point.loss for point in curve] == [0.5, 0.25, 0, 0, 0]
    assert curve[-1].cost == pytest.approx(1.06)
    shown = panels.cascade(rows)
    here = shown.at(pair="mini-300k → mini-5m", threshold=0.5)
    assert "Accuracy: 100.0%" in here.text and "Deferred: 50%" in here.text
    assert len(tables.cascade_table(rows).rows) == 3
    said = tables.cascade_said(rows)
    assert "50% by mini-300k, 0% by mini-1m and 50% by mini-5m; 100% right" in said


def test_texts_are_summed_up_as_planted():
    rows = [
        {"model": "mini-300k", "losses": [4.0, 2.0, 5.0],
         "confidences": {"mean": [-3.0, -1.0, -4.0], "sum": [-1.0, -9.0, -2.0]}},
        {"model": "mini-5m", "losses": [2.0, 2.0, 2.0]},
    ]  # fmt: skip
    assert "the mean does best" in tables.sequences_said(rows)


def test_smollm2_is_told_as_planted():
    rows = [
        {"layers": 10, "losses": [9.0 - i / 2 for i in range(10)],
         "agrees": [i / 9 for i in range(10)],
         "oracle": 6.2, "curve": [{"threshold": 0.9, "layers": 8.0, "loss": 5.0},
                                  {"threshold": 1.0, "layers": 10.0, "loss": 4.5}],
         "head_numbers": 80, "layer_numbers": 10}
    ]  # fmt: skip
    said = tables.smollm2_said(rows)
    assert "oracle needs 6.2 of 10 layers" in said
    assert "pass 8.0 layers at +0.50 nats" in said
    assert "8.0 times the numbers of a layer" in said
    assert len(tables.smollm2_table(rows).rows) == 2


def section_rows():
    rows = [
        {"rule": "entropy", "setting": t, "accuracy": 0.7 - t / 10, "layers": 6 - t}
        for t in (0.0, 0.2, 0.6, 1.0, 1.8)
    ]
    rows += [
        {"rule": "patience", "setting": p, "accuracy": 0.65, "layers": p + 1.5} for p in (1, 2, 3)
    ]
    return [*rows, {"rule": "oracle", "setting": 0, "accuracy": 0.7, "layers": 2.0}]


def test_sections_are_drawn_as_planted():
    rows = section_rows()
    assert len(tables.sections_table(rows).rows) == 9
    assert "oracle 70 at 2.0" in drawings.sections(rows).alt


def test_a_missing_result_says_so():
    missing = results.NotMeasured("05_inference/7_adaptive_computation/nothing")["table"]
    for made in (
        drawings.curves(missing), drawings.drafts(missing), drawings.sections(missing),
        tables.exits_table(missing), tables.exits_said(missing), tables.calm_said(missing),
        tables.speed_table(missing), tables.deferral_table(missing), tables.cascade_table(missing),
        tables.smollm2_said(missing), panels.guarantee(missing), panels.deferral(missing),
        panels.cascade(missing),
    ):  # fmt: skip
        assert "Not measured here" in str(made)


STORED = {
    "exits": (tables.exits_table, tables.measures_table),
    "sections": (tables.sections_table,),
    "speed": (tables.speed_table,),
    "speculative": (tables.speculative_table,),
    "cascade": (tables.cascade_table,),
    "smollm2": (tables.smollm2_table,),
}


@pytest.mark.parametrize("part", STORED)
def test_stored_results_fill_their_tables_or_say_that_they_are_missing(part):
    for make in STORED[part]:
        shown = make(tables.stored(part).data["table"])
        words = str(shown)
        assert "nan" not in words
        assert "Not measured here" in words or len(shown.rows) >= 2


# ------------------------------------------------------------------------------------- panels


def test_every_position_of_a_panel_answers(writer):
    panel = panels.leaving(writer)
    for threshold in (0.0, 0.2, 1.0):
        for measure in ("softmax", "saturation", "classifier"):
            at = panel.at(threshold=threshold, measure=measure, copying="states")
            assert "Layers per token: " in at.text
            assert not math.isnan(at.result.speed)
    projected = panel.at(threshold=0.0, measure="softmax", copying="projected")
    assert "It writes: This package provides the" in projected.text


def test_the_verdicts_rest_on_the_tables_of_their_sweep():
    """S-I4 is about experts too: that half rests on the sweep of their chapter."""
    sweeps = Path(__file__).parents[3] / "data" / "sweeps"
    for name in verdicts.TABLES:
        script, _, part = name.rpartition("/")
        assert f'"{part}":' in (sweeps / f"{script}.py").read_text()


@pytest.mark.full
def test_smollm2_drafts_for_itself():
    said = methods.smollm2_here(tokens=6)
    assert "the same text" in said
    assert torch.get_default_dtype() == torch.float32
