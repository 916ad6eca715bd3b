"""The companion of the chapter on pruning: exercises, live methods, tables, drawings, panels."""

import inspect
import math
import re

import pytest
import torch

from effnb.chapters.inference.pruning import (
    drawings,
    exercises,
    methods,
    panels,
    tables,
    training,
)
from effnb.core.outliers import inject_outliers
from effnb.inference import pruning
from effnb.lab import load, results
from effnb.lab.changes import Change

EXERCISES = [exercises.storage, exercises.wanda, exercises.surgery, exercises.movement]


# --- exercises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


def test_references_agree_with_the_package():
    score = torch.rand(16, 32, generator=torch.Generator().manual_seed(0))
    mask = pruning.keep_mask(score, 0.75)
    stored = pruning.mask_storage(mask, bits=8)
    assert exercises.bytes_of(mask.numel(), int(mask.sum()), 8) == stored.bitmap_bytes
    weight, inputs = torch.randn(6, 12), torch.randn(40, 12)
    want = pruning.wanda_mask(weight, inputs.norm(dim=0), 0.25)
    assert torch.equal(exercises.mask_of(weight, inputs, 0.25).bool(), want)
    hessian = inputs.T @ inputs / 20
    operated = exercises.operate(weight[0], hessian, 4)
    left = pruning.obs_step(weight[:1], torch.linalg.inv(hessian)[None], torch.tensor([4]))[0]
    torch.testing.assert_close(operated, left[0], atol=1e-4, rtol=1e-4)


def test_scores_of_the_exercise_are_those_of_a_descent():
    """Plain descent on the package's masked layer moves its scores as the reference says."""
    layer = pruning.MovementLinear(torch.nn.Linear(3, 1, bias=False))
    weights, gradients = [], []
    for step in range(3):
        layer.zero_grad()
        (layer(torch.tensor([[1.0, -2.0, 0.5 + step]])) ** 2).sum().backward()
        weights.append(layer.weight.detach()[0].clone())
        gradients.append(layer.weight.grad[0].clone())  # nothing is masked: W' is W
        with torch.no_grad():
            layer.raw_scores -= 0.1 * layer.raw_scores.grad
            layer.weight -= 0.1 * layer.weight.grad
    found = exercises.scores_of(weights, gradients, 0.1)
    torch.testing.assert_close(found, layer.raw_scores.detach())


# --- what is measured live ------------------------------------------------------------------------

NAMES = list(methods.panel_methods(torch.zeros(2, 1, dtype=torch.long)))


@pytest.mark.parametrize("method", NAMES)
def test_a_method_of_the_panel_reads_every_knob_that_it_takes(tiny_llama, ids, method):
    """Knobs that it does not take are greyed, so those that it takes must change something."""
    model = tiny_llama(0, intermediate_size=64, num_hidden_layers=3, num_key_value_heads=4)
    function = methods.panel_methods(ids)[method]
    knobs = list(inspect.signature(function).parameters)[1:]
    assert ("sparsity" in knobs) == (method not in methods.IDLE)
    assert "outliers" in knobs
    share = {"sparsity": 40} if "sparsity" in knobs else {}
    small = function(model, **share, outliers=0)
    with torch.inference_mode():
        assert not torch.equal(methods.evaluated(small)(ids).logits, model(ids).logits)
    if "sparsity" in knobs:
        more = function(model, sparsity=70, outliers=0)
        assert methods.stored_bytes(more) < methods.stored_bytes(small)


def test_structures_are_removed_in_whole_pieces(tiny_llama, ids):
    model = tiny_llama(0, num_hidden_layers=4)
    scores = {"layers": torch.tensor([3.0, 1.0, 2.0, 4.0])}
    assert methods.remove_structures(model, scores, 0.3).config.num_hidden_layers == 3
    assert methods.remove_structures(model, scores, 0.99).config.num_hidden_layers == 1
    assert methods.remove_structures(model, scores, 0.1).config.num_hidden_layers == 4


