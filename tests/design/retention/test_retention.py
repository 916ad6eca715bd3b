"""Retention: the sum over pairs of turned vectors, in three forms, and where forms disagree."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.design.retention.retention import (
    FORMS,
    decays,
    retention,
    rotate,
    rotation_frequencies,
    row_sums,
)


def inputs(tokens=11, batch=2, heads=3, dim_k=4, dim_v=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(tokens, dim_k), (tokens, dim_k), (tokens, dim_v), (dim_k, dim_v)]
    q, k, v, state = (
        torch.randn(batch, heads, *size, generator=generator, dtype=torch.float64).to(dtype)
        for size in sizes
    )
    return q, k, v, decays(heads), state


def with_gradients(form, q, k, v, gamma, state, **options):
    """Outputs, state, and the gradients of all inputs for fixed weights on both."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v, state)]
    out, final = retention(*leaves[:3], gamma, form=form, initial_state=leaves[3], **options)
    generator = torch.Generator().manual_seed(9)
    value = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in (out, final)
    )
    return [out, final, *torch.autograd.grad(value, leaves)]


def close(found, expected, atol=1e-10):
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---------------------------------------------------------------- decays and positions


def test_decays_of_the_paper_and_what_they_remember():
    gamma = decays(4)
    assert gamma.tolist() == [0.96875, 0.984375, 0.9921875, 0.99609375]
    assert (1 / (1 - gamma)).tolist() == [32, 64, 128, 256]
    half_lives = (math.log(0.5) / gamma.log()).tolist()
    assert half_lives == pytest.approx([21.8, 44.0, 88.4, 177], rel=2e-3)


def test_decays_of_the_language_models_lie_evenly_on_a_logarithmic_scale():
    forgets = 1 - decays(5, "lm")
    assert forgets[[0, -1]].tolist() == pytest.approx([1 / 32, 1 / 512], rel=1e-12)
    torch.testing.assert_close(forgets[1:] / forgets[:-1], torch.full((4,), 0.5).double())
    assert decays(3, 127 / 128).tolist() == [127 / 128] * 3
    assert decays(2, 1).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("heads", "kind", "said"),
    [(0, "paper", "at least 1"), (2, 1.5, "at most 1"), (2, 0.0, "above 0"), (2, "x", "choose")],
)
def test_decays_that_do_not_exist(heads, kind, said):
    with pytest.raises(ValueError, match=said):
        decays(heads, kind)


def test_frequencies():
    found = rotation_frequencies(8)
    assert found.tolist() == pytest.approx([1, 10000 ** (-1 / 3), 10000 ** (-2 / 3), 1e-4])
    assert rotation_frequencies(8, "rope").tolist() == pytest.approx([1, 0.1, 0.01, 0.001])
    assert rotation_frequencies(2).tolist() == [1]
    with pytest.raises(ValueError, match="5 numbers.*even"):
        rotation_frequencies(5)
    with pytest.raises(ValueError, match='"retnet" or "rope"'):
        rotation_frequencies(4, "xpos")


@pytest.mark.parametrize("kind", ["retnet", "rope"])
def test_the_rotation_is_a_complex_product_and_keeps_distances_only(kind):
    q, k, *_ = inputs(tokens=7)
    turned = rotate(q, k, 3, kind)
    phase = torch.arange(3, 10)[:, None] * rotation_frequencies(4, kind)
    for x, y in zip((q, k), turned):
        expected = torch.view_as_complex(x.unflatten(-1, (2, 2))) * torch.exp(1j * phase)
        close([torch.view_as_complex(y.unflatten(-1, (2, 2)))], [expected])
    later = rotate(q, k, 100, kind)
    close([later[0] @ later[1].mT], [turned[0] @ turned[1].mT])
    assert (later[0] - turned[0]).abs().max() > 0.1


