"""The companion of the chapter on quantization: exercises, live methods, tables, drawings."""

import inspect
import math
import re

import pytest
import torch

from effnb.chapters.inference.quantization import drawings, exercises, methods, panels, tables
from effnb.core.outliers import inject_outliers
from effnb.inference import quantization
from effnb.lab import load, results

EXERCISES = [
    exercises.cost,
    exercises.smooth,
    exercises.straight_through,
    exercises.step,
]


# --- exercises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


def test_references_agree_with_the_package():
    matrix = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    for bits, group, symmetric in ((4, 64, False), (3, 32, True)):
        held = quantization.quantize(matrix, bits, group_size=group, symmetric=symmetric)
        assert exercises.bits_of(bits, group, symmetric) == held.bits_per_weight
    x, w = torch.randn(5, 7), torch.randn(3, 7)
    scales = quantization.smooth_scales(x.abs().amax(0), [w], 0.3)
    torch.testing.assert_close(exercises.scales_of(x, w, 0.3), scales)
    x = torch.linspace(-3, 3, 41).requires_grad_()
    quantization.quantize_ste(x, torch.tensor(0.4), 0, -4, 3).sum().backward()
    mine = exercises.pass_back(x.detach(), 0.4, -4, 3, torch.ones(41))
    torch.testing.assert_close(mine, x.grad)


def test_steps_of_the_exercise_are_gptq():
    """Rounding column by column with `hand_on` gives the package's codes."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 60, generator=draw, dtype=torch.float64)
    inputs[1] += inputs[0]
    hessian = inputs @ inputs.T / 30
    weight = torch.randn(4, 6, generator=draw, dtype=torch.float64)
    found = quantization.gptq_columns(
        weight, quantization.invert_hessian(hessian), quantization.Grid(3)
    ).tensor
    upper = quantization.invert_hessian(hessian).upper
    w, want = weight.clone(), found.dequantize(torch.float64)
    for i in range(6):
        w = exercises.hand_on(w, upper, i, want[:, i])
    errors = [(w[:, i] - want[:, i]) / upper[i, i] for i in range(6)]
    delta = want - weight
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    total = sum(float(e.square().sum()) for e in errors)
    assert total == pytest.approx(methods.output_error(delta, damped))


# --- what is measured live ------------------------------------------------------------------------


@pytest.mark.parametrize("method", methods.panel_methods(torch.zeros(1, 1, dtype=torch.long)))
def test_a_method_of_the_panel_reads_every_knob_that_it_takes(tiny_llama, ids, method):
    """Knobs that it does not take are greyed, so those that it takes must change something."""
    model = tiny_llama(0, intermediate_size=128)
    function = methods.panel_methods(ids)[method]
    knobs = list(inspect.signature(function).parameters)[1:]
    home = {"bits": 3, "group": "64", "outliers": 0}
    other = {"bits": 4, "group": "row", "outliers": 30}

    def logits(values):
        made = function(model, **{knob: values[knob] for knob in knobs})
        with torch.inference_mode():
            return methods.evaluated(made)(ids).logits

    base = logits(home)
    assert ("outliers" in knobs) != (method in methods.IDLE)
    for knob in knobs:
        assert not torch.equal(logits({**home, knob: other[knob]}), base)


def test_a_rotation_undoes_injected_outliers(llama, ids):
    """So the panel greys the knob there: the gains are folded into the weights first."""
    few = inject_outliers(llama, [3, 17], 30.0)
    with torch.inference_mode():
        found = [quantization.rtn(quantization.rotate(m), 3)(ids).logits for m in (few, llama)]
    torch.testing.assert_close(found[0], found[1])


def test_packed_weights_are_read_back_to_evaluate(llama, ids):
    packed = quantization.rtn(llama, 3)
    with torch.inference_mode():
        torch.testing.assert_close(methods.evaluated(packed)(ids).logits, packed(ids).logits)
    assert methods.evaluated(llama) is llama
    for bits in (8, 4):  # inputs too; a number between two codes may take either
        inputs = quantization.quantize_activations(llama, bits, bits)
        with torch.inference_mode():
            found, exact, plain = (
                m(ids).logits for m in (methods.evaluated(inputs), inputs, llama)
            )
        assert (found - exact).norm() < 0.1 * (exact - plain).norm()


def test_errors_layer_by_layer(llama, ids):
    seen = methods.hessians(llama, ids)
    linears = {n for n, m in llama.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(seen) == linears - {"lm_head"}
    found = methods.error_ratios(llama, seen, bits=3)
    assert all(weights > 1 and outputs < 1 for _, weights, outputs in found)
    apart = {name: torch.diag(h.diagonal()) for name, h in seen.items()}
    for _, weights, outputs in methods.error_ratios(llama, apart, bits=3):
        assert weights == pytest.approx(1)
        assert outputs == pytest.approx(1)


def test_the_output_error_is_twice_the_mean_squared_change():
    delta, x = torch.randn(3, 5).double(), torch.randn(5, 40).double()
    error = methods.output_error(delta, 2 / 40 * x @ x.T)
    assert error == pytest.approx(float(2 * (delta @ x).square().sum(0).mean()))


def test_smoothing_helps_in_the_middle_only():
    off, none, half, full = (methods.smoothed_product(a) for a in (None, 0.0, 0.5, 1.0))
    assert half.error < 0.3 * min(off.error, none.error, full.error)
    spread = [float(one.inputs.max() / one.inputs.median()) for one in (off, none, half, full)]
    assert spread[0] > 20
    assert spread[1] > 20
    assert spread[3] == pytest.approx(1, rel=1e-4)
    assert float(full.weights.max() / full.weights.median()) > 20


# --- tables and sentences -------------------------------------------------------------------------


def made(shift, method, bits, group="64", **more):
    """A stored row whose windows lie `shift` above the original's, with a little noise."""
    noise = [0.004, -0.003, 0.001, -0.002, 0.002, -0.001, 0.003, -0.004]
    windows = [4 + 0.1 * i + shift * (1 + n) for i, n in enumerate(noise)]
    about = {
        "method": method,
        "bits": bits,
        "group_size": group,
        "seed": 0,
        "layer_bits": bits + 0.3,
    }
    return about | {"windows": windows, "loss": sum(windows) / 8} | more


