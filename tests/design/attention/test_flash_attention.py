"""FlashAttention: exact, whatever the tiles; linear memory; the paper's counts of accesses."""

import importlib
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

# Modules whose names the package gives to their functions.
fa = importlib.import_module("effnb.design.attention.flash_attention")


SDPA = torch.nn.functional.scaled_dot_product_attention


def qkv(queries, keys=None, *, batch=2, heads=2, dim=8, value_dim=8, seed=0, dtype=torch.float64):
    keys = queries if keys is None else keys
    generator = torch.Generator().manual_seed(seed)
    shapes = (queries, dim), (keys, dim), (keys, value_dim)
    return [torch.randn(batch, heads, *s, generator=generator).to(dtype) for s in shapes]


def dense(q, k, v, visible=None, scale=None):
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("block", [1, 16, 64, 300])
def test_tiles_of_any_size_give_the_softmax(block):
    """T = 257 is no multiple of any block; outputs and log-sum-exps to 1e-14 and 1e-12."""
    q, k, v = qkv(257, batch=1, heads=1, dim=16)
    out, logsumexp = fa.flash_forward(q, k, v, block_q=64, block_k=block)
    expected, log = dense(q, k, v)
    assert (out - expected).abs().max() < 1e-14
    assert (logsumexp - log).abs().max() < 1e-12


@settings(max_examples=20)
@given(
    queries=st.integers(1, 13),
    more=st.integers(0, 5),
    block_q=st.integers(1, 20),
    block_k=st.integers(1, 20),
    causal=st.booleans(),
    pad=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_the_dense_form(
    queries, more, block_q, block_k, causal, pad, seed
):
    keys = queries + more
    inputs = qkv(queries, keys, value_dim=5, seed=seed)
    padding = torch.rand(2, keys, generator=torch.Generator().manual_seed(seed)) < 0.4
    visible = torch.ones(queries, keys, dtype=torch.bool)
    visible = visible.tril(more) if causal else visible
    visible = visible & ~padding[:, None, None] if pad else visible
    options = dict(causal=causal, padding=padding if pad else None)
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.clone().requires_grad_() for x in inputs]
    out = fa.flash_attention(*ours, block_q=block_q, block_k=block_k, **options)
    # A row that sees nothing: the dense form must not make its softmax, whose gradient is NaN.
    blind = ~visible.any(-1, keepdim=True)
    expected, _ = dense(*theirs, visible | blind)
    expected = expected.masked_fill(blind, 0)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).double()
    for a, b in zip(torch.autograd.grad(out, ours, g), torch.autograd.grad(expected, theirs, g)):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in qkv(5, 6, batch=1, heads=1, dim=3, value_dim=2)]
    assert torch.autograd.gradcheck(
        lambda *x: fa.flash_attention(*x, causal=True, block_q=2, block_k=2), inputs
    )


def test_rows_that_see_nothing_are_zero_and_have_no_gradient():
    q, k, v = (x.requires_grad_() for x in qkv(4))
    padding = torch.tensor([[True] * 4, [False] * 4])
    out, logsumexp = fa.flash_forward(q, k, v, padding=padding, block_q=2, block_k=2)
    assert (out[0] == 0).all() and (logsumexp[0] == -torch.inf).all()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (gradient[0] == 0).all() and gradient.isfinite().all()


def test_what_lies_in_padding_does_not_matter():
    q, k, v = qkv(6)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[:, :2] = True
    clean = fa.flash_attention(q, k, v, padding=padding, block_k=4)
    k[:, :, :2], v[:, :, :2] = math.inf, math.nan
    assert torch.equal(fa.flash_attention(q, k, v, padding=padding, block_k=4), clean)


