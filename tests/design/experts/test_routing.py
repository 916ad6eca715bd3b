"""Routers: exact values, seats, padding, balance, drops, the leak of expert choice, bad input."""

import dataclasses
import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from effnb.design.experts import (
    approximate_drops,
    balance_loss,
    entmax_routing,
    expected_drops,
    expert_capacity,
    expert_choice,
    glam,
    gshard,
    jitter,
    leak_rate,
    switch,
    top_k,
    z_loss,
)
from effnb.hardware.codesign import gshard as codesign

switch_module = importlib.import_module("effnb.design.experts.switch")


def scores(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_switch_by_hand():
    """Two seats: of the three tokens that want expert 0, the last is dropped."""
    logits = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [4.0, 0.0]]])
    routing = switch(logits, capacity=2)
    assert routing.experts.tolist() == [0, 0, 1, 0]
    assert routing.kept.tolist() == [True, True, True, False]
    expected = [1 / (1 + math.exp(-x)) for x in (2, 1, 3, 4)]
    assert routing.gates.tolist() == pytest.approx(expected)
    assert routing.wanted.tolist() == [3, 1] and routing.load.tolist() == [2, 1]
    assert routing.dropped == 0.25 and routing.imbalance == 1.5
    assert routing.experts_of_token.tolist() == [[1, 1, 1, 0]]
    chosen, gates = routing.table()
    assert chosen.tolist() == [[0], [0], [1], [2]] and gates[3].item() == 0


def test_first_choices_sit_down_before_second_ones():
    logits = torch.tensor([[[2.0, 1.0], [2.0, 1.0], [1.0, 2.0]]])
    routing = glam(logits, capacity=2)
    # Expert 0: tokens 0 and 1 first, token 2 comes second. Expert 1: token 2 first, then token 0.
    kept = {(t, e) for t, e, k in zip(routing.tokens.tolist(), routing.experts.tolist(),
                                      routing.kept.tolist()) if k}  # fmt: skip
    assert kept == {(0, 0), (1, 0), (2, 1), (0, 1)}


@pytest.mark.parametrize("drawn", [False, True])
def test_gshard_is_the_layer_of_three_einsums(drawn):
    """The same weights and the same loss as the form that a compiler can split."""
    logits = scores(2, 12, 4)
    draws = torch.rand(2, 12, dtype=torch.float64) if drawn else None
    other = codesign.route(logits, 4, draws=draws)
    routing = gshard(logits, capacity=4, draws=draws)
    table = torch.zeros(24, 4)
    kept = routing.kept
    table[routing.tokens[kept], routing.experts[kept]] = routing.gates[kept].float()
    torch.testing.assert_close(table, other.combine.sum(-1).flatten(0, 1).float())
    first = switch(logits)  # its loss counts first choices only, over E squared
    torch.testing.assert_close(balance_loss(first).float() / 16, other.auxiliary_loss.float())


# --- balance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_balance_is_one_and_collapse_is_the_number_of_experts(k):
    cycled = torch.stack([torch.roll(torch.arange(8.0, 0, -1), t) for t in range(32)])[None] * 1e-6
    torch.testing.assert_close(balance_loss(top_k(cycled, k)).item(), 1.0, atol=1e-6, rtol=0)
    collapsed = torch.full((1, 32, 8), -40.0)
    collapsed[..., 3] = 40
    assert balance_loss(switch(collapsed)).item() == pytest.approx(8, abs=1e-6)


def test_drops_do_not_change_the_balance():
    """Fractions are counted before tokens are dropped: full experts are no fair ones."""
    logits = scores(1, 64, 4)
    assert balance_loss(switch(logits, capacity=2)) == balance_loss(switch(logits))


def test_the_fractions_have_no_gradient():
    logits = scores(1, 16, 4).requires_grad_()
    (grad,) = torch.autograd.grad(balance_loss(switch(logits)), logits)
    f = switch(logits.detach()).wanted.double() / 16
    p = logits.detach().softmax(-1)
    expected = 4 * p * (f - (p * f).sum(-1, keepdim=True)) / 16
    torch.testing.assert_close(grad, expected)