PLANTED = [
    made(0, "original", 32, "none"),
    made(0.5, "RTN", 2),
    made(0.2, "GPTQ", 2),
    made(0.01, "RTN", 3),
    made(0.3, "GPTQ", 3, seed=0),
    made(-0.28, "GPTQ", 3, seed=1),
    made(0.001, "RTN", 4),
    made(0.05, "GPTQ", 4),
]


def test_methods_are_ranked_as_planted():
    said = tables.methods_said("a model", PLANTED)
    assert "loses less than rounding to nearest at 2 bits, groups of 64 (−0.300 nats)" in said
    assert "cannot be told apart at 3 bits" in said
    assert "loses more at 4 bits, groups of 64 (+0.049 nats)" in said
    shown = tables.methods_table("a model", PLANTED)
    assert [row[-1] for row in shown.rows] == ["worse", "indistinguishable", "better"]
    cost = tables.cost_said("a model", PLANTED, [(2, "64")])
    assert "2 bits, groups of 64: worse than the original (+0.500" in cost


def trained(shifts, method, bits, stage, trainable=0):
    return [
        {"method": method, "bits": bits, "seed": seed, "loss": 4 + shift, "stage": stage,
         "trainable": trainable}
        for seed, shift in enumerate(shifts)
    ]  # fmt: skip


def test_training_is_judged_seed_by_seed():
    rows = [{"method": "original", "bits": 32, "seed": 0, "loss": 4.0, "stage": "none"}]
    for bits in (3, 2):
        rows += trained([0.30, 0.31, 0.32], "RTN", bits, "after training")
        rows += trained([0.20, 0.21, 0.22], "GPTQ", bits, "after training")
        rows += trained([0.10, 0.11, 0.121], "LoRA on GPTQ", bits, "while fine-tuning", 8)
        rows += trained([0.30, 0.31, 0.321], "PEQA on GPTQ", bits, "while fine-tuning", 4)
        rows += trained([0.20, 0.41, 0.32], "QAT", bits, "in training", 100)
        rows += trained([0.50, 0.51, 0.521], "QAT, LSQ", bits, "in training", 108)
    control = [{"method": "original", "loss": 4.0}]
    control += [
        {"method": m, "loss": 4.0 + x} for m in ("all weights", "LoRA") for x in (0.1, 0.11)
    ]
    said = tables.training_said(rows, control)
    assert "At 2 bits LoRA on GPTQ improved on the rounding" in said
    assert "QAT made no difference that these seeds show" in said
    assert "PEQA on GPTQ and QAT, LSQ ended behind the rounding" in said
    shown = tables.training_table(rows)
    assert shown.rows[2][:3] == ("LoRA on GPTQ", "while fine-tuning", "8")
    assert "3 seeds" in shown.caption


