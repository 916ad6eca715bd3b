"""Local attention and retention at the edges: what is not seen, far windows, overflow, no tokens.

A token that is not visible has no part in a sum, whatever it holds: in the kernels and in plain
PyTorch, forward and backward.
"""

import numpy as np
import pytest
import torch

from effnb.kernels.local_attention import (
    count_pairs,
    local_attention,
    local_attention_reference,
    local_attention_tiled,
    visible_pairs,
)
from effnb.kernels.retention import (
    retention,
    retention_chunkwise,
    retention_decay,
    retention_parallel,
    retention_recurrent,
    retention_step,
    retention_step_reference,
)

BACKENDS = ["triton", "torch"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of infinite numbers
both = pytest.mark.parametrize("backend", BACKENDS)
half = torch.float16


def close(found, expected, atol=1e-5, **more):
    torch.testing.assert_close(found, expected, equal_nan=True, atol=atol, rtol=1e-4, **more)


def with_gradients(run, *inputs, g):
    """Outputs and gradients for one gradient of the first output."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    found = run(*inputs)
    out = found[0] if isinstance(found, tuple) else found
    return out.detach(), *torch.autograd.grad(out, inputs, g)


# --- windows --------------------------------------------------------------------------------------

FAR = [140, 2**31, 2**32 - 2, 2**63, 10**30, np.int64(140), np.int64(2**62)]


@both
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", FAR, ids=lambda n: f"{type(n).__name__} {n:.0e}")
def test_windows_beyond_the_text(proof, backend, window, causal):
    q = proof.tensor(1, 1, 70, 8)
    everything = torch.ones(70, 70, dtype=torch.bool, device=proof.device)
    mask = everything.tril() if causal else everything
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    close(local_attention(q, q, q, window=window, causal=causal, backend=backend), expected)
    close(local_attention_reference(q, q, q, window=window, causal=causal), expected)
    assert torch.equal(visible_pairs(np.int64(70), window=window, causal=causal)[0], mask.cpu())
    assert int(count_pairs(np.int64(70), window=window, causal=causal)) == int(mask.sum())


@both
@pytest.mark.parametrize("window", [4.0, "4", None, np.float64(6)])
def test_windows_that_are_no_whole_number(proof, backend, window):
    q = proof.tensor(1, 1, 5, 8)
    with pytest.raises(TypeError, match="window is .*; it must be a whole number"):
        local_attention(q, q, q, window=window, backend=backend)


def test_every_form_refuses_a_window_that_cannot_be(proof):
    q = proof.tensor(1, 1, 5, 8)
    for window in (0, -2, 3, np.int64(3)):
        for run in (
            lambda w: local_attention_reference(q, q, q, window=w),
            lambda w: local_attention_tiled(q, q, q, window=w),
            lambda w: visible_pairs(5, window=w),
            lambda w: count_pairs(5, window=w),
        ):
            with pytest.raises(ValueError, match=f"window is {window}; it must be positive"):
                run(window)


# --- what is not seen -----------------------------------------------------------------------------


@both
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_may_hold_anything(proof, backend, bad, causal):
    """In all inputs and in the gradient; 70 tokens are two tiles, padding within both."""
    q, k, v, g = (proof.tensor(2, h, 70, 8, seed=i) for i, h in enumerate((2, 1, 1, 2)))
    padding = torch.zeros(2, 70, dtype=torch.bool, device=proof.device)
    padding[0, 60:], padding[1, 3:9] = True, True
    hidden = padding[:, None, :, None]

    def run(q, k, v):
        is_global = torch.arange(70, device=proof.device) == 20
        options = dict(causal=causal, padding=padding, global_tokens=is_global)
        return local_attention(q, k, v, window=8, backend=backend, **options)

    clean = with_gradients(run, q, k, v, g=g.masked_fill(hidden, 0))
    dirty = with_gradients(run, *(x.masked_fill(hidden, bad) for x in (q, k, v)),
                           g=g.masked_fill(hidden, bad))  # fmt: skip
    for found, expected in zip(dirty, clean):
        assert not bool(found.masked_select(hidden).any())
        close(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("place", "causal"), [(0, True), (1, False), (2, False), (2, True), (3, False)]
)
def test_who_does_not_see_what_is_infinite_is_not_spoilt(proof, place, causal):
    """Token 20's query, key, value or gradient; with a window of 6 few tokens see it.

    Both backends agree on every number, infinite ones included.
    """
    tokens = 70 if place == 2 and causal else 40  # two tiles, or one
    inputs = [proof.tensor(1, h, tokens, 5, seed=i) for i, h in enumerate((2, 1, 1, 2))]
    spoilt = [x.clone() for x in inputs]
    spoilt[place][0, 0, 20, 3] = torch.inf
    visible = visible_pairs(tokens, window=6, causal=causal)[0].to(proof.device)
    row = torch.arange(tokens, device=proof.device) == 20
    bad_scores = visible[:, 20] if place in (1, 2) else row  # queries, by their score gradients
    bad_rows = bad_scores if place < 3 else torch.zeros_like(row)
    reached = (visible & bad_scores[:, None]).any(0)  # keys that such a query sees
    assert not bool(reached[30:].any())  # though its tile goes on
    results, clean = [], None
    for backend in reversed(BACKENDS):

        def run(q, k, v, backend=backend):
            return local_attention(q, k, v, window=6, causal=causal, backend=backend)

        clean = clean or with_gradients(run, *inputs[:3], g=inputs[3])
        dirty = with_gradients(run, *spoilt[:3], g=spoilt[3])
        results.append(dirty)
        for found, expected, bad in zip(dirty, clean, (bad_rows, bad_scores, reached, reached)):
            close(found[:, :, ~bad], expected[:, :, ~bad])
        out, dq, dk, _ = dirty
        if place != 1:  # a score of -inf is a weight of 0
            assert not bool(out[0, 0, bad_rows].isfinite().all(-1).any())
        assert not bool(dq[0, 0, bad_scores].isfinite().all(-1).any())
        assert not bool(dk[0, 0, reached].isfinite().all())
    for expected, ours in zip(*results):
        assert torch.equal(ours.isfinite(), expected.isfinite())
        close(ours[expected.isfinite()], expected[expected.isfinite()])
    close(results[0][0], results[1][0])  # outputs, infinities and NaN alike


@both
def test_many_infinite_tokens_and_scores(proof, backend):
    """Every third value, some of either sign; and scores of -inf, over which softmax is NaN."""
    q, k, v = (proof.tensor(1, 1, 33, 4, seed=i) for i in range(3))
    v[:, :, ::9, 0], v[:, :, ::9, 1], v[:, :, 3::9, 1] = torch.inf, torch.nan, -torch.inf
    out = local_attention(q, k, v, window=2, backend=backend)
    for i in range(33):
        seen = slice(max(i - 1, 0), i + 2)
        weights = (0.5 * q[0, 0, i] @ k[0, 0, seen].T).softmax(0)
        close(out[0, 0, i], (weights[:, None] * v[0, 0, seen]).sum(0))
    q, k = torch.ones_like(q), torch.ones_like(k)
    k[:, :, :, 0] = -torch.inf
    assert bool(local_attention(q, k, torch.ones_like(v), window=2, backend=backend).isnan().all())


@pytest.mark.parametrize("chunk", [16, np.int64(32)])
@pytest.mark.parametrize("place", range(3), ids=["q", "k", "v"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_the_future_does_not_spoil_the_past(proof, place, chunk, bad):
    """Position 12 of 40: every form is finite where the recurrent one is, and equal there."""
    inputs = [proof.tensor(1, 2, 40, d, seed=i) for i, d in enumerate((5, 5, 3))]
    gamma = torch.tensor([0.9, 0.5], device=proof.device)
    clean = retention_recurrent(*inputs, gamma)
    inputs[place] = inputs[place].clone()
    inputs[place][0, 1, 12, 1] = bad
    expected = retention_recurrent(*inputs, gamma)
    close(expected[0][:, :, :12], clean[0][:, :, :12])
    for out, state in (
        retention(*inputs, gamma, chunk_size=chunk, backend="triton"),
        retention(*inputs, gamma, chunk_size=chunk, backend="torch"),
        retention_chunkwise(*inputs, gamma, chunk_size=chunk),
        retention_parallel(*inputs, gamma),
    ):
        for found, right in ((out, expected[0]), (state, expected[1])):
            fine = right.isfinite()
            assert torch.equal(found.isfinite(), fine)
            close(found[fine], right[fine])


@both
@pytest.mark.parametrize("place", range(4), ids=["q", "k", "v", "gradient"])
def test_gradients_of_retention_keep_apart_what_is_not_seen(proof, backend, place):
    """An infinite query or gradient reaches earlier keys only; a key or value, later queries."""
    inputs = [proof.tensor(1, 1, 40, d, seed=i) for i, d in enumerate((4, 4, 3, 3))]
    gamma = torch.tensor([0.8], device=proof.device)

    def run(q, k, v):
        return retention(q, k, v, gamma, chunk_size=16, backend=backend)

    clean = with_gradients(run, *inputs[:3], g=inputs[3])
    inputs[place] = inputs[place].clone()
    inputs[place][0, 0, 20] = torch.inf
    out, dq, dk, dv = with_gradients(run, *inputs[:3], g=inputs[3])
    close(out[:, :, :20], clean[0][:, :, :20])
    close(dq[:, :, :20], clean[1][:, :, :20])
    close(dk[:, :, 21:], clean[2][:, :, 21:])
    close(dv[:, :, 21:], clean[3][:, :, 21:])
    bad = [dk, out, out, dk][place]
    assert not bool(bad[:, :, 20].isfinite().any())


@pytest.mark.parametrize("dim", [5, 16])
def test_a_step_with_an_infinite_value(proof, dim):
    """Five keys fill eight places of a program: the three others must not count."""
    q, k, v = (proof.tensor(2, 1, d, seed=i) for i, d in enumerate((dim, dim, 3)))
    state, gamma = proof.tensor(2, 1, dim, 3, seed=3), torch.tensor([0.5], device=proof.device)
    q, k, v[0, 0, 1] = q.abs(), k.abs(), torch.inf
    ours = retention_step(q, k, v, gamma, state, backend="triton")
    for found, expected in zip(ours, retention_step_reference(q, k, v, gamma, state)):
        close(found, expected)
    assert bool(ours[0][0, 0, 1].isposinf()) and bool(ours[0][0, 0, [0, 2]].isfinite().all())


# --- overflow -------------------------------------------------------------------------------------


@both
def test_score_gradients_beyond_half_precision(proof, backend):
    """They reach 4 million, times keys that are small; or the other way round."""
    q, k = (1e-3 * proof.tensor(1, 2, 40, 16, seed=i) for i in range(2))
    v, g = (300 * proof.tensor(1, 2, 40, 16, seed=i) for i in (2, 3))
    for factor in (1, 1e-9):  # the second one below half precision's least

        def run(q, k, v):
            return local_attention(q, k, v, window=8, causal=True, backend=backend)

        inputs = [x.half() for x in (q, k / factor**0.5, v, factor * g)]
        found = with_gradients(run, *inputs[:3], g=inputs[3])
        exact = with_gradients(
            lambda q, k, v: local_attention_reference(q, k, v, window=8, causal=True),
            *(x.double() for x in inputs[:3]), g=inputs[3].double(),
        )  # fmt: skip
        for got, right in zip(found, exact):
            error = float((got.double() - right).abs().max())
            assert error <= 5e-3 * float(right.abs().max()) + 1e-7, factor


# --- no tokens, and numbers of every kind --------------------------------------------------------


@both
@pytest.mark.parametrize("shape", [(2, 2, 0, 4), (0, 2, 5, 4)])
def test_attention_over_nothing_has_gradients(proof, backend, shape):
    q = proof.tensor(*shape)
    k, g = q[:, :1], torch.ones_like(q)
    found = with_gradients(
        lambda q, k, v: local_attention(q, k, v, window=2, backend=backend), q, k, k, g=g
    )
    assert [x.shape for x in found] == [x.shape for x in (q, q, k, k)]


@both
@pytest.mark.parametrize(("tokens", "dim_v"), [(0, 3), (5, 0), (0, 0)])
def test_retention_of_nothing(proof, backend, tokens, dim_v):
    q, v = proof.tensor(1, 1, tokens, 4), proof.tensor(1, 1, tokens, dim_v, seed=1)
    gamma, first = retention_decay(np.int64(1)).to(proof.device), proof.tensor(1, 1, 4, dim_v)
    kept = first.clone()
    out, state = retention(q, q, v, gamma, initial_state=first, backend=backend)
    assert out.shape == v.shape and state.shape == first.shape
    if not tokens:
        assert torch.equal(state, kept)
        state.add_(1)  # the caller's first state is another tensor
        assert torch.equal(first, kept)
    grads = with_gradients(
        lambda q, k, v: retention(q, k, v, gamma, backend=backend), q, q, v, g=torch.ones_like(v)
    )
    assert [x.shape for x in grads] == [x.shape for x in (v, q, q, v)]


@both
@pytest.mark.parametrize("scale", [2, np.float32(2), np.int64(2)], ids=lambda n: type(n).__name__)
def test_scales_of_any_kind(proof, backend, scale):
    q, gamma = proof.tensor(1, 1, 5, 4), torch.tensor([0.5], device=proof.device)
    close(
        local_attention(q, q, q, window=2, scale=scale, backend=backend),
        local_attention_reference(q, q, q, window=2, scale=2.0),
    )
    close(
        retention(q, q, q, gamma, scale=scale, backend=backend)[0],
        retention_recurrent(q, q, q, gamma, scale=2.0)[0],
    )
    state = proof.tensor(1, 1, 4, 4, seed=1)
    row = q[:, :, 0]
    close(
        retention_step(row, row, row, gamma, state, scale=scale, backend=backend)[0],
        retention_step_reference(row, row, row, gamma, state, scale=2.0)[0],
    )
    for run in (
        lambda wrong: local_attention(q, q, q, window=2, scale=wrong, backend=backend),
        lambda wrong: retention(q, q, q, gamma, scale=wrong, backend=backend),
        lambda wrong: retention_step(row, row, row, gamma, state, scale=wrong, backend=backend),
    ):
        with pytest.raises(TypeError, match="scale is '2'; it must be a number"):
            run("2")
    with pytest.raises(TypeError, match="chunk_size is 16.0; it must be a whole number"):
        retention(q, q, q, gamma, chunk_size=16.0, backend=backend)