def test_z_loss_by_hand():
    logits = torch.zeros(1, 3, 4)
    assert z_loss(switch(logits)).item() == pytest.approx(math.log(4) ** 2)


@pytest.mark.parametrize("route", [
    lambda x, text: switch(x, text=text, capacity=3),
    lambda x, text: glam(x, text=text, capacity=3),
    lambda x, text: expert_choice(x, 3, text=text),
    lambda x, text: entmax_routing(x, text=text),
], ids=["switch", "glam", "expert choice", "entmax"])  # fmt: skip
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_nowhere(route, side):
    """Not in the seats, the loads or the losses, whatever its scores are."""
    text = torch.ones(1, 12, dtype=torch.bool)
    where = slice(0, 4) if side == "left" else slice(8, 12)
    text[:, where] = False
    logits = scores(1, 12, 4)
    padded = route(logits, text)
    wild = logits.clone()
    wild[:, where] = 50 * scores(1, 4, 4, seed=1)
    for other in (route(wild, text), route(logits[:, text[0]], None)):
        assert torch.equal(padded.load, other.load)
        assert torch.equal(padded.wanted, other.wanted)
        torch.testing.assert_close(balance_loss(padded), balance_loss(other))
        torch.testing.assert_close(z_loss(padded), z_loss(other))
    assert not bool(padded.experts_of_token[~text].any())


def test_text_that_is_all_padding():
    text = torch.zeros(1, 5, dtype=torch.bool)
    routing = switch(scores(1, 5, 4), text=text, capacity=2)
    assert balance_loss(routing) == 0 and z_loss(routing) == 0 and routing.dropped == 0


# --- drops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "factor", "expected"),
    [
        (64, 1.0, 0.127),
        (256, 1.0, 0.068),
        (1024, 1.0, 0.034),
        (64, 1.25, 0.047),
        (256, 1.25, 0.0054),
    ],
)
def test_what_a_fair_router_drops(tokens, factor, expected):
    seats = expert_capacity(tokens, 8, factor)
    found = expected_drops(tokens, 8, seats)
    assert found == pytest.approx(expected, rel=0.1)
    if factor == 1:
        assert approximate_drops(tokens, 8) == pytest.approx(found, rel=0.06)
    draws = torch.randint(8, (400, tokens), generator=torch.Generator().manual_seed(0))
    counts = torch.nn.functional.one_hot(draws, 8).sum(1)
    each = (counts - seats).clamp(min=0).sum(1) / tokens
    assert abs(float(each.mean()) - found) < 4 * float(each.std()) / 20


def test_drops_at_the_ends():
    assert expected_drops(16, 4, 16) == 0
    assert expected_drops(10, 1, 4) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="0 seats; all must be at least 1"):
        expected_drops(16, 4, 0)


@examples(max_examples=30, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 6), st.integers(1, 6), st.integers(1, 30), st.integers(0, 9)
)
def test_no_expert_has_more_than_its_seats(time, count, k, seats, seed):
    k = min(k, count)
    routing = top_k(scores(2, time, count, seed=seed), k, capacity=seats)
    group = routing.tokens // time
    for g in range(2):
        mine = routing.kept & (group == g)
        assert int(routing.experts[mine].bincount(minlength=count).max()) <= seats
    assert int(routing.wanted.sum()) == 2 * time * k
    if seats >= time:
        assert routing.dropped == 0
    sums = torch.zeros(2 * time, dtype=torch.float64).index_add(0, routing.tokens, routing.gates)
    torch.testing.assert_close(sums, torch.ones(2 * time, dtype=torch.float64))
    chosen, gates = routing.table()
    assert torch.equal(
        chosen[chosen < count].sort().values, routing.experts[routing.kept].sort().values
    )
    torch.testing.assert_close(gates.sum(), routing.gates[routing.kept].sum())


# --- expert choice and entmax ---------------------------------------------------------------------


def test_every_expert_takes_exactly_its_share():
    routing = expert_choice(scores(3, 20, 5), 4)
    assert routing.load.tolist() == [12] * 5
    many = routing.experts_of_token
    assert int(many.min()) == 0 and int(many.max()) > 1 and float(many.float().mean()) == 1


