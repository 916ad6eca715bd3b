"""Low-rank updates, 4-bit products and rotations at the edges: overflow, empty sizes, aliases.

Kernel and reference must give the same there, or refuse in the same way. `test_edges_sequences` has
the kernels that run along a sequence.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from effnb.kernels import _launch
from effnb.kernels.gathered_lora import UserBatch, gathered_lora, lora_update, stack_users
from effnb.kernels.int4_matmul import Blocks, int4_matmul, pack_int4
from effnb.kernels.lora import lora
from effnb.kernels.rope import rope

BACKENDS = ["triton", "torch"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of infinite numbers
both = pytest.mark.parametrize("backend", BACKENDS)
half, single = torch.float16, torch.float32


def ones(proof, *shape, dtype=single, value=1.0):
    return torch.full(shape, value, dtype=dtype, device=proof.device)


def gradients(y, *leaves):
    return torch.autograd.grad(y.float().sum(), leaves)


def close(found, expected, **more):
    torch.testing.assert_close(found, expected, equal_nan=True, **more)


# --- overflow -------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("kind", [single, half])
@pytest.mark.parametrize("b", [1e-4, 0.0])
def test_an_update_does_not_overflow_between_its_products(proof, backend, kind, b):
    """Half precision ends at 65,504, x A^T is 102,400: a fresh B of zeros gave 0 * inf."""
    x, w = ones(proof, 2, 64, dtype=half, value=40), ones(proof, 8, 64, dtype=half)
    a, b_matrix = ones(proof, 4, 64, dtype=kind, value=40), ones(proof, 8, 4, dtype=kind, value=b)
    right = 64 * 40 + 4 * (64 * 40 * 40) * float(b_matrix[0, 0])
    index = torch.zeros(2, dtype=torch.int64, device=proof.device)
    found = [
        lora(x, w, a, b_matrix, 1.0, backend=backend),
        lora_update(x, a, b_matrix, 1.0, x @ w.T, backend=backend),
        gathered_lora(x, a[None], b_matrix[None], index, 1.0, x @ w.T, backend=backend),
    ]
    for y in found:
        assert y.dtype == half and y.shape == (2, 8)
        assert bool(((y.float() - right).abs() < 2).all())


@both
def test_only_the_sum_has_to_fit(proof, backend):
    """The layer gives 80,000 and the update -30,000: their sum is in half precision's range."""
    x, w = ones(proof, 1, 16, dtype=half, value=50), ones(proof, 3, 16, dtype=half, value=100)
    a, b = ones(proof, 1, 16, dtype=half), ones(proof, 3, 1, dtype=half, value=-1)
    y = lora(x, w, a, b, 30000 / 800, backend=backend)
    assert bool((y == 50000).all())
    base = ones(proof, 1, 3, dtype=half, value=60000)
    y = lora_update(x, a, 4 * b, -100.0 / 4, -base, backend=backend)
    assert bool((y == 20000).all())


@both
@pytest.mark.parametrize("kind", [single, half])
def test_gradients_do_not_overflow_in_between(proof, backend, kind):
    """dy B is 400,000, but times x of 1e-3 the gradient of A is 400 a row; and so on."""
    x = ones(proof, 2, 32, dtype=half, value=1e-3).requires_grad_()
    w = torch.zeros(10, 32, dtype=half, device=proof.device)
    a = ones(proof, 3, 32, dtype=kind, value=1e-3).requires_grad_()
    b = ones(proof, 10, 3, dtype=kind, value=200).requires_grad_()
    bias = torch.zeros(10, device=proof.device, requires_grad=True)
    dy = ones(proof, 2, 10, dtype=half, value=40000)
    index = torch.zeros(2, dtype=torch.int64, device=proof.device)
    inputs = [t.detach().double().requires_grad_() for t in (x, a, b)]
    y = 0.1 * inputs[0] @ inputs[1].T @ inputs[2].T
    expected = torch.autograd.grad(y, inputs, dy.double())
    runs = (
        lora(x, w, a, b, 0.1, bias, backend=backend),
        gathered_lora(x, a[None], b[None], index, 0.1, backend=backend),
    )
    for y in runs:
        found = torch.autograd.grad(y, (x, a, b), dy, retain_graph=True)
        for got, right in zip(found, expected):
            close(got.double(), right, rtol=2e-3, atol=0)
    (found,) = torch.autograd.grad(runs[0], bias, dy)
    assert bool((found == 80000).all())  # which the type of dy does not hold


