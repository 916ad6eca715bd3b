"""RetNet's layer, by its equation; what its norm and gate do; the trap of normalized scores."""

import importlib
from dataclasses import replace

import pytest
import torch

from effnb.design.retention import (
    Call,
    MultiScaleRetention,
    RetNetBlock,
    RetNetConfig,
    RetNetLM,
    decays,
    rotation_frequencies,
)

FORMS = RetNetLM.forms


def layer_and_input(seed=0, tokens=9, **settings):
    torch.manual_seed(seed)
    options = dict(hidden=12, layers=1, feed_forward=24, heads=3, chunk_size=4)
    config = RetNetConfig(**(options | settings))
    layer = MultiScaleRetention(config).double()
    x = torch.randn(2, tokens, config.hidden, dtype=torch.float64)
    return layer, x, layer.initial_state(torch.zeros(2, dtype=torch.float64))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_layer_has_8_and_the_block_12_squares_of_the_width():
    config = RetNetConfig(hidden=16, layers=1, feed_forward=32, heads=2)
    assert count(MultiScaleRetention(config)) == 8 * 16**2
    assert count(RetNetBlock(config)) == 12 * 16**2 + 4 * 16 == config.block_parameters


def test_the_layer_is_its_equation():
    layer, x, state = layer_and_input()
    W = {name: p.detach() for name, p in layer.named_parameters()}
    theta, gamma = rotation_frequencies(4), decays(3)
    heads = []
    for h in range(3):
        q, k = (
            torch.view_as_complex(
                (x @ W[f"{name}.weight"].T)[..., 4 * h : 4 * h + 4].unflatten(-1, (2, 2))
            )
            * torch.exp(1j * torch.arange(9)[:, None] * theta)
            for name in ("query", "key")
        )
        v = (x @ W["value.weight"].T)[..., 8 * h : 8 * h + 8]
        scores = (q @ k.mT.conj()).real / 2  # 1 / sqrt(d_k)
        distance = torch.arange(9)[:, None] - torch.arange(9)
        out = (scores * gamma[h] ** distance.clamp(min=0)).tril() @ v
        centred = out - out.mean(-1, keepdim=True)
        heads.append(centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    gate = x @ W["gate.weight"].T
    expected = (gate * gate.sigmoid() * torch.cat(heads, -1)) @ W["output.weight"].T
    for form in FORMS:
        found, _ = layer(x, state, Call(form))
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("head_norm", ["group", "rms"])
def test_each_head_is_normalized_by_itself(head_norm):
    """A head whose values are ten times as large weighs no more than before."""
    layer, x, state = layer_and_input(head_norm=head_norm, norm_epsilon=0.0)
    before, _ = layer(x, state, Call("parallel"))
    with torch.no_grad():
        layer.value.weight[:8] *= 10
    after, _ = layer(x, state, Call("parallel"))
    torch.testing.assert_close(after, before, atol=1e-10, rtol=0)
    layer, x, state = layer_and_input(head_norm="none")
    before, _ = layer(x, state, Call("parallel"))
    with torch.no_grad():
        layer.value.weight[:8] *= 10
    assert (layer(x, state, Call("parallel"))[0] - before).abs().max() > 0.1 * before.abs().max()


def test_outputs_of_heads_have_mean_0_and_variance_1():
    layer, *_ = layer_and_input(norm_epsilon=0.0)
    out = layer.norm_heads(3 + 5 * torch.randn(2, 3, 9, 8, dtype=torch.float64))
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 3, 9).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(out.var(-1, correction=0), torch.ones(2, 3, 9).double())


@pytest.mark.parametrize(
    "settings",
    [
        dict(decay="lm"),
        dict(decay=1.0),
        dict(decay=127 / 128),
        dict(rotation="rope"),
        dict(rotation="none"),
        dict(gate=False),
        dict(head_norm="rms"),
        dict(head_norm="none"),
        dict(value_factor=1),
    ],
    ids=str,
)
def test_ablations_change_the_layer_and_keep_its_forms_equal(settings):
    layer, x, state = layer_and_input(**settings)
    found = [layer(x, state, Call(form))[0] for form in FORMS]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-10, rtol=0)
    whole, *_ = layer_and_input()
    assert (whole(x, whole.initial_state(torch.zeros(2).double()), Call("parallel"))[0]
            - found[0]).abs().max() > 1e-6  # fmt: skip


