"""Sparsefinder: learned projections, three rules, recall and sparsity, and lists of pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.design.attention import neighbours as nb
from effnb.design.attention import sparsefinder as sf
from effnb.design.attention.entmax import entmax_attention


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(tokens=60, heads=2, dim=16, groups=6, seed=0):
    """Queries and keys in groups: high scores within a group, low ones outside."""
    centres = 3 * randn(heads, groups, dim, seed=seed)
    member = torch.arange(tokens) % groups
    q = centres[:, member] + 0.5 * randn(1, heads, tokens, dim, seed=seed + 1)
    k = centres[:, member.flip(0)] + 0.5 * randn(1, heads, tokens, dim, seed=seed + 2)
    v = randn(1, heads, tokens, 8, seed=seed + 3)
    _, weights = entmax_attention(q, k, v)
    return q, k, v, weights > 0


def test_all_pairs_have_recall_1_and_sparsity_0():
    gold = randn(2, 3, 8, 8) > 1
    found = sf.graph_quality(torch.ones_like(gold), gold)
    assert (found.recall == 1).all() and (found.sparsity == 0).all()
    nothing = sf.graph_quality(torch.zeros_like(gold), gold)
    assert (nothing.recall == 0).all() and (nothing.sparsity == 1).all()


def test_random_pairs_lie_on_the_diagonal():
    """Recall is 1 - sparsity, within three standard errors."""
    gold = randn(1, 1, 200, 200, seed=1) > 1.2
    for share in (0.1, 0.4, 0.8):
        chance = torch.rand(gold.shape, generator=torch.Generator().manual_seed(2)) < share
        found = sf.graph_quality(chance, gold)
        error = (share * (1 - share) / int(gold.sum())) ** 0.5
        assert abs(float(found.recall + found.sparsity - 1)) < 3 * error


def test_quality_counts_allowed_pairs_only():
    gold, causal = torch.ones(1, 1, 4, 4).bool(), torch.ones(4, 4).bool().tril()
    found = sf.graph_quality(torch.eye(4).bool()[None, None], gold, visible=causal)
    assert float(found.recall) == pytest.approx(0.4)
    assert float(found.sparsity) == pytest.approx(0.6)


def test_with_recall_1_the_output_is_exact():
    """Any superset of the support gives entmax's own output; softmax changes."""
    q, k, v, gold = (x.double() if x.is_floating_point() else x for x in clustered())
    graph = gold | (torch.rand(gold.shape, generator=torch.Generator().manual_seed(3)) < 0.2)
    assert (sf.graph_quality(graph, gold).recall == 1).all()
    exact, _ = entmax_attention(q, k, v)
    restricted, _ = entmax_attention(q, k, v, visible=graph)
    assert (exact - restricted).abs().max() < 1e-12
    soft, _ = entmax_attention(0.2 * q, k, v, alpha=1.0)
    cut, _ = entmax_attention(0.2 * q, k, v, alpha=1.0, visible=graph)
    assert (soft - cut).abs().max() > 0.1


@pytest.mark.parametrize("shared", [False, True])
def test_learning_brings_pairs_with_weight_together(shared):
    q, k, _, gold = clustered()
    learned = sf.fit_projections(q, k, gold, shared=shared, steps=60, triplets=512)
    assert learned.maps.shape == (1 if shared else 2, 2, 16, 4)
    assert not learned.maps.requires_grad
    torch.manual_seed(0)
    other = sf.Projections(2, 16, 4, generator=torch.Generator().manual_seed(0))

    def recall_at_equal_sparsity(maps):
        small_q, small_k = maps(q, k)
        threshold = torch.cdist(small_q, small_k).quantile(0.2).item()
        return float(
            sf.graph_quality(sf.distance_graph(small_q, small_k, threshold), gold).recall.mean()
        )

    assert recall_at_equal_sparsity(learned) > 0.95
    assert recall_at_equal_sparsity(learned) > recall_at_equal_sparsity(other) + 0.1


