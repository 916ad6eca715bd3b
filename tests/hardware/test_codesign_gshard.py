"""GShard's layer of experts: against a loop over tokens, however it is spread."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.hardware.codesign import gshard
from effnb.hardware.codesign.gshard import Experts, dense_loop, moe_layer, route


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def in_one_process(x, experts, slots, devices):
    """All devices in lockstep: each runs until its exchange, where the parts change hands."""
    import threading

    share = len(x) // devices
    barrier = threading.Barrier(devices)
    table, results, sent = [None] * devices, [None] * devices, [0] * devices

    def work(device):
        def exchange(parts):
            table[device] = parts
            sent[device] += parts.nbytes - parts[device].nbytes
            barrier.wait(10)
            received = torch.stack([table[other][device] for other in range(devices)])
            barrier.wait(10)
            return received

        mine = x[device * share : (device + 1) * share]
        results[device] = moe_layer(
            mine, experts.part(device, devices), slots, devices=devices, exchange=exchange
        )

    threads = [threading.Thread(target=work, args=(d,)) for d in range(devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat([out for out, _ in results]), [r for _, r in results], sent


@settings(max_examples=12)
@given(
    devices=st.sampled_from([1, 2, 4]),
    each=st.integers(1, 3),
    groups=st.integers(1, 2),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_with_room_for_all_any_sharding_is_the_loop_over_tokens(
    devices, each, groups, tokens, seed
):
    experts = Experts.random(max(2, devices * each), 6, 10, seed=seed, dtype=torch.float64)
    if len(experts.up) % devices:
        return
    x = randn(devices * groups, tokens, 6, seed=seed + 1, dtype=torch.float64)
    found, _, _ = in_one_process(x, experts, tokens, devices)
    expected = dense_loop(x.flatten(0, 1), experts).view_as(x)
    # Gates are computed in float32, as everywhere.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_dropping_does_not_depend_on_the_devices():
    """Capacity counts within a group, so that where a group lies makes no difference."""
    experts = Experts.random(8, 16, 32)
    x = randn(4, 24, 16, seed=3)
    one, routing, _ = in_one_process(x, experts, 4, 1)
    assert routing[0].dropped_choices > 0
    for devices in (2, 4):
        spread, parts, _ = in_one_process(x, experts, 4, devices)
        torch.testing.assert_close(spread, one, rtol=1e-5, atol=1e-6)
        assert sum(r.dropped_choices for r in parts) == routing[0].dropped_choices
        assert sum(r.lost_tokens for r in parts) == routing[0].lost_tokens


@pytest.mark.parametrize("devices", [2, 4])
def test_the_bytes_are_those_of_the_formula(devices):
    experts = Experts.random(8, 16, 32)
    x = randn(8, 24, 16)
    slots = gshard.capacity(24, 8)
    _, _, sent = in_one_process(x, experts, slots, devices)
    expected = gshard.exchange_bytes(8 // devices, slots, 8, 16, devices)
    assert sent == [2 * expected] * devices  # there and back
    tokens = 8 // devices * 24
    # With a factor of 1 and a whole number of slots: tokens x k x d x b x (D - 1) / D.
    assert expected == tokens * 2 * 16 * 4 * (devices - 1) / devices


def test_an_all_to_all_twice_is_where_one_began():
    parts = randn(3, 3, 2)  # device, part for device, numbers
    assert torch.equal(parts.transpose(0, 1).transpose(0, 1), parts)
    received = parts.transpose(0, 1)
    assert torch.equal(received[1, 2], parts[2, 1])


def test_the_two_gates_are_divided_by_their_sum():
    logits = torch.tensor([[[2.0, 1.0, -1.0]]])
    routing = route(logits, 1)
    gates = logits.softmax(-1)[0, 0]
    share = gates[:2] / gates[:2].sum()
    torch.testing.assert_close(routing.combine[0, 0, :, 0], torch.tensor([*share, 0.0]))
    assert routing.load == (1, 0, 0)


def test_places_are_taken_in_order_and_first_choices_before_second():
    # All three tokens prefer expert 0; the second choice is expert 1 for all.
    logits = torch.tensor([[[3.0, 1, -9], [3, 1, -9], [3, 1, -9]]])
    routing = route(logits, 2)
    assert routing.dispatch[0, :, 0].int().tolist() == [[1, 0], [0, 1], [0, 0]]
    assert routing.dispatch[0, :, 1].int().tolist() == [[1, 0], [0, 1], [0, 0]]
    assert (routing.dropped_choices, routing.lost_tokens) == (2, 1)
    # Token 0 wants (0, 1), tokens 1 and 2 want (1, 0): the first choices of 1 fill it.
    logits = torch.tensor([[[3.0, 1, -9], [1, 3, -9], [1, 3, -9]]])
    routing = route(logits, 2)
    assert routing.dispatch[0, :, 1].int().tolist() == [[0, 0], [1, 0], [0, 1]]
    assert routing.dispatch[0, :, 0].int().tolist() == [[1, 0], [0, 1], [0, 0]]
    assert (routing.dropped_choices, routing.lost_tokens) == (2, 0)


@settings(max_examples=25)
@given(
    groups=st.integers(1, 3),
    tokens=st.integers(1, 12),
    experts=st.integers(2, 6),
    slots=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_no_seat_is_taken_twice(groups, tokens, experts, slots, seed):
    routing = route(randn(groups, tokens, experts, seed=seed), slots)
    taken = routing.dispatch.int()
    assert taken.sum(1).max() <= 1, "one token for a seat"
    assert taken.sum((2, 3)).max() <= 2, "two experts for a token"
    filled = taken.sum(1)  # seats are filled from the first on
    assert not (filled.diff(dim=-1) > 0).any()
    assert int(taken.sum()) + routing.dropped_choices == 2 * groups * tokens
    assert int((taken.sum((2, 3)) == 0).sum()) == routing.lost_tokens
    assert sum(routing.load) == groups * tokens
    weights, both = routing.combine.sum((2, 3)), taken.sum((2, 3)) == 2
    torch.testing.assert_close(weights[both], torch.ones_like(weights[both]))
    if slots >= tokens:
        assert routing.dropped_choices == 0


def test_a_full_place_in_one_group_is_free_in_another():
    logits = torch.tensor([[[3.0, 1, -9]], [[3.0, 1, -9]]])
    assert route(logits, 1).dropped_choices == 0
    assert route(logits.view(1, 2, 3), 1).dropped_choices == 2


def test_the_auxiliary_loss_by_hand():
    balanced = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]])
    assert route(balanced, 4).auxiliary_loss.item() == pytest.approx(1 / 16)
    logits = randn(2, 5, 4)
    gates = logits.softmax(-1)
    expected = 0.0
    for group in gates:
        first = group.argmax(-1)
        expected += sum(
            (first == e).float().mean().item() * group[:, e].mean().item() for e in range(4)
        )
    assert route(logits, 5).auxiliary_loss.item() == pytest.approx(expected / 2 / 4, rel=1e-5)
    crowded = torch.tensor([[[9.0, 0, 0, 0]] * 4])
    assert route(crowded, 4).auxiliary_loss > route(balanced, 4).auxiliary_loss * 3


def test_second_choices_are_kept_in_proportion_to_their_gate():
    logits = torch.tensor([0.0, -math.log(3.0), -99]).expand(1, 900, 3)  # gates 3/4 and 1/4
    draws = torch.rand(1, 900, generator=torch.Generator().manual_seed(0))
    routing = route(logits, 900, draws=draws)
    assert routing.skipped_seconds / 900 == pytest.approx(0.5, abs=0.05)  # min(1, 2/4)
    assert route(logits, 900).skipped_seconds == 0
    assert route(logits, 900, draws=torch.zeros(1, 900)).skipped_seconds == 0
    assert routing.dropped_choices == 0


def test_dropped_tokens_come_out_as_zero():
    experts = Experts.random(2, 4, 8)
    x = randn(1, 1, 4).expand(1, 5, 4)
    out, routing = moe_layer(x, experts, 2)
    assert routing.lost_tokens == 3
    assert not out[0, 2:].any()
    torch.testing.assert_close(out[0, :2], dense_loop(x[0, :2], experts), rtol=1e-5, atol=1e-6)


def test_gradients_reach_router_and_experts():
    experts = Experts.random(4, 6, 8, dtype=torch.float64)
    parts = [t.requires_grad_() for t in (experts.router, experts.up, experts.down)]
    x = randn(2, 7, 6, dtype=torch.float64)
    out, routing = moe_layer(x, experts, 7)
    (out.square().sum() + routing.auxiliary_loss).backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in parts)


def test_capacity_and_operations():
    assert gshard.capacity(64, 8) == 16
    assert gshard.capacity(64, 8, 1.25) == 20
    assert gshard.capacity(10, 8) == 3
    assert gshard.capacity(3, 2, 9.0) == 3, "no more than there are tokens"
    # One product up and one down, for all slots of all experts.
    up, down = randn(8, 16, 32), randn(8, 32, 16)
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        gshard.run_experts(randn(8, 4 * 16, 16), up, down)
    assert gshard.expert_operations(4, 16, 8, 16, 32) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: route(randn(1, 4, 1), 2), "1 experts of 2 slots"),
        (lambda: route(randn(1, 4, 3), 0), "3 experts of 0 slots"),
        (lambda: gshard.capacity(4, 1), "4 tokens and 1 experts"),
        (lambda: gshard.capacity(4, 2, 0.0), "capacity factor is 0.0"),
        (lambda: Experts.random(6, 4, 8).part(0, 4), "6 experts cannot be shared equally by 4"),
        (
            lambda: moe_layer(randn(1, 4, 4), Experts.random(2, 4, 8), 2, devices=2),
            "give an exchange",
        ),
    ],
)
def test_bad_input_gets_a_sentence(call, said):
    with pytest.raises(ValueError, match=said):
        call()
