"""The companion of the chapter on sharing: exercises, live methods, tables, drawings, panels."""

import pytest
import torch

from effnb.chapters.design.sharing import drawings, exercises, methods, panels, tables
from effnb.design import sharing
from effnb.evaluation.cost import flops
from effnb.lab import load, results

EXERCISES = [exercises.size, exercises.halting, exercises.cross]


# --- exercises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


def test_references_agree_with_the_package():
    for V, d, kept in ((4096, 64, 0.5), (30_000, 768, 0.25)):
        E = exercises.largest_e(V, d, kept)
        assert sharing.factorized_parameters(V, E, d) <= kept * V * d
        assert sharing.factorized_parameters(V, E + 1, d) > kept * V * d
    p = torch.tensor([0.3, 0.3, 0.5, 0.2])
    calls = iter(p.tolist())
    found = sharing.adaptive_computation_time(
        torch.zeros(1, 1, 1), lambda x, s: x, lambda x: torch.full((1, 1), next(calls)), max_steps=4
    )
    weights = exercises.halting_weights(p, 0.01)
    torch.testing.assert_close(found.weights[0, 0], weights[: found.weights.shape[-1]])
    M = exercises.crossing(64, 32, 4)
    pairs = lambda m: (4 * m * m, m * 32 + 4 * 32 * 32)  # noqa: E731
    assert pairs(M)[0] > pairs(M)[1] and pairs(M - 1)[0] <= pairs(M - 1)[1]


# --- live -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", methods.SHARED)
def test_multiplications_are_those_counted(name):
    model = methods.language_model(name, vocabulary=50).eval()
    ids = torch.randint(1, 50, (1, 128), generator=torch.Generator().manual_seed(0))
    counted = flops(lambda: model(input_ids=ids, use_cache=False)) / 2 / 128
    assert counted == pytest.approx(methods.token_multiply_adds(model), rel=0.01)


def test_equal_parameters_and_equal_work_are_what_they_say():
    numbers = {
        name: sum(p.numel() for p in methods.language_model(name).parameters())
        for name in methods.SHARED
    }
    assert numbers["all"] == numbers["one layer"]
    assert numbers["all"] < numbers["feed_forward"] < numbers["attention"] < numbers["none"]
    work = {n: methods.token_multiply_adds(methods.language_model(n)) for n in methods.SHARED}
    assert work["all"] == work["none"] > work["one layer"]


@pytest.mark.parametrize("name", methods.FILLERS)
def test_fillers_read_only_what_is_not_masked(name):
    model = methods.filler(name).eval()
    windows = torch.randint(0, 95, (3, methods.PLACES), generator=torch.Generator().manual_seed(0))
    ids, labels = methods.mask_some(windows, 5)
    assert torch.equal(ids == methods.MASK, labels != -100)
    assert 0.12 < float((labels != -100).float().mean()) < 0.18
    losses, right = methods.masked_by_window(model, windows, 5)
    assert len(losses) == 3 and 0 <= right <= 1
    mean = float(methods.masked_loss(model, (ids, labels)))
    counts = (labels != -100).sum(1)
    weighted = sum(loss * int(n) for loss, n in zip(losses, counts)) / int(counts.sum())
    assert weighted == pytest.approx(mean, abs=1e-3)
    if name != "Transformer":
        assert sum(p.numel() for p in model.parameters()) == model.parameters_by_formula
    counted = flops(lambda: model(ids[:1])) / 2
    assert counted == pytest.approx(methods.filler_multiply_adds(name), rel=0.01)


def test_characters_are_numbered():
    assert methods.characters(" ~\né") == [0, 94, 95, 96]