# ---------------------------------------------------------------- the three forms


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_sum_over_pairs(form):
    q, k, v, gamma, state = inputs()
    out, final = retention(*rotate(q, k), v, gamma, form=form, initial_state=state, chunk_size=4)
    turn = torch.exp(1j * torch.arange(11)[:, None] * rotation_frequencies(4))
    a, b = (torch.view_as_complex(x.unflatten(-1, (2, 2))) * turn for x in (q, k))
    expected, expected_final = torch.zeros_like(v), torch.zeros_like(state)
    for n in range(11):
        for h in range(3):
            for m in range(n + 1):
                score = (a[:, h, n] * b[:, h, m].conj()).real.sum(-1, keepdim=True)
                expected[:, h, n] += 0.5 * gamma[h] ** (n - m) * score * v[:, h, m]
            query = torch.view_as_real(a[:, h, n]).flatten(1)
            past = torch.einsum("bk,bkv->bv", query, state[:, h])
            expected[:, h, n] += 0.5 * gamma[h] ** (n + 1) * past
    for h in range(3):
        keys = torch.view_as_real(b[:, h]).flatten(2)
        weight = gamma[h] ** torch.arange(10, -1, -1)
        expected_final[:, h] = gamma[h] ** 11 * state[:, h]
        expected_final[:, h] += torch.einsum("btk,t,btv->bkv", keys, weight, v[:, h])
    close([out, final], [expected, expected_final])


@settings(max_examples=12)
@given(tokens=st.integers(1, 19), chunk=st.integers(1, 24), kind=st.sampled_from(["paper", "lm"]))
def test_forms_and_their_gradients_are_equal(tokens, chunk, kind):
    q, k, v, _, state = inputs(tokens)
    gamma = decays(3, kind)
    expected = with_gradients("parallel", q, k, v, gamma, state)
    close(with_gradients("recurrent", q, k, v, gamma, state), expected)
    close(with_gradients("chunkwise", q, k, v, gamma, state, chunk_size=chunk), expected)


def test_chunks_that_the_kernel_takes_give_the_same():
    q, k, v, gamma, state = inputs(tokens=37)
    expected = with_gradients("recurrent", q, k, v, gamma, state)
    close(with_gradients("chunkwise", q, k, v, gamma, state, chunk_size=16), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_text_in_two_parts_is_one_text(form):
    q, k, v, gamma, state = inputs()
    whole = retention(*rotate(q, k), v, gamma, initial_state=state)
    first = [x[:, :, :4] for x in (q, k, v)]
    second = [x[:, :, 4:] for x in (q, k, v)]
    out1, middle = retention(
        *rotate(*first[:2]), first[2], gamma, form=form, chunk_size=3, initial_state=state
    )
    out2, final = retention(
        *rotate(*second[:2], 4), second[2], gamma, form=form, chunk_size=3, initial_state=middle
    )
    close([torch.cat([out1, out2], 2), final], whole)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_depend_on_the_past_and_the_present_only(form):
    q, k, v, gamma, _ = inputs(tokens=7)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = retention(*leaves, gamma, form=form, chunk_size=3)[0]
    value = (out[:, :, 4] * torch.arange(1, 7)).sum()
    dq, dk, dv = (g.abs().sum((0, 1, 3)) for g in torch.autograd.grad(value, leaves))
    assert (dq != 0).tolist() == [False] * 4 + [True] + [False] * 2
    assert (dk != 0).tolist() == (dv != 0).tolist() == [True] * 5 + [False] * 2


def test_powers_of_the_decay_do_not_overflow():
    gamma = decays(1)
    assert torch.isinf(gamma.float() ** -4096).all()  # what γ^n γ^(-m) would need
    q, k, v, _, _ = inputs(4096, 1, 1, 2, 2, torch.float32)
    out = retention(q, k, v, gamma)[0]
    exact = retention(q.double(), k.double(), v.double(), gamma)[0]
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_states_stay_in_float32_for_16_bit_inputs_and_under_autocast(form):
    q, k, v, gamma, _ = inputs(dtype=torch.bfloat16)
    out, state = retention(q, k, v, gamma, form=form)
    exact = retention(q.double(), k.double(), v.double(), gamma)[0]
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.double(), exact, atol=0.02, rtol=0.01)
    single = [x.float() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        found = retention(*single, gamma, form=form)
    close(found, retention(*single, gamma, form=form), atol=0)


# ---------------------------------------------------------------- normalized scores: the trap


def group_norm(x, epsilon):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=epsilon)


