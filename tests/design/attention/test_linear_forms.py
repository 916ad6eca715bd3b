"""Linear attention, Performer and Linformer: recurrences, closed-form errors, and what leaks."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.design.attention import linformer as lin
from effnb.design.attention import performer as pf

# Modules whose names the package gives to their functions.
la = importlib.import_module("effnb.design.attention.linear_attention")


def randn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def qkv(time, keys=None, dim=4, value_dim=3, seed=0):
    keys = time if keys is None else keys
    shapes = (time, dim), (keys, dim), (keys, value_dim)
    return [randn(2, 2, *s, seed=seed + n) for n, s in enumerate(shapes)]


# --- linear attention


@settings(max_examples=20)
@given(time=st.integers(1, 14), chunk=st.integers(1, 16), seed=st.integers(0, 99))
def test_parallel_recurrent_and_the_double_sum_are_one(time, chunk, seed):
    q, k, v = qkv(time, seed=seed)
    parallel = la.linear_attention(q, k, v, chunk=chunk)
    state, steps = None, []
    for t in range(time):
        out, state = la.linear_attention_step(q[:, :, t], k[:, :, t], v[:, :, t], state)
        steps.append(out)
    torch.testing.assert_close(torch.stack(steps, 2), parallel, atol=1e-10, rtol=1e-10)
    similar = (la.elu_features(q) @ la.elu_features(k).mT).tril()
    expected = similar @ v / (similar.sum(-1, keepdim=True) + la.EPSILON)
    torch.testing.assert_close(parallel, expected, atol=1e-10, rtol=1e-10)
    assert state.S.shape == (2, 2, 4, 3) and state.z.shape == (2, 2, 4)


def test_float32_recurrence_to_1e_5():
    q, k, v = (x.float() for x in qkv(100))
    state, steps = None, []
    for t in range(100):
        out, state = la.linear_attention_step(q[:, :, t], k[:, :, t], v[:, :, t], state)
        steps.append(out)
    assert (torch.stack(steps, 2) - la.linear_attention(q, k, v)).abs().max() < 1e-5


def test_a_text_can_be_read_in_two_parts():
    q, k, v = qkv(11)
    phi_q, phi_k = la.elu_features(q), la.elu_features(k)
    whole, end = la.feature_attention(phi_q, phi_k, v, chunk=3)
    first, state = la.feature_attention(phi_q[:, :, :5], phi_k[:, :, :5], v[:, :, :5])
    second, last = la.feature_attention(
        phi_q[:, :, 5:], phi_k[:, :, 5:], v[:, :, 5:], chunk=2, state=state
    )
    torch.testing.assert_close(torch.cat([first, second], 2), whole)
    torch.testing.assert_close(last.S, end.S)


@pytest.mark.parametrize("side", ["left", "right"])
def test_linear_padding(side):
    q, k, v = qkv(6, 9)
    padding = torch.arange(9).expand(2, -1) < torch.tensor([[0], [4]])
    padding = padding.flip(1) if side == "right" else padding
    out = la.linear_attention(q, k, v, causal=False, padding=padding)
    alone = la.linear_attention(q[1:], k[1:, :, ~padding[1]], v[1:, :, ~padding[1]], causal=False)
    torch.testing.assert_close(out[1:], alone)


def test_half_precision_sums_in_float32():
    q, k, v = (x.bfloat16() for x in qkv(64))
    out = la.linear_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    exact = la.linear_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-2)


# --- Performer


def test_features_are_unbiased():
    """Means of 20,000 draws are within three standard errors of e^(q·k)."""
    q, k = randn(5, 8, scale=0.3), randn(5, 8, seed=1, scale=0.3)
    truth = (q * k).sum(-1).exp()
    w = pf.gaussian_features(20000, 8, orthogonal=False, like=q)
    for kind in pf.KINDS:
        found = (pf.softmax_features(q, w, kind) * pf.softmax_features(k, w, kind)).sum(-1)
        error = pf.kernel_mse(q, k, 20000, kind).sqrt()
        assert ((found - truth).abs() < 3 * error).all(), kind


@pytest.mark.parametrize("kind", pf.KINDS)
def test_mean_squared_error_is_the_closed_form(kind):
    """To 5 %, over 40,000 estimates of 8 features each."""
    q, k = randn(1, 4, scale=0.35), randn(1, 4, seed=1, scale=0.35)
    w = pf.gaussian_features(8 * 40000, 4, orthogonal=False, like=q)
    if kind == "positive":
        products = (w @ (q + k)[0] - (q.square() + k.square()).sum() / 2).exp()
    else:
        products = (w @ (q - k)[0]).cos() * ((q.square() + k.square()).sum() / 2).exp()
    estimates = products.view(-1, 8).mean(1)
    measured = (estimates - (q * k).sum().exp()).square().mean()
    assert float(measured) == pytest.approx(float(pf.kernel_mse(q, k, 8, kind)), rel=0.05)


def test_positive_features_are_good_where_trigonometric_ones_explode():
    """k ≈ −q with large norms: relative errors differ by many orders of magnitude."""
    q = randn(50, 16, scale=1.2)
    k = -q + randn(50, 16, seed=1, scale=0.02)
    truth = (q * k).sum(-1).exp()
    w = pf.gaussian_features(256, 16, like=q)
    errors = {}
    for kind in pf.KINDS:
        found = (pf.softmax_features(q, w, kind) * pf.softmax_features(k, w, kind)).sum(-1)
        errors[kind] = float(((found - truth) / truth).abs().median())
    assert errors["positive"] < 0.05
    assert errors["trigonometric"] > 1e6
    relative = (pf.kernel_mse(q, k, 256) / truth.square()).sqrt().median()
    assert float(relative) < 0.05


def test_orthogonal_directions():
    w = pf.gaussian_features(20, 8, like=randn(1))
    for block in w.split(8):
        unit = torch.nn.functional.normalize(block, dim=1)
        torch.testing.assert_close(unit @ unit.T, torch.eye(len(block)).double())
    many = pf.gaussian_features(8000, 8, like=randn(1))
    assert float(many.norm(dim=1).square().mean()) == pytest.approx(8, rel=0.03)
    assert (many.mean(0).abs() < 4 / 8000**0.5).all()
    torch.testing.assert_close(many.T @ many / 8000, torch.eye(8).double(), atol=0.05, rtol=0)


def test_orthogonal_directions_have_a_smaller_error():
    q, k = randn(1, 8, scale=0.2), randn(1, 8, seed=1, scale=0.2)
    truth = (q * k).sum().exp()
    errors = []
    for orthogonal in (True, False):
        found = []
        for seed in range(600):
            w = pf.gaussian_features(8, 8, orthogonal=orthogonal, seed=seed, like=q)
            product = pf.softmax_features(q, w) * pf.softmax_features(k, w)
            found.append((product.sum() - truth).square())
        errors.append(float(torch.stack(found).mean()))
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("kind", pf.KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_performer_is_the_dense_product_of_its_features(kind, causal):
    q, k, v = qkv(9, dim=8)
    w = pf.gaussian_features(32, 8, like=q)
    out = pf.performer_attention(q, k, v, w, kind=kind, causal=causal, chunk=4)
    phi_q, phi_k = (pf.softmax_features(x * 8**-0.25, w, kind) for x in (q, k))
    similar = phi_q @ phi_k.mT
    similar = similar.tril() if causal else similar
    expected = similar @ v / similar.sum(-1, keepdim=True)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-7)


def test_keys_share_one_maximum():
    """With many features ours nears softmax; a maximum of each key's own does not.

    Queries and keys are short: with long ones the estimate needs far more features than these.
    """
    q, k, v = qkv(30, dim=8)
    q, k = 0.7 * q, 0.7 * k
    w = pf.gaussian_features(8192, 8, like=q)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    ours = pf.performer_attention(q, k, v, w)
    x = k * 8**-0.25
    exponent = x @ w.T - x.square().sum(-1, keepdim=True) / 2
    wrong_keys = (exponent - exponent.amax(-1, keepdim=True)).exp()
    phi_q = pf.softmax_features(q * 8**-0.25, w)
    similar = phi_q @ wrong_keys.mT
    wrong = similar @ v / similar.sum(-1, keepdim=True)
    assert (wrong - exact).square().mean() > 4 * (ours - exact).square().mean()


def test_large_scores_stay_finite_in_float32():
    q, k, v = (x.float() for x in qkv(20, dim=8))
    w = pf.gaussian_features(64, 8, like=q)
    q, k = (12 * q).requires_grad_(), (12 * k).requires_grad_()
    out = pf.performer_attention(q, k, v, w, causal=True)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k)))


def test_error_falls_with_the_root_of_the_features():
    q, k, v = (0.5 * x for x in qkv(24, dim=8))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    errors = []
    for count in (64, 1024):
        seeds = (pf.gaussian_features(count, 8, seed=s, like=q) for s in range(6))
        found = [(pf.performer_attention(q, k, v, w) - exact).square().mean() for w in seeds]
        errors.append(float(torch.stack(found).mean().sqrt()))
    slope = math.log(errors[1] / errors[0]) / math.log(16)
    assert -0.75 < slope < -0.3
    assert pf.default_features(64) == math.ceil(64 * math.log(64))


def test_performer_padding_and_causality():
    q, k, v = qkv(8, dim=4)
    w = pf.gaussian_features(16, 4, like=q)
    padding = torch.arange(8).expand(2, -1) < torch.tensor([[0], [3]])
    out = pf.performer_attention(q, k, v, w, padding=padding)
    alone = pf.performer_attention(q[1:], k[1:, :, 3:], v[1:, :, 3:], w)
    torch.testing.assert_close(out[1:], alone, atol=1e-9, rtol=1e-7)
    changed = v.clone()
    changed[:, :, 5] += 1
    a, b = (pf.performer_attention(q, k, x, w, causal=True) for x in (v, changed))
    assert torch.equal(a[:, :, :5], b[:, :, :5]) and not torch.equal(a, b)


# --- Linformer


def test_identity_projections_are_full_attention():
    q, k, v = qkv(7)
    eye = torch.eye(7).double()[None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    found = lin.linformer_attention(q, k, v, eye, eye)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_the_first_token_sees_the_last():
    """Why Linformer cannot be causal."""
    layer = lin.LinformerAttention(8, 2, 10, 4).double()
    x = randn(1, 10, 8).requires_grad_()
    (gradient,) = torch.autograd.grad((layer(x)[0, 0] * torch.arange(8)).sum(), x)
    assert gradient[0, -1].abs().sum() > 0
    eye = torch.eye(4).double()[None]
    with pytest.raises(ValueError, match="cannot be causal"):
        lin.linformer_attention(*(randn(1, 1, 4, 2) for _ in range(3)), eye, eye, causal=True)


def test_sharing():
    counts = {}
    for sharing in lin.SHARING:
        layer = lin.LinformerAttention(8, 2, 10, 4, sharing=sharing)
        counts[sharing] = sum(p.numel() for p in layer.parameters()) - 4 * (64 + 8)
    assert counts == {"none": 160, "heads": 80, "key-value": 40}


@settings(max_examples=10)
@given(time=st.integers(1, 10), projected=st.integers(1, 10))
def test_shorter_texts_use_the_first_columns(time, projected):
    torch.manual_seed(0)
    layer = lin.LinformerAttention(8, 2, 10, projected).double()
    x = randn(2, time, 8)
    padded = torch.cat([x, randn(2, 10 - time, 8, seed=5)], 1)
    padding = (torch.arange(10) >= time).expand(2, -1)
    torch.testing.assert_close(layer(x), layer(padded, padding=padding)[:, :time])


def test_cumulative_energy():
    low = randn(2, 10, 1) @ randn(2, 1, 10) + 1e-9 * randn(2, 10, 10)
    found = lin.cumulative_energy(low)
    assert found.shape == (2, 10) and (found[:, 0] > 1 - 1e-9).all()
    flat = lin.cumulative_energy(torch.eye(4))
    torch.testing.assert_close(flat, torch.tensor([0.25, 0.5, 0.75, 1.0]))


def test_what_is_refused(unchecked):
    q, k, v = qkv(6)
    w = pf.gaussian_features(8, 4, like=q)
    layer = lin.LinformerAttention(8, 2, 5, 4)
    for words, call in (
        ("one query for each key", lambda: la.linear_attention(q[:, :, :3], k, v)),
        ("chunk is 0", lambda: la.linear_attention(q, k, v, chunk=0)),
        ("kind is 'cosine'", lambda: pf.performer_attention(q, k, v, w, kind="cosine")),
        ("as wide as queries and keys, 4", lambda: pf.performer_attention(q, k, v, w[:, :3])),
        ("one query for each key",
         lambda: pf.performer_attention(q[:, :, :3], k, v, w, causal=True)),
        ("count is 0", lambda: pf.gaussian_features(0, 4)),
        ("kind is", lambda: pf.kernel_mse(q, k, 4, "relu")),
        ("for 5 at most", lambda: layer(torch.zeros(1, 6, 8))),
        ("not made longer", lambda: lin.LinformerAttention(8, 2, 5, 6)),
        ("sharing is", lambda: lin.LinformerAttention(8, 2, 5, 4, sharing="layers")),
        ("E has shape", lambda: lin.linformer_attention(q, k, v, q[0], q[0])),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
