"""The loss without logits: against PyTorch's and by hand; the kernels against both."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.kernels import linear_cross_entropy as module
from effnb.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_distillation,
    linear_distillation_reference,
)


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """A vocabulary of hundreds is then taken in several pieces, as one of thousands is."""
    monkeypatch.setattr(module, "WORDS", 48)


def heads(proof, tokens, hidden, words, dtype=torch.float32, seed=0):
    x = proof.tensor(tokens, hidden, dtype=dtype, seed=seed, grad=True)
    w = (proof.tensor(words, hidden, seed=seed + 1) / hidden**0.5).to(dtype)
    return x, w.detach().requires_grad_()


def labels_of(proof, tokens, words, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(words, (tokens,), generator=generator).to(proof.device)


# ---------------------------------------------------------------- the definition


def test_by_hand():
    """Two words, logits 1 and 0: the softmax is 0.731, and the loss of the first word 0.313."""
    x, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    found = linear_cross_entropy(x, w, torch.tensor([0]))
    assert float(found) == pytest.approx(math.log(1 + math.exp(-1)))
    teacher = linear_distillation(x, w, torch.zeros(1, 3), torch.ones(2, 3))
    p = 1 / (1 + math.exp(-1))
    assert float(teacher) == pytest.approx(0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p)))


def test_it_is_the_loss_that_torch_computes_and_so_are_its_gradients(proof):
    x, w = heads(proof, 20, 16, 130, torch.float64)
    labels = labels_of(proof, 20, 130)
    labels[3] = -100
    found = linear_cross_entropy(x, w, labels)
    expected = torch.nn.functional.cross_entropy(x @ w.T, labels, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    counted = labels != -100
    for mine, theirs in zip(
        torch.autograd.grad(found[counted].mean(), (x, w), retain_graph=True),
        torch.autograd.grad(torch.nn.functional.cross_entropy(x @ w.T, labels), (x, w)),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, labels), (x, w))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_teacher_is_the_divergence_that_torch_computes(proof, temperature):
    x, w = heads(proof, 7, 8, 100, torch.float64)
    t, u = heads(proof, 7, 12, 100, torch.float64, seed=5)
    found = linear_distillation(x, w, t, u, temperature=temperature)
    q = (t @ u.T / temperature).log_softmax(1)
    p = (x @ w.T / temperature).log_softmax(1)
    expected = torch.nn.functional.kl_div(p, q, log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        found, linear_distillation_reference(x, w, t, u, temperature=temperature)
    )

    def loss(x, w):
        return linear_distillation(x, w, t, u, temperature=temperature)

    assert torch.autograd.gradcheck(loss, (x, w))
    assert torch.autograd.grad(loss(x, w).sum(), (t, u), allow_unused=True) == (None, None)
    itself = linear_distillation(x, w, x.detach(), w.detach(), temperature=temperature)
    assert float(itself.abs().max()) < 1e-12


def test_ignored_tokens_have_no_loss_and_no_gradient(proof):
    x, w = heads(proof, 6, 8, 20)
    labels = torch.tensor([0, 1, 7, 3, 4, 7], device=proof.device)
    losses = linear_cross_entropy(x, w, labels, ignore_index=7)
    assert [bool(loss) for loss in losses] == [True, True, False, True, True, False]
    dx, dw = torch.autograd.grad(losses.sum(), (x, w))
    assert [bool(row.any()) for row in dx] == [True, True, False, True, True, False]
    others = linear_cross_entropy(x[labels != 7], w, labels[labels != 7]).sum()
    torch.testing.assert_close(dw, torch.autograd.grad(others, w)[0])
    t, u = heads(proof, 6, 8, 20, seed=5)
    found = linear_distillation(x, w, t, u, counted=labels != 7)
    assert [bool(loss) for loss in found] == [True, True, False, True, True, False]
    assert not bool(torch.autograd.grad(found.sum(), x)[0][labels == 7].any())


def test_gradients_of_a_mean_are_not_lost_in_half_precision(proof):
    """A gradient of 1e-7 has no digits in float16, its sums have."""
    x, w = heads(proof, 64, 16, 60)
    labels = labels_of(proof, 64, 60)
    expected = torch.autograd.grad(linear_cross_entropy(x, w, labels).mean() / 1e4, w)[0]
    half = [z.detach().half().requires_grad_() for z in (x, w)]
    found = torch.autograd.grad(linear_cross_entropy(*half, labels).mean() * 1e4, half[1])[0]
    torch.testing.assert_close(found.float() / 1e8, expected, rtol=0.02, atol=2e-2 * 1e-6)


def test_logits_are_never_all_in_memory(monkeypatch):
    """Of 50,000 words and 200 tokens, no tensor of the chunked form has more than a chunk."""
    monkeypatch.setattr(module, "WORDS", 1000)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            out = function(*arguments, **(keywords or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    x, w = torch.randn(200, 8, requires_grad=True), torch.randn(50_000, 8, requires_grad=True)
    labels = torch.arange(200)
    with Watch():
        linear_cross_entropy(x, w, labels).mean().backward()
    assert largest <= max(200 * 1000 * 4, 50_000 * 8 * 4)


# ---------------------------------------------------------------- the kernels


@pytest.mark.parametrize(
    ("tokens", "hidden", "words"), [(5, 32, 40), (70, 24, 150), (130, 64, 129)]
)
def test_kernel(proof, dtype, tokens, hidden, words):
    x, w = heads(proof, tokens, hidden, words, dtype)
    labels = labels_of(proof, tokens, words)
    labels[1] = -100

    def ours(x, w):
        return linear_cross_entropy(x, w, proof.guarded(labels), backend=proof.kernel)

    def definition(x, w):
        return linear_cross_entropy_reference(x, w, labels)

    proof.compare(ours, definition, x, w, factor=8.0 if dtype != torch.float32 else 4.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kernel_with_a_teacher(proof, dtype, temperature):
    x, w = heads(proof, 70, 24, 150, dtype)
    t, u = (z.detach() for z in heads(proof, 70, 40, 150, dtype, seed=5))

    def ours(x, w):
        given = proof.guarded(t), proof.guarded(u)
        return linear_distillation(x, w, *given, temperature=temperature, backend=proof.kernel)

    def definition(x, w):
        kind = torch.float64 if x.dtype == torch.float64 else x.dtype
        return linear_distillation_reference(x, w, t.to(kind), u.to(kind), temperature=temperature)

    proof.compare(ours, definition, x, w, factor=8.0 if dtype != torch.float32 else 4.0)


@pytest.mark.unsanitized
@settings(max_examples=6)
@given(
    tokens=st.integers(0, 70), hidden=st.integers(1, 40), words=st.integers(1, 140),
    teacher=st.booleans(),
)  # fmt: skip
def test_kernel_on_any_shape(proof, tokens, hidden, words, teacher):
    x, w = heads(proof, tokens, hidden, words)
    if teacher:
        t, u = (z.detach() for z in heads(proof, tokens, hidden + 1, words, seed=5))
        found = linear_distillation(x, w, t, u, backend=proof.kernel)
        expected = linear_distillation_reference(x, w, t, u)
    else:
        labels = labels_of(proof, tokens, words)
        found = linear_cross_entropy(x, w, labels, backend=proof.kernel)
        expected = linear_cross_entropy_reference(x, w, labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_kernel_with_large_logits(proof):
    x, w = (z.detach() for z in heads(proof, 5, 16, 60))
    labels = labels_of(proof, 5, 60)
    found = linear_cross_entropy(1000 * x, w, labels, backend=proof.kernel)
    expected = linear_cross_entropy_reference(1000 * x.double(), w.double(), labels)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)


# ---------------------------------------------------------------- bad input


def test_what_does_not_fit():
    x, w, labels = torch.ones(3, 8), torch.ones(5, 8), torch.tensor([0, 1, 4])
    with pytest.raises(ValueError, match=r"x has shape \(3, 7\).*must be \(3, 8\)"):
        linear_cross_entropy(x[:, 1:], w, labels)
    with pytest.raises(ValueError, match=r"labels has shape \(2,\).*must be \(3,\)"):
        linear_cross_entropy(x, w, labels[1:])
    with pytest.raises(ValueError, match="a label is neither a word, 0 to 4, nor ignore_index"):
        linear_cross_entropy(x, w, labels + 1)
    with pytest.raises(ValueError, match="a label is neither"):
        linear_cross_entropy(x, w, labels - 1)
    with pytest.raises(TypeError, match="labels are of int32; they must be int64"):
        linear_cross_entropy(x, w, labels.int())
    with pytest.raises(TypeError, match="x is of float32 and weight of float16"):
        linear_cross_entropy(x, w.half(), labels)
    with pytest.raises(ValueError, match="words and hidden not 0"):
        linear_cross_entropy(x, w[:0], labels)
    with pytest.raises(ValueError, match="temperature is 0.0; it must be above 0"):
        linear_distillation(x, w, x, w, temperature=0)
    with pytest.raises(ValueError, match=r"teacher_weight has shape \(4, 8\).*must be \(5, 8\)"):
        linear_distillation(x, w, x, w[1:])
    with pytest.raises(ValueError, match=r"teacher has shape \(2, 8\).*must be \(3, 8\)"):
        linear_distillation(x, w, x[1:], w)
    with pytest.raises(TypeError, match="counted is of int64; it must be bool"):
        linear_distillation(x, w, x, w, counted=labels)
    with pytest.raises(TypeError, match="x is of float32 and teacher of float64"):
        linear_distillation(x, w, x.double(), w.double())
    assert linear_cross_entropy(x[:0], w, labels[:0]).shape == (0,)