def test_domains_are_ranked_in_nats_and_in_per_cent():
    base = {"novel": [4.0, 4.1], "Bible": [2.0, 2.1], "packages": [5.0, 5.2]}
    rounded = {"novel": [4.10, 4.21], "Bible": [2.08, 2.18], "packages": [5.0, 5.21]}
    said = tables.domains_said({"original": base, "RTN, 2 bits": rounded, "GPTQ, 2 bits": base})
    assert said.startswith("RTN, 2 bits: novel loses most in nats (+0.105) but in per cent Bible")
    assert "GPTQ" not in said


def test_the_encoder_is_judged_query_by_query():
    def row(method, bits, group, found):
        ranks = [1] * found + [2] * (100 - found)
        return {"method": method, "bits": bits, "group_size": group, "seed": 0, "ranks": ranks}

    rows = [row("original", 32, "none", 80)]
    for group in ("row", "64"):
        rows += [row("RTN", 8, group, 80), row("GPTQ", 8, group, 80)]
        rows += [row("RTN", 2, group, 9), row("GPTQ", 2, group, 36)]
    assert tables.minilm_bits(rows) == [8, 2]
    said = tables.minilm_said(rows)
    assert "with one scale per row, MiniLM loses measurably below 8 bits" in said
    assert "At 2 bits GPTQ is better: +27 points" in said
    assert tables.minilm_table(rows).rows[0] == ("RTN, per row", "80.0%", "9.0%")


STORED = {
    "methods": lambda d: tables.methods_table("mini-5m", d["table"]),
    "smollm2": lambda d: tables.methods_table("SmolLM2-135M", d["table"]),
    "training": lambda d: tables.training_table(d["table"]),
    "domains": lambda d: tables.domains_table(d["table"]),
    "cache": lambda d: tables.cache_table(d["table"]),
    "minilm": lambda d: tables.minilm_table(d["table"]),
    "speed": tables.speed_table,
}


def test_decoding_beside_llama_cpp_is_told():
    """Medians as ratios, both goals, and a sentence in their place before they are measured."""
    ways = [
        "llama.cpp",
        "modules",
        "step in PyTorch",
        "compiled step",
        "compiled step, by generate",
    ]
    speeds = {"1": (50, 25, 40, 75, 60), "2": (80, 30, 60, 88, 70)}
    found = {
        "tokens_per_second": {
            threads: {way: [0.9 * speed, speed, 1.2 * speed] for way, speed in zip(ways, of_ways)}
            for threads, of_ways in speeds.items()
        },
        "bytes_per_token": dict.fromkeys(ways[:4], 1e8),
        "bandwidth": {"1": 1e10, "2": 1.5e10},
        "loss": {way: [math.log(8), math.log(2)] for way in ways[:4]},
        "profile": {
            "1": {
                "products": 8000.0,
                "attention": 500.0,
                "head": 4500.0,
                "rest": 200.0,
                "Python around it": 150.0,
            },
            "2": {},
        },
    }
    said = tables.decoding_said(found)
    assert "products 8.00, attention 0.50, head 4.50, rest 0.20, Python around it 0.15." in said
    assert "at 8.0 GB/s, 80% of what one thread reads" in said
    assert "GB/s" not in tables.decoding_said(found | {"profile": {"1": {}, "2": {}}})
    assert "1.50 on 1 (goal 1.0: reached), 1.10 on 2 (goal 1.2: missed)" in said
    assert "40.0 ms through the modules, 25.0 ms by the step in PyTorch, 13.3 ms compiled" in said
    shown = tables.decoding_table(found)
    assert shown.rows[3] == ("compiled step", "1.50", "1.10", "100", "75%", "4.00")
    assert shown.rows[4][:3] == ("compiled step, by generate", "1.20", "0.88")
    missing = results.NotMeasured("05_inference/3_quantization/decoding")
    assert tables.decoding_said(missing) is missing
    assert tables.decoding_table(missing) is missing


@pytest.mark.parametrize("part", STORED)
def test_stored_results_fill_their_tables(part):
    shown = STORED[part](tables.stored(part).data)
    assert len(shown.rows) >= 3
    assert all(len(row) == len(shown.columns) for row in shown.rows)
    assert "nan" not in str(shown)


