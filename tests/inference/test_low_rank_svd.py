"""Truncation by the weight, by the inputs and by the loss: each the optimum of its own measure."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.core.calibration import Calibration
from effnb.core.modules import linears
from effnb.core.training import TrainingSettings
from effnb.inference.low_rank import (
    Gram,
    InputMean,
    asvd,
    asvd_weight,
    decompose,
    decompose_asvd,
    decompose_fwsvd,
    decompose_svd_llm,
    fisher,
    fwsvd,
    fwsvd_weight,
    importance,
    ranks_of,
    scaled_svd,
    svd,
    svd_llm,
    svd_llm_weight,
    truncate,
    truncated_svd,
    tune_factors,
    whitening,
)
from effnb.inference.quantization import rtn


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n, tokens, seed=5):
    """Inputs with covariance, and a few features much larger than the rest; columns are tokens."""
    mixed = randn(n, n, seed=seed) @ randn(n, tokens, seed=seed + 1)
    mixed[: max(1, n // 8)] *= 10
    return mixed


def layer_inputs(model, ids, name):
    """What a layer reads when the whole model runs."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return torch.cat([x.flatten(0, -2) for x in seen])


shapes = st.tuples(st.integers(1, 14), st.integers(1, 14))


# --- plain SVD ------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(shapes, st.data())
def test_eckart_young(shape, data):
    """The squared error is the sum of the squared singular values dropped."""
    rank = data.draw(st.integers(1, min(shape)))
    W = randn(*shape)
    factors = truncated_svd(W, rank)
    sigma = torch.linalg.svdvals(W)
    error = (W - factors.product()).square().sum()
    torch.testing.assert_close(error, sigma[rank:].square().sum(), rtol=1e-9, atol=1e-20)
    assert factors.error == pytest.approx(float(error.sqrt()), rel=1e-9, abs=1e-10)
    assert torch.linalg.matrix_rank(factors.product()) == rank
    assert factors.left.shape == (shape[0], rank) and factors.right.shape == (rank, shape[1])


def test_the_singular_values_are_shared_by_both_factors():
    factors = truncated_svd(randn(9, 13), 4)
    root = factors.singular_values[:4].diag()
    torch.testing.assert_close(factors.left.T @ factors.left, root)
    torch.testing.assert_close(factors.right @ factors.right.T, root)


def test_the_first_columns_are_the_smaller_factors():
    W, gram = randn(9, 13), inputs(13, 50) @ inputs(13, 50).T
    for some, few in (
        (truncated_svd(W), truncated_svd(W, 3)),
        (svd_llm_weight(W, gram), svd_llm_weight(W, gram, 3)),
    ):
        torch.testing.assert_close(some.truncated(3).product(), few.product())
        assert some.truncated(3).error == pytest.approx(few.error)
    with pytest.raises(ValueError, match="rank is 4; it must lie between 1 and the full rank, 3"):
        few.truncated(4)


def test_a_decomposition_is_made_once_and_truncated_at_will(llama, ids):
    parts = decompose(llama)
    for options in ({"kept": 0.6}, {"rank": 5}, {"rank": 20, "always": True}):
        one, other = svd(llama, **options), truncate(llama, parts, **options)
        assert ranks_of(one) == ranks_of(other)
        with torch.no_grad():
            torch.testing.assert_close(one(ids).logits, other(ids).logits, rtol=1e-3, atol=1e-3)
    assert ranks_of(truncate(llama, parts, 1.0)) == {}


@pytest.mark.parametrize(
    ("scale", "sentence"),
    [
        (torch.ones(4), r"a weight with 5 inputs takes \(5,\) or \(5, 5\)"),
        (torch.tensor([1.0, 1, 1, 1, 0]), "finite and above 0"),
        (torch.full((5,), torch.nan), "finite and above 0"),
        (-torch.eye(5), "finite and above 0"),
    ],
)
def test_a_scale_must_be_undone(scale, sentence):
    with pytest.raises(ValueError, match=sentence):
        scaled_svd(randn(3, 5), scale, 2)


# --- ASVD -----------------------------------------------------------------------------------------


