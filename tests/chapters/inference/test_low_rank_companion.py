"""The companion of the chapter on low rank: exercises, live methods, tables, drawings, panels."""

import inspect
import math
import re

import pytest
import torch

from effnb.chapters.inference.low_rank import drawings, exercises, methods, panels, tables
from effnb.inference import low_rank
from effnb.lab import results
from effnb.lab.changes import Change

EXERCISES = [exercises.saving, exercises.scaling, exercises.damage]


# --- exercises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


def test_references_agree_with_the_package():
    draw = torch.Generator().manual_seed(0)
    for kept, m, n in ((0.5, 256, 256), (0.3, 688, 256), (0.001, 8, 8)):
        assert exercises.rank_of(kept, m, n) == low_rank.rank_for(kept, m, n)
    W, X = torch.randn(6, 5, generator=draw).double(), torch.randn(5, 40, generator=draw).double()
    s = X.abs().mean(1)
    asvd = low_rank.asvd_weight(W, s - 1e-6, 2, alpha=1.0).product()  # which adds a floor of 1e-6
    torch.testing.assert_close(exercises.truncate_scaled(W, s, 2), asvd)
    factors = low_rank.svd_llm_weight(W, X @ X.T, 2)
    measured = ((W - factors.product()) @ X).square().sum()
    torch.testing.assert_close(exercises.predict(W, X @ X.T, 2), measured)


# --- two inputs -----------------------------------------------------------------------------------


def test_the_error_is_that_of_the_outputs():
    delta, x = torch.randn(3, 5).double(), torch.randn(5, 40).double()
    error = methods.output_error(delta, x @ x.T)
    assert error == pytest.approx(float((delta @ x).square().sum()))


def test_methods_differ_where_their_knowledge_does():
    alike, larger, opposed = (panels.errors_at(inputs) for inputs in methods.INPUTS)
    assert alike["ASVD"] == pytest.approx(alike["SVD"]) == pytest.approx(alike["SVD-LLM"])
    assert larger["SVD-LLM"] < larger["ASVD"] < 0.5 * larger["SVD"]
    assert opposed["SVD-LLM"] < 0.5 * opposed["SVD"]
    assert opposed["ASVD"] == pytest.approx(opposed["SVD"])
    best = exercises.predict(panels.WEIGHT, methods.INPUTS["opposed"], 1)
    assert opposed["SVD-LLM"] == pytest.approx(float(best), rel=1e-4)


def test_the_guess_names_what_beats_plain_svd():
    said = panels.better_than_plain
    assert said({"SVD": 5.0, "ASVD": 5.0, "SVD-LLM": 5.0}) == "neither"
    assert said({"SVD": 5.0, "ASVD": 5.0, "SVD-LLM": 4.0}) == "SVD-LLM alone"
    assert said({"SVD": 5.0, "ASVD": 4.0, "SVD-LLM": 6.0}) == "ASVD alone"
    assert said({"SVD": 5.0, "ASVD": 4.0, "SVD-LLM": 3.0}) == "both"
    shown = panels.two_inputs()
    assert said(shown.at(inputs="opposed").result["errors"]) in panels.BETTER
    assert "SVD-LLM: 4.5" in shown.at(inputs="opposed").text


# --- what is computed live ------------------------------------------------------------------------


@pytest.fixture
def made(tiny_llama, ids):
    return methods.Decompositions(tiny_llama(0), {8: ids[:1, :8], 40: ids})