@both
@pytest.mark.parametrize("rows", [1, 3])
def test_4_bit_weights_beyond_half_precision(proof, backend, rows):
    """Steps of 30,000: the weight itself is 240,000, the products are not beyond the range."""
    codes = torch.zeros(5, 64, dtype=torch.uint8, device=proof.device)
    weight = pack_int4(codes, ones(proof, 5, 2, dtype=half, value=30000), group_size=32)
    x = ones(proof, rows, 64, dtype=half, value=1e-3).requires_grad_()
    y = int4_matmul(x, weight, backend=backend)
    close(y.double(), x.double() @ weight.dequantize(torch.float64).T, rtol=2e-3, atol=0)
    dy = torch.full_like(y, 1e-3)
    (dx,) = torch.autograd.grad(y, x, dy)
    close(dx.double(), dy.double() @ weight.dequantize(torch.float64), rtol=2e-3, atol=0)


@both
def test_the_gradient_of_a_wide_bias_is_wide(proof, backend):
    codes = torch.full((4, 32), 8, dtype=torch.uint8, device=proof.device)
    weight = pack_int4(codes, ones(proof, 4, 1), group_size=32)
    bias = torch.zeros(4, device=proof.device, requires_grad=True)
    y = int4_matmul(ones(proof, 2, 32, dtype=half), weight, bias, backend=backend)
    (found,) = torch.autograd.grad(y, bias, ones(proof, 2, 4, dtype=half, value=40000))
    assert bool((found == 80000).all())


# --- what is not finite stays in its row ----------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_one_row_that_is_not_finite(proof, bad):
    """Odd sizes, so that every tile has lines and ranks past its end."""
    x, w = proof.tensor(5, 7), proof.tensor(6, 7, seed=1)
    a, b = proof.tensor(3, 7, seed=2), proof.tensor(6, 3, seed=3)
    index = torch.tensor([0, 1, -1, 1, 0], device=proof.device)
    users = torch.stack([a, -a]), torch.stack([b, 2 * b])
    weight = pack_int4(
        torch.arange(6 * 7, device=proof.device).view(6, 7).remainder(16).byte(),
        ones(proof, 6, 1), group_size=7,
    )  # fmt: skip
    spoilt = x.clone()
    spoilt[3, 2] = bad
    for run in (
        lambda x, how: lora(x, w, a, b, 2.0, backend=how),
        lambda x, how: gathered_lora(x, *users, index, backend=how),
        lambda x, how: int4_matmul(x, weight, backend=how),
    ):
        clean, ours, reference = run(x, "triton"), run(spoilt, "triton"), run(spoilt, "torch")
        close(ours, reference, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours[[0, 1, 2, 4]], clean[[0, 1, 2, 4]])
        assert not bool(ours[3].isfinite().any())