def test_stored_bytes_count_what_is_kept(llama, ids):
    dense = methods.stored_bytes(llama)
    linear = sum(layer.weight.numel() for layer in pruning.masks.linears(llama).values())
    half = methods.stored_bytes(pruning.magnitude(llama, 0.5))
    assert dense - half == pytest.approx(2 * linear - (linear / 8 + linear), abs=64)
    two_four = methods.stored_bytes(pruning.magnitude(llama, pattern="2:4"))
    assert dense - two_four == pytest.approx(linear * 14 / 16, abs=64)
    packed = pruning.sparsegpt(llama, ids, 0.5, bits=4, group_size=8)
    assert methods.stored_bytes(packed) < half


def test_the_hessian_of_a_layer_is_that_of_its_inputs(llama, ids):
    name = "model.layers.0.self_attn.q_proj"
    seen = []
    hook = llama.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        llama(ids)
    hook.remove()
    x = seen[0].flatten(0, 1).double()
    torch.testing.assert_close(
        methods.hessian_of(llama, ids, name), 2 / len(x) * x.T @ x, atol=1e-4, rtol=1e-4
    )


def test_methods_are_ranked_on_a_layer_with_correlated_inputs():
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=draw, dtype=torch.float64)
    x = torch.randn(400, 16, generator=draw, dtype=torch.float64) @ mix
    weight = torch.randn(8, 16, generator=draw, dtype=torch.float64)
    found = methods.layer_errors(weight, 2 / 400 * x.T @ x)
    assert found["Optimal Brain Surgeon"] < found["Wanda"] < 1
    assert found["the best weights on its choice"] < found["SparseGPT"]
    delta = weight * pruning.keep_mask(weight.abs(), 0.5, "row") - weight
    energy = (x @ delta.T).square().sum() / (x @ weight.T).square().sum()
    assert found["magnitude"] == pytest.approx(float(energy))


