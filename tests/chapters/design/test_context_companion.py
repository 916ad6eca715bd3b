"""The companion of the chapter on context: exercises, live methods, tables, drawings, panels."""

import math
from types import SimpleNamespace

import pytest
import torch

from effnb.chapters.design.context import drawings, exercises, methods, panels, tables
from effnb.design import context
from effnb.lab import load, results

EXERCISES = [exercises.base, exercises.parts, exercises.sharper]


@pytest.fixture(scope="module")
def small():
    return load("mini-300k", device="cpu").model


def words(count, seed=0):
    return torch.randint(2, 4000, (count,), generator=torch.Generator().manual_seed(seed))


# --- exercises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


def test_references_agree_with_the_package():
    for b, s, d in ((1e4, 4.0, 32), (5e5, 2.0, 64)):
        assert exercises.new_base(b, s, d) == pytest.approx(context.ntk_aware_base(b, s, d))
    theta = context.rope_frequencies(32)
    want = context.ntk_by_parts_frequencies(theta, 4, 512, ramp="paper")
    torch.testing.assert_close(exercises.blend(theta, 4, 512, 1.0, 32.0), want)
    scores = torch.tensor([1.0, 2.0, -1.0])
    by_package = torch.softmax(scores / context.temperature(8), -1)
    torch.testing.assert_close(exercises.sharpen(scores, 8), by_package)


# --- live -----------------------------------------------------------------------------------------


def test_each_method_has_its_own_spectrum(small):
    found = {m: methods.divisors(small, methods.longer(small, m, 4.0)) for m in methods.METHODS}
    assert set(found["RoPE"]) == {1.0}
    assert set(found["PI"]) == {4.0}
    for name in ("NTK-aware", "NTK-by-parts"):
        assert found[name][0] == pytest.approx(1)
        assert found[name][-1] == pytest.approx(4, rel=1e-4)
    assert found["YaRN"] == found["NTK-by-parts"]


def test_every_knob_of_a_method_changes_what_it_computes(small):
    ids = words(96)
    home = {
        "factor": 4.0,
        "alpha": 1.0,
        "beta": 32.0,
        "temperature": "0.1 ln s + 1",
        "ramp": "code",
    }
    other = {"factor": 8.0, "alpha": 4.0, "beta": 8.0, "temperature": "1.4", "ramp": "paper"}

    def logits(**values):
        with torch.inference_mode():
            return methods.longer(small, "YaRN", **values)(input_ids=ids[None]).logits

    first = logits(**home)
    for name, value in other.items():
        assert not torch.allclose(logits(**home | {name: value}), first), name


def test_a_reading_is_the_mean_of_its_places(small):
    model = methods.longer(small, "RoPE", 1.0, length=640)
    found = methods.read(small, model, "RoPE", words(640))
    assert len(found.curve) == 10
    assert found.temperature == 1
    assert found.between(64, 192) == pytest.approx(sum(found.curve[1:3]) / 2)


def test_only_the_librarys_dynamic_table_disagrees_with_its_cache(small):
    gaps = methods.cache_gaps(small, words(560), start=500)
    theirs = gaps.pop("transformers' dynamic")
    assert theirs > 0.01
    assert all(gap < 1e-3 for gap in gaps.values())


def test_saved_models_come_back(small):
    found = methods.round_trips(small, words(40))
    assert set(found) == set(methods.METHODS)
    assert all(gap == 0 for _, gap in found.values())
    assert found["PI"][0] == "linear"
    assert found["YaRN"][0] == "yarn"
    assert "yes" in str(tables.round_trip_table(found))


def test_a_cache_holds_keys_and_values(small):
    c = small.config
    want = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 10 * 2
    assert methods.cache_bytes(small, 10) == want


# --- stored results -------------------------------------------------------------------------------


def curve(method):
    high = {"RoPE": 8.0, "PI": 4.6}.get(method, 4.0)
    return [4.2] * 4 + [high] * 28


