"""What SpAtten and Energon leave out: against minus infinity, by hand and by brute force."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.hardware.codesign import attention_pruning as core


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def triangle(n):
    return torch.ones(1, 1, n, n, dtype=torch.bool).tril()


# --- attention and selection


def test_a_key_that_is_left_out_is_one_at_minus_infinity():
    q, k, v = (randn(2, 3, 7, 4, seed=s) for s in range(3))
    visible = rand(2, 1, 7, 7, seed=4) > 0.4
    visible |= torch.eye(7, dtype=torch.bool)
    scores = q @ k.transpose(-1, -2) / 2
    masked = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.zeros(2, 1, 7, 7).masked_fill(~visible, -torch.inf)
    )
    found = core.probabilities(scores, visible)
    assert not found[~visible.expand_as(found)].any()
    torch.testing.assert_close(found @ v, masked, rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_nothing_is_no_nan():
    found = core.probabilities(randn(1, 1, 2, 4), torch.zeros(1, 1, 2, 4, dtype=torch.bool))
    assert torch.equal(found, torch.full_like(found, 0.25))


@settings(max_examples=25)
@given(
    items=st.integers(1, 9), count=st.integers(0, 10), seed=st.integers(0, 99), ties=st.booleans()
)
def test_the_highest_are_kept(items, count, seed, ties):
    scores = randn(3, items, seed=seed)
    if ties:
        scores = scores.sign()
    allowed = rand(3, items, seed=seed + 1) > 0.3
    protected = torch.zeros(3, items, dtype=torch.bool)
    protected[:, 0] = True
    found = core.keep_top(scores, count, allowed, protected)
    for row in range(3):
        order = sorted(
            (i for i in range(items) if allowed[row, i]),
            key=lambda i: (i != 0, -scores[row, i].item(), i),
        )
        assert found[row].nonzero().flatten().tolist() == sorted(order[:count])


def test_each_row_may_keep_another_number():
    found = core.keep_top(torch.tensor([[1.0, 3, 2], [1, 3, 2]]), torch.tensor([1, 2]))
    assert found.tolist() == [[False, True, False], [False, True, True]]


# --- SpAtten


def test_shares_fall_to_the_last_layer():
    assert core.schedule(5, 0.5) == [1, 0.875, 0.75, 0.625, 0.5]
    assert core.schedule(4, 0.4, first=2) == pytest.approx([1, 1, 0.7, 0.4])
    assert core.schedule(3, 1.0, first=9) == [1, 1, 1]


def test_importance_is_summed_over_heads_and_queries():
    attention = torch.tensor(
        [[[[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0], [0.2, 0.3, 0.5]]]]
    )
    sums = torch.tensor([[[2.7, 1.8, 1.5]]])
    torch.testing.assert_close(core.token_importance(attention), sums)
    by_query = core.token_importance(attention, causal=True)
    torch.testing.assert_close(by_query[:, -1:], sums)
    torch.testing.assert_close(by_query[0, 1], torch.tensor([2.5, 1.5, 0]))
    without = core.token_importance(attention, torch.tensor([[True, False, True]]))
    torch.testing.assert_close(without, torch.tensor([[[2.2, 0.3, 1.5]]]))


def test_a_head_is_as_important_as_its_output_is_large():
    out = torch.tensor([[[[1.0, -2], [0, 1]], [[0.5, 0], [-3, 0]]]])  # heads, queries, dim
    torch.testing.assert_close(core.head_importance(out), torch.tensor([[[4.0, 3.5]]]))
    torch.testing.assert_close(
        core.head_importance(out, causal=True), torch.tensor([[[3.0, 0.5], [4.0, 3.5]]])
    )
    torch.testing.assert_close(
        core.head_importance(out, torch.tensor([[False, True]])), torch.tensor([[[1.0, 3.0]]])
    )


@settings(max_examples=20)
@given(steps=st.integers(1, 8), seed=st.integers(0, 99), share=st.floats(0.2, 1))
def test_what_was_dropped_never_comes_back(steps, seed, share):
    importance = randn(2, steps, steps, seed=seed)
    allowed = torch.ones(2, steps, steps, dtype=torch.bool).tril()
    count = torch.tensor([math.ceil(share * (t + 1)) for t in range(steps)]).expand(2, -1)
    held = core.evict(importance, count, allowed, torch.arange(steps))
    assert held.sum(-1).equal(count)
    assert held.diagonal(dim1=1, dim2=2).all(), "the newest token always stays"
    for t in range(1, steps):
        assert not (held[:, t, :t] & ~held[:, t - 1, :t]).any()
    # Broken in two, with what was held in between handed on, it is the same.
    half = steps // 2
    if half:
        before = held[:, half - 1]
        rest = core.evict(
            importance[:, half:],
            count[:, half:],
            allowed[:, half:],
            torch.arange(half, steps),
            before,
        )
        assert torch.equal(rest, held[:, half:])


def test_values_of_small_probability_are_not_read():
    attention = torch.tensor([[[[0.5, 0.2, 0.3, 0.0], [0.1, 0.9, 0.0, 0.0]]]])
    visible = torch.tensor([[[[True, True, True, True], [True, True, False, False]]]])
    found = core.local_values(attention, 0.5, visible)
    assert found.tolist() == [[[[True, False, True, False], [False, True, False, False]]]]
    assert torch.equal(core.local_values(attention, 1.0, visible), visible)


@settings(max_examples=20)
@given(high=st.integers(2, 8), low=st.integers(1, 8), seed=st.integers(0, 99))
def test_high_bits_are_a_shift(high, low, seed):
    x = randn(1, 2, 5, 6, seed=seed)
    codes, step = core.integer_codes(x, high + low)
    whole = codes.long()
    assert torch.equal(whole.float(), codes)
    assert whole.abs().max() == 2 ** (high + low - 1) - 1, "the largest number is hit"
    assert ((codes * step - x).abs() <= step / 2 * 1.001).all()
    top = core.high_bits(codes, low)
    assert torch.equal(top, ((whole >> low) << low) + (2**low - 1) / 2)
    assert (whole >> low).unique().numel() <= 2**high


def test_flat_attention_fetches_the_low_bits_and_peaked_does_not():
    k = torch.eye(4)[None, None] * 8
    q = torch.stack([k[0, 0, 0], torch.zeros(4)])[None, None]  # asks for key 0; asks for nothing
    visible = torch.ones(1, 1, 2, 4, dtype=torch.bool)
    found, fetched = core.progressive(q, k, visible, msb_bits=4, lsb_bits=8, threshold=0.5)
    assert fetched.tolist() == [[[False, True]]]
    exact = core.probabilities(q @ k.transpose(-1, -2) / 2, visible)
    torch.testing.assert_close(found[0, 0, 1], exact[0, 0, 1], atol=1e-3, rtol=0)


def test_thresholds_at_both_ends():
    q, k = randn(1, 2, 5, 8), randn(1, 2, 9, 8, seed=1)
    visible = torch.ones(1, 1, 5, 9, dtype=torch.bool)
    never, fetched = core.progressive(q, k, visible, threshold=0.0)
    assert not fetched.any()
    always, fetched = core.progressive(q, k, visible, threshold=1.1)
    assert fetched.all()
    exact = core.probabilities(q @ k.transpose(-1, -2) / 8**0.5, visible)
    (cq, sq), (ck, sk) = core.integer_codes(q, 10), core.integer_codes(k, 10)
    ten_bits = core.probabilities((cq * sq) @ (ck * sk).transpose(-1, -2) / 8**0.5, visible)
    torch.testing.assert_close(always, ten_bits, rtol=1e-4, atol=1e-6)
    assert (always - exact).abs().max() < (never - exact).abs().max() / 4


# --- Energon


def test_the_filter_by_hand():
    """One round at full width is a threshold on the scores themselves."""
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([4.0, 1, 2, -3]).view(1, 1, 4, 1)  # mean 1, max 4, min -3
    visible = torch.ones(1, 1, 1, 4, dtype=torch.bool)

    def kept(alpha):
        return core.filter_keys(q, k, visible, rounds=(16,), alpha=alpha)[0][0, 0, 0].tolist()

    assert kept(0.3) == [True, False, True, False]  # 1.9
    assert kept(0.4) == [True, False, False, False]  # 2.2
    assert kept(-0.1) == [True, True, True, False]  # 0.6
    assert kept(-1.0) == [True, True, True, True]
    assert kept(1.0) == [True, False, False, False]


@settings(max_examples=20)
@given(alpha=st.floats(-1, 1), seed=st.integers(0, 99), first=st.integers(2, 6))
def test_rounds_only_take_away_and_the_best_stays(alpha, seed, first):
    q, k = randn(2, 3, 5, 8, seed=seed), randn(2, 3, 5, 8, seed=seed + 1)
    visible = triangle(5)
    left = [visible.expand(2, 3, 5, 5)]
    left += core.filter_keys(q, k, visible, rounds=(first, 16), alpha=alpha)
    for before, after in itertools.pairwise(left):
        assert not (after & ~before).any()
        assert after.any(-1).all(), "every query keeps a key"
    # The last round is practically exact: of what entered it, the best key is still there.
    scores = (q @ k.transpose(-1, -2)).masked_fill(~left[1], -torch.inf)
    best = scores.argmax(-1, keepdim=True)
    close = scores.amax(-1, keepdim=True) - scores < 1e-2 * scores[scores > -torch.inf].abs().max()
    assert (left[2].gather(-1, best) | (left[2] & close).any(-1, keepdim=True)).all()


def test_the_mean_is_of_the_keys_that_are_left():
    """An early key that is not visible yet must not move the threshold."""
    q, k = randn(1, 1, 6, 8), randn(1, 1, 6, 8, seed=3)
    alone = core.filter_keys(q[:, :, 3:4], k[:, :, :4], triangle(6)[:, :, 3:4, :4], rounds=(16,))
    k2 = k.clone()
    k2[:, :, 4:] *= 0.9  # the steps of the codes are per head: stay below the maximum
    together = core.filter_keys(q, k2, triangle(6), rounds=(16,))
    assert torch.equal(alone[0][0, 0, 0], together[0][0, 0, 3, :4])


def test_equal_scores_are_all_kept():
    q = k = torch.full((1, 1, 7, 3), 0.1)
    found = core.filter_keys(q, k, triangle(7), alpha=0.5)
    assert torch.equal(found[-1], triangle(7))


def test_recall_of_the_true_best():
    scores = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    visible = torch.tensor([[True] * 4, [True, True, False, False]])
    selected = torch.tensor([[True, False, True, False], [True, False, False, False]])
    share, counts = core.top_recall(scores, selected, visible, 2)
    assert share.tolist() == [0.5, 0.5]
    assert counts.tolist() == [True, False], "with two keys, nothing can be missed at k = 2"


def test_coarse_products_find_the_best_keys_better_than_chance():
    """What the method rests on: few bits rank keys nearly as all bits do, and more bits better."""
    q, k = randn(4, 4, 32, 32), randn(4, 4, 256, 32, seed=1)
    visible = torch.ones(1, 1, 32, 256, dtype=torch.bool)
    scores = q @ k.transpose(-1, -2)
    recalls, shares = [], []
    for rounds in ((2,), (4,), (8,)):
        selected = core.filter_keys(q, k, visible, rounds=rounds)[-1]
        recalls.append(core.top_recall(scores, selected, visible, 8)[0].mean().item())
        shares.append(selected.float().mean().item())
    assert recalls[0] > shares[0] + 0.2
    assert recalls[0] < recalls[1] <= recalls[2] == 1.0


# --- bad input


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x, m: core.schedule(4, 0.0), "share to keep is 0.0"),
        (lambda x, m: core.schedule(4, 0.5, first=0), "layer 0 sees everything"),
        (lambda x, m: core.schedule(4, 0.5, first=4), "the model's last one is 3"),
        (lambda x, m: core.local_values(m.float(), 1.5, m), "share to keep is 1.5"),
        (lambda x, m: core.progressive(x, x, m, msb_bits=1), "1 high and 4 low bits"),
        (lambda x, m: core.progressive(x, x, m, lsb_bits=11), "6 high and 11 low bits"),
        (lambda x, m: core.progressive(x, x, m, threshold=-0.1), "threshold is -0.1"),
        (lambda x, m: core.filter_keys(x, x, m, rounds=()), "rounds are"),
        (lambda x, m: core.filter_keys(x, x, m, rounds=(1, 4)), r"rounds are \(1, 4\)"),
        (lambda x, m: core.filter_keys(x, x, m, alpha=1.2), "alpha is 1.2"),
        (lambda x, m: core.top_recall(m.float(), m, m, 0), "k is 0"),
    ],
)
def test_bad_input_gets_a_sentence(call, said):
    with pytest.raises(ValueError, match=said):
        call(randn(1, 1, 3, 4), triangle(3))