def test_additions_are_right():
    sums, result, chains = methods.addition(200, seed=1, digits=7)
    for row, digits, chain in zip(sums.tolist(), result.tolist(), chains.tolist()):
        total = sum(s * 10**i for i, s in enumerate(row))
        assert digits == [total // 10**i % 10 for i in range(7)]
        for place in range(7):
            below = row[:place][::-1]
            nines = next((n for n, s in enumerate(below) if s != 9), len(below))
            assert chain[place] == nines


def test_an_adder_learns():
    model = methods.train_adder(steps=250)
    assert methods.addition_right(model) > 0.9
    rows = methods.addition_report(model)
    assert [row["chain"] for row in rows] == list(methods.CHAINS)
    assert all(1 <= row["steps"] <= 6 for row in rows)
    assert methods.addition_right(model, steps=1) < methods.addition_right(model)


def test_neighbours_are_found_by_a_convolution_and_not_by_frequencies():
    windows = methods.character_windows("test", 4, methods.PLACES)
    loss, right = methods.masked_by_window(methods.train_neighbours(40), windows)
    frequent = methods.frequency_loss(windows)
    assert 2.5 < frequent < 3.5  # the entropy of English letters, with spaces and punctuation
    assert sum(loss) / 4 < frequent - 0.3 and right > 0.25


def test_the_plateau_is_said_of_those_who_are_on_it():
    rows = [
        {"model": "m", "method": name, "table": "masked", "seed": 0, "documents": [value] * 12}
        for name, value in (("4 latents", 3.0), ("Transformer", 2.0))
    ]
    assert "Only Transformer did better" in tables.plateau_said(rows)
    assert "None of them did better" in tables.plateau_said(rows[:1])


def test_what_the_chapter_shows_of_the_code():
    assert methods.gradient_gap() < 1e-10
    apart, together = (methods.language_model(n, vocabulary=64).eval() for n in ("none", "all"))
    ids = torch.randint(1, 64, (1, 9), generator=torch.Generator().manual_seed(0))
    assert methods.cache_gap(methods.whole_attention_shared(apart), ids) > 1e-3
    assert methods.cache_gap(sharing.share_layers(apart), ids) < 1e-4
    numbers, stored, change = methods.saved_and_loaded(together, ids)
    assert numbers == stored and change < 1e-5
    found = methods.compressed(together, ids)
    assert all(one for *_, one in found) and len({kind for _, kind, _ in found}) == 4


# --- tables and pictures --------------------------------------------------------------------------


def rows_of_sharing(names=tuple(methods.NAMES), seeds=2):
    generator = torch.Generator().manual_seed(0)
    noise = lambda: (0.1 * torch.randn(12, generator=generator)).tolist()  # noqa: E731
    base = {name: 5 + 0.1 * i for i, name in enumerate(methods.NAMES)}
    return [
        {
            "method": name, "seed": seed, "parameters": 1000 * (i + 1), "multiply_adds": 500,
            "training_tokens": 256_000,
            "documents": [base[name] + 0.01 * x for x in noise()],
        }
        for seed in range(seeds)
        for i, name in enumerate(names)
    ]  # fmt: skip


def test_tables_say_what_rows_hold():
    rows = rows_of_sharing()
    said = tables.shared_said(rows)
    assert "All layers shared, against none (the same multiplications): worse, +0.4" in said
    assert "(the same parameters): better, −0.1" in said
    shown = tables.shared_table(rows)._repr_html_()
    assert "nothing shared" in shown and "1,000" in shown
    picture = drawings.result(rows).alt
    assert "all shared: 5 thousand parameters" in picture


def test_a_sweep_that_has_only_begun_is_shown_as_far_as_it_is():
    rows = rows_of_sharing(("none", "all"), seeds=1)
    assert "one layer (the same parameters)" not in tables.shared_said(rows)
    assert "three groups" not in tables.shared_table(rows)._repr_html_()
    drawings.result(rows)
    some = rows_of_sharing()[:-1]  # the last run of the last seed is missing
    assert "worse" in tables.shared_said(some)


def test_depth_is_told_over_lengths():
    rows = [
        {"method": kind, "table": name, "tokens": n, "seconds": [slope * n, slope * n, 9.0]}
        for kind, slope in (("Perceiver", 1e-6), ("Transformer", 1e-5))
        for name in ("depth", "whole")
        for n in (128, 4096)
    ]
    assert "32 times as many" in tables.depth_said(rows)
    assert "one more layer: 0.13 ms at 128" in drawings.depth(rows).alt


def test_masked_and_universal():
    rows = [
        {"method": m, "seed": s, "documents": [3 - 0.2 * i, 3.1 - 0.2 * i], "accuracy": 0.3,
         "parameters": 10, "multiply_adds": 20}
        for s in (0, 1) for i, m in enumerate(methods.FILLERS)
    ]  # fmt: skip
    assert "64 latents against 4 latents: better" in tables.masked_said(rows)
    assert "64 latents against Transformer: worse" in tables.masked_said(rows)
    assert "30%" in tables.masked_table(rows)._repr_html_()
    rows = [
        {"method": m, "seed": 0, "by_steps": {"1": 0.5, "2": 0.9},
         "chains": [{"chain": c, "right": 0.9, "steps": 2 + c / 10} for c in methods.CHAINS]}
        for m in ("halting", "six steps", "one step")
    ]  # fmt: skip
    assert "take more steps (2.50) than where none has to (2.00)" in tables.universal_said(rows)
    assert "steps taken" in tables.universal_table(rows)._repr_html_()
    drawings.steps(rows)
    assert tables.universal_said(rows[1:]) == "Not measured here."


def test_real_models():
    rows = [
        {"model": "m", "groups": g, "initial": i, "documents": [2.0 + d, 3.0 + d],
         "parameters": p, "seconds": 1.0}
        for g, i, d, p in ((6, "first", 0, 600), (3, "first", 1, 300), (3, "mean", 2, 300))
    ]  # fmt: skip
    assert tables.real_said(rows) == (
        "m: at best +1.00 nats, with 3 groups and 50% of the parameters."
    )
    assert "own" in tables.real_table(rows)._repr_html_()
    assert tables.perplexity(20.0).endswith("e+08")


def test_what_is_not_measured_says_so():
    missing = results.read("02_design/3_sharing/no_such_part").data
    for function in (
        tables.shared_said, tables.shared_table, tables.depth_said, tables.masked_said,
        tables.masked_table, tables.universal_said, tables.universal_table, tables.real_said,
        tables.real_table, drawings.result, drawings.depth, drawings.steps,
    ):  # fmt: skip
        assert "Not measured here" in str(function(missing))


# --- panels ---------------------------------------------------------------------------------------


def test_counts_of_the_panel():
    found = panels.count("base", 1, 128)
    assert found["parameters"] == 11_683_584
    whole = panels.count("base", 12, 0)
    assert whole["parameters"] == whole["plain"]
    assert whole["multiply_adds"] == whole["plain_multiply_adds"]


def test_every_position_of_the_panels_answers():
    panels.counting().sweep()
    panels.latents().sweep()
    panels.adding(methods.universal()).sweep()


def test_the_trained_models_methods_use_the_knobs():
    model = load("mini-300k", device="cpu").model
    made = panels.trained_methods()
    assert made["short token vectors"](model, size=16).num_parameters() < model.num_parameters()
    for name, method in made.items():
        if name != "short token vectors":
            assert method(model, groups=1).num_parameters() < model.num_parameters()
            assert method(model, groups=2).num_parameters() == model.num_parameters()
