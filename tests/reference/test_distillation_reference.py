"""Distillation against the libraries that practitioners use, and against published formulas."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn
from torch.func import functional_call, jacrev, vmap

from effnb.core.losses import temperature_kl
from effnb.inference.distillation import (
    beam_search,
    cosine_loss,
    distilbert_loss,
    generalized_jsd,
    hinton_loss,
    prediction_loss,
    relation_loss,
    reverse_kl,
    robust_choice,
    sample,
    tangent_kernel,
)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 9), st.floats(0.2, 9), st.integers(0, 99))
def test_the_divergence_is_torchs(rows, classes, temperature, seed):
    z, v = randn(rows, classes, seed=seed), randn(rows, classes, seed=seed + 1)
    theirs = temperature**2 * nn.functional.kl_div(
        (z / temperature).log_softmax(-1), (v / temperature).softmax(-1), reduction="batchmean"
    )
    assert float(temperature_kl(z, v, temperature)) == pytest.approx(float(theirs), abs=1e-10)
    assert float(reverse_kl(z, v)) == pytest.approx(
        float(
            nn.functional.kl_div(
                v.log_softmax(-1), z.log_softmax(-1), reduction="batchmean", log_target=True
            )
        ),
        abs=1e-10,
    )


def test_gradients_are_those_of_torchs_divergence():
    ours, theirs = (randn(4, 7).requires_grad_() for _ in range(2))
    v, y = randn(4, 7, seed=1), torch.tensor([0, 3, -100, 6])
    hinton_loss(ours, v, y, temperature=3.0, weight=0.6).backward()
    soft = 9 * nn.functional.kl_div(
        (theirs / 3).log_softmax(-1), (v / 3).softmax(-1), reduction="batchmean"
    )
    (0.6 * soft + 0.4 * nn.functional.cross_entropy(theirs, y)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def trl_generalized_jsd(student_logits, teacher_logits, labels, beta, temperature):
    """The divergence of TRL's GKD trainer, written down from its formula.

    A mixture of beta parts of the teacher; forward and reverse divergence at the ends; the sum
    over all tokens with a label, divided by their number.
    """
    student = (student_logits / temperature).log_softmax(-1)
    teacher = (teacher_logits / temperature).log_softmax(-1)

    def kl(target, given):
        return nn.functional.kl_div(given, target, reduction="none", log_target=True)

    if beta == 0:
        rows = kl(teacher, student)
    elif beta == 1:
        rows = kl(student, teacher)
    else:
        share = torch.tensor(beta, dtype=student.dtype)
        mixture = torch.logsumexp(
            torch.stack([student + torch.log1p(-share), teacher + torch.log(share)]), 0
        )
        rows = share * kl(teacher, mixture) + (1 - share) * kl(student, mixture)
    mask = labels != -100
    return rows[mask].sum() / mask.sum()


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.9, 1.0])
def test_the_generalized_divergence_is_trls(beta, temperature):
    ours, theirs = (randn(2, 5, 11).requires_grad_() for _ in range(2))
    v = randn(2, 5, 11, seed=1)
    labels = torch.ones(2, 5, dtype=torch.long)
    labels[0, :2] = labels[1, 4] = -100
    found = generalized_jsd(ours, v, beta, temperature=temperature, mask=labels != -100)
    expected = trl_generalized_jsd(theirs, v, labels, beta, temperature)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_directions_are_compared_as_torch_compares_them():
    h, t = randn(6, 5), randn(6, 5, seed=1)
    theirs = nn.CosineEmbeddingLoss()(h, t, torch.ones(6))
    torch.testing.assert_close(cosine_loss(h, t), theirs)
    z, v = randn(1, 6, 9), randn(1, 6, 9, seed=1)
    y = torch.tensor([[1, -100, 3, -100, 5, 6]])
    expected = (
        5
        * 4
        * nn.KLDivLoss(reduction="batchmean")((z[0] / 2).log_softmax(-1), (v[0] / 2).softmax(-1))
    )
    expected = expected + 2 * nn.CrossEntropyLoss()(z[0].float(), y[0]) + theirs
    torch.testing.assert_close(
        distilbert_loss(z, v, y, h[None], t[None]).double(), expected.double(), atol=1e-5, rtol=1e-5
    )


def test_soft_cross_entropy_is_torchs_with_probabilities():
    z, v = randn(4, 7), randn(4, 7, seed=1)
    theirs = nn.functional.cross_entropy(z / 3, (v / 3).softmax(-1))
    torch.testing.assert_close(prediction_loss(z, v, 3.0), theirs)


def test_relations_are_compared_by_torchs_divergence():
    a, b = (randn(2, 3, 5, 5, seed=seed).log_softmax(-1) for seed in range(2))
    theirs = nn.functional.kl_div(a, b, reduction="sum", log_target=True) / (2 * 3 * 5)
    torch.testing.assert_close(relation_loss(a, b), theirs)


# --- the robust game ------------------------------------------------------------------------------


def solved_by_linear_programming(gains, wrong):
    """max over q, theta, s of sum q g - 2 (k theta + sum s) with s >= q g - theta: the same game.

    The sum of the k largest of some numbers is the least of k theta + sum max(0, x - theta).
    """
    n = len(gains)
    # unknowns: q (n), theta (free), s (n)
    cost = np.concatenate([-gains, [2 * wrong], 2 * np.ones(n)])
    above = np.hstack([np.diag(gains), -np.ones((n, 1)), -np.eye(n)])
    total = np.concatenate([np.ones(n), [0], np.zeros(n)])[None]
    bounds = [(0, None)] * n + [(None, None)] + [(0, None)] * n
    found = linprog(cost, above, np.zeros(n), total, [1.0], bounds, method="highs")
    assert found.success
    return -found.fun, found.x[:n]


@pytest.mark.parametrize(("n", "wrong"), [(12, 2), (5, 0), (7, 3), (30, 4), (1, 0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_game_is_solved_as_by_linear_programming(n, wrong, seed):
    gains = np.random.default_rng(seed).uniform(0.05, 1, n)
    value, q = solved_by_linear_programming(gains, wrong)
    ours = robust_choice(torch.tensor(gains), wrong)
    assert ours.value == pytest.approx(value, abs=1e-12)
    np.testing.assert_allclose(ours.probabilities.numpy(), q, atol=1e-9)


# --- the kernel -----------------------------------------------------------------------------------


def test_the_kernel_is_the_one_of_torch_func():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    x, others = randn(6, 5), randn(4, 5, seed=1)
    state = {name: p.detach() for name, p in model.named_parameters()}

    def one(parameters, point):
        return functional_call(model, parameters, (point[None],))[0]

    # The contraction of full Jacobians, class by class, as PyTorch's tutorial on tangent kernels.
    left, right = (vmap(jacrev(one), (None, 0))(state, points) for points in (x, others))
    full = sum(
        torch.einsum("Naf,Mbf->NMab", left[k].flatten(2), right[k].flatten(2)) for k in state
    )
    theirs = full.diagonal(dim1=-2, dim2=-1).mean(-1)
    torch.testing.assert_close(tangent_kernel(model, x, others=others), theirs)

    def by_loop(points):
        rows = []
        for point, c in itertools.product(points, range(3)):
            model.zero_grad()
            model(point[None])[0, c].backward()
            rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return torch.stack(rows).reshape(len(points), 3, -1)

    again = torch.einsum("ncf,mcf->nm", by_loop(x), by_loop(x)) / 3
    torch.testing.assert_close(tangent_kernel(model, x), again)


# --- texts ----------------------------------------------------------------------------------------


def test_a_beam_is_that_of_transformers(tiny_llama):
    model = tiny_llama(vocab_size=24)
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([5, 9, 2])
    theirs = model.generate(
        prompt[None], attention_mask=torch.ones(1, 3, dtype=torch.long), num_beams=4,
        num_return_sequences=4, max_new_tokens=5, do_sample=False, length_penalty=0.0,
        output_scores=True, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    ours = beam_search(model, prompt, 4, 5)
    assert [y for y, _ in ours] == theirs.sequences[:, 3:].tolist()
    np.testing.assert_allclose([s for _, s in ours], theirs.sequences_scores.numpy(), atol=1e-4)


def test_a_sharp_temperature_draws_what_transformers_decodes_greedily(llama):
    llama.generation_config.eos_token_id = None
    prompt = torch.tensor([[5, 9, 2], [7, 1, 1]])
    theirs = llama.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    ours, _ = sample(llama, prompt, 6, temperature=1e-4)
    assert torch.equal(ours, theirs)
