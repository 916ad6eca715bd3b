"""Masks that hold or change while a model trains: recovery, gradual, movement, lottery."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.core.modules import Layers, linears
from effnb.core.training import TrainingSettings, train
from effnb.inference.pruning import (
    CubicSchedule,
    MaskedLinear,
    MovementLinear,
    allocate_by_sensitivity,
    allocate_global,
    allocate_uniform,
    apply_masks,
    choose_masks,
    fine_tune,
    follows,
    gradual,
    lottery,
    magnitude,
    magnitude_mask,
    magnitude_scores,
    masks_of,
    movement,
    prune_remaining,
    random_masks,
    sensitivity,
    soft_mask,
    soft_movement,
    summarize,
    train_masked,
    wanda,
)
from effnb.inference.quantization import rtn

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randn(64, 4, generator=torch.Generator().manual_seed(2))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def rows(step):
    return torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(step))


def error(model, which):
    return (model(X[which]) - Y[which]).square().mean()


def run(**changes):
    return TrainingSettings(**({"steps": 12, "learning_rate": 0.02} | changes))


# --- recovery -------------------------------------------------------------------------------------


def test_fine_tuning_is_adamw_with_mask_gradient_and_moments_held():
    """A plain loop that zeroes weights, gradients and both moments after every step."""
    options = dict(weight_decay=0.1, clip_norm=0.05, schedule="linear", warmup_steps=2)
    pruned = magnitude(net(), 0.6)
    masks = masks_of(pruned)
    found = fine_tune(pruned, rows, run(**options), loss=error)
    plain = magnitude(net(), 0.6)
    held = [(plain.get_submodule(n).weight, mask) for n, mask in masks.items()]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in plain.parameters() if p.ndim == 2], "weight_decay": 0.1},
         {"params": [p for p in plain.parameters() if p.ndim == 1], "weight_decay": 0.0}],
        betas=(0.9, 0.999),
    )  # fmt: skip
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = run(**options).rate(step)
        optimizer.zero_grad()
        error(plain, rows(step)).backward()
        for weight, mask in held:
            weight.grad *= mask
        nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        optimizer.step()
        with torch.no_grad():
            for weight, mask in held:
                weight *= mask
                for key in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[weight][key] *= mask
    for ours, theirs in zip(found.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    for name, mask in masks_of(found.model).items():
        assert torch.equal(mask, masks[name]) and torch.equal(found.masks[name], mask)
        assert type(found.model.get_submodule(name)) is nn.Linear


def test_recovery_helps_and_changes_nothing_given(llama, ids):
    pruned = wanda(llama, ids, 0.5)
    before = {name: p.clone() for name, p in pruned.named_parameters()}
    found = fine_tune(
        pruned, lambda step: ids, TrainingSettings(steps=15, learning_rate=5e-3), evaluate=None
    )
    assert found.training.losses[-1] < 0.8 * found.training.losses[0]
    assert found.sparsities == [0.5] * 15
    assert summarize(masks_of(found.model)).sparsity == 0.5
    for name, parameter in pruned.named_parameters():
        assert torch.equal(parameter, before[name])
    assert found.model.lm_head.weight is found.model.model.embed_tokens.weight  # still tied


def test_what_is_frozen_is_shared_and_stays():
    pruned = magnitude(net(), 0.5)
    pruned[0].requires_grad_(False)
    found = fine_tune(pruned, rows, run(), loss=error).model
    assert torch.equal(found[0].weight, pruned[0].weight) and found[0].bias is pruned[0].bias
    assert not torch.equal(found[2].weight, pruned[2].weight)


def test_a_mask_given_is_the_mask_held():
    model = net()
    masks = {"0": magnitude_mask(model[0].weight, 0.75)}
    found = fine_tune(model, rows, run(), masks=masks, loss=error)
    assert torch.equal(masks_of(found.model)["0"], masks["0"])
    assert masks_of(found.model)["2"].all()
    with pytest.raises(ValueError, match="no linear layer '1'"):
        fine_tune(model, rows, run(), masks={"1": masks["0"]}, loss=error)
    with pytest.raises(ValueError, match="prune the original, then quantize"):
        fine_tune(rtn(model, 4, group_size=8), rows, run(), loss=error)


def test_early_stopping_goes_back_to_pruned_weights():
    pruned = magnitude(net(), 0.5)
    settings = run(steps=30, learning_rate=0.5, evaluate_every=1, patience=2)
    found = fine_tune(
        pruned, rows, settings, loss=error,
        evaluate=lambda model: {"loss": float(error(model, torch.arange(64)))},
    )  # fmt: skip
    assert found.training.stopped_early
    best = min(e["loss"] for e in found.training.evaluations)
    assert float(error(found.model, torch.arange(64)).detach()) == pytest.approx(best)
    assert summarize(masks_of(found.model)).sparsity == 0.5
    with pytest.raises(ValueError, match="patience must be 0"):
        train_masked(pruned, rows, settings, {}, update=lambda step, layers: None, loss=error)


# --- gradual --------------------------------------------------------------------------------------


def test_the_cubic_schedule():
    schedule = CubicSchedule(0.8, begin=2, end=6)
    assert [schedule.at(t) for t in (0, 2, 4, 6, 9)] == pytest.approx([0, 0, 0.7, 0.8, 0.8])
    assert schedule.at(3) == pytest.approx(0.8 * (1 - 0.75**3))
    halfway = CubicSchedule(0.9, begin=0, end=4, initial=0.5)
    assert [halfway.at(t) for t in (0, 2)] == pytest.approx([0.5, 0.9 - 0.4 / 8])
    every = CubicSchedule(0.8, begin=1, end=8, every=3)
    assert [t for t in range(12) if every.changes(t)] == [1, 4, 7, 8]
    assert CubicSchedule(0.5, begin=0, end=0).at(0) == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"begin": 5, "end": 3}, "begin is 5 and end 3"),
        ({"begin": -1, "end": 3}, "begin is -1"),
        ({"begin": 0, "end": 3, "every": 0}, "every is 0"),
    ],
)
def test_schedules_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        CubicSchedule(0.5, **settings)


def seen_masks(history):
    def evaluate(model):
        layers = {n: m for n, m in model.named_modules() if isinstance(m, MaskedLinear)}
        history.append({name: layer.mask.clone() for name, layer in layers.items()})
        return {"loss": 0.0}

    return evaluate


@pytest.mark.parametrize("pattern", ["layer", "row", "global", "1:4"])
def test_gradual_pruning_follows_its_schedule(pattern):
    history = []
    schedule = CubicSchedule(0.75, begin=2, end=9, every=2)
    found = gradual(
        net(), rows, run(evaluate_every=1), schedule, pattern=pattern, loss=error,
        evaluate=seen_masks(history),
    )  # fmt: skip
    expected = 0.0
    for step in range(12):
        if schedule.changes(step):
            expected = schedule.at(step)
        part = int(expected * 4 + 1e-9) / 4 if pattern == "1:4" else expected
        assert found.sparsities[step] == pytest.approx(part, abs=0.07 if pattern == "row" else 0.01)
        if step:  # what is gone does not come back
            before = history[step - 1]
            assert not any((history[step][n] & ~before[n]).any() for n in before)
    assert summarize(masks_of(found.model)).sparsity == 0.75
    assert sorted(set(found.sparsities))[-1] == 0.75 and len(set(found.sparsities)) > 2
    if pattern == "1:4":
        assert set(found.sparsities) <= {0, 0.25, 0.5, 0.75}
        assert all(follows(mask, "1:4") for mask in found.masks.values())


def test_gradual_masks_are_those_of_the_weights_then():
    """With one change, at a known step, the mask is that of training so far."""
    found = gradual(net(), rows, run(), CubicSchedule(0.5, begin=6, end=6), loss=error)
    dense = net()
    train(dense, rows, run(steps=6), loss=error)
    expected = masks_of(magnitude(dense, 0.5))
    assert all(torch.equal(found.masks[n], expected[n]) for n in expected)


def test_gradual_bad_input():
    with pytest.raises(ValueError, match="ends at step 12; it must end before the last of the 12"):
        gradual(net(), rows, run(), CubicSchedule(0.5, begin=0, end=12), loss=error)
    with pytest.raises(ValueError, match=r"sparsity is 1\.0"):
        gradual(net(), rows, run(), CubicSchedule(1.0, begin=0, end=5), loss=error)
    with pytest.raises(ValueError, match=r"sparsity is -0\.5"):
        gradual(net(), rows, run(), CubicSchedule(0.5, 0, 5, initial=-0.5), loss=error)
    with pytest.raises(ValueError, match="the pattern 2:4 removes 0.5"):
        gradual(net(), rows, run(), CubicSchedule(0.6, 0, 5), pattern="2:4", loss=error)
    with pytest.raises(ValueError, match="patience must be 0"):
        gradual(
            net(), rows, run(patience=2), CubicSchedule(0.5, 0, 5), loss=error,
            evaluate=lambda model: {"loss": 0.0},
        )  # fmt: skip


# --- movement -------------------------------------------------------------------------------------


def test_gradients_pass_straight_through():
    """dL/dS = dL/dW' * W, also for what is masked; dL/dW = dL/dW' * M."""
    layer = MovementLinear(net()[0])
    layer.mask = torch.rand(16, 8, generator=torch.Generator().manual_seed(0)) > 0.5
    effective = (layer.weight * layer.mask).detach().requires_grad_()
    out = nn.functional.linear(X, effective, layer.bias).square().mean()
    g = torch.autograd.grad(out, effective)[0]
    layer(X).square().mean().backward()
    torch.testing.assert_close(layer.raw_scores.grad.view(16, 8), g * layer.weight)
    torch.testing.assert_close(layer.weight.grad, g * layer.mask)
    assert bool(layer.raw_scores.grad.view(16, 8)[~layer.mask].abs().min() > 0)


def test_everything_kept_is_the_layer_itself():
    plain = net()[0]
    assert torch.equal(MovementLinear(plain)(X), plain(X))


def test_scores_replay_the_movement():
    """Plain gradient descent: S = -alpha sum_t dL/dW' * W, step by step."""
    layer = MovementLinear(net()[0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    replay = torch.zeros(16, 8)
    for _ in range(5):
        optimizer.zero_grad()
        layer(X).square().mean().backward()
        replay -= 0.1 * layer.weight.grad * layer.weight.detach()  # all kept: dL/dW = dL/dW'
        optimizer.step()
    torch.testing.assert_close(layer.scores.detach(), replay)


def test_scores_learn_at_a_rate_of_their_own():
    """As AdamW with two groups, decay on weights only; clipping over both."""
    settings = run(weight_decay=0.1, clip_norm=0.3, schedule="cosine")
    schedule = CubicSchedule(0.5, begin=3, end=9)
    found = movement(net(), rows, settings, schedule, score_learning_rate=0.3, loss=error)
    plain = net()
    scores = {n: nn.Parameter(torch.zeros_like(m.weight)) for n, m in linears(plain).items()}
    optimizer = torch.optim.AdamW(
        [{"params": [m.weight for m in linears(plain).values()], "weight_decay": 0.1},
         {"params": [m.bias for m in linears(plain).values()], "weight_decay": 0.0},
         {"params": list(scores.values()), "weight_decay": 0.0}],
    )  # fmt: skip
    for step in range(12):
        for group, peak in zip(optimizer.param_groups, (1, 1, 0.3 / 0.02), strict=True):
            group["lr"] = settings.rate(step) * peak
        masks = choose_masks(scores, schedule.at(step))
        shadow = apply_masks(plain, masks)
        effective = [m.weight for m in linears(shadow).values()]
        biases = [m.bias for m in linears(plain).values()]
        found_g = torch.autograd.grad(error(shadow, rows(step)), effective + biases)
        for (name, layer), g in zip(linears(plain).items(), found_g[:2], strict=True):
            layer.weight.grad = g * masks[name]
            scores[name].grad = g * layer.weight.detach()
        for bias, g in zip(biases, found_g[2:], strict=True):
            bias.grad = g
        nn.utils.clip_grad_norm_([*plain.parameters(), *scores.values()], 0.3)
        optimizer.step()
    for name, expected in scores.items():
        torch.testing.assert_close(found.scores[name], expected.detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            found.model.get_submodule(name).weight,
            plain.get_submodule(name).weight * found.masks[name], rtol=1e-3, atol=1e-4,
        )  # fmt: skip


@pytest.mark.parametrize("pattern", ["layer", "row", "global", "2:4"])
def test_movement_ends_at_its_sparsity(pattern):
    model = net()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = movement(
        model, rows, run(), CubicSchedule(0.5, begin=2, end=8), pattern=pattern, loss=error
    )
    assert summarize(masks_of(found.model)).sparsity == 0.5
    assert found.sparsities[0] == 0 and found.sparsities[-1] == 0.5
    expected = choose_masks(found.scores, None if pattern == "2:4" else 0.5, pattern)
    for name, mask in found.masks.items():
        assert torch.equal(mask, expected[name])
        assert type(found.model.get_submodule(name)) is nn.Linear
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_weights_that_move_away_stay_and_weights_that_shrink_go():
    """One input of each kind; magnitude would choose the other way round."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[1.0, 0.3]])
    x = torch.randn(256, 2)
    y = x @ torch.tensor([[0.7], [0.9]])  # the large weight shrinks, the small one grows

    def loss(model, step):
        return (model(x) - y).square().mean()

    settings = TrainingSettings(steps=6, learning_rate=0.01)
    found = movement(model, lambda s: s, settings, CubicSchedule(0.5, 4, 5), loss=loss)
    assert found.masks["0"].tolist() == [[False, True]]
    assert magnitude_mask(model[0].weight, 0.5).tolist() == [[True, False]]
    assert bool(found.scores["0"][0, 0] < 0 < found.scores["0"][0, 1])


def test_masked_weights_can_come_back():
    history = []
    movement(
        net(), rows, run(steps=30, evaluate_every=1), CubicSchedule(0.5, 0, 2),
        score_learning_rate=0.1, loss=error, evaluate=seen_masks(history),
    )  # fmt: skip
    back = [
        int((history[t + 1][n] & ~history[t][n]).sum()) for t in range(3, 29) for n in history[0]
    ]
    assert sum(back) > 0


def test_a_larger_penalty_is_sparser():
    found = [
        soft_movement(
            net(), rows, run(steps=25), CubicSchedule(0.3, 0, 15), penalty=penalty,
            score_learning_rate=0.1, loss=error,
        )
        for penalty in (0.0, 0.3, 30.0)
    ]  # fmt: skip
    sparsities = [summarize(masks_of(r.model)).sparsity for r in found]
    assert sparsities[0] < sparsities[1] < sparsities[2]
    for result in found:
        for name, mask in result.masks.items():
            assert torch.equal(mask, soft_mask(result.scores[name], 0.3))
    layers = list(summarize(found[1].masks).layers.values())
    assert layers[0] != layers[1]  # each layer finds its own


def test_the_penalty_is_the_mean_of_the_means():
    """At the first step, scores are 0 and the sigmoid is 1/2."""
    given = dict(loss=error, score_learning_rate=0.1)
    schedule = CubicSchedule(0.4, begin=0, end=5, initial=0.2)
    free = soft_movement(net(), rows, run(), schedule, penalty=0.0, **given).training.losses
    paid = soft_movement(net(), rows, run(), schedule, penalty=6.0, **given).training.losses
    assert paid[0] - free[0] == pytest.approx(6.0 * 0.2 / 0.4 * 0.5, rel=1e-5)


def test_the_soft_mask_never_empties_a_layer():
    scores = torch.linspace(-3, 0, 1000).view(10, 100)
    assert soft_mask(scores, 0.9).flatten().nonzero().flatten().tolist() == [*range(995, 1000)]
    assert int(soft_mask(scores[:1, :3], 0.9).sum()) == 1
    assert torch.equal(soft_mask(scores, 0.25), scores.sigmoid() > 0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": CubicSchedule(0.5, 0, 12)}, "ends at step 12"),
        ({"schedule": CubicSchedule(1.0, 0, 5)}, "sparsity is 1.0"),
        ({"score_learning_rate": 0.0}, "score_learning_rate is 0.0"),
        ({"settings": run(patience=1)}, "patience must be 0"),
        ({"pattern": "3:5"}, "groups of 5 of the pattern 3:5|removes 0.4"),
        ({"layers": "nothing"}, "no Linear fits"),
    ],
)
def test_movement_bad_input(changes, message):
    given = {"settings": run(), "schedule": CubicSchedule(0.5, 0, 5), "loss": error} | changes
    with pytest.raises(ValueError, match=message):
        movement(net(), rows, **given)


def test_soft_movement_bad_input():
    with pytest.raises(ValueError, match="the threshold goes from 0.0 to 1.0"):
        soft_movement(net(), rows, run(), CubicSchedule(1.0, 0, 5), penalty=1.0, loss=error)
    with pytest.raises(ValueError, match="penalty is -1"):
        soft_movement(net(), rows, run(), CubicSchedule(0.1, 0, 5), penalty=-1.0, loss=error)


# --- lottery tickets ------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["layer", "global"])
def test_each_round_removes_a_part_of_what_is_left(pattern):
    tickets = lottery(net(), rows, run(), rounds=4, rate=0.25, pattern=pattern, loss=error)
    kept = [summarize(t.masks).kept for t in tickets]
    sizes = [192] if pattern == "global" else [128, 64]
    for _ in range(4):
        sizes.append(None)
    left = [192] if pattern == "global" else [128, 64]
    for number, ticket in enumerate(tickets):
        assert kept[number] == sum(left)
        assert kept[number] == pytest.approx(192 * 0.75**number, abs=2)
        assert ticket.sparsity == 1 - kept[number] / 192
        left = [n - round(0.25 * n) for n in left]
        for name, mask in ticket.masks.items():
            start = ticket.start.get_submodule(name).weight
            assert torch.equal(start, net().get_submodule(name).weight * mask)  # step 0
            assert torch.equal(masks_of(ticket.model)[name], mask)
            if number:
                assert not (mask & ~tickets[number - 1].masks[name]).any()
    smallest = tickets[0].model[2].weight.abs()
    if pattern == "layer":
        assert torch.equal(tickets[1].masks["2"], magnitude_mask(smallest, 0.25))


def test_without_pruning_every_round_is_the_same_run():
    settings = run(schedule="cosine", warmup_steps=3)
    tickets = lottery(net(), rows, settings, rounds=2, rate=0.0, loss=error)
    plain = net()
    losses = train(plain, rows, settings, loss=error).losses
    for ticket in tickets:
        assert ticket.training.losses == losses
        for a, b in zip(ticket.model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a, b)


def test_rewinding_to_a_later_step():
    """Round 0 starts at the weights of step k; batches and rates go on from there."""
    settings = run(schedule="linear", warmup_steps=5)
    asked = []
    tickets = lottery(
        net(), lambda step: asked.append(step) or rows(step), settings,
        rounds=1, rate=0.5, rewind_step=4, loss=error,
    )  # fmt: skip
    assert asked == [*range(4), *range(4, 12), *range(4, 12)]

    plain = net()
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.0)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = settings.rate(step)
        optimizer.zero_grad()
        error(plain, rows(step)).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for a, b in zip(tickets[0].start.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    mask = tickets[1].masks["0"]
    torch.testing.assert_close(tickets[1].start[0].weight, plain[0].weight * mask)
    torch.testing.assert_close(tickets[1].start[0].bias, plain[0].bias)

    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.0)  # it starts afresh
    for step in range(4, 12):
        optimizer.param_groups[0]["lr"] = settings.rate(step)
        optimizer.zero_grad()
        error(plain, rows(step)).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for a, b in zip(tickets[0].model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_rewinding_the_learning_rate_only():
    tickets = lottery(net(), rows, run(), rounds=1, rate=0.5, rewind="learning rate", loss=error)
    trained, mask = tickets[0].model, tickets[1].masks["0"]
    assert torch.equal(tickets[1].start[0].weight, trained[0].weight * mask)
    assert torch.equal(tickets[1].start[0].bias, trained[0].bias)


def test_n_of_m_takes_one_weight_of_each_group_a_round():
    tickets = lottery(net(), rows, run(steps=4), rounds=2, pattern="2:4", loss=error)
    assert [t.sparsity for t in tickets] == [0, 0.25, 0.5]
    assert all(follows(mask, "2:4") for mask in tickets[2].masks.values())
    assert all(follows(mask, "3:4") for mask in tickets[1].masks.values())
    assert not any((tickets[2].masks[n] & ~tickets[1].masks[n]).any() for n in ("0", "2"))
    with pytest.raises(ValueError, match="rounds is 3; 2:4 is reached in 2"):
        lottery(net(), rows, run(), rounds=3, pattern="2:4", loss=error)


def test_progress_counts_all_rounds():
    seen = []
    lottery(
        net(), rows, run(steps=3), rounds=2, rewind_step=1, loss=error,
        progress=lambda done, of, loss: seen.append((done, of)),
    )  # fmt: skip
    assert seen == [(i, 7) for i in range(1, 8)]


@given(
    st.sampled_from(["layer", "row", "global"]), st.floats(0, 0.45), st.integers(1, 4),
    st.integers(0, 50),
)  # fmt: skip
@settings(max_examples=20)
def test_what_is_gone_stays_gone(pattern, rate, rounds, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {n: torch.randn(4, 10, generator=generator) for n in "ab"}
    masks = {n: torch.ones(4, 10, dtype=torch.bool) for n in weights}
    for _ in range(rounds):
        new = prune_remaining(weights, masks, rate, pattern)
        assert not any((new[n] & ~masks[n]).any() for n in masks)
        groups = {"global": 1, "layer": 2, "row": 8}[pattern]
        before = torch.cat(list(masks.values())).view(groups, -1).sum(1)
        after = torch.cat(list(new.values())).view(groups, -1).sum(1)
        assert after.tolist() == [b - round(rate * b) for b in before.tolist()]
        masks = new


def test_random_masks_are_the_control():
    masks = masks_of(magnitude(net(), 0.7))
    found = random_masks(masks, seed=3)
    assert all(int(found[n].sum()) == int(masks[n].sum()) for n in masks)
    assert not torch.equal(found["0"], masks["0"])
    assert torch.equal(found["0"], random_masks(masks, seed=3)["0"])
    assert not torch.equal(found["0"], random_masks(masks, seed=4)["0"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"rate": 1.0}, "rate is 1.0"),
        ({"rewind_step": 12}, r"rewind_step is 12; it must be one of the steps 0 … 11"),
        ({"rewind": "all"}, 'must be "weights" or "learning rate"'),
        ({"pattern": "rows"}, "pattern is 'rows'"),
        ({"rate": 0.99, "rounds": 3}, "at least one must stay"),
    ],
)
def test_lottery_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        lottery(net(), rows, run(), **({"rounds": 2, "loss": error} | changes))


# --- allocation -----------------------------------------------------------------------------------


def test_uniform_and_global_allocations(llama):
    uniform = allocate_uniform(llama, 0.4)
    assert uniform == dict.fromkeys(linears(llama), 0.4)
    share = allocate_global(magnitude_scores(llama), 0.4)
    assert share == summarize(masks_of(magnitude(llama, 0.4, pattern="global"))).layers
    again = masks_of(magnitude(llama, share))
    found = masks_of(magnitude(llama, 0.4, pattern="global"))
    assert all(torch.equal(again[name], found[name]) for name in found)
    with pytest.raises(ValueError, match="sparsity is 1"):
        allocate_uniform(llama, 1)


def test_sensitivity_prunes_one_layer_at_a_time():
    model = net()
    everything = torch.arange(64)
    asked = []

    def evaluate(model):
        asked.append({n for n, mask in masks_of(model).items() if not mask.all()})
        return float(error(model, everything).detach())

    steps = []
    found = sensitivity(
        model, evaluate, levels=(0.9, 0.5), progress=lambda done, of: steps.append((done, of))
    )
    assert asked == [set(), {"0"}, {"0"}, {"2"}, {"2"}]
    assert steps == [(i, 5) for i in range(2, 6)]
    dense = float(error(model, everything).detach())
    assert found["0"][0.0] == found["2"][0.0] == dense
    alone = apply_masks(model, {"2": magnitude_mask(model[2].weight, 0.9)})
    assert found["2"][0.9] == pytest.approx(float(error(alone, everything).detach()))


def test_sensitivity_of_another_method(llama, ids):
    def prune(model, sparsity, name):
        return wanda(model, ids, sparsity, layers=Layers(name, ()))

    def evaluate(model):
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    found = sensitivity(llama, evaluate, (0.5,), prune=prune, layers="*.1.mlp.*")
    name = "model.layers.1.mlp.down_proj"
    assert len(found) == 3
    assert found[name][0.5] == evaluate(wanda(llama, ids, 0.5, layers=name))


def test_the_allocation_is_the_best_there_is():
    """Against every combination on a fine grid; straight lines between measurements."""
    measured = {
        "a": {0.0: 1.0, 0.5: 1.1, 0.75: 1.6, 0.9: 3.0},
        "b": {0.0: 1.0, 0.5: 1.9, 0.75: 2.0, 0.9: 2.5},  # 0.5 lies above its neighbours' line
        "c": {0.0: 1.0, 0.5: 1.0, 0.75: 1.2, 0.9: 4.0},
    }
    hulls = {
        "a": [(0, 1.0), (0.5, 1.1), (0.75, 1.6), (0.9, 3.0)],
        "b": [(0, 1.0), (0.75, 2.0), (0.9, 2.5)],
        "c": [(0, 1.0), (0.5, 1.0), (0.75, 1.2), (0.9, 4.0)],
    }
    sizes = {"a": 100, "b": 200, "c": 100}

    def loss(name, s):
        points = hulls[name]
        for (x0, y0), (x1, y1) in pairwise(points):
            if s <= x1 + 1e-12:
                return y0 + (y1 - y0) * (s - x0) / (x1 - x0)
        raise AssertionError

    for sparsity in (0.0, 0.2, 0.5, 0.8, 0.9):
        found = allocate_by_sensitivity(measured, sizes, sparsity)
        assert sum(found[n] * sizes[n] for n in sizes) == pytest.approx(400 * sparsity)
        best = min(
            loss("a", i / 100) + loss("b", j / 100) + loss("c", k)
            for i in range(91) for j in range(91)
            for k in [(400 * sparsity - i - 2 * j) / 100] if -1e-9 <= k <= 0.9 + 1e-9
        )  # fmt: skip
        assert sum(loss(n, found[n]) for n in sizes) == pytest.approx(best, abs=1e-9)


def test_allocation_on_a_model(llama, ids):
    def evaluate(model):
        with torch.no_grad():
            return float((model(ids).logits - llama(ids).logits).square().mean())

    measured = sensitivity(llama, evaluate, (0.5, 0.8), layers="*.mlp.*")
    sizes = {n: m.weight.numel() for n, m in linears(llama, "*.mlp.*").items()}
    shares = allocate_by_sensitivity(measured, sizes, 0.5)
    assert len(set(shares.values())) > 1
    pruned = magnitude(llama, shares, layers="*.mlp.*")
    found = summarize(masks_of(pruned, "*.mlp.*"))
    assert found.sparsity == pytest.approx(0.5, abs=1e-3)
    even = magnitude(llama, 0.5, layers="*.mlp.*")
    assert evaluate(pruned) < evaluate(even)


def test_allocation_bad_input(llama):
    with pytest.raises(ValueError, match="levels are"):
        sensitivity(llama, lambda m: 0.0, ())
    with pytest.raises(ValueError, match="levels are"):
        sensitivity(llama, lambda m: 0.0, (0.5, 1.0))
    with pytest.raises(ValueError, match="loss of the dense model is nan"):
        sensitivity(llama, lambda m: float("nan"))
    curve = {"a": {0.0: 1.0, 0.5: 2.0}}
    with pytest.raises(ValueError, match=r"at most 0\.5 can be reached"):
        allocate_by_sensitivity(curve, {"a": 10}, 0.6)
    with pytest.raises(ValueError, match="a was measured but has no size"):
        allocate_by_sensitivity(curve, {}, 0.5)
    with pytest.raises(ValueError, match="a was not measured at sparsity 0"):
        allocate_by_sensitivity({"a": {0.5: 1.0}}, {"a": 10}, 0.5)
    with pytest.raises(ValueError, match="sparsity is 1.0"):
        allocate_by_sensitivity(curve, {"a": 10}, 1.0)
