"""The low-rank update: in one pass with its layer, on top of one, and for many users at once."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from effnb.kernels.gathered_lora import (
    UserBatch,
    gathered_lora,
    gathered_reference,
    lora_update,
    stack_users,
)
from effnb.kernels.lora import lora, reference


def parts(proof, rows, n, k, rank, dtype, thin=None, **more):
    """x, weight, A and B, all to be differentiated."""
    return (
        proof.tensor(rows, k, dtype=dtype, grad=True, **more),
        proof.tensor(n, k, dtype=dtype, seed=1, grad=True, **more),
        proof.tensor(rank, k, dtype=thin or dtype, seed=2, grad=True, **more),
        proof.tensor(n, rank, dtype=thin or dtype, seed=3, grad=True, **more),
    )


@pytest.mark.parametrize(
    ("rows", "n", "k", "rank"),
    [
        (1, 37, 70, 4),
        (5, 64, 64, 16),
        (19, 130, 33, 1),
        (130, 40, 96, 8),
        (3, 7, 5, 3),
        (0, 6, 8, 2),
    ],
)
def test_one_pass(proof, dtype, rows, n, k, rank):
    bias = proof.tensor(n, dtype=dtype, seed=4, grad=True)
    inputs = (*parts(proof, rows, n, k, rank, dtype), bias)
    proof.compare(
        lambda *t: lora(*t[:4], 0.7, t[4], backend=proof.kernel),
        lambda *t: reference(*t[:4], 0.7, t[4]),
        *inputs,
    )


def test_matrices_in_float32_under_a_layer_in_half_precision(proof):
    """The kernel multiplies in the layer's type: compared with everything in that type."""
    half = torch.float16
    inputs = parts(proof, 9, 40, 64, 8, half, thin=torch.float32)

    def plain(x, w, a, b):
        return reference(x, w, a.to(x.dtype), b.to(x.dtype), 0.5)

    proof.compare(lambda *t: lora(*t, 0.5, backend=proof.kernel), plain, *inputs)


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_one_pass_of_tensors_that_are_not_contiguous(proof, dtype, layout):
    bias = proof.tensor(35, dtype=dtype, seed=4, grad=True, layout=layout)
    inputs = (*parts(proof, 6, 35, 50, 4, dtype, layout=layout), bias)
    assert not any(t.is_contiguous() for t in inputs)
    proof.compare(
        lambda *t: lora(*t[:4], 2.0, t[4], backend=proof.kernel),
        lambda *t: reference(*t[:4], 2.0, t[4]),
        *inputs,
    )


@pytest.mark.parametrize("place", range(4), ids=["x", "weight", "A", "B"])
def test_places_beyond_32_bits(proof, place):
    inputs = [t.detach() for t in parts(proof, 4, 6, 5, 5, torch.float16)]
    near = lora(*inputs, 1.0, backend=proof.kernel)
    inputs[place] = proof.far(inputs[place])
    assert torch.equal(lora(*inputs, 1.0, backend=proof.kernel), near)


@pytest.mark.parametrize("wide", [torch.float16, torch.float32])
def test_a_bias_of_another_type(proof, wide):
    """Both backends take any type; the kernel adds it before it rounds."""
    narrow = torch.float16 if wide == torch.float32 else torch.float32
    inputs = [t.detach() for t in parts(proof, 5, 7, 8, 2, narrow)]
    bias = proof.tensor(7, dtype=wide, seed=4, grad=True)
    exact = reference(*(t.double() for t in inputs), 0.5, bias.detach().double())
    for run in (
        lambda: lora(*inputs, 0.5, bias, backend=proof.kernel),
        lambda: lora(*inputs, 0.5, bias, backend="torch"),
        lambda: reference(*inputs, 0.5, bias),
    ):
        y = run()
        assert y.dtype == narrow
        torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=1e-2)
        (grad,) = torch.autograd.grad(y.sum(), bias)
        assert torch.equal(grad, torch.full_like(bias, 5))


def test_leading_axes_and_what_needs_no_gradient(proof):
    x, w, a, b = parts(proof, 6, 12, 8, 2, torch.float32)
    w, x = w.detach(), x.detach()
    result = lora(x.view(2, 3, 8), w, a, b, 1.5, backend=proof.kernel)
    assert result.shape == (2, 3, 12)
    torch.testing.assert_close(result.view(6, 12), reference(x, w, a, b, 1.5), rtol=1e-5, atol=1e-5)
    result.sum().backward()
    assert a.grad is not None and b.grad is not None and x.grad is None and w.grad is None