@both
def test_users_do_not_spoil_each_other(proof, backend):
    """User 1's matrices, and the inputs of a row of no user, are infinite: user 0 sees neither."""
    a, b = proof.tensor(2, 3, 7, seed=2), proof.tensor(2, 6, 3, seed=3)
    x, index = proof.tensor(5, 7), torch.tensor([0, 1, -1, 1, 0], device=proof.device)
    spoilt_x, spoilt_a, spoilt_b = x.clone(), a.clone(), b.clone()
    spoilt_x[2], spoilt_a[1, 0, 0], spoilt_b[1, 2] = torch.nan, torch.inf, torch.inf

    def run(x, a, b, index):
        s = torch.tensor([0.5, 2.0], device=proof.device)
        inputs = [t.clone().requires_grad_() for t in (x, a, b, s)]
        y = gathered_lora(*inputs[:3], index, inputs[3], backend=backend)
        return y, *gradients(y, *inputs)

    (y, dx, da, db, ds), clean = run(spoilt_x, spoilt_a, spoilt_b, index), run(x, a, b, index)
    for found, expected in ((y, clean[0]), (dx, clean[1])):
        close(found[[0, 2, 4]], expected[[0, 2, 4]])
        assert not bool(found[2].any())
        assert not bool(found[[1, 3]].isfinite().all())
    for found, expected in ((da, clean[2]), (db, clean[3]), (ds, clean[4])):
        close(found[0], expected[0])
    # A user without rows has gradients of 0, and the rows of no user touch nothing.
    alone = torch.where(index == 1, -1, index)
    *_, da, db, ds = run(spoilt_x, spoilt_a, spoilt_b, alone)
    assert not bool(da[1].any()) and not bool(db[1].any()) and not bool(ds[1])
    assert bool(da[0].isfinite().all()) and bool(db[0].isfinite().all())


def test_rotations_keep_what_is_not_finite_in_its_token(proof):
    q = proof.tensor(1, 2, 5, 6)
    spoilt = q.clone()
    spoilt[0, 1, 3, 2] = torch.inf
    frequencies = proof.tensor(3, seed=1).abs()
    ours = rope(spoilt, spoilt, frequencies, backend="triton")[0]
    close(ours, rope(spoilt, spoilt, frequencies, backend="torch")[0])
    assert int((~ours.isfinite()).sum()) == 2  # the pair


# --- sizes of zero --------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("rows", "n", "k", "rank"),
    [(3, 4, 0, 2), (3, 0, 5, 2), (3, 4, 5, 0), (0, 4, 5, 2), (0, 4, 0, 2), (3, 0, 0, 0)],
)
def test_updates_of_no_size(proof, backend, rows, n, k, rank):
    x, w = proof.tensor(1, rows, k, grad=True), proof.tensor(n, k, seed=1, grad=True)
    a, b = proof.tensor(rank, k, seed=2, grad=True), proof.tensor(n, rank, seed=3, grad=True)
    bias = proof.tensor(n, seed=4, grad=True)
    y = lora(x, w, a, b, 1.0, bias, backend=backend)
    close(y, x @ w.T + x @ a.T @ b.T + bias)
    for leaf, grad in zip((x, w, a, b, bias), gradients(y, x, w, a, b, bias)):
        assert grad.shape == leaf.shape and bool(grad.isfinite().all())
    output = proof.tensor(1, rows, n, seed=5)
    found = lora_update(x, a, b, 1.0, output, backend=backend)
    close(found, output + x @ a.T @ b.T)
    index = torch.zeros(rows, dtype=torch.int64, device=proof.device)
    found = gathered_lora(x[0], a[None], b[None], index, 1.0, output[0], backend=backend)
    close(found, (output + x @ a.T @ b.T)[0])
    for leaf, grad in zip((x, a, b), gradients(found, x, a, b)):
        assert grad.shape == leaf.shape and bool(grad.isfinite().all())


@both
def test_no_users(proof, backend):
    x, index = proof.tensor(3, 5, grad=True), torch.full((3,), -1, device=proof.device)
    a, b = proof.tensor(0, 2, 5, grad=True), proof.tensor(0, 4, 2, grad=True)
    s, base = proof.tensor(0, grad=True), proof.tensor(3, 4, seed=1)
    y = gathered_lora(x, a, b, index, s, backend=backend)
    assert y.shape == (3, 4) and not bool(y.any())
    found = gradients(y, x, a, b, s)
    assert [g.shape for g in found] == [t.shape for t in (x, a, b, s)] and not bool(found[0].any())
    assert torch.equal(gathered_lora(x, a, b, index, base=base, backend=backend), base)
    with pytest.raises(ValueError, match="names user 0; there are 0"):
        gathered_lora(x, a, b, index + 1, backend=backend)


