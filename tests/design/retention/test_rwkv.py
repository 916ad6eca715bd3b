"""RWKV-4's layers by their equations, its initial values, and its state of five vectors."""

import math

import pytest
import torch

from effnb.design.retention import RWKVLM, Call, ChannelMix, RWKVConfig, TimeMix, initial_mix
from effnb.design.retention.rwkv import RWKVBlock
from effnb.design.retention.wkv import wkv


def random_weights(module):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:  # most start at 0
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
    return module.double()


CONFIG = RWKVConfig(hidden=6, layers=3, feed_forward=10, vocabulary=20)


def state_and_input(tokens=5):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, tokens, 6, generator=generator, dtype=torch.float64)
    state = RWKVBlock(CONFIG, 1).initial_state(torch.zeros(2, dtype=torch.float64))
    return x, state


def mixed(x, mu):
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    return mu * x + (1 - mu) * before


@pytest.mark.parametrize("form", RWKVLM.forms)
def test_the_time_mix_is_its_equation(form):
    layer = random_weights(TimeMix(CONFIG, 1))
    x, state = state_and_input()
    k, v, r = (
        mixed(x, mu) @ projection.weight.T
        for mu, projection in (
            (layer.mix_key, layer.key),
            (layer.mix_value, layer.value),
            (layer.mix_receptance, layer.receptance),
        )
    )
    averages = wkv(layer.time_decay.exp(), layer.time_first, k, v)[0]
    found, after = layer(x, state, Call(form))
    expected = (averages / (1 + torch.exp(-r))) @ layer.output.weight.T
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(after["time_shift"], x[:, -1])


def test_the_channel_mix_is_its_equation():
    layer = random_weights(ChannelMix(CONFIG, 1))
    x, state = state_and_input()
    k = mixed(x, layer.mix_key) @ layer.key.weight.T
    r = mixed(x, layer.mix_receptance) @ layer.receptance.weight.T
    expected = ((k * (k > 0)) ** 2 @ layer.value.weight.T) / (1 + torch.exp(-r))
    found, after = layer(x, state, Call("parallel"))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(after["channel_shift"], x[:, -1])


def test_initial_values_of_the_published_code():
    first, middle, last = (initial_mix(5, layer, 3) for layer in range(3))
    c = torch.arange(5)
    expected = -5 + 8 * (c / 4) ** 0.7
    torch.testing.assert_close(first["decay"], expected)
    torch.testing.assert_close(last["decay"], -5 + 8 * (c / 4) ** 2.0)
    assert {x["decay"][0].item() for x in (first, middle, last)} == {-5}
    assert {x["decay"][-1].item() for x in (first, middle, last)} == {3}
    # transformers sets every bonus to 1; the zigzag is around ln 0.3
    zigzag = torch.tensor([0.0, 0.5, -0.5, 0.0, 0.5])
    for x in (first, middle, last):
        torch.testing.assert_close(x["first"], math.log(0.3) + zigzag)
    torch.testing.assert_close(first["key"], c / 5)
    torch.testing.assert_close(middle["key"], (c / 5) ** (2 / 3))
    torch.testing.assert_close(middle["value"], middle["key"] + 0.15)
    torch.testing.assert_close(last["receptance"], (c / 5) ** (1 / 6))


def test_a_single_layer_has_initial_values():
    assert all(x.isfinite().all() for x in initial_mix(4, 0, 1).values())
    assert all(x.isfinite().all() for x in initial_mix(1, 0, 1).values())


def test_a_new_model_has_these_values_and_starts_as_its_embedding():
    model = RWKVLM(CONFIG)
    mix = model.blocks[2].time_mix
    torch.testing.assert_close(mix.time_first.data, initial_mix(6, 2, 3)["first"])
    torch.testing.assert_close(mix.time_decay.data, initial_mix(6, 2, 3)["decay"])
    ids = torch.arange(20)[None]
    embedded = model.norm(model.blocks[0].norm0(model.embedding(ids)))
    torch.testing.assert_close(model.hidden(ids), embedded)  # both outputs start at 0


def test_the_state_has_five_vectors_a_layer_in_float32():
    model = RWKVLM(CONFIG).to(torch.bfloat16)
    _, state = model.advance(torch.arange(7)[None])
    assert state.bytes == 3 * 5 * 6 * 4
    assert {len(layer) for layer in state.layers} == {5}
    assert {t.dtype for layer in state.layers for t in layer.values()} == {torch.float32}