@pytest.mark.parametrize(
    ("rows", "n", "k", "rank"), [(1, 37, 300, 4), (21, 130, 33, 16), (70, 20, 40, 3), (0, 6, 8, 2)]
)
def test_update_of_an_output(proof, dtype, rows, n, k, rank):
    x, _, a, b = parts(proof, rows, n, k, rank, dtype)
    output = proof.tensor(rows, n, dtype=dtype, seed=5, grad=True)

    def plain(x, a, b, output):
        return output + 0.7 * (x @ a.T) @ b.T

    proof.compare(
        lambda *t: lora_update(*t[:3], 0.7, t[3], backend=proof.kernel), plain, x, a, b, output
    )


def test_an_update_of_zero_changes_no_bit(proof, dtype):
    x, _, a, b = parts(proof, 5, 40, 48, 4, dtype)
    output = proof.tensor(5, 40, dtype=dtype, seed=5)
    result = lora_update(x, a, torch.zeros_like(b), 2.0, output, backend=proof.kernel)
    assert torch.equal(result, output)


# --- many users -----------------------------------------------------------------------------------


def users_of(proof, users, rank, n, k, dtype, **more):
    return (
        proof.tensor(users, rank, k, dtype=dtype, seed=2, grad=True, **more),
        proof.tensor(users, n, rank, dtype=dtype, seed=3, grad=True, **more),
        proof.tensor(users, seed=6, grad=True, **more),
    )