POSITIONS = {
    "model": "mini-5m", "bin": 128, "chapters": 6, "trained": 512,
    "table": [{"method": m, "factor": 8.0, "curve": curve(m)} for m in tables.ORDER],
}  # fmt: skip
LEVEL = dict(zip(tables.ORDER, (5.0, 4.6, 4.3, 4.2, 4.1)))
ZERO_SHOT = [
    {"model": m, "method": name, "context": c,
     "documents": [LEVEL[name] - (0.9 if c == 512 and name == "RoPE" else 0) + 0.01 * i * j
                   for i, j in enumerate((1, -1, 1, -1), 1)]}
    for m in ("mini-5m", "mini-1m") for name in tables.ORDER for c in (512, 2048)
]  # fmt: skip
TUNED = [
    {"method": m, "steps": s, "seed": seed, "training_tokens": 2048 * s,
     "documents": [start - 0.05 * s] * 3}
    for m, start in (("RoPE", 6.0), ("PI", 5.5), ("larger base", 5.2), ("YaRN", 4.8))
    for s in (2, 8, 20) for seed in (0, 1)
]  # fmt: skip
RECALL = {
    "model": "mini-1m", "inside": {"mini-300k": 0.2, "mini-1m": 0.95}, "enough": 0.9, "trials": 8,
    "lengths": [256, 512, 1024, 2048], "depths": [0.0, 0.5, 1.0], "trained": 512,
    "table": [
        {"method": "RoPE", "correct": [[8, 8, 8], [8, 8, 8], [0, 0, 4], [0, 0, 0]]},
        {"method": "YaRN", "correct": [[8, 8, 8], [8, 8, 8], [6, 6, 6], [4, 4, 4]]},
    ],
}  # fmt: skip
FACTORS = {
    "model": "mini-5m", "length": 2048, "chapters": 4,
    "table": [
        *({"method": m, "factor": f, "near": 4.0 + f / 50, "far": 4.0 + (f - best) ** 2 / 100}
          for m, best in zip(tables.ORDER[1:], (4, 8, 4, 6)) for f in (1.0, 4.0, 6.0, 8.0)),
        {"method": "YaRN, paper's ramp", "factor": 4.0, "near": 4.1, "far": 4.14},
        {"method": "YaRN, no temperature", "factor": 4.0, "near": 4.1, "far": 4.24},
    ],
}  # fmt: skip
SMOLLM2 = {
    "bin": 512, "trained": 8192,
    "table": [{"method": m, "curve": [3.0] * 16 + [end] * 4}
              for m, end in (("RoPE", 7.0), ("YaRN", 3.0), ("PI", 3.5))],
}  # fmt: skip


def test_sentences_are_computed_from_the_rows():
    said = tables.positions_said(POSITIONS)
    assert f"{math.exp(4.2):.0f} on its first 512" in said
    assert f"{math.exp(8):,.0f} as trained, {math.exp(4):.0f} with YaRN" in said
    assert "10 % none" not in tables.tuned_said(TUNED)
    assert "YaRN 8 (16,384 tokens)" in tables.tuned_said(TUNED)
    assert "RoPE none" in tables.tuned_said(TUNED)
    assert "mini-1m, the first of the bench that recalls 90%: 95% within 512" in (
        tables.recall_said(RECALL)
    )
    assert "RoPE 8% and YaRN 62%" in tables.recall_said(RECALL)
    poor = RECALL | {"inside": {"mini-1m": 0.4}}
    assert "the best of the bench, although it recalls less than 90%" in tables.recall_said(poor)
    assert "4 for PI, 8 for NTK-aware, 4 for NTK-by-parts and 6 for YaRN" in (
        tables.best_factor_said(FACTORS)
    )
    assert "ramp instead of the code's changes it by +0.100" in tables.variants_said(FACTORS)
    assert f"RoPE {math.exp(3):.1f} and {math.exp(7):,.1f}" in tables.smollm2_said(SMOLLM2)


def test_methods_are_compared_on_the_same_tokens():
    change = tables.between(ZERO_SHOT, "mini-5m", ("YaRN", 2048), ("NTK-by-parts", 2048))
    assert change.mean == pytest.approx(-0.1)
    said = tables.zero_shot_said(ZERO_SHOT)
    assert "YaRN is better than NTK-by-parts" in said
    shown = str(tables.zero_shot_table(ZERO_SHOT))
    assert "+0.900" in shown


@pytest.mark.parametrize(
    ("draw", "data"),
    [
        (drawings.result, POSITIONS), (drawings.recall, RECALL), (drawings.factors, FACTORS),
        (drawings.smollm2, SMOLLM2), (tables.positions_table, POSITIONS),
        (tables.tuned_table, TUNED),
    ],
)  # fmt: skip
def test_what_is_stored_is_drawn_and_what_is_missing_says_so(draw, data):
    assert str(draw(data)) or repr(draw(data))
    missing = results.NotMeasured("02_design/6_context/nothing")
    assert draw(missing) is missing


def test_pictures_that_need_no_measurement():
    for shown in (drawings.slowest_angle(), drawings.ramps()):
        assert shown.caption
        assert shown.alt
    assert "0.30 in the paper, 0.69 in the code" in drawings.ramps().alt or (
        "in the code" in drawings.ramps().alt
    )


# --- panels ---------------------------------------------------------------------------------------


def test_the_stored_panel_moves_and_knows_its_answer():
    shown = panels.reading(POSITIONS)
    shown.sweep()
    at = shown.at(method="RoPE", length=4096).result
    assert panels.times_choice(at["last"] / at["inside"]) == "more than five times"
    assert panels.times_choice(1.0) == "about the same"


def test_the_live_panel_moves(small, monkeypatch):
    monkeypatch.setattr(panels, "LENGTHS", (512, 1024, 2048))
    monkeypatch.setattr(panels, "long_texts", lambda *_: words(2048)[None])
    shown = panels.live(SimpleNamespace(model=small, tokenizer=None))
    found = shown.at(method="PI", factor=8, length=1024)
    assert found.result["reading"].divisors[0] == 8
    assert "Left alone: 0 of 8 pairs" in found.text
    yarn = shown.at(method="YaRN", factor=4, length=512, temperature="1.4")
    assert "Queries and keys times: 1.4000" in yarn.text
    assert shown.predict.answer(yarn.result) in shown.predict.choices
