"""The companion of the chapter on objectives: runs, the probe, sizes, tables, panels."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from planted_rows import stored

from effnb.chapters.pretraining.objectives import (
    drawings,
    exercises,
    live,
    panels,
    probing,
    runs,
    scaling,
    sheet,
    tables,
)
from effnb.lab.results import NotMeasured
from effnb.pretraining import objectives
from effnb.pretraining.objectives import IGNORED

EXERCISES = [exercises.masking, exercises.spans, exercises.rule]
MISSING = NotMeasured(f"{tables.CHAPTER}/no_such_part")


# --- exercises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


def test_references_agree_with_the_package():
    for n, prefix in ((6, 1), (6, 4), (3, 3)):
        wanted = objectives.prefix_visible(torch.tensor([prefix]), n)[0]
        assert torch.equal(exercises.prefix_mask(n, prefix), wanted)
    ids = torch.arange(10, 30)[None]
    noise = objectives.noise_mask(20, 0.4, 2, generator=torch.Generator().manual_seed(0))
    made = objectives.span_corruption(ids, noise=noise, first_sentinel=999, end=1)
    found = exercises.targets_of(ids[0].tolist(), noise[0].tolist(), 999, 1)
    assert found == made.targets[0].tolist()
    rule = objectives.chinchilla(1e20)
    assert exercises.spend(1e20) == pytest.approx((rule.parameters, rule.tokens))


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def windows():
    return torch.randint(1, runs.WORDS, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(runs, "SHAPE", (2, 24))


@pytest.mark.parametrize("name", runs.ALL)
def test_every_objective_trains_the_same_network(short, windows, name):
    found = runs.trained(runs.ALL[name], 1, steps=2, windows=windows)
    assert all(math.isfinite(x) for x in found.losses)
    assert found.work.text_tokens == 2 * 2 * 24
    fresh = runs.build(1)
    assert type(found.model) in (type(fresh), type(fresh.base_model))
    before = dict(fresh.base_model.named_parameters())
    after = dict(found.model.base_model.named_parameters())
    assert {n: p.shape for n, p in before.items()} == {n: p.shape for n, p in after.items()}
    assert all(not torch.equal(before[n], after[n]) for n in before if "layers" in n)
    features = runs.features(found.model, [windows[0], windows[1, :9]], runs.ALL[name].both_sides)
    assert features.shape == (2, 64)


def test_a_run_is_the_same_twice(short, windows):
    one, other = (runs.trained(runs.ALL["ELECTRA"], 3, steps=2, windows=windows) for _ in range(2))
    assert one.losses == other.losses
    assert runs.trained(runs.ALL["ELECTRA"], 4, steps=2, windows=windows).losses != one.losses


def test_fixed_examples_are_read_in_turn(short, windows, monkeypatch):
    seen = []
    monkeypatch.setattr(
        objectives, "example_loss",
        lambda model, given: (seen.append(given), model.model.norm.weight.sum())[1],
    )  # fmt: skip
    fixed = [runs.ALL["MLM 15 %"].make(part, runs.draws_of(0, 0)) for part in windows.split(2)]
    runs.trained(runs.ALL["MLM 15 %"], steps=5, windows=windows, examples=fixed)
    assert [one is fixed[i % 2] for i, one in enumerate(seen)] == [True] * 5


def test_features_do_not_depend_on_padding_and_clm_does_not_look_ahead(windows):
    model = runs.build(0)
    alone = runs.features(model, [windows[0, :9]], both_sides=False)
    padded = runs.features(model, [windows[0, :9], windows[1]], both_sides=False)[:1]
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=1e-5)
    left = runs.plain(windows[:1], torch.ones(1, 24), both_sides=False)
    assert torch.equal(left.visible[0], torch.ones(24, 24).tril().bool())
    assert runs.plain(windows[:1], torch.ones(1, 24), both_sides=True).visible.all()


def test_pooled_is_the_same_where_a_model_looks_to_the_left(windows):
    model, texts = runs.build(0), [windows[0], windows[1, :9]]
    torch.testing.assert_close(
        runs.pooled(model, texts), runs.features(model, texts, both_sides=False),
        atol=1e-5, rtol=1e-5,
    )  # fmt: skip


def test_the_common_test_is_always_the_same(windows):
    one, other = (runs.masked_alike(windows[:1]) for _ in range(2))
    assert torch.equal(one.inputs, other.inputs)
    assert len(one.inputs) == 4
    assert not torch.equal(one.inputs[0], one.inputs[1])
    losses = runs.losses_by_document(runs.build(0), [windows[0]], runs.masked_alike)
    assert losses[0] == pytest.approx(math.log(runs.VOCABULARY), abs=0.3)


def test_text_is_fresh_and_from_all_corpora():
    found = runs.text_windows(0, 6, 16)
    assert found.shape == (6, 16)
    assert torch.equal(found, runs.text_windows(0, 6, 16))
    assert not torch.equal(found, runs.text_windows(1, 6, 16))
    assert len({tuple(row) for row in found.tolist()}) == 6
    assert int(found.max()) < runs.WORDS


# --- the probe ------------------------------------------------------------------------------------


def test_descriptions_are_balanced_and_no_source_is_in_both_parts():
    given = probing.texts()
    assert given.learn_labels.bincount().tolist() == [probing.LEARN] * 10
    assert given.judge_labels.bincount().tolist() == [probing.JUDGE] * 10
    assert not set(given.learn) & set(given.judge)


def test_groups_are_means_of_neighbours():
    correct = [i % 3 == 0 for i in range(600)]
    found = probing.grouped(correct)
    assert len(found) == probing.GROUPS
    assert found[0] == pytest.approx(sum(correct[:12]) / 12, abs=1e-4)
    assert sum(found) / len(found) == pytest.approx(1 / 3, abs=0.02)


def test_a_network_that_knows_the_section_is_always_right(monkeypatch):
    given = probing.Texts(
        ("a", "b") * 10, torch.arange(20) % 2, ("b", "a") * 5, (torch.arange(10) + 1) % 2
    )
    monkeypatch.setattr(probing, "texts", lambda: given)
    tokenizer = SimpleNamespace(encode=lambda text, **_: [ord(text)] * 60)

    def read(texts):
        assert {len(t) for t in texts} == {probing.TOKENS}
        return torch.stack([t.float().mean() for t in texts])[:, None]

    assert all(probing.probed(read, tokenizer))
    assert sum(probing.probed(lambda t: torch.zeros(len(t), 1), tokenizer)) == 5


# --- the sheet ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sheet.KINDS)
def test_the_sheet_shows_what_is_asked(kind):
    found = sheet.sheet(kind, 0.3, 3, 1)
    assert len(found.shown) == len(found.answers) == len(found.changed) == len(found.visible)
    n = sheet.sentence().shape[1]
    asked = {"CLM": n - 1, "ELECTRA": n}.get(kind)
    assert found.asked == asked if asked else 0 < found.asked < n
    if kind in ("MLM", "span corruption"):
        assert any(found.changed)
        assert any(s in ("[M]", "⟨X⟩") for s in found.shown)
    assert "truth" in sheet.sheet("CLM").reads()


def test_the_sheets_answers_are_the_text():
    text = [sheet.piece(t) for t in sheet.sentence()[0].tolist()]
    clm = sheet.sheet("CLM")
    assert list(clm.answers) == [*text[1:], ""]
    mlm = sheet.sheet("MLM", 0.4, seed=2)
    assert [a or s for a, s in zip(mlm.answers, mlm.shown, strict=True)] == text


def test_half_a_letter_is_called_so():
    assert sheet.piece(runs.tokenizer().encode("é", add_special_tokens=False)[0]) in ("byte", "é")
    assert {sheet.piece(t) for t in (runs.MASK, runs.FIRST_SENTINEL - 1, 0)} == {"[M]", "⟨Y⟩", "·"}


def test_unknown_objectives_are_refused():
    with pytest.raises(ValueError, match="choose one of CLM"):
        sheet.sheet("BLM")


def test_a_generator_fills_from_what_it_finds_likely():
    ids = sheet.sentence()
    everywhere = objectives.causal_lm(ids)

    class Sure(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            following = torch.cat([input_ids[:, 1:], input_ids[:, :1]], 1)
            logits = 1e4 * torch.nn.functional.one_hot(following, runs.WORDS)
            return SimpleNamespace(logits=logits)

    draws = torch.Generator().manual_seed(0)
    found = sheet.fill(ids, everywhere, Sure(), draws)
    asked = everywhere.labels != IGNORED
    assert not found.labels[:, 1:][asked[:, 1:]].any()  # the first has nothing before it
    random = sheet.fill(ids, everywhere, None, draws)
    assert random.labels.sum() > 0.9 * asked.sum()


# --- sizes ----------------------------------------------------------------------------------------


def test_curves_are_the_records_at_the_constant_rate():
    curves = scaling.curves()
    assert list(curves) == list(scaling.SIZES)
    sizes = [one.parameters for one in curves.values()]
    assert sizes == sorted(sizes)
    for one in curves.values():
        first, loss = one.points[0]
        assert one.at(first) == pytest.approx(loss)
        assert one.at(0.5 * first) is None
        assert one.at(2 * one.points[-1][0]) is None
        (a, high), (b, low) = one.points[:2]
        assert low < one.at(math.sqrt(a * b)) < high
        assert one.end[1] < one.points[-1][1]  # the falling rate lowers the loss


def test_slices_spend_the_same_compute():
    for one in scaling.comparable():
        for name, loss in one.losses.items():
            curve = scaling.curves()[name]
            assert loss == curve.at(one.flops / (6 * curve.parameters))
        assert one.best in one.losses
        assert one.nearest in one.losses
    three = [one for one in scaling.comparable() if len(one.losses) == 3]
    assert three
    assert all(one.minimum is None or 3e5 < one.minimum < 6e6 for one in three)
    assert scaling.sliced(1e13).minimum is None


def test_the_size_nearest_to_the_rule_is_near_in_ratio(monkeypatch):
    rule = objectives.chinchilla(1e14).parameters
    assert 3e5 < rule < 2e6
    assert scaling.Slice(1e14, {"mini-300k": 1.0, "mini-5m": 2.0}).nearest == "mini-300k"
    assert scaling.Slice(1e16, {"mini-300k": 1.0, "mini-5m": 2.0}).nearest == "mini-5m"


def test_what_is_said_of_sizes_follows_the_records():
    said = scaling.judged()
    right = sum(one.best == one.nearest for one in scaling.comparable())
    assert f"In {right} of {len(scaling.comparable())} budgets" in said
    assert "mini-5m 4." in said
    assert len(scaling.slices_table().rows) == len(scaling.comparable())
    law = objectives.ScalingLaw(1.0, 10.0, 20.0, 0.5, 0.25)
    assert "N grows as C to the 0.33" in scaling.law_said(law)


# --- tables and drawings --------------------------------------------------------------------------


def planted(shift=0.02):
    """Rows of every objective with three seeds; the probe of each is a little better."""
    rows = []
    for number, name in enumerate(("untrained", *runs.ALL)):
        for seed in range(3):
            noise = [0.01 * ((7 * i + seed) % 5 - 2) for i in range(probing.GROUPS)]
            groups = [0.25 + shift * number + x for x in noise]
            row = {
                "method": name, "seed": seed, "probe": sum(groups) / len(groups),
                "probe_groups": groups,
            }  # fmt: skip
            if name != "untrained":
                row |= {
                    "training_tokens": 614_400, "text_targets": 100_000 * number, "flops": 1,
                    "training_loss": 7.0 - number / 10,
                    "documents": [5.0 + 0.5 * (name != "CLM") + 0.01 * i for i in range(24)],
                    "masked_documents": [6.0 + number / 10 + 0.01 * i for i in range(24)],
                }  # fmt: skip
            rows.append(row)
    return rows


def test_tables_say_what_is_missing():
    for one in (
        tables.text_table(MISSING), tables.text_said(MISSING), tables.rates_table(MISSING),
        tables.rates_said(MISSING), tables.spans_table(MISSING), tables.repeats_table(MISSING),
        tables.repeats_said(MISSING),
        tables.compute_table(MISSING, MISSING), tables.compute_said(MISSING, MISSING),
        tables.real_table(MISSING), tables.real_said(MISSING), drawings.result(MISSING),
    ):  # fmt: skip
        assert one is MISSING


def test_equal_text():
    rows = planted()
    found = tables.text_table(rows)
    assert len(found.rows) == 1 + len(runs.ALL)
    assert "614,400" in found.caption
    said = tables.text_said(rows)
    assert "against all of them: +0.500" in said
    assert "ELECTRA judged everywhere, against 15 %: −0.020" in said
    assert "worse" in said
    assert "Against the untrained network, better: CLM; CLM, 15 % asked; MLM 15 %" in said
    assert tables.gain(rows, "ELECTRA", "CLM").mean == pytest.approx(0.2)
    first = [r for r in rows if r["method"] == "CLM"]
    assert len(tables.text_table(first).rows) == 1
    assert tables.text_said(first) == ""
    for one in (tables.rates_table(first), tables.rates_said(first), tables.spans_table(first)):
        assert isinstance(one, NotMeasured)
        assert "1_objectives_claims.py tokens" in str(one)
    assert "untrained network 25 %" in drawings.result(rows).alt


def test_unequal_seeds_are_not_compared():
    rows = planted()
    rows = [r for r in rows if not (r["method"] == "CLM" and r["seed"] == 2)]
    rows += [dict(r, seed=9, probe_groups=[0.99] * 48) for r in rows if r["method"] == "ELECTRA"]
    assert tables.gain(rows, "ELECTRA", "CLM").mean == pytest.approx(0.2)


def test_rates_and_spans():
    rows = planted()
    said = tables.rates_said(rows)
    assert "disagree on the order" in said
    assert "Lowest own loss: MLM 80 %; lowest at the common 15 %: MLM 15 %" in said
    assert "best probe: MLM 80 %" in said
    assert len(tables.rates_table(rows).rows) == 4
    assert len(tables.spans_table(rows).rows) == 3


def test_equal_compute_and_repeats():
    rows = planted()
    some = [r for r in rows if r["method"] in ("MLM 15 %", "ELECTRA")]
    assert len(tables.compute_table({"table": some}, rows).rows) == 3
    assert tables.compute_said({"table": some}, rows).endswith("better: MLM 15 % and ELECTRA.")
    masked = [dict(some[0], method=name) for name in tables.MASKINGS]
    found = tables.repeats_table({"table": masked, "times": 30, "batches": 20})
    assert "20,480 tokens of text, read 30 times" in found.caption
    said = tables.repeats_said({"table": masked[:1], "times": 30, "batches": 20})
    assert said == (
        "After 30 readings: with one masking, 6.7 nats on the text itself and 6.4 on another."
    )
    assert len(found.rows) == 3


def test_real_models():
    table = [
        {"model": name, "parameters": 1e6 * (i + 1), "probe": 0.3 + i / 10}
        for i, name in enumerate(("mini-300k", "mini-1m", "minilm-l6"))
    ]
    data = stored(table, tokens=48).data
    assert tables.real_said(data) == ("mini-300k 30% and mini-1m 40%. Best of all: minilm-l6, 50%.")
    assert len(tables.real_table(data).rows) == 3


def test_work_is_counted_alike_in_table_and_panel():
    assert tables.counted("CLM").share == pytest.approx(127 / 128)
    assert tables.counted("ELECTRA").share == 1
    cheap = tables.counted("MLM 15 %")
    assert 0.12 < cheap.share < 0.18
    assert cheap.flops < 0.5 * tables.counted("CLM").flops
    assert len(tables.work_table().rows) == len(runs.ALL)
    assert panels.counts("MLM", 0.15, 3)["read"] == 100
    assert panels.counts("ELECTRA", 0.15, 3)["asked"] == 100
    assert panels.work_ratio("CLM", 0.15, 3) == pytest.approx(1)


def test_pictures_say_what_they_show():
    assert "Rows that are asked: CLM 9" in drawings.masks().alt
    assert "mini-5m" in drawings.law().alt


# --- panels ---------------------------------------------------------------------------------------


def test_the_panel_of_questions():
    made = panels.questions(None)
    whole = made.at(objective="CLM")
    assert "Operations, CLM's as 1: 1.00" in whole.text
    cut = made.at(objective="span corruption", rate=15, span=3)
    assert made.predict.answer(cut.result) == pytest.approx(13.5, abs=0.5)
    assert "⟨X⟩" in cut.text
    assert made.at(objective="ELECTRA").result["asked"] == 100


def test_the_panel_of_budgets():
    made = panels.budgets()
    last = made.at()
    assert made.predict.answer(last.result) in made.predict.choices
    assert "The rule: 0.91 million parameters, 18.3 million tokens" in last.text


def test_the_panel_of_generators(monkeypatch, tiny_llama):
    model = tiny_llama(0, vocab_size=runs.WORDS)
    monkeypatch.setattr(panels, "load", lambda name, device: SimpleNamespace(model=model))
    made = panels.fillers()
    found = made.at(rate=50, generator="mini-300k").result
    assert found["filled"] == pytest.approx(100 * (1 - math.exp(-0.5)), abs=3)
    assert found["new"] == pytest.approx(found["filled"] * (1 - found["right"] / 100), abs=0.1)
    assert made.at(rate=5, generator="random words").result["right"] < 10


def test_steps_are_timed(monkeypatch):
    monkeypatch.setattr(runs, "SHAPE", (2, 16))
    found = live.timed_steps(("CLM", "ELECTRA"), steps=3)
    assert [row[0] for row in found.rows] == ["CLM", "ELECTRA"]
    assert found.rows[0][2] == "1.00"


def test_the_sweeps_static_maskings_stay_with_their_text(monkeypatch):
    import sys
    from pathlib import Path

    folder = Path(__file__).resolve().parents[3] / "data" / "sweeps" / "03_pretraining"
    monkeypatch.syspath_prepend(str(folder))
    for name in ("1_objectives", "1_objectives_claims"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    script = importlib.import_module("1_objectives")
    monkeypatch.setattr(runs, "SHAPE", (2, 24))
    windows = torch.randint(1, runs.WORDS, (6, 24), generator=torch.Generator().manual_seed(0))
    fixed = script.static(windows, 2, seed=0)
    assert len(fixed) == 6
    for number, one in enumerate(fixed):
        chosen = one.labels != IGNORED
        part = windows.split(2)[number % 3]
        assert torch.equal(torch.where(chosen, one.labels, one.inputs), part)
    assert not torch.equal(fixed[0].inputs, fixed[3].inputs)
