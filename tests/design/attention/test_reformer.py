"""Reformer: hashes, one bucket against full attention, rounds, original positions, reversal."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.design.attention import reformer as rf
from effnb.design.attention import reversible as rev


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def collision(degrees, buckets):
    """How often two vectors at an angle share a bucket, over 20,000 rotations."""
    angle = math.radians(degrees)
    pair = torch.zeros(1, 1, 2, 8).double()
    pair[0, 0, 0, 0], pair[0, 0, 1, 0], pair[0, 0, 1, 1] = 1, math.cos(angle), math.sin(angle)
    found = rf.lsh_buckets(pair, buckets, rounds=20000)[0, 0]
    return float((found[:, 0] == found[:, 1]).double().mean())


def test_collisions():
    """One hyperplane: 1 − θ/π. The same pair with 4, 8, 16 buckets: .445, .313, .233."""
    for degrees in (20, 60, 120):
        expected = 1 - degrees / 180
        error = (expected * (1 - expected) / 20000) ** 0.5
        assert abs(collision(degrees, 2) - expected) < 3 * error
    for buckets, expected in ((4, 0.445), (8, 0.313), (16, 0.233)):
        assert collision(60, buckets) == pytest.approx(expected, abs=0.011)


def test_the_length_of_a_vector_does_not_matter_and_opposites_never_meet():
    x = randn(1, 1, 40, 8)
    buckets = rf.lsh_buckets(x, 8, rounds=3)
    assert torch.equal(buckets, rf.lsh_buckets(7 * x, 8, rounds=3))
    assert torch.equal((buckets + 4) % 8, rf.lsh_buckets(-x, 8, rounds=3))


def definition(qk, v, hashes, causal, padding, chunk):
    """Round by round, pair by pair: tokens of one bucket, in the same chunk or the one before."""
    batch, heads, rounds, time = hashes.shape
    key = torch.nn.functional.normalize(qk, dim=-1)
    out = torch.zeros_like(v)
    for b in range(batch):
        real = [t for t in range(time) if not padding[b, t]]
        for h in range(heads):
            seen = []
            for r in range(rounds):
                order = sorted(real, key=lambda t: (int(hashes[b, h, r, t]), t))
                chunks = -(-time // chunk)
                place = {t: n // chunk for n, t in enumerate(order)}
                seen.append({
                    (i, j) for i in real for j in real
                    if hashes[b, h, r, i] == hashes[b, h, r, j]
                    and (place[i] == place[j] or (place[i] - 1) % chunks == place[j])
                    and not (causal and j > i)
                })  # fmt: skip
            for i in real:
                # Together the rounds are one softmax over all pairs that any of them sees.
                keys = sorted({j for pairs in seen for a, j in pairs if a == i})
                if not keys:
                    continue
                scores = torch.stack([
                    qk[b, h, i] @ key[b, h, j] / qk.shape[3] ** 0.5 - rf.SELF * (i == j)
                    for j in keys
                ])  # fmt: skip
                out[b, h, i] = scores.softmax(0) @ v[b, h, keys]
    return out


@settings(max_examples=12)
@given(
    time=st.integers(2, 11), chunk=st.integers(1, 6), rounds=st.integers(1, 3),
    causal=st.booleans(), pad=st.sampled_from(["none", "left", "right"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_rounds_together_are_one_softmax_over_what_any_of_them_sees(
    time, chunk, rounds, causal, pad, seed
):
    qk, v = randn(2, 1, time, 4, seed=seed), randn(2, 1, time, 3, seed=seed + 1)
    padding = torch.zeros(2, time).bool()
    if pad != "none":
        padding[1, : time // 2] = True
        padding = padding if pad == "left" else padding.flip(1)
    hashes = rf.lsh_buckets(qk, 4, rounds=rounds, seed=seed)
    found = rf.lsh_attention(
        qk, v, buckets=4, chunk=min(chunk, time), rounds=rounds, causal=causal,
        padding=None if pad == "none" else padding, seed=seed,
    )  # fmt: skip
    expected = definition(qk, v, hashes, causal, padding, min(chunk, time))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("rounds", [1, 3])
def test_one_bucket_and_one_chunk_are_full_attention(causal, pad, rounds):
    qk, v = randn(2, 2, 9, 4), randn(2, 2, 9, 3, seed=1)
    padding = torch.arange(9).expand(2, -1) < torch.tensor([[0], [3]]) if pad else None
    one = torch.zeros(2, 2, rounds, 9).long()
    options = dict(causal=causal, padding=padding)
    found = rf.lsh_attention(qk, v, buckets=2, chunk=9, rounds=rounds, hashes=one, **options)
    expected = rf.full_shared_attention(qk, v, **options)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_a_token_attends_to_itself_only_if_there_is_nothing_else():
    qk, v = randn(1, 1, 6, 4), randn(1, 1, 6, 3, seed=1)
    out = rf.full_shared_attention(qk, v, causal=True)
    torch.testing.assert_close(out[0, 0, 0], v[0, 0, 0])
    torch.testing.assert_close(out[0, 0, 1], v[0, 0, 0])
    alone = torch.tensor([0, 1, 1, 1, 1, 1]).view(1, 1, 1, 6)
    found = rf.lsh_attention(qk, v, buckets=2, chunk=3, hashes=alone)
    torch.testing.assert_close(found[0, 0, 0], v[0, 0, 0])


def test_causal_means_original_positions():
    qk, v = randn(1, 1, 16, 4), randn(1, 1, 16, 3, seed=1).requires_grad_()
    out = rf.lsh_attention(qk, v, buckets=4, chunk=4, rounds=2, causal=True)
    for i in range(16):
        (gradient,) = torch.autograd.grad(out[0, 0, i].sum(), v, retain_graph=True)
        assert not (gradient[0, 0, i + 1 :] != 0).any()
    # In sorted order a later token often comes first: a mask there would let it through.
    order = rf.lsh_buckets(qk, 4, rounds=2)[0, 0, 0].argsort(stable=True)
    assert (order.diff() < 0).any()


def test_gradients():
    qk, v = randn(1, 1, 7, 3).requires_grad_(), randn(1, 1, 7, 2, seed=1).requires_grad_()
    padding = torch.tensor([[False] * 5 + [True] * 2])

    def attend(a, b):
        return rf.lsh_attention(
            a, b, buckets=2, chunk=3, rounds=2, causal=True, padding=padding,
            hashes=torch.tensor([[0, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 1, 0]])[None, None],
        )  # fmt: skip

    assert torch.autograd.gradcheck(attend, (qk, v), atol=1e-5)


def test_more_rounds_find_more_of_the_best_keys():
    qk = randn(1, 1, 64, 8)
    hashes = rf.lsh_buckets(qk, 8, rounds=8)
    found = [rf.top_key_recall(qk, hashes[:, :, :n], top=4) for n in (1, 2, 4, 8)]
    assert found == sorted(found) and found[3] > found[0] + 0.2
    assert rf.top_key_recall(qk, torch.zeros_like(hashes), top=4) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types(dtype):
    qk, v = randn(1, 2, 30, 4).to(dtype), randn(1, 2, 30, 4, seed=1).to(dtype)
    found = rf.lsh_attention(qk, v, buckets=4, chunk=8, rounds=2)
    assert found.dtype == dtype and found.isfinite().all()


# --- reversible layers


def stack(depth=4, half=6, shared=False):
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.LayerNorm(half), nn.Linear(half, half), nn.Tanh())  # noqa: E731
    f = make()
    blocks = [rev.ReversibleBlock(f if shared else make(), make()) for _ in range(depth)]
    return rev.ReversibleStack(blocks)


def test_the_inverse():
    net = stack().float()
    x1, x2 = randn(3, 6).float(), randn(3, 6, seed=1).float()
    y = x1, x2
    for block in net.blocks:
        y = block(*y)
    for block in reversed(net.blocks):
        y = block.inverse(*y)
    torch.testing.assert_close(y[0], x1, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y[1], x2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_of_the_ordinary_backward_pass(shared):
    net, x = stack(shared=shared).double(), randn(2, 5, 6)
    net.blocks[1].f[1].bias.requires_grad_(False)
    trained = [p for p in net.parameters() if p.requires_grad]
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    y1 = y2 = theirs
    for block in net.blocks:
        y1, y2 = block(y1, y2)
    weights = randn(2, 5, 6, seed=3)
    expected = torch.autograd.grad(((y1 + y2) / 2 * weights).sum(), [theirs, *trained])
    found = torch.autograd.grad((net(ours) * weights).sum(), [ours, *trained])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_what_is_kept_does_not_depend_on_the_depth():
    kept = []
    for depth in (2, 8):
        seen = []

        def note(tensor, seen=seen):
            seen.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, id):
            stack(depth)(randn(2, 5, 6).float().requires_grad_())
        kept.append(sum(seen))
    assert kept[0] == kept[1] == 2 * 60


def test_a_feed_forward_network_by_chunks():
    net, x = nn.Linear(4, 3).double(), randn(2, 7, 4)
    for chunk in (1, 3, 9):
        torch.testing.assert_close(rev.chunked(net, x, chunk), net(x))


def test_what_is_refused(unchecked):
    qk, v = randn(1, 1, 6, 4), randn(1, 1, 6, 4)
    for words, call in (
        ("must be even", lambda: rf.lsh_attention(qk, v, buckets=3, chunk=2)),
        ("chunk is 7; the text has only 6", lambda: rf.lsh_attention(qk, v, buckets=2, chunk=7)),
        ("rounds is 0", lambda: rf.lsh_attention(qk, v, buckets=2, chunk=2, rounds=0)),
        ("must agree", lambda: rf.lsh_attention(qk, v[:, :, :3], buckets=2, chunk=2)),
        ("hashes have shape", lambda: rf.lsh_attention(
            qk, v, buckets=2, chunk=2, hashes=torch.zeros(1, 1, 2, 6).long())),
        ("padding has shape", lambda: rf.lsh_attention(
            qk, v, buckets=2, chunk=2, padding=torch.zeros(1, 5).bool())),
        ("only 5 other keys", lambda: rf.top_key_recall(
            qk, torch.zeros(1, 1, 1, 6).long(), top=6)),
        ("no dropout", lambda: rev.ReversibleBlock(nn.Dropout(0.1), nn.Identity())),
        ("number of blocks is 0", lambda: rev.ReversibleStack([])),
        ("chunk is 0", lambda: rev.chunked(nn.Identity(), qk[0], 0)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