@both
@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 1, 0, 4)])
def test_rotations_of_nothing(proof, backend, shape):
    q, frequencies = proof.tensor(*shape, grad=True), proof.tensor(2, seed=1)
    for k in (q, q[:, :0]):
        turned = rope(q, k, frequencies, backend=backend)
        assert turned[0].shape == shape and turned[1].shape == k.shape
    assert gradients(turned[0], q)[0].shape == shape


@both
def test_4_bit_products_of_no_rows(proof, backend):
    codes = torch.zeros(5, 32, dtype=torch.uint8, device=proof.device)
    weight = pack_int4(codes, ones(proof, 5, 1), group_size=32)
    x = proof.tensor(2, 0, 32, grad=True)
    y = int4_matmul(x, weight, backend=backend)
    assert y.shape == (2, 0, 5) and gradients(y, x)[0].shape == (2, 0, 32)


# --- more rows than an axis of a grid has programs ------------------------------------------------


def test_rows_count_along_the_one_axis_that_is_long(proof, monkeypatch):
    """A GPU takes 65,535 programs along the others: of 16 rows each, a million rows. Here 3."""
    monkeypatch.setattr(_launch, "GRID", (2**31 - 1, 3, 3))
    x, w = proof.tensor(100, 8, grad=True), proof.tensor(70, 8, seed=1)
    a, b = proof.tensor(2, 8, seed=2), proof.tensor(70, 2, seed=3)
    index = torch.arange(100, device=proof.device).remainder(7)
    users = a.expand(7, 2, 8), b.expand(7, 70, 2)
    codes = torch.arange(70 * 8, device=proof.device).remainder(16).byte().view(70, 8)
    weight = pack_int4(codes, ones(proof, 70, 1), group_size=8)
    for run in (
        lambda how: lora(x, w, a, b, 1.0, backend=how),
        lambda how: lora_update(x, a, b, 1.0, x @ w.T, backend=how),
        lambda how: gathered_lora(x, *users, index, backend=how),
        lambda how: int4_matmul(x, weight, backend=how),
    ):
        results = [(y, *gradients(y, x)) for y in (run("triton"), run("torch"))]
        for ours, expected in zip(*results):
            close(ours, expected, rtol=1e-4, atol=1e-4)


def test_what_no_grid_holds_is_refused_and_nothing_started(proof):
    with pytest.raises(ValueError, match="larger than a GPU's"):
        _launch.launch(None, (2**31,), proof.tensor(1))


# --- who keeps what -------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_a_batch_keeps_its_users_when_the_index_is_reused(proof, backend, kind):
    index = torch.tensor([0, 1, 0, -1], device=proof.device, dtype=kind)
    x, a = proof.tensor(4, 5, grad=True), proof.tensor(2, 2, 5, seed=1, grad=True)
    b, batch = proof.tensor(2, 4, 2, seed=2, grad=True), UserBatch.of(index, 2)
    right = gathered_lora(x, a, b, UserBatch.of(index.clone(), 2), backend=backend)
    expected = right, *gradients(right, x, a, b)
    early = gathered_lora(x, a, b, index, backend=backend)
    index.copy_(1 - index.clamp(min=0))
    late = gathered_lora(x, a, b, batch, backend=backend)
    for y in (early, late):
        for found, right in zip((y, *gradients(y, x, a, b)), expected):
            assert torch.equal(found, right)


@both
def test_a_4_bit_weight_keeps_its_numbers(proof, backend):
    codes = torch.arange(4 * 64, device=proof.device).remainder(16).byte().view(4, 64)
    given = {
        "scales": proof.tensor(4, 2).abs(),
        "zeros": torch.full((4, 2), 3, dtype=torch.uint8, device=proof.device),
    }
    table = {"scales": given["scales"], "table": proof.tensor(16, seed=1)}
    x = proof.tensor(3, 64)
    for parts in (given, table):
        weight = pack_int4(codes, group_size=32, **parts)
        before = int4_matmul(x, weight, backend=backend)
        for t in (codes, *parts.values()):
            t.add_(1)
        assert torch.equal(int4_matmul(x, weight, backend=backend), before)
        codes.sub_(1)
    learned = given["scales"].requires_grad_()
    weight = pack_int4(codes, learned, group_size=32)
    assert weight.scales is learned  # so that an optimizer's step is seen