def test_a_constant_added_to_all_scores_changes_nothing_but_the_logsumexp():
    q, k, v = qkv(9)
    scores = (q @ k.mT)[0, 0]
    plain = fa.online_softmax(scores, v[0, 0], block=2)[-1]
    moved = fa.online_softmax(scores + 1000, v[0, 0], block=2)[-1]
    torch.testing.assert_close(moved.output, plain.output, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(moved.logsumexp, plain.logsumexp + 1000)


def test_blocks_can_come_in_any_order_and_side_by_side():
    q, k, v = qkv(3, 40, dim=16)
    expected, log = dense(q, k, v)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    state = fa.SoftmaxState.empty((2, 2, 3), 8, q)
    parts = []
    for block in order.tolist():
        columns = slice(8 * block, 8 * block + 8)
        scores = q @ k[:, :, columns].mT / 4
        state = state.add(scores, v[:, :, columns])
        parts.append(fa.SoftmaxState.empty((2, 2, 3), 8, q).add(scores, v[:, :, columns]))
    left, right = parts[0].merge(parts[1]), parts[2].merge(parts[3].merge(parts[4]))
    for found in (state, left.merge(right)):
        torch.testing.assert_close(found.output, expected, atol=1e-13, rtol=1e-13)
        torch.testing.assert_close(found.logsumexp, log, atol=1e-13, rtol=1e-13)


def test_the_trace_by_hand():
    """Scores 0, log 2 | log 4: m, l and o as they are worked out on paper."""
    q, k = torch.ones(1, 1, 1, 1).double(), torch.tensor([1.0, 2, 4]).double().log()
    v = torch.tensor([[7.0], [1.0], [2.0]]).double()
    steps = fa.flash_trace(q, k.view(1, 1, 3, 1), v.view(1, 1, 3, 1), block_q=1, block_k=2)
    assert [(s.queries, s.keys) for s in steps] == [((0, 1), (0, 2)), ((0, 1), (2, 3))]
    states = [(s.state.m.exp().item(), s.state.l.item(), s.state.o.item()) for s in steps]
    assert states[0] == pytest.approx((2, 1.5, 7 / 2 + 1))
    assert states[1] == pytest.approx((4, 1.75, (7 / 2 + 1) / 2 + 2))
    assert steps[-1].state.output.item() == pytest.approx((7 * 1 + 1 * 2 + 2 * 4) / 7)
    assert steps[-1].state.logsumexp.item() == pytest.approx(math.log(7))


def test_causal_tiles_above_the_diagonal_are_never_visited():
    q, k, v = qkv(64, batch=1, heads=1)
    steps = fa.flash_trace(q, k, v, causal=True, block_q=16, block_k=16)
    assert len(steps) == 4 + 3 + 2 + 1
    assert all(s.keys[0] < s.queries[1] for s in steps)
    assert len(fa.flash_trace(q, k, v, block_q=16, block_k=16)) == 16


def test_causal_outputs_depend_on_the_past_alone():
    q, k, v = (x.requires_grad_() for x in qkv(10, batch=1, heads=1))
    out = fa.flash_attention(q, k, v, causal=True, block_q=3, block_k=4)
    for i in (0, 4, 9):
        weights = torch.arange(1, 9).double()
        found = torch.autograd.grad((out[0, 0, i] * weights).sum(), (k, v), retain_graph=True)
        for gradient in found:
            seen = gradient[0, 0].abs().sum(-1) > 0
            assert not seen[i + 1 :].any()
        assert seen[: i + 1].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types_come_back_and_sums_are_taken_in_float32(dtype):
    q, k, v = qkv(40, dtype=dtype)
    out, logsumexp = fa.flash_forward(q, k, v, causal=True, block_q=16, block_k=8)
    assert out.dtype == dtype and logsumexp.dtype == torch.float32
    expected = dense(q.double(), k.double(), v.double(), torch.ones(40, 40).tril().bool())[0]
    tolerance = torch.finfo(dtype).eps * 4
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_no_table_is_kept_for_the_backward_pass():
    q, k, v = (x.requires_grad_() for x in qkv(128, batch=1, heads=1))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, id):
        fa.flash_attention(q, k, v, causal=True)
    assert max(kept) == 128 * 8 and len(kept) == 5


# --- memory traffic


def moved_by_algorithm_1(tokens, dim, sram):
    """Every load and store of the paper's two loops, counted one by one."""
    block_k = math.ceil(sram / (4 * dim))
    block_q = min(block_k, dim)
    moved = 0
    for start in range(0, tokens, block_k):
        keys = min(block_k, tokens - start)
        moved += 2 * keys * dim  # load K_j, V_j
        for first in range(0, tokens, block_q):
            rows = min(block_q, tokens - first)
            moved += 2 * rows * dim + 2 * rows  # load Q_i, O_i, l_i, m_i
            moved += rows * dim + 2 * rows  # store O_i, l_i, m_i
    return moved


@settings(max_examples=30)
@given(tokens=st.integers(1, 60), dim=st.integers(1, 12), sram=st.integers(48, 400))
def test_accesses_are_those_of_the_algorithm(tokens, dim, sram):
    found = fa.memory_accesses(tokens, dim, sram)
    assert found.tiled == moved_by_algorithm_1(tokens, dim, sram)
    assert found.standard == 4 * tokens * dim + 4 * tokens**2


def test_accesses_fall_as_one_over_the_size_of_fast_memory():
    """Within the range of the paper's theorem, tiled / (T² d² / M) is 12 but for lower orders."""
    found = [fa.memory_accesses(4096, 64, 256 * 2**n) for n in range(8)]
    ratios = [one.tiled / one.asymptotic for one in found]
    assert max(ratios) < 13 and min(ratios) > 11.9
    assert all(a.tiled > b.tiled for a, b in pairwise(found))
    usual = fa.memory_accesses(1024, 64, 192 * 1024 // 4)  # 192 KiB of fast memory in float32
    assert usual.tiled < usual.standard / 2
    assert (usual.block_k, usual.block_q) == (192, 64)
    assert usual.tiled_peak == 192 * 64 and usual.standard_peak == 1024**2


# --- what is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q[0], k, v), "batch, heads, time, dim"),
        (lambda q, k, v: (q, k[:, :, :3], v), "every key needs a value"),
        (lambda q, k, v: (q[..., :4], k, v), "one width"),
        (lambda q, k, v: (q.float(), k, v), "one float type"),
        (lambda q, k, v: (q, k[:, :, :3], v[:, :, :3]), "cannot be more"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(unchecked, change, words):
    with pytest.raises(ValueError, match=words):
        fa.flash_attention(*change(*qkv(5)), causal=True)


def test_numbers_that_do_not_fit_are_refused(unchecked):
    q, k, v = qkv(5)
    with pytest.raises(ValueError, match="block_q is 0; it must be at least 1"):
        fa.flash_attention(q, k, v, block_q=0)
    with pytest.raises(TypeError, match=r"block_k is 2\.5; it must be a whole number"):
        fa.flash_attention(q, k, v, block_k=2.5)
    with pytest.raises(ValueError, match="padding is of int64"):
        fa.flash_attention(q, k, v, padding=torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"padding has shape \(5,\)"):
        fa.flash_attention(q, k, v, padding=torch.zeros(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"4 \* dim = 256"):
        fa.memory_accesses(1024, 64, 255)
    with pytest.raises(ValueError, match="3 keys but 2 values"):
        fa.online_softmax(torch.zeros(3), torch.zeros(2, 1), block=2)
