"""Windows, global tokens and blocks: Longformer, ETC, BigBird, and the tables that define them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.design.attention import bigbird as bb
from effnb.design.attention import etc, patterns
from effnb.design.attention import longformer as lf


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def dense(q, k, v, visible):
    """The definition: all pairs, and a mask; rows that see nothing give 0."""
    blind = ~visible.any(-1, keepdim=True)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~(visible | blind), -torch.inf)
    return scores.softmax(-1).masked_fill(~visible, 0) @ v


# --- tables


@settings(max_examples=30)
@given(tokens=st.integers(1, 30), half=st.integers(1, 20))
def test_pairs_of_a_window(tokens, half):
    """Σ_i (min(T − 1, i + w/2) − max(0, i − w/2) + 1)."""
    expected = sum(min(tokens - 1, i + half) - max(0, i - half) + 1 for i in range(tokens))
    assert patterns.count_pairs(patterns.window_pattern(tokens, 2 * half)) == expected


def test_window_with_sinks():
    table = patterns.window_pattern(6, 2, global_tokens=1, causal=True)
    rows = [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5]]
    assert [row.nonzero().flatten().tolist() for row in table] == rows


def test_dilation_reaches_further_at_the_same_cost():
    table = patterns.window_pattern(30, 4, dilation=3)
    assert table[15].nonzero().flatten().tolist() == [9, 12, 15, 18, 21]
    causal = patterns.window_pattern(30, 3, dilation=3, causal=True)
    assert causal[15].nonzero().flatten().tolist() == [9, 12, 15]


def test_global_tokens_are_seen_and_see():
    table = patterns.window_pattern(9, 2, global_tokens=[4])
    assert table[4].all() and table[:, 4].all()
    assert patterns.share_of_dense(table) == pytest.approx(int(table.sum()) / 81)


def test_hops():
    line = patterns.window_pattern(17, 4)
    assert patterns.hops(line) == 8  # 16 tokens, 2 a layer
    assert patterns.hops(patterns.window_pattern(17, 4, global_tokens=1)) == 2
    assert patterns.hops(torch.ones(5, 5).bool()) == 1
    assert patterns.hops(torch.eye(3).bool()) is None
    assert patterns.hops(patterns.window_pattern(9, 3, causal=True)) == 4
    assert patterns.hops(bb.bigbird_pattern(32, block=2, random=1)[0]) == 2


def test_a_stack_of_layers_sees_layers_times_half_a_window():
    reach = patterns.receptive_field(patterns.window_pattern(31, 4), 3)
    assert reach[15].nonzero().flatten().tolist() == list(range(9, 22))


def test_pairs_of_etc():
    """n_g (n_g + n_l) + n_l (n_g + 2r + 1), less what the window loses at both ends."""
    table = patterns.etc_pattern(3, 20, 4)
    assert patterns.count_pairs(table) == etc.etc_pairs(3, 20, 4) - 4 * 5
    assert table[:3].all() and table[:, :3].all()
    assert table[12].nonzero().flatten().tolist() == [0, 1, 2, *range(8, 17)]


# --- Longformer


def longformer(window=4, causal=False, seed=0):
    torch.manual_seed(seed)
    layer = lf.LongformerAttention(8, 2, window, causal=causal).double()
    for name in ("query", "key", "value"):
        torch.nn.init.normal_(getattr(layer, f"{name}_global").weight)
    return layer


def longformer_dense(layer, x, chosen, padding):
    """The two cases of the definition, by tables."""

    def split(p):
        return p(x).unflatten(2, (layer.heads, -1)).transpose(1, 2)

    time = x.shape[1]
    real = ~padding
    window = patterns.window_pattern(time, layer.window, causal=layer.causal)
    past = torch.ones(time, time).bool()
    past = past.tril() if layer.causal else past
    local = (window | (chosen[:, None] & past)) & real[:, None] & real[..., None]
    out = dense(*(split(p) for p in (layer.query, layer.key, layer.value)), local[:, None])
    whole = (past & real[:, None] & real[..., None])[:, None]
    three = (layer.query_global, layer.key_global, layer.value_global)
    rows = dense(*(split(p) for p in three), whole)
    out = torch.where((chosen & real)[:, None, :, None], rows, out)
    return layer.out(out.transpose(1, 2).flatten(2))


@settings(max_examples=20)
@given(
    time=st.integers(1, 12),
    half=st.integers(1, 8),
    causal=st.booleans(),
    seed=st.integers(0, 99),
    pad=st.sampled_from(["none", "left", "right"]),
)
def test_longformer_is_its_definition(time, half, causal, seed, pad):
    layer, x = longformer(2 * half, causal, seed), randn(2, time, 8, seed=seed)
    chosen = torch.rand(2, time, generator=torch.Generator().manual_seed(seed)) < 0.3
    padding = torch.zeros(2, time).bool()
    if pad != "none":
        padding[1, : time // 2] = True
        padding = padding if pad == "left" else padding.flip(1)
    x.requires_grad_()
    given = None if pad == "none" else padding
    out = layer(x, global_tokens=chosen, padding=given)
    expected = longformer_dense(layer, x, chosen, padding)
    torch.testing.assert_close(out, expected, atol=1e-11, rtol=1e-11)
    weights = randn(*out.shape, seed=1)
    a, b = (torch.autograd.grad((o * weights).sum(), x)[0] for o in (out, expected))
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_a_window_longer_than_two_texts_is_dense_attention():
    layer, x = longformer(window=40), randn(2, 20, 8)
    q, k, v = (
        p(x).unflatten(2, (2, 4)).transpose(1, 2) for p in (layer.query, layer.key, layer.value)
    )
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    expected = layer.out(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)


def seen_by(layer, token, time, **options):
    x = randn(1, time, 8).requires_grad_()
    out = layer(x, **options)[0, token]
    (gradient,) = torch.autograd.grad((out * torch.arange(8)).sum(), x)
    return (gradient[0].abs().sum(-1) > 0).nonzero().flatten().tolist()


def test_receptive_field_by_gradients():
    """Window 4 and global token 0: token 10 sees 0 and 8 to 12, token 0 sees all."""
    chosen = torch.arange(20) == 0
    assert seen_by(longformer(), 10, 20, global_tokens=chosen) == [0, 8, 9, 10, 11, 12]
    assert seen_by(longformer(), 0, 20, global_tokens=chosen) == list(range(20))
    causal = longformer(causal=True)
    assert seen_by(causal, 10, 20, global_tokens=chosen) == [0, 7, 8, 9, 10]
    later = torch.arange(20) == 12
    assert seen_by(causal, 10, 20, global_tokens=later) == [7, 8, 9, 10]
    assert seen_by(causal, 12, 20, global_tokens=later) == list(range(13))


def test_global_projections_begin_as_copies():
    layer = lf.LongformerAttention(8, 2, 4).double()
    x, chosen = randn(1, 9, 8), torch.arange(9) < 2
    assert torch.equal(layer.query.weight, layer.query_global.weight)
    assert layer.query.weight is not layer.query_global.weight
    with torch.no_grad():
        layer.value.weight.mul_(2)
        before = layer(x, global_tokens=chosen)
        layer.copy_projections()
        assert not torch.allclose(before, layer(x, global_tokens=chosen))
    assert torch.equal(layer.value.weight, layer.value_global.weight)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("time", [1, 7, 12])
def test_dilated_attention_is_its_table(causal, time):
    q, k, v = (randn(2, 2, time, 4, seed=s) for s in range(3))
    out = lf.dilated_attention(q, k, v, window=4, dilation=3, causal=causal)
    table = patterns.window_pattern(time, 4, dilation=3, causal=causal)
    torch.testing.assert_close(out, dense(q, k, v, table), atol=1e-12, rtol=1e-12)


# --- ETC


def etc_dense(layer, long, global_input, part, padding):
    """One table of all tokens, the global ones first, with labels and masks."""
    g, n = global_input.shape[1], long.shape[1]

    def split(index):
        both = layer.globals[index](global_input), layer.long[index](long)
        return torch.cat(both, 1).unflatten(2, (layer.heads, -1)).transpose(1, 2)

    q, k, v = (split(index) for index in range(3))
    scores = q @ k.mT
    place = torch.cat([torch.arange(g), torch.arange(n)])
    distance = (place - place[:, None]).clamp(-layer.clip, layer.clip) + layer.clip
    one_input = (torch.arange(g + n) < g)[:, None] == (torch.arange(g + n) < g)
    label = torch.where(one_input, distance, 2 * layer.clip + 1).repeat(len(long), 1, 1)
    if part is not None:
        same = part[:, :, None] == torch.arange(g)
        label[:, g:, :g] += same
        label[:, :g, g:] += same.mT
    for b in range(len(long)):
        for h in range(layer.heads):
            scores[b, h] += (q[b, h][:, None] * layer.labels[h][label[b]]).sum(-1)
    visible = patterns.etc_pattern(g, n, layer.radius).repeat(len(long), 1, 1)
    unseen = torch.nn.functional.pad(padding, (g, 0), value=False)
    visible &= ~unseen[:, None] & ~unseen[..., None]
    blind = ~visible.any(-1, keepdim=True)
    scores = (scores / q.shape[3] ** 0.5).masked_fill(~(visible | blind)[:, None], -torch.inf)
    out = scores.softmax(-1).masked_fill(~visible[:, None], 0) @ v
    out = out.transpose(1, 2).flatten(2)
    return layer.long[3](out[:, g:]), layer.globals[3](out[:, :g])


@settings(max_examples=20)
@given(
    n=st.integers(1, 11), g=st.integers(1, 3), radius=st.integers(1, 6), separate=st.booleans(),
    with_parts=st.booleans(), pad=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_etc_by_blocks_is_its_definition(n, g, radius, separate, with_parts, pad, seed):
    torch.manual_seed(seed)
    layer = etc.EtcAttention(8, 2, radius, clip=2, separate=separate).double()
    torch.nn.init.normal_(layer.labels)
    long, short = randn(2, n, 8, seed=seed), randn(2, g, 8, seed=seed + 1)
    part = torch.randint(-1, g, (2, n)) if with_parts else None
    padding = torch.zeros(2, n).bool()
    padding[1, n // 2 :] = pad
    found = layer(long, short, part=part, padding=padding if pad else None)
    expected = etc_dense(layer, long, short, part, padding)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_etc_without_labels_runs_through_the_kernel_and_is_the_same():
    torch.manual_seed(0)
    labelled, plain = (etc.EtcAttention(8, 2, 3, clip=c).double() for c in (2, 0))
    with torch.no_grad():
        labelled.labels.zero_()
    plain.load_state_dict(labelled.state_dict(), strict=False)
    long, short = randn(2, 17, 8), randn(2, 3, 8, seed=1)
    padding = torch.arange(17).expand(2, -1) >= torch.tensor([[17], [12]])
    for pad in (None, padding):
        for a, b in zip(labelled(long, short, padding=pad), plain(long, short, padding=pad)):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_what_an_etc_token_sees():
    torch.manual_seed(1)
    layer = etc.EtcAttention(8, 2, 2).double()
    long, short = randn(1, 15, 8).requires_grad_(), randn(1, 2, 8, seed=1).requires_grad_()
    out, out_global = layer(long, short)
    weights = torch.arange(8)
    a, b = torch.autograd.grad((out[0, 7] * weights).sum(), (long, short), retain_graph=True)
    assert (a[0].abs().sum(-1) > 0).nonzero().flatten().tolist() == [5, 6, 7, 8, 9]
    assert (b[0].abs().sum(-1) > 0).all()
    a, b = torch.autograd.grad((out_global[0, 1] * weights).sum(), (long, short))
    assert (a[0].abs().sum(-1) > 0).all() and (b[0].abs().sum(-1) > 0).all()


# --- BigBird


def test_random_blocks_are_a_choice_among_those_not_seen_anyway():
    chosen = bb.random_blocks(12, 3, heads=4, seed=1)
    for block in range(1, 11):
        known = {0, 11, block - 1, block, block + 1}
        rows = chosen[:, block].tolist()
        assert all(len(set(row)) == 3 and not known & set(row) for row in rows)
        assert len({tuple(row) for row in rows}) > 1, "heads choose for themselves"
    assert torch.equal(chosen, bb.random_blocks(12, 3, heads=4, seed=1))
    assert not torch.equal(chosen, bb.random_blocks(12, 3, heads=4, seed=2))


@pytest.mark.parametrize(("blocks", "random"), [(5, 0), (6, 1), (9, 2), (8, 3)])
@pytest.mark.parametrize("pad", [False, True])
def test_bigbird_by_blocks_is_its_table(blocks, random, pad):
    time = 3 * blocks
    q, k, v = (randn(2, 2, time, 4, seed=s).requires_grad_() for s in range(3))
    padding = torch.arange(time).expand(2, -1) >= torch.tensor([[time], [time - 5]])
    out = bb.bigbird_attention(q, k, v, block=3, random=random, padding=padding if pad else None)
    table = bb.bigbird_pattern(time, block=3, random=random, heads=2)[None]
    if pad:
        table = table & ~padding[:, None, None] & ~padding[:, None, :, None]
    expected = dense(q, k, v, table)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    weights = randn(*out.shape, seed=9)
    for a, b in zip(
        *(torch.autograd.grad((o * weights).sum(), (q, k, v)) for o in (out, expected))
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_a_block_sees_a_constant_number_of_blocks():
    for blocks in (10, 20):
        table = bb.bigbird_pattern(4 * blocks, block=4, random=3)[0]
        counts = table[::4, ::4].sum(-1)
        assert counts[0] == counts[-1] == blocks
        assert counts[2:-2].unique().tolist() == [8]  # three, three, two


# --- types, and what is refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types(dtype):
    x = randn(1, 24, 8).to(dtype)
    assert longformer().to(dtype)(x, global_tokens=torch.arange(24) == 3).dtype == dtype
    found = etc.EtcAttention(8, 2, 2).to(dtype)(x, x[:, :2])
    assert {o.dtype for o in found} == {dtype}
    q = randn(1, 2, 24, 4).to(dtype)
    assert bb.bigbird_attention(q, q, q, block=4, random=1).dtype == dtype


def test_what_is_refused(unchecked):
    x, q = randn(1, 9, 8), randn(1, 2, 9, 4)
    layer = etc.EtcAttention(8, 2, 2).double()
    part = torch.zeros(1, 9).long()
    for words, call in (
        ("must be positive and, where it has two sides, even",
         lambda: patterns.window_pattern(5, 3)),
        ("token 5 is not one of the 5", lambda: patterns.window_pattern(5, 2, global_tokens=[5])),
        ("dilation is 0", lambda: patterns.window_pattern(5, 2, dilation=0)),
        ("layers is 0", lambda: patterns.receptive_field(torch.eye(2).bool(), 0)),
        ("two sides must be even", lambda: lf.LongformerAttention(8, 2, 3)),
        ("window is 0", lambda: lf.LongformerAttention(8, 2, 0)),
        ("number of heads, 3", lambda: lf.LongformerAttention(8, 3, 4)),
        ("must be bool", lambda: longformer()(x, padding=torch.zeros(1, 9))),
        ("global_tokens has shape", lambda: longformer()(
            x, global_tokens=torch.zeros(2, 9).bool())),
        ("dilation is 0", lambda: lf.dilated_attention(q, q, q, window=2, dilation=0)),
        ("radius is 0", lambda: etc.EtcAttention(8, 2, 0)),
        ("each input needs one", lambda: layer(x, x[:, :0])),
        ("name one of the 2 global tokens", lambda: layer(x, x[:, :2], part=part + 2)),
        ("parts of the text cannot be told", lambda: etc.EtcAttention(8, 2, 2, clip=0).double()(
            x, x[:, :2], part=part)),
        ("no multiple of blocks of 4", lambda: bb.bigbird_attention(q, q, q, block=4)),
        ("too short for 3 random ones", lambda: bb.bigbird_attention(q, q, q, block=3)),
        ("no multiple of blocks", lambda: bb.bigbird_pattern(9, block=2)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