INDICES = {
    "each their own": [3, 0, 2, 1],
    "all the same": [1] * 20,
    "some none": [-1, 2, -1, 0, 2, 2, -1],
    "all none": [-1, -1, -1],
    "more than a tile": [i * 7 % 4 for i in range(50)] + [2] * 20,
    "no one there": [],
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("with_base", [True, False])
def test_many_users(proof, dtype, name, with_base):
    index = torch.tensor(INDICES[name], dtype=torch.int64, device=proof.device)
    rows, n, k = len(index), 37, 70
    a, b, s = users_of(proof, 4, 5, n, k, dtype)
    x = proof.tensor(rows, k, dtype=dtype, grad=True)
    base = proof.tensor(rows, n, dtype=dtype, seed=4, grad=True) if with_base else None
    proof.compare(
        lambda *t: gathered_lora(*t, backend=proof.kernel),
        gathered_reference,
        x,
        a,
        b,
        index,
        s,
        base,
    )


def test_the_reference_is_each_user_alone():
    index = torch.tensor([2, -1, 0, 2])
    x, a, b = (
        torch.randn(4, 6).double(),
        torch.randn(3, 2, 6).double(),
        torch.randn(3, 5, 2).double(),
    )
    s, base = torch.tensor([0.5, 1.0, 3.0]), torch.randn(4, 5).double()
    result = gathered_lora(x, a, b, index, s, base)
    for row, user in enumerate(index.tolist()):
        change = 0 if user < 0 else float(s[user]) * b[user] @ a[user] @ x[row]
        torch.testing.assert_close(result[row], base[row] + change)


@examples(max_examples=15)
@given(st.lists(st.integers(-1, 5), max_size=60), st.sampled_from([16, 32]))
def test_every_row_lies_in_one_tile_of_its_user(index, lines):
    index = torch.tensor(index, dtype=torch.int64)
    batch = UserBatch.of(index, 6, lines)
    seen = batch.rows[batch.rows >= 0]
    assert seen.sort().values.tolist() == list(range(len(index)))
    for rows, owner in zip(batch.rows, batch.owners):
        assert len(rows) == lines and bool((index[rows[rows >= 0].long()] == owner).all())
    count = sum(-(-int((index == user).sum()) // lines) for user in range(-1, 6))
    assert len(batch.rows) == count  # no tile more than needed


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_many_users_not_contiguous(proof, dtype, layout):
    index = torch.tensor([1, 0, 1, 2, -1], device=proof.device)
    a, b, s = users_of(proof, 3, 4, 20, 33, dtype, layout=layout)
    x = proof.tensor(5, 33, dtype=dtype, grad=True, layout=layout)
    base = proof.tensor(5, 20, dtype=dtype, seed=4, layout=layout, grad=True)
    batch = UserBatch.of(index, 3)
    assert not any(t.is_contiguous() for t in (x, a, b, s, base))
    proof.compare(
        lambda x, a, b, s, base: gathered_lora(x, a, b, batch, s, base, backend=proof.kernel),
        lambda x, a, b, s, base: gathered_reference(x, a, b, index, s, base),
        x, a, b, s, base,
    )  # fmt: skip


@pytest.mark.parametrize("index", [[2, 0, 2, 1, -1, 2], [1] * 20])
def test_an_index_that_is_not_contiguous(proof, index):
    """Nor the lists of a batch, which a caller may have cut from larger ones."""
    whole = torch.tensor(index, device=proof.device)
    a, b, s = users_of(proof, 3, 4, 20, 33, torch.float32)
    x = proof.tensor(len(index), 33)
    expected = gathered_lora(x, a, b, whole, s, backend=proof.kernel)
    spread = proof.guarded(torch.stack([whole, whole + 1], 1)[:, 0])
    if len(set(index)) == 1:
        spread = whole[:1].expand(len(index))
    batch = UserBatch.of(whole, 3)
    lists = [torch.stack([t, t.flip(0)], -1)[..., 0] for t in (batch.rows, batch.owners)]
    cut = UserBatch(whole, 3, *map(proof.guarded, lists))
    assert not any(t.is_contiguous() for t in (spread, cut.rows, cut.owners))
    for arranged in (spread, cut):
        assert torch.equal(gathered_lora(x, a, b, arranged, s, backend=proof.kernel), expected)


@pytest.mark.parametrize("place", range(4), ids=["x", "A", "B", "base"])
def test_places_of_users_beyond_32_bits(proof, place):
    index = torch.tensor([1, 0, -1], device=proof.device)
    a, b, s = users_of(proof, 2, 5, 5, 5, torch.float16)
    inputs = [t.detach() for t in (proof.tensor(3, 5, dtype=torch.float16), a, b)]
    inputs.append(proof.tensor(3, 5, dtype=torch.float16, seed=4))

    def run(x, a, b, base):
        return gathered_lora(x, a, b, index, s.detach(), base, backend=proof.kernel)

    near = run(*inputs)
    inputs[place] = proof.far(inputs[place])
    assert torch.equal(run(*inputs), near)


def test_a_learned_scaling_alone_has_its_gradient(proof):
    """Also that of a user without rows, which is 0."""
    index = torch.tensor([0, 2, -1, 0], device=proof.device)
    a, b, s = (t.detach() for t in users_of(proof, 4, 3, 6, 8, torch.float32))
    x, s = proof.tensor(4, 8), s.requires_grad_()
    dy = proof.tensor(4, 6, seed=8)
    y = gathered_lora(x, a, b, index, s, backend=proof.kernel)
    (grad,) = torch.autograd.grad(y, s, dy)
    expected = torch.zeros(4, device=proof.device)
    for row, user in enumerate(index.tolist()):
        if user >= 0:
            expected[user] += dy[row] @ b[user] @ a[user] @ x[row]
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
    assert grad[0] != 0 and grad[1] == grad[3] == 0


def test_who_else_is_in_the_batch_does_not_matter(proof):
    index = torch.tensor([0, 1, 2, 1, -1, 0], device=proof.device)
    a, b, s = users_of(proof, 3, 4, 40, 200, torch.float32)
    x = proof.tensor(6, 200)
    together = gathered_lora(x, a, b, index, s, backend=proof.kernel)
    order = torch.tensor([4, 1, 5, 0, 3, 2], device=proof.device)
    shuffled = gathered_lora(x[order], a, b, index[order], s, backend=proof.kernel)
    assert torch.equal(shuffled, together[order])
    assert torch.equal(together[4], torch.zeros_like(together[4]))


def test_users_of_different_ranks(proof):
    pairs = [(proof.tensor(r, 9, seed=r), proof.tensor(6, r, seed=r + 9)) for r in (1, 5, 3)]
    a, b = stack_users(pairs)
    assert a.shape == (3, 5, 9) and b.shape == (3, 6, 5)
    index = torch.tensor([0, 1, 2], device=proof.device)
    x = proof.tensor(3, 9, seed=5)
    result = gathered_lora(x, a, b, index, 2.0, backend=proof.kernel)
    for row, (one, two) in enumerate(pairs):
        torch.testing.assert_close(result[row], 2 * two @ one @ x[row], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no user"):
        stack_users([])
    with pytest.raises(ValueError, match=r"B of user 1 has shape \(6, 5\)"):
        stack_users([pairs[0], (pairs[2][0], pairs[1][1])])


# --- bad input ------------------------------------------------------------------------------------


def test_shapes_that_do_not_fit(proof):
    x, w, a, b = (t.detach() for t in parts(proof, 3, 6, 8, 2, torch.float32))
    with pytest.raises(ValueError, match=r"\(3, 7\).*\(6, 8\)"):
        lora(x[:, :7], w, a, b, 1.0)
    with pytest.raises(ValueError, match=r"A has shape \(2, 7\).*\(6, 8\)"):
        lora(x, w, a[:, :7], b, 1.0)
    with pytest.raises(ValueError, match=r"B has shape \(6, 1\).*\(2, 8\)"):
        lora(x, w, a, b[:, :1], 1.0)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\)"):
        lora(x, w, a, b, 1.0, x[:, 0])
    with pytest.raises(ValueError, match="float32 and torch.float16"):
        lora(x, w.half(), a, b, 1.0)
    with pytest.raises(ValueError, match="A and B are of"):
        lora(x, w, a, b.half(), 1.0)
    with pytest.raises(TypeError, match="weight is of int64"):
        lora(x, w.long(), a, b, 1.0)
    learned = torch.tensor(1.0, requires_grad=True)
    for backend in (proof.kernel, "torch"):  # neither loses its gradient without a word
        with pytest.raises(TypeError, match="scaling is a tensor; it must be a number"):
            lora(x, w, a, b, learned, backend=backend)
        with pytest.raises(TypeError, match="scaling is a tensor; it must be a number"):
            lora_update(x, a, b, learned, x @ w.T, backend=backend)
    with pytest.raises(ValueError, match=r"output has shape \(2, 6\).*\(3, 8\)"):
        lora_update(x, a, b, 1.0, proof.tensor(2, 6))
    with pytest.raises(ValueError, match="cannot run: x and the output are of float32 and float16"):
        lora_update(x, a, b, 1.0, proof.tensor(3, 6).half(), backend="triton")


def test_ranks_without_a_kernel_go_to_the_reference(proof):
    inputs = [t.detach() for t in parts(proof, 3, 150, 140, 129, torch.float32)]
    assert torch.equal(lora(*inputs, 1.0), reference(*inputs, 1.0))
    with pytest.raises(ValueError, match="the rank is 129"):
        lora(*inputs, 1.0, backend="triton")


def test_users_that_cannot_be(proof):
    x, a, b = proof.tensor(3, 8), proof.tensor(2, 4, 8), proof.tensor(2, 6, 4)

    def index(*numbers):
        return torch.tensor(numbers, device=proof.device)

    with pytest.raises(ValueError, match="names user 2; there are 2"):
        gathered_lora(x, a, b, index(0, 2, 1))
    with pytest.raises(ValueError, match="names user -2"):
        gathered_lora(x, a, b, index(0, -2, 1))
    with pytest.raises(TypeError, match="index is of float32"):
        gathered_lora(x, a, b, index(0, 1, 1).float())
    with pytest.raises(ValueError, match=r"index has shape \(2,\).*\(3, 8\)"):
        gathered_lora(x, a, b, index(0, 1))
    with pytest.raises(ValueError, match=r"A has shape \(2, 4, 8\).*\(3, 7\)"):
        gathered_lora(x[:, :7], a, b, index(0, 1, 1))
    with pytest.raises(ValueError, match=r"B has shape \(2, 6, 3\).*\(2, 4, 8\)"):
        gathered_lora(x, a, b[:, :, :3], index(0, 1, 1))
    with pytest.raises(ValueError, match=r"scaling has shape \(3,\)"):
        gathered_lora(x, a, b, index(0, 1, 1), proof.tensor(3))
    with pytest.raises(ValueError, match=r"base has shape \(3, 5\)"):
        gathered_lora(x, a, b, index(0, 1, 1), 1.0, proof.tensor(3, 5))
    with pytest.raises(ValueError, match="the batch is of 5 users; A has 2"):
        gathered_lora(x, a, b, UserBatch.of(index(0, 1, 1), 5))
    with pytest.raises(ValueError, match="power of two from 16"):
        UserBatch.of(index(0), 1, lines=24)


# --- what is done once ----------------------------------------------------------------------------

one_pass = importlib.import_module("effnb.kernels.lora")
many = importlib.import_module("effnb.kernels.gathered_lora")


@pytest.fixture
def started(monkeypatch):
    """Names of the kernels that are launched."""
    found = []
    for module in (one_pass, many):
        plain = module.launch

        def launched(kernel, *arguments, plain=plain, **settings):
            found.append(kernel.fn.__name__)
            plain(kernel, *arguments, **settings)

        monkeypatch.setattr(module, "launch", launched)
    return found


def test_the_inner_product_is_computed_once_each_way(proof, started):
    """Two kernels forward, two backward: gradients of A and B read what these left."""
    inputs = parts(proof, 5, 70, 33, 4, torch.float32)
    y = lora(*inputs, 0.5, backend=proof.kernel)
    assert started == ["_inner", "_layer"]
    torch.autograd.grad(y.sum(), inputs)
    assert started == ["_inner", "_layer"] * 2


def test_gradients_of_the_matrices_alone(proof, dtype):
    """Then there is no kernel whose h could be read."""
    x, weight, A, B = parts(proof, 9, 40, 64, 8, dtype)
    x, weight = x.detach(), weight.detach()
    proof.compare(
        lambda a, b: lora(x, weight, a, b, 0.5, backend=proof.kernel),
        lambda a, b: reference(x.to(a.dtype), weight.to(a.dtype), a, b, 0.5),
        A, B,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_largest_rank_is_added_in_blocks(proof, dtype):
    inputs = parts(proof, 3, 17, 40, 128, dtype)
    proof.compare(
        lambda *t: lora(*t, 0.1, backend=proof.kernel), lambda *t: reference(*t, 0.1), *inputs
    )


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 128, 300, 2048])
@pytest.mark.parametrize("n", [576, 4096, 11008])
def test_tiles_are_small_where_there_are_few_rows(rows, n):
    """Enough programs for every multiprocessor, or the smallest tile that holds the rows."""
    tile = one_pass.tile_for(rows, n, torch.bfloat16)
    programs = -(-rows // tile.m) * -(-n // tile.n)
    assert programs >= one_pass.PROGRAMS or tile.n == 16
    assert tile.m < 2 * max(rows, 16), "at most half of a tile is empty"
    assert one_pass.tile_for(rows, n, torch.float32) == one_pass.SINGLE
    sizes = (tile.m + tile.n) * tile.k * 2 * tile.stages
    assert sizes <= 100 * 1024, "what is under way fits an A100, with room for the rest"


@pytest.mark.parametrize(("tiles", "parts"), [(0, 32), (1, 32), (3, 32), (16, 8), (200, 1)])
def test_the_inputs_are_cut_where_tiles_are_few(tiles, parts):
    assert many._parts(tiles, 4096, 128) == parts
    assert many._parts(tiles, 0, 128) == 1


def test_one_users_rows_are_arranged_once(proof, monkeypatch):
    """Not in every layer: a model's layers have inputs of one size."""
    made, plain = [], UserBatch.of_one.__func__
    many._one_user.cache_clear()

    def counted(cls, count, device):
        made.append(count)
        return plain(cls, count, device)

    monkeypatch.setattr(UserBatch, "of_one", classmethod(counted))
    x, a, b = (proof.tensor(*s, seed=i) for i, s in enumerate(((5, 8), (2, 8), (6, 2))))
    with torch.inference_mode():
        for _ in range(3):
            found = lora_update(x, a, b, 0.5, x @ x.T[:, :1] + b.T[:1], backend=proof.kernel)
    assert made == [5]
    x.requires_grad_()  # what was made in inference mode serves training too
    y = lora_update(x, a, b, 0.5, torch.zeros_like(found), backend=proof.kernel)
    torch.autograd.grad(y.sum(), x)
    assert made == [5]
    many._one_user.cache_clear()