def spread(norm, epsilon, scale=1.0):
    """Size of the outputs at the initial weights, and how far the other forms are from parallel."""
    torch.manual_seed(0)
    config = RetNetConfig(
        hidden=64,
        layers=1,
        feed_forward=64,
        chunk_size=16,
        head_norm=norm,
        norm_epsilon=epsilon,
        normalize="paper",
    )
    layer = MultiScaleRetention(config)
    x, state = scale * torch.randn(2, 64, 64), layer.initial_state(torch.zeros(2))
    with torch.no_grad():
        out = {form: layer(x, state, Call(form))[0] for form in FORMS}
    size = float(out["parallel"].std())
    return [size] + [
        float((out[form] - out["parallel"]).abs().max()) / size
        for form in ("recurrent", "chunkwise")
    ]


@pytest.mark.parametrize("norm", ["group", "rms"])
def test_with_normalized_scores_the_epsilon_makes_the_chunkwise_form_another_function(norm):
    size, recurrent, chunkwise = spread(norm, 1e-6)
    assert 0.01 < size < 0.2
    assert recurrent < 1e-5
    assert chunkwise > 0.1  # of the outputs' size
    for other in (spread(norm, 1e-30), spread(norm, 1e-6, scale=30)):
        assert max(other[1:]) < 2e-5


def test_without_them_the_forms_agree_at_the_initial_weights():
    torch.manual_seed(0)
    layer = MultiScaleRetention(RetNetConfig(hidden=64, layers=1, feed_forward=64, chunk_size=16))
    x, state = torch.randn(2, 64, 64), layer.initial_state(torch.zeros(2))
    with torch.no_grad():
        found = [layer(x, state, Call(form))[0] for form in FORMS]
    assert max(float((other - found[0]).abs().max()) for other in found) < 1e-5


def test_the_size_of_a_chunk_is_the_kernels_own_choice_and_changes_no_result():
    torch.manual_seed(0)
    config = RetNetConfig(hidden=64, layers=1, feed_forward=64)
    assert config.chunk_size is None
    layer = MultiScaleRetention(config)
    x, state = torch.randn(2, 150, 64), layer.initial_state(torch.zeros(2))
    found = {}
    for size in (None, 64, 128):
        layer.config = replace(config, chunk_size=size)
        with torch.no_grad():
            found[size] = layer(x, state, Call("chunkwise"))[0]
    assert torch.equal(found[None], found[64]), "the choice for 32 bits, as before"
    assert float((found[None] - found[128]).abs().max()) < 1e-5
    normal = replace(config, normalize="paper")
    for size in (None, 64):
        layer.config = replace(normal, chunk_size=size)
        with torch.no_grad():
            found[size] = layer(x, state, Call("chunkwise"))[0]
    assert torch.equal(found[None], found[64]), "chunks with factors of their own stay as they were"


def test_sixteen_bits_get_the_chunks_that_the_kernel_is_fastest_with(monkeypatch):
    kernel = importlib.import_module("effnb.kernels.retention")
    seen, plain = [], kernel.retention_chunkwise

    def remembered(*inputs, chunk_size, **options):
        seen.append(chunk_size)
        return plain(*inputs, chunk_size=chunk_size, **options)

    monkeypatch.setattr(kernel, "retention_chunkwise", remembered)
    layer = MultiScaleRetention(RetNetConfig(hidden=64, layers=1, feed_forward=64))
    for kind in (torch.float32, torch.bfloat16):
        layer, x = layer.to(kind), torch.randn(1, 9, 64).to(kind)
        with torch.no_grad():
            layer(x, layer.initial_state(torch.zeros(1)), Call("chunkwise"))
    assert seen == [64, 128]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(heads=5), "multiple"),
        (dict(heads=0), "multiple"),
        (dict(heads=4), "3 numbers.*even"),
        (dict(decay="half"), "choose"),
        (dict(decay=0.0), "above 0"),
        (dict(rotation="xpos"), '"retnet" or "rope"'),
        (dict(chunk_size=0), "at least 1"),
        (dict(value_factor=0), "at least 1"),
        (dict(head_norm="layer"), "choose group, rms, none"),
        (dict(norm_epsilon=-1.0), "at least 0"),
        (dict(normalize="rows"), "choose"),
        (dict(layers=0), "layers is 0"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(ValueError, match=said):
        RetNetConfig(**(dict(hidden=12, layers=1, feed_forward=8, heads=2) | settings))
