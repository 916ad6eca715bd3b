"""Gated linear attention: the recurrence, its other forms, and what it is with constant gates."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.design.retention import Call, GatedLinearAttention, GLAConfig, decays, gla, retention
from effnb.design.retention.gla import FORMS


def inputs(tokens=9, batch=2, heads=2, dim_k=3, dim_v=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q, k, v, gates, state = (
        torch.randn(batch, heads, *size, generator=generator, dtype=torch.float64)
        for size in [(tokens, dim_k)] * 2 + [(tokens, dim_v), (tokens, dim_k), (dim_k, dim_v)]
    )
    return [x.to(dtype) for x in (q, k, v, torch.nn.functional.logsigmoid(gates), state)]


def close(found, expected, atol=1e-10):
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_recurrence(form):
    q, k, v, log_gate, state = inputs()
    S, outputs = state, []
    for t in range(9):
        S = torch.einsum("bhk,bhkv->bhkv", log_gate[:, :, t].exp(), S)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, :, t], v[:, :, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], S) / 3**0.5)
    found = gla(q, k, v, log_gate, form=form, chunk_size=4, initial_state=state)
    close(found, [torch.stack(outputs, 2), S], 1e-12)


@settings(max_examples=12)
@given(tokens=st.integers(1, 13), chunk=st.integers(1, 16))
def test_forms_and_their_gradients_are_equal(tokens, chunk):
    found = []
    for form in FORMS:
        leaves = [x.requires_grad_() for x in inputs(tokens)]
        out, S = gla(*leaves[:4], form=form, chunk_size=chunk, initial_state=leaves[4])
        generator = torch.Generator().manual_seed(1)
        value = sum(
            (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in (out, S)
        )
        found.append([out, S, *torch.autograd.grad(value, leaves)])
    close(found[1], found[0])
    close(found[2], found[0])


@pytest.mark.parametrize("form", FORMS)
def test_with_constant_gates_it_is_retention_without_rotation(form):
    q, k, v, _, state = inputs()
    gamma = decays(2)
    gates = gamma.log()[:, None, None].expand_as(q)
    found = gla(q, k, v, gates, form=form, chunk_size=4, initial_state=state)
    close(found, retention(q, k, v, gamma, initial_state=state))


@pytest.mark.parametrize("form", FORMS)
def test_with_open_gates_it_is_linear_attention_without_a_denominator(form):
    q, k, v, *_ = inputs()
    found = gla(q, k, v, torch.zeros_like(q), form=form, chunk_size=4)
    close(found, [(q @ k.mT / 3**0.5).tril() @ v, k.mT @ v])


@pytest.mark.parametrize("form", FORMS)
def test_closed_gates_leave_the_present_only(form):
    q, k, v, log_gate, state = inputs()
    out, S = gla(q, k, v, log_gate - 1e4, form=form, chunk_size=4, initial_state=state)
    close([out], [(q * k).sum(-1, keepdim=True) / 3**0.5 * v])
    close([S], [k[:, :, -1:].mT @ v[:, :, -1:]])


@pytest.mark.parametrize("form", FORMS)
def test_strong_gates_overflow_nothing(form):
    q, k, v, _, _ = inputs(tokens=96, dtype=torch.float32)
    gates = torch.full_like(q, -1.0).requires_grad_()
    assert torch.isinf(torch.exp(-gates.cumsum(2))).any()  # the factor e^(-b) of a split
    out, _ = gla(q, k, v, gates, form=form)
    (gradient,) = torch.autograd.grad(out.sum(), gates)
    assert out.isfinite().all() and gradient.isfinite().all()
    exact, _ = gla(q.double(), k.double(), v.double(), gates.double(), form="recurrent")
    close([out.double()], [exact], 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_depend_on_the_past_and_the_present_only(form):
    leaves = [x.requires_grad_() for x in inputs(tokens=7)[:4]]
    out, _ = gla(*leaves, form=form, chunk_size=3)
    value = (out[:, :, 4] * torch.arange(1, 5)).sum()
    seen = [g.abs().sum((0, 1, 3)) > 1e-12 for g in torch.autograd.grad(value, leaves)]
    assert seen[0].tolist() == [False] * 4 + [True] + [False] * 2
    assert seen[1].tolist() == seen[2].tolist() == [True] * 5 + [False] * 2
    assert seen[3].tolist() == [False] + [True] * 4 + [False] * 2  # the first gate: of nothing


@pytest.mark.parametrize("form", FORMS)
def test_states_stay_in_float32(form):
    half = inputs(dtype=torch.bfloat16)[:4]
    out, state = gla(*half, form=form)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    close([out.double()], [gla(*(x.double() for x in half))[0]], 0.03)
    single = [x.float() for x in half]
    with torch.autocast("cpu", torch.bfloat16):
        found = gla(*single, form=form)
    close(found, gla(*single, form=form), 0)


@pytest.mark.parametrize("form", FORMS)
def test_the_layer_is_its_equation(form):
    torch.manual_seed(0)
    config = GLAConfig(hidden=8, layers=1, feed_forward=8, heads=2, chunk_size=3)
    layer = GatedLinearAttention(config).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    low, bias = layer.decay[0].weight, layer.decay[1].bias
    assert low.shape == (16, 8)
    alpha = torch.sigmoid(x @ low.T @ layer.decay[1].weight.T + bias) ** (1 / 16)
    parts = []
    for h in range(2):
        q, k, a = (
            y[..., 2 * h : 2 * h + 2]
            for y in (x @ layer.query.weight.T, x @ layer.key.weight.T, alpha)
        )
        v = (x @ layer.value.weight.T)[..., 4 * h : 4 * h + 4]
        S, outputs = torch.zeros(2, 2, 4).double(), []
        for t in range(5):
            S = a[:, t, :, None] * S + k[:, t, :, None] * v[:, t, None]
            outputs.append((q[:, t, None] @ S)[:, 0] / 2**0.5)
        out = torch.stack(outputs, 1)
        parts.append(out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    gate = x @ layer.gate.weight.T
    expected = (gate * gate.sigmoid() * torch.cat(parts, -1)) @ layer.output.weight.T
    found, _ = layer(x, layer.initial_state(torch.zeros(2).double()), Call(form))
    close([found], [expected])


def test_what_is_refused():
    q, k, v, log_gate, state = inputs()
    with pytest.raises(ValueError, match="the form is 'scan'"):
        gla(q, k, v, log_gate, form="scan")
    with pytest.raises(ValueError, match="at least 1 token"):
        gla(q, k, v, log_gate, chunk_size=0)
    with pytest.raises(ValueError, match="log_gate is above 0"):
        gla(q, k, v, -log_gate)
    bare = inspect.unwrap(gla)
    for bad in ((q, k[:, :, :2], v, log_gate), (q, k, v, log_gate[..., :1])):
        with pytest.raises(ValueError, match="q, k, v and log_gate have the shapes"):
            bare(*bad)
    with pytest.raises(ValueError, match=r"a state \(2, 2, 3, 4\)"):
        bare(q, k, v, log_gate, initial_state=state.mT)
    for heads, said in ((3, "multiple of twice"), (0, "multiple of twice")):
        with pytest.raises(ValueError, match=said):
            GLAConfig(hidden=8, layers=1, feed_forward=8, heads=heads)
    with pytest.raises(ValueError, match="at least 1"):
        GLAConfig(hidden=8, layers=1, feed_forward=8, heads=2, gate_rank=0)