def test_stored_outliers_fill_their_tables():
    rows = tables.stored("outliers").data["table"]
    assert "LLM.int8()" in str(tables.inputs_table(rows))
    assert [row[0] for row in tables.weights_table(rows).rows] == ["RTN", "AWQ", "GPTQ"]
    assert "SmoothQuant is" in tables.outliers_said(rows)


def test_stored_allocations_are_told():
    mixed = tables.stored("mixed").data
    said = tables.mixed_said(mixed)
    assert said.count("[") == 3
    assert f"{mixed['additivity']['uniform 2 bits']['together']:.3f}" in said


def test_an_allocation_keeps_to_its_budget():
    mixed, model = tables.stored("mixed").data, load("mini-5m", device="cpu").model
    shown = tables.allocation_table(mixed, model)
    assert {row[0] for row in shown.rows} >= {"q_proj", "down_proj"}
    bits = [int(cell) for row in shown.rows for cell in row[1:]]
    assert set(bits) <= set(mixed["choices"])
    assert len(bits) == len(mixed["sensitivity"])


def test_a_missing_result_says_so():
    missing = results.NotMeasured("05_inference/3_quantization/nothing")
    for shown in (
        tables.methods_table("mini-5m", missing["table"]),
        tables.training_said(missing, missing),
        drawings.result(missing["table"], missing["table"]),
        panels.retrieval(missing),
    ):
        assert "Not measured here" in str(shown)


def test_training_is_told_from_what_is_stored():
    rows, control = (tables.stored(part).data["table"] for part in ("training", "control"))
    said = tables.training_said(rows, control)
    assert re.search(r"At 2 bits .*At 3 bits .*all weights of the unrounded model", said)


# --- drawings and panels --------------------------------------------------------------------------


def test_the_points_of_a_grid_are_where_its_weights_are_rounded_to():
    w = torch.tensor([[0.11, -0.23, 0.31, -0.05, 0.18, -0.27, 0.09, 1.90]])
    for group in ("row", 4):
        for symmetric in (True, False):
            small = quantization.quantize(w, 4, group_size=group, symmetric=symmetric)
            points = drawings.grid_points(small)
            assert len(points) == (1 if group == "row" else 2)
            assert all(len(grid) == (15 if symmetric else 16) for grid in points)
            for i, value in enumerate(small.dequantize()[0].tolist()):
                grid = points[0 if group == "row" else i // 4]
                assert min(abs(value - point) for point in grid) < 1e-6


def test_pictures_say_their_numbers():
    table = tables.stored("methods").data["table"]
    shown = drawings.result(table, tables.stored("minilm").data["table"])
    base = drawings.math.exp(tables.pick(table, method="original")[0]["loss"])
    assert f"{base:.1f}" in shown.alt
    assert shown.alt.count("GPTQ, per row") == 2
    assert "1.50" in drawings.moved([("a", 2.0, 0.25), ("b", 1.0, 0.75)]).alt
    assert (
        "40 against a median of 1.0"
        in drawings.smoothed(torch.tensor([1.0, 1.0, 40.0]), torch.tensor([1.0, 2.0, 2.0])).alt
    )
    assert "-2.4 to 1.8" in drawings.straight_through().alt
    mixed = tables.stored("mixed").data["table"]
    assert drawings.mixed(mixed).alt.count("bits") >= len(drawings.BY)


def test_the_panel_of_search_answers_as_stored():
    data = tables.stored("minilm").data
    shown = panels.retrieval(data)
    position = shown.at(bits=2, method="RTN", scales="per row")
    row = tables.pick(data["table"], method="RTN", bits=2, group_size="row")[0]
    assert f"Found first: {row['recall_at_1']:.1%}" in position.text
    assert "worse" in position.text
    assert position.text.count("“") == len(data["shown"])


def test_the_panel_of_smoothing_shows_its_middle():
    shown = panels.smoothing()
    errors = {
        alpha: float(re.search(r"product: (\S+)", shown.at(alpha=alpha).text)[1])
        for alpha in shown.knobs["alpha"].values
    }
    assert min(errors, key=errors.get) == "0.5"


@pytest.mark.full
def test_real_models_answer():
    assert re.fullmatch(
        r"The original finds \d+% of 20 .* rounded to 2 bits, per row, it finds \d+%\.",
        methods.search_with(2, "row", queries=20),
    )
    assert re.search(r"int4 decodes \d\.\d\d times", methods.speed_here(tokens=4))


def test_results_are_of_this_chapter():
    assert isinstance(tables.stored("methods"), results.StoredResult)
