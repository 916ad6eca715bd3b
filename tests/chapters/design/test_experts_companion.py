"""The companion of the chapter on experts: exercises, twins, live methods, tables, panels."""

import pytest
import torch

from effnb.chapters.design.experts import drawings, exercises, methods, panels, tables, twins
from effnb.design import experts
from effnb.lab import results

EXERCISES = [exercises.seats, exercises.balance, exercises.choice]


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


def test_references_agree_with_the_package():
    assert exercises.seats_for(512, 8, 1, 1.25) == experts.expert_capacity(512, 8, 1.25)
    p = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    routing = experts.switch(p.log())
    torch.testing.assert_close(exercises.balance_of(p[0]), experts.balance_loss(routing))
    chosen = experts.expert_choice(p.log(), 5)
    rows = chosen.tokens.view(4, 5).sort(1).values
    assert torch.equal(exercises.choose_tokens(p[0], 5), rows)


def documents(count=3, length=40):
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(1, 4000, (length,), generator=draw) for _ in range(count)]


@pytest.mark.parametrize("method", ["dense", "Switch", "GLaM", "expert choice", "entmax"])
def test_twins_are_trained_and_judged(method):
    model = twins.twin(method, 4)
    batches = [torch.stack(documents(2, 32))] * 2
    seen = []
    twins.trained(model, batches, watch=lambda step, _: seen.append(step))
    assert seen == [0, 1] and not model.training
    found = twins.judged(model, documents())
    assert len(found["documents"]) == 3
    if method != "dense":
        assert all(sum(load) == pytest.approx(1, abs=1e-3) for load in found["load"])
    sizes, dense = twins.sizes_of(model), twins.sizes_of(twins.twin("dense"))
    if method == "Switch":
        assert sizes["active"] == dense["active"] + 2 * 4 * 64
        assert sizes["flops"] <= 1.05 * dense["flops"]


def test_exchanged_numbers_cost_the_same():
    model = twins.twin("entmax", 4).eval()
    for layer in experts.expert_layers(model).values():
        torch.nn.init.normal_(layer.router.weight, std=0.3)
    found = twins.by_input(model, documents())
    assert set(found) == {"entmax", "entmax, shuffled", "entmax, hard − easy"}
    assert found["entmax"]["documents"] != found["entmax, shuffled"]["documents"]
    settings = [layer.settings for layer in experts.expert_layers(model).values()]
    assert all(isinstance(s, experts.RoutingSettings) for s in settings)
    logits = torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(1)) * 3
    swapped = twins.Shuffled(settings[0], 0)
    routing = swapped.route(logits)
    assert swapped.paid == int(experts.entmax_routing(logits).experts_of_token.sum())
    assert len(routing.tokens) <= swapped.paid


def test_only_expert_choice_is_judged_otherwise_without_the_future():
    text = documents(1, 33)
    plain = methods.prefix_losses(twins.twin("dense").eval(), text)
    assert plain["whole"] == pytest.approx(plain["before"], abs=1e-4)
    leaky = twins.twin("expert choice", 4).eval()
    for layer in experts.expert_layers(leaky).values():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    found = methods.prefix_losses(leaky, text)
    assert found["whole"] != pytest.approx(found["before"], abs=1e-4)


def test_a_small_training_shows_what_balance_does():
    alone, even = methods.watched(8, 1, 1.25, 0.0), methods.watched(8, 1, 1.25, 1.0)
    assert even.busiest < alone.busiest
    assert alone.losses[-1] < alone.losses[0]
    assert len(even.loads) == methods.LIVE_STEPS


def test_drops_follow_the_formula():
    measured, formula = methods.measured_drops(256, 8, 1.0)
    assert measured == pytest.approx(formula, rel=0.1)


def test_what_is_not_measured_says_so():
    missing = results.NotMeasured("02_design/2_experts/nothing")
    for function in (
        tables.grid_table, tables.grid_said, tables.balance_table, tables.leak_said,
        tables.upcycled_table, tables.upcycled_said, tables.compressed_table, tables.speed_table,
        drawings.result, drawings.loads,
    ):  # fmt: skip
        assert function(missing) is missing


def planted(loss):
    return {
        "parameters": 1000, "flops": 500, "loss": loss, "documents": [loss, loss + 0.1, loss - 0.2],
        "busiest": [1.5, 1.2, 1.3], "dropped": [0.1, 0.0, 0.05], "load": [[0.5, 0.5]] * 2,
        "prefixes": {"whole": loss, "before": loss + 0.3},
    }  # fmt: skip


def test_sentences_follow_the_rows():
    losses = {"dense": 4.0, "Switch 8": 3.8, "Switch 8, weight 0": 3.9, "expert choice 8": 4.2}
    rows = [{"name": n, "seed": s} | planted(x) for n, x in losses.items() for s in (0, 1)]
    data = {"steps": 10, "table": rows}
    said = tables.grid_said(data)
    assert "A lower loss than the dense twin: Switch, 8 experts." in said
    assert "A higher loss: expert choice, 8 experts." in said
    assert "(+0.300)" in tables.leak_said(data)
    for shown in (tables.grid_table(data), tables.balance_table(data)):
        assert "Switch" in str(shown) or "0.01" in str(shown)
    assert "nats" in drawings.result(data).alt and drawings.loads(data).alt


def test_the_panels_pass_over_all_their_knobs():
    panels.fair().sweep()
    assert panels.share_choice(0.13) == "about an eighth"
    assert panels.share_choice(0.9) == "more than half"
