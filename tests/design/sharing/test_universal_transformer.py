"""One block, any number of steps; halting by the definition, position by position."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effnb.design.sharing import (
    UniversalConfig,
    UniversalTransformer,
    adaptive_computation_time,
    coordinates,
    sinusoid,
)

SIZES = dict(hidden=8, heads=2, feed_forward=12, vocabulary=11, steps=3)


def model_of(seed=0, **changes):
    torch.manual_seed(seed)
    model = UniversalTransformer(UniversalConfig(**(SIZES | changes))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ids_of(rows=2, time=5, seed=0):
    return torch.randint(0, 11, (rows, time), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------ halting


def by_definition(p, epsilon, max_steps):
    """Weights, steps and remainder of one position from its probabilities, in plain Python."""
    weights, total = [], 0.0
    for n, one in enumerate(p, 1):
        if total + one >= 1 - epsilon or n == max_steps:
            return [*weights, 1 - total], n, 1 - total
        weights.append(one)
        total += one
    raise AssertionError


@given(
    p=st.lists(st.lists(st.floats(0.001, 0.999), min_size=6, max_size=6), min_size=1, max_size=4),
    epsilon=st.floats(0.001, 0.5),
    max_steps=st.integers(1, 6),
)
def test_weights_steps_and_remainder_are_those_of_the_definition(p, epsilon, max_steps):
    probabilities = torch.tensor(p, dtype=torch.float64)[None]  # (1, time, steps)
    states = torch.randn(
        6, 1, len(p), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    calls = []

    def step(state, s):
        calls.append(s)
        return states[s]

    found = adaptive_computation_time(
        torch.zeros(1, len(p), 3, dtype=torch.float64),
        step,
        lambda state: probabilities[..., calls[-1]],
        max_steps=max_steps,
        epsilon=epsilon,
    )
    assert calls == list(range(int(found.steps.max())))  # it stops when all have halted
    assert int(found.steps.min()) >= 1
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(1, len(p)).double())
    for t, row in enumerate(p):
        weights, n, remainder = by_definition(row, epsilon, max_steps)
        assert int(found.steps[0, t]) == n
        assert float(found.remainder[0, t]) == pytest.approx(remainder)
        assert found.weights[0, t, :n].tolist() == pytest.approx(weights)
        assert not found.weights[0, t, n:].any()
        expected = sum(w * states[s, 0, t] for s, w in enumerate(weights))
        torch.testing.assert_close(found.output[0, t], expected)
        assert float(found.ponder_cost[0, t]) == pytest.approx(n + remainder)


def test_halting_at_once_is_one_step():
    model = model_of(halting=True)
    with torch.no_grad():
        model.halt.weight.zero_()
        model.halt.bias.fill_(20)
    ids = ids_of()
    found = model(ids)
    plain = model_of()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "halt" not in k})
    assert found.halting.steps.eq(1).all() and found.halting.weights.eq(1).all()
    torch.testing.assert_close(found.logits, plain(ids, steps=1).logits, atol=1e-12, rtol=0)


def test_never_halting_is_the_mean_that_the_rest_goes_last_in():
    model = model_of(halting=True, steps=4)
    with torch.no_grad():
        model.halt.weight.zero_()
        model.halt.bias.fill_(-30)
    found = model(ids_of())
    assert found.halting.steps.eq(4).all()
    plain = model_of()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "halt" not in k})
    expected = plain(ids_of(), steps=4).logits
    torch.testing.assert_close(found.logits, expected, atol=1e-9, rtol=0)


def test_halted_positions_are_copied_and_still_read():
    seen = []

    def step(state, s):
        seen.append(state.clone())
        return state + 1

    p = torch.tensor([[[1.0, 0.3, 0.0], [1.0, 0.3, 0.0], [1.0, 0.4, 0.0]]])  # (steps, time)
    calls = iter(range(3))
    adaptive_computation_time(torch.zeros(1, 3, 2), step, lambda _: p[:, next(calls)], max_steps=3)
    assert seen[1][0, :, 0].tolist() == [1, 1, 1]
    assert seen[2][0, :, 0].tolist() == [1, 2, 2]  # the first one had halted


def test_the_ponder_cost_trains_the_halting_layer():
    model = model_of(halting=True, steps=6)
    with torch.no_grad():
        model.halt.bias.fill_(-1)
    found = model(ids_of())
    assert found.halting.steps.min() > 1
    found.halting.ponder_cost.mean().backward()
    assert model.halt.bias.grad.abs() > 0 and model.halt.weight.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------- the model


def test_a_step_is_its_equation():
    model, x = model_of(), torch.randn(2, 5, 8, dtype=torch.float64)
    block, attention = model.block, model.block.attention
    h = x + coordinates(x, 1)
    q, k, v = (
        (h @ layer.weight.T + layer.bias).unflatten(-1, (2, 4)).transpose(1, 2)
        for layer in (attention.query, attention.key, attention.value)
    )
    heads = ((q @ k.mT) / 2).softmax(-1) @ v
    out = attention.output(heads.transpose(1, 2).flatten(2))
    a = block.attention_norm(h + out)
    expected = block.norm(a + block.transition(a))
    torch.testing.assert_close(model.step(x, 1), expected, atol=1e-12, rtol=0)


def test_coordinates_say_position_and_step():
    x = torch.zeros(1, 4, 8)
    found = coordinates(x, 2)
    assert found.shape == (4, 8)
    positions = sinusoid(torch.arange(4), 8)
    torch.testing.assert_close(found - coordinates(x, 0),
                               (sinusoid(torch.tensor([3]), 8) - sinusoid(torch.tensor([1]), 8))
                               .expand(4, 8), atol=1e-6, rtol=0)  # fmt: skip
    angle = torch.tensor(2 * 10000 ** (-2 / 8))
    assert float(positions[2, 2]) == pytest.approx(float(angle.sin()), abs=1e-6)
    assert float(positions[2, 3]) == pytest.approx(float(angle.cos()), abs=1e-6)


@pytest.mark.parametrize("halting", [False, True])
def test_parameters_do_not_grow_with_steps(halting):
    counts = {
        sum(p.numel() for p in model_of(steps=steps, halting=halting).parameters())
        for steps in (1, 3, 9)
    }
    assert counts == {UniversalConfig(**SIZES, halting=halting).parameters}


@pytest.mark.parametrize("halting", [False, True])
def test_what_a_position_depends_on(halting):
    ids = ids_of(1, 5)
    for causal in (False, True):
        model = model_of(causal=causal, halting=halting)
        other = ids.clone()
        other[0, 3] = (other[0, 3] + 1) % 11
        moved = (model(ids).hidden - model(other).hidden).abs().amax(-1)[0] > 1e-9
        assert moved.tolist() == ([False] * 3 + [True] * 2 if causal else [True] * 5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("halting", [False, True])
def test_padding_is_not_read(causal, halting):
    model = model_of(causal=causal, halting=halting)
    ids = ids_of(2, 5)
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    other = ids.clone()
    other[1, 3:] = 0
    found, again = model(ids, mask=mask).logits, model(other, mask=mask).logits
    torch.testing.assert_close(found[1, :3], again[1, :3], atol=1e-12, rtol=0)
    alone = model(ids[1:, :3]).logits[0]
    torch.testing.assert_close(found[1, :3], alone, atol=1e-12, rtol=0)


def test_more_steps_than_trained_can_be_asked_for():
    model, ids = model_of(), ids_of()
    assert torch.equal(model(ids, steps=3).logits, model(ids).logits)
    assert not torch.allclose(model(ids, steps=7).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(steps=0), "steps is 0"),
        (dict(heads=3), "multiple of the number of heads"),
        (dict(hidden=7, heads=1), "hidden is 7"),
        (dict(vocabulary=0), "vocabulary is 0"),
        (dict(epsilon=0.0), "epsilon is 0.0"),
        (dict(epsilon=1.0), "epsilon is 1.0"),
    ],
)
def test_settings_that_cannot_be(changes, said):
    with pytest.raises(ValueError, match=said):
        UniversalConfig(**(SIZES | changes))


def test_input_that_cannot_be():
    model, ids = model_of(), ids_of()
    with pytest.raises(ValueError, match="steps is 0"):
        model(ids, steps=0)
    with pytest.raises(ValueError, match="the ids reach from"):
        model(ids + 11)
    with pytest.raises(ValueError, match="at least one of them"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="the mask has shape"):
        model(ids, mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="has no text"):
        model(ids, mask=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="max_steps is 0"):
        adaptive_computation_time(
            torch.zeros(1, 1, 1), lambda x, s: x, lambda x: x[..., 0], max_steps=0
        )