def test_learned_rules_beat_random_pairs():
    """At its sparsity, every rule finds far more than the 1 - sparsity of chance."""
    q, k, _, gold = clustered(tokens=96)
    small_q, small_k = sf.fit_projections(q, k, gold, steps=60, triplets=512)(q, k)
    centroids = sf.kmeans(torch.cat([small_q[0], small_k[0]], 1), 6)
    threshold = torch.cdist(small_q, small_k).quantile(0.2).item()
    graphs = {
        "distance": sf.distance_graph(small_q, small_k, threshold),
        "cosine": sf.distance_graph(small_q, small_k, 0.5, metric="cosine"),
        "equal": sf.bucket_graph(*sf.quantization_buckets(small_q, small_k, 12)),
        "uniform": sf.bucket_graph(
            *sf.quantization_buckets(small_q, small_k, 12, equal_size=False)
        ),
        "clusters": sf.bucket_graph(*sf.cluster_buckets(small_q, small_k, centroids)),
    }
    for name, graph in graphs.items():
        found = sf.graph_quality(graph, gold)
        gain = float(found.recall.mean() + found.sparsity.mean()) - 1
        assert gain > 0.15, name


def test_the_hinge_by_hand():
    q, near, far = torch.zeros(2, 1), torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0], [1.2]])
    # [1 + 1 - 9]_+ = 0 and [1 + 1 - 1.44]_+ = 0.56
    assert float(sf.triplet_loss(q, near, far)) == pytest.approx(0.28)


def test_triplets_are_what_they_should_be():
    gold = randn(2, 2, 6, 6) > 0
    gold[0, 0, 0], gold[0, 0, 1] = True, False  # no negative, no positive
    visible = torch.ones(6, 6).bool().tril()
    drawn = sf.sample_triplets(gold & visible, 500, visible=visible)
    b, h, i, near, far = drawn.unbind(1)
    assert (gold & visible)[b, h, i, near].all()
    assert not gold[b, h, i, far].any() and visible[i, far].all()
    assert not ((b == 0) & (h == 0) & (i <= 1)).any()
    pairs = torch.unique(drawn[:, :4], dim=0)
    assert len(pairs) == len(drawn), "each pair with a weight once"


def test_equal_buckets_are_equal_and_queries_go_where_they_lie():
    q, k = randn(1, 1, 50, 2), randn(1, 1, 50, 2, seed=1)
    query_ids, key_ids = sf.quantization_buckets(q, k, 10)
    assert torch.bincount(key_ids.flatten(), minlength=20).tolist() == [5] * 20
    again, same = sf.quantization_buckets(k, k, 10)
    assert torch.equal(again, same)
    for dim in range(2):
        ordered = k[0, 0, :, dim].sort().values
        for query, bucket in zip(q[0, 0, :, dim], query_ids[0, 0, :, dim] - 10 * dim):
            assert bucket == 0 or query >= ordered[5 * bucket]
            assert bucket == 9 or query < ordered[5 * bucket + 5]


def test_kmeans_finds_clear_clusters():
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    points = (centres[torch.arange(30) % 3] + 0.1 * randn(30, 2))[None]
    found = sf.kmeans(points, 3, seed=4)[0]
    assert (torch.cdist(centres, found).min(1).values < 0.2).all()


def test_no_cluster_is_left_empty():
    points = torch.cat([torch.zeros(1, 20, 1), torch.full((1, 1, 1), 9.0)], 1)
    found = sf.kmeans(points, 2, steps=5)
    assert sorted(found.flatten().tolist()) == [0, 9]


def test_window_and_global_tokens():
    nothing = torch.zeros(1, 5, 5).bool()
    i = torch.arange(5)
    near = (i[:, None] - i).abs() <= 1
    assert torch.equal(sf.add_window(nothing, window=3)[0], near)
    assert torch.equal(sf.add_window(nothing, window=3, causal=True)[0], near.tril())
    both = sf.add_window(nothing, window=0, global_tokens=1)[0]
    assert torch.equal(both, (i == 0) | (i[:, None] == 0))