def test_a_weight_changed_before_the_backward_pass_is_noticed(proof):
    codes = torch.ones(4, 32, dtype=torch.uint8, device=proof.device)
    weight = pack_int4(codes, ones(proof, 4, 1), group_size=32)
    x = proof.tensor(2, 32, grad=True)
    y = int4_matmul(x, weight, backend="triton")
    weight.scales.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(y, x)


def test_views_that_change_the_sign(proof):
    """The imaginary part of a conjugate is one: in memory the numbers have the other sign."""
    x = torch.view_as_complex(proof.tensor(3, 8, 2)).conj().imag
    assert x.is_neg() and not x.is_complex()
    w, a, b = proof.tensor(6, 8), proof.tensor(2, 8, seed=1), proof.tensor(6, 2, seed=2)
    with pytest.raises(ValueError, match="changes the sign"):
        lora(x, w, a, b, 1.0, backend="triton")
    close(lora(x, w, a, b, 1.0), lora(x.clone(), w, a, b, 1.0, backend="torch"))


def test_tensors_without_numbers_are_not_read(proof):
    x, w, a, b = (torch.empty(*s, device="meta") for s in ((3, 8), (6, 8), (2, 8), (6, 2)))
    assert lora(x, w, a, b, 1.0).shape == (3, 6)
    with pytest.raises(ValueError, match="cannot run: the tensors are on meta"):
        lora(x, w, a, b, 1.0, backend="triton")


# --- numbers of every kind ------------------------------------------------------------------------

NUMBERS = [2, np.float32(2), np.float64(2), np.int64(2)]


@both
@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: type(n).__name__)
def test_factors_of_any_kind(proof, backend, number):
    x, w = proof.tensor(3, 8), proof.tensor(6, 8, seed=1)
    a, b = proof.tensor(2, 8, seed=2), proof.tensor(6, 2, seed=3)
    index = torch.zeros(3, dtype=torch.int64, device=proof.device)
    update = 2 * x @ a.T @ b.T
    close(lora(x, w, a, b, number, backend=backend), x @ w.T + update, rtol=1e-4, atol=1e-4)
    found = lora_update(x, a, b, number, x @ w.T, backend=backend)
    close(found, x @ w.T + update, rtol=1e-4, atol=1e-4)
    found = gathered_lora(x, a[None], b[None], index, number, backend=backend)
    close(found, update, rtol=1e-4, atol=1e-4)
    q = x[None, None]
    ours = rope(q, q, w[0, :4], scaling=number, backend=backend)[0]
    close(ours, 2 * rope(q, q, w[0, :4], backend="torch")[0])


@both
@pytest.mark.parametrize("wrong", ["2", None, 1j, [1.0, 2.0]])
def test_factors_that_are_none(proof, backend, wrong):
    x, a, b = proof.tensor(3, 8), proof.tensor(2, 8, seed=2), proof.tensor(8, 2, seed=3)
    index = torch.zeros(3, dtype=torch.int64, device=proof.device)
    for run in (
        lambda: lora(x, a[:1].expand(8, 8), a, b, wrong, backend=backend),
        lambda: lora_update(x, a, b, wrong, x, backend=backend),
        lambda: gathered_lora(x, a[None], b[None], index, wrong, backend=backend),
        lambda: rope(x[None, None], x[None, None], a[0, :4], scaling=wrong, backend=backend),
    ):
        with pytest.raises(TypeError, match="scaling is .*; it must be a number"):
            run()