def test_asvd_without_alpha_is_svd(llama, ids):
    W = randn(9, 13)
    factors = asvd_weight(W, randn(13).abs(), 4, alpha=0.0)
    torch.testing.assert_close(factors.product(), truncated_svd(W, 4).product())
    with torch.no_grad():
        expected = svd(llama, 0.5)(ids).logits
        torch.testing.assert_close(asvd(llama, ids, 0.5, alpha=0.0)(ids).logits, expected)


@settings(max_examples=20)
@given(shapes, st.sampled_from([0.25, 0.5, 1.0]), st.data())
def test_asvd_minimises_the_error_weighed_by_its_scale(shape, alpha, data):
    rank = data.draw(st.integers(1, min(shape)))
    W, mean = randn(*shape), randn(shape[1], seed=1).abs() + 0.01
    weights = mean ** (2 * alpha)  # the floor of 1e-6 is far below

    def weighed(factors):
        return float(((W - factors.product()).square() * weights).sum())

    found = asvd_weight(W, mean, rank, alpha=alpha)
    assert weighed(found) <= weighed(truncated_svd(W, rank)) * (1 + 1e-6) + 1e-12
    assert found.error**2 == pytest.approx(weighed(found), rel=1e-3, abs=1e-9)


def test_asvd_looks_at_the_mean_magnitude_of_the_inputs(llama, ids):
    """In the unchanged model the last layer's factors follow from its own inputs."""
    name = "model.layers.2.mlp.down_proj"
    x = layer_inputs(llama, ids, name)
    observer = InputMean(x.shape[1])
    observer.update(x[:10])
    observer.update(x[10:])
    torch.testing.assert_close(observer.value.float(), x.abs().mean(0))
    expected = asvd_weight(llama.get_submodule(name).weight, x.abs().mean(0), 7).product().float()
    found = asvd(llama, ids, rank=7, sequential=False).get_submodule(name).weight
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_an_input_that_is_always_zero_is_no_harm():
    mean = torch.tensor([0.0, 1, 1, 1, 1])
    assert torch.isfinite(asvd_weight(randn(4, 5), mean, 2).product()).all()


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_lies_between_0_and_1(llama, ids, alpha):
    with pytest.raises(ValueError, match=f"alpha is {alpha}; it must lie between 0"):
        asvd(llama, ids, 0.5, alpha=alpha)


# --- SVD-LLM --------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(shapes, st.data())
def test_the_predicted_loss_is_the_measured_one(shape, data):
    """In float64, to rounding; and the error of no other rank-r weight here is smaller."""
    rank = data.draw(st.integers(1, min(shape)))
    W, X = randn(*shape), inputs(shape[1], 40)
    factors = svd_llm_weight(W, X @ X.T, rank)
    measured = float(((W - factors.product()) @ X).norm())
    whole = float((W @ X).norm())
    assert factors.error == pytest.approx(measured, rel=1e-9, abs=1e-9 * whole)
    for other in (truncated_svd(W, rank), asvd_weight(W, X.abs().mean(1), rank)):
        assert measured <= float(((W - other.product()) @ X).norm()) * (1 + 1e-9) + 1e-9 * whole
    # The same weight without Cholesky: W on the first left singular vectors of the outputs.
    U = torch.linalg.svd(W @ X)[0][:, :rank]
    torch.testing.assert_close(factors.product(), U @ U.T @ W, rtol=0, atol=1e-7 * whole)


def test_the_order_of_the_methods_on_one_layer():
    """With large and correlated inputs: SVD loses most, SVD-LLM least, by a margin."""
    W, X = randn(64, 64), inputs(64, 400)
    mean = X.abs().mean(1)
    errors = [
        float(((W - factors.product()) @ X).norm())
        for factors in (
            truncated_svd(W, 20),
            asvd_weight(W, mean, 20),
            svd_llm_weight(W, X @ X.T, 20),
        )
    ]
    assert errors[0] > 1.2 * errors[1]
    assert errors[1] > 1.2 * errors[2]


def test_white_inputs_leave_nothing_to_know():
    W = randn(9, 13)
    Q = torch.linalg.qr(randn(40, 13))[0].T * 3  # rows are orthogonal: G = 9 I
    torch.testing.assert_close(
        svd_llm_weight(W, Q @ Q.T, 4).product(), truncated_svd(W, 4).product()
    )


