"""Losses on scores and embeddings of texts, and the encoders that make them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel

from effnb.inference.retrieval_distillation import (
    CrossEncoder,
    DualEncoder,
    embed_distill,
    inherit_documents,
    join,
    made_queries,
    margin_mse,
    mean_pool,
    order_only,
    pair_scores,
    pointwise,
    score_gap_bound,
    softmax_kl,
)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiny_encoder(seed=0, width=16, **changes):
    torch.manual_seed(seed)
    options = dict(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return BertModel(BertConfig(**(options | changes)), add_pooling_layer=False).eval()


# --- scores ---------------------------------------------------------------------------------------


def test_worked_values():
    s = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    t = torch.tensor([[5.0, 1.0, 4.5]], dtype=torch.float64)
    assert float(pointwise(s, t)) == pytest.approx((9 + 0 + 20.25) / 3)
    # Student margins 1 and 2, teacher margins 4 and 0.5.
    assert float(margin_mse(s, t)) == pytest.approx((9 + 2.25) / 2)
    assert float(order_only(s, t, 3.0)) == pytest.approx((2**2 + 0) / 2)
    assert float(order_only(s, t, 1.0)) == 0
    p, q = t.softmax(1), s.softmax(1)
    assert float(softmax_kl(s, t)) == pytest.approx(float((p * (p / q).log()).sum()))
    z = torch.tensor([[0.3]]).double()
    ours = float(pointwise(z, z, logistic=True))
    rate = 1 / (1 + math.exp(-0.3))
    assert ours == pytest.approx(-rate * math.log(rate) - (1 - rate) * math.log(1 - rate))


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 99), st.floats(-5, 5))
def test_what_each_loss_is_blind_to(queries, documents, seed, shift):
    s, t = randn(queries, documents, seed=seed), randn(queries, documents, seed=seed + 1)
    for loss in (softmax_kl, margin_mse, order_only):
        value = float(loss(s, t))
        assert value >= -1e-12
        assert float(loss(s + shift, t)) == pytest.approx(value, abs=1e-9)
        assert float(loss(s, t - shift)) == pytest.approx(value, abs=1e-9)
        assert float(loss(t, t)) == pytest.approx(0, abs=1e-12)
    assert float(pointwise(t + shift, t)) == pytest.approx(shift**2)  # this one is not blind
    # A student further ahead than its teacher costs nothing where only the order counts.
    ahead = t.clone()
    ahead[:, 0] += abs(shift)
    assert float(order_only(ahead, t)) == pytest.approx(0, abs=1e-12)
    assert float(margin_mse(ahead, t)) == pytest.approx(shift**2)


@pytest.mark.parametrize("loss", [pointwise, softmax_kl, margin_mse, order_only])
def test_no_gradient_reaches_the_teacher_and_bad_scores_are_refused(loss):
    # The student orders the documents the other way round.
    s, t = (-randn(2, 3)).requires_grad_(), randn(2, 3).requires_grad_()
    loss(s, t).backward()
    assert t.grad is None
    assert s.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"scores are \(2, 3\) and the teacher's \(2, 4\)"):
        loss(s, randn(2, 4))
    if loss is not pointwise:
        with pytest.raises(ValueError, match="at least one query and 2 documents"):
            loss(s[:, :1], t[:, :1])


def test_numbers_without_meaning_are_refused():
    with pytest.raises(ValueError, match="temperature is 0"):
        softmax_kl(randn(1, 2), randn(1, 2), temperature=0.0)
    with pytest.raises(ValueError, match="temperature is -2"):
        softmax_kl(randn(1, 2), randn(1, 2), teacher_temperature=-2.0)
    with pytest.raises(ValueError, match="margin is 0"):
        order_only(randn(1, 2), randn(1, 2), 0.0)


# --- embeddings -----------------------------------------------------------------------------------


def test_lengths_are_matched_not_their_squares():
    e, t = torch.zeros(2, 2).double(), torch.tensor([[3.0, 4.0], [0.0, 1.0]]).double()
    assert float(embed_distill(e, t)) == pytest.approx(3)
    assert float(embed_distill(e, t, metric="mse")) == pytest.approx(26 / 4)
    assert float(embed_distill(2 * t, t, metric="cosine")) == pytest.approx(0, abs=1e-9)
    wide = nn.Linear(3, 2, bias=False).double()
    x = randn(2, 3)
    found = embed_distill(x, t, projection=wide)
    assert float(found.detach()) == pytest.approx(float((t - wide(x)).norm(dim=1).mean().detach()))
    with pytest.raises(ValueError, match="a projection to the teacher's width"):
        embed_distill(x, t)
    with pytest.raises(ValueError, match="metric is 'l1'"):
        embed_distill(e, t, metric="l1")


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_near_embeddings_have_near_scores(pairs, dim, seed):
    q, d, a, b = (randn(pairs, dim, seed=4 * seed + i) for i in range(4))
    gap, bound = score_gap_bound((q, d), (a, b))
    assert bool((gap <= bound + 1e-9).all())
    gap, bound = score_gap_bound((q, b), (a, b))  # the teacher's documents
    torch.testing.assert_close(bound, (a - q).norm(dim=1) * b.norm(dim=1))
    assert bool((gap <= bound + 1e-9).all())


def test_made_queries_are_pieces_of_documents():
    documents = [torch.arange(1, 20), torch.tensor([25])]
    ids, real = made_queries(
        documents, 60, longest=6, dropout=0.3, generator=torch.Generator().manual_seed(0)
    )
    assert ids.shape[1] <= 6
    assert bool(real.any(1).all())
    for row, mask in zip(ids, real):
        words = row[mask].tolist()
        assert words == sorted(words)
        assert words == [25] or set(words) <= set(range(1, 20))
        assert words == [25] or words[-1] - words[0] < 6
    assert bool((ids[~real] == 0).all())
    whole, _ = made_queries(documents[1:], 2)
    assert whole.tolist() == [[25], [25]]
    with pytest.raises(ValueError, match="at least one token"):
        made_queries([torch.arange(0)], 1)
    with pytest.raises(ValueError, match="dropout 1"):
        made_queries(documents, 1, dropout=1.0)


# --- encoders -------------------------------------------------------------------------------------


def texts(seed=0, padded=True):
    ids = torch.randint(3, 32, (3, 7), generator=torch.Generator().manual_seed(seed))
    real = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        real[1, 4:] = False
        ids[1, 4:] = 0
    return ids, real


def test_padding_changes_no_embedding():
    encoder = tiny_encoder()
    ids, real = texts()
    model = DualEncoder(encoder, encoder)
    with torch.no_grad():
        found = model.encode_documents(ids, real)
        alone = model.encode_documents(ids[1:2, :4], real[1:2, :4])
        torch.testing.assert_close(found[1:2], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.encode_queries(ids, real), found)
        unit = DualEncoder(encoder, encoder, size=5, normalized=True).encode_queries(ids, real)
        assert unit.shape == (3, 5)
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(3))
    with pytest.raises(ValueError, match="no token that counts"):
        mean_pool(randn(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="size is 0"):
        DualEncoder(encoder, encoder, size=0)


@pytest.mark.parametrize("size", [None, 6])
def test_a_student_keeps_its_teachers_index(size):
    encoder = tiny_encoder()
    teacher = DualEncoder(encoder, encoder, size=size)
    student = inherit_documents(teacher, tiny_encoder(1, width=8, num_hidden_layers=1))
    ids, real = texts()
    with torch.no_grad():
        before = teacher.encode_documents(ids, real)
        torch.testing.assert_close(student.encode_documents(ids, real), before)
    search = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    target = teacher.encode_queries(ids, real).detach()
    losses = []
    for _ in range(5):
        search.zero_grad()
        loss = embed_distill(student.encode_queries(ids, real), target)
        loss.backward()
        search.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.no_grad():  # trained, and the index is what it was
        torch.testing.assert_close(student.encode_documents(ids, real), before)
    assert all(p.requires_grad for p in teacher.parameters())
    with pytest.raises(ValueError, match="the teacher is a BertModel"):
        inherit_documents(encoder, encoder)


def test_pairs_are_joined():
    found = join([[5, 6], [7]], [[8, 9, 10], [11]], start=1, separator=2)
    assert found["input_ids"].tolist() == [[1, 5, 6, 2, 8, 9, 10, 2], [1, 7, 2, 11, 2, 0, 0, 0]]
    assert found["attention_mask"].tolist()[1] == [1, 1, 1, 1, 1, 0, 0, 0]
    assert found["token_type_ids"].tolist()[0] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert found["query"].int().tolist()[0] == [0, 1, 1, 0, 0, 0, 0, 0]
    assert found["document"].int().tolist()[0] == [0, 0, 0, 0, 1, 1, 1, 0]
    short = join([[5, 6]], [[8, 9, 10]], start=1, separator=2, longest=7)
    assert short["input_ids"].tolist() == [[1, 5, 6, 2, 8, 9, 2]]
    with pytest.raises(ValueError, match="1 queries and 2 documents"):
        join([[5]], [[6], [7]], start=1, separator=2)
    with pytest.raises(ValueError, match="leaves no room"):
        join([[5, 6]], [[8]], start=1, separator=2, longest=5)


def test_a_cross_encoder_reads_both_at_once():
    pairs = join([[5, 6], [7]], [[8, 9, 10], [11]], start=1, separator=2)
    other = join([[5, 6], [7]], [[8, 9, 12], [11]], start=1, separator=2)
    pooled = CrossEncoder(tiny_encoder(), dual_pooled=True)
    plain = CrossEncoder(tiny_encoder())
    with torch.no_grad():
        for model in (pooled, plain):
            scores = model(pairs)
            assert scores.shape == (2,)
            assert float((model(other) - scores)[0].abs()) > 1e-6
            assert float((model(other) - scores)[1].abs()) == 0
        q, d = pooled.embeddings(pairs)
        torch.testing.assert_close(pooled(pairs), (q * d).sum(-1))
        moved, _ = pooled.embeddings(other)
        assert float((moved - q)[0].abs().max()) > 1e-6  # the query's vector has seen its document
    assert not any("head" in name for name, _ in pooled.named_parameters())


def test_scores_of_candidates():
    q, d = randn(3, 4), randn(3, 5, 4, seed=1)
    torch.testing.assert_close(pair_scores(q, d), torch.einsum("qd,qcd->qc", q, d))
