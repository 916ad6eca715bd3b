"""Distilled retrievers against the losses of sentence-transformers, to six digits."""

import pytest
import torch
from sentence_transformers import losses
from torch import nn

from effnb.inference.retrieval_distillation import (
    embed_distill,
    margin_mse,
    pair_scores,
    softmax_kl,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Nothing(nn.Module):
    """In the place of a model: the losses are given embeddings."""

    device = torch.device("cpu")

    def get_embedding_dimension(self):
        return 7


def embeddings(negatives):
    query, others = randn(5, 7), randn(5, 1 + negatives, 7, seed=1)
    return query, others, [query, *others.unbind(1)]


@pytest.mark.parametrize("negatives", [1, 4])
def test_margins_are_those_of_sentence_transformers(negatives):
    query, others, columns = embeddings(negatives)
    teacher = 3 * randn(5, 1 + negatives, seed=2)
    theirs = losses.MarginMSELoss(Nothing()).compute_loss_from_embeddings(columns, teacher)
    torch.testing.assert_close(
        margin_mse(pair_scores(query, others), teacher), theirs, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(("temperature", "teacher"), [(1.0, None), (2.0, None), (0.5, 3.0)])
def test_softmax_divergence_is_that_of_sentence_transformers(temperature, teacher):
    query, others, columns = embeddings(4)
    scores = 3 * randn(5, 5, seed=2)
    reference = losses.DistillKLDivLoss(
        Nothing(), student_temperature=temperature, teacher_temperature=teacher or temperature
    )
    theirs = reference.compute_loss_from_embeddings(columns, scores)
    ours = softmax_kl(
        pair_scores(query, others), scores, temperature=temperature, teacher_temperature=teacher
    )
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("metric", ["l2", "mse", "cosine"])
@pytest.mark.parametrize("width", [7, 9])
def test_embeddings_are_matched_as_sentence_transformers_does(metric, width):
    student, teacher = randn(5, 7), randn(5, width, seed=1)
    reference = losses.EmbedDistillLoss(
        Nothing(), distance_metric=metric, projection_dim=None if width == 7 else width
    )
    theirs = reference.compute_loss_from_embeddings([student], [teacher])
    ours = embed_distill(student, teacher, metric=metric, projection=reference.projection)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_gradients_agree_too():
    query, others, _ = embeddings(4)
    teacher = 3 * randn(5, 5, seed=2)
    grads = []
    for form in ("ours", "theirs"):
        q = query.clone().requires_grad_()
        if form == "ours":
            value = margin_mse(pair_scores(q, others), teacher)
        else:
            value = losses.MarginMSELoss(Nothing()).compute_loss_from_embeddings(
                [q, *others.unbind(1)], teacher
            )
        value.backward()
        grads.append(q.grad)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-6)