def test_expert_choice_sees_the_future_and_top_k_does_not():
    assert leak_rate(12, 3, 4, trials=2000) == pytest.approx(0.71, abs=0.05)
    assert leak_rate(8, 4, 8) == 0  # room for all: no token is pushed out
    logits = scores(1, 12, 3)
    changed = logits.clone()
    changed[0, -1] += 5
    before, after = (switch(x).experts[:-1] for x in (logits, changed))
    assert torch.equal(before, after)


def test_entmax_takes_as_many_experts_as_the_scores_ask_for():
    logits = torch.tensor([[[9.0, 0, 0, 0], [1.0, 1.0, 1.0, 1.0]]])
    routing = entmax_routing(logits)
    assert routing.experts_of_token.tolist() == [[1, 4]]
    assert routing.gates.tolist() == pytest.approx([1, 0.25, 0.25, 0.25, 0.25])


# --- gradients and noise --------------------------------------------------------------------------


def test_a_normalized_single_gate_has_no_gradient():
    logits = scores(1, 6, 4).requires_grad_()
    (alive,) = torch.autograd.grad(switch(logits).gates.sum(), logits)
    (dead,) = torch.autograd.grad(top_k(logits, 1).gates.sum(), logits)
    assert bool(alive.any()) and dead.abs().max() < 1e-12


def test_jitter_multiplies_within_its_bounds():
    torch.manual_seed(0)
    noisy = jitter(torch.ones(1000), 0.1)
    assert 0.9 <= float(noisy.min()) < 0.92 and 1.08 < float(noisy.max()) <= 1.1
    assert jitter(noisy, 0.0) is noisy


# --- bad input ------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(unchecked):
    logits = scores(1, 8, 4)
    with pytest.raises(ValueError, match="k is 5; with 4 experts a token can choose from 1 to 4"):
        top_k(logits, 5)
    with pytest.raises(ValueError, match="k is 2; with 1 expert a token"):
        glam(logits[..., :1])
    with pytest.raises(ValueError, match=r"leave 0.5 of a token for each expert; .* factor of 2"):
        expert_capacity(4, 8, 1.0)
    with pytest.raises(ValueError, match="the capacity factor is 0; it must be above 0"):
        expert_capacity(8, 4, 0)
    with pytest.raises(ValueError, match="the capacity is 0 tokens; of a group of 8"):
        expert_choice(logits, 0)
    with pytest.raises(ValueError, match="alpha is 1; it must be above 1"):
        entmax_routing(logits, alpha=1)
    with pytest.raises(ValueError, match=r"the scores have shape \(8, 4\)"):
        switch(logits[0])
    with pytest.raises(ValueError, match=r"the mask has shape \(1, 7\)"):
        switch(logits, text=torch.ones(1, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="the jitter is 1; it must lie from 0 to below 1"):
        jitter(logits, 1)
    with pytest.raises(ValueError, match=r"the draws have shape \(8,\)"):
        gshard(logits, draws=torch.rand(8))
    with pytest.raises(ValueError, match="there are 0 tokens"):
        leak_rate(0, 3, 4)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("capacity", [None, 4])
def test_a_table_that_is_in_order_is_that_of_sorting(k, capacity):
    """Choices that every token has as many of need no sort; places without a seat stay open."""
    text = torch.ones(3, 10, dtype=torch.bool)
    text[1, 6:] = False
    routing = top_k(scores(3, 10, 5), k, text=text, capacity=capacity)
    assert routing.choices == k
    found, gates = routing.table()
    sorted_ones, sorted_gates = dataclasses.replace(routing, choices=None).table()
    assert found.shape == gates.shape == (30, k) and sorted_ones.shape[0] == 30
    for token in range(30):
        mine, theirs = (
            {e: g for e, g in zip(a[token].tolist(), b[token].tolist(), strict=True) if e < 5}
            for a, b in ((found, gates), (sorted_ones, sorted_gates))
        )
        assert mine == theirs
    assert not bool(gates[found == 5].any())
    assert bool((found == 5).any()) and bool((found[text.flatten()] < 5).any())