def test_the_scale_of_the_inputs_does_not_matter():
    W, X = randn(9, 13), inputs(13, 40)
    one, other = svd_llm_weight(W, X @ X.T, 4), svd_llm_weight(W, 49 * X @ X.T, 4)
    torch.testing.assert_close(one.product(), other.product())
    assert other.error == pytest.approx(7 * one.error)


def test_whitening_gives_the_lower_factor():
    gram = inputs(6, 30) @ inputs(6, 30).T
    L = whitening(gram)
    torch.testing.assert_close(L @ L.T, gram)
    assert torch.equal(L, L.tril())


@pytest.mark.parametrize("tokens", [1, 5, 12])
def test_fewer_tokens_than_inputs(tokens):
    """A singular Gram matrix gets a little ridge; the prediction then counts that too."""
    W, X = randn(9, 13), inputs(13, tokens)
    for rank in (1, 4, 9):
        factors = svd_llm_weight(W, X @ X.T, rank)
        measured = float(((W - factors.product()) @ X).norm())
        whole = float((W @ X).norm())
        assert measured <= factors.error * (1 + 1e-6) + 1e-12 * whole
        assert factors.error < measured + 1e-2 * whole


def test_dead_inputs_and_dead_layers():
    W, X = randn(9, 13), inputs(13, 40)
    X[5] = 0
    factors = svd_llm_weight(W, X @ X.T, 4)
    measured = float(((W - factors.product()) @ X).norm())
    assert factors.error == pytest.approx(measured, rel=1e-3)
    nothing = svd_llm_weight(W, torch.zeros(13, 13), 4)
    torch.testing.assert_close(nothing.product(), truncated_svd(W, 4).product())


@settings(max_examples=20)
@given(st.integers(1, 150), st.lists(st.integers(0, 9), min_size=1, max_size=4), st.booleans())
def test_the_gram_matrix_is_summed_over_batches(features, batches, double):
    kind = torch.float64 if double else torch.float32
    parts = [randn(size, features, seed=i).to(kind) for i, size in enumerate(batches)]
    observer = Gram(features)
    for part in parts:
        observer.update(part)
    X = torch.cat(parts).double().T
    tolerance = 1e-12 if double else 1e-4
    torch.testing.assert_close(observer.value, X @ X.T, rtol=tolerance, atol=tolerance)
    assert observer.tokens == sum(batches)


