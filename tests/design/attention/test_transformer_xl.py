"""Transformer-XL: a full memory is the full context, and the shift is the double loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.design.attention import transformer_xl as xl


def model(layers=3, memory=64, seed=0, **changes):
    torch.manual_seed(seed)
    options = dict(dim=16, heads=2, layers=layers, memory=memory) | changes
    found = xl.TransformerXL(31, **options).double().eval()
    with torch.no_grad():
        found.u.normal_()
        found.v.normal_()
    return found


def ids(time, batch=2, seed=1):
    return torch.randint(0, 31, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("segment", [1, 5, 7])
def test_with_all_of_the_past_in_memory_it_is_one_full_context(segment, pre_norm):
    """Float64, three layers, segments that do not divide the text: to 1e-12."""
    whole, text = model(pre_norm=pre_norm), ids(24)
    with torch.no_grad():
        expected = whole(text).logits
        found = xl.read_in_segments(whole, text, segment)
        assert (found - expected).abs().max() < 1e-12
        whole.memory = 3
        assert (xl.read_in_segments(whole, text, segment) - expected).abs().max() > 1e-4


@settings(max_examples=25)
@given(queries=st.integers(1, 7), memory=st.integers(0, 6), seed=st.integers(0, 99))
def test_the_shift_puts_every_distance_in_its_place(queries, memory, seed):
    keys = queries + memory
    x = torch.randn(2, queries, keys, generator=torch.Generator().manual_seed(seed)).double()
    shifted = xl.rel_shift(x)
    for i in range(queries):
        for j in range(i + memory + 1):
            distance = i + memory - j
            assert torch.equal(shifted[:, i, j], x[:, i, keys - 1 - distance])


@settings(max_examples=10)
@given(queries=st.integers(1, 5), memory=st.integers(0, 4), seed=st.integers(0, 99))
def test_scores_are_the_double_loop(queries, memory, seed):
    """A_ij = [(q_i + u) k_j + (q_i + v) r_(i + M - j)] / sqrt(d_h), to 1e-10."""
    torch.manual_seed(seed)
    layer = xl.RelativeAttention(8, 2).double()
    h, c = torch.randn(1, queries, 8).double(), torch.randn(1, queries + memory, 8).double()
    u, v = torch.randn(2, 4).double(), torch.randn(2, 4).double()
    found = layer.scores(h, c, u, v)
    q, k = layer.q_proj(h)[0].view(-1, 2, 4), layer.k_proj(c)[0].view(-1, 2, 4)
    for head in range(2):
        for i in range(queries):
            for j in range(queries + memory):
                distance = i + memory - j
                if distance < 0:
                    assert found[0, head, i, j] == -torch.inf
                    continue
                table = xl.relative_table(torch.tensor([float(distance)]).double(), 8)
                r = layer.r_proj(table)[0].view(2, 4)[head]
                expected = (q[i, head] + u[head]) @ k[j, head] + (q[i, head] + v[head]) @ r
                assert abs((found[0, head, i, j] - expected / 2).item()) < 1e-10


def test_the_table_is_sines_then_cosines():
    table = xl.relative_table(torch.tensor([0.0, 2.0]), 4)
    assert table[0].tolist() == [0, 0, 1, 1]
    angles = torch.tensor([2.0, 0.02])  # frequencies 1 and 10000^(-1/2)
    torch.testing.assert_close(table[1], torch.cat([angles.sin(), angles.cos()]))


def test_scores_depend_on_the_distance_alone_where_contents_are_equal():
    torch.manual_seed(0)
    layer = xl.RelativeAttention(8, 2).double()
    h, c = torch.ones(1, 5, 8).double(), torch.ones(1, 9, 8).double()
    u, v = torch.randn(2, 4).double(), torch.randn(2, 4).double()
    scores = layer.scores(h, c, u, v)[0]
    for distance in range(9):
        same = [scores[:, i, i + 4 - distance] for i in range(5) if 0 <= i + 4 - distance < 9]
        for one in same[1:]:
            torch.testing.assert_close(one, same[0], atol=1e-12, rtol=0)


def gradient_reach(stop_gradient):
    """Embeddings that the last token of four segments of 6 depends on by gradients."""
    net, text = model(layers=3, memory=6), ids(24, batch=1)
    embedded = []
    net.embedding.register_forward_hook(
        lambda _m, _i, out: embedded.append(out.detach().requires_grad_()) or embedded[-1]
    )
    memories = None
    for part in text.split(6, 1):
        out = net(part, memories, stop_gradient=stop_gradient)
        memories = out.memories
    weighted = (out.logits[0, -1] * torch.arange(31)).sum()
    found = torch.autograd.grad(weighted, embedded, allow_unused=True)
    reached = [g is not None and g[0].abs().sum(-1) > 0 for g in found]
    return [6 * n + i for n, r in enumerate(reached) if r is not False for i in range(6) if r[i]]


def test_the_reach_of_three_layers_is_three_segments():
    """With the gradient let through, token 23 reaches token 0; cut off, its own segment only."""
    assert gradient_reach(stop_gradient=False)[0] == 0
    assert gradient_reach(stop_gradient=True) == list(range(18, 24))


def test_memories_are_the_last_inputs_of_each_layer_without_gradients():
    net, text = model(layers=2, memory=4), ids(10)
    first = net(text[:, :3])
    assert [m.shape for m in first.memories] == [(2, 3, 16)] * 2
    second = net(text[:, 3:6], first.memories)
    assert [m.shape for m in second.memories] == [(2, 4, 16)] * 2
    assert not any(m.requires_grad for m in second.memories)
    embedded = net.embedding(text[:, 2:6]) * 4
    torch.testing.assert_close(second.memories[0], embedded)
    assert torch.equal(second.memories[1][:, 0], first.memories[1][:, 2])
    net.memory = 0
    assert [m.shape for m in net(text).memories] == [(2, 0, 16)] * 2


def test_no_token_sees_a_later_one_across_the_memory():
    net, text = model(memory=8), ids(12)
    changed = text.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 31
    with torch.no_grad():
        a, b = (xl.read_in_segments(net, t, 4) for t in (text, changed))
    assert torch.equal(a[:, :9], b[:, :9])
    assert (a[:, 9:] - b[:, 9:]).abs().amin((0, 2)).max() > 0


def test_distances_above_the_clamp_count_as_the_clamp():
    near, text = model(clamp=3), ids(9)
    with torch.no_grad():
        clamped = near(text).logits
        near.clamp = None
        free = near(text).logits
    torch.testing.assert_close(clamped[:, :4], free[:, :4], atol=1e-12, rtol=1e-12)
    assert (clamped[:, 5:] - free[:, 5:]).abs().max() > 1e-4


def test_parameters():
    net = model(layers=2)
    assert net.head.weight is net.embedding.weight
    assert sum(p is net.u for p in net.parameters()) == 1, "u is shared by all layers"
    loss = net(ids(5)).logits.logsumexp(-1).sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    untied = model(tied=False)
    assert untied.head.weight is not untied.embedding.weight


def test_float32_and_bfloat16_run():
    for dtype in (torch.float32, torch.bfloat16):
        assert xl.read_in_segments(model().to(dtype), ids(8), 3).dtype == dtype


def test_what_is_refused():
    net, text = model(), ids(8)
    for words, call in (
        ("segment is 0", lambda: xl.read_in_segments(net, text, 0)),
        ("there must be 3", lambda: net(text, net(text).memories[:2])),
        ("there must be 3", lambda: net(text[:1], net(text).memories)),
        ("multiple of the number of heads", lambda: xl.TransformerXL(5, dim=16, heads=3)),
        ("even", lambda: xl.TransformerXL(5, dim=15, heads=3)),
        ("memory is -1", lambda: xl.TransformerXL(5, memory=-1)),
        ("layers is 0", lambda: xl.TransformerXL(5, layers=0)),
    ):
        with pytest.raises(ValueError, match=words):
            call()