def test_whole_numbers_of_any_kind(proof):
    index = torch.tensor([0, 1], device=proof.device)
    batch = UserBatch.of(index, np.int64(2), np.int32(16))
    assert type(batch.users) is int and batch.rows.shape == (2, 16)
    codes = torch.full((4, 64), 3, dtype=torch.uint8, device=proof.device)
    weight = pack_int4(codes, ones(proof, 4, 2), group_size=np.int64(32), zero=np.uint8(7))
    blocks = Blocks(np.int64(16), np.int64(16), np.int64(1), np.int64(4))
    x = proof.tensor(2, 64)
    close(
        int4_matmul(x, weight, blocks=blocks, backend="triton"),
        int4_matmul(x, weight, backend="torch"), rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    for wrong in (2.0, "2", None):
        with pytest.raises(TypeError, match="users is .*; it must be a whole number"):
            UserBatch.of(index, wrong)
        with pytest.raises(TypeError, match="group_size is .*; it must be a whole number"):
            pack_int4(codes, ones(proof, 4, 2), group_size=wrong)


def test_what_cannot_be_is_refused_before_any_work(proof):
    codes = torch.full((4, 40), 3, dtype=torch.uint8, device=proof.device)
    scales, table = ones(proof, 4, 1), ones(proof, 16)
    with pytest.raises(ValueError, match="users is -1"):
        UserBatch.of(torch.tensor([-1]), -1)
    with pytest.raises(ValueError, match="zero is 16"):
        pack_int4(codes, scales, group_size=40, zero=16)
    with pytest.raises(TypeError, match="zero is 7.5"):
        pack_int4(codes, scales, group_size=40, zero=7.5)
    with pytest.raises(ValueError, match="n is 24; it must be a power of two from 16"):
        Blocks(16, 24)
    with pytest.raises(ValueError, match="parts is 0"):
        Blocks(1, 16, 0)
    for number in (torch.inf, torch.nan, 1e5):
        with pytest.raises(ValueError, match="code 3 stands for"):
            pack_int4(codes, scales, group_size=40, table=table.where(codes[0, :16] != 3, number))
        unused = table.clone()
        unused[0] = number  # which fills up the last span in the kernel
        weight = pack_int4(codes, scales, group_size=40, table=unused)
        for backend in BACKENDS:
            for rows in (1, 2):
                y = int4_matmul(ones(proof, rows, 40), weight, backend=backend)
                assert bool((y == 40).all())
    with pytest.raises(ValueError, match="of user 1 have shapes"):
        stack_users([(ones(proof, 2, 3), ones(proof, 4, 2)), (ones(proof, 3), ones(proof, 4))])
    q = proof.tensor(1, 1, 2, 4)
    with pytest.raises(TypeError, match="positions is of complex64"):
        rope(q, q, q[0, 0, 0, :2], torch.zeros(2, dtype=torch.complex64, device=proof.device))
    wide = torch.zeros(1, 1, 1, 2**17, device=proof.device)
    with pytest.raises(ValueError, match="heads of 131072 are too wide"):
        rope(wide, wide, wide[0, 0, 0, : 2**16], backend="triton")
    assert not bool(rope(wide, wide, wide[0, 0, 0, : 2**16])[0].any())


# --- what the interpreter hides -------------------------------------------------------------------

COMPILED = """
from dataclasses import replace
from effnb.kernels import gathered_lora, int4_matmul, local_attention, lora, retention
from effnb.kernels.compile import compile_case

def found(module, words):
    return next(c for c in module.compile_cases() if words in c.name)

one = dict.fromkeys("heads key_heads group tokens key_tiles left right".split(), 1)
for case, sizes in (
    (found(lora, "fp16 128x128"), {"K": 0}),
    (found(lora, "fp16 128x128"), {"RANK": 0, "M": 1}),
    (found(gathered_lora, "fp16 down"), {"K": 0, "PARTS": 1}),
    (found(gathered_lora, "fp16 up"), {"RANK": 0}),
    (found(local_attention, "forward fp16 64"), one),
    (found(local_attention, "forward fp16 64 again"), one),
    (found(retention, "backward again"), one),
    (found(int4_matmul, "nf4 fp16 backward"), {"M": 1}),
):
    types = {name: kind for name, kind in case.types.items() if name not in sizes}
    case = replace(case, types=types, constants={**case.constants, **sizes}, mma=False)
    compile_case(case, 80)
    print(case.name)
"""


@pytest.mark.unsanitized
def test_sizes_of_zero_and_one_compile():
    """Triton takes a number that is 1 for a constant, and loops over nothing are none."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8