def test_predicted_and_measured_in_a_model(llama, ids):
    """Each layer's predicted error is that of its outputs on the model's own inputs."""
    model = llama.double()
    parts = decompose_svd_llm(model, ids)
    assert parts.keys() == linears(model).keys()
    new = svd_llm(model, ids, 0.5, sequential=False)
    for name, rank in ranks_of(new).items():
        X = layer_inputs(model, ids, name).T
        change = model.get_submodule(name).weight - new.get_submodule(name).weight
        measured = float((change.detach() @ X).norm())
        assert parts[name].truncated(rank).error == pytest.approx(measured, rel=1e-8), name


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("method", [asvd, svd_llm])
def test_which_inputs_are_looked_at(llama, ids, sequential, method):
    """Sequential: those behind factorised blocks; otherwise those of the original."""
    model = llama.double()
    name = "model.layers.2.self_attn.q_proj"
    new = method(model, ids, 0.5, sequential=sequential)
    X = layer_inputs(new if sequential else model, ids, name).T
    W, rank = model.get_submodule(name).weight, ranks_of(new)[name]
    expected = (
        asvd_weight(W, X.abs().mean(1), rank)
        if method is asvd
        else svd_llm_weight(W, X @ X.T, rank)
    )
    torch.testing.assert_close(
        new.get_submodule(name).weight, expected.product(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("method", [asvd, svd_llm, fwsvd])
def test_calibrated_methods_keep_their_word(llama, ids, method):
    before = {name: p.clone() for name, p in llama.named_parameters()}
    calls = []
    watched = Calibration(ids, progress=lambda done, all_: calls.append((done, all_)))
    new = method(llama, watched, 0.5)
    assert calls[-1][0] == calls[-1][1] == len(calls)
    assert new.model.embed_tokens.weight is llama.model.embed_tokens.weight
    assert ranks_of(new) == ranks_of(svd(llama, 0.5))
    assert ranks_of(method(llama, ids, 1.0)) == {}
    only = method(llama, ids, rank={"model.layers.1.mlp.up_proj": 3})
    assert ranks_of(only) == {"model.layers.1.mlp.up_proj": 3}
    new(ids).logits.sum().backward()  # the factors can be trained afterwards
    assert all(p.grad is not None for n, p in new.named_parameters() if n.endswith(".v.weight"))
    for name, parameter in llama.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    ("parts", "method"),
    [(decompose_asvd, asvd), (decompose_svd_llm, svd_llm), (decompose_fwsvd, fwsvd)],
)
def test_calibrated_decompositions_are_truncated_at_will(llama, ids, parts, method):
    options = {} if method is fwsvd else {"sequential": False}
    expected = method(llama, ids, 0.6, **options)
    found = truncate(llama, parts(llama, ids), 0.6)
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [asvd, svd_llm, fwsvd])
def test_bad_input_of_calibrated_methods(llama, ids, method):
    with pytest.raises(ValueError, match="calibration data is empty"):
        method(llama, ids[:0], 0.5)
    with pytest.raises(ValueError, match="70 tokens; the model's context is 64"):
        method(llama, torch.ones(2, 70, dtype=torch.long), 0.5)
    with pytest.raises(ValueError, match="give either kept or rank"):
        method(llama, ids)
    with pytest.raises(ValueError, match=r"kept is 2\.0"):
        method(llama, ids, 2.0)
    with pytest.raises(ValueError, match="quantized already; factorise the original"):
        method(rtn(llama, 8), ids, 0.5)
    with pytest.raises(ValueError, match="nothing"):
        method(llama, ids, 0.5, layers="nothing")
    with torch.no_grad():
        llama.model.layers[1].input_layernorm.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"finite|NaN|nan"):
        method(llama, ids, 0.5)


@pytest.mark.parametrize(
    ("gram", "sentence"),
    [
        (torch.ones(3, 4), "must be square"),
        (torch.full((3, 3), torch.nan), "NaN or infinite"),
    ],
)
def test_a_gram_matrix_is_square_and_finite(gram, sentence):
    with pytest.raises(ValueError, match=sentence):
        whitening(gram)


# --- training the factors -------------------------------------------------------------------------


def test_factors_are_tuned_one_after_the_other(llama, ids):
    new = svd_llm(llama, ids, 0.3)
    before = {k: v.clone() for k, v in new.state_dict().items()}
    run = TrainingSettings(steps=8, learning_rate=1e-2)
    tuned, (first, second) = tune_factors(new, lambda step: ids, run, rank=4)
    assert first.losses[-1] < first.losses[0]
    assert second.losses[-1] < second.losses[0]
    assert second.losses[0] < first.losses[0]  # the second stage starts from the first one's end
    assert ranks_of(tuned) == ranks_of(new)
    name = "model.layers.0.mlp.up_proj"
    for factor in ("u", "v"):
        change = tuned.get_submodule(f"{name}.{factor}").weight - before[f"{name}.{factor}.weight"]
        assert torch.linalg.matrix_rank(change.detach(), rtol=1e-4) == 4
    for key, value in new.state_dict().items():
        assert torch.equal(value, before[key])
    with pytest.raises(ValueError, match="no layer of this model is factorised"):
        tune_factors(llama, lambda step: ids, run)


# --- FWSVD ----------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(shapes, st.sampled_from(["inputs", "outputs"]), st.data())
def test_fwsvd_minimises_the_error_weighed_by_importance(shape, axis, data):
    rank = data.draw(st.integers(1, min(shape)))
    W, F = randn(*shape), randn(*shape, seed=1).square() + 0.01
    squares = F.sum(0) if axis == "inputs" else F.sum(1)[:, None]
    torch.testing.assert_close(importance(F, axis).square(), squares.flatten())

    def weighed(factors):
        return float(((W - factors.product()).square() * squares).sum())

    found = fwsvd_weight(W, F, rank, axis=axis)
    assert found.error**2 == pytest.approx(weighed(found), rel=1e-8, abs=1e-12)
    assert weighed(found) <= weighed(truncated_svd(W, rank)) * (1 + 1e-9) + 1e-12
    # No other matrix of this rank does better: a step to any side makes it worse.
    for seed in range(3):
        left = found.left + 1e-3 * randn(*found.left.shape, seed=seed)
        moved = float(((W - left @ found.right).square() * squares).sum())
        assert moved >= weighed(found) * (1 - 1e-12) - 1e-15