def test_grams_are_sums_of_products(llama, ids):
    found = methods.grams(llama, ids)
    linears = {n for n, m in llama.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(found) == linears - {"lm_head"}
    seen = []
    layer = llama.get_submodule("model.layers.1.mlp.down_proj")
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        llama(ids)
    hook.remove()
    x = seen[0].flatten(0, 1).double()
    torch.testing.assert_close(found["model.layers.1.mlp.down_proj"], x.T @ x, rtol=1e-5, atol=1e-5)


def test_the_damage_is_known_before_it_is_done(llama, ids):
    found = methods.predicted_and_measured(
        llama, ids, "model.layers.1.self_attn.q_proj", (0.8, 0.4)
    )
    assert [kept for kept, _, _ in found] == [0.8, 0.4]
    assert 0 < found[0][1] < found[1][1] < 1
    for _, predicted, measured in found:
        assert measured == pytest.approx(predicted, rel=1e-3)


def test_no_method_keeps_outputs_nearer_than_svd_llm(made, ids):
    seen = methods.grams(made.model, ids)
    nearer = made.nearer(seen, 0.5)
    assert nearer["SVD-LLM"] == len(seen)
    assert set(nearer) == {"ASVD", "SVD-LLM"}
    assert nearer["ASVD"] <= len(seen)


def test_decompositions_are_made_once_for_each_text(made):
    assert made.of("SVD", 8) is made.of("SVD")
    assert made.of("SVD-LLM", 40) is made.of("SVD-LLM")
    assert made.of("SVD-LLM", 8) is not made.of("SVD-LLM")


@pytest.mark.parametrize(("layers", "part"), [("attention", "self_attn"), ("MLP", "mlp")])
def test_only_the_chosen_layers_are_factorized(made, layers, part):
    small = made.truncated("SVD", 0.4, layers)
    thin = [n for n, m in small.named_modules() if isinstance(m, low_rank.LowRankLinear)]
    assert thin
    assert all(f".{part}." in name for name in thin)


def test_shuffled_weights_are_the_same_numbers():
    weight = torch.arange(12.0).view(3, 4)
    found = drawings.shuffled(weight)
    assert found.shape == weight.shape
    assert not torch.equal(found, weight)
    assert torch.equal(found.flatten().sort().values, weight.flatten())


def test_random_numbers_have_no_small_half(made):
    noise = torch.linalg.svdvals(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    assert methods.smaller_half(torch.tensor([1.0, 1.0, 1.0, 1.0])) == pytest.approx(0.5)
    assert methods.smaller_half(torch.tensor([3.0, 0.0, 0.0, 0.0])) == 0
    assert 0.02 < methods.smaller_half(noise / noise[0]) < 0.3
    spectrum = made.spectrum("SVD-LLM", "model.layers.0.mlp.up_proj")
    assert spectrum[0] == 1
    assert bool((spectrum[1:] <= spectrum[:-1]).all())


@pytest.mark.parametrize("method", ["SVD-LLM", "ASVD", "SVD", "FWSVD", "LoSparse", "TensorGPT"])
def test_a_method_of_the_panel_reads_every_knob_that_it_takes(made, ids, method):
    """Knobs that it does not take are greyed, so those that it takes must change something."""
    function = methods.panel_methods(made)[method]
    knobs = list(inspect.signature(function).parameters)[1:]
    home = {"kept": 90, "layers": "all", "tokens": 40}
    other = {"kept": 40, "layers": "MLP", "tokens": 8}

    def logits(values):
        small = function(made.model, **{knob: values[knob] for knob in knobs})
        with torch.inference_mode():
            return small(ids).logits

    base = logits(home)
    assert ("tokens" in knobs) == (method in ("SVD-LLM", "ASVD", "FWSVD"))
    for knob in knobs:
        assert not torch.equal(logits({**home, knob: other[knob]}), base)


def test_the_panel_offers_all_methods(made):
    assert set(methods.panel_methods(made)) >= {*methods.METHODS, *methods.IDLE}


def test_a_train_keeps_to_its_budget():
    fold = low_rank.balanced_shape(256)
    for kept in (0.2, 0.4, 0.8):
        rank = methods.train_rank(256, kept)
        assert low_rank.train_size(fold, rank) <= kept * 256 or rank == 1
        assert low_rank.train_size(fold, rank + 1) > kept * 256
    assert methods.train_rank(256, 0.001) == 1


def test_times_are_ratios(made):
    name = "model.layers.0.mlp.up_proj"
    layer = made.model.get_submodule(name)
    found = methods.times_dense(layer, made.of("SVD")[name], (2, 8), tokens=4)
    assert list(found) == [2, 8]
    assert all(0 < ratio < 100 for ratio in found.values())


# --- tables and sentences -------------------------------------------------------------------------

NOISE = (0.004, -0.003, 0.001, -0.002, 0.002, -0.001, 0.003, -0.004)


def row(shift, noisy=1.0, **about):
    """A stored row whose windows lie `shift` above the original's, with a little noise."""
    windows = [4 + 0.1 * i + shift + noisy * n for i, n in enumerate(NOISE)]
    return about | {"windows": windows, "loss": sum(windows) / 8}


def compared(svd, asvd, llm):
    """Rows of the three methods at every part that is compared; one shift for each part."""
    rows = [row(0, method="original", kept=1.0)]
    for kept, *shifts in zip(tables.COMPARED, svd, asvd, llm):
        rows += [
            row(shift, noisy, method=method, kept=kept)
            for method, shift, noisy in zip(methods.METHODS, shifts, (1, 2, -1))
        ]
        rows.append(row(shifts[0], method="FWSVD", kept=kept))
    return rows


def test_methods_are_ranked_as_planted():
    rows = compared((0.1, 0.2, 0.4), (0.1, 0.1, 0.6), (0.05, 0.1, 0.2))
    said = tables.methods_said(rows)
    assert "SVD-LLM loses less than plain SVD at 80%, 60% and 40% kept" in said
    asvd = said.split("ASVD ")[1].split(" SVD-LLM")[0]
    assert "less than plain SVD at 60% kept" in asvd
    assert "cannot be told apart from it at 80%" in asvd
    assert "loses more at 40%" in asvd
    shown = tables.methods_table(rows)
    assert [line[-1] for line in shown.rows] == ["better"] * 3
    assert "+0.400" in shown.rows[2]
    cost = tables.cost_said(rows, [("SVD", 0.4)])
    assert "SVD with 40% kept is worse than the original (+0.4" in cost
    same = [row(0, method="original", kept=1.0), row(0, 2.0, method="SVD", kept=0.8)]
    assert "indistinguishable from the original" in tables.cost_said(same, [("SVD", 0.8)])


def test_factors_are_said_with_as_many_digits_as_are_read():
    assert tables.times(Change(0.0, -0.01, 0.01)) == "× 1 [0.99, 1.01]"
    assert tables.times(Change(math.log(61_628), 7.5, 20.0)).startswith("× 61,628 [1,808, 4.9e+08]")
    assert tables.times(Change(800.0, 0.0, 900.0)).endswith("e+304]")


def test_budgets_are_compared_as_planted():
    rows = [row(0, method="original", kept=1.0)]
    for kept in tables.COMPARED:
        rows.append(row(0.3, method=tables.SAME, kept=kept))
        rows.append(row(0.1, 2.0, method="by spectrum", kept=kept))
        rows.append(row(0.5, 2.0, method="by loss", kept=kept))
    said = tables.allocation_said(rows)
    spectrum, loss = said.split("Ranks by loss")
    assert spectrum.count("better at") == 3
    assert loss.count("worse at") == 3
    assert tables.allocation_table(rows).rows[1][1:] == ("+0.100",) * 3


def roads(costs):
    rows = [row(0, way="original", step="none")]
    for way in tables.ROADS:
        rows.append(row(costs.get(way, 0.1), 2.0, way=way, step="compressed", layer_bits=3.3))
    return rows


def test_roads_are_compared_and_their_costs_added():
    rows = roads({"GPTQ 3": 0.2, "rank 75%": 0.05, "GPTQ 4": 0.01, "rank 75% + 4 bits": 0.5})
    rows.append(row(0.04, 2.0, way="GPTQ 2", step="LoRA", layer_bits=2.7))
    said = tables.composed_said(rows)
    assert "prune half, round to 4 bits is better" in said
    assert "keep 75 %, round to 4 bits is worse (+0.300" in said
    assert "+0.06" in said.split("cost ")[1]
    shown = tables.composed_table(rows)
    assert shown.rows[-1][-1].endswith("at 2.70 bits")
    assert shown.rows[0][-1] == ""


def test_the_text_that_is_needed_is_told_as_planted():
    rows = [row(0, method="original", tokens=0), row(0.1, method="SVD", tokens=0)]
    for tokens, shift, own in ((64, 0.4, -0.02), (1024, 0.1, 0.03), (8192, 0.02, 0.02)):
        for method in ("ASVD", "SVD-LLM"):
            rows.append(
                row(shift, 2.0, method=method, tokens=tokens, seed=0, rise_on_calibration=own)
            )
    said = tables.text_said(rows)
    assert "worse with 64 tokens" in said
    assert "indistinguishable with 1,024 tokens" in said
    assert "better with 8,192 tokens" in said
    assert "−0.02 nats on its own text" in said
    assert tables.measured_tokens(rows) == [64, 1024, 8192]
    assert "0.400 at 64" in drawings.text_needed(rows).alt


def test_training_is_told_as_planted():
    rows = [row(0, method="original", share=1.0)]
    rows += [row(0.3, method="one shot", share=share) for share in (0.0, 0.5, 1.0)]
    rows += [row(0.2, 2.0, method="trained", share=share) for share in (0.0, 0.5, 1.0)]
    rows += [row(0.3, method="SVD-LLM", share=1.0), row(0.1, method="SVD-LLM, tuned", share=1.0)]
    data = {"steps": 30, "table": rows}
    said = tables.losparse_said(data)
    assert "equal within the interval to low rank alone" in said
    assert "better than SVD-LLM" in said
    shown = tables.losparse_table(data)
    assert shown.rows[-1] == ("SVD-LLM", "+0.300", "+0.100")
    assert "30 short steps" in shown.caption


def test_inputs_that_stand_out_are_told():
    said = tables.stands_out_said({"table": {"a": {"x": 2.0, "y": 4.0, "z": 100.0}}})
    assert said == (
        "In a the largest input of a layer is 4.0 times its middle one (median over layers), and "
        "100 times in the worst layer."
    )


def test_half_of_the_rank_saves_nothing_in_a_square_layer():
    shown = tables.break_even_table()
    assert shown.rows[0][1:] == ("256", "128.0", "100%", "45%")
    assert shown.rows[0][0].split() == ["256", "×", "256"]
    assert len(shown.rows) == len(tables.SHAPES)


STORED = {
    "methods": lambda d: tables.methods_table(d["table"]),
    "allocation": lambda d: tables.allocation_table(d["table"]),
    "composed": lambda d: tables.composed_table(d["table"]),
    "losparse": tables.losparse_table,
    "smollm2": lambda d: tables.smollm2_table(d["table"]),
    "speed": tables.speed_table,
}


@pytest.mark.parametrize("part", STORED)
def test_stored_results_fill_their_tables(part):
    shown = STORED[part](tables.stored(part).data)
    assert len(shown.rows) >= 3
    assert all(len(line) == len(shown.columns) for line in shown.rows)
    assert "nan" not in str(shown)


def test_stored_results_are_told():
    for said in (
        tables.methods_said(tables.stored("methods").data["table"]),
        tables.allocation_said(tables.stored("allocation").data["table"]),
        tables.composed_said(tables.stored("composed").data["table"]),
        tables.text_said(tables.stored("calibration").data["table"]),
        tables.losparse_said(tables.stored("losparse").data),
        tables.smollm2_said(tables.stored("smollm2").data["table"]),
        tables.stands_out_said(tables.stored("inputs").data),
    ):
        assert said.endswith(".")
        assert "nan" not in said


def test_a_missing_result_says_so():
    missing = results.NotMeasured("05_inference/2_low_rank/nothing")
    for shown in (
        drawings.result(missing["table"]),
        tables.methods_table(missing["table"]),
        tables.composed_said(missing["table"]),
        panels.smollm2(missing["table"]),
    ):
        assert "Not measured here" in str(shown)


# --- drawings and panels --------------------------------------------------------------------------


def test_pictures_say_their_numbers(made):
    rows = tables.stored("methods").data["table"]
    factor = math.exp(tables.rises(rows, "SVD", 0.2).mean)
    assert f"{factor:.2f} times at 20 per cent" in drawings.result(rows).alt
    assert drawings.composed(tables.stored("composed").data["table"]).alt.count("bits") == 9
    curves = tables.stored("latency").data["curves"]
    assert f"{curves[0]['times_dense'][0]:.2f} at 10%" in drawings.latency(curves).alt
    name = "model.layers.0.mlp.up_proj"
    half = methods.smaller_half(made.spectrum("SVD", name))
    assert f"up_proj {half:.0%}, " in drawings.spectra(made, {"up_proj": name}).alt


def smollm2_rows(**text):
    """Rows of a model that plain SVD ruins and SVD-LLM does not."""
    rows = [row(0, method="original", kept=1.0, **({"text": "Once"} if text else {}))]
    for kept in (0.9, 0.4):
        for method, shift in (("SVD", 9.0), ("ASVD", 2.0), ("SVD-LLM", 0.0)):
            more = {"text": text[method]} if method in text else {}
            rows.append(row(shift, 2.0, method=method, kept=kept, **more))
    return rows


def test_the_panel_of_smollm2_answers_as_stored():
    shown = panels.smollm2(smollm2_rows())
    broken, fine = (shown.at(kept=90, method=m) for m in ("SVD", "SVD-LLM"))
    assert "Against the original: worse" in broken.text
    assert "× 8,103 [" in broken.text and "8 windows" in broken.text
    assert "indistinguishable" in fine.text
    assert "writes" not in broken.text
    assert shown.predict.answer(broken.result) == "more than 1,000 times"
    assert shown.predict.answer(fine.result) == "less than 1.5 times"
    assert shown.frames == {"kept": (90, 40), "method": ("SVD", "SVD-LLM")}


def test_what_smollm2_writes_is_shown_where_it_is_stored():
    rows = smollm2_rows(**{"SVD": "of of of", "ASVD": "the", "SVD-LLM": "upon"})
    assert "Now: of of of" in panels.smollm2(rows).at(kept=90, method="SVD").text


@pytest.mark.parametrize(
    ("factor", "choice"),
    [(0.9, "less than 1.5"), (1.6, "1.5 to 10"), (10.1, "10 to 1,000"), (1e4, "more than 1,000")],
)
def test_a_factor_belongs_to_one_choice(factor, choice):
    assert panels.factor_choice(math.log(factor)) == f"{choice} times"
    assert panels.factor_choice(1000.0) == "more than 1,000 times"


@pytest.mark.full
def test_a_real_model_answers():
    assert re.fullmatch(
        r"The last six up_proj at 40% kept change SmolLM2's loss by [+−][\d.]+ nats with plain SVD "
        r"and [+−][\d.]+ nats with SVD-LLM\.",
        methods.smollm2_here(sequences=4),
    )