@settings(max_examples=25)
@given(
    tokens=st.integers(1, 9),
    members=st.integers(1, 3),
    buckets=st.integers(1, 5),
    window=st.sampled_from([0, 1, 3]),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_lists_are_the_table(tokens, members, buckets, window, causal, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randint(0, buckets, (2, 2, tokens, members), generator=generator) for _ in "qk")
    found = nb.bucket_neighbours(q, k, window=window, causal=causal)
    expected = sf.add_window(sf.bucket_graph(q, k), window=window, causal=causal)
    assert torch.equal(found.graph(tokens), expected)
    assert found.pairs == int(expected.sum()), "each pair once"
    assert found.index.shape[-1] == int(expected.sum(-1).max())


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_attention_over_lists_is_that_under_the_table(alpha):
    q, k, v = (randn(2, 2, 9, 4, seed=s).double().requires_grad_() for s in range(3))
    ids = torch.randint(0, 4, (2, 2, 9, 2), generator=torch.Generator().manual_seed(5))
    lists = nb.bucket_neighbours(ids, ids.roll(1, 2), window=1, causal=True)
    out = nb.neighbour_attention(q, k, v, lists, alpha=alpha)
    expected, _ = entmax_attention(q, k, v, alpha=alpha, visible=lists.graph(9))
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    g = randn(*out.shape, seed=9).double()
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), g) for o in (out, expected))):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_queries_without_any_key_give_0():
    q, k, v = (randn(1, 1, 3, 2, seed=s) for s in range(3))
    lists = nb.bucket_neighbours(
        torch.tensor([0, 1, 2]).view(1, 1, 3, 1), torch.zeros(1, 1, 3, 1).long()
    )
    out = nb.neighbour_attention(q, k, v, lists)
    assert (out[0, 0, 1:] == 0).all() and (out[0, 0, 0] != 0).any()


def test_the_lists_do_not_grow_with_the_square_of_the_length():
    """A bucket of constant size has a constant number of pairs a query."""
    counts = []
    for tokens in (128, 256):
        q, k = randn(1, 1, tokens, 2), randn(1, 1, tokens, 2, seed=1)
        lists = nb.bucket_neighbours(*sf.quantization_buckets(q, k, tokens // 8))
        counts.append(lists.pairs / tokens)
        assert lists.index.shape[-1] <= 2 * 8
    assert counts[1] == pytest.approx(counts[0], rel=0.1)


def test_what_is_refused(unchecked):
    q, k = randn(1, 1, 4, 2), randn(1, 1, 4, 2, seed=1)
    ids = torch.zeros(1, 1, 4, 1).long()
    gold = torch.zeros(1, 1, 4, 4).bool()
    for words, call in (
        ("manhattan", lambda: sf.distance_graph(q, k, 1.0, metric="manhattan")),
        ("4 keys cannot be cut into 5", lambda: sf.quantization_buckets(q, k, 5)),
        ("buckets is 0", lambda: sf.quantization_buckets(q, k, 0)),
        ("4 points cannot make 5", lambda: sf.kmeans(q[0], 5)),
        ("top is 3", lambda: sf.cluster_buckets(q, k, q[0, :, :2], top=3)),
        ("window is 2", lambda: sf.add_window(gold, window=2)),
        ("fewer than 5 global", lambda: sf.add_window(gold, global_tokens=5)),
        ("nothing to learn from", lambda: sf.fit_projections(q, k, gold, steps=1)),
        ("rank is 0", lambda: sf.fit_projections(q, k, ~gold, rank=0)),
        ("must agree", lambda: sf.graph_quality(gold, gold[..., :3])),
        ("window is 2", lambda: nb.bucket_neighbours(ids, ids, window=2)),
        ("are not the tokens", lambda: nb.bucket_neighbours(ids[:, :, :2], ids, causal=True)),
        ("below 0", lambda: nb.bucket_neighbours(ids - 1, ids)),
        ("lists for", lambda: nb.neighbour_attention(
            q[:, :, :2], k, k, nb.bucket_neighbours(ids, ids))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