def test_surgery_takes_as_many_products_more_as_there_are_weights_in_a_column():
    layer = torch.nn.Sequential(torch.nn.Linear(6, 4))
    assert methods.products(layer) == {"surgery": 12 * 36, "SparseGPT": 4 * 36 // 2}


def test_outliers_mislead_magnitude_and_not_wanda(tiny_llama, ids):
    model = tiny_llama(0, hidden_size=64)
    found = methods.outlier_masks(model, ids)
    before, after, same = found["magnitude"]
    assert after < 0.5 * before
    assert not same
    assert found["Wanda"][0] == found["Wanda"][1]
    assert found["Wanda"][2]


def test_enlarged_channels_leave_the_function_alone(llama, ids):
    assert methods.with_outliers(llama, 0) is llama
    with torch.inference_mode():
        changed = methods.with_outliers(llama, 8.0)(ids).logits
        torch.testing.assert_close(changed, llama(ids).logits, atol=1e-4, rtol=1e-4)


def test_movement_keeps_small_weights_and_magnitude_does_not():
    found = methods.learn(load("mini-300k", device="cpu"), "model.layers.1.mlp.up_proj", steps=10)
    kept = {way: float(mask.float().mean()) for way, mask in found.kept.items()}
    assert kept == pytest.approx({"magnitude": 0.5, "movement": 0.5}, abs=0.01)
    assert found.small_kept("magnitude") < 0.2 < found.small_kept("movement")


def test_german_comes_in_the_same_pieces_every_time():
    batches = methods.german_batches(load("mini-300k", device="cpu"), tokens=2_000)
    assert batches(3).shape == (8, 64)
    assert torch.equal(batches(3), batches(3))
    assert not torch.equal(batches(3), batches(4))


def test_whole_rows_and_columns_are_told_from_single_weights(llama):
    assert methods.whole_share(pruning.magnitude(llama, 0.5)) < 0.2
    weights = {name: torch.ones_like(m) for name, m in pruning.masks_of(llama).items()}
    for mask in weights.values():
        mask[0], mask[:, 1] = False, False
    assert methods.whole_share(pruning.apply_masks(llama, weights)) == 1


def test_products_are_timed_beside_the_dense_one():
    shown = methods.product_times(rounds=1, runs=1)
    assert shown.rows[0] == ("dense", "1.00")
    assert len(shown.rows) == 5


@pytest.mark.full
def test_the_real_model_answers():
    assert re.fullmatch(
        r"The original has perplexity .* Without 3 blocks SmolLM2 has perplexity .* s\.",
        methods.shorter_here(),
    )


# --- tables and sentences -------------------------------------------------------------------------


def made(shift, method, setting=None, **more):
    """A stored row whose windows lie `shift` above the original's, with a little noise."""
    noise = [0.004, -0.003, 0.001, -0.002, 0.002, -0.001, 0.003, -0.004]
    windows = [4 + 0.1 * i + shift * (1 + n) for i, n in enumerate(noise)]
    row = {"method": method, "windows": windows, "loss": sum(windows) / 8, "seed": 0}
    if isinstance(setting, str):
        row |= {"pattern": setting}
    elif setting is not None:
        row |= {"sparsity": setting, "pattern": tables.SCOPES.get(method)}
    return row | more


PLANTED = [
    made(0, "original"),
    made(0.5, "magnitude", 0.5),
    made(0.2, "Wanda", 0.5),
    made(0.2, "SparseGPT", 0.5),
    made(0.9, "magnitude", 0.7),
    made(0.9, "Wanda", 0.7),
    made(1.2, "SparseGPT", 0.7),
    made(0.6, "magnitude", "2:4"),
    made(0.7, "Wanda", "2:4", seed=0),
    made(0.5, "Wanda", "2:4", seed=1),
    made(7, "Wanda", 0.5, pattern="layer"),  # another scope, which is not compared
]


def test_methods_are_ranked_as_planted():
    said = tables.methods_said("a model", PLANTED)
    assert said == (
        "a model. Wanda loses less than magnitude at 50 %; it cannot be told apart from magnitude "
        "at 70 % and 2:4. SparseGPT loses less than magnitude at 50 %; it loses more than "
        "magnitude at 70 %."
    )
    shown = tables.methods_table("a model", PLANTED)
    assert [row[0] for row in shown.rows] == ["50 %", "70 %", "2:4"]
    assert [row[-1] for row in shown.rows] == ["better", "worse", "not measured"]
    cost = tables.harm_said("a model", PLANTED, [("magnitude", 0.5), ("SparseGPT", "1:4")])
    assert cost.startswith("a model. 50 % removed by magnitude: worse than the original (+0.500 [")
    assert "SparseGPT" not in cost


def test_a_real_models_rows_are_found_by_their_amount():
    rows = [made(0, "original"), made(0.5, "Wanda", amount=0.5), made(0.4, "Wanda", amount="2:4")]
    assert tables.measured_settings(rows, "Wanda") == [0.5, "2:4"]
    assert tables.rise(rows, "Wanda", "2:4").mean == pytest.approx(0.4, abs=0.01)
    assert tables.rise(rows, "SparseGPT", 0.5) is None


def test_outliers_are_judged_window_by_window():
    rows = [made(0, "original")]
    for method, shift in (("magnitude", 0.3), ("Wanda", 0.0), ("SparseGPT", -0.05)):
        for share in (0.5, 0.6):
            for injected in tables.INJECTED:
                more = 0 if injected == "none" else shift
                rows.append(made(0.1 + more, method, share, injected=injected))
    said = tables.outliers_said(rows)
    assert "magnitude is worse (+0.300" in said
    assert "Wanda is indistinguishable (+0.000" in said
    assert "SparseGPT is better" in said
    assert tables.outliers_table(rows).rows[0][1:4] == ("+0.100", "+0.400", "+0.400")


def test_kinds_of_structures_are_ranked_by_what_they_weigh():
    planted = {"LLM-Pruner": 0.01, "heads": 0.3, "channels": 0.2, "ShortGPT": 0.1}
    rows = [made(0, "original"), made(0.8, "random", amount=0.2, removed=0.2)]
    rows += [made(planted[m], m, amount=a, removed=0.1) for m, a in tables.KINDS.values()]
    rows += [made(0.4, "LLM-Pruner", amount=0.2, removed=0.2)]
    said = tables.structures_said(rows)
    order = [
        said.index(kind)
        for kind in ("heads 0.03", "channels 0.02", "whole blocks 0.01", "neurons 0.00")
    ]
    assert order == sorted(order)
    assert "LLM-Pruner's heads and neurons are better than random ones (−0.400" in said
    shown = tables.structures_table(rows)
    assert [row[1] for row in shown.rows] == ["10%"] * 4 + ["20%"] * 2


def test_blocks_are_ranked_by_influence_and_by_loss():
    row = {"model": "m", "influence": [9, 1, 2, 3, 8], "without": [9.0, 1.5, 2.5, 8.0, 1.0]}
    (said,) = tables.depth_said([row]).splitlines()
    assert "influence would drop blocks 1, 2 and 3" in said
    assert "alone would drop 1, 2 and 4" in said
    assert "rank correlation 0.40" in said


def test_seeds_of_domains_are_averaged():
    base = {"novel": [4.0, 4.0], "Bible": [2.0, 2.0], "packages": [5.0, 5.0]}
    rows = [{"method": "original", "sparsity": 0.0, "seed": 0, "domains": base}]
    for seed, extra in enumerate((0.1, 0.3)):
        more = {d: [x + extra * (2 if d == "novel" else 1) for x in w] for d, w in base.items()}
        rows.append({"method": "Wanda", "sparsity": 0.7, "seed": seed, "domains": more})
    found = tables.by_domain(rows)
    assert found["Wanda, 70 %"]["novel"] == pytest.approx([4.4, 4.4])
    assert tables.domains_said(rows) == (
        "Wanda, 70 %: most nats are lost on novel (+0.400), most per cent on novel (+10.0)."
    )


def test_speed_is_told_for_zeros_and_for_smaller_models():
    names = ("dense", "magnitude, 50 %", "magnitude, 2:4", "20 % of layers")
    rows = [
        {"name": n, "prefill_times_dense": 1 + i / 10, "decode_times_dense": 1 - i / 10}
        for i, n in enumerate(names)
    ]
    said = tables.speed_said(rows)
    assert "With zeros SmolLM2 runs 0.80 to 1.20 times" in said
    assert "fewer blocks, 0.70 to 1.30 times" in said


def seeds(method, losses, **more):
    return [{"method": method, "seed": s, "loss": x, **more} for s, x in enumerate(losses)]


def test_movement_is_judged_seed_by_seed():
    rows = seeds("original", [7.0]) + seeds("dense", [4.0, 4.1, 4.2])
    for sparsity, moved in ((0.5, [4.3, 4.31, 4.33]), (0.9, [4.2, 5.0, 4.6])):
        rows += seeds("magnitude at once", [4.6, 4.61, 4.62], sparsity=sparsity)
        rows += seeds("magnitude, gradual", [4.2, 4.21, 4.22], sparsity=sparsity)
        rows += seeds("movement, hard", moved, sparsity=sparsity)
    rows += seeds("movement, soft", [4.4, 4.5, 4.6], penalty=10.0, reached=0.4)
    said = training.training_said(rows)
    assert "At 50% removed, movement is better than magnitude at once (−0.297" in said
    assert "worse than magnitude, gradual (+0.103" in said
    assert "At 90% removed, movement is indistinguishable from magnitude at once" in said
    shown = training.training_table(rows)
    assert shown.rows[-1] == ("movement, soft, λ = 10", "40%", f"{math.exp(4.5):.1f}")


def test_healing_is_told_with_its_controls():
    rows = seeds("original", [4.0])
    rows += seeds("nothing pruned", [4.1, 4.11, 4.12])
    rows += seeds("SparseGPT", [4.2, 4.21, 4.22], sparsity=0.7, pattern="layer", before=4.4)
    cut = seeds("nothing pruned", [4.0, 4.01, 3.99], amount=0)
    for amount in (0.2, 0.5):
        cut += seeds("LLM-Pruner", [4.3, 4.31, 4.33], amount=amount, before=4.6)
        cut += seeds("LoRAPrune", [4.4, 4.41, 4.42], amount=amount)
    shown = training.healing_table(rows, cut)
    assert [row[:4] for row in shown.rows] == [
        ("SparseGPT, 70 %", "all, mask held", "+0.400", "+0.210"),
        ("LLM-Pruner, a fifth", "a LoRA", "+0.600", "+0.313"),
        ("LLM-Pruner, half", "a LoRA", "+0.600", "+0.313"),
    ]
    said = training.healing_said(rows, cut)
    assert "changes by +0.110" in said
    assert said.count("LoRAPrune is worse than LLM-Pruner") == 2


def test_tickets_are_compared_with_controls_of_their_size():
    rows = []
    for seed, extra in enumerate((0.0, 0.1, 0.3)):
        about = {"seed": seed, "sparsities": [0.0, 0.5, 0.875]}
        own = [5.9 + extra, 5.8 + extra, 5.6 + extra]
        rows.append(about | {"method": "ticket, rewound to step 15", "losses": own})
        controls = {"re-drawn": [5.8 + 1.01 * extra], "random mask": [5.6 + extra]}
        rows.append(
            about
            | {"method": "ticket, rewound to step 0", "losses": own, "control_sparsities": [0.875]}
            | controls
        )
    said = training.tickets_said(rows)
    assert "With 12.5 % of the weights left, tickets are better than other starting weights" in said
    assert "indistinguishable from random masks" in said
    shown = training.tickets_table(rows)
    assert shown.columns == ("network", "100 %", "50 %", "12.5 %")
    assert shown.rows[2][1:3] == ("not measured", "not measured")


STORED = {
    "structured": lambda rows: tables.structures_table(rows),
    "smollm2": lambda rows: tables.real_table(rows),
    "outliers": lambda rows: tables.outliers_table(rows),
    "domains": lambda rows: tables.domains_table(rows),
    "speed": lambda rows: tables.speed_table(rows),
    "training": lambda rows: training.training_table(rows),
    "lottery": lambda rows: training.tickets_table(rows),
}


def rows_of(part):
    return tables.stored(part).data["table"]


@pytest.mark.parametrize("part", STORED)
def test_stored_results_fill_their_tables(part):
    shown = STORED[part](rows_of(part))
    assert len(shown.rows) >= 3
    assert all(len(row) == len(shown.columns) for row in shown.rows)
    assert "nan" not in str(shown)


def test_stored_results_are_told():
    mini = [*rows_of("methods"), *rows_of("patterns")]
    assert len(tables.methods_table("mini-5m", mini).rows) == len(tables.SETTINGS)
    for said in (
        tables.methods_said("mini-5m", mini),
        tables.methods_said("SmolLM2-135M", rows_of("smollm2")),
    ):
        assert re.search(r"Wanda .* magnitude at .* SparseGPT .* magnitude at", said)
    assert "at 3 bits with nothing removed" in tables.rounded_said(rows_of("patterns"))
    assert tables.allocation_said(rows_of("allocation")).count("every layer (") == 3
    assert tables.depth_said(rows_of("depth")).count("rank correlation") == 2
    assert "with its" in training.healing_table(rows_of("recovery"), rows_of("healing")).caption


def test_a_missing_result_says_so():
    missing = results.NotMeasured("05_inference/1_pruning/nothing")["table"]
    for shown in (
        tables.methods_table("mini-5m", missing),
        tables.speed_said(missing),
        training.healing_said(missing, missing),
        drawings.result(missing, missing),
        panels.methods(missing, PLANTED),
    ):
        assert "Not measured here" in str(shown)


# --- drawings and panels --------------------------------------------------------------------------


def test_stricter_patterns_keep_less_of_the_score():
    score = torch.randn(8, 16, generator=torch.Generator().manual_seed(3)).abs()
    kinds = drawings.patterns(score)
    assert all(int(mask.sum()) == 64 for mask in kinds.values())
    kept = [float(score[mask].sum()) for mask in kinds.values()]
    assert kept == sorted(kept, reverse=True)
    rows = kinds["whole rows"].float().mean(1)
    assert set(rows.tolist()) == {0.0, 1.0}
    assert f"layer {kept[0] / float(score.sum()):.0%}" in drawings.masks(score, kinds).alt


def test_pictures_say_their_numbers():
    shown = drawings.result(rows_of("methods"), rows_of("speed"))
    losses = tables.losses(rows_of("methods"), "SparseGPT", 0.8)
    assert f"SparseGPT {math.exp(sum(losses) / len(losses)):.0f}" in shown.alt
    assert all(name in shown.alt for name in drawings.TIMED.values())
    before = torch.tensor([0.1, -0.2, 1.0, -2.0])
    kept = {"magnitude": before.abs() > 0.5, "movement": torch.tensor([True, False, True, False])}
    alt = drawings.learned(methods.Learned(before, kept)).alt
    assert "magnitude keeps 0%" in alt
    assert "movement keeps 100%" in alt


def test_the_first_panel_answers_as_stored():
    shown = panels.methods(PLANTED_REAL, PLANTED)
    at = shown.at(removed="50 %", model="mini-5m")
    assert re.search(r"magnitude: × 1\.649, worse \(95 % interval × 1\.64\d to 1\.65\d\)", at.text)
    assert "SparseGPT: not measured" in shown.at(removed="50 %", model="SmolLM2-135M").text
    asked = shown.at(removed="50 %", model="SmolLM2-135M").result
    assert shown.predict.answer(asked) == round(math.exp(asked["magnitude"].mean), 1)
    assert shown.knobs["removed"].values == ("50 %", "2:4")


PLANTED_REAL = [
    made(0, "original"),
    made(2, "magnitude", amount=0.5),
    made(3, "magnitude", amount="2:4"),
    made(0.5, "Wanda", amount=0.5),
]


def test_a_huge_rise_is_still_a_factor():
    assert panels.ratio(1e6) == math.exp(50)
    assert panels.factor(1.0049) == "1.005"
    assert panels.factor(12.34) == "12.3"


def test_the_panel_of_storage_counts_by_the_formulas():
    n = panels.SIZE**2
    for bits in (16, 8, 4):
        at = panels.stored(50, bits).times_dense
        assert at["bitmap"] == pytest.approx((n + n / 2 * bits) / (n * bits))
        assert at["2:4"] == pytest.approx((bits + 2) / (2 * bits))
        starts = 32 * (panels.SIZE + 1)
        assert at["CSR"] == pytest.approx((n / 2 * (bits + 16) + starts) / (n * bits))
    assert "2:4" not in panels.stored(40, 16).times_dense
    shown = panels.storage()
    assert "Smallest: dense" in shown.at(sparsity=0, bits=16).text
    assert shown.predict.answer(panels.stored(50, 16)) == panels.which(panels.saves_from("CSR", 16))


def test_a_change_that_is_not_decided_is_said_to_be_so():
    open_ = Change(0.1, -0.1, 0.3)
    said = tables.than(open_, "the original")
    assert said == "indistinguishable from the original (+0.100 [−0.100, +0.300] nats)"


def test_injection_is_that_of_the_core(llama, ids):
    mine = methods.with_outliers(llama, 4.0)
    core = inject_outliers(llama, range(0, llama.config.hidden_size, 16), 4.0)
    with torch.inference_mode():
        assert torch.equal(mine(ids).logits, core(ids).logits)
