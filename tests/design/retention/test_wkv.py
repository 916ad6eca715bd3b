"""The wkv of RWKV-4: the double sum, in two forms that cannot overflow."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.design.retention.wkv import EMPTY, FORMS, wkv


def inputs(tokens=9, batch=2, dim=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    w = torch.rand(dim, generator=generator, dtype=torch.float64) + 0.05
    u, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((dim,), (batch, tokens, dim), (batch, tokens, dim))
    )
    return [x.to(dtype) for x in (w, u, k, v)]


def double_sum(w, u, k, v):
    out = torch.zeros_like(v)
    for t in range(k.shape[1]):
        top, bottom = (u + k[:, t]).exp() * v[:, t], (u + k[:, t]).exp()
        for i in range(t):
            weight = (-(t - 1 - i) * w + k[:, i]).exp()
            top, bottom = top + weight * v[:, i], bottom + weight
        out[:, t] = top / bottom
    return out


def some_state(batch=2, dim=5):
    generator = torch.Generator().manual_seed(4)
    a, b, p = torch.randn(3, batch, dim, generator=generator, dtype=torch.float64)
    return a, b.exp(), p


def weight_and_mean(state):
    """What a state stands for, whatever its exponent p: log b + p, and a / b."""
    a, b, p = state
    return torch.stack([b.log() + p, a / b])


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_form_is_the_double_sum(form, dtype):
    w, u, k, v = inputs(dtype=dtype)
    atol = 1e-12 if dtype == torch.float64 else 2e-6
    close(wkv(w, u, k, v, form=form)[0], double_sum(w, u, k, v), atol)


@settings(max_examples=15)
@given(tokens=st.integers(1, 18), begins=st.booleans())
def test_forms_and_their_gradients_are_equal(tokens, begins):
    found = []
    for form in FORMS:
        leaves = [x.requires_grad_() for x in inputs(tokens)]
        state = None if begins else [x.requires_grad_() for x in some_state()]
        out, final = wkv(*leaves, state and tuple(state), form=form)
        last = weight_and_mean(final)
        generator = torch.Generator().manual_seed(1)
        value = sum(
            (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum()
            for x in (out, last)
        )
        found.append([out, last, *torch.autograd.grad(value, leaves + (state or []))])
    for a, b in zip(*found):
        close(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_a_text_in_two_parts_is_one_text(form):
    w, u, k, v = inputs()
    whole, end = wkv(w, u, k, v, some_state())
    first, middle = wkv(w, u, k[:, :4], v[:, :4], some_state(), form=form)
    second, last = wkv(w, u, k[:, 4:], v[:, 4:], middle, form=form)
    close(torch.cat([first, second], 1), whole)
    close(weight_and_mean(last), weight_and_mean(end))


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_added_to_all_keys_changes_nothing(form):
    w, u, k, v = inputs(dtype=torch.float32)
    expected = wkv(w, u, k, v, form=form)[0]
    for shift in (100.0, -100.0):
        # In float32, adding 100 rounds the keys themselves to 4e-6
        close(wkv(w, u, k + shift, v, form=form)[0], expected, 2e-5)
    assert not double_sum(w, u, k + 100, v).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_limits(form):
    w, u, k, v = inputs()
    huge = torch.full_like(w, 1e4)
    forgetful = wkv(huge, -huge, k, v, form=form)[0]
    close(forgetful[:, 1:], v[:, :-1])  # only the last token before counts
    close(forgetful[:, 0], v[:, 0])  # there is nothing but the present
    close(wkv(w, huge, k, v, form=form)[0], v)
    # Without decay and bonus: a softmax over everything so far
    weight = k.exp()
    average = (weight * v).cumsum(1) / weight.cumsum(1)
    close(wkv(0 * w, 0 * u, k, v, form=form)[0], average)


@pytest.mark.parametrize("form", FORMS)
def test_large_keys_have_finite_averages_and_gradients(form):
    w, u, k, v = (x.requires_grad_() for x in inputs(dtype=torch.float32))
    keys = 1e4 * k
    out, _ = wkv(w, u, keys, v, form=form)
    assert out.isfinite().all()
    assert bool((out <= v.max()).all() and (out >= v.min()).all())  # averages
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (w, u, k, v)))


@pytest.mark.parametrize("form", FORMS)
def test_averages_depend_on_the_past_and_the_present_only(form):
    w, u, k, v = inputs(tokens=7)
    out, _ = wkv(w, u, k.requires_grad_(), v.requires_grad_(), form=form)
    value = (out[:, 4] * torch.arange(1, 6)).sum()
    for gradient in torch.autograd.grad(value, (k, v)):
        assert (gradient.abs().sum((0, 2)) != 0).tolist() == [True] * 5 + [False] * 2


def test_the_state_of_16_bit_values_is_in_float32():
    w, u, k, v = inputs(dtype=torch.bfloat16)
    for form in FORMS:
        out, state = wkv(w, u, k, v, form=form)
        assert out.dtype == torch.bfloat16
        assert {s.dtype for s in state} == {torch.float32}
        exact = double_sum(*(x.double() for x in (w, u, k, v)))
        close(out.double(), exact, 0.02)


def test_keys_of_nothing_have_no_weight():
    w, u, k, v = inputs()
    nothing = torch.full_like(k[:, :3], EMPTY)
    for form in FORMS:
        padded = wkv(w, u, torch.cat([nothing, k], 1), torch.cat([0 * v[:, :3], v], 1), form=form)
        close(padded[0][:, 3:], wkv(w, u, k, v)[0])


def test_what_is_refused():
    w, u, k, v = inputs()
    with pytest.raises(ValueError, match="the form is 'scan'; choose parallel or recurrent"):
        wkv(w, u, k, v, form="scan")
    bare = inspect.unwrap(wkv)
    for bad in ((w[:3], u, k, v), (w, u, k[:, :4], v), (w, u, k, v, (k[:, 0, :2],) * 3)):
        with pytest.raises(ValueError, match=r"\(dim,\) twice and \(batch, time, dim\) twice"):
            bare(*bad)
