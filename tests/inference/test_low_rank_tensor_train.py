"""Tensor trains of embeddings: exact at full rank, bounded below it, and counted right."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.evaluation import parameter_count, stored_bytes
from effnb.inference.low_rank import (
    TensorTrainEmbedding,
    TensorTrainHead,
    balanced_shape,
    dense,
    tensor_train,
    train_size,
    tt_svd,
)
from effnb.inference.quantization import rtn


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


folds = st.lists(st.integers(1, 5), min_size=2, max_size=4)


# --- trains ---------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(folds, st.integers(1, 4), st.integers(0, 3))
def test_at_full_rank_nothing_is_lost(shape, count, missing):
    """Also where the vectors are shorter than the fold and were filled up."""
    features = max(1, math.prod(shape) - missing)
    x = randn(count, features)
    train = tt_svd(x, 1000, shape)
    torch.testing.assert_close(train.vectors(), x, rtol=0, atol=1e-12)
    assert float(train.dropped.sum()) == 0


@settings(max_examples=30)
@given(folds, st.integers(1, 4), st.integers(1, 4))
def test_the_error_is_within_what_the_steps_dropped(shape, count, rank):
    x = randn(count, math.prod(shape))
    train = tt_svd(x, rank, shape)
    error = (train.vectors() - x).square().sum(1)
    assert bool((error <= train.dropped.sum(1) * (1 + 1e-9) + 1e-20).all())
    assert bool((error >= train.dropped.amax(1) * (1 - 1e-9) - 1e-20).all())
    assert sum(core[0].numel() for core in train.cores) == train_size(shape, rank)
    ranks = [core.shape[-1] for core in train.cores]
    assert ranks[-1] == 1 and all(r <= rank for r in ranks)


def test_two_directions_are_one_truncated_svd():
    x = randn(1, 6 * 8)
    train = tt_svd(x, 2, (6, 8))
    U, sigma, Vh = torch.linalg.svd(x.view(6, 8), full_matrices=False)
    torch.testing.assert_close(
        train.vectors().view(6, 8), U[:, :2] * sigma[:2] @ Vh[:2], rtol=0, atol=1e-12
    )
    torch.testing.assert_close(train.dropped[0, 0], sigma[2:].square().sum())


def test_a_vector_that_is_a_product_needs_rank_1():
    a, b, c = randn(4), randn(5, seed=1), randn(6, seed=2)
    x = torch.einsum("i,j,k->ijk", a, b, c).reshape(1, -1)
    train = tt_svd(x, 1, (4, 5, 6))
    torch.testing.assert_close(train.vectors(), x)
    assert train_size((4, 5, 6), 1) == 15


def test_noise_does_not_compress():
    """A random table loses most of itself: the method lives on structure in the embeddings."""
    x = randn(20, 256)
    train = tt_svd(x, 2, (4, 8, 8))
    assert float((train.vectors() - x).norm() / x.norm()) > 0.6


def test_sizes_by_hand():
    """4 x 8 x 8 at ranks 2 and 3: 1*4*2 + 2*8*3 + 3*8*1."""
    assert train_size((4, 8, 8), (2, 3)) == 8 + 48 + 24
    assert train_size((4, 8, 8), 100) == 4 * 4 + 4 * 8 * 8 + 8 * 8  # more than 256 at full rank


@pytest.mark.parametrize(
    ("features", "shape"),
    [(256, (4, 8, 8)), (192, (4, 6, 8)), (576, (8, 8, 9)), (768, (8, 8, 12)), (31, (2, 4, 4))],
)
def test_balanced_shapes(features, shape):
    assert balanced_shape(features) == shape


@settings(max_examples=30)
@given(st.integers(8, 2000), st.integers(2, 3))
def test_a_balanced_shape_holds_the_features_with_little_filling(features, ways):
    shape = balanced_shape(features, ways)
    assert len(shape) == ways and min(shape) >= 2
    assert features <= math.prod(shape) <= max(1.05 * features + 8, 16)


# --- models ---------------------------------------------------------------------------------------


def test_embedding_and_tied_head_become_trains(llama, ids):
    """Vocabulary 128, width 32 in 2 x 4 x 4: at rank 2, 4 + 16 + 8 = 28 numbers per token."""
    new = tensor_train(llama, 2)
    embedding, head = new.model.embed_tokens, new.lm_head
    assert isinstance(embedding, TensorTrainEmbedding) and isinstance(head, TensorTrainHead)
    assert train_size(balanced_shape(32), 2) == 28
    assert embedding.ranks == (2, 2)
    saved = 128 * (32 - 28)
    assert parameter_count(new) == parameter_count(llama) - saved
    assert stored_bytes(new) == stored_bytes(llama) - 4 * saved
    table = tt_svd(llama.model.embed_tokens.weight, 2).vectors().float()
    torch.testing.assert_close(embedding(ids), table[ids])
    torch.testing.assert_close(head(embedding(ids)), table[ids] @ table.T, rtol=1e-4, atol=1e-4)
    plain = dense(new)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, new(ids).logits, rtol=1e-4, atol=1e-4)


def test_at_full_rank_the_model_is_the_same_if_larger(llama, ids):
    new = tensor_train(llama, 99, always=True)
    assert parameter_count(new) > parameter_count(llama)
    with torch.no_grad():
        torch.testing.assert_close(new(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-4)


def test_where_nothing_is_saved_the_table_stays(llama):
    new = tensor_train(llama, 4)
    assert new.model.embed_tokens.weight is llama.model.embed_tokens.weight


def test_an_untied_head_is_left_alone(tiny_llama, ids):
    model = tiny_llama(tie_word_embeddings=False)
    new = tensor_train(model, 1)
    assert new.lm_head.weight is model.lm_head.weight
    assert isinstance(new.model.embed_tokens, TensorTrainEmbedding)


def test_only_token_embeddings_unless_asked():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=40, max_position_embeddings=16,
    )  # fmt: skip
    model = BertModel(config).eval()
    kinds = {
        name: isinstance(m, TensorTrainEmbedding)
        for name, m in tensor_train(model, 1).named_modules()
        if name.endswith("embeddings") and name.count(".") == 1
    }
    assert kinds == {
        "embeddings.word_embeddings": True,
        "embeddings.position_embeddings": False,
        "embeddings.token_type_embeddings": False,
    }
    both = tensor_train(model, 1, include=["*.word_embeddings", "*.position_embeddings"])
    assert isinstance(both.embeddings.position_embeddings, TensorTrainEmbedding)
    assert both(torch.tensor([[1, 2, 3]])).last_hidden_state.isfinite().all()


def test_trains_are_trained_and_the_original_stays(llama, ids):
    before = llama.model.embed_tokens.weight.clone()
    new = tensor_train(llama.to(torch.bfloat16), 2)
    assert new.model.embed_tokens.cores[0].dtype == torch.bfloat16
    new(ids).logits.float().sum().backward()
    assert all(core.grad is not None for core in new.model.embed_tokens.cores)
    assert torch.equal(llama.model.embed_tokens.weight, before.bfloat16())


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"rank": (2, 0)}, "rank is 0"),
        ({"rank": (2, 2, 2)}, "3 ranks were given; a fold of 3 directions has 2"),
        ({"rank": 1, "shape": (2, 4)}, r"the shape \(2, 4\) does not hold 32"),
        ({"rank": 1, "shape": (32,)}, "there must be two or more"),
        ({"rank": 1, "include": "nothing"}, "fits the pattern nothing"),
    ],
)
def test_bad_settings_are_one_sentence(llama, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        tensor_train(llama, **options)


def test_what_cannot_be_folded(llama):
    with pytest.raises(ValueError, match="7 features cannot be folded 3 ways"):
        balanced_shape(7)
    with pytest.raises(ValueError, match="tensor train already"):
        tensor_train(tensor_train(llama, 1), 1)
    with pytest.raises(ValueError, match="quantized already; factorise the original"):
        tensor_train(rtn(llama, 4), 1)

    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 3

    with pytest.raises(ValueError, match="0 is a Scaled that does more than look up"):
        tensor_train(nn.Sequential(Scaled(10, 32)), 1)
    with torch.no_grad():
        llama.model.embed_tokens.weight[3, 3] = torch.inf
    for rank in (1, 4):
        with pytest.raises(ValueError, match="1 entries that are NaN or infinite"):
            tensor_train(llama, rank)