@pytest.mark.parametrize("axis", ["inputs", "outputs"])
def test_equal_information_is_plain_svd(axis):
    W = randn(9, 13)
    for same in (torch.full((9, 13), 0.3), torch.zeros(9, 13)):
        torch.testing.assert_close(
            fwsvd_weight(W, same, 4, axis=axis).product(), truncated_svd(W, 4).product()
        )


def test_weights_without_information_are_given_up_first():
    """Rank 2 for 6 inputs of which 2 matter: those two come out right."""
    W, F = randn(5, 6), torch.zeros(5, 6)
    F[:, 1] = F[:, 4] = 1.0
    product = fwsvd_weight(W, F, 2).product()
    assert torch.isfinite(product).all()
    torch.testing.assert_close(product[:, [1, 4]], W[:, [1, 4]], rtol=1e-4, atol=1e-4)


def test_fisher_is_the_mean_of_squares_not_the_square_of_the_mean(llama, ids):
    name = "model.layers.1.mlp.up_proj"
    llama.requires_grad_(False)
    found = fisher(llama, ids)
    assert found.keys() == linears(llama).keys()
    assert all(p.grad is None and not p.requires_grad for p in llama.parameters())
    expected, together = 0, 0
    weight = llama.get_submodule(name).weight
    weight.requires_grad_(True)
    for row in ids:
        logits = llama(row[None]).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, row[1:])
        gradient = torch.autograd.grad(loss, weight)[0]
        expected, together = expected + gradient**2 / len(ids), together + gradient / len(ids)
    torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-9)
    assert found[name].sum() > 1.5 * together.square().sum()


def test_fisher_is_the_same_where_gradients_are_switched_off(llama, ids):
    found = fisher(llama, ids[:2], layers="*.q_proj")
    with torch.inference_mode():
        again = fisher(llama, ids[:2], layers="*.q_proj")
    assert found.keys() == again.keys()
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_fisher_of_padded_batches_and_other_losses(llama, ids):
    """Padding has no gradient; a batch of two is two samples."""
    padded = torch.cat([ids[:2], torch.zeros(2, 5, dtype=torch.long)], 1)
    mask = torch.ones_like(padded)
    mask[:, -5:] = 0
    found = fisher(llama, [{"input_ids": padded, "attention_mask": mask}], layers="*.q_proj")
    plain = fisher(llama, ids[:2], layers="*.q_proj")
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-8)
    double = fisher(
        llama, ids[:2], layers="*.q_proj", loss=lambda m, s: 2 * m(**s, labels=s["input_ids"]).loss
    )
    for name, value in plain.items():
        torch.testing.assert_close(double[name], 4 * value, rtol=1e-3, atol=1e-8)


def test_bad_information(llama, ids):
    W = randn(3, 4)
    with pytest.raises(ValueError, match=r"shape \(4, 3\), the weight \(3, 4\)"):
        fwsvd_weight(W, torch.ones(4, 3), 2)
    with pytest.raises(ValueError, match="nowhere below 0"):
        fwsvd_weight(W, -torch.ones(3, 4), 2)
    for call in (
        lambda: fwsvd(llama, ids, 0.5, axis="rows"),
        lambda: fwsvd_weight(W, torch.ones(3, 4), 2, axis="rows"),
    ):
        with pytest.raises(ValueError, match="axis is 'rows'"):
            call()
    with pytest.raises(ValueError, match="the loss of calibration sample 0 is nan"):
        fisher(llama, ids, loss=lambda m, s: m(**s).logits.sum() * torch.nan)
    with pytest.raises(ValueError, match=r"layers\.1\.\S+ ?; exclude it|does not depend on model"):
        fisher(llama, ids, loss=lambda m, s: m.model.layers[0].mlp.up_proj.weight.sum())
