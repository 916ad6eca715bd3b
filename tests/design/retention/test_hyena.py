"""Hyena: convolutions by FFT against their matrices, implicit filters, the operator by hand."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.design.retention import Call, HyenaConfig, HyenaLM, HyenaOperator
from effnb.design.retention.long_convolution import (
    ImplicitFilter,
    fft_convolution,
    last_outputs,
    time_features,
    toeplitz,
    toeplitz_convolution,
)


def inputs(tokens=12, batch=2, dim=3, dtype=torch.float64, longer=0):
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(batch, tokens, dim, generator=generator, dtype=torch.float64)
    h = torch.randn(tokens + longer, dim, generator=generator, dtype=torch.float64)
    return u.to(dtype), h.to(dtype)


# ---------------------------------------------------------------- convolutions


def test_a_toeplitz_matrix():
    h = torch.tensor([[1.0], [2.0], [3.0], [9.0]])
    assert toeplitz(h, 3).tolist() == [[[1, 0, 0], [2, 1, 0], [3, 2, 1]]]


@settings(max_examples=15)
@given(tokens=st.integers(1, 20), longer=st.integers(0, 5))
def test_the_fft_is_the_toeplitz_product(tokens, longer):
    u, h = inputs(tokens, longer=longer)
    found = []
    for convolution in (fft_convolution, toeplitz_convolution):
        leaves = u.clone().requires_grad_(), h.clone().requires_grad_()
        out = convolution(*leaves)
        found.append([out, *torch.autograd.grad((out * out).sum(), leaves)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_in_float32_it_is_within_rounding_and_without_padding_it_wraps_around():
    u, h = inputs(256, dtype=torch.float32)
    exact = toeplitz_convolution(u, h)
    assert (fft_convolution(u, h) - exact).abs().max() < 2e-5 * exact.abs().max()
    wrapped = torch.fft.irfft(torch.fft.rfft(u, dim=1) * torch.fft.rfft(h, dim=0), 256, dim=1)
    assert (wrapped - exact).abs().max() > 0.5 * exact.abs().max()


@pytest.mark.parametrize("convolution", [fft_convolution, toeplitz_convolution])
def test_a_convolution_sees_the_past_only_and_moves_with_its_input(convolution):
    u, h = inputs(9)
    out = convolution(u.requires_grad_(), h)
    (gradient,) = torch.autograd.grad((out[:, 5] * torch.arange(1, 4)).sum(), u)
    seen = gradient.abs().sum((0, 2))
    assert bool((seen[:6] > 1e-3).all())
    assert bool((seen[6:] < 1e-13).all())  # an FFT's zeros are rounded
    later = torch.cat([torch.zeros(2, 2, 3), u[:, :-2]], 1)
    torch.testing.assert_close(convolution(later, h)[:, 2:], out[:, :-2], atol=1e-12, rtol=0)


@pytest.mark.parametrize("count", [1, 4, 12])
def test_last_outputs_are_those_of_the_convolution(count):
    u, h = inputs(longer=3)
    expected = toeplitz_convolution(u, h)[:, -count:]
    torch.testing.assert_close(last_outputs(u, h, count), expected, atol=1e-12, rtol=0)


def test_half_precision_is_computed_in_float32():
    u, h = inputs(64, dtype=torch.bfloat16)
    out = fft_convolution(u, h)
    assert out.dtype == torch.bfloat16
    exact = toeplitz_convolution(u.double(), h.double())
    torch.testing.assert_close(out.double(), exact, atol=0.05, rtol=0.01)


@pytest.mark.parametrize("run", [fft_convolution, toeplitz_convolution])
def test_filters_that_do_not_fit(run):
    u, h = inputs()
    for bad in (h[:-1], h[:, :2]):
        with pytest.raises(ValueError, match="at least as many steps"):
            inspect.unwrap(run)(u, bad)


# ---------------------------------------------------------------- implicit filters


def test_what_the_network_is_told_of_the_time():
    found = time_features(8, 5)
    assert found[:, 0].tolist() == pytest.approx([n / 7 for n in range(8)])
    for band, f in enumerate((1e-4, 1.0)):
        for n in range(8):
            angle = 2 * math.pi * n / 8 * f
            assert found[n, 1 + band].item() == pytest.approx(math.cos(angle))
            assert found[n, 3 + band].item() == pytest.approx(-math.sin(angle))
    for bad in (1, 4):
        with pytest.raises(ValueError, match="odd number from 3"):
            time_features(8, bad)


def test_a_filter_is_the_network_times_its_windows():
    torch.manual_seed(0)
    filters = ImplicitFilter(4, 10, width=6, features=5, frequency=3.0).double()
    h = time_features(10, 5)
    for layer in filters.layers:
        h = torch.sin(3 * (h @ layer.weight.T + layer.bias))
    h = h @ filters.output.weight.T
    rates = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, 4)
    window = torch.exp(-rates * torch.arange(10)[:, None] / 9)
    torch.testing.assert_close(filters(), h * window, atol=1e-6, rtol=0)
    assert window[3, 3].item() == pytest.approx(100 ** (-1 / 0.9))
    gradients = torch.autograd.grad(filters().square().sum(), list(filters.parameters()))
    assert all((g != 0).any() for g in gradients)  # ω among them


def test_windows_are_down_to_a_hundredth_where_they_should_be():
    for slow, fast in ((1.5, 0.3), (0.5, 0.1)):
        rates = ImplicitFilter(3, 10, slow=slow, fast=fast).windows()
        assert torch.exp(-rates[0] * slow).item() == pytest.approx(0.01)
        assert torch.exp(-rates[-1] * fast).item() == pytest.approx(0.01)


def test_another_length_stretches_a_filter():
    torch.manual_seed(0)
    short = ImplicitFilter(2, 9, width=8, features=3)
    long = ImplicitFilter(2, 17, width=8, features=3)
    long.load_state_dict(short.state_dict())
    a, b = short().detach(), long().detach()
    assert (a - b[:9]).abs().max() > 0.01 * a.abs().max()
    assert (short.windows() == long.windows()).all()


# ---------------------------------------------------------------- the operator


def operator(order, **settings):
    torch.manual_seed(1)
    config = HyenaConfig(
        hidden=4,
        layers=1,
        feed_forward=4,
        vocabulary=9,
        max_length=20,
        order=order,
        filter_width=8,
        filter_features=5,
        **settings,
    )
    return HyenaOperator(config).double()


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("form", HyenaLM.forms)
def test_the_operator_is_its_equations(order, form):
    layer = operator(order)
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    u = x @ layer.streams.weight.T
    taps = layer.short.weight[:, 0]  # the last one is for the present
    padded = torch.cat([torch.zeros(2, 2, u.shape[2]).double(), u], 1)
    u = sum(padded[:, i : i + 11] * taps[:, i] for i in range(3))
    *gates, z = u.split(4, -1)
    filters = layer.filter().split(4, -1)
    for n in reversed(range(1, order)):
        z = gates[n] * z
        M = toeplitz(filters[n - 1], 11)
        z = torch.einsum("cts,bsc->btc", M, z) + layer.bias[n - 1] * z
    expected = (gates[0] * z) @ layer.output.weight.T
    state = layer.initial_state(torch.zeros(2, dtype=torch.float64))
    found, _ = layer(x, state, Call(form))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("form", HyenaLM.forms)
def test_the_operator_sees_the_past_only_and_moves_with_its_input(form):
    layer = operator(2)
    state = layer.initial_state(torch.zeros(2, dtype=torch.float64))
    x = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    out, _ = layer(x, state, Call(form))
    (gradient,) = torch.autograd.grad((out[:, 5] * torch.arange(1, 5)).sum(), x)
    seen = gradient.abs().sum((0, 2))
    assert bool((seen[:6] > 1e-8).all()) and bool((seen[6:] < 1e-14).all())
    later = torch.cat([torch.zeros(2, 3, 4), x.detach()], 1)
    moved, _ = layer(later, state, Call(form))
    torch.testing.assert_close(moved[:, 3:], out, atol=1e-12, rtol=0)


def test_a_text_longer_than_the_filters_is_refused():
    layer = operator(2)
    state = layer.initial_state(torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="21 tokens.*made for 20"):
        layer(torch.zeros(1, 21, 4).double(), state, Call("parallel"))
    with pytest.raises(ValueError, match="21 tokens"):
        layer(torch.zeros(1, 1, 4).double(), state, Call("recurrent", position=20))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(order=1), "at least 2"),
        (dict(max_length=1), "at least 2, 1 and 0"),
        (dict(filter_width=0), "at least 2, 1 and 0"),
        (dict(filter_features=4), "odd"),
        (dict(slow=0.0), "above 0"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(ValueError, match=said):
        HyenaConfig(**(dict(hidden=4, layers=1, feed_forward=4) | settings))
