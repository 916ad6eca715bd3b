"""Rows of many experts in one launch: values, gradients, groups of every size, bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from effnb.kernels.grouped_matmul import MOST_EXPERTS, grouped_matmul, reference

SIZES = {
    "even": [4, 4, 4],
    "some without rows": [0, 5, 0, 1],
    "one has all": [0, 19, 0],
    "more than a tile": [17, 1, 40],
    "all without rows": [0, 0],
    "a single expert": [7],
}


def ends_of(sizes, device, dtype=torch.int32):
    return torch.tensor(sizes, device=device).cumsum(0).to(dtype)


def parts(proof, sizes, n, k, dtype, beyond=0, **more):
    """x and the weights, both to be differentiated, and the ends."""
    x = proof.tensor(sum(sizes) + beyond, k, dtype=dtype, grad=True, **more)
    weight = proof.tensor(len(sizes), n, k, dtype=dtype, seed=1, grad=True, **more)
    return x, weight, ends_of(sizes, proof.device)


def ours(proof):
    return lambda x, w, ends: grouped_matmul(x, w, ends, backend=proof.kernel)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("beyond", [0, 3])
def test_groups_of_every_size(proof, dtype, name, beyond):
    inputs = parts(proof, SIZES[name], 37, 41, dtype, beyond)
    y, dx, dw = proof.compare(ours(proof), reference, *inputs)
    rows = sum(SIZES[name])
    assert not bool(y[rows:].any()) and not bool(dx[rows:].any())
    for expert, size in enumerate(SIZES[name]):
        assert bool(dw[expert].any()) == (size > 0)


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_tensors_that_are_not_contiguous(proof, dtype, layout):
    inputs = parts(proof, [3, 0, 6], 35, 18, dtype, layout=layout)
    assert not any(t.is_contiguous() for t in inputs[:2])
    proof.compare(ours(proof), reference, *inputs)


def test_the_reference_is_each_row_by_its_own_matrix():
    x, weight = torch.randn(7, 5).double(), torch.randn(3, 4, 5).double()
    y = reference(x, weight, torch.tensor([2, 2, 6]))
    for row, expert in enumerate([0, 0, 2, 2, 2, 2]):
        torch.testing.assert_close(y[row], weight[expert] @ x[row])
    assert not bool(y[6].any())


@pytest.mark.parametrize("place", [0, 1], ids=["x", "weight"])
def test_places_beyond_32_bits(proof, place):
    x, w, ends = parts(proof, [2, 3], 6, 5, torch.float16)
    inputs = [x.detach(), w.detach()]
    near = grouped_matmul(*inputs, ends, backend=proof.kernel)
    inputs[place] = proof.far(inputs[place])
    assert torch.equal(grouped_matmul(*inputs, ends, backend=proof.kernel), near)


@examples(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(0, 5))
def test_products_of_any_groups(sizes, beyond):
    """The same numbers as one product after another, wherever the groups end."""
    x = torch.randn(sum(sizes) + beyond, 8)
    weight = torch.randn(len(sizes), 8, 8)
    ends = ends_of(sizes, "cpu")
    expected = reference(x, weight, ends)
    found = grouped_matmul(x, weight, ends)
    assert torch.equal(found, expected)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    direct = torch.einsum("mk,mnk->mn", x[: len(owner)], weight[owner])
    torch.testing.assert_close(found[: len(owner)], direct, rtol=1e-4, atol=1e-5)


def test_experts_may_be_renamed(proof):
    """Another order of the experts, and rows sorted by it, give the same rows."""
    x, w, ends = (t.detach() for t in parts(proof, [3, 5, 2], 33, 20, torch.float32))
    y = grouped_matmul(x, w, ends, backend=proof.kernel)
    groups = x.split([3, 5, 2])
    other = torch.cat([groups[2], groups[0], groups[1]])
    again = grouped_matmul(
        other, w[[2, 0, 1]], ends_of([2, 3, 5], proof.device), backend=proof.kernel
    )
    expected = y.split([3, 5, 2])
    assert torch.equal(again, torch.cat([expected[2], expected[0], expected[1]]))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rows_of_no_expert_may_be_infinite(proof, backend):
    x, w, ends = (t.detach() for t in parts(proof, [3, 2], 6, 5, torch.float32, beyond=2))
    x[5], w[1, 0, 0] = torch.inf, torch.inf
    y = grouped_matmul(x, w, ends, backend=backend)
    assert bool(y[:3].isfinite().all()) and not bool(y[5:].any())
    assert not bool(y[3:5, 0].isfinite().any())


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("rows", "n", "k"), [(0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_products_of_no_size(proof, backend, rows, n, k):
    x, w = proof.tensor(rows, k, grad=True), proof.tensor(2, n, k, seed=1, grad=True)
    y = grouped_matmul(x, w, ends_of([rows, 0], proof.device), backend=backend)
    assert y.shape == (rows, n) and not (k == 0 and bool(y.any()))
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert dx.shape == x.shape and dw.shape == w.shape


def test_ends_of_either_width(proof):
    x, w, ends = (t.detach() for t in parts(proof, [3, 2], 6, 5, torch.float32))
    narrow = grouped_matmul(x, w, ends, backend=proof.kernel)
    assert torch.equal(grouped_matmul(x, w, ends.long(), backend=proof.kernel), narrow)
    spread = torch.stack([ends, ends], 1)[:, 0]
    assert torch.equal(grouped_matmul(x, w, spread, backend=proof.kernel), narrow)


def test_only_what_is_asked_for_gets_a_gradient(proof):
    x, w, ends = parts(proof, [3, 2], 6, 5, torch.float32)
    grouped_matmul(x.detach(), w, ends, backend=proof.kernel).sum().backward()
    assert w.grad is not None and x.grad is None


def test_what_does_not_fit_is_refused(proof):
    x, w, ends = (t.detach() for t in parts(proof, [3, 2], 6, 5, torch.float32))
    with pytest.raises(ValueError, match=r"\(5, 4\) does not fit weights of shape \(2, 6, 5\)"):
        grouped_matmul(x[:, :4], w, ends)
    with pytest.raises(ValueError, match=r"ends has shape \(1,\).*\(2, 6, 5\)"):
        grouped_matmul(x, w, ends[:1])
    with pytest.raises(ValueError, match="float32 and float16; they must be the same"):
        grouped_matmul(x, w.half(), ends)
    with pytest.raises(TypeError, match="ends is of float32; it must be int32 or int64"):
        grouped_matmul(x, w, ends.float())
    with pytest.raises(TypeError, match="weight is of int64"):
        grouped_matmul(x, w.long(), ends)
    if proof.device.type == "cpu":
        for wrong in ([3, 6], [4, 2], [-1, 5]):
            with pytest.raises(ValueError, match="ends is .*; it must rise"):
                grouped_matmul(x, w, torch.tensor(wrong))
    many = w.new_zeros(MOST_EXPERTS + 1, 1, 5)
    last = torch.full((MOST_EXPERTS + 1,), 5, device=proof.device)
    with pytest.raises(ValueError, match="the kernel takes up to 1024"):
        grouped_matmul(x, many, last, backend="triton")
    assert not bool(grouped_matmul(x, many, last).any())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[0, 5, 0, 1], [17, 1, 40], [0, 0], [7]])
def test_the_reference_without_gradients_is_the_same(kind, sizes):
    """There each product is written where it belongs, past the rows of no expert."""
    x = torch.randn(sum(sizes) + 3, 6).to(kind)
    weight = torch.randn(len(sizes), 5, 6).to(kind)
    before = x.clone(), weight.clone()
    with torch.no_grad():
        found = reference(x, weight, ends_of(sizes, "cpu"))
    expected = reference(x, weight.requires_grad_(), ends_of(sizes, "cpu"))
    assert found.dtype == kind and not bool(found[sum(sizes) :].any())
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])


def test_the_reference_under_autocast():
    x, weight, ends = torch.randn(6, 8), torch.randn(2, 4, 8), ends_of([2, 4], "cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = reference(x, weight, ends)
    torch.testing.assert_close(found, reference(x, weight, ends), rtol=0.05, atol=0.1)