def furthest(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize(
    ("normalize", "before", "after"), [("paper", 24, 1.5e-5), ("absolute", 26, 1e-4)]
)
def test_the_group_norm_removes_normalizations_up_to_its_epsilon(normalize, before, after):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 4, 64, 16, dtype=torch.float64)
    v = torch.randn(2, 4, 64, 32, dtype=torch.float64)
    plain = retention(q, k, v, decays(4), form="parallel")[0]
    found = retention(q, k, v, decays(4), form="parallel", normalize=normalize)[0]
    assert furthest(plain, found) == pytest.approx(before, abs=1)
    differ = furthest(group_norm(plain, 1e-6), group_norm(found, 1e-6))
    assert differ == pytest.approx(after, rel=0.1)
    assert furthest(group_norm(plain, 0), group_norm(found, 0)) < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalize", ["paper", "absolute"])
def test_normalizing_divides_rows_by_positive_numbers_and_leaves_the_state(form, normalize):
    q, k, v, gamma, state = inputs()
    options = dict(form=form, chunk_size=4, initial_state=state)
    plain, expected = retention(q, k, v, gamma, **options)
    out, final = retention(q, k, v, gamma, normalize=normalize, seen=5, **options)
    ratio = out / plain
    assert (ratio > 0).all() and (ratio < 1).all()
    close([ratio.std(-1)], [torch.zeros(2, 3, 11).double()])
    close([final], [expected])


def test_the_published_forms_divide_differently():
    q, k, v, gamma, _ = inputs(tokens=12)
    sums = row_sums(gamma, 12)
    scores = (
        (q @ k.mT)
        / 2
        * torch.stack(
            [g ** (torch.arange(12)[:, None] - torch.arange(12)).clamp(min=0) for g in gamma]
        ).tril()
    )
    scores = scores / sums.sqrt()[..., None]
    for normalize, rows in (("paper", scores.sum(-1).abs()), ("absolute", scores.abs().sum(-1))):
        expected = scores / rows.clamp(min=1)[..., None] @ v  # R̃ V
        close([retention(q, k, v, gamma, form="parallel", normalize=normalize)[0]], [expected])
    expected = retention(q, k, v, gamma)[0] / sums.sqrt()[..., None]
    close([retention(q, k, v, gamma, form="recurrent", normalize="paper")[0]], [expected])
    # The first chunk has no past: its factor is that of the absolute sums within it
    found = retention(q, k, v, gamma, form="chunkwise", chunk_size=4, normalize="paper")[0]
    first = (x[:, :, :4] for x in (q, k, v))
    alone = retention(*first, gamma, form="parallel", normalize="absolute")[0]
    close([found[:, :, :4]], [alone])


def test_normalized_decoding_counts_the_tokens_that_were_seen():
    q, k, v, gamma, _ = inputs()
    options = dict(form="recurrent", normalize="paper")
    whole = retention(q, k, v, gamma, **options)[0]
    _, state = retention(*(x[:, :, :6] for x in (q, k, v)), gamma)
    rest = (x[:, :, 6:] for x in (q, k, v))
    close([retention(*rest, gamma, initial_state=state, seen=6, **options)[0]], [whole[:, :, 6:]])


def test_row_sums_are_sums_of_powers():
    gamma = torch.tensor([0.5, 1 - 2**-20, 1.0], dtype=torch.float64)
    powers = gamma[:, None] ** torch.arange(9)
    close([row_sums(gamma, 6, seen=3)], [powers.cumsum(1)[:, 3:]], atol=1e-9)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(form="linear"), "the form is 'linear'; choose chunkwise, parallel, recurrent"),
        (dict(chunk_size=0), "at least 1 token"),
        (dict(normalize="rows"), '"paper", "absolute" or None'),
        (dict(seen=-1), "at least 0"),
    ],
)
def test_options_that_do_not_exist(change, said):
    q, k, v, gamma, _ = inputs()
    with pytest.raises(ValueError, match=said):
        retention(q, k, v, gamma, **change)


def test_shapes_and_decays_that_do_not_fit():
    q, k, v, gamma, state = inputs()
    bare = inspect.unwrap(retention)  # without the check of annotated shapes, as outside of tests
    for bad in ((q, k[:, :, :5], v, gamma), (q, k, v[:, :2], gamma), (q, k, v, gamma[:2])):
        with pytest.raises(ValueError, match=r"q, k, v and gamma have the shapes \(2, 3, 11, 4\)"):
            bare(*bad)
    with pytest.raises(ValueError, match=r"for this q and v it is \(2, 3, 4, 6\)"):
        bare(q, k, v, gamma, initial_state=state.mT)
    with pytest.raises(ValueError, match="what a token keeps"):
        retention(q, k, v, gamma + 0.5)
